"""The public functions: what the command line's commands are, for Python.

Paths are local. Every function raises the errors of `loratool.errors` and prints nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loratool import formats
from loratool.adapter import Adapter, Loss
from loratool.errors import UsageError
from loratool.files import existing, prepare_output, staged
from loratool.formats.base import Evidence
from loratool.model import Model, read_model
from loratool.ops import compare as comparing
from loratool.ops import convert as converting
from loratool.ops import inspect as inspecting
from loratool.ops import verify as verifying
from loratool.ops.merge import Merge, MergeReport, Progress, prepare_merge, run_merge

AnyPath = str | os.PathLike[str]
Source = AnyPath | Adapter
Base = AnyPath | Model


@dataclass(frozen=True)
class Reading:
    """How inputs may be read: pickles and links that leave their folder only on the user's word; ``scaling`` for
    files that do not tell theirs."""

    allow_pickle: bool = False
    allow_links: bool = False
    scaling: float | None = None


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did; the fields of ``convert --json``."""

    output: str
    source_format: str
    format: str
    modules: int
    losses: tuple[str, ...]
    unmatched: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class FormatRow:
    """One format; the fields of ``formats --json``."""

    name: str
    title: str
    reads: bool
    writes: bool
    kinds: tuple[str, ...]


def read(
    path: AnyPath, *, format: str | None = None, base: Base | None = None, reading: Reading | None = None
) -> Adapter:
    """Read an adapter of any known format, detected by its content unless ``format`` names it.

    Only headers are read; tensors load when used. ``base`` helps where names are flattened (kohya). Raises
    LoratoolError (no such path), FormatError (not recognised, malformed, unsupported), UsageError (unknown format).
    """
    reading = reading or Reading()
    modules = _model(base, reading).modules if base is not None else ()
    evidence = Evidence(existing(path, "adapter"), reading.allow_pickle, reading.allow_links, reading.scaling, modules)
    return formats.read_adapter(evidence, format)


def detect(path: AnyPath, *, reading: Reading | None = None) -> tuple[str, str]:
    """The name of an adapter's format, and the reason why it is that. Raises FormatError when none fits."""
    reading = reading or Reading()
    evidence = Evidence(existing(path, "adapter"), reading.allow_pickle, reading.allow_links)
    found, reason = formats.detect(evidence)
    return found.name, reason


def write(
    adapter: Adapter, path: AnyPath, *, format: str, overwrite: bool = False, allow_loss: bool = False
) -> list[Loss]:
    """Write an adapter as ``format``, complete or not at all; what was lost.

    Raises LossError (exit code 5), before anything is written, for what the format cannot say unless ``allow_loss``;
    LoratoolError when ``path`` exists, unless ``overwrite``.
    """
    converting.require_scaling(adapter)
    chosen = formats.by_name(format)
    inputs = {"the adapter": adapter.metadata.path} if adapter.metadata.path else {}
    out = prepare_output(path, overwrite, inputs)
    losses = formats.check_losses(adapter, chosen, allow_loss)
    with staged(out, overwrite) as temporary:
        chosen.write(adapter, temporary)
    return losses


def inspect(path: Source, *, norms: bool = False, reading: Reading | None = None) -> inspecting.Inspection:
    """Describe an adapter from its headers (with ``norms`` also the size of each update)."""
    return inspecting.inspect(_adapter(path, reading), norms)


def list_formats() -> list[FormatRow]:
    """Every format: its name, whether it is read and written, and the kinds it can express."""
    return [FormatRow(f.name, f.title, True, True, f.kinds) for f in formats.FORMATS]


def convert(
    adapter: Source,
    out: AnyPath,
    *,
    to: str,
    source_format: str | None = None,
    base: Base | None = None,
    dtype: str = "keep",
    allow_loss: bool = False,
    allow_unmatched: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    reading: Reading | None = None,
) -> ConvertReport:
    """Convert an adapter to another format: the same deltas under other names.

    ``dtype`` is one of keep, fp32, fp16, bf16. ``base`` gives names, and every module must then have its place in it.
    Raises what `read` and `write` raise, MatchError, and NumericError when a dtype cannot hold a value.
    """
    chosen = formats.by_name(to)
    if dtype not in converting.DTYPES:
        raise UsageError("unknown dtype", repr(dtype), f"one of {', '.join(converting.DTYPES)}")
    reading = reading or Reading()
    model = None if base is None else _model(base, reading)
    source = (
        adapter if isinstance(adapter, Adapter) else read(adapter, format=source_format, base=model, reading=reading)
    )
    converting.require_scaling(source)
    unmatched: tuple[str, ...] = ()
    target = source
    if model is not None:
        target, unmatched = converting.fit(source, model, allow_unmatched)
    target = converting.cast(target, converting.DTYPES[dtype])
    losses = formats.check_losses(target, chosen, allow_loss)
    inputs = {"the adapter": source.metadata.path} if source.metadata.path else {}
    path = prepare_output(out, overwrite, inputs)
    if not dry_run:
        weights = {f"adapter/{p.name}": p for p in source.metadata.weights}
        target = converting.with_provenance(target, "convert", weights)
        write(target, path, format=to, overwrite=overwrite, allow_loss=allow_loss)
    return ConvertReport(
        output=str(path),
        source_format=source.metadata.format,
        format=to,
        modules=len(source.modules()),
        losses=tuple(map(str, losses)),
        unmatched=unmatched,
        warnings=source.metadata.warnings,
    )


