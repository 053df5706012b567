"""OFT and BOFT: a weight turned by an orthogonal matrix that is block-diagonal, or a chain of such (a butterfly).

An orthogonal block is stored as the skew-symmetric matrix of its Cayley transform. kohya and LyCORIS turn the outputs
of a weight, W'_k = R_k^T W_k for each block of rows; PEFT since 0.14 turns the inputs, W' = W R^T. The change W' - W
is what a strength multiplies, as for every kind (so do sd-scripts and LyCORIS' diag-OFT; LyCORIS' BOFT turns each
factor less far instead). Source: Qiu et al. 2023, Liu et al. 2024; kohya-ss/sd-scripts `oft.py` and `oft_flux.py`,
LyCORIS 4, AUTOMATIC1111 `network_oft.py`, huggingface/peft 0.11 to 0.21.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice

from loratool.errors import FormatError
from loratool.kinds.halves import wide
from loratool.kinds.joined import joined
from loratool.lazy import np
from loratool.tensors import BLOCK, Array, Tensor, numpy_dtype
from loratool.update import Layer, Load, Prepared, Update, alike, namespace


@dataclass(frozen=True)
class Stage:
    """One block-diagonal factor: 1 + ``less_one`` [n,b,b] acts on rows taken in ``order`` (None: as they are).

    One block may stand for all.
    """

    less_one: np.ndarray
    order: np.ndarray | None = None


class Turn(Update):
    """A weight whose outputs are turned, or its inputs where ``on_input``, a kernel flattened into these.

    ``weight`` is the shape of the weight where it is known: the tensors tell one axis of it, and ``shape`` says 0 for
    the others. ``layer`` says how the base stores the weight.
    """

    layer: Layer
    weight: tuple[int, ...] | None
    on_input = False
    kind = "oft"

    @property
    @abstractmethod
    def size(self) -> int:
        """Length of the axis that is turned; 0 where the base decides it."""

    @property
    def by_rows(self) -> bool:
        """Whether rows of the weight as the base stores it are turned; else its columns."""
        return self.on_input == (self.layer == "transposed")

    @property
    def others(self) -> int:
        """Length of the other axis; 0 where it is not known."""
        return 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight or ((self.size, self.others) if self.by_rows else (self.others, self.size))

    def sized(self, shape: tuple[int, ...]) -> Update | None:
        return replace(self, weight=shape) if self._fits(shape) else None  # type: ignore[type-var]

    def _fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the turned axis is of a weight of this shape."""
        return len(shape) > 1 and self.size in (0, _sides(shape)[not self.by_rows])

    def _check(self) -> None:
        """Raise FormatError where the parts do not fit each other."""
        if self.weight and not self._fits(self.weight):
            raise FormatError(f"a {self.kind} of {self.size} rows or columns for a weight of shape {list(self.weight)}")

    def oriented(self, layer: Layer) -> Update:
        """The same update for a base that stores its weight as ``layer``."""
        return replace(self, layer=layer, weight=None)  # type: ignore[type-var]


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight, a kernel flattened into these."""
    return shape[0], math.prod(shape[1:])


class Rotation(Turn):
    """W' = stretch * (M W) on the outputs of a layer, stretch * (W M^T) on its inputs, M one orthogonal matrix."""

    block_share = False
    """Whether one block stands for as many as the base has."""

    @property
    def blocks(self) -> Tensor:
        """What M is made of: the first of the slots."""
        return next(iter(self.slots.values()))

    @property
    def stretch(self) -> Tensor | None:
        """A factor for each output, after the turn: the second of the slots, where there is one."""
        return next(islice(self.slots.values(), 1, None), None)

    @property
    def size(self) -> int:
        return 0 if self.block_share else self.blocks.shape[0] * self.span

    @property
    def span(self) -> int:
        """How many neighbours along the axis are mixed: the axis is a multiple of it."""
        return self.blocks.shape[-1]

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The block-diagonal factors of M, the first to act first."""

    @property
    def mixes(self) -> int:
        return self.span if self.by_rows else 1

    @property
    def others(self) -> int:
        return self.stretch.size if self.stretch is not None and self.on_input else 0

    def _fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the turned axis and the stretch are of a weight of this shape."""
        if not super()._fits(shape):
            return False
        axis, outputs = _sides(shape)[not self.by_rows], _sides(shape)[self.layer == "transposed"]
        return axis % self.span == 0 and (self.stretch is None or self.stretch.size == outputs)

    def _check(self) -> None:
        if self.block_share and self.blocks.rows != 1:
            raise FormatError(f"an OFT of {self.blocks.rows} shared blocks")
        if self.size % self.span:
            raise FormatError(f"a {self.kind} whose factors mix {self.span} rows of {self.size}")
        if self.stretch is not None and not self.on_input and self.stretch.size != self.size:
            raise FormatError(f"a {self.kind} of {self.size} outputs with {self.stretch.size} factors")
        super()._check()

    def part(self, start: int, stop: int) -> Update | None:
        """Every row of a plain weight is turned alike where its inputs are; of outputs, rows of whole spans are."""
        if self.by_rows:
            if start % self.span or stop % self.span:
                raise FormatError(f"an {self.kind} mixes {self.span} rows of a fused weight: it cannot be split there")
            return None
        slots = {slot: self.slots[slot] for slot in self._stretched_rows}
        changes = {slot: tensor.reshape(tensor.size).slice(start, stop) for slot, tensor in slots.items()}
        weight = self.weight and (stop - start, *self.weight[1:])
        return replace(self, **changes, weight=weight)  # type: ignore[type-var]

    def stacked(self, parts: Sequence[Update], heights: Sequence[int]) -> Update | None:
        return None if self.by_rows else joined(self, parts, heights, self._stretched_rows)

    @property
    def _stretched_rows(self) -> tuple[str, ...]:
        """The slots that hold a value for each row of the weight as stored."""
        return () if self.layer == "transposed" else tuple(self.slots)[1:]

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        factors = [(load(Tensor.of(stage.less_one)), stage.order) for stage in self.stages()]
        stretch = None if self.stretch is None else load(self.stretch).reshape(-1)

        def reach(start: int, stop: int) -> tuple[int, int]:
            return start // self.span * self.span, -(-stop // self.span) * self.span

        kept = threading.local()  # of the last span: the next block mostly lies in the same, and spans may be long

        def turned(base: Array, low: int) -> Array:
            if getattr(kept, "place", None) != (low, len(base)):
                kept.change, kept.place = _turned(base, low, factors), (low, len(base))
            return kept.change

        def delta(start: int, stop: int, base: Array | None) -> Array:
            assert base is not None
            own = base
            if self.by_rows:
                low, high = reach(start, stop)
                own = base[start - low : stop - low]
                whole = (low, high) == (start, stop)
                change = _turned(base, low, factors) if whole else turned(base, low)[start - low : stop - low]
            else:
                change = _turned(base.T, 0, factors).T
            if stretch is not None:
                by = stretch[None, :] if self.layer == "transposed" else stretch[start:stop, None]
                change = change * by + own * (by - 1)
            return change * strength

        return Prepared(delta, reach=reach if self.by_rows else None)


