"""Text encoders of diffusion transformers, under the names that huggingface/transformers gives them.

CLIP, T5, and the decoders of language models. On disk some have a further level (``model.``), or lack one
(``text_model.``). Sizes are those of the published checkpoints.
"""

from __future__ import annotations

from loratool.architectures.rows import Size, Table, table
from loratool.architectures.transformer import Encoder

_CLIP = table("""
=   text_model.embeddings.token_embedding                     vxc
=   text_model.embeddings.position_embedding                  pxc
=   text_model.encoder.layers.#l.self_attn.{q,k,v,out}_proj   cxc+
=   text_model.encoder.layers.#l.layer_norm{1,2}              c+
=   text_model.encoder.layers.#l.mlp.fc1                      4cxc+
=   text_model.encoder.layers.#l.mlp.fc2                      cx4c+
=   text_model.final_layer_norm                               c+
=   text_projection                                           cxc    projection
""")
_T5 = table("""
=   shared                                                                  vxc
=   encoder.block.#l.layer.0.SelfAttention.{q,k,v}                          ixc
=   encoder.block.#l.layer.0.SelfAttention.o                                cxi
=   encoder.block.#p.layer.0.SelfAttention.relative_attention_bias          32xn
=   encoder.block.#l.layer.{0,1}.layer_norm                                 c
=   encoder.block.#l.layer.1.DenseReluDense.{wi_0,wi_1}                     fxc
=   encoder.block.#l.layer.1.DenseReluDense.wo                              cxf
=   encoder.final_layer_norm                                                c
""")


def _decoder(start: str, bias: str = "", norms: str = "{input,post_attention}_layernorm") -> Table:
    """The decoder of a language model; ``start`` is what its names begin with."""
    return table(f"""
=   {start}embed_tokens                          vxc
=   {start}layers.#l.self_attn.q_proj            qxc{bias}
=   {start}layers.#l.self_attn.{{k,v}}_proj      kxc{bias}
=   {start}layers.#l.self_attn.o_proj            cxq
=   {start}layers.#l.self_attn.{{q,k}}_norm      d      qk_norm
=   {start}layers.#l.mlp.{{gate,up}}_proj        fxc
=   {start}layers.#l.mlp.down_proj               cxf
=   {start}layers.#l.{norms}                     c
=   {start}norm                                  c
""")


_MODEL = ("model.", "language_model.", "model.language_model.", "language_model.model.")
_INNER, _PLAIN, _BIASED = _decoder(""), _decoder("model."), _decoder("model.", "+")
_GEMMA = _decoder("", norms="{input,post_attention,pre_feedforward,post_feedforward}_layernorm")


def _widths(c: int, q: int, k: int, f: int, v: int, d: int = 128) -> dict[str, int]:
    """Widths of a decoder: hidden, queries, keys, inner, vocabulary, head."""
    return {"c": c, "q": q, "k": k, "f": f, "v": v, "d": d}


_NORMED = frozenset({"qk_norm"})
_T5_XXL = {"c": 4096, "i": 4096, "f": 10240, "n": 64}
# kind -> tables, size, the name in ComfyUI's files, levels
_KINDS: dict[str, tuple[Table, Size, str, tuple[str, ...]]] = {
    "clip_l": (
        _CLIP,
        Size("clip_l", {"v": 49408, "p": 77, "c": 768}, {"#l": 12}),
        "clip_l.transformer.",
        ("text_model.",),
    ),
    "clip_g": (
        _CLIP,
        Size("clip_g", {"v": 49408, "p": 77, "c": 1280}, {"#l": 32}, frozenset({"projection"})),
        "clip_g.transformer.",
        ("text_model.",),
    ),
    "t5xxl": (_T5, Size("t5xxl", {**_T5_XXL, "v": 32128}, {"#l": 24, "#p": 1}), "t5xxl.transformer.", ()),
    "umt5xxl": (_T5, Size("umt5xxl", {**_T5_XXL, "v": 256384}, {"#l": 24, "#p": 24}), "umt5xxl.transformer.", ()),
    "gemma2_2b": (
        _GEMMA,
        Size("gemma2_2b", _widths(2304, 2048, 1024, 9216, 256000, 256), {"#l": 26}),
        "gemma2_2b.transformer.model.",
        _MODEL,
    ),
    "qwen3_06b": (
        _INNER,
        Size("qwen3_06b", _widths(1024, 2048, 1024, 3072, 151936), {"#l": 28}, _NORMED),
        "qwen3_06b.transformer.model.",
        _MODEL,
    ),
    "qwen3_4b": (
        _PLAIN,
        Size("qwen3_4b", _widths(2560, 4096, 1024, 9728, 151936), {"#l": 36}, _NORMED),
        "qwen3_4b.transformer.",
        _MODEL,
    ),
    "qwen25_7b": (
        _BIASED,
        Size("qwen25_7b", _widths(3584, 3584, 512, 18944, 152064), {"#l": 28}),
        "qwen25_7b.transformer.",
        _MODEL,
    ),
    "llama": (
        _PLAIN,
        Size("llama", _widths(4096, 4096, 1024, 14336, 128256), {"#l": 32}),
        "llama.transformer.",
        _MODEL,
    ),
    "mistral3_24b": (
        _PLAIN,
        Size("mistral3_24b", _widths(5120, 4096, 1024, 32768, 131072), {"#l": 40}),
        "mistral3_24b.transformer.",
        _MODEL,
    ),
}


# of Anima: between its text encoder and its transformer, in whose file it is kept
CONDITIONER = Encoder(
    "text_conditioner",
    table("""
=   embed                                                  vxc
=   blocks.#l.norm_{self_attn,cross_attn,mlp}              c
=   blocks.#l.{self,cross}_attn.{q,k,v,o}_proj             cxc
=   blocks.#l.{self,cross}_attn.{q,k}_norm                 64
=   blocks.#l.mlp.0                                        4cxc+
=   blocks.#l.mlp.2                                        cx4c+
=   out_proj                                               cxc+
=   norm                                                   c
"""),
    Size("conditioner", {"c": 1024, "v": 32128}, {"#l": 6}),
    ("text_conditioner",),
    "lora_unet_llm_adapter_",
    "diffusion_model.llm_adapter.",
)


def encoder(component: str, kind: str, kohya: str, *roles: str) -> Encoder:
    """The text encoder of a pipeline's component: its kind, kohya's prefix, and further roles that names give it."""
    held, size, comfy, levels = _KINDS[kind]
    own = (component, kind, kohya.removeprefix("lora_").removesuffix("_"))
    return Encoder(component, held, size, (*own, *roles), kohya, f"text_encoders.{comfy}", levels)
