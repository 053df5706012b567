"""PEFT's own LoRA beyond plain layers: experts, attention, tokens, block-diagonal, pooled, KaSA; PEFT is the oracle."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.errors import FormatError, LoratoolError, LossError, MatchError
from loratool.formats.peft.config import FIELDS
from loratool.kinds.experts import Experts
from loratool.kinds.tokens import Tokens
from loratool.model import read_model
from loratool.tensors import Tensor, read_safetensors
from loratool.update import Dense, DoRA, LowRank
from tests import models
from tests.samples import PEFT_CONFIG, assert_same_adapter, low, magnitude, model, normal, peft_folder, peft_pair

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


def make_small(name: str, layers: int = 1) -> Any:
    """A transformer of a layer."""
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 8, "tie_word_embeddings": name in ("llama_tied", "gpt2"), "intermediate_size": 24}
    moe = sizes | {"num_local_experts": 3, "num_experts_per_tok": 2}
    if name == "gpt_oss":  # as the real one: down_proj is square, [E,in,out]
        return transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**models.TEXT, **moe | {"intermediate_size": 16})
        )
    if name == "llama4":
        config = transformers.Llama4TextConfig(**models.TEXT, **moe, intermediate_size_mlp=24)
        return transformers.Llama4ForCausalLM(config)
    if name == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**models.TEXT, **moe))
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**models.TEXT, n_embd=16, n_layer=1, n_head=2))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**models.TEXT, **sizes))


def saved(model: Any, folder: Path) -> Path:
    """A model with visible values, as transformers saves it."""
    import torch

    torch.manual_seed(0)
    for parameter, value in model.named_parameters():
        value.data.copy_(models.visible(parameter, value))
    return models.save_model(model, folder, {})


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
def test_trained_tokens_equal_peft(name: str, indices: Any, more: dict[str, Any], tmp_path: Path) -> None:
    """llm trap 36: rows are replaced. On tied weights both ends, unless they have rows of their own."""
    import torch

    base = saved(make_small(name), tmp_path / "base")
    config = {"target_modules": ["q_proj"]} | more
    lora = trained(models.load_model(base), lora_config(trainable_token_indices=indices, **config), tmp_path / "x")
    truth = models.logits(base, lora)
    loratool.merge(base, lora, out=tmp_path / "out")
    assert torch.allclose(models.logits(tmp_path / "out"), truth, atol=1e-5 * float(truth.abs().max()))
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    apart = isinstance(indices, dict) and len(indices) > 1 and len({str(rows) for rows in indices.values()}) > 1
    assert told["tie_word_embeddings"] is (name != "llama" and not apart)
    adapter = loratool.read(lora)
    assert any(isinstance(update, Tokens) for update in adapter.updates.values())
    for number, source in enumerate((adapter, adapter.with_metadata(config={}))):
        loratool.write(source, tmp_path / f"again{number}", format="peft")
    assert_same_adapter(loratool.read(tmp_path / "again0"), adapter)
    found = models.logits(base, tmp_path / "again1")
    assert torch.allclose(found, truth, atol=1e-5 * float(truth.abs().max()))


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


@pytest.mark.peer
@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "mixtral"])
def test_experts_of_a_transformer_equal_peft(name: str, tmp_path: Path) -> None:
    """llm traps 4 and 6: gpt-oss is known to be transposed; Llama 4 is, and PEFT does not know: shapes decide.

    Mixtral's experts lie one by one on disk.
    """
    import torch

    base = saved(make_small(name), tmp_path / "base")
    config = lora_config(target_parameters=EXPERTS[::-1], target_modules=["q_proj"], rank_pattern={".*down_proj": 3})
    lora = trained(models.load_model(base), config, tmp_path / "lora")
    truth = models.logits(base, lora)
    loratool.merge(base, lora, out=tmp_path / "out")
    found = models.logits(tmp_path / "out")
    assert torch.allclose(found, truth, atol=1e-5 * float(truth.abs().max()))
    assert not torch.allclose(models.logits(base), truth, atol=1e-2)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_experts_trained_whole_equal_peft(name: str, tmp_path: Path) -> None:
    """Stacks of modules_to_save; Mixtral's experts lie one by one on disk, gate and up apart."""
    import torch

    base = saved(make_small(name), tmp_path / "base")
    config = lora_config(target_modules=["q_proj"], modules_to_save=["mlp.experts"])
    lora = trained(models.load_model(base), config, tmp_path / "lora")
    truth = models.logits(base, lora)
    loratool.merge(base, lora, out=tmp_path / "out")
    assert torch.allclose(models.logits(tmp_path / "out"), truth, atol=1e-5 * float(truth.abs().max()))
    again = loratool.read(lora).with_metadata(config={})
    loratool.write(again, tmp_path / "again", format="peft")
    found = models.logits(base, tmp_path / "again")
    assert torch.allclose(found, truth, atol=1e-5 * float(truth.abs().max()))


