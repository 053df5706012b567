"""Linear sums of updates: exact by concatenation of the factors, or the best of a given rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.adapter import Adapter, is_bias, parameter, strengths_of
from loratool.architectures import Slot
from loratool.errors import MatchError, NumericError, UsageError, some
from loratool.lazy import np
from loratool.linalg import recompress
from loratool.model import Model
from loratool.names import Names, Unmatched, module_of
from loratool.ops.compare import Placed, blocks, norm, placed
from loratool.ops.replicate import shared_layers
from loratool.ops.resize import Squares, dense_squares, dense_svd, each, factors_of, is_matrix, padded
from loratool.ops.spectral import Choice, Piece, Result, fresh_metadata, stored, summarise, wide_factors
from loratool.ops.stacks import apart, repacked, stacks_of
from loratool.plan import Progress
from loratool.tensors import DTYPES, FLOATS, Tensor
from loratool.update import Additive, Dense, DoRA, Layer, LowRank, Update, as_low_rank, trimmed

_NOISE = 1e-7  # singular values of a float32 matrix below that share of the largest are rounding
Term = tuple[float, Placed]  # strength, and the update in its place
Part = tuple[float, Update, tuple[np.ndarray, np.ndarray]]  # strength, the update, and its up [o,r] and down [r,i*k]


def add(
    adapters: Sequence[Adapter],
    strengths: Sequence[float] | None = None,
    rank: int | None = None,
    model: Model | None = None,
    progress: Progress | None = None,
) -> Result:
    """The sum of strength x update over ``adapters``, module by module.

    Exact: the factors are stacked, with their own ranks and scalings, in float32 where the stored dtype cannot say it;
    where stacked factors are dependent they are compacted without loss, and a module whose sum is zero is left out.
    With ``rank`` the best of that rank. Raises UsageError for a wrong count of strengths; MatchError where shapes
    differ, for whole tensors that cannot be summed, and for kinds that need the base without ``model``.
    """
    given = strengths_of(adapters, strengths)
    shared_layers(adapters)
    stacks = stacks_of(adapters, model)
    adapters = [apart(adapter, model) for adapter in adapters]
    choice = Choice(rank or None) if rank is not None else None
    terms = _terms(adapters, given, model)

    def one(name: str) -> tuple[Update | None, Squares]:
        try:
            return _sum(terms[name], choice, is_bias(name))
        except NumericError as error:
            raise NumericError(error.what, name, error.hint) from None

    sizes = (sum(update.nbytes for _, (update, _) in found) for found in terms.values())
    made = dict(zip(terms, each(one, terms, sizes, progress), strict=True))
    updates = {name: update for name, (update, _) in made.items() if update is not None}
    spellings = {k: v for adapter in reversed(adapters) for k, v in adapter.spellings.items()}
    carried = _carried(adapters, given, updates, model)
    whole = replace(adapters[0], updates=updates, carried=carried, spellings=spellings)
    found = {n: squares for n, (_, squares) in made.items() if not is_bias(n)}
    notes = _grown(terms, updates) if choice is None else ()
    return repacked(summarise(fresh_metadata(whole), found, notes), stacks)


def _grown(terms: Mapping[str, Sequence[Term]], updates: Mapping[str, Update]) -> tuple[str, ...]:
    """What to say of changes like DoRA's: as a LoRA they are of any rank, so an exact sum may be large."""
    based = {name for name, found in terms.items() if any(update.needs_base for _, (update, _) in found)}
    ranks = {name: updates[name].rank or 0 for name in based & updates.keys()}
    own = {name: sum(update.rank or 0 for _, (update, _) in terms[name]) for name in ranks}
    grown = [name for name in ranks if ranks[name] > own[name] > 0]
    if not grown:
        return ()
    most = max(ranks[name] for name in grown)
    told = some([f"{name} (rank {own[name]} to {ranks[name]})" for name in sorted(grown)])
    return (f"the exact sum of what depends on the base has rank up to {most}: {told}; --rank N gives a small one",)


def subtract(
    adapters: Sequence[Adapter],
    strengths: Sequence[float] | None = None,
    rank: int | None = None,
    model: Model | None = None,
    progress: Progress | None = None,
) -> Result:
    """The first adapter minus the others; the rules of `add`."""
    given = strengths_of(adapters, strengths)
    if len(adapters) < 2:
        raise UsageError("nothing to subtract", hint="give two adapters or more")
    return add(adapters, (given[0], *(-s for s in given[1:])), rank, model, progress)


