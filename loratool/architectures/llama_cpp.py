"""llama.cpp's names of language models: which of its architectures a model type is, and what its tensors are called.

Data only. ``{}`` stands for the number of a layer; experts, one by one in Hugging Face's names, lie in one stack.
Source: ggml-org/llama.cpp, conversion/ and gguf-py (tensor_mapping.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Pairs = tuple[tuple[str, str], ...]
Rows = Literal["", "rotary", "grouped"]
"""How llama.cpp reorders output rows: not; those of q and k from halves to pairs, as its rotary embedding turns them;
those of a fused projection from [q..., k, v] a head (or group of heads) to all q, all k, all v."""

_EDGES: Pairs = (("model.embed_tokens", "token_embd"), ("lm_head", "output"))
_ATTENTION: Pairs = (
    ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
)
_UP_DOWN: Pairs = (
    ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
)
_GATED: Pairs = (("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"), *_UP_DOWN)
_ROUTED: Pairs = (
    ("model.layers.{}.mlp.gate", "blk.{}.ffn_gate_inp"),
    ("model.layers.{}.mlp.experts.gate_proj", "blk.{}.ffn_gate_exps"),
    ("model.layers.{}.mlp.experts.up_proj", "blk.{}.ffn_up_exps"),
    ("model.layers.{}.mlp.experts.down_proj", "blk.{}.ffn_down_exps"),
)
_SHARED: Pairs = (
    ("model.layers.{}.mlp.shared_expert_gate", "blk.{}.ffn_gate_inp_shexp"),
    ("model.layers.{}.mlp.shared_expert.gate_proj", "blk.{}.ffn_gate_shexp"),
    ("model.layers.{}.mlp.shared_expert.up_proj", "blk.{}.ffn_up_shexp"),
    ("model.layers.{}.mlp.shared_expert.down_proj", "blk.{}.ffn_down_shexp"),
)
_MIXTRAL: Pairs = (
    ("model.layers.{}.block_sparse_moe.gate", "blk.{}.ffn_gate_inp"),
    ("model.layers.{}.block_sparse_moe.experts.w1", "blk.{}.ffn_gate_exps"),
    ("model.layers.{}.block_sparse_moe.experts.w2", "blk.{}.ffn_down_exps"),
    ("model.layers.{}.block_sparse_moe.experts.w3", "blk.{}.ffn_up_exps"),
)
_LLAMA = (*_EDGES, *_ATTENTION, *_GATED)
_HEADLESS = (_EDGES[0], *_ATTENTION, *_GATED)  # always tied: no tensor for the output projection
_GPT2: Pairs = (
    ("transformer.wte", "token_embd"),
    ("lm_head", "output"),
    ("transformer.h.{}.attn.c_attn", "blk.{}.attn_qkv"),
    ("transformer.h.{}.attn.c_proj", "blk.{}.attn_output"),
    ("transformer.h.{}.mlp.c_fc", "blk.{}.ffn_up"),
    ("transformer.h.{}.mlp.c_proj", "blk.{}.ffn_down"),
)


@dataclass(frozen=True)
class LlamaCpp:
    """One architecture of llama.cpp: its name, the names of its tensors, how its rows are ordered.

    ``tied`` says that it has no output projection of its own unless a configuration says otherwise.
    """

    name: str
    pairs: Pairs
    rows: Rows = ""
    tied: bool = False


def _fused(prefix: str, attention: str, edges: Pairs) -> Pairs:
    """Falcon, Bloom and GPT-NeoX: one projection for q, k and v."""
    return (
        *edges,
        (f"{prefix}.{{}}.{attention}.query_key_value", "blk.{}.attn_qkv"),
        (f"{prefix}.{{}}.{attention}.dense", "blk.{}.attn_output"),
        (f"{prefix}.{{}}.mlp.dense_h_to_4h", "blk.{}.ffn_up"),
        (f"{prefix}.{{}}.mlp.dense_4h_to_h", "blk.{}.ffn_down"),
    )


_WORDS: Pairs = (("transformer.word_embeddings", "token_embd"), ("lm_head", "output"))
_NEOX: Pairs = (("gpt_neox.embed_in", "token_embd"), ("embed_out", "output"))

# by transformers' model_type; of several with one architecture the first is meant where nothing else tells
LLAMA_CPP: Mapping[str, LlamaCpp] = {
    "llama": LlamaCpp("llama", _LLAMA, "rotary"),
    "mistral": LlamaCpp("llama", _LLAMA, "rotary"),
    "mixtral": LlamaCpp("llama", (*_EDGES, *_ATTENTION, *_MIXTRAL), "rotary"),
    "ministral3": LlamaCpp("mistral3", _LLAMA, "rotary"),
    "mistral3": LlamaCpp("mistral3", _LLAMA, "rotary"),
    "granite": LlamaCpp("granite", _LLAMA, "rotary"),
    "smollm3": LlamaCpp("smollm3", _LLAMA, "rotary"),
    "minicpm": LlamaCpp("minicpm", _LLAMA, "rotary"),
    "olmo": LlamaCpp("olmo", _LLAMA, "rotary"),
    "arcee": LlamaCpp("arcee", (*_EDGES, *_ATTENTION, *_UP_DOWN), "rotary"),
    "qwen2": LlamaCpp("qwen2", _LLAMA),
    "qwen3": LlamaCpp("qwen3", _LLAMA),
    "qwen2_vl": LlamaCpp("qwen2vl", _LLAMA),
    "qwen2_5_vl": LlamaCpp("qwen2vl", _LLAMA),
    "qwen3_vl": LlamaCpp("qwen3vl", _LLAMA),
    "qwen2_moe": LlamaCpp("qwen2moe", (*_EDGES, *_ATTENTION, *_ROUTED, *_SHARED)),
    "qwen3_moe": LlamaCpp("qwen3moe", (*_EDGES, *_ATTENTION, *_ROUTED)),
    "olmoe": LlamaCpp("olmoe", (*_EDGES, *_ATTENTION, *_ROUTED)),
    "olmo2": LlamaCpp("olmo2", _LLAMA),
    "olmo3": LlamaCpp("olmo2", _LLAMA),
    "seed_oss": LlamaCpp("seed_oss", _LLAMA),
    "exaone4": LlamaCpp("exaone4", _LLAMA),
    "gemma": LlamaCpp("gemma", _HEADLESS),
    "gemma2": LlamaCpp("gemma2", _HEADLESS),
    "gemma3_text": LlamaCpp("gemma3", _LLAMA, tied=True),
    "gemma3": LlamaCpp("gemma3", _LLAMA, tied=True),
    "cohere": LlamaCpp("command-r", _HEADLESS),
    "cohere2": LlamaCpp("cohere2", _HEADLESS),
    "stablelm": LlamaCpp("stablelm", _LLAMA),
    "nemotron": LlamaCpp("nemotron", (*_EDGES, *_ATTENTION, *_UP_DOWN)),
    "phi3": LlamaCpp(
        "phi3",
        (
            *_EDGES,
            ("model.layers.{}.self_attn.qkv_proj", "blk.{}.attn_qkv"),
            ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
            ("model.layers.{}.mlp.gate_up_proj", "blk.{}.ffn_up"),
            ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
        ),
    ),
    "phi": LlamaCpp(
        "phi2",
        (
            *_EDGES,
            *_ATTENTION[:3],
            ("model.layers.{}.self_attn.dense", "blk.{}.attn_output"),
            ("model.layers.{}.mlp.fc1", "blk.{}.ffn_up"),
            ("model.layers.{}.mlp.fc2", "blk.{}.ffn_down"),
        ),
    ),
    "starcoder2": LlamaCpp(
        "starcoder2",
        (
            *_EDGES,
            *_ATTENTION,
            ("model.layers.{}.mlp.c_fc", "blk.{}.ffn_up"),
            ("model.layers.{}.mlp.c_proj", "blk.{}.ffn_down"),
        ),
        tied=True,
    ),
    "gpt2": LlamaCpp("gpt2", _GPT2, tied=True),
    "gpt_bigcode": LlamaCpp("starcoder", _GPT2, tied=True),
    "gpt_neox": LlamaCpp("gptneox", _fused("gpt_neox.layers", "attention", _NEOX), "grouped"),
    "bloom": LlamaCpp("bloom", _fused("transformer.h", "self_attention", _WORDS), "grouped", tied=True),
    "falcon": LlamaCpp("falcon", _fused("transformer.h", "self_attention", _WORDS), "grouped", tied=True),
    "mpt": LlamaCpp(
        "mpt",
        (
            ("transformer.wte", "token_embd"),
            ("transformer.blocks.{}.attn.Wqkv", "blk.{}.attn_qkv"),
            ("transformer.blocks.{}.attn.out_proj", "blk.{}.attn_output"),
            ("transformer.blocks.{}.ffn.up_proj", "blk.{}.ffn_up"),
            ("transformer.blocks.{}.ffn.down_proj", "blk.{}.ffn_down"),
        ),
        tied=True,
    ),
}
