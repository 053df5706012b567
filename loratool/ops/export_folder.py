"""Export an ONNX graph from a model folder: merge, let torch's exporter write the graph, and prove it by running.

The proof goes another way than the output: the unmerged model is exported too, and side branches in its graph must
give what the graph of the merged model gives.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loratool.adapter import Adapter
from loratool.errors import LoratoolError, MatchError, UsageError
from loratool.files import prepare_output
from loratool.onnx.fold import Change, Edit
from loratool.onnx.folder import Given, check_folder, export_folder, name_sizes
from loratool.onnx.graph import Graph, read_graph
from loratool.onnx.resolve import resolve
from loratool.onnx.verify import has_onnxruntime, onnxruntime
from loratool.ops.export_onnx import MODES, Export, ExportReport, described, prepare_export, run_export
from loratool.ops.merge import Merge, run_merge
from loratool.plan import Progress

GRAPH = "graph.onnx"
_TRACES = "stack_trace"  # what dynamo notes of the exporter's own folders


@dataclass(frozen=True, eq=False)
class FolderExport:
    """An export from a folder worked out and not yet begun: the merge, and what is made of it."""

    merge: Merge
    mode: str
    allow_unmatched: bool = False

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters."""
        return self.merge.adapters

    @property
    def inputs(self) -> dict[str, Path]:
        """Files whose sha256 goes into the provenance."""
        config = self.merge.model.path / "config.json"
        return {"base/config.json": config, **self.merge.plan.inputs}


@dataclass(frozen=True, eq=False)
class Exported(Export):
    """An export whose graph comes from a folder."""

    sources: FolderExport | None = None

    @property
    def inputs(self) -> dict[str, Path]:
        """Files of the folder and of the adapters."""
        return {} if self.sources is None else self.sources.inputs


def prepare_folder(merge: Merge, mode: str | None = None, allow_unmatched: bool = False) -> FolderExport:
    """What is made of a merge that was worked out. Raises what `check_folder` raises, UsageError (unknown mode)."""
    if mode is not None and mode not in MODES:
        raise UsageError(f"unknown mode {mode!r}", hint=f"one of {', '.join(MODES)}")
    check_folder(merge.model.path)
    return FolderExport(merge, mode or "fold", allow_unmatched)


def check(planned: FolderExport, out: str | Path, overwrite: bool, verify: bool | None = None) -> None:
    """Check where the output goes, and what is to prove it. Raises LoratoolError."""
    if verify:
        onnxruntime()
    given = {f"adapter {n}": a.metadata.path for n, a in enumerate(planned.adapters, 1) if a.metadata.path}
    prepare_output(Path(out), overwrite, {"the base": planned.merge.model.path, **given})


