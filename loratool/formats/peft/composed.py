"""The rows of PEFT's types whose difference is composed of single values: of a spectrum, of chosen entries.

Source: huggingface/peft 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from loratool.formats.peft.rows import Row, Slots, Words, only, patterned, share, transposed
from loratool.kinds.composed import Circulant, Fourier, Shira, Supertuning, Wavelet


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
        **transposed(updates),
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


ROWS: tuple[Row, ...] = (
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
)
