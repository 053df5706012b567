"""Every tuner of PEFT whose update is a fixed change of weights: merged as PEFT merges it, written as PEFT reads it."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.model import read_model
from loratool.ops.convert import fit
from loratool.tensors import read_safetensors
from tests.samples import assert_same_adapter

pytestmark = pytest.mark.peer

TEXT: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LINEAR = ["q_proj", "k_proj", "down_proj"]  # [16,16] with a bias, [8,16] with a bias, [16,24] without
CONV1D = ["c_attn", "c_fc"]


def make_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    return LlamaForCausalLM(LlamaConfig(**TEXT, **sizes, **heads, max_position_embeddings=32))


def make_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**TEXT, n_embd=16, n_layer=2, n_head=4, n_positions=32))


def make_convnet() -> Any:
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(40, 6)
            self.conv = nn.Conv2d(6, 8, 3, padding=1)
            self.pointwise = nn.Conv2d(8, 4, 1)

        def forward(self, ids: Any) -> Any:
            image = self.tokens(ids).reshape(len(ids), -1, 4, 6).movedim(-1, 1)
            return self.pointwise(self.conv(image).tanh())

    return Net()


MODELS: Mapping[str, Callable[[], Any]] = {"llama": make_llama, "gpt2": make_gpt2, "convnet": make_convnet}


@dataclass(frozen=True)
class Case:
    """A type, a model and a configuration. ``exact`` says that it is a LoRA exactly."""

    type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    model: str = "llama"
    exact: bool = False


CASES: Mapping[str, Case] = {
    "adalora": Case("ADALORA", {"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 10}, exact=True),
    "adalora_gpt2": Case("ADALORA", {"init_r": 3, "lora_alpha": 8, "total_step": 10}, "gpt2", exact=True),
    "adalora_conv": Case(
        "ADALORA",
        {"init_r": 3, "lora_alpha": 8, "total_step": 10, "target_modules": ["conv", "pointwise"]},
        "convnet",
        exact=True,
    ),
    "vera": Case("VERA", {"r": 3}, exact=True),
    "vera_gpt2": Case("VERA", {"r": 3}, "gpt2", exact=True),
    "pvera": Case("PVERA", {"r": 3}, exact=True),
    "delora": Case("DELORA", {"r": 3}, exact=True),
    "delora_patterns": Case("DELORA", {"r": 3, "rank_pattern": {"k_proj": 2}}, exact=True),
    "vblora": Case("VBLORA", {"r": 2, "num_vectors": 10, "vector_length": 4, "topk": 3}, exact=True),
    "vblora_gpt2": Case("VBLORA", {"r": 2, "num_vectors": 10, "vector_length": 4}, "gpt2", exact=True),
    "vblora_topk": Case(
        "VBLORA", {"r": 2, "num_vectors": 10, "vector_length": 4, "save_only_topk_weights": True}, exact=True
    ),
    "randlora": Case("RANDLORA", {"r": 3, "randlora_alpha": 6}, exact=True),
    "randlora_sparse": Case("RANDLORA", {"r": 4, "randlora_alpha": 6, "sparse": True}, exact=True),
    "randlora_gpt2": Case("RANDLORA", {"r": 3, "randlora_alpha": 6}, "gpt2", exact=True),
    "gralora": Case("GRALORA", {"r": 4, "gralora_k": 2, "alpha": 8}, exact=True),
    "gralora_hybrid": Case("GRALORA", {"r": 8, "gralora_k": 4, "alpha": 8, "hybrid_r": 3}, exact=True),
    "gralora_gpt2": Case("GRALORA", {"r": 4, "gralora_k": 2, "hybrid_r": 2}, "gpt2", exact=True),
    "miss": Case("MISS", {"r": 3}, exact=True),
    "miss_mini": Case("MISS", {"r": 5, "init_weights": "mini", "mini_r": 4}, exact=True),
    "unilora": Case("UNILORA", {"r": 2, "theta_d_length": 20, "save_indices": True}, exact=True),
    "unilora_gpt2": Case("UNILORA", {"r": 2, "theta_d_length": 20, "save_indices": True}, "gpt2", exact=True),
    "fourierft": Case("FOURIERFT", {"n_frequency": 20, "scaling": 100.0}),
    "fourierft_patterns": Case("FOURIERFT", {"n_frequency": 9, "n_frequency_pattern": {"k_proj": 40}}),
    "fourierft_gpt2": Case("FOURIERFT", {"n_frequency": 20, "random_loc_seed": 5}, "gpt2"),
    "waveft": Case("WAVEFT", {"n_frequency": 20}),
    "waveft_db4": Case("WAVEFT", {"n_frequency": 20, "wavelet_family": "db4"}),
    "waveft_db3_gpt2": Case("WAVEFT", {"n_frequency": 20, "wavelet_family": "db3"}, "gpt2"),
    "waveft_plain": Case("WAVEFT", {"n_frequency": 20, "use_idwt": False}),
    "shira": Case("SHIRA", {"r": 1}),
    "supertuning": Case("SUPERTUNING", {"sparsity": 0.9}),
    "supertuning_lora": Case("SUPERTUNING", {"sparsity": 0.9, "r": 2, "lora_alpha": 3.0}),
    "c3a": Case("C3A", {"block_size": 4}),
    "hra": Case("HRA", {"r": 4}),
    "hra_orthogonal": Case("HRA", {"r": 3, "apply_GS": True, "init_weights": False}),
    "hra_conv": Case("HRA", {"r": 4, "target_modules": ["conv", "pointwise"]}, "convnet"),
    "hira": Case("HIRA", {"r": 3, "rank_pattern": {"k_proj": 2}}),
    "hira_gpt2": Case("HIRA", {"r": 3}, "gpt2"),
    "hira_conv": Case("HIRA", {"r": 3, "target_modules": ["conv", "pointwise", "tokens"]}, "convnet"),
    "miss_bat": Case("MISS", {"r": 4, "init_weights": "bat"}),
    "road_1": Case("ROAD", {"group_size": 4}),
    "road_2": Case("ROAD", {"group_size": 8, "variant": "road_2"}),
    "road_4": Case("ROAD", {"group_size": 4, "variant": "road_4"}),
    "glora": Case("GLORA", {"r": 3, "config_C": "none"}),
    "glora_vector": Case("GLORA", {"r": 3, "config_A_B": "vector", "config_C": "none", "config_D_E": "vector"}),
    "glora_constant": Case("GLORA", {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}),
    "deft": Case("DEFT", {"r": 3, "alpha": 5}),
    "deft_qr": Case("DEFT", {"r": 3, "decomposition_method": "qr"}),
    "deft_para": Case("DEFT", {"r": 3, "para": True}),
    "deft_gpt2": Case("DEFT", {"r": 3, "decomposition_method": "qr"}, "gpt2"),
    "osf": Case("OSF", {"effective_rank": 5, "target_svd_config": None}),
    "frod": Case("FROD", {"sparse_rate": 0.1, "progressbar": False}),
    "ln_tuning": Case("LN_TUNING", {"target_modules": ["input_layernorm", "model.norm"]}),
    "ln_tuning_gpt2": Case("LN_TUNING", {"target_modules": ["ln_1"]}, "gpt2"),
    "beft": Case("BEFT", {"target_modules": ["q_proj", "k_proj"]}),
    "tokens": Case("TRAINABLE_TOKENS", {"token_indices": [5, 1, 39], "target_modules": ["embed_tokens"]}),
    "ia3": Case("IA3", {"feedforward_modules": ["down_proj"]}),
    "ia3_gpt2": Case("IA3", {"feedforward_modules": ["c_fc"]}, "gpt2"),
    "ia3_conv": Case("IA3", {"target_modules": ["conv", "pointwise"], "feedforward_modules": r".*wise"}, "convnet"),
    "loha": Case("LOHA", {"r": 2, "alpha": 3, "alpha_pattern": {"k_proj": 5}, "rank_pattern": {"q_proj": 3}}),
    "loha_conv": Case("LOHA", {"r": 2, "target_modules": ["conv", "pointwise"]}, "convnet"),
    "loha_effective": Case("LOHA", {"r": 2, "use_effective_conv2d": True}, "convnet"),
    "lokr": Case("LOKR", {"r": 1, "alpha": 3}),
    "lokr_both": Case("LOKR", {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 8}),
    "lokr_whole": Case("LOKR", {"r": 30, "alpha": 3, "alpha_pattern": {"k_proj": 5}}),
    "lokr_conv": Case("LOKR", {"r": 1, "target_modules": ["conv", "pointwise"]}, "convnet"),
    "oft": Case("OFT", {"oft_block_size": 4}),
    "oft_exact": Case("OFT", {"oft_block_size": 4, "use_cayley_neumann": False, "coft": True, "eps": 0.5}),
    "oft_shared": Case("OFT", {"oft_block_size": 8, "block_share": True}),
    "oft_conv": Case("OFT", {"oft_block_size": 2}, "convnet"),
    "boft": Case("BOFT", {"boft_block_size": 4}),
    "boft_conv": Case("BOFT", {"boft_block_size": 2}, "convnet"),
    "c3a_patterns": Case("C3A", {"block_size": 4, "block_size_pattern": {"k_proj": 8}}),
}
every_case = pytest.mark.parametrize("name", CASES)


@cache
def model_of(name: str) -> Any:
    """A model in memory with weights of a visible size."""
    import torch

    torch.manual_seed(zlib.crc32(name.encode()))
    model = MODELS[name]().eval()
    for parameter, value in model.named_parameters():
        noise = torch.randn_like(value)
        value.data.copy_(noise * value[0].numel() ** -0.5 if value.ndim > 1 else 1 + 0.1 * noise)
        if parameter.endswith("bias"):
            value.data.copy_(0.1 * noise)
    return model


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`stored("llama")`: the folder of a model; read it only."""

    @cache
    def make(name: str) -> Path:
        from safetensors.torch import save_model

        folder = tmp_path_factory.mktemp(name)
        if hasattr(model_of(name), "save_pretrained"):
            model_of(name).save_pretrained(folder)
        else:
            save_model(model_of(name), str(folder / "model.safetensors"), {"format": "pt"})
            (folder / "config.json").write_text('{"model_type": "convnet"}')
        return folder

    return make


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tuned("vera")`: an adapter folder as PEFT saves it, every trained tensor random; read it only."""

    @cache
    def make(name: str) -> Path:
        return saved(CASES[name], tmp_path_factory.mktemp(name))

    return make


def saved(case: Case, folder: Path, **changes: Any) -> Path:
    import torch
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    targets = {"llama": LINEAR, "gpt2": CONV1D, "convnet": ["conv"]}[case.model]
    config = PEFT_TYPE_TO_CONFIG_MAPPING[case.type](**{"target_modules": targets} | dict(case.config) | changes)
    torch.manual_seed(zlib.crc32(case.type.encode()))
    model = get_peft_model(copy.deepcopy(model_of(case.model)), config)
    for parameter, value in model.named_parameters():
        if value.requires_grad:
            value.data.copy_(trained(parameter, value))
    model.save_pretrained(folder)
    return folder


def trained(name: str, value: Any) -> Any:
    """What training could have made of a parameter."""
    import torch

    noise = torch.randn_like(value)
    if "ia3" in name or "boft_s" in name:
        return 1 + 0.3 * noise
    return value + 0.3 * noise


def peft_model(case: Case, folder: Path) -> Any:
    """The adapter in PEFT; complains of missing and unexpected keys."""
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    model = PeftModel.from_pretrained(copy.deepcopy(model_of(case.model)), folder).eval()
    assert get_peft_model_state_dict(model).keys() == load_peft_weights(str(folder), device="cpu").keys()
    return model


def peft_merged(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """The weights after PEFT's merge."""
    merged = peft_model(case, folder).merge_and_unload()
    return {name: value.detach().numpy().copy() for name, value in merged.state_dict().items()}


def merged(base: Path, adapter: Any, out: Path, **options: Any) -> dict[str, np.ndarray]:
    """The weights after ours."""
    loratool.merge(base, adapter, out=out, **options)
    return {name: t.array() for name, t in read_safetensors(out / "model.safetensors").tensors.items()}


def assert_close(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], atol: float = 2e-6) -> None:
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], atol=atol, rtol=2e-6, err_msg=name)


# -- merging -------------------------------------------------------------------------------------------------


@every_case
def test_the_merge_is_peft_s(name: str, stored: Any, tuned: Any, tmp_path: Path) -> None:
    case = CASES[name]
    base, wanted = stored(case.model), peft_merged(case, tuned(name))
    found = merged(base, tuned(name), tmp_path / "out")
    assert_close(found, wanted)
    before = {key: tensor.array() for key, tensor in read_safetensors(base / "model.safetensors").tensors.items()}
    changed = {key.removesuffix(".weight") for key in before if not np.array_equal(before[key], found[key])}
    targets = loratool.read(tuned(name)).updates.keys()
    there = {target for target in targets if target.removesuffix(".weight") in changed}
    assert there and there >= {target for target in targets if not target.endswith(".bias")}


@every_case
def test_strength_multiplies_the_change(name: str, stored: Any, tuned: Any, tmp_path: Path) -> None:
    """W + s (W' - W)."""
    base = stored(CASES[name].model)
    before = {key: tensor.array() for key, tensor in read_safetensors(base / "model.safetensors").tensors.items()}
    once = merged(base, tuned(name), tmp_path / "once")
    half = merged(base, tuned(name), tmp_path / "half", strengths=[0.5])
    assert_close(half, {key: (before[key] + once[key]) / 2 for key in before})


# -- files ---------------------------------------------------------------------------------------------------


@every_case
def test_it_is_written_as_itself_byte_for_byte(name: str, tuned: Any, tmp_path: Path) -> None:
    adapter = loratool.read(tuned(name))
    assert {update.kind for update in adapter.updates.values()} == {CASES[name].type.lower()}
    loratool.write(adapter, tmp_path / "again", format="peft")
    one, other = (folder / "adapter_model.safetensors" for folder in (tuned(name), tmp_path / "again"))
    assert one.read_bytes() == other.read_bytes()
    assert_same_adapter(adapter, loratool.read(tmp_path / "again"))
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tuned(name), tmp_path / "again")]
    assert configs[0] == configs[1]


@every_case
def test_a_configuration_made_anew_gives_peft_the_same_model(
    name: str, stored: Any, tuned: Any, tmp_path: Path
) -> None:
    case = CASES[name]
    adapter, _ = fit(loratool.read(tuned(name)).with_metadata(config={}), read_model(stored(case.model)))
    loratool.write(adapter, tmp_path / "again", format="peft")
    assert_close(peft_merged(case, tmp_path / "again"), peft_merged(case, tuned(name)), 1e-7)


@every_case
def test_raw_carries_it(name: str, tuned: Any, tmp_path: Path) -> None:
    adapter = loratool.read(tuned(name))
    loratool.write(adapter, tmp_path / "raw.safetensors", format="raw")
    again = loratool.read(tmp_path / "raw.safetensors")
    assert_same_adapter(adapter, again)
    loratool.write(again, tmp_path / "again", format="peft")
    one, other = (folder / "adapter_model.safetensors" for folder in (tuned(name), tmp_path / "again"))
    assert one.read_bytes() == other.read_bytes()


def test_raw_holds_a_shared_tensor_once(tuned: Any, tmp_path: Path) -> None:
    loratool.write(loratool.read(tuned("vera")), tmp_path / "raw.safetensors", format="raw")
    shapes = [tensor.shape for tensor in read_safetensors(tmp_path / "raw.safetensors").tensors.values()]
    assert shapes.count((3, 24)) == 1 and shapes.count((16, 3)) == 1
