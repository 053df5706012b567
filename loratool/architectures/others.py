"""Transformers that fewer adapters are made for: Mochi, PixArt, AuraFlow, Sana, Krea 2, and Anima on Cosmos-Predict 2.

Original names beside diffusers', as its single-file converters have them.
"""

from __future__ import annotations

from loratool.architectures.encoders import CONDITIONER, encoder
from loratool.architectures.rows import Size, table
from loratool.architectures.transformer import transformer

# the context is half as wide; of the last block it has a modulation of its own, and nothing after the attention
MOCHI = transformer(
    "mochi",
    "Mochi 1",
    table("""
x_embedder.proj                   patch_embed.proj                                    2gxcx2x2+
pos_frequencies:                  pos_frequencies:                                    3x24x64
t_embedder.mlp.0                  time_embed.timestep_embedder.linear_1               2gx256+
t_embedder.mlp.2                  time_embed.timestep_embedder.linear_2               2gx2g+
t5_y_embedder.to_kv               time_embed.pooler.to_kv                             2txt+
t5_y_embedder.to_q                time_embed.pooler.to_q                              txt+
t5_y_embedder.to_out              time_embed.pooler.to_out                            2gxt+
t5_yproj                          time_embed.caption_proj                             gxt+
blocks.#b.mod_x                   transformer_blocks.#b.norm1.linear                  8gx2g+
blocks.#c.mod_y                   transformer_blocks.#c.norm1_context.linear          4gx2g+
blocks.#l.mod_y                   transformer_blocks.#l.norm1_context.linear_1        gx2g+
blocks.#b.attn.qkv_x              transformer_blocks.#b.attn1.to_{q,k,v}              2gx2g
blocks.#b.attn.qkv_y              transformer_blocks.#b.attn1.add_{q,k,v}_proj        2gxg
blocks.#b.attn.{q,k}_norm_x       transformer_blocks.#b.attn1.norm_{q,k}              128
blocks.#b.attn.{q,k}_norm_y       transformer_blocks.#b.attn1.norm_added_{q,k}        128
blocks.#b.attn.proj_x             transformer_blocks.#b.attn1.to_out.0                2gx2g+
blocks.#c.attn.proj_y             transformer_blocks.#c.attn1.to_add_out              gx2g+
blocks.#b.mlp_x.w1                ~transformer_blocks.#b.ff.net.0.proj                2fx2g
blocks.#b.mlp_x.w2                transformer_blocks.#b.ff.net.2                      2gxf
blocks.#c.mlp_y.w1                ~transformer_blocks.#c.ff_context.net.0.proj        fxg
blocks.#c.mlp_y.w2                transformer_blocks.#c.ff_context.net.2              gxe
final_layer.mod                   ~norm_out.linear                                    4gx2g+
final_layer.linear                proj_out                                            4cx2g+
"""),
    (
        Size(
            "10b",
            {"g": 1536, "c": 12, "t": 4096, "f": 8192, "e": 4096},
            {"#b": 48, "#c": 47, "#l": range(47, 48)},
        ),
    ),
    (encoder("text_encoder", "t5xxl", "lora_te_", "te1", "te3"),),
)
PIXART = transformer(
    "pixart",
    "PixArt",
    table("""
x_embedder.proj                   pos_embed.proj                                                hx4x2x2+
t_embedder.mlp.0                  adaln_single.emb.timestep_embedder.linear_1                   hx256+
t_embedder.mlp.2                  adaln_single.emb.timestep_embedder.linear_2                   hxh+
csize_embedder.mlp.0              adaln_single.emb.resolution_embedder.linear_1                 rx256+  sizes
csize_embedder.mlp.2              adaln_single.emb.resolution_embedder.linear_2                 rxr+    sizes
ar_embedder.mlp.0                 adaln_single.emb.aspect_ratio_embedder.linear_1               rx256+  sizes
ar_embedder.mlp.2                 adaln_single.emb.aspect_ratio_embedder.linear_2               rxr+    sizes
t_block.1                         adaln_single.linear                                           6hxh+
y_embedder.y_proj.fc1             caption_projection.linear_1                                   hx4096+
y_embedder.y_proj.fc2             caption_projection.linear_2                                   hxh+
blocks.#b.scale_shift_table:      transformer_blocks.#b.scale_shift_table:                      6xh
blocks.#b.attn.qkv                transformer_blocks.#b.attn1.to_{q,k,v}                        hxh+
blocks.#b.attn.proj               transformer_blocks.#b.attn1.to_out.0                          hxh+
blocks.#b.cross_attn.q_linear     transformer_blocks.#b.attn2.to_q                              hxh+
blocks.#b.cross_attn.kv_linear    transformer_blocks.#b.attn2.to_{k,v}                          hxh+
blocks.#b.cross_attn.proj         transformer_blocks.#b.attn2.to_out.0                          hxh+
blocks.#b.mlp.fc1                 transformer_blocks.#b.ff.net.0.proj                           4hxh+
blocks.#b.mlp.fc2                 transformer_blocks.#b.ff.net.2                                hx4h+
final_layer.scale_shift_table:    scale_shift_table:                                            2xh
final_layer.linear                proj_out                                                      32xh+
"""),
    (
        Size("sigma", {"h": 1152, "r": 384}, {"#b": 28}),
        Size("alpha", {"h": 1152, "r": 384}, {"#b": 28}, frozenset({"sizes"})),
    ),
    (encoder("text_encoder", "t5xxl", "lora_te_", "te1", "te3"),),
)
AURAFLOW = transformer(
    "auraflow",
    "AuraFlow",
    table("""
register_tokens:                                   register_tokens:                                               1x8xh
positional_encoding:                               pos_embed.pos_embed:                                           1xpxh
init_x_linear                                      pos_embed.proj                                                 hx16+
cond_seq_linear                                    context_embedder                                               hx2048
t_embedder.mlp.0                                   time_step_proj.linear_1                                        hx256+
t_embedder.mlp.2                                   time_step_proj.linear_2                                        hxh+
double_layers.#d.mod{X,C}.1                        joint_transformer_blocks.#d.{norm1,norm1_context}.linear       6hxh
double_layers.#d.attn.w2{q,k,v,o}                  joint_transformer_blocks.#d.attn.{to_q,to_k,to_v,to_out.0}     hxh
double_layers.#d.attn.w1{q,k,v}                    joint_transformer_blocks.#d.attn.add_{q,k,v}_proj              hxh
double_layers.#d.attn.w1o                          joint_transformer_blocks.#d.attn.to_add_out                    hxh
double_layers.#d.mlp{X,C}.c_fc1                    joint_transformer_blocks.#d.{ff,ff_context}.linear_1           fxh
double_layers.#d.mlp{X,C}.c_fc2                    joint_transformer_blocks.#d.{ff,ff_context}.linear_2           fxh
double_layers.#d.mlp{X,C}.c_proj                   joint_transformer_blocks.#d.{ff,ff_context}.out_projection     hxf
single_layers.#s.modCX.1                           single_transformer_blocks.#s.norm1.linear                      6hxh
single_layers.#s.attn.w1{q,k,v,o}                  single_transformer_blocks.#s.attn.{to_q,to_k,to_v,to_out.0}    hxh
single_layers.#s.mlp.c_fc{1,2}                     single_transformer_blocks.#s.ff.linear_{1,2}                   fxh
single_layers.#s.mlp.c_proj                        single_transformer_blocks.#s.ff.out_projection                 hxf
modF.1                                             ~norm_out.linear                                               2hxh
final_linear                                       proj_out                                                       16xh
"""),
    (Size("0.3", {"h": 3072, "f": 8192, "p": 9216}, {"#d": 4, "#s": 32}),),
    (encoder("text_encoder", "t5xxl", "lora_te_", "te1", "te3"),),
)
SANA = transformer(
    "sana",
    "Sana",
    table("""
x_embedder.proj                   patch_embed.proj                                              hx32x1x1+
t_embedder.mlp.0                  time_embed.emb.timestep_embedder.linear_1                     hx256+
t_embedder.mlp.2                  time_embed.emb.timestep_embedder.linear_2                     hxh+
t_block.1                         time_embed.linear                                             6hxh+
y_embedder.y_proj.fc1             caption_projection.linear_1                                   hx2304+
y_embedder.y_proj.fc2             caption_projection.linear_2                                   hxh+
attention_y_norm                  caption_norm                                                  h
blocks.#b.scale_shift_table:      transformer_blocks.#b.scale_shift_table:                      6xh
blocks.#b.attn.qkv                transformer_blocks.#b.attn1.to_{q,k,v}                        hxh
blocks.#b.attn.proj               transformer_blocks.#b.attn1.to_out.0                          hxh+
blocks.#b.cross_attn.q_linear     transformer_blocks.#b.attn2.to_q                              hxh+
blocks.#b.cross_attn.kv_linear    transformer_blocks.#b.attn2.to_{k,v}                          hxh+
blocks.#b.cross_attn.proj         transformer_blocks.#b.attn2.to_out.0                          hxh+
blocks.#b.mlp.inverted_conv.conv  transformer_blocks.#b.ff.conv_inverted                        5hxhx1x1+
blocks.#b.mlp.depth_conv.conv     transformer_blocks.#b.ff.conv_depth                           5hx1x3x3+
blocks.#b.mlp.point_conv.conv     transformer_blocks.#b.ff.conv_point                           hxfx1x1
final_layer.scale_shift_table:    scale_shift_table:                                            2xh
final_layer.linear                proj_out                                                      32xh+
"""),
    (
        Size("1.6b", {"h": 2240, "f": 5600}, {"#b": 20}),
        Size("0.6b", {"h": 1152, "f": 2880}, {"#b": 28}),
    ),
    (encoder("text_encoder", "gemma2_2b", "lora_te_", "te1"),),
)

