"""`cloneofsimo`: the first LoRA files of Stable Diffusion (cloneofsimo/lora, 2022; Replicate's "lora-training").

A safetensors file of ``<model>:<index>:up`` [o,r,*1] and ``:down`` [r,i,*k], ``<model>`` being ``unet`` or
``text_encoder``; the metadata has ``<model>``, a JSON list of the classes whose layers were adapted, and the value
``<embed>`` for each token, whose vector is a tensor of the token's name (``<s1>``). There is no alpha: scaling 1.

An index is no name but a place in the order in which the model of the time was walked: blocks down, up and then mid;
attentions before resnets; in a transformer block attn1, feed-forward (GEGLU), attn2; queries, keys, values, out; in
CLIP keys, values, queries, out. Shapes must agree with SD1 or SD2, or with the modules of a base that is given.

The oldest files are pickled lists [up, down, up, down, ...] of one model, with the classes of their time.
Read only. Source: cloneofsimo/lora d84074b, transformers' CLIPAttention; the order of the UNet proved by real files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from loratool.adapter import Adapter
from loratool.architectures import architecture
from loratool.architectures.base import Shape
from loratool.errors import FormatError
from loratool.formats import dialects
from loratool.formats.base import Evidence, Format
from loratool.tensors import SafetensorsFile
from loratool.update import trimmed

_KEY = re.compile(r"^([a-z_]+):(\d{1,9}):(up|down)$")
_COMPONENTS = ("unet", "text_encoder")
_ATTENTION, _GEGLU, _RESNET, _CLIP = "attention", "geglu", "resnet", "clip"
_CLASSES = {  # the classes of the time -> the layers inside them
    "CrossAttention": _ATTENTION,
    "Attention": _ATTENTION,
    "GEGLU": _GEGLU,
    "ResnetBlock2D": _RESNET,
    "CLIPAttention": _CLIP,
}
# layers in the order in which a block has them: (what a module ends in, the class around it)
_LAYERS = (
    *((f"attn1.{leaf}", _ATTENTION) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    ("ff.net.0.proj", _GEGLU),
    *((f"attn2.{leaf}", _ATTENTION) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    *((leaf, _RESNET) for leaf in ("conv1", "time_emb_proj", "conv2", "conv_shortcut")),
    *((f"self_attn.{leaf}_proj", _CLIP) for leaf in ("k", "v", "q", "out")),
)
_BLOCKS = ("down_blocks", "up_blocks", "mid_block", "text_model")
_LISTS = (  # the classes that the pickled lists were made of
    ("unet", ("CrossAttention",)),
    ("unet", ("CrossAttention", "GEGLU")),
    ("text_encoder", ("CLIPAttention",)),
    ("unet", ("CrossAttention", "GEGLU", "ResnetBlock2D")),
)


def sniff(evidence: Evidence) -> str | None:
    """By its keys, which nobody else has; a pickled list by its alternating factors."""
    found = next((key for key in evidence.keys if _KEY.match(key)), None)
    if found:
        return f"keys such as {found}"
    return "a list of factors, up and down by turns" if _is_list(evidence.file) else None


def read(evidence: Evidence) -> Adapter:
    """Read such a file. Raises FormatError for what is malformed or fits no known model."""
    file = _from_list(evidence) if _is_list(evidence.file) else evidence.file
    names = _named(evidence, file)
    return dialects.read(evidence, "cloneofsimo", lambda module, slot: (names.get(module, module), slot), file)


# ---------------------------------------------------------------- the order of modules


def ordered(modules: Iterable[str], component: str, classes: Iterable[str]) -> list[str]:
    """The modules of a component that lie in such classes, in the order in which they were walked."""
    wanted = {_CLASSES[name] for name in classes}
    places = ((place, name) for name in modules if name.startswith(f"{component}.") and (place := _place(name, wanted)))
    return [name for _, name in sorted(places)]


def _place(name: str, wanted: set[str]) -> tuple[int, ...] | None:
    """Where a module comes in the walk; None where it is in none of the classes."""
    leaf = next((n for n, (leaf, kind) in enumerate(_LAYERS) if kind in wanted and name.endswith(f".{leaf}")), None)
    block = next((n for n, block in enumerate(_BLOCKS) if f".{block}." in name), None)
    if leaf is None or block is None:
        return None
    numbers = [int(number) for number in re.findall(r"\.(\d{1,9})\.", name.removesuffix(_LAYERS[leaf][0]))]
    of_block = [] if _BLOCKS[block] == "mid_block" else numbers[:1]
    return (block, *of_block, "resnets" in name, *numbers[len(of_block) :], leaf)


# ---------------------------------------------------------------- names


def _named(evidence: Evidence, file: SafetensorsFile) -> dict[str, str]:
    """References by ``<model>:<index>``. Raises FormatError where the metadata or the shapes fit nothing."""
    stems: dict[str, dict[int, str]] = {}
    for key in file.tensors:
        if found := _KEY.match(key):
            stems.setdefault(found[1], {})[int(found[2])] = f"{found[1]}:{found[2]}"
    named: dict[str, str] = {}
    for component, indexed in stems.items():
        if component not in _COMPONENTS:
            raise FormatError(f"an unknown model {component!r}", file.path)
        if sorted(indexed) != list(range(len(indexed))):
            raise FormatError(f"the indices of {component} have gaps", file.path, "the file is incomplete")
        inner = [indexed[n] for n in range(len(indexed))]
        found_shapes = [_shape(file, stem) for stem in inner]
        names = _fitting(evidence, component, _classes(file, component), found_shapes)
        if names is None:
            what = f"{len(inner)} modules of {component} that fit no known model"
            raise FormatError(what, file.path, "--base tells the model it was trained on")
        named.update(zip(inner, names, strict=True))
    return named


def _classes(file: SafetensorsFile, component: str) -> list[str]:
    """The classes whose layers a component's modules are, as the metadata tells."""
    try:
        told = json.loads(file.metadata[component])
    except (KeyError, ValueError, RecursionError):
        told = None
    if not isinstance(told, list):
        what = f"the metadata does not say which layers of {component} were adapted"
        raise FormatError(what, file.path, "the order of its modules is unknown without it")
    for name in told:
        if name not in tuple(_CLASSES):
            raise FormatError(f"layers of {str(name)[:80]} were adapted, whose order is not known", file.path)
    return told