# -- adapters of a changed base ------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "rank_pattern": {"last": 3}}])
def test_a_changed_base_needs_the_initial_adapter(init: str, more: dict[str, Any], tmp_path: Path) -> None:
    """llm trap 30: beside its initial factors it is a delta of the plain base; alone it is refused."""
    import torch
    from peft import get_peft_model

    base = toy_base("attention", tmp_path / "base")
    model = get_peft_model(
        make_toy("attention"), lora_config(target_modules=["first", "last"], init_lora_weights=init, **more)
    )
    config = model.peft_config["default"]
    config.init_lora_weights = True  # as PEFT's guide says
    model.save_pretrained(tmp_path / "kept")
    config.init_lora_weights = init
    torch.manual_seed(1)
    for parameter, value in model.named_parameters():
        if value.requires_grad:
            value.data.copy_(models.trained(parameter, value))
    model.save_pretrained(tmp_path / "lora")
    truth = output(model.eval())
    with pytest.raises(FormatError, match=f"{init}' changed the base") as caught:
        loratool.read(tmp_path / "lora")
    assert "_init" in caught.value.hint
    (tmp_path / "kept").rename(tmp_path / "lora" / "before_init")
    loratool.merge(base, tmp_path / "lora", out=tmp_path / "merged")
    close(output(loaded(make_toy("attention"), tmp_path / "merged")), truth, 2e-5)
    loratool.write(loratool.read(tmp_path / "lora"), tmp_path / "plain", format="peft")
    told = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert told["init_lora_weights"] is True and told["r"] == 4
    close(output(with_adapter(make_toy("attention"), tmp_path / "plain")), truth, 2e-5)


def initial(path: Path, tensors: Mapping[str, Tensor], name: str = "pissa_init") -> Path:
    peft_folder(path / name, tensors, CONFIG)
    return path


def test_what_makes_no_pair_with_its_beginning_is_refused(tmp_path: Path) -> None:
    config = CONFIG | {"init_lora_weights": "pissa"}
    pair, other = peft_pair("q"), peft_pair("k")
    cases = [
        ({**pair, **other}, pair, "no LoRA of this shape"),
        (pair, {**pair, **other}, "the trained one lacks"),
        (pair, {k.replace(".q.", ".k."): t for k, t in pair.items()}, "no LoRA of this shape"),
    ]
    for number, (after, before, message) in enumerate(cases):
        folder = initial(peft_folder(tmp_path / str(number), after, config), before)
        with pytest.raises(FormatError, match=message):
            loratool.read(folder)
    folder = initial(initial(peft_folder(tmp_path / "two", pair, config), pair), pair, "other_init")
    with pytest.raises(FormatError, match=r"several initial adapters: other_init, pissa_init"):
        loratool.read(folder)
    quantised = initial(peft_folder(tmp_path / "loftq", pair, config | {"init_lora_weights": "loftq"}), pair)
    with pytest.raises(FormatError, match="loftq' changed the base"):  # its residual was quantised
        loratool.read(quantised)


# -- the configuration ---------------------------------------------------------------------------------------


