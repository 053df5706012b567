"""Linear sums of updates: exact by concatenation of the factors, or the best of a given rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from loratool.adapter import Adapter, is_bias, parameter
from loratool.architectures import Slot
from loratool.errors import MatchError, UsageError
from loratool.linalg import recompress
from loratool.model import Model
from loratool.names import Names, Unmatched
from loratool.ops.resize import dense_piece, same_shape
from loratool.ops.spectral import Piece, Result, factor_error, fresh_metadata, summarise
from loratool.tensors import Tensor
from loratool.update import Additive, Dense, LowRank, Update, as_low_rank

_DEPENDENT = 1e-13  # singular values below that share of the largest are rounding of dependent factors


def add(
    adapters: Sequence[Adapter],
    strengths: Sequence[float] | None = None,
    rank: int | None = None,
    model: Model | None = None,
) -> Result:
    """The sum of strength x update over ``adapters``, module by module.

    Exact: the factors are stacked, with their own ranks and scalings; where the stacked factors are dependent they are
    compacted without loss, and a module whose sum is zero is left out. With ``rank`` the best of that rank. Raises
    MatchError where shapes differ, for whole tensors that cannot be summed, and for kinds that need the base without
    ``model``; UsageError for a wrong count of strengths.
    """
    given = tuple(strengths) if strengths else (1.0,) * len(adapters)
    if len(given) != len(adapters) or not adapters:
        raise UsageError(f"{len(given)} strengths for {len(adapters)} adapters", hint="one for each, or none")
    if rank is not None and rank < 1:
        raise UsageError("the rank must be at least 1", str(rank))
    terms: dict[str, list[tuple[Update, float]]] = {}
    for adapter, strength in zip(adapters, given, strict=True):
        names = Names({parameter(n): Slot(n) for n in terms})
        for name, update in adapter.updates.items():
            hit = names.find(parameter(name))
            target = name if isinstance(hit, Unmatched) else names.places[hit[0]].tensor
            terms.setdefault(target, []).append((update, strength))
    updates: dict[str, Update] = {}
    squares: dict[str, tuple[float, float]] = {}
    for name, parts in terms.items():
        made, lost = _sum(name, parts, rank, model)
        squares[name] = lost
        if made is not None:
            updates[name] = made
    first = adapters[0]
    whole = replace(first, updates=updates, carried=_carried(adapters, given))
    return summarise(fresh_metadata(whole), squares)


def subtract(
    adapters: Sequence[Adapter],
    strengths: Sequence[float] | None = None,
    rank: int | None = None,
    model: Model | None = None,
) -> Result:
    """The first adapter minus the others; the rules of `add`."""
    given = tuple(strengths) if strengths else (1.0,) * len(adapters)
    if len(given) != len(adapters):
        raise UsageError(f"{len(given)} strengths for {len(adapters)} adapters", hint="one for each, or none")
    return add(adapters, (given[0], *(-s for s in given[1:])), rank, model)


def _sum(
    name: str, parts: Sequence[tuple[Update, float]], rank: int | None, model: Model | None
) -> tuple[Update | None, tuple[float, float]]:
    """The summed update of one target, None where it is zero; squared norms of the error and of the whole."""
    for update, _ in parts[1:]:
        same_shape(parts[0][0], update, name)
    if len(parts) == 1 and parts[0][1] == 1.0 and rank is None:
        return parts[0][0], (0.0, 1.0)
    lows = [as_low_rank(update) for update, _ in parts]
    if is_bias(name) or len(parts[0][0].shape) < 2:
        return _dense_sum(parts), (0.0, 1.0)
    if any(low is None for low in lows):
        if rank is None and all(isinstance(update, Additive) for update, _ in parts):
            return _dense_sum(parts), (0.0, 1.0)
        return _best(name, parts, rank, model)
    return _low_rank_sum([(low, s) for low, (_, s) in zip(lows, parts, strict=True) if low is not None], rank)


def _low_rank_sum(
    parts: Sequence[tuple[LowRank, float]], rank: int | None
) -> tuple[Update | None, tuple[float, float]]:
    first = parts[0][0]
    held = [low.oriented("plain") if low.layer == "transposed" else low for low, _ in parts]
    if len({low.layer == "transposed" for low, _ in parts}) > 1 and held[0].shape != held[-1].shape:
        raise MatchError("the adapters take this layer's weight for differently oriented", hint="give --base")
    pairs = [low.factors() for low in held]
    up = np.concatenate([u.astype(np.float64) * s for (u, _), (_, s) in zip(pairs, parts, strict=True)], axis=1)
    down = np.concatenate([d.astype(np.float64) for _, d in pairs], axis=0)
    found = recompress(up, down)
    scale = max(
        (
            abs(s) * float(np.linalg.norm(u)) * float(np.linalg.norm(d))
            for (u, d), (_, s) in zip(pairs, parts, strict=True)
        ),
        default=0.0,
    )
    real = int((found.values > _DEPENDENT * max(scale, 1e-300) * 10).sum())
    if real == 0:
        return None, (0.0, 0.0)
    if rank is None and real == up.shape[1]:
        return _stacked(parts, held), (0.0, found.energy)
    piece = Piece(found, held[0].shape, _widest(parts), first.layer, first.scaling, first.rank_stabilised)
    made = piece.low_rank(rank if rank is not None else real)
    return made, factor_error(up, down, made)


def _stacked(parts: Sequence[tuple[LowRank, float]], held: Sequence[LowRank]) -> LowRank:
    """One LoRA of all factors; those that need another scaling than the first have it folded into up."""
    first = held[0]
    rank = sum(low.rank for low in held)
    scaling = first.scaling * parts[0][1]
    scaling = scaling if scaling > 0 and math.isfinite(scaling) else 1.0
    ratios = [low.scaling * s / scaling for low, (_, s) in zip(held, parts, strict=True)]
    exact = all(abs(ratio) == 2.0 ** round(math.log2(abs(ratio))) for ratio in ratios if ratio)
    dtype = _widest(parts) if exact and len({low.up.dtype for low in held}) == 1 else "F32"
    shape = first.shape
    ups = [low.up.float().reshape(shape[0], low.rank) * np.float32(r) for low, r in zip(held, ratios, strict=True)]
    downs = [low.down.float().reshape(low.rank, *shape[1:]) for low in held]
    alpha = scaling * (math.sqrt(rank) if first.rank_stabilised else rank)
    up, down = Tensor.of(np.concatenate(ups, axis=1), dtype), Tensor.of(np.concatenate(downs, axis=0), dtype)
    return LowRank(down, up, None, alpha, first.rank_stabilised, parts[0][0].layer)


def _widest(parts: Sequence[tuple[LowRank, float]]) -> str:
    """A dtype that holds every factor as it is."""
    dtypes = {tensor.dtype for low, _ in parts for tensor in (low.up, low.down)}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _dense_sum(parts: Sequence[tuple[Update, float]]) -> Dense | None:
    """Whole deltas summed in float32, by rows when they are read; None where the sum is zero."""
    known = [(update, s) for update, s in parts if isinstance(update, Additive)]
    shape = parts[0][0].shape

    def load(start: int, stop: int) -> np.ndarray:
        rows = sum(np.float64(s) * update.delta(start, stop) for update, s in known)
        return np.asarray(rows, np.float32).reshape(stop - start, *shape[1:])

    value = Tensor("F32", shape, load)
    if not np.any(value.array()):
        return None
    first = parts[0][0]
    return Dense(value, 1.0, first.kind if isinstance(first, Dense) else "full")


def _best(
    name: str, parts: Sequence[tuple[Update, float]], rank: int | None, model: Model | None
) -> tuple[Update | None, tuple[float, float]]:
    """The best LoRA of a sum with dense terms; all of its rank where none is asked for."""
    ups, downs = [], []
    for update, strength in parts:
        piece, (up, down) = dense_piece(name, update, model, "F32")
        ups.append(up * strength)
        downs.append(down)
    up, down = np.concatenate(ups, axis=1), np.concatenate(downs, axis=0)
    found = recompress(up, down)
    made = replace(piece, truncation=found).low_rank(rank or min(len(found.values), min(up.shape[0], down.shape[1])))
    return made, factor_error(up, down, made)


def _carried(adapters: Sequence[Adapter], strengths: Sequence[float]) -> Mapping[str, Tensor]:
    """Whole tensors: kept where one adapter, or all alike, carry them at full strength; else refused."""
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(n for adapter in adapters for n in adapter.carried):
        holders = [(a, s) for a, s in zip(adapters, strengths, strict=True) if name in a.carried]
        tensors = [a.carried[name] for a, _ in holders]
        alike = all(t.same_bytes(tensors[0]) for t in tensors[1:])
        total = sum(s for _, s in holders)
        if alike and total == 0:
            continue
        if not alike or total != 1.0:
            raise MatchError(
                "whole tensors cannot be summed without the base",
                holders[0][0].spelling(name),
                "leave this adapter out",
            )
        found[name] = tensors[0]
    return found
