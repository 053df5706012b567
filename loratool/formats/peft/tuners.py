"""PEFT's tuners beside LoRA: one row of a table each (`types`), read and written as themselves.

A row says how a type names its tensors (by module, and those that all modules share under ``base_model.``), which
fields of the configuration its mathematics needs, and how its updates are built from them. What cannot be told from
the file is refused by name. Source: huggingface/peft 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, is_bias
from loratool.errors import FormatError, MatchError
from loratool.formats.base import CONFIG, Evidence
from loratool.formats.peft.config import listed
from loratool.formats.peft.keys import PREFIX, normalise
from loratool.formats.peft.rows import COPY, Row, Slots, Words, same
from loratool.formats.peft.types import rows
from loratool.kinds.tuner import Fixed
from loratool.model import Model
from loratool.names import Names, Unmatched, stores_transposed
from loratool.tensors import FLOATS, Tensor
from loratool.update import Update

SHARED = "base_model."  # before the names of what all modules share

# ---------------------------------------------------------------- reading


def read(evidence: Evidence, row: Row) -> tuple[dict[str, Update], dict[str, Tensor], dict[str, str]]:
    """Updates by target, the tensors that are none of this type's, and the spellings. Raises FormatError."""
    words = Words(evidence.config, evidence.path)
    row.check(words)
    shared, own = _apart(row, evidence)
    named = re.compile(rf"((?:{'|'.join(map(re.escape, row.stems))})\w*)\.default(?=\.|$)")
    modules, rest = row.layout.group(own, lambda key: named.sub(r"\1", normalise(key)), evidence.weights)
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
    used.update(name for name in shared if row.pool and name.startswith(f"{row.pool}."))
    strays = [SHARED + name for name in shared.keys() - used]
    if strays := strays + [key for key in rest if any(stem in key for stem in row.stems)]:
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
    for slot in [slot for slot in slots if slot.startswith(COPY)]:
        name = slot.removeprefix(COPY)
        if not slots.pop(slot).same_bytes(shared[name]):
            raise FormatError(f"the module's own {name} differs from the one of all modules")
    return slots


# ---------------------------------------------------------------- writing


def row_of(adapter: Adapter) -> Row | None:
    """The type as which an adapter can be written: all its updates are of that one, and say the same of it."""
    kinds = {type(update) for update in adapter.updates.values()}
    fitting = [row for row in rows() if kinds and kinds <= set(row.kinds)]
    own = [row for row in fitting if row.name == _config_type(adapter)]
    return next((row for row in own or fitting if _agree(adapter, row)), None)


def _config_type(adapter: Adapter) -> str:
    return str(adapter.metadata.config.get("peft_type", "")).upper()


def _agree(adapter: Adapter, row: Row) -> bool:
    """Whether what must be one for all modules is: shared tensors, settings, and a gain that a tensor can absorb."""
    updates = list(adapter.updates.values())
    if not row.gain and any(isinstance(u, Fixed) and u.gain != 1.0 for u in updates):
        return False
    if _config_type(adapter) != row.name or not _still_says(adapter.metadata.config, adapter, row):
        try:
            row.told(adapter.updates)
        except ValueError:
            return False
    first: dict[str, Tensor] = {}
    for module, parts in _by_module(adapter.updates).items():
        for name, key in row.shared:
            tensor = getattr(parts[""], name)
            if not same(first.setdefault(f"{key}{row.family(module)}", tensor), tensor):
                return False
    return row.agrees(adapter.updates)


def written(adapter: Adapter, row: Row) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The stored tensors of all updates by key, and adapter_config.json."""
    tensors: dict[str, Tensor] = {}
    config = configuration(adapter, row)
    unsaved = row.drawn is not None and config.get("save_projection") is False
    for module, updates in _by_module(adapter.updates).items():
        slots = row.take(row, updates)
        tensors |= {f"{PREFIX}{module}{suffix}": slots[name] for name, suffix in row.slots if name in slots}
        tensors |= {
            f"{PREFIX}{module}{suffix}": getattr(updates[""], name) for name, suffix in row.copied if row.saves_copies
        }
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