def _terms(adapters: Sequence[Adapter], strengths: Sequence[float], model: Model | None) -> dict[str, list[Term]]:
    """What is to be summed for each target. Raises MatchError where it does not add up."""
    terms: dict[str, list[Term]] = {}
    for adapter, strength in zip(adapters, strengths, strict=True):
        names = Names({parameter(n): Slot(n) for n in terms})
        for name, update in adapter.updates.items():
            hit = names.find(parameter(name))
            target = name if isinstance(hit, Unmatched) else names.places[hit[0]].tensor
            there = terms.setdefault(target, [])
            one, base = placed(name, update, model)
            if there and isinstance(one, (LowRank, DoRA)) and one.layer != "embedding":
                like = getattr(there[0][1][0], "layer", one.layer)  # how the base stores it, a file can only guess
                one = one.oriented(like) if like != "embedding" else one
            if there and trimmed(one.shape) != trimmed(there[0][1][0].shape):
                shapes = f"{list(there[0][1][0].shape)} and {list(one.shape)}"
                raise MatchError(f"shapes differ: {shapes}", adapter.spelling(name), "are they for the same base?")
            there.append((strength, (one, base)))
    return terms


def _sum(terms: Sequence[Term], choice: Choice | None, bias: bool) -> tuple[Update | None, Squares]:
    """The summed update of one target, None where it is zero; squared norms of the error and of the whole."""
    first = terms[0][1][0]
    terms = [term for term in terms if term[0] != 0]
    if not terms:
        return None, (0.0, 0.0)
    matrix = not bias and is_matrix(first)
    updates = [(strength, update) for strength, (update, _) in terms]
    if len(terms) == 1 and not (choice and matrix) and isinstance(only := terms[0][1][0], Additive):
        made = only if terms[0][0] == 1.0 else _scaled(only, terms[0][0])
        return made, (0.0, norm(made) ** 2)
    pairs = [factors_of(update) for _, update in updates]
    if matrix and None not in pairs and len({pair[0].shape[0] for pair in pairs if pair}) == 1:
        return _low_rank_sum([(s, u, pair) for (s, u), pair in zip(updates, pairs, strict=True) if pair], choice)
    if not matrix or (choice is None and all(isinstance(update, Additive) for _, update in updates)):
        whole = _dense_sum(terms)
        return whole, (0.0, norm(whole) ** 2 if whole else 0.0)
    return _best(terms, choice)


def _scaled(update: Additive, by: float) -> Additive:
    """``by`` times an update; a negative sign goes into up, where every format can say it."""
    if isinstance(update, LowRank) and by < 0:
        up = Tensor.of(-update.up.array())
        return replace(update, up=up).scaled(-by)
    return update.scaled(by)


def _low_rank_sum(parts: Sequence[Part], choice: Choice | None) -> tuple[Update | None, Squares]:
    """A sum of products: stacked where that is of full rank, else through its SVD."""
    products = _products(parts)
    if not products:
        return None, (0.0, 0.0)
    up = np.concatenate([up for up, _, _ in products], axis=1)
    down = np.concatenate([down for _, down, _ in products], axis=0)
    found = recompress(up, down)
    real = int((found.values > 0).sum())
    if real == 0:
        return None, (0.0, 0.0)
    groups = [lows for _, _, lows in products]
    rank = real if choice is None or choice.rank is None else choice.rank
    if rank >= up.shape[1]:
        stacked = _stacked(groups)
        made = padded(stacked, rank) if rank > stacked.rank else stacked
    else:
        dtypes = _dtypes([update for _, update, _ in parts])
        dtype = dtypes if choice else _wider(dtypes, "F32")  # in 16 bits a compaction would not be without loss
        first = groups[0][0]
        piece = Piece(found, first.oriented("plain").shape, dtype, first.layer, first.scaling, first.rank_stabilised)
        made = piece.low_rank(rank)
    return made, (found.distance(*wide_factors(made)), found.energy)


def _products(parts: Sequence[Part]) -> list[tuple[np.ndarray, np.ndarray, list[LowRank]]]:
    """Up [o,r] and down [r,i*k] of the sum, product by product, and the LoRAs that each is made of.

    Those of one down are one product: A + A is as small as A, in its own dtype, and A - A is nothing.
    """
    found: list[tuple[np.ndarray, np.ndarray, list[LowRank]]] = []
    for strength, update, (up, down) in parts:
        low = as_low_rank(update)
        assert low is not None  # it has factors
        twin = next((n for n, one in enumerate(found) if np.array_equal(one[1], down)), None)
        if twin is None:
            found.append((strength * up, down, [low.scaled(strength)]))
        else:
            found[twin] = found[twin][0] + strength * up, down, [*found[twin][2], low.scaled(strength)]
    return [one for one in found if one[0].any()]


def _stacked(groups: Sequence[Sequence[LowRank]]) -> LowRank:
    """One LoRA of all factors, one down for each group; those of another scaling have the ratio folded into up."""
    first = groups[0][0]
    scaling = abs(first.scaling) or 1.0
    shape = first.oriented("plain").shape

    def wide(tensor: Tensor, *rest: int) -> np.ndarray:
        return tensor.array().astype(np.float64).reshape(rest)

    ups = [sum(wide(low.up, -1, low.rank) * (low.scaling / scaling) for low in lows) for lows in groups]
    downs = [wide(lows[0].down, lows[0].rank, *shape[1:]) for lows in groups]
    dtype = _dtypes([low for lows in groups for low in lows])
    up, down = exact(np.concatenate(ups, axis=1), dtype), exact(np.concatenate(downs), dtype)
    unit = LowRank(down, up, None, 1.0, first.rank_stabilised, first.layer)
    return replace(unit, alpha=scaling / unit.scaling)


