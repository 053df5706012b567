"""The rows of PEFT's types whose kinds other formats have too: IA3, LyCORIS' and orthogonal ones, rows of tables.

Source: huggingface/peft 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loratool.adapter import is_bias
from loratool.errors import FormatError
from loratool.formats.peft.config import Patterns
from loratool.formats.peft.rows import Row, Slots, Words, from_fields, only, patterned, same, split, transposed
from loratool.kinds.hadamard import LoHa
from loratool.kinds.kronecker import LoKr
from loratool.kinds.rescale import IA3
from loratool.kinds.rotation import PeftBOFT, PeftOFT, PeftOldOFT
from loratool.kinds.tokens import Tokens
from loratool.update import Update


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
    update = from_fields(row, words, slots, module)
    bias = IA3(slots["vector"], centre=1.0)
    return {"": update} if getattr(update, "on_input") else {"": update, ".bias": bias}  # noqa: B009


def _ia3_agrees(updates: Mapping[str, Any]) -> bool:
    """PEFT's own: factors around 1, the bias of each layer whose outputs are rescaled with it."""
    outputs = {name: u for name, u in updates.items() if not is_bias(name) and not u.on_input}
    return all(u.centre == 1.0 for u in updates.values()) and all(
        (own := updates.get(f"{name}.bias")) is not None and same(own.vector, u.vector) for name, u in outputs.items()
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
    update = from_fields(row, words, slots, module)
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
        **transposed(updates),
    }


ROWS: tuple[Row, ...] = (
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
            **transposed(updates),
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
            **transposed(updates),
        },
    ),
)