def _turned(value: Array, first: int, factors: list[tuple[Array, np.ndarray | None]]) -> Array:
    """M W - W for rows ``value`` [rows,-1] of W, whole spans that begin at row ``first``; ``factors`` are less 1."""
    change: Array = value * 0
    for minus, order in factors:
        turn, rows = alike([minus, value + change])
        own = None if order is None else order[first : first + len(rows)] - first
        rows = rows if own is None else rows[own]
        size = turn.shape[-1]
        count, index = len(rows) // size, first // size if len(turn) > 1 else 0
        moved = (turn[index : index + count] @ rows.reshape(count, size, -1)).reshape(value.shape)  # [n,b,b] [n,b,-1]
        change = change + (moved if own is None else moved[np.argsort(own)])
    return change


def skew(blocks: np.ndarray) -> np.ndarray:
    """B - B^T of each block [n,b,b]."""
    return np.asarray(blocks - np.swapaxes(blocks, 1, 2))


def cayley(q: np.ndarray) -> np.ndarray:
    """(1 + Q) (1 - Q)^-1 of skew-symmetric blocks [n,b,b]: orthogonal, and 1 - Q is never singular."""
    one = np.eye(q.shape[-1])
    return np.asarray(np.linalg.solve(one - q, one + q))


def each_block(stored: Tensor, size: int, turn: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """``turn`` of the rows of a tensor [n,..], less 1: [n,b,b] in float32 (float64 where stored so).

    Computed in float64, a few MiB at a time: kohya's blocks of a large layer are millions of numbers each.
    """
    found = np.empty((stored.rows, size, size), numpy_dtype(wide(stored)))
    for rows in _spans(stored, size):
        found[rows] = turn(_float64(stored, rows)) - np.eye(size)
    return found


def shrinking(blocks: Tensor, alpha: float | None, outputs: int) -> float:
    """What B - B^T of all blocks together is multiplied with, so that its norm is at most alpha x outputs.

    No alpha, or 0, is no constraint (diffusion 1.2.3, trap 45).
    """
    limit = (alpha or 0.0) * outputs
    if limit <= 0:
        return 1.0
    squares = (np.square(skew(_float64(blocks, rows))).sum() for rows in _spans(blocks, blocks.shape[-1]))
    norm = math.sqrt(float(sum(squares)))
    return limit / norm if norm > limit else 1.0


def _spans(stored: Tensor, size: int) -> Iterator[slice]:
    step = max(1, BLOCK // size**2)
    return (slice(start, min(start + step, stored.rows)) for start in range(0, stored.rows, step))


def _float64(stored: Tensor, rows: slice) -> np.ndarray:
    return stored.float(rows.start, rows.stop).astype(np.float64)


def check_blocks(blocks: Tensor, axes: int) -> None:
    """Raise FormatError where these are no square blocks [..,n,b,b]."""
    shape = blocks.shape
    if len(shape) != axes or shape[-1] != shape[-2] or blocks.size == 0:
        raise FormatError(f"rotations of shape {list(shape)} are no {axes - 2 and 'stack of '}square blocks")


# ---------------------------------------------------------------- kohya, LyCORIS: on the outputs


@dataclass(frozen=True)
class OFT(Rotation):
    """diag-OFT: W'_k = rescale * R_k^T W_k, R = (1 + Q) (1 - Q)^-1, Q = B - B^T for each block B of rows.

    oft_blocks [n,b,b] of n*b outputs, rescale of one value for each output. ``alpha`` as stored is the constraint,
    times the outputs, on the norm of Q (kohya, LyCORIS, A1111; diffusion trap 45), none or 0 sets none. ``direct``:
    the blocks hold R itself (LyCORIS before 2024, `oft_diag`), and alpha says nothing.
    """

    oft_blocks: Tensor
    rescale: Tensor | None = None
    alpha: float | None = None
    direct: bool = False
    layer: Layer = "plain"
    weight: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_blocks(self.oft_blocks, 3)
        self._check()

    def stages(self) -> list[Stage]:
        by = shrinking(self.oft_blocks, self.alpha, self.size)

        def turn(blocks: np.ndarray) -> np.ndarray:
            return np.swapaxes(blocks if self.direct else cayley(skew(blocks) * by), 1, 2)

        return [Stage(each_block(self.oft_blocks, self.span, turn))]

    @property
    def _limited(self) -> bool:
        """Whether one constraint spans all blocks."""
        return bool(self.alpha) and not self.direct

    def part(self, start: int, stop: int) -> Update | None:
        super().part(start, stop)
        if self._limited or self.layer != "plain":
            return None
        return replace(
            self,
            oft_blocks=self.oft_blocks.slice(start // self.span, stop // self.span),
            rescale=self.rescale and self.rescale.slice(start, stop),
            weight=self.weight and (stop - start, *self.weight[1:]),
        )

    def stacked(self, parts: Sequence[Update], heights: Sequence[int]) -> Update | None:
        whole = None if self._limited else joined(self, parts, heights, ("oft_blocks", "rescale"))
        return whole or segmented(parts, heights)

    def still(self, height: int) -> OFT | None:
        if height % self.span or self.layer != "plain":
            return None
        blocks = np.zeros((height // self.span, self.span, self.span))
        return replace(
            self,
            oft_blocks=Tensor.of(blocks + np.eye(self.span) * self.direct, self.oft_blocks.dtype),
            rescale=self.rescale and Tensor.of(np.ones((height, *self.rescale.shape[1:])), self.rescale.dtype),
            weight=self.weight and (height, *self.weight[1:]),
        )


@dataclass(frozen=True)
class SegmentOFT(Turn):
    """kohya's OFT of a fused FLUX projection: a diag-OFT for each segment of the outputs (`oft_blocks.0`, `.1`, ...).

    oft_blocks: a [n,b,b] for each segment of n*b outputs; the constraint of each is ``alpha`` times its own outputs.
    """

    oft_blocks: tuple[Tensor, ...]
    alpha: float | None = None
    layer: Layer = "plain"
    weight: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.oft_blocks:
            raise FormatError("an OFT without a segment")
        for blocks in self.oft_blocks:
            check_blocks(blocks, 3)
        self._check()

    @property
    def segments(self) -> tuple[OFT, ...]:
        """The update of each segment."""
        return tuple(OFT(blocks, alpha=self.alpha) for blocks in self.oft_blocks)

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)

    @property
    def mixes(self) -> int:
        return max(segment.span for segment in self.segments)

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        if self.layer == "transposed":
            raise FormatError("an OFT of segments for a transposed weight")
        prepared = [segment.prepare(load, strength) for segment in self.segments]
        edges = list(accumulate((segment.size for segment in self.segments), initial=0))

        def touched(start: int, stop: int) -> list[tuple[Prepared, int, int, int]]:
            """(segment, its first row, rows of it) that overlap rows [start, stop)."""
            spans = zip(prepared, edges, edges[1:], strict=False)
            return [
                (p, low, max(start, low) - low, min(stop, high) - low)
                for p, low, high in spans
                if max(start, low) < min(stop, high)
            ]

        def reach(start: int, stop: int) -> tuple[int, int]:
            found = [(low, *p.reach(a, b)) for p, low, a, b in touched(start, stop) if p.reach is not None]
            return found[0][0] + found[0][1], found[-1][0] + found[-1][2]

        def delta(start: int, stop: int, base: Array | None) -> Array:
            assert base is not None
            first, _ = reach(start, stop)
            blocks = []
            for p, low, a, b in touched(start, stop):
                assert p.reach is not None
                begin, end = p.reach(a, b)
                blocks.append(p.delta(a, b, base[low + begin - first : low + end - first]))
            return namespace(base).concatenate(blocks)

        return Prepared(delta, reach=reach)

    def part(self, start: int, stop: int) -> Update | None:
        edges = list(accumulate((segment.size for segment in self.segments), initial=0))
        if start not in edges or stop not in edges:
            return None
        blocks = self.oft_blocks[edges.index(start) : edges.index(stop)]
        weight = self.weight and (stop - start, *self.weight[1:])
        if len(blocks) > 1:
            return SegmentOFT(blocks, self.alpha, weight=weight)
        return OFT(blocks[0], alpha=self.alpha, weight=weight)

    def stacked(self, parts: Sequence[Update], heights: Sequence[int]) -> Update | None:
        return segmented(parts, heights)

    def still(self, height: int) -> OFT | None:
        return next((found for segment in self.segments if (found := segment.still(height))), None)


def segmented(parts: Sequence[Update], heights: Sequence[int]) -> SegmentOFT | None:
    """The OFT whose segments are ``parts``; None where they are more than that, or have several constraints."""
    found: list[Tensor] = []
    for part, height in zip(parts, heights, strict=True):
        plain = isinstance(part, SegmentOFT) or (isinstance(part, OFT) and part.rescale is None and not part.direct)
        if not isinstance(part, OFT | SegmentOFT) or not plain or part.layer != "plain" or part.size != height:
            return None
        found += [part.oft_blocks] if isinstance(part, OFT) else part.oft_blocks
    alphas = {part.alpha for part in parts if isinstance(part, OFT | SegmentOFT)}
    weights = {part.weight and part.weight[1:] for part in parts if isinstance(part, OFT | SegmentOFT)}
    rest = weights.pop() if len(weights) == 1 else None
    weight = None if rest is None else (sum(heights), *rest)
    return SegmentOFT(tuple(found), alphas.pop(), weight=weight) if len(alphas) == 1 else None


class Butterfly(Rotation):
    """A chain of block-diagonal factors on rows in several orders, blocks [m,n,b,b]."""

    kind = "boft"

    def __post_init__(self) -> None:
        check_blocks(self.blocks, 4)
        factors, count, size, _ = self.blocks.shape
        if factors > 1 and (size % 2 or factors > 63 or count % (1 << (factors - 1))):
            raise FormatError(f"{factors} butterfly factors of {count} blocks of {size} do not interlock")
        self._check()

    @property
    def size(self) -> int:
        return self.blocks.shape[1] * self.blocks.shape[2]

    @property
    def span(self) -> int:
        return self.blocks.shape[2] << (self.blocks.shape[0] - 1)

    def factors(self, turn: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """``turn`` of each block, less 1: [m,n,b,b]."""
        return each_block(self._flat, self.blocks.shape[-1], turn).reshape(self.blocks.shape)

    @property
    def _flat(self) -> Tensor:
        """The blocks of all factors, [m*n,b,b]."""
        count, blocks, *size = self.blocks.shape
        return self.blocks.reshape(count * blocks, *size)


@dataclass(frozen=True)
class BOFT(Butterfly):
    """LyCORIS' BOFT: W' = rescale * (R_m-1 ... R_1 R_0 W), each R_i block-diagonal on rows taken in another order.

    oft_blocks [m,n,b,b] of n*b outputs (an OFT has one axis less, diffusion trap 46); R from the blocks as in `OFT`,
    but not transposed. Factor i takes rows 0, k, 1, k+1, ... of each 2k rows, k = 2^i b/2. ``alpha`` as in `OFT`.
    """

    oft_blocks: Tensor
    rescale: Tensor | None = None
    alpha: float | None = None
    layer: Layer = "plain"
    weight: tuple[int, ...] | None = None

    def stages(self) -> list[Stage]:
        count, _, size, _ = self.blocks.shape
        by = shrinking(self._flat, self.alpha, self.size)
        turns = self.factors(lambda b: cayley(skew(b) * by))
        rows = np.arange(self.size)
        orders = (rows.reshape(-1, 2, size // 2 << i).swapaxes(1, 2).reshape(-1) for i in range(count))
        return [Stage(turn, order) for turn, order in zip(turns, orders, strict=True)]


# ---------------------------------------------------------------- PEFT: on the inputs


@dataclass(frozen=True)
class PeftOFT(Rotation):
    """PEFT's OFT since 0.16: W' = W R^T, a block R of the inputs for each row of oft_R.

    oft_R [n,b(b-1)/2]: the upper triangle of a skew-symmetric K, row by row; one row where ``block_share``, of as many
    blocks as the base has. R = 1 + 2K + 2K^2 + ... + K^(terms-1), or (1 - K) (1 + K)^-1 where ``neumann_terms`` is 0
    (`use_cayley_neumann` false; the two turn in opposite directions). ``eps``: K of each block is no longer than
    eps / sqrt(n) (`coft`). ``kernels_back``: a convolution is turned the other way, W' = W R (OneTrainer and those
    who follow it); once the weight's shape is known, that of K's sign says so.
    """

    oft_R: Tensor
    block_share: bool = False
    neumann_terms: int = 5
    eps: float | None = None
    kernels_back: bool = False
    layer: Layer = "plain"
    weight: tuple[int, ...] | None = None
    on_input = True

    def __post_init__(self) -> None:
        shape = self.oft_R.shape
        if len(shape) != 2 or 0 in shape or self.span * (self.span - 1) // 2 != shape[1]:
            raise FormatError(f"oft_R of shape {list(shape)} holds no triangles of square blocks")
        if not 0 <= self.neumann_terms <= 100:
            raise FormatError(f"an OFT of {self.neumann_terms} terms")
        self._check()

    @property
    def span(self) -> int:
        return (1 + math.isqrt(1 + 8 * self.oft_R.shape[1])) // 2

    def sized(self, shape: tuple[int, ...]) -> Update | None:
        if not self._fits(shape):
            return None
        back = self.kernels_back and len(shape) > 2  # R(-K) is the transpose of R(K)
        return replace(self, oft_R=_negated(self.oft_R) if back else self.oft_R, kernels_back=False, weight=shape)

    def stages(self) -> list[Stage]:
        size = self.span
        limit = bound(self.eps, self.oft_R.rows)

        def turn(triangles: np.ndarray) -> np.ndarray:
            upper = np.zeros((len(triangles), size, size))
            upper[(slice(None), *np.triu_indices(size, 1))] = triangles
            k = shortened(skew(upper), limit)
            return _neumann(k, self.neumann_terms) if self.neumann_terms else cayley(-k)

        return [Stage(each_block(self.oft_R, size, turn))]


def _negated(tensor: Tensor) -> Tensor:
    """The values with the other sign, which every dtype can say."""
    return Tensor(tensor.dtype, tensor.shape, lambda start, stop: -tensor.load(start, stop))


def _neumann(k: np.ndarray, terms: int) -> np.ndarray:
    """The truncated series of the Cayley transform, term by term as PEFT sums it: from 3 terms on, K^2 counts twice."""
    total = np.broadcast_to(np.eye(k.shape[-1]), k.shape)
    if terms < 2:
        return total
    if terms == 2:
        return np.asarray(total + 2 * k)
    power = k @ k
    total = total + 2 * k + 2 * power
    for _ in range(3, terms - 1):
        power = power @ k
        total = total + 2 * power
    return np.asarray(total + power @ k)


def bound(eps: float | None, blocks: int) -> float:
    """The norm that each of so many stored blocks has at most: PEFT's constrained OFT; infinite without ``eps``."""
    if eps is None:
        return math.inf
    if not eps > 0:
        raise FormatError(f"blocks of an OFT no longer than {eps}")
    return eps / math.sqrt(blocks)


def shortened(blocks: np.ndarray, limit: float) -> np.ndarray:
    """Blocks [n,b,b], made shorter where their norm exceeds the limit."""
    norm = np.linalg.norm(blocks, axis=(1, 2), keepdims=True)
    return np.asarray(blocks * np.minimum(1.0, limit / np.maximum(norm, 1e-300)))


@dataclass(frozen=True)
class PeftOldOFT(Rotation):
    """PEFT's OFT before 0.16, R = (1 - K) (1 + K)^-1 with K = (B - B^T) / 2 for each block B of oft_r.

    oft_r [n,b,b], one block where ``block_share``. With oft_s (0.14, 0.15; one value for each output) W' = oft_s *
    (W R^T); without (0.11 to 0.13) the outputs are turned, W'_k = R_k^T W_k. ``eps`` as configured bounds the blocks
    (`coft`), times the square of the outputs by the number of blocks, rounded up.
    """

    oft_r: Tensor
    oft_s: Tensor | None = None
    block_share: bool = False
    eps: float | None = None
    layer: Layer = "plain"
    weight: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_blocks(self.oft_r, 3)
        self._check()

    @property
    def on_input(self) -> bool:  # type: ignore[override]
        """Whether the inputs are turned."""
        return self.oft_s is not None

    @property
    def _outputs(self) -> int:
        return self.oft_s.size if self.oft_s is not None else self._count * self.span

    @property
    def _count(self) -> int:
        """Blocks of the layer, where one stands for all; as many as stored where its shape is not known."""
        if not self.block_share or not self.weight:
            return self.oft_r.shape[0]
        rows, columns = self.weight[0], math.prod(self.weight[1:])
        return (rows if self.by_rows else columns) // self.span

    def stages(self) -> list[Stage]:
        eps = self.eps and self.eps * math.ceil(self._outputs / self._count) ** 2
        limit = bound(eps, self.oft_r.rows)

        def turn(blocks: np.ndarray) -> np.ndarray:
            found = cayley(-skew(shortened(blocks, limit)) / 2)
            return found if self.on_input else np.swapaxes(found, 1, 2)

        return [Stage(each_block(self.oft_r, self.span, turn))]


@dataclass(frozen=True)
class PeftBOFT(Butterfly):
    """PEFT's BOFT: W' = boft_s * (W M^T), M a chain of m block-diagonal factors on inputs taken in another order.

    boft_R [m,n,b,b] of n*b inputs, R = (1 - K) (1 + K)^-1 with K = (B - B^T) / 2; boft_s one value for each output.
    Factor i acts on the even runs of b/2 of each 2^i b inputs, then on the odd ones.
    """

    boft_R: Tensor
    boft_s: Tensor
    layer: Layer = "plain"
    weight: tuple[int, ...] | None = None
    on_input = True

    def stages(self) -> list[Stage]:
        count, _, size, _ = self.blocks.shape
        turns = self.factors(lambda b: cayley(-skew(b) / 2))
        if count == 1:
            return [Stage(turns[0])]
        rows = np.arange(self.size)
        orders = (rows.reshape(-1, 1 << i, 2, size // 2).swapaxes(1, 2).reshape(-1) for i in range(count))
        return [Stage(turn, np.argsort(order)) for turn, order in zip(turns, orders, strict=True)]
