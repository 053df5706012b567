"""The name tables of Stable Diffusion, against those who define the names: diffusers and transformers."""

from __future__ import annotations

import re

import numpy as np
import pytest

from loratool.architectures import (
    ARCHITECTURES,
    Architecture,
    NameTable,
    Row,
    Slot,
    architecture,
    flatten,
    identify,
    identify_checkpoint,
    targets,
    unflatten,
)
from loratool.architectures import UNETS as FAMILIES
from loratool.architectures.base import PREFIXES
from loratool.architectures.sd import SD1, SD2, SDXL
from loratool.errors import MatchError
from loratool.model import pick
from loratool.tensors import Tensor

CROSS_DOWN = ("CrossAttnDownBlock2D",) * 3
CROSS_UP = ("CrossAttnUpBlock2D",) * 3
UNETS = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", *CROSS_DOWN[:2]],
        "up_block_types": [*CROSS_UP[:2], "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIPS = [
    ("sd1", "text_encoder", CLIP_L, False),
    ("sd2", "text_encoder", CLIP_H, False),
    ("sdxl", "text_encoder", CLIP_L, False),
    ("sdxl", "text_encoder_2", CLIP_G | {"projection_dim": 1280}, True),
]
every = pytest.mark.parametrize("known", FAMILIES, ids=lambda known: known.name)


def get(name: str) -> Architecture:
    known = architecture(name)
    assert known is not None
    return known


