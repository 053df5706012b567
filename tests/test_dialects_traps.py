"""Known traps of image models' files that no other test stands for; their numbers are those of the list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool import api
from loratool.adapter import Adapter
from loratool.architectures import architecture
from loratool.errors import FormatError, MatchError
from loratool.formats import by_name, detect
from loratool.formats.base import Evidence
from tests import diffusion
from tests.diffusion import Pairs, factors, save

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

H = 8
SD1 = {  # both the first levels and the last ones, whose numbers begin alike
    "unet.down_blocks.0.attentions.0.proj_in": "input_blocks_1_1_proj_in",
    "unet.down_blocks.3.resnets.0.conv1": "input_blocks_10_0_in_layers_2",
    "unet.down_blocks.3.resnets.1.conv2": "input_blocks_11_0_out_layers_3",
    "unet.up_blocks.0.resnets.1.conv1": "output_blocks_1_0_in_layers_2",
    "unet.up_blocks.3.attentions.1.proj_out": "output_blocks_10_1_proj_out",
}
LINEAR = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def read(path: Path, format: str = "") -> Adapter:
    evidence = Evidence(path)
    found, _ = detect(evidence)
    assert format in ("", found.name)
    return found.read(evidence)


def written(adapter: Adapter, path: Path, to: str) -> Path:
    """A file of an adapter of which nothing is lost."""
    assert not by_name(to).losses(adapter)
    by_name(to).write(adapter, path)
    return path


def assert_same(adapter: Adapter, pairs: Pairs, alpha: float | None = None) -> None:
    assert adapter.updates.keys() == pairs.keys()
    for name, pair in pairs.items():
        update: Any = adapter.updates[name]
        expected = diffusion.delta(pair, alpha)
        np.testing.assert_allclose(update.delta().reshape(expected.shape), expected, atol=1e-5, err_msg=name)


def named(pairs: Pairs, names: dict[str, str], alpha: float | None = 1.0) -> dict[str, Any]:
    return diffusion.kohya(pairs, names, alpha)


def test_alphas_of_a_split_training_are_taken_as_loaders_do_8(tmp_path: Path) -> None:
    """alpha / (3 r): a third of what was trained; a word says so."""
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    pairs = factors({module: (3 * H, H)}, rank=6)
    told = {"ss_network_args": json.dumps({"split_qkv": "True"})}
    adapter = read(save(tmp_path / "file", named(pairs, {module: module}, 2.0), told), "kohya")
    assert {update.scaling for update in adapter.updates.values()} == {2 / 6}
    assert "split_qkv" in " ".join(adapter.metadata.warnings)


@pytest.mark.parametrize("to", ["kohya", "lycoris", "comfyui", "diffusers"])
def test_the_ends_of_flux_keep_their_component_12(to: str, tmp_path: Path) -> None:
    ends = (
        "x_embedder",
        "context_embedder",
        "time_text_embed.guidance_embedder.linear_1",
        "norm_out.linear",
        "proj_out",
    )
    shapes = {f"transformer.{end}": (2 * H, H) for end in ends}
    pairs = factors(shapes | {"transformer.single_transformer_blocks.0.proj_out": (H, 5 * H)}, rank=1)
    source = read(save(tmp_path / "s", diffusion.diffusers(pairs) | {f"{n}.alpha": torch.tensor(0.5) for n in pairs}))
    back = read(written(source, tmp_path / "out", to), to)
    assert_same(back, pairs, 0.5)
    assert all(update.alpha == 0.5 for update in back.updates.values())  # none is dropped [11]


def test_flux_2_with_alphas_15(tmp_path: Path) -> None:
    names = ("double_blocks.0.img_mlp.2", "single_blocks.0.linear1", "double_stream_modulation_img.lin")
    pairs = factors(dict(zip(names, ((H, 3 * H), (9 * H, H), (6 * H, H)), strict=True)))
    tensors = named(pairs, {name: f"diffusion_model.{name}" for name in names}, 4.0)
    adapter = read(save(tmp_path / "file", tensors), "comfyui")
    assert adapter.metadata.architecture == "flux2"
    assert {update.scaling for update in adapter.updates.values()} == {2.0}
    keys = diffusion.load(written(adapter, tmp_path / "out", "diffusers"))
    assert not any("alpha" in key for key in keys)
    assert {key.rpartition(".lora_")[0] for key in keys} == {
        "transformer.transformer_blocks.0.ff.linear_out",
        "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        "transformer.double_stream_modulation_img.linear",
    }


def test_names_of_both_worlds_in_one_file_16(tmp_path: Path) -> None:
    known = architecture("sdxl")
    assert known
    names = [name for name in known.modules() if "mid_block" in name and ".attn" in name and "_blocks.0" in name]
    pairs = factors({name: known.shapes()[name] for name in names}, rank=1)
    forward = known.kohya().forward
    mixed = {name: forward[name] if n % 2 else diffusion.flat(name) for n, name in enumerate(names)}
    adapter = read(save(tmp_path / "file", named(pairs, mixed)), "kohya")
    assert adapter.updates.keys() == pairs.keys()
    assert {adapter.spelling(name) for name in names} == set(mixed.values())


def test_numbers_that_begin_alike_are_not_the_same_18(tmp_path: Path) -> None:
    shapes = diffusion.layers("sd1", conv=True)
    pairs = factors({name: shapes[name] for name in SD1}, rank=1)
    adapter = read(save(tmp_path / "file", named(pairs, {n: f"lora_unet_{body}" for n, body in SD1.items()})), "kohya")
    assert adapter.metadata.architecture == "sd1"
    assert adapter.updates.keys() == pairs.keys()


@pytest.mark.parametrize("shape", [(640, 1), (640,)])
def test_magnitudes_are_not_dropped_and_have_the_shape_that_readers_take_20_22(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    pairs = factors({LINEAR: (640, 640)}, rank=1)
    magnitude = torch.rand(shape)
    module = diffusion.flat(LINEAR)
    tensors = diffusion.kohya(pairs) | {f"{module}.dora_scale": magnitude}
    if len(shape) == 1:
        tensors = diffusion.diffusers(pairs) | {f"{LINEAR}.lora_magnitude_vector": magnitude}
    adapter = read(save(tmp_path / "file", tensors))
    assert adapter.updates[LINEAR].kind == "dora"
    found = diffusion.load(written(adapter, tmp_path / "d", "diffusers"))
    assert torch.equal(found[f"{LINEAR}.lora_magnitude_vector.weight"], magnitude.reshape(640))
    for to in ("kohya", "comfyui"):
        found = diffusion.load(written(adapter, tmp_path / to, to))
        assert torch.equal(found[f"{module}.dora_scale"], magnitude.reshape(640, 1))


@pytest.mark.parametrize(("axis", "shape"), [(0, (640, 1)), (1, (1, 640))])
def test_magnitudes_stand_for_norms_of_the_sum_21_24(axis: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Not of the base alone, as ComfyUI has it, and along the axis that their shape tells: LyCORIS reloads one only."""
    pairs = factors({LINEAR: (640, 640)}, rank=4)
    module, weight = diffusion.flat(LINEAR), np.random.default_rng(1).standard_normal((640, 640))
    magnitude = torch.rand(shape) + 0.5
    adapter = read(save(tmp_path / "file", diffusion.kohya(pairs, alpha=2.0) | {f"{module}.dora_scale": magnitude}))
    delta = diffusion.delta(pairs[LINEAR], 2.0)
    weight *= 2 * np.linalg.norm(delta) / np.linalg.norm(weight)  # a change large enough to tell the two apart
    ours, total = adapter.updates[LINEAR].apply(weight), weight + delta
    right, wrong = (
        magnitude.numpy() * total / np.linalg.norm(w, axis=1 - axis, keepdims=True) for w in (total, weight)
    )
    np.testing.assert_allclose(ours, right, atol=1e-6)
    assert np.abs(ours - wrong).max() > 0.1 * np.abs(ours).max()


