"""Which rank is needed: the spectrum of every update, its energy and error at each rank, and a proposal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratool.adapter import Adapter
from loratool.lazy import np
from loratool.linalg import Truncation, error_for_energy, rank_for_error
from loratool.model import Model
from loratool.names import module_of
from loratool.ops.extract import Pair, each_pair, survey
from loratool.ops.resize import is_matrix, spectrum
from loratool.ops.spectral import Choice, Piece, choose_ranks, header_size, weights_of
from loratool.ops.stacks import apart
from loratool.plan import Progress, thread_count
from loratool.tensors import Tensor

DEFAULT_ENERGY = 0.95
DUST = 1e-6  # of the largest singular value: below that, float32 differences hold nothing but rounding


@dataclass(frozen=True)
class Spectrum:
    """One module: descending singular values; share of the energy kept and relative error at ranks 1, 2, ...

    ``stable_rank`` is ||D||_F^2 / ||D||_2^2. ``noise_edge`` is the singular value below which a dense difference looks
    like noise (None for an adapter, whose rank was chosen by its trainer).
    """

    module: str
    singular_values: tuple[float, ...]
    energy: tuple[float, ...]
    error: tuple[float, ...]
    proposed_rank: int
    stable_rank: float
    noise_edge: float | None
    shape: tuple[int, ...]

    def needed(self, share: float) -> int:
        """The smallest rank that keeps this share of the energy."""
        return int(np.searchsorted(np.asarray(self.energy), share * (1 - 1e-9))) + 1


@dataclass(frozen=True)
class RankReport:
    """Every module, and what the proposal amounts to."""

    modules: tuple[Spectrum, ...]
    proposed_parameters: int
    relative_error: float


def rank_adapter(adapter: Adapter, choice: Choice | None = None, model: Model | None = None) -> RankReport:
    """The spectra of an adapter's updates. Raises MatchError for kinds that need the base without ``model``."""
    adapter = apart(adapter, model)
    found = {n: adapter.updates[n] for n in weights_of(adapter) if is_matrix(adapter.updates[n])}
    pieces = {}
    for name, update in found.items():
        dtype = next(iter(update.slots.values())).dtype
        pieces[name] = Piece(_bare(spectrum(name, update, model)), update.shape, dtype)
    return _report(pieces, choice, {}, adapter.carried)


def rank_models(
    base: Model, tuned: Model, choice: Choice | None = None, progress: Progress | None = None
) -> RankReport:
    """The spectra of TUNED - BASE, exactly, with the edge of the noise. Raises what `survey` raises."""
    seen = survey(base, tuned)
    pieces, edges = {}, {}
    for pair, piece in each_pair(_piece, seen.pairs, thread_count(), progress):
        if piece is not None:
            name = seen.prefix + module_of(pair.name)
            pieces[name] = piece
            edges[name] = noise_edge(piece.truncation.values, (pair.shape[0], math.prod(pair.shape[1:])))
    return _report(pieces, choice, edges, seen.carried)


def _piece(pair: Pair) -> Piece | None:
    """The spectrum of one difference; None where there is none."""
    change = pair.difference()
    if change is None:
        return None
    values, energy = singular_values(change)
    empty = np.zeros((0, 0), np.float32)
    return Piece(Truncation(empty, values, empty, energy, complete=True), pair.shape, pair.base.tensor.dtype)


def singular_values(change: np.ndarray) -> tuple[np.ndarray, float]:
    """All singular values of a matrix, descending, and its energy; from the Gram matrix in float64, by row blocks.

    Squaring leaves those below 1e-8 of the largest unknown, beyond what float32 differences hold.
    """
    tall = change if change.shape[0] >= change.shape[1] else change.T
    short = tall.shape[1]
    gram = np.zeros((short, short))
    step = max(1, (1 << 22) // short)
    for start in range(0, len(tall), step):
        rows = np.asarray(tall[start : start + step], np.float64)
        gram += rows.T @ rows
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)), float(np.trace(gram))


def _bare(found: Truncation) -> Truncation:
    """The spectrum without the vectors."""
    empty = np.zeros((0, 0), np.float32)
    return Truncation(empty, np.asarray(found.values, np.float64), empty, found.energy, complete=True)


def noise_edge(values: np.ndarray, shape: tuple[int, ...]) -> float:
    """The threshold above which singular values are signal, from their median, the noise unknown.

    Source: Gavish and Donoho 2014, The optimal hard threshold for singular values is 4 / sqrt(3), equation 5. Never
    below what float32 can tell from rounding.
    """
    beta = min(shape) / max(shape)
    edge = (0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43) * np.median(values)
    return float(max(edge, DUST * values[0]))


def _report(
    pieces: Mapping[str, Piece], choice: Choice | None, edges: Mapping[str, float], carried: Mapping[str, Tensor]
) -> RankReport:
    if choice is not None:
        ranks = choose_ranks(pieces, choice, header_size(pieces, {}, carried))
    else:
        ranks = {name: _propose(piece.truncation, edges.get(name)) for name, piece in pieces.items()}
    ranks = {name: min(rank, max(1, len(pieces[name].truncation.values))) for name, rank in ranks.items()}
    modules = tuple(_spectrum(name, piece, ranks[name], edges.get(name)) for name, piece in pieces.items())
    energy = sum(piece.truncation.energy for piece in pieces.values())
    lost = sum(m.error[m.proposed_rank - 1] ** 2 * pieces[m.module].truncation.energy for m in modules if m.error)
    units = {name: replace(piece, dtype="F32").unit // 4 for name, piece in pieces.items()}
    parameters = sum(ranks[name] * unit for name, unit in units.items())
    return RankReport(modules, parameters, math.sqrt(lost / energy) if energy > 0 else 0.0)


def _propose(found: Truncation, edge: float | None) -> int:
    """Without a budget: what stands out of the noise, else what keeps 95 percent of the energy."""
    if edge is not None and (signal := int((found.values > edge).sum())):
        return signal
    return max(1, rank_for_error(found.values, found.energy, error_for_energy(DEFAULT_ENERGY)))


def _spectrum(name: str, piece: Piece, rank: int, edge: float | None) -> Spectrum:
    values = np.asarray(piece.truncation.values, np.float64)
    squares = np.square(values)
    whole = float(squares.sum())
    left = np.append(np.cumsum(squares[::-1])[::-1][1:], 0.0) if len(values) else squares  # beyond each rank
    share = np.minimum(left / whole, 1.0) if whole > 0 else np.zeros(len(values))
    return Spectrum(
        module=name,
        singular_values=tuple(map(float, values)),
        energy=tuple(map(float, 1 - share)),
        error=tuple(map(float, np.sqrt(share))),
        proposed_rank=rank,
        stable_rank=whole / float(squares[0]) if whole > 0 else 0.0,
        noise_edge=edge,
        shape=piece.shape,
    )
