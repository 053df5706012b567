"""A graph written anew: with other values, other initializers, other nodes; streamed, and complete or not at all.

`Edit` is a graph under change; `fold` adds updates to its weights, shared ones in a copy of their own; `write_graph`
writes it. Values lie where the base has them: in the message, or in one external file beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.devices import choose
from loratool.errors import LoratoolError
from loratool.files import check_space, prepare_output
from loratool.lazy import np
from loratool.onnx.graph import EXTERNAL, Graph, Node, Use, Value, Weight, tensor_message, tensors_of
from loratool.onnx.resolve import Site
from loratool.onnx.turned import restored, stored
from loratool.onnx.wire import SMALL, Hole, length, unskim
from loratool.plan import Outcome, OutputFile, Part, Plan, Progress, Run, Step, Tally, Writer, thread_count
from loratool.tensors import Tensor
from loratool.update import Additive, Replace

INLINE = 1_800_000_000  # bytes of values that a message may hold, well below protobuf's 2 GiB
PAGE = 4096  # external tensors of a page or more begin at one, so that they can be mapped


@dataclass(frozen=True, eq=False)
class Change:
    """What one adapter (counted from 0) changes at one site."""

    site: Site
    strength: float = 1.0
    adapter: int = 0


@dataclass(frozen=True, eq=False)
class Values:
    """What an initializer of the output holds: ``tensor`` with ``parts`` added, stored as ``dtype`` (None: its own)."""

    tensor: Tensor
    parts: tuple[Part, ...] = ()
    dtype: str | None = None


@dataclass(eq=False)
class Edit:
    """A graph under change. ``model`` is a copy of its message; ``values`` holds what is new, by initializer name."""

    graph: Graph
    model: Any
    values: dict[str, Values] = field(default_factory=dict)
    _scopes: list[Any] = field(default_factory=list)
    _nodes: list[list[Any]] = field(default_factory=list)
    _inserted: dict[tuple[int, int], list[Any]] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    @staticmethod
    def of(graph: Graph) -> Edit:
        """Begin to change a graph."""
        model = type(graph.model)()
        model.CopyFrom(graph.model)
        edit = Edit(graph, model, _scopes=list(_scopes(model.graph)))
        edit._nodes = [list(scope.node) for scope in edit._scopes]
        for scope in graph.scopes:
            edit._names.update(scope.defined)
            edit._names.update(node.name for node in scope.proto.node)
        return edit

    def scope(self, number: int) -> Any:
        """The message of a graph (0: the main one) or subgraph."""
        return self._scopes[number]

    def node(self, node: Node) -> Any:
        """The message of a node, to be changed."""
        return self._nodes[node.scope][node.position]

    def fresh(self, name: str) -> str:
        """``name``, or, where it is taken, the same with a number; from now on taken."""
        found, number = name, 0
        while found in self._names:
            number += 1
            found = f"{name}_{number}"
        self._names.add(found)
        return found

    def add(self, name: str, tensor: Tensor, parts: Iterable[Part] = (), dtype: str | None = None) -> str:
        """A new initializer of the main graph, behind all others; its name, made unique."""
        name = self.fresh(name)
        self.model.graph.initializer.append(tensor_message(name, dtype or tensor.dtype, tensor.shape))
        self.values[name] = Values(tensor, tuple(parts), dtype)
        return name

    def rewire(self, use: Use, name: str) -> None:
        """Let a node take ``name`` instead."""
        self.node(use.node).input[use.slot] = name

    def insert(self, before: Node, nodes: Iterable[Any], after: bool = False) -> None:
        """Put new nodes right before a node of the base, or right after it."""
        self._inserted.setdefault((before.scope, before.position + after), []).extend(nodes)

    def finish(self) -> None:
        """Put the new nodes in their places."""
        for number, nodes in enumerate(self._nodes):
            at = {position: new for (scope, position), new in self._inserted.items() if scope == number}
            if at:
                everything = [n for p in range(len(nodes) + 1) for n in (*at.get(p, ()), *nodes[p : p + 1])]
                copies = [_copy(node) for node in everything]
                del self._scopes[number].node[:]
                self._scopes[number].node.extend(copies)
        self._inserted.clear()


def _scopes(graph: Any) -> Iterator[Any]:
    """A graph and its subgraphs, in the order of `Graph.scopes`."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _scopes(inner)


