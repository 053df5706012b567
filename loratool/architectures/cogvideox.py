"""CogVideoX, under diffusers' names: those of all its trainers."""

from __future__ import annotations

from loratool.architectures.encoders import encoder
from loratool.architectures.rows import Size, table
from loratool.architectures.transformer import transformer

_TABLE = """
=   patch_embed.proj                              hxcx2x2+     flat
=   patch_embed.proj                              hx8c+        deep
=   patch_embed.text_proj                         hxt+
=   patch_embed.pos_embedding:                    1x17776xh    learned
=   time_embedding.linear_1                       exh+
=   time_embedding.linear_2                       exe+
=   ofs_embedding.linear_{1,2}                    exe+         offsets
=   transformer_blocks.#b.norm{1,2}.linear        6hxe+
=   transformer_blocks.#b.norm{1,2}.norm          h+
=   transformer_blocks.#b.attn1.norm_{q,k}        64+
=   transformer_blocks.#b.attn1.to_{q,k,v}        hxh+
=   transformer_blocks.#b.attn1.to_out.0          hxh+
=   transformer_blocks.#b.ff.net.0.proj           4hxh+
=   transformer_blocks.#b.ff.net.2                hx4h+
=   norm_final                                    h+
=   norm_out.linear                               2hxe+
=   norm_out.norm                                 h+
=   proj_out                                      oxh+
"""


def _size(name: str, depth: int, h: int, c: int, o: int, *features: str) -> Size:
    return Size(name, {"h": h, "e": 512, "t": 4096, "c": c, "o": o}, {"#b": depth}, frozenset(features))


COGVIDEOX = transformer(
    "cogvideox",
    "CogVideoX",
    table(_TABLE),
    (
        _size("2b", 30, 1920, 16, 64, "flat"),
        _size("5b", 42, 3072, 16, 64, "flat"),
        _size("5b-i2v", 42, 3072, 32, 64, "flat", "learned"),
        _size("1.5-5b", 42, 3072, 16, 128, "deep"),
        _size("1.5-5b-i2v", 42, 3072, 32, 128, "deep", "offsets"),
    ),
    (encoder("text_encoder", "t5xxl", "lora_te_", "te1", "te3"),),
)
