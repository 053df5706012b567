"""Every tuner of PEFT whose update is a fixed change of weights: merged as PEFT merges it, written as PEFT reads it."""

from __future__ import annotations

import copy
import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter
from loratool.errors import FormatError, LoratoolError, LossError, MatchError
from loratool.formats.peft import types
from loratool.model import read_model
from loratool.names import match
from loratool.ops.changes import Changes, check_values
from loratool.ops.convert import fit
from loratool.tensors import Tensor, read_safetensors, write_safetensors
from loratool.update import as_low_rank
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
    "vera_drawn": Case("VERA", {"r": 3, "projection_prng_key": 7, "save_projection": False}, exact=True),
    "vera_drawn_gpt2": Case("VERA", {"r": 3, "save_projection": False}, "gpt2", exact=True),
    "pvera_drawn": Case("PVERA", {"r": 3, "save_projection": False}, exact=True),
    "tinylora": Case("TINYLORA", {"r": 2, "u": 3}, exact=True),
    "tinylora_groups": Case("TINYLORA", {"r": 3, "u": 2, "weight_tying": 0.5}, exact=True),
    "tinylora_one": Case("TINYLORA", {"r": 2, "u": 3, "weight_tying": 1.0}, "gpt2", exact=True),
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
    "peanut": Case("PEANUT", {"r": 3}),
    "peanut_deep": Case("PEANUT", {"r": 3, "depth": 2, "act_fn": "silu", "scaling": 2.0}),
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
    model.create_or_update_model_card = lambda folder: None  # slow, and nothing reads it
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


@pytest.fixture(scope="session")
def read(stored: Any, tuned: Any) -> Callable[..., Adapter]:
    """`read("vera")`: the adapter as we read it, the base at hand; `read("vera", folder)`: another folder of it."""

    def made(name: str, folder: Path | None = None) -> Adapter:
        return loratool.read(folder or tuned(name), base=stored(CASES[name].model))

    return made


@pytest.fixture(scope="session")
def oracle(tuned: Any) -> Callable[[str], dict[str, np.ndarray]]:
    """`oracle("vera")`: the weights after PEFT's merge."""
    return cache(lambda name: peft_merged(CASES[name], tuned(name)))


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {key: tensor.array() for key, tensor in read_safetensors(folder / "model.safetensors").tensors.items()}


def assert_same_files(one: Path, other: Path) -> None:
    assert (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (one, other)]
    assert configs[0] == configs[1]


# -- merging -------------------------------------------------------------------------------------------------


@every_case
def test_the_merge_is_peft_s(name: str, stored: Any, tuned: Any, read: Any, oracle: Any, tmp_path: Path) -> None:
    """Section 2 of llm.md, row by row; and at half the strength W + (W' - W) / 2. llm.md trap 21: adalora."""
    base = stored(CASES[name].model)
    found = merged(base, tuned(name), tmp_path / "out")
    assert_close(found, oracle(name))
    before = weights(base)
    changed = {key.removesuffix(".weight") for key in before if not np.array_equal(before[key], found[key])}
    targets = read(name).updates.keys()
    there = {target for target in targets if target.removesuffix(".weight") in changed}
    assert there and there >= {target for target in targets if not target.endswith(".bias")}
    if not CASES[name].exact:
        half = merged(base, tuned(name), tmp_path / "half", strengths=[0.5])
        assert_close(half, {key: (before[key] + found[key]) / 2 for key in before})