@pytest.mark.parametrize("leaf", ["w_norm", "b_norm"])
def test_half_of_a_norm_is_read_and_written_32(leaf: str, tmp_path: Path) -> None:
    """A1111 gives up a file that has only one of the two."""
    norm = "unet.down_blocks.0.resnets.0.norm1"
    key = f"{diffusion.flat(norm)}.{leaf}"
    adapter = read(save(tmp_path / "file", {key: torch.rand(320)}), "kohya")
    assert list(adapter.updates) == [norm if leaf == "w_norm" else f"{norm}.bias"]
    assert list(diffusion.load(written(adapter, tmp_path / "out", "kohya"))) == [key]


def test_alphas_have_names_of_their_own_38(tmp_path: Path) -> None:
    """Of diffusers' in-memory spelling ``....down.weight.alpha`` nothing is written, and nothing is guessed."""
    pairs = factors({LINEAR: (640, 640)}, rank=2)
    adapter = read(save(tmp_path / "file", diffusion.kohya(pairs, alpha=0.5)))
    for to in ("diffusers", "kohya", "lycoris", "comfyui"):
        path = written(adapter, tmp_path / to, to)
        assert not any("weight.alpha" in key for key in diffusion.load(path))
        assert_same(read(path), pairs, 0.5)
    tensors = {f"{LINEAR}.lora.{half}.weight": t for half, t in zip(("down", "up"), pairs[LINEAR], strict=True)}
    with pytest.raises(FormatError, match="alpha"):
        read(save(tmp_path / "theirs", tensors | {f"{LINEAR}.lora.down.weight.alpha": torch.tensor(0.5)}))


