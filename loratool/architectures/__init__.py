"""Name tables of known model families, as data; tables are built when first used.

``ARCHITECTURES`` is all there is: a new family is a file that makes an ``Architecture``, and an entry here.

What those who read and write adapters need:

- `identify(modules)`: the architecture of an adapter, from module names in any spelling and their shapes.
- ``arch.pieces(name, shape)``: the reference modules that a stored module is, each with its rows of it: one piece of
  all rows for a plain module, three for a fused qkv, one of two ranges where halves are swapped; none for a name that
  is not known. `update.rows` takes the update apart.
- ``arch.stored(reference, world)``: the module, in the names of ``kohya``, ``comfy``, ``native`` or ``diffusers``,
  that holds a reference module, and the segments (references, or equal parts of one) whose rows it stacks;
  ``heights`` gives their rows, also of segments that an adapter lacks. `update.stack` puts the updates together.
- ``arch.checkpoint(tensors)``: the places of reference parameters in a single file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from loratool.architectures.base import Architecture, Piece, Row, Segment, Shape, Slot, Stored, agree
from loratool.architectures.base import split as _split
from loratool.architectures.cogvideox import COGVIDEOX
from loratool.architectures.flux import CHROMA, FLUX
from loratool.architectures.flux2 import FLUX2
from loratool.architectures.hidream import HIDREAM
from loratool.architectures.hunyuan import HUNYUAN_IMAGE, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from loratool.architectures.ltx import LTX, LTX2
from loratool.architectures.lumina import LUMINA2, Z_IMAGE
from loratool.architectures.others import ANIMA, AURAFLOW, FLUX3, KREA2, MOCHI, PIXART, SANA
from loratool.architectures.qwen_image import QWEN_IMAGE, QWEN_IMAGE_21
from loratool.architectures.rows import Numbers
from loratool.architectures.sd import SD1, SD2, SDXL, flatten, targets, unflatten
from loratool.architectures.sd3 import SD3
from loratool.architectures.table import NameTable
from loratool.architectures.transformer import MAINS, Transformer, spelled
from loratool.architectures.wan import WAN

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "NameTable",
    "Piece",
    "Row",
    "Segment",
    "Slot",
    "Stored",
    "architecture",
    "flatten",
    "identify",
    "identify_checkpoint",
    "identify_names",
    "targets",
    "telling",
    "told",
    "unflatten",
]

UNETS: tuple[Architecture, ...] = (SD1, SD2, SDXL)
# of several that fit alike, the first is meant
TRANSFORMERS: tuple[Transformer, ...] = (
    *(FLUX, CHROMA, SD3, WAN, QWEN_IMAGE, Z_IMAGE, LUMINA2, FLUX2),
    *(HUNYUAN_VIDEO, HUNYUAN_IMAGE, HUNYUAN_VIDEO_15, LTX, LTX2, COGVIDEOX, HIDREAM),
    *(MOCHI, PIXART, AURAFLOW, SANA, KREA2, ANIMA, FLUX3, QWEN_IMAGE_21),
)
ARCHITECTURES: tuple[Architecture, ...] = (*UNETS, *TRANSFORMERS)

# how metadata calls them, the longer beginnings first
_TOLD = (
    ("flux-2", "flux2"),
    ("flux-3", "flux3"),
    ("flux3", "flux3"),
    ("flux2", "flux2"),
    ("flux", "flux"),
    ("chroma", "chroma"),
    ("sd3", "sd3"),
    ("stable-diffusion-3", "sd3"),
    ("lumina", "lumina2"),
    ("hunyuan-image", "hunyuan-image-2.1"),
    ("hunyuan-video-1.5", "hunyuan-video-1.5"),
    ("hunyuan", "hunyuan-video"),
    ("framepack", "hunyuan-video"),
    ("wan", "wan"),
    ("qwen-image-2.1", "qwen-image-2.1"),
    ("qwen", "qwen-image"),
    ("z-image", "z-image"),
    ("zimage", "z-image"),
    ("anima", "anima"),
    ("hidream", "hidream"),
    ("ltx2", "ltx2"),
    ("ltx-2", "ltx2"),
    ("ltx", "ltx"),
)
_MODELSPEC = "modelspec.architecture"
_OTHERS = ("first_stage_model.", "vae.", "model_ema.", "cond_stage_model.", "conditioner.", "text_encoders.")


def architecture(name: str) -> Architecture | None:
    """The architecture called ``name`` ("sd1"), or None."""
    return next((known for known in ARCHITECTURES if known.name == name), None)


def identify(modules: Mapping[str, Shape], hint: str | None = None) -> Architecture | None:
    """The architecture that an adapter is for, or None if it is for none that is known.

    ``modules`` are raw module names, in any spelling that ``Architecture.pieces`` reads, with the shapes
    (out, in, ...) of their updates; ``()`` where a shape is not known. ``hint`` (see `told`) decides between families
    that know as many of the names, and what a text encoder alone is for.
    """
    found = _transformer(modules, 0.75, hint)
    if found is None and isinstance(hinted := architecture(hint or ""), Transformer) and modules:
        found = hinted if all(map(hinted.knows, modules)) else None
    return found or _unet(modules)


def told(strings: Mapping[str, str]) -> str | None:
    """The name of the architecture that the metadata of kohya's trainers and their kin tells, or None."""
    for key in (_MODELSPEC, "ss_base_model_version"):
        words = strings.get(key, "").lower().replace("_", "-")
        own = words.partition("/")[0]
        if name := own if architecture(own) else next((name for start, name in _TOLD if words.startswith(start)), None):
            return name
    return None