@pytest.mark.parametrize("name", ["vera", "gralora_hybrid", "fourierft", "c3a", "hra", "road_1", "deft", "osf", "oft"])
def test_a_base_in_bfloat16_is_rounded_once(name: str, stored: Any, tuned: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(stored(CASES[name].model), base)
    wide = read_safetensors(base / "model.safetensors").tensors
    narrow = {key: Tensor.of(tensor.cast("BF16").array()) for key, tensor in wide.items()}
    rewrite(base / "model.safetensors", narrow)
    exact = tmp_path / "exact"
    shutil.copytree(base, exact)
    rewrite(exact / "model.safetensors", {k: Tensor.of(t.float()) for k, t in narrow.items()})
    wanted = merged(exact, tuned(name), tmp_path / "wide")
    for key, value in merged(base, tuned(name), tmp_path / "out").items():
        np.testing.assert_array_equal(value, Tensor.of(wanted[key]).cast("BF16").array(), key)


def test_a_pruned_adalora_divides_by_its_first_rank(stored: Any, tuned: Any, tmp_path: Path) -> None:
    """llm.md traps 21 and 22: the masks are no ranks, the tensors are cut already; one module is cut to nothing."""
    source = tmp_path / "pruned"
    shutil.copytree(tuned("adalora"), source)
    tensors = dict(read_safetensors(source / "adapter_model.safetensors").tensors)
    masks, kept = {}, [[True, False, True, True], [False, False, False, False]]
    modules = sorted({key.rsplit(".", 1)[0] for key in tensors})
    for number, module in enumerate(modules):
        mask = np.array(kept[number == 2])
        masks[module.removeprefix("base_model.model.") + ".lora_E"] = mask.tolist()
        for leaf, axis in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
            values = np.compress(mask, tensors[f"{module}.{leaf}"].array(), axis)
            tensors[f"{module}.{leaf}"] = Tensor.of(values)
    rewrite(source / "adapter_model.safetensors", tensors)
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": masks}))
    found = merged(stored("llama"), source, tmp_path / "out")
    assert_close(found, peft_merged(CASES["adalora"], source))
    adapter = loratool.read(source)
    assert sorted({update.rank for update in adapter.updates.values()}) == [0, 3]
    assert_same_files(source, written(adapter, tmp_path))
    low = as_low_rank(adapter.updates[modules[2].removeprefix("base_model.model.")])
    assert low is not None and not low.delta().any()
    (source / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {k: [True] * 4 for k in masks}}))
    with pytest.raises(FormatError, match="rank_pattern"):
        loratool.read(source)


# -- files ---------------------------------------------------------------------------------------------------


def written(adapter: Adapter, folder: Path, format: str = "peft") -> Path:
    loratool.write(adapter, folder / "again", format=format)
    return folder / "again"


@every_case
def test_it_is_written_as_itself_byte_for_byte(name: str, tuned: Any, read: Any, tmp_path: Path) -> None:
    adapter = read(name)
    assert {update.kind for update in adapter.updates.values()} == {CASES[name].type.lower()}
    again = written(adapter, tmp_path)
    assert_same_files(tuned(name), again)
    assert_same_adapter(adapter, read(name, again))


@pytest.mark.parametrize("name", ["vera", "randlora", "oft", "gralora_hybrid", "osf", "supertuning_lora", "adalora"])
def test_the_adapter_s_name_in_the_keys_is_left_out(name: str, read: Any, tuned: Any, tmp_path: Path) -> None:
    """llm.md trap 15: a raw dump of a state dict, whose keys hold ``default``."""
    from peft import PeftModel

    dump = PeftModel.from_pretrained(copy.deepcopy(model_of("llama")), tuned(name)).state_dict()
    raw = {k: Tensor.of(v.numpy()) for k, v in dump.items() if ".default" in k and "ranknum" not in k}
    assert len(raw) >= len(read_safetensors(tuned(name) / "adapter_model.safetensors").tensors)
    folder = edited(tuned(name), tmp_path, tensors=lambda _: raw)
    assert_same_adapter(read(name), read(name, folder))


def test_bone_is_miss_by_its_former_name(stored: Any, tuned: Any, oracle: Any, tmp_path: Path) -> None:
    """PEFT up to 0.17 wrote it so."""
    for name in ("miss", "miss_bat"):
        (tmp_path / name).mkdir()
        folder = edited(
            tuned(name),
            tmp_path / name,
            {"peft_type": "BONE"},
            lambda held: {key.replace("miss_block", "bone_block"): tensor for key, tensor in held.items()},
        )
        assert_close(merged(stored("llama"), folder, tmp_path / f"{name}_out"), oracle(name))
        adapter = loratool.read(folder)
        assert {update.kind for update in adapter.updates.values()} == {"bone"}
        assert_same_files(folder, written(adapter, tmp_path / name))


