"""`diffusers-old`: what diffusers saved before PEFT, and its SD and SDXL training scripts still do.

Keys are ``unet.<module>.lora.down.weight`` [r,i,*k] and ``.lora.up.weight`` [o,r,*1] for the UNet (or transformer), and
``text_encoder.<module>.lora_linear_layer.down.weight`` for text encoders. There is no alpha: scaling 1, unless a tensor
or the metadata tells it. Read only; other keys of a file are read as any dialect's.
Source: huggingface/diffusers 0.17 to 0.42.
"""

from __future__ import annotations

import re

from loratool.adapter import Adapter
from loratool.formats import attn_procs, dialects
from loratool.formats.base import Evidence, Format

_KEY = re.compile(r"\.(lora|lora_linear_layer)\.(down|up)\.weight$")


def sniff(evidence: Evidence) -> str | None:
    """By the names of its factors."""
    found = next((key for key in evidence.keys if _KEY.search(key)), None)
    return f"keys such as {found}" if found else None


def read(evidence: Evidence) -> Adapter:
    """Read such a file. Raises FormatError for what is malformed or unknown."""
    return dialects.read(evidence, "diffusers-old", attn_procs.rename)


FORMAT = Format(
    name="diffusers-old",
    title="diffusers file with .lora.down or lora_linear_layer keys, read only",
    kinds=("lora",),
    container="file",
    sniff=sniff,
    read=read,
)
