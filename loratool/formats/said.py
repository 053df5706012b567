"""An update of an image model -> the tensors of its module, in LyCORIS' slots.

kohya's, LyCORIS' and ComfyUI's files share these; `loratool.formats.slots` reads them. What cannot be said in them is
refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

from loratool.formats import raw
from loratool.formats.slots import SPARSE, Slots
from loratool.kinds.glora import GLoRA
from loratool.kinds.hadamard import LoHa
from loratool.kinds.kronecker import LoKr
from loratool.kinds.rescale import IA3
from loratool.kinds.rotation import BOFT, OFT, SegmentOFT
from loratool.kinds.sparse import Sparse
from loratool.lazy import np
from loratool.tensors import Tensor
from loratool.update import Additive, Dense, DoRA, LowRank, Replace, Sum, Update, as_low_rank

LARGEST = 1 << 32
"""Elements that a weight has at most: small factors may claim more, which is not multiplied out."""


def said(update: Update) -> Slots | str:
    """The tensors of the update of a weight in LyCORIS' slots, or why it cannot be said in them."""
    if isinstance(update, DoRA):
        direction = said(update.direction)
        if isinstance(direction, str) or "diff" in direction:
            return direction if isinstance(direction, str) else "a DoRA of a direction without factors"
        return {**direction, "dora_scale": _magnitude(update)}
    say: Callable[[Any], Slots | str] = next((say for kind, say in _SAYS if isinstance(update, kind)), _say_other)
    return say(update)


def said_of_bias(update: Update, norm: bool) -> Slots | str:
    """The tensors of the update of a bias, or why it cannot be said."""
    return {"b_norm" if norm else "diff_b": whole(update)} if isinstance(update, Additive) else _REFUSED


_REFUSED = "an update of a kind that these slots do not have"


def _say_low_rank(low: LowRank) -> Slots | str:
    """Factors with as many axes as the layer has: [r,i,*k] and [o,r,*1]; beside a core [r,i,*1]."""
    if low.layer == "transposed":
        return "a LoRA of a layer that stores its weight transposed"
    ones = [1] * (len((low.mid or low.down).shape) - 2)
    slots = {**low.slots, "up": low.up.reshape(*low.up.shape[:2], *ones)}
    if low.mid is not None:
        slots["down"] = low.down.reshape(*low.down.shape[:2], *ones)
    told = low.scaling * low.rank if low.alpha is None or low.rank_stabilised else low.alpha
    return _beside_alpha(slots, told, low.scaling == 0)


def _say_loha(update: LoHa) -> Slots | str:
    return _beside_alpha(_prefixed("hada_", update), update.explicit_alpha, update.scaling == 0)


def _say_lokr(update: LoKr) -> Slots | str:
    update = update.folded()
    if update.explicit_alpha is None:  # two whole halves: it says nothing, but readers expect one
        return _beside_alpha(_prefixed("lokr_", update), update.alpha or 1.0, False)
    return _beside_alpha(_prefixed("lokr_", update), update.explicit_alpha, update.scaling == 0)


def _say_glora(update: GLoRA) -> Slots | str:
    return _beside_alpha(_prefixed("glora_", update), update.scaling * update.rank, update.scaling == 0)


def _say_ia3(update: IA3) -> Slots | str:
    if update.layer != "plain":
        return "an (IA)3 of a layer that stores its weight transposed"
    axes = len(update.weight or update.vector.shape)
    shape = (update.vector.size,) if axes < 3 else (1, update.vector.size, *[1] * (axes - 2))
    vector = update.vector.reshape(*shape)
    if update.centre:
        vector = Tensor.of(vector.float() - np.float32(update.centre))
    return {"weight": vector, "on_input": Tensor.of(np.int64(update.on_input))}


def _say_oft(update: OFT | BOFT) -> Slots | str:
    if update.layer != "plain":
        return "an OFT of a layer that stores its weight transposed"
    direct = isinstance(update, OFT) and update.direct
    slots = {"oft_diag" if direct else "oft_blocks": update.oft_blocks}
    if update.rescale is not None:
        slots["rescale"] = update.rescale.reshape(*update.rescale.shape, *[1] * (2 - len(update.rescale.shape)))
    return _beside_alpha(slots, update.alpha or 0.0, True)