@every_case
def test_a_configuration_made_anew_gives_peft_the_same_model(
    name: str, stored: Any, read: Any, oracle: Any, tmp_path: Path
) -> None:
    case = CASES[name]
    adapter, _ = fit(read(name).with_metadata(config={}), read_model(stored(case.model)))
    assert_close(peft_merged(case, written(adapter, tmp_path)), oracle(name), 1e-7)


@every_case
def test_raw_carries_it(name: str, tuned: Any, read: Any, tmp_path: Path) -> None:
    adapter = read(name)
    loratool.write(adapter, tmp_path / "raw.safetensors", format="raw")
    again = loratool.read(tmp_path / "raw.safetensors")
    assert_same_adapter(adapter, again)
    assert_same_files(tuned(name), written(again, tmp_path))


@pytest.mark.parametrize("name", ["vera", "glora", "shira", "tinylora", "peanut_deep", "vblora_topk", "oft", "hira"])
def test_another_dtype_reaches_every_floating_tensor(name: str, tuned: Any, tmp_path: Path) -> None:
    for format in ("peft", "raw"):
        loratool.convert(tuned(name), tmp_path / format, to=format, dtype="bf16")
    for file in (tmp_path / "peft" / "adapter_model.safetensors", tmp_path / "raw"):
        found = read_safetensors(file).tensors
        assert {tensor.dtype for tensor in found.values()} <= {"BF16", "I32", "U8"}
        stored = read_safetensors(tuned(name) / "adapter_model.safetensors").tensors
        assert len(found) == len(stored)


def test_raw_holds_a_shared_tensor_once(read: Any, tmp_path: Path) -> None:
    loratool.write(read("vera"), tmp_path / "raw.safetensors", format="raw")
    shapes = [tensor.shape for tensor in read_safetensors(tmp_path / "raw.safetensors").tensors.values()]
    assert shapes.count((3, 24)) == 1 and shapes.count((16, 3)) == 1
    assert loratool.inspect(read("vera")).parameters == 3 * 24 + 16 * 3 + 2 * ((16 + 8 + 16) + 3 * 3)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])
def test_what_is_a_lora_is_written_as_one_exactly(
    name: str, stored: Any, read: Any, oracle: Any, tmp_path: Path
) -> None:
    """Section 3.1 of llm.md: exact, and without an SVD; PEFT merges the LoRA to what it merges the tuner to."""
    case = CASES[name]
    adapter, _ = fit(read(name), read_model(stored(case.model)))
    lows = {module: as_low_rank(update) for module, update in adapter.updates.items()}
    assert {update.rank for update in adapter.updates.values()} == {low.rank for low in lows.values() if low}
    lora = replace(adapter, updates=lows).with_metadata(config={})
    assert_close(peft_merged(case, written(lora, tmp_path)), oracle(name))


SCALABLE = [
    n for n, case in CASES.items() if case.exact or case.type in ("FOURIERFT", "WAVEFT", "SHIRA", "C3A", "LOHA")
]


@pytest.mark.parametrize("name", SCALABLE)
def test_a_multiple_stays_of_its_type_where_that_can_say_it(
    name: str, stored: Any, read: Any, oracle: Any, tmp_path: Path
) -> None:
    case = CASES[name]
    adapter, _ = fit(read(name), read_model(stored(case.model)))
    scaled = replace(adapter, updates={module: u.scaled(-2.0) for module, u in adapter.updates.items()})
    before, once = weights(stored(case.model)), oracle(name)
    wanted = {key: value - 2 * (once[key] - value) for key, value in before.items()}
    assert_close(merged(stored(case.model), written(scaled, tmp_path), tmp_path / "out"), wanted, 5e-6)


@pytest.mark.parametrize(
    "name", ["hra", "hira", "miss_bat", "road_1", "glora", "deft", "osf", "frod", "fourierft", "oft"]
)
def test_what_is_none_becomes_one_by_rank(name: str, stored: Any, tuned: Any, oracle: Any, tmp_path: Path) -> None:
    """At full rank nothing is lost but the bias that only the tuner changes."""
    base = stored(CASES[name].model)
    with pytest.raises(LossError) as caught:
        loratool.convert(tuned(name), tmp_path / "lora", to="mlx", base=base)
    assert CASES[name].type.lower() in str(caught.value) and not (tmp_path / "lora").exists()
    loratool.resize(tuned(name), tmp_path / "lora", rank=16, base=base, allow_loss=True)
    found = merged(base, tmp_path / "lora", tmp_path / "out")
    assert_close({key: value for key, value in found.items() if not key.endswith("bias")}, oracle(name), 1e-5)


