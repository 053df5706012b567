"""What the dialects of image and video models share: one reader.

In published files four things vary independently: the prefix, the names of modules, the suffixes, and what tells
alpha. Each is normalised by itself, so that a file may mix them; a dialect only says how it renames what is its own.
Suffixes are those of kohya-ss/sd-scripts, KohakuBlueleaf/LyCORIS, huggingface/diffusers (all generations), PEFT,
ostris/ai-toolkit, ComfyUI, XLabs-AI/x-flux and cloneofsimo/lora.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, Metadata
from loratool.architectures import identify, identify_names, unflatten
from loratool.architectures.base import Shape, flat, split
from loratool.errors import FormatError, LoratoolError, MatchError, NumericError, some
from loratool.formats import peft, raw
from loratool.formats.base import Evidence
from loratool.keys import Layout, require_pair
from loratool.tensors import FLOATS, SafetensorsFile, Tensor
from loratool.update import Dense, DoRA, LowRank, Update, trimmed

READ = Layout(
    slots=(),
    aliases=(
        ("down", ".lora_down.weight"),
        ("up", ".lora_up.weight"),
        ("down", "_lora_down.weight"),  # seen in published files
        ("up", "_lora_up.weight"),
        ("down", ".lora_down"),
        ("up", ".lora_up"),
        ("down", ".lora_A.weight"),
        ("up", ".lora_B.weight"),
        ("down", ".lora_A"),
        ("up", ".lora_B"),
        ("down", ".lora.down.weight"),
        ("up", ".lora.up.weight"),
        ("down", "_lora.down.weight"),
        ("up", "_lora.up.weight"),
        ("down", ".lora_linear_layer.down.weight"),
        ("up", ".lora_linear_layer.up.weight"),
        ("down", ".down.weight"),
        ("up", ".up.weight"),
        ("down", ":down"),
        ("up", ":up"),
        ("bias", ".lora_B.bias"),
        ("mid", ".lora_mid.weight"),
        ("alpha", ".alpha"),
        ("scale", ".scale"),
        ("dora_scale", ".dora_scale"),
        ("magnitude", ".lora_magnitude_vector.weight"),
        ("magnitude", ".lora_magnitude_vector"),
        ("magnitude", ".magnitude"),
        ("diff", ".diff"),
        ("diff_b", ".diff_b"),
        ("w_norm", ".w_norm"),
        ("b_norm", ".b_norm"),
    ),
)
WEAK = ("scale", "weight")  # slots whose suffixes other tensors have too: they show no dialect
TABLE = "lora_adapter_metadata"  # metadata of diffusers: LoRA configurations by component, JSON
EMBEDDINGS = "bundle_emb."  # textual inversions that travel along
_EMBEDDING = re.compile(r"^<[^>]+>$")  # a token of cloneofsimo/lora
_IGNORED = "_aux."  # bookkeeping of slider trainers
_ANY_DTYPE = ("alpha", "scale")
_NORM = {"w_norm": "diff", "b_norm": "diff_b"}

_COMPONENT = re.compile(r"^(unet|transformer(_\d)?|text_encoder(_\d)?)\.")
_RENAMED = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # OneTrainer's names of the components
_HEADS = {  # the first segment of a module in a bare model -> the component that has it
    **dict.fromkeys(("down_blocks", "mid_block", "up_blocks"), "unet"),
    **dict.fromkeys(("conv_in", "conv_norm_out", "conv_out", "time_embedding", "add_embedding"), "unet"),
    **dict.fromkeys(("transformer_blocks", "single_transformer_blocks"), "transformer"),
    "text_model": "text_encoder",
}
# language models whose own first segment is `transformer`: GPT-2, Falcon, Bloom, MPT, DBRX, ChatGLM, XLNet
_LANGUAGE_MODEL = re.compile(
    r"^transformer\.(h|layer|encoder|wte|wpe|ln_f|word_embeddings|embedding|output_layer)\b"
    r"|^transformer\.blocks\.\d+\.(attn\.(Wqkv|out_proj)|ffn\.|norm_attn_norm\.)"
)
_LDM = re.compile(r"^lora_unet_(input_blocks|middle_block|output_blocks)_")
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

Rename = Callable[[str, str], tuple[str, str]]
"""(module, slot) as a file has them -> as the reader knows them."""


@dataclass
class Stored:
    """One module of a file: the name that it is looked up by, and its tensors."""

    name: str
    slots: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def bias_key(self) -> str:
        """The key that holds its bias delta."""
        return " + ".join(self.keys[slot] for slot in ("bias", "diff_b", "b_norm") if slot in self.keys)


Parts = Mapping[str, Update]
"""The updates of one module: "" of its weight, ".bias" of its bias."""


def as_it_is(module: str, slot: str) -> tuple[str, str]:
    """No renaming."""
    return module, slot


# ---------------------------------------------------------------- names


def located(name: str) -> str | None:
    """The reference name of a module: behind its pipeline component. None where nothing tells which one that is."""
    if _LANGUAGE_MODEL.match(name):
        return None
    name = behind_component(name)
    return (unflatten(name) or name) if has_component(name) else None


def behind_component(name: str) -> str:
    """A name behind its component, where nothing but the component lacks."""
    component = None if has_component(name) else _HEADS.get(name.partition(".")[0])
    return f"{component}.{name}" if component else name


def component_of(name: str) -> str:
    """The pipeline component of a name that has one."""
    return name.partition(".")[0]


def by_component(names: Iterable[str]) -> dict[str, list[str]]:
    """Names grouped by their pipeline component."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(component_of(name), []).append(name)
    return groups


