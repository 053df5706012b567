"""`peft`: a folder of Hugging Face PEFT, ``adapter_config.json`` and ``adapter_model.safetensors``.

Keys are ``base_model.model.<module>.lora_A.weight`` (down [r,i,*k]) and ``.lora_B.weight`` (up [o,r,*1]), for an
Embedding ``.lora_embedding_A`` [r,entries] and ``.lora_embedding_B`` [dim,r], for DoRA ``.lora_magnitude_vector``, and
plain parameter names for what was trained whole. The scaling is in the configuration only: ``lora_alpha / r``, or
``/ sqrt(r)`` with ``use_rslora``, with exceptions by module in ``rank_pattern`` and ``alpha_pattern``, whose keys are
regular expressions ``(.*\\.)?KEY$``: the first that fits wins. Raw dumps of other trainers keep the adapter's name in
the keys, wrap modules once more or leave the prefix out; they are read alike. Source: huggingface/peft 0.21.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapter import Adapter, Loss, Metadata, is_bias
from loratool.architectures.llm import EMBEDDING_LEAVES
from loratool.errors import FormatError
from loratool.formats.base import CONFIG, Evidence, Format
from loratool.keys import Layout, require_pair
from loratool.tensors import FLOATS, Tensor, write_safetensors
from loratool.update import Dense, DoRA, LowRank, Update, as_low_rank

PREFIX = "base_model.model."
LAYOUT = Layout(
    slots=(
        ("down", ".lora_A.weight"),
        ("up", ".lora_B.weight"),
        ("bias", ".lora_B.bias"),
        ("embedding_down", ".lora_embedding_A"),
        ("embedding_up", ".lora_embedding_B"),
        ("magnitude", ".lora_magnitude_vector"),
    ),
    aliases=(("down", ".lora_A"), ("up", ".lora_B"), ("magnitude", ".lora_magnitude_vector.weight")),
)
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ADAPTER_NAME = re.compile(
    r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight$|bias$)[^.]+(?=(\.weight|\.bias)?$)"
)

# other tuners of PEFT, and whether their update is a fixed change of weights
_NOT_A_WEIGHT_CHANGE = frozenset(
    [
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "ADAPTION_PROMPT",
        "CPT",
        "CARTRIDGE",
        "XLORA",
        "POLY",
        "LILY",
    ]
)
# configuration fields of LoRA that change the mathematics: (field, why it is refused, is it final)
_REFUSED_FIELDS = (
    ("alora_invocation_tokens", "activated LoRA depends on the tokens: it is no fixed change of weights"),
    ("arrow_config", "Arrow routes by token: it is no fixed change of weights"),
    ("target_parameters", "LoRA on bare parameters (mixture-of-experts) is not supported yet"),
    ("trainable_token_indices", "trainable tokens are not supported yet"),
    ("layer_replication", "layer replication is not supported yet"),
    ("use_qalora", "QALoRA is not supported yet"),
    ("use_bdlora", "BD-LoRA is not supported yet"),
    ("kasa_config", "KaSA is not supported yet"),
)
_MUTATING_INIT = ("pissa", "olora", "corda", "lora_ga", "loftq")
_TOKENIZER_FILES = frozenset(
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "spiece.model",
    ]
)


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """PEFT by its configuration, or by the prefix that only PEFT's own saves have."""
    if "peft_type" in evidence.config:
        return "adapter_config.json names a peft_type"
    if any(_unwrapped(key).startswith(PREFIX) for key in evidence.keys):
        return f"keys begin with {PREFIX}"
    return None


def read(evidence: Evidence) -> Adapter:
    """Read a PEFT folder or file. Raises FormatError for what is malformed or refused by name."""
    config, file = evidence.config, evidence.file
    refuse(config, evidence.path)
    grouped, rest = LAYOUT.group(file.tensors, normalise, file.path)
    scales = Scales(config, evidence)
    updates: dict[str, Update] = {}
    spellings: dict[str, str] = {}
    for module, slots in grouped.items():
        if ".base_layer" in module:
            raise FormatError(
                "nested wrappers (mixture-of-experts parameters, MultiheadAttention) are not supported yet",
                f"{file.path}: {module}",
            )
        updates.update(_updates(module, slots, scales, file.path))
        spellings[module] = PREFIX + module
    carried: dict[str, Tensor] = {}
    for key, tensor in rest.items():
        name = _carried_name(normalise(key), file.path)
        if name is not None:
            if name in carried:
                raise FormatError(f"two tensors for {name}", f"{file.path}: {key} and {spellings[name]}")
            carried[name] = tensor
            spellings[name] = key
    return Adapter(updates, carried, _metadata(evidence, scales, updates), spellings)


def normalise(key: str) -> str:
    """A key without the wrappers of training frameworks, PEFT's prefix and the adapter's name."""
    key = _unwrapped(key)
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return without_adapter_name(key)


