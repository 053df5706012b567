"""One rank, one alpha and no exceptions: what every engine reads alike.

Many engines take rank and alpha from the configuration and ignore its exceptions by module, or rank stabilisation. So
ranks are padded with zeros to the largest, and what a module's scaling differs by goes into its up factor.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from loratool.adapter import Adapter, is_bias
from loratool.lazy import np
from loratool.ops.add import exact
from loratool.ops.resize import padded
from loratool.update import Dense, DoRA, LowRank, Update, as_low_rank

_STALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "init_lora_weights")


def uniform(adapter: Adapter) -> Adapter:
    """The same deltas with one rank and one scaling for every LoRA (and DoRA); other kinds stay as they are.

    The commonest scaling is kept; where another module's factor cannot be said in its dtype it is stored in float32.
    """
    lows = {name: low for name, update in adapter.updates.items() if (low := _low(update)) is not None}
    if not lows:
        return adapter
    rank = max(low.rank for low in lows.values())
    scaling = Counter(low.scaling for low in lows.values() if low.scaling).most_common(1)
    target = abs(scaling[0][0]) if scaling else 1.0
    updates: dict[str, Update] = {}
    for name, update in adapter.updates.items():
        if name not in lows:
            updates[name] = update
            continue
        made = _scaled(lows[name], rank, target)
        updates[name] = replace(update, direction=made) if isinstance(update, DoRA) else made
    for name, update in updates.items():  # PEFT multiplies the bias that a LoRA learned by its scaling
        if (
            is_bias(name)
            and isinstance(update, Dense)
            and name.removesuffix(".bias") in lows
            and update.scaling != target
        ):
            value = update.value.float().astype(np.float64) * (update.scaling / target)
            updates[name] = replace(update, value=exact(value, update.value.dtype), scaling=target)
    config = {key: value for key, value in adapter.metadata.config.items() if key not in _STALE}
    return replace(adapter, updates=updates).with_metadata(config=config)


def _low(update: Update) -> LowRank | None:
    """The LoRA of an update, of a DoRA that of its direction."""
    return as_low_rank(update.direction if isinstance(update, DoRA) else update)


def _scaled(low: LowRank, rank: int, target: float) -> LowRank:
    """The same delta at this rank with this scaling."""
    wide = padded(low, rank) if low.rank < rank else low
    alpha = target * rank
    if low.scaling == target:
        return replace(wide, alpha=alpha, rank_stabilised=False)
    up = wide.up.array().astype(np.float64) * (low.scaling / target)
    return replace(wide, up=exact(up, wide.up.dtype), alpha=alpha, rank_stabilised=False)
