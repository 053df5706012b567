"""Diffusion adapters merged into every layout of a base: pipeline folder, component, LDM/SGM single file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import loratool
from loratool.api import Reading
from loratool.architectures import architecture
from loratool.errors import MatchError
from loratool.model import read_model
from loratool.tensors import Tensor, read_safetensors, write_safetensors
from tests import models

TINY = models.FIXTURES / "tiny-sd"
KOHYA = models.FIXTURES / "adapters" / "kohya.safetensors"
rng = np.random.default_rng(7)


def narrow(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A small shape in place of a real one, equal where these are equal."""
    return tuple(size if size <= 4 else 4 + size % 7 for size in shape)


def single_file(path: Path, name: str) -> None:
    """A checkpoint with every name of an architecture's single file, narrow, plus a VAE."""
    known = architecture(name)
    assert known is not None
    tensors = {"first_stage_model.decoder.conv_in.weight": Tensor.of(rng.random((4, 3), np.float32), "F16")}
    for module, shape in known.shapes().items():
        slots = known.checkpoint()
        for leaf, size in (("weight", narrow(shape)), ("bias", narrow(shape)[:1])):
            slot = slots.get(f"{module}.{leaf}")
            if slot is not None:
                values = rng.standard_normal(slot.stored(size)).astype(np.float32)
                tensors.setdefault(slot.tensor, Tensor.of(values, "F16"))
    write_safetensors(path, tensors, {"modelspec.hash_sha256": "0xstale", "modelspec.title": "kept"})


def kohya_file(path: Path, name: str, components: tuple[str, ...]) -> dict[str, np.ndarray]:
    """A kohya adapter of every Linear and Conv of these components; their deltas by reference name."""
    known = architecture(name)
    assert known is not None
    tensors, deltas = {}, {}
    for module, shape in known.shapes().items():
        if module.split(".")[0] not in components or len(shape) < 2 or "embedding" in module.rpartition(".")[2]:
            continue
        out, inner, *kernel = narrow(shape)
        down = rng.standard_normal((2, inner, *kernel)).astype(np.float32)
        up = rng.standard_normal((out, 2, *(1 for _ in kernel))).astype(np.float32)
        key = known.kohya().forward[module]
        tensors[f"{key}.lora_down.weight"] = Tensor.of(down)
        tensors[f"{key}.lora_up.weight"] = Tensor.of(up)
        tensors[f"{key}.alpha"] = Tensor.of(np.float32(1.0))
        deltas[module] = (0.5 * up.reshape(out, 2) @ down.reshape(2, -1)).reshape(out, inner, *kernel)
    write_safetensors(path, tensors, {})
    return deltas


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_every_module_lands_in_its_place_of_a_single_file(name: str, tmp_path: Path) -> None:
    """diffusion traps 42 and 43: 1x1 convolutions by the base's shape; q, k, v rows of OpenCLIP's in_proj; the
    transposed text_projection. Every expected value is computed here from the table, one rounding."""
    known = architecture(name)
    assert known is not None
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    single_file(base, name)
    deltas = kohya_file(tmp_path / "kohya.safetensors", name, known.components)
    report = loratool.merge(base, tmp_path / "kohya.safetensors", out=out, strengths=[0.75])
    before, after = read_safetensors(base), read_safetensors(out)
    assert list(before.tensors) == list(after.tensors) and report.modules == len(deltas)
    expected = {key: tensor.array().astype(np.float32) for key, tensor in before.tensors.items()}
    for module, delta in deltas.items():
        slot = known.checkpoint(before.tensors)[f"{module}.weight"]
        ((start, stop),) = slot.ranges(len(expected[slot.tensor]))
        view = expected[slot.tensor][start:stop]
        view += (0.75 * (delta.T if slot.transposed else delta)).reshape(view.shape)
    changed = {known.checkpoint(before.tensors)[f"{m}.weight"].tensor for m in deltas}
    for key, tensor in after.tensors.items():
        if key in changed:
            np.testing.assert_allclose(tensor.array().astype(np.float32), expected[key], rtol=2e-3, atol=1e-6)
        else:
            assert tensor.same_bytes(before.tensors[key]), key
    assert after.metadata["modelspec.title"] == "kept" and "modelspec.hash_sha256" not in after.metadata