def without_adapter_name(key: str) -> str:
    """A key without the adapter's name before or in the place of its suffix."""
    return _ADAPTER_NAME.sub(r"\1", key)


def _unwrapped(key: str) -> str:
    """A key without the wrappers of torch.compile, FSDP and DDP."""
    return _WRAPPERS.sub("", key).removeprefix("module.")


def refuse(config: Mapping[str, Any], where: Path) -> None:
    """Raise FormatError, naming the kind, for configurations whose mathematics is not plain LoRA."""
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind in _NOT_A_WEIGHT_CHANGE:
        raise FormatError(f"{kind} is not a fixed change of weights", where, "it cannot be merged or converted")
    if kind != "LORA":
        raise FormatError(f"the PEFT type {kind} is not supported yet", where)
    for field, why in _REFUSED_FIELDS:
        if config.get(field):
            raise FormatError(f"{why} ({field} is set)", where)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INIT):
        raise FormatError(
            f"init_lora_weights {init!r} changed the base, so this is no delta of the plain base",
            where,
            "save it with PEFT's path_initial_model_for_weight_conversion, which gives a plain LoRA",
        )


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


class Patterns:
    """PEFT's rank_pattern and alpha_pattern: regular expressions tried in order, all together bounded in time."""

    seconds = 10.0

    def __init__(self, table: Mapping[str, Any], field: str, where: Path) -> None:
        if not isinstance(table, Mapping):
            raise FormatError(f"{field} is not a table", where)
        import regex

        self.field, self.where = field, where
        try:
            self.rules = [(regex.compile(rf"(.*\.)?({key})$"), value) for key, value in table.items()]
        except regex.error as error:
            raise FormatError(f"a key of {field} is no regular expression: {error}", where) from None

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


def _updates(module: str, slots: dict[str, Tensor], scales: Scales, where: Path) -> dict[str, Update]:
    """The update of one module and, with lora_bias, that of its bias."""
    pair = _pair(module, slots, where)
    for slot, tensor in slots.items():
        if tensor.dtype not in FLOATS:
            raise FormatError(f"{slot} is stored as {tensor.dtype}", f"{where}: {module}")
    embedding = "embedding_down" in slots
    fits = min((t for t in pair), key=lambda t: len(t.shape)).shape
    if len(fits) < 2:
        raise FormatError(
            f"a factor of shape {list(fits)}: a partial save (ZeRO-3, FSDP)",
            f"{where}: {module}",
            "save it gathered",
        )
    try:
        alpha = scales.alpha_of(module, pair[0].shape[0])
        low = LowRank(pair[0], pair[1], alpha=alpha, rank_stabilised=scales.rank_stabilised)
        if embedding:  # PEFT holds A [r,entries], B [dim,r]; the base's orientation is [entries,dim]
            low = replace(low, down=pair[1].T, up=pair[0].T, layer="embedding")
        elif scales.transposed and len(pair[0].shape) == 2:
            low = low.oriented("transposed")
        update: Update = low
        if "magnitude" in slots:
            update = DoRA(low, slots["magnitude"], axis=1 if embedding else 0)
    except FormatError as error:
        raise FormatError(error.what, error.where or f"{where}: {module}", error.hint) from None
    found: dict[str, Update] = {module: update}
    if "bias" in slots:
        found[f"{module}.bias"] = Dense(slots["bias"], low.scaling, "bias")
    return found


def _pair(module: str, slots: dict[str, Tensor], where: Path) -> tuple[Tensor, Tensor]:
    """(A, B) of a module, Linear or Embedding."""
    kind = "embedding_" if any(slot.startswith("embedding_") for slot in slots) else ""
    if kind and not slots.keys().isdisjoint(("down", "up")):
        raise FormatError("a module with the factors of a Linear and of an Embedding", f"{where}: {module}")
    require_pair(module, {slot.removeprefix(kind) for slot in slots}, where)
    return slots[kind + "down"], slots[kind + "up"]


def _carried_name(key: str, where: Path) -> str | None:
    """The parameter that a whole tensor stands for; None for copies that are dropped."""
    key = re.sub(r"\.modules_to_save\.[^.]+\.", ".", key)
    if ".original_module." in key:
        return None
    key = key.replace(".base_layer.", ".")
    if re.search(r"\.(lora_|token_adapter\.|trainable_tokens_|vera_|hada_|lokr_|oft_|boft_|ia3_)", key):
        raise FormatError("a tensor of a kind that is not supported yet", f"{where}: {key}")
    if not key.endswith((".weight", ".bias")):
        raise FormatError("a tensor whose meaning is unknown", f"{where}: {key}")
    return key


