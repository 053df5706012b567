"""Several adapters into one, other than by their plain sum: TIES, DARE, pruning by magnitude, KnOTS.

All on true updates (scaling x up @ down, or whatever a kind computes), never on the factors apart: how an update is
factored does not matter. Module by module; the updates of one module at a time are dense, in float32.

Sources: Yadav et al. 2023 (TIES); Yu et al. 2024 (DARE); Stoica et al. 2025 (KnOTS); Ilharco et al. 2023 (sums of
updates); Eckart and Young 1936 (best rank).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loratool.adapter import Adapter, is_bias, parameter, strengths_of
from loratool.architectures import Slot
from loratool.errors import NumericError, UsageError
from loratool.lazy import np
from loratool.linalg import Truncation, recompress, truncated_svd
from loratool.model import Model
from loratool.names import Names, Unmatched
from loratool.ops.add import _carried as summed_carried
from loratool.ops.add import add
from loratool.ops.compare import Factored, Placed, blocks, placed
from loratool.ops.replicate import shared_layers
from loratool.ops.resize import Squares, each, same_shape
from loratool.ops.spectral import Piece, Result, fresh_metadata, summarise, wide_factors
from loratool.ops.stacks import apart, repacked, stacks_of
from loratool.plan import Progress, counted
from loratool.tensors import FLOATS, Tensor
from loratool.update import Dense, Layer, LowRank, Sum, Update, as_low_rank

Method = Literal["linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "knots"]
METHODS: tuple[Method, ...] = ("linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "knots")
ALIASES: Mapping[str, Method] = {"dare": "dare_linear"}
DENSITY = 0.5  # where none is given
_DEPENDENT = 1e-10  # singular values below that share of the largest are rounding of dependent updates
_CANCELLED = 2.0**-20  # a sum below that share of its terms' magnitudes is rounding of float32 terms
_BLOCK = 1 << 18  # entries that are merged at a time


@dataclass(frozen=True)
class Recipe:
    """How updates are combined. Raises UsageError for an unknown method, a density outside (0, 1], a rank below 1."""

    method: str
    density: float | None = None
    seed: int = 0
    rank: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", ALIASES.get(self.method, self.method))
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}", hint=f"one of {', '.join(METHODS)}")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError("the density must be in (0, 1]", str(self.density))
        if self.rank is not None and self.rank < 1:
            raise UsageError("the rank must be at least 1", str(self.rank))

    @property
    def sparse(self) -> bool:
        """Whether the method drops entries."""
        return self.method not in ("linear", "svd")

    @property
    def kept(self) -> float:
        """The share of entries that is kept."""
        return DENSITY if self.density is None else self.density

    def details(self) -> dict[str, object]:
        """What the provenance records beside the strengths."""
        return {"method": self.method, "density": self.kept if self.sparse else None, "seed": self.seed}


def combine(
    adapters: Sequence[Adapter],
    recipe: Recipe,
    strengths: Sequence[float] | None = None,
    model: Model | None = None,
    progress: Progress | None = None,
) -> Result:
    """One adapter of many, module by module, by ``recipe``; ``strengths`` multiply the updates.

    ``linear``: the sum (`add`), exact unless a rank is given. ``svd``: the best rank of the sum. ``magnitude_prune``:
    the sum of the trimmed updates (`trim`). ``dare_linear``: the sum of updates with dropped entries (`drop`).
    ``ties``, ``dare_ties``: the entries that are left elect a sign (`elect`). ``knots``: ties in shared coordinates
    (`tied_knots`).

    The result of each module is factored at the best rank in the Frobenius norm: the recipe's, else the largest among
    the adapters' updates of that module; ``relative_error`` is that of what will be stored. Biases, norms, and modules
    that an adapter holds whole (no rank is known, and none is given) stay whole. A module that some adapters lack is
    zero there: it adds nothing to a sum, and has no voice in an election. Whole tensors: the rule of `add`.

    Raises MatchError where shapes differ and for kinds that need the base without ``model``; UsageError for a wrong
    count of strengths; NumericError where an update is not finite.
    """
    given = strengths_of(adapters, strengths)
    shared_layers(adapters)
    notes = () if recipe.sparse or recipe.density is None else (f"{recipe.method} keeps every entry: no density",)
    if recipe.method == "linear":
        plain = add(adapters, given, recipe.rank, model, progress)
        return replace(plain, warnings=(*plain.warnings, *notes))
    stacks = stacks_of(adapters, model)
    adapters = [apart(adapter, model) for adapter in adapters]
    terms = _aligned(adapters, given, model)

    def one(name: str) -> tuple[Update | None, Squares]:
        return _combined(name, terms[name], recipe)

    sizes = (sum(term.update.nbytes for term in found) for found in terms.values())
    if recipe.method == "svd":
        results = each(one, terms, sizes, progress)
    else:  # what works entry by entry holds whole matrices: one module at a time
        results = counted(map(one, terms), sizes, progress)
    made = dict(zip(terms, results, strict=True))
    updates = {name: update for name, (update, _) in made.items() if update is not None}
    spellings = {k: v for adapter in reversed(adapters) for k, v in adapter.spellings.items()}
    carried = summed_carried(adapters, given, updates, model)
    whole = replace(adapters[0], updates=updates, carried=carried, spellings=spellings)
    found = {name: squares for name, (_, squares) in made.items() if not is_bias(name)}
    return repacked(summarise(fresh_metadata(whole), found, notes), stacks)


# ---------------------------------------------------------------- which updates belong together


@dataclass(frozen=True)
class _Term:
    """One adapter's update of a module; ``adapter`` counts from 0 and seeds its dropout."""

    placed: Placed
    strength: float
    adapter: int
    transposed: bool = False  # whether the weight is stored so; what is computed is [o,i*k] all the same

    @property
    def update(self) -> Update:
        return self.placed[0]

    def low_rank(self) -> tuple[np.ndarray, np.ndarray] | None:
        """up [o,r] times the strength and down [r,i*k] in float64; None where there are none."""
        low = as_low_rank(self.update)
        if low is None:
            return None
        up, down = wide_factors(low)
        if not (np.isfinite(up).all() and np.isfinite(down).all()):
            raise NumericError("an update is not finite")
        return up * self.strength, down

    def dense(self) -> np.ndarray:
        """The update itself: [o,i*k] in float32, without the strength. Raises NumericError where it is not finite."""
        update, base = self.placed
        flat = np.concatenate([block.astype(np.float32) for block in blocks(update, base)])
        flat = np.ascontiguousarray(flat.T) if self.transposed else flat
        if not np.isfinite(flat).all():
            raise NumericError("an update is not finite")
        return flat


