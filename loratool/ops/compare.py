"""How far two adapters' updates are apart, whatever their factors look like."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TypeAlias

from loratool.adapter import Adapter, parameter
from loratool.architectures import Slot
from loratool.devices import one_blas_thread
from loratool.errors import MatchError
from loratool.kinds.based import Hira
from loratool.kinds.tuner import Tuner
from loratool.lazy import np
from loratool.model import Model
from loratool.names import Names, Unmatched, orient
from loratool.ops.beside import alike
from loratool.plan import Progress, counted
from loratool.tensors import Tensor, block_rows
from loratool.update import Additive, Dense, DoRA, LowRank, Replace, Update, trimmed

Factors: TypeAlias = "tuple[np.ndarray, np.ndarray]"
"""up [o,r] and down [r,i] in float64, scaling included."""
_CANCELS = 1e-6  # a squared norm this small beside its terms has lost digits that QR keeps
Factored = (LowRank, DoRA, Tuner, Hira)
"""Kinds that are held as for an [o,i] weight, and know how the base stores it."""


@dataclass(frozen=True)
class Difference:
    """One module: ||first - second|| / ||first|| in the Frobenius norm, and the cosine of the two updates."""

    module: str
    relative_difference: float
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """The fields of ``compare --json``: over all modules (those of one side only count in full), and each.

    ``not_counted`` are whole tensors that differ, or that one side lacks, where no base tells what they change; the
    lists of what is in one only name them as well.
    """

    relative_difference: float
    cosine: float
    modules: tuple[Difference, ...]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    not_counted: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Squares:
    """||a||^2, ||b||^2, ||a - b||^2 of two updates."""

    first: float
    second: float
    apart: float

    def __add__(self, other: _Squares) -> _Squares:
        return _Squares(self.first + other.first, self.second + other.second, self.apart + other.apart)

    @property
    def difference(self) -> float:
        if self.apart == 0:
            return 0.0
        return math.sqrt(self.apart / self.first) if self.first else math.inf

    @property
    def cosine(self) -> float:
        scale = math.sqrt(self.first * self.second)
        return min(1.0, max(-1.0, (self.first + self.second - self.apart) / 2 / scale)) if scale else 0.0


def compare(
    first: Adapter, second: Adapter, model: Model | None = None, progress: Progress | None = None
) -> Comparison:
    """Compare two adapters by the updates themselves.

    Low-rank updates are compared from their factors (float64), never forming the product; experts in a stack with the
    same experts one by one. A whole tensor (a head, an embedding) counts as what it changes, for which the base must be
    known: without it those that differ are named, and not counted. Raises MatchError for kinds that need the base when
    none is given, and for shapes that differ.
    """
    first, second = alike(first, second)
    one, other = _changes(first, model), _changes(second, model)
    aligned = _aligned(first, second) | {n: n for n in first.carried if _one_shape(n, one, other)}
    with one_blas_thread():  # many small products: threads would wait for each other
        pairs = [(one[name], other[twin]) for name, twin in aligned.items()]
        sizes = (a.nbytes + b.nbytes for (a, _), (b, _) in pairs)
        found = dict(zip(aligned, counted((squares(*pair) for pair in pairs), sizes, progress), strict=True))
    only_first = [name for name in one if name not in aligned]
    only_second = [name for name in other if name not in aligned.values()]
    total = sum(found.values(), _Squares(0, 0, 0))
    for name in only_first:
        own = norm(*one[name]) ** 2
        total += _Squares(own, 0, own)
    for name in only_second:
        own = norm(*other[name]) ** 2
        total += _Squares(0, own, own)
    rest = _differing(first, second, one.keys() | other.keys())
    return Comparison(
        relative_difference=total.difference,
        cosine=total.cosine,
        modules=tuple(Difference(name, s.difference, s.cosine) for name, s in found.items()),
        only_in_first=(*only_first, *(n for n in first.carried if n in rest)),
        only_in_second=(*only_second, *(n for n in second.carried if n in rest)),
        not_counted=tuple(rest),
    )


def _changes(adapter: Adapter, model: Model | None) -> dict[str, Placed]:
    """Everything that an adapter changes and whose change is known: of whole tensors only where the base is."""
    found = {name: placed(name, update, model) for name, update in adapter.updates.items()}
    if model is not None:
        names = Names(model.places)
        own = {parameter(name) for name in adapter.updates}  # what an update was trained on is no change
        found |= {n: _whole(tensor, n, names, model) for n, tensor in adapter.carried.items() if n not in own}
    return found


def _whole(tensor: Tensor, name: str, names: Names, model: Model) -> Placed:
    """A whole tensor as the change of the base's: all of it where the base has none, rows that are new as well."""
    hit = names.find(name)
    if isinstance(hit, Unmatched):
        return Dense(tensor), None
    place = model.places[hit[0]]
    base = model.rows_of(place)
    value = tensor.T if place.transposed and len(tensor.shape) == 2 else tensor
    if value.shape[1:] != base.shape[1:]:
        return Dense(tensor), None
    if value.rows > base.rows:
        new = np.zeros((value.rows - base.rows, *base.shape[1:]), np.float32)
        base = Tensor.joined([base, Tensor.of(new).cast(base.dtype)])
    return Replace(value), base.slice(0, value.rows)