def _metadata(evidence: Evidence, scales: Scales, updates: Mapping[str, Update]) -> Metadata:
    config = evidence.config
    warnings = list(scales.warnings)
    if not scales.known:
        warnings.append("no adapter_config.json: the file does not tell its scaling")
    if config.get("use_dora") and not all(isinstance(u, DoRA) for n, u in updates.items() if not is_bias(n)):
        raise FormatError("use_dora is set but magnitudes are missing", evidence.path, "the file is incomplete")
    folder = evidence.path if evidence.path.is_dir() else None
    extras = sorted(p for p in folder.iterdir() if p.name in _TOKENIZER_FILES) if folder else []
    base = config.get("base_model_name_or_path")
    return Metadata(
        format="peft",
        path=evidence.path,
        weights=(evidence.weights,),
        strings=evidence.file.metadata,
        config=config,
        extras=tuple(extras),
        base_model=base if isinstance(base, str) and base else None,
        warnings=tuple(warnings),
        scaling_known=scales.known,
    )


# ---------------------------------------------------------------- writing


def losses(adapter: Adapter) -> list[Loss]:
    """What PEFT's LoRA cannot say."""
    found = []
    modules = adapter.modules()
    some_dora = any(isinstance(u, DoRA) for u in modules.values())
    for name, update in adapter.updates.items():
        reason = _loss(name, update, some_dora)
        if reason is None and is_bias(name) and name.removesuffix(".bias") not in modules:
            reason = "a bias delta without a LoRA on its module"
        if reason:
            found.append(Loss(adapter.spelling(name), reason))
    bare = (name for name in adapter.carried if not name.endswith((".weight", ".bias")))
    return found + [Loss(adapter.spelling(name), "a bare parameter, which PEFT does not save") for name in bare]


def _loss(name: str, update: Update, some_dora: bool) -> str | None:
    if is_bias(name):
        return None if isinstance(update, Dense) else "a bias update that is not a plain delta"
    if isinstance(update, DoRA):
        by_input = update.axis == 1 and update.layer != "embedding"
        return "a DoRA magnitude for each input; PEFT knows only outputs" if by_input else None
    if as_low_rank(update) is None:
        return f"an update of kind {update.kind} has no plain LoRA form"
    if some_dora:
        return "a LoRA beside DoRA modules; PEFT's use_dora holds for all"
    return None


def write(adapter: Adapter, path: Path) -> None:
    """Write a PEFT folder: tensors, configuration, and the tokenizer files that travelled along."""
    lost = {loss.name for loss in losses(adapter)}
    modules = {n: u for n, u in adapter.modules().items() if adapter.spelling(n) not in lost}
    biases = {n: u for n, u in adapter.updates.items() if is_bias(n) and adapter.spelling(n) not in lost}
    cut = _component(adapter)
    plain = {name: _layered(name, plain_low_rank(update)) for name, update in modules.items()}
    if len({low.rank_stabilised for low in plain.values()}) > 1:
        plain = {n: replace(low, alpha=low.scaling * low.rank, rank_stabilised=False) for n, low in plain.items()}
    tensors: dict[str, Tensor] = {}
    for name, update in modules.items():
        for slot, tensor in stored_slots(plain[name], update, biases, name).items():
            tensors[PREFIX + LAYOUT.key(name.removeprefix(cut), slot)] = tensor
    for name, tensor in adapter.carried.items():
        if adapter.spelling(name) not in lost:
            tensors[PREFIX + _stored_name(name, modules).removeprefix(cut)] = tensor
    config = configuration(adapter, {n.removeprefix(cut): low for n, low in plain.items()}, bool(biases))
    path.mkdir()
    write_safetensors(path / "adapter_model.safetensors", tensors, {"format": "pt", **adapter.metadata.strings})
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False))
    for extra in adapter.metadata.extras:
        (path / extra.name).write_bytes(extra.read_bytes())


def _component(adapter: Adapter) -> str:
    """The pipeline component to leave out of the names: PEFT wraps one model, whose own names have none."""
    heads = {name.split(".", 1)[0] for name in (*adapter.updates, *adapter.carried)}
    return f"{heads.pop()}." if len(heads) == 1 and adapter.metadata.format in ("kohya", "diffusers") else ""


def plain_low_rank(update: Update) -> LowRank:
    """The LoRA of an update that has one: its direction where it is a DoRA."""
    low = as_low_rank(update.direction if isinstance(update, DoRA) else update)
    assert low is not None  # losses() said so
    return low


def _layered(name: str, low: LowRank) -> LowRank:
    """An Embedding's LoRA as such, also from a format that does not tell it from a Linear's."""
    known = low.layer == "plain" and len(low.shape) == 2 and name.rpartition(".")[2] in EMBEDDING_LEAVES
    return low.oriented("embedding") if known else low


