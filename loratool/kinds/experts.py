"""LoRA of expert weights that are stored as one stack [E, ...]: PEFT's `target_parameters`.

The factors of all experts lie in two matrices, packed in two ways: down expert by expert, up rank by rank. Source:
huggingface/peft 0.21, `ParamWrapper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loratool.errors import FormatError, MatchError
from loratool.lazy import np
from loratool.tensors import Array, Tensor
from loratool.update import Additive, ByAlpha, Load, LowRank, Prepared, alike

Order = Literal["plain", "transposed", "model", "shape"]
"""How the base stores an expert: [o,i]; [i,o]; or not known yet, and then what decides where its shape cannot: what is
known of the model, or nothing."""


@dataclass(frozen=True)
class Experts(ByAlpha, Additive):
    """One LoRA for each expert of a stack [E,o,i] or [E,i,o]: delta[e] = scaling x up_e @ down_e, or its transpose.

    down [E*r,i], expert e in rows e*r to (e+1)*r; up [o,r*E], expert e in columns e, e+E, e+2E, ... Raises FormatError
    when the shapes do not chain.
    """

    kind = "lora"
    down: Tensor
    up: Tensor
    experts: int
    alpha: float | None = None
    rank_stabilised: bool = False
    order: Order = "plain"

    def __post_init__(self) -> None:
        down, up = self.down.shape, self.up.shape
        if len(down) != 2 or len(up) != 2 or 0 in (*down, *up) or down[0] != up[1]:
            raise FormatError(f"factors of shapes down {list(down)} and up {list(up)} are no LoRA pair")
        if self.experts < 1 or down[0] % self.experts:
            raise FormatError(f"{down[0]} rows of down are not shared out evenly among {self.experts} experts")

    @staticmethod
    def packed(experts: Sequence[LowRank]) -> Experts:
        """The stack of LoRAs of equal shapes, one for each expert. Raises FormatError when they differ.

        Where scalings differ they are folded into up, in float32.
        """
        first = experts[0]
        if len({(low.shape, low.rank, low.layer) for low in experts}) > 1 or first.layer == "embedding":
            raise FormatError("experts of different shapes or ranks make no stack")
        if any(low.mid is not None or len(low.down.shape) != 2 for low in experts):
            raise FormatError("convolutions make no stack of experts")
        same = len({(low.scaling, low.alpha, low.rank_stabilised, low.up.dtype) for low in experts}) == 1
        ups = [low.up.array() if same else low.up.float() * np.float32(low.scaling) for low in experts]
        up = np.stack([values.reshape(values.shape[:2]) for values in ups], axis=-1)  # [o,r,E]
        return Experts(
            Tensor.joined([low.down for low in experts]),
            Tensor.of(up.reshape(len(up), -1)),
            len(experts),
            first.alpha if same else None,
            first.rank_stabilised if same else False,
            "transposed" if first.layer == "transposed" else "plain",
        )

    def expert(self, number: int) -> LowRank:
        """The LoRA of one expert's weight, in the orientation of the stack."""
        r, up, count = self.rank, self.up, self.experts

        def columns(start: int, stop: int) -> np.ndarray:
            return np.ascontiguousarray(up.load(start, stop)[:, number::count])  # [rows,r]

        return LowRank(
            self.down.slice(number * r, (number + 1) * r),
            Tensor(up.dtype, (up.shape[0], r), columns),
            alpha=self.alpha,
            rank_stabilised=self.rank_stabilised,
            layer="transposed" if self.order == "transposed" else "plain",
        )

    def flipped(self) -> Experts:
        """The same delta with the factors' parts exchanged: what up was is down, for a reader of the other order.

        delta[e] = up_e @ down_e is the transpose of down_e' @ up_e'.
        """
        r, count = self.rank, self.experts
        down = self.down.array().reshape(count, r, -1)  # [E,r,i]
        up = self.up.array().reshape(-1, r, count)  # [o,r,E]
        turned: Order = "plain" if self.order == "transposed" else "transposed"
        return replace(
            self,
            down=Tensor.of(np.ascontiguousarray(up.transpose(2, 1, 0)).reshape(count * r, -1)),
            up=Tensor.of(np.ascontiguousarray(down.transpose(2, 1, 0)).reshape(-1, r * count)),
            order=turned,
        )

    @property
    def rank(self) -> int:
        """Rank of each expert's pair."""
        return self.down.shape[0] // self.experts

    @property
    def shape(self) -> tuple[int, ...]:
        pair = (self.up.shape[0], self.down.shape[1])
        return (self.experts, *(pair[::-1] if self.order == "transposed" else pair))

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        down, up = alike([load(self.down), load(self.up)])
        downs = down.reshape(self.experts, self.rank, -1)  # [E,r,i]
        ups = (up * (self.scaling * strength)).reshape(-1, self.rank, self.experts)  # [o,r,E]

        def delta(start: int, stop: int, base: Array | None) -> Array:
            value = ups[:, :, start:stop].swapaxes(0, 2).swapaxes(1, 2) @ downs[start:stop]  # [n,o,i]
            value = value.swapaxes(1, 2) if self.order == "transposed" else value
            return value.reshape(stop - start, -1)

        return Prepared(delta)

    def orders(self, transposed: bool | None) -> list[Experts]:
        """The orientations to try on a base; its shape decides, but for a square expert.

        ``transposed`` is what is known of the model, None where nothing is. Raises MatchError where nothing tells.
        """
        told = [replace(self, order=order) for order in ("plain", "transposed")]
        if self.up.shape[0] != self.down.shape[1]:
            return told
        if self.order in ("plain", "transposed"):
            return [self]
        if self.order == "shape" or transposed is None:
            raise MatchError(
                f"experts of square shape {list(self.shape)}: nothing tells which axis is the input",
                hint="the adapter does not name the PEFT version that made it, or the base has no config.json",
            )
        return [told[transposed]]
