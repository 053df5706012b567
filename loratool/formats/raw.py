"""`raw`: any safetensors file whose pairs are named by module path.

Read: ``<module>.lora_A[.weight]`` / ``.lora_B`` or ``.lora_down`` / ``.lora_up`` (or ``.down.weight`` /
``.up.weight``), ``.alpha`` optional (none: scaling 1), ``.lora_mid.weight``, DoRA magnitudes, ``.diff`` and
``.diff_b``; what else ends in ``.weight`` or ``.bias`` is a whole tensor. Written: bare module paths,
``.lora_A.weight`` / ``.lora_B.weight`` and a scalar ``.alpha``; ``up @ down`` is the update of an [o,i] weight. What
names and shapes cannot say (rank-stabilised scaling, Embedding and transposed layers, the axis of a magnitude,
scalings of whole deltas) stands in the metadata under ``loratool.modules``; updates of other kinds stand under
``loratool.updates``, their tensors named ``<target>.<field>``: nothing of the representation is lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loratool import kinds
from loratool.adapter import Adapter, Loss, Metadata, is_bias
from loratool.errors import FormatError
from loratool.formats.base import Evidence, Format, kept
from loratool.keys import Layout, require_pair
from loratool.lazy import np
from loratool.tensors import FLOATS, SafetensorsFile, Tensor, write_safetensors
from loratool.update import Additive, Dense, DoRA, LowRank, Sum, Update

LAYOUT = Layout(
    slots=(
        ("down", ".lora_A.weight"),
        ("up", ".lora_B.weight"),
        ("mid", ".lora_mid.weight"),
        ("alpha", ".alpha"),
        ("magnitude", ".lora_magnitude_vector"),
        ("diff", ".diff"),
        ("diff_b", ".diff_b"),
    ),
    aliases=(
        ("down", ".lora_A"),
        ("up", ".lora_B"),
        ("down", ".lora_A.default.weight"),
        ("up", ".lora_B.default.weight"),
        ("down", ".lora_down.weight"),
        ("up", ".lora_up.weight"),
        ("down", ".lora_down"),
        ("up", ".lora_up"),
        ("down", ".down.weight"),
        ("up", ".up.weight"),
        ("magnitude", ".lora_magnitude_vector.weight"),
        ("magnitude", ".dora_scale"),
        ("bias", ".lora_B.bias"),
    ),
)
OWN = Layout(LAYOUT.slots)  # what is written
MODULES = "loratool.modules"  # metadata: what names and shapes cannot say, JSON by module
OTHERS = "loratool.updates"  # metadata: updates of other kinds by target, JSON; each tensor as {"tensor": its name}
SOURCE = "loratool.source"  # metadata: the configuration of the file this one was made from, JSON


def sniff(evidence: Evidence) -> str | None:
    """Raw when the file has both halves of some pair."""
    found = {slot for key in evidence.keys if (hit := LAYOUT.split(key)) for slot in hit[1:]}
    if {"down", "up"} <= found:
        return "pairs of factors named by module path"
    return "written by loratool" if MODULES in evidence.file.metadata else None


def read(evidence: Evidence) -> Adapter:
    """Read a raw file. Raises FormatError for what is malformed."""
    file = evidence.file
    own = MODULES in file.metadata  # ours: no spelling but our own, so that a whole tensor may be called mlp.up.weight
    others, plain = _others(file)
    grouped, rest = (OWN if own else LAYOUT).group(plain, where=file.path)
    extra = _extra(file.metadata, file.path)
    updates: dict[str, Update] = {}
    missing = 0
    for module in sorted(grouped, key=lambda name: numbered(name)[1]):
        try:
            found = build(numbered(module)[0], grouped[module], extra.get(module, {}), evidence)
        except FormatError as error:
            raise FormatError(error.what, error.where or f"{file.path}: {module}", error.hint) from None
        missing += any(u.rank is not None and u.alpha is None for u in found.values())
        for name, update in found.items():
            updates[name] = join(updates[name], update) if name in updates else update
    for name, update in others.items():
        updates[name] = join(updates[name], update) if name in updates else update
    for key in rest:
        if not own and not key.endswith((".weight", ".bias")):
            raise FormatError("a tensor whose meaning is unknown", f"{file.path}: {key}")
    warnings = [f"alpha is missing for {missing} of {len(grouped)} modules: their scaling is 1"] if missing else []
    metadata = Metadata(
        format="raw",
        path=evidence.path,
        weights=(evidence.weights,),
        strings={k: v for k, v in file.metadata.items() if k not in (MODULES, OTHERS, SOURCE)},
        **_table(file.metadata, SOURCE, _SOURCE, file.path),
        warnings=tuple(warnings),
    )
    return Adapter(updates, rest, metadata, {})


def _others(file: SafetensorsFile) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """Updates of the kinds that pairs cannot say, and the tensors that are left."""
    used: set[str] = set()
    found: dict[str, Update] = {}
    for target, words in _table(file.metadata, OTHERS, None, file.path).items():
        try:
            found[target] = kinds.unspelled(words, file.tensors, used)
        except FormatError as error:
            raise FormatError(error.what, error.where or f"{file.path}: {target}", error.hint) from None
    return found, {name: tensor for name, tensor in file.tensors.items() if name not in used}


def numbered(module: str) -> tuple[str, int]:
    """A module's own name and which of its updates this is: ``<module>``, ``<module>#2``, ..."""
    name, _, number = module.rpartition("#")
    return (name, int(number)) if name and number.isdecimal() and len(number) < 6 else (module, 1)


