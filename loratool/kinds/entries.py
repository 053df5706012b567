"""An update of one entry of a stack of weights, or of some of its rows or columns: an expert in a stack [E,d1,d2]."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from loratool.errors import FormatError
from loratool.tensors import Array
from loratool.update import Additive, Around, Load, Prepared, Update, namespace


@dataclass(frozen=True)
class Entry(Around):
    """What ``inner`` does to rows (``axis`` 0) or columns (1) start, start + step, ... below stop of a matrix [d1,d2].

    The matrix is one entry of a stack, so the shape is [1,d1,d2]; the rest of it stays. Factors are loaded when the
    entry is reached: a stack has hundreds of them. Raises FormatError where the shapes do not fit.
    """

    makes = 0  # until the entry is reached
    inner: Update
    rows: int
    columns: int
    axis: int
    start: int
    stop: int
    step: int = 1

    def __post_init__(self) -> None:
        lines = len(range(self.start, self.stop, self.step))
        wanted = (lines, self.columns) if self.axis == 0 else (self.rows, lines)
        if self.start < 0 or self.stop > (self.columns if self.axis else self.rows) or self.inner.shape != wanted:
            raise FormatError(f"an update of shape {list(self.inner.shape)} for {list(wanted)} of a stack's entry")

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, self.rows, self.columns)

    @property
    def lines(self) -> tuple[int, int, int, int]:
        """Which part of the matrix it changes."""
        return self.axis, self.start, self.stop, self.step

    @property
    def needs_base(self) -> bool:
        return self.inner.needs_base

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        lines = slice(self.start, self.stop, self.step)
        region: tuple[Any, ...] = (slice(None), lines) if self.axis else (lines,)

        def delta(start: int, stop: int, base: Array | None) -> Array:
            prepared = self.inner.prepare(load, strength)
            own = None if base is None else base.reshape(self.rows, self.columns)[region]
            if prepared.scan is not None:
                prepared.scan([(0, len(own), own)])  # type: ignore[arg-type]  # such kinds are given the base
            value = prepared.delta(0, self.inner.shape[0], own)
            found = namespace(value).zeros((self.rows, self.columns), dtype=value.dtype, **_device(value))
            found[region] = value
            return found.reshape(1, -1)

        return Prepared(delta)


def _device(value: Array) -> dict[str, Any]:
    """Where torch keeps an array; numpy has one place only."""
    return {"device": value.device} if hasattr(value, "is_cuda") else {}


class AdditiveEntry(Entry, Additive):
    """The same where the inner update is additive."""

    inner: Additive

    def scaled(self, by: float) -> AdditiveEntry:
        return replace(self, inner=self.inner.scaled(by))


def entry(inner: Update, rows: int, columns: int, axis: int, start: int, stop: int, step: int = 1) -> Entry:
    """An entry of the right class."""
    made = AdditiveEntry if isinstance(inner, Additive) else Entry
    return made(inner, rows, columns, axis, start, stop, step)
