"""Stacked experts where ranks are chosen: each expert counts as a module of its own, and the stack is packed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.adapter import Adapter
from loratool.errors import MatchError
from loratool.kinds.experts import Experts, Order
from loratool.lazy import np
from loratool.model import Model
from loratool.ops.compare import placed
from loratool.ops.spectral import Result
from loratool.tensors import Tensor
from loratool.update import LowRank, Update


def stacks_of(adapters: Sequence[Adapter], model: Model | None = None) -> dict[str, Experts]:
    """The stacks of adapters by target, the first one's of each; as the base stores them where it is given.

    Raises MatchError where two adapters have other numbers of experts.
    """
    found: dict[str, Experts] = {}
    for adapter in adapters:
        for name, update in adapter.updates.items():
            if isinstance(update, Experts) and found.setdefault(name, update).experts != update.experts:
                raise MatchError(f"stacks of {found[name].experts} and of {update.experts} experts", name)
    return {name: _oriented(name, stack, model) for name, stack in found.items()}


def _oriented(name: str, stack: Experts, model: Model | None) -> Experts:
    update = placed(name, stack, model)[0]
    return update if isinstance(update, Experts) else stack


def hollow(experts: int, order: Order) -> Experts:
    """A stack that only tells how many experts there are, and how the base stores them."""
    return Experts(
        Tensor.of(np.zeros((experts, 1), np.float32)),
        Tensor.of(np.zeros((1, experts), np.float32)),
        experts,
        order=order,
    )


def apart(adapter: Adapter, model: Model | None = None) -> Adapter:
    """An adapter whose stacks are one LoRA for each expert, of target ``<stack>.<number>``."""
    updates: dict[str, Update] = {}
    for name, update in adapter.updates.items():
        if isinstance(update, Experts):
            stack = _oriented(name, update, model)
            updates.update({f"{name}.{number}": stack.expert(number) for number in range(stack.experts)})
        else:
            updates[name] = update
    return replace(adapter, updates=updates)


def together(adapter: Adapter, stacks: Mapping[str, Experts]) -> Adapter:
    """The inverse of `apart`: experts of one rank, the smaller ones padded with zeros; none of a stack: none left.

    Raises MatchError for an expert that has no factors.
    """
    owner = {f"{name}.{number}": name for name, stack in stacks.items() for number in range(stack.experts)}
    updates: dict[str, Update] = {}
    for name, update in adapter.updates.items():
        stack = owner.get(name)
        if stack is None:
            updates[name] = update
        elif stack not in updates:
            updates[stack] = _packed(stack, stacks[stack], adapter.updates)
    return replace(adapter, updates=updates)


def _packed(name: str, like: Experts, updates: Mapping[str, Update]) -> Experts:
    parts = [updates.get(f"{name}.{number}") for number in range(like.experts)]
    lows = [part for part in parts if isinstance(part, LowRank)]
    if len(lows) < sum(part is not None for part in parts):
        raise MatchError("an expert without factors cannot be put into a stack", name, "give a rank")
    rank = max(low.rank for low in lows)
    first = lows[0]
    made = [_of_rank(part, rank) if isinstance(part, LowRank) else _nothing(first, rank) for part in parts]
    return replace(Experts.packed(made), order=like.order)


def _of_rank(low: LowRank, rank: int) -> LowRank:
    """The same delta at a rank that is not smaller, its scaling kept."""
    more = rank - low.rank
    if not more:
        return low
    down, up = np.pad(low.down.array(), ((0, more), (0, 0))), np.pad(low.up.array(), ((0, 0), (0, more)))
    made = replace(low, down=Tensor.of(down), up=Tensor.of(up), alpha=1.0)
    return replace(made, alpha=low.scaling / made.scaling)


def _nothing(like: LowRank, rank: int) -> LowRank:
    """A LoRA of zeros, beside one like ``like``."""
    down, up = (np.zeros_like(t.array()) for t in (like.down, like.up))
    return _of_rank(replace(like, down=Tensor.of(down), up=Tensor.of(up)), rank)


def repacked(result: Result, stacks: Mapping[str, Experts]) -> Result:
    """A result whose adapter is `together` again; its report keeps telling of each expert."""
    return replace(result, adapter=together(result.adapter, stacks)) if stacks else result
