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

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapter import Adapter, Loss, Metadata, is_bias
from loratool.architectures import Architecture, architecture, flatten, identify, identify_names, unflatten
from loratool.architectures.base import Shape, flat, split
from loratool.errors import FormatError, MatchError
from loratool.formats import raw
from loratool.formats.base import Evidence, Format, kept
from loratool.formats.diffusers import EMBEDDINGS, TABLE, collect, is_empty, located, remarks, shapes
from loratool.keys import Layout
from loratool.tensors import Tensor, write_safetensors
from loratool.update import Additive, Dense, DoRA, LowRank, Update, as_low_rank, trimmed

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
    aliases=(
        ("down", "_lora_down.weight"),  # seen in published files
        ("up", "_lora_up.weight"),
        ("down", ".lora_A.weight"),
        ("up", ".lora_B.weight"),
    ),
)
_NORM = {"w_norm": "diff", "b_norm": "diff_b"}
_LDM = re.compile(r"^lora_unet_(input_blocks|middle_block|output_blocks)_")
_PREFIX = re.compile(r"^lora_(unet|te\d?)_")
_LOOSE_END = re.compile(r"^([^.]*[^._])_+(?=\.)")  # lora_unet_proj_out_.alpha

# what names that are not understood speak of
_OTHERS = (
    (r"_joint_blocks_\d", "Stable Diffusion 3"),
    (r"_(double|single)_blocks_\d", "FLUX (or HunyuanVideo)"),
    (r"^lora_unet_(single_)?transformer_blocks_\d", "a diffusion transformer (SD3, FLUX, Qwen-Image)"),
    (r"_blocks_\d+_(self_attn|cross_attn|ffn)_", "Wan"),
    (r"_(layers|context_refiner|noise_refiner)_\d+_(attention|feed_forward)_", "Lumina or Z-Image"),
    (r"^lora_te\d?_encoder_block_\d|^lora_te[3-9]_", "a T5 (or further) text encoder"),
    (_LDM.pattern, "a UNet in LDM names of an unknown size"),
)
_BASES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}  # ss_base_model_version


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """kohya by its prefixes together with its suffixes."""
    found = next((key for key in evidence.keys if _PREFIX.match(key) and LAYOUT.split(key)), None)
    return f"keys such as {found}" if found else None


def read(evidence: Evidence) -> Adapter:
    """Read a kohya file. Raises FormatError for what is malformed, unknown or not supported."""
    file = evidence.file
    carried = {key: tensor for key, tensor in file.tensors.items() if key.startswith(EMBEDDINGS)}
    pairs = {_mended(key, file.tensors): t for key, t in file.tensors.items() if key not in carried}
    grouped, rest = LAYOUT.group(pairs)
    for key in rest:
        raise FormatError("a tensor whose meaning is unknown", f"{file.path}: {key}")
    built = {module: _build(module, slots, evidence) for module, slots in grouped.items()}
    known = identify(shapes(built))
    if known is None and any(_LDM.match(module) for module in built):
        known = identify_names(built)  # these names are looked up in a table or not at all
    lookups = (known.from_kohya if known else unflatten, _Base(evidence.modules).find, unflatten)
    names = {module: _name(module, lookups, file.path) for module in built}
    updates, spellings = collect(built, names, ".diff_b", file.path)
    if known:
        updates = {name: _unfolded(update, known.shapes().get(name, ())) for name, update in updates.items()}
    metadata = Metadata(
        format="kohya",
        path=evidence.path,
        weights=(evidence.weights,),
        strings=file.metadata,
        architecture=known.name if known else None,
        base_model=_base_model(file.metadata),
        warnings=(*remarks(built), *_doubts(file.metadata, updates)),
    )
    return Adapter(updates, carried, metadata, spellings)


def _mended(key: str, keys: Mapping[str, Tensor]) -> str:
    """A key without loose underscores at the end of its module, unless another has that very name."""
    mended = _LOOSE_END.sub(r"\1", key)
    return key if mended in keys else mended