def _layer(terms: Sequence[_Term]) -> Layer:
    """How the base stores the weight, as the first update that has factors tells."""
    return next((term.update.layer for term in terms if isinstance(term.update, Factored)), "plain")


def _aligned(adapters: Sequence[Adapter], strengths: Sequence[float], model: Model | None) -> dict[str, list[_Term]]:
    """The terms of each target, which later adapters may spell without leading segments. Checks every shape."""
    terms: dict[str, list[_Term]] = {}
    for number, (adapter, strength) in enumerate(zip(adapters, strengths, strict=True)):
        names = Names({parameter(n): Slot(n) for n in terms})
        for name, update in adapter.updates.items():
            hit = names.find(parameter(name))
            target = name if isinstance(hit, Unmatched) else names.places[hit[0]].tensor
            found, base = placed(name, as_low_rank(update) or update if isinstance(update, Sum) else update, model)
            others = terms.setdefault(target, [])
            if others:
                found = _alike(found, others[0].update)
                same_shape(others[0].update, found, target)
            others.append(_Term((found, base), strength, number))
    for name, found_terms in terms.items():
        if _layer(found_terms) == "transposed":
            terms[name] = [replace(term, transposed=True) for term in found_terms]
    return terms


def _alike(update: Update, first: Update) -> Update:
    """The update in the other's orientation: a file's word on how the base stores it is a hint only."""
    if isinstance(update, Factored) and isinstance(first, Factored) and "embedding" not in (update.layer, first.layer):
        return update.oriented(first.layer)
    return update


# ---------------------------------------------------------------- one module


def _combined(name: str, terms: Sequence[_Term], recipe: Recipe) -> tuple[Update | None, Squares]:
    """The combined update of one target, None where it is zero; squared norms of what it misses, and of the whole."""
    ranks = [_rank(term.update) for term in terms]
    rank = recipe.rank if recipe.rank is not None else max((r for r in ranks if r is not None), default=None)
    matrix = not is_bias(name) and len(terms[0].update.shape) > 1
    pair = _factored(terms, recipe) if matrix else None
    if not matrix or rank is None or (recipe.rank is None and None in ranks):
        return _whole(terms, _merged(name, terms, recipe) if pair is None else np.asarray(pair[0] @ pair[1]))
    if pair is not None:
        return _from_factors(terms, rank, *pair)
    return _from_dense(terms, rank, _merged(name, terms, recipe), recipe.seed)


def _rank(update: Update) -> int | None:
    """The rank of an update itself, not of what it is made of: a LoHa of rank r is a LoRA of rank r x r."""
    if update.needs_base or isinstance(update, Factored):
        return update.rank
    low = as_low_rank(update)
    return None if low is None else low.rank


