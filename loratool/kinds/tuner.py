"""What the tuners of PEFT share: tensors held as for an [o,i] weight, whose shape the base may have to tell."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from loratool.errors import FormatError, LoratoolError, MatchError
from loratool.kinds.halves import made, wide
from loratool.lazy import np
from loratool.tensors import FLOATS, Array, Tensor, numpy_dtype
from loratool.update import Additive, Layer, Load, LowRank, Prepared, Update, tensors_of, trimmed

INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")


@dataclass(frozen=True, kw_only=True)
class Tuner(Update):
    """An update of one PEFT type.

    ``size`` is the shape of the weight as [o,i,*k] once the base has told it, () before. ``layer`` says how the base
    stores the weight.
    """

    word: ClassVar[str]
    """The PEFT type in lower case: the kind in reports."""

    flattens: ClassVar[bool] = False
    """Whether a convolution's tensors are held as those of an [o,i*k] weight."""

    hollow: ClassVar[bool] = False
    """Whether a module may have been pruned to rank 0."""

    indices: ClassVar[frozenset[str]] = frozenset()
    """Fields that hold integers."""

    plain_only: ClassVar[bool] = False
    """Whether it is worked out for weights that are stored as [o,i] only."""

    layer: Layer = "plain"
    size: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, tensor in tensors_of(self):
            if 0 in tensor.shape and not self.hollow:
                raise FormatError(f"{name} is empty: {list(tensor.shape)}", hint="a partial save (ZeRO-3, FSDP)")
            if tensor.dtype not in (INTEGERS if name in self.indices else FLOATS):
                raise FormatError(f"{name} is stored as {tensor.dtype}")
        self.check()
        if self.size and not self.fits(self.size):
            raise FormatError(f"an update of kind {self.word} does not fit a weight of shape {list(self.size)}")

    @abstractmethod
    def check(self) -> None:
        """Raise FormatError where the shapes of the tensors do not go together."""

    @property
    @abstractmethod
    def known(self) -> tuple[int, ...]:
        """[o,i] as the tensors tell it, 0 for what they do not tell."""

    def fits(self, plain: tuple[int, ...]) -> bool:
        """Whether this can be the update of a weight of shape [o,i,*k]."""
        flat = (plain[0], math.prod(plain[1:])) if self.flattens and len(self.known) == 2 else trimmed(plain)
        return len(flat) == len(self.known) and all(k in (0, n) for k, n in zip(self.known, flat, strict=True))

    @property
    def kind(self) -> str:
        return self.word

    @property
    def plain(self) -> tuple[int, ...]:
        """Shape of the weight as [o,i,*k], 0 where it is not known."""
        return self.size or self.known

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plain[::-1] if self.layer == "transposed" else self.plain

    def oriented(self, layer: Layer) -> Self:
        """The same update for a base that stores its weight as ``layer``."""
        return replace(self, layer=layer)

    def sized(self, shape: tuple[int, ...]) -> Self | None:
        """Raises MatchError where the weight fits but for how it is stored."""
        plain = shape[::-1] if self.layer == "transposed" else shape
        if not self.fits(plain):
            return None
        if self.plain_only and self.layer == "transposed":
            raise MatchError(
                f"an update of kind {self.word} is worked out by rows of outputs, and the base stores this weight, "
                f"{list(shape)}, by rows of inputs (a Conv1D)",
                hint="merge it with PEFT",
            )
        return replace(self, size=tuple(plain))

    def require_size(self) -> None:
        """Raise MatchError where only the base tells the shape of the weight, and has not."""
        if 0 in self.plain:
            raise MatchError(f"the file of a {self.word} adapter does not tell the shape of its weights", hint="--base")


def chained(**axes: tuple[tuple[str, Tensor, int], ...]) -> None:
    """Raise FormatError unless all (name, tensor, axis) of each word are equally long.

    ``chained(rank=(("A", a, 0), ("B", b, 1)))``
    """
    for word, ends in axes.items():
        lengths = {t.shape[axis] if -len(t.shape) <= axis < len(t.shape) else None for _, t, axis in ends}
        if len(lengths) > 1 or None in lengths:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor, _ in ends)
            raise FormatError(f"the tensors disagree about the {word}: {shapes}")


def axes(count: int, **tensors: Tensor) -> None:
    """Raise FormatError for a tensor that has another number of axes."""
    for name, tensor in tensors.items():
        if len(tensor.shape) != count:
            raise FormatError(f"{name} has shape {list(tensor.shape)}, not {count} axes")


@dataclass(frozen=True, kw_only=True)
class Fixed(Tuner, Additive):
    """A tuner with a fixed delta; ``gain`` is what `scaled` multiplied it by."""

    gain: float = 1.0

    @property
    def needs_base(self) -> bool:
        return 0 in self.plain

    def scaled(self, by: float) -> Self:
        return replace(self, gain=self.gain * by)


class Factored(Fixed):
    """A delta that is a product of two factors which are made of less."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Rank of the factors."""

    @property
    def makes(self) -> int:
        return 4 * self.rank * (self.plain[0] + math.prod(self.plain[1:]))  # in float64, in float32, and scaled

    @abstractmethod
    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """up [o,r] and down [r,i*k] of the [o,i,*k] weight in float64, everything folded in but ``gain``."""

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        self.require_size()
        up, down = (half.astype(numpy_dtype(self._dtype)) for half in self.pair())
        up = up * up.dtype.type(self.gain)
        return (down.T, up.T) if self.layer == "transposed" else (up, down)

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        up, down = (load(Tensor.of(np.ascontiguousarray(half))) for half in self.factors())
        up = up * strength
        return Prepared(lambda start, stop, base: up[start:stop] @ down, factors=(up, down))

    def low_rank(self) -> LowRank | None:
        if 0 in self.plain:
            return None
        out, *rest = self.plain
        up = made(self._dtype, (out, self.rank), lambda: self.pair()[0] * self.gain)
        down = made(self._dtype, (self.rank, *rest), lambda: self.pair()[1])
        return LowRank(down, up, alpha=float(self.rank), layer=self.layer)

    @property
    def _dtype(self) -> str:
        return wide(*(tensor for tensor in self.slots.values()))


class Composed(Fixed):
    """A delta that is put together by blocks of rows on the processor, in float64."""

    @abstractmethod
    def blocks(self) -> Callable[[int, int], np.ndarray]:
        """What gives rows [start, stop) of the delta of the weight as stored, without ``gain``."""

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        self.require_size()
        rows, by = self.blocks(), self.gain * strength

        def delta(start: int, stop: int, base: Array | None) -> Array:
            return load(Tensor.of((rows(start, stop) * by).astype(np.float32).reshape(stop - start, -1)))

        return Prepared(delta)


def double(tensor: Tensor) -> np.ndarray:
    """The values of a tensor in float64."""
    return tensor.float().astype(np.float64)


def entries(tensor: Tensor, limit: int) -> np.ndarray:
    """Integer values in [0, limit). Raises FormatError for others."""
    found = tensor.array().astype(np.int64)
    if found.size and (found.min() < 0 or found.max() >= limit):
        raise FormatError(f"an index of {found.max() if found.min() >= 0 else found.min()} into {limit}")
    return found


def torch_of(what: str) -> Any:
    """The module torch. Raises LoratoolError where it is not installed."""
    try:
        import torch
    except ImportError:
        hint = "pip install 'loratool[torch]'"
        raise LoratoolError(f"torch is not installed, and only its generator makes {what}", hint=hint) from None
    return torch
