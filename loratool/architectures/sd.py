"""Stable Diffusion 1.x, 2.x and XL base: one UNet, described by a few numbers, and CLIP text encoders.

Names of three worlds are kept side by side: diffusers (the reference), LDM/SGM (CompVis/stable-diffusion,
Stability-AI/generative-models: single files, and kohya's SDXL), and OpenCLIP (text encoders of 2.x and XL).
The index arithmetic is that of diffusers' single-file converter. Shapes are written one letter an axis:

    o out   i in   c width   f 4c   g 8c (GEGLU)   t time   x text   v vocabulary   p positions   1, 3 kernel
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, partial
from typing import NamedTuple

from loratool.architectures.base import Architecture, Row, Shape, Slot, flat, split

# diffusers, LDM, shape of the weight
_RESNET = (
    ("norm1", "in_layers.0", "i"),
    ("conv1", "in_layers.2", "oi33"),
    ("time_emb_proj", "emb_layers.1", "ot"),
    ("norm2", "out_layers.0", "o"),
    ("conv2", "out_layers.3", "oo33"),
    ("conv_shortcut", "skip_connection", "oi11"),  # only where the width changes
)
# The same in diffusers and LDM
_TRANSFORMER = (("norm", "c"), ("proj_in", "cc"), ("proj_out", "cc"))
_TRANSFORMER_BLOCK = (
    ("norm1", "c"),
    ("attn1.to_q", "cc"),
    ("attn1.to_k", "cc"),
    ("attn1.to_v", "cc"),
    ("attn1.to_out.0", "cc"),
    ("norm2", "c"),
    ("attn2.to_q", "cc"),
    ("attn2.to_k", "cx"),
    ("attn2.to_v", "cx"),
    ("attn2.to_out.0", "cc"),
    ("norm3", "c"),
    ("ff.net.0.proj", "gc"),
    ("ff.net.2", "cf"),
)
# transformers, OpenCLIP tensor ({} is weight or bias), shape of the weight
_CLIP_ENDS = (
    ("text_model.embeddings.token_embedding", "token_embedding.{}", "vc"),
    ("text_model.embeddings.position_embedding", "positional_embedding", "pc"),
    ("text_model.final_layer_norm", "ln_final.{}", "c"),
)
_CLIP_PROJECTION = ("text_projection", "text_projection", "cc")
_CLIP_LAYER = (
    ("self_attn.q_proj", "attn.in_proj_{}", "cc"),
    ("self_attn.k_proj", "attn.in_proj_{}", "cc"),
    ("self_attn.v_proj", "attn.in_proj_{}", "cc"),
    ("self_attn.out_proj", "attn.out_proj.{}", "cc"),
    ("layer_norm1", "ln_1.{}", "c"),
    ("layer_norm2", "ln_2.{}", "c"),
    ("mlp.fc1", "mlp.c_fc.{}", "fc"),
    ("mlp.fc2", "mlp.c_proj.{}", "cf"),
)
_QKV = ("q_proj", "k_proj", "v_proj")  # the row slices of OpenCLIP's in_proj
_WITHOUT_BIAS = {"to_q", "to_k", "to_v", "token_embedding", "position_embedding", "text_projection"}

_Names = Iterator[tuple[str, str, Shape]]  # reference, other name, shape of the weight


class UNet(NamedTuple):
    """A UNet2DConditionModel: widths and transformer depths by level (0: no attention), width of the text."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    text: int
    conv_projection: bool  # proj_in and proj_out are 1x1 convolutions
    vector: int = 0  # width of the additional conditioning

    @property
    def time(self) -> int:
        return 4 * self.widths[0]


class Clip(NamedTuple):
    """A CLIP text encoder and what its tensors begin with in a single file."""

    prefix: str
    width: int
    layers: int
    openclip: bool = False
    projection: bool = False


def _shape(letters: str, **axes: int) -> Shape:
    return tuple(int(letter) if letter.isdigit() else axes[letter] for letter in letters)


def _ends(unet: UNet) -> _Names:
    width, time = unet.widths[0], unet.time
    yield "conv_in", "input_blocks.0.0", (width, 4, 3, 3)
    yield "time_embedding.linear_1", "time_embed.0", (time, width)
    yield "time_embedding.linear_2", "time_embed.2", (time, time)
    if unet.vector:
        yield "add_embedding.linear_1", "label_emb.0.0", (time, unet.vector)
        yield "add_embedding.linear_2", "label_emb.0.2", (time, time)
    yield "conv_norm_out", "out.0", (width,)
    yield "conv_out", "out.2", (4, width, 3, 3)


def _resnet(unet: UNet, reference: str, ldm: str, given: int, width: int) -> _Names:
    rows = _RESNET if given != width else _RESNET[:-1]
    for leaf, ldm_leaf, letters in rows:
        yield f"{reference}.{leaf}", f"{ldm}.{ldm_leaf}", _shape(letters, i=given, o=width, t=unet.time)