def _copy(message: Any) -> Any:
    twin = type(message)()
    twin.CopyFrom(message)
    return twin


# ---------------------------------------------------------------- folding


def fold(graph: Graph, changes: Sequence[Change]) -> Edit:
    """``graph`` with the changes added to its weights: in place, or, where others use a weight too, in a copy."""
    edit = Edit.of(graph)
    by_weight: dict[Value, list[Change]] = {}
    for change in changes:
        if change.strength:  # at strength 0 the base keeps its very bytes
            by_weight.setdefault(change.site.weight.value, []).append(change)
    for found in by_weight.values():
        _fold_weight(edit, found[0].site.weight, found)
    edit.finish()
    return edit


def _fold_weight(edit: Edit, weight: Weight, changes: Sequence[Change]) -> None:
    """One stored weight: each group of nodes that are to see the same changes gets its values."""
    by_use: dict[tuple[int, int], tuple[Use, list[Change]]] = {}
    for change in changes:
        for use in change.site.uses:
            by_use.setdefault((id(use.node), use.slot), (use, []))[1].append(change)
    groups: dict[tuple[int, ...], tuple[list[Use], list[Change]]] = {}
    for use, found in by_use.values():
        groups.setdefault(tuple(map(id, found)), ([], found))[0].append(use)
    others = [u for u in edit.graph.ends(weight.value) if (id(u.node), u.slot) not in by_use]
    free = not others and weight.value.scope == 0 and not weight.constant and weight.value not in edit.graph.outputs
    for uses, found in groups.values():
        values = new_values(weight, found)
        if free:
            edit.values[weight.value.name] = values
            free = False  # the others get copies
            continue
        name = edit.add(f"{found[0].site.module}.weight", values.tensor, values.parts, values.dtype)
        for use in uses:
            _reconnect(edit, use, name)


def new_values(weight: Weight, changes: Sequence[Change]) -> Values:
    """The stored values of a weight with changes."""
    first = changes[0]
    operand = first.site.operands[0]
    replaced = first.site.update
    alone = len(changes) == 1 and first.strength == 1.0 and first.site.rows is None and operand.gain == 1.0
    if alone and isinstance(replaced, Replace):
        value = restored(replaced.value, operand.layout).reshape(*weight.shape)
        return Values(value, dtype=weight.tensor.dtype)
    return Values(weight.tensor, tuple(_part(weight, change) for change in changes))


def _part(weight: Weight, change: Change) -> Part:
    operand, update = change.site.operands[0], change.site.update
    if operand.gain != 1.0 and not isinstance(update, Additive):
        raise LoratoolError("a scaled product takes no update that needs the base", change.site.spelling)
    turned = stored(update, weight.shape, operand.layout, change.site.rows)
    return Part(turned, change.strength / operand.gain, 0, weight.tensor.rows, change.site.spelling)


def _reconnect(edit: Edit, use: Use, name: str) -> None:
    """Let one input take the initializer ``name``, through nodes of its own where there were some in between."""
    traced = edit.graph.trace(use)
    chain = traced[1] if traced else ()
    for step in chain:
        if step.op == "Identity":
            continue
        twin = _copy(step.proto)
        twin.name = edit.fresh(f"{step.proto.name or step.op}_copy") if step.proto.name else ""
        twin.input[0], twin.output[0] = name, edit.fresh(f"{step.proto.output[0]}_copy")
        edit.insert(use.node, [twin])
        name = twin.output[0]
    edit.rewire(use, name)


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Written:
    """What a written graph consists of."""

    output: Path
    external_data: Path | None
    bytes_written: int
    outcome: Outcome


