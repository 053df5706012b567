"""`ai-toolkit`: files of ostris/ai-toolkit (and of Replicate's FLUX trainer, which is it).

Transformers have PEFT-style keys behind ``transformer.`` (FLUX.1, SD3) or ``diffusion_model.`` with the original
repository's names; there is no alpha, the scaling being 1, but beside LoKr. The magnitude of a DoRA is ``.magnitude``
[o]; layers trained whole are ``.diff`` and ``.diff_b``. UNets are `kohya`'s, old LoKr files `lycoris`'. The names are
those of `diffusers` or `comfyui`: what tells the program is the metadata, ``software``, or ``.magnitude``. Read only.
"""

from __future__ import annotations

from loratool.adapter import Adapter
from loratool.formats import dialects
from loratool.formats.base import Evidence, Format
from loratool.formats.dialects import has_component, is_language_model, is_slot, normalise


def sniff(evidence: Evidence) -> str | None:
    """By its name in the metadata, or its own name of the magnitude, on keys of an image model."""
    names = [normalise(key) for key in evidence.keys if is_slot(key)]
    dotted = [name for name in names if has_component(name) or name.startswith("diffusion_model.")]
    if not dotted or any(map(is_language_model, dotted)):
        return None
    if "ai-toolkit" in evidence.file.metadata.get("software", "")[:1000]:
        return "the metadata names ai-toolkit"
    return "magnitudes called .magnitude" if any(key.endswith(".magnitude") for key in evidence.keys) else None


def read(evidence: Evidence) -> Adapter:
    """Read such a file. Raises FormatError for what is malformed or unknown."""
    return dialects.read(evidence, "ai-toolkit")


FORMAT = Format(
    name="ai-toolkit",
    title="ostris/ai-toolkit file, read only",
    kinds=("lora", "dora", "lokr", "full"),
    container="file",
    sniff=sniff,
    read=read,
)
