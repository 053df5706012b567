"""Names of original repositories against diffusers' converters: of single files, and of adapters.

Tensors hold numbers that tell which row of which tensor they were, so that equal values mean equal places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest

from loratool.architectures.base import Shape
from loratool.architectures.rows import Size
from loratool.architectures.transformer import Transformer
from tests.test_architectures_transformers import few, get, main_shapes, size_of

torch = pytest.importorskip("torch")

SINGLE_FILES = [  # (architecture, size, converter, prefix of the names, number of blocks)
    ("sd3", "3-medium", "sd3_transformer_checkpoint", "model.diffusion_model.", 3),
    ("sd3", "3.5-medium", "sd3_transformer_checkpoint", "", 3),
    ("flux", "dev", "flux_transformer_checkpoint", "model.diffusion_model.", 3),
    ("chroma", "chroma", "chroma_transformer_checkpoint", "", 3),
    ("flux2", "dev", "flux2_transformer_checkpoint", "", 3),
    ("wan", "i2v-14b", "wan_transformer", "model.diffusion_model.", 2),
    ("wan", "vace-14b", "wan_transformer", "", 2),
    ("z-image", "6b", "z_image_transformer_checkpoint", "model.diffusion_model.", 2),
    ("lumina2", "2b", "lumina2", "", 2),
    ("hunyuan-video", "t2v", "hunyuan_video_transformer", "", 2),
    ("ltx", "2b", "ltx_transformer_checkpoint", "model.diffusion_model.", 2),
    ("ltx2", "19b", "ltx2_transformer", "model.diffusion_model.", 2),
    ("hidream", "i1", "hidream_transformer", "model.diffusion_model.", 2),
    ("mochi", "10b", "mochi_transformer_checkpoint", "", 48),
    ("auraflow", "0.3", "auraflow_transformer_checkpoint", "", 2),
    ("sana", "1.6b", "sana_transformer", "", 2),
    ("anima", "2b", "cosmos_transformer_checkpoint", "net.", 2),
    ("krea2", "2", "krea2_transformer_checkpoint", "model.diffusion_model.", 2),
    ("flux3", "3", "flux3_transformer_checkpoint", "", 2),
    ("qwen-image", "20b", "", "", 2),
    ("qwen-image-2.1", "2.1", "qwen_image21_transformer_checkpoint", "model.diffusion_model.", 2),
]
UNUSED = {"sana": {"pos_embed": (1, 1), "y_embedder.y_embedding": (1, 1)}, "lumina2": {"norm_final.weight": (1,)}}


def single_file(known: Transformer, size: Size) -> dict[str, Shape]:
    """The tensors of a file of the original repository, bare, with their shapes."""
    found: dict[str, Shape] = {}
    for hit in known.table.modules(size):
        shape = hit.line.stored_shape(size.widths)
        found[hit.native + (hit.line.parameter and f".{hit.line.parameter}")] = shape
        if hit.line.bias:
            found[f"{hit.native}.bias"] = shape[:1]
    return found


@pytest.mark.parametrize(("name", "size", "converter", "prefix", "blocks"), SINGLE_FILES)
def test_single_files_are_what_diffusers_converts_them_to(name, size, converter, prefix, blocks) -> None:
    """Every parameter, every row, with fused rows and swapped halves (diffusion trap 11)."""
    single = pytest.importorskip("diffusers.loaders.single_file_utils")
    known = get(name)
    shapes = {prefix + n: shape for n, shape in single_file(known, few(size_of(known, size), blocks)).items()}
    tensors, top = {}, 0
    for key, shape in shapes.items():  # one column is enough to tell the rows
        tensors[key] = torch.arange(top, top + shape[0]).reshape(shape[0], *(1 for _ in shape[1:]))
        top += shape[0]
    converted = dict(tensors) | {key: torch.zeros(shape) for key, shape in UNUSED.get(name, {}).items()}
    if converter:
        converted = getattr(single, f"convert_{converter}_to_diffusers")(converted, config={})
    slots = {key.removeprefix("transformer."): slot for key, slot in known.checkpoint(shapes).items()}
    assert {key for key in converted if "scale_shift_table" not in key or key in slots} == set(slots)
    for key, slot in slots.items():
        stored, ranges = tensors[slot.tensor].flatten(), slot.ranges(shapes[slot.tensor][0])
        assert torch.equal(converted[key].flatten(), torch.cat([stored[start:stop] for start, stop in ranges])), key


# --- adapters ------------------------------------------------------------------------------------------

KOHYA, COMFY = ("kohya", "lora_down", "lora_up"), ("comfy", "lora_A", "lora_B")
ADAPTERS = [  # (architecture, size, converter, world and suffixes, modules that it does not take, blocks)
    ("flux", "dev", "kohya_flux", KOHYA, r"$^", 19),  # trap 12: some without prefix
    ("flux", "dev", "fal_kontext", ("native", "lora_A", "lora_B"), r"embed|norm_out", 38),
    ("flux2", "klein-4b", "kohya_flux2", KOHYA, r"norm_out|modulation", 2),
    ("flux2", "klein-4b", "non_diffusers_flux2", COMFY, r"norm_out", 2),
    ("wan", "14b", "musubi_wan", KOHYA, r"embed|proj_out$", 2),
    ("wan", "i2v-14b", "non_diffusers_wan", COMFY, r"image_embedder|proj_out$", 2),
    ("wan", "vace-14b", "non_diffusers_wan", COMFY, r"vace|embed|proj_out$", 2),
    ("qwen-image", "20b", "non_diffusers_qwen", KOHYA, "$^", 2),
    ("qwen-image", "20b", "non_diffusers_qwen", COMFY, "$^", 2),
    ("z-image", "6b", "non_diffusers_z_image", KOHYA, r"all_|embedder|adaLN", 2),
    ("lumina2", "2b", "non_diffusers_lumina2", COMFY, r"embed|norm_out", 2),
    ("hunyuan-video", "t2v", "hunyuan_video", ("native", "lora_A", "lora_B"), r"refiner_blocks.*to_[qkv]|norm_out", 2),
    ("hidream", "i1", "non_diffusers_hidream", COMFY, "$^", 2),
    ("ltx", "2b", "non_diffusers_ltxv", ("comfy-diffusers", "lora_A", "lora_B"), "$^", 2),
    ("ltx2", "19b", "non_diffusers_ltx2", COMFY, "$^", 2),
    ("ltx2", "2.3-22b", "non_diffusers_ltx2", COMFY, "$^", 2),
    ("anima", "2b", "non_diffusers_anima", COMFY, "$^", 2),
    ("krea2", "2", "non_diffusers_krea2", COMFY, "$^", 2),
    ("flux3", "3", "non_diffusers_flux3", COMFY, r"embed|modulations|norm_out|proj_out$", 2),
]


def adapter(known: Transformer, size: Size, world: str, but: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(up [o,2], down [2,i]) of every matrix, by its stored name, of a LoRA trained in that world."""
    rng, shapes, found = np.random.default_rng(0), main_shapes(known, size), {}
    for name, shape in shapes.items():
        if len(shape) != 2 or re.search(but, name):
            continue
        if world == "comfy-diffusers":
            heights, stored = (shape[0],), name.replace("transformer.", "diffusion_model.", 1)
        else:
            place = known.stored(name, world, shape)
            assert place is not None
            heights = place.heights([shapes.get(segment.reference) for segment in place.segments]) or ()
            stored = place.name
        if stored not in found:
            found[stored] = (rng.random((sum(heights), 2), np.float32), rng.random((2, shape[1]), np.float32))
    return found