def _factored(terms: Sequence[_Term], recipe: Recipe) -> tuple[np.ndarray, np.ndarray] | None:
    """up, down of the combined update for the methods that need no dense matrix; None for the others."""
    if recipe.method not in ("svd", "knots"):
        return None
    pairs = [term.low_rank() for term in terms]
    known = [pair for pair in pairs if pair is not None]
    if recipe.method == "knots":
        if len(known) < len(pairs):
            return tied_knots([(np.eye(len(d)), d) for d in _weighted(terms)], recipe.kept)
        return tied_knots(known, recipe.kept)
    if len(known) < len(pairs):
        return None
    ups, downs = zip(*known, strict=True)
    return np.concatenate(ups, axis=1), np.concatenate(downs, axis=0)


def _weighted(terms: Sequence[_Term]) -> Iterator[np.ndarray]:
    return (term.dense() * np.float64(term.strength) for term in terms)


def _from_factors(terms: Sequence[_Term], rank: int, up: np.ndarray, down: np.ndarray) -> tuple[Update | None, Squares]:
    found = recompress(up, down)
    scale = math.sqrt(float((up * up).sum()) * float((down * down).sum()))
    if not (found.values > _DEPENDENT * scale).any():
        return None, (0.0, 0.0)
    made = _piece(terms, found).low_rank(rank)
    return made, (found.distance(*wide_factors(made)), found.energy)


def _from_dense(terms: Sequence[_Term], rank: int, matrix: np.ndarray, seed: int) -> tuple[Update | None, Squares]:
    if not matrix.any():
        return None, (0.0, 0.0)
    made = _piece(terms, truncated_svd(matrix, min(rank, *matrix.shape), abs(seed))).low_rank(rank)
    up, down = wide_factors(made)
    step = max(1, _BLOCK // matrix.shape[1])
    lost = whole = 0.0
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step].astype(np.float64)
        lost += float(np.square(rows - up[start : start + step] @ down).sum())
        whole += float(np.square(rows).sum())
    return made, (lost, whole)


def _piece(terms: Sequence[_Term], found: Truncation) -> Piece:
    """What the written LoRA must look like: as the first adapter's, in a dtype that holds what all of them hold."""
    first = terms[0].update
    rest = first.shape[:1] if terms[0].transposed else first.shape[1:]
    named = ((slot, tensor.dtype) for term in terms for slot, tensor in term.update.slots.items())
    dtypes = {dtype for slot, dtype in named if slot != "magnitude" and dtype in FLOATS}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    scaling = first.scaling if isinstance(first, LowRank) else 1.0
    stabilised = isinstance(first, LowRank) and first.rank_stabilised
    return Piece(found, (found.up.shape[0], *rest), dtype, _layer(terms), scaling, stabilised)


def _whole(terms: Sequence[_Term], values: np.ndarray) -> tuple[Update | None, Squares]:
    """The combined update of a vector, or of a module that some adapter holds whole, stored whole in float32."""
    if not values.any():
        return None, (0.0, 0.0)
    first = terms[0].update
    stored = np.ascontiguousarray(values.T if terms[0].transposed else values, np.float32)
    kind = first.kind if isinstance(first, Dense) else "full"
    made = Dense(Tensor.of(stored.reshape(first.shape)), 1.0, kind)
    return made, (0.0, float(np.square(values, dtype=np.float64).sum()))


def _merged(name: str, terms: Sequence[_Term], recipe: Recipe) -> np.ndarray:
    """The combined update of one target, [o,i*k] in float32, by a method that works entry by entry."""
    density, method = recipe.kept, recipe.method
    deltas = [term.dense() for term in terms]
    if method in ("ties", "magnitude_prune", "knots"):  # in one dimension the coordinates are the entries themselves
        deltas = [trim(delta, density) for delta in deltas]
    elif method in ("dare_linear", "dare_ties"):
        deltas = [drop(d, density, recipe.seed, name, t.adapter) for d, t in zip(deltas, terms, strict=True)]
    return _by_blocks(deltas, [t.strength for t in terms], elect if method in _ELECTED else _sum)


_ELECTED = ("ties", "dare_ties", "knots")


