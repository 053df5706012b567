"""Tiny language models and adapters for the tests of their dialects; deltas computed by the definition. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapter import Adapter, Metadata
from loratool.tensors import Tensor
from loratool.update import DoRA, LowRank, Update
from tests import samples
from tests.samples import normal

Shape = tuple[int, int]
Q, KV, HEAD, HIDDEN, INNER, VOCAB = 4, 2, 6, 20, 14, 9  # q is 24 wide, k and v 12

LLAMA: Mapping[str, Shape] = {
    "model.embed_tokens": (VOCAB, HIDDEN),
    "lm_head": (VOCAB, HIDDEN),
    **{
        f"model.layers.{layer}.{module}": shape
        for layer in (0, 1)
        for module, shape in {
            "self_attn.q_proj": (Q * HEAD, HIDDEN),
            "self_attn.k_proj": (KV * HEAD, HIDDEN),
            "self_attn.v_proj": (KV * HEAD, HIDDEN),
            "self_attn.o_proj": (HIDDEN, Q * HEAD),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items()
    },
}
CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": Q,
    "num_key_value_heads": KV,
    "head_dim": HEAD,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}


def experts(leaves: Mapping[str, Shape], where: str = "mlp.experts", count: int = 3) -> dict[str, Shape]:
    """Modules of a mixture of experts, one by one."""
    return {f"model.layers.0.{where}.{n}.{leaf}": shape for n in range(count) for leaf, shape in leaves.items()}


def low(
    shape: Shape, rank: int = 3, alpha: float | None = 6.0, dtype: str = "F32", seed: int = 0, **more: Any
) -> LowRank:
    """A LoRA of an [o,i] weight."""
    down, up = normal(rank, shape[1], dtype=dtype, seed=seed), normal(shape[0], rank, dtype=dtype, seed=seed + 1)
    return LowRank(down, up, alpha=alpha, **more)


def adapter(shapes: Mapping[str, Shape], config: Mapping[str, Any] = CONFIG, **more: Any) -> Adapter:
    """An adapter with a LoRA of each of these modules; embeddings as such."""
    updates: dict[str, Update] = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        layer = "embedding" if name.endswith(("embed_tokens", "wte", "embed_in", "word_embeddings")) else "plain"
        updates[name] = low(shape, seed=2 * seed, layer=layer, **more)
    return Adapter(updates, {}, Metadata("sample", base_config=config))


def delta(update: Update) -> np.ndarray:
    """scaling x up @ down in float64, from the stored values; the direction's of a DoRA."""
    inner = update.direction if isinstance(update, DoRA) else update
    assert isinstance(inner, LowRank)
    up, down = (tensor.float().astype(np.float64) for tensor in (inner.up, inner.down))
    return inner.scaling * (up @ down)


def assert_same_deltas(one: Adapter, other: Adapter, tolerance: float = 1e-6) -> None:
    """The same modules, each with the same delta (and magnitude)."""
    assert one.updates.keys() == other.updates.keys()
    for name, update in one.updates.items():
        again = other.updates[name]
        expected = delta(update)
        assert again.shape == update.shape, name
        assert np.abs(delta(again) - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-30), name
        if isinstance(update, DoRA):
            assert isinstance(again, DoRA)
            assert np.array_equal(again.magnitude.float().ravel(), update.magnitude.float().ravel()), name


def base(folder: Path, shapes: Mapping[str, Shape] = LLAMA, config: Mapping[str, Any] = CONFIG) -> Path:
    """A model folder with these weights."""
    weights = {f"{name}.weight": normal(*shape, seed=50 + n) for n, (name, shape) in enumerate(shapes.items())}
    return samples.model(folder, weights, config)


def tensor(values: Any, dtype: str = "F32") -> Tensor:
    """A tensor of these values."""
    return Tensor.of(np.asarray(values, np.float32), dtype)