def _build(module: str, slots: Mapping[str, Tensor], evidence: Evidence) -> dict[str, Update]:
    """The updates of one module, by its name in the file."""
    if is_empty(slots):
        return {}
    plain = {_NORM.get(slot, slot): tensor for slot, tensor in slots.items()}
    where = f"{evidence.path}: {module}"
    if len(plain) < len(slots):
        raise FormatError("a delta both of a layer and of a norm", where)
    try:
        found = raw.build(module, plain, {"kind": "norm"} if "w_norm" in slots else {}, evidence)
    except FormatError as error:
        raise FormatError(error.what, where, error.hint) from None
    bias = found.get(f"{module}.bias")
    if "b_norm" in slots and isinstance(bias, Dense):
        found[f"{module}.bias"] = replace(bias, kind="norm")
    return found


class _Base:
    """The modules of a base, looked up by flattened name."""

    def __init__(self, modules: Iterable[str]) -> None:
        self._table: dict[tuple[str, str], set[str]] = {}
        for module in modules:
            name = module.removeprefix("model.")
            key = _flattened(located(name) or name) or ("unet", flat(name))  # kohya's word for the main model
            self._table.setdefault(key, set()).add(located(module) or module)

    def find(self, name: str) -> str | None:
        """The module that a kohya name means. Raises MatchError where two have that name."""
        found = self._table.get(_flattened(name) or ("", ""), set())
        if len(found) > 1:
            raise MatchError("a name that two modules of the base have when flattened", f"{name}: {sorted(found)}")
        return next(iter(found), None)


def _flattened(name: str) -> tuple[str, str] | None:
    """Component and flattened body; a transformer goes by the name of a UNet, as in kohya's prefixes."""
    return split(f"unet.{name.removeprefix('transformer.')}" if name.startswith("transformer.") else name)


def _name(module: str, lookups: Iterable[Callable[[str], str | None]], where: Path) -> str:
    """The reference name of a kohya name. Raises FormatError where no lookup knows it."""
    for lookup in lookups:
        if name := lookup(module):
            return name
    for pattern, title in _OTHERS:
        if re.search(pattern, module):
            raise FormatError(f"names of {title}, which is not supported yet", f"{where}: {module}")
    raise FormatError(
        "a flattened name that no known model has",
        f"{where}: {module}",
        "--base names the modules it may mean",
    )


def _unfolded(update: Update, weight: Shape) -> Update:
    """A LoRA whose down factor holds the kernel flattened [r,i*k], as [r,i,*k]; others as they are."""
    if not isinstance(update, LowRank) or len(trimmed(weight)) < 3 or len(update.shape) > 2:
        return update
    if update.shape[1] != math.prod(weight[1:]):
        return update
    return replace(update, down=update.down.reshape(update.rank, *weight[1:]))


def _base_model(strings: Mapping[str, str]) -> str | None:
    told = (strings.get(key) for key in ("ss_sd_model_name", "ss_base_model_version"))
    return next((name for name in told if name and name != "None"), None)


def _doubts(strings: Mapping[str, str], updates: Mapping[str, Update]) -> list[str]:
    """What the training arguments make doubtful."""
    try:
        told = json.loads(strings.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        told = {}
    arguments = told if isinstance(told, dict) else {}
    found = []
    if _is_true(arguments.get("split_qkv")):
        found.append("trained with split_qkv: the stored alpha is that of each part, so its fused modules act too weak")
    if _is_true(arguments.get("dora_wd")) and not any(isinstance(u, DoRA) for u in updates.values()):
        found.append("trained as DoRA (dora_wd), but there is no dora_scale: it is read as plain LoRA")
    return found


def _is_true(value: Any) -> bool:
    """Whether a value that trainers store as text is true: "False" and "None" are not."""
    return str(value).strip().lower() in ("true", "1", "yes", "on")


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
