"""How PEFT names tensors: its prefix and suffixes, and what wrappers of training and raw dumps put around them."""

from __future__ import annotations

import re

from loratool.keys import Layout

PREFIX = "base_model.model."
LAYOUT = Layout(
    slots=(
        ("down", ".lora_A.weight"),
        ("up", ".lora_B.weight"),
        ("bias", ".lora_B.bias"),
        ("embedding_down", ".lora_embedding_A"),
        ("embedding_up", ".lora_embedding_B"),
        ("magnitude", ".lora_magnitude_vector"),
        ("diagonal", ".lora_diag"),
        ("tokens", ".token_adapter.trainable_tokens_delta"),
    ),
    aliases=(("down", ".lora_A"), ("up", ".lora_B"), ("magnitude", ".lora_magnitude_vector.weight")),
)
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ADAPTER_NAME = re.compile(
    r"(\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector|diag)|token_adapter\.trainable_tokens_delta))"
    r"\.(?!weight$|bias$)[^.]+(?=(\.weight|\.bias)?$)"
)
_NESTED = re.compile(r"\.base_layer(?=\.|$)")
OUT_PROJ = ".base_layer.out_proj"  # of a MultiheadAttention, which PEFT wraps with it


def normalise(key: str) -> str:
    """A key without the wrappers of training frameworks, PEFT's prefix and the adapter's name."""
    key = unwrapped(key)
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return without_adapter_name(key)


def without_adapter_name(key: str) -> str:
    """A key without the adapter's name before or in the place of its suffix."""
    return _ADAPTER_NAME.sub(r"\1", key)


def unwrapped(key: str) -> str:
    """A key without the wrappers of torch.compile, FSDP and DDP."""
    return _WRAPPERS.sub("", key).removeprefix("module.")


def unnested(module: str) -> str:
    """A module's path without the wrappers around it."""
    return _NESTED.sub("", module)


def is_in_proj(name: str) -> bool:
    """Whether a target is the input projection of a torch MultiheadAttention."""
    return name.endswith(".in_proj_weight")