_KREA_BLOCK = """
{0}.attn.{{wq,wo,gate}}           {1}.attn.{{to_q,to_out.0,to_gate}}                            {2}x{2}
{0}.attn.{{wk,wv}}                {1}.attn.to_{{k,v}}                                           {3}x{2}
{0}.attn.qknorm.{{q,k}}norm:scale {1}.attn.norm_{{q,k}}                                         128
{0}.mlp.{{gate,up}}               {1}.ff.{{gate,up}}                                            {4}x{2}
{0}.mlp.down                      {1}.ff.down                                                   {2}x{4}
{0}.prenorm:scale                 {1}.norm1                                                     {2}
{0}.postnorm:scale                {1}.norm2                                                     {2}
"""
KREA2 = transformer(
    "krea2",
    "Krea 2",
    table(
        """
first                             img_in                                                        hx64+
tmlp.0                            time_embed.linear_1                                           hx256+
tmlp.2                            time_embed.linear_2                                           hxh+
tproj.1                           time_mod_proj                                                 6hxh+
txtmlp.0:scale                    txt_in.norm                                                   t
txtmlp.1                          txt_in.linear_1                                               hxt+
txtmlp.3                          txt_in.linear_2                                               hxh+
txtfusion.projector               text_fusion.projector                                         1x12
last.linear                       final_layer.linear                                            64xh+
last.norm:scale                   final_layer.norm                                              h
=                                 transformer_blocks.#b.scale_shift_table:                      6xh
=                                 final_layer.scale_shift_table:                                2xh
"""  # the original's tables of modulations have other shapes
        + _KREA_BLOCK.format("blocks.#b", "transformer_blocks.#b", "h", "g", "f")
        + _KREA_BLOCK.format("txtfusion.layerwise_blocks.#r", "text_fusion.layerwise_blocks.#r", "t", "t", "e")
        + _KREA_BLOCK.format("txtfusion.refiner_blocks.#r", "text_fusion.refiner_blocks.#r", "t", "t", "e")
    ),
    (Size("2", {"h": 6144, "g": 1536, "f": 16384, "t": 2560, "e": 6912}, {"#b": 28, "#r": 2}),),
)
ANIMA = transformer(
    "anima",
    "Anima (Cosmos-Predict 2)",
    table("""
x_embedder.proj.1                             patch_embed.proj                             hx68
t_embedder.1.linear_1                         time_embed.t_embedder.linear_1               hxh
t_embedder.1.linear_2                         time_embed.t_embedder.linear_2               3hxh
t_embedding_norm                              time_embed.norm                              h
blocks.#b.self_attn.{q,k,v,output}_proj       transformer_blocks.#b.attn1.{to_q,to_k,to_v,to_out.0}   hxh
blocks.#b.self_attn.{q,k}_norm                transformer_blocks.#b.attn1.norm_{q,k}       128
blocks.#b.cross_attn.{q,output}_proj          transformer_blocks.#b.attn2.{to_q,to_out.0}  hxh
blocks.#b.cross_attn.{k,v}_proj               transformer_blocks.#b.attn2.to_{k,v}         hx1024
blocks.#b.cross_attn.{q,k}_norm               transformer_blocks.#b.attn2.norm_{q,k}       128
blocks.#b.mlp.layer1                          transformer_blocks.#b.ff.net.0.proj          4hxh
blocks.#b.mlp.layer2                          transformer_blocks.#b.ff.net.2               hx4h
blocks.#b.adaln_modulation_{self_attn,cross_attn,mlp}.1   transformer_blocks.#b.norm{1,2,3}.linear_1   256xh
blocks.#b.adaln_modulation_{self_attn,cross_attn,mlp}.2   transformer_blocks.#b.norm{1,2,3}.linear_2   3hx256
final_layer.adaln_modulation.1                norm_out.linear_1                            256xh
final_layer.adaln_modulation.2                norm_out.linear_2                            2hx256
final_layer.linear                            proj_out                                     64xh
"""),
    (Size("2b", {"h": 2048}, {"#b": 28}), Size("14b", {"h": 5120}, {"#b": 36})),
    (encoder("text_encoder", "qwen3_06b", "lora_te_", "te1"), CONDITIONER),
)

