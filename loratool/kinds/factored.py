"""PEFT's tuners whose delta is a product of two factors: each is a LoRA, exactly.

AdaLoRA (Zhang et al. 2023), VeRA (Kopiczko et al. 2024), PVeRA, DeLoRA (Bini et al. 2025), VB-LoRA (Li et al. 2024),
RandLoRA (Albert et al. 2025), GraLoRA (Jung et al. 2025), MiSS (Kang et al. 2024, also known as Bone), Uni-LoRA,
TinyLoRA. Formulas as huggingface/peft 0.21 computes them; o out, i in, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from loratool.errors import FormatError
from loratool.kinds.tuner import Factored, axes, chained, double, entries, torch_of
from loratool.lazy import np
from loratool.tensors import Tensor
from loratool.update import LowRank


class Pair(Factored):
    """A delta of factors that are stored whole, down [r,i] and up [o,r], beside what scales them."""

    down: Tensor
    up: Tensor

    @property
    def known(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, kw_only=True)
class AdaLora(Pair):
    """AdaLoRA: delta = alpha / (init_r + 1e-5) x up @ (singular * down).

    down [r,i*k], up [o,r], singular [r,1]. The divisor is the rank at the start, whatever ranks survived.
    """

    word: ClassVar[str] = "adalora"
    flattens: ClassVar[bool] = True
    hollow: ClassVar[bool] = True
    down: Tensor
    up: Tensor
    singular: Tensor
    alpha: float = 1.0
    init_r: int = 12

    def check(self) -> None:
        axes(2, lora_A=self.down, lora_B=self.up, lora_E=self.singular)
        chained(rank=(("lora_A", self.down, 0), ("lora_B", self.up, 1), ("lora_E", self.singular, 0)))
        if self.singular.shape[1] != 1 or self.init_r < 1 or 0 in self.known:
            raise FormatError(f"lora_E of shape {list(self.singular.shape)}, init_r {self.init_r}")

    @property
    def scaling(self) -> float:
        return (self.alpha if self.alpha > 0 else self.init_r) / (self.init_r + 1e-5)

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        return double(self.up) * self.scaling, double(self.down) * double(self.singular)

    def low_rank(self) -> LowRank | None:
        if self.rank:
            return super().low_rank()
        out, *rest = self.plain
        down, up = (Tensor.of(np.zeros(shape, np.float32)) for shape in ((1, *rest), (out, 1)))
        return LowRank(down, up, alpha=1.0, layer=self.layer)


@dataclass(frozen=True, kw_only=True)
class Vera(Factored):
    """VeRA: delta = (scale_up * up) @ (scale_down * down), up and down random and shared by all modules.

    scale_up [o], scale_down [r], up [o or more,r], down [r,i or more]: each module takes the first rows, or columns.
    """

    word: ClassVar[str] = "vera"
    scale_up: Tensor
    scale_down: Tensor
    up: Tensor
    down: Tensor

    def check(self) -> None:
        axes(2, **{f"{self.word}_A": self.down, f"{self.word}_B": self.up})
        if (len(self.scale_up.shape), len(self.scale_down.shape)) != (1, 1):
            raise FormatError(f"lambdas of shapes {list(self.scale_up.shape)} and {list(self.scale_down.shape)}")
        chained(rank=(("lambda_d", self.scale_down, 0), (f"{self.word}_A", self.down, 0)))
        if self.rank != self.up.shape[1] or self.scale_up.shape[0] > self.up.shape[0]:
            raise FormatError(
                f"projection {list(self.up.shape)} for {self.scale_up.shape[0]} outputs, rank {self.rank}"
            )

    @property
    def known(self) -> tuple[int, ...]:
        return (self.scale_up.shape[0], 0)

    def fits(self, plain: tuple[int, ...]) -> bool:
        return super().fits(plain) and plain[1] <= self.down.shape[1]

    @property
    def rank(self) -> int:
        return self.scale_down.shape[0]

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        out, inner = self.plain
        up = double(self.up.slice(0, out)) * double(self.scale_up)[:, None]  # [o,r]
        down = double(self.down)[: self.rank, :inner] * double(self.scale_down)[: self.rank, None]  # [r,i]
        return up, down


class Pvera(Vera):
    """PVeRA: VeRA whose scale_down [2r] and down [2r,i] hold a mean and a variance; the mean counts."""

    word: ClassVar[str] = "pvera"

    @property
    def rank(self) -> int:
        return self.scale_down.shape[0] // 2


@dataclass(frozen=True, kw_only=True)
class Delora(Pair):
    """DeLoRA: delta = up @ diag(strength / (r |down_n| |up_n|)) @ down * norm: factors of length one, and a strength.

    down [r,i], up [o,r], strength [1], norm [i] of the base's columns as they were when the training began. Lengths
    below 1e-4 count as that.
    """

    word: ClassVar[str] = "delora"
    down: Tensor
    up: Tensor
    strength: Tensor
    norm: Tensor

    def check(self) -> None:
        axes(2, delora_A=self.down, delora_B=self.up)
        chained(rank=(("delora_A", self.down, 0), ("delora_B", self.up, 1)))
        chained(width=(("delora_A", self.down, 1), ("delora_w_norm", self.norm, 0)))
        if self.strength.size != 1 or len(self.norm.shape) != 1:
            raise FormatError(f"delora_lambda {list(self.strength.shape)}, delora_w_norm {list(self.norm.shape)}")

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        up, down = double(self.up), double(self.down)
        lengths = [np.maximum(np.linalg.norm(half, axis=axis), 1e-4) for half, axis in ((down, 1), (up, 0))]  # [r]
        return up * (self.strength.item() / self.rank / (lengths[0] * lengths[1])), down * double(self.norm)


@dataclass(frozen=True, kw_only=True)
class Mixtures(Factored):
    """VB-LoRA: factors put together from sub-vectors, each a mixture of the ``topk`` likeliest vectors of one bank.

    bank [n,v], shared by all modules; logits_up [o/v,r,n], logits_down [r,i/v,n].
    """

    word: ClassVar[str] = "vblora"
    logits_up: Tensor
    logits_down: Tensor
    bank: Tensor
    topk: int = 2

    def check(self) -> None:
        axes(2, vblora_vector_bank=self.bank)
        axes(3, logits_A=self.logits_down, logits_B=self.logits_up)
        vectors = (
            ("vblora_vector_bank", self.bank, 0),
            ("logits_A", self.logits_down, 2),
            ("logits_B", self.logits_up, 2),
        )
        chained(rank=(("logits_A", self.logits_down, 0), ("logits_B", self.logits_up, 1)), number_of_vectors=vectors)
        if not 0 < self.topk <= self.bank.shape[0]:
            raise FormatError(f"topk is {self.topk} of {self.bank.shape[0]} vectors")

    @property
    def known(self) -> tuple[int, ...]:
        width = self.bank.shape[1]
        return (self.logits_up.shape[0] * width, self.logits_down.shape[1] * width)

    @property
    def rank(self) -> int:
        return self.logits_down.shape[0]

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        up, down = (likeliest(double(logits), self.topk) for logits in (self.logits_up, self.logits_down))
        return mixed(self.bank, up, down)


@dataclass(frozen=True, kw_only=True)
class ChosenMixtures(Factored):
    """VB-LoRA as saved with ``save_only_topk_weights``: which vectors, and their shares but for the last.

    index_up [o/v,r,k], share_up [o/v,r,k-1], index_down [r,i/v,k], share_down [r,i/v,k-1], bank [n,v].
    """

    word: ClassVar[str] = "vblora"
    hollow: ClassVar[bool] = True  # of one vector there is no share to tell
    indices: ClassVar[frozenset[str]] = frozenset(["index_up", "index_down"])
    index_up: Tensor
    share_up: Tensor
    index_down: Tensor
    share_down: Tensor
    bank: Tensor

    def check(self) -> None:
        axes(2, vblora_vector_bank=self.bank)
        for index, share in ((self.index_up, self.share_up), (self.index_down, self.share_down)):
            if len(index.shape) != 3 or 0 in index.shape or share.shape != (*index.shape[:2], index.shape[2] - 1):
                raise FormatError(f"indices {index.dtype} {list(index.shape)} with shares {list(share.shape)}")
        if self.index_up.shape[1] != self.index_down.shape[0]:
            raise FormatError(f"rank mismatch: {list(self.index_down.shape)}, {list(self.index_up.shape)}")

    @property
    def known(self) -> tuple[int, ...]:
        width = self.bank.shape[1]
        return (self.index_up.shape[0] * width, self.index_down.shape[1] * width)

    @property
    def rank(self) -> int:
        return self.index_down.shape[0]

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        halves = ((self.index_up, self.share_up), (self.index_down, self.share_down))
        up, down = ((completed(share), entries(index, self.bank.rows)) for index, share in halves)
        return mixed(self.bank, up, down)


def likeliest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares [..,k] (softmax) and indices [..,k] of the ``count`` largest logits [..,n]."""
    index = np.argsort(-logits, axis=-1, kind="stable")[..., :count]
    found = np.take_along_axis(logits, index, -1)
    weights = np.exp(found - found[..., :1])
    return weights / weights.sum(-1, keepdims=True), index


