"""`bfl`: FLUX adapters in the names of black-forest-labs/flux, without a prefix or behind PEFT's.

Black Forest Labs' control LoRAs (Canny, Depth) have ``<module>.lora_A.weight`` [r,i], ``.lora_B.weight`` [o,r] and
``.lora_B.bias``, a delta of the bias, and whole ``<...>_norm.scale``, which replace those of the base. Their ``img_in``
takes 128 channels: a base of 64 is grown when they are merged. There is no alpha: scaling 1. fal's trainers leave
PEFT's ``base_model.model.`` before the same names, without a configuration. Read only.
"""

from __future__ import annotations

import re

from loratool.adapter import Adapter
from loratool.formats import dialects
from loratool.formats.base import Evidence, Format
from loratool.formats.dialects import is_slot, normalise

_MODULE = re.compile(
    r"^(double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj|norm)|mlp\.[02]|mod\.lin)"
    r"|single_blocks\.\d+\.(linear[12]|modulation\.lin|norm\.)"
    r"|(double_stream_modulation_(img|txt)|single_stream_modulation)\.lin)"
)


def sniff(evidence: Evidence) -> str | None:
    """By the names of FLUX's blocks, bare or behind PEFT's prefix, unless PEFT's configuration lies beside them."""
    if "peft_type" in evidence.config:
        return None
    found = next((key for key in evidence.keys if _MODULE.match(normalise(key)) and is_slot(key)), None)
    return f"bare names of FLUX's blocks, such as {found}" if found else None


def read(evidence: Evidence) -> Adapter:
    """Read such a file. Raises FormatError for what is malformed or unknown."""
    return dialects.read(evidence, "bfl", rename)


def rename(module: str, slot: str) -> tuple[str, str]:
    """A norm's scale is a value that replaces the base's."""
    return module, "set_weight" if slot == "scale" and module.endswith("_norm") else slot


FORMAT = Format(
    name="bfl",
    title="FLUX file in Black Forest Labs' own names (control LoRAs, fal), read only",
    kinds=("lora", "full"),
    container="file",
    sniff=sniff,
    read=read,
)
