"""Another rank for every module: the best in the Frobenius norm, from the factors alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loratool.adapter import Adapter, is_bias
from loratool.errors import MatchError
from loratool.linalg import Truncation, exact_svd, recompress
from loratool.model import Model
from loratool.ops.compare import blocks, placed
from loratool.ops.spectral import (
    Choice,
    Piece,
    Result,
    choose_ranks,
    factor_error,
    fresh_metadata,
    header_size,
    summarise,
)
from loratool.tensors import Tensor
from loratool.update import Dense, Layer, LowRank, Update, as_low_rank, trimmed


def resize(adapter: Adapter, choice: Choice, model: Model | None = None, dtype: str | None = None) -> Result:
    """``adapter`` with the ranks that ``choice`` asks for; a rank beyond what there is pads with zeros.

    Low-rank updates never form their product: QR of the factors and the SVD of a small core, in float64. Whole
    deltas, and kinds that need the base (DoRA, with ``model``), are factored from the dense change. Biases and
    norms stay. Raises MatchError for kinds that need the base when none is given.
    """
    pieces: dict[str, Piece] = {}
    wholes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, update in adapter.updates.items():
        if is_bias(name) or len(update.shape) < 2:
            continue
        low = as_low_rank(update)
        if low is None:
            pieces[name], wholes[name] = dense_piece(name, update, model, dtype)
        else:
            pieces[name], wholes[name] = low_rank_piece(low, dtype)
    carried = adapter.carried
    ranks = choose_ranks(pieces, choice, header_size(pieces, adapter.metadata.strings, carried))
    updates = dict(adapter.updates)
    squares = {}
    for name, piece in pieces.items():
        made = _unchanged(adapter.updates[name], ranks[name], dtype) or piece.low_rank(ranks[name])
        updates[name] = made
        squares[name] = factor_error(*wholes[name], made)
    return summarise(fresh_metadata(replace(adapter, updates=updates)), squares)


def low_rank_piece(low: LowRank, dtype: str | None = None) -> tuple[Piece, tuple[np.ndarray, np.ndarray]]:
    """The truncation of one LoRA, and its factors in float64."""
    held = low.oriented("plain") if low.layer == "transposed" else low
    up, down = (factor.astype(np.float64) for factor in held.factors())
    stored = dtype or low.down.dtype
    piece = Piece(recompress(up, down), held.shape, stored, low.layer, low.scaling, low.rank_stabilised)
    return piece, (up, down)


def dense_piece(
    name: str, update: Update, model: Model | None, dtype: str | None
) -> tuple[Piece, tuple[np.ndarray, np.ndarray]]:
    """The truncation of a change that has no factors, through the dense matrix."""
    update, base = placed(name, update, model)
    change = np.concatenate(list(blocks(update, base)))  # [o, i*k]
    layer: Layer = getattr(update, "layer", "plain")
    if layer == "transposed":
        change = change.T
    found = exact_svd(change.astype(np.float32))
    shape = (change.shape[0], *update.shape[1:]) if layer != "transposed" else change.shape
    stored = dtype or next(iter(update.slots.values())).dtype
    return Piece(found, shape, stored, layer), (found.up * found.values[None, :], np.asarray(found.down))


def _unchanged(update: Update, rank: int, dtype: str | None) -> LowRank | None:
    """The update with its own factors, zeros added, where its rank is not to fall; None where it is."""
    if not isinstance(update, LowRank) or update.mid is not None or rank < update.rank or dtype is not None:
        return None
    if rank == update.rank:
        return update
    more = rank - update.rank
    alpha = update.scaling * (np.sqrt(rank) if update.rank_stabilised else rank)
    down, up = update.down.array(), update.up.array()
    pads = ((0, more), *((0, 0) for _ in down.shape[1:])), ((0, 0), (0, more), *((0, 0) for _ in up.shape[2:]))
    return replace(update, down=Tensor.of(np.pad(down, pads[0])), up=Tensor.of(np.pad(up, pads[1])), alpha=float(alpha))


def spectrum(name: str, update: Update, model: Model | None = None) -> Truncation:
    """The whole spectrum of one update. Raises MatchError where it needs the base."""
    low = as_low_rank(update)
    piece, _ = dense_piece(name, update, model, "F32") if low is None else low_rank_piece(low)
    return piece.truncation


def same_shape(one: Update, other: Update, name: str) -> None:
    """Raise MatchError where two updates of one module differ in shape."""
    if trimmed(one.shape) != trimmed(other.shape):
        raise MatchError(f"shapes differ: {list(one.shape)} and {list(other.shape)}", name)


def is_matrix(update: Update) -> bool:
    """Whether an update can be factored."""
    return len(update.shape) > 1 and not (isinstance(update, Dense) and update.kind == "norm")
