"""`attn-procs`: the attention processors that diffusers saved in 2023.

Keys are ``<module>.processor.<projection>_lora.down.weight`` [r,i] and ``.up.weight`` [o,r]; attention only. The first
generation has no component and is the UNet's; the second has ``unet.``, and ``text_encoder.`` with the UNet's names
of the projections, ``self_attn.to_q_lora``. There is no alpha: scaling 1. Of the projections ``to_out`` is the module
``to_out.0``, and ``to_q``, ``to_k``, ``to_v``, ``to_out`` of a text encoder are ``q_proj``, ``k_proj``, ``v_proj``,
``out_proj``. Read only; other keys of a file are read as any dialect's. Source: huggingface/diffusers 0.11 to 0.19.
"""

from __future__ import annotations

import re

from loratool.adapter import Adapter
from loratool.formats import dialects
from loratool.formats.base import Evidence, Format

_KEY = re.compile(r"\.(processor|self_attn)\.(to_[qkv]|to_out|add_[kv]_proj)_lora\.(down|up)\.weight$")
_MODULE = re.compile(r"\.processor\.(to_[qkv]|to_out|add_[kv]_proj)$")
_TEXT = re.compile(r"(?<=\.self_attn\.)to_(q|k|v|out)$")


def sniff(evidence: Evidence) -> str | None:
    """By the names of its factors."""
    found = next((key for key in evidence.keys if _KEY.search(key)), None)
    return f"keys such as {found}" if found else None


def read(evidence: Evidence) -> Adapter:
    """Read such a file. Raises FormatError for what is malformed or unknown."""
    return dialects.read(evidence, "attn-procs", rename)


def rename(module: str, slot: str) -> tuple[str, str]:
    """The module that a processor's projection is."""
    name = re.sub(r"\.to_out$", ".to_out.0", _MODULE.sub(r".\1", module))
    return dialects.behind_component(_TEXT.sub(r"\1_proj", module) if _TEXT.search(module) else name), slot


FORMAT = Format(
    name="attn-procs",
    title="attention processors of diffusers (2023), read only",
    kinds=("lora",),
    container="file",
    sniff=sniff,
    read=read,
)
