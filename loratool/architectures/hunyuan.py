"""HunyuanVideo 1.0 and 1.5, HunyuanImage 2.1.

Names of Tencent-Hunyuan (kohya-ss's trainers keep them) and ComfyUI's, which are nearer to those of FLUX, beside
diffusers'. The converter of diffusers has the first; its scripts the others. Of the refiner's last modulation (shift,
scale) no halves are swapped, unlike those of the final layer.
"""

from __future__ import annotations

from loratool.architectures.encoders import encoder
from loratool.architectures.rows import Size, table
from loratool.architectures.transformer import transformer

_REFINER, _TOKENS = "txt_in.individual_token_refiner.blocks.#r", "context_embedder.token_refiner.refiner_blocks.#r"
_TEXT = f"""
txt_in.t_embedder.mlp.0             context_embedder.time_text_embed.timestep_embedder.linear_1   hx256+
txt_in.t_embedder.mlp.2             context_embedder.time_text_embed.timestep_embedder.linear_2   hxh+
txt_in.c_embedder.linear_1          context_embedder.time_text_embed.text_embedder.linear_1       hxt+
txt_in.c_embedder.linear_2          context_embedder.time_text_embed.text_embedder.linear_2       hxh+
txt_in.input_embedder               context_embedder.proj_in                                      hxt+
{_REFINER}.norm{{1,2}}              {_TOKENS}.norm{{1,2}}                                         h+
{_REFINER}.self_attn_qkv            {_TOKENS}.attn.to_{{q,k,v}}                                   hxh+
{_REFINER}.self_attn_proj           {_TOKENS}.attn.to_out.0                                       hxh+
{_REFINER}.mlp.fc1                  {_TOKENS}.ff.net.0.proj                                       4hxh+
{_REFINER}.mlp.fc2                  {_TOKENS}.ff.net.2                                            hx4h+
{_REFINER}.adaLN_modulation.1       {_TOKENS}.norm_out.linear                                     2hxh+
"""
_COMFY_TEXT = f"""
txt_in.t_embedder.{{in,out}}_layer  context_embedder.time_text_embed.timestep_embedder.linear_{{1,2}}
txt_in.c_embedder.{{in,out}}_layer  context_embedder.time_text_embed.text_embedder.linear_{{1,2}}
{_REFINER}.self_attn.qkv            {_TOKENS}.attn.to_{{q,k,v}}
{_REFINER}.self_attn.proj           {_TOKENS}.attn.to_out.0
{_REFINER}.mlp.{{0,2}}              {_TOKENS}.{{ff.net.0.proj,ff.net.2}}
"""
_DOUBLE = """
double_blocks.#d.{img,txt}_mod.linear        transformer_blocks.#d.{norm1,norm1_context}.linear         6hxh+
double_blocks.#d.{img,txt}_attn_proj         transformer_blocks.#d.attn.{to_out.0,to_add_out}           hxh+
double_blocks.#d.img_attn_{q,k}_norm         transformer_blocks.#d.attn.norm_{q,k}                      128
double_blocks.#d.txt_attn_{q,k}_norm         transformer_blocks.#d.attn.norm_added_{q,k}                128
double_blocks.#d.{img,txt}_mlp.fc1           transformer_blocks.#d.{ff,ff_context}.net.0.proj           4hxh+
double_blocks.#d.{img,txt}_mlp.fc2           transformer_blocks.#d.{ff,ff_context}.net.2                hx4h+
"""
_FUSED = """
double_blocks.#d.img_attn_qkv                transformer_blocks.#d.attn.to_{q,k,v}                      hxh+
double_blocks.#d.txt_attn_qkv                transformer_blocks.#d.attn.add_{q,k,v}_proj                hxh+
"""
_APART = """
double_blocks.#d.img_attn_{q,k,v}            transformer_blocks.#d.attn.to_{q,k,v}
double_blocks.#d.txt_attn_{q,k,v}            transformer_blocks.#d.attn.add_{q,k,v}_proj
"""
_COMFY_DOUBLE = """
double_blocks.#d.img_attn.qkv                transformer_blocks.#d.attn.to_{q,k,v}
double_blocks.#d.txt_attn.qkv                transformer_blocks.#d.attn.add_{q,k,v}_proj
double_blocks.#d.{img,txt}_mod.lin           transformer_blocks.#d.{norm1,norm1_context}.linear
double_blocks.#d.{img,txt}_attn.proj         transformer_blocks.#d.attn.{to_out.0,to_add_out}
double_blocks.#d.img_attn.norm.{query,key}_norm:scale   transformer_blocks.#d.attn.norm_{q,k}
double_blocks.#d.txt_attn.norm.{query,key}_norm:scale   transformer_blocks.#d.attn.norm_added_{q,k}
double_blocks.#d.{img,txt}_mlp.0             transformer_blocks.#d.{ff,ff_context}.net.0.proj
double_blocks.#d.{img,txt}_mlp.2             transformer_blocks.#d.{ff,ff_context}.net.2
"""
_SINGLE = """
single_blocks.#s.linear1   single_transformer_blocks.#s.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}   hxh,hxh,hxh,4hxh+
single_blocks.#s.linear2                     single_transformer_blocks.#s.proj_out                      hx5h+
single_blocks.#s.{q,k}_norm                  single_transformer_blocks.#s.attn.norm_{q,k}               128
single_blocks.#s.modulation.linear           single_transformer_blocks.#s.norm.linear                   3hxh+
"""
_COMFY_SINGLE = """
single_blocks.#s.norm.{query,key}_norm:scale   single_transformer_blocks.#s.attn.norm_{q,k}
single_blocks.#s.modulation.lin                single_transformer_blocks.#s.norm.linear
"""
_APART_SINGLE = """
single_blocks.#s.{linear1_q,linear1_k,linear1_v}   single_transformer_blocks.#s.attn.to_{q,k,v}
single_blocks.#s.linear1_mlp                       single_transformer_blocks.#s.proj_mlp
single_blocks.#s.linear2.fc                        single_transformer_blocks.#s.proj_out
"""
_FINAL = """
final_layer.linear                           proj_out                                                   oxh+
final_layer.adaLN_modulation.1               ~norm_out.linear                                           2hxh+
"""
_GLYPHS = """
byt5_in.layernorm                           context_embedder_2.norm                                   1472+     glyphs
byt5_in.fc1                                 context_embedder_2.linear_1                               gx1472+   glyphs
byt5_in.fc2                                 context_embedder_2.linear_2                               gxg+      glyphs
byt5_in.fc3                                 context_embedder_2.linear_3                               hxg+      glyphs
"""


