"""The same weights laid out otherwise: experts one by one or stacked, projections fused or apart.

An adapter names the modules of the model it was trained on; the base on disk may hold them in another layout. Here a
target that has no place of its own is taken apart, or put into rows of what the base stores. Which half is the gate
and which axis the input is told by the model's type (`architectures.layouts`), never guessed from equal sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from loratool.architectures import Slot
from loratool.architectures.layouts import (
    BLOCK_LEAVES,
    EXPERT_BLOCKS,
    EXPERT_LEAVES,
    FUSED,
    OUTER,
    STACKS,
    Fused,
    StackLayout,
    heads_of,
)
from loratool.errors import MatchError
from loratool.kinds.entries import entry
from loratool.kinds.experts import Experts
from loratool.model import Model
from loratool.update import Dense, LowRank, Replace, Update, rows, stack

Find = Callable[[str], "str | None"]
"""The base's own name of a parameter, None where it has none."""
Placed = tuple[Update, Slot]


class Expert(NamedTuple):
    """Which projection of which expert a name means; ``number`` None is the stack of all."""

    layer: str
    number: int | None
    role: str


def expert_of(name: str) -> Expert | None:
    """The expert that a module, or a bare parameter, is; None where it is none."""
    parts = name.removesuffix(".weight").split(".")
    leaf = EXPERT_LEAVES.get(parts[-1])
    if len(parts) > 4 and leaf and parts[-2].isdecimal() and parts[-3] == "experts" and parts[-4] in EXPERT_BLOCKS:
        return Expert(_layer(parts[:-4]), int(parts[-2]), leaf)
    if len(parts) > 3 and leaf and parts[-2] == "experts" and parts[-3] in EXPERT_BLOCKS:
        return Expert(_layer(parts[:-3]), None, leaf)
    if len(parts) > 2 and parts[-1] in BLOCK_LEAVES and parts[-2] in EXPERT_BLOCKS:
        return Expert(_layer(parts[:-2]), None, BLOCK_LEAVES[parts[-1]])
    return None


def _layer(parts: list[str]) -> str:
    """A layer's path without the segments that one naming has before it and another has not."""
    while parts and parts[0] in OUTER:
        parts = parts[1:]
    return ".".join(parts)


