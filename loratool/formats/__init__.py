"""Adapter formats: one file each, one visible tuple, asked in this order.

Adding one: a file whose docstring is its specification, an entry in `FORMATS`, and a fixture.
"""

from __future__ import annotations

import re

from loratool.adapter import Adapter, Loss
from loratool.errors import FormatError, LossError, UsageError, some
from loratool.formats import diffusers, kohya, peft, raw
from loratool.formats.base import Evidence, Format

FORMATS: tuple[Format, ...] = (peft.FORMAT, kohya.FORMAT, diffusers.FORMAT, raw.FORMAT)

# dialects that are known by their keys but not read yet: refused by name, never half-read
RECOGNISED: tuple[tuple[str, str], ...] = (
    ("cloneofsimo", r"^[a-z_]+:\d+:(up|down)$"),
    ("a control LoRA (ControlNet)", r"^lora_controlnet$"),
    ("a ControlNet-LLLite", r"^lllite_"),
    ("xlabs", r"(double|single)_blocks\.\d+\.processor\.(qkv|proj)_lora"),
    ("attn-procs", r"\.processor\.to_(q|k|v|out)_lora\."),
    ("diffusers-old", r"\.lora\.(down|up)\.weight$|\.lora_linear_layer\.(down|up)\.weight$"),
    ("onetrainer", r"^lora_(transformer|prior_unet|prior_te)_"),
    ("kohya OFT", r"^oft_unet_|\.oft_blocks|\.oft_diag$"),
    ("lycoris (names of its own wrapper)", r"^lycoris_"),
    ("LoHa", r"\.hada_(w\d_[ab]|t\d)$"),
    ("LoKr", r"\.lokr_(w\d(_[ab])?|t\d)$"),
    ("GLoRA", r"\.[ab][12]\.weight$"),
    ("(IA)3", r"\.(ia3_l|on_input)$"),
    ("PEFT OFT", r"\.oft_R\b"),
    ("BOFT", r"\.boft_[Rs]$"),
    ("mlx", r"\.lora_[ab]$"),
    ("torchtune", r"\.lora_[ab]\.weight$"),
    ("a sparse residual (bias_indices)", r"\.bias_(indices|values|size)$"),
    ("a ComfyUI patch", r"\.(set_weight|reshape_weight)$"),
    ("a textual inversion, not an adapter", r"^(emb_params|clip_[lg]|string_to_param|<[^>]+>)$"),
)


def by_name(name: str) -> Format:
    """The format of that name. Raises UsageError."""
    for format in FORMATS:
        if format.name == name:
            return format
    known = ", ".join(format.name for format in FORMATS)
    raise UsageError("unknown format", repr(name), f"known formats: {known}")


def detect(evidence: Evidence) -> tuple[Format, str]:
    """The format of an input and why, from its content only. Raises FormatError when none recognises it."""
    for name, pattern in RECOGNISED:
        found = next((key for key in evidence.keys if re.search(pattern, key)), None)
        if found is not None and "peft_type" not in evidence.config:
            raise FormatError(
                f"this is {name}, which is not supported yet",
                f"{evidence.weights}: {found}",
                "loratool formats lists what is read",
            )
    for format in FORMATS:
        reason = format.sniff(evidence)
        if reason:
            return format, reason
    sample = ", ".join(evidence.keys[:3]) or "none"
    raise FormatError("no known adapter format", evidence.path, f"tensors found: {sample}")


def read_adapter(evidence: Evidence, format: str | None = None) -> Adapter:
    """Read an adapter, in the named format or the one its content shows. Raises FormatError."""
    chosen = by_name(format) if format else detect(evidence)[0]
    return chosen.read(evidence)


def check_losses(adapter: Adapter, format: Format, allow_loss: bool = False) -> list[Loss]:
    """What ``format`` cannot say of ``adapter``. Raises LossError unless ``allow_loss``."""
    losses = format.losses(adapter)
    if losses and not allow_loss:
        raise LossError(
            f"{format.name} cannot say {len(losses)} of {len(adapter.updates) + len(adapter.carried)} parts",
            some(losses),
            "--allow-loss writes it without them",
            [str(loss) for loss in losses],
        )
    return losses
