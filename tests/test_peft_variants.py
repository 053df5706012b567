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
from loratool.kinds.experts import Experts
from loratool.tensors import read_safetensors
from tests import models
from tests.samples import PEFT_CONFIG, assert_same_adapter

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