def plan_merge(
    base: Base,
    adapters: Sequence[Source],
    strengths: Sequence[float] | None = None,
    *,
    dtype: str = "keep",
    allow_unmatched: bool = False,
    reading: Reading | None = None,
) -> Merge:
    """Work out a merge without writing anything: what ``--dry-run`` shows. Raises all that a merge would refuse."""
    if not adapters:
        raise UsageError("no adapter given")
    if dtype not in converting.DTYPES:
        raise UsageError("unknown dtype", repr(dtype), f"one of {', '.join(converting.DTYPES)}")
    if strengths and len(strengths) != len(adapters):
        raise UsageError(
            f"{len(strengths)} strengths for {len(adapters)} adapters",
            hint="give -s once for each adapter, or never",
        )
    reading = reading or Reading()
    model = _model(base, reading)
    loaded = [a if isinstance(a, Adapter) else read(a, base=model, reading=reading) for a in adapters]
    return prepare_merge(model, loaded, strengths, converting.DTYPES[dtype], allow_unmatched)


def merge(
    base: Base,
    *adapters: Source | Sequence[Source],
    out: AnyPath,
    strengths: Sequence[float] | None = None,
    dtype: str = "keep",
    device: str = "auto",
    allow_unmatched: bool = False,
    overwrite: bool = False,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Write ``base`` + the sum of strength x update to ``out``: a folder for a folder, a file for a file.

    Streamed: memory is bounded by a few blocks and the factors of a tensor, whatever the model's size. For kinds
    that need the base (DoRA): W + s (W' - W). Raises MatchError (a module without a target, a shape that differs),
    NumericError (NaN, overflow), FormatError, UsageError, LoratoolError (output exists, I/O, out of disk).
    """
    flat = _flat(adapters)
    planned = plan_merge(base, flat, strengths, dtype=dtype, allow_unmatched=allow_unmatched, reading=reading)
    return run_merge(planned, os.fspath(out), device=device, overwrite=overwrite, progress=progress)


def verify(
    base: Base,
    *adapters: Source | Sequence[Source],
    merged: Base,
    strengths: Sequence[float] | None = None,
    dtype: str = "keep",
    device: str = "auto",
    tolerance: int = 0,
    allow_unmatched: bool = False,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> verifying.VerifyReport:
    """Replay the merge against ``merged``, block by block; ``.ok`` says whether every stored value agrees.

    ``tolerance`` is in units of the last place. Raises what `merge` raises before it writes.
    """
    flat = _flat(adapters)
    planned = plan_merge(base, flat, strengths, dtype=dtype, allow_unmatched=allow_unmatched, reading=reading)
    other = _model(merged, reading or Reading())
    return verifying.verify(planned, other, device=device, tolerance=tolerance, progress=progress)


def compare(
    first: Source, second: Source, *, base: Base | None = None, reading: Reading | None = None
) -> comparing.Comparison:
    """The relative difference of two adapters' updates, module by module, blind to how they are factored."""
    model = None if base is None else _model(base, reading or Reading())
    one, other = (_adapter(source, reading) for source in (first, second))
    for adapter in (one, other):
        converting.require_scaling(adapter)
    return comparing.compare(one, other, model)


def _adapter(source: Source, reading: Reading | None) -> Adapter:
    return source if isinstance(source, Adapter) else read(source, reading=reading)


def _model(base: Base, reading: Reading) -> Model:
    return base if isinstance(base, Model) else read_model(Path(base), reading.allow_links)


def _flat(adapters: Sequence[Source | Sequence[Source]]) -> list[Source]:
    """Adapters given one by one or as one list."""
    found: list[Source] = []
    for adapter in adapters:
        if isinstance(adapter, (list, tuple)):
            found += adapter
        else:
            found.append(adapter)  # type: ignore[arg-type]
    return found


__all__ = [
    "ConvertReport",
    "FormatRow",
    "Reading",
    "compare",
    "convert",
    "detect",
    "inspect",
    "list_formats",
    "merge",
    "plan_merge",
    "read",
    "verify",
    "write",
]