def has_component(name: str) -> bool:
    """Whether a name begins with a pipeline component."""
    return bool(_COMPONENT.match(name))


def is_language_model(name: str) -> bool:
    """Whether it is the name of a language model that has a component's name itself."""
    return bool(_LANGUAGE_MODEL.match(name))


def is_slot(key: str) -> bool:
    """Whether a key ends as an adapter's tensors do, and only these."""
    found = READ.split(peft.without_adapter_name(key))
    return found is not None and found[1] not in WEAK


def normalise(module: str) -> str:
    """A module whose prefixes stand once, without the names of PEFT's wrapper and of the adapter."""
    head, _, body = peft.normalise(module).partition(".")
    component = _RENAMED.get(head, head)
    body = peft.normalise(body)
    while body.startswith(f"{component}."):
        body = peft.normalise(body.removeprefix(f"{component}."))
    return f"{component}.{body}" if body else component


class Names:
    """What turns the names of one file into references: tables of known models, the base, templates of names."""

    def __init__(self, shapes: Mapping[str, Shape], evidence: Evidence) -> None:
        self.known = identify(shapes)
        if self.known is None and any(map(_LDM.match, shapes)):
            self.known = identify_names(shapes)  # these names are looked up in a table or not at all
        table = self.known.from_kohya if self.known else unflatten
        self._lookups = (table, _Base(evidence.modules).find, unflatten)
        self._where = evidence.path

    def find(self, name: str, spelled: str) -> str:
        """The reference of a name; ``spelled`` is for messages. Raises FormatError where nothing knows it."""
        for lookup in self._lookups:
            if found := lookup(name):
                return found
        if has_component(name):
            return name
        for pattern, title in _OTHERS:
            if re.search(pattern, name):
                raise FormatError(f"names of {title}, which is not supported yet", f"{self._where}: {spelled}")
        raise FormatError(
            "a flattened name that no known model has" if "." not in name else "a tensor whose meaning is unknown",
            f"{self._where}: {spelled}",
            "--base names the modules it may mean",
        )


class _Base:
    """The modules of a base, looked up by flattened name."""

    def __init__(self, modules: Iterable[str]) -> None:
        self._table: dict[tuple[str, str], set[str]] = {}
        for module in modules:
            name = module.removeprefix("model.")
            key = _flattened(located(name) or name) or ("unet", flat(name))  # kohya's word for the main model
            self._table.setdefault(key, set()).add(located(module) or module)

    def find(self, name: str) -> str | None:
        """The module that a name means. Raises MatchError where two have that name."""
        found = self._table.get(_flattened(name) or ("", ""), set())
        if len(found) > 1:
            raise MatchError("a name that two modules of the base have when flattened", f"{name}: {sorted(found)}")
        return next(iter(found), None)


