"""Qwen-Image, its Edit and Layered models, and 2.1.

The original repository's names are diffusers'; kohya-ss/musubi-tuner flattens them. ComfyUI fuses the two halves of
2.1's mlp, the gate first, as diffusers' single-file converter has it.
"""

from __future__ import annotations

from loratool.architectures.encoders import encoder
from loratool.architectures.rows import Size, table
from loratool.architectures.transformer import transformer

_TABLE = """
=   img_in                                                      hxc+
=   txt_norm                                                    t
=   txt_in                                                      hxt+
=   time_text_embed.timestep_embedder.linear_1                  hx256+
=   time_text_embed.timestep_embedder.linear_2                  hxh+
=   time_text_embed.addition_t_embedding                        2xh     layered
=   transformer_blocks.#b.{img,txt}_mod.1                       6hxh+
=   transformer_blocks.#b.attn.to_{q,k,v}                       hxh+
=   transformer_blocks.#b.attn.add_{q,k,v}_proj                 hxh+
=   transformer_blocks.#b.attn.{to_out.0,to_add_out}            hxh+
=   transformer_blocks.#b.attn.norm_{q,k,added_q,added_k}       d
=   transformer_blocks.#b.{img,txt}_mlp.net.0.proj              4hxh+
=   transformer_blocks.#b.{img,txt}_mlp.net.2                   hx4h+
=   norm_out.linear                                             2hxh+
=   proj_out                                                    oxh+
"""
_WIDTHS = {"h": 3072, "c": 64, "t": 3584, "d": 128, "o": 64}

QWEN_IMAGE = transformer(
    "qwen-image",
    "Qwen-Image",
    table(_TABLE),
    (Size("20b", _WIDTHS, {"#b": 60}), Size("layered", _WIDTHS, {"#b": 60}, frozenset({"layered"}))),
    (encoder("text_encoder", "qwen25_7b", "lora_te_", "te1"),),
)
QWEN_IMAGE_21 = transformer(
    "qwen-image-2.1",
    "Qwen-Image 2.1",
    table(
        """
=   img_in                                      hxc
=   txt_in.text_norm                            t
=   txt_in.in_layer                             hxt
=   txt_in.out_layer                            hxh
=   time_text_embed.timestep_embedder.linear_1  hx256
=   time_text_embed.timestep_embedder.linear_2  hxh
=   modulation.1                                4hxh
=   transformer_blocks.#b.attn.to_{q,k,v}       hxh
=   transformer_blocks.#b.attn.to_out.0         hxh
=   transformer_blocks.#b.attn.norm_{q,k}       d
=   transformer_blocks.#b.img_mlp.gate_layer    3hxh
=   transformer_blocks.#b.img_mlp.proj          3hxh
=   transformer_blocks.#b.img_mlp.out           hx3h
=   norm_out.linear                             hxh
=   proj_out                                    cxh
""",
        comfy="transformer_blocks.#b.img_mlp.gate_up   transformer_blocks.#b.img_mlp.{gate_layer,proj}",
    ),
    (Size("2.1", {"h": 4096, "c": 64, "t": 4096, "d": 128}, {"#b": 32}),),
)
