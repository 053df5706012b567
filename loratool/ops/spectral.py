"""What extract, resize, add and combine share: the choice of ranks, LoRAs from truncations, and the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from loratool.adapter import Adapter, is_bias
from loratool.errors import NumericError, UsageError
from loratool.lazy import np
from loratool.linalg import Truncation, allocate, error_for_energy, rank_for_error, to_numpy
from loratool.tensors import DTYPES, Tensor, header_bytes, numpy_dtype, peak
from loratool.update import Layer, LowRank

SizeOf = Callable[[Adapter], int]  # bytes of the weights file that an adapter will make
_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Choice:
    """How ranks are chosen: a rank for all (a cap beside another), a share of the energy, a relative error, a size.

    ``energy`` and ``error`` are in (0, 1]; ``max_size`` is in bytes of the whole weights file. Raises UsageError.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    max_size: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UsageError("the rank must be at least 1", str(self.rank))
        for name, value in (("energy", self.energy), ("error", self.error)):
            if value is not None and not 0 < value <= 1:
                raise UsageError(f"the {name} must be in (0, 1]", str(value))
        if sum(value is not None for value in (self.energy, self.error, self.max_size)) > 1:
            raise UsageError("only one of --energy, --error and --max-size can choose the ranks")
        if (self.rank, self.energy, self.error, self.max_size) == (None, None, None, None):
            raise UsageError("no rank is chosen", hint="give --rank, --energy, --error or --max-size")

    @property
    def bound(self) -> float | None:
        """The relative error allowed for each module, where that chooses."""
        return error_for_energy(self.energy) if self.energy is not None else self.error


def parse_size(text: str) -> int:
    """Bytes of ``12MB``, ``1.5GB``, ``4096`` (powers of 1000). Raises UsageError."""
    number = text.strip().upper().rstrip("TGMKB")
    unit = text.strip().upper()[len(number) :]
    try:
        count = float(number) * _SIZES[unit]
    except (ValueError, KeyError):
        raise UsageError("not a size", repr(text), "such as 50MB") from None
    if not 0 < count < 1e18:
        raise UsageError("not a size", repr(text), "such as 50MB")
    return int(count)


@dataclass(frozen=True)
class Piece:
    """One module on its way: the truncation that its ranks are cut from, and what its LoRA must look like.

    ``shape`` is that of the weight as the factors are held: [o,i,*k].
    """

    truncation: Truncation
    shape: tuple[int, ...]
    dtype: str
    layer: Layer = "plain"
    scaling: float = 1.0
    rank_stabilised: bool = False
    up_dtype: str | None = None

    @property
    def unit(self) -> int:
        """Bytes of one more rank."""
        up, down = DTYPES[self.up_dtype or self.dtype].bits // 8, DTYPES[self.dtype].bits // 8
        return self.shape[0] * up + math.prod(self.shape[1:]) * down

    def low_rank(self, rank: int) -> LowRank:
        """The LoRA of this rank, padded with zeros beyond what there is. Raises NumericError where it overflows."""
        found = self.truncation.cut(min(rank, len(self.truncation.values)))
        made = self.hollow(rank)
        by = 1 / math.sqrt(made.scaling)
        up, down = (to_numpy(factor) * by for factor in found.factors())
        if missing := rank - len(down):
            up, down = np.pad(up, ((0, 0), (0, missing))), np.pad(down, ((0, missing), (0, 0)))
        return replace(made, down=stored(down, made.down.dtype).reshape(*made.down.shape), up=stored(up, made.up.dtype))

    def hollow(self, rank: int) -> LowRank:
        """A LoRA of this rank and form, all of it zero; its alpha is one that float32 holds."""
        down, up = (rank, *self.shape[1:]), (self.shape[0], rank)
        made = LowRank(zeros(self.dtype, down), zeros(self.up_dtype or self.dtype, up), None, 1.0, self.rank_stabilised)
        with np.errstate(over="ignore"):
            alpha = float(np.float32(self.scaling / made.scaling))
        sound = alpha >= np.finfo(np.float32).tiny and math.isfinite(alpha)
        return replace(made, alpha=alpha if sound else made.explicit_alpha / made.scaling, layer=self.layer)


