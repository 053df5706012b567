"""Writing adapter_config.json of a LoRA: the source's own words where they still say the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, is_bias
from loratool.formats.base import CONFIG
from loratool.formats.peft.config import (
    DOUBLES_OUT_PROJ,
    REWRITTEN,
    Patterns,
    expert_order,
    listed,
    mutating,
    saved_whole,
    token_indices,
    version,
)
from loratool.formats.peft.keys import is_in_proj
from loratool.kinds.experts import Experts
from loratool.kinds.tokens import Tokens
from loratool.kinds.truncated import Truncated
from loratool.update import DoRA, LowRank


def configuration(
    adapter: Adapter,
    pairs: Mapping[str, LowRank | Experts],
    lora_bias: bool,
    parameters: Collection[str] = (),
) -> dict[str, Any]:
    """adapter_config.json for pairs by module (or, if among ``parameters``, by parameter).

    The source's own where it still says the same.
    """
    lora = str(adapter.metadata.config.get("peft_type", "")).upper() == "LORA"  # another tuner's says nothing of a LoRA
    source = dict(adapter.metadata.config) if lora else {}
    modules = sorted(set(pairs) - set(parameters))
    config = {
        **_usual(adapter, pairs, modules),
        **source,
        **{field: plain for field, plain in REWRITTEN.items() if field in source},
        **_parameter_fields(source, sorted(parameters)),
        **_token_fields(adapter, source),
        **_saved_field(adapter, source, pairs),
        **_flags(adapter, pairs, lora_bias, source),
        **_version_field(pairs, any(map(is_in_proj, adapter.updates)), source),
    }
    if mutating(source):
        config["init_lora_weights"] = True
    ranks = {rule: pair.rank or 1 for rule, pair in pairs.items()}
    alphas = {rule: number(pair.explicit_alpha) for rule, pair in pairs.items()}
    if not still_says(source, ranks, alphas, config["use_rslora"]) or _moved(source, parameters):
        config["r"], config["rank_pattern"] = patterned(ranks, 8)
        config["lora_alpha"], config["alpha_pattern"] = patterned(alphas, 8)
        config.update(target_modules=modules, init_lora_weights=True)
    return config


def _usual(adapter: Adapter, pairs: Iterable[str], modules: list[str]) -> dict[str, Any]:
    """What stands in a configuration unless its source says otherwise."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.metadata.base_model,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "bias": _bias_kind(adapter, pairs),
        "modules_to_save": _modules_to_save(adapter, pairs),
        "target_modules": modules,
    }


def _flags(
    adapter: Adapter, pairs: Mapping[str, LowRank | Experts], lora_bias: bool, source: Mapping[str, Any]
) -> dict[str, Any]:
    """What the tensors show, whatever the source said."""
    kinds = {type(update) for update in adapter.modules().values()}
    return {
        "fan_in_fan_out": any(isinstance(p, LowRank) and p.layer == "transposed" for p in pairs.values()),
        "use_rslora": any(pair.rank_stabilised for pair in pairs.values()),
        "use_dora": DoRA in kinds,
        "lora_bias": lora_bias,
        **({"kasa_config": source.get("kasa_config") or {}} if Truncated in kinds else {}),
    }


def _version_field(
    pairs: Mapping[str, LowRank | Experts], attention: bool, source: Mapping[str, Any]
) -> dict[str, Any]:
    """peft_version, where what is written means what it means in one only: it is told which that is."""
    orders = {pair.order for pair in pairs.values() if isinstance(pair, Experts)} - {"shape"}
    said = expert_order(source)
    other = bool(orders) and said != "model" and orders != {said}
    silent = attention and version(source) is None
    return {"peft_version": ".".join(map(str, DOUBLES_OUT_PROJ))} if other or silent else {}


def _saved_field(adapter: Adapter, source: Mapping[str, Any], pairs: Iterable[str]) -> dict[str, Any]:
    """modules_to_save where the source's own does not have the modules of bare parameters."""
    told = source.get("modules_to_save") or []
    bare = [name for name in adapter.carried if not name.endswith((".weight", ".bias"))]
    if not bare or all(saved_whole(name, told) for name in bare):
        return {}
    modules = {name.rpartition(".")[0] for name in bare}
    return {"modules_to_save": sorted({*(_modules_to_save(adapter, pairs) or []), *told, *modules})}


def _parameter_fields(source: Mapping[str, Any], parameters: list[str]) -> dict[str, Any]:
    """target_parameters, and what PEFT does not allow beside it."""
    if not parameters:
        return {}
    told = source.get("target_parameters") or []
    same = told and not _moved(source, parameters)
    return {"target_parameters": told if same else parameters, "lora_dropout": 0.0}


def _moved(source: Mapping[str, Any], parameters: Iterable[str]) -> bool:
    """Whether parameters are not the source's own, or its parameters are modules here (``q_proj.weight``)."""
    told = source.get("target_parameters") or []
    return any(entry.endswith("weight") for entry in told) or not all(listed(name, told) for name in parameters)


def _token_fields(adapter: Adapter, source: Mapping[str, Any]) -> dict[str, Any]:
    """trainable_token_indices by module; the source's own list where there is one module."""
    rows = {name: update.indices for name, update in adapter.updates.items() if isinstance(update, Tokens)}
    if not rows:
        return {}
    told = source.get("trainable_token_indices")
    same = isinstance(told, list) and list(rows.values()) == [told]
    if isinstance(told, dict):
        same = all(rows_of == token_indices(name, source, Path(CONFIG)) for name, rows_of in rows.items())
    return {"trainable_token_indices": told if same else rows}


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
    tails = {tail for name in values for tail in _tails(name)}
    return common, {
        ("^" if name in tails else "") + re.escape(name).replace("\\_", "_"): value
        for name, value in values.items()
        if value != common
    }


def _tails(name: str) -> Iterator[str]:
    """What a name ends in, from each of its dots on."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _bias_kind(adapter: Adapter, plain: Iterable[str]) -> str:
    """Whose biases were trained: of no module, of those with a LoRA, or of all."""
    whole = {name.rpartition(".")[0] for name in adapter.carried if not is_bias(name)}
    biased = {name.rpartition(".")[0] for name in adapter.carried if is_bias(name)} - whole
    return "none" if not biased else "lora_only" if biased <= set(plain) else "all"


def _modules_to_save(adapter: Adapter, plain: Iterable[str]) -> list[str] | None:
    """Modules whose whole weight travels along and that carry no LoRA."""
    names = {name.rpartition(".")[0] for name in adapter.carried if not is_bias(name)}
    return sorted(names - set(plain)) or None


def number(value: float) -> float:
    """An integer where it is one: some readers insist."""
    return int(value) if float(value).is_integer() else value
