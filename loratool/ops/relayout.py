"""An adapter under the module names of another version of transformers: prefixes, and experts one by one or stacked.

Transformers 4 holds each expert's projections as modules of their own; 5 holds all experts of a layer in two stacks,
gate and up in one. A stacked pair of gate and up has the rank of both, in blocks: the delta is the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from loratool.adapter import Adapter
from loratool.architectures.layouts import ONE_BY_ONE, STACKS, VERSIONED_PREFIXES, Naming
from loratool.errors import FormatError, MatchError, UsageError
from loratool.kinds.experts import Experts
from loratool.layouts import each_expert, expert_of
from loratool.lazy import np
from loratool.ops.resize import padded
from loratool.tensors import Tensor
from loratool.update import LowRank, Update, as_low_rank, rows, stack

LAYOUTS = ("transformers-4", "transformers-5")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def relayout(adapter: Adapter, layout: str) -> Adapter:
    """The adapter as ``layout`` names its modules; the base's configuration tells the model's type.

    Raises UsageError for an unknown layout, MatchError where the type is not known, FormatError for experts whose
    updates cannot be stacked or taken apart.
    """
    if layout not in LAYOUTS:
        raise UsageError("unknown layout", repr(layout), f"one of {', '.join(LAYOUTS)}")
    config = adapter.metadata.base_config
    text = config.get("text_config")
    told = {**config, **text} if isinstance(text, dict) else config
    kind = str(config.get("model_type"))
    if kind == "None":
        raise MatchError("the type of the base model is not known", adapter.metadata.path, "give --base")
    five = layout == LAYOUTS[1]
    made = list(_stacked(adapter, kind, told) if five else _alone(adapter, kind, told))
    names = {name: _moved(name, kind, five) for name, _, _ in made}
    carried = {name: _moved(name, kind, five) for name in adapter.carried}
    return replace(
        adapter,
        updates={names[name]: update for name, update, _ in made},
        carried={carried[name]: tensor for name, tensor in adapter.carried.items()},
        spellings={names[name]: adapter.spelling(source) for name, _, source in made}
        | {carried[name]: adapter.spelling(name) for name in adapter.carried},
    ).with_metadata(config=_without_targets(adapter.metadata.config))


def _without_targets(config: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT configuration without what names modules: it is written anew."""
    stale = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "r", "lora_alpha", "use_rslora")
    return {key: value for key, value in config.items() if key not in (*stale, "modules_to_save")}


def _moved(name: str, kind: str, five: bool) -> str:
    """A name with the prefix that its module has in the other version."""
    pairs = VERSIONED_PREFIXES.get(kind, ())
    there = tuple(new if five else old for old, new in pairs)
    dotted = f"{name}."
    if five and dotted.startswith(there):
        return name
    for four, new in pairs:
        old, other = (four, new) if five else (new, four)
        if dotted.startswith(old):
            return (other + dotted.removeprefix(old)).removesuffix(".")
    return name


Named = tuple[str, Update, str]
"""A target, its update, and the target of the source that it comes from."""


def _alone(adapter: Adapter, kind: str, config: Mapping[str, Any]) -> Iterator[Named]:
    """Every target, stacks of experts one by one."""
    naming = ONE_BY_ONE.get(kind, Naming("mlp"))
    for target, update in adapter.updates.items():
        expert = expert_of(target)
        if expert is None or expert.number is not None:
            yield target, update, target
            continue
        _check_type(kind, target)
        block = re.sub(r"[^.]+\.experts$", f"{naming.block}.experts", target.rpartition(".")[0])
        gate, up, down = naming.leaves
        for number, one in enumerate(each_expert(target, update, _fits(expert.role, config))):
            if expert.role != "gate_up":
                leaf = {"gate": gate, "up": up, "down": down}[expert.role]
                yield f"{block}.{number}.{leaf}", one, target
                continue
            half = one.shape[0] // 2
            yield f"{block}.{number}.{gate}", rows(one, 0, half), target
            yield f"{block}.{number}.{up}", rows(one, half, 2 * half), target


