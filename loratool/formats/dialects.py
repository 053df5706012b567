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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, Loss, Metadata
from loratool.architectures import Architecture, architecture, identify, identify_names, told, unflatten
from loratool.architectures.base import Piece, Shape, flat
from loratool.architectures.base import split as prefix_split
from loratool.errors import FormatError, LoratoolError, MatchError, NumericError, some
from loratool.formats import peft, raw
from loratool.formats.base import Evidence
from loratool.formats.modules import Holder, Locate, Module, gathered, split
from loratool.formats.peft.config import Scales as PeftScales
from loratool.formats.peft.config import mutating
from loratool.keys import Layout
from loratool.tensors import SafetensorsFile, Tensor
from loratool.update import DoRA, LowRank, Update, trimmed

if TYPE_CHECKING:
    from loratool.formats.slots import Parts

_ONE_SPELLING = (
    *("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "weight", "on_input", "rescale", "oft_diag"),
    *("bias_indices", "bias_values", "bias_size"),
    *("glora_a1", "glora_a2", "glora_b1", "glora_b2"),
)
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
        *((f"hada_{leaf}", f".hada_{leaf}") for leaf in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *((f"lokr_{leaf}", f".lokr_{leaf}") for leaf in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")),
        *((f"glora_{leaf}", f".{leaf}.weight") for leaf in ("a1", "a2", "b1", "b2", "bm")),
        ("weight", ".weight"),  # with on_input: a difference, not a weight
        ("on_input", ".on_input"),
        ("oft_blocks", ".oft_blocks"),
        *((f"oft_blocks.{n}", f".oft_blocks.{n}") for n in range(8)),
        ("oft_diag", ".oft_diag"),
        ("rescale", ".rescale"),
        ("oft_R", ".oft_R.weight"),
        ("oft_R", ".oft_R"),
        ("scaled_oft", ".oft_R.scaled_oft"),
        ("boft_R", ".boft_R"),
        ("boft_s", ".boft_s"),
        ("ia3_l", ".ia3_l"),
        ("bias_indices", ".bias_indices"),
        ("bias_values", ".bias_values"),
        ("bias_size", ".bias_size"),
        ("set_weight", ".set_weight"),
        ("reshape_weight", ".reshape_weight"),
    ),
)
WRITTEN = Layout(
    slots=(
        ("down", ".lora_down.weight"),
        ("up", ".lora_up.weight"),
        ("mid", ".lora_mid.weight"),
        *((slot, suffix) for slot, suffix in READ.aliases if suffix.startswith((".hada_", ".lokr_", ".oft_blocks"))),
        *((slot, suffix) for slot, suffix in READ.aliases if slot in _ONE_SPELLING),
    )
)
WEAK = ("scale", "weight")  # slots whose suffixes other tensors have too: they show no dialect
NATIVE = "diffusion_model."  # ComfyUI's prefix of the original repository's names
TABLE = "lora_adapter_metadata"  # metadata of diffusers: LoRA configurations by component, JSON
EMBEDDINGS = "bundle_emb."  # textual inversions that travel along
_EMBEDDING = re.compile(r"^<[^>]+>$")  # a token of cloneofsimo/lora
_IGNORED = "_aux."  # bookkeeping of slider trainers

_COMPONENT = re.compile(r"^(unet|transformer(_\d)?|text_encoder(_\d)?)\.")
_RENAMED = {  # OneTrainer's names of the components; which text encoder a T5 is, the model tells
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoders.t5xxl.transformer",
}
_HEADS = {  # the first segment of a module in a bare model -> the component that has it
    **dict.fromkeys(("down_blocks", "mid_block", "up_blocks"), "unet"),
    **dict.fromkeys(("conv_in", "conv_norm_out", "conv_out", "time_embedding", "add_embedding"), "unet"),
    **dict.fromkeys(("transformer_blocks", "single_transformer_blocks"), "transformer"),
    "text_model": "text_encoder",
}
# language models whose own first segment is `transformer`: GPT-2, Falcon, Bloom, MPT, DBRX, ChatGLM, XLNet
_LANGUAGE_MODEL = re.compile(
    r"^transformer\.(h|layer|encoder|wte|wpe|ln_f|word_embeddings|embedding|output_layer)\b"
    r"|^transformer\.blocks\.\d+\.(attn\.(Wqkv|out_proj)|ffn\.(up_proj|down_proj|gate_proj|experts|router)|norm_attn_norm\.)"
)
_LDM = re.compile(r"^lora_unet_(input_blocks|middle_block|output_blocks)_")
_LOOSE_END = re.compile(r"^([^.]*[^._])_+(?=\.)")  # lora_unet_proj_out_.alpha

Pieces = Callable[[str, Shape], tuple[Piece, ...]]
"""What a module of that name and shape is, beyond what architectures know."""
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

    def __init__(
        self, shapes: Mapping[str, Shape], evidence: Evidence, pieces: Pieces, hint: str | None = None
    ) -> None:
        self._own = pieces
        shapes = {name: shape for name, shape in shapes.items() if not pieces(name, shape)}
        self.known = identify(shapes, hint)
        if self.known is None and any(map(_LDM.match, shapes)):
            self.known = identify_names(shapes)  # these names are looked up in a table or not at all
        self._lookups = (_Base(evidence.modules).find, unflatten)
        self._where = evidence.path

    def pieces(self, name: str, shape: Shape, spelled: str) -> tuple[Piece, ...]:
        """The reference modules that a stored one is; ``spelled`` is for messages.

        Raises FormatError where nothing knows the name.
        """
        if own := self._own(name, shape):
            return own
        if self.known and (pieces := self.known.pieces(name, shape)):
            return pieces
        return (Piece(self._find(name, spelled), ((0, shape[0] if shape else 1),)),)

    def _find(self, name: str, spelled: str) -> str:
        for lookup in self._lookups:
            if found := lookup(name):
                return found
        if has_component(name):
            return name
        if name.startswith(NATIVE):  # of a model that no table knows: the base must have the very name
            return name.removeprefix(NATIVE)
        raise FormatError(
            "a flattened name that no known model has" if "." not in name else "a module whose meaning is unknown",
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
    return prefix_split(f"unet.{name.removeprefix('transformer.')}" if name.startswith("transformer.") else name)


# ---------------------------------------------------------------- reading


def read(
    evidence: Evidence,
    format: str,
    rename: Rename = as_it_is,
    file: SafetensorsFile | None = None,
    pieces: Pieces = lambda name, shape: (),
) -> Adapter:
    """Read a file of any dialect. ``pieces`` knows what the architecture does not: fused modules of the dialect's own.

    Raises FormatError for what is malformed, unknown or not supported.
    """
    file = file or evidence.file
    carried, carried_as, pairs, warnings = _sorted_out(file)
    modules = _grouped(pairs, rename, file.path)
    scales = Scales(file.metadata, evidence)
    built = {spelled: build(spelled, stored, scales) for spelled, stored in modules.items()}
    named = {modules[spelled].name: shape for spelled, shape in shapes(built).items()}
    names = Names(named, evidence, pieces, told(file.metadata))
    updates, spellings = collect(built, modules, names, file.path)
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
    """The updates of one module. Raises FormatError for slots that do not fit."""
    from loratool.formats import slots

    if slots.is_empty(stored.slots):
        return {}
    where = f"{scales.where}: {spelled}"
    try:
        found = slots.build(spelled, stored.slots, partial(scales.alpha_of, stored.name), scales.arguments)
    except (FormatError, MatchError) as error:
        raise FormatError(error.what, where, error.hint) from None
    for update in found.values():
        if update.alpha is not None and not math.isfinite(update.alpha):
            raise NumericError(f"alpha is {update.alpha}", where)
    return found


class Scales:
    """What a file says of the scaling of its modules: alphas of their own, or a LoRA configuration by component."""

    def __init__(self, strings: Mapping[str, str], evidence: Evidence) -> None:
        self.where, self.override = evidence.path, evidence.scaling
        self.arguments = _arguments(strings)
        self.tables = read_tables(strings, evidence.path)
        self._of = {component: Table(table, evidence) for component, table in self.tables.items()}

    def alpha_of(self, module: str, given: dict[str, Tensor], rank: int) -> tuple[float | None, bool]:
        """(alpha, rank-stabilised) of a module; a tensor of its own wins. Raises FormatError when ranks disagree."""
        if "scale" in given:  # A1111: instead of alpha / rank
            given.pop("alpha", None)
            return given.pop("scale").item() * rank, False
        if "alpha" in given:
            return given.pop("alpha").item(), False
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
        if (init := mutating(table)) is not None:
            raise FormatError(f"init_lora_weights {init!r} changed the base, so this is no delta of it", evidence.path)
        self._scales = PeftScales(table, evidence)
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
    built: Mapping[str, Parts], modules: Mapping[str, Stored], names: Names, where: Path
) -> tuple[dict[str, Update], dict[str, str]]:
    """Updates by target, and the spellings of targets, from those by the source's modules.

    Fused modules are split; modules that mean one target are summed. Raises FormatError where updates cannot be split
    or do not add up.
    """
    updates: dict[str, Update] = {}
    spellings: dict[str, str] = {}
    for source, found in built.items():
        weight = found.get("") or next(iter(found.values()), None)
        pieces = names.pieces(modules[source].name, weight.shape, source) if weight else ()
        for leaf, update in found.items():
            spelling = modules[source].bias_key if leaf else source
            try:
                if len(pieces) > 1 and weight and update.shape[:1] != weight.shape[:1]:
                    raise FormatError(f"a bias of shape {list(update.shape)} beside a weight of {list(weight.shape)}")
                for reference, part in split(update, pieces).items():
                    _put(updates, spellings, reference + leaf, part, spelling)
            except LoratoolError as error:
                raise FormatError(error.what, f"{where}: {error.where or spelling}", error.hint) from None
    return updates, spellings


def _put(updates: dict[str, Update], spellings: dict[str, str], target: str, update: Update, spelling: str) -> None:
    """Add an update of a target. Raises LoratoolError where it has another that this does not add up with."""
    if target not in updates:
        updates[target], spellings[target] = update, spelling
        return
    both = f"{spellings[target]} and {spelling}"
    try:
        updates[target], spellings[target] = raw.join(updates[target], update), f"{spellings[target]} + {spelling}"
    except LoratoolError as error:
        raise FormatError(error.what, both, error.hint) from None


def _unfolded(update: Update, weight: Shape) -> Update:
    """An update that holds a kernel flattened, such as a LoRA with down [r,i*k], for a weight of that shape."""
    if weight and not isinstance(update, LowRank):
        return update.sized(weight) or update
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
    from loratool.formats import slots

    arguments = _arguments(strings)
    found = []
    if slots.is_true(arguments.get("split_qkv")):
        found.append("trained with split_qkv: the stored alpha is that of each part, so its fused modules act too weak")
    if slots.is_true(arguments.get("dora_wd")) and not any(isinstance(u, DoRA) for u in updates.values()):
        found.append("trained as DoRA (dora_wd), but there is no dora_scale: it is read as plain LoRA")
    return found


def _arguments(strings: Mapping[str, str]) -> Mapping[str, Any]:
    """The arguments of kohya's or LyCORIS' training, as far as they can be read."""
    try:
        told = json.loads(strings.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        told = {}
    return told if isinstance(told, dict) else {}


# ---------------------------------------------------------------- writing


def referenced(adapter: Adapter) -> tuple[Adapter, Architecture | None]:
    """The adapter with the names of its architecture's reference, and that; fused modules are split."""
    known = architecture(adapter.metadata.architecture or "") or identify(shapes_of(adapter))
    strangers = [name for name in adapter.modules() if located(name) is None]
    if known is None or not strangers:
        return adapter, known
    updates, spellings = dict(adapter.updates), dict(adapter.spellings)
    for name in strangers:
        pieces = known.pieces(name, updates[name].shape)
        for leaf in ("", ".bias"):
            if pieces and name + leaf in updates:
                spelling = adapter.spelling(name + leaf)
                for reference, part in split(updates.pop(name + leaf), pieces).items():
                    _put(updates, spellings, reference + leaf, part, spelling)
    return replace(adapter, updates=updates, spellings=spellings), known


def shapes_of(adapter: Adapter) -> dict[str, Shape]:
    """The shapes of an adapter's updates by reference name, where nothing else tells by their own."""
    return {located(name) or name: update.shape for name, update in adapter.modules().items()}


Fit = Callable[[Update], Update | str]
"""An update as readers of a format take it, the same exactly, or why they cannot."""


def say(
    adapter: Adapter,
    holder: Holder,
    spelled: Callable[[Module], str] = lambda module: module.name,
    layout: Layout = WRITTEN,
    fit: Fit = lambda update: update,
    locate: Locate | None = None,
) -> tuple[dict[str, Tensor], list[Loss]]:
    """The tensors of a file in LyCORIS' slots, and what they cannot say; ``fit`` knows what readers cannot take."""
    tensors = {name: tensor for name, tensor in adapter.carried.items() if name.startswith(EMBEDDINGS)}
    lost = [Loss(adapter.spelling(name), "a whole tensor; only adapters are loaded") for name in adapter.carried]
    lost = [loss for loss, name in zip(lost, adapter.carried, strict=True) if name not in tensors]
    modules, unnamed = gathered(adapter, locate or located, holder)
    for module in modules:
        said = _said(module, layout, fit)
        found = {} if isinstance(said, str) else {layout.key(spelled(module), slot): t for slot, t in said.items()}
        if found.keys() & tensors.keys():
            said = "another module has this very name"
        if isinstance(said, str):
            lost += [Loss(adapter.spelling(target), said) for target in module.targets]
        else:
            tensors.update(found)
    return tensors, lost + unnamed


def _said(module: Module, layout: Layout, fit: Fit) -> dict[str, Tensor] | str:
    """The tensors of a module by slot, or why it cannot be said."""
    from loratool.formats.said import said, said_of_bias

    update = module.update if isinstance(module.update, str) else fit(module.update)
    if isinstance(update, str):
        return update
    found = said_of_bias(update, module.norm) if module.bias else said(update)
    if not isinstance(found, str) and (strange := found.keys() - layout.suffixes.keys()):
        return f"an update whose {' and '.join(sorted(strange))} has no place here"
    return found