def telling(strings: Mapping[str, str], known: Architecture | None) -> dict[str, str]:
    """What an adapter's metadata must say besides for `told` to know a transformer: its names may be others' too.

    A lone ``final_layer.linear`` is FLUX's as well as Z-Image's. Source: Stability AI's ModelSpec.
    """
    if not isinstance(known, Transformer) or told(strings) == known.name:
        return {}
    return {_MODELSPEC: f"{known.name}/lora"}


def _transformer(modules: Mapping[str, Shape], share: float, hint: str | None = None) -> Transformer | None:
    """The diffusion transformer whose names most of these are, at least that share of them; then whose shapes."""
    bodies: dict[tuple[str, str], Counter[Numbers]] = {}
    for name in map(spelled, modules):
        bodies.setdefault((name.role, name.body[0]), Counter())[name.body[1]] += 1
    mains = {body for role, body in bodies if role in MAINS}
    counts = {known: known.known(bodies) for known in TRANSFORMERS if not mains.isdisjoint(known.table.read)}
    most = max(counts.values(), default=0)
    if not most or most < share * len(modules):
        return None
    likely = {known.name: known for known, count in counts.items() if count == most}
    if hint in likely:
        return likely[hint]
    return max(likely.values(), key=lambda known: known.evidence(modules)) if len(likely) > 1 else likely.popitem()[1]


def _unet(modules: Mapping[str, Shape]) -> Architecture | None:
    """What fits most modules by name and shape wins; then what also has the same number of axes (proj_in is a
    convolution in 1.x only); then what would be written the same way (LDM names: XL); then the first.
    """
    if not any(map(_split, modules)):
        return None
    resolved = {known: _resolved(known, modules) for known in UNETS}
    evidence = {known: _evidence(known, modules, resolved[known]) for known in UNETS}
    best = max(UNETS, key=lambda known: evidence[known])
    fitting = evidence[best][0]
    unets = sum(name.startswith("unet.") for name in resolved[best].values())
    strangers = len(modules) - len(resolved[best])
    # The text encoders alone are shared with other families (CLIP of FLUX): the rest must not be foreign.
    return best if 2 * fitting > len(modules) and strangers <= unets else None


def identify_names(modules: Iterable[str]) -> Architecture | None:
    """The architecture whose tables know every one of these names, whatever the widths: for narrow test models.

    Where several do, the one that would write most of the names just so (LDM names: XL).
    """
    names = list(modules)
    if known := _transformer(dict.fromkeys(names, ()), 1.0):
        return known
    knowing = [known for known in UNETS if names and all(map(known.resolve, names))]
    return max(knowing, key=lambda known: sum(n in known.kohya().backward for n in names), default=None)


def identify_checkpoint(tensors: Mapping[str, Shape]) -> Architecture | None:
    """The architecture of a single-file checkpoint, by tensor names and shapes, or None.

    A UNet of other widths is known by its names, if it has every name of the UNet and no other; a transformer by
    nearly all of its names.
    """
    weights = {name.removesuffix(".weight"): shape for name, shape in tensors.items() if name.endswith(".weight")}
    mains = {name: shape for name, shape in weights.items() if not name.startswith(_OTHERS) and len(shape) > 1}
    if known := _transformer(mains, 0.9):
        return known
    if not any("diffusion_model." in name or name.startswith("input_blocks.") for name in tensors):
        return None
    counts = [(*_slots_fitting(known, tensors), known) for known in UNETS]
    fitting, present, best = max(counts, key=lambda count: count[0])
    if 2 * fitting > present:
        return best
    whole = [(present, known) for _, present, known in counts if _has_unet(known, tensors)]
    return max(whole, key=lambda count: count[0])[1] if whole else None


def _has_unet(known: Architecture, tensors: Mapping[str, Shape]) -> bool:
    """Whether the weights of the UNet are there by name, all of them and no others."""
    slots = known.checkpoint(tensors)
    unet = {slots[f"{name}.weight"].tensor for name in known.modules() if name.startswith("unet.")}
    prefix = min(unet).partition("input_blocks.")[0]
    there = {name for name in tensors if prefix and name.startswith(prefix) and name.endswith(".weight")}
    # whether a block needs a skip connection is a matter of its widths
    return there <= unet and all(".skip_connection." in name for name in unet - there)


def _resolved(known: Architecture, modules: Mapping[str, Shape]) -> dict[str, str]:
    resolved = ((raw, known.resolve(raw)) for raw in modules)
    return {raw: name for raw, name in resolved if name}


def _evidence(known: Architecture, modules: Mapping[str, Shape], resolved: Mapping[str, str]) -> tuple[int, int, int]:
    """How many modules fit by name and shape; how many of these have the very shape; and the very name."""
    shapes, kohya = known.shapes(), known.kohya().forward
    fitting = [(raw, name) for raw, name in resolved.items() if agree(modules[raw], shapes[name])]
    exact = sum(modules[raw] == shapes[name] for raw, name in fitting)
    return len(fitting), exact, sum(raw == kohya[name] for raw, name in fitting)


def _slots_fitting(known: Architecture, tensors: Mapping[str, Shape]) -> tuple[int, int]:
    """How many weights of ``tensors`` have the expected shape, and how many there are by name."""
    slots = known.checkpoint(tensors)
    expected = ((slots[f"{name}.weight"], shape) for name, shape in known.shapes().items())
    pairs = [(tensors[slot.tensor], slot.stored(shape)) for slot, shape in expected if slot.tensor in tensors]
    return sum(found == shape for found, shape in pairs), len(pairs)