Checks = Mapping[str, Callable[[Any], bool]]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_EXTRA: Checks = {
    "rank_stabilised": lambda value: isinstance(value, bool),
    "layer": lambda value: value in ("plain", "transposed", "embedding"),
    "axis": lambda value: type(value) is int and value in (0, 1),
    "scaling": _is_number,
    "bias_scaling": _is_number,
    "kind": lambda value: isinstance(value, str),
}
_SOURCE: Checks = {
    "config": lambda value: isinstance(value, dict),
    "architecture": lambda value: isinstance(value, str),
    "base_model": lambda value: isinstance(value, str),
}


def _extra(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """What names and shapes cannot say, by module."""
    table = _table(metadata, MODULES, None, path)
    return {name: _checked(words, MODULES, _EXTRA, f"{path}: {name}") for name, words in table.items()}


def _table(metadata: Mapping[str, str], key: str, checks: Checks | None, path: Path) -> dict[str, Any]:
    """One JSON table of the metadata, its words checked. Raises FormatError."""
    try:
        table = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        table = None
    return _checked(table, key, checks, path)


def _checked(table: Any, key: str, checks: Checks | None, where: object) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise FormatError(f"the metadata {key} is no JSON table", where)
    for word, value in table.items():
        if checks is not None and not (word in checks and checks[word](value)):
            raise FormatError(f"the metadata {key} says {word} = {str(value)[:40]!r}, which means nothing here", where)
    return table


def build(module: str, slots: Mapping[str, Tensor], extra: Mapping[str, Any], evidence: Evidence) -> dict[str, Update]:
    """The updates of one module's slots. Raises FormatError without a place where the slots do not fit."""
    for slot, tensor in slots.items():
        if tensor.dtype not in FLOATS and slot != "alpha":
            raise FormatError(f"{slot} is stored as {tensor.dtype}")
    found: dict[str, Update] = {}
    if "diff" in slots:
        found[module] = Dense(slots["diff"], extra.get("scaling", 1.0), extra.get("kind", "full"))
    if "diff_b" in slots:
        found[f"{module}.bias"] = Dense(slots["diff_b"], extra.get("bias_scaling", 1.0), "bias")
    rest = {slot: t for slot, t in slots.items() if slot not in ("diff", "diff_b")}
    if not rest:
        return found
    low = low_rank(module, rest, extra, evidence)
    update: Update = low
    if "magnitude" in rest:
        update = DoRA(low, rest["magnitude"], extra.get("axis", magnitude_axis(rest["magnitude"])))
    if "bias" in rest:
        if "diff_b" in slots:
            raise FormatError("both lora_B.bias and diff_b")
        found[f"{module}.bias"] = Dense(rest["bias"], low.scaling, "bias")
    found[module] = join(found[module], update) if module in found else update
    return found


def low_rank(module: str, slots: Mapping[str, Tensor], extra: Mapping[str, Any], evidence: Evidence) -> LowRank:
    """The LoRA of one module."""
    require_pair(module, slots, evidence.path)
    alpha = slots["alpha"].item() if "alpha" in slots else None
    if evidence.scaling is not None and alpha is None:
        alpha = evidence.scaling * slots["down"].shape[0]
    down, up = slots["down"], slots["up"]
    return LowRank(
        down,
        up,
        slots.get("mid"),
        alpha,
        bool(extra.get("rank_stabilised", False)),
        extra.get("layer", "plain"),
    )


def magnitude_axis(magnitude: Tensor) -> int:
    """What a magnitude's shape says it stands for: [o,1..] outputs, [1,i,1..] inputs, [o] outputs."""
    shape = magnitude.shape
    return 1 if len(shape) > 1 and shape[0] == 1 and shape[1] > 1 else 0


def join(one: Update, other: Update) -> Update:
    """Two updates of one weight in one. Raises FormatError where they do not add up."""
    if not isinstance(one, Additive) or not isinstance(other, Additive):
        raise FormatError(f"one module has two updates ({one.kind}, {other.kind}) that cannot be added")
    parts = tuple(p for u in (one, other) for p in (u.parts if isinstance(u, Sum) else (u,)))
    return Sum(parts)


# ---------------------------------------------------------------- writing


def losses(adapter: Adapter) -> list[Loss]:
    """Raw says everything."""
    return []


def write(adapter: Adapter, path: Path) -> None:
    """Write a raw file."""
    tensors: dict[str, Tensor] = dict(adapter.carried)
    extra: dict[str, dict[str, Any]] = {}
    others: dict[str, Any] = {}
    named: dict[int, str] = {}
    for name, update in adapter.updates.items():
        parts = update.parts if isinstance(update, Sum) else (update,)
        if not all(map(_is_plain, parts)):
            others[name], own = kinds.spelled(update, name, named)
            tensors.update(own)
            continue
        for number, part in enumerate(parts, 1):
            module = name.removesuffix(".bias") if is_bias(name) else name
            module = module if number == 1 else f"{module}#{number}"
            slots, more = stored(part, is_bias(name))
            tensors.update({LAYOUT.key(module, slot): tensor for slot, tensor in slots.items()})
            if more:
                extra.setdefault(module, {}).update(more)
    metadata = kept(adapter.metadata.strings, tensors)
    if others:
        metadata[OTHERS] = json.dumps(others, sort_keys=True, separators=(",", ":"))
    metadata[MODULES] = json.dumps(extra, sort_keys=True, separators=(",", ":"))
    source = {
        "architecture": adapter.metadata.architecture,
        "base_model": adapter.metadata.base_model,
        "config": dict(adapter.metadata.config),
    }
    known = {key: value for key, value in source.items() if value}
    if known:
        metadata[SOURCE] = json.dumps(known, sort_keys=True, separators=(",", ":"))
    write_safetensors(path, tensors, metadata)


def _is_plain(update: Update) -> bool:
    """Whether pairs (and whole deltas) say it."""
    inner = update.direction if isinstance(update, DoRA) else update
    return isinstance(inner, LowRank) or type(update) is Dense


def stored(update: Update, bias: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one update by slot, and what they cannot say."""
    if isinstance(update, Dense):
        slot, scaling = ("diff_b", "bias_scaling") if bias else ("diff", "scaling")
        more: dict[str, Any] = {} if update.scaling == 1.0 else {scaling: update.scaling}
        if not bias and update.kind != "full":
            more["kind"] = update.kind
        return {slot: update.value}, more
    if isinstance(update, DoRA):
        slots, more = stored(update.direction, bias)
        if update.axis != magnitude_axis(update.magnitude):
            more["axis"] = update.axis
        return {**slots, "magnitude": update.magnitude}, more
    assert isinstance(update, LowRank)
    more = {}
    if update.rank_stabilised:
        more["rank_stabilised"] = True
    if update.layer != "plain":
        more["layer"] = update.layer
    slots = dict(update.slots)
    if update.alpha is not None:
        slots["alpha"] = alpha_tensor(update.alpha)
    return slots, more


def alpha_tensor(alpha: float) -> Tensor:
    """A scalar alpha: float32, or float64 where float32 cannot hold it exactly."""
    exact = float(np.float32(alpha)) == alpha
    return Tensor.of(np.array(alpha, np.float32 if exact else np.float64))


FORMAT = Format(
    name="raw",
    title="safetensors with pairs named by module path (ours: lossless)",
    kinds=("lora", "dora", "full", "norm"),
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
)
