"""What each format says of each kind of update: the table behind ``loratool formats`` and the README's.

`exact`: read, and written as it is. `rewritten`: not a kind of the format's own, but written exactly as another (a LoRA
of higher rank, or the whole difference). `partly`: some forms of it are written, others refused, such as LyCORIS' OFT
where only PEFT's is known. `read`: read only. `no`: refused (exit code 5); ``--allow-loss`` leaves it out.
tests/test_formats_table.py puts every kind through every format and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from loratool.formats import FORMATS, raw
from loratool.formats.base import Format

KINDS = tuple(dict.fromkeys(kind for format in FORMATS for kind in format.kinds))
"""Every kind that some format has words for."""


class Beyond(NamedTuple):
    """What a format says of kinds that are not, or not wholly, its own."""

    rewritten: tuple[str, ...] = ()
    partly: tuple[str, ...] = ()


# exactly a LoRA, of whatever rank
_LORAS = (
    *("loha", "adalora", "vera", "pvera", "delora", "vblora", "randlora", "gralora", "miss", "bone", "unilora"),
    "tinylora",
)
_WHOLE = (*_LORAS, "fourierft", "waveft", "shira", "supertuning", "c3a", "beft")  # a difference that needs no base
_BEYOND: Mapping[str, Beyond] = {
    **dict.fromkeys(("gguf", "mlx", "torchtune", "litgpt", "mistral", "tinker"), Beyond(_LORAS, ("lokr",))),
    **dict.fromkeys(("diffusers", "loralib"), Beyond(_LORAS, ("lokr",))),
    "onnx-adapter": Beyond((*_LORAS, "beft"), ("lokr",)),
    **dict.fromkeys(("kohya", "lycoris", "comfyui"), Beyond(_WHOLE, ("glora", "oft", "boft"))),
    "peft": Beyond((), ("glora", "ia3", "oft", "boft")),
}


def detail(format: Format) -> dict[str, str]:
    """What a format says of each kind: exact, rewritten, partly, read or no."""
    return {kind: _said(format, kind, _BEYOND.get(format.name, Beyond())) for kind in KINDS}


def kinds(format: Format) -> tuple[str, ...]:
    """The kinds that a format has words for: raw carries whatever there is."""
    return KINDS if format is raw.FORMAT else format.kinds


def _said(format: Format, kind: str, beyond: Beyond) -> str:
    own = kind in kinds(format)
    if not format.writes:
        return "read" if own else "no"
    if kind in beyond.partly:
        return "partly"
    return "exact" if own else "rewritten" if kind in beyond.rewritten else "no"
