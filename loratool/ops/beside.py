"""One adapter laid out as another: stacks of experts one by one, where the other has them so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from loratool.adapter import Adapter
from loratool.architectures.layouts import ONE_BY_ONE, STACKS, Naming, StackLayout
from loratool.errors import MatchError
from loratool.layouts import Expert, each_expert, expert_of
from loratool.lazy import np
from loratool.tensors import Tensor
from loratool.update import Dense, LowRank, Replace, Update, rows

Names = Mapping[Expert, str]


def alike(first: Adapter, second: Adapter) -> tuple[Adapter, Adapter]:
    """Both with each layer's experts one by one where either has them so; the deltas are the same.

    Raises MatchError where nothing tells which half of a stack is the gate, or which axis of a square expert the input.
    """
    one, other = _experts(first), _experts(second)
    kinds = (adapter.metadata.base_config.get("model_type") for adapter in (first, second))
    kind = next((str(kind) for kind in kinds if kind), None)
    return _beside(first, one, second, other, kind), _beside(second, other, first, one, kind)


def _experts(adapter: Adapter) -> Names:
    """Targets by the expert that they are."""
    return {expert: name for name in adapter.updates if (expert := expert_of(name))}


def _beside(adapter: Adapter, own: Names, like: Adapter, names: Names, kind: str | None) -> Adapter:
    """``adapter``, whose stacks are one by one in the layers where ``like`` has them so, under its names."""
    containers = {e.layer: name.rsplit(".", 2)[0] for e, name in names.items() if e.number is not None}
    stacks = {name: e for e, name in own.items() if e.number is None and e.layer in containers}
    updates: dict[str, Update] = {}
    spellings = dict(adapter.spellings)
    for target, update in adapter.updates.items():
        if target not in stacks:
            updates[target] = update
            continue
        for expert, part in _apart(target, stacks[target], update, like, names, kind):
            name = names.get(expert) or f"{containers[expert.layer]}.{expert.number}.{_leaf(expert, names, kind)}"
            if expert in names or not _still(part):  # a stack has a place for each expert, whether it learned or not
                updates[name], spellings[name] = part, adapter.spelling(target)
    return replace(adapter, updates=updates, spellings=spellings)


def _leaf(expert: Expert, names: Names, kind: str | None) -> str:
    """What ``names`` calls the projection of other experts; else what the model does."""
    known = (name for other, name in names.items() if other.number is not None and other.role == expert.role)
    found = next(known, None)
    leaves = dict(zip(("gate", "up", "down"), ONE_BY_ONE.get(str(kind), Naming("mlp")).leaves, strict=True))
    return found.rpartition(".")[2] if found else leaves[expert.role]


def _apart(
    target: str, stack: Expert, update: Update, like: Adapter, names: Names, kind: str | None
) -> Iterator[tuple[Expert, Update]]:
    """Each expert's own projections [o,i] of a stack."""
    layout = STACKS.get(str(kind))
    shape = _shape(stack, like, names)
    square = shape[0] == shape[1]
    if (layout is None and stack.role == "gate_up") or (square and (layout is None or layout.transposed is None)):
        told = f"how {stack.role.replace('_', ' and ')} are stacked in a model of type {kind!r}"
        raise MatchError(f"nothing tells {told}", target, "give --base")
    known = layout or StackLayout()
    for number, entry in enumerate(each_expert(target, update, lambda found: found == shape, known.transposed)):
        one = _turned(entry) if entry.shape != shape or (square and known.transposed) else entry
        if one.shape != shape:
            raise MatchError(f"experts of shapes {list(one.shape)} and {list(shape)}", target)
        if stack.role != "gate_up":
            yield stack._replace(number=number), one
            continue
        gate, up = _halves(target, one, known)
        yield stack._replace(number=number, role="gate"), gate
        yield stack._replace(number=number, role="up"), up


def _shape(stack: Expert, like: Adapter, names: Names) -> tuple[int, ...]:
    """[o,i] of one entry of a stack, as the other adapter's experts of the layer tell it."""
    expert, name = next((e, n) for e, n in names.items() if e.layer == stack.layer and e.number is not None)
    told = like.updates[name].shape
    inner, width = told[::-1] if expert.role == "down" else told  # of a gate
    return {"down": (width, inner), "gate_up": (2 * inner, width)}.get(stack.role, (inner, width))


def _turned(one: Update) -> Update:
    """The transpose of one entry of a stack."""
    if isinstance(one, LowRank):
        return LowRank(one.up.T, one.down.T, None, one.alpha, one.rank_stabilised)
    assert isinstance(one, (Dense, Replace))  # each_expert gives no other
    return replace(one, value=one.value.T)


def _halves(target: str, one: Update, layout: StackLayout) -> tuple[Update, Update]:
    """Gate and up [o,i] of what holds both [2o,i]."""
    if not layout.interleaved:
        half = one.shape[0] // 2
        return rows(one, 0, half), rows(one, half, 2 * half)
    if not isinstance(one, LowRank):
        raise MatchError(f"an update of kind {one.kind} of interleaved gate and up cannot be taken apart", target)
    gate, up = (replace(one, up=Tensor.of(np.ascontiguousarray(one.up.array()[n::2]))) for n in (0, 1))
    return gate, up


def _still(update: Update) -> bool:
    """Whether a LoRA changes nothing: one of its factors is zero."""
    return isinstance(update, LowRank) and not all(tensor.array().any() for tensor in (update.down, update.up))
