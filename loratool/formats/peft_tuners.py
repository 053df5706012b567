"""PEFT's tuners beside LoRA: one row of a table each, read and written as themselves.

A row says how a type names its tensors (by module, and those that all modules share under ``base_model.``), which
fields of the configuration its mathematics needs, and how its updates are built from them. Fields that only guide the
training (initialisation, dropout) are kept as they are. What cannot be told from the file is refused by name.
Source: huggingface/peft 0.21.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapter import Adapter, is_bias
from loratool.errors import FormatError, MatchError
from loratool.formats.base import CONFIG, Evidence
from loratool.formats.peft_config import Patterns, listed
from loratool.keys import Layout
from loratool.kinds.based import (
    BiasShift,
    BlockAffine,
    BoneAffine,
    Frod,
    Glora,
    Hira,
    Householder,
    Injection,
    LnTuning,
    Road,
    Subspace,
)
from loratool.kinds.composed import Circulant, Fourier, Shira, Supertuning, Wavelet
from loratool.kinds.factored import (
    AdaLora,
    Bone,
    ChosenMixtures,
    Delora,
    Gralora,
    Miss,
    Mixtures,
    Pvera,
    RandLora,
    Tinylora,
    Unilora,
    Vera,
    drawn,
)
from loratool.kinds.hadamard import LoHa
from loratool.kinds.kronecker import LoKr
from loratool.kinds.rescale import IA3
from loratool.kinds.rotation import PeftBOFT, PeftOFT, PeftOldOFT
from loratool.kinds.tokens import Tokens
from loratool.kinds.tuner import Fixed, axes
from loratool.model import Model
from loratool.names import Names, Unmatched, stores_transposed
from loratool.tensors import FLOATS, Tensor
from loratool.update import LowRank, Update

PREFIX = "base_model.model."
SHARED = "base_model."  # before the names of what all modules share

Slots = dict[str, Tensor]


@dataclass(frozen=True)
class Words:
    """The configuration, read with its types checked. ``where`` is named in errors.

    ``pool`` are numbered tensors of the whole adapter, ``modules`` is the number of its modules.
    """

    table: Mapping[str, Any]
    where: Path
    pool: tuple[Tensor, ...] = ()
    modules: int = 0

    def number(self, name: str, default: float) -> float:
        """A finite number. Raises FormatError."""
        value = self.table.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise FormatError(f"{name} is {value!r}, not a number", self.where)
        return value

    def count(self, name: str, default: int) -> int:
        """A whole number from 0 to 2^62. Raises FormatError."""
        value = self.number(name, default)
        if value != int(value) or not 0 <= value < 1 << 62:
            raise FormatError(f"{name} is {value!r}, not a whole number", self.where)
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false. Raises FormatError."""
        value = self.table.get(name)
        if value is not None and not isinstance(value, bool):
            raise FormatError(f"{name} is {value!r}, not true or false", self.where)
        return default if value is None else value

    def table_of(self, name: str) -> Mapping[str, Any]:
        """A table, empty where there is none. Raises FormatError."""
        value = self.table.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise FormatError(f"{name} is not a table", self.where)
        return value or {}

    def fits(self, pattern: str, module: str) -> bool:
        """Whether a regular expression is all of a module's name; bounded in time. Raises FormatError."""
        import regex

        try:
            return regex.fullmatch(pattern, module, timeout=1.0) is not None
        except (regex.error, TimeoutError) as error:
            raise FormatError(f"{pattern[:80]!r} cannot be matched: {error}", self.where) from None


@dataclass(frozen=True)
class Row:
    """One PEFT type.

    ``slots`` are (field, suffix) pairs of a module's tensors, ``shared`` (field, name) pairs of those that lie under
    ``base_model.``; ``optional`` fields may be missing. ``kinds`` are the classes of its updates. ``settings`` gives
    the fields of an update that stand in the configuration, ``told`` the configuration of some updates (ValueError
    where none says them all). ``gain`` are the fields that absorb what the delta was multiplied by. ``build`` makes the
    updates of a module by what is put behind its name, ``take`` gives their tensors again.
    """

    name: str
    kinds: tuple[type[Update], ...]
    slots: tuple[tuple[str, str], ...]
    shared: tuple[tuple[str, str], ...] = ()
    copied: tuple[tuple[str, str], ...] = ()  # (field, suffix): the shared tensors once more in each module
    family: Callable[[str], str] = lambda module: ""  # which of several shared tensors is a module's: ".name"
    optional: frozenset[str] = frozenset()
    bare: str = ""  # why a file has no module's tensors, where PEFT can save it so
    gain: tuple[str, ...] = ()
    settings: Callable[[Words, Slots, str], dict[str, Any]] = lambda words, slots, module: {}
    told: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda updates: {}
    pool: str = ""  # the stem of numbered tensors under ``base_model.`` that every module gets
    drawn: Callable[[Words, int, int], Slots] | None = None  # what was not saved, for the widest [o,i]
    check: Callable[[Words], None] = lambda words: None
    agrees: Callable[[Mapping[str, Any]], bool] = lambda updates: True  # what PEFT has no other word for
    build: Callable[[Row, Words, Slots, str], dict[str, Update]] = lambda *of: {"": _from_fields(*of)}
    take: Callable[[Row, Mapping[str, Update]], Slots] = lambda row, updates: _fields(row, updates[""])
    layout: Layout = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = (*self.slots, *((_COPY + name, suffix) for name, suffix in self.copied))
        aliases = tuple((slot, f"{suffix}.default") for slot, suffix in pairs)
        object.__setattr__(self, "layout", Layout(pairs, aliases))


_COPY = "copy of "


def _from_fields(row: Row, words: Words, slots: Slots, module: str) -> Update:
    """The update whose fields are the slots: of the first kind that has them all."""
    for kind in row.kinds:
        fields: Mapping[str, Any] = getattr(kind, "__dataclass_fields__")  # noqa: B009
        needed = {name for name, _ in (*row.slots, *row.shared) if name in fields and name not in row.optional}
        if needed <= slots.keys() <= fields.keys():
            told = {k: v for k, v in row.settings(words, slots, module).items() if k in fields}
            return kind(**slots, **told, **({"layer": "transposed"} if words.flag("fan_in_fan_out") else {}))
    raise FormatError(f"{', '.join(sorted(slots))} are not the tensors of a {row.name} module", hint="is it complete?")


