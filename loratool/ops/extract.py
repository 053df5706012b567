"""The LoRA of a full fine-tune: truncated SVD of TUNED - BASE, tensor pair by tensor pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from loratool.adapter import Adapter, Metadata
from loratool.architectures import Slot
from loratool.architectures.llm import EMBEDDING_LEAVES
from loratool.errors import FormatError, MatchError, NumericError, UsageError
from loratool.linalg import Truncation, adaptive_svd, exact_svd, to_numpy, truncated_svd
from loratool.model import Model
from loratool.names import Names, Unmatched, module_of, stores_transposed
from loratool.ops.spectral import Choice, Piece, Result, choose_ranks, header_size, summarise
from loratool.tensors import FLOATS, Array, Tensor
from loratool.update import Layer, LowRank, Update, trimmed

Progress = Callable[[int, int], None]
ToDevice = Callable[[np.ndarray], Array]


@dataclass(frozen=True)
class Pair:
    """One weight in both models; ``rows`` says which rows of the stored tensors it is."""

    name: str
    base: Tensor
    tuned: Tensor
    start: int
    stop: int
    layer: Layer

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as its factors are held: [o,i,*k]."""
        shape = (self.stop - self.start, *self.base.shape[1:])
        return shape[::-1] if self.layer == "transposed" else trimmed(shape) if len(trimmed(shape)) == 2 else shape

    def difference(self) -> np.ndarray:
        """TUNED - BASE of the stored values in float32, [o, i*k]."""
        change = np.subtract(self.tuned.float(self.start, self.stop), self.base.float(self.start, self.stop))
        flat = change.reshape(len(change), -1).astype(np.float32, copy=False)
        return np.ascontiguousarray(flat.T) if self.layer == "transposed" else flat


@dataclass(frozen=True)
class Survey:
    """Two models held against each other: what will be factored, and what is carried whole, names first."""

    pairs: tuple[Pair, ...]
    carried: dict[str, Tensor]


def survey(base: Model, tuned: Model, include: str | None = None, exclude: str | None = None) -> Survey:
    """Match the two models' tensors. All mismatches are found here, before the first SVD.

    Raises MatchError for a tensor that TUNED lacks or whose shape differs (but for added rows of an embedding or a
    head, which are carried whole), UsageError for an impossible regular expression.
    """
    chosen = _filter(include, exclude)
    names = Names(tuned.places)
    pairs: list[Pair] = []
    carried: dict[str, Tensor] = {}
    seen: set[str] = set()
    for name, slot in _canonical(base):
        hit = names.find(name)
        if isinstance(hit, Unmatched):
            raise MatchError("the tuned model lacks a tensor of the base", str(hit), "are these the right two models?")
        place = tuned.places[hit[0]]
        seen.add(place.tensor)
        if not chosen(module_of(name)):
            continue
        one, other = base.parameters[slot.tensor][0].tensor, tuned.parameters[place.tensor][0].tensor
        if slot != Slot(slot.tensor) and place.parts != slot.parts:
            raise MatchError("one model has a projection fused, the other not", name)
        if one.shape != other.shape:
            if one.shape[1:] != other.shape[1:] or len(one.shape) != 2:
                raise MatchError(f"shapes differ: {list(one.shape)} and {list(other.shape)}", name)
            carried[name] = other
        elif _worth(name, one) and one.dtype in FLOATS and other.dtype in FLOATS:
            rows = one.shape[0] // slot.parts
            start = slot.part * rows
            pairs.append(Pair(name, one, other, start, start + rows, _layer(name, slot, base)))
        elif one.dtype in FLOATS and not np.array_equal(one.float(), other.float()):
            carried[name] = other
        elif one.dtype not in FLOATS and not one.same_bytes(other):
            raise FormatError(f"a tensor of dtype {one.dtype} that differs", name, "give both models in 16 or 32 bit")
    carried |= {n: at[0].tensor for n, at in tuned.parameters.items() if n not in seen and chosen(module_of(n))}
    return Survey(tuple(pairs), carried)


def _canonical(model: Model) -> Iterator[tuple[str, Slot]]:
    """Every parameter once, under the name that formats know: reference names where an architecture is known."""
    named = {slot: name for name, slot in model.places.items()}  # reference names come last
    whole = {slot.tensor for slot in named if slot.parts > 1}
    for slot, name in named.items():
        if slot.parts > 1 or slot.tensor not in whole:
            yield name, slot