def _transformer(unet: UNet, reference: str, ldm: str, width: int, depth: int) -> _Names:
    axes = {"c": width, "f": 4 * width, "g": 8 * width, "x": unet.text}
    for leaf, letters in _TRANSFORMER:
        kernel = "11" if unet.conv_projection and leaf != "norm" else ""
        yield f"{reference}.{leaf}", f"{ldm}.{leaf}", _shape(letters + kernel, **axes)
    for k in range(depth):
        for leaf, letters in _TRANSFORMER_BLOCK:
            path = f"transformer_blocks.{k}.{leaf}"
            yield f"{reference}.{path}", f"{ldm}.{path}", _shape(letters, **axes)


def _down(unet: UNet) -> _Names:
    given, last = unet.widths[0], len(unet.widths) - 1
    for b, (width, depth) in enumerate(zip(unet.widths, unet.depths, strict=True)):
        for j in range(2):
            block, ldm = f"down_blocks.{b}", f"input_blocks.{1 + 3 * b + j}"
            yield from _resnet(unet, f"{block}.resnets.{j}", f"{ldm}.0", given, width)
            if depth:
                yield from _transformer(unet, f"{block}.attentions.{j}", f"{ldm}.1", width, depth)
            given = width
        if b < last:
            yield (
                f"down_blocks.{b}.downsamplers.0.conv",
                f"input_blocks.{3 + 3 * b}.0.op",
                (width, width, 3, 3),
            )


def _mid(unet: UNet) -> _Names:
    width = unet.widths[-1]
    yield from _resnet(unet, "mid_block.resnets.0", "middle_block.0", width, width)
    yield from _transformer(unet, "mid_block.attentions.0", "middle_block.1", width, max(unet.depths))
    yield from _resnet(unet, "mid_block.resnets.1", "middle_block.2", width, width)


def _up(unet: UNet) -> _Names:
    given, last = unet.widths[-1], len(unet.widths) - 1
    # What the way down left behind: conv_in, then two resnets and a downsampler a level.
    skips = [unet.widths[0], *(width for width in unet.widths for _ in range(3))][:-1]
    for b, (width, depth) in enumerate(zip(unet.widths[::-1], unet.depths[::-1], strict=True)):
        for j in range(3):
            block, ldm = f"up_blocks.{b}", f"output_blocks.{3 * b + j}"
            yield from _resnet(unet, f"{block}.resnets.{j}", f"{ldm}.0", given + skips.pop(), width)
            if depth:
                yield from _transformer(unet, f"{block}.attentions.{j}", f"{ldm}.1", width, depth)
            given = width
        if b < last:  # it follows the attention, where there is one
            upsampler = f"output_blocks.{3 * b + 2}.{2 if depth else 1}.conv"
            yield f"up_blocks.{b}.upsamplers.0.conv", upsampler, (width, width, 3, 3)


def _clip(clip: Clip) -> _Names:
    axes = {"c": clip.width, "f": 4 * clip.width, "v": 49408, "p": 77}
    for name, tensor, letters in (*_CLIP_ENDS, _CLIP_PROJECTION) if clip.projection else _CLIP_ENDS:
        yield name, tensor, _shape(letters, **axes)
    for n in range(clip.layers):
        for leaf, tensor, letters in _CLIP_LAYER:
            layer, block = f"text_model.encoder.layers.{n}", f"transformer.resblocks.{n}"
            yield f"{layer}.{leaf}", f"{block}.{tensor}", _shape(letters, **axes)


def _clip_slot(clip: Clip, name: str, tensor: str, kind: str) -> Slot:
    if not clip.openclip:
        return Slot(f"{clip.prefix}{name}.{kind}")
    stored = clip.prefix + tensor.format(kind)
    leaf = name.rpartition(".")[2]
    if leaf in _QKV:
        part = _QKV.index(leaf)
        return Slot(stored, ((part, part + 1),), len(_QKV))
    return Slot(stored, transposed=leaf == "text_projection")


def _has_bias(name: str) -> bool:
    return name.rpartition(".")[2] not in _WITHOUT_BIAS


def _unet_rows(unet: UNet, ldm_body: bool) -> Iterator[Row]:
    for names in (_ends, _down, _mid, _up):
        for name, ldm, shape in names(unet):
            bodies = flat(name), flat(ldm)
            tensor = f"model.diffusion_model.{ldm}"
            bias = Slot(f"{tensor}.bias") if _has_bias(name) else None
            kohya = f"lora_unet_{bodies[ldm_body]}"
            yield Row(f"unet.{name}", kohya, bodies, shape, Slot(f"{tensor}.weight"), bias)


