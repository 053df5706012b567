"""Matching an adapter to a base: every target finds its one place, or the error names the nearest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.architectures import Slot
from loratool.architectures.llm import RENAMED_PREFIXES
from loratool.errors import LoratoolError, MatchError
from loratool.model import read_model
from loratool.names import Match, Names, Unmatched, match
from loratool.tensors import Tensor
from loratool.update import Dense, DoRA, LowRank, Update
from tests import models, samples
from tests.samples import low, normal

Make = Callable[..., Path]


def names(*modules: str) -> Names:
    return Names({f"{module}.weight": Slot(f"{module}.weight") for module in modules})


def find(base: Names, module: str) -> Any:
    """(module, how), or what is said of one without a place."""
    found = base.find(f"{module}.weight")
    return found.why if isinstance(found, Unmatched) else (found[0].removesuffix(".weight"), found[1])


def layers(prefix: str, leaf: str = "self_attn.q_proj", count: int = 3) -> tuple[str, ...]:
    return tuple(f"{prefix}layers.{n}.{leaf}" for n in range(count))


# -- by name -------------------------------------------------------------------------------------------------


def test_the_exact_name_goes_before_every_other() -> None:
    base = names("model.layers.0.q", "layers.0.q", "model.model.layers.0.q")
    assert find(base, "layers.0.q") == ("layers.0.q", "exact")


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ("model.language_model.", "language_model.model."),
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        ("model.vision_tower.", "vision_tower."),
        ("transformer.", ""),
        ("bert.", ""),
        ("model.", ""),
        ("model.model.", "model."),
        ("text_model.model.", ""),
    ],
)
def test_prefixes_that_changed_are_found_both_ways(base: str, adapter: str) -> None:
    """llm traps 2 and 13: VLM names of transformers 4 and 5; checkpoints without the class prefix."""
    for there, here in ((base, adapter), (adapter, base)):
        for wanted, asked in zip(layers(there), layers(here), strict=True):
            found, how = find(names(*layers(there)), asked)
            assert found == wanted
            assert how in ("renamed", "suffix")


@pytest.mark.parametrize(("one", "other"), RENAMED_PREFIXES)
def test_every_renamed_prefix_is_used_both_ways(one: str, other: str) -> None:
    for there, here in ((one, other), (other, one)):
        assert find(names(f"{there}x.0.y", "else.x.1.y"), f"{here}x.0.y")[0] == f"{there}x.0.y"


def test_suffixes_are_of_whole_segments() -> None:
    base = names("h.0.cross_attn.c_attn", "h.0.xattn.c_attn")
    assert "nearest" in find(base, "attn.c_attn")
    assert "nearest" in find(names("decoder_layers.0.q"), "layers.0.q")


@pytest.mark.parametrize("leaf", ["q_proj", "self_attn.q_proj"])
def test_a_layers_number_is_never_guessed(leaf: str) -> None:
    """Not even where there is only one layer."""
    base = names(*layers("model.", count=1))
    assert "nearest: model.layers.0.self_attn.q_proj" in find(base, leaf)
    assert "nearest" in find(names("self_attn.q_proj"), "model.layers.0.self_attn.q_proj")
    assert "nearest" in find(base, "model.layers.3.self_attn.q_proj")
    assert "nearest" in find(names(*layers("model.layers.")), "model.layers.3.self_attn.q_proj")


def test_a_name_with_two_places_is_ambiguous() -> None:
    base = names("encoder.layers.0.q", "decoder.layers.0.q", "encoder.layers.1.q")
    assert find(base, "layers.0.q").startswith("ambiguous: decoder.layers.0.q.weight, encoder.layers.0.q.weight")
    assert find(base, "layers.1.q") == ("encoder.layers.1.q", "suffix")
    assert find(names("a.layers.0.q", "layers.0.q"), "b.layers.0.q") == ("layers.0.q", "suffix")


def test_two_names_of_one_place_are_not_ambiguous() -> None:
    base = Names({"a.layers.0.q.weight": Slot("x"), "b.layers.0.q.weight": Slot("x")})
    assert not isinstance(base.find("layers.0.q.weight"), Unmatched)


def test_the_nearest_is_named() -> None:
    base = names(*layers("model."), *layers("model.", "self_attn.k_proj"), "model.norm")
    assert find(base, "model.layers.2.self_atn.k_proj") == "nearest: model.layers.2.self_attn.k_proj"
    assert find(base, "model.layers.2.self_attn.kproj") == "nearest: model.layers.2.self_attn.k_proj"
    assert find(names(), "x") == "nearest: none"


# -- adapters and models -------------------------------------------------------------------------------------


def adapter_of(**updates: Update) -> Adapter:
    return Adapter({k.replace("__", "."): u for k, u in updates.items()}, {}, Metadata("test"))


def tiny(tmp_path: Path, *modules: str, shape: tuple[int, ...] = (7, 5), **config: Any) -> Any:
    tensors = {f"{module}.weight": normal(*shape) for module in modules}
    return read_model(samples.model(tmp_path / "base", tensors, config))


def only(found: tuple[list[Match], list[Unmatched]]) -> Match:
    (hit,), unmatched = found
    assert not unmatched
    return hit


def test_a_lost_prefix_component_finds_its_place_or_is_an_error(tmp_path: Path) -> None:
    """llm trap 1: PEFT warns and hands back the base."""
    base = samples.model(tmp_path / "base", {f"{m}.weight": normal(7, 5) for m in layers("model.language_model.")})
    found = samples.lora_file(tmp_path / "found", {m: low() for m in layers("model.")})
    lost = samples.lora_file(tmp_path / "lost", {m: low() for m in layers("model.text_model.")})
    assert loratool.plan_merge(base, [found]).changes.modules == 3
    with pytest.raises(MatchError, match=r"3 of 3.*nearest: model\.language_model\.layers\.0\.self_attn") as caught:
        loratool.plan_merge(base, [lost])
    assert caught.value.exit_code == 4


def test_one_misspelt_layer_among_many_is_refused(tmp_path: Path) -> None:
    """Nothing is skipped in silence."""
    base = samples.model(tmp_path / "base", {f"{m}.weight": normal(7, 5) for m in layers("model.", count=9)})
    targets = [*layers("model.", count=8), "model.layers.8.self_attn.q_prj"]
    lora = samples.lora_file(tmp_path / "lora", {m: low() for m in targets})
    with pytest.raises(MatchError, match=r"1 of 9.*q_prj \(nearest: model\.layers\.8\.self_attn\.q_proj\)"):
        loratool.plan_merge(base, [lora])
    planned = loratool.plan_merge(base, [lora], allow_unmatched=True)
    assert [u.name for u in planned.changes.unmatched] == ["model.layers.8.self_attn.q_prj"]
    assert planned.changes.modules == 8


def test_the_sources_own_spelling_is_named(tmp_path: Path, base: Make) -> None:
    with pytest.raises(MatchError, match=r"base_model\.model\.mystery"):
        loratool.plan_merge(base("llama"), [samples.peft_folder(tmp_path / "x", samples.peft_pair("mystery"))])


def test_two_targets_of_one_place_are_refused(tmp_path: Path) -> None:
    """CLI law 1: one module in two spellings is never the last one taken."""
    base = tiny(tmp_path, "model.layers.0.q")
    adapter = adapter_of(model__layers__0__q=low(), layers__0__q=low(seed=3))
    with pytest.raises(MatchError, match=r"two modules of the adapter mean one place, model\.layers\.0\.q"):
        match(adapter, base)


@pytest.mark.parametrize("update", [low(7, 6), low(6, 5), low(5, 7), low(7, 5, 3, 3, 3), samples.UPDATES["dora_conv"]])
def test_a_shape_that_differs_is_an_error_and_no_other_place(update: Update, tmp_path: Path) -> None:
    with pytest.raises(MatchError, match="shapes differ") as caught:
        match(adapter_of(q=update), tiny(tmp_path, "q", "x.q"))
    assert "q -> q.weight" in str(caught.value)


def test_a_1x1_convolution_fits_a_matrix_and_back(tmp_path: Path) -> None:
    assert only(match(adapter_of(q=low(7, 5, 3, 1, 1)), tiny(tmp_path / "a", "q"))).update.shape == (7, 5, 1, 1)
    there = tiny(tmp_path / "b", "q", shape=(7, 5, 1, 1))
    assert only(match(adapter_of(q=low()), there)).update.shape == (7, 5)


def test_biases_are_matched_by_their_own_name(tmp_path: Path) -> None:
    tensors = {"model.q.weight": normal(7, 5), "model.q.bias": normal(7)}
    base = read_model(samples.model(tmp_path / "base", tensors))
    bias = samples.Dense(normal(7), kind="bias")
    found, unmatched = match(Adapter({"q.bias": bias, "k.bias": bias}, {}, Metadata("test")), base)
    assert [m.place.tensor for m in found] == ["model.q.bias"]
    assert [u.name for u in unmatched] == ["k.bias"]


# -- orientation ---------------------------------------------------------------------------------------------


def layer(found: Match) -> str:
    assert isinstance(found.update, (LowRank, DoRA))
    return found.update.layer


@pytest.mark.parametrize("said", ["plain", "transposed"])
@pytest.mark.parametrize(
    ("model_type", "wanted"),
    [("gpt2", "transposed"), ("starcoder2", "plain"), ("gpt_bigcode", "plain"), ("imagegpt", "transposed")],
)
def test_a_square_c_proj_is_what_its_model_says(said: str, model_type: str, wanted: str, tmp_path: Path) -> None:
    """llm trap 46: neither the shape nor fan_in_fan_out tells."""
    base = tiny(tmp_path, "h.0.attn.c_proj", shape=(6, 6), model_type=model_type)
    for update in (low(6, 6, layer=said), DoRA(low(6, 6, layer=said), samples.magnitude(6))):
        assert layer(only(match(adapter_of(h__0__attn__c_proj=update), base))) == wanted


@pytest.mark.parametrize(("fused", "wanted"), [((6, 18), "transposed"), ((18, 6), "plain")])
def test_without_a_configuration_its_neighbours_tell(fused: tuple[int, int], wanted: str, tmp_path: Path) -> None:
    tensors = {"h.0.attn.c_proj.weight": normal(6, 6), "h.0.attn.c_attn.weight": normal(*fused)}
    folder = samples.model(tmp_path / "base", tensors)
    (folder / "config.json").unlink()
    for said in ("plain", "transposed"):
        adapter = adapter_of(h__0__attn__c_proj=low(6, 6, layer=said))
        assert layer(only(match(adapter, read_model(folder)))) == wanted


def test_a_linear_is_never_turned(tmp_path: Path) -> None:
    """A square q_proj whose file says fan_in_fan_out: no layer but Conv1D is stored so."""
    base = tiny(tmp_path, "layers.0.q_proj", shape=(6, 6), model_type="llama")
    assert layer(only(match(adapter_of(layers__0__q_proj=low(6, 6, layer="transposed")), base))) == "plain"
    with pytest.raises(MatchError, match="shapes differ"):
        match(adapter_of(q=low(5, 7)), tiny(tmp_path / "x", "q", model_type="llama"))


@pytest.mark.peer
@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_gpt2_is_merged_right_whatever_is_known_of_it(
    config: bool, kind: str, base: Make, lora: Make, tmp_path: Path
) -> None:
    """llm trap 46, with PEFT as the oracle, also by a single file of weights that has no config.json."""
    import torch
    from safetensors.torch import load_file

    path = base("gpt2") if config else base("gpt2") / "model.safetensors"
    out = tmp_path / "out"
    loratool.merge(path, lora("gpt2", kind), out=out)
    merged = load_file(out / "model.safetensors" if config else out)
    expected = models.peft_merged(base("gpt2"), lora("gpt2", kind))
    name = "transformer.h.0.attn.c_proj.weight"
    assert torch.allclose(merged[name], expected[name], atol=1e-6)
    assert not torch.allclose(merged[name], load_file(base("gpt2") / "model.safetensors")[name], atol=1e-2)


# -- real names ----------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("bert", "bert."), ("llama", "model.")])
def test_checkpoints_without_their_class_prefix(name: str, prefix: str, base: Make, lora: Make, tmp_path: Path) -> None:
    """llm trap 13: hub GPT-2 and BERT files are saved from the headless class."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(base(name) / "model.safetensors")
    headless = {k.removeprefix(prefix): t for k, t in tensors.items()}
    (tmp_path / "base").mkdir()
    save_file(headless, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text((base(name) / "config.json").read_text())
    report = loratool.merge(tmp_path / "base", lora(name, "plain"), out=tmp_path / "out")
    loratool.merge(base(name), lora(name, "plain"), out=tmp_path / "whole")
    merged, whole = (load_file(tmp_path / at / "model.safetensors") for at in ("out", "whole"))
    assert not report.unmatched
    assert all(tensor.equal(whole[key if key in whole else prefix + key]) for key, tensor in merged.items())


def test_an_adapter_is_no_model(lora: Make, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="this is an adapter, not a model"):
        loratool.merge(lora("llama"), lora("llama"), out=tmp_path / "out")


def test_a_bias_of_zeros_needs_no_place_and_any_other_does(tmp_path: Path) -> None:
    base = samples.model(tmp_path / "base", {"a.weight": normal(7, 5)})
    zeros = Dense(Tensor.of(np.zeros(7, np.float32)), 2.0, "bias")
    one = Adapter({"a": low(), "a.bias": zeros}, {}, Metadata("raw"))
    assert loratool.merge(base, one, out=tmp_path / "out").unmatched == ()
    other = Adapter({"a": low(), "a.bias": Dense(normal(7), 2.0, "bias")}, {}, Metadata("raw"))
    with pytest.raises(MatchError, match=r"a\.bias"):
        loratool.merge(base, other, out=tmp_path / "more")
