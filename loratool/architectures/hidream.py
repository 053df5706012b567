"""HiDream-I1: diffusers' names are those of the original repository. Its experts are modules of their own."""

from __future__ import annotations

from loratool.architectures.encoders import encoder
from loratool.architectures.rows import Size, table
from loratool.architectures.transformer import transformer

_BLOCK = """
=   {0}.adaLN_modulation.1                    {1}hxh+
=   {0}.attn1.to_{{q,k,v,out}}                hxh+
=   {0}.attn1.{{q,k}}_rms_norm                h
=   {0}.ff_i.shared_experts.w{{1,3}}          sxh
=   {0}.ff_i.shared_experts.w2                hxs
=   {0}.ff_i.experts.#e.w{{1,3}}              fxh
=   {0}.ff_i.experts.#e.w2                    hxf
=   {0}.ff_i.gate                             nxh
"""
_TABLE = """
=   t_embedder.timestep_embedder.linear_1               hx256+
=   t_embedder.timestep_embedder.linear_2               hxh+
=   p_embedder.pooled_embedder.linear_1                 hxp+
=   p_embedder.pooled_embedder.linear_2                 hxh+
=   x_embedder.proj                                     hx64+
=   caption_projection.#c.linear                        hx4096
=   double_stream_blocks.#d.block.attn1.to_{q,k,v,out}_t    hxh+
=   double_stream_blocks.#d.block.attn1.{q,k}_rms_norm_t    h
=   double_stream_blocks.#d.block.ff_t.w{1,3}           fxh
=   double_stream_blocks.#d.block.ff_t.w2               hxf
=   final_layer.linear                                  64xh+
=   final_layer.adaLN_modulation.1                      2hxh+
"""

HIDREAM = transformer(
    "hidream",
    "HiDream-I1",
    table(
        _TABLE + _BLOCK.format("double_stream_blocks.#d.block", 12) + _BLOCK.format("single_stream_blocks.#s.block", 6)
    ),
    (
        Size(
            "i1",
            {"h": 2560, "s": 3584, "f": 6912, "p": 2048, "n": 4},
            {"#d": 16, "#s": 32, "#e": 4, "#c": 49},
        ),
    ),
    (
        encoder("text_encoder", "clip_l", "lora_te1_"),
        encoder("text_encoder_2", "clip_g", "lora_te2_"),
        encoder("text_encoder_3", "t5xxl", "lora_te3_"),
        encoder("text_encoder_4", "llama", "lora_te4_"),
    ),
)
