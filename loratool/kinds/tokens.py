"""Rows of an embedding that were trained whole: PEFT's trainable tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratool.errors import FormatError, MatchError
from loratool.lazy import np
from loratool.tensors import Array, Tensor
from loratool.update import Load, Prepared, Update


@dataclass(frozen=True)
class Tokens(Update):
    """Some rows of a table are replaced: W'[index[n]] = value[n], whatever PEFT's name of the tensor ("delta") says.

    value [n,dim], index [n] of integers, each once; ``entries`` is the number of the table's rows, 0 where it is not
    known yet. Raises FormatError for indices that are no rows.
    """

    kind = "trainable_tokens"
    value: Tensor
    index: Tensor
    entries: int = 0

    def __post_init__(self) -> None:
        if len(self.value.shape) != 2 or self.index.shape != self.value.shape[:1] or not self.value.size:
            raise FormatError(f"rows of shape {list(self.value.shape)} for {list(self.index.shape)} token indices")
        if self.index.dtype[0] not in "IU":
            raise FormatError(f"token indices are stored as {self.index.dtype}")
        indices = self.index.array()
        if int(indices.min()) < 0 or len(np.unique(indices)) < len(indices):
            raise FormatError("token indices are negative, or one occurs twice")
        if self.entries and int(indices.max()) >= self.entries:
            raise FormatError(f"token {indices.max()} of a table of {self.entries} rows")

    @staticmethod
    def at(indices: list[int], value: Tensor) -> Tokens:
        """The rows ``value`` [n,dim] at ``indices``."""
        return Tokens(value, Tensor.of(np.array(indices, np.int64)))

    @property
    def indices(self) -> list[int]:
        """The rows that change, in the order of ``value``."""
        return [int(n) for n in self.index.array()]

    @property
    def shape(self) -> tuple[int, ...]:
        """[entries,dim]."""
        return (self.entries, self.value.shape[1])

    @property
    def slots(self) -> Mapping[str, Tensor]:
        return {"value": self.value}

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        index = self.index.array().astype(np.int64)

        def delta(start: int, stop: int, base: Array | None) -> Array:
            assert base is not None
            change = base * 0
            rows, held, span = _within(index, start, stop)
            if len(rows):
                change[rows] = (load(self.value.slice(*span))[held] - base[rows]) * strength
            return change

        return Prepared(delta)

    def sized(self, shape: tuple[int, ...]) -> Tokens | None:
        """This update for a table of ``shape``. Raises MatchError for a token beyond its end."""
        if len(shape) != 2 or shape[1] != self.value.shape[1] or self.entries not in (0, shape[0]):
            return None
        last = max(self.indices)
        if last >= shape[0]:
            raise MatchError(
                f"token {last} is beyond the base's {shape[0]} rows",
                hint="the adapter was trained on a longer vocabulary: resize the base's embedding first",
            )
        return replace(self, entries=shape[0])

    def put_into(self, table: Tensor) -> Tensor:
        """``table`` with these rows in the place of its own, rounded once to its dtype: what no sum is exact for."""
        index, value = self.index.array().astype(np.int64), self.value.cast(table.dtype)

        def load(start: int, stop: int) -> np.ndarray:
            found = table.load(start, stop).copy()
            rows, held, span = _within(index, start, stop)
            if len(rows):
                found[rows] = value.load(*span)[held]
            return found

        return Tensor(table.dtype, table.shape, load)


def _within(index: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Rows of the block [start, stop) that ``index`` names, and where their values are: in a span, to be read alone."""
    here = np.flatnonzero((start <= index) & (index < stop))
    low, high = (int(here.min()), int(here.max()) + 1) if len(here) else (0, 0)
    return index[here] - start, here - low, (low, high)
