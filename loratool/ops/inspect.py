"""What an adapter holds, from its headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratool.adapter import Adapter
from loratool.update import LowRank, Sum, Update, stack


@dataclass(frozen=True)
class Target:
    """One target: ``shape`` is that of the update in the base's orientation; ``scaling`` None where unknown."""

    module: str
    kind: str
    rank: int | None
    alpha: float | None
    scaling: float | None
    shape: tuple[int, ...]
    dtype: str
    norm: float | None = None


@dataclass(frozen=True)
class Inspection:
    """The fields of ``inspect --json``."""

    format: str
    architecture: str | None
    base_model: str | None
    kinds: Mapping[str, int]
    modules: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    ranks: Mapping[str, int]
    targets: tuple[Target, ...]
    carried: tuple[str, ...]
    metadata: Mapping[str, str]
    warnings: tuple[str, ...]
    config: Mapping[str, Any]


def inspect(adapter: Adapter, norms: bool = False) -> Inspection:
    """Describe ``adapter``; with ``norms`` the Frobenius norm of each additive update, which reads the factors."""
    adapter = as_stored(adapter)
    modules = adapter.modules()
    slots = [t for u in adapter.updates.values() for t in u.slots.values()]
    tensors = {id(t): t for t in (*slots, *adapter.carried.values())}.values()  # one that modules share counts once
    ranks = Counter(str(u.rank) for u in modules.values() if u.rank is not None)
    return Inspection(
        format=adapter.metadata.format,
        architecture=adapter.metadata.architecture,
        base_model=adapter.metadata.base_model,
        kinds=dict(Counter(u.kind for u in modules.values())),
        modules=len(modules),
        parameters=sum(t.size for t in tensors),
        bytes=sum(path.stat().st_size for path in adapter.metadata.weights),
        dtypes=dict(Counter(t.dtype for t in tensors).most_common()),
        ranks=dict(sorted(ranks.items(), key=lambda pair: int(pair[0]))),
        targets=tuple(_target(adapter, name, update, norms) for name, update in adapter.updates.items()),
        carried=tuple(adapter.carried),
        metadata=dict(adapter.metadata.strings),
        warnings=tuple(dict.fromkeys((*adapter.metadata.warnings, *odd(adapter)))),
        config=dict(adapter.metadata.config),
    )


def as_stored(adapter: Adapter) -> Adapter:
    """The adapter with projections that its file holds fused as one module again, by the file's own name."""
    groups: dict[str, list[str]] = {}
    for name in adapter.updates:
        groups.setdefault(adapter.spelling(name), []).append(name)
    updates: dict[str, Update] = {}
    for spelling, names in groups.items():
        parts = [adapter.updates[name] for name in names]
        whole = stack(parts, [part.shape[0] for part in parts]) if len(parts) > 1 else None
        if whole is None:
            updates.update(zip(names, parts, strict=True))
        else:
            updates[spelling] = whole
    return replace(adapter, updates=updates)


def _target(adapter: Adapter, name: str, update: Update, norms: bool) -> Target:
    return Target(
        module=name,
        kind=update.kind,
        rank=update.rank,
        alpha=update.alpha,
        scaling=update.scaling if adapter.metadata.scaling_known else None,
        shape=update.shape,
        dtype=next(iter(update.slots.values())).dtype,
        norm=_norm(update) if norms else None,
    )


def _norm(update: Update) -> float | None:
    """The size of an update; None for kinds whose change depends on the base."""
    from loratool.ops.compare import norm

    return None if update.needs_base else norm(update)


def odd(adapter: Adapter) -> list[str]:
    """What is odd about an adapter, as its headers show it."""
    found = []
    lows = [low for u in adapter.modules().values() for low in _low_ranks(u)]
    scalings = [abs(low.scaling) for low in lows if low.alpha is not None and low.scaling]
    if scalings and max(scalings) > 50 * min(scalings):
        found.append(
            f"alpha/rank varies {max(scalings) / min(scalings):.0f}-fold within the file "
            f"({min(scalings):g} to {max(scalings):g})"
        )
    if any(low.alpha == 0 for low in lows):
        found.append("alpha is stored as 0: these modules have no effect here, while LyCORIS reads 0 as the rank")
    missing = sum(low.alpha is None for low in lows)
    if missing and adapter.metadata.scaling_known:
        found.append(f"alpha is missing for {missing} of {len(lows)} modules: their scaling is 1")
    return found


def _low_ranks(update: Update) -> list[LowRank]:
    parts = update.parts if isinstance(update, Sum) else (getattr(update, "direction", update),)
    return [part for part in parts if isinstance(part, LowRank)]
