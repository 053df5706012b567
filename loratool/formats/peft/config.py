"""What PEFT's ``adapter_config.json`` of a LoRA says: each of its fields, and its rules of matching names.

Source: huggingface/peft 0.21, ``tuners/lora/config.py``; fields of older versions with the version that had them.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loratool.errors import FormatError
from loratool.formats.base import Evidence
from loratool.formats.peft.types import NAMES, NOT_A_WEIGHT_CHANGE, REFUSED

if TYPE_CHECKING:
    from loratool.kinds.experts import Order

Meaning = Literal["read", "names", "training", "refused"]
"""read: it changes the update, and is followed; names: it chose the modules, which the file names itself; training: no
trace of it is in the weights; refused: no fixed change of weights, or a layout that is not read."""

FIELDS: Mapping[str, Meaning] = {
    "alora_invocation_tokens": "refused",
    "alpha_pattern": "read",
    "arrow_config": "refused",
    "auto_mapping": "training",
    "base_model_name_or_path": "read",
    "bias": "read",
    "corda_config": "training",
    "enable_lora": "refused",  # PEFT 0.2: merged projections
    "ensure_weight_tying": "read",
    "eva_config": "training",
    "exclude_modules": "names",
    "fan_in_fan_out": "read",
    "inference_mode": "training",
    "init_lora_weights": "read",
    "kasa_config": "read",
    "layer_replication": "read",
    "layers_pattern": "names",
    "layers_to_transform": "names",
    "loftq_config": "training",
    "lora_alpha": "read",
    "lora_bias": "read",
    "lora_dropout": "training",
    "lora_ga_config": "training",
    "megatron_config": "names",
    "megatron_core": "names",
    "merge_weights": "training",  # PEFT 0.2
    "modules_to_save": "read",
    "monteclora_config": "training",
    "peft_type": "read",
    "peft_version": "read",
    "qalora_group_size": "read",
    "r": "read",
    "rank_pattern": "read",
    "revision": "training",
    "runtime_config": "training",
    "target_modules": "names",
    "target_parameters": "read",
    "task_type": "training",
    "trainable_token_indices": "read",
    "use_bdlora": "read",
    "use_dora": "read",
    "use_qalora": "read",
    "use_rslora": "read",
    "velora_config": "training",
}
_WHY = {
    "alora_invocation_tokens": "activated LoRA depends on the tokens: it is no fixed change of weights",
    "arrow_config": "Arrow routes by token: it is no fixed change of weights",
    "enable_lora": "merged projections of PEFT 0.2 are not read",
}

MUTATING_INIT = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""What begins so took its first factors out of the base."""

REWRITTEN: Mapping[str, Any] = {
    "kasa_config": None,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
"""Fields that say how tensors are held: what they are in a file of plain LoRA."""

DOUBLES_OUT_PROJ = (0, 21, 2)
"""The last version of PEFT known to add the update of a MultiheadAttention's out_proj twice, in the forward pass too
(huggingface/peft#3774): what was trained so is meant so."""

_PARAMETER_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "w1", "v1", "w2", "w3", "down_proj")
"""Parameters in the order in which transformers' expert modules register them: PEFT wraps them in this order."""


def refuse(config: Mapping[str, Any], where: Path) -> None:
    """Raise FormatError, naming the kind or the field, for what is no fixed change of weights."""
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind in NOT_A_WEIGHT_CHANGE:
        raise FormatError(f"{kind} is not a fixed change of weights", where, "it cannot be merged or converted")
    if kind in REFUSED:
        raise FormatError(f"the PEFT type {kind} cannot be read: {REFUSED[kind]}", where)
    if kind != "LORA" and kind not in NAMES:
        raise FormatError(f"the PEFT type {kind} is not known", where)
    for field, meaning in FIELDS.items():
        if meaning == "refused" and config.get(field):
            raise FormatError(f"{_WHY[field]} ({field} is set)", where, "it cannot be merged or converted")


def strangers(config: Mapping[str, Any]) -> list[str]:
    """Fields that are not known here and are set: a later PEFT may have changed the mathematics by one."""
    return sorted(name for name, value in config.items() if name not in FIELDS and value)


def mutating(config: Mapping[str, Any]) -> str | None:
    """The initialiser that changed the base, None where it was left alone."""
    init = config.get("init_lora_weights")
    return init if isinstance(init, str) and init.lower().startswith(MUTATING_INIT) else None


