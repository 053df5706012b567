"""GLoRA: a low-rank change, and a low-rank mixture of the weight's own inputs.

Source: Chavan et al. 2023, as LyCORIS stores it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loratool.errors import FormatError
from loratool.kinds.joined import joined
from loratool.tensors import Array, Tensor
from loratool.update import ByAlpha, Load, Prepared, Update, alike, namespace, trimmed


@dataclass(frozen=True)
class GLoRA(ByAlpha):
    """GLoRA: W' = W + scaling x (b1 @ b2 + (W @ a1) @ a2), a convolution's kernel apart.

    a1 [i,r], a2 [r,i], b1 [o,r], b2 [r,i,*k]. The layout of 2023 has the roles transposed, a1 [r,i], a2 [i,r], b1
    [r,i], b2 [o,r], and is known by its shapes. ``alpha`` as stored (None: scaling 1); unlike the other kinds,
    LyCORIS stores it raw where the training was rank-stabilised, which only the metadata tell (diffusion trap 3).
    Raises FormatError when the shapes chain in neither layout.
    """

    kind = "glora"
    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    alpha: float | None = None
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        given = (self.a1, self.a2, self.b1, self.b2)
        if any(len(t.shape) < 2 or t.size == 0 for t in given) or not (self._is_new or self._is_old):
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in self.slots.items())
            raise FormatError(f"factors of shapes {shapes} are no GLoRA")

    @property
    def _is_new(self) -> bool:
        return _chain(self.a1, self.a2, self.b1, self.b2)

    @property
    def _is_old(self) -> bool:
        return _chain(self.a2, self.a1, self.b2, self.b1)

    @property
    def _ordered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The factors in the order [i,r], [r,i], [o,r], [r,i,*k]; the new layout where shapes allow both."""
        return (self.a1, self.a2, self.b1, self.b2) if self._is_new else (self.a2, self.a1, self.b2, self.b1)

    @property
    def rank(self) -> int:
        return self._ordered[2].shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        _, _, up, down = self._ordered
        return (up.shape[0], *down.shape[1:])

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        first, second, up, down = alike([load(factor).reshape(_as_matrix(factor)) for factor in self._ordered])
        by = self.scaling * strength
        second, up = second * by, up * by

        def delta(start: int, stop: int, base: Array | None) -> Array:
            assert base is not None
            mixed, one, other = alike([base.reshape(stop - start, len(first), -1), first, second])
            mixed = namespace(base).einsum("oik,ir->ork", mixed, one)
            mixed = namespace(base).einsum("ork,ri->oik", mixed, other)
            return up[start:stop] @ down + mixed.reshape(stop - start, -1)

        return Prepared(delta)

    def part(self, start: int, stop: int) -> GLoRA:
        if self._is_new:
            return replace(self, b1=self.b1.slice(start, stop))
        return replace(self, b2=self.b2.slice(start, stop))

    def stacked(self, parts: Sequence[Update], heights: Sequence[int]) -> GLoRA | None:
        return joined(self, parts, heights, ("b1",) if self._is_new else ("b2",))


def _as_matrix(factor: Tensor) -> tuple[int, int]:
    """The shape of a factor as a matrix."""
    return factor.shape[0], math.prod(factor.shape[1:])


def _chain(a_left: Tensor, a_right: Tensor, b_left: Tensor, b_right: Tensor) -> bool:
    """Whether these are [i,r], [r,i], [o,r], [r,i,*k]."""
    matrices = [trimmed(t.shape) for t in (a_left, a_right, b_left)]
    if any(len(shape) != 2 for shape in matrices) or len(b_right.shape) < 2:
        return False
    (i, r), (r2, i2), (_, rank) = matrices
    return (r, i) == (r2, i2) and rank == b_right.shape[0] and b_right.shape[1] == i