def _flattened(name: str) -> tuple[str, str] | None:
    """Component and flattened body; a transformer goes by the name of a UNet, as in kohya's prefixes."""
    return split(f"unet.{name.removeprefix('transformer.')}" if name.startswith("transformer.") else name)


# ---------------------------------------------------------------- reading


def read(evidence: Evidence, format: str, rename: Rename = as_it_is, file: SafetensorsFile | None = None) -> Adapter:
    """Read a file of any dialect. Raises FormatError for what is malformed, unknown or not supported."""
    file = file or evidence.file
    carried, carried_as, pairs, warnings = _sorted_out(file)
    modules = _grouped(pairs, rename, file.path)
    scales = Scales(file.metadata, evidence)
    built = {spelled: build(spelled, stored, scales) for spelled, stored in modules.items()}
    names = Names({modules[spelled].name: shape for spelled, shape in shapes(built).items()}, evidence)
    references = {spelled: names.find(stored.name, spelled) for spelled, stored in modules.items()}
    updates, spellings = collect(built, references, modules, file.path)
    if names.known:
        updates = {name: _unfolded(u, names.known.shapes().get(name, ())) for name, u in updates.items()}
    doubts = _doubts(file.metadata, updates)
    metadata = Metadata(
        format=format,
        path=evidence.path,
        weights=(evidence.weights,),
        strings=file.metadata,
        architecture=names.known.name if names.known else None,
        base_model=_base_model(file.metadata),
        warnings=(*warnings, *scales.warnings(modules), *remarks(built), *doubts),
    )
    return Adapter(updates, carried, metadata, {**carried_as, **spellings})


def _sorted_out(file: SafetensorsFile) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor], list[str]]:
    """What travels along and its spellings, what belongs to modules, and warnings of what is left out."""
    carried = {_EMBEDDING.sub(rf"{EMBEDDINGS}\g<0>.emb_params", key): key for key in file.tensors if _is_embedding(key)}
    ignored = [key for key in file.tensors if key.startswith(_IGNORED)]
    apart = {*carried.values(), *ignored}
    pairs = {key: tensor for key, tensor in file.tensors.items() if key not in apart}
    warnings = [f"left out, bookkeeping of a trainer that means nothing: {some(ignored)}"] if ignored else []
    spellings = {name: key for name, key in carried.items() if name != key}
    return {name: file.tensors[key] for name, key in carried.items()}, spellings, pairs, warnings


def _is_embedding(key: str) -> bool:
    return key.startswith(EMBEDDINGS) or bool(_EMBEDDING.match(key))


def _grouped(tensors: Mapping[str, Tensor], rename: Rename, where: Path) -> dict[str, Stored]:
    """The modules of a file by their own names. Raises FormatError for what no suffix fits."""
    modules: dict[str, Stored] = {}
    for key, tensor in tensors.items():
        found = READ.split(peft.without_adapter_name(_mended(key, tensors)))
        if found is None:
            raise FormatError("a tensor whose meaning is unknown", f"{where}: {key}")
        name, slot = rename(*found)
        module = modules.setdefault(found[0], Stored(normalise(name)))
        if slot in module.slots or module.name != normalise(name):
            raise FormatError(f"two tensors for {slot} of one module", f"{where}: {key}")
        module.slots[slot], module.keys[slot] = tensor, key
    return modules


def _mended(key: str, keys: Mapping[str, Tensor]) -> str:
    """A key without loose underscores at the end of its module, unless another has that very name."""
    mended = _LOOSE_END.sub(r"\1", key)
    return key if mended in keys else mended


# ---------------------------------------------------------------- one module


def build(spelled: str, stored: Stored, scales: Scales) -> Parts:
    """The updates of one module: of its weight, and ``.bias``. Raises FormatError for slots that do not fit."""
    if is_empty(stored.slots):
        return {}
    where = f"{scales.where}: {spelled}"
    slots = {_NORM.get(slot, slot): tensor for slot, tensor in stored.slots.items()}
    if len(slots) < len(stored.slots):
        raise FormatError("a delta both of a layer and of a norm", where)
    norm = "norm" if "w_norm" in stored.slots or "b_norm" in stored.slots else None
    try:
        found = _built(slots, norm, stored.name, scales)
    except FormatError as error:
        raise FormatError(error.what, where, error.hint) from None
    for update in found.values():
        if update.alpha is not None and not math.isfinite(update.alpha):
            raise NumericError(f"alpha is {update.alpha}", where)
    return found


