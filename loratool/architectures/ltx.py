"""LTX-Video, LTX-2 and 2.3.

Names of Lightricks (ComfyUI keeps them) beside diffusers', as its single-file converters have them; trainers write
diffusers'.
"""

from __future__ import annotations

from loratool.architectures.encoders import encoder
from loratool.architectures.rows import Size, table
from loratool.architectures.transformer import transformer


def _attention(name: str, out: str, width: str, query: str, key: str) -> str:
    """One attention: the widths of its result, of its inside, of what asks and of what is asked."""
    return f"""
transformer_blocks.#b.{name}.{{q,k}}_norm   transformer_blocks.#b.{name}.norm_{{q,k}}   {width}
=   transformer_blocks.#b.{name}.to_q          {width}x{query}+
=   transformer_blocks.#b.{name}.to_{{k,v}}    {width}x{key}+
=   transformer_blocks.#b.{name}.to_out.0      {out}x{width}+
"""


def _stream(h: str, start: str = "", feature: str = "") -> str:
    """The parts that a stream has: of video, and in LTX-2 of audio; what ``feature`` marks 2.3 has otherwise."""
    return f"""
{start}patchify_proj                                    {start}proj_in                                     {h}xc+
{start}adaln_single.emb.timestep_embedder.linear_1      {start}time_embed.emb.timestep_embedder.linear_1   {h}x256+
{start}adaln_single.emb.timestep_embedder.linear_2      {start}time_embed.emb.timestep_embedder.linear_2   {h}x{h}+
{start}adaln_single.linear                              {start}time_embed.linear                   6{h}x{h}+ {feature}
=   {start}caption_projection.linear_1                  {h}xt+          {feature}
=   {start}caption_projection.linear_2                  {h}x{h}+        {feature}
=   {start}scale_shift_table:                           2x{h}
=   transformer_blocks.#b.{start}scale_shift_table:     6x{h}           {feature}
=   transformer_blocks.#b.{start}ff.net.0.proj          4{h}x{h}+
=   transformer_blocks.#b.{start}ff.net.2               {h}x4{h}+
=   {start}proj_out                                     cx{h}+
"""


def _later(h: str, start: str) -> str:
    """What 2.3 has instead, and besides: modulated texts."""
    new, block = f"{start}prompt_adaln", f"transformer_blocks.#b.{start}"
    return f"""
{start}adaln_single.linear                      {start}time_embed.linear                   9{h}x{h}+   later
{new}_single.emb.timestep_embedder.linear_1     {new}.emb.timestep_embedder.linear_1       {h}x256+    later
{new}_single.emb.timestep_embedder.linear_2     {new}.emb.timestep_embedder.linear_2       {h}x{h}+    later
{new}_single.linear                             {new}.linear                               2{h}x{h}+   later
=   {block}scale_shift_table:           9x{h}   later
=   {block}prompt_scale_shift_table:    2x{h}   later
"""


def _modulation(native: str, name: str, h: str, chunks: str) -> str:
    """A modulation of LTX-2's attention between the streams."""
    return f"""
{native}_adaln_single.emb.timestep_embedder.linear_1   {name}.emb.timestep_embedder.linear_1   {h}x256+
{native}_adaln_single.emb.timestep_embedder.linear_2   {name}.emb.timestep_embedder.linear_2   {h}x{h}+
{native}_adaln_single.linear                           {name}.linear                           {chunks}{h}x{h}+
"""


def _table(stream: str, h: str) -> str:
    native = f"transformer_blocks.#b.scale_shift_table_a2v_ca_{stream}:"
    return f"{native} transformer_blocks.#b.{stream}_a2v_cross_attn_scale_shift_table: 5x{h}\n"


_BLOCKS = _attention("attn1", "h", "h", "h", "h") + _attention("attn2", "h", "h", "h", "h")
_GATES = """
=   transformer_blocks.#b.{attn1,attn2,audio_to_video_attn}.to_gate_logits                     nxh+   later
=   transformer_blocks.#b.{audio_attn1,audio_attn2,video_to_audio_attn}.to_gate_logits         nxa+   later
"""
_AUDIO = (
    _stream("a", "audio_", "first")
    + _attention("audio_attn1", "a", "a", "a", "a")
    + _attention("audio_attn2", "a", "a", "a", "a")
    + _attention("audio_to_video_attn", "h", "a", "h", "a")
    + _attention("video_to_audio_attn", "a", "a", "a", "h")
    + _modulation("av_ca_video_scale_shift", "av_cross_attn_video_scale_shift", "h", "4")
    + _modulation("av_ca_audio_scale_shift", "av_cross_attn_audio_scale_shift", "a", "4")
    + _modulation("av_ca_a2v_gate", "av_cross_attn_video_a2v_gate", "h", "")
    + _modulation("av_ca_v2a_gate", "av_cross_attn_audio_v2a_gate", "a", "")
    + _table("video", "h")
    + _table("audio", "a")
)

_WIDTHS = {"h": 4096, "a": 2048, "c": 128, "n": 32}

LTX = transformer(
    "ltx",
    "LTX-Video",
    table(_stream("h") + _BLOCKS),
    (
        Size("2b", {"h": 2048, "c": 128, "t": 4096}, {"#b": 28}),
        Size("13b", {"h": 4096, "c": 128, "t": 4096}, {"#b": 48}),
    ),
    (encoder("text_encoder", "t5xxl", "lora_te_", "te1", "te3"),),
    flattened="diffusers",
)
LTX2 = transformer(
    "ltx2",
    "LTX-2",
    table(_stream("h", "", "first") + _BLOCKS + _AUDIO + _later("h", "") + _later("a", "audio_") + _GATES),
    (
        Size("19b", {**_WIDTHS, "t": 3840}, {"#b": 48}, frozenset({"first"})),
        Size("2.3-22b", {**_WIDTHS, "t": 3840}, {"#b": 48}, frozenset({"later"})),
    ),
    flattened="diffusers",
)
