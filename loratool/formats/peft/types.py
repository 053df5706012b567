"""PEFT's types beside LoRA, by name: the file with the row of each, and those that are no change of weights.

The rows stand where the kinds of update do, and are imported when one of them is met: a LoRA needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratool.formats.peft.rows import Row

HOMES: Mapping[str, tuple[str, ...]] = {
    "factored": (
        *("ADALORA", "VERA", "PVERA", "DELORA", "VBLORA", "RANDLORA", "GRALORA", "MISS", "BONE", "UNILORA"),
        "TINYLORA",
    ),
    "composed": ("FOURIERFT", "WAVEFT", "SHIRA", "SUPERTUNING", "C3A"),
    "based": ("HRA", "HIRA", "ROAD", "GLORA", "DEFT", "OSF", "FROD", "PEANUT", "LN_TUNING", "BEFT"),
    "common": ("TRAINABLE_TOKENS", "IA3", "LOHA", "LOKR", "OFT", "BOFT"),
}
"""The types by the file of this folder that has their rows."""

NAMES: tuple[str, ...] = tuple(name for names in HOMES.values() for name in names)

NOT_A_WEIGHT_CHANGE = frozenset(
    [
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "ADAPTION_PROMPT",
        "CPT",
        "CARTRIDGE",
        "XLORA",
        "POLY",
        "LILY",
    ]
)
REFUSED: Mapping[str, str] = {
    "PSOFT": "it turns singular vectors of the base, whose signs are a matter of the library that finds them",
    "SHADOW": "a second model runs beside the base, it is no change of weights",
    "ADAMSS": "which outputs its blocks stand for is found by clustering the base, and not in the file",
}


@cache
def rows_of(home: str) -> Mapping[str, Row]:
    """The rows of one file by their names."""
    found: tuple[Row, ...] = import_module(f"loratool.formats.peft.{home}").ROWS
    return {row.name: row for row in found}


def row_named(name: str) -> Row | None:
    """The row of a type; None for LORA, and for what is not known."""
    home = next((home for home, names in HOMES.items() if name in names), None)
    return None if home is None else rows_of(home)[name]


def rows() -> tuple[Row, ...]:
    """All rows."""
    return tuple(row for home in HOMES for row in rows_of(home).values())
