"""Diffusion transformers in every dialect: fused and split, under every name, with equal deltas.

Numbers in brackets are those of the list of known traps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loratool import api
from loratool.adapter import Adapter
from loratool.architectures import TRANSFORMERS, architecture
from loratool.errors import FormatError
from loratool.formats import by_name, detect
from loratool.formats.base import Evidence
from tests import diffusion
from tests.diffusion import Pairs, factors, save
from tests.laws import examples

torch = pytest.importorskip("torch")

FAMILIES = [known.name for known in TRANSFORMERS]


@cache
def modules(family: str) -> Mapping[str, tuple[int, ...]]:
    """The weights of the first block of each sort, and those outside of blocks, 1/32 as wide."""
    known = architecture(family)
    assert known is not None
    found = {}
    for name, shape in known.shapes().items():
        blocks = [int(number) for number in re.findall(r"s\.(\d+)\.", name)]
        if name.startswith("transformer.") and len(shape) > 1 and not any(blocks):
            found[name] = (*(max(axis // 32, 1) for axis in shape[:2]), *shape[2:])
    return found


def read(path: Path, format: str | None = None) -> Adapter:
    evidence = Evidence(path)
    if format:
        assert detect(evidence)[0].name == format, detect(evidence)
    return detect(evidence)[0].read(evidence)


def assert_same(adapter: Adapter, pairs: Pairs, alpha: float | None = None) -> None:
    """The adapter changes these modules, and just so, as it acts on a vector."""
    assert adapter.updates.keys() == pairs.keys()
    for name, pair in pairs.items():
        update: Any = adapter.updates[name]
        down, up = (factor.double().flatten(1).numpy() for factor in pair)
        vector = np.linspace(-1, 1, down.shape[1])
        ours, scaling = update.factors(), 1.0 if alpha is None else alpha / len(down)
        np.testing.assert_allclose(
            ours[0] @ (ours[1] @ vector), scaling * up @ (down @ vector), atol=1e-4, err_msg=name
        )


def written(adapter: Adapter, path: Path, to: str) -> Path:
    """A file of an adapter of which nothing is lost."""
    format = by_name(to)
    assert not format.losses(adapter)
    format.write(adapter, path)
    return path


# -- split modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_split_modules_go_through_every_format(family: str, tmp_path: Path) -> None:
    """From diffusers' names to all others and back; no family's names are another's."""
    pairs = factors(modules(family), rank=1)
    adapter = read(save(tmp_path / "source", diffusion.diffusers(pairs)), "diffusers")
    assert adapter.metadata.architecture == family
    assert_same(adapter, pairs)
    for to in ("kohya", "lycoris", "comfyui"):
        back = read(written(adapter, tmp_path / to, to), to)
        assert back.metadata.architecture == family
        assert_same(back, pairs)
    same = written(back, tmp_path / "same", "diffusers")
    assert {key for key in diffusion.load(same)} == {key for key in diffusion.load(tmp_path / "source")}


@pytest.mark.parametrize("to", ["raw", "peft"])
def test_formats_of_any_model_keep_what_is_split(to: str, tmp_path: Path) -> None:
    pairs = factors(modules("flux"), rank=1)
    source = save(tmp_path / "source", diffusion.diffusers(pairs))
    assert not api.convert(source, tmp_path / "out", to=to).losses
    api.convert(tmp_path / "out", tmp_path / "back", to="diffusers")
    assert_same(read(tmp_path / "back"), pairs)


# -- fused modules ---------------------------------------------------------------------------------------------