def _times(native: str, reference: str, feature: str = "") -> str:
    """The two layers of an embedding of times."""
    return f"""
{native}.mlp.0   {reference}.linear_1   hx256+   {feature}
{native}.mlp.2   {reference}.linear_2   hxh+     {feature}
"""


def _comfy_times(native: str, reference: str) -> str:
    return f"{native}.{{in,out}}_layer   {reference}.linear_{{1,2}}\n"


_VIDEO = """
img_in.proj                                  x_embedder.proj                                            hxcx1x2x2+
vector_in.in_layer                           time_text_embed.text_embedder.linear_1                     hx768+
vector_in.out_layer                          time_text_embed.text_embedder.linear_2                     hxh+
"""
_FRAMEPACK = """
=   clean_x_embedder.proj        hxcx1x2x2+    frames
=   clean_x_embedder.proj_2x     hxcx2x4x4+    frames
=   clean_x_embedder.proj_4x     hxcx4x8x8+    frames
=   image_projection.up          3hx1152+      frames
=   image_projection.down        hx3h+         frames
"""
_IMAGE = """
img_in.proj                                  x_embedder.proj                                            hxcx1x1+
"""
_VIDEO_15 = """
img_in.proj                                  x_embedder.proj                                            hxcx1x1x1+
vision_in.proj.0                             image_embedder.norm_in                                     1152+
vision_in.proj.1                             image_embedder.linear_1                                    1152x1152+
vision_in.proj.3                             image_embedder.linear_2                                    hx1152+
vision_in.proj.4                             image_embedder.norm_out                                    h+
cond_type_embedding                          cond_type_embed                                            3xh
double_blocks.#d.img_attn_{q,k,v}            transformer_blocks.#d.attn.to_{q,k,v}                      hxh+
double_blocks.#d.txt_attn_{q,k,v}            transformer_blocks.#d.attn.add_{q,k,v}_proj                hxh+
"""
_COUNTS, _GUIDED = {"#d": 20, "#s": 40, "#r": 2}, frozenset({"guidance"})


