"""(IA)3: a factor for each output or each input of a weight.

Source: Liu et al. 2022; LyCORIS stores it around 0, PEFT around 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from loratool.errors import FormatError
from loratool.kinds.joined import joined
from loratool.lazy import np
from loratool.tensors import Array, Tensor
from loratool.update import Layer, Load, Prepared, Update


@dataclass(frozen=True)
class IA3(Update):
    """(IA)3: W' = W * (1 + vector - centre), broadcast over the outputs, or the inputs where ``on_input``.

    ``vector`` holds one value for each, whatever its shape; ``centre`` is the value that changes nothing: 0 in LyCORIS
    (``.weight``, a difference and no weight, diffusion trap 44), 1 in PEFT (``ia3_l``). ``weight`` is the shape of
    the weight where it is known: the tensors tell one axis of it, and ``shape`` says 0 for the others.
    """

    kind = "ia3"
    vector: Tensor
    on_input: bool = False
    centre: float = 0.0
    homogeneous: ClassVar[bool] = True
    layer: Layer = "plain"
    weight: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        size = self.vector.size
        if size == 0 or max(self.vector.shape, default=1) != size:
            raise FormatError(f"an (IA)3 of shape {list(self.vector.shape)} is no vector")
        if self.weight and not self._fits(self.weight):
            raise FormatError(f"an (IA)3 of {size} values for a weight of shape {list(self.weight)}")

    @property
    def _axis(self) -> int:
        """The axis of the stored weight that is rescaled."""
        return int(self.on_input) ^ int(self.layer == "transposed")

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > self._axis and shape[self._axis] == self.vector.size

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.vector.size
        return self.weight or ((0, size) if self._axis else (size, 0))

    def sized(self, shape: tuple[int, ...]) -> IA3 | None:
        return replace(self, weight=shape) if self._fits(shape) else None

    def oriented(self, layer: Layer) -> IA3:
        return replace(self, layer=layer, weight=None)

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        change = (load(self.vector).reshape(-1) - self.centre) * strength

        def of_rows(start: int, stop: int, base: Array | None) -> Array:
            assert base is not None
            return base * change[start:stop, None]

        def of_columns(start: int, stop: int, base: Array | None) -> Array:
            assert base is not None
            return (base.reshape(len(base), len(change), -1) * change[None, :, None]).reshape(base.shape)

        return Prepared(of_columns if self._axis else of_rows)

    def part(self, start: int, stop: int) -> IA3:
        weight = self.weight and (stop - start, *self.weight[1:])
        if self._axis:
            return replace(self, weight=weight)
        return replace(self, vector=self.vector.reshape(self.vector.size).slice(start, stop), weight=weight)

    def stacked(self, parts: Sequence[Update], heights: Sequence[int]) -> IA3 | None:
        flat = [replace(p, vector=p.vector.reshape(p.vector.size)) if isinstance(p, IA3) else p for p in parts]
        return joined(self, flat, heights, () if self._axis else ("vector",))

    def still(self, height: int) -> IA3 | None:
        if self._axis:
            return None
        none = Tensor.of(np.full(height, self.centre), self.vector.dtype)
        return replace(self, vector=none, weight=self.weight and (height, *self.weight[1:]))