def _by_blocks(
    deltas: Sequence[np.ndarray], strengths: Sequence[float], merge: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """``merge`` of the weighted updates, stacked in float64 a few entries at a time; overwrites the first."""
    flat = [delta.reshape(-1) for delta in deltas]
    weights = np.asarray(strengths, np.float64)[:, None]
    for start in range(0, flat[0].size, _BLOCK):
        stacked = np.stack([delta[start : start + _BLOCK] for delta in flat]) * weights
        flat[0][start : start + _BLOCK] = merge(stacked)
    return flat[0].reshape(deltas[0].shape)


def _sum(stacked: np.ndarray) -> np.ndarray:
    return np.asarray(stacked.sum(axis=0))


# ---------------------------------------------------------------- the definitions


def trim(delta: np.ndarray, density: float) -> np.ndarray:
    """The ``density`` largest entries by magnitude, the others zero (the first step of TIES, Yadav et al. 2023).

    Exactly floor(density x entries) are kept, at least one; of entries alike in magnitude the first ones in memory.
    """
    count = max(1, int(density * delta.size + 1e-6))
    if count >= delta.size:
        return delta
    size = np.abs(delta).reshape(-1)
    edge = size[np.argpartition(size, size.size - count)[size.size - count]]
    keep = size > edge
    keep[np.flatnonzero(size == edge)[: count - int(keep.sum())]] = True
    return np.where(keep.reshape(delta.shape), delta, delta.dtype.type(0))


def drop(delta: np.ndarray, density: float, seed: int, module: str, adapter: int) -> np.ndarray:
    """Each entry kept with probability ``density`` and divided by it, else zero (DARE, Yu et al. 2024).

    The draws are Philox's, by a key of seed, module and the adapter's place in the list, so that neither the other
    modules nor threads matter. An entry is kept where its 32 bits are below density x 2^32.
    """
    if density == 1:
        return delta
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{module}\0{adapter}".encode()).digest()[:16], "little")
    stream = np.random.Philox(key=key)
    flat, bound = delta.reshape(-1), np.float64(density) * 2**32
    made = np.zeros_like(flat)
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        draws = stream.random_raw((part.size + 1) // 2).astype("<u8").view("<u4")[: part.size]
        made[start : start + part.size] = np.where(draws < bound, part / delta.dtype.type(density), 0)
    return made.reshape(delta.shape)


def elect(stacked: np.ndarray) -> np.ndarray:
    """The elected sign's mean of each entry over axis 0 (the last two steps of TIES, Yadav et al. 2023).

    The sign is that of the sum of the values, strengths included; the mean is over the values that have it: not over
    zeros, nor over adapters without this module. Where the values cancel, up to the rounding of float32, no sign is
    elected and the result is zero. PEFT's ``ties`` elects by the values without their weights, and takes a sum of zero
    for positive.
    """
    total = stacked.sum(axis=0)
    total[np.abs(total) <= _CANCELLED * np.abs(stacked).sum(axis=0)] = 0.0
    agree = np.sign(stacked) == np.sign(total)
    count = np.maximum(agree.sum(axis=0), 1)
    return np.asarray((stacked * agree).sum(axis=0) / count)


def tied_knots(pairs: Sequence[tuple[np.ndarray, np.ndarray]], density: float) -> tuple[np.ndarray, np.ndarray]:
    """TIES in coordinates that the updates share (KnOTS, Stoica et al. 2025): up [o,k] and down [k,i] of the result.

    ``pairs`` are the updates as (up, down), strengths included. The SVD U S [V_1 | V_2 | ...] of the updates side by
    side gives one basis U of their outputs; the coordinates S V_n are trimmed, elect their signs and are averaged as
    in `trim` and `elect`, and mapped back by U. The SVD is that of a core as small as the sum of ranks.

    Why this one: on 7 settings of planted least-squares tasks with trained LoRAs (48 x 48, 3 to 6 tasks, 4 seeds each),
    at density 0.5 and strength 1, its loss over all tasks was 0.73 to 0.98 of that of ties in 6 and 1.01 in one, and
    below that of coordinates without S in all. TIES in a two-sided core (Core Space, Panariello et al. 2025) was 0.88
    to 0.99 of it in 5 and up to 1.25 in 2; with the strength tuned on the tasks it was the worse one in 5. Tuned, knots
    beat ties in 3 only, and the plain sum was below them all: try `linear` first. No evidence beyond such toys.
    """
    left, small = np.linalg.qr(np.concatenate([up for up, _ in pairs], axis=1))  # [o,p], [p,R]
    ends = np.cumsum([up.shape[1] for up, _ in pairs])
    cores = np.split(small, ends[:-1], axis=1)
    rights = [np.asarray(np.linalg.qr(down.T, mode="r")).T for _, down in pairs]  # down = right @ orthonormal rows
    core = np.concatenate([c @ r for c, r in zip(cores, rights, strict=True)], axis=1)
    basis, values, _ = np.linalg.svd(core, full_matrices=False)
    basis = basis[:, : max(1, int((values > _DEPENDENT * values[0]).sum()))]  # [p,k]
    coordinates = [trim((basis.T @ c) @ down, density) for c, (_, down) in zip(cores, pairs, strict=True)]
    return left @ basis, _by_blocks(coordinates, [1.0] * len(coordinates), elect)