@dataclass(frozen=True)
class Layouts:
    """The layout of one base: where targets go that it holds under no name of their own."""

    model: Model
    find: Find

    @cached_property
    def _experts(self) -> Mapping[Expert, str]:
        """Parameters of the base by the expert that they are."""
        named = ((expert_of(name), name) for name in self.model.parameters if not name.endswith(".bias"))
        return {expert: name for expert, name in named if expert is not None}

    def places(self, target: str, update: Update) -> list[Placed]:
        """What ``update`` does to each of the base's tensors, with the rows it does it to; empty where it has none.

        Raises MatchError where the base's layout is not known, or shapes do not fit it.
        """
        if self._experts and (expert := expert_of(target)):
            if name := self._experts.get(expert):
                return [(update, Slot(name))]
            apart = [(expert, update)] if expert.number is not None else list(self._apart(target, expert, update))
            found = [self._one(target, one, part) for one, part in apart]
            return [placed for placed in found if placed] if all(found) else []
        return self._into_fused(target, update) or self._out_of_fused(target, update)

    # ------------------------------------------------------------ experts

    def _apart(self, target: str, expert: Expert, update: Update) -> Iterator[tuple[Expert, Update]]:
        """A stack [E,o,i] as the projections of each of its experts."""
        like = self._sizes(expert)
        for number, one in enumerate(each_expert(target, update, lambda shape: like in (None, shape))):
            if expert.role != "gate_up":
                yield expert._replace(number=number), one
                continue
            half = one.shape[0] // 2
            yield expert._replace(number=number, role="gate"), rows(one, 0, half)
            yield expert._replace(number=number, role="up"), rows(one, half, 2 * half)

    def _sizes(self, expert: Expert) -> tuple[int, int] | None:
        """[o,i] of one expert's projection in the base, if it holds them one by one."""
        alone = expert._replace(number=0, role="gate" if expert.role == "gate_up" else expert.role)
        name = self._experts.get(alone)
        shape = self.model.shape(name) if name else ()
        if len(shape) != 2:
            return None
        return (shape[0] * (2 if expert.role == "gate_up" else 1), shape[1])

    def _one(self, target: str, expert: Expert, update: Update) -> Placed | None:
        """The place of one expert's projection: a tensor of its own, or lines of an entry of a stack."""
        if name := self._experts.get(expert):
            return update, Slot(name)
        for role in (expert.role, "gate_up"):
            name = self._experts.get(Expert(expert.layer, None, role))
            if name and (role == expert.role or expert.role in ("gate", "up")):
                return self._entry(target, expert, update, name, half=role != expert.role)
        return None

    def _entry(self, target: str, expert: Expert, update: Update, name: str, half: bool) -> Placed | None:
        stored = self.model.shape(name)
        assert expert.number is not None
        if len(stored) != 3 or expert.number >= stored[0] or len(update.shape) != 2:
            raise MatchError(f"no expert {expert.number} in a stack of shape {list(stored)}", f"{target} -> {name}")
        layout = self._layout(name, update, stored, half)
        inner = update
        if layout.transposed:
            turned = getattr(update, "oriented", None)
            if turned is None:
                raise MatchError(f"an update of kind {update.kind} cannot be turned for a transposed stack", target)
            inner = turned("transposed")
        axis = 1 if layout.transposed else 0
        lines = inner.shape[axis]
        wanted = tuple(n * (1 + half) if a == axis else n for a, n in enumerate(inner.shape))
        if wanted != stored[1:]:
            shapes = f"the adapter's update is {list(update.shape)}, the base's stack {list(stored)}"
            raise MatchError(f"shapes differ: {shapes}", f"{target} -> {name}", "made for another base")
        second = int(half and expert.role == "up")
        start, stop, step = (second, 2 * lines, 2) if half and layout.interleaved else (second * lines, 0, 1)
        made = entry(inner, stored[1], stored[2], axis, start, stop or start + lines, step)
        return made, Slot(name, ((expert.number, expert.number + 1),), stored[0])

    def _layout(self, name: str, update: Update, stored: tuple[int, ...], half: bool) -> StackLayout:
        """How the base stores a stack. Raises MatchError where its type is not known and its shape does not tell."""
        config = self.model.config_of(name)
        text = config.get("text_config")
        types = [config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None]
        layout = next((STACKS[str(told)] for told in types if told in STACKS), None)
        if layout is None and half:
            raise MatchError(
                f"nothing tells how gate and up are stored in a model of type {types[0]!r}",
                name,
                "give a base whose config.json names a known model_type",
            )
        if layout is None or layout.transposed is None:
            out, inner = (n * (2 if half and axis == 0 else 1) for axis, n in enumerate(update.shape))
            if out == inner:
                raise MatchError(
                    f"a stack of square experts {list(stored)}: nothing tells which axis is the input", name
                )
            return StackLayout(stored[1:] == (inner, out))
        return layout

    # ------------------------------------------------------------ fused projections

    def _fusions(self, name: str) -> Iterator[tuple[Fused, tuple[tuple[tuple[int, int], ...], ...], int]]:
        """The fused projections that the base's type is known for, with the rows of their parts."""
        config = self.model.config_of(name)
        heads = heads_of(config)
        for fused in FUSED.get(str(config.get("model_type")), ()):
            if heads:
                yield fused, *fused.rows(*heads)

    def _into_fused(self, target: str, update: Update) -> list[Placed]:
        """A part of what the base stores fused: rows of it."""
        parent, _, own = target.rpartition(".")
        for fused, pieces, of in self._fusions(next(iter(self.model.parameters))) if self.model.parameters else ():
            if own in fused.parts and (name := self.find(f"{parent}.{fused.leaf}.weight")):
                return [(update, Slot(name, pieces[fused.parts.index(own)], of))]
        return []

    def _out_of_fused(self, target: str, update: Update) -> list[Placed]:
        """A fused projection whose parts the base stores apart; its rows must be known by its name alone."""
        parent, _, own = target.rpartition(".")
        known = {fused for table in FUSED.values() for fused in table if fused.leaf == own}
        found = {fused: [self.find(f"{parent}.{part}.weight") for part in fused.parts] for fused in known}
        apart = {fused: [n for n in names if n] for fused, names in found.items() if all(names)}
        if len({fused.rows for fused in apart}) != 1:
            return []
        fused, names = next(iter(apart.items()))
        return self._parts(fused, update, names)

    def _parts(self, fused: Fused, update: Update, names: list[str]) -> list[Placed]:
        """The parts of a fused update. Raises MatchError where heads and shapes of the base do not agree on them."""
        pieces, of = fused.rows(*(heads_of(self.model.config_of(names[0])) or (1, 1)))
        if update.shape[0] % of:
            raise MatchError(f"{update.shape[0]} rows are not {of} parts", names[0])
        unit = update.shape[0] // of
        found: list[Placed] = []
        for name, ranges in zip(names, pieces, strict=True):
            spans = [(start * unit, stop * unit) for start, stop in ranges]
            part = stack([rows(update, *span) for span in spans], [stop - start for start, stop in spans])
            if part is None:
                raise MatchError(f"an update of kind {update.kind} of a fused projection cannot be taken apart", name)
            found.append((part, Slot(name)))
        return found


def each_expert(
    target: str, update: Update, fits: Callable[[tuple[int, ...]], bool], transposed: bool | None = False
) -> Iterator[Update]:
    """Each expert's update [o,i] of a stack [E,o,i]; ``fits`` tells whether that is the shape of the base's experts.

    ``transposed`` is what is known of the model that the stack is of, None where nothing is.
    Raises MatchError where the stack's orientation cannot be told, or its kind cannot be taken apart.
    """
    if isinstance(update, (Dense, Replace)) and len(update.shape) == 3:
        for number in range(update.shape[0]):
            value = update.value.slice(number, number + 1).reshape(*update.shape[1:])
            yield replace(update, value=value)
        return
    if not isinstance(update, Experts):
        raise MatchError(f"an update of kind {update.kind} of a stack of experts cannot be taken apart", target)
    orders = [one for one in update.orders(transposed) if fits(one.shape[1:])]
    if not orders:
        raise MatchError(f"shapes differ: the adapter's experts are {list(update.shape)}", target, "of another base?")
    for number in range(update.experts):
        one = orders[0].expert(number)
        if orders[0].order == "transposed":  # delta = (up @ down).T of the stored [o,i]
            one = LowRank(one.up.T, one.down.T, None, one.alpha, one.rank_stabilised)
        yield one