def test_single_file_and_pipeline_agree(tmp_path: Path) -> None:
    """The same adapter into diffusers names and LDM names gives the same weights."""
    known = architecture("sd1")
    assert known is not None
    pipeline = read_model(TINY)
    slots = known.checkpoint()
    ldm = {
        slots[name].tensor: places[0].tensor
        for name, places in pipeline.parameters.items()
        if name in slots and slots[name].whole
    }
    write_safetensors(tmp_path / "ldm.safetensors", ldm, {})
    loratool.merge(tmp_path / "ldm.safetensors", KOHYA, out=tmp_path / "ldm-merged.safetensors")
    loratool.merge(TINY, KOHYA, out=tmp_path / "pipeline")
    merged, single = read_model(tmp_path / "pipeline"), read_model(tmp_path / "ldm-merged.safetensors")
    changed = 0
    for name, slot in slots.items():
        if slot.tensor in ldm:
            tensor = merged.parameters[name][0].tensor
            assert tensor.same_bytes(single.parameters[slot.tensor][0].tensor), name
            changed += not tensor.same_bytes(ldm[slot.tensor])
    assert changed == 289


def test_one_component_as_base(tmp_path: Path) -> None:
    """The UNet's own folder takes the UNet's modules; the text encoder's are named and refused, or insisted away."""
    with pytest.raises(MatchError, match="lora_te_text_model_encoder_layers_0_mlp_fc1") as refused:
        loratool.merge(TINY / "unet", KOHYA, out=tmp_path / "out")
    assert refused.value.exit_code == 4 and not (tmp_path / "out").exists()
    report = loratool.merge(TINY / "unet", KOHYA, out=tmp_path / "out", allow_unmatched=True)
    assert report.modules == 277 and len(report.unmatched) == 12
    loratool.merge(TINY, KOHYA, out=tmp_path / "whole")
    name = "diffusion_pytorch_model.safetensors"
    parts = (read_safetensors(tmp_path / "out" / name), read_safetensors(tmp_path / "whole" / "unet" / name))
    assert all(tensor.same_bytes(parts[1].tensors[key]) for key, tensor in parts[0].tensors.items())


def test_both_precisions_of_a_folder_are_merged(tmp_path: Path) -> None:
    """A folder that holds the weights twice (variants) has no stale copy after the merge."""
    base = tmp_path / "unet"
    shutil.copytree(TINY / "unet", base)
    file = read_safetensors(base / "diffusion_pytorch_model.safetensors")
    wide = {key: tensor.cast("F32") for key, tensor in file.tensors.items()}
    (base / "diffusion_pytorch_model.safetensors").rename(base / "diffusion_pytorch_model.fp16.safetensors")
    write_safetensors(base / "diffusion_pytorch_model.safetensors", wide, {})
    loratool.merge(base, KOHYA, out=tmp_path / "out", allow_unmatched=True)
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"):
        before, after = read_safetensors(base / name), read_safetensors(tmp_path / "out" / name)
        assert sum(not t.same_bytes(before.tensors[k]) for k, t in after.tensors.items()) == 277, name