@pytest.mark.peer
def test_every_field_of_peft_is_known() -> None:
    """What PEFT adds must be looked at: does it change the mathematics?"""
    from dataclasses import fields

    from peft import LoraConfig

    assert {field.name for field in fields(LoraConfig)} <= set(FIELDS)


def test_a_field_from_later_is_told(tmp_path: Path) -> None:
    """Unknown keys are tolerated, and named where they are set."""
    config = CONFIG | {"use_novelty": True, "novelty_config": None, "task": ""}
    found = loratool.read(peft_folder(tmp_path / "x", peft_pair("q"), config))
    assert [w for w in found.metadata.warnings if "not known here: use_novelty" in w]
    assert not loratool.read(peft_folder(tmp_path / "y", peft_pair("q"), CONFIG)).metadata.warnings


def test_tensors_of_training_are_left_out_with_a_note(tmp_path: Path) -> None:
    more = {f"{PREFIX}q.lora_velora_embed": normal(4), f"{PREFIX}q.lora_monteclora_sampler.default.mean": normal(2)}
    config = CONFIG | {"velora_config": {"num_groups": 2}, "monteclora_config": {"num_samples": 2}}
    found = loratool.read(peft_folder(tmp_path / "x", {**peft_pair("q"), **more}, config))
    assert list(found.updates) == ["q"] and not found.carried
    assert any("2 tensors that only training uses" in warning for warning in found.metadata.warnings)
    loratool.write(found, tmp_path / "out", format="peft")
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert told["velora_config"] is None and told["monteclora_config"] is None


def experts_of(module: str, outer: int = 1, e: int = 2, r: int = 3) -> dict[str, Tensor]:
    """Wrappers of one module, the outermost first: factors [e*r,5] and [7,r*e]."""
    heads = [PREFIX + module + n * ".base_layer" for n in range(outer)]
    found = {f"{head}.lora_A.weight": normal(e * r, 5, seed=n) for n, head in enumerate(heads)}
    return found | {f"{head}.lora_B.weight": normal(7, e * r, seed=n) for n, head in enumerate(heads)}


NAMED = ["experts.gate_up_proj", "experts.down_proj"]
BAD_EXPERTS: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "not_named": (experts_of("mlp.experts", 2), {}, "the configuration does not name"),
    "named_once": (experts_of("mlp.experts", 2), {"target_parameters": NAMED[:1]}, "which is which is unknown"),
    "one_of_two": (experts_of("mlp.experts"), {"target_parameters": NAMED}, "which is which is unknown"),
    "strange_names": (
        experts_of("mlp.experts", 2),
        {"target_parameters": ["experts.alpha", "experts.beta"]},
        "which is which is unknown",
    ),
    "no_list": (experts_of("mlp.experts"), {"target_parameters": "experts.down_proj"}, "no list of names"),
    "rank": (experts_of("mlp.experts"), {"target_parameters": NAMED[:1], "r": 4}, "does not divide the 6 rows"),
    "rank_zero": (experts_of("mlp.experts"), {"target_parameters": NAMED[:1], "r": 0}, "does not divide"),
    "alpha": (experts_of("mlp.experts"), {"target_parameters": NAMED[:1], "lora_alpha": "6"}, "alpha is '6'"),
    "magnitude": (
        {**experts_of("mlp.experts"), f"{PREFIX}mlp.experts.lora_magnitude_vector": normal(7)},
        {"target_parameters": NAMED[:1]},
        "a parameter with a magnitude",
    ),
    "bias": (
        {**experts_of("mlp.experts"), f"{PREFIX}mlp.experts.lora_B.bias": normal(7)},
        {"target_parameters": NAMED[:1]},
        "lora_B.bias of a parameter",
    ),
    "attention_bias": (
        {**peft_pair("attn"), **peft_pair("attn.base_layer.out_proj"), f"{PREFIX}attn.lora_B.bias": normal(7)},
        {},
        "lora_B.bias of a parameter",
    ),
    "attention_twice": (
        {**peft_pair("attn"), **peft_pair("attn.base_layer"), **peft_pair("attn.base_layer.out_proj")},
        {},
        "wrapped twice",
    ),
    "group": (peft_pair("q"), {"use_qalora": True, "qalora_group_size": 1 << 40}, "qalora_group_size"),
    "group_text": (peft_pair("q"), {"use_qalora": True, "qalora_group_size": "4"}, "qalora_group_size"),
    "blocks": (peft_pair("q"), {"use_bdlora": {"target_modules_bd_a": ["q"], "nblocks": 2}}, "2 blocks of a factor"),
    "blocks_text": (peft_pair("q"), {"use_bdlora": {"target_modules_bd_a": ["q"], "nblocks": "1"}}, "blocks of a"),
    "blocks_both": (
        peft_pair("q"),
        {"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}},
        "both factors",
    ),
    "blocks_names": (peft_pair("q"), {"use_bdlora": {"target_modules_bd_a": "q"}}, "that is none"),
    "blocks_flag": (peft_pair("q"), {"use_bdlora": True}, "no table"),
    "diagonal": ({**peft_pair("q"), f"{PREFIX}q.lora_diag": normal(4)}, {"kasa_config": {}}, "a diagonal of shape"),
    "diagonal_missing": (peft_pair("q"), {"kasa_config": {}}, "lora_diag is missing"),
}