def completed(share: Tensor) -> np.ndarray:
    """Shares [..,k] of which all but the last are stored: together they are 1."""
    shares = double(share)
    return np.concatenate([shares, 1 - shares.sum(-1, keepdims=True)], -1)


def mixed(bank: Tensor, *halves: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """up [o,r] and down [r,i], made of mixtures of the vectors of a bank [n,v].

    The ``halves`` are shares and indices, [o/v,r,k] of up and [r,i/v,k] of down.
    """
    vectors = double(bank)
    up, down = (np.einsum("...k,...kv->...v", shares, vectors[index]) for shares, index in halves)
    return up.swapaxes(1, 2).reshape(-1, len(down)), down.reshape(len(down), -1)


@dataclass(frozen=True, kw_only=True)
class RandLora(Factored):
    """RandLoRA: delta = alpha / r x up' @ down', n random bases shared by all modules, of full rank r x n.

    down [r,1,m or more], up [M or more,n or more,r] with m and M the shorter and the longer side of the weight;
    scale [r,n], gamma [n,m]. down' [r*n,m] = scale[:,:,None] * down * gamma, up' [M,n*r]; the two orders of the axes
    differ on purpose. For a weight with more inputs than outputs the product is transposed.
    """

    word: ClassVar[str] = "randlora"
    scale: Tensor
    gamma: Tensor
    down: Tensor
    up: Tensor
    alpha: float = 1.0

    def check(self) -> None:
        axes(2, randlora_lambda=self.scale, randlora_gamma=self.gamma)
        chained(number_of_bases=(("randlora_lambda", self.scale, 1), ("randlora_gamma", self.gamma, 0)))
        (r, n), (_, short) = self.scale.shape, self.gamma.shape
        if len(self.down.shape) != 3 or self.down.shape[:2] != (r, 1) or self.down.shape[2] < short:
            raise FormatError(f"randlora_A of shape {list(self.down.shape)} for rank {r} and {short} columns")
        if len(self.up.shape) != 3 or self.up.shape[2] != r or self.up.shape[1] < n or n != math.ceil(short / r):
            raise FormatError(f"randlora_B of shape {list(self.up.shape)} for rank {r} and {n} bases")

    @property
    def known(self) -> tuple[int, ...]:
        return (0, 0)

    def fits(self, plain: tuple[int, ...]) -> bool:
        return super().fits(plain) and min(plain) == self.gamma.shape[1] and max(plain) <= self.up.shape[0]

    @property
    def rank(self) -> int:
        return math.prod(self.scale.shape)

    @property
    def scaling(self) -> float:
        return self.alpha / self.scale.shape[0]

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        short, n = self.gamma.shape[1], self.scale.shape[1]
        down = double(self.scale)[:, :, None] * double(self.down)[:, :, :short] * double(self.gamma)  # [r,n,m]
        up = double(self.up.slice(0, max(self.plain)))[:, :n] * self.scaling  # [M,n,r]
        tall, wide = up.reshape(len(up), -1), down.reshape(-1, short)
        return (tall, wide) if short == self.plain[1] else (wide.T, tall.T)


@dataclass(frozen=True, kw_only=True)
class Gralora(Factored):
    """GraLoRA: k x k blocks, each with a pair of its own of rank r/k; and a hybrid pair over all of them.

    down [k,i/k,r], up [k,r,o/k], hybrid_down [h,i], hybrid_up [o,h] (both or none); scaling alpha / (r + h). The block
    of inputs n and outputs j is down[n,:,j*r/k:(j+1)*r/k] @ up[j,n*r/k:(n+1)*r/k], so the whole has rank k x r + h.
    """

    word: ClassVar[str] = "gralora"
    down: Tensor
    up: Tensor
    hybrid_down: Tensor | None = None
    hybrid_up: Tensor | None = None
    alpha: float = 1.0

    def check(self) -> None:
        axes(3, gralora_A=self.down, gralora_B=self.up)
        pair = (("gralora_A", self.down, 0), ("gralora_B", self.up, 0))
        chained(blocks=pair, rank=(("gralora_A", self.down, 2), ("gralora_B", self.up, 1)))
        if self.down.shape[2] % self.blocks or (self.hybrid_down is None) != (self.hybrid_up is None):
            raise FormatError(f"rank {self.down.shape[2]} over {self.blocks} blocks, or half a hybrid pair")
        if self.hybrid_down is not None and self.hybrid_up is not None:
            ends = (self.hybrid_up.shape[:1], self.hybrid_down.shape[1:])
            if ends != (self.known[:1], self.known[1:]) or self.hybrid_up.shape[1:] != self.hybrid_down.shape[:1]:
                raise FormatError(f"hybrid pair {list(self.hybrid_down.shape)}, {list(self.hybrid_up.shape)}")

    @property
    def blocks(self) -> int:
        """k."""
        return self.down.shape[0]

    @property
    def known(self) -> tuple[int, ...]:
        return (self.blocks * self.up.shape[2], self.blocks * self.down.shape[1])

    @property
    def hybrid(self) -> int:
        """Rank of the hybrid pair."""
        return self.hybrid_down.shape[0] if self.hybrid_down is not None else 0

    @property
    def rank(self) -> int:
        return self.blocks * self.down.shape[2] + self.hybrid

    @property
    def scaling(self) -> float:
        return self.alpha / (self.down.shape[2] + self.hybrid)

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        k, width, r = self.down.shape
        height = self.up.shape[2]
        downs, ups = double(self.down), double(self.up)
        down = np.zeros((k, r, k, width))  # [block of inputs n, rank, block, i/k]
        up = np.zeros((k, height, k, k, r // k))  # [block of outputs j, o/k, n, j, r/k]
        for n in range(k):
            down[n, :, n] = downs[n].T
            up[n, :, :, n] = ups[n].reshape(k, r // k, height).transpose(2, 0, 1)
        pair = [up.reshape(k * height, k * r), down.reshape(k * r, k * width)]
        if self.hybrid_down is not None and self.hybrid_up is not None:
            pair = [
                np.concatenate([pair[0], double(self.hybrid_up)], 1),
                np.concatenate([pair[1], double(self.hybrid_down)]),
            ]
        return pair[0] * self.scaling, pair[1]


@dataclass(frozen=True, kw_only=True)
class Miss(Factored):
    """MiSS (Bone): one block, transposed and tiled along the inputs: delta[:, c] = block[c mod r].

    block [r,o]; in the small form [r,m] it is tiled along the outputs as well.
    """

    word: ClassVar[str] = "miss"
    block: Tensor
    small: bool = False

    def check(self) -> None:
        axes(2, miss_block=self.block)

    @property
    def known(self) -> tuple[int, ...]:
        return (0 if self.small else self.block.shape[1], 0)

    def fits(self, plain: tuple[int, ...]) -> bool:
        return super().fits(plain) and plain[0] % self.block.shape[1] == 0 and plain[1] >= self.rank

    @property
    def rank(self) -> int:
        return self.block.shape[0]

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        out, inner = self.plain
        up = np.tile(double(self.block), (1, out // self.block.shape[1])).T  # [o,r]
        return up, np.equal.outer(np.arange(self.rank), np.arange(inner) % self.rank).astype(np.float64)  # [r,i]


class Bone(Miss):
    """Bone, the former name of MiSS."""

    word: ClassVar[str] = "bone"


@dataclass(frozen=True, kw_only=True)
class Unilora(Factored):
    """Uni-LoRA: every entry of both factors is a scaled entry of one vector, shared by all modules.

    theta [d]; index_down and scale_down [r,i], index_up and scale_up [o,r].
    """

    word: ClassVar[str] = "unilora"
    indices: ClassVar[frozenset[str]] = frozenset(["index_up", "index_down"])
    theta: Tensor
    index_down: Tensor
    scale_down: Tensor
    index_up: Tensor
    scale_up: Tensor

    def check(self) -> None:
        axes(2, indices_A=self.index_down, indices_B=self.index_up)
        shapes = (self.index_down.shape, self.index_up.shape)
        if (self.scale_down.shape, self.scale_up.shape) != shapes or len(self.theta.shape) != 1:
            raise FormatError(
                f"scales {list(self.scale_down.shape)}, {list(self.scale_up.shape)}; theta {list(self.theta.shape)}"
            )
        chained(rank=(("indices_A", self.index_down, 0), ("indices_B", self.index_up, 1)))

    @property
    def known(self) -> tuple[int, ...]:
        return (self.index_up.shape[0], self.index_down.shape[1])

    @property
    def rank(self) -> int:
        return self.index_down.shape[0]

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        theta = double(self.theta)
        up, down = (
            theta[entries(index, len(theta))] * double(scale)
            for index, scale in ((self.index_up, self.scale_up), (self.index_down, self.scale_down))
        )
        return up, down


@dataclass(frozen=True, kw_only=True)
class Tinylora(Pair):
    """TinyLoRA: delta = up @ (sum_n theta[n] projection[n]) @ down, factors frozen from the base's own SVD.

    down [r,i], up [o,r], projection [u,r,r], thetas the [u] of each group of modules. Which group a module is of, only
    its projection tells: it was drawn from ``seed`` plus the module's number among ``modules``.
    """

    word: ClassVar[str] = "tinylora"
    thetas: tuple[Tensor, ...]
    projection: Tensor
    down: Tensor
    up: Tensor
    seed: int = 42
    modules: int = 1
    tying: float = 0.0

    def check(self) -> None:
        axes(2, tinylora_A=self.down, tinylora_B=self.up)
        r = self.rank
        shapes = {theta.shape for theta in self.thetas}
        if self.up.shape[1] != r or len(shapes) != 1 or self.projection.shape != (*shapes.pop(), r, r):
            found = [list(t.shape) for t in (self.down, self.up, self.projection, *self.thetas[:1])]
            raise FormatError(f"factors, projection and vector of shapes {found} do not chain")
        if not 0 <= self.tying <= 1 or not 0 < len(self.thetas) <= self.modules <= 1 << 20:
            raise FormatError(f"{len(self.thetas)} vectors for {self.modules} modules, weight_tying {self.tying}")

    def theta(self) -> np.ndarray:
        """The vector of the module's group. Raises FormatError where no number gives its projection."""
        if len(self.thetas) == 1:
            return double(self.thetas[0])
        groups = max(1, round(self.modules * (1.0 - self.tying)))
        number = self._number()
        group = min(number // max(1, self.modules // groups), groups - 1)
        if group >= len(self.thetas):
            raise FormatError(f"{len(self.thetas)} vectors for {groups} groups of modules")
        return double(self.thetas[group])

    def _number(self) -> int:
        """The module's number, by which PEFT seeded its projection."""
        torch, stored, shape = torch_of("the numbers of modules"), self.projection.array(), self.projection.shape
        for number in range(self.modules):
            drawn = torch.Generator().manual_seed(self.seed + number)
            values = torch.normal(0.0, 1.0 / self.rank**0.5, shape, generator=drawn)
            if np.array_equal(Tensor.of(values.numpy(), self.projection.dtype).array(), stored):
                return number
        raise FormatError(f"the projection was not drawn from projection_seed {self.seed}")

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        inner = np.einsum("u,urs->rs", self.theta(), double(self.projection))
        return double(self.up), inner @ double(self.down)


def drawn(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    """Matrices that PEFT draws one after the other from one generator, each uniform for its second axis.

    They are made when they are read, all together: with torch, bit for bit as PEFT does.
    """

    @cache
    def values() -> list[np.ndarray]:
        torch = torch_of("projections that are not stored")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        bounds = [math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1])) for shape in shapes]
        pairs = zip(shapes, bounds, strict=True)
        return [torch.empty(shape).uniform_(-bound, bound, generator=generator).numpy() for shape, bound in pairs]

    def one(n: int) -> Tensor:
        return Tensor("F32", shapes[n], lambda start, stop: values()[n][start:stop])

    return [one(n) for n in range(len(shapes))]
