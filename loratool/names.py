"""Matching an adapter to a base: which tensor, or rows of it, each update changes, and in which orientation.

Exact names first; then the renamed prefixes of known models; then the one place whose name is the target's plus or
minus whole leading segments. A shape that differs, an ambiguity or a target without a place is an error that names
the nearest module: nothing is skipped in silence.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from loratool.adapter import Adapter, is_bias, parameter
from loratool.architectures import Slot
from loratool.architectures.base import Shape
from loratool.architectures.layouts import RENAMED_PARTS, renamed_parts
from loratool.architectures.llm import CONV1D_MODELS, CONV1D_NAMES, RENAMED_PREFIXES, experts_transposed
from loratool.errors import MatchError
from loratool.kinds.experts import Experts
from loratool.kinds.patch import Padded
from loratool.layouts import Layouts
from loratool.model import Model
from loratool.update import Dense, LowRank, Update


@dataclass(frozen=True)
class Match:
    """One target of an adapter and its place in the base; ``update`` is oriented as the base stores the weight."""

    target: str
    update: Update
    place: Slot
    how: str


@dataclass(frozen=True)
class Unmatched:
    """A target or carried tensor without a place, and why."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


class Names:
    """The parameter names of a base, looked up in every way that is allowed."""

    def __init__(self, places: Mapping[str, Slot]) -> None:
        self.places = places
        self._by_tail: dict[int, dict[str, list[str]]] = {}

    def find(self, name: str) -> tuple[str, str] | Unmatched:
        """(the base's name, how it was found) of a parameter."""
        if name in self.places:
            return name, "exact"
        for how, candidates in (("renamed", self._renamed(name)), ("suffix", self._suffix(name))):
            distinct = {self.places[c]: c for c in candidates}
            if len(distinct) == 1:
                return next(iter(distinct.values())), how
            if distinct:
                some = ", ".join(sorted(distinct.values())[:3])
                return Unmatched(name, f"ambiguous: {some}")
        return Unmatched(name, f"nearest: {self.nearest(name)}")

    def find_target(self, target: str) -> tuple[str, str] | Unmatched:
        """(the base's name, how it was found) of what a target means: a module's weight, or a bare parameter."""
        if target in self.places:
            return target, "exact"
        hit = self.find(parameter(target))
        bare = self.find(target) if isinstance(hit, Unmatched) else hit
        return hit if isinstance(bare, Unmatched) else bare

    def known(self, name: str) -> str | None:
        """The base's own name of a parameter, None where it has none or several."""
        hit = self.find(name)
        return None if isinstance(hit, Unmatched) else hit[0]

    def _renamed(self, name: str) -> list[str]:
        """Names under the prefixes, and with the parts, that known models changed."""
        pairs = [*RENAMED_PREFIXES, *((b, a) for a, b in RENAMED_PREFIXES)]
        moved = [b + name.removeprefix(a) for a, b in pairs if name.startswith(a)]
        other = (renamed_parts(name, family, back) for family in RENAMED_PARTS for back in (False, True))
        moved += [new for new in dict.fromkeys(other) if new != name]
        inside = [there for new in moved if new not in self.places for there in self._suffix(new)]
        return [m for m in moved if m in self.places] or inside

    def _suffix(self, name: str) -> list[str]:
        """Names that have leading segments more, or fewer; a layer number is never among these."""
        parts = name.split(".")
        tails = (parts[n:] for n in range(1, len(parts) - 1) if not has_number(parts[:n]))
        shorter = [".".join(tail) for tail in tails]
        longer = self._tails(len(parts)).get(name, [])
        return [s for s in shorter if s in self.places][:1] + [
            name for name in longer if not has_number(name.split(".")[: -len(parts)])
        ]

    def _tails(self, length: int) -> dict[str, list[str]]:
        """Base names by their last ``length`` segments."""
        if length not in self._by_tail:
            table: dict[str, list[str]] = {}
            for name in self.places:
                parts = name.split(".")
                if len(parts) > length:
                    table.setdefault(".".join(parts[-length:]), []).append(name)
            self._by_tail[length] = table
        return self._by_tail[length]

    @cached_property
    def _by_leaf(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        for name in self.places:
            table.setdefault(leaf(name), []).append(name)
        return table

    @cached_property
    def _segments(self) -> dict[str, frozenset[str]]:
        return {name: frozenset(name.split(".")) for name in self.places}

    def nearest(self, name: str) -> str:
        """The base's module that is spelled most alike: it shares most segments, then most letters."""
        parts = frozenset(name.split("."))
        shared = {n: len(parts & self._segments[n]) for n in self._by_leaf.get(leaf(name)) or self.places}
        most = max(shared.values(), default=0)
        pool = [n for n, count in shared.items() if count == most][:20]
        close = difflib.get_close_matches(name, pool, 1, cutoff=0.0)
        return module_of(close[0]) if close else "none"


def has_number(parts: Iterable[str]) -> bool:
    """Whether a segment is a number, as layers have."""
    return any(part.isdigit() for part in parts)


def module_of(name: str) -> str:
    """The module of a weight."""
    return name.removesuffix(".weight")


def leaf(name: str) -> str:
    """The last segment of a parameter's module."""
    return name.rpartition(".")[0].rpartition(".")[2]


def present(adapter: Adapter, model: Model) -> Adapter:
    """The adapter without what only multiplies biases that ``model`` does not have."""
    names = Names(model.places)
    absent = {
        target
        for target, update in adapter.updates.items()
        if _needs_no_place(target, update) and isinstance(names.find_target(target), Unmatched)
    }
    return replace(adapter, updates={t: u for t, u in adapter.updates.items() if t not in absent})


def _needs_no_place(target: str, update: Update) -> bool:
    """Whether a base without that bias is no loss: there is nothing to rescale, or what would be added is zero.

    PEFT's ``lora_bias`` holds for all modules, so it is zeros for those without a bias.
    """
    if not is_bias(target):
        return False
    return update.homogeneous or (isinstance(update, Dense) and not update.value.array().any())


def match(adapter: Adapter, model: Model) -> tuple[list[Match], list[Unmatched]]:
    """Places of every update of ``adapter`` in ``model``, and what has none.

    Raises MatchError for shapes that differ and for two targets that mean one place.
    """
    names = Names(model.places)
    found: list[Match] = []
    unmatched: list[Unmatched] = []
    taken: dict[tuple[Slot, object], str] = {}
    layouts = Layouts(model, names.known)

    def take(target: str, place: Slot, lines: object = None) -> None:
        """A place is taken once; ``lines`` are those of a stack's entry."""
        if (place, lines) in taken:
            raise MatchError(
                f"two modules of the adapter mean one place, {module_of(place.tensor)}",
                f"{adapter.spelling(taken[place, lines])} and {adapter.spelling(target)}",
                "one of them is misnamed",
            )
        taken[place, lines] = target

    for target, update in adapter.updates.items():
        hit = names.find_target(target)
        if isinstance(hit, Unmatched) and (elsewhere := layouts.places(target, update)):
            for part, place in elsewhere:
                take(target, place, getattr(part, "lines", None))
                found.append(Match(target, orient(part, target, place, model), place, "layout"))
            continue
        if isinstance(hit, Unmatched):
            if not _needs_no_place(target, update):
                unmatched.append(Unmatched(adapter.spelling(target), hit.why))
            continue
        name, how = hit
        place = model.places[name]
        take(target, place)
        found.append(Match(target, orient(update, target, place, model), place, how))
    return found, unmatched


def orient(update: Update, target: str, place: Slot, model: Model) -> Update:
    """``update`` in the orientation in which ``model`` stores the weight. Raises MatchError when no shape fits."""
    stored = model.shape(place.tensor)
    wanted = place.shape(stored)
    for candidate in (*_orientations(update, place, model), *_control(update, target, wanted)):
        sized = candidate.sized(wanted)
        if sized is not None:
            return sized
    raise MatchError(
        f"shapes differ: the adapter's update is {list(update.shape)}, the base's weight {list(wanted)}",
        f"{target} -> {place.tensor}",
        "the adapter was made for another base",
    )


def _control(update: Update, target: str, wanted: Shape) -> list[Update]:
    """FLUX's control LoRAs: their first layer takes the channels of an image beside those of the latents."""
    doubled = len(wanted) == 2 and update.shape == (wanted[0], 2 * wanted[1])
    first = target.rpartition(".")[2] in ("x_embedder", "img_in")
    return [Padded(update)] if doubled and first and isinstance(update, LowRank) else []


def _orientations(update: Update, place: Slot, model: Model) -> list[Update]:
    """The orientations to try, likeliest first: what the architecture says goes before what the file believes."""
    if isinstance(update, Experts):
        return [*update.orders(experts_transposed(model.config_of(place.tensor)))]
    turned = getattr(update, "oriented", None)  # None: held as the base stores it
    layer = getattr(update, "layer", "plain")
    if turned is None or layer == "embedding" or len(update.shape) > 2:
        return [update]
    plain, transposed = turned("plain"), turned("transposed")
    if place.transposed:
        return [transposed]
    verdict = stores_transposed(place.tensor, model)
    if verdict is None:  # nothing is known of this model: the file's word, then the shape's
        return [transposed, plain] if layer == "transposed" else [plain]
    return [transposed] if verdict else [plain]


def stores_transposed(name: str, model: Model) -> bool | None:
    """Whether the base stores this weight as [in,out] (transformers' Conv1D); None where nothing tells."""
    if not CONV1D_NAMES.search(name):
        return False
    model_type = model.config_of(name).get("model_type")
    if model_type is not None:
        return model_type in CONV1D_MODELS
    # without a config.json, a fused projection of the same model shows it: [d,3d] is [in,out]
    shapes = [model.shape(n) for n in model.parameters if CONV1D_NAMES.search(n) and leaf(n) in ("c_attn", "c_fc")]
    wide = {rows < columns for rows, columns in (s for s in shapes if len(s) == 2) if rows != columns}
    return wide.pop() if len(wide) == 1 else None
