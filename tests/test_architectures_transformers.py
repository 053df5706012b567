"""The tables of diffusion transformers, against diffusers: its models tell the modules, its converters the names."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from loratool.architectures import TRANSFORMERS, architecture, identify, identify_checkpoint, identify_names, told
from loratool.architectures.base import Segment, Shape, flat
from loratool.architectures.rows import Size, expanded, table
from loratool.architectures.transformer import Transformer, spelled, transformer

WORLDS = ("kohya", "comfy", "native", "diffusers")
every = pytest.mark.parametrize("known", TRANSFORMERS, ids=lambda known: known.name)

# class -> how it calls its numbers of blocks, and the letters of the table's
_BOTH = {"num_layers": "#d", "num_single_layers": "#s"}
_LIKE_FLUX = (
    "Flux3",
    "Flux",
    "Chroma",
    "Flux2",
    "HiDreamImage",
    "HunyuanVideo",
    "HunyuanVideoFramepack",
    "HunyuanImage",
)
DEPTHS: dict[str, dict[str, str]] = {kind: _BOTH for kind in _LIKE_FLUX} | {
    "ZImage": {"n_layers": "#b"},
    "AuraFlow": {"num_mmdit_layers": "#d", "num_single_dit_layers": "#s"},
    "HunyuanVideo15": {"num_layers": "#d"},
}
SD3 = {"sample_size": 128, "pos_embed_max_size": 192, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD35 = SD3 | {"qk_norm": "rms_norm"}
COG = {"num_attention_heads": 48, "use_rotary_positional_embeddings": True}
WAN_13 = {"num_attention_heads": 12, "ffn_dim": 8960}
WAN_5 = {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
WAN_IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
SANA_06 = {"num_attention_heads": 36, "num_cross_attention_heads": 16}
SANA_06 |= {"cross_attention_head_dim": 72, "cross_attention_dim": 1152}
HIDREAM = {"patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096] * 2}
LATER = {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True}
LATER |= {"use_prompt_embeddings": False}
KLEIN = {"joint_attention_dim": 7680, "num_attention_heads": 24, "guidance_embeds": False}
GLYPHS = {"text_embed_2_dim": 1472}
MODELS = [  # (architecture, size, class, what differs from the class's defaults)
    ("flux", "dev", "Flux", {"guidance_embeds": True}),
    ("flux", "schnell", "Flux", {}),
    ("flux", "control", "Flux", {"guidance_embeds": True, "in_channels": 128, "out_channels": 64}),
    ("flux", "fill", "Flux", {"guidance_embeds": True, "in_channels": 384, "out_channels": 64}),
    ("chroma", "chroma", "Chroma", {}),
    ("flux2", "dev", "Flux2", {}),
    ("flux2", "klein-4b", "Flux2", KLEIN),
    ("flux2", "klein-9b", "Flux2", KLEIN | {"num_attention_heads": 32, "joint_attention_dim": 12288}),
    ("sd3", "3-medium", "SD3", SD3),
    ("sd3", "3.5-large", "SD3", SD35 | {"num_attention_heads": 38, "caption_projection_dim": 2432}),
    ("sd3", "3.5-medium", "SD3", SD35 | {"pos_embed_max_size": 384, "dual_attention_layers": (0, 1)}),
    ("wan", "14b", "Wan", {}),
    ("wan", "1.3b", "Wan", WAN_13),
    ("wan", "2.2-5b", "Wan", WAN_5),
    ("wan", "i2v-14b", "Wan", WAN_IMAGE),
    ("wan", "2.2-i2v-14b", "Wan", {"in_channels": 36}),
    ("wan", "flf2v-14b", "Wan", WAN_IMAGE | {"pos_embed_seq_len": 514}),
    ("wan", "vace-14b", "WanVACE", {"vace_layers": [0, 1]}),
    ("wan", "vace-1.3b", "WanVACE", WAN_13 | {"vace_layers": [0, 2]}),
    ("qwen-image", "20b", "QwenImage", {}),
    ("qwen-image", "layered", "QwenImage", {"use_additional_t_cond": True}),
    ("z-image", "6b", "ZImage", {}),
    ("lumina2", "2b", "Lumina2", {"cap_feat_dim": 2304}),
    ("hunyuan-video", "t2v", "HunyuanVideo", {}),
    ("hunyuan-video", "i2v", "HunyuanVideo", {"in_channels": 33, "guidance_embeds": False}),
    ("hunyuan-video", "framepack", "HunyuanVideoFramepack", {"has_image_proj": True, "has_clean_x_embedder": True}),
    ("hunyuan-video-1.5", "8b", "HunyuanVideo15", {}),
    ("hunyuan-image-2.1", "2.1", "HunyuanImage", GLYPHS),
    ("hunyuan-image-2.1", "2.1-distilled", "HunyuanImage", GLYPHS | {"guidance_embeds": True, "use_meanflow": True}),
    ("ltx", "2b", "LTXVideo", {}),
    ("ltx", "13b", "LTXVideo", {"attention_head_dim": 128, "cross_attention_dim": 4096}),
    ("ltx2", "19b", "LTX2Video", {}),
    ("ltx2", "2.3-22b", "LTX2Video", LATER),
    ("cogvideox", "2b", "CogVideoX", {}),
    ("cogvideox", "5b", "CogVideoX", COG),
    ("cogvideox", "5b-i2v", "CogVideoX", COG | {"in_channels": 32, "use_learned_positional_embeddings": True}),
    ("cogvideox", "1.5-5b", "CogVideoX", COG | {"patch_size_t": 2}),
    ("cogvideox", "1.5-5b-i2v", "CogVideoX", COG | {"patch_size_t": 2, "in_channels": 32, "ofs_embed_dim": 512}),
    ("hidream", "i1", "HiDreamImage", HIDREAM | {"llama_layers": [0]}),
    ("mochi", "10b", "Mochi", {}),
    ("pixart", "sigma", "PixArt", {"caption_channels": 4096, "use_additional_conditions": False}),
    ("pixart", "alpha", "PixArt", {"caption_channels": 4096}),
    ("auraflow", "0.3", "AuraFlow", {"pos_embed_max_size": 9216}),
    ("sana", "1.6b", "Sana", {}),
    ("sana", "0.6b", "Sana", SANA_06),
    ("krea2", "2", "Krea2", {}),
    ("flux3", "3", "Flux3", {}),
    ("qwen-image-2.1", "2.1", "QwenImage21", {}),
    ("anima", "2b", "Cosmos", {"num_attention_heads": 16, "extra_pos_embed_type": None}),
    ("anima", "14b", "Cosmos", {"num_attention_heads": 40, "extra_pos_embed_type": None}),
]
# the numbers of blocks of the published models, by class: those that a size tells must be these
PUBLISHED = {
    "flux": {"#d": 19, "#s": 38},
    "chroma": {"#d": 19, "#s": 38, "#l": 5},
    "qwen-image": {"#b": 60},
    "hunyuan-video-1.5": {"#d": 54, "#r": 2},
    "mochi": {"#b": 48, "#c": 47, "#l": range(47, 48)},
}


def few(size: Size, depth: int = 3) -> Size:
    """The size with at most that many blocks of a kind; what is said of the first and of the last block holds."""
    names = {letter: size.numbers(letter) for letter in size.blocks}
    most = max((names[letter].stop for letter in ("#b",) if letter in names), default=0)
    blocks = {}
    for letter, numbers in names.items():
        lacking = most - numbers.stop if most > depth else 0  # #c: all but the last; #a: the first 13
        stop = depth - lacking if lacking == 1 else min(numbers.stop, depth - 1 if lacking > 1 else depth)
        start = depth - 1 if numbers.start == most - 1 and most > depth else min(numbers.start, depth - 1)
        blocks[letter] = range(start, stop)
    return Size(size.name, size.widths, blocks, size.features)


def get(name: str) -> Transformer:
    known = architecture(name)
    assert isinstance(known, Transformer)
    return known


def size_of(known: Transformer, name: str) -> Size:
    return next(size for size in known.sizes if size.name == name)


def main_shapes(known: Transformer, size: Size | None = None) -> dict[str, Shape]:
    """The modules of the transformer itself."""
    return {name: shape for name, shape in known.shapes(size).items() if name.startswith("transformer.")}


def meta(name: str, config: dict[str, object]):
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("diffusers.models.transformers")
    found = next(kind for kind in vars(models) if kind.startswith(f"{name}Transformer"))
    with torch.device("meta"):
        return getattr(models, found)(**config)


# --- modules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size", "kind", "config"), MODELS, ids=lambda value: str(value)[:16])
def test_the_modules_are_those_of_diffusers_model(name: str, size: str, kind: str, config: dict[str, object]) -> None:
    """Every parameter of every published size, and its shape, in three blocks of each kind."""
    known = get(name)
    small = few(size_of(known, size))
    depths = {key: len(small.numbers(letter)) for key, letter in DEPTHS.get(kind, {"num_layers": "#b"}).items()}
    if kind == "HiDreamImage":
        config = config | {"num_routed_experts": 3}
        small = Size(small.name, {**small.widths, "n": 3}, {**small.blocks, "#c": 3 + 3 + 1}, small.features)
    if kind == "WanVACE":
        small = Size(small.name, small.widths, {**small.blocks, "#v": 2}, small.features)
    if kind == "Chroma":
        config = config | {"approximator_layers": 3}
    theirs = {key: tuple(tensor.shape) for key, tensor in meta(kind, config | depths).state_dict().items()}
    ours = known.parameters(small).items()
    start = "transformer."
    assert {key.removeprefix(start): shape for key, shape in ours if key.startswith(start)} == theirs


def test_every_size_of_every_family_is_compared() -> None:
    told = {(name, size) for name, size, _, _ in MODELS}
    assert {(known.name, size.name) for known in TRANSFORMERS for size in known.sizes} == told


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_have_these_blocks(name: str) -> None:
    assert all(size.blocks == PUBLISHED[name] for size in get(name).sizes)


TEXTS = [  # (kind, class of transformers, its configuration)
    ("clip_l", "CLIPText", {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}),
    ("clip_g", "CLIPText", {"hidden_size": 1280, "intermediate_size": 5120}),
    ("t5xxl", "T5", {"d_model": 4096, "d_ff": 10240, "num_heads": 64}),
    ("umt5xxl", "UMT5", {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "vocab_size": 256384}),
    ("gemma2_2b", "Gemma2", {}),
    ("qwen3_06b", "Qwen3", {"hidden_size": 1024, "intermediate_size": 3072}),
    ("qwen3_4b", "Qwen3", {"hidden_size": 2560, "intermediate_size": 9728}),
    ("qwen25_7b", "Qwen2", {"hidden_size": 3584, "intermediate_size": 18944}),
    ("llama", "Llama", {"intermediate_size": 14336, "vocab_size": 128256}),
    ("mistral3_24b", "Mistral", {"hidden_size": 5120, "intermediate_size": 32768}),
]
MORE = {
    "clip_g": {"num_attention_heads": 20, "projection_dim": 1280},
    "t5xxl": {"d_kv": 64, "feed_forward_proj": "gated-gelu"},
    "umt5xxl": {"d_kv": 64, "feed_forward_proj": "gated-gelu"},
    "qwen3_06b": {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "qwen3_4b": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "qwen25_7b": {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    "llama": {"num_key_value_heads": 8},
    "mistral3_24b": {"head_dim": 128, "vocab_size": 131072, "num_attention_heads": 32, "num_key_value_heads": 8},
}


def test_the_conditioner_of_anima_is_that_of_diffusers() -> None:
    torch = pytest.importorskip("torch")
    conditioners = pytest.importorskip("diffusers.models.condition_embedders.condition_embedder_anima")
    with torch.device("meta"):
        model = conditioners.AnimaTextConditioner()
    theirs = {f"text_conditioner.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = get("anima").parameters()
    assert {name: shape for name, shape in ours.items() if name.startswith("text_conditioner.")} == theirs


@pytest.mark.parametrize(("kind", "family", "config"), TEXTS, ids=[kind for kind, _, _ in TEXTS])
def test_the_text_encoders_are_those_of_transformers(kind: str, family: str, config: dict[str, object]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    encoder = next(e for known in TRANSFORMERS for e in known.encoders if e.size.name == kind)
    small = Size(kind, encoder.size.widths, {"#l": 2, "#p": 2 if kind == "umt5xxl" else 1}, encoder.size.features)
    ours = {
        name: line.shape(part, encoder.size.widths)
        for hit in encoder.table.modules(small)
        for line in (hit.line,)
        for name, part in zip(hit.references, line.parts, strict=True)
    }
    ends = {"T5": "EncoderModel", "UMT5": "EncoderModel", "CLIPText": "Model"}
    suffix = "ModelWithProjection" if kind == "clip_g" else ends.get(family, "Model")
    depth = {"num_layers" if "T5" in family else "num_hidden_layers": 2}
    made = getattr(transformers, f"{family}Config")(**config, **MORE.get(kind, {}), **depth)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}{suffix}")(made)
    theirs = {n.removesuffix(".weight"): tuple(t.shape) for n, t in model.state_dict().items() if n.endswith("weight")}
    theirs.pop("encoder.embed_tokens", None)  # tied
    bare = [
        {n.removeprefix("text_model.").removeprefix("model."): s for n, s in names.items()} for names in (ours, theirs)
    ]
    assert bare[0] == bare[1]


# --- names ---------------------------------------------------------------------------------------------


Modules = dict[str, tuple[Shape, tuple[Segment, ...]]]


def stored_modules(known: Transformer, world: str, shapes: Mapping[str, Shape]) -> Modules:
    """Shapes and segments of the modules of an adapter for all of these, in the names of a world."""
    found: Modules = {}
    for name, shape in shapes.items():
        stored = known.stored(name, world, shape)
        assert stored is not None, name
        if stored.name not in found:
            heights = stored.heights([shapes[segment.reference] for segment in stored.segments])
            assert heights is not None
            found[stored.name] = ((sum(heights), *shape[1:]), stored.segments)
    return found


@every
@pytest.mark.parametrize("world", WORLDS)
def test_every_module_is_read_back_from_every_world(known: Transformer, world: str) -> None:
    """Reference -> stored -> reference: each row comes back to where it was, once."""
    seen: dict[str, int] = {}
    small = few(known.sizes[0])
    shapes = known.shapes(small)
    for name, (shape, segments) in stored_modules(known, world, shapes).items():
        assert world != "kohya" or "." not in name
        edges, top = [], 0  # (first row, last row, reference, its first row) of each segment
        for reference, part, of in segments:
            rows = shapes[reference][0] // of
            edges.append((top, top + rows, reference, part * rows))
            top += rows
        for reference, ranges in known.pieces(name, shape):
            done = 0
            for start, stop in ranges:
                assert (start, stop, reference, done) in edges, name
                done += stop - start
            assert done == shapes[reference][0]
            seen[reference] = seen.get(reference, 0) + 1
    assert seen == dict.fromkeys(shapes, 1)


@every
def test_names_mean_one_thing(known: Transformer) -> None:
    """Tables are checked one-to-one when they are read."""
    assert known.table.read
    assert all(encoder.table.read for encoder in known.encoders)


@every
def test_the_places_in_a_single_file_fill_it(known: Transformer) -> None:
    """Every row of every tensor of a single file belongs to one reference parameter, and all of these are there."""
    slots = known.checkpoint()
    assert set(slots) == set(known.parameters())
    rows: dict[str, list[tuple[float, float]]] = {}
    for slot in slots.values():
        rows.setdefault(slot.tensor, []).extend((start / slot.of, stop / slot.of) for start, stop in slot.pieces)
    for tensor, pieces in rows.items():
        starts, stops = zip(*sorted(pieces), strict=True)
        assert starts == pytest.approx([0.0, *stops[:-1]]) and stops[-1] == 1, tensor


def alone(known: Transformer, world: str, size: Size | None = None) -> dict[str, Shape]:
    """The modules of the transformer itself, in the names of a world."""
    return {name: shape for name, (shape, _) in stored_modules(known, world, main_shapes(known, size)).items()}


@every
def test_single_files_are_identified(known: Transformer) -> None:
    """In every world's names, with or without a prefix, beside a VAE: one architecture, and the same places."""
    other = {"first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3), "vae.encoder.conv_in.weight": (4, 4, 3, 3)}
    for world in ("native", "comfy", "diffusers"):
        modules = {bare(name): shape for name, shape in alone(known, world).items()}
        for prefix in ("model.diffusion_model.", "diffusion_model.", "") if world == "native" else ("",):
            file = {f"{prefix}{name}.{parameter(known, name, shape)}": shape for name, shape in modules.items()} | other
            assert identify_checkpoint(file) is known, (world, prefix)
            places = {name.removesuffix(".weight"): slot for name, slot in known.checkpoint(file).items()}
            assert set(places) == set(main_shapes(known)), (world, prefix)
            assert all(slot.tensor in file for slot in places.values())


def bare(name: str) -> str:
    return name.removeprefix("transformer.").removeprefix("diffusion_model.")


def parameter(known: Transformer, name: str, shape: Shape) -> str:
    """What the stored parameter of a module is called."""
    hit = known.table.find(spelled(name).body, shape)
    assert hit is not None
    return hit.line.parameter


@every
def test_narrow_models_are_known_by_their_names(known: Transformer) -> None:
    """Any width and any number of blocks: for test models, distilled and pruned ones."""
    if known.name in ("chroma", "hunyuan-image-2.1"):
        pytest.skip("its blocks are those of another family")
    widths = {letter: 6 * 2**n for n, letter in enumerate(known.sizes[0].widths)}
    narrow = few(Size("narrow", widths, known.sizes[0].blocks, known.sizes[0].features))
    for world in WORLDS:
        shapes = alone(known, world, narrow)
        assert identify(shapes) is known, world
        assert identify_names(shapes) is known, world


@every
def test_adapters_are_identified(known: Transformer) -> None:
    """By everything, and by the attention alone: every size in one world's names, the first in all."""
    cases = [("kohya", size) for size in known.sizes] + [(world, known.sizes[0]) for world in WORLDS[1:]]
    for world, size in cases:
        modules = alone(known, world, size)
        assert identify(modules) is known, (world, size.name)
        attention = {name: shape for name, shape in modules.items() if "attn" in name or "attention" in name}
        if attention and known.name not in ("chroma", "flux2", "sana"):  # these share theirs with another family
            assert identify(attention) is known, (world, size.name)


# --- spellings -----------------------------------------------------------------------------------------

QKV = "transformer.transformer_blocks.3.attn.to_q"
FC1 = "text_model.encoder.layers.0.mlp.fc1"
SPELLINGS = [  # (architecture, name in a file, shape, what it means)
    ("flux", "lora_unet_double_blocks_3_img_attn_qkv", (9, 3), QKV),
    ("flux", "lora_unet_double_blocks_3_img_attn_qkv_", (9, 3), QKV),  # trap 33
    ("flux", "lora_unet__double_blocks_3_img_attn_qkv", (9, 3), QKV),  # trap 34
    ("flux", "lora_unet_diffusion_model_double_blocks_3_img_attn_qkv", (9, 3), QKV),
    ("flux", "oft_unet_double_blocks_3_img_attn_qkv", (9, 3), QKV),
    ("flux", "lora_transformer_transformer_blocks_3_attn_to_q", (3, 3), QKV),  # OneTrainer
    ("flux", "lycoris_transformer_blocks_3_attn_to_q", (3, 3), QKV),
    ("flux", "diffusion_model.double_blocks.3.img_attn.qkv", (9, 3), QKV),
    ("flux", "diffusion_model.diffusion_model.double_blocks.3.img_attn.qkv", (9, 3), QKV),  # trap 35
    ("flux", "transformer.transformer.transformer_blocks.3.attn.to_q", (3, 3), QKV),  # trap 35
    ("flux", "base_model.model.double_blocks.3.img_attn.qkv", (9, 3), QKV),
    ("flux", "base_model.model.base_model.model.double_blocks.3.img_attn.qkv", (9, 3), QKV),  # trap 35
    ("flux", "transformer.double_blocks.3.img_attn.qkv", (9, 3), QKV),  # trap 14
    ("flux", "double_blocks.3.img_attn.qkv", (9, 3), QKV),
    ("flux", "transformer_blocks.3.attn.to_q", (3, 3), QKV),
    ("flux", "diffusion_model.double_blocks.3.img_attn.norm.key_norm.scale", (3,), f"{QKV[:-4]}norm_k"),  # ComfyUI
    ("flux2", "sformer_blocks.3.attn.to_q", (3, 3), QKV),
    ("wan", "lora_unet__blocks_0_cross_attn_o", (3, 3), "transformer.blocks.0.attn2.to_out.0"),  # trap 34
    ("wan", "transformer_2.blocks.0.attn1.to_q", (3, 3), "transformer_2.blocks.0.attn1.to_q"),
    ("wan", "diffusion_model.blocks.0.norm3", (3,), "transformer.blocks.0.norm2"),
    ("hunyuan-video", "lora_unet_double_blocks_0_img_mlp_0", (8, 2), "transformer.transformer_blocks.0.ff.net.0.proj"),
    ("hunyuan-video", "Hunyuan_video_I2V_lora_double_blocks_3_img_attn_qkv", (9, 3), QKV),
    ("hunyuan-video", "double_blocks.0.img_mlp.fc1", (8, 2), "transformer.transformer_blocks.0.ff.net.0.proj"),
    (
        "hunyuan-video",
        "double_blocks.0.img_mod.lin",
        (12, 2),
        "transformer.transformer_blocks.0.norm1.linear",
    ),  # trap 58
    ("hunyuan-image-2.1", "double_blocks.0.img_attn_q", (2, 2), "transformer.transformer_blocks.0.attn.to_q"),
    ("z-image", "lora_unet_layers_0_attention_to_out_0", (3, 3), "transformer.layers.0.attention.to_out.0"),
    ("z-image", "diffusion_model.layers.0.attention.qkv", (9, 3), "transformer.layers.0.attention.to_q"),
    ("anima", "lora_unet_llm_adapter_blocks_0_mlp_0", (8, 2), "text_conditioner.blocks.0.mlp.0"),
    ("anima", "net.llm_adapter.blocks.0.mlp.0", (8, 2), "text_conditioner.blocks.0.mlp.0"),
    ("anima", "net.blocks.0.mlp.layer1", (8, 2), "transformer.transformer_blocks.0.ff.net.0.proj"),
    (
        "flux",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        (8, 2),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ),
    ("flux", "text_encoder.encoder.layers.0.mlp.fc1", (8, 2), "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
    ("flux", "clip_l.transformer.text_model.final_layer_norm", (2,), "text_encoder.text_model.final_layer_norm"),
    (
        "sd3",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
        (8, 2),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    ),
    ("lumina2", "lora_te_layers_0_self_attn_q_proj", (2, 2), "text_encoder.layers.0.self_attn.q_proj"),
    ("lumina2", "text_encoders.gemma2_2b.transformer.model.norm", (2,), "text_encoder.norm"),
    ("qwen-image", "text_encoder.language_model.norm", (2,), "text_encoder.model.norm"),
]


@pytest.mark.parametrize(("name", "spelling", "shape", "reference"), SPELLINGS)
def test_known_spellings_are_read(name: str, spelling: str, shape: Shape, reference: str) -> None:
    pieces = get(name).pieces(spelling, shape)
    assert pieces and pieces[0].reference == reference
    assert (get(name).resolve(spelling) == reference) == (len(pieces) == 1)


@pytest.mark.parametrize("prefix", ["lora_te2_", "lora_te3_", "text_encoder_2.", "text_encoders.t5xxl.transformer."])
def test_the_t5_of_flux_is_known_by_its_leaves(prefix: str) -> None:
    """diffusion trap 28: sd-scripts numbers it 3, OneTrainer 2."""
    name = "encoder.block.0.layer.0.SelfAttention.q"
    spelling = prefix + (flat(name) if prefix.startswith("lora") else name)
    assert get("flux").resolve(spelling) == f"text_encoder_2.{name}"
    assert get("flux").stored(f"text_encoder_2.{name}").name == f"lora_te3_{flat(name)}"
    assert get("chroma").resolve(f"lora_te1_{flat(name)}") == f"text_encoder.{name}"
    assert get("sd3").resolve(f"lora_te3_{flat(name)}") == f"text_encoder_3.{name}"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lora_unet_",
        "diffusion_model.",
        "lora_unet_double_blocks_x_img_attn_qkv",
        "lora_unet_double_blocks_007_img_attn_qkv",
        "lora_unet_double_blocks_" + "9" * 5000 + "_img_attn_qkv",
        "lora_unet_double_blocks_٣_img_attn_qkv",
        "lora_unet_double_blocks_3_img_mlp_1",
        "lora_unet_double_blocks_3",
        "lora_te1_double_blocks_3_img_attn_qkv",
        "unet." * 100_000,
        "base_model.model." * 8 + "double_blocks.3.img_attn.qkv",
        "first_stage_model.double_blocks.3.img_attn.qkv",
        "model.layers.0.self_attn.q_proj",
    ],
)
def test_other_names_mean_nothing(name: str) -> None:
    assert get("flux").pieces(name, (9, 3)) == ()
    assert get("flux").resolve(name) is None and not get("flux").knows(name)