ODD: list[Any] = [True, -1, "x", [1], {"q": "z"}, [[0, 1], "a"], "("]


@pytest.mark.parametrize("kind", ["pair", "experts", "tokens", "attention", "kasa"])
def test_no_value_of_any_field_makes_a_traceback(kind: str, tmp_path: Path) -> None:
    """CLI law 7: it is read, written and read again, or refused."""
    tensors, config = {
        "pair": (peft_pair("q"), {}),
        "experts": (experts_of("mlp.experts", 2), {"target_parameters": NAMED}),
        "tokens": (TOKENS, {"trainable_token_indices": [1, 2, 3]}),
        "attention": ({**peft_pair("attn"), **peft_pair("attn.base_layer.out_proj")}, {}),
        "kasa": ({**peft_pair("q"), f"{PREFIX}q.lora_diag": normal(3)}, {"kasa_config": {}}),
    }[kind]
    folder = peft_folder(tmp_path / "x", tensors, CONFIG)
    read_fields = [field for field, meaning in FIELDS.items() if meaning == "read"]
    read = 0
    for number, (field, value) in enumerate(itertools.product(read_fields, ODD)):
        (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config, field: value}))
        try:
            found = loratool.read(folder)
        except FormatError:
            continue
        read += 1
        if number % 4 == 0:  # each field at least once
            loratool.write(found, tmp_path / str(number), format="peft", allow_loss=True)
            assert loratool.read(tmp_path / str(number)).updates.keys() == found.updates.keys()
    assert read > 40


@pytest.mark.parametrize("case", BAD_EXPERTS)
def test_what_a_variant_cannot_be_is_refused(case: str, tmp_path: Path) -> None:
    tensors, changes, message = BAD_EXPERTS[case]
    with pytest.raises(FormatError, match=message) as caught:
        loratool.read(peft_folder(tmp_path / "x", tensors, CONFIG | changes))
    assert str(tmp_path / "x") in str(caught.value)


