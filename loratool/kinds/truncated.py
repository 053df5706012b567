"""KaSA: a LoRA beside a base weight whose smallest singular components are dropped (Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loratool.errors import FormatError, NumericError
from loratool.tensors import Array, Tensor
from loratool.update import Around, Load, LowRank, Prepared, cast, namespace


@dataclass(frozen=True)
class Truncated(Around):
    """W' = W - (its r smallest singular components) + scaling x up @ diag(diagonal) @ down.

    ``direction`` holds the pair, diagonal [r] stands between its factors. r is the pair's rank and less than W has.
    Source: huggingface/peft 0.21, `KasaLinearVariant`.
    """

    kind = "kasa"
    direction: LowRank
    diagonal: Tensor

    def __post_init__(self) -> None:
        if self.diagonal.shape != (self.direction.rank,):
            raise FormatError(f"a diagonal of shape {list(self.diagonal.shape)} for rank {self.direction.rank}")
        if self.direction.mid is not None or self.direction.layer != "plain" or len(self.direction.shape) != 2:
            raise FormatError("KaSA is defined for plain Linear layers only")
        if self.direction.rank >= min(self.direction.shape):
            raise FormatError(f"KaSA of rank {self.direction.rank} would drop all of a {list(self.shape)} weight")

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        up, down = self.direction.matrices(load)
        up = up * load(self.diagonal)[None, :] * self.direction.scaling
        dropped: list[Array] = []

        def scan(blocks: Iterable[tuple[int, int, Array]]) -> None:
            weight = [cast(block, namespace(block).float64) for _, _, block in blocks]
            left, right = smallest(namespace(weight[0]).concatenate(weight), self.direction.rank)
            dropped[:] = [cast(left, up.dtype), cast(right, up.dtype)]

        def delta(start: int, stop: int, base: Array | None) -> Array:
            left, right = dropped
            return (up[start:stop] @ down - left[start:stop] @ right) * strength

        return Prepared(delta, scan)


def smallest(weight: Array, count: int) -> tuple[Array, Array]:
    """The ``count`` smallest singular components of ``weight`` [o,i] in float64, as a product [o,n] @ [n,i].

    They come from the Gram matrix of the shorter side: in float64 that is exact enough for weights of 32 bits or less.
    """
    linalg = namespace(weight).linalg
    tall = weight.shape[0] >= weight.shape[1]
    gram = weight.T @ weight if tall else weight @ weight.T
    if not bool((gram == gram).all()):
        raise NumericError("NaN in the base weight")
    vectors = linalg.eigh(gram)[1][:, :count]  # ascending: the first belong to the smallest
    return (weight @ vectors, vectors.T) if tall else (vectors, vectors.T @ weight)
