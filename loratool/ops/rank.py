"""Which rank is needed: the spectrum of every update, its energy and error at each rank, and a proposal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from loratool.adapter import Adapter
from loratool.linalg import Truncation, error_for_energy, exact_svd, rank_for_error
from loratool.model import Model
from loratool.names import module_of
from loratool.ops.extract import Progress, on_host, survey
from loratool.ops.resize import is_matrix, spectrum
from loratool.ops.spectral import Choice, Piece, choose_ranks, weights_of

DEFAULT_ENERGY = 0.95


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


@dataclass(frozen=True)
class RankReport:
    """Every module, and what the proposal amounts to."""

    modules: tuple[Spectrum, ...]
    proposed_parameters: int
    relative_error: float


def rank_adapter(adapter: Adapter, choice: Choice | None = None, model: Model | None = None) -> RankReport:
    """The spectra of an adapter's updates. Raises MatchError for kinds that need the base without ``model``."""
    found = {n: adapter.updates[n] for n in weights_of(adapter) if is_matrix(adapter.updates[n])}
    pieces = {name: Piece(spectrum(name, update, model), update.shape, "F32") for name, update in found.items()}
    return _report(pieces, choice, {})


def rank_models(
    base: Model, tuned: Model, choice: Choice | None = None, progress: Progress | None = None
) -> RankReport:
    """The spectra of TUNED - BASE, exactly, with the edge of the noise. Raises what `survey` raises."""
    pairs = survey(base, tuned).pairs
    pieces, edges = {}, {}
    for number, pair in enumerate(pairs, 1):
        change = pair.difference()
        if change.any():
            whole = on_host(exact_svd(change))
            name = module_of(pair.name)
            edges[name] = noise_edge(whole.values, change.shape)
            pieces[name] = Piece(
                Truncation(whole.up[:, :0], whole.values, whole.down[:0], whole.energy), pair.shape, "F32"
            )
        if progress is not None:
            progress(number, len(pairs))
    return _report(pieces, choice, edges)


def noise_edge(values: np.ndarray, shape: tuple[int, ...]) -> float:
    """The threshold above which singular values are signal, from their median, the noise unknown.

    Source: Gavish and Donoho 2014, The optimal hard threshold for singular values is 4 / sqrt(3), equation 5.
    """
    beta = min(shape) / max(shape)
    return float((0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43) * np.median(values))


def _report(pieces: Mapping[str, Piece], choice: Choice | None, edges: Mapping[str, float]) -> RankReport:
    if choice is not None:
        ranks = choose_ranks(pieces, choice)
    else:
        ranks = {name: _propose(piece.truncation, edges.get(name)) for name, piece in pieces.items()}
    modules = tuple(_spectrum(name, piece, ranks[name], edges.get(name)) for name, piece in pieces.items())
    energy = sum(piece.truncation.energy for piece in pieces.values())
    lost = sum((p.truncation.error(ranks[n]) ** 2) * p.truncation.energy for n, p in pieces.items())
    return RankReport(
        modules,
        sum(ranks[n] * (p.shape[0] + math.prod(p.shape[1:])) for n, p in pieces.items()),
        math.sqrt(lost / energy) if energy > 0 else 0.0,
    )


def _propose(found: Truncation, edge: float | None) -> int:
    """Without a budget: what stands out of the noise, else what keeps 95 percent of the energy."""
    if edge is not None and (signal := int((found.values > edge).sum())):
        return signal
    return max(1, rank_for_error(found.values, found.energy, error_for_energy(DEFAULT_ENERGY)))


def _spectrum(name: str, piece: Piece, rank: int, edge: float | None) -> Spectrum:
    values = np.asarray(piece.truncation.values, np.float64)
    whole = piece.truncation.energy
    kept = np.minimum(np.cumsum(values**2) / whole, 1.0) if whole > 0 else np.ones(len(values))
    return Spectrum(
        module=name,
        singular_values=tuple(map(float, values)),
        energy=tuple(map(float, kept)),
        error=tuple(map(float, np.sqrt(np.maximum(0.0, 1 - kept)))),
        proposed_rank=rank,
        stable_rank=float(whole / values[0] ** 2) if len(values) and values[0] > 0 else 0.0,
        noise_edge=edge,
        shape=piece.shape,
    )
