"""What is known of language models: renamed prefixes, transposed layers, tied weights. Data only.

Source: huggingface/transformers 4 and 5 (conversion_mapping.py, ``_tied_weights_keys``, ``Conv1D``).
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

# Prefixes that changed between transformers 4 and 5, between disk and memory, or between a model and the model
# inside it: each pair is tried in both directions. Plain additions (``model.``, ``transformer.``, ``bert.``) need no
# entry: names are also matched by whole-segment suffix.
RENAMED_PREFIXES: tuple[tuple[str, str], ...] = (
    ("language_model.model.", "model.language_model."),  # llava, gemma3, paligemma, internvl, mistral3
    ("language_model.lm_head.", "lm_head."),
    ("model.layers.", "model.language_model.layers."),  # qwen2_vl, qwen2_5_vl
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.norm.", "model.language_model.norm."),
    ("visual.", "model.visual."),
    ("vision_tower.", "model.vision_tower."),
    ("vision_model.", "model.vision_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("embed_out.", "lm_head."),  # gpt_neox
    ("text_encoder.text_model.", "text_encoder."),  # CLIPTextModel lost this level in transformers 5
    ("text_encoder_2.text_model.", "text_encoder_2."),
)

# Models whose projections are transformers' Conv1D, weight [in,out], and the names of those projections (OpenCLIP has
# a c_fc and a c_proj too, plain ones).
CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "decision_transformer", "imagegpt"))
CONV1D_NAMES = re.compile(r"(^|\.)h\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_proj|c_fc)\.weight$")

# Models whose stacked experts are [E,in,out]; those of all others are [E,out,in] (transformers 5, `is_transposed`).
TRANSPOSED_EXPERTS = frozenset(("aria", "aria_text", "gpt_oss", "openai_privacy_filter"))

# Leaf names of input embeddings: for formats that must know an Embedding and are told nothing.
EMBEDDING_LEAVES = frozenset(
    (
        "embed_tokens",
        "embed_in",
        "embed_positions",
        "relative_attention_bias",
        "wte",
        "wpe",
        "shared",
        "tok_embeddings",
        "token_embedding",
    )
) | {"position_embedding", "word_embeddings", "position_embeddings", "token_type_embeddings"}


def experts_transposed(config: Mapping[str, Any]) -> bool | None:
    """Whether a model stores its stacked experts as [E,in,out]; None where its configuration does not name it."""
    found = config.get("model_type")
    return found in TRANSPOSED_EXPERTS if isinstance(found, str) else None


# Leaf names of what has a row for each token: the input embedding and the output projection.
VOCABULARY_LEAVES = frozenset(("embed_tokens", "embed_in", "wte", "shared", "tok_embeddings", "lm_head", "embed_out"))


@dataclass(frozen=True)
class Tie:
    """One tied pair: the output projection and the input embedding that lends it its weight.

    ``separable`` is False where untying changes the forward pass beyond the weight.
    """

    head: str
    embedding: str
    separable: bool = True


# by model_type; the default is looked up by leaf name
TIES: Mapping[str, Tie] = {
    "t5": Tie("lm_head", "shared", separable=False),  # a tied head scales by d_model ** -0.5
    "mt5": Tie("lm_head", "shared", separable=False),
    "umt5": Tie("lm_head", "shared", separable=False),
    "whisper": Tie("proj_out", "model.decoder.embed_tokens"),
    "bart": Tie("lm_head", "model.shared", separable=False),
    "gpt2": Tie("lm_head", "transformer.wte"),
    "opt": Tie("lm_head", "model.decoder.embed_tokens"),
}
_DEFAULT_TIES = (
    Tie("lm_head", "model.embed_tokens"),
    Tie("lm_head", "model.language_model.embed_tokens"),
    Tie("lm_head", "language_model.model.embed_tokens"),
    Tie("lm_head", "transformer.wte"),
)
_HEADED = ("CausalLM", "LMHead", "ConditionalGeneration", "ForSpeechSeq2Seq")


def tie_of(config: Mapping[str, Any], modules: Container[str]) -> Tie | None:
    """The tied pair of a model with this config.json and these modules on disk, or None where nothing is tied.

    Tied means: the architecture has an output projection and the configuration does not deny the tie. The embedding
    is given under the name it has in ``modules`` (a checkpoint may leave the class prefix out).
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    told = [c["tie_word_embeddings"] for c in (config, text or {}) if "tie_word_embeddings" in c]
    headed = any(mark in str(name) for name in config.get("architectures") or () for mark in _HEADED)
    if not headed or any(value is False for value in told):
        return None
    known = TIES.get(str(config.get("model_type")))
    for tie in (known,) if known else _DEFAULT_TIES:
        names = (tie.embedding, tie.embedding.split(".", 1)[-1])
        found = next((name for name in names if name in modules), None)
        if found and (told or tie.head not in modules):
            return Tie(tie.head, found, tie.separable)
    return None
