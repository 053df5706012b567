"""The diffusers format, with diffusers itself as the judge; numbers in brackets are those of known traps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratool.adapter import Adapter, Metadata
from loratool.architectures import architecture
from loratool.errors import FormatError, NumericError
from loratool.formats import detect, diffusers, kohya, peft, raw
from loratool.formats.base import Evidence
from loratool.tensors import Tensor
from loratool.update import Dense, DoRA, LowRank
from tests import diffusion
from tests.diffusion import factors, layers, read, save, write

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV1 = "unet.down_blocks.0.resnets.0.conv1"
SHORTCUT = "unet.down_blocks.2.resnets.0.conv_shortcut"
FC1 = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
MODULES = (TO_Q, TO_OUT, CONV1, SHORTCUT, FC1, Q_PROJ)


def some(*names: str, **options: Any) -> diffusion.Pairs:
    """Factors of a few modules of the tiny model."""
    shapes = layers("tiny", conv=True)
    return factors({name: shapes[name] for name in names}, **options)


def one(tmp_path: Path, tensors: dict[str, Any], table: dict[str, Any] | None = None, **options: Any) -> Adapter:
    """The adapter of a file of these tensors."""
    metadata = {"lora_adapter_metadata": json.dumps(table)} if table is not None else None
    return read(diffusers, save(tmp_path / "one.safetensors", tensors, metadata), **options)


def adapter(updates: dict[str, Any], **metadata: Any) -> Adapter:
    return Adapter(updates, {}, Metadata("raw", **metadata))


def low(name: str, rank: int = 2, **options: Any) -> LowRank:
    down, up = some(name, rank=rank)[name]
    return LowRank(Tensor.of(down.numpy()), Tensor.of(up.numpy()), **options)


def magnitude(name: str) -> Tensor:
    out = layers("tiny", conv=True)[name][0]
    return Tensor.of(np.random.default_rng(1).uniform(0.5, 1.5, out).astype(np.float32))


# -- diffusers as the judge ------------------------------------------------------------------------------------


def pipeline(fixtures: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(fixtures / "tiny-sd", dtype=torch.float32)


def weights(pipe: Any) -> dict[str, Any]:
    """The weights and biases of UNet and text encoder by reference name, LoRA layers unwrapped."""
    found = {}
    for prefix, model in (("unet.", pipe.unet), ("text_encoder.text_model.", pipe.text_encoder)):
        for name, value in model.state_dict().items():
            if ".lora_" not in name:
                found[prefix + name.replace(".base_layer.", ".")] = value.detach().clone()
    return found


def loaded(pipe: Any) -> dict[str, Any]:
    """The LoRA tensors that diffusers has put into the models, by reference name."""
    found = {}
    for prefix, model in (("unet.", pipe.unet), ("text_encoder.text_model.", pipe.text_encoder)):
        for name, value in model.state_dict().items():
            if ".lora_" in name:
                found[prefix + name.replace(".default_0.", ".")] = value
    return found


def judge(source: Adapter, path: Path, fixtures: Path) -> None:
    """Asserts that diffusers loads all of a file, nothing else, and fuses what the adapter says."""
    pipe, tensors = pipeline(fixtures), diffusion.load(path)
    base = weights(pipe)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    found = loaded(pipe)
    if "lora_A" in str(list(tensors)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert len({key.partition(".lora_")[0] for key in found}) == len(source.modules())
    components = [name for name in ("unet", "text_encoder") if any(key.startswith(name) for key in found)]
    pipe.fuse_lora(components=components)
    fused = weights(pipe)
    assert fused.keys() == base.keys()
    for name, before in base.items():
        target = name if name.endswith(".bias") else name.removesuffix(".weight")
        update = source.updates.get(target)
        expected = update.apply(before.numpy().astype(np.float32)) if update else before.numpy()
        np.testing.assert_allclose(fused[name].numpy().reshape(expected.shape), expected, atol=2e-6, err_msg=name)


PLAIN = {
    TO_Q: lambda: low(TO_Q, alpha=1.0),
    TO_OUT: lambda: low(TO_OUT, rank=3, alpha=6.0),
    CONV1: lambda: low(CONV1, alpha=0.3),
    SHORTCUT: lambda: low(SHORTCUT, rank=4, alpha=1.0),
    FC1: lambda: low(FC1, rank=3, alpha=1.0),
    Q_PROJ: lambda: low(Q_PROJ, alpha=6.0),
}
WITH_BIAS = (CONV1, SHORTCUT, FC1, Q_PROJ)
JUDGED: dict[str, Any] = {
    "ranks and alphas that differ [36, 37]": lambda: {name: make() for name, make in PLAIN.items()},
    "no alpha": lambda: {name: low(name) for name in MODULES},
    "no alpha, ranks that differ": lambda: {name: low(name, rank=2 + n % 2) for n, name in enumerate(MODULES)},
    "rank-stabilised": lambda: {name: low(name, rank=4, alpha=3.0, rank_stabilised=True) for name in MODULES},
    "rank-stabilised in part": lambda: {
        name: low(name, rank=4, alpha=3.0, rank_stabilised=n % 2 == 0) for n, name in enumerate(MODULES)
    },
    "DoRA": lambda: {name: DoRA(low(name, alpha=6.0), magnitude(name)) for name in MODULES},
    "DoRA in the text encoder only": lambda: {
        TO_Q: low(TO_Q, alpha=1.0),
        Q_PROJ: DoRA(low(Q_PROJ, alpha=1.0), magnitude(Q_PROJ)),
    },
    "biases": lambda: {
        **{f"{name}.bias": Dense(magnitude(name), 3.0, "bias") for name in WITH_BIAS if name != SHORTCUT},
        **{name: low(name, alpha=6.0) for name in WITH_BIAS},
    },
    "biases in the text encoder only": lambda: {
        TO_Q: low(TO_Q),
        FC1: low(FC1),
        Q_PROJ: low(Q_PROJ),  # an encoder with LoRA on its MLPs only is beyond diffusers 0.42
        f"{FC1}.bias": Dense(magnitude(FC1), 1.0, "bias"),
    },
}


@pytest.mark.peer
@pytest.mark.parametrize("make", JUDGED.values(), ids=JUDGED)
def test_diffusers_loads_all_that_is_written_and_fuses_the_same_weights(
    make: Any, tmp_path: Path, fixtures: Path
) -> None:
    source = adapter(make())
    path = write(diffusers, source, tmp_path / "lora.safetensors")
    judge(source, path, fixtures)
    again = read(diffusers, path)
    assert again.updates.keys() >= source.updates.keys()  # a module without a bias delta gets one of zero
    for name, update in source.updates.items():
        base = np.random.default_rng(0).normal(size=update.shape)
        np.testing.assert_allclose(again.updates[name].apply(base), update.apply(base), atol=1e-6)


@pytest.mark.peer
def test_diffusers_fuses_a_kohya_file_and_what_is_made_of_it_alike(tmp_path: Path, fixtures: Path) -> None:
    source = read(kohya, fixtures / "adapters" / "kohya.safetensors")
    judge(source, write(kohya, source, tmp_path / "kohya.safetensors"), fixtures)
    judge(source, write(diffusers, source, tmp_path / "diffusers.safetensors"), fixtures)


# -- whole files -----------------------------------------------------------------------------------------------


def saved_by_diffusers(path: Path, metadata: bool) -> Path:
    """A file that diffusers itself saved, of a LoRA that PEFT put into its UNet."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = UNet2DConditionModel(**diffusion.UNETS["tiny"])
    patterns = {"attn2.to_k": 3, "conv1": 2}
    targets = ["to_q", "to_k", "to_out.0", "conv1"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, rank_pattern=patterns, alpha_pattern={"to_q": 5})
    torch.manual_seed(0)
    unet.add_adapter(config)
    state = {key: torch.randn_like(value) for key, value in get_peft_model_state_dict(unet).items()}
    table = config.to_dict() if metadata else None
    StableDiffusionPipeline.save_lora_weights(path, state, unet_lora_adapter_metadata=table)
    return path / "pytorch_lora_weights.safetensors"


