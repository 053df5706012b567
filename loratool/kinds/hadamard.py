"""LoHa: the element-wise product of two low-rank matrices.

Source: LyCORIS (Yeh et al. 2024), FedPara (Hyeon-Woo et al. 2022); PEFT stores the same tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loratool.errors import FormatError
from loratool.kinds.halves import Half, Unfolding, by_rows, products, wide, zeros
from loratool.kinds.joined import joined
from loratool.lazy import np
from loratool.tensors import Array, Tensor
from loratool.update import ByAlpha, Load, LowRank, Prepared, Update, alike


@dataclass(frozen=True)
class LoHa(ByAlpha, Unfolding):
    """LoHa: delta = scaling x (w1_a @ w1_b) * (w2_a @ w2_b), applied once (diffusion trap 2).

    w*_a [o,r], w*_b [r,i*k]; around the cores t1 and t2 [r,r,*k], both or none, w*_a is [r,o] and w*_b [r,i].
    ``alpha`` as stored (None: scaling 1); LyCORIS writes it with sqrt(r) multiplied in where the training was
    rank-stabilised, so alpha / r is right there too (trap 3). ``weight`` is the weight's shape where the tensors
    tell it flattened only. Raises FormatError when the shapes do not chain.
    """

    kind = "loha"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    alpha: float | None = None
    weight: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.t1 is None) != (self.t2 is None):
            raise FormatError("one of the two Tucker cores t1 and t2 is missing")
        one, other = (half.shape for half in self._halves)
        if one[0] != other[0] or math.prod(one[1:]) != math.prod(other[1:]):
            raise FormatError(f"the two products of a LoHa differ in shape: {list(one)} and {list(other)}")
        self.check_weight()

    @property
    def _halves(self) -> tuple[Half, Half]:
        return (
            Half("w1", None, self.w1_a, self.w1_b, self.t1),
            Half("w2", None, self.w2_a, self.w2_b, self.t2),
        )

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def told(self) -> tuple[int, ...]:
        return self._halves[0].shape

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        left, right, other_left, other_right = alike([t for half in self._halves for t in half.terms(load)])
        left = left * (self.scaling * strength)

        def delta(start: int, stop: int, base: Array | None) -> Array:
            return (left[start:stop] @ right) * (other_left[start:stop] @ other_right)

        return Prepared(delta)

    def part(self, start: int, stop: int) -> LoHa:
        def cut(a: Tensor) -> Tensor:
            return a.slice(start, stop) if self.t1 is None else a.T.slice(start, stop).T

        weight = self.weight and (stop - start, *self.weight[1:])
        return replace(self, w1_a=cut(self.w1_a), w2_a=cut(self.w2_a), weight=weight)

    def stacked(self, parts: Sequence[Update], heights: Sequence[int]) -> LoHa | None:
        outer = ("w1_a", "w2_a")
        return joined(self, parts, heights, *((outer,) if self.t1 is None else ((), outer)))

    def still(self, height: int) -> LoHa:
        def none(a: Tensor) -> Tensor:
            return zeros(a, height, a.shape[1]) if self.t1 is None else zeros(a, a.shape[0], height)

        weight = self.weight and (height, *self.weight[1:])
        return replace(self, w1_a=none(self.w1_a), w2_a=none(self.w2_a), weight=weight)

    def low_rank(self) -> LowRank | None:
        """Of rank r x r: up[o,(p,q)] = a1[o,p] a2[o,q], down[(p,q),i] = b1[p,i] b2[q,i]; None where that is no gain."""
        first, second = self._halves
        rank = self.w1_b.shape[0] * self.w2_b.shape[0]
        if rank >= min(self.shape[0], math.prod(self.shape[1:])):
            return None

        def terms() -> list[np.ndarray]:
            return alike([*first.terms(Tensor.float), *second.terms(Tensor.float)])

        def up(start: int, stop: int) -> np.ndarray:
            one, _, other, _ = terms()
            return np.asarray(products(one[start:stop], other[start:stop]))

        def down(start: int, stop: int) -> np.ndarray:
            _, one, _, other = terms()
            p, q = np.divmod(np.arange(start, stop), len(other))
            return np.asarray(one[p] * other[q])

        dtype = wide(*self.slots.values())
        return LowRank(
            by_rows(dtype, (rank, *self.shape[1:]), down),
            by_rows(dtype, (self.shape[0], rank), up),
            alpha=None if self.alpha is None else self.scaling * rank,
        )