def zeros(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros that takes no memory."""
    return Tensor(dtype, shape, lambda start, stop: np.zeros((stop - start, *shape[1:]), numpy_dtype(dtype)))


def stored(values: np.ndarray, dtype: str) -> Tensor:
    """Values as a tensor, rounded once. Raises NumericError where they overflow or all vanish."""
    tensor = Tensor.of(Tensor.of(values).cast(dtype).array())
    kept = peak(tensor.array())
    if not math.isfinite(kept) or (kept == 0 and values.any()):
        what = "overflows" if kept else "vanishes in"
        raise NumericError(f"a factor {what} {dtype}", hint="choose a wider --dtype")
    return tensor


def choose_ranks(pieces: Mapping[str, Piece], choice: Choice, overhead: int = 0) -> dict[str, int]:
    """The rank of each module; at least 1. ``overhead`` is what the file holds besides factors, in bytes."""
    if choice.max_size is not None:
        return _by_size(pieces, choice, choice.max_size - overhead)
    if choice.bound is None:
        return {name: int(choice.rank or 1) for name in pieces}
    cap = choice.rank or 1 << 30
    found = {n: rank_for_error(p.truncation.values, p.truncation.energy, choice.bound) for n, p in pieces.items()}
    return {name: max(1, min(rank, cap)) for name, rank in found.items()}


def _by_size(pieces: Mapping[str, Piece], choice: Choice, budget: int) -> dict[str, int]:
    """One global threshold: what loses least for the bytes. Raises UsageError where not even rank 1 fits."""
    units = {name: piece.unit for name, piece in pieces.items()}
    room = budget - sum(units.values())
    if room < 0:
        raise UsageError(
            f"rank 1 of all modules is larger than --max-size by {-room:,} bytes",
            hint="a larger size, or fewer modules",
        )
    limit = (choice.rank or 1 << 30) - 1
    more = {name: piece.truncation.values[1 : 1 + limit] for name, piece in pieces.items()}
    return {name: 1 + rank for name, rank in allocate(more, units, room).items()}


def fit_size(
    pieces: Mapping[str, Piece], choice: Choice, size_of: Callable[[Mapping[str, int]], int]
) -> dict[str, int]:
    """The ranks that lose least in a file of ``choice.max_size`` bytes; ``size_of`` tells that of a file with ranks.

    What a file holds besides factors depends on the ranks (digits, patterns): measured, spent, measured again. Raises
    UsageError where not even rank 1 fits.
    """
    limit = choice.max_size or 0

    def besides(ranks: Mapping[str, int]) -> int:
        return size_of(ranks) - sum(piece.unit * ranks[name] for name, piece in pieces.items())

    best = dict.fromkeys(pieces, 1)
    least = overhead = besides(best)
    room = limit - sum(piece.unit for piece in pieces.values())
    choose_ranks(pieces, choice, least)  # raises where rank 1 does not fit
    spent = 0
    for _ in range(8):
        ranks = choose_ranks(pieces, choice, overhead)
        found = besides(ranks)
        total = found + sum(piece.unit * ranks[name] for name, piece in pieces.items())
        if spent < total <= limit:
            best, spent = ranks, total
        if found == overhead or (total <= limit and found > overhead):
            break
        overhead = min(found, room)
    return best


def bounded_size(adapter: Adapter) -> int:
    """A bound of the bytes of the weights file of an adapter, where no format measures it."""
    factors = sum(update.nbytes for update in adapter.updates.values())
    return factors + header_size(adapter.updates, adapter.metadata.strings, adapter.carried)


def header_size(pieces: Mapping[str, object], metadata: Mapping[str, str], carried: Mapping[str, Tensor]) -> int:
    """A bound of the bytes of a weights file besides the factors: header, alphas, carried tensors."""
    longest = 24  # characters that any layout's suffix or prefix adds to a module's name
    entries: list[tuple[str, str, tuple[int, ...]]]
    entries = [(f"{name}{'x' * longest}{n}", "F32", (1 << 20, 1 << 20)) for name in pieces for n in range(3)]
    entries += [(name + "x" * longest, t.dtype, t.shape) for name, t in carried.items()]
    extra = {"loratool": "x" * (1200 + 90 * len(carried))}
    return len(header_bytes(entries, {**metadata, **extra})) + 4 * len(pieces) + sum(t.nbytes for t in carried.values())


@dataclass(frozen=True)
class ModuleResult:
    """One module of the output: its rank, its relative error, and the share of the energy that is kept."""

    module: str
    rank: int | None
    relative_error: float
    energy: float


@dataclass(frozen=True)
class Result:
    """An adapter computed and not yet written, and how far it is from what was asked."""

    adapter: Adapter
    modules: tuple[ModuleResult, ...]
    relative_error: float
    warnings: tuple[str, ...] = ()


def summarise(adapter: Adapter, squares: Mapping[str, tuple[float, float]], warnings: Sequence[str] = ()) -> Result:
    """The report of an adapter from (squared norm of the error, of the whole) by module."""
    modules = []
    for name, (lost, whole) in squares.items():
        update = adapter.updates.get(name)
        relative = math.sqrt(lost / whole) if whole > 0 else 0.0
        modules.append(ModuleResult(name, update.rank if update else 0, relative, max(0.0, 1 - relative**2)))
    lost, whole = (sum(pair[n] for pair in squares.values()) for n in (0, 1))
    return Result(adapter, tuple(modules), math.sqrt(lost / whole) if whole > 0 else 0.0, tuple(warnings))


def wide_factors(low: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """up [o,r], scaling included, and down [r,i*k] in float64, in the orientation in which factors are held."""
    plain = low.oriented("plain") if low.layer == "transposed" else low
    up, down = plain.matrices(lambda tensor: tensor.array().astype(np.float64))
    return up if low.scaling == 1 else up * low.scaling, down


_STALE_STRINGS = ("ss_network_dim", "ss_network_alpha", "lora_adapter_metadata", "sshs_", "modelspec.hash_sha256")
_STALE_CONFIG = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_dora", "use_rslora", "lora_bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
)
_STALE_ARGUMENTS = ("dim", "alpha", "conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims")


def fresh_metadata(adapter: Adapter) -> Adapter:
    """The adapter without metadata that told ranks, scalings and targets: formats write them anew."""
    strings = {k: v for k, v in adapter.metadata.strings.items() if not k.startswith(_STALE_STRINGS)}
    try:
        arguments = json.loads(strings.get("ss_network_args", "null"))
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict) and not arguments.keys().isdisjoint(_STALE_ARGUMENTS):
        kept = {key: value for key, value in arguments.items() if key not in _STALE_ARGUMENTS}
        strings["ss_network_args"] = json.dumps(kept)
    config = {k: v for k, v in adapter.metadata.config.items() if k not in _STALE_CONFIG}
    return adapter.with_metadata(strings=strings, config=config)


def weights_of(adapter: Adapter) -> list[str]:
    """The targets that are weights, not biases."""
    return [name for name in adapter.updates if not is_bias(name)]