def test_embeddings_of_one_name_65(tmp_path: Path) -> None:
    """Equal ones are one; of two that differ none is dropped."""
    tensors = diffusion.kohya(factors({LINEAR: (640, 640)}, rank=1))
    key = "bundle_emb.token.string_to_param.*"
    one, twin, other = (
        save(tmp_path / name, tensors | {key: torch.full((1, 768), value)})
        for name, value in (("one", 1.0), ("twin", 1.0), ("other", 2.0))
    )
    loratool.add(one, twin, out=tmp_path / "sum")
    assert list(loratool.read(tmp_path / "sum").carried) == [key]
    with pytest.raises(MatchError, match="bundle_emb"):
        loratool.add(one, other, out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_comfyui_takes_of_a_unet_is_kohya_s_names_30_31(tmp_path: Path) -> None:
    """It does not take ``unet.….attn1.to_q.lora_A.weight``, nor does anything that splits at the first dot."""
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    pairs = factors({LINEAR: (640, 640), text: (3072, 768)}, rank=1)
    adapter = read(save(tmp_path / "file", diffusion.diffusers(pairs)), "diffusers")
    keys = diffusion.load(written(adapter, tmp_path / "out", "comfyui"))
    assert {key.partition(".")[0] for key in keys} == {diffusion.flat(LINEAR), diffusion.flat(text)}
    assert all(key.partition(".")[2] in ("lora_down.weight", "lora_up.weight", "alpha") for key in keys)


def test_one_module_under_two_prefixes_is_summed_54(tmp_path: Path) -> None:
    """Of which ComfyUI keeps one."""
    first, second = (factors({"double_blocks.0.img_attn.proj": (H, H)}, rank=rank) for rank in (2, 3))
    name = "double_blocks.0.img_attn.proj"
    tensors = named(first, {name: "lora_unet_double_blocks_0_img_attn_proj"}, 1.0)
    tensors |= named(second, {name: f"diffusion_model.{name}"}, 6.0)
    adapter = read(save(tmp_path / "file", tensors))
    target = "transformer.transformer_blocks.0.attn.to_out.0"
    update: Any = adapter.updates[target]
    expected = diffusion.delta(first[name], 1.0) + diffusion.delta(second[name], 6.0)
    np.testing.assert_allclose(update.delta(), expected, atol=1e-5)
    spelled = {f"diffusion_model.{name}", "lora_unet_double_blocks_0_img_attn_proj"}
    assert set(adapter.spelling(target).split(" + ")) == spelled
    back: Any = read(written(adapter, tmp_path / "out", "kohya")).updates[target]
    np.testing.assert_allclose(back.delta(), expected, atol=1e-5)


def test_alphas_of_another_rank_are_worth_a_word_64(tmp_path: Path) -> None:
    shapes = {f"lora_unet_blocks_{n}_self_attn_q_proj": (64, 64) for n in range(2)}
    pairs = {name: factors({name: shape}, rank=1 + 63 * n)[name] for n, (name, shape) in enumerate(shapes.items())}
    path = save(tmp_path / "file", named(pairs, {name: name for name in pairs}, 64.0))
    found = api.inspect(path)
    assert sorted(target.scaling or 0 for target in found.targets) == [1.0, 64.0]
    assert "varies 64-fold" in " ".join(found.warnings)


OMI = {  # OneTrainer: its components, the original repository's names, kohya's suffixes
    "unet.output_blocks.5.1.proj_in": "unet.up_blocks.1.attentions.2.proj_in",
    "unet.middle_block.1.transformer_blocks.9.ff.net.2": "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.2",
    "clip_g.text_model.encoder.layers.31.mlp.fc2": "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
}


def test_original_names_behind_a_component_are_onetrainer_s(tmp_path: Path) -> None:
    """Section 2.1: the prefix says diffusers, the body says SGM."""
    known = architecture("sdxl")
    assert known
    pairs = factors({stored: known.shapes()[name] for stored, name in OMI.items()}, rank=1)
    adapter = read(save(tmp_path / "file", named(pairs, {name: name for name in pairs}, 0.5)), "onetrainer")
    assert adapter.metadata.architecture == "sdxl"
    assert {adapter.spelling(name): name for name in adapter.updates} == OMI
    assert {update.scaling for update in adapter.updates.values()} == {0.5}


@pytest.mark.parametrize(("family", "component"), [("flux", "text_encoder_2"), ("sd3", "text_encoder_3")])
def test_which_text_encoder_a_t5_is_depends_on_the_model_28(family: str, component: str, tmp_path: Path) -> None:
    body = {
        "flux": "transformer.single_transformer_blocks.0.proj_out",
        "sd3": "transformer.joint_blocks.0.x_block.mlp.fc1",
    }
    leaf = "encoder.block.0.layer.0.SelfAttention.q"
    pairs = factors({body[family]: (H, 5 * H) if family == "flux" else (4 * H, H), f"t5.{leaf}": (H, H)}, rank=1)
    adapter = read(save(tmp_path / "file", named(pairs, {name: name for name in pairs}, 1.0)), "onetrainer")
    assert adapter.metadata.architecture == family
    assert f"{component}.{leaf}" in adapter.updates


def test_original_names_without_a_prefix_are_onetrainer_s(tmp_path: Path) -> None:
    names = ("blocks.0.self_attn.q", "blocks.0.cross_attn.o", "blocks.3.ffn.2")
    pairs = factors(dict.fromkeys(names, (H, H)))
    adapter = read(save(tmp_path / "file", diffusion.diffusers(pairs)), "onetrainer")
    assert adapter.updates.keys() == {
        "transformer.blocks.0.attn1.to_q",
        "transformer.blocks.0.attn2.to_out.0",
        "transformer.blocks.3.ffn.net.2",
    }


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_of_language_models_are_not_taken_for_theirs(prefix: str, tmp_path: Path) -> None:
    names = (f"{prefix}layers.0.attention.wq", f"{prefix}layers.0.feed_forward.w1")
    for own in (names, names[1:]):
        path = save(tmp_path / "file", diffusion.diffusers(factors(dict.fromkeys(own, (H, H)))))
        assert detect(Evidence(path))[0].name not in ("onetrainer", "bfl", "comfyui")
