"""`xlabs`: FLUX.1 adapters of XLabs-AI/x-flux and of USO, made of attention processors.

Keys are ``double_blocks.<n>.processor.<name>.down.weight`` [r,i] and ``.up.weight`` [o,r], ``<name>`` being
``qkv_lora1``, ``proj_lora1`` (image) and ``qkv_lora2``, ``proj_lora2`` (text), and optionally
``single_blocks.<n>.processor.qkv_lora`` and ``proj_lora``; ``diffusion_model.`` may stand before them. qkv of a double
block is that of the original names; of a single block it is the first three parts of ``linear1``, whose fourth (the
MLP's) it does not touch; ``proj`` there is ``linear2``. There is no alpha: scaling 1. Read only.
"""

from __future__ import annotations

import re

from loratool.adapter import Adapter
from loratool.architectures.base import Piece, Shape
from loratool.errors import FormatError
from loratool.formats import dialects
from loratool.formats.base import Evidence, Format

_KEY = re.compile(r"(double|single)_blocks\.\d+\.processor\.(qkv|proj)_lora\d?\.(down|up)\.weight$")
_DOUBLE = re.compile(r"^(?:diffusion_model\.)?(double_blocks\.\d+)\.processor\.(qkv|proj)_lora([12])$")
_SINGLE = re.compile(r"^(?:diffusion_model\.)?single_blocks\.(\d+)\.processor\.(qkv|proj)$")
_STREAMS = {"1": "img", "2": "txt"}


def sniff(evidence: Evidence) -> str | None:
    """By the names of its factors."""
    found = next((key for key in evidence.keys if _KEY.search(key)), None)
    return f"keys such as {found}" if found else None


def read(evidence: Evidence) -> Adapter:
    """Read such a file. Raises FormatError for what is malformed or unknown."""
    return dialects.read(evidence, "xlabs", rename, pieces=single_qkv)


def rename(module: str, slot: str) -> tuple[str, str]:
    """The module, in the original repository's names, that a processor's projection is."""
    if found := _DOUBLE.match(module):
        return f"diffusion_model.{found[1]}.{_STREAMS[found[3]]}_attn.{found[2]}", slot
    if (found := _SINGLE.match(module)) and found[2] == "proj":
        return f"diffusion_model.single_blocks.{found[1]}.linear2", slot
    return module, slot


def single_qkv(name: str, shape: Shape) -> tuple[Piece, ...]:
    """The modules that qkv of a single block is. Raises FormatError where it is not three equal parts."""
    found = _SINGLE.match(name)
    if found is None:
        return ()
    if not shape or shape[0] % 3:
        raise FormatError(f"a qkv of shape {list(shape)} is not three equal parts", name)
    block, height = f"transformer.single_transformer_blocks.{found[1]}", shape[0] // 3
    return tuple(
        Piece(f"{block}.attn.{leaf}", ((n * height, (n + 1) * height),))
        for n, leaf in enumerate(("to_q", "to_k", "to_v"))
    )


FORMAT = Format(
    name="xlabs",
    title="FLUX.1 attention processors of XLabs and USO, read only",
    kinds=("lora",),
    container="file",
    sniff=sniff,
    read=read,
)