@pytest.mark.peer
@pytest.mark.parametrize("metadata", [True, False])
def test_a_file_of_diffusers_is_written_byte_for_byte(metadata: bool, tmp_path: Path) -> None:
    path = saved_by_diffusers(tmp_path / "saved", metadata)
    found = read(diffusers, path)
    alphas = {update.alpha for update in found.updates.values()}
    assert alphas == ({5.0, 8.0} if metadata else {None})
    assert write(diffusers, found, tmp_path / "again").read_bytes() == path.read_bytes()


def test_the_bundled_file_is_written_byte_for_byte_and_is_the_kohya_one(fixtures: Path, tmp_path: Path) -> None:
    path = fixtures / "adapters" / "diffusers.safetensors"
    found = read(diffusers, path)
    assert write(diffusers, found, tmp_path / "again").read_bytes() == path.read_bytes()
    diffusion.same(found, read(kohya, fixtures / "adapters" / "kohya.safetensors"))


def test_through_other_formats_and_back_every_delta_stays(tmp_path: Path) -> None:
    source = read(diffusers, write(diffusers, adapter({n: f() for n, f in PLAIN.items()}), tmp_path / "source"))
    for format in (kohya, peft, raw):
        there = read(format, write(format, source, tmp_path / format.FORMAT.name))
        back = read(diffusers, write(diffusers, there, tmp_path / f"{format.FORMAT.name}.diffusers"))
        diffusion.same(source, back)