def fused(family: str, rank: int = 2) -> dict[str, tuple[Any, Any, tuple[tuple[str, slice], ...]]]:
    """kohya's modules of a family: (down, up) of each, trained as one, and which rows of what references it is."""
    known = architecture(family)
    assert known is not None
    shapes, found = modules(family), {}
    for name, shape in shapes.items():
        stored = known.stored(name, "kohya", shape)
        assert stored is not None
        if stored.name in found or any(segment.reference not in shapes for segment in stored.segments):
            continue
        heights = stored.heights([shapes[segment.reference] for segment in stored.segments])
        assert heights is not None
        heights = (shape[0],) if len(stored.segments) == 1 else heights
        down, up = factors({name: (sum(heights), *shape[1:])}, rank)[name]
        places = [
            (s.reference, slice(s.part * height if s.of > 1 else 0, (s.part + 1) * height if s.of > 1 else height))
            for s, height in zip(stored.segments, heights, strict=True)
        ]
        found[stored.name] = (down, up, tuple(places))
    return found


def expected(family: str, stored: dict[str, tuple[Any, Any, tuple[tuple[str, slice], ...]]]) -> Pairs:
    """The factors of each reference module: rows of up, the same down."""
    pairs: Pairs = {}
    for down, up, places in stored.values():
        row = 0
        for reference, rows in places:
            height = rows.stop - rows.start
            if reference not in pairs:
                pairs[reference] = (down, torch.zeros(modules(family)[reference][0], *up.shape[1:]))
            pairs[reference][1][rows] = up[row : row + height]
            row += height
    return pairs


def kohya(stored: Mapping[str, tuple[Any, ...]], alpha: float = 1.0) -> dict[str, Any]:
    return diffusion.kohya({name: found[:2] for name, found in stored.items()}, {name: name for name in stored}, alpha)


FUSED = [f for f in FAMILIES if any(len(found[2]) > 1 for found in fused(f).values())]


@pytest.mark.parametrize("family", FUSED)
def test_fused_modules_come_apart_and_together_at_their_rank(family: str, tmp_path: Path) -> None:
    """Byte for byte, by way of names that are split and of names that are not [9, 10, 11]."""
    stored = fused(family)
    source = save(tmp_path / "source", kohya(stored))
    adapter = read(source, "kohya")
    assert adapter.metadata.architecture == family
    pairs = expected(family, stored)
    assert_same(adapter, pairs, 1.0)
    for to in ("diffusers", "comfyui"):
        there = read(written(adapter, tmp_path / to, to), to)
        assert_same(there, pairs, 1.0)
        back = diffusion.load(written(there, tmp_path / f"{to}-back", "kohya"))
        assert back.keys() == diffusion.load(source).keys()
        assert all(torch.equal(back[key], tensor) for key, tensor in diffusion.load(source).items())


def test_one_stored_module_is_counted_once(tmp_path: Path) -> None:
    stored = fused("flux")
    found = api.inspect(save(tmp_path / "source", kohya(stored)))
    assert found.modules == len(stored)
    assert len(found.targets) == len(stored)
    shapes = {target.module: target.shape for target in found.targets}
    assert shapes["lora_unet_double_blocks_0_img_attn_qkv"] == (288, 96)
    assert found.parameters == sum(down.numel() + up.numel() for down, up, _ in stored.values())


@pytest.mark.parametrize("family", [known.name for known in TRANSFORMERS])
def test_a_lone_module_stays_of_its_family_in_every_format(family: str, tmp_path: Path) -> None:
    """ComfyUI's final_layer.linear is FLUX's as well as Z-Image's: the metadata tells whose, where names do not."""
    shapes = {re.sub(r"\d+", "0", name): (name, shape) for name, shape in modules(family).items()}
    for n, (name, shape) in enumerate(shapes.values()):
        adapter = read(save(tmp_path / f"{n}", diffusion.diffusers(factors({name: shape}, rank=1))))
        for to in ("kohya", "diffusers", "comfyui", "lycoris") if adapter.metadata.architecture == family else ():
            again = read(written(adapter, tmp_path / f"{n}-{to}", to))
            assert again.metadata.architecture == family
            assert name in again.updates  # with the other parts of what is fused


QKV = [f"transformer.transformer_blocks.0.attn.to_{leaf}" for leaf in "qkv"]


