"""`kohya`: one safetensors file in the names of kohya-ss/sd-scripts and LyCORIS.

A module is its path, every dot an underscore, behind ``lora_unet_`` or ``lora_te_`` (``lora_te1_`` and
``lora_te2_`` where there are two text encoders); SD1 and SD2 have diffusers' names, SDXL those of LDM. The first
dot ends it; then comes the slot: ``.lora_down.weight`` [r,i,*k], ``.lora_up.weight`` [o,r,*1],
``.lora_mid.weight`` [r,r,*k] (Tucker), ``.alpha`` (none: the rank), ``.dora_scale`` ([o,*1]: of outputs,
[1,i,*1]: of inputs), ``.diff`` and ``.diff_b`` (whole deltas of weight and bias), ``.w_norm`` and ``.b_norm``
(the same of a norm). ``bundle_emb.*`` are textual inversions.

No rule of text turns names back: they are looked up in the lists of known models, then among the modules of the
base, then in templates of names. Written: one float32 scalar alpha a module, rank-stabilised ones times sqrt(r).
Source: kohya-ss/sd-scripts 48d368f, KohakuBlueleaf/LyCORIS f49d30d.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from loratool.adapter import Adapter, Loss, is_bias
from loratool.architectures import Architecture, architecture, flatten, identify, unflatten
from loratool.formats import dialects
from loratool.formats.base import Evidence, Format, kept
from loratool.formats.dialects import EMBEDDINGS, TABLE, is_slot, located
from loratool.keys import Layout
from loratool.tensors import Tensor, write_safetensors
from loratool.update import Additive, Dense, DoRA, LowRank, as_low_rank

LAYOUT = Layout(
    slots=(
        ("down", ".lora_down.weight"),
        ("up", ".lora_up.weight"),
        ("mid", ".lora_mid.weight"),
        ("alpha", ".alpha"),
        ("magnitude", ".dora_scale"),
        ("diff", ".diff"),
        ("diff_b", ".diff_b"),
        ("w_norm", ".w_norm"),
        ("b_norm", ".b_norm"),
    ),
)
_PREFIX = re.compile(r"^lora_(unet|te\d?)_")
_BASES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}  # ss_base_model_version


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """kohya by its prefixes together with its suffixes."""
    found = next((key for key in evidence.keys if _PREFIX.match(key) and is_slot(key)), None)
    return f"keys such as {found}" if found else None


def read(evidence: Evidence) -> Adapter:
    """Read a kohya file. Raises FormatError for what is malformed, unknown or not supported."""
    return dialects.read(evidence, "kohya")


# ---------------------------------------------------------------- writing


def losses(adapter: Adapter) -> list[Loss]:
    """What kohya's names and slots cannot say."""
    return _said(adapter)[1]


def write(adapter: Adapter, path: Path) -> None:
    """Write a kohya file."""
    tensors, _, known = _said(adapter)
    write_safetensors(path, tensors, _strings(adapter, tensors, known))


def _said(adapter: Adapter) -> tuple[dict[str, Tensor], list[Loss], Architecture | None]:
    """The tensors of a file, what cannot be said, and the architecture whose names are used."""
    known = _architecture(adapter)
    tensors = {name: tensor for name, tensor in adapter.carried.items() if name.startswith(EMBEDDINGS)}
    whole = [name for name in adapter.carried if name not in tensors]
    lost = [Loss(adapter.spelling(name), "a whole tensor, which kohya cannot carry") for name in whole]
    for target in adapter.updates:
        module = _kohya_name(adapter, target.removesuffix(".bias"), known)
        said = _slots(adapter, target) if module else "kohya has no name for this module"
        found = {} if isinstance(said, str) else {LAYOUT.key(str(module), slot): t for slot, t in said.items()}
        if found.keys() & tensors.keys():
            said = "another module has this very name"
        if isinstance(said, str):
            lost.append(Loss(adapter.spelling(target), said))
        else:
            tensors.update(found)
    return tensors, lost, known


def _architecture(adapter: Adapter) -> Architecture | None:
    """What the adapter says it is for, or what its names and shapes show."""
    told = architecture(adapter.metadata.architecture or "")
    places = ((located(name), update.shape) for name, update in adapter.modules().items())
    return told or identify({name: shape for name, shape in places if name})


