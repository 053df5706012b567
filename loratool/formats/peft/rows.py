"""What one row of the table of PEFT's tuners is, and the words in which rows are written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.errors import FormatError
from loratool.keys import Layout
from loratool.kinds.tuner import Fixed
from loratool.lazy import np
from loratool.tensors import Tensor
from loratool.update import Update

Slots = dict[str, Tensor]


@dataclass(frozen=True)
class Words:
    """The configuration, read with its types checked. ``where`` is named in errors.

    ``pool`` are numbered tensors of the whole adapter, ``modules`` is the number of its modules.
    """

    table: Mapping[str, Any]
    where: Path
    pool: tuple[Tensor, ...] = ()
    modules: int = 0

    def number(self, name: str, default: float) -> float:
        """A finite number. Raises FormatError."""
        value = self.table.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise FormatError(f"{name} is {value!r}, not a number", self.where)
        return value

    def count(self, name: str, default: int) -> int:
        """A whole number from 0 to 2^62. Raises FormatError."""
        value = self.number(name, default)
        if value != int(value) or not 0 <= value < 1 << 62:
            raise FormatError(f"{name} is {value!r}, not a whole number", self.where)
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false. Raises FormatError."""
        value = self.table.get(name)
        if value is not None and not isinstance(value, bool):
            raise FormatError(f"{name} is {value!r}, not true or false", self.where)
        return default if value is None else value

    def table_of(self, name: str) -> Mapping[str, Any]:
        """A table, empty where there is none. Raises FormatError."""
        value = self.table.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise FormatError(f"{name} is not a table", self.where)
        return value or {}

    def fits(self, pattern: str, module: str) -> bool:
        """Whether a regular expression is all of a module's name; bounded in time. Raises FormatError."""
        import regex

        try:
            return regex.fullmatch(pattern, module, timeout=1.0) is not None
        except (regex.error, TimeoutError) as error:
            raise FormatError(f"{pattern[:80]!r} cannot be matched: {error}", self.where) from None


@dataclass(frozen=True)
class Row:
    """One PEFT type.

    ``slots`` are (field, suffix) pairs of a module's tensors, ``shared`` (field, name) pairs of those that lie under
    ``base_model.``; ``optional`` fields may be missing. ``kinds`` are the classes of its updates. ``settings`` gives
    the fields of an update that stand in the configuration, ``told`` the configuration of some updates (ValueError
    where none says them all). ``gain`` are the fields that absorb what the delta was multiplied by. ``build`` makes the
    updates of a module by what is put behind its name, ``take`` gives their tensors again.
    """

    name: str
    kinds: tuple[type[Update], ...]
    slots: tuple[tuple[str, str], ...]
    shared: tuple[tuple[str, str], ...] = ()
    copied: tuple[tuple[str, str], ...] = ()  # (field, suffix): the shared tensors once more in each module,
    saves_copies: bool = False  # as raw dumps have them, and PEFT's own files of this type where set
    family: Callable[[str], str] = lambda module: ""  # which of several shared tensors is a module's: ".name"
    optional: frozenset[str] = frozenset()
    bare: str = ""  # why a file has no module's tensors, where PEFT can save it so
    gain: tuple[str, ...] = ()
    settings: Callable[[Words, Slots, str], dict[str, Any]] = lambda words, slots, module: {}
    told: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda updates: {}
    pool: str = ""  # the stem of numbered tensors under ``base_model.`` that every module gets
    drawn: Callable[[Words, int, int], Slots] | None = None  # what was not saved, for the widest [o,i]
    check: Callable[[Words], None] = lambda words: None
    agrees: Callable[[Mapping[str, Any]], bool] = lambda updates: True  # what PEFT has no other word for
    build: Callable[[Row, Words, Slots, str], dict[str, Update]] = lambda *of: {"": from_fields(*of)}
    take: Callable[[Row, Mapping[str, Update]], Slots] = lambda row, updates: fields_of(row, updates[""])
    layout: Layout = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = (*self.slots, *((COPY + name, suffix) for name, suffix in self.copied))
        object.__setattr__(self, "layout", Layout(pairs))

    @property
    def stems(self) -> tuple[str, ...]:
        """What the names of this type's tensors begin with: ``.vera_``."""
        return tuple(dict.fromkeys(suffix.split("_")[0] + "_" for _, suffix in self.slots))


COPY = "copy of "


def from_fields(row: Row, words: Words, slots: Slots, module: str) -> Update:
    """The update whose fields are the slots: of the first kind that has them all."""
    for kind in row.kinds:
        fields: Mapping[str, Any] = getattr(kind, "__dataclass_fields__")  # noqa: B009
        needed = {name for name, _ in (*row.slots, *row.shared) if name in fields and name not in row.optional}
        if needed <= slots.keys() <= fields.keys():
            told = {k: v for k, v in row.settings(words, slots, module).items() if k in fields}
            return kind(**slots, **told, **({"layer": "transposed"} if words.flag("fan_in_fan_out") else {}))
    raise FormatError(f"{', '.join(sorted(slots))} are not the tensors of a {row.name} module", hint="is it complete?")


def fields_of(row: Row, update: Update) -> Slots:
    """The stored tensors of an update by slot, what the delta was multiplied by in one of them."""
    given = ((name, getattr(update, name, None)) for name, _ in row.slots)
    return {
        name: gained(update, tensor) if name in row.gain else tensor for name, tensor in given if tensor is not None
    }


def gained(update: Update, tensor: Tensor) -> Tensor:
    """A tensor times what the delta of its update was multiplied by."""
    gain = update.gain if isinstance(update, Fixed) else 1.0
    return tensor if gain == 1.0 else Tensor.of((tensor.float() * gain).astype(np.float32))


# ---------------------------------------------------------------- a configuration made anew


def only(updates: Mapping[str, Any], of: Callable[[Any], Any]) -> Any:
    """The value that all updates have. Raises ValueError where they differ."""
    values = {of(update) for update in updates.values()}
    if len(values) != 1:
        raise ValueError("updates that one configuration cannot describe")
    return values.pop()


def patterned(updates: Mapping[str, Any], of: Callable[[Any], Any], name: str, pattern: str) -> dict[str, Any]:
    """The commonest value as ``name``, and by full name the modules that differ as ``pattern``."""
    return split({module: of(update) for module, update in updates.items()}, name, pattern)


def split(values: Mapping[str, Any], name: str, pattern: str) -> dict[str, Any]:
    """The commonest of some values by module as ``name``, the others as ``pattern``."""
    common = Counter(values.values()).most_common(1)[0][0]
    return {name: common, pattern: {module: value for module, value in values.items() if value != common}}


def transposed(updates: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the layers are transposed; PEFT corrects it by their class."""
    return {"fan_in_fan_out": any(update.layer == "transposed" for update in updates.values())}


def share(counts: Iterable[tuple[int, int]]) -> float:
    """A number whose products with the second of each pair, rounded down, give the first. Raises ValueError."""
    pairs = list(counts)
    if not all(size for _, size in pairs):
        raise ValueError("the shapes are not known")
    low, high = max(n / size for n, size in pairs), min((n + 1) / size for n, size in pairs)
    found = (low + high) / 2
    if any(int(size * found) != n for n, size in pairs):
        raise ValueError("updates that one configuration cannot describe")
    return float(found)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same."""
    return one is other or one.same_bytes(other)
