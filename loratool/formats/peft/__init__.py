"""`peft`: a folder of Hugging Face PEFT, ``adapter_config.json`` and ``adapter_model.safetensors``.

Keys are ``base_model.model.<module>.lora_A.weight`` (down [r,i,*k]) and ``.lora_B.weight`` (up [o,r,*1]), for an
Embedding ``.lora_embedding_A`` [r,entries] and ``.lora_embedding_B`` [dim,r], for DoRA ``.lora_magnitude_vector``, and
plain parameter names for what was trained whole. The scaling is in the configuration only: ``lora_alpha / r``, or
``/ sqrt(r)`` with ``use_rslora``, with exceptions by module in ``rank_pattern`` and ``alpha_pattern``, whose keys are
regular expressions ``(.*\\.)?KEY$``: the first that fits wins. Raw dumps of other trainers keep the adapter's name in
the keys, wrap modules once more or leave the prefix out; they are read alike.

Parameters that are no module's ``weight`` (``target_parameters``: stacks of experts [E,o,i]) are wrapped by wrapping
their module, the first registered innermost, behind most ``.base_layer``; the keys do not name them. A torch
MultiheadAttention holds the pair of ``in_proj_weight`` itself and that of its output below ``.base_layer.out_proj``;
PEFT up to 0.21.2 counts the latter twice, and so does this reader for what such a version wrote. Rows of an embedding
(``trainable_token_indices``) are in ``.token_adapter.trainable_tokens_delta``. QALoRA and BD-LoRA hold factors in a
form of their own and are read as the plain LoRA that they are; KaSA has a ``.lora_diag``. What began as PiSSA, OLoRA,
CorDA or LoRA-GA is no delta of the plain base: it is read where a folder ``*_init`` beside it holds the adapter before
training, whose factors are subtracted. Source: huggingface/peft 0.21.
"""

from __future__ import annotations

from pathlib import Path

from loratool.adapter import Adapter, Loss
from loratool.formats.base import Evidence, Format
from loratool.formats.peft.config import refuse
from loratool.formats.peft.keys import PREFIX, normalise, unwrapped, without_adapter_name
from loratool.formats.peft.types import NAMES

__all__ = ["FORMAT", "PREFIX", "losses", "normalise", "read", "refuse", "sniff", "without_adapter_name", "write"]


def sniff(evidence: Evidence) -> str | None:
    """PEFT by its configuration, or by the prefix that only PEFT's own saves have."""
    if "peft_type" in evidence.config:
        return "adapter_config.json names a peft_type"
    if any(unwrapped(key).startswith(PREFIX) for key in evidence.keys):
        return f"keys begin with {PREFIX}"
    return None


def read(evidence: Evidence) -> Adapter:
    """Read a PEFT folder or file. Raises FormatError for what is malformed or refused by name."""
    from loratool.formats.peft.reading import read

    return read(evidence)


def write(adapter: Adapter, path: Path) -> None:
    """Write a PEFT folder: tensors, configuration, and the tokenizer files that travelled along."""
    from loratool.formats.peft.writing import write

    write(adapter, path)


def losses(adapter: Adapter) -> list[Loss]:
    """What PEFT cannot say: of an adapter of one of its other tuners nothing, else what its LoRA cannot."""
    from loratool.formats.peft.writing import losses

    return losses(adapter)


FORMAT = Format(
    name="peft",
    title="Hugging Face PEFT folder",
    kinds=("lora", "dora", "kasa", *map(str.lower, NAMES)),
    container="folder",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
)
