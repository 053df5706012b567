"""FLUX.2 dev and klein.

Names of black-forest-labs/flux2 (kohya-ss/musubi-tuner and ComfyUI keep them) beside diffusers'. Its single blocks are
fused in diffusers too. The halves of the last modulation are swapped, as in diffusers' single-file converter; its LoRA
converter forgets that.
"""

from __future__ import annotations

from loratool.architectures.encoders import encoder
from loratool.architectures.rows import Size, table
from loratool.architectures.transformer import transformer

_TABLE = """
img_in                                         x_embedder                                              hxc
txt_in                                         context_embedder                                        hxt
time_in.in_layer                               time_guidance_embed.timestep_embedder.linear_1          hx256
time_in.out_layer                              time_guidance_embed.timestep_embedder.linear_2          hxh
guidance_in.in_layer                           time_guidance_embed.guidance_embedder.linear_1          hx256   guidance
guidance_in.out_layer                          time_guidance_embed.guidance_embedder.linear_2          hxh     guidance
double_stream_modulation_{img,txt}.lin         double_stream_modulation_{img,txt}.linear               6hxh
single_stream_modulation.lin                   single_stream_modulation.linear                         3hxh
double_blocks.#d.img_attn.qkv                  transformer_blocks.#d.attn.to_{q,k,v}                   hxh
double_blocks.#d.txt_attn.qkv                  transformer_blocks.#d.attn.add_{q,k,v}_proj             hxh
double_blocks.#d.{img,txt}_attn.proj           transformer_blocks.#d.attn.{to_out.0,to_add_out}        hxh
double_blocks.#d.img_attn.norm.{query,key}_norm:scale   transformer_blocks.#d.attn.norm_{q,k}          d
double_blocks.#d.txt_attn.norm.{query,key}_norm:scale   transformer_blocks.#d.attn.norm_added_{q,k}    d
double_blocks.#d.{img,txt}_mlp.0               transformer_blocks.#d.{ff,ff_context}.linear_in         6hxh
double_blocks.#d.{img,txt}_mlp.2               transformer_blocks.#d.{ff,ff_context}.linear_out        hx3h
single_blocks.#s.linear1                       single_transformer_blocks.#s.attn.to_qkv_mlp_proj       9hxh
single_blocks.#s.linear2                       single_transformer_blocks.#s.attn.to_out                hx4h
single_blocks.#s.norm.{query,key}_norm:scale   single_transformer_blocks.#s.attn.norm_{q,k}            d
final_layer.adaLN_modulation.1                 ~norm_out.linear                                        2hxh
final_layer.linear                             proj_out                                                oxh
"""


def size(name: str, h: int, t: int, double: int, single: int, *features: str) -> Size:
    """A model of width h for texts of width t, with its numbers of blocks."""
    return Size(name, {"h": h, "c": 128, "t": t, "d": 128, "o": 128}, {"#d": double, "#s": single}, frozenset(features))


FLUX2 = transformer(
    "flux2",
    "FLUX.2",
    table(_TABLE),
    (
        size("dev", 6144, 15360, 8, 48, "guidance"),
        size("klein-4b", 3072, 7680, 5, 20),
        size("klein-9b", 4096, 12288, 8, 24),
    ),
    (encoder("text_encoder", "mistral3_24b", "lora_te_", "te1", "qwen3_4b", "qwen3_8b"),),
)