@pytest.mark.parametrize(
    ("version", "order"),
    [("0.17.1", "transposed"), ("0.18.0", "transposed"), ("0.19.0", "shape"), ("0.19.1", "model"), (None, "shape")],
)
def test_square_experts_are_told_by_the_version(version: str | None, order: str, tmp_path: Path) -> None:
    """llm trap 6: PEFT took the first axis for the input up to 0.18, the other since 0.19.1."""
    tensors = {
        f"{PREFIX}mlp.experts.lora_A.weight": normal(6, 5),
        f"{PREFIX}mlp.experts.lora_B.weight": normal(5, 6, seed=1),
    }
    config = CONFIG | {"target_parameters": NAMED[1:], "peft_version": version}
    lora = peft_folder(tmp_path / "x", tensors, config)
    found = loratool.read(lora).updates["mlp.experts.down_proj"]
    assert isinstance(found, Experts) and found.order == order
    base = model(tmp_path / "base", {"model.mlp.experts.down_proj": normal(2, 5, 5, seed=4)})
    if order == "shape":
        with pytest.raises(MatchError, match="nothing tells which axis"):
            loratool.merge(base, lora, out=tmp_path / "out")
        return
    loratool.merge(base, lora, out=tmp_path / "out")
    merged = read_model(tmp_path / "out").parameters["model.mlp.experts.down_proj"][0].tensor.array()
    a = normal(6, 5).array().reshape(2, 3, 5)
    b = normal(5, 6, seed=1).array().reshape(5, 3, 2)
    delta = 2 * np.einsum("ore,eri->eoi", b, a)
    expected = delta.swapaxes(1, 2) if order == "transposed" else delta
    close(merged, normal(2, 5, 5, seed=4).array() + expected)


def test_out_proj_of_a_later_peft_counts_once(tmp_path: Path) -> None:
    """llm trap 29, once it is mended."""
    tensors = {**peft_pair("attn"), **peft_pair("attn.base_layer.out_proj")}
    for version, times in (("0.21.2", 2), ("0.9.0", 2), (None, 2), ("0.22.0", 1), ("1.0", 1)):
        folder = peft_folder(tmp_path / str(version), tensors, CONFIG | {"peft_version": version})
        found = loratool.read(folder)
        assert found.updates["attn.out_proj"].scaling == 2.0 * times
        loratool.write(found, tmp_path / f"{version} again", format="peft")
        assert_same_adapter(loratool.read(tmp_path / f"{version} again"), found)
        assert any("counts twice" in warning for warning in found.metadata.warnings) is (times == 2)


# -- what PEFT cannot say beside them ------------------------------------------------------------------------


def adapter_of(updates: Mapping[str, Any]) -> Adapter:
    return Adapter(updates, {}, Metadata("sample"))


def stack(e: int = 2, r: int = 3) -> Experts:
    return Experts(normal(e * r, 5), normal(7, e * r, seed=1), e, 6.0)


def losses_of(updates: Mapping[str, Any]) -> list[str]:
    from loratool.formats.peft import losses

    return sorted(str(loss) for loss in losses(adapter_of(updates)))


def test_what_peft_excludes_beside_stacks_is_a_loss(tmp_path: Path) -> None:
    dora = DoRA(low(), magnitude(7))
    assert losses_of({"a": low(), "m.experts.down_proj": stack()}) == []
    (lost,) = losses_of({"a": dora, "m.experts.down_proj": stack()})
    assert lost.startswith("m.experts.down_proj: a LoRA beside DoRA")
    (lost,) = losses_of({"a": low(), "a.bias": Dense(normal(7), 2.0, "bias"), "m.experts.down_proj": stack()})
    assert lost.startswith("a.bias: a bias delta beside")
    assert losses_of({"down_proj": stack()})[0].startswith("down_proj: a parameter of the model itself")
    assert losses_of({"m": low(), "m.down_proj": stack()})[0].startswith("m.down_proj: a parameter of a module that")
    two = losses_of({"m.one": stack(), "m.two": stack(), "n.three": stack()})
    assert [lost.partition(":")[0] for lost in two] == ["m.one", "m.two"]
    with pytest.raises(LossError):
        loratool.write(adapter_of({"m.one": stack(), "m.two": stack()}), tmp_path / "x", format="peft")


@pytest.mark.parametrize("given", [("in",), ("in", "out"), ("out",)])
def test_any_part_of_an_attention_can_be_said(given: tuple[str, ...], tmp_path: Path) -> None:
    """PEFT gives both projections one rank and one alpha: zeros and folded scalings make them so."""
    parts: dict[str, Any] = {"in": low(15, 5, 3, alpha=6.0), "out": low(5, 5, 2, alpha=5.0, rank_stabilised=True)}
    names = {"in": "attn.in_proj_weight", "out": "attn.out_proj"}
    loratool.write(adapter_of({names[part]: parts[part] for part in given}), tmp_path / "x", format="peft")
    found = loratool.read(tmp_path / "x").updates
    for part in given:
        assert isinstance(found[names[part]], LowRank)
        close(found[names[part]].delta(), parts[part].delta(), 1e-5)
    assert ("attn.out_proj" in found) is (len(given) == 2 or given == ("out",)) or not found[
        "attn.out_proj"
    ].delta().any()