def _fields(row: Row, update: Update) -> Slots:
    """The stored tensors of an update by slot, what the delta was multiplied by in one of them."""
    given = ((name, getattr(update, name, None)) for name, _ in row.slots)
    return {
        name: _gained(update, tensor) if name in row.gain else tensor for name, tensor in given if tensor is not None
    }


def _gained(update: Update, tensor: Tensor) -> Tensor:
    gain = update.gain if isinstance(update, Fixed) else 1.0
    return tensor if gain == 1.0 else Tensor.of((tensor.float() * gain).astype(np.float32))


# ---------------------------------------------------------------- reading


def row_named(config: Mapping[str, Any]) -> Row | None:
    """The row of the type that a configuration names."""
    return BY_NAME.get(str(config.get("peft_type", "")).upper())


def read(
    evidence: Evidence, row: Row, normalise: Callable[[str], str]
) -> tuple[dict[str, Update], dict[str, Tensor], dict[str, str]]:
    """Updates by target, the tensors that are none of this type's, and the spellings.

    ``normalise`` takes PEFT's prefix and the like off a key. Raises FormatError.
    """
    words = Words(evidence.config, evidence.path)
    row.check(words)
    shared, own = _apart(row, evidence)
    modules, rest = row.layout.group(own, normalise, evidence.weights)
    updates: dict[str, Update] = {}
    used: set[str] = set()
    if row.drawn is not None and not shared:
        shared = _drawn(row, words, evidence.base, modules)
    words = replace(words, pool=_pool(row, shared), modules=len(modules))
    for module, slots in modules.items():
        keys = {name: f"{key}{row.family(module)}" for name, key in row.shared}
        try:
            _check_floats(slots)
            found = row.build(row, words, _uncopied(slots, lent := _lent(keys, shared)) | lent, module)
        except FormatError as error:
            raise FormatError(error.what, error.where or f"{evidence.weights}: {module}", error.hint) from None
        updates |= {module + part: update for part, update in found.items()}
        used.update(keys.values())
    if not updates:
        raise FormatError(f"a {row.name} adapter without a module's tensors", evidence.weights, row.bare)
    stems = {suffix.split("_")[0] + "_" for _, suffix in row.slots}
    used.update(name for name in shared if row.pool and name.startswith(f"{row.pool}."))
    strays = [SHARED + name for name in shared.keys() - used]
    if strays := strays + [key for key in rest if any(stem in key for stem in stems)]:
        raise FormatError("a tensor whose meaning is unknown", f"{evidence.weights}: {strays[0]}")
    return updates, rest, {target: PREFIX + target for target in updates}


_INTEGERS = frozenset(["index", "index_up", "index_down"])


def _check_floats(slots: Slots) -> None:
    """Raise FormatError for a tensor of a dtype that nothing is computed from."""
    for slot, tensor in slots.items():
        if tensor.dtype not in FLOATS and slot not in _INTEGERS:
            raise FormatError(f"{slot} is stored as {tensor.dtype}")


def _apart(row: Row, evidence: Evidence) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that modules share by name, and the others by key."""
    shared: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for key, tensor in evidence.file.tensors.items():
        name = key.removeprefix(SHARED)
        stems = [stem for _, stem in row.shared] + [row.pool] * bool(row.pool)
        if name == key or not any(name == stem or name.startswith(f"{stem}.") for stem in stems):
            own[key] = tensor
        elif shared.setdefault(name.removesuffix(".default"), tensor) is not tensor:
            raise FormatError("two tensors of one name", f"{evidence.weights}: {key}")
    return shared, own


def _pool(row: Row, shared: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The tensors of the pool by number. Raises FormatError where a number is left out."""
    numbered = {name.removeprefix(f"{row.pool}."): t for name, t in shared.items() if name.startswith(f"{row.pool}.")}
    if row.pool and sorted(numbered) != sorted(str(n) for n in range(len(numbered))):
        raise FormatError(f"{SHARED}{row.pool} is numbered {', '.join(sorted(numbered)[:5])}")
    return tuple(numbered[str(n)] for n in range(len(numbered))) if row.pool else ()


def _drawn(row: Row, words: Words, base: Model | None, modules: Iterable[str]) -> dict[str, Tensor]:
    """Shared tensors that were not saved: drawn for the widest of the base's modules, which these names mean.

    Raises MatchError where the base is not known, or lacks a module.
    """
    if base is None:
        raise MatchError(
            "the projection is not in the file: it is drawn for the widest modules of the base",
            words.where,
            "give --base, or save it in PEFT with save_projection=True",
        )
    assert row.drawn is not None
    found = Names(base.places)
    sides = [(0, 0)]
    for module in modules:
        hit = found.find_target(module)
        if isinstance(hit, Unmatched):
            raise MatchError("a module has no target in the base", str(hit))
        place = base.places[hit[0]]
        shape = place.shape(base.shape(place.tensor))
        turned = stores_transposed(place.tensor, base)
        height, width = shape[0], math.prod(shape[1:])
        flipped = turned or (turned is None and words.flag("fan_in_fan_out"))
        sides.append((width, height) if flipped else (height, width))
    values = row.drawn(words, max(o for o, _ in sides), max(i for _, i in sides))
    return {key: values[name] for name, key in row.shared}


def _lent(keys: Mapping[str, str], shared: Mapping[str, Tensor]) -> Slots:
    """The shared tensors of a module by field. Raises FormatError where one is not in the file."""
    if absent := [key for key in keys.values() if key not in shared]:
        raise FormatError(
            f"{SHARED}{absent[0]} is not in the file: it was saved without what depends on the base",
            hint="load it in PEFT and save it with save_projection=True",
        )
    return {name: shared[key] for name, key in keys.items()}


