"""Adapters in diffusers' names, merged into single files of the original repositories: each row is where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import loratool
from loratool.architectures import TRANSFORMERS
from loratool.architectures.base import Shape, Slot
from loratool.architectures.rows import Size
from loratool.architectures.transformer import Transformer
from loratool.tensors import Tensor, read_safetensors, write_safetensors
from tests.test_architectures_converters import single_file
from tests.test_architectures_transformers import few

every = pytest.mark.parametrize("known", TRANSFORMERS, ids=lambda known: known.name)


def narrow(known: Transformer, depth: int = 2) -> Size:
    """The first size, with small widths that all differ, and few blocks."""
    first = known.sizes[0]
    widths = {letter: 6 + 2 * n for n, letter in enumerate(first.widths)}
    return few(Size("narrow", widths, first.blocks, first.features), depth)


def write_base(path: Path, known: Transformer, size: Size, prefix: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = single_file(known, size) | {"first_stage_model.decoder.conv_in.weight": (3, 2)}
    values = {
        (name if "stage" in name else prefix + name): rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    write_safetensors(path, {name: Tensor.of(value) for name, value in values.items()}, {})
    return values


def write_adapter(path: Path, shapes: dict[str, Shape]) -> dict[str, np.ndarray]:
    """A LoRA of rank 2 on everything that is a matrix or a convolution; its deltas in float64."""
    rng, tensors, deltas = np.random.default_rng(2), {}, {}
    for name, (out, *rest) in shapes.items():
        if not rest:
            continue
        down = rng.standard_normal((2, *rest)).astype(np.float32)
        up = rng.standard_normal((out, 2, *(1 for _ in rest[1:]))).astype(np.float32)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = Tensor.of(down), Tensor.of(up)
        product = up.reshape(out, 2).astype(np.float64) @ down.reshape(2, -1).astype(np.float64)
        deltas[name] = product.reshape(out, *rest)
    write_safetensors(path, tensors, {})
    return deltas


@every
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_every_module_lands_in_its_rows_of_a_single_file(known: Transformer, prefix: str, tmp_path: Path) -> None:
    """Fused projections and swapped halves (diffusion traps 11, 59); every other tensor keeps its bytes."""
    size = narrow(known)
    shapes = {n: s for n, s in known.shapes(size).items() if n.startswith("transformer.")}
    before = write_base(tmp_path / "base.safetensors", known, size, prefix)
    deltas = write_adapter(tmp_path / "lora.safetensors", shapes)
    report = loratool.merge(
        tmp_path / "base.safetensors", tmp_path / "lora.safetensors", out=tmp_path / "out.safetensors", strengths=[0.5]
    )
    assert report.modules == len(deltas)
    expected = {name: value.astype(np.float64) for name, value in before.items()}
    touched = set()
    for hit in known.table.modules(size):
        top, name = 0, f"{prefix}{hit.native}.{hit.line.parameter}"
        for reference, part in zip(hit.references, hit.line.parts, strict=True):
            rows = part.axes[0].of(size.widths)
            if (delta := deltas.get(f"transformer.{reference}")) is None:
                continue
            own = np.roll(delta, rows // 2, axis=0) if hit.line.swapped else delta
            expected[name][top : top + rows] += 0.5 * own
            touched.add(name)
            top += rows
    after = read_safetensors(tmp_path / "out.safetensors").tensors
    assert list(after) == list(read_safetensors(tmp_path / "base.safetensors").tensors)
    for name, tensor in after.items():
        if name in touched:
            np.testing.assert_allclose(tensor.array(), expected[name], rtol=0, atol=1e-5, err_msg=name)
        else:
            assert tensor.array().tobytes() == before[name].tobytes(), name


@pytest.mark.parametrize("to", ["raw", "kohya", "comfyui"])
@pytest.mark.parametrize("name", ["flux", "sd3", "lumina2", "mochi"])
def test_what_is_extracted_from_single_files_gives_the_tuned_one(name: str, to: str, tmp_path: Path) -> None:
    """Differences of fused weights are extracted by module, under reference names, and merged again."""
    known = next(known for known in TRANSFORMERS if known.name == name)
    size = narrow(known)
    before = write_base(tmp_path / "base.safetensors", known, size, "")
    rng = np.random.default_rng(3)
    trained = {key for key, value in before.items() if value.ndim > 1 and key.endswith("weight") and "stage" not in key}
    tuned = {
        key: value + rng.standard_normal(value.shape).astype(np.float32) if key in trained else value
        for key, value in before.items()
    }
    write_safetensors(tmp_path / "tuned.safetensors", {k: Tensor.of(v) for k, v in tuned.items()}, {})
    paths = [tmp_path / name for name in ("base.safetensors", "tuned.safetensors")]
    loratool.extract(*paths, out=tmp_path / "lora.safetensors", rank=64, to=to)
    found = set(loratool.read(tmp_path / "lora.safetensors").updates)
    assert found == {n for n, s in known.shapes(size).items() if n.startswith("transformer.") and worth(s)}
    loratool.merge(paths[0], tmp_path / "lora.safetensors", out=tmp_path / "out.safetensors")
    merged = read_safetensors(tmp_path / "out.safetensors").tensors
    for key, value in tuned.items():
        np.testing.assert_allclose(merged[key].array(), value, rtol=0, atol=1e-4, err_msg=key)


def worth(shape: Shape) -> bool:
    """Whether factors of rank 1 are smaller than the matrix; others are carried whole."""
    rest = int(np.prod(shape[1:]))
    return len(shape) > 1 and shape[0] > 1 and rest > 1 and shape[0] + rest < shape[0] * rest


def dora(path: Path, module: str, up: np.ndarray, down: np.ndarray, magnitude: np.ndarray) -> None:
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude}
    write_safetensors(path, {f"lora_unet_{module}.{name}": Tensor.of(value) for name, value in tensors.items()}, {})


def test_dora_of_a_half_swapped_modulation(tmp_path: Path) -> None:
    """A magnitude for each output is swapped along; one for each input stands for norms over all rows: refused."""
    known = next(known for known in TRANSFORMERS if known.name == "flux")
    size = narrow(known)
    values = write_base(tmp_path / "base.safetensors", known, size, "")
    weight = values["final_layer.adaLN_modulation.1.weight"].astype(np.float64)
    rng = np.random.default_rng(4)
    up, down = (rng.standard_normal(s).astype(np.float32) for s in ((len(weight), 2), (2, weight.shape[1])))
    magnitude = rng.random((len(weight), 1)).astype(np.float32) + 1
    dora(tmp_path / "dora.safetensors", "norm_out_linear", up, down, magnitude)  # diffusers' order of the halves
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "dora.safetensors", out=tmp_path / "out.safetensors")
    half = len(weight) // 2
    turned = np.roll(weight, half, axis=0) + up.astype(np.float64) @ down
    turned *= magnitude / np.linalg.norm(turned, axis=1, keepdims=True)
    merged = read_safetensors(tmp_path / "out.safetensors").tensors["final_layer.adaLN_modulation.1.weight"].array()
    np.testing.assert_allclose(merged, np.roll(turned, half, axis=0), rtol=0, atol=1e-5)
    by_input = rng.random((1, weight.shape[1])).astype(np.float32) + 1
    dora(tmp_path / "input.safetensors", "norm_out_linear", up, down, by_input)
    with pytest.raises(loratool.LoratoolError, match=r"lora_unet_norm_out_linear -> final_layer\.adaLN_modulation\.1"):
        loratool.merge(tmp_path / "base.safetensors", tmp_path / "input.safetensors", out=tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


def test_metadata_says_what_a_text_encoder_is_for(tmp_path: Path) -> None:
    """A T5 alone may be SD3's or FLUX's; a flattened name is refused where nothing tells."""
    tensors = {
        f"lora_te3_encoder_block_0_layer_0_SelfAttention_q.{slot}.weight": Tensor.of(np.ones(shape, np.float32))
        for slot, shape in (("lora_down", (2, 8)), ("lora_up", (8, 2)))
    }
    found = {}
    for told in ("sd3", "flux1", "None"):
        path = tmp_path / f"{told}.safetensors"
        write_safetensors(path, tensors, {"ss_base_model_version": told})
        if told == "None":
            with pytest.raises(loratool.LoratoolError, match="lora_te3_encoder_block_0") as refused:
                loratool.read(path)
            assert refused.value.exit_code == 3
        else:
            found[told] = next(iter(loratool.read(path).updates)).partition(".")[0]
    assert found == {"sd3": "text_encoder_3", "flux1": "text_encoder_2"}


@pytest.mark.parametrize("world", ["kohya", "comfy", "diffusers"])
@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "lumina2", "z-image", "hunyuan-video", "mochi"])
def test_one_adapter_changes_every_layout_of_a_base_alike(name: str, world: str, tmp_path: Path) -> None:
    """An adapter in any world's names, into the original's single file and into diffusers' folder: the same rows."""
    known = next(known for known in TRANSFORMERS if known.name == name)
    size = narrow(known)
    before = write_base(tmp_path / "base.safetensors", known, size, "model.diffusion_model.")
    slots = known.checkpoint({name: value.shape for name, value in before.items()})
    shapes = {n: s for n, s in known.shapes(size).items() if n.startswith("transformer.") and len(s) == 2}
    rng, tensors = np.random.default_rng(5), {}
    for reference, shape in shapes.items():
        place = known.stored(reference, world, shape)
        assert place is not None
        heights = place.heights([shapes.get(segment.reference) for segment in place.segments]) or ()
        for slot, factor in (("lora_down", (2, shape[1])), ("lora_up", (sum(heights), 2))):
            key = f"{place.name}.{slot}.weight"
            if key not in tensors:
                tensors[key] = Tensor.of(rng.standard_normal(factor).astype(np.float32))
    write_safetensors(tmp_path / "lora.safetensors", tensors, {})
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "Transformer2DModel"}')
    parts = {reference.removeprefix("transformer."): rows_of(before, slot) for reference, slot in slots.items()}
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", {k: Tensor.of(v) for k, v in parts.items()}, {})
    for base, out in (("base.safetensors", "out.safetensors"), ("folder", "out")):
        report = loratool.merge(tmp_path / base, tmp_path / "lora.safetensors", out=tmp_path / out)
        assert report.modules == len(shapes)
    single = {k: t.array() for k, t in read_safetensors(tmp_path / "out.safetensors").tensors.items()}
    split = read_safetensors(tmp_path / "out" / "diffusion_pytorch_model.safetensors").tensors
    changed = 0
    for reference, slot in slots.items():
        merged = split[reference.removeprefix("transformer.")].array()
        np.testing.assert_allclose(merged, rows_of(single, slot), rtol=0, atol=1e-5, err_msg=reference)
        changed += not np.array_equal(merged, parts[reference.removeprefix("transformer.")])
    assert changed == len(shapes)


