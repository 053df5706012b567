"""How language models lay out experts and fused projections, by ``model_type``. Data only.

The same weights lie one by one or stacked, fused or apart, depending on the model and on the version of transformers
that names them. What a layout cannot tell from its shapes (which half is the gate, which axis the input) stands here:
it is never guessed. Source: huggingface/transformers 5.23 (conversion_mapping.py and the modelling code).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

# ---------------------------------------------------------------- experts

# what an expert's projection is, by its leaf; "gate_up" is both, one below the other
EXPERT_LEAVES: Mapping[str, str] = {
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up"},
    **{"w1": "gate", "w3": "up", "w2": "down"},  # mixtral
    **{"fc1": "gate", "fc3": "up", "fc2": "down"},
}
# stacks that lie in the block itself, without ``experts`` (granitemoe)
BLOCK_LEAVES: Mapping[str, str] = {"input_linear": "gate_up", "output_linear": "down"}
# what the block of a layer that holds the experts is called
EXPERT_BLOCKS = frozenset(("mlp", "block_sparse_moe", "feed_forward", "mixer", "moe", "ffn"))
# segments before the layers that one naming has and another leaves out
OUTER = frozenset(("model", "language_model", "transformer", "backbone", "text_model", "thinker"))


class StackLayout(NamedTuple):
    """How a model stores its stacked experts: [E,o,i], or ``transposed`` [E,i,o]; None where its shape must tell.

    ``interleaved``: gate and up take turns, else the gate comes first.
    """

    transposed: bool | None = False
    interleaved: bool = False


_PLAIN = StackLayout()
STACKS: Mapping[str, StackLayout] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2", "phimoe", "lfm2_moe", "jamba", "nemotron_h"), _PLAIN),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker"), _PLAIN),
    **dict.fromkeys(("qwen3_omni_moe_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmoe", "flex_olmo"), _PLAIN),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "longcat_flash", "dots1", "afmoe"), _PLAIN),
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe", "glm4v_moe_text"), _PLAIN),
    **dict.fromkeys(("ernie4_5_moe", "hunyuan_v1_moe", "exaone_moe", "cohere2_moe", "solar_open"), _PLAIN),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), _PLAIN),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe_text"), StackLayout(None)),  # both are in use on disk
    **dict.fromkeys(("llama4", "llama4_text"), StackLayout(True)),
    "gpt_oss": StackLayout(True, interleaved=True),
}


class Naming(NamedTuple):
    """How a family names experts one by one: the block, and the leaves of gate, up and down."""

    block: str
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


_MIXTRAL = Naming("block_sparse_moe", ("w1", "w3", "w2"))
# one by one, as transformers 4 has them; the stacks of transformers 5 lie in ``mlp`` unless the block is its own
ONE_BY_ONE: Mapping[str, Naming] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2", "phimoe"), _MIXTRAL),
    **dict.fromkeys(("jamba",), Naming("feed_forward")),
    **dict.fromkeys(("lfm2_moe",), Naming("feed_forward", ("w1", "w3", "w2"))),
    **dict.fromkeys(("nemotron_h",), Naming("mixer")),
}

# ---------------------------------------------------------------- fused projections

Ranges = tuple[tuple[int, int], ...]
Sizes = Mapping[str, int]  # of a configuration: heads, keys, width of a head


class Fused(NamedTuple):
    """A fused projection: its leaf, the leaves of its parts, and the rows of each (in units, of how many).

    ``rows`` gives them from the model's numbers of heads and of key and value heads.
    """

    leaf: str
    parts: tuple[str, ...]
    rows: Callable[[int, int], tuple[tuple[Ranges, ...], int]]


def _blocks(heads: int, keys: int) -> tuple[tuple[Ranges, ...], int]:
    """All queries, all keys, all values; in heads."""
    edges = (0, heads, heads + keys, heads + 2 * keys)
    return tuple(((a, b),) for a, b in pairwise(edges)), edges[-1]


def _per_group(heads: int, keys: int) -> tuple[tuple[Ranges, ...], int]:
    """For each key head its queries, the key, the value; in heads."""
    group = heads // keys + 2
    starts = [group * n for n in range(keys)]
    spans = ((0, group - 2), (group - 2, group - 1), (group - 1, group))
    return tuple(tuple((s + a, s + b) for s in starts) for a, b in spans), group * keys


def _halves(heads: int, keys: int) -> tuple[tuple[Ranges, ...], int]:
    """The gate, then what it gates."""
    return (((0, 1),), ((1, 2),)), 2


_QKV = ("q_proj", "k_proj", "v_proj")
_SPELLED = ("query", "key", "value")
_GATE_UP = Fused("gate_up_proj", ("gate_proj", "up_proj"), _halves)
FUSED: Mapping[str, tuple[Fused, ...]] = {
    **dict.fromkeys(("phi3", "phi4_multimodal", "glm", "glm4"), (Fused("qkv_proj", _QKV, _blocks), _GATE_UP)),
    **dict.fromkeys(("gpt_neox", "bloom"), (Fused("query_key_value", _QKV, _per_group),)),
    **dict.fromkeys(("falcon",), (Fused("query_key_value", _QKV, _per_group),)),
    **dict.fromkeys(("internlm2",), (Fused("wqkv", ("wq", "wk", "wv"), _per_group), Fused("wqkv", _QKV, _per_group))),
    **dict.fromkeys(("mpt", "dbrx"), (Fused("Wqkv", _QKV, _blocks),)),
    **dict.fromkeys(("qwen",), (Fused("c_attn", _QKV, _blocks),)),
    **dict.fromkeys(("chatglm",), (Fused("query_key_value", _QKV, _blocks),)),
    **dict.fromkeys(("baichuan",), (Fused("W_pack", _QKV, _blocks),)),
}


def heads_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(heads, key and value heads) of a configuration; None where it does not tell."""
    text = config.get("text_config")
    told = {**config, **text} if isinstance(text, dict) else config
    heads = next((told[key] for key in ("num_attention_heads", "n_head", "n_heads") if key in told), None)
    keys = next((told[key] for key in ("num_key_value_heads", "num_kv_heads", "n_head_kv") if key in told), heads)
    if config.get("model_type") == "falcon" and not told.get("new_decoder_architecture"):
        keys = 1 if told.get("multi_query", True) else heads
    if not (type(heads) is int and type(keys) is int and 0 < keys <= heads < 1 << 16) or heads % keys:
        return None
    return heads, keys


