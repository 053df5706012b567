"""`onetrainer`: those of OneTrainer's outputs that are no other program's too.

LEGACY: flattened names of diffusers behind ``lora_transformer_`` or ``lora_prior_unet_``, text encoders behind
``lora_te1_``, ``lora_te2_``, ...; its T5 of FLUX is number 2, where sd-scripts' is number 3. OMI and newer models of
2025: dotted names behind the component (``unet.``, ``transformer.``, ``clip_l.``), of diffusers or of the original
repository, with kohya's suffixes and alphas. ORIGINAL: bare dotted names of the original repository. In all of them
suffixes are kohya's or PEFT's, ``.alpha`` counts and without it the scaling is 1.

Its other outputs are `diffusers` (alpha folded in), `kohya`, and `comfyui`. OFT is PEFT's, rotating inputs;
``oft_R.scaled_oft`` tells that its values are divided, by the root of their number where that is an integer, else by
``2 sqrt(b - 1)``. Read only. Source: Nerogar/OneTrainer 23df383.
"""

from __future__ import annotations

import re

from loratool.adapter import Adapter
from loratool.architectures import identify_names
from loratool.formats import dialects
from loratool.formats.base import Evidence, Format
from loratool.formats.dialects import READ, has_component, is_language_model, is_slot, normalise

_FLAT = re.compile(r"^lora_(transformer|prior_unet|prior_te)_")
_KOHYA_SLOT = re.compile(r"\.lora_(down|up)\.weight$")
_NATIVE = re.compile(
    r"^(input_blocks|middle_block|output_blocks|joint_blocks|double_blocks|blocks|double_stream_blocks)\.\d"
    r"|^layers\.\d+\.(attention\.(qkv|out)|adaLN_modulation)\b"  # language models have feed_forward, too
)


def sniff(evidence: Evidence) -> str | None:
    """By its flattened prefixes; kohya's suffixes behind a component; bare names of a known original repository."""
    for key in evidence.keys:
        if _FLAT.match(key):
            return f"keys such as {key}"
        name = normalise(key)
        if _KOHYA_SLOT.search(name) and has_component(name) and not is_language_model(name):
            return f"kohya's suffixes behind a pipeline component, such as {key}"
    return _original(evidence)


def _original(evidence: Evidence) -> str | None:
    """Whether all are bare names of the original repository of one known model, other than diffusers' own."""
    native = next((key for key in evidence.keys if _NATIVE.match(key) and is_slot(key)), None)
    if native is None or evidence.config:
        return None
    names = {found[0] for key in evidence.keys if (found := READ.split(key))}
    known = identify_names(names)
    return f"bare names of the original {known.title}, such as {native}" if known else None


def read(evidence: Evidence) -> Adapter:
    """Read such a file. Raises FormatError for what is malformed or unknown."""
    return dialects.read(evidence, "onetrainer")


FORMAT = Format(
    name="onetrainer",
    title="OneTrainer file: LEGACY, OMI and ORIGINAL names, read only",
    kinds=("lora", "dora", "loha", "lokr", "oft"),
    container="file",
    sniff=sniff,
    read=read,
)