def test_the_metadata_s_own_text_is_kept_where_it_still_holds(tmp_path: Path) -> None:
    table = {"unet.lora_alpha": 8.0, "unet.r": 2, "unet.target_modules": "all-linear"}
    found = one(tmp_path, diffusion.diffusers(some(TO_Q)), table)
    strings = read(diffusers, write(diffusers, found, tmp_path / "out")).metadata.strings
    assert strings["lora_adapter_metadata"] == json.dumps(table)


def test_a_change_of_alpha_is_not_hidden_by_the_metadata_of_the_source(tmp_path: Path) -> None:
    source = read(diffusers, write(diffusers, adapter({n: f() for n, f in PLAIN.items()}), tmp_path / "source"))
    half = Adapter({n: u.scaled(0.5) for n, u in source.updates.items()}, {}, source.metadata)
    diffusion.same(half, read(diffusers, write(diffusers, half, tmp_path / "half")))


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_whole_models_are_identified(model: str, tmp_path: Path) -> None:
    pairs = factors(layers(model), rank=1, dtype="float16")
    found = one(tmp_path, diffusion.diffusers(pairs))
    assert found.updates.keys() == pairs.keys()
    assert found.metadata.architecture == model


# -- reading -----------------------------------------------------------------------------------------------------


SPELLINGS = {
    "an adapter's name": "unet.{}.lora_{}.default.weight",
    "PEFT's prefix": "unet.base_model.model.{}.lora_{}.weight",
    "all of them [35]": "unet.unet.base_model.model.base_model.model.{}.lora_{}.my_adapter.weight",
    "no suffix": "unet.{}.lora_{}",
}


@pytest.mark.parametrize("pattern", SPELLINGS.values(), ids=SPELLINGS)
def test_odd_spellings_of_keys(pattern: str, tmp_path: Path) -> None:
    pair, module = some(TO_Q)[TO_Q], TO_Q.removeprefix("unet.")
    found = one(tmp_path, {pattern.format(module, x): factor for x, factor in zip("AB", pair, strict=True)})
    assert list(found.updates) == [TO_Q]
    np.testing.assert_allclose(found.updates[TO_Q].delta(), diffusion.delta(pair), atol=1e-6)