# ---------------------------------------------------------------- modules that changed their names

# by family, all at once and in this order: as on disk and in transformers 4 -> as in memory in transformers 5
RENAMED_PARTS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("block_sparse_moe.gate", "mlp.router"), ("block_sparse_moe", "mlp")),  # phimoe
    (("block_sparse_moe", "mlp"),),  # mixtral
    (("router.layer", "router"),),  # granitemoe
    (("backbone", "model"),),  # nemotron_h
    (  # vision transformers
        *(("encoder.layer", "layers"), ("attention.attention.query", "attention.q_proj")),
        *(("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj")),
        *(("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1")),
        ("output.dense", "mlp.fc2"),
    ),
    (  # dinov2
        *(("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj")),
        *(("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj")),
        ("mlp.weights_out", "mlp.down_proj"),
    ),
    (  # swin
        *(("attention.self.query", "attention.q_proj"), ("attention.self.key", "attention.k_proj")),
        *(("attention.self.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj")),
        *(("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2")),
    ),
    (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
)


def renamed_parts(name: str, pairs: tuple[tuple[str, str], ...], back: bool) -> str:
    """A name with the first fitting pair applied at each place: whole segments only."""
    dotted = f".{name}."
    for one, other in pairs:
        old, new = (other, one) if back else (one, other)
        dotted = dotted.replace(f".{old}.", f".{new}.", 1)
    return dotted[1:-1]


# (as in transformers 4, as in transformers 5): the beginning of a name, by model_type
_LLAVA = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
_QWEN_VL = (("visual.", "model.visual."), ("model.", "model.language_model."))
VERSIONED_PREFIXES: Mapping[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("llava", "paligemma", "gemma3", "internvl", "aya_vision", "mistral3", "got_ocr2"), _LLAVA),
    **dict.fromkeys(("vipllava", "llava_next", "llava_next_video", "llava_onevision", "aria"), _LLAVA),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN_VL),
    "gpt_neox": (("embed_out.", "lm_head."),),
    "nemotron_h": (("backbone.", "model."),),
}