def _video(name: str, channels: int, *features: str) -> Size:
    return Size(name, {"h": 3072, "t": 4096, "c": channels, "o": 64}, _COUNTS, frozenset(features))


def _image(name: str, channels: int, *features: str) -> Size:
    return Size(name, {"h": 3584, "g": 2048, "t": 3584, "c": channels, "o": channels}, _COUNTS, frozenset(features))


HUNYUAN_VIDEO = transformer(
    "hunyuan-video",
    "HunyuanVideo",
    table(
        _VIDEO
        + _TEXT
        + _times("time_in", "time_text_embed.timestep_embedder")
        + _times("guidance_in", "time_text_embed.guidance_embedder", "guidance")
        + (_FUSED + _DOUBLE + _SINGLE + _FINAL + _FRAMEPACK),
        comfy=_COMFY_TEXT
        + _comfy_times("time_in", "time_text_embed.timestep_embedder")
        + _comfy_times("guidance_in", "time_text_embed.guidance_embedder")
        + (_COMFY_DOUBLE + _COMFY_SINGLE),
    ),
    (
        _video("t2v", 16, "guidance"),
        _video("i2v", 33),
        _video("framepack", 16, "guidance", "frames"),
    ),
    (
        encoder("text_encoder", "llama", "lora_te1_", "te"),
        encoder("text_encoder_2", "clip_l", "lora_te2_"),
    ),
)
HUNYUAN_VIDEO_15 = transformer(
    "hunyuan-video-1.5",
    "HunyuanVideo 1.5",
    table(
        _VIDEO_15
        + _GLYPHS
        + _TEXT
        + _times("time_in", "time_embed.timestep_embedder")
        + _times("time_r_in", "time_embed.timestep_embedder_r", "meanflow")
        + (_DOUBLE + _FINAL),
        comfy=_COMFY_TEXT + _comfy_times("time_in", "time_embed.timestep_embedder") + _COMFY_DOUBLE,
    ),
    (Size("8b", {"h": 2048, "g": 2048, "t": 3584, "c": 65, "o": 32}, {"#d": 54, "#r": 2}, frozenset({"glyphs"})),),
    (encoder("text_encoder", "qwen25_7b", "lora_te1_", "te"),),
)
HUNYUAN_IMAGE = transformer(
    "hunyuan-image-2.1",
    "HunyuanImage 2.1",
    table(
        _IMAGE
        + _GLYPHS
        + _TEXT
        + _times("time_in", "time_guidance_embed.timestep_embedder")
        + _times("time_r_in", "time_guidance_embed.timestep_embedder_r", "meanflow")
        + _times("guidance_in", "time_guidance_embed.guidance_embedder", "guidance")
        + (_FUSED + _DOUBLE + _SINGLE + _FINAL),
        comfy=_COMFY_TEXT
        + _comfy_times("time_in", "time_guidance_embed.timestep_embedder")
        + _comfy_times("guidance_in", "time_guidance_embed.guidance_embedder")
        + (_COMFY_DOUBLE + _COMFY_SINGLE),
        apart=_APART + _APART_SINGLE,  # of Tencent's trainers
    ),
    (
        _image("2.1", 64, "glyphs"),
        _image("2.1-distilled", 64, "glyphs", "guidance", "meanflow"),
    ),
    (encoder("text_encoder", "qwen25_7b", "lora_te1_", "te"),),
)
