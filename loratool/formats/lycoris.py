"""`lycoris`: files of LyCORIS' own wrapper (SimpleTuner, old ai-toolkit LoKr).

A module is ``lycoris_`` and its dotted name in diffusers' model, every dot an underscore; slots are those of `kohya`,
of all kinds that LyCORIS has. The wrapper knows one model: text encoders are behind kohya's prefixes, ``lora_te_``
and so on, as other readers expect them. Written: one float32 scalar alpha a module; fused projections come apart, as
diffusers has them. Source: KohakuBlueleaf/LyCORIS f49d30d.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from loratool.adapter import Adapter, Loss
from loratool.architectures import Architecture
from loratool.architectures.base import Segment, Shape, Stored, flat
from loratool.formats import dialects, kohya
from loratool.formats.base import Evidence, Format
from loratool.formats.dialects import component_of, is_slot
from loratool.tensors import Tensor, write_safetensors
from loratool.update import Update

_PREFIX = "lycoris_"
_MAIN = re.compile(r"^(unet|transformer)$")


def sniff(evidence: Evidence) -> str | None:
    """By its prefix."""
    found = next((key for key in evidence.keys if key.startswith(_PREFIX) and is_slot(key)), None)
    return f"keys such as {found}" if found else None


def read(evidence: Evidence) -> Adapter:
    """Read such a file. Raises FormatError for what is malformed or unknown."""
    return dialects.read(evidence, "lycoris")


def losses(adapter: Adapter) -> list[Loss]:
    """What its names and slots cannot say."""
    return _said(adapter)[1]


def write(adapter: Adapter, path: Path) -> None:
    """Write such a file."""
    tensors, _, known = _said(adapter)
    write_safetensors(path, tensors, kohya.strings(adapter, tensors, known))


def _said(adapter: Adapter) -> tuple[dict[str, Tensor], list[Loss], Architecture | None]:
    adapter, known = dialects.referenced(adapter)
    tensors, lost = dialects.say(adapter, partial(_holder, adapter, known), fit=_fit)
    return tensors, lost, known


def _holder(adapter: Adapter, known: Architecture | None, reference: str, shape: Shape) -> Stored | None:
    """The name of a module: kohya's where it is a text encoder's."""
    component = component_of(reference)
    own = kohya.holder(adapter, known)(reference, shape)
    if own is None or not _MAIN.match(component):
        return own
    body = reference.removeprefix(f"{component}.")
    return Stored(_PREFIX + flat(body), (Segment(reference),))


def _fit(update: Update) -> Update | str:
    from loratool.kinds.rotation import SegmentOFT

    return SEGMENTS if isinstance(update, SegmentOFT) else update


SEGMENTS = "an OFT of the segments of a fused projection, which only sd-scripts has"
FORMAT = Format(
    name="lycoris",
    title="LyCORIS wrapper file",
    kinds=kohya.FORMAT.kinds,
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
)