def _say_segments(update: SegmentOFT) -> Slots | str:
    return _beside_alpha(dict(update.slots), update.alpha or 0.0, True)


def _say_dense(update: Dense) -> Slots | str:
    return {"w_norm" if update.kind == "norm" else "diff": whole(update)}


def _say_sum(update: Sum) -> Slots | str:
    """A LoRA and single entries of its scaling stand side by side; others are added up."""
    sparse = [part for part in update.parts if isinstance(part, Sparse)]
    rest: list[Update] = [part for part in update.parts if not isinstance(part, Sparse)]
    low = as_low_rank(reduce(raw.join, rest)) if rest and sparse else None
    if low is None or len(sparse) != 1 or sparse[0].scaling != low.scaling:
        return _say_other(update)
    said = _say_low_rank(low)
    own = zip(SPARSE, sparse[0].slots.values(), strict=True)
    return said if isinstance(said, str) else {**said, **dict(own)}


def _say_replace(update: Replace) -> Slots | str:
    return {"set_weight": update.value}


def _say_other(update: Update) -> Slots | str:
    """Other additive kinds: as the LoRA that they are, or their delta whole."""
    low = plain_low_rank(update)
    if low is not None:
        return _say_low_rank(low)
    if math.prod(update.shape) > LARGEST:
        return f"a whole difference of shape {list(update.shape)}, larger than any weight"
    return {"diff": whole(update)} if isinstance(update, Additive) else _REFUSED


_SAYS: tuple[tuple[type[Update], Callable[[Any], Slots | str]], ...] = (
    (LowRank, _say_low_rank),
    (LoHa, _say_loha),
    (LoKr, _say_lokr),
    (GLoRA, _say_glora),
    (IA3, _say_ia3),
    (OFT, _say_oft),
    (BOFT, _say_oft),
    (SegmentOFT, _say_segments),
    (Dense, _say_dense),
    (Replace, _say_replace),
    (Sum, _say_sum),
)


def _prefixed(prefix: str, update: Update) -> Slots:
    return {prefix + slot: tensor for slot, tensor in update.slots.items()}


def _beside_alpha(slots: Slots, alpha: float, zero: bool) -> Slots | str:
    """Slots with a float32 alpha; why not, where that cannot hold it. ``zero``: whether it may be 0."""
    value = np.float32(alpha)
    if not np.isfinite(value) or (value == 0 and not zero):
        return f"its alpha, {alpha}, is beyond float32"
    return {**slots, "alpha": Tensor.of(value)}


def _magnitude(update: DoRA) -> Tensor:
    """[o,*1] of outputs, [1,i,*1] of inputs, with as many axes as the weight has."""
    count, ones = update.magnitude.size, [1] * (len(update.shape) - 1)
    return update.magnitude.reshape(*((count, *ones) if update.axis == 0 else (1, count, *ones[1:])))


def whole(update: Additive) -> Tensor:
    """A delta as one tensor, its scaling folded in: as stored where there is none, else float32."""
    if isinstance(update, Dense) and update.scaling == 1.0:
        return update.value
    return Tensor("F32", update.shape, lambda start, stop: update.delta(start, stop).astype(np.float32))


def plain_low_rank(update: Update) -> LowRank | None:
    """The same delta as one LoRA without a Tucker core, exactly; None where there is no such form.

    Where the ranks of a LoHa or of a LoKr with a factorised half multiply to the full rank, one factor is 1.
    """
    if not isinstance(update, LowRank) and math.prod(update.shape) > LARGEST:
        return None
    low = as_low_rank(update)
    if low is not None or not isinstance(update, LoHa | LoKr) or update.rank is None:
        return low
    height, width = update.shape[0], math.prod(update.shape[1:])
    one = np.eye(min(height, width), dtype=np.float32)
    delta = whole(update)
    if height <= width:
        return LowRank(delta, Tensor.of(one))
    return LowRank(Tensor.of(one).reshape(width, *update.shape[1:]), delta.reshape(height, width))