def stored_slots(low: LowRank, update: Update, biases: Mapping[str, Update], name: str) -> dict[str, Tensor]:
    """The stored tensors of one module, by PEFT's slots."""
    if low.layer == "embedding":
        slots = {"embedding_down": low.up.T, "embedding_up": low.down.T}
    else:
        kernel = low.down.shape[2:]
        slots = {"down": low.down, "up": low.up.reshape(*low.up.shape[:2], *(1 for _ in kernel))}
    if isinstance(update, DoRA):
        shape: tuple[int, ...] = (update.magnitude.size,)
        if len(low.down.shape) > 2:  # convolutions keep theirs as [1,o,1,1]
            shape = (1, *shape, *(1 for _ in low.down.shape[2:]))
        slots["magnitude"] = update.magnitude.reshape(*shape)
    if biases:
        slots["bias"] = _bias(biases.get(f"{name}.bias"), low)
    return slots


def _bias(delta: Update | None, low: LowRank) -> Tensor:
    """lora_B.bias, which PEFT multiplies by the scaling; zeros where this module has none."""
    if not isinstance(delta, Dense):
        return Tensor.of(np.zeros(low.up.shape[0], np.float32))
    if delta.scaling == low.scaling:
        return delta.value
    return Tensor.of(delta.value.float() * np.float32(delta.scaling / low.scaling))


def _stored_name(name: str, modules: Iterable[str]) -> str:
    """The key of a carried parameter: below ``base_layer`` where its module is wrapped."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module in modules else name


def configuration(adapter: Adapter, plain: Mapping[str, LowRank], lora_bias: bool) -> dict[str, Any]:
    """adapter_config.json for these modules; the source's own where it still says the same."""
    source = dict(adapter.metadata.config) if "peft_type" in adapter.metadata.config else {}
    ranks = {name: low.rank for name, low in plain.items()}
    alphas = {name: number(low.explicit_alpha) for name, low in plain.items()}
    rank_stabilised = any(low.rank_stabilised for low in plain.values())
    kinds = {u.kind for u in adapter.modules().values()}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.metadata.base_model,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "bias": _bias_kind(adapter, plain),
        "modules_to_save": _modules_to_save(adapter, plain),
        "target_modules": sorted(plain),
        **source,
        "fan_in_fan_out": any(low.layer == "transposed" for low in plain.values()),
        "use_rslora": rank_stabilised,
        "use_dora": "dora" in kinds,
        "lora_bias": lora_bias,
    }
    if not still_says(source, ranks, alphas, rank_stabilised):
        config["r"], config["rank_pattern"] = patterned(ranks, 8)
        config["lora_alpha"], config["alpha_pattern"] = patterned(alphas, 8)
        config.update(target_modules=sorted(plain), init_lora_weights=True)
    return config


def still_says(
    config: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float], rank_stabilised: bool
) -> bool:
    """Whether a configuration gives every module this rank and alpha."""
    if not config or bool(config.get("use_rslora")) != rank_stabilised:
        return False
    by_rank = Patterns(config.get("rank_pattern") or {}, "rank_pattern", Path(CONFIG))
    by_alpha = Patterns(config.get("alpha_pattern") or {}, "alpha_pattern", Path(CONFIG))
    r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    return all(by_rank.get(n, r) == rank and by_alpha.get(n, alpha) == alphas[n] for n, rank in ranks.items())


def patterned(values: Mapping[str, float], default: int) -> tuple[float, dict[str, float]]:
    """The commonest value, and by full name the modules that differ."""
    if not values:
        return default, {}
    common = Counter(values.values()).most_common(1)[0][0]
    anchored = {name: any(other.endswith(f".{name}") for other in values) for name in values}
    return common, {
        ("^" if anchored[name] else "") + re.escape(name).replace("\\_", "_"): value
        for name, value in values.items()
        if value != common
    }


def _bias_kind(adapter: Adapter, plain: Iterable[str]) -> str:
    """Whose biases were trained: of no module, of those with a LoRA, or of all."""
    whole = {name.rpartition(".")[0] for name in adapter.carried if not is_bias(name)}
    biased = {name.rpartition(".")[0] for name in adapter.carried if is_bias(name)} - whole
    return "none" if not biased else "lora_only" if biased <= set(plain) else "all"


def _modules_to_save(adapter: Adapter, plain: Mapping[str, LowRank]) -> list[str] | None:
    """Modules whose whole weight travels along and that carry no LoRA."""
    names = {name.rpartition(".")[0] for name in adapter.carried if not is_bias(name)}
    return sorted(names - set(plain)) or None


def number(value: float) -> float:
    """An integer where it is one: some readers insist."""
    return int(value) if float(value).is_integer() else value


FORMAT = Format(
    name="peft",
    title="Hugging Face PEFT folder",
    kinds=("lora", "dora"),
    container="folder",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
)
