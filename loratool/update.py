"""The algebra: what an adapter does to one weight.

An `Update` changes a weight ``W`` into ``W'``. The additive kinds have a fixed delta; the others (DoRA) need the base
weight. Axis letters: o out, i in, r rank, k kernel. Deltas are computed in float32 or wider, scaling included, by
blocks of rows of the weight *as the base stores it*, flattened to ``[rows, -1]``, so no weight is ever needed whole.

The arithmetic is written in the operations that numpy and torch share; which of them runs is decided by the `Load`
that turns stored factors into arrays.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, ClassVar, Literal, Self

from loratool.errors import FormatError, MatchError, NumericError
from loratool.lazy import np
from loratool.tensors import Array, Tensor, numpy_dtype

Load = Callable[[Tensor], Array]  # a stored tensor -> float32 (or float64) array on the computing device
Layer = Literal["plain", "transposed", "embedding"]
"""How a layer stores its weight: ``up @ down`` itself; its transpose (HF Conv1D); or a table of rows (Embedding,
whose factors are held in the base's orientation: up [entries, r], down [r, dim])."""


def namespace(array: Array) -> Any:
    """numpy or torch, whichever ``array`` belongs to."""
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def cast(array: Array, dtype: Any) -> Array:
    """``array`` in a dtype of its own library."""
    return array.astype(dtype) if namespace(array) is np else array.to(dtype)


def alike(arrays: list[Array]) -> list[Array]:
    """Arrays of one dtype, float64 where one is: torch multiplies like with like only."""
    if len({array.dtype for array in arrays}) == 1:
        return arrays
    return [cast(array, namespace(array).float64) for array in arrays]


@dataclass(frozen=True)
class Prepared:
    """An update whose factors are loaded: asks for row blocks, any number of times, from any thread.

    ``delta(start, stop, base)`` gives rows [start, stop) of strength x (W' - W) as ``[rows, -1]``; ``base`` holds those
    rows of W flattened alike (ignored by additive kinds). Where ``scan`` is set, it must first be given every
    ``(start, stop, base)`` block once, in order. Where ``reach`` is set (rotations of outputs mix rows), ``base`` holds
    rows [lo, hi) of W instead, with ``(lo, hi) = reach(start, stop)``. ``factors`` (up [o,r], down [r,i*k], everything
    folded in) are set where the delta is their product, for those who have a better place to put it; ``dense`` where
    these hold no zero.
    """

    delta: Callable[[int, int, Array | None], Array]
    scan: Callable[[Iterable[tuple[int, int, Array]]], None] | None = None
    factors: tuple[Array, Array] | None = None
    dense: bool = False
    reach: Callable[[int, int], tuple[int, int]] | None = None


class Update(ABC):
    """What an adapter does to one weight. ``shape`` is that of the weight, as the base stores it."""

    homogeneous: ClassVar[bool] = False
    """Whether zeros stay zeros: a bias that the base does not have is then left as it is."""

    @property
    def needs_base(self) -> bool:
        """Whether the change depends on the weight, or its shape on that of the weight."""
        return True

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name of the kind in reports: ``lora``, ``dora``, ``full``, ..."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes, in the base's orientation; 0 for an axis that the file does not tell."""

    def sized(self, shape: tuple[int, ...]) -> Update | None:
        """The update for a weight that the base stores in ``shape``; None where it is for another."""
        return self if trimmed(self.shape) == trimmed(shape) else None

    def low_rank(self) -> LowRank | None:
        """The same delta as one LoRA, exactly, with tensors made when they are read; None where there is none."""
        return None

    def part(self, start: int, stop: int) -> Update | None:
        """The update of output rows [start, stop) alone, of the same kind; None where the kind has no words for it.

        Raises FormatError where the rows cannot be told apart.
        """
        return None

    def stacked(self, parts: Sequence[Update], heights: Sequence[int]) -> Update | None:
        """The update whose rows are ``parts`` (this one first), of their own kind; None where the kind has no words."""
        return None

    def still(self, height: int) -> Update | None:
        """What leaves ``height`` rows as they are and can be stacked with this update; None where the kind has none."""
        return None

    @property
    def slots(self) -> Mapping[str, Tensor]:
        """The stored tensors by slot name (``down``, ``up``, ``magnitude``, ...)."""
        return dict(tensors_of(self))

    @property
    def nbytes(self) -> int:
        """Bytes of its stored tensors."""
        return sum(tensor.nbytes for tensor in self.slots.values())

    @abstractmethod
    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        """Load what the blocks need; ``strength`` multiplies the change W' - W."""

    @property
    def rank(self) -> int | None:
        """Rank of the factors, where there is one."""
        return None

    @property
    def alpha(self) -> float | None:
        """alpha as stored, where there is one."""
        return None

    @property
    def scaling(self) -> float:
        """What multiplies the product of the factors."""
        return 1.0

    @property
    def makes(self) -> int:
        """How many float32 elements `prepare` holds at most beside those of the stored tensors."""
        return 0

    @property
    def mixes(self) -> int:
        """How many neighbouring rows of the weight one row of the result needs: whole multiples of so many."""
        return 1

    def apply(self, base: Array, strength: float = 1.0) -> Array:
        """W + strength x (W' - W) for a whole weight, in float32 or wider (for tests and small weights)."""
        flat = base.reshape(base.shape[0], -1)
        prepared = self.prepare(Tensor.float, strength)
        if prepared.scan is not None:
            prepared.scan([(0, len(flat), flat)])
        return (flat + prepared.delta(0, len(flat), flat)).reshape(base.shape)


def tensors_of(update: Update) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an update by its fields' names, those of tuples numbered; and those of an update inside it."""
    for field in fields(update):  # type: ignore[arg-type]
        value = getattr(update, field.name)
        if isinstance(value, Tensor):
            yield field.name, value
        elif isinstance(value, Update):
            yield from value.slots.items()
        elif isinstance(value, tuple):
            yield from ((f"{field.name}.{n}", t) for n, t in enumerate(value) if isinstance(t, Tensor))


class Additive(Update):
    """An update with a fixed delta: W' = W + delta."""

    @property
    def needs_base(self) -> bool:
        return False

    def delta(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of the delta, scaling included: shape [rows, *rest], float32 or wider."""
        stop = self.shape[0] if stop is None else stop
        block = self.prepare(Tensor.float).delta(start, stop, None)
        return np.asarray(block).reshape(stop - start, *self.shape[1:])

    @abstractmethod
    def scaled(self, by: float) -> Additive:
        """The update whose delta is ``by`` times this one's."""

    def factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """An exact (up [o,r], down [r,i*k]) pair of the delta, scaling folded into up; None where there is none."""
        low = self.low_rank()
        return None if low is None else low.factors()

    def __add__(self, other: Additive) -> Additive:
        return Sum((self, other))


class ByAlpha(Update):
    """An update scaled by alpha / r, alpha / sqrt(r) when rank-stabilised (Kalajdzievski 2023), 1 without alpha."""

    rank_stabilised = False

    @property
    @abstractmethod
    def rank(self) -> int:
        """r."""

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self._unit

    @property
    def _unit(self) -> float:
        """The alpha whose scaling is 1."""
        return math.sqrt(self.rank) if self.rank_stabilised else self.rank

    @property
    def explicit_alpha(self) -> float:
        """alpha, or where none is stored the one that says the same."""
        return self._unit if self.alpha is None else self.alpha

    def scaled(self, by: float) -> Self:
        """The update whose change is ``by`` times this one's."""
        return replace(self, alpha=self.explicit_alpha * by)  # type: ignore[type-var]


@dataclass(frozen=True)
class LowRank(ByAlpha, Additive):
    """LoRA: delta = scaling x up @ down (Hu et al. 2021), convolutions and Tucker cores included.

    down [r,i,*k] (or [r,i,*1] below a mid), up [o,r] (or [o,r,*1]), mid [r,r,*k] or None. ``alpha`` is kept as
    stored (None: scaling 1). Raises FormatError when the shapes do not chain.
    """

    kind = "lora"
    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    alpha: float | None = None
    rank_stabilised: bool = False
    layer: Layer = "plain"

    def __post_init__(self) -> None:
        down, up = self.down.shape, self.up.shape
        if len(down) < 2 or len(up) < 2 or math.prod(up[2:]) != 1 or 0 in (*down, *up):
            raise FormatError(f"factors of shapes down {list(down)} and up {list(up)} are no LoRA pair")
        if self.mid is not None and len(self.mid.shape) < 2:
            raise FormatError(f"a core of shape {list(self.mid.shape)} is no matrix")
        inner = (self.mid.shape[1], self.mid.shape[0]) if self.mid is not None else (down[0], down[0])
        if (down[0], up[1]) != inner:
            raise FormatError(f"rank mismatch: down {list(down)}, up {list(up)}")
        if self.layer != "plain" and len(down) != 2:
            raise FormatError(f"a convolution cannot be stored as {self.layer}")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        kernel = (self.mid or self.down).shape[2:]
        out, inner = self.up.shape[0], self.down.shape[1]
        return (inner, out) if self.layer == "transposed" else (out, inner, *kernel)

    @property
    def slots(self) -> Mapping[str, Tensor]:
        pair = {"down": self.down, "up": self.up}
        return pair if self.mid is None else {**pair, "mid": self.mid}

    def matrices(self, load: Load) -> tuple[Array, Array]:
        """up [o,r] and down [r,i*k] without scaling, in the base's orientation."""
        down, up, *mid = alike([load(factor) for factor in self.slots.values()])
        up, down = up.reshape(self.up.shape[:2]), down.reshape(self.down.shape[0], -1)
        for core in mid:  # down'[m,i,k] = sum_n mid[m,n,k] down[n,i]
            core = core.reshape(*core.shape[:2], -1)
            down = namespace(down).einsum("mnk,ni->mik", core, down).reshape(len(core), -1)
        return (down.T, up.T) if self.layer == "transposed" else (up, down)

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        up, down = self.matrices(load)
        up = up * (self.scaling * strength)
        return Prepared(lambda start, stop, base: up[start:stop] @ down, factors=(up, down))

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        up, down = self.matrices(Tensor.float)
        return up * self.scaling, down

    def oriented(self, layer: Layer) -> LowRank:
        """The same factors for a base that stores its weight as ``layer``."""
        return replace(self, layer=layer)

    def part(self, start: int, stop: int) -> LowRank | None:
        return replace(self, up=self.up.slice(start, stop)) if self.layer == "plain" else None


@dataclass(frozen=True)
class Dense(Additive):
    """A delta stored whole: delta = scaling x value, of the weight's own shape (also the bias a LoRA learned)."""

    value: Tensor
    scaling: float = 1.0
    kind: str = "full"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        by = self.scaling * strength

        def delta(start: int, stop: int, base: Array | None) -> Array:
            return load(self.value.slice(start, stop)).reshape(stop - start, -1) * by

        return Prepared(delta)

    def scaled(self, by: float) -> Dense:
        return replace(self, scaling=self.scaling * by)

    def part(self, start: int, stop: int) -> Dense:
        if stop > self.shape[0]:  # a bias that is shorter than its weight is high
            raise FormatError(f"rows {start} to {stop} of a difference of shape {list(self.shape)}")
        return replace(self, value=self.value.slice(start, stop))


@dataclass(frozen=True)
class Replace(Update):
    """A weight trained whole: W' = value."""

    kind = "full"
    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        def delta(start: int, stop: int, base: Array | None) -> Array:
            return (load(self.value.slice(start, stop)).reshape(stop - start, -1) - base) * strength

        return Prepared(delta)

    def part(self, start: int, stop: int) -> Replace:
        return replace(self, value=self.value.slice(start, stop))


@dataclass(frozen=True)
class Sum(Additive):
    """Several additive updates of one weight (a module that occurs twice).

    Parts that hold a kernel flattened take the shape of those that tell it. Raises MatchError where shapes differ.
    """

    parts: tuple[Additive, ...]

    def __post_init__(self) -> None:
        sized = self._sized(max((part.shape for part in self.parts), key=len))
        if sized is None:
            shapes = {trimmed(part.shape) for part in self.parts}
            raise MatchError(f"updates of one weight differ in shape: {sorted(map(list, shapes))}")
        object.__setattr__(self, "parts", sized)

    def _sized(self, shape: tuple[int, ...]) -> tuple[Additive, ...] | None:
        """The parts for a weight of this shape, None where one is for another."""
        sized = [part.sized(shape) for part in self.parts]
        return tuple(part for part in sized if isinstance(part, Additive)) if None not in sized else None

    def sized(self, shape: tuple[int, ...]) -> Sum | None:
        sized = self._sized(shape)
        return None if sized is None else Sum(sized)

    @property
    def kind(self) -> str:
        return self.parts[0].kind

    @property
    def rank(self) -> int | None:
        ranks = [part.rank for part in self.parts]
        return None if None in ranks else sum(r for r in ranks if r is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def slots(self) -> Mapping[str, Tensor]:
        return {f"{n}.{slot}": t for n, part in enumerate(self.parts) for slot, t in part.slots.items()}

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        first, *rest = [part.prepare(load, strength) for part in self.parts]

        def delta(start: int, stop: int, base: Array | None) -> Array:
            total = first.delta(start, stop, base)
            for part in rest:
                total = total + part.delta(start, stop, base)
            return total

        return Prepared(delta)

    def scaled(self, by: float) -> Sum:
        return Sum(tuple(part.scaled(by) for part in self.parts))

    def factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        pairs = [part.factors() for part in self.parts]
        known = [pair for pair in pairs if pair is not None]
        if len(known) < len(pairs):
            return None
        ups, downs = zip(*known, strict=True)
        return np.concatenate(ups, axis=1), np.concatenate(downs, axis=0)


class Around(Update):
    """An update made of another one, its first field: what it does not say itself is as that one says."""

    @property
    def within(self) -> Update:
        """The update inside."""
        found: Update = getattr(self, fields(self)[0].name)  # type: ignore[arg-type]
        return found

    @property
    def kind(self) -> str:
        return self.within.kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.within.shape

    @property
    def rank(self) -> int | None:
        return self.within.rank

    @property
    def alpha(self) -> float | None:
        return self.within.alpha

    @property
    def scaling(self) -> float:
        return self.within.scaling

    @property
    def makes(self) -> int:
        return self.within.makes


@dataclass(frozen=True)
class DoRA(Around):
    """DoRA: W' = magnitude x V / ||V||, V = W + delta (Liu et al. 2024).

    ``axis`` says for what the norms stand, in terms of the factors: 0 each output, 1 each input (LyCORIS' older
    convention; also each dimension of an Embedding). ``magnitude`` holds as many values, whatever its shape. The
    direction is of any additive kind (LyCORIS decomposes LoHa and LoKr too).
    """

    kind = "dora"
    direction: Additive
    magnitude: Tensor
    axis: int = 0

    def __post_init__(self) -> None:
        shape, size = self.direction.shape, self.magnitude.size
        if len(shape) < 2 or size == 0 or self.axis not in (0, 1):
            raise FormatError(f"a magnitude of shape {list(self.magnitude.shape)} for an update of {list(shape)}")
        pair = shape[1::-1] if self.layer == "transposed" else shape[:2]
        # the inputs of a LoHa or LoKr may hold a kernel, until the base tells it
        unfolds = self.axis == 1 and len(shape) == 2 and not isinstance(self.direction, LowRank)
        if pair[self.axis] % size if unfolds else pair[self.axis] != size:
            raise FormatError(
                f"magnitude of shape {list(self.magnitude.shape)} does not fit {pair[self.axis]} "
                f"{'inputs' if self.axis else 'outputs'}"
            )

    @property
    def layer(self) -> Layer:
        """How the base stores the weight."""
        return self.direction.layer if isinstance(self.direction, LowRank) else "plain"

    def sized(self, shape: tuple[int, ...]) -> DoRA | None:
        direction = self.direction.sized(shape)
        unfolded = isinstance(direction, LowRank) or self.axis == 0 or shape[1] == self.magnitude.size
        if not isinstance(direction, Additive) or not unfolded:
            return None
        return self if direction is self.direction else replace(self, direction=direction)

    def oriented(self, layer: Layer) -> DoRA:
        """The same update for a base that stores its weight as ``layer``."""
        if not isinstance(self.direction, LowRank):  # held as the base stores it
            return self
        return replace(self, direction=self.direction.oriented(layer))

    def part(self, start: int, stop: int) -> DoRA:
        if self.axis == 1 or self.layer == "transposed":  # a norm over all rows
            raise FormatError("a DoRA magnitude for each input of a fused projection cannot be split exactly")
        direction = rows(self.direction, start, stop)
        assert isinstance(direction, Additive)  # rows of what is additive are
        magnitude = self.magnitude.reshape(self.magnitude.size).slice(start, stop)
        return replace(self, direction=direction, magnitude=magnitude)

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        direction = self.direction.prepare(load)
        magnitude = load(self.magnitude).reshape(-1)
        stored_axis = 1 - self.axis if self.layer == "transposed" else self.axis
        if stored_axis == 0:
            return Prepared(lambda *block: _rescaled_rows(direction, magnitude, strength, *block))
        return _by_column(direction, magnitude, strength, self.magnitude.size)


def _rescaled_rows(
    direction: Prepared, magnitude: Array, strength: float, start: int, stop: int, base: Array | None
) -> Array:
    """DoRA where each stored row has its own norm: the block suffices."""
    value = base + direction.delta(start, stop, base)  # [rows, -1]
    norm = (value * value).sum(-1) ** 0.5
    _check_norm(norm)
    return (value * (magnitude[start:stop] / norm)[:, None] - base) * strength


def _by_column(direction: Prepared, magnitude: Array, strength: float, columns: int) -> Prepared:
    """DoRA where the norms run over stored columns: a first pass sums the squares."""
    gain: list[Array] = []

    def scan(blocks: Iterable[tuple[int, int, Array]]) -> None:
        total: Array = 0
        for start, stop, base in blocks:
            value = (base + direction.delta(start, stop, base)).reshape(stop - start, columns, -1)
            wide = cast(value, namespace(value).float64)
            total = total + (wide * wide).sum(-1).sum(0)  # [columns], float64
        norm = total**0.5
        _check_norm(norm)
        gain[:] = [cast(magnitude / norm, magnitude.dtype)]

    def delta(start: int, stop: int, base: Array | None) -> Array:
        value = (base + direction.delta(start, stop, base)).reshape(stop - start, columns, -1)
        return ((value * gain[0][None, :, None]).reshape(stop - start, -1) - base) * strength

    return Prepared(delta, scan)


def _check_norm(norm: Array) -> None:
    """An all-zero row or column has no direction: 0/0."""
    if not bool((norm > 0).all()):
        raise NumericError("DoRA divides by the norm of an all-zero row", hint="the base or the adapter is damaged")


# ---------------------------------------------------------------- fused weights: rows of an update, and the whole again


@dataclass(frozen=True)
class Rows(Around):
    """What ``whole`` does to output rows [start, stop) of a fused weight."""

    whole: Update
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.whole.shape[0]:
            raise FormatError(f"rows {self.start} to {self.stop} of a weight of shape {list(self.whole.shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.whole.shape[1:])

    @property
    def mixes(self) -> int:
        return self.whole.mixes

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        whole = self.whole.prepare(load, strength)
        if whole.scan is not None:
            raise FormatError(f"an update of kind {self.kind} over all rows of a fused weight cannot be split")
        up, down = whole.factors or (None, None)
        return Prepared(
            lambda start, stop, base: whole.delta(self.start + start, self.start + stop, base),
            factors=None if up is None else (up[self.start : self.stop], down),
            reach=None if whole.reach is None else self._reach(whole.reach),
        )

    def _reach(self, reach: Callable[[int, int], tuple[int, int]]) -> Callable[[int, int], tuple[int, int]]:
        """The reach of the whole, in rows of the part. Raises FormatError where it goes beyond the part."""

        def within(start: int, stop: int) -> tuple[int, int]:
            low, high = reach(self.start + start, self.start + stop)
            if low < self.start or high > self.stop:
                raise FormatError(f"an update of kind {self.kind} mixes rows of a fused weight: it cannot be split")
            return low - self.start, high - self.start

        return within


class AdditiveRows(Rows, Additive):
    """Rows of an additive update."""

    whole: Additive

    def scaled(self, by: float) -> AdditiveRows:
        return AdditiveRows(self.whole.scaled(by), self.start, self.stop)

    def low_rank(self) -> LowRank | None:
        low = self.whole.low_rank()
        return low and low.part(self.start, self.stop)

    def factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        pair = self.whole.factors()
        return None if pair is None else (pair[0][self.start : self.stop], pair[1])


@dataclass(frozen=True)
class Stacked(Additive):
    """Additive updates of row-stacked weights; ``heights`` are the rows of each, None stands for no change."""

    parts: tuple[Additive | None, ...]
    heights: tuple[int, ...]

    @property
    def kind(self) -> str:
        return self._known[0].kind

    @property
    def _known(self) -> list[Additive]:
        return [part for part in self.parts if part is not None]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.heights), *self._known[0].shape[1:])

    @property
    def slots(self) -> Mapping[str, Tensor]:
        return {f"{n}.{slot}": t for n, part in enumerate(self.parts) if part for slot, t in part.slots.items()}

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        prepared = [part.prepare(load, strength) if part else None for part in self.parts]
        edges = list(accumulate(self.heights, initial=0))

        def delta(start: int, stop: int, base: Array | None) -> Array:
            blocks: list[Array] = []
            for part, low, high in zip(prepared, edges, edges[1:], strict=False):
                first, last = max(start, low), min(stop, high)
                if first < last:
                    blocks.append(part.delta(first - low, last - low, None) if part else last - first)
            like = next((block for block in blocks if not isinstance(block, int)), None)
            width = math.prod(self.shape[1:])
            if like is None:
                some = load(next(iter(self.slots.values())).slice(0, 1))
                like = namespace(some).zeros((0, width), dtype=some.dtype)
            zeros = [_zeros(like, block, width) if isinstance(block, int) else block for block in blocks]
            return namespace(like).concatenate(alike(zeros))

        return Prepared(delta)

    def scaled(self, by: float) -> Stacked:
        return replace(self, parts=tuple(part and part.scaled(by) for part in self.parts))


def _zeros(like: Array, rows: int, width: int) -> Array:
    """A block of zeros [rows, width] beside ``like``: its library, dtype and device."""
    return like.new_zeros((rows, width)) if namespace(like) is not np else np.zeros((rows, width), like.dtype)


def rows(update: Update, start: int, stop: int) -> Update:
    """The exact update of output rows [start, stop) of a fused weight.

    LoRAs share the down factor; a DoRA by output keeps its rows' magnitudes. Raises FormatError where the rows
    cannot be told apart (a magnitude for each input is a norm over all of them).
    """
    if not update.shape:
        raise FormatError("a single number has no rows")
    if (start, stop) == (0, update.shape[0]):
        return update
    own = update.part(start, stop)
    if own is not None:
        return own
    return AdditiveRows(update, start, stop) if isinstance(update, Additive) else Rows(update, start, stop)


def stack(parts: Sequence[Update | None], heights: Sequence[int]) -> Update | None:
    """The update of weights stacked by rows, exactly; ``heights`` are the rows of each, None stands for no change.

    The whole again where the parts are its rows; LoRAs of one down factor keep their rank; of several, the factors
    are stacked block-diagonally. None where no such update exists (a DoRA beside nothing).
    """
    parts = tuple(parts)
    if len(parts) == 1:
        return parts[0]
    if whole := _whole_of(parts, heights):
        return whole
    if all(isinstance(part, DoRA) and part.axis == 0 for part in parts):
        return _stacked_dora([part for part in parts if isinstance(part, DoRA)], heights)
    known = [part for part in parts if part is not None]
    full = [known[0].still(height) if part is None else part for part, height in zip(parts, heights, strict=True)]
    filled = [part for part in full if part is not None]
    if len(filled) == len(parts) and (whole := known[0].stacked(filled, heights)):
        return whole
    if any(not isinstance(part, Additive) for part in known):
        return None
    lows = [None if part is None else as_low_rank(part) for part in parts]
    if all(
        (low is None) == (part is None) and (low is None or low.layer == "plain")
        for low, part in zip(lows, parts, strict=True)
    ):
        return _stacked_pairs(lows, heights)
    wholes = [part for part in known if isinstance(part, Dense)]
    if len(wholes) == len(parts) and len({(part.scaling, part.kind) for part in wholes}) == 1:
        return replace(wholes[0], value=Tensor.joined([part.value for part in wholes]))
    return Stacked(tuple(part for part in parts if part is None or isinstance(part, Additive)), tuple(heights))


def _whole_of(parts: Sequence[Update | None], heights: Sequence[int]) -> Update | None:
    """The update that ``parts`` are the rows of, in order and all of them."""
    first = parts[0]
    if not isinstance(first, Rows) or first.whole.shape[0] != sum(heights):
        return None
    edges = accumulate(heights, initial=0)
    for part, start in zip(parts, edges, strict=False):
        if not isinstance(part, Rows) or part.whole is not first.whole or part.start != start:
            return None
    return first.whole


def _stacked_dora(parts: Sequence[DoRA], heights: Sequence[int]) -> DoRA | None:
    direction = stack([part.direction for part in parts], heights)
    if not isinstance(direction, Additive):
        return None
    return DoRA(direction, Tensor.joined([part.magnitude.reshape(part.magnitude.size) for part in parts]), 0)


def _stacked_pairs(lows: Sequence[LowRank | None], heights: Sequence[int]) -> LowRank:
    """One LoRA of row-stacked weights."""
    known = [low for low in lows if low is not None]
    first = known[0]
    if len(known) == 1 or all(_shares_down(first, low) for low in known[1:]):
        ups = [
            low.up if low else Tensor.of(np.zeros((rows, *first.up.shape[1:]), numpy_dtype(first.up.dtype)))
            for low, rows in zip(lows, heights, strict=True)
        ]
        return replace(first, up=Tensor.joined(ups))
    equal = len({low.scaling for low in known}) == 1
    rank = sum(low.rank for low in known)
    dtypes = {low.up.dtype for low in known}
    exact = equal and len(dtypes) == 1
    up = np.zeros((sum(heights), rank), numpy_dtype(first.up.dtype) if exact else np.float32)  # [o1+o2+.., r1+r2+..]
    row = column = 0
    for low, height in zip(lows, heights, strict=True):
        if low is not None:
            values = low.up.array() if exact else low.up.float() * (1.0 if equal else low.scaling)
            up[row : row + height, column : column + low.rank] = values.reshape(height, low.rank)
            column += low.rank
        row += height
    down = Tensor.joined([low.down for low in known])
    plain = all(low.alpha is None for low in known)
    alpha = None if plain or not equal else first.scaling * rank
    return LowRank(down, Tensor.of(up), alpha=alpha)


def _shares_down(one: LowRank, other: LowRank) -> bool:
    """Whether two LoRAs differ in their up factors only: slices of one fused pair, also after a way through a file."""
    alike_in_words = (one.scaling, one.down.dtype, one.up.dtype, one.mid) == (
        other.scaling,
        other.down.dtype,
        other.up.dtype,
        other.mid,
    )
    return alike_in_words and (one.down is other.down or one.down.same_bytes(other.down))


def as_low_rank(update: Update) -> LowRank | None:
    """The same delta as one LoRA without a Tucker core, exactly; None where there is no such form.

    A core is folded into down and several LoRAs are concatenated, in float32; a plain LoRA stays as it is.
    """
    parts = update.parts if isinstance(update, Sum) else (update,)
    found = [part if isinstance(part, LowRank) else part.low_rank() for part in parts]
    lows = [low for low in found if low is not None]
    layers = {low.layer for low in lows}
    if len(lows) < len(parts) or len(layers) != 1:
        return None
    if len(lows) == 1 and lows[0].mid is None:
        return lows[0]
    layer = layers.pop()
    held: Layer = "plain" if layer == "transposed" else layer  # the orientation in which factors are held
    ups, downs = zip(*(low.oriented(held).factors() for low in lows), strict=True)
    up, down = np.concatenate(ups, axis=1), np.concatenate(downs, axis=0)  # [o,r], [r,i*k]
    shape = lows[0].oriented("plain").shape
    return LowRank(Tensor.of(down.reshape(len(down), *shape[1:])), Tensor.of(up), layer=layer)


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` without trailing ones past the second axis: a 1x1 convolution is a matrix."""
    end = len(shape)
    while end > 2 and shape[end - 1] == 1:
        end -= 1
    return shape[:end]
