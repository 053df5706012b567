"""Lumina Image 2.0 and Z-Image.

Alpha-VLLM/Lumina-Image-2.0 and ComfyUI fuse queries, keys and values (in Lumina, keys and values are fewer); diffusers
does not, nor does Tongyi-MAI/Z-Image, after whose names kohya-ss/musubi-tuner trains. Converters: diffusers'.
"""

from __future__ import annotations

from loratool.architectures.encoders import encoder
from loratool.architectures.rows import Size, table
from loratool.architectures.transformer import transformer

_LUMINA_BLOCK = """
{0}.attention.qkv                   {0}.attn.to_{{q,k,v}}                                hxh,gxh,gxh
{0}.attention.out                   {0}.attn.to_out.0                                    hxh
{0}.attention.{{q,k}}_norm          {0}.attn.norm_{{q,k}}                                d
{0}.feed_forward.w{{1,3}}           {0}.feed_forward.linear_{{1,3}}                      fxh
{0}.feed_forward.w2                 {0}.feed_forward.linear_2                            hxf
{0}.attention_norm1                 {0}.{1}                                              h
{0}.attention_norm2                 {0}.norm2                                            h
=                                   {0}.ffn_norm{{1,2}}                                  h
"""
_LUMINA = """
=                                   x_embedder                                           hx64+
t_embedder.mlp.0                    time_caption_embed.timestep_embedder.linear_1        tx256+
t_embedder.mlp.2                    time_caption_embed.timestep_embedder.linear_2        txt+
cap_embedder.0                      time_caption_embed.caption_embedder.0                c
cap_embedder.1                      time_caption_embed.caption_embedder.1                hxc+
layers.#b.adaLN_modulation.1        layers.#b.norm1.linear                               4hxt+
noise_refiner.#r.adaLN_modulation.1 noise_refiner.#r.norm1.linear                        4hxt+
final_layer.adaLN_modulation.1      norm_out.linear_1                                    hxt+
final_layer.linear                  norm_out.linear_2                                    64xh+
"""
_Z_BLOCK = """
{0}.attention.qkv                   {0}.attention.to_{{q,k,v}}                           hxh
{0}.attention.out                   {0}.attention.to_out.0                               hxh
{0}.attention.{{q,k}}_norm          {0}.attention.norm_{{q,k}}                           d
=                                   {0}.feed_forward.w{{1,3}}                            fxh
=                                   {0}.feed_forward.w2                                  hxf
=                                   {0}.attention_norm{{1,2}}                            h
=                                   {0}.ffn_norm{{1,2}}                                  h
"""
_Z = """
x_embedder                          all_x_embedder.2-1                                   hx64+
=                                   t_embedder.mlp.0                                     1024x256+
=                                   t_embedder.mlp.2                                     256x1024+
=                                   cap_embedder.0                                       c
=                                   cap_embedder.1                                       hxc+
=                                   {x,cap}_pad_token:                                   1xh
=                                   layers.#b.adaLN_modulation.0                         4hx256+
=                                   noise_refiner.#r.adaLN_modulation.0                  4hx256+
final_layer.adaLN_modulation.1      all_final_layer.2-1.adaLN_modulation.1               hx256+
final_layer.linear                  all_final_layer.2-1.linear                           64xh+
"""


def _blocks(block: str, *places: tuple[str, str]) -> str:
    return "".join(block.format(*place) for place in places)


LUMINA2 = transformer(
    "lumina2",
    "Lumina Image 2.0",
    table(
        _LUMINA
        + _blocks(
            _LUMINA_BLOCK,
            ("layers.#b", "norm1.norm"),
            ("noise_refiner.#r", "norm1.norm"),
            ("context_refiner.#r", "norm1"),  # of the text: not modulated
        )
    ),
    (Size("2b", {"h": 2304, "g": 768, "f": 9216, "t": 1024, "c": 2304, "d": 96}, {"#b": 26, "#r": 2}),),
    (encoder("text_encoder", "gemma2_2b", "lora_te_", "te1"),),
)
Z_IMAGE = transformer(
    "z-image",
    "Z-Image",
    table(_Z + _blocks(_Z_BLOCK, ("layers.#b", ""), ("noise_refiner.#r", ""), ("context_refiner.#r", ""))),
    (Size("6b", {"h": 3840, "f": 10240, "c": 2560, "d": 128}, {"#b": 30, "#r": 2}),),
    (encoder("text_encoder", "qwen3_4b", "lora_te_", "te1"),),
    flattened="diffusers",
)