def _filter(include: str | None, exclude: str | None) -> Callable[[str], bool]:
    import regex

    try:
        wanted = regex.compile(include) if include else None
        unwanted = regex.compile(exclude) if exclude else None
    except regex.error as error:
        raise UsageError(f"no regular expression: {error}", repr(include or exclude)) from None

    def chosen(name: str) -> bool:
        return not (wanted and not wanted.search(name)) and not (unwanted and unwanted.search(name))

    return chosen


def _worth(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a matrix of some size: factors of rank 1 must be smaller than it is."""
    if len(tensor.shape) < 2 or not name.endswith(".weight"):
        return False
    rest = math.prod(tensor.shape[1:])
    return tensor.shape[0] > 1 and rest > 1 and tensor.shape[0] + rest < tensor.size


def _layer(name: str, slot: Slot, model: Model) -> Layer:
    leaf = module_of(name).rpartition(".")[2]
    if slot.transposed or (len(model.shape(slot.tensor)) == 2 and stores_transposed(slot.tensor, model)):
        return "transposed"
    return "embedding" if leaf in EMBEDDING_LEAVES else "plain"


def extract(
    base: Model,
    tuned: Model,
    choice: Choice,
    *,
    include: str | None = None,
    exclude: str | None = None,
    dtype: str | None = None,
    to_device: ToDevice = lambda values: values,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """A LoRA of TUNED - BASE; merged into BASE it gives TUNED up to the stated error.

    Each difference is taken in float32 from the stored values and truncated within 1.0005 of the best error
    (`truncated_svd`); norms, biases, resized embeddings and what only TUNED has are carried whole. Factors are stored
    in ``dtype``, the base's own where None. Raises what `survey` raises, and NumericError for NaN or infinities.
    """
    found = survey(base, tuned, include, exclude)
    pieces: dict[str, Piece] = {}
    total = sum(pair.base.nbytes for pair in found.pairs)
    done = 0
    for pair in found.pairs:
        piece = _piece(pair, choice, dtype, to_device, seed)
        if piece is not None:
            pieces[module_of(pair.name)] = piece
        done += pair.base.nbytes
        if progress is not None:
            progress(done, total)
    metadata = Metadata(format="peft", base_model=str(base.path), architecture=getattr(base.architecture, "name", None))
    ranks = choose_ranks(pieces, choice, header_size(pieces, {}, found.carried))
    updates: dict[str, Update] = {}
    squares: dict[str, tuple[float, float]] = {}
    by_name = {module_of(pair.name): pair for pair in found.pairs}
    for name, piece in pieces.items():
        rank = min(ranks[name], min(piece.shape[0], math.prod(piece.shape[1:])))
        made = piece.low_rank(rank)
        updates[name] = made
        squares[name] = written_error(by_name[name].difference(), made)
    return summarise(Adapter(updates, found.carried, metadata), squares)


def _piece(pair: Pair, choice: Choice, dtype: str | None, to_device: ToDevice, seed: int) -> Piece | None:
    """The truncation of one difference; None where there is none."""
    change = pair.difference()
    if not np.isfinite(np.dot(change.reshape(-1), change.reshape(-1))) and not np.isfinite(change).all():
        raise NumericError("NaN or infinity in the difference", pair.name)
    if not change.any():
        return None
    stored = dtype or pair.base.dtype
    return Piece(on_host(truncate(to_device(change), choice, seed)), pair.shape, stored, pair.layer)


def truncate(matrix: Array, choice: Choice, seed: int = 0) -> Truncation:
    """As much of the SVD of ``matrix`` as ``choice`` needs."""
    short = min(matrix.shape)
    if choice.bound is not None:
        return adaptive_svd(matrix, choice.bound, choice.rank, seed)
    if choice.max_size is not None:
        return exact_svd(matrix).cut(min(choice.rank or short, short))
    return truncated_svd(matrix, min(choice.rank or short, short), seed)


def on_host(found: Truncation) -> Truncation:
    """A truncation in ordinary memory, its factors in float32."""
    up, down = (to_numpy(factor).astype(np.float32) for factor in (found.up, found.down))
    return Truncation(up, found.values, down, found.energy, found.complete)


def written_error(change: np.ndarray, made: LowRank) -> tuple[float, float]:
    """Squared norms of what a stored LoRA misses of a difference [o,i*k], and of the difference; by row blocks."""
    held = made.oriented("plain") if made.layer == "transposed" else made
    up, down = held.factors()
    lost = whole = 0.0
    step = max(1, (1 << 22) // change.shape[1])
    for start in range(0, len(change), step):
        rows = change[start : start + step]
        miss = rows - up[start : start + step] @ down
        lost += float(np.square(miss, dtype=np.float64).sum())
        whole += float(np.square(rows, dtype=np.float64).sum())
    return lost, whole