def _dtypes(updates: Sequence[Update]) -> str:
    """A dtype that holds the factors of all of them as they are."""
    named = ((slot, t.dtype) for update in updates for slot, t in update.slots.items())
    dtypes = {dtype for slot, dtype in named if not slot.endswith("magnitude") and dtype in FLOATS}
    return dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"


def _wider(one: str, other: str) -> str:
    return one if DTYPES[one].bits > DTYPES[other].bits else other


def exact(values: np.ndarray, dtype: str) -> Tensor:
    """Values as stored in ``dtype`` where that holds every one of them, else in float32 (or wider)."""
    with np.errstate(over="ignore"):
        narrow = Tensor.of(Tensor.of(values).cast(dtype).array())
    same = np.array_equal(narrow.array().astype(np.float64), values)
    return narrow if same else stored(values, _wider(dtype, "F32"))


def _dense_sum(terms: Sequence[Term]) -> Dense | None:
    """Whole changes summed in float64 and stored in float32 (or wider); None where the sum is zero."""
    first = terms[0][1][0]
    total = np.zeros(first.shape)
    for strength, one in terms:
        total += strength * np.concatenate(list(blocks(*one))).reshape(first.shape)
    if not total.any():
        return None
    kind = first.kind if isinstance(first, Dense) else "full"
    return Dense(exact(total, _dtypes([update for _, (update, _) in terms])), 1.0, kind)


def _best(terms: Sequence[Term], choice: Choice | None) -> tuple[Update | None, Squares]:
    """The best LoRA of a sum with dense terms; all of its rank where none is asked for."""
    layers: list[Layer] = [getattr(update, "layer", "plain") for _, (update, _) in terms]
    layer: Layer = next((layer for layer in layers if layer != "plain"), "plain")
    whole = sum(strength * np.concatenate(list(blocks(*term))) for strength, term in terms)
    matrix = np.asarray(whole).T if layer == "transposed" else np.asarray(whole)
    if not matrix.any():
        return None, (0.0, 0.0)
    found = dense_svd(matrix.astype(np.float32), choice or Choice(max_size=1))
    shape = matrix.shape if layer == "transposed" else (len(matrix), *terms[0][1][0].shape[1:])
    dtype = _dtypes([update for _, (update, _) in terms])
    rank = (choice and choice.rank) or max(1, int((found.values > _NOISE * found.values[0]).sum()))
    made = Piece(found, shape, dtype if choice else _wider(dtype, "F32"), layer).low_rank(rank)
    return made, dense_squares(matrix, made)


def _carried(
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    updates: Mapping[str, Update] | None = None,
    model: Model | None = None,
) -> Mapping[str, Tensor]:
    """Whole tensors, as a merge of the adapters would place them: kept where all holders agree at strength 1.

    The base weight of a module that was trained on it is kept beside its update. What cancels goes. The rest is
    summed as changes of the base, where that is known, else refused.
    """
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(n for adapter in adapters for n in adapter.carried):
        holders = [(a, s) for a, s in zip(adapters, strengths, strict=True) if name in a.carried and s != 0]
        if not holders:
            continue
        tensors = [a.carried[name] for a, _ in holders]
        alike = all(t.same_bytes(tensors[0]) for t in tensors[1:])
        if alike and not is_bias(name) and any(module_of(name) in a.updates for a, _ in holders):
            if updates is None or module_of(name) in updates:
                found[name] = tensors[0]
        elif alike and (all(s == 1.0 for _, s in holders) or math.isclose(sum(s for _, s in holders), 1.0)):
            found[name] = tensors[0]
        elif not alike or sum(s for _, s in holders) != 0:
            found[name] = _summed(name, [(s, a.carried[name]) for a, s in holders], holders[0][0], model)
    return found


def _summed(name: str, parts: Sequence[tuple[float, Tensor]], holder: Adapter, model: Model | None) -> Tensor:
    """base + the sum of strength x (tensor - base), in the first one's dtype. Raises MatchError without the base."""
    hit = Unmatched(name, "") if model is None else Names(model.places).find(name)
    if model is None or isinstance(hit, Unmatched):
        hint = "give --base, or leave this adapter out" if model is None else "leave this adapter out"
        raise MatchError("whole tensors cannot be summed without the base", holder.spelling(name), hint)
    place = model.places[hit[0]]
    base = model.parameters[place.tensor][0].tensor
    if not place.whole or place.transposed or any(t.shape != base.shape for _, t in parts):
        raise MatchError("whole tensors of another shape than the base's cannot be summed", holder.spelling(name))
    start = base.float().astype(np.float64)
    total = start + sum(s * (tensor.float().astype(np.float64) - start) for s, tensor in parts)
    return stored(np.asarray(total), parts[0][1].dtype)