def test_bare_parameters_of_wrapped_modules_keep_their_place(tmp_path: Path) -> None:
    """Whole tensors of a wrapped module lie below as many `base_layer` as it has wrappers."""
    updates = {"m.experts.gate_up_proj": stack(), "m.experts.down_proj": stack(), "attn.in_proj_weight": low(15, 5)}
    adapter = adapter_of({**updates, "m.experts.inner": low(seed=3)})
    carried = {"m.experts.inner.bias": normal(7), "attn.out_proj.bias": normal(5), "head.weight": normal(2, 2)}
    whole = Adapter(adapter.updates, carried, adapter.metadata)
    loratool.write(whole, tmp_path / "x", format="peft")
    keys = {k.removeprefix(PREFIX) for k in read_safetensors(tmp_path / "x" / "adapter_model.safetensors").tensors}
    assert {"m.experts.base_layer.base_layer.inner.base_layer.bias", "attn.base_layer.out_proj.base_layer.bias"} < keys
    assert {"m.experts.base_layer.lora_A.weight", "m.experts.lora_A.weight", "head.weight"} < keys
    again = loratool.read(tmp_path / "x")
    assert again.carried.keys() == carried.keys() and again.updates.keys() >= adapter.updates.keys()


# -- layers stacked anew -------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("shards", [None, "12KB"])
def test_replicated_layers_equal_peft(shards: str | None, tmp_path: Path) -> None:
    """llm.md 1.10: the adapter counts the new layers; PEFT runs it and refuses to merge it."""
    import torch

    whole = saved(make_small("llama", 3), tmp_path / "whole")
    base = models.save_model(models.load_model(whole), tmp_path / "base", {"max_shard_size": shards} if shards else {})
    told = {"layer_replication": [[0, 2], [1, 3]], "target_modules": ["q_proj", "down_proj"]}
    lora = trained(models.load_model(base), lora_config(**told), tmp_path / "lora")
    truth = models.logits(base, lora)
    loratool.merge(base, lora, out=tmp_path / "out")
    found = models.load_model(tmp_path / "out")
    assert found.config.num_hidden_layers == 4
    assert torch.allclose(models.logits(found), truth, atol=1e-5 * float(truth.abs().max()))
    assert loratool.verify(base, lora, merged=tmp_path / "out").ok
    if shards:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        held = read_model(tmp_path / "out").parameters
        assert index["weight_map"].keys() == held.keys()
        assert index["metadata"]["total_size"] == sum(at[0].tensor.nbytes for at in held.values())
    with pytest.raises(LoratoolError, match="cannot be undone"):
        loratool.merge(base, lora, out=tmp_path / "twice", undo=tmp_path / "undo")
    loratool.write(loratool.read(lora), tmp_path / "again", format="peft")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["layer_replication"] == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([[0, 3]], "counts 3 layers, model.layers has 2"),
        ([[0, 1], [1]], "no list of ranges"),
        ([[1, 1]], "no list of ranges"),
        ([[0, 1.5]], "no list of ranges"),
        ("0-1", "no list of ranges"),
        ([[0, 1 << 40]], "more than 4096"),
    ],
)
def test_a_replication_that_cannot_be_is_refused(told: Any, message: str, tmp_path: Path) -> None:
    weights = {f"model.layers.{n}.q.weight": normal(7, 5, seed=n) for n in range(2)}
    base = model(tmp_path / "base", weights, {"num_hidden_layers": 2})
    lora = peft_folder(tmp_path / "x", peft_pair("model.layers.0.q"), CONFIG | {"layer_replication": told})
    with pytest.raises(LoratoolError, match=message):
        loratool.merge(base, lora, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_different_stacks_do_not_go_together(tmp_path: Path) -> None:
    base = model(tmp_path / "base", {f"model.layers.{n}.q.weight": normal(7, 5, seed=n) for n in range(2)})
    config = CONFIG | {"layer_replication": [[0, 2], [0, 2]]}
    stacked = peft_folder(tmp_path / "x", peft_pair("model.layers.3.q"), config)
    plain = peft_folder(tmp_path / "y", peft_pair("model.layers.0.q"), CONFIG)
    with pytest.raises(MatchError, match="different stacks"):
        loratool.merge(base, [stacked, plain], out=tmp_path / "out")
    loratool.merge(base, stacked, out=tmp_path / "out")
    merged = {name: at[0].tensor.array() for name, at in read_model(tmp_path / "out").parameters.items()}
    assert list(merged) == [f"model.layers.{n}.q.weight" for n in (0, 2, 1, 3)]
    np.testing.assert_array_equal(merged["model.layers.1.q.weight"], normal(7, 5, seed=1).array())
    close(merged["model.layers.3.q.weight"], normal(7, 5, seed=1).array() + low().delta())


def test_other_formats_cannot_say_a_replication(tmp_path: Path) -> None:
    config = CONFIG | {"layer_replication": [[0, 2], [0, 2]]}
    lora = loratool.read(peft_folder(tmp_path / "x", peft_pair("model.layers.3.q"), config))
    loratool.write(lora, tmp_path / "raw.safetensors", format="raw")
    assert loratool.read(tmp_path / "raw.safetensors").metadata.config["layer_replication"]
    with pytest.raises(LossError, match="layer_replication"):
        loratool.write(lora, tmp_path / "mlx", format="mlx")


@pytest.mark.peer
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_embedding_that_stays_tied(tied: bool, tmp_path: Path) -> None:
    """ensure_weight_tying of modules_to_save: both ends are in the file, alike; without it the ends part (trap 39)."""
    import torch

    base = saved(make_small("llama_tied"), tmp_path / "base")
    config = lora_config(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=tied)
    lora = trained(models.load_model(base), config, tmp_path / "lora")
    truth = models.logits(base, lora)
    loratool.merge(base, lora, out=tmp_path / "out")
    assert torch.allclose(models.logits(tmp_path / "out"), truth, atol=1e-5 * float(truth.abs().max()))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied


@pytest.mark.peer
def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    """llm.md 1.5: its product does not fit the grouped weight; PEFT runs it and refuses to merge it."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 4, 3, groups=2)

        def forward(self, x: Any) -> Any:
            return self.conv(x)

    lora = trained(Net(), lora_config(target_modules=["conv"]), tmp_path / "lora")
    with pytest.raises(FormatError, match="grouped convolution"):
        loratool.read(lora)


@pytest.mark.parametrize("order", ["plain", "transposed"])
@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text", None])
@pytest.mark.parametrize("made_by", [None, "0.18.0", "0.21.2"])
def test_stacks_are_written_as_peft_sees_their_axes(order: Any, model_type: Any, made_by: Any, tmp_path: Path) -> None:
    """The same change in the order of PEFT's flag, where the base is known; and the version that this order means."""
    square = Experts(normal(6, 5), normal(5, 6, seed=1), 2, 6.0, order=order)
    source = {"peft_type": "LORA", "peft_version": made_by} if made_by else {}
    known = {"model_type": model_type} if model_type else {}
    adapter = adapter_of({"m.experts.down_proj": square}).with_metadata(config=source, base_config=known)
    loratool.write(adapter, tmp_path / "x", format="peft")
    told = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    again = loratool.read(tmp_path / "x").updates["m.experts.down_proj"]
    assert isinstance(again, Experts)
    flagged = model_type == "gpt_oss" if model_type else order == "transposed"
    (seen,) = again.orders(flagged)
    close(seen.delta(), square.delta(), 1e-5)
    assert told["peft_version"] == (made_by if made_by == "0.21.2" or (made_by and flagged) else "0.21.2")


# -- a vocabulary that was resized before training -----------------------------------------------------------


def longer(base: Path) -> Any:
    """The model with three tokens more, the same values each time."""
    import torch

    model = models.load_model(base)
    torch.manual_seed(3)
    model.resize_token_embeddings(99, mean_resizing=False)
    return model


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", {}),
        ("llama", {"trainable_token_indices": [96, 97]}),
        ("llama_tied", {"trainable_token_indices": [96, 97]}),
        ("llama_tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama_tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
)
def test_a_resized_vocabulary_comes_with_the_adapter(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    """llm traps 40 and 41: whatever PEFT saves beside the LoRA, some of it twice and without the adapter's name."""
    import torch
    from peft import PeftModel

    base = saved(make_small(name), tmp_path / "base")
    lora = trained(longer(base), lora_config(**{"target_modules": ["q_proj"]} | more), tmp_path / "lora")
    truth = models.logits(PeftModel.from_pretrained(longer(base), lora).eval())
    loratool.merge(base, lora, out=tmp_path / "out")
    found = models.load_model(tmp_path / "out")
    assert found.config.vocab_size == 99
    assert torch.allclose(models.logits(found), truth, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.peer
def test_a_vocabulary_of_one_end_alone_is_a_mismatch(tmp_path: Path) -> None:
    """PEFT saves only the end that has a LoRA: the other one's new rows are lost, and the model would not load."""
    base = saved(make_small("llama"), tmp_path / "base")
    lora = trained(longer(base), lora_config(target_modules=["q_proj", "embed_tokens"]), tmp_path / "lora")
    with pytest.raises(MatchError, match=r"a vocabulary of 99 for model\.embed_tokens, lm_head keeps 96"):
        loratool.merge(base, lora, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lora", [False, True])
def test_a_tied_head_on_disk_gets_the_longer_vocabulary(lora: bool, tmp_path: Path) -> None:
    """Some checkpoints hold both ends of a tie."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
        "vocab_size": 9,
    }
    both = {"model.embed_tokens.weight": normal(9, 4), "lm_head.weight": normal(9, 4)}
    base = model(tmp_path / "base", both, config)
    key = f"{PREFIX}model.embed_tokens.{'base_layer.' * lora}weight"
    tensors = {**(peft_pair("q") if not lora else {}), key: normal(11, 4, seed=2)}
    if lora:
        head = f"{PREFIX}model.embed_tokens.lora_embedding"
        tensors |= {f"{head}_A": normal(3, 11), f"{head}_B": normal(4, 3, seed=1)}
    folder = peft_folder(tmp_path / "x", tensors, CONFIG)
    loratool.merge(base, folder, out=tmp_path / "out", allow_unmatched=not lora)
    merged = {name: at[0].tensor.array() for name, at in read_model(tmp_path / "out").parameters.items()}
    whole = normal(11, 4, seed=2).array()
    np.testing.assert_array_equal(merged["lm_head.weight"], whole)
    delta = 2 * (normal(4, 3, seed=1).array() @ normal(3, 11).array()).T if lora else 0
    close(merged["model.embed_tokens.weight"], whole + delta)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["vocab_size"] == 11 and told["tie_word_embeddings"] is not lora


def test_two_copies_of_a_whole_tensor_must_agree(tmp_path: Path) -> None:
    one = {f"{PREFIX}head.modules_to_save.weight": normal(3, 4), f"{PREFIX}head.weight": normal(3, 4)}
    found = loratool.read(peft_folder(tmp_path / "x", {**peft_pair("q"), **one}, CONFIG))
    assert list(found.carried) == ["head.weight"]
    two = {**one, f"{PREFIX}head.weight": normal(3, 4, seed=1)}
    with pytest.raises(FormatError, match=r"two tensors for head\.weight"):
        loratool.read(peft_folder(tmp_path / "y", {**peft_pair("q"), **two}, CONFIG))