def rows_of(values: dict[str, np.ndarray], slot: Slot) -> np.ndarray:
    tensor = values[slot.tensor]
    return np.concatenate([tensor[start:stop] for start, stop in slot.ranges(len(tensor))])


def test_whole_differences_of_norms_and_modulations(tmp_path: Path) -> None:
    """As distilled Wan adapters carry them (diffusion trap 56): of a norm, of biases, of tables without a module."""
    known = next(known for known in TRANSFORMERS if known.name == "wan")
    before = write_base(tmp_path / "base.safetensors", known, narrow(known), "")
    rng = np.random.default_rng(6)
    stored = {
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "blocks.1.self_attn.q.diff_b": "blocks.1.self_attn.q.bias",
        "blocks.1.modulation.diff": "blocks.1.modulation",
        "head.modulation.diff": "head.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    deltas = {key: rng.standard_normal(before[name].shape).astype(np.float32) for key, name in stored.items()}
    tensors = {f"diffusion_model.{key}": Tensor.of(value) for key, value in deltas.items()}
    write_safetensors(tmp_path / "lora.safetensors", tensors, {})
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", out=tmp_path / "out.safetensors")
    after = read_safetensors(tmp_path / "out.safetensors").tensors
    for key, name in stored.items():
        np.testing.assert_allclose(after[name].array(), before[name] + deltas[key], rtol=1e-6, atol=1e-6)
    assert sum(after[n].array().tobytes() != value.tobytes() for n, value in before.items()) == len(stored)


def test_what_the_base_lacks_is_named(tmp_path: Path) -> None:
    """diffusion trap 57: an adapter for images on a base for texts is refused by name, or insisted on."""
    known = next(known for known in TRANSFORMERS if known.name == "wan")
    write_base(tmp_path / "base.safetensors", known, narrow(known), "")
    tensors = {}
    for module in ("blocks_0_cross_attn_k_img", "blocks_0_cross_attn_k"):
        tensors[f"lora_unet_{module}.lora_down.weight"] = Tensor.of(np.ones((2, 6), np.float32))
        tensors[f"lora_unet_{module}.lora_up.weight"] = Tensor.of(np.ones((6, 2), np.float32))
    write_safetensors(tmp_path / "lora.safetensors", tensors, {})
    paths = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    with pytest.raises(loratool.LoratoolError, match="lora_unet_blocks_0_cross_attn_k_img") as refused:
        loratool.merge(*paths, out=tmp_path / "out.safetensors")
    assert refused.value.exit_code == 4
    report = loratool.merge(*paths, out=tmp_path / "out.safetensors", allow_unmatched=True)
    assert report.modules == 1 and len(report.unmatched) == 1


def test_parts_of_an_adapter_are_enough(tmp_path: Path) -> None:
    """diffusion trap 19: any blocks, any modules; of a fused projection, any of its parts."""
    known = next(known for known in TRANSFORMERS if known.name == "flux")
    size = narrow(known, 3)
    before = write_base(tmp_path / "base.safetensors", known, size, "")
    shapes = known.shapes(size)
    some = ("transformer_blocks.2.attn.to_v", "single_transformer_blocks.1.proj_mlp")
    deltas = write_adapter(
        tmp_path / "lora.safetensors", {f"transformer.{n}": shapes[f"transformer.{n}"] for n in some}
    )
    loratool.convert(tmp_path / "lora.safetensors", out=tmp_path / "kohya.safetensors", to="kohya")
    for adapter in ("lora", "kohya"):
        out = tmp_path / f"{adapter}-out.safetensors"
        loratool.merge(tmp_path / "base.safetensors", tmp_path / f"{adapter}.safetensors", out=out)
        after = read_safetensors(out).tensors
        h = size.widths["h"]
        for (key, rows), delta in zip(
            (
                ("double_blocks.2.img_attn.qkv.weight", slice(2 * h, 3 * h)),
                ("single_blocks.1.linear1.weight", slice(3 * h, None)),
            ),
            deltas.values(),
            strict=True,
        ):
            expected = before[key].astype(np.float64)
            expected[rows] += delta
            np.testing.assert_allclose(after[key].array(), expected, rtol=0, atol=1e-5)
        changed = {name for name, value in before.items() if after[name].array().tobytes() != value.tobytes()}
        assert changed == {"double_blocks.2.img_attn.qkv.weight", "single_blocks.1.linear1.weight"}
