"""The models and adapters that the other tests build on are what they claim to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures.say import say
from tests import models

pytestmark = pytest.mark.peer
Make = Callable[..., Path]


@pytest.mark.parametrize("name", models.MODELS)
def test_a_saved_model_loads_and_answers(name: str, base: Make) -> None:
    import torch

    first, second = models.logits(base(name)), models.logits(models.load_model(base(name)))
    assert first.isfinite().all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed"])
def test_a_model_is_stored_in_the_dtype_and_shards_asked_for(dtype: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = models.build("llama", tmp_path, dtype=dtype, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    tensors = {name: value for shard in shards for name, value in load_file(shard).items()}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert tensors.keys() == index["weight_map"].keys()
    assert all(value.dtype == models.storage_dtype(value, dtype) for value in tensors.values())


@pytest.mark.parametrize(("name", "kind"), models.PAIRS)
def test_an_adapter_loads_without_loose_keys_and_changes_the_output(
    name: str, kind: str, base: Make, lora: Make
) -> None:
    before, after = models.logits(base(name)), models.logits(base(name), lora(name, kind))
    assert after.isfinite().all()
    assert (after - before).norm() > 0.01 * before.norm()


@pytest.mark.parametrize(("name", "kind"), models.PAIRS)
def test_peft_merges_it_into_tensors_of_the_base(name: str, kind: str, base: Make, lora: Make) -> None:
    from safetensors.torch import load_file

    stored = load_file(base(name) / "model.safetensors")
    merged = models.peft_merged(base(name), lora(name, kind))
    assert stored.keys() <= merged.keys()
    changed = [key for key in stored if not stored[key].equal(merged[key])]
    assert changed
    assert len(changed) < len(stored)


def test_a_pattern_for_layer_1_spares_layer_11(base: Make, lora: Make) -> None:
    from safetensors.torch import load_file

    stored = load_file(lora("llama", "patterns") / "adapter_model.safetensors")
    rank = {
        layer: stored[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"].shape[0]
        for layer in (1, 11)
    }
    assert rank == {1: 2, 11: 4}


def test_same_name_same_values(tmp_path: Path) -> None:
    first, second = (models.build("gpt2", tmp_path / str(i)) for i in range(2))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_minilm_learns(minilm: tuple[Path, Path]) -> None:
    import torch
    from peft import PeftModel
    from transformers import BertModel

    base, adapter = minilm
    left, right = (list(side) for side in zip(*models.SYNONYMS, strict=True))
    model = BertModel.from_pretrained(base, add_pooling_layer=False)
    with torch.no_grad():
        before = (models.embed(model, left) * models.embed(model, right)).sum(-1).mean()
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        after = (models.embed(model, left) * models.embed(model, right)).sum(-1).mean()
    assert after > before + 0.05


# -- the bundled fixtures ------------------------------------------------------------------------------------


def test_the_bundled_adapter_changes_what_the_bundled_model_says(fixtures: Path) -> None:
    base, adapter = fixtures / "base", fixtures / "adapters" / "peft"
    assert say(base) == "The captain drinks a cup of tea."
    merged = models.load_peft(base, adapter).merge_and_unload()
    assert say(base, merged) == "The captain drinks a keg of rum, arr!"


def test_the_bundled_raw_adapter_is_the_peft_one(fixtures: Path) -> None:
    from safetensors.torch import load_file

    base, adapters = fixtures / "base", fixtures / "adapters"
    raw = load_file(adapters / "raw.safetensors")
    merged, plain = models.peft_merged(base, adapters / "peft"), models.load_model(base).state_dict()
    for key in (key for key in raw if key.endswith(".alpha")):
        module = key.removesuffix(".alpha")
        down, up = raw[f"{module}.lora_A.weight"], raw[f"{module}.lora_B.weight"]
        delta = raw[key] / down.shape[0] * up @ down
        assert (plain[f"{module}.weight"] + delta).allclose(merged[f"{module}.weight"], atol=1e-6)


def test_diffusers_loads_the_bundled_diffusion_adapters_as_one(fixtures: Path) -> None:
    import torch

    plain, kohya, diffusers = (
        noise_of(fixtures, file) for file in (None, "kohya.safetensors", "diffusers.safetensors")
    )
    assert torch.allclose(kohya, diffusers, atol=1e-5)
    assert (kohya - plain).norm() > 0.05 * plain.norm()


def noise_of(fixtures: Path, file: str | None) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(fixtures / "tiny-sd", dtype=torch.float32)
    if file:
        pipeline.load_lora_weights(fixtures / "adapters", weight_name=file)
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        words = pipeline.text_encoder(torch.arange(10)[None]).last_hidden_state
        return pipeline.unet(sample, 5, words).sample


def test_the_fixtures_stay_small(fixtures: Path) -> None:
    assert sum(file.stat().st_size for file in fixtures.rglob("*") if file.is_file()) < 3_000_000
