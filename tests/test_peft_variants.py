"""PEFT's own LoRA beyond plain layers: experts, attention, tokens, block-diagonal, pooled, KaSA; PEFT is the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter
from loratool.errors import FormatError, MatchError
from loratool.kinds.experts import Experts
from loratool.kinds.tokens import Tokens
from loratool.model import read_model
from loratool.tensors import Tensor, read_safetensors
from tests import models
from tests.samples import PEFT_CONFIG, assert_same_adapter, model, normal, peft_folder, peft_pair

PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {**PEFT_CONFIG, "peft_version": "0.21.2"}
Make = Callable[..., Path]


# -- toys and what PEFT makes of them ------------------------------------------------------------------------


def make_toy(name: str) -> Any:
    """A torch model with one layer of a kind that the tiny transformers do not have."""
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.last = nn.Linear(8, 4)

        def forward(self, x: Any) -> Any:
            x = self.first(x)
            return self.last(self.attn(x, x, x)[0])

    class Stack(nn.Module):
        """Two stacks of experts [E,o,i], or [E,i,o] with `is_transposed`; a matrix and a bias beside them."""

        def __init__(self, transposed: bool, inner: int = 5, width: int = 8) -> None:
            super().__init__()
            gate, down = (3, 2 * inner, width), (3, width, inner)
            turn = (lambda s: (s[0], s[2], s[1])) if transposed else (lambda s: s)
            self.gate_up_proj = nn.Parameter(torch.empty(turn(gate)))
            self.gate_up_proj_bias = nn.Parameter(torch.empty(3, 2 * inner))
            self.down_proj = nn.Parameter(torch.empty(turn(down)))
            self.transposed = transposed
            if transposed:
                self.is_transposed = True

        def forward(self, x: Any) -> Any:
            turn = (lambda w: w) if self.transposed else (lambda w: w.transpose(1, 2))
            inner = (x @ turn(self.gate_up_proj) + self.gate_up_proj_bias[:, None]).tanh()
            half = inner.shape[-1] // 2
            return ((inner[..., :half] * inner[..., half:]) @ turn(self.down_proj)).mean(0)

    class Matrix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.empty(8, 4))

        def forward(self, x: Any) -> Any:
            return x @ self.matrix

    class Mixture(nn.Module):
        def __init__(self, transposed: bool, **sizes: int) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.experts = Stack(transposed, **sizes)
            self.scale = Matrix()

        def forward(self, x: Any) -> Any:
            return self.scale(self.experts(self.first(x)))

    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 2 * 27)
            self.conv = nn.Conv3d(2, 3, 2)
            self.line = nn.Conv1d(3, 4, 3)

        def forward(self, x: Any) -> Any:
            return self.line(self.conv(self.first(x).reshape(-1, 2, 3, 3, 3)).flatten(2))

    makers: Mapping[str, Callable[[], Any]] = {
        "attention": Attention,
        "mixture": lambda: Mixture(False),
        "mixture_transposed": lambda: Mixture(True),
        "mixture_square": lambda: Mixture(False, inner=4),
        "volume": Volume,
    }
    torch.manual_seed(0)
    model = makers[name]().eval()
    for parameter, value in model.named_parameters():
        value.data.copy_(models.visible(parameter, value))
    return model


def toy_base(name: str, folder: Path) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(make_toy(name).state_dict(), folder / "model.safetensors", {"format": "pt"})
    model_type = "gpt_oss" if "transposed" in name else "toy"
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def loaded(model: Any, folder: Path) -> Any:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def trained(model: Any, config: Any, folder: Path) -> Path:
    """An adapter of `model`, every trained tensor of it random, as PEFT saves it."""
    import torch
    from peft import get_peft_model

    wrapped = get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter, value in wrapped.named_parameters():
        if value.requires_grad:
            noise = torch.randn_like(value)
            value.data.copy_(noise if "lora_diag" in parameter else models.trained(parameter, value))
    wrapped.save_pretrained(folder)
    return folder


def output(model: Any) -> np.ndarray:
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found: np.ndarray = model(torch.randn(5, 7, 6, generator=generator)[0]).numpy()
    return found


def with_adapter(model: Any, folder: Path) -> Any:
    """PEFT's own model with the adapter; complains of keys that are missing or left over."""
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    wrapped = PeftModel.from_pretrained(model, folder)
    wanted, found = get_peft_model_state_dict(wrapped).keys(), load_peft_weights(folder, device="cpu").keys()
    assert wanted == found, sorted(wanted ^ found)
    return wrapped.eval()