def test_language_models_are_no_diffusion_models() -> None:
    """Names of the original Llama and Mistral share some with Lumina's."""
    llama = {
        f"layers.{n}.{leaf}": (64, 64) for n in range(4) for leaf in ("attention.wq", "attention.wo", "feed_forward.w1")
    }
    peft = {f"base_model.model.model.layers.{n}.self_attn.q_proj": (64, 64) for n in range(4)}
    gpt2 = {f"transformer.h.{n}.attn.c_attn": (64, 64) for n in range(4)}
    for modules in (llama, peft, gpt2, {}):
        assert identify(modules) is None and identify_names(modules) is None
        assert identify_checkpoint({f"{name}.weight": shape for name, shape in modules.items()}) is None


def test_biases_tell_a_family_too_and_narrow_models_are_of_the_first_that_fits() -> None:
    """A difference of a bias alone, as distilled adapters carry: its height is that of FLUX.1's fused projection."""
    proj = {"diffusion_model.double_blocks.0.img_attn.proj": (3072, 3072)}
    assert identify(proj | {"diffusion_model.single_blocks.0.linear1": (21504,)}) is get("flux")
    narrow = {"diffusion_model.double_blocks.0.img_attn.proj": (4, 4), "diffusion_model.single_blocks.0.linear1": (28,)}
    assert identify(narrow) is get("flux")


