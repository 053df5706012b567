"""Stable Diffusion 3 and 3.5.

Names of Stability-AI/sd3.5 (kohya-ss/sd-scripts and ComfyUI keep them) beside diffusers'; what is fused and swapped is
that of diffusers' single-file converter. Of the last block the context only lends keys and values: its modulation has
two chunks, not six, and these are swapped. 3.5 medium has a second attention in its first 13 blocks.
"""

from __future__ import annotations

from loratool.architectures.encoders import encoder
from loratool.architectures.rows import Size, table
from loratool.architectures.transformer import transformer

_TABLE = """
pos_embed:                                       pos_embed.pos_embed:                                   1xnxh
x_embedder.proj                                  pos_embed.proj                                         hxcx2x2+
=                                                context_embedder                                       hxt+
t_embedder.mlp.0                                 time_text_embed.timestep_embedder.linear_1             hx256+
t_embedder.mlp.2                                 time_text_embed.timestep_embedder.linear_2             hxh+
y_embedder.mlp.0                                 time_text_embed.text_embedder.linear_1                 hxp+
y_embedder.mlp.2                                 time_text_embed.text_embedder.linear_2                 hxh+
joint_blocks.#b.x_block.attn.qkv                 transformer_blocks.#b.attn.to_{q,k,v}                  hxh+
joint_blocks.#b.context_block.attn.qkv           transformer_blocks.#b.attn.add_{q,k,v}_proj            hxh+
joint_blocks.#b.x_block.attn.ln_{q,k}            transformer_blocks.#b.attn.norm_{q,k}                  64    norm
joint_blocks.#b.context_block.attn.ln_{q,k}      transformer_blocks.#b.attn.norm_added_{q,k}            64    norm
joint_blocks.#b.x_block.attn.proj                transformer_blocks.#b.attn.to_out.0                    hxh+
joint_blocks.#c.context_block.attn.proj          transformer_blocks.#c.attn.to_add_out                  hxh+
joint_blocks.#a.x_block.attn2.qkv                transformer_blocks.#a.attn2.to_{q,k,v}                 hxh+
joint_blocks.#a.x_block.attn2.ln_{q,k}           transformer_blocks.#a.attn2.norm_{q,k}                 64    norm
joint_blocks.#a.x_block.attn2.proj               transformer_blocks.#a.attn2.to_out.0                   hxh+
joint_blocks.#n.x_block.adaLN_modulation.1       transformer_blocks.#n.norm1.linear                     6hxh+
joint_blocks.#a.x_block.adaLN_modulation.1       transformer_blocks.#a.norm1.linear                     9hxh+
joint_blocks.#c.context_block.adaLN_modulation.1 transformer_blocks.#c.norm1_context.linear             6hxh+
joint_blocks.#l.context_block.adaLN_modulation.1 ~transformer_blocks.#l.norm1_context.linear            2hxh+
joint_blocks.#b.x_block.mlp.fc1                  transformer_blocks.#b.ff.net.0.proj                    4hxh+
joint_blocks.#b.x_block.mlp.fc2                  transformer_blocks.#b.ff.net.2                         hx4h+
joint_blocks.#c.context_block.mlp.fc1            transformer_blocks.#c.ff_context.net.0.proj            4hxh+
joint_blocks.#c.context_block.mlp.fc2            transformer_blocks.#c.ff_context.net.2                 hx4h+
final_layer.linear                               proj_out                                               64xh+
final_layer.adaLN_modulation.1                   ~norm_out.linear                                       2hxh+
"""


def size(name: str, depth: int, width: int, positions: int, attn2: int = 0, *features: str) -> Size:
    """A model of that many blocks; ``attn2`` of them have a second attention."""
    widths = {"h": width, "n": positions**2, "c": 16, "t": 4096, "p": 2048}
    blocks = {"#b": range(depth), "#c": range(depth - 1), "#l": range(depth - 1, depth)}
    return Size(name, widths, {**blocks, "#a": range(attn2), "#n": range(attn2, depth)}, frozenset(features))


SD3 = transformer(
    "sd3",
    "Stable Diffusion 3",
    table(_TABLE),
    (
        size("3-medium", 24, 1536, 192),
        size("3.5-large", 38, 2432, 192, 0, "norm"),
        size("3.5-medium", 24, 1536, 384, 13, "norm"),
    ),
    (
        encoder("text_encoder", "clip_l", "lora_te1_"),
        encoder("text_encoder_2", "clip_g", "lora_te2_"),
        encoder("text_encoder_3", "t5xxl", "lora_te3_"),
    ),
)