def run_folder(
    planned: FolderExport,
    out: str | Path,
    *,
    verify: bool | None = None,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> ExportReport:
    """Merge, export, write and prove. Raises what `run_merge`, `export_folder` and `run_export` raise."""
    began, path = time.perf_counter(), Path(out)
    check(planned, path, overwrite, verify)
    proving = verify is not False and has_onnxruntime()
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.loratool-") as work:
        fold = _folded if planned.mode == "fold" else _beside
        made, lost = fold(planned, Path(work), proving, device)
        if verify and not made.changes:
            raise LoratoolError(
                "the export cannot be proven", "; ".join(made.warnings), "--no-verify exports regardless"
            )
        report = run_export(
            made,
            path,
            verify=verify if made.changes else False,
            overwrite=overwrite,
            device=device,
            progress=progress,
        )
    seconds = round(time.perf_counter() - began, 3)
    modules = planned.merge.changes.modules
    return replace(report, seconds=seconds, modules=modules, lost_to_rounding=max(lost, report.lost_to_rounding))


def _folded(planned: FolderExport, work: Path, proving: bool, device: str) -> tuple[Exported, float]:
    """The graph of the merged folder, to be proven by that of the base; and the share of changes lost to rounding."""
    merge = planned.merge
    notes: tuple[str, ...] = ()
    if proving:
        try:
            export_folder(merge.model.path, _new(work / "base"))
        except LoratoolError as error:  # weights that only a merge reads: pickles
            proving, notes = False, (f"not verified: {error}",)
    merged = run_merge(merge, work / "merged", device=device)
    given = export_folder(work / "merged", _new(work / "graph"))
    graph = read_graph(work / "graph" / GRAPH)
    base = read_graph(work / "base" / GRAPH) if proving else graph
    changes, more = _changes(planned, base) if not notes else ((), ())
    edit = _clean(Edit.of(graph), given)
    made = Exported(
        graph=base,
        adapters=merge.adapters,
        strengths=merge.strengths,
        mode=planned.mode,
        changes=changes,
        edit=edit,
        unmatched=tuple(u.name for u in merge.changes.unmatched),
        warnings=(*merge.plan.warnings, *notes, *more),
        sources=planned,
    )
    return made, merged.lost_to_rounding


def _beside(planned: FolderExport, work: Path, proving: bool, device: str) -> tuple[Exported, float]:
    """The graph of the base folder, with the adapters beside its weights."""
    merge = planned.merge
    given = export_folder(merge.model.path, _new(work / "base"))
    graph = read_graph(work / "base" / GRAPH)
    found = prepare_export(graph, merge.adapters, merge.strengths, planned.mode, None, planned.allow_unmatched)
    _clean(found.edit, given)
    held = {field.name: getattr(found, field.name) for field in fields(Export)}
    return Exported(**held, sources=planned), 0.0


def _new(folder: Path) -> Path:
    """Where a graph goes, in a folder of its own."""
    folder.mkdir()
    return folder / GRAPH


def _changes(planned: FolderExport, graph: Graph) -> tuple[tuple[Change, ...], tuple[str, ...]]:
    """Where the adapters would change the graph of the base, for the proof and the report."""
    found: list[Change] = []
    left = 0
    for number, (adapter, strength) in enumerate(zip(planned.adapters, planned.merge.strengths, strict=True)):
        try:
            sites, unmatched = resolve(graph, adapter)
        except MatchError as error:
            return (), (f"not verified: {error}",)
        found += [Change(site, strength, number) for site in sites]
        left += len(unmatched)
    if left > len(planned.merge.changes.unmatched):
        return (), (f"not verified: {left} targets of the adapter are not to be seen in the graph",)
    return tuple(found), ()


def _clean(edit: Edit, given: Mapping[str, Given]) -> Edit:
    """Name the free sizes, and take out what the exporter noted of its own folders."""
    name_sizes(edit.model, given)
    for node in edit.model.graph.node:
        kept = [(entry.key, entry.value) for entry in node.metadata_props if not entry.key.endswith(_TRACES)]
        del node.metadata_props[:]
        for key, value in kept:
            node.metadata_props.add(key=key, value=value)
    return edit


def describe(planned: FolderExport, out: str | Path) -> dict[str, Any]:
    """A plan as plain data: the merge's, under the export's words."""
    from loratool.plan import thread_count

    plan, merge = planned.merge.plan, planned.merge
    return {
        "output": str(out),
        "mode": planned.mode,
        "modules": merge.changes.modules,
        "unmatched": [u.name for u in merge.changes.unmatched],
        "bytes_to_read": plan.bytes_read,
        "bytes_to_write": plan.bytes_written,
        "disk_needed": 4 * plan.bytes_written,  # the merged folder, both graphs, the output
        "peak_memory": max(plan.peak_memory(thread_count()), 3 * plan.bytes_written),  # torch holds the model whole
        "threads": thread_count(),
        "tensors": [described(step, "merge" if step.parts else "copy") for step in plan.steps],
        "warnings": list(plan.warnings),
    }
