"""Targets <-> the modules that a file has: fused projections are split when read, and fused when written.

A stored module is one reference module, or several whose rows it stacks (qkv), or one whose halves it swaps
(norm_out); the architecture says which. Splitting gives each its rows of the update; fusing gives the whole again, at
the rank it had, or stacks what was never one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loratool.adapter import Adapter, Loss, is_bias
from loratool.architectures.base import Architecture, Piece, Ranges, Segment, Shape, Stored
from loratool.errors import FormatError
from loratool.update import Dense, Update, rows, stack

Locate = Callable[[str], str | None]
"""The reference name of a target, None where nothing tells what it is."""


def split(update: Update, pieces: Sequence[Piece], bias: bool = False) -> dict[str, Update]:
    """The updates of the reference modules that a stored module is. Raises FormatError where they cannot be told apart.

    Of a bias the pieces are those of its weight.
    """
    if len(pieces) == 1 and len(pieces[0].rows) == 1:
        return {pieces[0].reference: update}
    return {piece.reference: _of(update, piece.rows) for piece in pieces}


def _of(update: Update, ranges: Ranges) -> Update:
    """The rows of an update in these ranges, one below the other."""
    parts = [rows(update, start, stop) for start, stop in ranges]
    found = stack(parts, [stop - start for start, stop in ranges])
    if found is None:
        raise FormatError(f"the rows of an update of kind {update.kind} cannot be put in another order")
    return found


@dataclass(frozen=True)
class Module:
    """A module to be written: its name, the targets it holds, and the update of its weight or of its bias.

    In the place of the update stands why there is none.
    """

    name: str
    targets: tuple[str, ...]
    update: Update | str
    bias: bool = False
    norm: bool = False


Holder = Callable[[str, Shape], Stored | None]
"""The stored module that holds a reference module of that shape, in the names of a format."""


def held_by(known: Architecture, world: str) -> Holder:
    """What an architecture says of a world's names."""
    return lambda reference, shape: known.stored(reference, world, shape)


def gathered(adapter: Adapter, locate: Locate, holder: Holder) -> tuple[list[Module], list[Loss]]:
    """The modules of a file that says an adapter, and the targets that none of them holds."""
    named: dict[str, str] = {}  # reference parameter -> target
    groups: dict[tuple[str, bool], tuple[Stored, list[str]]] = {}
    lost: list[Loss] = []
    for target in adapter.updates:
        module, bias = target.removesuffix(".bias"), is_bias(target)
        reference = locate(module)
        stored = holder(reference, _shape(adapter, module)) if reference else None
        if reference is None or stored is None:
            lost.append(Loss(adapter.spelling(target), "the format has no name for this module"))
        elif named.setdefault(reference + ".bias" * bias, target) != target:
            lost.append(Loss(adapter.spelling(target), "another module has this very name"))
        else:
            groups.setdefault((stored.name, bias), (stored, []))[1].append(target)
    modules = []
    for (name, bias), (stored, targets) in groups.items():
        parts = {s.reference: adapter.updates.get(named.get(s.reference + ".bias" * bias, "")) for s in stored.segments}
        norm = any(isinstance(u, Dense) and u.kind == "norm" for t in targets for u in _beside(adapter, t))
        modules.append(Module(name, tuple(targets), _fused(stored, parts), bias, norm))
    return modules, lost


def _shape(adapter: Adapter, module: str) -> Shape:
    """The shape of a module's weight, as far as its update tells it."""
    update = adapter.updates.get(module)
    return update.shape if update is not None and all(update.shape) else ()


def _beside(adapter: Adapter, target: str) -> Iterator[Update]:
    """A target's update, and for a bias that of the weight beside it."""
    yield from (adapter.updates[name] for name in (target, target.removesuffix(".bias")) if name in adapter.updates)


def _fused(stored: Stored, parts: Mapping[str, Update | None]) -> Update | str:
    """The update of a stored module, from those of the reference modules that it holds."""
    segments = stored.segments
    if segments == (Segment(segments[0].reference),):
        return parts[segments[0].reference] or ""
    shapes = [None if part is None else part.shape for part in (parts[s.reference] for s in segments)]
    heights = stored.heights(shapes)
    if heights is None:
        return f"the parts of {stored.name} that are not there have heights that nothing tells"
    try:
        found = stack([_part(parts[s.reference], s) for s in segments], heights)
    except FormatError as error:
        return error.what
    kinds = " and ".join(sorted({part.kind for part in parts.values() if part is not None}))
    return found or f"{kinds} updates of parts of {stored.name}, which has one for all of its rows"


def _part(update: Update | None, segment: Segment) -> Update | None:
    """A segment's rows of an update."""
    if update is None or segment.of == 1:
        return update
    unit = update.shape[0] // segment.of
    return rows(update, segment.part * unit, (segment.part + 1) * unit)