def close(one: Any, other: Any, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, float(np.abs(other).max())))


def check_toy(name: str, config: Any, tmp_path: Path, anew: bool = True) -> Adapter:
    """Our merge gives the outputs of PEFT's unmerged model, and so does PEFT with the adapter that we write.

    ``anew``: also without the configuration that the adapter came with.
    """
    base = toy_base(name, tmp_path / "base")
    lora = trained(make_toy(name), config, tmp_path / "lora")
    truth = output(with_adapter(make_toy(name), lora))
    assert np.abs(truth - output(make_toy(name))).max() > 1e-2  # the adapter is visible
    loratool.merge(base, lora, out=tmp_path / "merged")
    close(output(loaded(make_toy(name), tmp_path / "merged")), truth)
    adapter = loratool.read(lora)
    for number, source in enumerate((adapter, adapter.with_metadata(config={}))[: 1 + anew]):
        again = tmp_path / f"again{number}"
        loratool.write(source, again, format="peft")
        close(output(with_adapter(make_toy(name), again)), truth)
    stored = [folder / "adapter_model.safetensors" for folder in (lora, tmp_path / "again0")]
    if not (config.use_bdlora or config.use_qalora):
        assert stored[0].read_bytes() == stored[1].read_bytes()
        assert_same_adapter(loratool.read(tmp_path / "again0"), adapter)
    return adapter


EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]


def lora_config(**more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": []} | more)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["mixture", "mixture_transposed", "mixture_square"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"experts.gate_up_proj": 4}, "alpha_pattern": {"experts.down_proj": 3}},
        {"target_modules": ["first"], "target_parameters": [*EXPERTS, "scale.matrix"]},
        {"target_parameters": [*EXPERTS, "first.weight"], "bias": "all"},
    ],
)
def test_stacked_experts_equal_peft(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    """llm traps 3, 4 and 6: two packings, nested wrappers in the order of registration, either orientation."""
    config = {"target_parameters": EXPERTS} | more
    two_axes = len(config["target_parameters"]) > 2  # only the configuration tells a matrix from a module's weight
    adapter = check_toy(name, lora_config(**config), tmp_path, anew=not two_axes)
    kinds = {target: type(update) for target, update in adapter.updates.items()}
    assert kinds["experts.gate_up_proj"] is Experts and kinds["experts.down_proj"] is Experts


@pytest.mark.peer
@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True}, {"alpha_pattern": {"attn": 5}, "target_modules": ["attn", "last"]}]
)
def test_attention_equals_peft(more: dict[str, Any], tmp_path: Path) -> None:
    """llm trap 29: PEFT counts out_proj twice, forward and merge alike; so does what was trained with it."""
    from peft import LoraModel  # noqa: F401 - the oracle must be there

    adapter = check_toy("attention", lora_config(**{"target_modules": ["attn"]} | more), tmp_path)
    assert {"attn.in_proj_weight", "attn.out_proj"} <= set(adapter.updates)
    assert adapter.updates["attn.out_proj"].scaling == 2 * adapter.updates["attn.in_proj_weight"].scaling
    assert any("counts twice" in warning for warning in adapter.metadata.warnings)


@pytest.mark.peer
def test_convolutions_of_one_and_three_axes_equal_peft(tmp_path: Path) -> None:
    config = lora_config(target_modules=["conv", "line"], use_dora=True)
    adapter = check_toy("volume", config, tmp_path)
    assert adapter.updates["conv"].shape == (3, 2, 2, 2, 2) and adapter.updates["line"].shape == (4, 3, 3)


