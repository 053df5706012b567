"""Another rank for every module: the best in the Frobenius norm, from the factors alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from loratool.adapter import Adapter, is_bias
from loratool.devices import one_blas_thread
from loratool.errors import MatchError, NumericError
from loratool.lazy import np
from loratool.linalg import Recompression, Truncation, adaptive_svd, exact_svd, recompress, truncated_svd
from loratool.model import Model
from loratool.ops.compare import Placed, blocks, norm, placed
from loratool.ops.convert import cast
from loratool.ops.spectral import (
    Choice,
    Piece,
    Result,
    SizeOf,
    bounded_size,
    choose_ranks,
    fit_size,
    fresh_metadata,
    stored,
    summarise,
    wide_factors,
)
from loratool.ops.stacks import apart, repacked, stacks_of, together
from loratool.plan import Made, Progress, counted
from loratool.tensors import FLOATS, Tensor
from loratool.update import Dense, Layer, LowRank, Sum, Update, trimmed

Squares = tuple[float, float]  # squared norms of the error, and of the whole
Item = TypeVar("Item")


def resize(
    adapter: Adapter,
    choice: Choice,
    model: Model | None = None,
    dtype: str | None = None,
    size_of: SizeOf = bounded_size,
    progress: Progress | None = None,
) -> Result:
    """``adapter`` with the ranks that ``choice`` asks for; a rank beyond what there is pads with zeros.

    Low-rank updates never form their product; whole deltas, and kinds that need the base (DoRA, with ``model``), are
    factored from the dense change. A module whose rank does not fall keeps its factors; biases, norms and whole
    tensors stay. Errors are of the values as stored: where these miss an ``energy`` or ``error`` that was asked for,
    the rank is raised. ``size_of`` weighs an output for ``max_size``. Raises MatchError for kinds that need the base
    when none is given, before any work.
    """
    stacks = stacks_of([adapter], model)
    adapter = apart(adapter, model)
    modules = {n: _Module.of(n, u, model, dtype) for n, u in adapter.updates.items() if is_matrix(u) and not is_bias(n)}
    sizes = [module.update.nbytes for module in modules.values()]
    ranks: Mapping[str, int] = {}
    if choice.max_size is not None:  # every module twice: to know its spectrum, and at the rank that is chosen by it
        found = each(lambda module: module.spectrum(choice), modules.values(), sizes, _half(progress, 0))
        progress = _half(progress, 1)
        measure = lambda made: size_of(together(made, stacks))  # noqa: E731
        ranks = _fitting(adapter, modules, dict(zip(modules, found, strict=True)), choice, dtype, measure)

    def one(name: str) -> tuple[Update, Squares]:
        try:
            return modules[name].resized(choice, ranks.get(name))
        except NumericError as error:
            raise NumericError(error.what, adapter.spelling(name), error.hint) from None

    results = dict(zip(modules, each(one, modules, sizes, progress), strict=True))
    squares: dict[str, Squares] = {}
    for name, update in adapter.modules().items():
        kept = placed(name, update, model) if update.needs_base else (update, None)
        squares[name] = results[name][1] if name in results else (0.0, norm(*kept) ** 2)
    updates = {name: results[name][0] if name in results else update for name, update in adapter.updates.items()}
    return repacked(summarise(_finished(adapter, updates, dtype), squares), stacks)


def _finished(adapter: Adapter, updates: Mapping[str, Update], dtype: str | None) -> Adapter:
    return cast(fresh_metadata(replace(adapter, updates=updates)), dtype)


def _fitting(
    adapter: Adapter,
    modules: Mapping[str, _Module],
    pieces: Mapping[str, Piece],
    choice: Choice,
    dtype: str | None,
    size_of: SizeOf,
) -> dict[str, int]:
    """The ranks for a size, measured on outputs without values."""

    def weigh(ranks: Mapping[str, int]) -> int:
        made = {name: modules[name].kept(rank) or pieces[name].hollow(rank) for name, rank in ranks.items()}
        updates = {name: made.get(name, update) for name, update in adapter.updates.items()}
        return size_of(_finished(adapter, updates, dtype))

    return fit_size(pieces, choice, weigh)


def each(
    work: Callable[[Item], Made], items: Iterable[Item], sizes: Iterable[int], progress: Progress | None
) -> list[Made]:
    """``work`` on every item, side by side, one BLAS thread each: results do not depend on the number of threads."""
    with one_blas_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
        return counted(pool.map(work, items), sizes, progress)


def _half(progress: Progress | None, number: int) -> Progress | None:
    """Tells of one half of the work as of a part of all."""
    return None if progress is None else lambda done, total: progress(number * total + done, 2 * total)


@dataclass(frozen=True)
class _Module:
    """One module to resize: its update in its place, and what its new factors are stored as."""

    update: Update
    base: Tensor | None
    stored: str | None

    @staticmethod
    def of(name: str, update: Update, model: Model | None, dtype: str | None) -> _Module:
        """Raises MatchError where the update needs a base that is not there."""
        return _Module(*(placed(name, update, model) if update.needs_base else (update, None)), dtype)

    def piece(self, choice: Choice) -> Piece:
        """As much of the SVD as ``choice`` needs, and what the new LoRA must look like."""
        slots = {slot: tensor for slot, tensor in self.update.slots.items() if tensor.dtype in FLOATS}
        down = slots.get("down") or next(iter(slots.values()))
        dtypes = self.stored or down.dtype, self.stored or slots.get("up", down).dtype
        lows, pair = lows_of(self.update), factors_of(self.update)
        if lows is None or pair is None:
            return replace(dense_piece((self.update, self.base), choice, dtypes[0]), up_dtype=dtypes[1])
        first = lows[0]
        shape = first.oriented("plain").shape
        return Piece(
            recompress(*pair), shape, dtypes[0], first.layer, first.scaling, first.rank_stabilised, up_dtype=dtypes[1]
        )

    def spectrum(self, choice: Choice) -> Piece:
        """The piece without its vectors."""
        piece = self.piece(choice)
        found, none = piece.truncation, np.empty((0, 0))
        return replace(piece, truncation=Truncation(none, found.values, none, found.energy, found.complete))

    def resized(self, choice: Choice, rank: int | None) -> tuple[Update, Squares]:
        """The update of ``rank``, or of that which ``choice`` asks for, and its error."""
        if rank is None and choice.bound is None:
            rank = choice.rank
        if rank is not None and self.stored is None and (kept := self.kept(rank)) is not None:
            return kept, (0.0, norm(self.update) ** 2)
        piece = self.piece(choice)
        target = rank or choose_ranks({"": piece}, choice)[""]
        most = max(target, min(choice.rank or 1 << 30, len(piece.truncation.values)))
        while True:
            made = self.kept(target) or piece.low_rank(target)
            lost, whole = self.squares(piece.truncation, made)
            enough = rank is not None or choice.bound is None or lost <= choice.bound**2 * whole * (1 + 1e-6)
            if enough or target == most:
                return made, (lost, whole)
            target += 1

    def kept(self, rank: int) -> LowRank | None:
        """The update with its own factors, zeros added, where its rank is not to fall; None where it is."""
        update = self.update
        if not isinstance(update, LowRank) or rank < update.rank or (update.mid and rank > update.rank):
            return None
        found = update if rank == update.rank else padded(update, rank)
        if self.stored is None:
            return found
        down, up = (stored(t.array(), self.stored) for t in (found.down, found.up))
        return None if found.mid else replace(found, down=down, up=up)

    def squares(self, found: Truncation, made: LowRank) -> Squares:
        """Squared norms of what ``made`` misses as it is stored, and of the whole change."""
        if isinstance(found, Recompression):
            if made is self.update:
                return 0.0, found.energy
            return found.distance(*wide_factors(made)), found.energy
        return dense_squares(dense_change((self.update, self.base)), made)


def padded(update: LowRank, rank: int) -> LowRank:
    """The same update at a higher rank: zeros behind its own factors, which stay byte for byte."""
    more = rank - update.rank
    down, up = update.down.array(), update.up.array()
    down = np.pad(down, ((0, more), *((0, 0) for _ in down.shape[1:])))
    up = np.pad(up, ((0, 0), (0, more), *((0, 0) for _ in up.shape[2:])))
    made = replace(update, down=Tensor.of(down), up=Tensor.of(up), alpha=1.0)
    return replace(made, alpha=update.scaling / made.scaling)


def factors_of(update: Update) -> tuple[np.ndarray, np.ndarray] | None:
    """up [o,r] and down [r,i*k] in float64, scaling included, as factors are held; None where it has none."""
    lows = lows_of(update)
    if lows is None:
        return None
    if len(lows) == 1:
        return wide_factors(lows[0])
    ups, downs = zip(*map(wide_factors, lows), strict=True)
    return np.concatenate(ups, axis=1), np.concatenate(downs, axis=0)


def lows_of(update: Update) -> list[LowRank] | None:
    """The LoRAs of one orientation that an update is the sum of, exactly; None where there are none."""
    parts = update.parts if isinstance(update, Sum) else (update,)
    found = [part if isinstance(part, LowRank) else part.low_rank() for part in parts]
    lows = [low for low in found if low is not None]
    return None if len(lows) < len(parts) or len({low.layer for low in lows}) > 1 else lows


def dense_piece(placed: Placed, choice: Choice, dtype: str) -> Piece:
    """The SVD of a change that has no factors, through the dense matrix: within `linalg.EXCESS` of the best."""
    update, _ = placed
    layer: Layer = getattr(update, "layer", "plain")
    change = dense_change(placed)
    shape = change.shape if layer == "transposed" else (len(change), *update.shape[1:])
    return Piece(dense_svd(change.astype(np.float32), choice), shape, dtype, layer)


def dense_svd(matrix: np.ndarray, choice: Choice) -> Truncation:
    """As much of the SVD of a matrix as ``choice`` needs."""
    if choice.bound is not None:
        return adaptive_svd(matrix, choice.bound, choice.rank)
    if choice.max_size is not None or choice.rank is None:
        return exact_svd(matrix)
    return truncated_svd(matrix, min(choice.rank, *matrix.shape))


def dense_change(placed: Placed) -> np.ndarray:
    """The change of one weight as a matrix [o,i*k] in float64, as factors are held."""
    update, base = placed
    change = np.concatenate(list(blocks(update, base)))
    return change.T if getattr(update, "layer", "plain") == "transposed" else change


def dense_squares(matrix: np.ndarray, made: LowRank) -> Squares:
    """Squared norms of what ``made`` misses of a dense change [o,i*k], and of the change."""
    up, down = wide_factors(made)
    return float(np.square(matrix - up @ down).sum()), float(np.square(matrix).sum())


def spectrum(name: str, update: Update, model: Model | None = None) -> Truncation:
    """The whole spectrum of one update. Raises MatchError where it needs the base."""
    return _Module.of(name, update, model, None).piece(Choice(max_size=1)).truncation


def same_shape(one: Update, other: Update, name: str) -> None:
    """Raise MatchError where two updates of one module differ in shape."""
    if trimmed(one.shape) != trimmed(other.shape):
        raise MatchError(f"shapes differ: {list(one.shape)} and {list(other.shape)}", name)


def is_matrix(update: Update) -> bool:
    """Whether an update can be factored."""
    return len(update.shape) > 1 and not (isinstance(update, Dense) and update.kind == "norm")