@dataclass(frozen=True, eq=False)
class Layout:
    """Where everything of an output goes.

    ``steps`` are all tensors; ``inline`` those that lie in the message, ``external`` the offsets of those in the data
    file, both by step name. Those in neither stay in the message as they are.
    """

    model: Any
    steps: tuple[Step, ...]
    inline: Mapping[str, Step]
    external: Mapping[str, int]
    data_bytes: int

    @property
    def bytes_written(self) -> int:
        """Bytes of both files, but for the message without values."""
        return self.data_bytes + sum(step.nbytes for step in self.inline.values())


def external_name(out: Path) -> str:
    """The name of the external data beside an output: always the same."""
    return f"{out.name}.data"


def lay_out(edit: Edit, data_name: str, shared: bool = False) -> Layout:
    """Decide where each tensor of the output goes, and note it in a copy of the message.

    ``shared``: external values that stay as they are stay in the base's files.
    """
    graph, model = edit.graph, _copy(edit.model)
    steps: list[Step] = []
    wanted: list[tuple[Any, Step, bool]] = []  # message, values, whether these go into the data file
    regions = {_place(weight.proto): weight for weight in graph.weights.values() if weight.external}
    uses_files = any(weight.external for weight in graph.weights.values())
    main = {id(proto): proto for proto in model.graph.initializer}
    for proto in (*main.values(), *(t for t in tensors_of(model) if id(t) not in main and t.data_location == EXTERNAL)):
        weight = graph.weights.get(Value(0, proto.name)) if id(proto) in main else regions[_place(proto)]
        new = edit.values.get(proto.name) if id(proto) in main else None
        if new is None and (weight is None or (shared and weight.external)):
            continue  # strings, packed integers: they stay in the message
        tensor = new.tensor if new else weight.tensor  # type: ignore[union-attr]
        name = proto.name if id(proto) in main else f"{len(steps)} {proto.name}"
        step = Step(name, name, tensor, (new and new.dtype) or tensor.dtype, new.parts if new else ())
        steps.append(step)
        outside = weight.external if weight else uses_files and step.nbytes >= SMALL
        held = weight is not None and not weight.external and not weight.hole and new is None
        if not held:
            wanted.append((proto, step, outside))
    if sum(step.nbytes for _, step, outside in wanted if not outside) > INLINE:
        wanted = [(proto, step, outside or step.nbytes >= SMALL) for proto, step, outside in wanted]
    inline: dict[str, Step] = {}
    external: dict[str, int] = {}
    position = 0
    for proto, step, outside in wanted:
        _clear(proto)
        if outside:
            position = _aligned(position, step.nbytes)
            external[step.name] = position
            _refer(proto, data_name, position, step.nbytes)
            position += step.nbytes
        else:
            inline[step.name] = step
    return Layout(model, tuple(steps), inline, external, position)


def _place(proto: Any) -> tuple[Any, ...]:
    """What tells one external tensor from another."""
    return (*sorted((e.key, e.value) for e in proto.external_data), proto.data_type, *proto.dims)