def _built(slots: dict[str, Tensor], norm: str | None, name: str, scales: Scales) -> Parts:
    """The updates of one module's slots, each of which must be used."""
    for slot, tensor in slots.items():
        if slot not in _ANY_DTYPE and tensor.dtype not in FLOATS:
            raise FormatError(f"{slot} is stored as {tensor.dtype}")
    rest = dict(slots)
    found: dict[str, list[Update]] = {}
    if "diff" in rest:
        found.setdefault("", []).append(Dense(rest.pop("diff"), 1.0, norm or "full"))
    if "diff_b" in rest:
        found.setdefault(".bias", []).append(Dense(rest.pop("diff_b"), 1.0, norm or "bias"))
    if rest:
        low = _low_rank(rest, name, scales)
        bias = rest.pop("bias", None)
        if bias is not None:
            found.setdefault(".bias", []).append(Dense(bias, low.scaling, "bias"))
        found.setdefault("", []).append(_with_magnitude(low, rest))
    if rest:
        raise FormatError(f"{' and '.join(sorted(rest))} of a module that cannot have such")
    return {leaf: reduce(raw.join, updates) for leaf, updates in found.items()}


def _low_rank(slots: dict[str, Tensor], name: str, scales: Scales) -> LowRank:
    """The LoRA of one module, whose slots it takes."""
    require_pair(name, slots, scales.where)
    down, up, mid = slots.pop("down"), slots.pop("up"), slots.pop("mid", None)
    alpha, stabilised = scales.alpha_of(name, slots, down.shape[0] if down.shape else 0)
    return LowRank(down, up, mid, alpha, stabilised)


def _with_magnitude(direction: LowRank, slots: dict[str, Tensor]) -> Update:
    """The DoRA of a direction, where there is a magnitude."""
    if {"magnitude", "dora_scale"} <= slots.keys():
        raise FormatError("both lora_magnitude_vector and dora_scale")
    if "magnitude" in slots:  # PEFT's are of outputs, whatever their shape
        return DoRA(direction, slots.pop("magnitude"), 0)
    if "dora_scale" in slots:
        scale = slots.pop("dora_scale")
        return DoRA(direction, scale, raw.magnitude_axis(scale))
    return direction


def is_empty(slots: Mapping[str, Tensor]) -> bool:
    """Whether a module has rank 0: it changes nothing (some tools that reduce ranks leave such)."""
    return {"down", "up"} <= set(slots) and slots["down"].shape[:1] == (0,) and slots["up"].shape[1:2] == (0,)


class Scales:
    """What a file says of the scaling of its modules: alphas of their own, or a LoRA configuration by component."""

    def __init__(self, strings: Mapping[str, str], evidence: Evidence) -> None:
        self.where, self.override = evidence.path, evidence.scaling
        self.tables = read_tables(strings, evidence.path)
        self._of = {component: Table(table, evidence) for component, table in self.tables.items()}

    def alpha_of(self, module: str, slots: dict[str, Tensor], rank: int) -> tuple[float | None, bool]:
        """(alpha, rank-stabilised) of a module; a tensor of its own wins. Raises FormatError when ranks disagree."""
        if "scale" in slots:  # A1111: instead of alpha / rank
            slots.pop("alpha", None)
            return slots.pop("scale").item() * rank, False
        if "alpha" in slots:
            return slots.pop("alpha").item(), False
        table = self._of.get(component_of(module))
        if table is not None:
            return table.alpha_of(module, rank)
        return (None if self.override is None else self.override * rank), False

    def warnings(self, modules: Mapping[str, Stored]) -> list[str]:
        """What is odd about the configurations."""
        found = [warning for table in self._of.values() for warning in table.warnings]
        dora = {component_of(m.name) for m in modules.values() if {"magnitude", "dora_scale"} & m.slots.keys()}
        there = {component_of(m.name) for m in modules.values()}
        for component, table in self.tables.items():
            if table.get("use_dora") and component in there - dora:
                found.append(f"the metadata says DoRA, but {component} has no magnitudes: it is read as plain LoRA")
        return found