def _fitting(evidence: Evidence, component: str, classes: Sequence[str], shapes: list[Shape]) -> list[str] | None:
    """The names of modules of these shapes: those of the base, or of a known model whose shapes agree."""
    names = ordered(filter(None, map(dialects.located, evidence.modules)), component, classes)
    if names:
        return names if len(names) == len(shapes) else None
    for known in filter(None, map(architecture, ("sd1", "sd2"))):
        names = ordered(known.modules(), component, classes)
        if [trimmed(known.shapes()[name]) for name in names] == shapes:
            return names
    return None


def _shape(file: SafetensorsFile, stem: str) -> Shape:
    """The shape of a module's update; () where it has no two factors."""
    up, down = (file.tensors.get(f"{stem}:{half}") for half in ("up", "down"))
    if up is None or down is None:
        raise FormatError("half a pair", f"{file.path}: {stem}", "the file is incomplete")
    return trimmed((up.shape[0], *down.shape[1:])) if len(up.shape) > 1 and len(down.shape) > 1 else ()


# ---------------------------------------------------------------- pickled lists


def _is_list(file: SafetensorsFile) -> bool:
    """Whether a file is a list of factors: an even number of them, as many ranks as there are pairs."""
    listed = [file.tensors.get(str(n)) for n in range(len(file.tensors))]
    factors = [tensor.shape for tensor in listed if tensor and len(tensor.shape) > 1]
    if not factors or len(factors) < len(listed) or len(factors) % 2:
        return False
    return all(up[1] == down[0] for up, down in zip(factors[::2], factors[1::2], strict=True))


def _from_list(evidence: Evidence) -> SafetensorsFile:
    """A list as the later format names it. Raises FormatError where its shapes fit no known model."""
    file = evidence.file
    for component, classes in _LISTS:
        tensors = {f"{component}:{n // 2}:{_half(n)}": file.tensors[str(n)] for n in range(len(file.tensors))}
        named = replace(file, tensors=tensors, metadata={component: json.dumps(classes)})
        shapes = [_shape(named, f"{component}:{n}") for n in range(len(tensors) // 2)]
        if _fitting(evidence, component, classes, shapes):
            return named
    what = f"a list of {len(file.tensors) // 2} pairs that fit no known model"
    raise FormatError(what, file.path, "--base tells the model it was trained on")


def _half(position: int) -> str:
    return "down" if position % 2 else "up"


FORMAT = Format(
    name="cloneofsimo",
    title="cloneofsimo/lora file (2022), read only",
    kinds=("lora",),
    container="file",
    sniff=sniff,
    read=read,
)
