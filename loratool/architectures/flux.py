"""FLUX.1 and Chroma.

Names of black-forest-labs/flux (kohya-ss/sd-scripts and ComfyUI keep them) beside diffusers'; index arithmetic and
the swapped halves of the last modulation are those of diffusers' single-file converter.
"""

from __future__ import annotations

from loratool.architectures.encoders import encoder
from loratool.architectures.rows import Size, table
from loratool.architectures.transformer import transformer

_BLOCKS = """
img_in                                         x_embedder                                              hxc+
txt_in                                         context_embedder                                        hxt+
double_blocks.#d.img_attn.qkv                  transformer_blocks.#d.attn.{to_q,to_k,to_v}             hxh+
double_blocks.#d.txt_attn.qkv                  transformer_blocks.#d.attn.add_{q,k,v}_proj             hxh+
double_blocks.#d.{img,txt}_attn.proj           transformer_blocks.#d.attn.{to_out.0,to_add_out}        hxh+
double_blocks.#d.img_attn.norm.{query,key}_norm:scale   transformer_blocks.#d.attn.norm_{q,k}          d
double_blocks.#d.txt_attn.norm.{query,key}_norm:scale   transformer_blocks.#d.attn.norm_added_{q,k}    d
double_blocks.#d.{img,txt}_mlp.0               transformer_blocks.#d.{ff,ff_context}.net.0.proj        4hxh+
double_blocks.#d.{img,txt}_mlp.2               transformer_blocks.#d.{ff,ff_context}.net.2             hx4h+
single_blocks.#s.linear1   single_transformer_blocks.#s.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}   hxh,hxh,hxh,4hxh+
single_blocks.#s.linear2                       single_transformer_blocks.#s.proj_out                   hx5h+
single_blocks.#s.norm.{query,key}_norm:scale   single_transformer_blocks.#s.attn.norm_{q,k}            d
final_layer.linear                             proj_out                                                oxh+
"""
_MODULATIONS = """
double_blocks.#d.{img,txt}_mod.lin             transformer_blocks.#d.{norm1,norm1_context}.linear      6hxh+
single_blocks.#s.modulation.lin                single_transformer_blocks.#s.norm.linear                3hxh+
final_layer.adaLN_modulation.1                 ~norm_out.linear                                        2hxh+
time_in.in_layer                               time_text_embed.timestep_embedder.linear_1              hx256+
time_in.out_layer                              time_text_embed.timestep_embedder.linear_2              hxh+
vector_in.in_layer                             time_text_embed.text_embedder.linear_1                  hxp+
vector_in.out_layer                            time_text_embed.text_embedder.linear_2                  hxh+
guidance_in.in_layer                           time_text_embed.guidance_embedder.linear_1              hx256+  guidance
guidance_in.out_layer                          time_text_embed.guidance_embedder.linear_2              hxh+    guidance
"""
_APPROXIMATOR = """
=                                              distilled_guidance_layer.in_proj                        axc+
=                                              distilled_guidance_layer.out_proj                       hxa+
distilled_guidance_layer.layers.#l.in_layer    distilled_guidance_layer.layers.#l.linear_1             axa+
distilled_guidance_layer.layers.#l.out_layer   distilled_guidance_layer.layers.#l.linear_2             axa+
distilled_guidance_layer.norms.#l:scale        distilled_guidance_layer.norms.#l                       a
"""
_WIDTHS = {"h": 3072, "c": 64, "t": 4096, "d": 128, "o": 64, "p": 768, "a": 5120}
_COUNTS = {"#d": 19, "#s": 38}
_GUIDED = frozenset({"guidance"})

FLUX = transformer(
    "flux",
    "FLUX.1",
    table(_BLOCKS + _MODULATIONS),
    (
        Size("dev", _WIDTHS, _COUNTS, _GUIDED),
        Size("schnell", _WIDTHS, _COUNTS),
        Size("control", {**_WIDTHS, "c": 128}, _COUNTS, _GUIDED),
        Size("fill", {**_WIDTHS, "c": 384}, _COUNTS, _GUIDED),
    ),
    # the T5 is numbered 3 by sd-scripts (as in SD3), 2 by OneTrainer: its own names tell it from CLIP
    (encoder("text_encoder", "clip_l", "lora_te1_", "te"), encoder("text_encoder_2", "t5xxl", "lora_te3_", "te2")),
)
CHROMA = transformer(
    "chroma",
    "Chroma",
    table(_BLOCKS + _APPROXIMATOR),
    (Size("chroma", _WIDTHS, {**_COUNTS, "#l": 5}),),
    (encoder("text_encoder", "t5xxl", "lora_te1_", "te", "te3"),),
)
