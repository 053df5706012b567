"""The tensors of one module of an image model -> its updates, in the words of kohya, LyCORIS, PEFT and ComfyUI.

Slots are what suffixes mean (`loratool.formats.dialects.READ`); `loratool.formats.said` is the way back. Every slot is
taken, or refused. A kind is imported by what makes it: most files are plain LoRAs.
Sources: kohya-ss/sd-scripts, LyCORIS 4 (`weight_list` of its modules, `extract_locon`), PEFT 0.21, OneTrainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from loratool.errors import FormatError
from loratool.formats import raw
from loratool.keys import require_pair
from loratool.lazy import np
from loratool.tensors import FLOATS, Tensor
from loratool.update import Additive, Dense, DoRA, LowRank, Replace, Update

if TYPE_CHECKING:
    from loratool.kinds.glora import GLoRA
    from loratool.kinds.hadamard import LoHa
    from loratool.kinds.kronecker import LoKr

    Scaled = TypeVar("Scaled", LoHa, LoKr, GLoRA)

Parts = Mapping[str, Update]
"""The updates of one module: "" of its weight, ".bias" of its bias."""
Slots = dict[str, Tensor]
Arguments = Mapping[str, Any]
Alpha = Callable[[dict[str, Tensor], int], tuple[float | None, bool]]
"""What takes alpha out of a module's slots, or finds it elsewhere, for a rank: (alpha, rank-stabilised)."""

_NORM = {"w_norm": "diff", "b_norm": "diff_b"}
SPARSE = ("bias_indices", "bias_values", "bias_size")
_INTEGERS = ("on_input", "scaled_oft", "reshape_weight", "bias_indices", "bias_size")
_NO_FLOATS = ("alpha", "scale", *_INTEGERS)  # slots that may be of any dtype


def build(name: str, slots: Mapping[str, Tensor], alpha: Alpha, arguments: Mapping[str, Any]) -> Parts:
    """The updates of one module. ``arguments`` are those of the training, as far as they are told.

    Raises FormatError for slots that do not fit each other, and for what is left of them.
    """
    rest = {_NORM.get(slot, slot): tensor for slot, tensor in slots.items()}
    if len(rest) < len(slots):
        raise FormatError("a delta both of a layer and of a norm")
    for slot, tensor in rest.items():
        if slot not in _NO_FLOATS and tensor.dtype not in FLOATS:
            raise FormatError(f"{slot} is stored as {tensor.dtype}")
    norm = "norm" if slots.keys() & _NORM.keys() else None
    found: dict[str, list[Update]] = {"": [], ".bias": []}
    sparse = [rest.pop(slot) for slot in SPARSE if slot in rest]
    for leaf, slot, kind in (("", "diff", norm or "full"), (".bias", "diff_b", norm or "bias")):
        if slot in rest:
            found[leaf].append(Dense(rest.pop(slot), 1.0, kind))
    if "set_weight" in rest:
        found[""].append(Replace(rest.pop("set_weight")))
    bias, padded = rest.pop("bias", None), rest.pop("reshape_weight", None)
    made = [row.make(name, rest, alpha, arguments) for row in _KINDS if any(map(row.shown_by, tuple(rest)))]
    if made:
        found[""].append(_decomposed(reduce(raw.join, made), rest))
    if bias is not None:
        found[".bias"].append(Dense(bias, made[0].scaling if made else 1.0, "bias"))
    if sparse:
        found[""].append(_sparse(sparse, made))
    if padded is not None:
        _check_padded(padded, found[""])
    if rest:
        raise FormatError(f"{' and '.join(sorted(rest))} but no factors that belong to it")
    return {leaf: reduce(raw.join, updates) for leaf, updates in found.items() if updates}


def _sparse(given: list[Tensor], made: list[Update]) -> Update:
    """Single entries beside factors, with the scaling of these."""
    if len(given) < len(SPARSE):
        raise FormatError(f"a part of {', '.join(SPARSE)}, which belong together")
    from loratool.kinds.sparse import Sparse

    indices, values, size = given
    return Sparse(indices, values, size, made[0].scaling if made else 1.0)


def _check_padded(told: Tensor, updates: list[Update]) -> None:
    """Raise FormatError unless the shape to which ComfyUI pads the base is that of its update."""
    shapes = {update.shape for update in updates}
    if len(told.shape) != 1 or told.size > 8 or shapes != {tuple(map(int, told.array()))}:
        raise FormatError(f"reshape_weight says another shape than that of the update, {sorted(map(list, shapes))}")


def _decomposed(direction: Update, slots: dict[str, Tensor]) -> Update:
    """The DoRA of a direction, where there is a magnitude."""
    if {"magnitude", "dora_scale"} <= slots.keys():
        raise FormatError("both lora_magnitude_vector and dora_scale")
    if slots.keys().isdisjoint(("magnitude", "dora_scale")):
        return direction
    if not isinstance(direction, Additive):
        raise FormatError(f"a magnitude beside an update of kind {direction.kind}")
    if "magnitude" in slots:  # PEFT's are of outputs, whatever their shape
        return DoRA(direction, slots.pop("magnitude"), 0)
    scale = slots.pop("dora_scale")
    return DoRA(direction, scale, raw.magnitude_axis(scale))


class Kind(NamedTuple):
    """A kind of update: the slots that show it, and what takes its own out of a module's slots."""

    slots: tuple[str, ...]
    make: Callable[[str, Slots, Alpha, Arguments], Update]

    def shown_by(self, slot: str) -> bool:
        """Whether a slot shows this kind."""
        return slot.startswith(self.slots)


