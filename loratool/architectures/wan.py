"""Wan 2.1 and 2.2: text and image to video, VACE.

Names of Wan-Video/Wan2.1 (kohya-ss/musubi-tuner and ComfyUI keep them) beside diffusers', as its single-file converter
has them. Nothing is fused. Wan 2.2 A14B has two transformers of one kind, with an adapter each.
"""

from __future__ import annotations

from loratool.architectures.encoders import encoder
from loratool.architectures.rows import Size, table
from loratool.architectures.transformer import transformer

_BLOCK = """
{0}blocks.{1}.modulation:                    {0}blocks.{1}.scale_shift_table:                          1x6xh
{0}blocks.{1}.self_attn.{{q,k,v,o}}          {0}blocks.{1}.attn1.{{to_q,to_k,to_v,to_out.0}}           hxh+
{0}blocks.{1}.self_attn.norm_{{q,k}}         {0}blocks.{1}.attn1.norm_{{q,k}}                          h
{0}blocks.{1}.cross_attn.{{q,k,v,o}}         {0}blocks.{1}.attn2.{{to_q,to_k,to_v,to_out.0}}           hxh+
{0}blocks.{1}.cross_attn.norm_{{q,k}}        {0}blocks.{1}.attn2.norm_{{q,k}}                          h
{0}blocks.{1}.cross_attn.{{k,v}}_img   {0}blocks.{1}.attn2.add_{{k,v}}_proj   hxh+   image
{0}blocks.{1}.cross_attn.norm_k_img   {0}blocks.{1}.attn2.norm_added_k   h   image
{0}blocks.{1}.norm3                          {0}blocks.{1}.norm2                                       h+
{0}blocks.{1}.ffn.0                          {0}blocks.{1}.ffn.net.0.proj                              fxh+
{0}blocks.{1}.ffn.2                          {0}blocks.{1}.ffn.net.2                                   hxf+
"""
_ENDS = """
=                                            patch_embedding                                           hxcx1x2x2+
time_embedding.0                             condition_embedder.time_embedder.linear_1                 hx256+
time_embedding.2                             condition_embedder.time_embedder.linear_2                 hxh+
time_projection.1                            condition_embedder.time_proj                              6hxh+
text_embedding.0                             condition_embedder.text_embedder.linear_1                 hx4096+
text_embedding.2                             condition_embedder.text_embedder.linear_2                 hxh+
img_emb.proj.0   condition_embedder.image_embedder.norm1   1280+   image
img_emb.proj.1   condition_embedder.image_embedder.ff.net.0.proj   1280x1280+   image
img_emb.proj.3   condition_embedder.image_embedder.ff.net.2   hx1280+   image
img_emb.proj.4   condition_embedder.image_embedder.norm2   h+   image
img_emb.emb_pos:                             condition_embedder.image_embedder.pos_embed:              1x514x1280   ends
head.modulation:                             scale_shift_table:                                        1x2xh
head.head                                    proj_out                                                  oxh+
=                                            vace_patch_embedding                                      hx96x1x2x2+  vace
vace_blocks.#w.before_proj                   vace_blocks.#w.proj_in                                    hxh+         vace
vace_blocks.#v.after_proj                    vace_blocks.#v.proj_out                                   hxh+         vace
"""


def size(name: str, depth: int, h: int, f: int, c: int = 16, o: int = 64, vace: int = 0, *features: str) -> Size:
    """A model of that many blocks: widths h of all, f inside; channels c in, o out; ``vace`` control blocks."""
    more = frozenset((*features, "vace")) if vace else frozenset(features)
    return Size(name, {"h": h, "f": f, "c": c, "o": o}, {"#b": depth, "#v": vace, "#w": min(vace, 1)}, more)


WAN = transformer(
    "wan",
    "Wan",
    table(_BLOCK.format("", "#b") + _ENDS + _BLOCK.format("vace_", "#v")),
    (
        size("14b", 40, 5120, 13824),
        size("1.3b", 30, 1536, 8960),
        size("2.2-5b", 30, 3072, 14336, 48, 192),
        size("i2v-14b", 40, 5120, 13824, 36, 64, 0, "image"),
        size("flf2v-14b", 40, 5120, 13824, 36, 64, 0, "image", "ends"),
        size("2.2-i2v-14b", 40, 5120, 13824, 36),
        size("vace-14b", 40, 5120, 13824, 16, 64, 8),
        size("vace-1.3b", 30, 1536, 8960, 16, 64, 15),
    ),
    (encoder("text_encoder", "umt5xxl", "lora_te_", "te1", "t5xxl"),),
)