class Table:
    """The LoRA configuration of one component."""

    def __init__(self, table: Mapping[str, Any], evidence: Evidence) -> None:
        peft.refuse(table, evidence.path)
        self._scales = peft.Scales(table, evidence)
        self._named = namer(table)

    @property
    def warnings(self) -> list[str]:
        """What is odd about it."""
        return self._scales.warnings

    def alpha_of(self, module: str, rank: int) -> tuple[float | None, bool]:
        """(alpha, rank-stabilised) of a module. Raises FormatError when the ranks disagree."""
        try:
            return self._scales.alpha_of(self._named(module), rank), self._scales.rank_stabilised
        except FormatError as error:
            raise FormatError(error.what, module, f"correct {TABLE}, or give --scaling") from None


def namer(table: Mapping[str, Any]) -> Callable[[str], str]:
    """What turns a name into the module that the patterns of a table mean.

    transformers 5 keeps CLIP without ``text_model``, files have it: patterns may have either.
    """
    patterns = [key for field in ("rank_pattern", "alpha_pattern") for key in table.get(field) or ()]
    spelled_out = any("text_model" in key for key in patterns)
    return lambda name: name.partition(".")[2].removeprefix("" if spelled_out else "text_model.")


def read_tables(strings: Mapping[str, str], where: Path) -> dict[str, dict[str, Any]]:
    """The LoRA configuration of each component, as the metadata tells it. Raises FormatError."""
    try:
        table = json.loads(strings.get(TABLE, "{}"))
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise FormatError(f"the metadata {TABLE} is no JSON table", where)
    found: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        component, _, name = key.partition(".")
        found.setdefault(component, {})[name] = value
    return found


# ---------------------------------------------------------------- all modules


def shapes(built: Mapping[str, Parts]) -> dict[str, Shape]:
    """The shape of each module's update; () where only its bias has one."""
    return {module: found[""].shape if "" in found else () for module, found in built.items()}


def collect(
    built: Mapping[str, Parts], references: Mapping[str, str], modules: Mapping[str, Stored], where: Path
) -> tuple[dict[str, Update], dict[str, str]]:
    """Updates by target, and the spellings of targets, from those by the source's modules.

    Modules that ``references`` gives one target are summed. Raises FormatError where updates do not add up.
    """
    updates: dict[str, Update] = {}
    spellings: dict[str, str] = {}
    for source, found in built.items():
        for leaf, update in found.items():
            target = references[source] + leaf
            spelling = modules[source].bias_key if leaf else source
            if target in updates:
                try:
                    update = raw.join(updates[target], update)
                except LoratoolError as error:
                    raise FormatError(error.what, f"{where}: {spellings[target]} and {spelling}") from None
                spelling = f"{spellings[target]} + {spelling}"
            updates[target], spellings[target] = update, spelling
    return updates, spellings


def _unfolded(update: Update, weight: Shape) -> Update:
    """A LoRA whose down factor holds the kernel flattened [r,i*k], as [r,i,*k]; others as they are."""
    if not isinstance(update, LowRank) or len(trimmed(weight)) < 3 or len(update.shape) > 2:
        return update
    if update.shape[1] != math.prod(weight[1:]):
        return update
    return replace(update, down=update.down.reshape(update.rank, *weight[1:]))


def remarks(built: Mapping[str, Parts]) -> list[str]:
    """Warnings of modules without alpha and of modules of rank 0."""
    lows = [update for found in built.values() for update in found.values() if update.rank is not None]
    missing, empty = sum(low.alpha is None for low in lows), sum(not found for found in built.values())
    warnings = [f"alpha is missing for {missing} of {len(lows)} modules: their scaling is 1"] if missing else []
    return warnings + ([f"{empty} modules of rank 0 change nothing and are left out"] if empty else [])


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
