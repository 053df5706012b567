"""A delta of single entries: what LyCORIS' extraction keeps beside its factors (`--use_sparse_bias`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loratool.errors import FormatError
from loratool.kinds.halves import Unfolding, wide
from loratool.lazy import np
from loratool.tensors import Array, Tensor
from loratool.update import Load, Prepared, namespace


@dataclass(frozen=True)
class Sparse(Unfolding):
    """delta = scaling x the entries ``values`` [n] at ``indices`` [2,n] of an [o,i*k] matrix, its ``size`` [2].

    LyCORIS stores indices and size in 16 bits: from 32768 on they read as negative, and are taken for what they were
    up to 65535. Entries that occur twice are summed. ``scaling`` is that of the factors beside it (AUTOMATIC1111
    multiplies both; LyCORIS writes alpha = r). Raises FormatError for indices beyond the size.
    """

    kind = "full"
    indices: Tensor
    values: Tensor
    size: Tensor
    scaling: float = 1.0  # a field in the place of a property
    weight: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.size.shape != (2,) or self.indices.shape != (2, self.values.size) or len(self.values.shape) != 1:
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in self.slots.items())
            raise FormatError(f"tensors of shapes {shapes} hold no sparse matrix")
        for name in ("indices", "size"):
            if getattr(self, name).dtype[0] not in "IU":
                raise FormatError(f"{name} of a sparse matrix are stored as {getattr(self, name).dtype}")
        size, places = self.told, self._places
        beyond = (places < 0) | (places >= np.array(size)[:, None])
        if 0 in size or beyond.any():
            raise FormatError(f"entries of a sparse matrix lie outside of its size {list(size)}")
        self.check_weight()

    @property
    def _places(self) -> np.ndarray:
        """Row and column of each entry, [2,n]."""
        return _unwrapped(self.indices)

    @property
    def told(self) -> tuple[int, ...]:
        return tuple(map(int, _unwrapped(self.size)))

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        width = math.prod(self.shape[1:])
        rows, columns = self._places
        flat, inverse = np.unique(rows * width + columns, return_inverse=True)
        summed = np.zeros(len(flat), np.float64)
        np.add.at(summed, inverse, self.values.float())
        values = load(Tensor.of(summed * (self.scaling * strength), wide(self.values)))

        def delta(start: int, stop: int, base: Array | None) -> Array:
            low, high = np.searchsorted(flat, (start * width, stop * width))
            block = _zeros(values, (stop - start) * width)
            block[flat[low:high] - start * width] = values[low:high]
            return block.reshape(stop - start, width)

        return Prepared(delta)

    def scaled(self, by: float) -> Sparse:
        return replace(self, scaling=self.scaling * by)


def _unwrapped(tensor: Tensor) -> np.ndarray:
    """Integers in 64 bits; those of 16 as if they had no sign."""
    stored = tensor.array()
    return (stored.view(np.uint16) if stored.dtype == np.int16 else stored).astype(np.int64)


def _zeros(like: Array, count: int) -> Array:
    """Zeros beside ``like``: in its library, of its dtype, on its device."""
    return np.zeros(count, like.dtype) if namespace(like) is np else like.new_zeros(count)