@pytest.mark.parametrize(("name", "size", "converter", "world", "but", "blocks"), ADAPTERS)
def test_adapters_are_what_diffusers_converts_them_to(name, size, converter, world, but, blocks) -> None:
    """The update of each module, on a probe: fused modules split by their rows."""
    loaders = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    known = get(name)
    small = few(size_of(known, size), blocks)
    trained = adapter(known, small, world[0], but)
    tensors = {}
    for module, (up, down) in trained.items():
        prefix = "base_model.model." if converter == "fal_kontext" else ""
        tensors[f"{prefix}{module}.{world[1]}.weight"] = torch.from_numpy(down)
        tensors[f"{prefix}{module}.{world[2]}.weight"] = torch.from_numpy(up)
        if world is KOHYA:
            tensors[f"{module}.alpha"] = torch.tensor(2.0)
    theirs = updates(getattr(loaders, f"_convert_{converter}_lora_to_diffusers")(tensors))
    ours = {}
    for module, (up, down) in trained.items():
        pieces = known.pieces(module, (len(up), down.shape[1]))
        assert pieces, module
        for piece in pieces:
            ours[piece.reference] = (np.concatenate([up[a:b] for a, b in piece.rows]), down)
    assert {f"transformer.{key.removeprefix('transformer.')}" for key in theirs} == set(ours)
    for key, (up, down) in theirs.items():
        up2, down2 = ours[f"transformer.{key.removeprefix('transformer.')}"]
        probe = np.linspace(-1, 1, down.shape[1], dtype=np.float32)
        np.testing.assert_allclose(up @ (down @ probe), up2 @ (down2 @ probe), rtol=1e-4, atol=1e-4, err_msg=key)


def updates(tensors: Mapping[str, object]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for key in sorted(tensors):
        module = re.sub(r"\.lora_[AB]\.weight$", "", key)
        found.setdefault(module, []).append(np.asarray(tensors[key]))
    return {module: (up, down) for module, (down, up) in found.items()}