@pytest.mark.peer
def test_block_diagonal_factors_equal_peft(tmp_path: Path) -> None:
    from peft.tuners.lora.config import BdLoraConfig

    words = BdLoraConfig(target_modules_bd_a=["fir"], target_modules_bd_b=["last"], nblocks=2)
    adapter = check_toy("attention", lora_config(target_modules=["first", "last"], use_bdlora=words), tmp_path)
    stored = read_safetensors(tmp_path / "lora" / "adapter_model.safetensors").tensors
    assert stored[f"{PREFIX}first.lora_A.weight"].shape == (2, 3) and adapter.updates["first"].slots["down"].shape == (
        2,
        6,
    )


@pytest.mark.peer
def test_pooled_inputs_equal_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llm trap 23: PEFT offers QALoRA for GPTQ layers only, by this very class; the factor is n/g."""
    from peft.tuners.lora import layer, variants

    def variant(self: Any, *, config: Any, **more: Any) -> Any:
        return variants.QALoraLinearVariant() if config.use_qalora else None

    monkeypatch.setattr(layer.Linear, "resolve_lora_variant", variant)
    config = lora_config(target_modules=["last"], use_qalora=True, qalora_group_size=4)
    adapter = check_toy("attention", config, tmp_path)
    assert adapter.updates["last"].scaling == 3 * 2 / 4  # alpha / r, two groups of four


@pytest.mark.peer
def test_kasa_equals_peft(tmp_path: Path) -> None:
    from peft.tuners.lora.config import KasaConfig

    adapter = check_toy("attention", lora_config(target_modules=["first", "last"], kasa_config=KasaConfig()), tmp_path)
    assert {update.kind for update in adapter.updates.values()} == {"kasa"}


# -- trainable tokens ----------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "indices", "more"),
    [
        ("llama", [3, 5, 7], {}),
        ("llama", {"embed_tokens": [7, 2], "lm_head": [4]}, {}),
        ("gpt2", {"wte": [5, 4, 9]}, {"target_modules": ["c_attn"]}),
        ("llama_tied", [3, 5, 7], {}),
        ("llama_tied", [3, 5, 7], {"ensure_weight_tying": True}),
        ("llama_tied", {"embed_tokens": [1, 2], "lm_head": [1, 2]}, {}),
        ("llama_tied", {"embed_tokens": [1, 2], "lm_head": [4]}, {}),
    ],
)
def test_trained_tokens_equal_peft(name: str, indices: Any, more: dict[str, Any], base: Make, tmp_path: Path) -> None:
    """llm trap 36: rows are replaced. On tied weights both ends, unless they have rows of their own."""
    import torch

    config = {"target_modules": ["q_proj"]} | more
    lora = trained(
        models.load_model(base(name)), lora_config(trainable_token_indices=indices, **config), tmp_path / "x"
    )
    truth = models.logits(base(name), lora)
    loratool.merge(base(name), lora, out=tmp_path / "out")
    assert torch.allclose(models.logits(tmp_path / "out"), truth, atol=1e-5 * float(truth.abs().max()))
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    apart = isinstance(indices, dict) and len(indices) > 1 and len({str(rows) for rows in indices.values()}) > 1
    assert told["tie_word_embeddings"] is (name != "llama" and not apart)
    adapter = loratool.read(lora)
    assert any(isinstance(update, Tokens) for update in adapter.updates.values())
    for number, source in enumerate((adapter, adapter.with_metadata(config={}))):
        loratool.write(source, tmp_path / f"again{number}", format="peft")
        found = models.logits(base(name), tmp_path / f"again{number}")
        assert torch.allclose(found, truth, atol=1e-5 * float(truth.abs().max()))
    assert_same_adapter(loratool.read(tmp_path / "again0"), adapter)


TOKENS = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": normal(3, 4)}


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (None, "does not tell the rows"),
        ([1, 2], "rows of shape"),
        ([1, 2, 2], "occurs twice"),
        ([1, 2, -1], "does not tell the rows"),
        ([1, 2, True], "does not tell the rows"),
        ([1, 2, 1 << 70], "does not tell the rows"),
        ({"lm_head": [1, 2, 3]}, "does not tell the rows"),
        ({"embed_tokens": "123"}, "does not tell the rows"),
    ],
)
def test_token_indices_that_fit_nothing_are_refused(indices: Any, message: str, tmp_path: Path) -> None:
    tensors = {**peft_pair("q"), **TOKENS}
    with pytest.raises(FormatError, match=message) as caught:
        loratool.read(peft_folder(tmp_path / "x", tensors, CONFIG | {"trainable_token_indices": indices}))
    assert "embed_tokens" in str(caught.value)


def test_a_lora_beside_trained_tokens_of_one_module_is_refused(tmp_path: Path) -> None:
    """PEFT saves it and cannot run it."""
    tensors = {**TOKENS, **peft_pair("model.embed_tokens")}
    with pytest.raises(FormatError, match="has a LoRA as well"):
        loratool.read(peft_folder(tmp_path / "x", tensors, CONFIG | {"trainable_token_indices": [1, 2, 3]}))


def test_a_token_beyond_the_table_is_a_mismatch(tmp_path: Path) -> None:
    base = model(tmp_path / "base", {"model.embed_tokens.weight": normal(9, 4)})
    lora = peft_folder(tmp_path / "x", TOKENS, CONFIG | {"trainable_token_indices": [1, 2, 9]})
    with pytest.raises(MatchError, match="token 9 is beyond the base's 9 rows"):
        loratool.merge(base, lora, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokens_of_a_longer_vocabulary_bring_it(tmp_path: Path) -> None:
    """llm trap 41: the base copy that was resized is in the file; a tied head goes along."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
        "vocab_size": 9,
    }
    base = model(tmp_path / "base", {"model.embed_tokens.weight": normal(9, 4)}, config)
    longer = np.concatenate((normal(9, 4).array(), normal(2, 4, seed=8).array()))
    key = f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight"
    tensors = {**TOKENS, key: Tensor.of(longer)}
    lora = peft_folder(tmp_path / "x", tensors, CONFIG | {"trainable_token_indices": [1, 9, 10]})
    loratool.merge(base, lora, out=tmp_path / "out")
    merged = read_model(tmp_path / "out")
    assert list(merged.parameters) == ["model.embed_tokens.weight"] and merged.configs[""]["vocab_size"] == 11
    longer[[1, 9, 10]] = normal(3, 4).array()
    np.testing.assert_array_equal(merged.parameters["model.embed_tokens.weight"][0].tensor.array(), longer)


