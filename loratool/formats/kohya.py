"""`kohya`: one safetensors file in the names of kohya-ss/sd-scripts and LyCORIS.

A module is its path, every dot an underscore, behind ``lora_unet_`` or ``lora_te_`` (``lora_te1_`` and
``lora_te2_`` where there are two text encoders); SD1 and SD2 have diffusers' names, SDXL those of LDM. The first
dot ends it; then comes the slot: ``.lora_down.weight`` [r,i,*k], ``.lora_up.weight`` [o,r,*1],
``.lora_mid.weight`` [r,r,*k] (Tucker), ``.alpha`` (none: the rank), ``.dora_scale`` ([o,*1]: of outputs,
[1,i,*1]: of inputs), ``.diff`` and ``.diff_b`` (whole deltas of weight and bias), ``.w_norm`` and ``.b_norm``
(the same of a norm). ``bundle_emb.*`` are textual inversions.

No rule of text turns names back: they are looked up in the lists of known models, then among the modules of the
base, then in templates of names. Written: one float32 scalar alpha a module, rank-stabilised ones times sqrt(r).
Source: kohya-ss/sd-scripts 48d368f, KohakuBlueleaf/LyCORIS f49d30d.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from loratool.adapter import Adapter, Loss
from loratool.architectures import Architecture, flatten, telling, unflatten
from loratool.architectures.base import Segment, Shape, Stored
from loratool.formats import dialects
from loratool.formats.base import Evidence, Format, kept
from loratool.formats.dialects import TABLE, is_slot
from loratool.formats.modules import Holder, Module, held_by
from loratool.tensors import Tensor, write_safetensors

_PREFIX = re.compile(r"^(lora_(unet|te\d?)|oft_unet|Hunyuan_video_I2V_lora)_")  # the last is of Tencent's trainer
_TOLD = {  # ss_base_model_version, and the network module of sd-scripts or musubi-tuner
    "sd1": ("sd_v1", "networks.lora"),
    "sd2": ("sd_v2", "networks.lora"),
    "sdxl": ("sdxl_base_v1-0", "networks.lora"),
    "sd3": ("sd3", "networks.lora_sd3"),
    "flux": ("flux1", "networks.lora_flux"),
    "chroma": ("chroma", "networks.lora_flux"),
    "lumina2": ("lumina2", "networks.lora_lumina"),
    "hunyuan-image-2.1": ("hunyuan-image-2.1", "networks.lora_hunyuan_image"),
    "anima": ("anima", "networks.lora_anima"),
    "wan": ("wan", "networks.lora_wan"),
}


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """kohya by its prefixes together with its suffixes."""
    found = next((key for key in evidence.keys if _PREFIX.match(key) and is_slot(key)), None)
    return f"keys such as {found}" if found else None


def read(evidence: Evidence) -> Adapter:
    """Read a kohya file. Raises FormatError for what is malformed, unknown or not supported."""
    return dialects.read(evidence, "kohya")


# ---------------------------------------------------------------- writing


def losses(adapter: Adapter) -> list[Loss]:
    """What kohya's names and slots cannot say."""
    return _said(adapter)[1]


def write(adapter: Adapter, path: Path) -> None:
    """Write a kohya file."""
    tensors, _, known = _said(adapter)
    write_safetensors(path, tensors, strings(adapter, tensors, known))


def _said(adapter: Adapter) -> tuple[dict[str, Tensor], list[Loss], Architecture | None]:
    """The tensors of a file, what cannot be said, and the architecture whose names are used."""
    adapter, known = dialects.referenced(adapter)
    tensors, lost = dialects.say(adapter, holder(adapter, known), partial(_spelled, adapter))
    return tensors, lost, known


def holder(adapter: Adapter, known: Architecture | None) -> Holder:
    """What holds a module, by kohya's names."""
    return held_by(known, "kohya") if known else partial(_flattened, adapter)


def _spelled(adapter: Adapter, module: Module) -> str:
    """The name of a module: sd-scripts' own OFT has a prefix of its own."""
    from loratool.kinds.rotation import OFT, SegmentOFT

    own = all(adapter.spelling(target).startswith("oft_unet_") for target in module.targets)
    rotated = isinstance(module.update, SegmentOFT) or (own and isinstance(module.update, OFT))
    return re.sub("^lora_unet_", "oft_unet_", module.name) if rotated else module.name


def _flattened(adapter: Adapter, reference: str, shape: Shape) -> Stored | None:
    """kohya's name of a module of a UNet or CLIP of no known size; None where it could not be read again."""
    two = any(other.startswith("text_encoder_2.") for other in adapter.updates)
    try:
        spelled = flatten(reference, "sdxl" if two else None)
    except ValueError:
        return None
    known = unflatten(spelled) == reference or adapter.spellings.get(reference) == spelled
    return Stored(spelled, (Segment(reference),)) if known else None


def strings(adapter: Adapter, tensors: Mapping[str, Tensor], known: Architecture | None) -> dict[str, str]:
    """The metadata: the source's, and what readers look for where it is not there."""
    slots = [(hit[1], tensor) for key, tensor in tensors.items() if (hit := dialects.WRITTEN.split(key))]
    base, network = _TOLD.get(known.name if known else "", ("", "networks.lora"))
    plain = {slot for slot, _ in slots} <= {"down", "up", "alpha"}
    found = {
        "ss_network_module": network if plain else "lycoris.kohya",
        "ss_network_dim": _common(str(tensor.shape[0]) for slot, tensor in slots if slot == "down"),
        "ss_network_alpha": _common(f"{tensor.item():g}" for slot, tensor in slots if slot == "alpha"),
        "ss_base_model_version": base,
    }
    strings = {key: value for key, value in adapter.metadata.strings.items() if key != TABLE}
    strings.update({key: value for key, value in found.items() if value and key not in strings})
    return kept(strings | telling(strings, known), tensors)


def _common(values: Iterable[str]) -> str:
    """The value of all, kohya's word where they differ, nothing where there are none."""
    distinct = set(values)
    return "Dynamic" if len(distinct) > 1 else "".join(distinct)


FORMAT = Format(
    name="kohya",
    title="kohya-ss/sd-scripts and LyCORIS file",
    kinds=("lora", "dora", "loha", "lokr", "glora", "ia3", "oft", "boft", "full", "norm"),
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
)