def _one_shape(name: str, one: Mapping[str, Placed], other: Mapping[str, Placed]) -> bool:
    """Whether both change a whole tensor of this name, to the same size."""
    return name in one and name in other and one[name][0].shape == other[name][0].shape


def _differing(first: Adapter, second: Adapter, counted: Set[str]) -> list[str]:
    """Whole tensors that differ, or that one of them lacks, beside those that are counted."""
    names = [name for name in {**first.carried, **second.carried} if name not in counted]
    pairs = ((name, first.carried.get(name), second.carried.get(name)) for name in names)
    return [name for name, one, other in pairs if one is None or other is None or not one.same_values(other)]


def _aligned(first: Adapter, second: Adapter) -> dict[str, str]:
    """Targets of the first -> the same targets of the second, which may leave leading segments out."""
    names = Names({parameter(n): Slot(parameter(n)) for n in second.updates})
    back = {parameter(n): n for n in second.updates}
    found = {}
    for name in first.updates:
        hit = names.find(parameter(name))
        if not isinstance(hit, Unmatched):
            found[name] = back[hit[0]]
    return found


Placed = tuple[Update, Tensor | None]
"""An update as the base stores its weight, and the weight, where the base is known."""


def placed(name: str, update: Update, model: Model | None) -> Placed:
    """An update in its place. Raises MatchError where one needs the base and has no place in it."""
    if model is None:
        if update.needs_base:
            raise MatchError(f"an update of kind {update.kind} needs the base", name, "give --base")
        return update, None
    hit = Names(model.places).find_target(name)
    if isinstance(hit, Unmatched):
        if update.needs_base:
            raise MatchError("a module has no target in the base", str(hit))
        return update, None
    place = model.places[hit[0]]
    return orient(update, name, place, model), model.rows_of(place)


def squares(first: Placed, second: Placed) -> _Squares:
    """The three squared norms of two updates of one weight."""
    (one, base), (other, _) = first, second
    if isinstance(one, Factored) and isinstance(other, Factored) and "embedding" not in (one.layer, other.layer):
        other = other.oriented(one.layer)  # a file's word on how the base stores it is a hint only
    if trimmed(one.shape) != trimmed(other.shape):
        raise MatchError(f"the updates' shapes differ: {list(one.shape)} and {list(other.shape)}")
    equal = _equal(one, other)
    pair = _pair(one)
    pair2 = pair if equal else _pair(other)
    if pair is not None and pair2 is not None:
        return _of_factors(pair, pair2, equal or all(map(np.array_equal, pair, pair2)))
    total = _Squares(0, 0, 0)
    for a, b in zip(blocks(one, base), blocks(other, base), strict=True):
        total += _Squares(float((a * a).sum()), float((b * b).sum()), float(((a - b) ** 2).sum()))
    return total


