"""PEFT's tuners whose change depends on the base weight.

HRA (Yuan et al. 2024), HiRA (Huang et al. 2025), MiSS with ``bat`` (Kang et al. 2024), RoAd (Liao et al. 2024), GLoRA
(Chavan et al. 2023), DEFT, OSF (Nayak et al. 2025), FRoD, PEANUT. Formulas as huggingface/peft 0.21 computes them; o
out, i in, r rank. Where a sum over all rows of the weight comes first, `Prepared.scan` takes it block by block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from loratool.errors import FormatError
from loratool.kinds.truncated import smallest
from loratool.kinds.tuner import Tuner, axes, chained, double, entries
from loratool.lazy import np
from loratool.tensors import Array, Tensor
from loratool.update import Around, Dense, Layer, Load, LowRank, Prepared, Replace, alike, cast, namespace

Block = tuple[int, int, Array]


def product(one: Array, other: Array) -> Array:
    """one @ other, in float64 where one of them is."""
    one, other = alike([one, other])
    return one @ other


def moved(load: Load, values: np.ndarray) -> Array:
    """Computed values in float32 on the computing device."""
    return load(Tensor.of(np.ascontiguousarray(values, np.float32)))


@dataclass(frozen=True, kw_only=True)
class Householder(Tuner):
    """HRA: W' = W (1 - 2 u_1 u_1^T) ... (1 - 2 u_r u_r^T), a chain of reflections of the inputs.

    vectors [i*k,r], each made of length one; ``orthogonal``: each first made orthogonal to those before it.
    """

    word: ClassVar[str] = "hra"
    plain_only: ClassVar[bool] = True
    flattens: ClassVar[bool] = True
    vectors: Tensor
    orthogonal: bool = False

    def check(self) -> None:
        axes(2, hra_u=self.vectors)

    @property
    def known(self) -> tuple[int, ...]:
        return (0, self.vectors.shape[0])

    @property
    def rank(self) -> int:
        return self.vectors.shape[1]

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        left, right = (moved(load, half) for half in self._pair())
        return Prepared(lambda start, stop, base: product(product(base, left), right) * strength)

    def _pair(self) -> tuple[np.ndarray, np.ndarray]:
        """[i,r] and [r,i] whose product is the whole chain less 1."""
        with np.errstate(invalid="ignore", divide="ignore"):  # a vector of zeros has no direction: the result is NaN
            vectors = double(self.vectors)
            if self.orthogonal:
                for n in range(self.rank):
                    before = vectors[:, :n]
                    vectors[:, n] -= before @ (before.T @ vectors[:, n])
                    vectors[:, n] /= np.linalg.norm(vectors[:, n])
            units = vectors / np.linalg.norm(vectors, axis=0)
        chain = np.zeros((self.rank, len(units)))
        for n, unit in enumerate(units.T):
            image = chain @ unit  # where the chain so far takes it, in terms of the vectors
            image[n] += 1
            chain -= 2 * np.outer(image, unit)
        return units, chain


@dataclass(frozen=True)
class Hira(Around):
    """HiRA: W' = W * (1 + up @ down), entry by entry. ``direction`` holds the pair, alpha None."""

    kind = "hira"
    direction: LowRank

    @property
    def layer(self) -> Layer:
        """How the base stores the weight."""
        return self.direction.layer

    def oriented(self, layer: Layer) -> Hira:
        """The same update for a base that stores its weight as ``layer``."""
        return replace(self, direction=self.direction.oriented(layer))

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        direction = self.direction.prepare(load, strength)
        return Prepared(lambda start, stop, base: base * direction.delta(start, stop, None))