def test_a_transformer_keeps_its_names_whatever_they_are(tmp_path: Path) -> None:
    down, up = some(TO_Q)[TO_Q]
    module = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
    found = one(tmp_path, tensors)
    assert list(found.updates) == [module]
    assert diffusion.load(write(diffusers, found, tmp_path / "out")).keys() == {
        f"{module}.lora_A.weight",
        f"{module}.lora_B.weight",
    }


def test_ldm_names_behind_a_component_are_translated(tmp_path: Path) -> None:
    """As OneTrainer wrote them: kohya's suffixes, components of its own."""
    known = architecture("sdxl")
    assert known
    pairs = factors({n: s for n, s in layers("sdxl").items() if "mid_block" in n or "layers.0." in n}, rank=1)
    tensors = {}
    for name, (down, up) in pairs.items():
        body = name.removeprefix("unet.").replace("mid_block.attentions.0", "middle_block.1")
        head = {"unet": "unet", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}[name.partition(".")[0]]
        module = f"unet.{body}" if head == "unet" else f"{head}.{name.partition('.')[2]}"
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        tensors[f"{module}.alpha"] = torch.tensor(0.5)
    tensors["bundle_emb.sks.clip_l"] = torch.ones(1, 768)
    found = one(tmp_path, tensors)
    assert found.updates.keys() == pairs.keys()
    assert {update.alpha for update in found.updates.values()} == {0.5}
    assert list(found.carried) == ["bundle_emb.sks.clip_l"]


def test_text_encoders_without_text_model_are_those_with_it(tmp_path: Path) -> None:
    """And their patterns may be written for either."""
    pair, lacking = some(Q_PROJ)[Q_PROJ], Q_PROJ.replace("text_model.", "")
    for spelling, pattern in (
        (lacking, "^encoder.layers.0.self_attn.q_proj"),
        (Q_PROJ, "^encoder.layers.0.self_attn.q_proj"),
        (Q_PROJ, "^text_model.*q_proj"),
        (Q_PROJ, "layers.0.self_attn.q_proj"),
    ):
        table = {
            "text_encoder.r": 2,
            "text_encoder.lora_alpha": 8,
            "text_encoder.alpha_pattern": {pattern: 5},
        }
        found = one(tmp_path, diffusion.diffusers({spelling: pair}), table)
        assert {name: update.alpha for name, update in found.updates.items()} == {Q_PROJ: 5.0}


def test_an_alpha_tensor_wins_over_the_metadata_53(tmp_path: Path) -> None:
    tensors = diffusion.diffusers(some(TO_Q, CONV1)) | {f"{TO_Q}.alpha": torch.tensor(1)}
    table = {"unet.r": 2, "unet.lora_alpha": 8, "unet.use_rslora": True}
    found = one(tmp_path, tensors, table)
    assert found.updates[TO_Q].scaling == 0.5
    assert found.updates[CONV1].scaling == pytest.approx(8 / 2**0.5)
    diffusion.same(found, read(diffusers, write(diffusers, found, tmp_path / "out")))


def test_without_metadata_the_scaling_is_one_unless_it_is_given_36(tmp_path: Path) -> None:
    tensors = diffusion.diffusers(some(TO_Q))
    found = one(tmp_path, tensors)
    assert (found.updates[TO_Q].alpha, found.updates[TO_Q].scaling) == (None, 1.0)
    assert "alpha is missing" in found.metadata.warnings[0]
    assert one(tmp_path, tensors, scaling=0.25).updates[TO_Q].scaling == 0.25


def test_a_magnitude_by_its_name_is_of_outputs_whatever_its_shape_23(tmp_path: Path) -> None:
    """[1,o,1,1] of PEFT against [1,i,1,1] of LyCORIS, of a square convolution."""
    tensors = diffusion.diffusers(some(CONV1))
    for key, axis in (("lora_magnitude_vector", 0), ("lora_magnitude_vector.weight", 0), ("dora_scale", 1)):
        update = one(tmp_path, tensors | {f"{CONV1}.{key}": torch.rand(1, 8, 1, 1)}).updates[CONV1]
        assert isinstance(update, DoRA)
        assert update.axis == axis