def _uncopied(slots: Slots, shared: Slots) -> Slots:
    """A module's own tensors. Raises FormatError for a copy that differs from what is shared."""
    for slot in [slot for slot in slots if slot.startswith(_COPY)]:
        name = slot.removeprefix(_COPY)
        if not slots.pop(slot).same_bytes(shared[name]):
            raise FormatError(f"the module's own {name} differs from the one of all modules")
    return slots


# ---------------------------------------------------------------- writing


def row_of(adapter: Adapter) -> Row | None:
    """The type as which an adapter can be written: all its updates are of that one, and say the same of it."""
    kinds = {type(update) for update in adapter.updates.values()}
    fitting = [row for row in ROWS if kinds and kinds <= set(row.kinds)]
    own = [row for row in fitting if row.name == _config_type(adapter)]
    return next((row for row in own or fitting if _agree(adapter, row)), None)


def _config_type(adapter: Adapter) -> str:
    return str(adapter.metadata.config.get("peft_type", "")).upper()


def _agree(adapter: Adapter, row: Row) -> bool:
    """Whether what must be one for all modules is: shared tensors, settings, and a gain that a tensor can absorb."""
    updates = list(adapter.updates.values())
    if not row.gain and any(isinstance(u, Fixed) and u.gain != 1.0 for u in updates):
        return False
    if not _still_says(adapter.metadata.config, adapter, row):
        try:
            row.told(adapter.updates)
        except ValueError:
            return False
    first: dict[str, Tensor] = {}
    for module, parts in _by_module(adapter.updates).items():
        for name, key in row.shared:
            tensor = getattr(parts[""], name)
            if not _same(first.setdefault(f"{key}{row.family(module)}", tensor), tensor):
                return False
    return row.agrees(adapter.updates)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or one.same_bytes(other)


def written(adapter: Adapter, row: Row) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The stored tensors of all updates by key, and adapter_config.json."""
    tensors: dict[str, Tensor] = {}
    config = configuration(adapter, row)
    unsaved = row.drawn is not None and config.get("save_projection") is False
    for module, updates in _by_module(adapter.updates).items():
        slots = row.take(row, updates)
        tensors |= {f"{PREFIX}{module}{suffix}": slots[name] for name, suffix in row.slots if name in slots}
        tensors |= {f"{PREFIX}{module}{suffix}": getattr(updates[""], name) for name, suffix in row.copied}
        if not unsaved:
            tensors |= {f"{SHARED}{key}{row.family(module)}": getattr(updates[""], name) for name, key in row.shared}
        pool: Sequence[Tensor] = getattr(updates[""], "thetas", ()) if row.pool else ()
        tensors |= {f"{SHARED}{row.pool}.{n}": tensor for n, tensor in enumerate(pool)}
    return tensors, config


def _by_module(updates: Mapping[str, Update]) -> dict[str, dict[str, Update]]:
    """Updates by module and what stands behind its name: nothing, or ``.bias``."""
    found: dict[str, dict[str, Update]] = {}
    for target, update in updates.items():
        part = ".bias" if is_bias(target) else ""
        found.setdefault(target.removesuffix(part), {})[part] = update
    return found


def configuration(adapter: Adapter, row: Row) -> dict[str, Any]:
    """adapter_config.json: the source's own fields, and those that its updates need."""
    own = dict(adapter.metadata.config) if _config_type(adapter) == row.name else {}
    modules = sorted(_by_module(adapter.updates))
    config = {
        "task_type": None,
        "base_model_name_or_path": adapter.metadata.base_model,
        "inference_mode": True,
        "target_modules": modules,
        **own,
        "peft_type": row.name,
    }
    named = config["target_modules"]
    if not isinstance(named, str) and not all(listed(module, named or ()) for module in modules):  # renamed
        config["target_modules"] = modules
    if not (own and _still_says(own, adapter, row)):
        config |= row.told(adapter.updates)
    return config


def _still_says(config: Mapping[str, Any], adapter: Adapter, row: Row) -> bool:
    """Whether a configuration gives every module the settings that its update has."""
    words = Words(config, Path(CONFIG))
    try:
        for module, updates in _by_module(adapter.updates).items():
            told = row.settings(words, row.take(row, updates), module)
            if any(
                getattr(update, name, value) != value for update in updates.values() for name, value in told.items()
            ):
                return False
    except FormatError:
        return False
    return True


# ---------------------------------------------------------------- what the rows say


def only(updates: Mapping[str, Any], of: Callable[[Any], Any]) -> Any:
    """The value that all updates have. Raises ValueError where they differ."""
    values = {of(update) for update in updates.values()}
    if len(values) != 1:
        raise ValueError("updates that one configuration cannot describe")
    return values.pop()


def patterned(updates: Mapping[str, Any], of: Callable[[Any], Any], name: str, pattern: str) -> dict[str, Any]:
    """The commonest value as ``name``, and by full name the modules that differ as ``pattern``."""
    return split({module: of(update) for module, update in updates.items()}, name, pattern)


def split(values: Mapping[str, Any], name: str, pattern: str) -> dict[str, Any]:
    """The commonest of some values by module as ``name``, the others as ``pattern``."""
    common = Counter(values.values()).most_common(1)[0][0]
    return {name: common, pattern: {module: value for module, value in values.items() if value != common}}


def _adalora(words: Words, slots: Slots, module: str) -> dict[str, Any]:
    masks = words.table_of("rank_pattern")
    mask = next((masks[key] for key in masks if key.removesuffix(".default").rpartition(".")[0] == module), None)
    rank = slots["down"].shape[0] if slots["down"].shape else 0
    if mask is not None and (not isinstance(mask, list) or sum(map(bool, mask)) != rank):
        raise FormatError(f"rank_pattern keeps another number of directions than the {rank} in the file")
    return {"alpha": float(words.number("lora_alpha", 8)), "init_r": words.count("init_r", 12)}


def _adalora_told(updates: Mapping[str, Any]) -> dict[str, Any]:
    init = only(updates, lambda u: u.init_r)
    masks = {f"{name}.lora_E": [n < u.rank for n in range(init)] for name, u in updates.items() if u.rank != init}
    full = {f"{name}.lora_E": [True] * init for name, u in updates.items() if u.rank == init}
    told = {"init_r": init, "target_r": init, "lora_alpha": only(updates, lambda u: u.alpha), "total_step": 1}
    return {**told, "rank_pattern": {**masks, **full} if masks else None, **_transposed(updates)}


