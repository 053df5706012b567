"""`comfyui`: what ComfyUI saves, and what it reads best.

Read: ``diffusion_model.<module>`` in the names of the original repository, text encoders behind
``text_encoders.<name>.transformer.``, with any suffix; ComfyUI's own extraction saves ``.lora_up.weight`` and
``.lora_down.weight`` without alpha, ``.diff`` and ``.diff_b``; its patches ``.set_weight`` (a value that replaces the
base's) and ``.reshape_weight`` (the shape to which the base is padded with zeros first) are of converted control LoRAs.

Written: UNets under `kohya`'s names, transformers behind ``diffusion_model.`` with ``.lora_A.weight``,
``.lora_B.weight`` and ``.alpha`` unless it is the rank, other kinds in LyCORIS' slots, magnitudes as [o,1]. ComfyUI
ignores alphas in metadata, takes a constraint of OFT for another number, drops its rescale, and has no (IA)3: such are
losses. Source: ComfyUI `comfy/lora.py`, `comfy/weight_adapter`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from loratool.adapter import Adapter, Loss
from loratool.architectures import Architecture, telling
from loratool.architectures.base import Segment, Shape, Stored
from loratool.formats import dialects, kohya
from loratool.formats.base import Evidence, Format, kept
from loratool.formats.dialects import NATIVE, TABLE, WRITTEN, is_slot
from loratool.formats.lycoris import SEGMENTS
from loratool.formats.modules import held_by
from loratool.keys import Layout
from loratool.lazy import np
from loratool.tensors import Tensor, write_safetensors
from loratool.update import Dense, Sum, Update

_PREFIX = re.compile(r"^(diffusion_model|text_encoders|model\.diffusion_model)\.")
_CONTROL = 128  # channels of latents and of a control image
_NAMES = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
DOTTED = Layout(
    slots=(*((slot, _NAMES.get(slot, suffix)) for slot, suffix in WRITTEN.slots), ("set_weight", ".set_weight"))
)


def sniff(evidence: Evidence) -> str | None:
    """By its prefixes."""
    found = next((key for key in evidence.keys if _PREFIX.match(key) and is_slot(key)), None)
    return f"keys such as {found}" if found else None


def read(evidence: Evidence) -> Adapter:
    """Read such a file. Raises FormatError for what is malformed or unknown."""
    return dialects.read(evidence, "comfyui")


def losses(adapter: Adapter) -> list[Loss]:
    """What ComfyUI does not load, or takes for something else."""
    return _said(adapter)[1]


def write(adapter: Adapter, path: Path) -> None:
    """Write such a file."""
    tensors, _, known = _said(adapter)
    if _flattens(adapter, known):
        write_safetensors(path, tensors, kohya.strings(adapter, tensors, known))
        return
    strings = {key: value for key, value in adapter.metadata.strings.items() if key != TABLE}
    write_safetensors(path, tensors, kept(strings | telling(strings, known), tensors))


def _said(adapter: Adapter) -> tuple[dict[str, Tensor], list[Loss], Architecture | None]:
    adapter, known = dialects.referenced(adapter)
    if _flattens(adapter, known):
        return *dialects.say(adapter, kohya.holder(adapter, known), fit=_fit), known
    holder = held_by(known, "comfy") if known else partial(_as_spelled, adapter)
    tensors, lost = dialects.say(adapter, holder, layout=DOTTED, fit=_fit, locate=None if known else str)
    told = {key: tensor for key, tensor in tensors.items() if not _is_the_rank(key, tensors)}
    return {**told, **_padded(tensors)}, lost, known


def _is_the_rank(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is an alpha that says what its absence does, which more readers take."""
    down = tensors.get(key.removesuffix(".alpha") + DOTTED.suffixes["down"])
    return key.endswith(".alpha") and down is not None and tensors[key].item() == down.shape[0]


def _flattens(adapter: Adapter, known: Architecture | None) -> bool:
    """Whether kohya's names are written: of UNets, known or not."""
    return "unet" in known.components if known else not any(map(_is_native, map(adapter.spelling, adapter.updates)))


def _is_native(spelling: str) -> bool:
    return spelling.startswith(NATIVE)


def _as_spelled(adapter: Adapter, reference: str, shape: Shape) -> Stored | None:
    """The source's own name of a module of a model that no table knows, where it is ComfyUI's."""
    spelling = adapter.spelling(reference)
    return Stored(spelling, (Segment(reference),)) if _is_native(spelling) else None


def _padded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The shape to which a base is padded for FLUX's control LoRAs, whose first layer takes twice the channels."""
    halves = [tensors.get(f"diffusion_model.img_in.{half}") for half in ("lora_B.weight", "lora_A.weight")]
    shape = [half.shape[n] for n, half in enumerate(halves) if half]
    told = Tensor.of(np.array(shape, np.int64))
    return {"diffusion_model.img_in.reshape_weight": told} if shape[1:] == [_CONTROL] else {}


def _fit(update: Update) -> Update | str:
    """An update as ComfyUI takes it, or why it does not, though the slots have it."""
    from loratool.formats.said import whole
    from loratool.kinds.rescale import IA3
    from loratool.kinds.rotation import BOFT, OFT, SegmentOFT
    from loratool.kinds.sparse import Sparse

    if isinstance(update, Sum) and any(isinstance(part, Sparse) for part in update.parts):
        return Dense(whole(update))  # single entries are not read
    if isinstance(update, IA3):
        return "an (IA)3, which ComfyUI does not have"
    if isinstance(update, SegmentOFT):
        return SEGMENTS
    if isinstance(update, OFT | BOFT) and update.alpha:
        return "a constrained OFT: ComfyUI takes its alpha for another number"
    return "an OFT with rescale, which ComfyUI drops" if isinstance(update, OFT | BOFT) and update.rescale else update


FORMAT = Format(
    name="comfyui",
    title="ComfyUI file",
    kinds=("lora", "dora", "loha", "lokr", "glora", "oft", "boft", "full", "norm"),
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
)