def test_metadata_that_says_dora_without_magnitudes_is_worth_a_word(tmp_path: Path) -> None:
    table = {"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True}
    found = one(tmp_path, diffusion.diffusers(some(TO_Q)), table)
    assert "no magnitudes" in found.metadata.warnings[0]
    assert not read(diffusers, write(diffusers, found, tmp_path / "out")).metadata.warnings


REFUSED = {
    "another rank": ({"unet.r": 4, "unet.lora_alpha": 4}, "rank 4, the tensors have rank 2"),
    "no number": ({"unet.r": 2, "unet.lora_alpha": "x"}, "not a number"),
    "a base that was changed": ({"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": "pissa"}, "pissa"),
    "no table": (["unet.r"], "no JSON table"),
}


@pytest.mark.parametrize(("table", "said"), REFUSED.values(), ids=REFUSED)
def test_metadata_that_contradicts_is_refused(table: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=said):
        one(tmp_path, diffusion.diffusers(some(TO_Q)), table)


def test_half_a_pair_or_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    tensors = diffusion.diffusers(some(TO_Q))
    for change, said in (
        ({f"{TO_Q}.lora_B.weight": None}, "half a pair"),
        ({f"{TO_Q}.scales": torch.ones(())}, "unknown"),
        ({"lm_head.lora_A.weight": torch.ones(2, 2)}, "unknown"),
        ({f"{TO_Q}.lora_magnitude_vector": torch.ones(8), f"{TO_Q}.dora_scale": torch.ones(8)}, "both"),
    ):
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        with pytest.raises(FormatError, match=said):
            one(tmp_path, changed)
    with pytest.raises(NumericError, match="alpha is nan"):
        one(tmp_path, tensors | {f"{TO_Q}.alpha": torch.tensor(float("nan"))})


def test_a_module_of_rank_zero_is_left_out_39(tmp_path: Path) -> None:
    empty = {CONV1: (torch.ones(0, 8, 3, 3), torch.ones(8, 0, 1, 1))}
    found = one(tmp_path, diffusion.diffusers(some(TO_Q) | empty))
    assert list(found.updates) == [TO_Q]
    assert "rank 0" in " ".join(found.metadata.warnings)


DETECTED = {
    "a UNet": ("unet.mid_block.attentions.0.proj_in", diffusers),
    "a text encoder": ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", diffusers),
    "a transformer": ("transformer.transformer_blocks.0.attn.to_q", diffusers),
    "Wan": ("transformer.blocks.0.attn1.to_q", diffusers),
    "GPT-2": ("transformer.h.0.attn.c_attn", raw),
    "MPT": ("transformer.blocks.0.attn.Wqkv", raw),
    "ChatGLM": ("transformer.encoder.layers.0.self_attention.query_key_value", raw),
    "Llama": ("model.layers.0.self_attn.q_proj", raw),
}


@pytest.mark.parametrize(("module", "format"), DETECTED.values(), ids=DETECTED)
def test_detection_tells_diffusers_from_language_models(module: str, format: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "file", diffusion.diffusers({module: some(TO_Q)[TO_Q]}))
    assert detect(Evidence(path))[0] is format.FORMAT


def test_a_raw_file_of_a_diffusion_model_stays_raw(tmp_path: Path) -> None:
    path = write(raw, adapter({TO_Q: low(TO_Q, alpha=2.0, rank_stabilised=True)}), tmp_path / "raw")
    assert detect(Evidence(path))[0] is raw.FORMAT


# -- writing -----------------------------------------------------------------------------------------------------


def test_what_diffusers_does_not_load_is_a_loss_in_the_source_s_spelling() -> None:
    updates = {
        TO_Q: DoRA(low(TO_Q), Tensor.of(np.ones(8, np.float32)), axis=1),
        TO_OUT: low(TO_OUT),
        CONV1: Dense(Tensor.of(np.ones((8, 8, 3, 3), np.float32))),
        f"{CONV1}.bias": Dense(Tensor.of(np.ones(8, np.float32)), 1.0, "bias"),
        SHORTCUT: low(SHORTCUT),
        FC1: low(FC1, layer="transposed"),
        Q_PROJ: low(Q_PROJ),
        Q_PROJ.replace("text_model.", ""): low(Q_PROJ),
        "model.layers.0.self_attn.q_proj": low(TO_Q),
        "transformer.h.0.attn.c_attn": low(TO_Q),
    }
    carried = {"bundle_emb.sks.clip_l": Tensor.of(np.ones(2))}
    source = Adapter(updates, carried, Metadata("kohya"), {TO_Q: "lora_unet_to_q", CONV1: "lora_unet_conv1"})
    reasons = {loss.name: loss.reason for loss in diffusers.FORMAT.losses(source)}
    said = {
        "lora_unet_to_q": "each input",
        TO_OUT: "beside DoRA",
        "lora_unet_conv1": "kind full",
        f"{CONV1}.bias": "without a LoRA",
        SHORTCUT: "beside DoRA",
        FC1: "transposed",
        Q_PROJ.replace("text_model.", ""): "this very name",
        "model.layers.0.self_attn.q_proj": "component",
        "transformer.h.0.attn.c_attn": "component",
        "bundle_emb.sks.clip_l": "whole tensor",
    }
    assert reasons.keys() == said.keys()
    assert all(part in reasons[name] for name, part in said.items())


def test_the_loss_is_left_out_and_the_rest_written(tmp_path: Path) -> None:
    source = adapter({TO_Q: low(TO_Q), "lm_head": low(TO_Q)})
    diffusers.FORMAT.write(source, tmp_path / "out")
    assert list(read(diffusers, tmp_path / "out").updates) == [TO_Q]


def test_a_tucker_core_becomes_a_plain_convolution(tmp_path: Path) -> None:
    """Which diffusers takes, as it does not take `lora_mid` [26]."""
    parts = [torch.randn(shape).numpy() for shape in ((3, 8, 1, 1), (8, 3, 1, 1), (3, 3, 3, 3))]
    source = adapter({CONV1: LowRank(*map(Tensor.of, parts), alpha=6.0)})
    back = read(diffusers, write(diffusers, source, tmp_path / "out")).updates[CONV1]
    np.testing.assert_allclose(back.delta(), source.updates[CONV1].delta(), atol=1e-5)


def test_no_alpha_is_folded_where_it_would_underflow_7(tmp_path: Path) -> None:
    pairs = some(TO_Q, dtype="float16")
    tiny = read(kohya, save(tmp_path / "source", diffusion.kohya(pairs, alpha=1e-9)))
    written = diffusion.load(write(diffusers, tiny, tmp_path / "out"))
    assert all(torch.equal(written[key], tensor) for key, tensor in diffusion.diffusers(pairs).items())
    assert read(diffusers, tmp_path / "out").updates[TO_Q].scaling == tiny.updates[TO_Q].scaling


def test_metadata_of_the_source_is_kept_but_for_hashes_50(tmp_path: Path) -> None:
    strings = {"ss_v2": "False", "modelspec.hash_sha256": "0x1", "custom": "x"}
    source = adapter({TO_Q: low(TO_Q, alpha=1.0)}, strings=strings)
    found = read(diffusers, write(diffusers, source, tmp_path / "out")).metadata.strings
    table = json.loads(found["lora_adapter_metadata"])
    assert {k: v for k, v in found.items() if k != "lora_adapter_metadata"} == {
        "ss_v2": "False",
        "custom": "x",
        "format": "pt",
    }
    assert (table["unet.r"], table["unet.lora_alpha"]) == (2, 1)
    kept = read(kohya, write(kohya, read(diffusers, tmp_path / "out"), tmp_path / "kohya")).metadata.strings
    assert "lora_adapter_metadata" not in kept  # beside alphas, diffusers refuses it
