"""A matrix as LoHa and LoKr store it: whole, as a pair of factors, or as a pair around a Tucker core."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

from loratool.errors import FormatError
from loratool.lazy import np
from loratool.tensors import BLOCK, Array, Tensor, numpy_dtype
from loratool.update import Additive, Load, Update, alike, namespace


class Unfolding(Additive):
    """An additive update whose tensors may hold the kernel of a convolution flattened into the inputs.

    ``told`` is the shape that the tensors tell, ``weight`` that of the weight where it is known (a field of the kind).
    """

    weight: tuple[int, ...] | None

    @property
    @abstractmethod
    def told(self) -> tuple[int, ...]:
        """[o,i,*k], or [o,i*k] where the tensors tell no more."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight or self.told

    def sized(self, shape: tuple[int, ...]) -> Update | None:
        flat = len(self.told) == 2 and len(shape) > 2 and _unfolds(self.told, shape)
        return replace(self, weight=shape) if flat else super().sized(shape)  # type: ignore[type-var]

    def check_weight(self) -> None:
        """Raise FormatError where ``weight`` is not the told shape with its kernel unfolded."""
        if self.weight and not _unfolds(self.told, self.weight):
            raise FormatError(f"an update of shape {list(self.told)} for a weight of shape {list(self.weight)}")


def _unfolds(flat: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return flat[0] == shape[0] and math.prod(flat[1:]) == math.prod(shape[1:])


@dataclass(frozen=True)
class Half:
    """One matrix [h,w*k]: ``whole``; ``a [h,r] @ b [r,w*k]``; or, around ``core [r,r,*k]``, ``a [r,h]``, ``b [r,w]``.

    The factors around a core are stored transposed: M[p,q,k] = sum_ij core[i,j,k] a[i,p] b[j,q] (diffusion trap 25).
    ``name`` is that of the whole in messages. Raises FormatError when tensors are missing or do not chain.
    """

    name: str
    whole: Tensor | None
    a: Tensor | None
    b: Tensor | None
    core: Tensor | None = None

    def __post_init__(self) -> None:
        given = {"": self.whole, "_a": self.a, "_b": self.b}
        there = [self.name + end for end, tensor in given.items() if tensor is not None]
        if there not in ([self.name], [f"{self.name}_a", f"{self.name}_b"]):
            raise FormatError(f"{self.name} is stored as {' and '.join(there) or 'nothing'}")
        for tensor in (self.whole, self.a, self.b, self.core):
            if tensor is not None and (len(tensor.shape) < 2 or tensor.size == 0):
                raise FormatError(f"a factor of {self.name} of shape {list(tensor.shape)} is no matrix")
        if not self._chains():
            shapes = [list(t.shape) for t in (self.a, self.b, self.core or self.whole) if t is not None]
            raise FormatError(f"rank mismatch in {self.name}: factors of shapes {', '.join(map(str, shapes))}")

    def _chains(self) -> bool:
        if self.a is None or self.b is None:
            return self.core is None
        if self.core is None:
            return self.a.shape[1] == self.b.shape[0] and math.prod(self.a.shape[2:]) == 1
        ends = math.prod((*self.a.shape[2:], *self.b.shape[2:]))
        return ends == 1 and self.core.shape[:2] == (self.a.shape[0], self.b.shape[0])

    @property
    def rank(self) -> int | None:
        """r of the pair; None where the matrix is stored whole."""
        return None if self.b is None else self.b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """[h,w,*k], as far as the tensors tell: a kernel may be flattened into w."""
        if self.a is None or self.b is None:
            assert self.whole is not None
            return self.whole.shape
        if self.core is None:
            return (self.a.shape[0], *self.b.shape[1:])
        return (self.a.shape[1], self.b.shape[1], *self.core.shape[2:])

    @property
    def slots(self) -> dict[str, Tensor]:
        """The stored tensors, without the core."""
        given = {self.name: self.whole, f"{self.name}_a": self.a, f"{self.name}_b": self.b}
        return {slot: tensor for slot, tensor in given.items() if tensor is not None}

    def terms(self, load: Load) -> list[Array]:
        """The matrix [h,w*k], or its two factors [h,r] and [r,w*k]."""
        if self.a is None or self.b is None:
            assert self.whole is not None
            return [load(self.whole).reshape(self.whole.shape[0], -1)]
        if self.core is None:
            return [load(self.a).reshape(self.a.shape[:2]), load(self.b).reshape(self.b.shape[0], -1)]
        a, b, core = alike([load(self.a), load(self.b), load(self.core)])
        core = core.reshape(*core.shape[:2], -1)  # [r,r,k]
        right = namespace(core).einsum("ijk,jq->iqk", core, b.reshape(b.shape[:2]))
        return [a.reshape(a.shape[:2]).T, right.reshape(len(right), -1)]

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Two factors [h,r] and [r,w*k] of the matrix, r the smallest that needs no decomposition."""
        terms = alike(self.terms(Tensor.float))
        if len(terms) == 2 and len(terms[1]) < self._short:
            return terms[0], terms[1]
        matrix = terms[0] @ terms[1] if len(terms) == 2 else terms[0]  # [h,w*k]
        one = np.eye(self._short, dtype=matrix.dtype)
        return (one, matrix) if len(matrix) == self._short else (matrix, one)

    @property
    def _short(self) -> int:
        """The shorter side."""
        return min(self.shape[0], math.prod(self.shape[1:]))

    @property
    def pair_rank(self) -> int:
        """The rank that `pair` gives."""
        return self._short if self.rank is None else min(self.rank, self._short)


def by_index(terms: list[Array]) -> Callable[[Array], Array]:
    """What gives the rows of a matrix at an index array; a product is multiplied out when it is at most one block."""
    if len(terms) == 2 and terms[0].shape[0] * terms[1].shape[1] <= BLOCK:
        terms = [terms[0] @ terms[1]]
    if len(terms) == 1:
        return lambda index: terms[0][index]
    return lambda index: terms[0][index] @ terms[1]


def made(dtype: str, shape: tuple[int, ...], values: Callable[[], np.ndarray]) -> Tensor:
    """A tensor whose values are computed when they are read."""
    return Tensor(dtype, shape, lambda start, stop: values().reshape(shape)[start:stop].astype(numpy_dtype(dtype)))


def by_rows(dtype: str, shape: tuple[int, ...], rows: Callable[[int, int], np.ndarray]) -> Tensor:
    """A tensor whose rows [start, stop) are computed when they are read."""

    def load(start: int, stop: int) -> np.ndarray:
        return rows(start, stop).reshape(stop - start, *shape[1:]).astype(numpy_dtype(dtype), copy=False)

    return Tensor(dtype, shape, load)


def products(one: Array, other: Array) -> Array:
    """The Kronecker product of each row of ``one`` [n,p] and the same row of ``other`` [n,q]: [n,p*q]."""
    return (one[:, :, None] * other[:, None, :]).reshape(len(one), -1)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """A tensor of zeros, stored as ``like`` is."""
    return Tensor.of(np.zeros(shape, numpy_dtype(like.dtype)))


def wide(*tensors: Tensor) -> str:
    """The dtype of what is computed from these: float32, float64 where one is."""
    return "F64" if any(tensor.dtype == "F64" for tensor in tensors) else "F32"