def _clip_rows(clip: Clip, component: str, kohya: str) -> Iterator[Row]:
    for name, tensor, shape in _clip(clip):
        weight = _clip_slot(clip, name, tensor, "weight")
        bias = _clip_slot(clip, name, tensor, "bias") if _has_bias(name) else None
        yield Row(f"{component}.{name}", f"{kohya}{flat(name)}", (flat(name),), shape, weight, bias)


def _rows(unet: UNet, *clips: Clip) -> Iterator[Row]:
    """All rows; with two text encoders kohya-ss/sd-scripts numbers them and uses LDM names for the UNet."""
    two = len(clips) == 2
    yield from _unet_rows(unet, ldm_body=two)
    for n, clip in enumerate(clips, 1):
        yield from _clip_rows(clip, _COMPONENTS[n], f"lora_te{n}_" if two else "lora_te_")


_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_WIDTHS = (320, 640, 1280, 1280)
_SD1 = partial(
    _rows,
    UNet(_WIDTHS, (1, 1, 1, 0), text=768, conv_projection=True),
    Clip("cond_stage_model.transformer.", 768, 12),
)
_SD2 = partial(  # OpenCLIP has 24 layers; the last is never used
    _rows,
    UNet(_WIDTHS, (1, 1, 1, 0), text=1024, conv_projection=False),
    Clip("cond_stage_model.model.", 1024, 23, openclip=True),
)
_SDXL = partial(
    _rows,
    UNet(_WIDTHS[:3], (0, 2, 10), text=2048, conv_projection=False, vector=2816),
    Clip("conditioner.embedders.0.transformer.", 768, 12),
    Clip("conditioner.embedders.1.model.", 1280, 32, openclip=True, projection=True),
)

# A container and its index, as in `down_blocks_0`. The numbers of `to_out_0` and `linear_1` are no indices.
_INDEX = r"(blocks|resnets|attentions|downsamplers|upsamplers|layers)_\d+(?=_)"


def _kind(body: str) -> str:
    return re.sub(_INDEX, r"\1_#", body)


@cache
def _samples() -> dict[tuple[str, str], str]:
    """One body with its dots for each kind of name, by component and by flattened body less its indices."""
    names = (name.partition(".")[::2] for name in SDXL.modules())
    return {(component, _kind(flat(body))): body for component, body in names}


def unflatten(name: str) -> str | None:
    """The reference name of a kohya name with diffusers body, of any UNet and CLIP of this family, or None.

    No architecture is needed: names of a kind have their dots in the same places, whatever the indices.
    """
    found = split(name)
    if found is None:
        return None
    component, body = found
    sample = _samples().get((component, _kind(body)))
    if sample is None:
        return None
    words = iter(body.split("_"))
    return f"{component}." + re.sub(r"[^._]+", lambda _: next(words), sample)


def flatten(reference: str, architecture: str | None = None) -> str:
    """The kohya name, with diffusers body, of a module of any UNet or CLIP of this family.

    ``architecture`` ("sdxl") only tells that the first text encoder is one of two. Raises ``ValueError`` for
    a component that has no kohya prefix.
    """
    component, _, body = reference.partition(".")
    first = "lora_te1_" if architecture == "sdxl" else "lora_te_"
    prefixes = dict(zip(_COMPONENTS, ("lora_unet_", first, "lora_te2_"), strict=True))
    if component not in prefixes or not body:
        raise ValueError(f"{reference!r} has no kohya name: it belongs to none of {', '.join(_COMPONENTS)}")
    return prefixes[component] + flat(body)


def targets(architecture: Architecture, conv: bool = False) -> tuple[str, ...]:
    """The modules that kohya-ss/sd-scripts trains unless told otherwise: attentions and text encoder layers.

    With ``conv``, also resnets, downsamplers and upsamplers (its ``conv_dim``).
    """
    inside = {"attentions", "self_attn", "mlp"}
    if conv:
        inside |= {"resnets", "downsamplers", "upsamplers"}
    shapes = architecture.shapes().items()
    return tuple(name for name, shape in shapes if len(shape) > 1 and not inside.isdisjoint(name.split(".")))


# UNet-only files drop the prefix or a part of it; old text encoders had no `text_model`.
_UNET_ALIASES = (("model.diffusion_model.", "diffusion_model."), ("model.diffusion_model.", ""))
_TEXT_ALIASES = (("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),)

SD1 = Architecture("sd1", "Stable Diffusion 1.x", _COMPONENTS[:2], _SD1, unflatten, _UNET_ALIASES + _TEXT_ALIASES)
SD2 = Architecture("sd2", "Stable Diffusion 2.x", _COMPONENTS[:2], _SD2, unflatten, _UNET_ALIASES)
SDXL = Architecture("sdxl", "Stable Diffusion XL base", _COMPONENTS, _SDXL, unflatten, _UNET_ALIASES)
