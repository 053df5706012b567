"""LoKr: the Kronecker product of a small matrix and one that may be low-rank.

Source: LyCORIS (Yeh et al. 2024), KronA (Edalati et al. 2022); PEFT stores the same tensors without alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from loratool.errors import FormatError
from loratool.kinds.halves import Half, Unfolding, by_index, by_rows, products, wide, zeros
from loratool.kinds.joined import joined
from loratool.lazy import np
from loratool.tensors import Array, Tensor
from loratool.update import Load, LowRank, Prepared, Update, alike, namespace


@dataclass(frozen=True)
class LoKr(Unfolding):
    """LoKr: delta = scaling x kron(w1 [a,c], w2 [b,d,*k]), a weight of a*b outputs and c*d inputs.

    Each half is whole, or a pair w*_a @ w*_b, or (w2) a pair around the core t2 [r,r,*k], w2_a [r,b] and w2_b [r,d].
    ``alpha`` as stored counts where a half is factorised (None: scaling 1); with both halves whole it says nothing
    (LyCORIS stores a rank of up to 1e10 there, diffusion trap 1), unless ``stated_rank`` gives the rank that belongs
    to it (PEFT's configuration). LyCORIS multiplies sqrt(r) into the stored alpha of rank-stabilised training (trap
    3); that of two whole halves it loses, as every reader does. ``weight`` is the weight's shape where the tensors
    tell it flattened only. Raises FormatError when tensors are missing or do not chain.
    """

    kind = "lokr"
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    alpha: float | None = None
    stated_rank: int | None = None
    weight: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        first, _ = self._halves
        if math.prod(first.shape[2:]) != 1:
            raise FormatError(f"w1 of shape {list(first.shape)} is no matrix")
        if self.stated_rank is not None and self.stated_rank < 1:
            raise FormatError(f"a rank of {self.stated_rank}")
        self.check_weight()

    @property
    def _halves(self) -> tuple[Half, Half]:
        return Half("w1", self.w1, self.w1_a, self.w1_b), Half("w2", self.w2, self.w2_a, self.w2_b, self.t2)

    @property
    def rank(self) -> int | None:
        """r of the factorised half, of w2 where both are; None where both are whole."""
        first, second = self._halves
        return first.rank if second.rank is None else second.rank

    @property
    def scaling(self) -> float:
        """alpha / r; 1 without alpha, and where both halves are whole and no rank is stated."""
        rank = self.rank or self.stated_rank
        return 1.0 if self.alpha is None or rank is None else self.alpha / rank

    @property
    def explicit_alpha(self) -> float | None:
        """alpha, or where none is stored the one that says the same; None where alpha says nothing."""
        return self.scaling * self.rank if self.rank else None

    @property
    def told(self) -> tuple[int, ...]:
        (a, c, *_), (b, d, *kernel) = (half.shape for half in self._halves)
        return (a * b, c * d, *kernel)

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        terms = [half.terms(load) for half in self._halves]
        flat = alike([term for half in terms for term in half])
        flat[0] = flat[0] * (self.scaling * strength)
        first, second = by_index(flat[: len(terms[0])]), by_index(flat[len(terms[0]) :])
        height = self._halves[1].shape[0]

        def delta(start: int, stop: int, base: Array | None) -> Array:
            index = _arange(flat[0], start, stop)
            return products(first(index // height), second(index % height))  # of [rows,c] and [rows,d*k]

        return Prepared(delta)

    def scaled(self, by: float) -> LoKr:
        if self.rank is None:
            return replace(self, alpha=self.scaling * by, stated_rank=1)
        return replace(self, alpha=self.scaling * by * self.rank)

    def folded(self) -> LoKr:
        """The same as LyCORIS' files can say it: of two whole halves, w1 carries the scaling."""
        if self.rank is not None or self.scaling == 1.0:
            return replace(self, stated_rank=None)
        assert self.w1 is not None
        return replace(self, w1=Tensor.of(self.w1.float() * np.float32(self.scaling)), alpha=None, stated_rank=None)

    def part(self, start: int, stop: int) -> LoKr | None:
        """Rows that begin and end at whole rows of w1."""
        height = self._halves[1].shape[0]
        if start % height or stop % height:
            return None
        name = "w1_a" if self.w1 is None else "w1"
        cut = {name: getattr(self, name).slice(start // height, stop // height)}
        return replace(self, **cut, weight=self.weight and (stop - start, *self.weight[1:]))

    def stacked(self, parts: Sequence[Update], heights: Sequence[int]) -> LoKr | None:
        return joined(self, parts, heights, ("w1", "w1_a"))

    def still(self, height: int) -> LoKr | None:
        rows, rest = divmod(height, self._halves[1].shape[0])
        outer = self.w1_a if self.w1 is None else self.w1
        if rest or outer is None:
            return None
        none, weight = zeros(outer, rows, *outer.shape[1:]), self.weight and (height, *self.weight[1:])
        if self.w1 is None:
            return replace(self, w1_a=none, weight=weight)
        return replace(self, w1=none, weight=weight)

    def low_rank(self) -> LowRank | None:
        """kron(A1 B1, A2 B2) = kron(A1, A2) kron(B1, B2), of the product of the ranks; None where that is no gain."""
        first, second = self._halves
        rank = first.pair_rank * second.pair_rank
        if rank >= min(self.shape[0], math.prod(self.shape[1:])):
            return None

        def factor(which: int, start: int, stop: int) -> np.ndarray:
            one, other = alike([first.pair()[which], second.pair()[which]])
            a, b = np.divmod(np.arange(start, stop), len(other))
            return np.asarray(products(one[a], other[b]))  # rows of [a*b,r] or [r,c*d*k]

        dtype = wide(*self.slots.values())
        up = by_rows(dtype, (self.shape[0], rank), partial(factor, 0))
        down = by_rows(dtype, (rank, *self.shape[1:]), partial(factor, 1))
        return LowRank(down, up, alpha=None if self.scaling == 1.0 else self.scaling * rank)


def _arange(like: Array, start: int, stop: int) -> Array:
    """start, ..., stop - 1 beside ``like``: in its library, on its device."""
    space = namespace(like)
    return np.arange(start, stop) if space is np else space.arange(start, stop, device=like.device)