def _lora(name: str, slots: Slots, alpha: Alpha, arguments: Arguments) -> Update:
    require_pair(name, slots, "")
    down, up, mid = slots.pop("down"), slots.pop("up"), slots.pop("mid", None)
    value, stabilised = alpha(slots, down.shape[0] if down.shape else 0)
    return LowRank(down, up, mid, value, stabilised)


def _loha(name: str, slots: Slots, alpha: Alpha, arguments: Arguments) -> Update:
    from loratool.kinds.hadamard import LoHa

    return _with_alpha(LoHa(**_taken(slots, "hada_", LoHa)), slots, alpha)


def _lokr(name: str, slots: Slots, alpha: Alpha, arguments: Arguments) -> Update:
    from loratool.kinds.kronecker import LoKr

    return _with_alpha(LoKr(**_taken(slots, "lokr_", LoKr)), slots, alpha)


def _glora(name: str, slots: Slots, alpha: Alpha, arguments: Arguments) -> Update:
    from loratool.kinds.glora import GLoRA

    update = _with_alpha(GLoRA(**_taken(slots, "glora_", GLoRA)), slots, alpha)
    return replace(update, rank_stabilised=is_true(arguments.get("rs_lora")))  # its stored alpha is raw


def _ia3(name: str, slots: Slots, alpha: Alpha, arguments: Arguments) -> Update:
    from loratool.kinds.rescale import IA3

    slots.pop("alpha", None)  # it has no scaling
    if "ia3_l" in slots:
        vector = slots.pop("ia3_l")
        return IA3(vector, vector.shape[:1] == (1,) and vector.size > 1, 1.0)
    if "weight" not in slots:
        raise FormatError("on_input without the vector of an (IA)3")
    return IA3(slots.pop("weight"), bool(slots.pop("on_input").item()))


def _oft(name: str, slots: Slots, alpha: Alpha, arguments: Arguments) -> Update:
    from loratool.kinds.rotation import BOFT, OFT, SegmentOFT

    limit, _ = alpha(slots, 1)
    if "oft_diag" in slots:
        return OFT(slots.pop("oft_diag"), slots.pop("rescale", None), None, direct=True)
    segments = sorted((slot for slot in slots if slot.startswith("oft_blocks.")), key=lambda s: int(s[11:]))
    if segments:
        if segments != [f"oft_blocks.{n}" for n in range(len(segments))] or "oft_blocks" in slots:
            raise FormatError(f"the segments of an OFT are {', '.join(segments)}")
        return SegmentOFT(tuple(slots.pop(slot) for slot in segments), limit)
    blocks, rescale = slots.pop("oft_blocks"), slots.pop("rescale", None)
    if len(blocks.shape) == 4:
        return BOFT(blocks, rescale, limit)
    return OFT(blocks, rescale, limit)


def _peft_oft(name: str, slots: Slots, alpha: Alpha, arguments: Arguments) -> Update:
    from loratool.kinds.rotation import PeftOFT

    slots.pop("alpha", None)  # it has no scaling
    blocks, scaled = slots.pop("oft_R", None), slots.pop("scaled_oft", None)
    if blocks is None:
        raise FormatError("scaled_oft without oft_R")
    update = PeftOFT(blocks, block_share=blocks.shape[:1] == (1,), kernels_back=True)
    if scaled is None:
        return update
    # OneTrainer: by the root of all values, later by twice that of the other rows
    by = math.sqrt(blocks.shape[1]) if scaled.dtype.startswith("I") else 2 * math.sqrt(update.span - 1)
    return replace(update, oft_R=Tensor.of(blocks.float() / np.float32(by)))


def _peft_boft(name: str, slots: Slots, alpha: Alpha, arguments: Arguments) -> Update:
    from loratool.kinds.rotation import PeftBOFT

    if {"boft_R", "boft_s"} - slots.keys():
        raise FormatError("half of a BOFT: boft_R and boft_s belong together")
    return PeftBOFT(slots.pop("boft_R"), slots.pop("boft_s"))


_KINDS = (
    Kind(("down", "up", "mid"), _lora),
    Kind(("hada_",), _loha),
    Kind(("lokr_",), _lokr),
    Kind(("glora_",), _glora),
    Kind(("on_input", "ia3_l"), _ia3),
    Kind(("oft_blocks", "oft_diag"), _oft),
    Kind(("oft_R", "scaled_oft"), _peft_oft),
    Kind(("boft_",), _peft_boft),
)


def _taken(slots: Slots, prefix: str, kind: type[Update]) -> dict[str, Any]:
    """The slots of a kind, by the names of its fields. Raises FormatError where some are missing."""
    known = {field.name: field.default is MISSING for field in fields(kind)}  # type: ignore[arg-type]
    own = [slot for slot in slots if slot.startswith(prefix) and slot.removeprefix(prefix) in known]
    found = {slot.removeprefix(prefix): slots.pop(slot) for slot in own}
    missing = [field for field, needed in known.items() if needed and field not in found]
    if missing:
        raise FormatError(f"{', '.join(sorted(found))} but no {' and '.join(missing)}", hint="the file is incomplete")
    return found


def _with_alpha(update: Scaled, slots: Slots, alpha: Alpha) -> Scaled:
    """An update with the alpha of its module."""
    return replace(update, alpha=alpha(slots, update.rank or 0)[0])


def is_true(value: Any) -> bool:
    """Whether a value that trainers store as text is true: "False" and "None" are not."""
    return str(value).strip().lower() in ("true", "1", "yes", "on")


def is_empty(slots: Mapping[str, Tensor]) -> bool:
    """Whether a module has rank 0: it changes nothing (some tools that reduce ranks leave such)."""
    return {"down", "up"} <= set(slots) and slots["down"].shape[:1] == (0,) and slots["up"].shape[1:2] == (0,)