def test_a_shape_that_the_file_does_not_tell_comes_from_the_base(stored: Any, tuned: Any, tmp_path: Path) -> None:
    """Without a base VeRA stays VeRA; what must know its width says so."""
    shapes = {update.shape for update in loratool.read(tuned("vera")).updates.values()}
    assert shapes == {(16, 0), (8, 0)}
    with pytest.raises(MatchError, match="needs the base"):
        loratool.resize(tuned("vera"), tmp_path / "lora", rank=2)
    with pytest.raises(LossError) as caught:
        loratool.convert(tuned("vera"), tmp_path / "lora", to="mlx")
    assert "--base" in caught.value.hint
    loratool.convert(tuned("vera"), tmp_path / "lora", to="mlx", base=stored("llama"))


def test_the_plan_counts_what_is_made_of_small_tensors(stored: Any, tuned: Any, tmp_path: Path) -> None:
    """A dry run's bound holds the factors that VeRA's vectors make, and the places that a seed draws."""
    for name, elements in (("vera", 3 * (16 + 24)), ("fourierft", 16 * 24), ("osf", 16 * 24), ("frod", 24 * 24)):
        found, _ = fit(loratool.read(tuned(name)), read_model(stored("llama")))
        assert max(update.makes for update in found.updates.values()) >= 2 * elements


# -- what is refused -----------------------------------------------------------------------------------------

ROUTED = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "XLORA", "POLY", "LILY", "CPT", "ADAPTION_PROMPT", "CARTRIDGE")


@pytest.mark.parametrize("kind", [*ROUTED, "MULTITASK_PROMPT_TUNING", "SHADOW", "PSOFT", "ADAMSS"])
def test_what_is_no_change_that_the_file_holds_is_refused_by_name(kind: str, tuned: Any, tmp_path: Path) -> None:
    """llm.md trap 67 and section 2, in either spelling of the type."""
    source = edited(tuned("miss"), tmp_path, {"peft_type": kind.lower()})
    with pytest.raises(FormatError, match=kind):
        loratool.read(source)


def test_every_type_of_peft_is_read_or_refused_by_name() -> None:
    from peft.utils.peft_types import PeftType

    known = {"LORA", *types.NAMES, *types.REFUSED}
    assert {kind.value for kind in PeftType} <= known | set(ROUTED) | {"MULTITASK_PROMPT_TUNING"}


@pytest.mark.parametrize("home", types.HOMES)
def test_every_row_is_where_its_name_is_looked_for(home: str) -> None:
    assert tuple(types.rows_of(home)) == types.HOMES[home]
    assert all(types.row_named(name) is row for name, row in types.rows_of(home).items())