def test_parts_of_several_factors_are_stacked_block_diagonally(tmp_path: Path) -> None:
    """Section 10: the rank is the sum; of one part that is missing there is no rank [10]."""
    shapes = {name: (8, 8) for name in (*QKV, *(n.replace("attn.to_q", "ff.net.2") for n in QKV[:1]))}
    pairs = factors(shapes | {"transformer.transformer_blocks.0.ff.net.2": (8, 32)}, rank=2)
    for parts, rank in ((QKV, 6), (QKV[::2], 4), (QKV[1:2], 2)):
        own = {name: pairs[name] for name in (*parts, "transformer.transformer_blocks.0.ff.net.2")}
        path = written(read(save(tmp_path / "s", diffusion.diffusers(own))), tmp_path / f"{rank}", "kohya")
        tensors = diffusion.load(path)
        assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (rank, 8)
        back = read(path)
        for name in QKV:
            update: Any = back.updates[name]
            delta = diffusion.delta(pairs[name]) if name in parts else np.zeros((8, 8))
            np.testing.assert_allclose(update.delta(), delta, atol=1e-6)


def test_parts_of_unlike_scalings_keep_each_its_own(tmp_path: Path) -> None:
    pairs = factors({name: (8, 8) for name in QKV}, rank=2)
    tensors = diffusion.diffusers(pairs) | {
        f"{n}.alpha": torch.tensor(a) for n, a in zip(QKV, (1.0, 2.0, 8.0), strict=True)
    }
    back = read(written(read(save(tmp_path / "s", tensors)), tmp_path / "out", "kohya"))
    for name, alpha in zip(QKV, (1.0, 2.0, 8.0), strict=True):
        update: Any = back.updates[name]
        np.testing.assert_allclose(update.delta(), diffusion.delta(pairs[name], alpha), atol=1e-5)


def test_rows_that_no_part_can_have_are_a_loss(tmp_path: Path) -> None:
    """A DoRA of one part of a fused projection changes rows that the others have, too."""
    pairs = factors({name: (8, 8) for name in QKV[:2]}, rank=2)
    tensors = diffusion.diffusers(pairs) | {f"{n}.lora_magnitude_vector": torch.ones(8) for n in QKV[:2]}
    adapter = read(save(tmp_path / "s", tensors))
    losses = by_name("kohya").losses(adapter)
    assert {loss.name for loss in losses} == set(QKV[:2])


def test_a_magnitude_by_input_of_a_fused_projection_cannot_be_split(tmp_path: Path) -> None:
    """Section 3.12: its norm is over all rows."""
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = diffusion.kohya(factors({module: (24, 8)}), {module: module})
    by_output = read(save(tmp_path / "out", tensors | {f"{module}.dora_scale": torch.rand(24, 1)}))
    magnitudes: Any = [by_output.updates[name] for name in QKV]
    assert [update.magnitude.size for update in magnitudes] == [8, 8, 8]
    with pytest.raises(FormatError, match="each input") as error:
        read(save(tmp_path / "in", tensors | {f"{module}.dora_scale": torch.rand(1, 8)}))
    assert module in str(error.value.where)


