"""Layouts: (module, slot) <-> tensor name, one table read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from loratool.errors import FormatError
from loratool.tensors import Tensor


@dataclass(frozen=True)
class Layout:
    """How a dialect names the tensors of a module.

    ``slots`` are (slot, suffix) pairs, one-to-one: what is written. ``aliases`` are further suffixes that are
    read. Raises ValueError when a suffix stands twice.
    """

    slots: tuple[tuple[str, str], ...]
    aliases: tuple[tuple[str, str], ...] = ()
    suffixes: Mapping[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table = dict(self.slots)
        suffixes = [suffix for _, suffix in (*self.slots, *self.aliases)]
        if len(table) < len(self.slots) or len(set(suffixes)) < len(suffixes):
            raise ValueError(f"a slot or a suffix stands twice in {self.slots + self.aliases}")
        object.__setattr__(self, "suffixes", table)

    @cached_property
    def _longest_first(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted((*self.slots, *self.aliases), key=lambda pair: -len(pair[1])))

    def key(self, module: str, slot: str) -> str:
        """The tensor name of a module's slot."""
        return module + self.suffixes[slot]

    def split(self, key: str) -> tuple[str, str] | None:
        """(module, slot) of a tensor name, None where no suffix fits."""
        for slot, suffix in self._longest_first:
            if key.endswith(suffix) and len(key) > len(suffix):
                return key[: -len(suffix)], slot
        return None

    def group(
        self, tensors: Mapping[str, Tensor], normalise: Callable[[str], str] = lambda key: key, where: object = ""
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Tensors by module and slot, and those that no suffix fits.

        ``normalise`` is applied to each key first. Raises FormatError when two keys mean the same slot.
        """
        modules: dict[str, dict[str, Tensor]] = {}
        rest: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            found = self.split(normalise(key))
            if found is None:
                rest[key] = tensor
                continue
            slots = modules.setdefault(found[0], {})
            if found[1] in slots:
                raise FormatError(f"two tensors for {found[1]} of one module", f"{where}: {key}" if where else key)
            slots[found[1]] = tensor
        return modules, rest


def require_pair(module: str, slots: Iterable[str], where: object) -> None:
    """Raise FormatError when a module has only one half of its down / up pair."""
    have = set(slots)
    for one, other in (("down", "up"), ("up", "down")):
        if one in have and other not in have:
            raise FormatError(f"half a pair: {module} has {one} but no {other}", where, "the file is incomplete")
    if "down" not in have:
        raise FormatError(f"{module} has {', '.join(sorted(have))} but no factors", where, "the file is incomplete")
