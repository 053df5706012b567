"""The public functions: what the command line's commands are, for Python.

Paths are local. Every function raises the errors of `loratool.errors` and prints nothing. Operations are imported by
the functions that need them: looking at headers starts at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool import __version__, formats
from loratool.adapter import Adapter, Loss, strengths_of
from loratool.errors import UsageError
from loratool.files import check_space, existing, prepare_output, staged
from loratool.formats.base import Evidence, Format
from loratool.model import Model, read_model
from loratool.tensors import parse_dtype

if TYPE_CHECKING:
    from loratool.ops.check import CheckReport
    from loratool.ops.compare import Comparison
    from loratool.ops.export_folder import FolderExport
    from loratool.ops.export_onnx import Export, ExportReport
    from loratool.ops.inspect import Inspection
    from loratool.ops.merge import Merge, MergeReport
    from loratool.ops.unmerge import UnmergeReport
    from loratool.ops.verify import VerifyReport
    from loratool.plan import Progress

AnyPath = str | os.PathLike[str]
Source = AnyPath | Adapter
Base = AnyPath | Model


@dataclass(frozen=True)
class Reading:
    """How inputs may be read: pickles and links that leave their folder only on the user's word; ``scaling`` for
    files that do not tell theirs; ``map``, a text file of names that no known format has (`formats.mapped`)."""

    allow_pickle: bool = False
    allow_links: bool = False
    scaling: float | None = None
    map: AnyPath | None = None

    @property
    def map_path(self) -> Path | None:
        """The map, if there is one. Raises LoratoolError where it is not there."""
        return None if self.map is None else existing(self.map, "map")


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did; the fields of ``convert --json``."""

    output: str
    source_format: str
    format: str
    modules: int
    bytes_written: int
    losses: tuple[str, ...]
    unmatched: tuple[str, ...]
    content_hash: str
    operation: str
    version: str
    inputs: Mapping[str, str]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Conversion:
    """A conversion worked out and not yet written: what goes to ``out``, and what does not."""

    adapter: Adapter
    out: Path
    format: Format
    losses: tuple[Loss, ...]
    unmatched: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def modules(self) -> int:
        """Modules that the output will have."""
        lost = {loss.name for loss in self.losses}
        return sum(self.adapter.spelling(name) not in lost for name in self.adapter.modules())

    def describe(self) -> dict[str, Any]:
        """The plan as plain data: every tensor, and what the run needs."""
        from loratool.ops.convert import describe

        return {
            "output": str(self.out),
            "source_format": self.adapter.metadata.format,
            "format": self.format.name,
            "modules": self.modules,
            **describe(self.adapter),
            "losses": [str(loss) for loss in self.losses],
            "unmatched": list(self.unmatched),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class FormatRow:
    """One format; the fields of ``formats --json``. ``detail`` says of each kind whether it is said exactly."""

    name: str
    title: str
    reads: bool
    writes: bool
    kinds: tuple[str, ...]
    detail: Mapping[str, str]


def read(
    path: AnyPath, *, format: str | None = None, base: Base | None = None, reading: Reading | None = None
) -> Adapter:
    """Read an adapter of any known format, detected by its content unless ``format`` names it.

    Only headers are read; tensors load when used. ``base`` helps where names are flattened (kohya). Raises
    LoratoolError (no such path), FormatError (not recognised, malformed, unsupported), UsageError (unknown format).
    """
    reading = reading or Reading()
    return _read(path, format, None if base is None else model_of(base, reading), reading)


def _read(
    path: AnyPath, format: str | None, model: Model | None, reading: Reading, modules: tuple[str, ...] = ()
) -> Adapter:
    """Read an adapter with the help of a base, or of the names of the ``modules`` it may mean."""
    evidence = Evidence(
        existing(path, "adapter"),
        reading.allow_pickle,
        reading.allow_links,
        reading.scaling,
        modules=model.modules if model else modules,
        base=model,
        map=reading.map_path,
    )
    adapter = formats.read_adapter(evidence, format)
    known = model.configs.get("") if model else None
    return adapter.with_metadata(base_config=known) if known else adapter


def detect(path: AnyPath, *, reading: Reading | None = None) -> tuple[str, str]:
    """The name of an adapter's format, and the reason why it is that. Raises FormatError when none fits."""
    reading = reading or Reading()
    evidence = Evidence(existing(path, "adapter"), reading.allow_pickle, reading.allow_links, map=reading.map_path)
    found, reason = formats.detect(evidence)
    return found.name, reason


def write(
    adapter: Adapter, path: AnyPath, *, format: str, overwrite: bool = False, allow_loss: bool = False
) -> list[Loss]:
    """Write an adapter as ``format``, complete or not at all; what was lost.

    Raises LossError (exit code 5), before anything is written, for what the format cannot say unless ``allow_loss``;
    LoratoolError when ``path`` exists, unless ``overwrite``.
    """
    from loratool.ops.convert import require_scaling

    require_scaling(adapter)
    chosen = formats.to_write(format)
    inputs = {"the adapter": adapter.metadata.path} if adapter.metadata.path else {}
    out = prepare_output(path, overwrite, inputs)
    losses = formats.check_losses(adapter, chosen, allow_loss)
    with staged(out, overwrite) as temporary:
        chosen.write(adapter, temporary)
    return losses


def inspect(path: Source, *, norms: bool = False, reading: Reading | None = None) -> Inspection:
    """Describe an adapter from its headers (with ``norms`` also the size of each update)."""
    from loratool.ops.inspect import inspect

    return inspect(adapter_of(path, reading), norms)


def list_formats() -> list[FormatRow]:
    """Every format: its name, whether it is read and written, and the kinds it can express.

    Of each kind: exact, rewritten (exactly, as another kind), partly (some forms), read (only) or no.
    """
    from loratool.formats import table

    return [FormatRow(f.name, f.title, True, f.writes, table.kinds(f), table.detail(f)) for f in formats.FORMATS]


def plan_convert(
    adapter: Source,
    out: AnyPath,
    *,
    to: str,
    source_format: str | None = None,
    base: Base | None = None,
    layout: str | None = None,
    uniform: bool = False,
    dtype: str = "keep",
    allow_loss: bool = False,
    allow_unmatched: bool = False,
    overwrite: bool = False,
    reading: Reading | None = None,
) -> Conversion:
    """Work out a conversion without writing anything. Raises all that `convert` would refuse."""
    from loratool.ops.changes import Changes, check_values

    chosen, stored, reading = formats.to_write(to), parse_dtype(dtype), reading or Reading()
    model = None if base is None else model_of(base, reading)
    source = (
        adapter if isinstance(adapter, Adapter) else read(adapter, format=source_format, base=model, reading=reading)
    )
    inputs = {"the adapter": source.metadata.path, "the base": model.path if model else None}
    path = prepare_output(out, overwrite, {what: path for what, path in inputs.items() if path})
    values = Changes()
    check_values(source, values)
    target, unmatched = (source, ()) if model is None else _fitted(source, model, allow_unmatched)
    target = _rewritten(target, layout, uniform, stored)
    losses = formats.check_losses(target, chosen, allow_loss)
    warnings = (*source.metadata.warnings, *values.warnings, *chosen.notes(target))
    planned = Conversion(target, path, chosen, tuple(losses), unmatched, warnings)
    check_space(path.parent, planned.describe()["disk_needed"])
    return planned


def _fitted(adapter: Adapter, model: Model, allow_unmatched: bool) -> tuple[Adapter, tuple[str, ...]]:
    """An adapter under the names of its base, and what has no place there. Raises MatchError."""
    from loratool.ops.convert import fit

    target, unmatched = fit(adapter, model, allow_unmatched)
    return target.with_metadata(base_config=model.configs.get("", {})), unmatched


def _rewritten(adapter: Adapter, layout: str | None, uniform: bool, dtype: str | None) -> Adapter:
    """The same deltas in the layout, of the ranks and of the dtype that were asked for."""
    from loratool.ops.convert import cast

    if layout is not None:
        from loratool.ops.relayout import relayout

        adapter = relayout(adapter, layout)
    if uniform:
        from loratool.ops.uniform import uniform as made_uniform

        adapter = made_uniform(adapter)
    return cast(adapter, dtype)


def convert(
    adapter: Source,
    out: AnyPath,
    *,
    to: str,
    source_format: str | None = None,
    base: Base | None = None,
    layout: str | None = None,
    uniform: bool = False,
    dtype: str = "keep",
    allow_loss: bool = False,
    allow_unmatched: bool = False,
    overwrite: bool = False,
    reading: Reading | None = None,
) -> ConvertReport:
    """Convert an adapter to another format: the same deltas under other names.

    ``dtype`` is one of keep, fp32, fp16, bf16. ``base`` gives names, and every module must then have its place in it.
    ``layout``, transformers-4 or transformers-5, names modules as that version does (experts one by one, or stacked).
    ``uniform`` pads ranks and folds scalings, so that all modules have one rank and one alpha.
    Raises what `read` and `write` raise, MatchError, and NumericError (NaN; a dtype that cannot hold a value).
    """
    planned = plan_convert(
        adapter,
        out,
        to=to,
        source_format=source_format,
        base=base,
        layout=layout,
        uniform=uniform,
        dtype=dtype,
        allow_loss=allow_loss,
        allow_unmatched=allow_unmatched,
        overwrite=overwrite,
        reading=reading,
    )
    return run_convert(planned, overwrite=overwrite)


def run_convert(planned: Conversion, *, overwrite: bool = False) -> ConvertReport:
    """Carry out a conversion: its output appears complete and flushed, or not at all."""
    from loratool.ops.convert import input_hashes, with_provenance
    from loratool.tensors import CONTENT_HASH, content_hash, digest

    adapter = planned.adapter
    inputs = input_hashes({f"adapter/{path.name}": path for path in adapter.metadata.weights})
    with staged(planned.out, overwrite) as temporary:
        planned.format.write(with_provenance(adapter, "convert", inputs), temporary)
        written = Evidence(temporary, allow_pickle=True).file  # our own
        size = sum(p.stat().st_size for p in (temporary, *temporary.rglob("*")) if p.is_file())
    return ConvertReport(
        output=str(planned.out),
        source_format=adapter.metadata.format,
        format=planned.format.name,
        modules=planned.modules,
        bytes_written=size,
        losses=tuple(map(str, planned.losses)),
        unmatched=planned.unmatched,
        content_hash=written.metadata.get(CONTENT_HASH)
        or content_hash((n, t.dtype, t.shape, digest(t)) for n, t in written.tensors.items()),
        operation="convert",
        version=__version__,
        inputs=inputs,
        warnings=planned.warnings,
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
    from loratool.ops.merge import prepare_merge

    strengths_of(adapters, strengths)
    stored = parse_dtype(dtype)
    reading = reading or Reading()
    model = model_of(base, reading)
    loaded = [a if isinstance(a, Adapter) else read(a, base=model, reading=reading) for a in adapters]
    return prepare_merge(model, loaded, strengths, stored, allow_unmatched)


def merge(
    base: Base,
    *adapters: Source | Sequence[Source],
    out: AnyPath,
    strengths: Sequence[float] | None = None,
    dtype: str = "keep",
    device: str = "auto",
    allow_unmatched: bool = False,
    undo: AnyPath | None = None,
    overwrite: bool = False,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Write ``base`` + the sum of strength x update to ``out``: a folder for a folder, a file for a file.

    Streamed: memory is bounded by a few blocks and the factors of a tensor, whatever the model's size. For kinds
    that need the base (DoRA): W + s (W' - W). ``undo`` is a file to write, for `unmerge`. Raises MatchError (a module
    without a target, a shape that differs), NumericError (NaN, overflow), FormatError, UsageError, LoratoolError
    (output exists, I/O, out of disk).
    """
    from loratool.ops.merge import run_merge

    flat = flattened(adapters)
    planned = plan_merge(base, flat, strengths, dtype=dtype, allow_unmatched=allow_unmatched, reading=reading)
    record = None if undo is None else os.fspath(undo)
    return run_merge(planned, os.fspath(out), device=device, overwrite=overwrite, undo=record, progress=progress)


def plan_unmerge(
    merged: Base, out: AnyPath, *, undo: AnyPath, overwrite: bool = False, reading: Reading | None = None
) -> dict[str, Any]:
    """What an unmerge would write, as plain data. Raises all that `unmerge` would refuse before it writes."""
    from loratool.ops.unmerge import describe

    return describe(model_of(merged, reading or Reading()), existing(undo, "undo file"), os.fspath(out), overwrite)


def unmerge(
    merged: Base,
    out: AnyPath,
    *,
    undo: AnyPath,
    overwrite: bool = False,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Write the base that ``merged`` was made from, bit for bit, from the file that `merge` wrote as ``undo``.

    Raises VerifyError when ``merged`` is another model than that merge wrote, FormatError when the undo file is
    damaged, LoratoolError (output exists, I/O, out of disk). Nothing is written unless it is the base.
    """
    from loratool.ops.unmerge import unmerge

    model = model_of(merged, reading or Reading())
    return unmerge(model, existing(undo, "undo file"), os.fspath(out), overwrite=overwrite, progress=progress)


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
) -> VerifyReport:
    """Replay the merge against ``merged``, block by block; ``.ok`` says whether every stored value agrees.

    ``tolerance`` is in units of the last place. Raises what `merge` raises before it writes.
    """
    from loratool.ops.verify import verify

    flat = flattened(adapters)
    planned = plan_merge(base, flat, strengths, dtype=dtype, allow_unmatched=allow_unmatched, reading=reading)
    other = model_of(merged, reading or Reading(), complete=False)  # what it lacks is what a proof tells
    return verify(planned, other, device=device, tolerance=tolerance, progress=progress)


def plan_export_onnx(
    base: AnyPath,
    adapters: Sequence[Source],
    strengths: Sequence[float] | None = None,
    *,
    mode: str | None = None,
    base_weights: Base | None = None,
    allow_unmatched: bool = False,
    reading: Reading | None = None,
) -> Export | FolderExport:
    """Work out an export to ONNX without writing anything. Raises all that `export_onnx` would refuse."""
    from loratool.onnx.graph import read_graph
    from loratool.onnx.operands import modules
    from loratool.ops.export_onnx import prepare_export

    path = existing(base, "model")
    if path.is_dir():
        from loratool.ops.export_folder import prepare_folder

        if base_weights is not None:
            raise UsageError("base weights are for an .onnx base", hint="a model folder has its own")
        merged = plan_merge(path, adapters, strengths, allow_unmatched=allow_unmatched, reading=reading)
        return prepare_folder(merged, mode, allow_unmatched)
    strengths_of(adapters, strengths)
    reading = reading or Reading()
    graph = read_graph(path, reading.allow_links)
    model = None if base_weights is None else model_of(base_weights, reading)
    known = modules(graph)
    loaded = [a if isinstance(a, Adapter) else _read(a, None, model, reading, known) for a in adapters]
    return prepare_export(graph, loaded, strengths, mode, model, allow_unmatched)


def export_onnx(
    base: AnyPath,
    *adapters: Source | Sequence[Source],
    out: AnyPath,
    strengths: Sequence[float] | None = None,
    mode: str | None = None,
    base_weights: Base | None = None,
    verify: bool | None = None,
    device: str = "auto",
    allow_unmatched: bool = False,
    overwrite: bool = False,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the ONNX graph ``base`` with the adapters in it to ``out``, streamed, and prove it in onnxruntime.

    Where ``base`` is a model folder, torch's exporter makes the graph of the merged model (extra ``export``).
    ``mode``: fold (into the weights), branch (constant side branches; the default where weights are quantised) or
    inputs (adapters as optional inputs). ``base_weights``, the checkpoint of the graph, finds weights by value where
    names are gone. ``verify`` None: where onnxruntime is there. Raises MatchError, FormatError (hostile or quantised),
    NumericError, VerifyError, UsageError, LoratoolError (a missing package, output exists, I/O).
    """
    from loratool.ops.export_onnx import run_export

    planned = plan_export_onnx(
        base,
        flattened(adapters),
        strengths,
        mode=mode,
        base_weights=base_weights,
        allow_unmatched=allow_unmatched,
        reading=reading,
    )
    return run_export(planned, os.fspath(out), verify=verify, overwrite=overwrite, device=device, progress=progress)


def check(
    adapter: Source,
    *,
    engine: str,
    max_rank: int | None = None,
    base: Base | None = None,
    reading: Reading | None = None,
) -> CheckReport:
    """Whether an engine (vllm, sglang, llama.cpp, mlx, onnxruntime, comfyui, diffusers) accepts an adapter.

    For each no the report names the command that mends it. Raises UsageError for an unknown engine.
    """
    from loratool.ops.check import check
    from loratool.ops.check import engine as engine_of

    chosen = engine_of(engine)
    model = None if base is None else model_of(base, reading or Reading())
    source = adapter if isinstance(adapter, Adapter) else read(adapter, base=model, reading=reading)
    losses: Sequence[Loss] = ()
    if chosen.format:
        losses = formats.by_name(chosen.format).losses(source)
    called = "ADAPTER" if isinstance(adapter, Adapter) else os.fspath(adapter)
    return check(source, engine, max_rank, losses, called)


def compare(
    first: Source,
    second: Source,
    *,
    base: Base | None = None,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """The relative difference of two adapters' updates, module by module, blind to how they are factored."""
    from loratool.names import present
    from loratool.ops.changes import Changes, check_values
    from loratool.ops.compare import compare

    model = None if base is None else model_of(base, reading or Reading())
    found = [
        source if isinstance(source, Adapter) else read(source, base=model, reading=reading)
        for source in (first, second)
    ]
    one, other = found if model is None else [present(adapter, model) for adapter in found]
    for adapter in (one, other):
        check_values(adapter, Changes())
    return compare(one, other, model, progress)


def adapter_of(source: Source, reading: Reading | None) -> Adapter:
    """The adapter itself, read where a path is given."""
    return source if isinstance(source, Adapter) else read(source, reading=reading)


def model_of(base: Base, reading: Reading, complete: bool = True) -> Model:
    """The model itself, described from its headers where a path is given."""
    if isinstance(base, Model):
        return base
    return read_model(Path(base), reading.allow_links, reading.allow_pickle, complete)


def flattened(adapters: Sequence[Source | Sequence[Source]]) -> list[Source]:
    """Adapters given one by one or as one list."""
    found: list[Source] = []
    for adapter in adapters:
        if isinstance(adapter, (list, tuple)):
            found += adapter
        else:
            found.append(adapter)  # type: ignore[arg-type]
    return found


__all__ = [
    "CheckReport",
    "Conversion",
    "ConvertReport",
    "FormatRow",
    "Reading",
    "check",
    "compare",
    "convert",
    "detect",
    "export_onnx",
    "inspect",
    "list_formats",
    "merge",
    "plan_convert",
    "plan_export_onnx",
    "plan_merge",
    "plan_unmerge",
    "read",
    "run_convert",
    "unmerge",
    "verify",
    "write",
]