def _aligned(position: int, nbytes: int) -> int:
    unit = PAGE if nbytes >= PAGE else 64
    return -(-position // unit) * unit


def _clear(proto: Any) -> None:
    """Take the values out of a message."""
    for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        proto.ClearField(name)
    proto.ClearField("external_data")
    proto.ClearField("data_location")


def _refer(proto: Any, location: str, offset: int, nbytes: int) -> None:
    """Let a message point to an external file."""
    proto.data_location = EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", nbytes)):
        proto.external_data.add(key=key, value=str(value))


def write_graph(
    edit: Edit,
    path: Path,
    *,
    inputs: Mapping[str, Path],
    metadata: Mapping[str, str],
    device: str = "auto",
    progress: Progress | None = None,
    shared: bool = False,
) -> Written:
    """Write a changed graph to ``path``, its external data, where it has some, beside it; neither may exist.

    ``inputs`` are hashed into the metadata, beside ``metadata``. ``shared``: for a moment's use only, values that
    stay are not copied, but the base's files linked beside ``path``, where the file system can. For output that
    appears whole or not at all see `files.staged_beside`. Raises LoratoolError (I/O, out of disk), NumericError (NaN,
    overflow).
    """
    data = path.with_name(external_name(path))
    layout = lay_out(edit, data.name, shared and _link(edit.graph, path.parent))
    plan = Plan((OutputFile(path.name, layout.steps, {}),), inputs=inputs)
    chosen = choose(device, {})
    blank = Outcome(dict.fromkeys(inputs, "0" * 64), "0" * 64, Tally())
    pieces = _message(layout, metadata, blank)
    writer = _Places(layout, pieces, path, data)
    try:
        run = Run(plan, writer, chosen, thread_count())
        done = 0
        for count in run:
            done += count
            if progress is not None:
                progress(done, run.total)
        outcome = run.outcome
        writer.write_message(_message(layout, metadata, outcome))
    finally:
        writer.close()
    return Written(path, data if layout.external else None, length(pieces) + layout.data_bytes, outcome)


def _link(graph: Graph, folder: Path) -> bool:
    """Put links to the external data of a graph into ``folder``; whether all could be made.

    Hard ones: onnxruntime refuses symbolic links that leave the folder.
    """
    for location in {e.value for w in graph.weights.values() for e in w.proto.external_data if e.key == "location"}:
        place = folder / location
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link((graph.path.parent / location).resolve(), place)
        except FileExistsError:
            continue  # two spellings of one file
        except OSError:
            return False
    return True


def check_output(
    graph: Graph, out: Path, layout: Layout, overwrite: bool, inputs: Mapping[str, Path] | None = None
) -> None:
    """Check where the output goes, and that there is room. Raises LoratoolError."""
    taken = {f"the base ({path.name})": path for path in graph.files}
    for path in (out, out.with_name(external_name(out))) if layout.external else (out,):
        prepare_output(path, overwrite, {**(inputs or {}), **taken})
    check_space(out.parent, layout.bytes_written)


def _message(layout: Layout, metadata: Mapping[str, str], outcome: Outcome) -> Sequence[bytes | Hole]:
    """The pieces of the output's file; as long whatever the outcome."""
    model = layout.model
    told = {
        "loratool.version": __version__,
        **metadata,
        "loratool.inputs": json.dumps(dict(sorted(outcome.hashes.items()))),
        "loratool.content_hash": outcome.content_hash,
    }
    kept = [(e.key, e.value) for e in model.metadata_props if not e.key.startswith("loratool.")]
    del model.metadata_props[:]
    for key, value in (*kept, *told.items()):
        model.metadata_props.add(key=key, value=value)
    holes = {name: Hole(name, step.nbytes) for name, step in layout.inline.items()}
    return unskim(model, holes.get)


class _Places(Writer):
    """Writes blocks where the layout has a place for them."""

    def __init__(self, layout: Layout, pieces: Sequence[bytes | Hole], message: Path, data: Path) -> None:
        self._paths = {"message": message, "data": data}
        self._fds: dict[str, int] = {}
        self._places: dict[str, tuple[str, int]] = {n: ("data", at) for n, at in layout.external.items()}
        self._pieces: list[int] = []
        position = 0
        for piece in pieces:
            if isinstance(piece, Hole):
                self._places[piece.name] = ("message", position)
            else:
                self._pieces.append(position)
            position += len(piece) if isinstance(piece, bytes) else piece.nbytes
        try:
            self._fds["message"] = self._create(message, position)
            if layout.external:
                self._fds["data"] = self._create(data, layout.data_bytes)
        except BaseException:
            self.close()
            raise

    def block(self, output: OutputFile, step: Step, start: int, data: np.ndarray) -> None:
        place = self._places.get(step.name)
        if place is not None:
            row = step.nbytes // max(step.base.rows, 1)
            self.write(place[0], place[1] + start * row, memoryview(np.ascontiguousarray(data).view(np.uint8)))

    def write_message(self, pieces: Sequence[bytes | Hole]) -> None:
        """Write what lies around the holes."""
        found = [piece for piece in pieces if isinstance(piece, bytes)]
        for position, piece in zip(self._pieces, found, strict=True):
            self.write("message", position, piece)
