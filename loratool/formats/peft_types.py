"""The table of PEFT's tuners beside LoRA: how each names its tensors, and what its configuration says of them.

Fields that only guide the training (initialisation, dropout) are kept as they are. Source: huggingface/peft 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from loratool.adapter import is_bias
from loratool.errors import FormatError
from loratool.formats.peft_config import Patterns
from loratool.formats.peft_rows import (
    Row,
    Slots,
    Words,
    from_fields,
    only,
    patterned,
    same,
    share,
    split,
    transposed,
)
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
    Network,
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
from loratool.kinds.tuner import axes
from loratool.lazy import np
from loratool.tensors import Tensor
from loratool.update import LowRank, Update


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


def _miss_built(row: Row, words: Words, slots: Slots, module: str) -> dict[str, Update]:
    """One block for all, or (bat) one for each block of outputs."""
    whole, bat = row.kinds
    if (len(slots["block"].shape) == 3) != (words.table.get("init_weights") == "bat"):
        raise FormatError(f"a block of shape {list(slots['block'].shape)} with another init_weights")
    return {
        "": from_fields(replace(row, kinds=(bat if len(slots["block"].shape) == 3 else whole,)), words, slots, module)
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
BY_NAME: Mapping[str, Row] = {row.name: row for row in ROWS}
WORDS: tuple[str, ...] = tuple(dict.fromkeys(row.name.lower() for row in ROWS))

REFUSED: Mapping[str, str] = {
    "PSOFT": "it turns singular vectors of the base, whose signs are a matter of the library that finds them",
    "SHADOW": "a second model runs beside the base, it is no change of weights",
    "ADAMSS": "which outputs its blocks stand for is found by clustering the base, and not in the file",
}