@examples(15)
@given(data=st.data())
def test_any_part_of_a_model_keeps_its_deltas_on_a_way_through_all_names(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is missing, of any rank, alpha and dtype: each part of a fused module has its own."""
    family = data.draw(st.sampled_from(("flux", "sd3", "z-image", "auraflow")))
    shapes = modules(family)
    names = data.draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=6, unique=True))
    dtypes, alphas = st.sampled_from(("float16", "bfloat16", "float32")), st.sampled_from((None, 0.3, 1.0, 257.0, 7e4))
    tensors, expected = {}, {}
    for name in names:
        rank, alpha = data.draw(st.integers(1, 4)), data.draw(alphas)
        pair = factors({name: shapes[name]}, rank, data.draw(dtypes))[name]
        tensors |= diffusion.diffusers({name: pair}) | ({f"{name}.alpha": torch.tensor(alpha)} if alpha else {})
        expected[name] = diffusion.delta(pair, alpha and float(np.float32(alpha)))
    folder = tmp_path_factory.mktemp("way")
    adapter = read(save(folder / "source", tensors))
    assume(adapter.metadata.architecture == family)  # a few modules that several families share do not tell theirs
    for n, to in enumerate(("kohya", "diffusers", "comfyui", "lycoris", "kohya")):
        adapter = read(written(adapter, folder / f"{n}", to))
        for name, delta in expected.items():
            update: Any = adapter.updates[name]
            scale = max(np.abs(delta).max(), 1e-9)
            np.testing.assert_allclose(update.delta() / scale, delta / scale, rtol=0, atol=2e-6)
        for name in adapter.updates.keys() - expected.keys():  # the other parts of what is fused
            update = adapter.updates[name]
            assert not update.delta().any()


# -- FLUX in every dialect ---------------------------------------------------------------------------------------


H = 8
DOUBLE, SINGLE = "double_blocks.0", "single_blocks.0"
BFL = {  # the original names and their shapes
    **{f"{DOUBLE}.{stream}_attn.qkv": (3 * H, H) for stream in ("img", "txt")},
    **{f"{DOUBLE}.{stream}_attn.proj": (H, H) for stream in ("img", "txt")},
    f"{DOUBLE}.img_mlp.0": (4 * H, H),
    f"{DOUBLE}.img_mod.lin": (6 * H, H),
    f"{SINGLE}.linear1": (7 * H, H),
    f"{SINGLE}.linear2": (H, 5 * H),
    f"{SINGLE}.modulation.lin": (3 * H, H),
    "final_layer.adaLN_modulation.1": (2 * H, H),
    "img_in": (H, 4),
}
NATIVE: dict[str, tuple[str, str, bool]] = {  # dialect -> how a native module is spelled, its suffixes, its alphas
    "kohya": ("lora_unet_{_}", "lora_down", True),
    "comfyui": ("diffusion_model.{}", "lora_A", True),
    "comfyui, twice [35]": ("diffusion_model.diffusion_model.{}", "lora_A", False),
    "comfyui, of its extraction": ("diffusion_model.{}", "lora_down", False),
    "bfl": ("{}", "lora_A", False),
    "bfl, OneTrainer's ORIGINAL": ("{}", "lora_A", True),
    "bfl, fal's": ("base_model.model.{}", "lora_A", False),
    "bfl, fal's, twice [35]": ("base_model.model.base_model.model.{}", "lora_A.default", False),
    "onetrainer": ("transformer.{}", "lora_down", True),
    "kohya, two underscores [34]": ("lora_unet__{_}", "lora_down", True),
    "lycoris": ("lycoris_{_}", "lora_down", True),
}


def spelled(pairs: Pairs, pattern: str, suffix: str, alpha: float | None) -> dict[str, Any]:
    other = {"lora_A": "lora_B", "lora_down": "lora_up", "lora_A.default": "lora_B.default"}[suffix]
    tensors = {}
    for name, (down, up) in pairs.items():
        module = pattern.replace("{_}", name.replace(".", "_")).replace("{}", name)
        tensors[f"{module}.{suffix}.weight"], tensors[f"{module}.{other}.weight"] = down, up
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


@cache
def flux() -> tuple[Pairs, Pairs]:
    """A LoRA in the original names, and what it is in diffusers'."""
    native = factors(BFL, rank=2)
    tensors = diffusion.kohya(native, {name: "lora_unet_" + name.replace(".", "_") for name in native}, None)
    split = {}
    heights = {"qkv": 3, "linear1": 7}
    for name, (down, up) in native.items():
        for n, reference in enumerate(REFERENCES[name]):
            unit = len(up) // heights.get(name.rpartition(".")[2], 1)
            last = reference.endswith("proj_mlp")
            rows = up[n * unit : (n + (4 if last else 1)) * unit]
            split[f"transformer.{reference}"] = (down, rows)
    halves = native["final_layer.adaLN_modulation.1"]
    split["transformer.norm_out.linear"] = (halves[0], torch.cat(list(reversed(halves[1].chunk(2)))))
    assert len(tensors) == 2 * len(native)
    return native, split


REFERENCES = {
    f"{DOUBLE}.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    f"{DOUBLE}.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
    f"{DOUBLE}.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    f"{DOUBLE}.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    f"{DOUBLE}.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
    f"{DOUBLE}.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    f"{SINGLE}.linear1": [
        f"single_transformer_blocks.0.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ],
    f"{SINGLE}.linear2": ["single_transformer_blocks.0.proj_out"],
    f"{SINGLE}.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "img_in": ["x_embedder"],
}
SPLIT: dict[str, tuple[str, str, bool]] = {
    "diffusers": ("{}", "lora_A", False),
    "diffusers, twice [35]": ("transformer.{}", "lora_A", False),
    "onetrainer": ("{}", "lora_down", True),  # alphas are applied, and nothing is left over [14]
    "onetrainer, LEGACY [13]": ("lora_{_}", "lora_down", True),
    "diffusers, PEFT's wrapper": ("transformer.base_model.model.{bare}", "lora_A.default", False),
}


@pytest.mark.parametrize("dialect", NATIVE)
def test_flux_in_native_names(dialect: str, tmp_path: Path) -> None:
    pattern, suffix, alphas = NATIVE[dialect]
    native, split = flux()
    path = save(tmp_path / "file", spelled(native, pattern, suffix, 4.0 if alphas else None))
    adapter = read(path, dialect.partition(",")[0])
    assert adapter.metadata.architecture == "flux"
    assert_same(adapter, split, 4.0 if alphas else None)
    assert len({adapter.spelling(name) for name in adapter.updates}) == len(native)


@pytest.mark.parametrize("dialect", SPLIT)
def test_flux_in_diffusers_names(dialect: str, tmp_path: Path) -> None:
    pattern, suffix, alphas = SPLIT[dialect]
    _, split = flux()
    bare = {name.removeprefix("transformer.") if "{bare}" in pattern else name: pair for name, pair in split.items()}
    tensors = spelled(bare, pattern.replace("{bare}", "{}"), suffix, 4.0 if alphas else None)
    adapter = read(save(tmp_path / "file", tensors), dialect.partition(",")[0])
    assert_same(adapter, split, 4.0 if alphas else None)


def test_the_files_of_ai_toolkit_are_known_by_what_they_say(tmp_path: Path) -> None:
    native, split = flux()
    told = {"software": '{"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit"}'}
    for pairs, pattern in ((split, "{}"), (native, "diffusion_model.{}")):
        assert_same(read(save(tmp_path / "file", spelled(pairs, pattern, "lora_A", None), told), "ai-toolkit"), split)
    tensors = spelled(split, "{}", "lora_A", None)
    tensors |= {f"{name}.magnitude": torch.ones(len(up)) for name, (_, up) in split.items()}
    adapter = read(save(tmp_path / "dora", tensors), "ai-toolkit")
    assert {update.kind for update in adapter.updates.values()} == {"dora"}


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_processors(prefix: str, tmp_path: Path) -> None:
    """Section 7.5: qkv of a single block is three parts of linear1; fused again, the fourth is zero."""
    names = {
        f"{DOUBLE}.img_attn.qkv": f"{DOUBLE}.processor.qkv_lora1",
        f"{DOUBLE}.img_attn.proj": f"{DOUBLE}.processor.proj_lora1",
        f"{DOUBLE}.txt_attn.qkv": f"{DOUBLE}.processor.qkv_lora2",
        f"{DOUBLE}.txt_attn.proj": f"{DOUBLE}.processor.proj_lora2",
        f"{SINGLE}.linear1": f"{SINGLE}.processor.qkv_lora",
        f"{SINGLE}.linear2": f"{SINGLE}.processor.proj_lora",
    }
    native, split = flux()
    tensors, kept = {}, {}
    for name, key in names.items():
        down, up = native[name]
        up = up[: 3 * H] if name.endswith("linear1") else up
        tensors[f"{prefix}{key}.down.weight"], tensors[f"{prefix}{key}.up.weight"] = down, up
        kept |= {f"transformer.{r}": split[f"transformer.{r}"] for r in REFERENCES[name] if not r.endswith("proj_mlp")}
    adapter = read(save(tmp_path / "file", tensors), "xlabs")
    assert adapter.metadata.architecture == "flux"
    assert_same(adapter, kept)
    back = diffusion.load(written(adapter, tmp_path / "out", "kohya"))
    up = back["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    assert up.shape == (7 * H, 2)
    assert torch.equal(up[: 3 * H], native[f"{SINGLE}.linear1"][1][: 3 * H])
    assert not up[3 * H :].any()


def test_a_control_lora_of_black_forest_labs(tmp_path: Path) -> None:
    """Section 7.6: biases, replaced norms, and a first layer of twice the channels."""
    native, split = flux()
    wide = factors({"img_in": (H, 128)})
    tensors = spelled(native | wide, "{}", "lora_A", None)
    tensors |= {f"{DOUBLE}.img_attn.qkv.lora_B.bias": torch.arange(3.0 * H), "img_in.lora_B.bias": torch.ones(H)}
    norms = [
        f"{DOUBLE}.{stream}_attn.norm.{which}_norm.scale" for stream in ("img", "txt") for which in ("query", "key")
    ]
    norms += [f"{SINGLE}.norm.key_norm.scale"]
    tensors |= {key: torch.rand(4) for key in norms}
    adapter = read(save(tmp_path / "file", tensors), "bfl")
    kinds = {name: update.kind for name, update in adapter.updates.items() if name not in split}
    attn = "transformer.transformer_blocks.0.attn"
    assert kinds == {
        **dict.fromkeys((f"{attn}.norm_{x}" for x in ("q", "k", "added_q", "added_k")), "full"),
        "transformer.single_transformer_blocks.0.attn.norm_k": "full",
        **dict.fromkeys((f"{name}.bias" for name in (*QKV, "transformer.x_embedder")), "bias"),
    }
    np.testing.assert_array_equal(adapter.updates[f"{QKV[1]}.bias"].slots["value"].array(), np.arange(H, 2.0 * H))
    assert adapter.spelling(f"{attn}.norm_k") == f"{DOUBLE}.img_attn.norm.key_norm"
    there = written(adapter, tmp_path / "out", "comfyui")
    found = diffusion.load(there)
    assert found["diffusion_model.img_in.reshape_weight"].tolist() == [H, 128]
    assert torch.equal(found[f"diffusion_model.{norms[0]}.set_weight"], tensors[norms[0]])
    assert torch.equal(found[f"diffusion_model.{DOUBLE}.img_attn.qkv.diff_b"], torch.arange(3.0 * H))
    back = read(there, "comfyui")
    assert back.updates.keys() == adapter.updates.keys()
    losses = by_name("diffusers").losses(adapter)
    assert {loss.name for loss in losses} == {key.removesuffix(".scale") for key in norms}


T5 = "encoder.block.0.layer.0.SelfAttention.q"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("prefix", "component"), [("lora_te3_", "text_encoder_2"), ("lora_te2_", "text_encoder_2")])
def test_the_t5_of_flux_is_known_by_its_leaves_28(prefix: str, component: str, tmp_path: Path) -> None:
    native, split = flux()
    own = factors({T5: (H, H), CLIP: (H, H)})
    tensors = spelled(native, "lora_unet_{_}", "lora_down", 2.0)
    tensors |= spelled({T5: own[T5]}, prefix + "{_}", "lora_down", 2.0)
    tensors |= spelled({CLIP: own[CLIP]}, "lora_te1_{_}", "lora_down", 2.0)
    adapter = read(save(tmp_path / "file", tensors), "kohya")
    assert_same(adapter, split | {f"{component}.{T5}": own[T5], f"text_encoder.{CLIP}": own[CLIP]}, 2.0)
    keys = diffusion.load(written(adapter, tmp_path / "out", "kohya"))
    assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha" in keys
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha" in keys
    losses = by_name("diffusers").losses(adapter)  # diffusers loads no T5
    assert [loss.name for loss in losses] == [prefix + T5.replace(".", "_")]
    comfy = diffusion.load(written(adapter, tmp_path / "comfy", "comfyui"))
    assert f"text_encoders.t5xxl.transformer.{T5}.lora_A.weight" in comfy
    assert f"text_encoders.clip_l.transformer.{CLIP}.lora_A.weight" in comfy


def test_the_oft_of_sd_scripts_turns_each_part_apart_46(tmp_path: Path) -> None:
    """Its numbered blocks are those of the parts of a fused projection; the prefix is its own."""
    counts = {"double_blocks_0_img_attn_qkv": (48,) * 3, "single_blocks_0_linear1": (48, 48, 48, 192)}
    tensors = {"oft_unet_double_blocks_0_img_attn_proj.oft_blocks": 0.1 * torch.randn(48, 64, 64)}
    for module, parts in counts.items():
        for n, count in enumerate(parts):
            tensors[f"oft_unet_{module}.oft_blocks.{n}"] = 0.1 * torch.randn(count, 64, 64)
    tensors |= {f"{key.partition('.')[0]}.alpha": torch.tensor(1e-4) for key in tensors}
    adapter = read(save(tmp_path / "file", tensors), "kohya")
    assert adapter.metadata.architecture == "flux"  # by the heights alone: FLUX.2 has the same names
    mlp: Any = adapter.updates["transformer.single_transformer_blocks.0.proj_mlp"]
    assert torch.equal(
        torch.from_numpy(mlp.oft_blocks.array()), tensors["oft_unet_single_blocks_0_linear1.oft_blocks.3"]
    )
    back = diffusion.load(written(adapter, tmp_path / "out", "kohya"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    for to, lost in (("lycoris", 0), ("comfyui", 8), ("diffusers", 8)):
        assert len(by_name(to).losses(adapter)) == lost


# -- names of other families ---------------------------------------------------------------------------------------


def test_a_partial_wan_is_read_19(tmp_path: Path) -> None:
    """And image-conditioned keys keep their names [57]."""
    shapes = {"blocks.7.self_attn.q": (H, H), "blocks.9.cross_attn.k_img": (H, H), "blocks.9.ffn.0": (4 * H, H)}
    adapter = read(save(tmp_path / "file", spelled(factors(shapes), "lora_unet__{_}", "lora_down", 1.0)), "kohya")
    assert adapter.updates.keys() == {
        "transformer.blocks.7.attn1.to_q",
        "transformer.blocks.9.attn2.add_k_proj",
        "transformer.blocks.9.ffn.net.0.proj",
    }
    names = diffusion.load(written(adapter, tmp_path / "out", "kohya"))
    assert "lora_unet_blocks_9_cross_attn_k_img.alpha" in names


HUNYUAN = {
    "double_blocks_0_img_attn_qkv": (3 * H, H),
    "double_blocks_0_img_mlp_{}": (4 * H, H),
    "double_blocks_0_img_mod_{}": (6 * H, H),
    "single_blocks_0_modulation_{}": (3 * H, H),
}


@pytest.mark.parametrize("leaves", [("", "fc1", "linear", "linear"), ("", "0", "lin", "lin")])
def test_both_namings_of_hunyuan_video_58(leaves: tuple[str, ...], tmp_path: Path) -> None:
    names = [name.format(leaf) for name, leaf in zip(HUNYUAN, leaves, strict=True)]
    extra = {"txt_in_individual_token_refiner_blocks_0_mlp_fc1": (4 * H, H)}
    shapes = dict(zip(names, HUNYUAN.values(), strict=True)) | extra
    adapter = read(save(tmp_path / "file", spelled(factors(shapes), "lora_unet_{}", "lora_down", 1.0)), "kohya")
    assert adapter.metadata.architecture == "hunyuan-video"
    assert {n for n in adapter.updates if ".attn." not in n and "refiner" not in n} == {
        "transformer.transformer_blocks.0.ff.net.0.proj",
        "transformer.transformer_blocks.0.norm1.linear",
        "transformer.single_transformer_blocks.0.norm.linear",
    }
    names = list(diffusion.load(written(adapter, tmp_path / "out", "comfyui")))
    assert "diffusion_model.double_blocks.0.img_attn.qkv.alpha" in names
    assert "diffusion_model.double_blocks.0.img_mlp.0.alpha" in names


def test_uneven_parts_of_lumina_59(tmp_path: Path) -> None:
    """Grouped queries: 2304, 768, 768 rows."""
    shapes = {
        "layers.0.attention.qkv": (10, 6),
        "layers.0.feed_forward.w1": (16, 6),
        "layers.0.adaLN_modulation.1": (24, 6),
    }
    pairs = factors(shapes)
    adapter = read(save(tmp_path / "file", spelled(pairs, "lora_unet_{_}", "lora_down", 1.0)), "kohya")
    assert adapter.metadata.architecture == "lumina2"
    heights = {name.rpartition(".")[2]: u.shape[0] for name, u in adapter.updates.items() if ".to_" in name}
    assert heights == {"to_q": 6, "to_k": 2, "to_v": 2}


def test_a_fused_qkv_of_z_image_is_split(tmp_path: Path) -> None:
    """Section 8.9: diffusers leaves it unmatched."""
    shapes = {"layers.0.attention.qkv": (11520, 3840), "noise_refiner.0.attention.out": (3840, 3840)}
    adapter = read(save(tmp_path / "file", spelled(factors(shapes), "diffusion_model.{}", "lora_A", None)), "comfyui")
    assert adapter.metadata.architecture == "z-image"
    assert adapter.updates.keys() == {
        *(f"transformer.layers.0.attention.to_{leaf}" for leaf in "qkv"),
        "transformer.noise_refiner.0.attention.to_out.0",
    }


def test_a_model_that_no_table_knows_keeps_its_dotted_names(tmp_path: Path) -> None:
    pairs = factors({"novel_blocks.0.mixer.in": (H, H)})
    path = save(tmp_path / "file", spelled(pairs, "diffusion_model.{}", "lora_A", None))
    adapter = read(path, "comfyui")
    assert list(adapter.updates) == ["novel_blocks.0.mixer.in"]
    assert diffusion.load(written(adapter, tmp_path / "out", "comfyui")).keys() == diffusion.load(path).keys()
    assert [len(by_name(to).losses(adapter)) for to in ("kohya", "lycoris", "diffusers", "raw")] == [1, 1, 1, 0]
    with pytest.raises(FormatError, match="no known model has"):
        read(save(tmp_path / "flat", spelled(pairs, "lora_unet_{_}", "lora_down", None)), "kohya")


@pytest.mark.parametrize("key", ["lora_controlnet", "lllite_unet_input_blocks_1_1_attn1_to_q.down.0.weight"])
def test_control_nets_are_refused_by_name(key: str, tmp_path: Path) -> None:
    path = save(tmp_path / "file", {key: torch.ones(2, 2), "input_blocks.1.1.proj_in.up": torch.ones(2, 2)})
    with pytest.raises(FormatError, match=r"(?i)controlnet"):
        read(path)