def _fits(role: str, config: Mapping[str, Any]) -> Any:
    """Whether a shape [o,i] is that of an expert's projection: the width of the model tells."""
    width = config.get("hidden_size")
    return lambda shape: width is None or shape[0 if role == "down" else 1] == width


def _stacked(adapter: Adapter, kind: str, config: Mapping[str, Any]) -> Iterator[Named]:
    """Every target, experts in the stacks of their layer."""
    layers: dict[str, dict[str, dict[int, str]]] = {}  # container -> role -> number -> target
    for target, update in adapter.updates.items():
        expert = expert_of(target)
        if expert is None or expert.number is None:
            yield target, update, target
            continue
        _check_type(kind, target)
        layers.setdefault(target.rsplit(".", 2)[0], {}).setdefault(expert.role, {})[expert.number] = target
    for container, roles in layers.items():
        most = 1 + max(max(found) for found in roles.values())
        count = next((config[key] for key in _COUNTS if type(config.get(key)) is int), most)
        if count < most:
            raise MatchError(f"expert {most - 1} of {count}", container, "is this its base model?")
        place = re.sub(r"block_sparse_moe\.experts$", "mlp.experts", container)
        first = next(iter(next(iter(roles.values())).values()))
        if "down" in roles:
            yield f"{place}.down_proj", _packed([_low(adapter, roles["down"].get(n)) for n in range(count)]), first
        if "gate" in roles or "up" in roles:
            pairs = [[_low(adapter, roles.get(role, {}).get(n)) for role in ("gate", "up")] for n in range(count)]
            half = next(low.shape[0] for pair in pairs for low in pair if low is not None)
            both = [stack(pair, (half, half)) if any(pair) else None for pair in pairs]
            leaf = "gate_up_proj"
            yield f"{place}.{leaf}", _packed([low for low in both if low is None or isinstance(low, LowRank)]), first


def _low(adapter: Adapter, target: str | None) -> LowRank | None:
    """The plain LoRA of one expert. Raises FormatError for what has none."""
    if target is None:
        return None
    low = as_low_rank(adapter.updates[target])
    if low is None or low.layer != "plain" or len(low.shape) != 2:
        raise FormatError(
            f"an update of kind {adapter.updates[target].kind} cannot be stacked with other experts",
            adapter.spelling(target),
        )
    return low


def _packed(lows: list[LowRank | None]) -> Experts:
    """The stack of these experts, padded with zeros to one rank; zero where an expert has no update."""
    like = next(low for low in lows if low is not None)
    rank = max(low.rank for low in lows if low is not None)
    none = LowRank(_zeros(like.down, rank, like.down.shape[1]), _zeros(like.up, like.up.shape[0], rank), alpha=None)
    alike = {(low.scaling, low.rank_stabilised) for low in lows if low is not None}
    full = [none if low is None else low if low.rank == rank else padded(low, rank) for low in lows]
    if len(alike) == 1:
        full = [_as(low, like, rank) for low in full]
    return Experts.packed(full)


def _as(low: LowRank, like: LowRank, rank: int) -> LowRank:
    """A LoRA with the words of another of the same scaling."""
    alpha = None if like.alpha is None else like.scaling * (rank**0.5 if like.rank_stabilised else rank)
    return replace(low, alpha=alpha, rank_stabilised=like.rank_stabilised)


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return Tensor.of(np.zeros(shape, np.float32)).cast(like.dtype)


def _check_type(kind: str, target: str) -> None:
    """Raise MatchError for models whose stacks are not gate above up, or not known."""
    known = STACKS.get(kind)
    if known is None or known.interleaved or known.transposed:
        raise MatchError(f"nothing tells how the experts of a model of type {kind!r} are stacked", target)
