"""Adapter files of diffusion models, made for tests without loratool: names and shapes come from diffusers' models.

`layers("sd1")` are the modules of a model by reference name, with their shapes; `factors` makes LoRA factors for
them, `kohya` and `diffusers` put these under the names of a format, `save` writes a file as safetensors does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from loratool.adapter import Adapter
from loratool.formats.base import Evidence

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Pairs = dict[str, tuple["Tensor", "Tensor"]]  # module -> (down, up)

_CROSS = {False: ("DownBlock2D", "UpBlock2D"), True: ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")}


def unet_config(widths: tuple[int, ...], depths: tuple[int, ...], **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": tuple(_CROSS[depth > 0][0] for depth in depths),
        "up_block_types": tuple(_CROSS[depth > 0][1] for depth in reversed(depths)),
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in depths),
        **more,
    }


UNETS = {
    "sd1": unet_config((320, 640, 1280, 1280), (1, 1, 1, 0), cross_attention_dim=768),
    "sd2": unet_config((320, 640, 1280, 1280), (1, 1, 1, 0), cross_attention_dim=1024, use_linear_projection=True),
    "sdxl": unet_config(
        (320, 640, 1280),
        (0, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "tiny": unet_config((8, 8, 16, 16), (1, 1, 1, 0), cross_attention_dim=16, norm_num_groups=4),
}
CLIPS = {  # component, width, layers
    "sd1": (("text_encoder", 768, 12),),
    "sd2": (("text_encoder", 1024, 23),),
    "sdxl": (("text_encoder", 768, 12), ("text_encoder_2", 1280, 32)),
    "tiny": (("text_encoder", 16, 2),),
}
CLIP_LAYER = {f"self_attn.{p}_proj": (1, 1) for p in ("q", "k", "v", "out")} | {"mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}


@cache
def layers(model: str, conv: bool = False) -> Mapping[str, Shape]:
    """What sd-scripts adapts of a model (with ``conv`` also its 3x3 convolutions): reference name -> shape."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[model])
    found = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and ("attentions" in name or conv):
            found[f"unet.{name}"] = tuple(module.weight.shape)
    for component, width, count in CLIPS[model]:
        for n in range(count):
            for leaf, (out, given) in CLIP_LAYER.items():
                name = f"{component}.text_model.encoder.layers.{n}.{leaf}"
                found[name] = (out * width, given * width)
    return found


def factors(shapes: Mapping[str, Shape], rank: int = 2, dtype: str = "float32") -> Pairs:
    """Random factors: down [r,i,*k], up [o,r,*1]; the update is about a tenth of a usual weight."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found = {}
    for name, (out, *rest) in shapes.items():
        down = noise(rank, *rest) * float(np.prod(rest)) ** -0.5
        up = 0.1 * noise(out, rank, *(1 for _ in rest[1:]))
        found[name] = (down.to(getattr(torch, dtype)), up.to(getattr(torch, dtype)))
    return found


def flat(name: str) -> str:
    """The kohya name with diffusers body, of a model with one text encoder."""
    component, _, body = name.partition(".")
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}[component]
    return f"{prefix}_{body.replace('.', '_')}"


def kohya(pairs: Pairs, names: Mapping[str, str] | None = None, alpha: float | None = 1.0) -> dict[str, Tensor]:
    """The tensors of a kohya file; ``names`` where flattening the reference name is not enough."""
    import torch

    tensors = {}
    for name, (down, up) in pairs.items():
        module = names[name] if names else flat(name)
        tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"] = down, up
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


def diffusers(pairs: Pairs) -> dict[str, Tensor]:
    """The tensors of a diffusers file."""
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
    return tensors


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    from safetensors.torch import save_file

    held = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(held, path, dict(metadata or {}) or None)
    return path


def load(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def read(format: ModuleType, path: Path, **options: Any) -> Adapter:
    found: Adapter = format.FORMAT.read(Evidence(path, **options))
    return found


def write(format: ModuleType, adapter: Adapter, path: Path) -> Path:
    """Writes an adapter of which nothing is lost."""
    assert not format.FORMAT.losses(adapter)
    format.FORMAT.write(adapter, path)
    return path


def delta(pair: tuple[Tensor, Tensor], alpha: float | None = None) -> np.ndarray:
    """alpha / r x up @ down in float64, of the weight's shape."""
    down, up = (factor.double() for factor in pair)
    scaling = 1.0 if alpha is None else alpha / len(down)
    product = scaling * up.flatten(1) @ down.flatten(1)
    return product.reshape(len(up), *down.shape[1:]).numpy()


def same(one: Adapter, other: Adapter, names: Iterable[str] | None = None) -> None:
    """Asserts that two adapters change the same modules in the same way."""
    assert one.updates.keys() == other.updates.keys()
    for name in names or one.updates:
        base = np.random.default_rng(0).normal(size=one.updates[name].shape)
        first, second = one.updates[name].apply(base), other.updates[name].apply(base)
        np.testing.assert_allclose(second, first, rtol=0, atol=1e-6, err_msg=name)