def _transposed(updates: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the layers are transposed; PEFT corrects it by their class."""
    return {"fan_in_fan_out": any(update.layer == "transposed" for update in updates.values())}


def _rank(updates: Mapping[str, Any]) -> dict[str, Any]:
    return {"r": only(updates, lambda u: u.rank), **_transposed(updates)}


def _vera_drawn(times: int) -> Callable[[Words, int, int], Slots]:
    """VeRA's projections, those of the inputs ``times`` as many."""

    def draw(words: Words, out: int, inner: int) -> Slots:
        r = words.count("r", 256)
        down, up = drawn(words.count("projection_prng_key", 0), (times * r, inner), (out, r))
        return {"down": down, "up": up}

    return draw


def _tinylora(row: Row, words: Words, slots: Slots, module: str) -> dict[str, Update]:
    """A module of TinyLoRA; which of the vectors is its own is looked for when values are asked for."""
    if slots.keys() != {"projection", "down", "up"}:
        raise FormatError(
            f"a module with {', '.join(sorted(slots))}",
            hint="without its projection it cannot be told which vector it has: save it with save_projection=True",
        )
    told = {
        "seed": words.count("projection_seed", 42),
        "tying": float(words.number("weight_tying", 0.0)),
        "modules": words.modules,
    }
    return {"": Tinylora(thetas=words.pool, **slots, **told)}  # type: ignore[arg-type]


def _refuse(name: str, why: str) -> Callable[[Words], None]:
    """A check that refuses a flag which makes the change depend on more than the file."""

    def check(words: Words) -> None:
        if words.flag(name):
            raise FormatError(f"{name} is set: {why}", words.where, "it cannot be merged or converted")

    return check


def _miss(words: Words, slots: Slots, module: str) -> dict[str, Any]:
    return {"small": words.table.get("init_weights") == "mini"}


def _miss_told(updates: Mapping[str, Any]) -> dict[str, Any]:
    if only(updates, lambda u: isinstance(u, BlockAffine)):
        return {"r": only(updates, lambda u: u.rank), "init_weights": "bat"}
    small = only(updates, lambda u: u.small)
    mini = {"init_weights": "mini", "mini_r": only(updates, lambda u: u.block.shape[1])} if small else {}
    return {"r": only(updates, lambda u: u.rank), "init_weights": True, **mini}


def _vblora_told(updates: Mapping[str, Any]) -> dict[str, Any]:
    chosen = only(updates, lambda u: isinstance(u, ChosenMixtures))
    return {
        **_rank(updates),
        "topk": only(updates, lambda u: u.index_up.shape[2] if chosen else u.topk),
        "num_vectors": only(updates, lambda u: u.bank.shape[0]),
        "vector_length": only(updates, lambda u: u.bank.shape[1]),
        "save_only_topk_weights": chosen,
    }


def _seeded(scale: float) -> Callable[[Words, Slots, str], dict[str, Any]]:
    return lambda words, slots, module: {
        "scale": float(words.number("scaling", scale)),
        "seed": words.count("random_loc_seed", 777),
    }


def _seeded_told(updates: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "scaling": only(updates, lambda u: u.scale),
        "random_loc_seed": only(updates, lambda u: u.seed),
        **patterned(updates, lambda u: u.values.size, "n_frequency", "n_frequency_pattern"),
        **_transposed(updates),
    }


def _wavelet(words: Words, slots: Slots, module: str) -> dict[str, Any]:
    family = words.table.get("wavelet_family", "db1")
    return {**_seeded(25.0)(words, slots, module), "family": str(family) if words.flag("use_idwt", True) else ""}


def _shira_told(updates: Mapping[str, Any]) -> dict[str, Any]:
    """r, which tells PEFT how many values there are: r x (o + i)."""
    ranks = {u.values.size / sum(u.plain) if all(u.plain) else 0.0 for u in updates.values()}
    if len(ranks) != 1 or (rank := ranks.pop()) != int(rank) or not rank:
        raise ValueError("r is not known")
    return {"r": int(rank), "mask_type": "random"}


def _miss_built(row: Row, words: Words, slots: Slots, module: str) -> dict[str, Update]:
    """One block for all, or (bat) one for each block of outputs."""
    whole, bat = row.kinds
    if (len(slots["block"].shape) == 3) != (words.table.get("init_weights") == "bat"):
        raise FormatError(f"a block of shape {list(slots['block'].shape)} with another init_weights")
    return {
        "": _from_fields(replace(row, kinds=(bat if len(slots["block"].shape) == 3 else whole,)), words, slots, module)
    }


def _hira(row: Row, words: Words, slots: Slots, module: str) -> dict[str, Update]:
    """A pair of a Linear, Conv1D or convolution; or of an Embedding, whose table is [entries,dim]."""
    if slots.keys() == {"embedding_down", "embedding_up"}:
        axes(2, **slots)
        pair = LowRank(slots["embedding_up"].T, slots["embedding_down"].T, layer="embedding")
    elif slots.keys() == {"down", "up"}:
        pair = LowRank(slots["down"], slots["up"])
        if words.flag("fan_in_fan_out") and len(pair.shape) == 2:
            pair = pair.oriented("transposed")
    else:
        raise FormatError(f"a HiRA module with {', '.join(sorted(slots))}")
    return {"": Hira(pair)}


def _hira_taken(row: Row, updates: Mapping[str, Any]) -> Slots:
    pair = updates[""].direction
    if pair.layer == "embedding":
        return {"embedding_down": pair.up.T, "embedding_up": pair.down.T}
    return {"down": pair.down, "up": pair.up}


def _road(words: Words, slots: Slots, module: str) -> dict[str, Any]:
    variant = words.table.get("variant", "road_1")
    known = {"road_1": 1, "road_2": 2, "road_4": 4}
    if variant not in known:
        raise FormatError(f"variant is {variant!r}", words.where)
    return {"variant": known[variant], "group": words.count("group_size", 64)}


def _turned(row: Row, words: Words, slots: Slots, module: str) -> dict[str, Update]:
    turn = _from_fields(row, words, slots, module)
    assert isinstance(turn, Road)
    return {"": turn, ".bias": replace(turn, of_bias=True)}


def _with_biases(updates: Mapping[str, Any]) -> bool:
    """Whether each module's bias goes along with its weight, as PEFT's merge has it."""
    return all(
        (own := updates.get(f"{name}.bias")) is not None and own.slots == update.slots
        for name, update in updates.items()
        if not is_bias(name)
    )


def _glora(row: Row, words: Words, slots: Slots, module: str) -> dict[str, Update]:
    paths = {path: _path(path, slots) for path in "ABCDE"}
    if len(paths["C"]) == 2 or "C.X" in slots:
        raise FormatError(
            "glora_C changes the bias by way of the weight, which is not supported", hint="train it with config_C none"
        )
    if len(paths["D"]) == 2 or len(paths["E"]) == 2:
        raise FormatError("glora_D or glora_E is a pair")
    (scale, shift), (column,), (times,), (plus,) = (paths["A"], paths["B"]), paths["C"], paths["D"], paths["E"]
    found = Glora(scale=scale, shift=shift, column=column, bias_scale=times, bias_shift=plus)
    biased = "D.X" in slots or "E.X" in slots
    return {"": found, **({".bias": replace(found, of_bias=True)} if biased else {})}


def _path(path: str, slots: Slots) -> tuple[Tensor, ...]:
    """The tensors of one path of GLoRA: a pair, a vector or number, or zeros. Raises FormatError."""
    there = [leaf for leaf in ("Xd", "Xu", "X", "zeros") if f"{path}.{leaf}" in slots]
    if there not in (["Xd", "Xu"], ["X"], ["zeros"]):
        raise FormatError(f"glora_{path} holds {', '.join(there) or 'nothing'}")
    return tuple(slots[f"{path}.{leaf}"] for leaf in there)


def _glora_taken(row: Row, updates: Mapping[str, Any]) -> Slots:
    update = updates[""]
    found: Slots = {"C.zeros": update.column}
    for name, path in (("A", update.scale), ("B", update.shift)):
        leaves = ("Xd", "Xu") if len(path) == 2 else ("zeros",) if _is_zeros(path[0]) else ("X",)
        found |= {f"{name}.{leaf}": tensor for leaf, tensor in zip(leaves, path, strict=True)}
    leaf = "X" if ".bias" in updates else "zeros"
    return found | {f"D.{leaf}": update.bias_scale, f"E.{leaf}": update.bias_shift}


def _is_zeros(tensor: Tensor) -> bool:
    """Whether this is PEFT's stand-in for no path: a whole matrix."""
    return len(tensor.shape) == 2 and tensor.shape[1] > 1


def _glora_told(updates: Mapping[str, Any]) -> dict[str, Any]:
    weights = {name: u for name, u in updates.items() if not is_bias(name)}

    def word(u: Any) -> str:
        if len(u.scale) == 2:
            return "lora"
        return "none" if _is_zeros(u.scale[0]) else "constant" if len(u.scale[0].shape) == 1 else "vector"

    biased = {u.bias_scale.size for name, u in updates.items() if is_bias(name)}
    return {
        "r": max(u.scale[0].shape[1] if len(u.scale) == 2 else 1 for u in weights.values()),
        "config_A_B": only(weights, word),
        "config_C": "none",
        "config_D_E": "none" if not biased else "constant" if biased == {1} else "vector",
    }


def _deft(words: Words, slots: Slots, module: str) -> dict[str, Any]:
    alpha, rank = words.number("alpha", 0), slots["basis"].shape[-1] if slots["basis"].shape else 1
    method = str(words.table.get("decomposition_method", "relu"))
    return {"method": method, "scale": alpha / max(rank, 1) if alpha and "content" in slots else 1.0}


def _category(module: str) -> str:
    """FRoD's name for the modules that share a basis: the last part, or the last two."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return f".{parts[-1]}"
    name = "_".join(parts[-2:])
    return ".attention_output" if name == "output_dense" and parts[-3:-2] == ["attention"] else f".{name}"


_END: Mapping[str, str] = {"weight": "", "bias": ".bias"}


def _shifted(update: Any) -> Tensor:
    """The vector [1,o] that a bias is shifted by, scaled as the update is."""
    tensor = update.value.reshape(1, update.value.size)
    return tensor if update.scaling == 1.0 else Tensor.of((tensor.float() * update.scaling).astype(np.float32))


def _token_indices(words: Words) -> list[int]:
    told = words.table.get("token_indices")
    if not isinstance(told, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in told):
        raise FormatError("token_indices does not tell the rows", words.where)
    return told


def _ia3_settings(words: Words, slots: Slots, module: str) -> dict[str, Any]:
    """Whether the inputs are rescaled: for a Linear its shape shows it, else the configuration says it."""
    shape = slots["vector"].shape
    if len(shape) == 2 and shape != (1, 1):
        return {"on_input": shape[0] == 1, "centre": 1.0}
    named = words.table.get("feedforward_modules")
    if isinstance(named, str):
        return {"on_input": words.fits(named, module), "centre": 1.0}
    if named is not None and not (isinstance(named, list) and all(isinstance(n, str) for n in named)):
        raise FormatError("feedforward_modules is no list of names", words.where)
    return {"on_input": any(module.endswith(n) for n in named or ()), "centre": 1.0}


def _ia3(row: Row, words: Words, slots: Slots, module: str) -> dict[str, Update]:
    """The weight's update, and where outputs are rescaled the bias' too."""
    update = _from_fields(row, words, slots, module)
    bias = IA3(slots["vector"], centre=1.0)
    return {"": update} if getattr(update, "on_input") else {"": update, ".bias": bias}  # noqa: B009


def _ia3_agrees(updates: Mapping[str, Any]) -> bool:
    """PEFT's own: factors around 1, the bias of each layer whose outputs are rescaled with it."""
    outputs = {name: u for name, u in updates.items() if not is_bias(name) and not u.on_input}
    return all(u.centre == 1.0 for u in updates.values()) and all(
        (own := updates.get(f"{name}.bias")) is not None and _same(own.vector, u.vector) for name, u in outputs.items()
    )


def _lycoris(words: Words, slots: Slots, module: str) -> dict[str, Any]:
    alphas = Patterns(words.table_of("alpha_pattern"), "alpha_pattern", words.where)
    told = Words({"alpha": alphas.get(module, words.table.get("alpha"))}, words.where)
    return {"alpha": float(told.number("alpha", 8))}


def _rank_of(words: Words, module: str) -> int:
    ranks = Patterns(words.table_of("rank_pattern"), "rank_pattern", words.where)
    return Words({"r": ranks.get(module, words.table.get("r"))}, words.where).count("r", 8)


def _of_rank(row: Row, words: Words, slots: Slots, module: str) -> dict[str, Update]:
    """An update of LyCORIS' kinds: the configuration must know its rank, since alpha is divided by that."""
    update = _from_fields(row, words, slots, module)
    if update.rank not in (None, told := _rank_of(words, module)):
        raise FormatError(f"the configuration says rank {told}, the tensors have rank {update.rank}")
    return {"": update}


def _lokr(words: Words, slots: Slots, module: str) -> dict[str, Any]:
    whole = {} if slots.keys() & {"w1_b", "w2_b"} else {"stated_rank": _rank_of(words, module)}
    return {**_lycoris(words, slots, module), **whole}


def _lycoris_told(updates: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **patterned(updates, lambda u: u.rank, "r", "rank_pattern"),
        **patterned(updates, lambda u: u.scaling * u.rank, "alpha", "alpha_pattern"),
    }


def _lokr_told(updates: Mapping[str, Any]) -> dict[str, Any]:
    """The rank and the way of factorising that give every module its halves. Raises ValueError where none does."""
    ranks = {name: u.rank or u.stated_rank or max(u.told) for name, u in updates.items()}
    alphas = {name: u.scaling * ranks[name] for name, u in updates.items()}
    factors = [-1, *sorted({side for u in updates.values() for side in _first_half(u)})]
    for factor in factors:
        for both in (False, True):
            if all(_lokr_slots(u, ranks[n], factor, both) == _lokr_shape(u) for n, u in updates.items()):
                return {
                    **split(ranks, "r", "rank_pattern"),
                    **split(alphas, "alpha", "alpha_pattern"),
                    "decompose_factor": factor,
                    "decompose_both": both,
                    "use_effective_conv2d": any(u.t2 for u in updates.values()),
                }
    raise ValueError("halves that no configuration gives")


def _first_half(update: Any) -> tuple[int, int]:
    """(a, c) of the first half."""
    return update.w1.shape[:2] if update.w1 else (update.w1_a.shape[0], update.w1_b.shape[1])


def _lokr_shape(update: Any) -> tuple[Any, ...]:
    return (_first_half(update), update.w1 is not None, update.w2 is not None)


def _lokr_slots(update: Any, rank: int, factor: int, both: bool) -> tuple[Any, ...]:
    """What PEFT would make of a weight of this shape: (a, c), and which halves are whole."""
    (a, b), (c, d) = (factorised(side, factor) for side in update.told[:2])
    return ((a, c), not (both and rank < max(a, c) / 2), not rank < max(b, d) / 2)


def factorised(size: int, factor: int) -> tuple[int, int]:
    """Two factors of ``size``: the first is ``factor``, or the next smaller one that is nearer the square root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    one = 1
    for n in range(2, math.isqrt(size) + 1):
        if size % n == 0 and n <= limit:
            one = n
    return one, size // one


def _oft(words: Words, slots: Slots, module: str) -> dict[str, Any]:
    terms = words.count("num_cayley_neumann_terms", 5) if words.flag("use_cayley_neumann", True) else 0
    eps = words.number("eps", 6e-5) if words.flag("coft") else None
    return {"block_share": words.flag("block_share"), "neumann_terms": terms, "eps": eps}


def _oft_told(updates: Mapping[str, Any]) -> dict[str, Any]:
    eps = only(updates, lambda u: u.eps)
    terms = only(updates, lambda u: getattr(u, "neumann_terms", 0))
    return {
        "oft_block_size": only(updates, lambda u: u.span),
        "r": 0,
        "block_share": only(updates, lambda u: u.block_share),
        "coft": eps is not None,
        "eps": 6e-5 if eps is None else eps,
        "use_cayley_neumann": bool(terms),
        "num_cayley_neumann_terms": terms or 5,
        **_transposed(updates),
    }


def share(counts: Iterable[tuple[int, int]]) -> float:
    """A number whose products with the second of each pair, rounded down, give the first. Raises ValueError."""
    pairs = list(counts)
    if not all(size for _, size in pairs):
        raise ValueError("the shapes are not known")
    low, high = max(n / size for n, size in pairs), min((n + 1) / size for n, size in pairs)
    found = (low + high) / 2
    if any(int(size * found) != n for n, size in pairs):
        raise ValueError("updates that one configuration cannot describe")
    return float(found)


ROWS: tuple[Row, ...] = (
    Row(
        "ADALORA",
        (AdaLora,),
        (("down", ".lora_A"), ("up", ".lora_B"), ("singular", ".lora_E")),
        gain=("singular",),
        settings=_adalora,
        told=_adalora_told,
    ),
    Row(
        "VERA",
        (Vera,),
        (("scale_up", ".vera_lambda_b"), ("scale_down", ".vera_lambda_d")),
        shared=(("down", "vera_A"), ("up", "vera_B")),
        drawn=_vera_drawn(1),
        gain=("scale_up",),
        told=lambda updates: {**_rank(updates), "save_projection": True},
    ),
    Row(
        "PVERA",
        (Pvera,),
        (("scale_up", ".pvera_lambda_b"), ("scale_down", ".pvera_lambda_d")),
        shared=(("down", "pvera_A"), ("up", "pvera_B")),
        drawn=_vera_drawn(2),
        gain=("scale_up",),
        check=_refuse("sample_at_inference", "the change is drawn anew at each step"),
        told=lambda updates: {**_rank(updates), "save_projection": True},
    ),
    Row(
        "DELORA",
        (Delora,),
        (("down", ".delora_A"), ("up", ".delora_B"), ("strength", ".delora_lambda"), ("norm", ".delora_w_norm")),
        gain=("strength",),
        told=lambda updates: patterned(updates, lambda u: u.rank, "r", "rank_pattern"),
    ),
    Row(
        "VBLORA",
        (Mixtures, ChosenMixtures),
        (
            ("logits_down", ".vblora_logits_A"),
            ("logits_up", ".vblora_logits_B"),
            ("index_down", ".vblora_logits_A_topk_indices"),
            ("index_up", ".vblora_logits_B_topk_indices"),
            ("share_down", ".vblora_logits_A_topk_weights"),
            ("share_up", ".vblora_logits_B_topk_weights"),
        ),
        shared=(("bank", "vblora_vector_bank"),),
        settings=lambda words, slots, module: {"topk": words.count("topk", 2)},
        told=_vblora_told,
    ),
    Row(
        "RANDLORA",
        (RandLora,),
        (("scale", ".randlora_lambda"), ("gamma", ".randlora_gamma")),
        shared=(("down", "randlora_A"), ("up", "randlora_B")),
        copied=(("down", ".randlora_A"), ("up", ".randlora_B")),
        gain=("scale",),
        settings=lambda words, slots, module: {"alpha": float(words.number("randlora_alpha", 640))},
        told=lambda updates: {
            "r": only(updates, lambda u: u.scale.shape[0]),
            "randlora_alpha": only(updates, lambda u: u.alpha),
            "save_projection": True,
            **_transposed(updates),
        },
    ),
    Row(
        "GRALORA",
        (Gralora,),
        (
            ("down", ".gralora_A"),
            ("up", ".gralora_B"),
            ("hybrid_down", ".gralora_A_general.weight"),
            ("hybrid_up", ".gralora_B_general.weight"),
        ),
        optional=frozenset(["hybrid_down", "hybrid_up"]),
        gain=("up", "hybrid_up"),
        settings=lambda words, slots, module: {"alpha": float(words.number("alpha", 64))},
        told=lambda updates: {
            "r": only(updates, lambda u: u.down.shape[2]),
            "gralora_k": only(updates, lambda u: u.blocks),
            "hybrid_r": only(updates, lambda u: u.hybrid),
            "alpha": only(updates, lambda u: u.alpha),
            **_transposed(updates),
        },
    ),
    Row(
        "MISS",
        (Miss, BlockAffine),
        (("block", ".miss_block"),),
        gain=("block",),
        settings=_miss,
        told=_miss_told,
        build=_miss_built,
    ),
    Row(
        "BONE",
        (Bone, BoneAffine),
        (("block", ".bone_block"),),
        gain=("block",),
        settings=_miss,
        told=_miss_told,
        build=_miss_built,
    ),
    Row(
        "UNILORA",
        (Unilora,),
        (
            ("index_down", ".unilora_indices_A"),
            ("index_up", ".unilora_indices_B"),
            ("scale_down", ".unilora_scales_A"),
            ("scale_up", ".unilora_scales_B"),
        ),
        shared=(("theta", "unilora_theta_d"),),
        bare="its indices depend on the order of the base's modules: load it in PEFT, save it with save_indices=True",
        told=lambda updates: {
            **_rank(updates),
            "theta_d_length": only(updates, lambda u: u.theta.size),
            "save_indices": True,
        },
    ),
    Row(
        "TINYLORA",
        (Tinylora,),
        (("projection", ".tinylora_P"), ("down", ".tinylora_A"), ("up", ".tinylora_B")),
        pool="tinylora_v",
        build=_tinylora,
        told=lambda updates: {
            "r": max(u.rank for u in updates.values()),
            "u": only(updates, lambda u: u.projection.shape[0]),
            "weight_tying": only(updates, lambda u: u.tying),
            "projection_seed": only(updates, lambda u: u.seed),
            "save_projection": True,
        },
        agrees=lambda updates: (
            all(u.modules == len(updates) for u in updates.values())
            and len({tuple(map(id, u.thetas)) for u in updates.values()}) == 1
        ),
    ),
    Row(
        "FOURIERFT",
        (Fourier,),
        (("values", ".fourierft_spectrum"),),
        gain=("values",),
        settings=_seeded(150.0),
        told=_seeded_told,
    ),
    Row(
        "WAVEFT",
        (Wavelet,),
        (("values", ".waveft_spectrum"),),
        gain=("values",),
        settings=_wavelet,
        told=lambda updates: {
            **_seeded_told(updates),
            "wavelet_family": only(updates, lambda u: u.family) or "db1",
            "use_idwt": bool(only(updates, lambda u: u.family)),
        },
    ),
    Row(
        "SHIRA",
        (Shira,),
        (("values", ".shira_weight"), ("index", ".shira_indices")),
        gain=("values",),
        told=_shira_told,
    ),
    Row(
        "SUPERTUNING",
        (Supertuning,),
        (
            ("values", ".supertuning_values"),
            ("index", ".supertuning_indices"),
            ("down", ".supertuning_lora_A.weight"),
            ("up", ".supertuning_lora_B.weight"),
        ),
        optional=frozenset(["down", "up"]),
        gain=("values", "up"),
        settings=lambda words, slots, module: {"alpha": float(words.number("lora_alpha", 0)) if "up" in slots else 0.0},
        told=lambda updates: {
            "r": only(updates, lambda u: None if u.down is None else u.down.shape[0]),
            "lora_alpha": only(updates, lambda u: u.alpha) or None,
            "save_precomputed_indices": True,
            "sparsity": 1 - share({(u.values.size, math.prod(u.plain)) for u in updates.values()}),
        },
    ),
    Row(
        "C3A",
        (Circulant,),
        (("kernel", ".c3a_kernel"),),
        gain=("kernel",),
        told=lambda updates: patterned(updates, lambda u: u.kernel.shape[2], "block_size", "block_size_pattern"),
    ),
    Row(
        "HRA",
        (Householder,),
        (("vectors", ".hra_u"),),
        settings=lambda words, slots, module: {"orthogonal": words.flag("apply_GS")},
        told=lambda updates: {
            "r": only(updates, lambda u: u.rank),
            "apply_GS": only(updates, lambda u: u.orthogonal),
        },
    ),
    Row(
        "HIRA",
        (Hira,),
        (
            ("down", ".hira_A"),
            ("up", ".hira_B"),
            ("embedding_down", ".hira_embedding_A"),
            ("embedding_up", ".hira_embedding_B"),
        ),
        told=lambda updates: {**patterned(updates, lambda u: u.rank, "r", "rank_pattern"), **_transposed(updates)},
        build=_hira,
        take=_hira_taken,
    ),
    Row(
        "ROAD",
        (Road,),
        (("theta", ".road_theta"), ("alphas", ".road_alpha")),
        settings=_road,
        told=lambda updates: {
            "variant": f"road_{only(updates, lambda u: u.variant)}",
            "group_size": only(updates, lambda u: u.group),
        },
        build=_turned,
        agrees=_with_biases,
    ),
    Row(
        "GLORA",
        (Glora,),
        tuple((f"{path}.{leaf}", f".glora_{path}.{leaf}") for path in "ABCDE" for leaf in ("Xd", "Xu", "X", "zeros")),
        told=_glora_told,
        build=_glora,
        take=_glora_taken,
    ),
    Row(
        "DEFT",
        (Injection,),
        (("basis", ".deft_P"), ("content", ".deft_R")),
        optional=frozenset(["content"]),
        settings=_deft,
        told=lambda updates: {
            "r": only(updates, lambda u: u.rank),
            "alpha": only(updates, lambda u: u.scale * u.rank),
            "decomposition_method": only(updates, lambda u: u.method),
            "para": only(updates, lambda u: u.content is None),
            **_transposed(updates),
        },
    ),
    Row(
        "OSF",
        (Subspace,),
        (
            ("up", ".osf_svd_params.U_low"),
            ("values", ".osf_svd_params.S_low"),
            ("down", ".osf_svd_params.V_low"),
        ),
        told=lambda updates: patterned(updates, lambda u: min(u.known) - u.rank, "effective_rank", "rank_pattern"),
    ),
    Row(
        "FROD",
        (Frod,),
        (("diagonal", ".frod_lambda_l"), ("values", ".frod_lambda_s_values")),
        shared=(("basis", "frod_V"), ("index", "frod_s_indices"), ("extent", "frod_s_size")),
        family=_category,
        told=lambda updates: {
            "save_projection": True,
            "sparse_rate": share({(u.values.size, u.diagonal.size**2) for u in updates.values()}),
            **_transposed(updates),
        },
    ),
    Row(
        "LN_TUNING",
        (LnTuning,),
        (("weight", ".ln_tuning_layers.weight"), ("bias", ".ln_tuning_layers.bias")),
        build=lambda row, words, slots, module: {_END[name]: LnTuning(tensor) for name, tensor in slots.items()},
        take=lambda row, updates: {n: updates[end].slots["value"] for n, end in _END.items() if end in updates},
    ),
    Row(
        "BEFT",
        (BiasShift,),
        (("bias", ".beft_bias"),),
        build=lambda row, words, slots, module: {".bias": BiasShift(slots["bias"].reshape(slots["bias"].size))},
        take=lambda row, updates: {"bias": _shifted(updates[".bias"])},
    ),
    Row(
        "TRAINABLE_TOKENS",
        (Tokens,),
        (("tokens", ".trainable_tokens_delta"),),
        build=lambda row, words, slots, module: {"": Tokens.at(_token_indices(words), slots["tokens"])},
        take=lambda row, updates: {"tokens": updates[""].slots["value"]},
        told=lambda updates: {"token_indices": list(only(updates, lambda u: tuple(u.indices)))},
    ),
    Row(
        "IA3",
        (IA3,),
        (("vector", ".ia3_l"),),
        settings=_ia3_settings,
        told=lambda updates: {
            "feedforward_modules": sorted(name for name, u in updates.items() if u.on_input),
            **_transposed(updates),
        },
        build=_ia3,
        agrees=_ia3_agrees,
    ),
    Row(
        "LOHA",
        (LoHa,),
        tuple((name, f".hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        optional=frozenset(["t1", "t2"]),
        settings=_lycoris,
        told=lambda updates: {**_lycoris_told(updates), "use_effective_conv2d": any(u.t1 for u in updates.values())},
        build=_of_rank,
    ),
    Row(
        "LOKR",
        (LoKr,),
        tuple((name, f".lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        optional=frozenset(["w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"]),
        settings=_lokr,
        told=_lokr_told,
        build=_of_rank,
    ),
    Row(
        "OFT",
        (PeftOFT, PeftOldOFT),
        (("oft_R", ".oft_R.weight"), ("oft_r", ".oft_r"), ("oft_s", ".oft_s")),
        optional=frozenset(["oft_s"]),
        settings=_oft,
        told=_oft_told,
    ),
    Row(
        "BOFT",
        (PeftBOFT,),
        (("boft_R", ".boft_R"), ("boft_s", ".boft_s")),
        told=lambda updates: {
            "boft_block_size": only(updates, lambda u: u.boft_R.shape[2]),
            "boft_block_num": 0,
            "boft_n_butterfly_factor": only(updates, lambda u: u.boft_R.shape[0]),
            **_transposed(updates),
        },
    ),
)
BY_NAME: Mapping[str, Row] = {row.name: row for row in ROWS}
WORDS: tuple[str, ...] = tuple(dict.fromkeys(row.name.lower() for row in ROWS))

REFUSED: Mapping[str, str] = {
    "PSOFT": "it turns singular vectors of the base, whose signs are a matter of the library that finds them",
    "PEANUT": "it changes the weight by a small network of that weight, which is not supported",
    "SHADOW": "a second model runs beside the base, it is no change of weights",
    "ADAMSS": "which outputs its blocks stand for is found by clustering the base, and not in the file",
}