def of_component(known: Architecture, component: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of one component, by their names inside of it."""
    start, shapes = f"{component}.", known.shapes()
    parameters = (name for name in known.checkpoint() if name.startswith(start))
    weights = {name: shapes[name.rpartition(".")[0]] for name in parameters}
    return {
        name.removeprefix(start): shape if name.endswith(".weight") else shape[:1] for name, shape in weights.items()
    }


def meta_unet(**config: object):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**config)


def meta_clip(config: dict[str, int], projection: bool):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    with torch.device("meta"):
        return kind(transformers.CLIPTextConfig(**config))


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- NameTable -----------------------------------------------------------------------------------------


def test_a_name_table_reads_both_ways() -> None:
    table = NameTable((("a.b", "a_b"), ("c", "d")))
    assert table.forward == {"a.b": "a_b", "c": "d"}
    assert table.backward == {"a_b": "a.b", "d": "c"}


@pytest.mark.parametrize("pairs", [(("a", "x"), ("b", "x")), (("x", "a"), ("x", "b"))])
def test_a_name_table_that_is_not_one_to_one_names_the_collision(pairs) -> None:
    with pytest.raises(ValueError, match="'x' is both 'a' and 'b'"):
        NameTable(pairs)


# --- modules -------------------------------------------------------------------------------------------


def test_architectures_are_found_by_name() -> None:
    assert [known.name for known in ARCHITECTURES][:3] == ["sd1", "sd2", "sdxl"]
    assert architecture("sdxl") is SDXL
    assert architecture("sd9") is None


@pytest.mark.parametrize("name", UNETS)
def test_the_unet_is_that_of_diffusers(name: str) -> None:
    assert of_component(get(name), "unet") == shapes_of(meta_unet(**UNETS[name]))


@pytest.mark.parametrize(("name", "component", "config", "projection"), CLIPS)
def test_the_text_encoder_is_that_of_transformers(name, component, config, projection) -> None:
    theirs = shapes_of(meta_clip(config, projection))
    if not projection:  # transformers 5.6 dropped the wrapper
        theirs = {f"text_model.{key.removeprefix('text_model.')}": shape for key, shape in theirs.items()}
    theirs = {key: shape for key, shape in theirs.items() if not key.endswith("position_ids")}
    assert of_component(get(name), component) == theirs


@every
def test_modules_are_distinct_and_belong_to_the_components(known: Architecture) -> None:
    modules = known.modules()
    assert len(set(modules)) == len(modules)
    assert {name.partition(".")[0] for name in modules} == set(known.components)
    assert not any(name.endswith((".weight", ".bias")) for name in modules)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sd1", {"unet": 192, "text_encoder": 72}),
        ("sd2", {"unet": 192, "text_encoder": 138}),
        ("sdxl", {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}),
    ],
)
def test_kohya_targets_are_as_many_as_in_real_files(name: str, counts: dict[str, int]) -> None:
    found = targets(get(name))
    assert {c: sum(t.startswith(f"{c}.") for t in found) for c in counts} == counts
    assert sum(counts.values()) == len(found)


def test_conv_targets_add_resnets_and_resampling_but_no_ends_and_no_norms() -> None:
    more = set(targets(SD1, conv=True)) - set(targets(SD1))
    assert len(more) == 22 * 3 + 14 + 6  # conv1, conv2, time_emb_proj; shortcuts; down and up
    assert "unet.up_blocks.0.upsamplers.0.conv" in more
    assert not any("norm" in name or name == "unet.conv_in" for name in more)


# --- single files --------------------------------------------------------------------------------------


@every
def test_slots_are_one_to_one_and_fill_whole_tensors(known: Architecture) -> None:
    slots = list(known.checkpoint().values())
    assert len(set(slots)) == len(slots)
    for tensor in {slot.tensor for slot in slots if not slot.whole}:
        assert {slot.pieces for slot in slots if slot.tensor == tensor} == {((n, n + 1),) for n in range(3)}


@pytest.mark.parametrize("name", UNETS)
def test_the_unet_of_a_single_file_is_what_diffusers_converts_it_to(name: str) -> None:
    torch = pytest.importorskip("torch")
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    slots = {key: slot for key, slot in get(name).checkpoint().items() if key.startswith("unet.")}
    file = {slot.tensor: torch.tensor(tag) for tag, slot in enumerate(slots.values())}
    converted = single_file.convert_ldm_unet_checkpoint(file, dict(meta_unet(**UNETS[name]).config))
    assert {f"unet.{key}": file[slots[f"unet.{key}"].tensor].item() for key in converted} == {
        f"unet.{key}": tag.item() for key, tag in converted.items()
    }
    assert len(converted) == len(slots)


@pytest.mark.parametrize(
    ("name", "component", "prefix"),
    [
        ("sd2", "text_encoder", "cond_stage_model.model."),
        ("sdxl", "text_encoder_2", "conditioner.embedders.1.model."),
    ],
)
def test_openclip_is_what_diffusers_converts_it_to(name: str, component: str, prefix: str) -> None:
    """In width 2, values tell which tensor, and which rows and columns of it, a parameter was taken from."""
    torch = pytest.importorskip("torch")
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    slots = {
        key.removeprefix(f"{component}."): slot
        for key, slot in get(name).checkpoint().items()
        if key.startswith(f"{component}.")
    }
    file = {}
    for tag, slot in enumerate(slots.values()):
        matrix = torch.arange(2.0 * slot.of * 2).reshape(-1, 2) + 100 * tag
        file[slot.tensor] = matrix[:, 0] if slot.tensor.endswith("bias") else matrix
    config = type("Config", (), {"hidden_size": 2})
    converted = single_file.convert_open_clip_checkpoint(type("Model", (), {"config": config}), file, prefix)

    def taken(slot: Slot) -> list[object]:
        (start, stop), *_ = slot.ranges(len(file[slot.tensor]))
        rows = file[slot.tensor][start:stop]
        return (rows.T if slot.transposed else rows).tolist()

    assert all(slot.tensor.startswith(prefix) for slot in slots.values())
    assert {key: taken(slot) for key, slot in slots.items()} == {key: t.tolist() for key, t in converted.items()}


def test_the_last_layer_of_the_openclip_of_2_is_no_ones() -> None:
    assert not any(".resblocks.23." in slot.tensor for slot in SD2.checkpoint().values())
    assert any(".resblocks.22." in slot.tensor for slot in SD2.checkpoint().values())


def test_only_the_text_projection_is_stored_transposed() -> None:
    transposed = {key for key, slot in SDXL.checkpoint().items() if slot.transposed}
    assert transposed == {"text_encoder_2.text_projection.weight"}
    slot = SDXL.checkpoint()["text_encoder_2.text_projection.weight"]
    assert slot == Slot("conditioner.embedders.1.model.text_projection", transposed=True)
    assert slot.stored((1280, 768)) == (768, 1280)


def test_queries_keys_and_values_are_rows_of_one_openclip_tensor() -> None:
    for part, leaf in enumerate(("q_proj", "k_proj", "v_proj")):
        module = f"text_encoder_2.text_model.encoder.layers.7.self_attn.{leaf}"
        start = "conditioner.embedders.1.model.transformer.resblocks.7.attn.in_proj"
        assert SDXL.checkpoint()[f"{module}.weight"] == Slot(f"{start}_weight", ((part, part + 1),), 3)
        assert SDXL.checkpoint()[f"{module}.bias"] == Slot(f"{start}_bias", ((part, part + 1),), 3)
        assert Slot("", ((part, part + 1),), 3).stored((1280, 1280)) == (3840, 1280)


def test_a_slot_is_rows_of_any_proportions() -> None:
    """q, k, v and mlp of one projection, and a half swap, in units: real and narrow widths alike."""
    mlp = Slot("linear1", ((3, 7),), 7)
    assert mlp.ranges(7 * 3072) == ((9216, 21504),) and mlp.ranges(14) == ((6, 14),)
    assert mlp.shape((14, 5)) == (8, 5) and mlp.stored((8, 5)) == (14, 5) and not mlp.whole
    swapped = Slot("final", ((1, 2), (0, 1)), 2)
    assert swapped.ranges(6) == ((3, 6), (0, 3)) and not swapped.whole
    assert swapped.shape((6, 4)) == swapped.stored((6, 4)) == (6, 4)
    assert Slot("x").whole and Slot("x").shape((5, 3, 1)) == (5, 3, 1) and Slot("x").shape(()) == ()
    with pytest.raises(MatchError, match="15 rows are not 7 equal parts"):
        mlp.ranges(15)


def test_the_rows_of_a_slot_are_put_one_below_the_other() -> None:
    stored = Tensor.of(np.arange(12).reshape(6, 2))
    rows = pick(stored, Slot("x", ((1, 2), (0, 1)), 2)).array()
    assert rows.reshape(-1).tolist() == [*range(6, 12), *range(6)]
    assert pick(stored, Slot("x")) is stored
    assert pick(stored, Slot("x", ((2, 3),), 3)).array().reshape(-1).tolist() == [8, 9, 10, 11]


def test_the_text_encoder_of_1_has_two_spellings_in_single_files() -> None:
    name = "text_encoder.text_model.encoder.layers.3.mlp.fc1.weight"
    old = "cond_stage_model.transformer.encoder.layers.3.mlp.fc1.weight"
    usual = "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
    assert SD1.checkpoint()[name].tensor == usual
    assert SD1.checkpoint({usual})[name].tensor == usual
    assert SD1.checkpoint({old})[name].tensor == old
    assert SD1.checkpoint({old, usual})[name].tensor == usual
    assert SD1.checkpoint({f"diffusion_model.{usual}"})[name].tensor == usual


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_unet_files_may_lack_the_prefix(prefix: str) -> None:
    tensor = f"{prefix}output_blocks.5.2.conv.bias"
    slots = SDXL.checkpoint({tensor})
    assert slots["unet.up_blocks.1.upsamplers.0.conv.bias"].tensor == tensor
    missing = slots["unet.up_blocks.0.upsamplers.0.conv.bias"].tensor
    assert missing == "model.diffusion_model.output_blocks.2.2.conv.bias"


@every
def test_a_single_file_is_identified(known: Architecture) -> None:
    slots, shapes = known.checkpoint(), known.shapes()
    file = {slots[f"{name}.weight"].tensor: slots[f"{name}.weight"].stored(shapes[name]) for name in shapes}
    assert identify_checkpoint(file) is known
    unet = {name.removeprefix("model."): shape for name, shape in file.items() if name.startswith("model.")}
    assert identify_checkpoint(unet) is known


def test_other_single_files_are_not_identified() -> None:
    slots, shapes = SDXL.checkpoint(), SDXL.shapes()
    narrow = {slots[f"{name}.weight"].tensor: (8, 16) for name in shapes if name.startswith("unet.")}
    assert identify_checkpoint(narrow) is SDXL  # by its names, all of them and no others
    refiner = narrow | {"model.diffusion_model.input_blocks.11.0.in_layers.0.weight": (16,)}
    assert identify_checkpoint(refiner) is None
    assert identify_checkpoint(dict(list(narrow.items())[1:])) is None
    assert identify_checkpoint({}) is None


# --- kohya names ---------------------------------------------------------------------------------------


@every
def test_kohya_names_are_read_back(known: Architecture) -> None:
    table = known.kohya()
    assert set(table.forward) == set(known.modules())
    for reference, kohya in table.pairs:
        assert known.from_kohya(kohya) == known.resolve(kohya) == reference
        assert "." not in kohya


@pytest.mark.parametrize(
    ("name", "reference", "kohya"),
    [
        ("sd1", "unet.conv_in", "lora_unet_conv_in"),
        (
            "sd1",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
        ),
        (
            "sd2",
            "text_encoder.text_model.encoder.layers.22.self_attn.q_proj",
            "lora_te_text_model_encoder_layers_22_self_attn_q_proj",
        ),
        (
            "sdxl",
            "unet.down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
            "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        ),
        ("sdxl", "unet.mid_block.resnets.1.time_emb_proj", "lora_unet_middle_block_2_emb_layers_1"),
        ("sdxl", "unet.add_embedding.linear_2", "lora_unet_label_emb_0_2"),
        (
            "sdxl",
            "text_encoder.text_model.encoder.layers.0.mlp.fc2",
            "lora_te1_text_model_encoder_layers_0_mlp_fc2",
        ),
        (
            "sdxl",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
            "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
        ),
        ("sdxl", "text_encoder_2.text_projection", "lora_te2_text_projection"),
    ],
)
def test_kohya_writes(name: str, reference: str, kohya: str) -> None:
    assert get(name).kohya().forward[reference] == kohya


def test_diffusers_reads_the_blocks_of_xl_as_we_do() -> None:
    loaders = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    config = type("Config", (), {"layers_per_block": 2})
    for reference in targets(SDXL):
        if reference.startswith("unet."):
            ours = SDXL.kohya().forward[reference]
            (theirs,) = loaders._maybe_map_sgm_blocks_to_diffusers({ours: 0}, config)
            for ldm, block in (
                ("input_blocks", "down_blocks"),
                ("middle", "mid"),
                ("output_blocks", "up_blocks"),
            ):
                theirs = theirs.replace(ldm, block, 1)
            assert theirs == flatten(reference)


@pytest.mark.parametrize(
    ("name", "index"),
    [("sd1", 1), ("sd2", 1), ("sdxl", 2)],
)
def test_the_first_upsampler_follows_attention_only_in_xl(name: str, index: int) -> None:
    known, reference = get(name), "unet.up_blocks.0.upsamplers.0.conv"
    assert known.from_kohya(f"lora_unet_output_blocks_2_{index}_conv") == reference
    assert known.from_kohya(f"lora_unet_output_blocks_2_{3 - index}_conv") is None
    slot = known.checkpoint()[f"{reference}.weight"]
    assert slot.tensor == f"model.diffusion_model.output_blocks.2.{index}.conv.weight"


def test_block_1_is_neither_10_nor_11() -> None:
    read = SD1.from_kohya
    assert read("lora_unet_input_blocks_1_0_in_layers_2") == "unet.down_blocks.0.resnets.0.conv1"
    assert read("lora_unet_input_blocks_10_0_in_layers_2") == "unet.down_blocks.3.resnets.0.conv1"
    assert read("lora_unet_input_blocks_11_0_in_layers_2") == "unet.down_blocks.3.resnets.1.conv1"
    assert read("lora_unet_input_blocks_10_1_proj_in") is None
    assert read("lora_unet_output_blocks_11_1_proj_in") == "unet.up_blocks.3.attentions.2.proj_in"
    assert read("lora_unet_output_blocks_1_1_proj_in") is None


QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
FC1 = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    ("names", "spelling", "reference"),
    [
        ("sd1 sd2 sdxl", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q", QUERY),
        ("sd1 sd2 sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_q", QUERY),
        ("sd1", "lora_unet_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q", QUERY),
        ("sd1", "lora_unet__down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q", QUERY),
        ("sd1", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q_", QUERY),
        ("sd1", "oft_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q", QUERY),
        ("sd1", "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q", QUERY),
        ("sdxl", "unet.input_blocks.4.1.transformer_blocks.0.attn2.to_q", QUERY),
        ("sdxl", "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_q", QUERY),
        ("sd1 sd2 sdxl", QUERY, QUERY),
        ("sd1 sd2 sdxl", "lora_te_text_model_encoder_layers_0_mlp_fc1", FC1),
        ("sd1 sd2 sdxl", "lora_te1_text_model_encoder_layers_0_mlp_fc1", FC1),
        ("sd1", "lora_te_text_encoder_text_model_encoder_layers_0_mlp_fc1", FC1),
        ("sd1", "lora_te_encoder_layers_0_mlp_fc1", FC1),
        ("sd1", "text_encoder.encoder.layers.0.mlp.fc1", FC1),
        ("sdxl", "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", FC1),
        ("sd1", "lora_te2_text_model_encoder_layers_0_mlp_fc1", None),
        ("sdxl", "lora_te2_text_model_encoder_layers_0_mlp_fc1", FC1.replace("coder.", "coder_2.", 1)),
        ("sdxl", "lora_unet_double_blocks_0_img_attn_qkv", None),
        ("sdxl", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", None),
        ("sdxl", "", None),
    ],
)
def test_known_spellings_are_read(names: str, spelling: str, reference: str | None) -> None:
    for name in names.split():
        assert get(name).from_kohya(spelling) == reference
        assert get(name).resolve(spelling) == reference


def test_resolve_knows_only_the_modules_that_are_there() -> None:
    beyond = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert SDXL.resolve(beyond) is None
    assert SDXL.from_kohya(beyond) == "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def test_no_prefix_begins_another() -> None:
    prefixes = [prefix for prefix, _ in PREFIXES]
    assert not [(a, b) for a in prefixes for b in prefixes if a != b and a.startswith(b)]


# --- models of other sizes -----------------------------------------------------------------------------


TINY = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "layers_per_block": 3,
    "transformer_layers_per_block": 11,
}


def test_a_tiny_unet_is_unflattened_without_a_table() -> None:
    modules = {f"unet.{name.rpartition('.')[0]}" for name in shapes_of(meta_unet(**TINY))}
    assert len(modules) > 100
    assert {unflatten(flatten(name)) for name in modules} == modules
    for name in modules:
        assert unflatten(flatten(name)) == SD1.from_kohya(flatten(name)) == name


@every
def test_real_models_are_unflattened_without_a_table(known: Architecture) -> None:
    for name in known.modules():
        assert unflatten(flatten(name, known.name)) == name


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        (
            "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k",
            "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
        ),
        (
            "lora_te_text_model_encoder_layers_101_mlp_fc1",
            "text_encoder.text_model.encoder.layers.101.mlp.fc1",
        ),
        ("lora_unet_unet_down_blocks_12_downsamplers_0_conv_", "unet.down_blocks.12.downsamplers.0.conv"),
        ("lora_unet_time_embedding_linear_1", "unet.time_embedding.linear_1"),
        ("lora_unet_time_embedding_linear_7", None),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_5_proj", None),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_1", None),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_x_attn1_to_out_0", None),
        ("lora_unet_text_model_encoder_layers_0_mlp_fc1", None),
        ("lora_unet_input_blocks_4_1_proj_in", None),
        ("lora_te3_text_model_encoder_layers_0_mlp_fc1", None),
    ],
)
def test_unflatten(name: str, reference: str | None) -> None:
    assert unflatten(name) == reference


def test_flatten_keeps_the_body_and_numbers_the_first_of_two_text_encoders() -> None:
    assert flatten("unet.down_blocks.1.resnets.0.conv1", "sdxl") == "lora_unet_down_blocks_1_resnets_0_conv1"
    assert flatten(FC1) == "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert flatten(FC1, "sdxl") == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    assert flatten("text_encoder_2.text_projection", "sdxl") == "lora_te2_text_projection"


@pytest.mark.parametrize("reference", ["vae.decoder.conv_in", "transformer.x", "unet", "unet."])
def test_what_has_no_kohya_name_is_named(reference: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(reference))):
        flatten(reference)


# --- identify ------------------------------------------------------------------------------------------


Shapes = dict[str, tuple[int, ...]]


def adapter(known: Architecture, pattern: str = "", spell=lambda known, name: name) -> Shapes:
    """Names and update shapes of an adapter for those targets of ``known`` that match ``pattern``."""
    chosen = [name for name in targets(known, conv=True) if re.search(pattern, name)]
    assert chosen
    return {spell(known, name): known.shapes()[name] for name in chosen}


def kohya(known: Architecture, name: str) -> str:
    return known.kohya().forward[name]


def diffusers_body(known: Architecture, name: str) -> str:
    return flatten(name, known.name)


@every
@pytest.mark.parametrize("spell", [lambda known, name: name, kohya, diffusers_body])
@pytest.mark.parametrize("pattern", ["", r"^unet", "^text_encoder", "attn2.to_[kv]", "proj_in"])
def test_adapters_are_identified(known: Architecture, pattern: str, spell) -> None:
    if known is SDXL and pattern == "^text_encoder":
        pattern = "^text_encoder_2"
    assert identify(adapter(known, pattern, spell)) is known


def test_shapes_may_be_those_of_flattened_kernels_or_unknown() -> None:
    convs = adapter(SD1, "resnets.*conv", kohya)
    assert all(len(shape) == 4 for shape in convs.values())
    assert identify({name: (out, i * kh * kw) for name, (out, i, kh, kw) in convs.items()}) is SD1
    assert identify({name: () for name in convs}) is SD1
    assert identify({name: () for name in adapter(SDXL, "", kohya)}) is SDXL


def test_what_decides_between_1_and_2() -> None:
    assert identify(adapter(SD2, "attn1")) is SD1  # nothing does: the same names and shapes
    assert identify(adapter(SD2, "attn1|proj_in")) is SD2  # axes of proj_in
    assert identify(adapter(SD2, "attn2.to_k")) is SD2  # width of the text
    assert identify(adapter(SD2, "layers.0.self_attn")) is SD2  # width of the text encoder


def test_ldm_names_decide_for_xl_where_nothing_else_does() -> None:
    pattern = r"down_blocks\.1\.attentions\.0\.transformer_blocks\.0\.attn1"
    assert identify(adapter(SD1, pattern, kohya)) is SD1
    assert identify(adapter(SDXL, pattern, kohya)) is SDXL


def test_1_may_be_numbered_as_diffusers_exports_it() -> None:
    export = {re.sub("^lora_te_", "lora_te1_", name): shape for name, shape in adapter(SD1, "", kohya).items()}
    assert identify(export) is SD1
    assert identify(adapter(SDXL, r"^text_encoder\.", kohya)) is SDXL


def test_ldm_names_on_1_are_identified_by_blocks_that_only_1_has() -> None:
    slots = SD1.checkpoint()
    ldm = {
        "lora_unet_" + slots[f"{name}.weight"].tensor.split(".", 2)[2].removesuffix(".weight").replace(".", "_"): shape
        for name, shape in adapter(SD1, "^unet.*(attn1|resnets)").items()
    }
    assert "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q" in ldm
    assert identify(ldm) is SD1


def test_one_stranger_does_not_matter() -> None:
    assert identify(adapter(SDXL, "", kohya) | {"lora_unet_something_else": (4, 4)}) is SDXL


def test_other_families_are_not_identified() -> None:
    clip = adapter(SDXL, r"^text_encoder\.", kohya)
    flux = {f"lora_unet_triple_blocks_{n}_img_attn_qkv": (9216, 3072) for n in range(19)}
    t5 = {f"lora_te3_encoder_block_{n}_layer_0_SelfAttention_q": (4096, 4096) for n in range(24)}
    llm = {f"model.layers.{n}.self_attn.q_proj": (64, 64) for n in range(4)}
    for modules in (flux, t5, llm, clip | flux, clip | t5, {}):
        assert identify(modules) is None


def test_models_of_other_widths_are_not_identified() -> None:
    narrow = {name: tuple(axis // 10 if axis > 3 else axis for axis in shape) for name, shape in adapter(SD1).items()}
    assert identify(narrow) is None


# --- tables are checked when they are built ------------------------------------------------------------


def built(*rows: Row) -> Architecture:
    return Architecture("x", "X", ("unet",), lambda: rows, unflatten)


@pytest.mark.parametrize("table", ["kohya", "checkpoint", "resolve"])
def test_collisions_are_found_when_a_table_is_built(table: str) -> None:
    row = Row("unet.a_b", "lora_unet_a_b", ("a_b",), (2, 2), Slot("a.b.weight"))
    colliding = row._replace(reference="unet.a.b")
    arguments = ("lora_unet_a_b",) if table == "resolve" else ()
    getattr(built(row), table)(*arguments)
    with pytest.raises(ValueError, match=r"both 'unet\.a_b(\.weight)?' and 'unet\.a\.b"):
        getattr(built(row, colliding), table)(*arguments)


def test_tables_are_built_once_and_only_when_asked_for() -> None:
    calls: list[int] = []
    known = Architecture("x", "X", ("unet",), lambda: calls.append(1) or (), unflatten)  # type: ignore[func-returns-value]
    assert not calls
    assert known.modules() == () and not known.kohya().pairs
    assert known.checkpoint() == {} and known.resolve("lora_unet_x") is None
    assert calls == [1]
