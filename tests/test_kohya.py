"""The kohya format: names, slots, alphas, metadata; numbers in brackets are those of the list of known traps."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratool.adapter import Adapter, Metadata
from loratool.architectures import architecture
from loratool.errors import FormatError, MatchError, NumericError
from loratool.formats import detect, diffusers, kohya, peft, raw
from loratool.formats.base import Evidence
from loratool.tensors import Tensor
from loratool.update import Dense, DoRA, LowRank, Sum
from tests import diffusion
from tests.diffusion import factors, layers, read, save, write

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # whose shape tells SD1
PROJ_OUT = "unet.down_blocks.0.attentions.0.proj_out"
CONV1 = "unet.down_blocks.0.resnets.0.conv1"
FC1 = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
METADATA = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "2",
    "ss_network_alpha": "1.0",
    "ss_base_model_version": "sd_v1",
    "ss_sd_model_name": "model.safetensors",
    "ss_v2": "False",
    "ss_tag_frequency": json.dumps({"set": {"ünïcode tag": 3}}),
}


def some(*names: str, model: str = "tiny", **options: Any) -> diffusion.Pairs:
    """Factors of a few modules."""
    shapes = layers(model, conv=True)
    return factors({name: shapes[name] for name in names}, **options)


def one(tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None, **options: Any) -> Adapter:
    """The adapter of a file of these tensors."""
    return read(kohya, save(tmp_path / "one.safetensors", tensors, metadata), **options)


def adapter(updates: dict[str, Any], format: str = "raw", **metadata: Any) -> Adapter:
    return Adapter(updates, {}, Metadata(format=format, **metadata))


def low(pair: tuple[Any, Any], **options: Any) -> LowRank:
    down, up = pair
    return LowRank(Tensor.of(down.numpy()), Tensor.of(up.numpy()), **options)


# -- whole files ---------------------------------------------------------------------------------------------


def canonical(model: str, path: Path) -> tuple[Path, diffusion.Pairs]:
    """A file as sd-scripts writes it for a whole model, convolutions too."""
    known = architecture(model)
    pairs = factors(layers(model, conv=True), rank=1, dtype="float16")
    names = known.kohya().forward if known else None
    return save(path / f"{model}.safetensors", diffusion.kohya(pairs, names, alpha=0.5), METADATA), pairs


@pytest.mark.parametrize("model", ["tiny", "sd1", "sd2", "sdxl"])
def test_a_canonical_file_is_read_under_reference_names_and_written_byte_for_byte(model: str, tmp_path: Path) -> None:
    path, pairs = canonical(model, tmp_path)
    found = read(kohya, path)
    assert found.updates.keys() == pairs.keys()
    assert found.metadata.architecture == (None if model == "tiny" else model)
    assert not found.metadata.warnings
    for name in list(pairs)[::40]:
        expected = diffusion.delta(pairs[name], 0.5)
        np.testing.assert_allclose(found.updates[name].delta(), expected, atol=1e-6)
    assert write(kohya, found, tmp_path / "again").read_bytes() == path.read_bytes()


def test_the_bundled_files_are_written_byte_for_byte(fixtures: Path, tmp_path: Path) -> None:
    path = fixtures / "adapters" / "kohya.safetensors"
    assert write(kohya, read(kohya, path), tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.peer
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_diffusers_own_converter_reads_what_is_written_as_the_same_modules(model: str, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.configuration_utils import FrozenDict
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    shapes = layers(model, conv=True)
    pairs = factors(shapes, rank=1, dtype="float16")
    source = save(tmp_path / "source", diffusion.diffusers(pairs))
    tensors = diffusion.load(write(kohya, read(diffusers, source), tmp_path / "out"))
    assert ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha" in tensors) == (model == "sdxl")
    assert any("_input_blocks_" in key for key in tensors) == (model == "sdxl")
    config = FrozenDict(**UNet2DConditionModel.__init__.__kwdefaults__ or {}, layers_per_block=2)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=config)
    assert set(alphas.values()) == {1.0}
    unet = convert_unet_state_dict_to_peft({k: v for k, v in state.items() if k.startswith("unet.")})
    text = convert_state_dict_to_peft({k: v for k, v in state.items() if k.startswith("text_")})
    converted = unet | text
    expected = diffusion.diffusers(pairs)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_through_other_formats_and_back_every_delta_stays(fixtures: Path, tmp_path: Path) -> None:
    source = read(kohya, fixtures / "adapters" / "kohya.safetensors")
    for format in (diffusers, peft, raw):
        there = read(format, write(format, source, tmp_path / format.FORMAT.name))
        back = read(kohya, write(kohya, there, tmp_path / f"{format.FORMAT.name}.kohya"))
        diffusion.same(source, back)
        tensors = back.updates[TO_Q].slots
        assert all(tensors[slot].same_bytes(t) for slot, t in source.updates[TO_Q].slots.items())


def test_two_text_encoders_are_numbered(tmp_path: Path) -> None:
    pair, second = some(FC1)[FC1], FC1.replace("encoder.", "encoder_2.", 1)
    for names, prefixes in (((FC1,), {"lora_te_"}), ((FC1, second), {"lora_te1_", "lora_te2_"})):
        path = write(kohya, adapter(dict.fromkeys(names, low(pair))), tmp_path / f"{len(names)}")
        assert {key.partition("text_model")[0] for key in diffusion.load(path)} == prefixes
        assert read(kohya, path).updates.keys() == set(names)


def test_the_architecture_that_an_adapter_is_told_to_be_for_names_it(tmp_path: Path) -> None:
    """The first text encoder of XL is that of 1.x."""
    update = low(some(FC1, model="sd1")[FC1])
    for told, prefix in (("sdxl", "lora_te1_"), ("sd1", "lora_te_"), (None, "lora_te_")):
        path = write(kohya, adapter({FC1: update}, architecture=told), tmp_path / f"{told}")
        assert all(key.startswith(prefix) for key in diffusion.load(path))


def test_a_peft_folder_of_a_bare_model_gets_its_component(tmp_path: Path) -> None:
    pairs = some(TO_Q, CONV1) | some(FC1)
    bare = {name.partition(".")[2]: low(pair, alpha=4.0) for name, pair in pairs.items()}
    back = read(kohya, write(kohya, adapter(bare, "peft"), tmp_path / "out"))
    assert back.updates.keys() == pairs.keys()


# -- names ---------------------------------------------------------------------------------------------------


ODD_NAMES = {
    "twice the component [35]": ("lora_unet_unet_{}", "unet"),
    "two underscores [34]": ("lora_unet__{}", "unet"),
    "an underscore at the end [33]": ("lora_unet_{}_", "unet"),
    "the first of two text encoders, of one model [27]": ("lora_te1_{}", "text_encoder"),
}


@pytest.mark.parametrize(("pattern", "component"), ODD_NAMES.values(), ids=ODD_NAMES)
@pytest.mark.parametrize("model", ["tiny", "sd1"])
def test_odd_prefixes_of_published_files(pattern: str, component: str, model: str, tmp_path: Path) -> None:
    name = FC1 if component == "text_encoder" else PROJ_OUT
    module = pattern.format(name.partition(".")[2].replace(".", "_"))
    found = one(tmp_path, diffusion.kohya(some(name, model=model), {name: module}))
    assert list(found.updates) == [name]
    assert found.spelling(name).rstrip("_") == module.rstrip("_")
    assert found.updates[name].alpha == 1.0


def test_an_underscore_at_the_end_of_one_tensor_s_name_only_33(tmp_path: Path) -> None:
    tensors = diffusion.kohya(some(PROJ_OUT), alpha=None)
    tensors[f"{diffusion.flat(PROJ_OUT)}_.alpha"] = torch.tensor(1.0)
    assert one(tmp_path, tensors).updates[PROJ_OUT].scaling == 0.5


def test_suffixes_joined_by_an_underscore_35(tmp_path: Path) -> None:
    (down, up), module = some(TO_Q)[TO_Q], "lora_unet_" + diffusion.flat(TO_Q).removeprefix("lora_")
    tensors = {f"{module}_lora_down.weight": down, f"{module}_lora_up.weight": up}
    found = one(tmp_path, tensors)
    np.testing.assert_allclose(found.updates[TO_Q].delta(), diffusion.delta((down, up)), atol=1e-6)


def test_xl_with_diffusers_names_is_the_same_adapter_and_is_written_in_ldm_names_16(tmp_path: Path) -> None:
    pairs = factors({n: s for n, s in layers("sdxl").items() if "mid_block" in n}, rank=1)
    known = architecture("sdxl")
    assert known
    plain = one(tmp_path, diffusion.kohya(pairs))
    own = read(kohya, save(tmp_path / "own", diffusion.kohya(pairs, known.kohya().forward)))
    assert plain.metadata.architecture == own.metadata.architecture == "sdxl"
    diffusion.same(plain, own, list(pairs)[:5])
    written = diffusion.load(write(kohya, plain, tmp_path / "written"))
    assert all(key.startswith("lora_unet_middle_block_1_") for key in written)


def test_the_upsampler_of_1x_in_ldm_names_17(tmp_path: Path) -> None:
    target = "unet.up_blocks.0.upsamplers.0.conv"
    pairs = some(target, "unet.up_blocks.0.resnets.0.conv1", model="sd1")
    names = dict(
        zip(pairs, ("lora_unet_output_blocks_2_1_conv", "lora_unet_output_blocks_0_0_in_layers_2"), strict=True)
    )
    assert one(tmp_path, diffusion.kohya(pairs, names)).updates.keys() == pairs.keys()


def test_two_spellings_of_a_module_are_summed_54(tmp_path: Path) -> None:
    first, second = some(PROJ_OUT), some(PROJ_OUT, rank=3)
    tensors = diffusion.kohya(first)
    tensors |= diffusion.kohya(second, {PROJ_OUT: diffusion.flat(PROJ_OUT) + "_"}, alpha=6.0)
    found = one(tmp_path, tensors)
    expected = diffusion.delta(first[PROJ_OUT], 1.0) + diffusion.delta(second[PROJ_OUT], 6.0)
    update = found.updates[PROJ_OUT]
    assert isinstance(update, Sum)
    np.testing.assert_allclose(update.delta(), expected, atol=1e-6)
    assert found.spelling(PROJ_OUT) == f"{diffusion.flat(PROJ_OUT)} + {diffusion.flat(PROJ_OUT)}_"
    back = read(kohya, write(kohya, found, tmp_path / "out")).updates[PROJ_OUT]
    assert (back.rank, back.scaling) == (5, 1.0)
    np.testing.assert_allclose(back.delta(), expected, atol=1e-6)


def test_two_spellings_that_do_not_add_up_are_refused_54(tmp_path: Path) -> None:
    tensors = diffusion.kohya(some(TO_Q)) | diffusion.kohya(some(TO_Q), {TO_Q: diffusion.flat(TO_Q) + "_"})
    for module in (diffusion.flat(TO_Q), diffusion.flat(TO_Q) + "_"):
        tensors[f"{module}.dora_scale"] = torch.ones(8, 1)
    with pytest.raises(FormatError, match=r"cannot be added.*to_q and .*to_q_"):
        one(tmp_path, tensors)


@pytest.mark.parametrize("body", ["input_blocks_1_1_transformer_blocks_3_attn1_to_q", "something_else"])
def test_a_name_that_cannot_be_turned_back_is_refused(body: str, tmp_path: Path) -> None:
    tensors = diffusion.kohya(some(FC1)) | diffusion.kohya(some(TO_Q), {TO_Q: f"lora_unet_{body}"})
    with pytest.raises(FormatError, match="no known model has") as error:
        one(tmp_path, tensors)
    assert error.value.where.endswith(f"lora_unet_{body}")


def test_the_modules_of_the_base_turn_names_back(tmp_path: Path) -> None:
    """Also of models that no table knows, with or without their component."""
    tensors = diffusion.kohya(some(TO_Q), {TO_Q: "lora_unet_my_net_to_q"})
    for base, found in (
        ("unet.my.net.to_q", "unet.my.net.to_q"),
        ("unet.my_net.to_q", "unet.my_net.to_q"),
        ("transformer.my.net_to_q", "transformer.my.net_to_q"),
    ):
        assert list(one(tmp_path, tensors, modules=(base, "vae.my.net.to_q")).updates) == [found]
    written = diffusion.load(write(kohya, one(tmp_path, tensors, modules=("unet.my.net.to_q",)), tmp_path / "out"))
    assert "lora_unet_my_net_to_q.alpha" in written
    with pytest.raises(MatchError, match="two modules of the base"):
        one(tmp_path, tensors, modules=("unet.my.net.to_q", "unet.my_net.to_q"))


# -- alpha ---------------------------------------------------------------------------------------------------


ALPHAS = {
    "int64 [4]": lambda: torch.tensor(3),
    "a vector of one [5]": lambda: torch.tensor([3.0], dtype=torch.float16),
    "bfloat16 [6]": lambda: torch.tensor(3.0, dtype=torch.bfloat16),
    "float64": lambda: torch.tensor(3.0, dtype=torch.float64),
    "a matrix of one [39]": lambda: torch.tensor([[3.0]]),
}


@pytest.mark.parametrize("make", ALPHAS.values(), ids=ALPHAS)
def test_alpha_of_any_dtype_and_shape_is_read_and_written_as_a_float32_scalar(make: Any, tmp_path: Path) -> None:
    pairs = some(TO_Q, dtype="bfloat16")
    tensors = diffusion.kohya(pairs) | {f"{diffusion.flat(TO_Q)}.alpha": make()}
    found = one(tmp_path, tensors)
    assert (found.updates[TO_Q].alpha, found.updates[TO_Q].scaling) == (3.0, 1.5)
    written = diffusion.load(write(kohya, found, tmp_path / "out"))
    alpha = written[f"{diffusion.flat(TO_Q)}.alpha"]
    assert (alpha.dtype, alpha.shape, alpha.item()) == (torch.float32, (), 3.0)
    assert written[f"{diffusion.flat(TO_Q)}.lora_up.weight"].dtype == torch.bfloat16


def test_an_alpha_that_no_half_can_hold_is_kept_beside_half_factors_7(tmp_path: Path) -> None:
    pairs = some(TO_Q, dtype="float16")
    for alpha in (70000.0, 1e-5):
        back = one(tmp_path, diffusion.kohya(pairs, alpha=alpha))
        written = diffusion.load(write(kohya, back, tmp_path / f"{alpha}"))
        assert written[f"{diffusion.flat(TO_Q)}.alpha"] == torch.tensor(alpha)
        assert torch.equal(written[f"{diffusion.flat(TO_Q)}.lora_down.weight"], pairs[TO_Q][0])


def test_an_alpha_that_overflowed_is_an_error_7(tmp_path: Path) -> None:
    tensors = diffusion.kohya(some(TO_Q))
    tensors[f"{diffusion.flat(TO_Q)}.alpha"] = torch.tensor(70000.0).half()
    with pytest.raises(NumericError, match="alpha is inf"):
        one(tmp_path, tensors)


def test_no_alpha_means_the_rank_and_a_word(tmp_path: Path) -> None:
    found = one(tmp_path, diffusion.kohya(some(TO_Q), alpha=None))
    assert (found.updates[TO_Q].alpha, found.updates[TO_Q].scaling) == (None, 1.0)
    assert found.metadata.warnings == ("alpha is missing for 1 of 1 modules: their scaling is 1",)
    assert diffusion.load(write(kohya, found, tmp_path / "out"))[f"{diffusion.flat(TO_Q)}.alpha"].item() == 2.0


def test_an_alpha_of_zero_is_kept(tmp_path: Path) -> None:
    found = one(tmp_path, diffusion.kohya(some(TO_Q), alpha=0.0))
    assert (found.updates[TO_Q].alpha, found.updates[TO_Q].scaling) == (0.0, 0.0)
    assert diffusion.load(write(kohya, found, tmp_path / "out"))[f"{diffusion.flat(TO_Q)}.alpha"].item() == 0.0


def test_rank_stabilised_scaling_is_in_the_stored_alpha_3(tmp_path: Path) -> None:
    """Read: LyCORIS stored alpha x sqrt(r), and says so in its arguments. Written: the same."""
    pair = some(TO_Q, rank=4)[TO_Q]
    arguments = {"ss_network_args": json.dumps({"rs_lora": "True"})}
    assert one(tmp_path, diffusion.kohya({TO_Q: pair}, alpha=8.0), arguments).updates[TO_Q].scaling == 2.0
    source = adapter({TO_Q: low(pair, alpha=4.0, rank_stabilised=True)})
    back = read(kohya, write(kohya, source, tmp_path / "out")).updates[TO_Q]
    assert (back.alpha, back.scaling) == (8.0, 2.0)


def test_an_alpha_beyond_float32_is_a_loss() -> None:
    lost = kohya.FORMAT.losses(adapter({TO_Q: low(some(TO_Q)[TO_Q], alpha=1e-60)}))
    assert "beyond float32" in lost[0].reason


def test_each_module_has_its_own_rank_whatever_the_metadata_says_37(tmp_path: Path) -> None:
    pairs = some(TO_Q, rank=2) | some(CONV1, rank=3)
    found = one(tmp_path, diffusion.kohya(pairs, alpha=6.0), {"ss_network_dim": "64"})
    assert [found.updates[name].rank for name in (TO_Q, CONV1)] == [2, 3]
    assert [found.updates[name].scaling for name in (TO_Q, CONV1)] == [3.0, 2.0]


# -- slots ---------------------------------------------------------------------------------------------------


def test_factors_of_hand_made_shapes_are_reshaped_42(tmp_path: Path) -> None:
    """up without kernel axes, or down with its kernel flattened, or a 1x1 convolution as a matrix."""
    pairs = some(CONV1, PROJ_OUT, TO_K, model="sd1")
    conv, square = pairs[CONV1], pairs[PROJ_OUT]
    matrix = square[0].flatten(1), square[1].flatten(1)
    mixed = diffusion.kohya(pairs | {CONV1: (conv[0], conv[1].flatten(1)), PROJ_OUT: matrix})
    found = one(tmp_path, mixed)
    assert found.metadata.architecture == "sd1"
    np.testing.assert_allclose(found.updates[CONV1].delta(), diffusion.delta(conv, 1.0), atol=1e-6)
    assert found.updates[PROJ_OUT].shape == (320, 320)
    written = diffusion.load(write(kohya, found, tmp_path / "out"))
    assert written[f"{diffusion.flat(CONV1)}.lora_up.weight"].shape == (320, 2, 1, 1)
    assert written[f"{diffusion.flat(PROJ_OUT)}.lora_down.weight"].shape == (2, 320)
    flattened = one(tmp_path, diffusion.kohya(pairs | {CONV1: (conv[0].flatten(1), conv[1])}))
    np.testing.assert_allclose(flattened.updates[CONV1].delta(), diffusion.delta(conv, 1.0), atol=1e-6)


def test_a_tucker_core_is_read_and_written_as_it_is(tmp_path: Path) -> None:
    down, up, mid = torch.randn(3, 8, 1, 1), torch.randn(8, 3, 1, 1), torch.randn(3, 3, 3, 3)
    tensors = diffusion.kohya({CONV1: (down, up)}) | {f"{diffusion.flat(CONV1)}.lora_mid.weight": mid}
    found = one(tmp_path, tensors)
    expected = torch.einsum("om,mnxy,ni->oixy", up.flatten(1), mid, down.flatten(1)) / 3
    np.testing.assert_allclose(found.updates[CONV1].delta(), expected.numpy(), atol=1e-5)
    written = diffusion.load(write(kohya, found, tmp_path / "out"))
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", [TO_Q, CONV1])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_axis_of_dora_is_in_the_shape_of_its_scale(name: str, axis: int, tmp_path: Path) -> None:
    pair = some(name)[name]
    ones = [1] * (pair[0].ndim - 1)
    shape = (8, *ones) if axis == 0 else (1, 8, *ones[1:])
    tensors = diffusion.kohya({name: pair}) | {f"{diffusion.flat(name)}.dora_scale": 1 + torch.rand(shape)}
    found = one(tmp_path, tensors)
    update = found.updates[name]
    assert isinstance(update, DoRA)
    assert update.axis == axis
    written = diffusion.load(write(kohya, found, tmp_path / "out"))
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    # a magnitude of another shape, as PEFT keeps them, gets this one
    other = adapter({name: DoRA(update.direction, update.magnitude.reshape(8), axis)})
    again = diffusion.load(write(kohya, other, tmp_path / "again"))
    assert again[f"{diffusion.flat(name)}.dora_scale"].shape == shape


def test_whole_deltas_and_norms(tmp_path: Path) -> None:
    norm = "unet.down_blocks.0.resnets.0.norm1"
    tensors = {
        f"{diffusion.flat(CONV1)}.diff": torch.randn(8, 8, 3, 3),
        f"{diffusion.flat(CONV1)}.diff_b": torch.randn(8),
        f"{diffusion.flat(norm)}.w_norm": torch.randn(8),
        f"{diffusion.flat(norm)}.b_norm": torch.randn(8),
    }
    found = one(tmp_path, tensors)
    kinds = {name: update.kind for name, update in found.updates.items()}
    assert kinds == {CONV1: "full", f"{CONV1}.bias": "bias", norm: "norm", f"{norm}.bias": "norm"}
    np.testing.assert_array_equal(found.updates[CONV1].delta(), tensors[f"{diffusion.flat(CONV1)}.diff"])
    assert found.spelling(f"{CONV1}.bias") == f"{diffusion.flat(CONV1)}.diff_b"
    written = diffusion.load(write(kohya, found, tmp_path / "out"))
    assert written.keys() == tensors.keys()
    strings = read(kohya, tmp_path / "out").metadata.strings
    assert strings == {"ss_network_module": "lycoris.kohya"}
    back = read(kohya, write(kohya, read(raw, write(raw, found, tmp_path / "raw")), tmp_path / "back"))
    assert {name: update.kind for name, update in back.updates.items()} == kinds


def test_a_lora_beside_a_whole_delta_is_summed_and_written_as_one_delta_55(tmp_path: Path) -> None:
    """Readers take only one of the two."""
    pair, diff = some(TO_Q)[TO_Q], torch.randn(8, 8)
    found = one(tmp_path, diffusion.kohya({TO_Q: pair}) | {f"{diffusion.flat(TO_Q)}.diff": diff})
    expected = diffusion.delta(pair, 1.0) + diff.numpy()
    np.testing.assert_allclose(found.updates[TO_Q].delta(), expected, atol=1e-6)
    written = diffusion.load(write(kohya, found, tmp_path / "out"))
    assert list(written) == [f"{diffusion.flat(TO_Q)}.diff"]
    np.testing.assert_allclose(written[f"{diffusion.flat(TO_Q)}.diff"], expected, atol=1e-6)


def test_the_bias_that_a_lora_learned_is_written_with_its_scaling(tmp_path: Path) -> None:
    bias = np.ones(8, np.float32)
    source = adapter({TO_Q: low(some(TO_Q)[TO_Q], alpha=6.0), f"{TO_Q}.bias": Dense(Tensor.of(bias), 3.0, "bias")})
    written = diffusion.load(write(kohya, source, tmp_path / "out"))
    np.testing.assert_array_equal(written[f"{diffusion.flat(TO_Q)}.diff_b"], 3 * bias)


def test_an_embedding_is_said_as_the_plain_product(tmp_path: Path) -> None:
    name = "text_encoder.text_model.embeddings.token_embedding"
    pair = torch.randn(2, 16), torch.randn(20, 2)
    back = read(kohya, write(kohya, adapter({name: low(pair, layer="embedding")}), tmp_path / "out"))
    np.testing.assert_allclose(back.updates[name].delta(), diffusion.delta(pair), atol=1e-6)


def test_an_untrained_module_stays_and_one_of_rank_zero_goes_39_40(tmp_path: Path) -> None:
    down, up = some(TO_Q)[TO_Q]
    tensors = diffusion.kohya({TO_Q: (down, torch.zeros_like(up)), PROJ_OUT: (down[:0], up[:, :0])})
    found = one(tmp_path, tensors)
    assert list(found.updates) == [TO_Q]
    assert found.metadata.warnings == ("1 modules of rank 0 change nothing and are left out",)
    assert f"{diffusion.flat(TO_Q)}.lora_up.weight" in diffusion.load(write(kohya, found, tmp_path / "out"))


@pytest.mark.parametrize("slot", ["lora_up.weight", "lora_down.weight", "lora_mid.weight", "unknown", "scale"])
def test_half_a_module_or_an_unknown_tensor_is_refused(slot: str, tmp_path: Path) -> None:
    module = diffusion.flat(TO_Q)
    tensors = {f"{module}.{slot}": torch.ones(2, 2)} | diffusion.kohya(some(FC1))
    with pytest.raises(FormatError, match=r"pair|factors|unknown") as error:
        one(tmp_path, tensors)
    assert module in str(error.value)


# -- metadata and what travels along -------------------------------------------------------------------------


def test_bundled_embeddings_travel_along(tmp_path: Path) -> None:
    tensors = diffusion.kohya(some(TO_Q)) | {"bundle_emb.sks.string_to_param.*": torch.randn(2, 16)}
    found = one(tmp_path, tensors)
    assert list(found.carried) == ["bundle_emb.sks.string_to_param.*"]
    assert write(kohya, found, tmp_path / "out").exists()
    assert diffusion.load(tmp_path / "out").keys() == tensors.keys()
    assert [loss.name for loss in diffusers.FORMAT.losses(found)] == list(found.carried)


def test_text_is_not_truth_61(tmp_path: Path) -> None:
    """ "False" is a string like any other: not DoRA, not split, and no Stable Diffusion 2."""
    arguments = {"dora_wd": "False", "split_qkv": "False"}
    metadata = METADATA | {"ss_network_args": json.dumps(arguments)}
    found = one(tmp_path, diffusion.kohya(some(TO_Q, model="sd1")), metadata)
    assert (found.metadata.architecture, found.metadata.warnings) == ("sd1", ())
    for told in (True, "True"):
        metadata["ss_network_args"] = json.dumps({"dora_wd": told, "split_qkv": told})
        split, dora = one(tmp_path, diffusion.kohya(some(TO_Q, model="sd1")), metadata).metadata.warnings
        assert "split_qkv" in split
        assert "no dora_scale" in dora


@pytest.mark.parametrize("arguments", ["no json", "[]", "null", "{" * 100_000])
def test_hostile_arguments_are_no_obstacle(arguments: str, tmp_path: Path) -> None:
    assert not one(tmp_path, diffusion.kohya(some(TO_Q)), {"ss_network_args": arguments}).metadata.warnings


def test_metadata_is_kept_whole_and_completed_50_52(tmp_path: Path) -> None:
    huge = json.dumps({f"tag {n}": n for n in range(100_000)})
    metadata = {"ss_tag_frequency": huge, "ss_network_dim": "128", "ss_sd_model_name": "None"}
    found = one(tmp_path, diffusion.kohya(some(TO_Q, model="sd1")), metadata)
    assert found.metadata.base_model is None
    assert one(tmp_path, diffusion.kohya(some(TO_Q)), METADATA).metadata.base_model == "model.safetensors"
    strings = read(kohya, write(kohya, found, tmp_path / "out")).metadata.strings
    assert strings == metadata | {
        "ss_network_module": "networks.lora",
        "ss_network_alpha": "1",
        "ss_base_model_version": "sd_v1",
    }


def test_what_is_written_without_a_source_says_what_it_is(tmp_path: Path) -> None:
    mixed = {TO_Q: low(some(TO_Q)[TO_Q], alpha=1.0), CONV1: low(some(CONV1, rank=3)[CONV1], alpha=1.5)}
    strings = read(kohya, write(kohya, adapter(mixed), tmp_path / "out")).metadata.strings
    assert strings == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
    }


def sshs(tensors: dict[str, Any], metadata: dict[str, str]) -> dict[str, str]:
    """The hashes as sd-scripts computes them (train_util.precalculate_safetensors_hashes)."""
    from safetensors.torch import save

    data = save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


def test_hashes_are_those_of_what_is_written_51(tmp_path: Path) -> None:
    """Also of the bytes beyond the first MiB, which the legacy hash is made of."""
    pairs = factors({n: s for n, s in layers("sd1").items() if "attn1" in n}, rank=4)
    tensors = diffusion.kohya(pairs)
    stale = METADATA | {"modelspec.hash_sha256": "0xabc", "sshs_model_hash": "1", "sshs_legacy_hash": "2"}
    found = one(tmp_path, tensors, stale)
    strings = read(kohya, write(kohya, found, tmp_path / "out")).metadata.strings
    assert strings == METADATA | sshs(tensors, METADATA)
    again = save(tmp_path / "again", tensors, dict(strings))
    assert write(kohya, read(kohya, again), tmp_path / "same").read_bytes() == again.read_bytes()


# -- what cannot be said, and what is recognised ---------------------------------------------------------------


def test_what_kohya_has_no_name_for_is_a_loss_in_the_source_s_spelling() -> None:
    pair = some(TO_Q)[TO_Q]
    updates = {
        "model.layers.0.self_attn.q_proj": low(pair),
        "transformer.h.0.attn.c_attn": low(pair),
        "unet.no.such.module": low(pair),
        TO_Q: low(pair, layer="transposed"),
    }
    spellings = {"model.layers.0.self_attn.q_proj": "base_model.model.model.layers.0.self_attn.q_proj"}
    carried = {"unet.conv_in.weight": Tensor.of(np.ones(2))}
    lost = kohya.FORMAT.losses(Adapter(updates, carried, Metadata("peft"), spellings))
    assert {loss.name: "no name" in loss.reason for loss in lost} == {
        "base_model.model.model.layers.0.self_attn.q_proj": True,
        "transformer.h.0.attn.c_attn": True,
        "unet.no.such.module": True,
        TO_Q: False,
        "unet.conv_in.weight": False,
    }


def test_two_names_of_one_module_are_not_written_over_each_other() -> None:
    pair = some(TO_Q)[TO_Q]
    lost = kohya.FORMAT.losses(adapter({TO_Q: low(pair), TO_Q.removeprefix("unet."): low(pair)}))
    assert [loss.reason for loss in lost] == ["another module has this very name"]


def test_the_loss_is_left_out_and_the_rest_written(tmp_path: Path) -> None:
    pair = some(TO_Q)[TO_Q]
    kohya.FORMAT.write(adapter({TO_Q: low(pair), "lm_head": low(pair)}), tmp_path / "out")
    assert list(read(kohya, tmp_path / "out").updates) == [TO_Q]


def test_detection_is_by_prefix_and_suffix(tmp_path: Path) -> None:
    path = save(tmp_path / "any.bin", diffusion.kohya(some(TO_Q)))
    assert detect(Evidence(path))[0] is kohya.FORMAT
    assert "lora_unet_" in detect(Evidence(path))[1]
    other = save(tmp_path / "other", {"lora_unet_x.weight": torch.ones(1), "lora_up.weight": torch.ones(1)})
    assert kohya.FORMAT.sniff(Evidence(other)) is None


HALVES = ("hada_w1_a", "lokr_w1", "lokr_t1", "oft_blocks", "a1.weight", "bm.weight", "on_input", "weight", "rescale")


@pytest.mark.parametrize("key", HALVES)
def test_half_of_any_kind_is_refused(key: str, tmp_path: Path) -> None:
    module = diffusion.flat(TO_Q)
    tensors = diffusion.kohya(some(FC1)) | {f"{module}.{key}": torch.ones(2, 2)}
    with pytest.raises(FormatError) as error:
        one(tmp_path, tensors)
    assert module in str(error.value.where)
