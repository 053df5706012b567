"""What is written, judged by diffusers: its loaders on tiny transformers, its converters on real widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratool.formats import by_name, detect
from loratool.formats.base import Evidence
from tests import diffusion
from tests.diffusion import factors, save

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.peer

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flux": (
        "FluxTransformer2DModel",
        "FluxPipeline",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (2, 2, 4),
            "guidance_embeds": True,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        "StableDiffusion3Pipeline",
        {
            "sample_size": 8,
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),  # else a narrow one has only names that FLUX has too
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        "WanPipeline",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
        },
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        "QwenImagePipeline",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        "Lumina2Pipeline",
        {
            "sample_size": 4,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "cap_feat_dim": 16,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (8, 8, 8),
        },
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        "ZImagePipeline",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [16, 16, 16],
        },
    ),
}


@pytest.mark.parametrize("family", MODELS)
def test_diffusers_loads_all_of_a_transformer_and_fuses_the_same_weights(family: str, tmp_path: Path) -> None:
    """Of all Linear layers, by way of kohya's fused names, with alphas in the metadata."""
    import diffusers

    kind, pipeline, config = MODELS[family]
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**config)
    linears = {name: m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    pairs = factors({f"transformer.{name}": tuple(weight.shape) for name, weight in linears.items()}, rank=2)
    source = read(save(tmp_path / "s", diffusion.diffusers(pairs) | {f"{n}.alpha": torch.tensor(1.0) for n in pairs}))
    assert source.metadata.architecture == family
    fused = read(written(source, tmp_path / "fused", "kohya"))
    path = written(fused, tmp_path / "lora.safetensors", "diffusers")
    loader = getattr(diffusers, pipeline)
    state, *_, metadata = loader.lora_state_dict(str(path), return_lora_metadata=True)
    tensors = diffusion.load(path)
    assert state.keys() == tensors.keys()
    model.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    found = {f"transformer.{n.replace('.default_0', '')}": t for n, t in model.state_dict().items() if ".lora_" in n}
    assert found.keys() == tensors.keys()
    before = {name: weight.detach().double().numpy() for name, weight in linears.items()}
    model.fuse_lora()
    for name, weight in before.items():
        fused_weight = model.get_submodule(name).get_base_layer().weight.detach().numpy()
        expected = weight + diffusion.delta(pairs[f"transformer.{name}"], 1.0)
        np.testing.assert_allclose(fused_weight, expected, atol=2e-6, err_msg=name)


FLUX = {  # one block of each sort, at the widths that diffusers' converters expect
    "transformer_blocks.0.attn.to_q": (3072, 3072),
    "transformer_blocks.0.attn.to_k": (3072, 3072),
    "transformer_blocks.0.attn.to_v": (3072, 3072),
    "transformer_blocks.0.attn.add_q_proj": (3072, 3072),
    "transformer_blocks.0.attn.add_k_proj": (3072, 3072),
    "transformer_blocks.0.attn.add_v_proj": (3072, 3072),
    "transformer_blocks.0.attn.to_out.0": (3072, 3072),
    "transformer_blocks.0.ff.net.2": (3072, 12288),
    "transformer_blocks.0.norm1.linear": (18432, 3072),
    "single_transformer_blocks.0.attn.to_q": (3072, 3072),
    "single_transformer_blocks.0.attn.to_k": (3072, 3072),
    "single_transformer_blocks.0.attn.to_v": (3072, 3072),
    "single_transformer_blocks.0.proj_mlp": (12288, 3072),
    "single_transformer_blocks.0.proj_out": (3072, 15360),
    "single_transformer_blocks.0.norm.linear": (9216, 3072),
}


def converted(pipeline: str, path: Path) -> dict[str, Any]:
    """What diffusers makes of a file: the product up @ down @ v of each module, by its name."""
    import diffusers

    state = getattr(diffusers, pipeline).lora_state_dict(str(path))
    names = {key.rpartition(".lora_")[0] for key in state}
    assert state.keys() == {f"{name}.lora_{x}.weight" for name in names for x in "AB"}
    return {name: acting(state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in names}


def acting(down: Any, up: Any, scaling: float = 1.0) -> np.ndarray:
    """up @ down @ v."""
    vector = torch.linspace(-1, 1, down.shape[1], dtype=torch.float64)
    product = scaling * up.double() @ (down.double() @ vector)
    return np.asarray(product.numpy())


def test_diffusers_own_converter_reads_what_is_written_of_flux(tmp_path: Path) -> None:
    pairs = factors({f"transformer.{name}": shape for name, shape in FLUX.items()}, rank=1)
    alphas = {f"{name}.alpha": torch.tensor(0.5) for name in pairs}
    source = read(save(tmp_path / "s", diffusion.diffusers(pairs) | alphas))
    found = converted("FluxPipeline", written(source, tmp_path / "lora.safetensors", "kohya"))
    assert found.keys() == pairs.keys()
    for name, (down, up) in pairs.items():
        np.testing.assert_allclose(found[name], acting(down, up, 0.5), atol=1e-4, err_msg=name)


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_diffusers_own_converters_read_what_is_written_of_qwen_image(to: str, tmp_path: Path) -> None:
    names = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "img_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1")
    shapes = {f"transformer.transformer_blocks.{n}.{name}": (8, 8) for n in (0, 7) for name in names}
    pairs = factors(shapes, rank=2)
    alphas = {f"{name}.alpha": torch.tensor(1.0) for name in pairs}
    source = read(save(tmp_path / "s", diffusion.diffusers(pairs) | alphas))
    found = converted("QwenImagePipeline", written(source, tmp_path / "lora.safetensors", to))
    assert found.keys() == pairs.keys()
    for name, (down, up) in pairs.items():
        np.testing.assert_allclose(found[name], acting(down, up, 0.5), atol=1e-5, err_msg=name)


def read(path: Path) -> Any:
    evidence = Evidence(path)
    return detect(evidence)[0].read(evidence)


def written(adapter: Any, path: Path, to: str) -> Path:
    """A file of an adapter of which nothing is lost."""
    assert not by_name(to).losses(adapter)
    by_name(to).write(adapter, path)
    return path