def test_metadata_decides_where_names_and_shapes_do_not() -> None:
    blocks = {f"lora_unet_double_blocks_{n}_img_attn_qkv": (9216, 3072) for n in range(5)}
    found = {hint: identify(blocks, hint) for hint in (None, "chroma", "flux2", "sd3", "nonsense")}
    names = {hint: known.name for hint, known in found.items() if known}
    assert names == {None: "flux2", "chroma": "chroma", "flux2": "flux2", "sd3": "flux2", "nonsense": "flux2"}
    t5 = {"lora_te3_encoder_block_0_layer_0_SelfAttention_q": (4096, 4096)}
    assert identify(t5) is None
    assert identify(t5, "sd3") is get("sd3") and identify(t5, "flux") is get("flux")
    assert identify(t5, "wan") is None


@pytest.mark.parametrize(
    ("strings", "name"),
    [
        ({"ss_base_model_version": "flux1"}, "flux"),
        ({"ss_base_model_version": "chroma"}, "chroma"),
        ({"ss_base_model_version": "hunyuan-image-2.1"}, "hunyuan-image-2.1"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux"),
        ({"modelspec.architecture": "stable-diffusion-3-m/lora"}, "sd3"),
        ({"ss_base_model_version": "None", "modelspec.architecture": "lumina-2/lora"}, "lumina2"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, None),
        ({}, None),
    ],
)
def test_what_metadata_tells(strings: dict[str, str], name: str | None) -> None:
    assert told(strings) == name


# --- rows ----------------------------------------------------------------------------------------------


def rows(name: str, module: str, shape: Shape) -> list[tuple[tuple[int, int], ...]]:
    return [piece.rows for piece in get(name).pieces(module, shape)]


def test_rows_of_fused_modules() -> None:
    """Widths come from the stored shape: thirds, what is as high as wide and the rest, or the usual proportions."""
    assert rows("flux", "double_blocks.0.img_attn.qkv", (12, 9)) == [((0, 4),), ((4, 8),), ((8, 12),)]
    linear1 = [((0, 3),), ((3, 6),), ((6, 9),), ((9, 29),)]
    assert rows("flux", "single_blocks.0.linear1", (29, 3)) == linear1  # another mlp ratio
    assert rows("flux", "single_blocks.0.linear1", (14,)) == [((0, 2),), ((2, 4),), ((4, 6),), ((6, 14),)]
    assert rows("lumina2", "layers.0.attention.qkv", (3840, 2304)) == [((0, 2304),), ((2304, 3072),), ((3072, 3840),)]
    assert rows("lumina2", "layers.0.attention.qkv", (10, 6)) == [((0, 6),), ((6, 8),), ((8, 10),)]  # trap 59
    assert rows("pixart", "blocks.0.cross_attn.kv_linear", (8, 4)) == [((0, 4),), ((4, 8),)]
    assert rows("qwen-image-2.1", "transformer_blocks.0.img_mlp.gate_up", (6, 1)) == [((0, 3),), ((3, 6),)]
    assert rows("flux2", "single_blocks.0.linear1", (27, 3)) == [((0, 27),)]  # fused in diffusers too
    assert rows("flux", "double_blocks.0.img_attn.qkv", (10, 9)) == []  # no thirds
    assert rows("flux", "single_blocks.0.linear1", (13,)) == []


def test_halves_are_swapped_where_the_original_has_shift_before_scale() -> None:
    """diffusion trap 11, and the context of the last block of SD3, whose modulation has two chunks."""
    for name in ("sd3", "flux", "flux2", "hunyuan-video", "hunyuan-image-2.1"):
        assert rows(name, "final_layer.adaLN_modulation.1", (6, 3)) == [((3, 6), (0, 3))]
    assert rows("auraflow", "modF.1", (6, 3)) == [((3, 6), (0, 3))]
    context = "joint_blocks.7.context_block.adaLN_modulation.1"
    assert rows("sd3", context, (6, 3)) == [((3, 6), (0, 3))]
    assert rows("sd3", context, (18, 3)) == [((0, 18),)]
    assert rows("sd3", context, ()) == rows("sd3", context, (6,)) == rows("sd3", context, (12, 3)) == []  # either
    assert get("sd3").resolve(context) is None and get("sd3").knows(context)
    linear = "transformer.transformer_blocks.7.norm1_context.linear"
    assert get("sd3").stored(linear) is None
    assert [len(get("sd3").stored(linear, "kohya", (n, 3)).segments) for n in (6, 18)] == [2, 1]
    assert rows("flux", "transformer.norm_out.linear", (6, 3)) == [((0, 6),)]  # diffusers' own order
    assert rows("flux", "final_layer.adaLN_modulation.1", (7, 3)) == []


def test_heights_of_what_an_adapter_lacks() -> None:
    """q and v alone: the rows of k are as many; an mlp alone tells those of q by its inputs, or by proportion."""
    place = get("lumina2").stored("transformer.layers.0.attn.to_k")
    assert place is not None and [s.reference.rpartition("_")[2] for s in place.segments] == ["q", "k", "v"]
    assert place.heights([(6, 6), None, (2, 6)]) == (6, 2, 2)
    assert place.heights([None, None, (2, 6)]) == (6, 2, 2)
    assert place.heights([None, (768,), None]) == (2304, 768, 768)
    single = get("flux").stored("transformer.single_transformer_blocks.0.proj_mlp")
    assert single is not None and single.heights([None, None, None, (8, 2)]) == (2, 2, 2, 8)
    assert single.heights([None] * 4) is None
    assert place.heights([(6, 6), (2, 6), (3, 6)]) == (6, 2, 3)  # what is there is as high as it is
    final = get("flux").stored("transformer.norm_out.linear", "comfy")
    assert final is not None and final.heights([(6, 3), (6, 3)]) == (3, 3)


def test_names_that_only_some_worlds_have() -> None:
    """ComfyUI names what is no weight by the parameter; the second of two transformers is told by diffusers alone."""
    flux, wan = get("flux"), get("wan")
    norm = "transformer.transformer_blocks.3.attn.norm_k"
    names = {world: flux.stored(norm, world).name for world in WORLDS}
    assert names["comfy"] == "diffusion_model.double_blocks.3.img_attn.norm.key_norm.scale"
    assert names["kohya"] == "lora_unet_double_blocks_3_img_attn_norm_key_norm"
    second = "transformer_2.blocks.0.attn1.to_q"
    assert {world for world in WORLDS if wan.stored(second, world)} == {"diffusers"}
    table = wan.stored("transformer.blocks.0.scale_shift_table", "comfy")
    assert table is not None and table.name == "diffusion_model.blocks.0.modulation"
    assert flux.stored("unet.conv_in") is None and flux.stored("transformer.nothing") is None
    assert flux.kohya().forward["transformer.proj_out"] == "lora_unet_final_layer_linear"
    assert "transformer.norm_out.linear" not in flux.kohya().forward  # its halves are swapped


# --- tables --------------------------------------------------------------------------------------------


def test_a_table_that_means_two_things_by_one_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' is both"):
        table("a b hxh\na c hxh").read  # noqa: B018
    assert table("a.#b.x b.#b.x 6hxh\na.#b.x ~b.#b.x 2hxh").read  # told apart by their proportions


@pytest.mark.parametrize("text", ["a b", "a b c d e", "{a,b} {c,d,e} hxh", "a {b,c} hxh,hxh,hxh"])
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"columns|go together"):
        table(text).lines  # noqa: B018