def _kohya_name(adapter: Adapter, target: str, known: Architecture | None) -> str | None:
    """kohya's name of a module; None where it has none that could be read again."""
    name = located(target)
    if name is None or known:
        return known.kohya().forward.get(name) if known and name else None
    two = any(other.startswith("text_encoder_2.") for other in adapter.updates)
    try:
        spelled = flatten(name, "sdxl" if two else None)
    except ValueError:
        return None
    return spelled if unflatten(spelled) == name or adapter.spellings.get(target) == spelled else None


def _slots(adapter: Adapter, target: str) -> dict[str, Tensor] | str:
    """The tensors of one update by slot, or why it cannot be said."""
    update = adapter.updates[target]
    if is_bias(target):
        beside = (update, adapter.updates.get(target.removesuffix(".bias")))
        norm = any(isinstance(u, Dense) and u.kind == "norm" for u in beside)
        return {"b_norm" if norm else "diff_b": _whole(update)} if isinstance(update, Additive) else _REFUSED
    inner = update.direction if isinstance(update, DoRA) else update
    low = inner if isinstance(inner, LowRank) else as_low_rank(inner)
    if low is None:
        slot = "w_norm" if isinstance(update, Dense) and update.kind == "norm" else "diff"
        return {slot: _whole(update)} if isinstance(update, Additive) else _REFUSED
    if low.layer == "transposed":
        return "a LoRA of a layer that stores its weight transposed"
    alpha = np.float32(low.scaling * low.rank if low.alpha is None or low.rank_stabilised else low.alpha)
    if not np.isfinite(alpha) or (alpha == 0) != (low.scaling == 0):
        return f"its alpha, {low.alpha}, is beyond float32"
    slots = {**_factors(low), "alpha": Tensor.of(alpha)}
    if isinstance(update, DoRA):
        count, ones = update.magnitude.size, [1] * (len(slots["down"].shape) - 1)
        shape = (count, *ones) if update.axis == 0 else (1, count, *ones[1:])
        slots["magnitude"] = update.magnitude.reshape(*shape)
    return slots


_REFUSED = "an update of a kind that kohya's names do not have"


def _factors(low: LowRank) -> dict[str, Tensor]:
    """Factors with as many axes as the layer has: [r,i,*k] and [o,r,*1]; beside a core [r,i,*1]."""
    core = low.mid or low.down
    ones = [1] * (len(core.shape) - 2)
    slots = {**low.slots, "up": low.up.reshape(*low.up.shape[:2], *ones)}
    if low.mid is not None:
        slots["down"] = low.down.reshape(*low.down.shape[:2], *ones)
    return slots


def _whole(update: Additive) -> Tensor:
    """A delta as one tensor, its scaling folded in: as stored where there is none, else float32."""
    if isinstance(update, Dense) and update.scaling == 1.0:
        return update.value
    return Tensor("F32", update.shape, lambda start, stop: update.delta(start, stop).astype(np.float32))


def _strings(adapter: Adapter, tensors: Mapping[str, Tensor], known: Architecture | None) -> dict[str, str]:
    """The metadata: the source's, and what readers look for where it is not there."""
    slots = [(hit[1], tensor) for key, tensor in tensors.items() if (hit := LAYOUT.split(key))]
    plain = {slot for slot, _ in slots} <= {"down", "up", "alpha"}
    found = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": _common(str(tensor.shape[0]) for slot, tensor in slots if slot == "down"),
        "ss_network_alpha": _common(f"{tensor.item():g}" for slot, tensor in slots if slot == "alpha"),
        "ss_base_model_version": _BASES.get(known.name, "") if known else "",
    }
    strings = {key: value for key, value in adapter.metadata.strings.items() if key != TABLE}
    strings.update({key: value for key, value in found.items() if value and key not in strings})
    return kept(strings, tensors)


def _common(values: Iterable[str]) -> str:
    """The value of all, kohya's word where they differ, nothing where there are none."""
    distinct = set(values)
    return "Dynamic" if len(distinct) > 1 else "".join(distinct)


FORMAT = Format(
    name="kohya",
    title="kohya-ss/sd-scripts and LyCORIS file",
    kinds=("lora", "dora", "full", "norm"),
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
)
