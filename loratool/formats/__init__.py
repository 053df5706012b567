"""Adapter formats: one file each, one visible tuple, asked in this order.

Adding one: a file whose docstring is its specification, an entry in `FORMATS`, and a fixture.
"""

from __future__ import annotations

import re

from loratool.adapter import Adapter, Loss
from loratool.errors import FormatError, LossError, UsageError, some
from loratool.formats import (
    ai_toolkit,
    attn_procs,
    bfl,
    cloneofsimo,
    comfyui,
    diffusers,
    diffusers_old,
    gguf,
    kohya,
    litgpt,
    loralib,
    lycoris,
    mapped,
    mistral,
    mlx,
    onetrainer,
    onnx_adapter,
    peft,
    raw,
    tinker,
    torchtune,
    xlabs,
)
from loratool.formats.base import Evidence, Format

FORMATS: tuple[Format, ...] = (
    gguf.FORMAT,
    onnx_adapter.FORMAT,
    mlx.FORMAT,
    torchtune.FORMAT,
    litgpt.FORMAT,
    mistral.FORMAT,
    tinker.FORMAT,
    cloneofsimo.FORMAT,
    xlabs.FORMAT,
    bfl.FORMAT,
    attn_procs.FORMAT,
    diffusers_old.FORMAT,
    peft.FORMAT,
    lycoris.FORMAT,
    ai_toolkit.FORMAT,
    onetrainer.FORMAT,
    kohya.FORMAT,
    comfyui.FORMAT,
    diffusers.FORMAT,
    loralib.FORMAT,
    raw.FORMAT,
)

# dialects that are known by their keys but not read yet: refused by name, never half-read
RECOGNISED: tuple[tuple[str, str], ...] = (
    (
        "a NeMo or Megatron checkpoint (export it in Hugging Face's form)",
        r"\.adapter\.linear_(in|out)\.|\.lora_kqv_adapter\.",
    ),
    ("a control LoRA (ControlNet)", r"^lora_controlnet$"),
    ("a ControlNet-LLLite", r"^lllite_"),
    ("a T-LoRA, whose initial factors are not in the file", r"\.lambda_layer$"),
)
_INVERSION = re.compile(r"^(emb_params|clip_[lg]|t5|llama|string_to_param(\..*)?|<[^>]+>)$")  # all that a file has


def by_name(name: str) -> Format:
    """The format of that name. Raises UsageError."""
    for format in (*FORMATS, mapped.FORMAT):
        if format.name == name:
            return format
    known = ", ".join(format.name for format in FORMATS)
    raise UsageError("unknown format", repr(name), f"known formats: {known}")


def to_write(name: str | None, source: str = "") -> Format:
    """The format of that name, or where none is named the source's own, to be written. Raises UsageError.

    Where the source's own is only read, it is kohya's: those are dialects of image models; of names of the user's, raw.
    """
    chosen = by_name(name or source)
    if not chosen.writes and name is None:
        return raw.FORMAT if chosen is mapped.FORMAT else kohya.FORMAT
    if not chosen.writes:
        known = ", ".join(format.name for format in FORMATS if format.writes)
        raise UsageError("a format that is only read", repr(name), f"formats that are written: {known}")
    return chosen


def detect(evidence: Evidence) -> tuple[Format, str]:
    """The format of an input and why, from its content only. Raises FormatError when none recognises it."""
    if raw.MODULES in evidence.file.metadata:
        return raw.FORMAT, "written by loratool"
    if reason := mapped.sniff(evidence):
        return mapped.FORMAT, reason
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
    if evidence.keys and all(map(_INVERSION.match, evidence.keys)):
        raise FormatError("this is a textual inversion, not an adapter", f"{evidence.weights}: {evidence.keys[0]}")
    sample = ", ".join(evidence.keys[:3]) or "none"
    unknown = "no known adapter format" + (
        f", and the map {evidence.map} knows no tensor of it" if evidence.map else ""
    )
    raise FormatError(unknown, evidence.path, f"tensors found: {sample} (--map FILE tells what such names mean)")


def read_adapter(evidence: Evidence, format: str | None = None) -> Adapter:
    """Read an adapter, in the named format or the one its content shows. Raises FormatError, UsageError."""
    if evidence.map is not None and format not in (None, mapped.FORMAT.name):
        raise UsageError("a map and a format that has its own names", str(format), "give --from or --map, not both")
    chosen = by_name(format) if format else detect(evidence)[0]
    return chosen.read(evidence)


def check_losses(adapter: Adapter, format: Format, allow_loss: bool = False) -> list[Loss]:
    """What ``format`` cannot say of ``adapter``. Raises LossError unless ``allow_loss``."""
    losses = [*format.losses(adapter), *_beyond(adapter, format)]
    if losses and not allow_loss:
        raise LossError(
            f"{format.name} cannot say {len(losses)} of {len(adapter.updates) + len(adapter.carried)} parts",
            some(losses),
            f"{_first_the_base(adapter, losses)}--allow-loss writes it without them",
            [str(loss) for loss in losses],
        )
    return losses


def _first_the_base(adapter: Adapter, losses: list[Loss]) -> str:
    """What to try before losing what only lacks the shape of its weight."""
    lost = {loss.name for loss in losses}
    open_ended = any(0 in u.shape for n, u in adapter.updates.items() if adapter.spelling(n) in lost)
    return "--base tells the shapes that the file does not; " if open_ended else ""


def _beyond(adapter: Adapter, format: Format) -> list[Loss]:
    """What only a configuration says: PEFT's layers stacked anew, by whose numbers the modules are named."""
    if format.name in ("peft", "raw") or not adapter.metadata.config.get("layer_replication"):
        return []
    return [Loss("layer_replication", "a stack of layers that is not the base's")]
