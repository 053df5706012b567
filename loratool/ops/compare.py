"""How far two adapters' updates are apart, whatever their factors look like."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from loratool.adapter import Adapter, parameter
from loratool.architectures import Slot
from loratool.errors import MatchError
from loratool.kinds.based import Hira
from loratool.kinds.tuner import Tuner
from loratool.lazy import np
from loratool.model import Model
from loratool.names import Names, Unmatched, orient
from loratool.tensors import Tensor, block_rows
from loratool.update import Additive, DoRA, LowRank, Update, trimmed

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
    """The fields of ``compare --json``: over all modules (those of one side only count in full), and each."""

    relative_difference: float
    cosine: float
    modules: tuple[Difference, ...]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]


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


def compare(first: Adapter, second: Adapter, model: Model | None = None) -> Comparison:
    """Compare two adapters by the updates themselves.

    Low-rank updates are compared from their factors (QR, float64), never forming the product. Raises MatchError for
    kinds that need the base when none is given, and for shapes that differ.
    """
    aligned = _aligned(first, second)
    one = {name: placed(name, update, model) for name, update in first.updates.items()}
    other = {name: placed(name, update, model) for name, update in second.updates.items()}
    found = {name: squares(one[name], other[twin]) for name, twin in aligned.items()}
    only_first = [name for name in one if name not in aligned]
    only_second = [name for name in other if name not in aligned.values()]
    total = sum(found.values(), _Squares(0, 0, 0))
    for name in only_first:
        own = norm(*one[name]) ** 2
        total += _Squares(own, 0, own)
    for name in only_second:
        own = norm(*other[name]) ** 2
        total += _Squares(0, own, own)
    carried = first.carried.keys() ^ second.carried.keys()
    both = first.carried.keys() & second.carried.keys()
    carried |= {name for name in both if not first.carried[name].same_values(second.carried[name])}
    return Comparison(
        relative_difference=total.difference,
        cosine=total.cosine,
        modules=tuple(Difference(name, s.difference, s.cosine) for name, s in found.items()),
        only_in_first=(*only_first, *(n for n in first.carried if n in carried)),
        only_in_second=(*only_second, *(n for n in second.carried if n in carried)),
    )


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
    pair, pair2 = _pair(one), _pair(other)
    if pair is not None and pair2 is not None:
        (up, down), (up2, down2) = pair, pair2
        stacked = product_norm(np.hstack((up, -up2)), np.vstack((down, down2)))
        same = up.shape == up2.shape and np.array_equal(up, up2) and np.array_equal(down, down2)
        return _Squares(product_norm(up, down) ** 2, product_norm(up2, down2) ** 2, 0.0 if same else stacked**2)
    total = _Squares(0, 0, 0)
    for a, b in zip(blocks(one, base), blocks(other, base), strict=True):
        total += _Squares(float((a * a).sum()), float((b * b).sum()), float(((a - b) ** 2).sum()))
    return total


def norm(update: Update, base: Tensor | None = None) -> float:
    """The Frobenius norm of an update's change, from its factors where it has them."""
    pair = _pair(update)
    if pair is not None:
        return product_norm(*pair)
    return math.sqrt(sum(float((block * block).sum()) for block in blocks(update, base)))


def _pair(update: Update) -> tuple[np.ndarray, np.ndarray] | None:
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
