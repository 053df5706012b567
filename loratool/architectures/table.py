"""One-to-one name tables: the only way a name is ever translated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class NameTable:
    """Pairs (reference name, other name), usable in both directions.

    Raises ``ValueError``, naming the collision, unless the pairs are one-to-one.
    """

    pairs: tuple[tuple[str, str], ...]
    forward: Mapping[str, str] = field(init=False, repr=False, compare=False)
    backward: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward", _unique(self.pairs))
        object.__setattr__(self, "backward", _unique((other, name) for name, other in self.pairs))


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    table: dict[str, str] = {}
    for name, other in pairs:
        if name in table:
            raise ValueError(f"names are not one-to-one: {name!r} is both {table[name]!r} and {other!r}")
        table[name] = other
    return table