def test_braces_are_alternatives() -> None:
    assert expanded("a{1,2}.{x,y}") == ["a1.x", "a1.y", "a2.x", "a2.y"]
    assert expanded("plain") == ["plain"]


def test_tables_are_read_when_they_are_first_asked_for() -> None:
    broken = transformer("x", "X", table("no table"), (Size("x", {}),))
    assert broken.name == "x"
    with pytest.raises(ValueError, match="columns"):
        broken.modules()


HOSTILE: list[Shape] = [(), (0,), (1,), (7, 0), (0, 5), (13, 5), (2**62, 2**62), (2**70,), (1,) * 12]


@every
@pytest.mark.parametrize("shape", HOSTILE, ids=str)
def test_hostile_shapes_give_rows_that_are_there_or_none(known: Transformer, shape: Shape) -> None:
    """A damaged file never ends in a traceback: neither an adapter's module nor a tensor of a base."""
    names = [hit.native for hit in known.table.modules(few(known.sizes[0], 1))]
    for name in names:
        for piece in known.pieces(name, shape):
            assert all(0 <= start <= stop <= (shape[0] if shape else 1) for start, stop in piece.rows), name
    file = {f"{name}.{leaf}": shape for name in names for leaf in ("weight", "bias", "scale", "weight.weight")}
    for name, slot in known.checkpoint(file | dict.fromkeys(names, shape)).items():
        assert slot.shape(shape)[1:] == shape[1:], name
    identify_checkpoint(file)
    identify(dict.fromkeys(names, shape))
    for name in names[:20]:
        place = known.stored(f"transformer.{name}", "diffusers", shape)
        assert place is None or place.heights([shape] * len(place.segments)) is not None or not shape
