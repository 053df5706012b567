"""The rows of PEFT's types whose difference depends on the base.

Source: huggingface/peft 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratool.adapter import is_bias
from loratool.errors import FormatError
from loratool.formats.peft.rows import Row, Slots, Words, from_fields, only, patterned, share, transposed
from loratool.kinds.based import BiasShift, Frod, Glora, Hira, Householder, Injection, LnTuning, Network, Road, Subspace
from loratool.kinds.tuner import axes
from loratool.lazy import np
from loratool.tensors import Tensor
from loratool.update import LowRank, Update


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
    turn = from_fields(row, words, slots, module)
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


_SIDES = ("encoders", "decoders")


_DEPTH = 8  # layers on each side that are known by name: PEFT's own is 0


def _peanut(row: Row, words: Words, slots: Slots, module: str) -> dict[str, Update]:
    """A network whose layers are numbered. Raises FormatError where a number is left out."""
    sides = {side: [n for n in range(_DEPTH) if f"{side}.{n}" in slots] for side in _SIDES}
    if any(found != list(range(len(found))) for found in sides.values()) or not {"down", "up"} <= slots.keys():
        raise FormatError(f"a network of {', '.join(sorted(slots))}")
    layers: dict[str, Any] = {side: tuple(slots[f"{side}.{n}"] for n in found) for side, found in sides.items()}
    told = row.settings(words, slots, module)
    return {"": Network(down=slots["down"], up=slots["up"], **layers, **told)}


def _peanut_taken(row: Row, updates: Mapping[str, Any]) -> Slots:
    update = updates[""]
    layers = {f"{side}.{n}": layer for side in _SIDES for n, layer in enumerate(getattr(update, side))}
    return {"down": update.down, "up": update.up, **layers}


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


ROWS: tuple[Row, ...] = (
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
        told=lambda updates: {**patterned(updates, lambda u: u.rank, "r", "rank_pattern"), **transposed(updates)},
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
            **transposed(updates),
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
            **transposed(updates),
        },
    ),
    Row(
        "PEANUT",
        (Network,),
        (
            ("down", ".peanut_A.weight"),
            ("up", ".peanut_B.weight"),
            *((f"{side}.{n}", f".peanut_{side}.{n}.weight") for side in _SIDES for n in range(_DEPTH)),
        ),
        told=lambda updates: {
            "r": only(updates, lambda u: u.rank),
            "depth": only(updates, lambda u: len(u.encoders)),
            "act_fn": only(updates, lambda u: u.activation),
            "scaling": only(updates, lambda u: u.scale),
        },
        settings=lambda words, slots, module: {
            "activation": str(words.table.get("act_fn", "relu")),
            "scale": float(words.number("scaling", 1.0)),
        },
        build=_peanut,
        take=_peanut_taken,
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
)
