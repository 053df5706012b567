"""The rows of PEFT's types whose difference is made of factors that the file holds, or draws.

Source: huggingface/peft 0.21.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from loratool.errors import FormatError
from loratool.formats.peft.rows import Row, Slots, Words, from_fields, only, patterned, transposed
from loratool.kinds.based import BlockAffine, BoneAffine
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
from loratool.update import Update


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
    return {**told, "rank_pattern": {**masks, **full} if masks else None, **transposed(updates)}


def _rank(updates: Mapping[str, Any]) -> dict[str, Any]:
    return {"r": only(updates, lambda u: u.rank), **transposed(updates)}


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


def _miss_built(row: Row, words: Words, slots: Slots, module: str) -> dict[str, Update]:
    """One block for all, or (bat) one for each block of outputs."""
    whole, bat = row.kinds
    if (len(slots["block"].shape) == 3) != (words.table.get("init_weights") == "bat"):
        raise FormatError(f"a block of shape {list(slots['block'].shape)} with another init_weights")
    return {
        "": from_fields(replace(row, kinds=(bat if len(slots["block"].shape) == 3 else whole,)), words, slots, module)
    }


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
        copied=(("down", ".vera_A"), ("up", ".vera_B")),
        drawn=_vera_drawn(1),
        gain=("scale_up",),
        told=lambda updates: {**_rank(updates), "save_projection": True},
    ),
    Row(
        "PVERA",
        (Pvera,),
        (("scale_up", ".pvera_lambda_b"), ("scale_down", ".pvera_lambda_d")),
        shared=(("down", "pvera_A"), ("up", "pvera_B")),
        copied=(("down", ".pvera_A"), ("up", ".pvera_B")),
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
        saves_copies=True,
        gain=("scale",),
        settings=lambda words, slots, module: {"alpha": float(words.number("randlora_alpha", 640))},
        told=lambda updates: {
            "r": only(updates, lambda u: u.scale.shape[0]),
            "randlora_alpha": only(updates, lambda u: u.alpha),
            "save_projection": True,
            **transposed(updates),
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
            **transposed(updates),
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
)