def rewrite(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Other tensors in the place of a file's."""
    held = {key: Tensor.of(tensor.array().copy()) for key, tensor in tensors.items()}
    file.unlink()
    write_safetensors(file, held, {"format": "pt"})


def edited(
    source: Path,
    folder: Path,
    config: Mapping[str, Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda held: held,
) -> Path:
    """A copy of an adapter with other words in its configuration, or other tensors."""
    shutil.copytree(source, folder / "edited")
    at = folder / "edited"
    told = json.loads((at / "adapter_config.json").read_text()) | dict(config or {})
    (at / "adapter_config.json").write_text(json.dumps(told))
    held = dict(read_safetensors(at / "adapter_model.safetensors").tensors)
    rewrite(at / "adapter_model.safetensors", tensors(held))
    return at


REFUSALS: tuple[tuple[str, Mapping[str, Any], str], ...] = (
    ("pvera", {"sample_at_inference": True}, "sample_at_inference"),
    ("waveft", {"wavelet_family": "sym5"}, "sym5"),
    ("adalora", {"init_r": "four"}, "init_r"),
    ("adalora", {"init_r": 2.5}, "init_r"),
    ("adalora", {"lora_alpha": float("nan")}, "lora_alpha"),
    ("vblora", {"topk": 11}, "topk"),
    ("fourierft", {"random_loc_seed": -1}, "random_loc_seed"),
    ("fourierft", {"scaling": [1]}, "scaling"),
    ("road_1", {"variant": "road_3"}, "variant"),
    ("road_1", {"group_size": 3}, "RoAd"),
    ("deft", {"decomposition_method": "svd"}, "decomposition_method"),
    ("miss", {"init_weights": "bat"}, "init_weights"),
    ("loha", {"rank_pattern": {"q_proj": 2}}, "rank"),
    ("loha", {"alpha_pattern": {"(a+)+$": 1, "q_proj[": 3}}, "alpha_pattern"),
    ("ia3_conv", {"feedforward_modules": "("}, "matched"),
    ("tokens", {"token_indices": [1, "2"]}, "token_indices"),
    ("hra", {"apply_GS": "yes"}, "apply_GS"),
    ("peanut", {"act_fn": "gelu"}, "gelu"),
)


@pytest.mark.parametrize(("name", "config", "word"), REFUSALS)
def test_a_configuration_that_means_nothing_is_refused(
    name: str, config: Mapping[str, Any], word: str, tuned: Any, tmp_path: Path
) -> None:
    with pytest.raises(FormatError) as caught:
        loratool.read(edited(tuned(name), tmp_path, config))
    assert word in str(caught.value)


@pytest.mark.parametrize("name", ["vera_drawn", "unilora"])
def test_what_was_saved_without_what_depends_on_the_base_names_the_way(name: str, tuned: Any, tmp_path: Path) -> None:
    def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in tensors.items() if "unilora_indices" not in key and "scales" not in key}

    with pytest.raises((FormatError, MatchError)) as caught:
        loratool.read(edited(tuned(name), tmp_path, tensors=bare))
    assert "save_" in caught.value.hint


DAMAGES: Mapping[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda tensor: None,
    "one axis more": lambda tensor: Tensor.of(tensor.array()[None]),
    "cut short": lambda tensor: Tensor.of(tensor.array()[:-1]),
    "empty": lambda tensor: Tensor.of(tensor.array()[:0]),
    "scalar": lambda tensor: Tensor.of(tensor.array().reshape(-1)[0]),
    "of another type": lambda tensor: Tensor.of(tensor.array() > 0),
    "not a number": lambda tensor: Tensor.of(np.full(tensor.shape, np.nan, np.float32)),
    "beyond the end": lambda tensor: Tensor.of((tensor.array() * 0 + 100).astype(tensor.array().dtype)),
}
HOSTILE = {case.type: name for name, case in CASES.items() if case.model == "llama"}.values()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_tensor_raises_our_errors_only(name: str, stored: Any, tuned: Any, tmp_path: Path) -> None:
    """Each tensor of one module and each shared one, damaged in every way: read, placed, checked and computed."""
    source = dict(read_safetensors(tuned(name) / "adapter_model.safetensors").tensors)
    model = read_model(stored("llama"))
    first = next(iter(source)).partition(".layers.0.")[2].partition(".")[0]
    folder = edited(tuned(name), tmp_path)
    for key in (key for key in source if f".layers.0.{first}." in key or ".layers." not in key):
        for damage, change in DAMAGES.items():
            tensor = change(source[key])
            held = {k: t for k, t in source.items() if k != key} | ({} if tensor is None else {key: tensor})
            rewrite(folder / "adapter_model.safetensors", held)
            try:
                adapter, _ = fit(loratool.read(folder, base=model), model)
                check_values(adapter, Changes())
                for found in match(adapter, model)[0]:
                    found.update.apply(model.parameters[found.place.tensor][0].tensor.float())
            except LoratoolError:
                continue
            assert damage in HARMLESS or key.endswith(UNUSED), (key, damage)


# what a file can say as well: a vector without its axis of one, a part that may be absent, an index of the last row;
# and what PEFT stores beside GLoRA's paths is not used without a bias
HARMLESS = ("missing", "one axis more", "cut short", "scalar", "beyond the end")
UNUSED = ("glora_D.zeros", "glora_E.zeros")