def _equal(one: Update, other: Update) -> bool:
    """Whether two LoRAs are the same to the byte."""
    if not isinstance(one, LowRank) or not isinstance(other, LowRank):
        return False
    words = (one.scaling, one.layer, one.slots.keys()) == (other.scaling, other.layer, other.slots.keys())
    return words and all(tensor.same_bytes(other.slots[slot]) for slot, tensor in one.slots.items())


def _of_factors(one: Factors, other: Factors, same: bool) -> _Squares:
    """The squared norms of two products."""
    first = _squared(*one)
    if same:
        return _Squares(first, first, 0.0)
    (up, down), (up2, down2) = one, other
    second, both = _squared(*other), _inner(one, other)
    apart = first + second - 2 * both
    if apart < _CANCELS * (_bound(*one) + _bound(*other)) ** 2:
        apart = product_norm(np.hstack((up, -up2)), np.vstack((down, down2))) ** 2
    return _Squares(first, second, apart)


def _squared(up: np.ndarray, down: np.ndarray) -> float:
    """||up @ down||^2: inner products of the factors tell, but where they cancel; there QR does."""
    found = _inner((up, down), (up, down))
    return found if found >= _CANCELS * _bound(up, down) ** 2 else product_norm(up, down) ** 2


def _inner(one: Factors, other: Factors) -> float:
    """The Frobenius inner product of two products up [o,r] @ down [r,i], from matrices [r,r]."""
    (up, down), (up2, down2) = one, other
    return float(((up.T @ up2) * (down @ down2.T)).sum())


def _bound(up: np.ndarray, down: np.ndarray) -> float:
    """What ||up @ down|| cannot exceed: the sum of the norms of the rank's terms."""
    return float(np.sqrt(np.einsum("or,or->r", up, up) * np.einsum("ri,ri->r", down, down)).sum())


def norm(update: Update, base: Tensor | None = None) -> float:
    """The Frobenius norm of an update's change, from its factors where it has them."""
    pair = _pair(update)
    if pair is not None:
        return math.sqrt(_squared(*pair))
    return math.sqrt(sum(float((block * block).sum()) for block in blocks(update, base)))


def _pair(update: Update) -> Factors | None:
    """The factors in float64."""
    pair = update.factors() if isinstance(update, Additive) else None
    return None if pair is None else (pair[0].astype(np.float64), pair[1].astype(np.float64))


def product_norm(up: np.ndarray, down: np.ndarray) -> float:
    """||up @ down|| of up [o,r], down [r,i] without the product: from the triangular factors of both."""
    left = np.asarray(np.linalg.qr(up, mode="r"))  # [<=r, r]
    right = np.asarray(np.linalg.qr(down.T, mode="r"))
    return float(np.linalg.norm(left @ right.T))


def blocks(update: Update, base: Tensor | None) -> Iterator[np.ndarray]:
    """The change of one weight by row blocks [rows,-1] in float64."""
    if base is None and update.needs_base:
        raise MatchError(f"an update of kind {update.kind} needs the base", hint="give --base")
    prepared = update.prepare(Tensor.float)
    rows, step = update.shape[0], block_rows(update.shape)
    spans = [(n, min(n + step, rows)) for n in range(0, rows, step)]

    def stored(a: int, b: int) -> np.ndarray | None:
        return None if base is None else base.float(a, b).reshape(b - a, -1)

    if prepared.scan is not None:
        prepared.scan((a, b, stored(a, b)) for a, b in spans)
    reach = prepared.reach or (lambda a, b: (a, b))  # rotations of outputs mix rows
    for a, b in spans:
        yield np.asarray(prepared.delta(a, b, stored(*reach(a, b))), np.float64).reshape(b - a, -1)