@dataclass(frozen=True, kw_only=True)
class BlockAffine(Tuner):
    """MiSS with ``bat``: W'_ab = W_ab + W_ab M_a + M_a for each r x r block; blocks [o/r,r,r] holds the M_a."""

    word: ClassVar[str] = "miss"
    plain_only: ClassVar[bool] = True
    block: Tensor

    def check(self) -> None:
        axes(3, miss_block=self.block)
        if self.block.shape[1] != self.block.shape[2]:
            raise FormatError(f"miss_block of shape {list(self.block.shape)} holds no square blocks")

    @property
    def known(self) -> tuple[int, ...]:
        return (self.block.shape[0] * self.block.shape[1], 0)

    @property
    def rank(self) -> int:
        return self.block.shape[1]

    def fits(self, plain: tuple[int, ...]) -> bool:
        return super().fits(plain) and plain[1] % self.rank == 0

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        r = self.rank

        def delta(start: int, stop: int, base: Array | None) -> Array:
            assert base is not None
            change = base * 0
            for n in range(start // r, -(-stop // r)):
                first, last = max(start, n * r), min(stop, (n + 1) * r)
                block = load(self.block.slice(n, n + 1))[0]  # [r,r]
                own = base[first - start : last - start].reshape(last - first, -1, r)  # [rows,i/r,r]
                made = product(own, block) + block[first - n * r : last - n * r, None]
                change[first - start : last - start] = made.reshape(last - first, -1)
            return change * strength

        return Prepared(delta)


class BoneAffine(BlockAffine):
    """Bone with ``bat``, the former name of MiSS."""

    word: ClassVar[str] = "bone"


@dataclass(frozen=True, kw_only=True)
class Road(Tuner):
    """RoAd: pairs of outputs are turned by an angle and stretched, W'_p = a_p W_p - b_p W_q, W'_q = a_q W_q + b_q W_p.

    Within each group of outputs those of the first half pair with those of the second. a = alpha cos(theta) and b =
    alpha sin(theta): of each pair (variant 1), of each output (2), or with angles and lengths of their own (4); theta
    and alpha [o/2], [o], [2o]. The layer's bias is turned as well: ``of_bias``.
    """

    word: ClassVar[str] = "road"
    plain_only: ClassVar[bool] = True
    theta: Tensor
    alphas: Tensor
    variant: int = 1
    group: int = 64
    of_bias: bool = False
    homogeneous: ClassVar[bool] = True

    def check(self) -> None:
        axes(1, road_theta=self.theta, road_alpha=self.alphas)
        chained(length=(("road_theta", self.theta, 0), ("road_alpha", self.alphas, 0)))
        size = self.theta.shape[0] * 2 // self.variant if self.variant in (1, 2, 4) else 0
        if size == 0 or self.group < 2 or self.group % 2 or size % self.group or self.theta.shape[0] * 2 % self.variant:
            raise FormatError(f"RoAd of variant {self.variant}, groups of {self.group}, {self.theta.shape[0]} angles")

    @property
    def known(self) -> tuple[int, ...]:
        size = self.theta.shape[0] * 2 // self.variant
        return (size,) if self.of_bias else (size, 0)

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        own, other = (moved(load, column) for column in self._columns())
        half = self.group // 2

        def reach(start: int, stop: int) -> tuple[int, int]:
            return start // self.group * self.group, -(-stop // self.group) * self.group

        def delta(start: int, stop: int, base: Array | None) -> Array:
            assert base is not None
            low, high = reach(start, stop)
            pairs = base.reshape(-1, 2, half, base.shape[-1])
            turned = namespace(base).stack([-pairs[:, 1], pairs[:, 0]], 1).reshape(base.shape)
            change = base * (own[low:high, None] - 1) + turned * other[low:high, None]
            return change[start - low : stop - low] * strength

        return Prepared(delta, reach=reach)

    @property
    def mixes(self) -> int:
        return self.group

    def _columns(self) -> tuple[np.ndarray, np.ndarray]:
        """What each output is multiplied by, and its partner: [o] each."""
        theta, alpha = double(self.theta), double(self.alphas)
        if self.variant == 1:
            theta, alpha = (np.repeat(v.reshape(-1, self.group // 2), 2, axis=0).ravel() for v in (theta, alpha))
        if self.variant < 4:
            return alpha * np.cos(theta), alpha * np.sin(theta)
        (cos, sin), (one, other) = (v.reshape(-1, 2, self.group).swapaxes(0, 1) for v in (theta, alpha))
        return (one * np.cos(cos)).ravel(), (other * np.sin(sin)).ravel()


@dataclass(frozen=True, kw_only=True)
class Glora(Tuner):
    """GLoRA of PEFT: W' = W + W * scale + shift, and b' = b + b * bias_scale + bias_shift.

    scale and shift are products of a pair [o,r], [r,i], or one tensor that is broadcast: [o,1], [1]; the bias' are [o]
    or [1]. ``column`` [i,1] holds zeros: what PEFT adds to the bias by way of the weight is refused on reading.
    ``of_bias``: the update of the layer's bias.
    """

    word: ClassVar[str] = "glora"
    plain_only: ClassVar[bool] = True
    scale: tuple[Tensor, ...]
    shift: tuple[Tensor, ...]
    bias_scale: Tensor
    bias_shift: Tensor
    column: Tensor
    of_bias: bool = False

    def check(self) -> None:
        for name, path in (("glora_A", self.scale), ("glora_B", self.shift)):
            if len(path) == 2:
                axes(2, **{f"{name}.Xd": path[0], f"{name}.Xu": path[1]})
                chained(rank=((f"{name}.Xd", path[0], 1), (f"{name}.Xu", path[1], 0)))
            elif len(path) != 1 or len(path[0].shape) not in (1, 2):
                raise FormatError(f"{name} is neither a pair nor one tensor")
        axes(1, glora_D=self.bias_scale, glora_E=self.bias_shift)
        axes(2, glora_C=self.column)
        sizes = {n for path in (self.scale, self.shift) for n in _sizes(path)}
        if len({o for o, _ in sizes} - {0}) > 1 or len({i for _, i in sizes} - {0}) > 1:
            raise FormatError(f"glora_A and glora_B are of weights of different shapes: {sorted(sizes)}")

    @property
    def known(self) -> tuple[int, ...]:
        sizes = [_sizes(path)[0] for path in (self.scale, self.shift)]
        biases = [t.shape[0] for t in (self.bias_scale, self.bias_shift) if t.shape[0] > 1]
        out = max(o for o, _ in sizes)
        if self.of_bias:
            return (max([out, *biases]),)
        return (out, max(i for _, i in sizes) or (self.column.shape[0] if self.column.shape[0] > 1 else 0))

    @property
    def slots(self) -> Mapping[str, Tensor]:
        found = super().slots
        return {n: t for n, t in found.items() if n.startswith("bias") == self.of_bias and n != "column"}

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        if self.column.size and np.abs(double(self.column)).max():
            raise FormatError("glora_C changes the bias by way of the weight, which is not supported")
        if self.of_bias:
            times, plus = load(self.bias_scale), load(self.bias_shift)
            return Prepared(
                lambda start, stop, base: (
                    (base * _rows(times, start, stop)[:, None] + _rows(plus, start, stop)[:, None]) * strength
                )
            )
        scale, shift = (_path(load, path) for path in (self.scale, self.shift))
        return Prepared(lambda start, stop, base: (base * scale(start, stop) + shift(start, stop)) * strength)


def _sizes(path: tuple[Tensor, ...]) -> list[tuple[int, int]]:
    """(o, i) as a path tells it, 0 for what is broadcast."""
    if len(path) == 2:
        return [(path[0].shape[0], path[1].shape[1])]
    shape = path[0].shape if len(path[0].shape) == 2 else (1, 1)
    return [(shape[0] if shape[0] > 1 else 0, shape[1] if shape[1] > 1 else 0)]


def _path(load: Load, path: tuple[Tensor, ...]) -> Callable[[int, int], Array]:
    """Rows of a path of GLoRA, to be broadcast."""
    if len(path) == 2:
        down, up = load(path[0]), load(path[1])
        return lambda start, stop: down[start:stop] @ up
    whole = load(path[0]).reshape(-1, path[0].shape[-1])
    return lambda start, stop: _rows(whole, start, stop)


def _rows(values: Array, start: int, stop: int) -> Array:
    return values if len(values) == 1 else values[start:stop]


@dataclass(frozen=True, kw_only=True)
class Injection(Tuner):
    """DEFT: W' = W - Q (P^T W) + scale x Q content: a subspace of the outputs is emptied and filled anew.

    basis [o,r]: with ``qr`` Q = P = its orthonormal factor, with ``relu`` Q = basis and P = its positive part; content
    [r,i], none where the subspace stays empty.
    """

    word: ClassVar[str] = "deft"
    basis: Tensor
    content: Tensor | None = None
    method: str = "relu"
    scale: float = 1.0

    def check(self) -> None:
        axes(2, deft_P=self.basis)
        if self.content is not None:
            axes(2, deft_R=self.content)
            chained(rank=(("deft_P", self.basis, 1), ("deft_R", self.content, 0)))
        if self.method not in ("relu", "qr"):
            raise FormatError(f"decomposition_method is {self.method!r}")

    @property
    def known(self) -> tuple[int, ...]:
        return (self.basis.shape[0], self.content.shape[1] if self.content is not None else 0)

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    @property
    def scaling(self) -> float:
        return self.scale

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        basis = double(self.basis)
        if self.method == "qr":
            basis = np.linalg.qr(basis)[0]
        put, taken = moved(load, basis), moved(load, np.maximum(basis, 0) if self.method == "relu" else basis)
        content = 0.0 if self.content is None else load(self.content) * self.scale
        if self.layer == "transposed":  # the columns of W lie in rows, each for itself
            own: Any = content if isinstance(content, float) else content.T
            return Prepared(
                lambda start, stop, base: product(_rows_of(own, start, stop) - product(base, taken), put.T) * strength,
            )
        held: list[Array] = []

        def scan(blocks: Iterable[Block]) -> None:
            held[:] = [sum(product(taken[start:stop].T, base) for start, stop, base in blocks)]  # [r,i]

        return Prepared(lambda start, stop, base: product(put[start:stop], content - held[0]) * strength, scan)


def _rows_of(values: Any, start: int, stop: int) -> Any:
    return values if isinstance(values, float) else values[start:stop]


@dataclass(frozen=True, kw_only=True)
class Subspace(Tuner):
    """OSF: the smallest singular components of W are replaced, W' = W - low(W) + up @ diag(values) @ down.

    up [o,n], values [n], down [n,i]: as many components as are dropped, min(o,i) less the effective rank.
    """

    word: ClassVar[str] = "osf"
    plain_only: ClassVar[bool] = True
    up: Tensor
    values: Tensor
    down: Tensor

    def check(self) -> None:
        axes(2, U_low=self.up, V_low=self.down)
        axes(1, S_low=self.values)
        chained(rank=(("U_low", self.up, 1), ("S_low", self.values, 0), ("V_low", self.down, 0)))
        if self.rank > min(self.known):
            raise FormatError(f"{self.rank} singular values of a weight of shape {list(self.known)}")

    @property
    def known(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        return self.values.shape[0]

    @property
    def makes(self) -> int:
        return 6 * math.prod(self.plain)  # the whole weight in float64, and what its components are found with

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        up, down = load(self.up) * load(self.values), load(self.down)
        dropped: list[Array] = []

        def scan(blocks: Iterable[Block]) -> None:
            whole = [cast(base, namespace(base).float64) for _, _, base in blocks]
            dropped[:] = [cast(half, up.dtype) for half in smallest(namespace(whole[0]).concatenate(whole), self.rank)]

        def delta(start: int, stop: int, base: Array | None) -> Array:
            left, right = dropped
            return (up[start:stop] @ down - left[start:stop] @ right) * strength

        return Prepared(delta, scan)


@dataclass(frozen=True, kw_only=True)
class Frod(Tuner):
    """FRoD: W = U diag(lambda) V^T with a V shared by a category of modules; W' = U (S + diag(diagonal)) V^T.

    basis V [i,i], diagonal [i], values [n] of S at index [2,n]. lambda are the lengths of the columns of W V^-T, U the
    columns made of length one (zeros stay zeros).
    """

    word: ClassVar[str] = "frod"
    plain_only: ClassVar[bool] = True
    indices: ClassVar[frozenset[str]] = frozenset(["index", "extent"])
    hollow: ClassVar[bool] = True  # S may have no entry
    diagonal: Tensor
    values: Tensor
    basis: Tensor
    index: Tensor
    extent: Tensor

    def check(self) -> None:
        axes(1, frod_lambda_l=self.diagonal, frod_lambda_s_values=self.values, frod_s_size=self.extent)
        axes(2, frod_V=self.basis, frod_s_indices=self.index)
        chained(width=(("frod_lambda_l", self.diagonal, 0), ("frod_V", self.basis, 0), ("frod_V", self.basis, 1)))
        chained(number_of_values=(("values", self.values, 0), ("indices", self.index, 1)))
        if self.index.shape[0] != 2 or self.diagonal.size == 0 or self.extent.shape != (2,):
            raise FormatError(f"frod_s_indices of shape {list(self.index.shape)}")

    @property
    def known(self) -> tuple[int, ...]:
        return (0, self.diagonal.shape[0])

    @property
    def makes(self) -> int:
        return 10 * self.diagonal.size**2  # a few square matrices in float64

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        inner = double(self.basis)
        try:
            inverse = np.linalg.inv(inner).T
        except np.linalg.LinAlgError:
            inverse = np.linalg.pinv(inner, rcond=1e-6).T
        middle = np.diag(double(self.diagonal))
        np.add.at(middle, tuple(entries(self.index, len(middle))), double(self.values))
        back, right = moved(load, inverse), middle @ inner.T
        held: list[Array] = []

        def scan(blocks: Iterable[Block]) -> None:
            squares = np.zeros(len(inner))
            for _, _, base in blocks:
                turned = cast(product(base, back), namespace(base).float64)
                squares += np.asarray((turned * turned).sum(0).tolist())
            lengths = np.sqrt(squares)
            held[:] = [moved(load, right * np.where(lengths > 1e-12, 1 / np.maximum(lengths, 1e-12), 0.0)[:, None])]

        return Prepared(lambda start, stop, base: (product(product(base, back), held[0]) - base) * strength, scan)


ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "tanh": lambda x: np.tanh(x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "linear": lambda x: x,
}
"""What may stand between the layers of PEANUT, by transformers' names."""


@dataclass(frozen=True, kw_only=True)
class Network(Tuner):
    """PEANUT: delta = scale x up @ f(down @ W), f a small network over the columns.

    down [r,o], up [o,r]; f begins with an activation, goes through as many ``encoders`` as ``decoders`` [r,r], each
    with an activation, and adds to what a decoder gives what the matching encoder was given.
    """

    word: ClassVar[str] = "peanut"
    plain_only: ClassVar[bool] = True
    down: Tensor
    up: Tensor
    encoders: tuple[Tensor, ...] = ()
    decoders: tuple[Tensor, ...] = ()
    activation: str = "relu"
    scale: float = 1.0

    def check(self) -> None:
        axes(2, peanut_A=self.down, peanut_B=self.up)
        out, r = self.up.shape
        inner = {layer.shape for layer in (*self.encoders, *self.decoders)}
        if self.down.shape != (r, out) or inner - {(r, r)} or len(self.encoders) != len(self.decoders):
            raise FormatError(
                f"peanut_A {list(self.down.shape)}, peanut_B {list(self.up.shape)} and layers do not chain"
            )
        if self.activation not in ACTIVATIONS:
            raise FormatError(f"act_fn {self.activation!r} is not supported", hint=f"{', '.join(ACTIVATIONS)} are")

    @property
    def known(self) -> tuple[int, ...]:
        return (self.up.shape[0], 0)

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def scaling(self) -> float:
        return self.scale

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        up, down = load(self.up) * (self.scale * strength), load(self.down)
        held: list[Array] = []

        def scan(blocks: Iterable[Block]) -> None:
            seen = sum(product(down[:, start:stop], base) for start, stop, base in blocks)  # [r,i]
            wide = cast(seen, namespace(seen).float64)
            values = wide if isinstance(wide, np.ndarray) else wide.cpu().numpy()
            held[:] = [moved(load, self._through(values))]

        return Prepared(lambda start, stop, base: product(up[start:stop], held[0]), scan)

    def _through(self, values: np.ndarray) -> np.ndarray:
        """f of values [r,i]."""
        act = ACTIVATIONS[self.activation]
        values, given = act(values), []
        for layer in self.encoders:
            given.append(values)
            values = act(double(layer) @ values)
        for layer in self.decoders:
            values = act(double(layer) @ values) + given.pop()
        return values


class LnTuning(Replace):
    """LN tuning: the weight or bias of a norm, trained whole."""

    kind = "ln_tuning"


@dataclass(frozen=True)
class BiasShift(Dense):
    """BEFT: what is added to a layer's bias; value [o]."""

    kind: str = "beft"
