"""A weight that is grown with zeros before it changes: ComfyUI's `reshape_weight`, FLUX's control LoRAs.

Their first layer takes the channels of a control image beside those of the latents. (ComfyUI's `set_weight`, the
other patch of a whole weight, is `Replace`.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratool.errors import FormatError
from loratool.lazy import np
from loratool.tensors import Tensor
from loratool.update import Additive, Around, Load, LowRank, Prepared, as_low_rank


@dataclass(frozen=True)
class Padded(Around, Additive):
    """W' = (W, with columns of zeros behind its own up to the shape of ``inner``) + the delta of ``inner``.

    Raises FormatError where ``inner`` is no matrix.
    """

    inner: Additive

    def __post_init__(self) -> None:
        if len(self.inner.shape) < 2:
            raise FormatError(f"an update of shape {list(self.inner.shape)} grows no weight")

    def sized(self, shape: tuple[int, ...]) -> Additive | None:
        """The inner update where the weight has been grown already, this one where it has fewer inputs."""
        inner = self.inner.sized(shape)
        if isinstance(inner, Additive):
            return inner
        own = self.shape
        grows = len(shape) == len(own) and (shape[0], *shape[2:]) == (own[0], *own[2:]) and shape[1] < own[1]
        return self if grows else None

    def grown(self, weight: Tensor) -> Tensor:
        """The weight [o,i,*k] with zeros behind its inputs."""
        more = self.shape[1] - weight.shape[1]
        ends = [(0, 0), (0, more), *((0, 0) for _ in weight.shape[2:])]
        return Tensor(weight.dtype, self.shape, lambda start, stop: np.pad(weight.load(start, stop), ends))

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        return self.inner.prepare(load, strength)

    def scaled(self, by: float) -> Padded:
        return replace(self, inner=self.inner.scaled(by))

    def low_rank(self) -> LowRank | None:
        return as_low_rank(self.inner)
