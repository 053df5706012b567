"""Synthetic models of real shapes: weights without meaning, sizes and names of the real thing."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from loratool.tensors import Tensor, write_safetensors


@dataclass(frozen=True)
class Shapes:
    """The sizes of a Llama-like model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    def divided(self, by: int) -> Shapes:
        """A narrower model, to try a benchmark itself."""
        return replace(self, hidden=self.hidden // by, inner=self.inner // by)

    def projections(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block, [out, in]."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }


LLAMA_1B = Shapes(2048, 8192, 16, 32, 8, 128256, tied=True)
LLAMA_8B = Shapes(4096, 14336, 32, 32, 8, 128256, tied=False)


def write_base(folder: Path, shapes: Shapes, dtype: str = "BF16", shards: int = 4) -> None:
    """A sharded Hugging Face folder of these shapes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 24, dtype=np.float32) * 0.02).astype(_numpy(dtype))

    def tensor(*shape: int) -> Tensor:
        count = int(np.prod(shape))
        start = int(rng.integers(0, 1 << 20))
        values = np.resize(pool[start:], count).reshape(shape)
        return Tensor.of(values)

    names = ["embed_tokens", *range(shapes.layers), "norm"]
    parts = np.array_split(np.array(names, dtype=object), shards)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        tensors: dict[str, Tensor] = {}
        for name in part:
            if name == "embed_tokens":
                tensors["model.embed_tokens.weight"] = tensor(shapes.vocab, shapes.hidden)
                if not shapes.tied:
                    tensors["lm_head.weight"] = tensor(shapes.vocab, shapes.hidden)
            elif name == "norm":
                tensors["model.norm.weight"] = tensor(shapes.hidden)
            else:
                for leaf in ("input_layernorm", "post_attention_layernorm"):
                    tensors[f"model.layers.{name}.{leaf}.weight"] = tensor(shapes.hidden)
                for leaf, shape in shapes.projections().items():
                    tensors[f"model.layers.{name}.{leaf}.weight"] = tensor(*shape)
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / file, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    size = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(shapes, dtype)))


def write_adapter(
    folder: Path, shapes: Shapes, rank: int = 16, dtype: str = "F32", seed: int = 1, falling: bool = False
) -> None:
    """A PEFT LoRA on every linear layer; with ``falling`` its spectrum is no plateau."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    fall = np.arange(1, rank + 1, dtype=np.float32) ** (-0.5 if falling else 0)
    tensors: dict[str, Tensor] = {}
    for layer in range(shapes.layers):
        for leaf, (out, inner) in shapes.projections().items():
            module = f"base_model.model.model.layers.{layer}.{leaf}"
            down = rng.standard_normal((rank, inner), dtype=np.float32) * 0.02
            up = rng.standard_normal((out, rank), dtype=np.float32) * 0.02 * fall
            tensors[f"{module}.lora_A.weight"] = Tensor.of(down, dtype)
            tensors[f"{module}.lora_B.weight"] = Tensor.of(up, dtype)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(leaf.rpartition(".")[2] for leaf in shapes.projections()),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _numpy(dtype: str) -> np.dtype:
    return np.dtype({"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[dtype])


def _config(shapes: Shapes, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.inner,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.kv_heads,
        "vocab_size": shapes.vocab,
        "tie_word_embeddings": shapes.tied,
        "torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
    }