def version(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The version of PEFT that wrote a configuration, None where it does not say."""
    found = re.match(r"\d{1,4}(\.\d{1,4}){1,3}", str(config.get("peft_version")))
    return tuple(map(int, found[0].split("."))) if found else None


def out_proj_times(config: Mapping[str, Any]) -> float:
    """How often the update of a MultiheadAttention's out_proj counts."""
    known = version(config)
    return 2.0 if known is None or known <= DOUBLES_OUT_PROJ else 1.0


def expert_order(config: Mapping[str, Any]) -> Order:
    """What tells which axis of a stack of square experts was the input, by the version of PEFT.

    Up to 0.18 the first; since 0.19.1 the last, but for models that are known to be transposed. In 0.19.0 these two
    were exchanged, and a file without a version tells nothing.
    """
    known = version(config)
    if known is None or known[:3] == (0, 19, 0):
        return "shape"
    return "transposed" if known < (0, 19) else "model"


def names(config: Mapping[str, Any], field: str, where: Path) -> list[str]:
    """A field that is a list of names, or none. Raises FormatError."""
    value = config.get(field) or []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise FormatError(f"{field} is no list of names", where)
    return value


def listed(name: str, entries: Iterable[str]) -> bool:
    """Whether a module is meant by one of ``entries``: its whole name, or its last segments."""
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def saved_whole(parameter: str, entries: Iterable[str]) -> bool:
    """Whether a parameter lies in a module to save: there an entry may be the end of a segment (llm.md 1.3)."""
    parts = parameter.split(".")[:-1]
    modules = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(module.endswith(entry) for module in modules for entry in entries)


def parameters_of(module: str, config: Mapping[str, Any], where: Path, wrappers: int) -> list[str]:
    """The parameters of a module that ``target_parameters`` means, in the order in which PEFT wraps them.

    A bare entry means the parameter wherever a module has it. Where not all are as many as the ``wrappers``, those are
    meant that name the module: PEFT writes ``gate.weight`` beside ``down_proj`` for experts that transformers 5 stacks.
    """
    modules = config.get("target_modules")
    plain = isinstance(modules, list) and listed(module, modules)
    entries = [entry.rpartition(".") for entry in names(config, "target_parameters", where)]
    own = {parameter for head, _, parameter in entries if head and listed(module, [head])}
    found = own | {parameter for head, _, parameter in entries if not head and not plain}
    found = own if len(found) != wrappers == len(own) else found
    return in_order(found) or sorted(found)


def in_order(parameters: Iterable[str]) -> list[str] | None:
    """Parameters of one module in the order in which PEFT wraps them; None where that is not known."""
    found = list(parameters)
    if len(found) > 1 and not set(found) <= set(_PARAMETER_ORDER):
        return None
    return sorted(found, key=lambda name: _PARAMETER_ORDER.index(name) if len(found) > 1 else 0)


def token_indices(module: str, config: Mapping[str, Any], where: Path) -> list[int]:
    """The rows of an embedding that were trained. Raises FormatError where the configuration does not tell them."""
    told = config.get("trainable_token_indices")
    if isinstance(told, dict):
        hits = {entry: rows for entry, rows in told.items() if module.endswith(entry)}
        told = hits[max(hits, key=len)] if hits else None
    if not isinstance(told, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in told):
        raise FormatError("trainable_token_indices does not tell the rows", f"{where}: {module}")
    return told


class Scales:
    """Rank, alpha and rank stabilisation of each module, as the configuration tells them."""

    def __init__(self, config: Mapping[str, Any], evidence: Evidence) -> None:
        self.where = evidence.path
        self.override = evidence.scaling
        self.known = bool(config) or self.override is not None
        self.rank_stabilised = bool(config.get("use_rslora")) and self.override is None
        self.transposed = bool(config.get("fan_in_fan_out"))  # a hint: at the merge the base's shapes decide
        self.r = config.get("r", 8)
        self.alpha = config.get("lora_alpha", 8)
        self.ranks = Patterns(config.get("rank_pattern") or {}, "rank_pattern", evidence.path)
        self.alphas = Patterns(config.get("alpha_pattern") or {}, "alpha_pattern", evidence.path)
        self.warnings: list[str] = []
        if config and "lora_alpha" not in config:
            self.warnings.append("lora_alpha is missing from the configuration: PEFT's default, 8, is used")

    def alpha_of(self, module: str, rank: int) -> float | None:
        """alpha of a module whose factors have ``rank``. Raises FormatError when the configuration disagrees."""
        if self.override is not None:
            return self.override * rank
        if not self.known:
            return None
        told = self.ranks.get(module, self.r)
        if told != rank:
            raise FormatError(
                f"the configuration says rank {told}, the tensors have rank {rank}: the scaling is unknown",
                f"{self.where}: {module}",
                "correct r or rank_pattern in adapter_config.json, or give --scaling",
            )
        alpha = self.alphas.get(module, self.alpha)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= sys.float_info.max:
            raise FormatError(f"alpha is {alpha!r}, not a number", f"{self.where}: {module}")
        return float(alpha)

    def experts_of(self, parameter: str, rows: int) -> int:
        """How many experts share ``rows`` rows of a down factor. Raises FormatError when none can."""
        told = self.ranks.get(parameter, self.r)
        if type(told) is not int or told < 1 or rows % told:
            raise FormatError(
                f"the configuration says rank {told}, which does not divide the {rows} rows of all experts",
                f"{self.where}: {parameter}",
                "correct r or rank_pattern in adapter_config.json",
            )
        return rows // told


def _compiled(table: Mapping[str, Any], field: str, where: Path) -> list[tuple[Any, Any]]:
    """The regular expressions of a table with their values. Raises FormatError where a key is none."""
    import regex

    try:
        return [(regex.compile(rf"(.*\.)?({key})$"), value) for key, value in table.items()]
    except regex.error as error:
        raise FormatError(f"a key of {field} is no regular expression: {error}", where) from None


class Patterns:
    """PEFT's rank_pattern and alpha_pattern: regular expressions tried in order, all together bounded in time."""

    seconds = 10.0

    def __init__(self, table: Mapping[str, Any], field: str, where: Path) -> None:
        if not isinstance(table, Mapping):
            raise FormatError(f"{field} is not a table", where)
        self.field, self.where = field, where
        self.rules = _compiled(table, field, where) if table else []

    def get(self, module: str, default: Any) -> Any:
        """The value of the first key that fits ``module``."""
        began = time.monotonic()
        try:
            for pattern, value in self.rules:
                if pattern.match(module, timeout=max(self.seconds, 1e-3)):
                    return value
        except TimeoutError:
            raise FormatError(f"the keys of {self.field} take too long to match", self.where) from None
        finally:
            self.seconds -= time.monotonic() - began
        return default