_FLUX3_BLOCK = """
{0}.{{q,k,v}}_proj              {1}.attn.to_{{q,k,v}}       hxh
{0}.attn_out                    {1}.attn.to_out.0           hxh
{0}.norm.{{query,key}}_norm:scale   {1}.attn.norm_{{q,k}}   128
{0}.mlp_in                      {1}.ff.linear_in            6hxh
{0}.mlp_out                     {1}.ff.linear_out           hx3h
"""
FLUX3 = transformer(
    "flux3",
    "FLUX.3",
    table(
        """
txt_in                                               context_embedder                                       hxt
emb_in.{image,image_cond}                            x_embedders.{image,image_cond}                         hxc
time_in.in_layer                                     timestep_embedder.linear_1                             hx256
time_in.out_layer                                    timestep_embedder.linear_2                             hxh
ref_time_in.in_layer                                 target_timestep_embedder.linear_1                      hx256  steps
ref_time_in.out_layer                                target_timestep_embedder.linear_2                      hxh    steps
early_stream_modulations.{image,image_cond,txt}.lin  early_stream_modulations.{image,image_cond,txt}.linear   3hxh
single_stream_modulations.{image,image_cond,txt}.lin single_stream_modulations.{image,image_cond,txt}.linear  3hxh
final_layer.image.adaLN_modulation.1                 ~norm_out.linear                                       2hxh
final_layer.image.linear                             proj_out                                               cxh
"""
        + _FLUX3_BLOCK.format("content_mode_blocks.image.#d", "mode_blocks.image.#d")
        + _FLUX3_BLOCK.format("content_mode_blocks.image_cond.#d", "mode_blocks.image_cond.#d")
        + _FLUX3_BLOCK.format("txt_mode_blocks.#d", "txt_mode_blocks.#d")
        + _FLUX3_BLOCK.format("single_blocks.#s", "single_transformer_blocks.#s")
    ),
    (Size("3", {"h": 3072, "c": 128, "t": 20480}, {"#d": 5, "#s": 28}),),
)