@pytest.mark.peer
def test_diffusers_runs_the_merged_pipeline_as_it_runs_the_adapter(tmp_path: Path) -> None:
    """Merged folder == diffusers' own load_lora_weights + fuse, by the UNet's output."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    loratool.merge(TINY, models.FIXTURES / "adapters" / "diffusers.safetensors", out=tmp_path / "out")
    options = {"torch_dtype": torch.float32, "safety_checker": None}
    ours = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", **options)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(TINY, **options)
    theirs.load_lora_weights(str(models.FIXTURES / "adapters"), weight_name="diffusers.safetensors")
    generator = torch.Generator().manual_seed(0)
    text = theirs.text_encoder.config.hidden_size
    inputs = (torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([5]))
    context = torch.randn(1, 4, text, generator=generator)
    with torch.no_grad():
        plain = diffusers.UNet2DConditionModel.from_pretrained(TINY / "unet")(*inputs, context).sample
        one, other = (pipe.unet(*inputs, context).sample for pipe in (ours, theirs))
    assert (one - other).abs().max() < 0.02 * (plain - other).abs().max()  # ours is rounded to float16


def test_reading_is_refused_without_the_base_only_where_it_must_be(tmp_path: Path) -> None:
    """Flattened names of a model of one's own are read with its base, and refused by name without."""
    path = tmp_path / "own.safetensors"
    factors = {
        "lora_unet_my_block_3_to_q.lora_down.weight": Tensor.of(np.ones((2, 5), np.float32)),
        "lora_unet_my_block_3_to_q.lora_up.weight": Tensor.of(np.ones((6, 2), np.float32)),
    }
    write_safetensors(path, factors, {})
    with pytest.raises(loratool.LoratoolError, match="lora_unet_my_block_3_to_q") as refused:
        loratool.read(path)
    assert refused.value.exit_code == 3
    weight = {"my.block_3.to_q.weight": Tensor.of(np.zeros((6, 5), np.float32))}
    write_safetensors(tmp_path / "base.safetensors", weight, {})
    loratool.merge(tmp_path / "base.safetensors", path, out=tmp_path / "out.safetensors", reading=Reading())
    merged = read_safetensors(tmp_path / "out.safetensors").tensors["my.block_3.to_q.weight"].array()
    assert (merged == 2).all()


def test_a_second_merge_of_one_adapter_is_noticed(tmp_path: Path) -> None:
    """llm trap 66: the provenance of a merged base names the adapter that is in it."""
    loratool.merge(TINY, KOHYA, out=tmp_path / "once")
    again = loratool.merge(tmp_path / "once", KOHYA, out=tmp_path / "twice")
    assert any("merged into this base before" in warning for warning in again.warnings)
    other = models.FIXTURES / "adapters" / "diffusers.safetensors"
    assert not loratool.merge(tmp_path / "once", other, out=tmp_path / "other").warnings


def test_two_whole_tensors_of_one_name_are_summed_against_the_base(tmp_path: Path) -> None:
    """Never the last one taken: W + (V1 - W) + s (V2 - W); at strength 0 the base keeps its bytes, -0.0 too."""
    weight = np.array([[1.0, -0.0], [2.0, 4.0]], np.float32)
    write_safetensors(tmp_path / "base.safetensors", {"m.a.weight": Tensor.of(weight)}, {})
    whole = [weight + 1, weight * 3]
    for number, values in enumerate(whole):
        pair = {"x.lora_A.weight": Tensor.of(np.ones((1, 2), np.float32)), "m.a.weight": Tensor.of(values)}
        pair |= {"x.lora_B.weight": Tensor.of(np.ones((2, 1), np.float32))}
        write_safetensors(tmp_path / f"{number}.safetensors", pair, {})
    adapters = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for strengths, expected in (
        ((1.0, 0.5), whole[0] + 0.5 * (whole[1] - weight)),
        ((0.5, 1.0), weight + 0.5 * (whole[0] - weight) + (whole[1] - weight)),
        ((1.0, 1.0), whole[0] + whole[1] - weight),
        ((0.0, 0.0), weight),
    ):
        options = {"strengths": strengths, "overwrite": True, "allow_unmatched": True}
        loratool.merge(tmp_path / "base.safetensors", adapters, out=tmp_path / "out.safetensors", **options)
        merged = read_safetensors(tmp_path / "out.safetensors").tensors["m.a.weight"].array()
        np.testing.assert_array_equal(merged, expected.astype(np.float32))
        assert any(strengths) or merged.tobytes() == weight.tobytes()