# -- experts of real architectures ---------------------------------------------------------------------------


def make_moe(name: str) -> Any:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    if name == "gpt_oss":  # as the real one: down_proj is square, [E,in,out]
        config = transformers.GptOssConfig(**models.TEXT, **sizes, intermediate_size=16)
        return transformers.GptOssForCausalLM(config)
    config = transformers.Llama4TextConfig(**models.TEXT, **sizes, intermediate_size=24, intermediate_size_mlp=24)
    return transformers.Llama4ForCausalLM(config)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
def test_experts_of_a_transformer_equal_peft(name: str, tmp_path: Path) -> None:
    """llm traps 4 and 6: gpt-oss is known to be transposed; Llama 4 is, and PEFT does not know: shapes decide."""
    import torch

    torch.manual_seed(0)
    model = make_moe(name)
    for parameter, value in model.named_parameters():
        value.data.copy_(models.visible(parameter, value))
    base = models.save_model(model, tmp_path / "base", {})
    config = lora_config(target_parameters=EXPERTS[::-1], target_modules=["q_proj"], rank_pattern={".*down_proj": 3})
    lora = trained(models.load_model(base), config, tmp_path / "lora")
    truth = models.logits(base, lora)
    loratool.merge(base, lora, out=tmp_path / "out")
    found = models.logits(tmp_path / "out")
    assert torch.allclose(found, truth, atol=1e-5 * float(truth.abs().max()))
    assert not torch.allclose(models.logits(base), truth, atol=1e-2)
