"""Export a merged ONNX graph: what an adapter changes, folded into an existing graph, and proven by running it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool import __version__
from loratool.adapter import Adapter, is_bias, strengths_of
from loratool.errors import FormatError, MatchError, UsageError, some
from loratool.files import prepare_output, remove, staged_beside
from loratool.model import Model
from loratool.onnx.fold import Change, Edit, Written, check_output, external_name, lay_out, write_graph
from loratool.onnx.graph import Graph
from loratool.onnx.resolve import resolve
from loratool.ops.changes import Changes, check_values
from loratool.ops.merge import peak_bytes
from loratool.plan import OutputFile, Plan, Progress, Step, thread_count

if TYPE_CHECKING:
    from loratool.onnx.verify import Trial, Verification
    from loratool.ops.export_folder import FolderExport

MODES = ("fold", "branch", "inputs")  # each a file of `loratool.onnx`, whose function of that name makes the graph


@dataclass(frozen=True)
class ExportReport:
    """What an export did; the fields of ``export-onnx --json``.

    ``resolved`` tells for each module its weight in the graph and what found it. ``max_abs_diff`` is the largest
    difference between the output and the base with side branches, ``max_effect`` that between it and the base; both
    are None where nothing was run.
    """

    output: str
    mode: str
    modules: int
    resolved: Mapping[str, Mapping[str, str]]
    unmatched: tuple[str, ...]
    adapters: tuple[str, ...]
    external_data: str | None
    verified: bool
    max_abs_diff: float | None
    max_effect: float | None
    providers: tuple[str, ...]
    bytes_written: int
    seconds: float
    peak_bytes: int
    lost_to_rounding: float
    content_hash: str
    operation: str
    version: str
    strengths: tuple[float, ...]
    inputs: Mapping[str, str]
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Export:
    """An export worked out and not yet written."""

    graph: Graph
    adapters: tuple[Adapter, ...]
    strengths: tuple[float, ...]
    mode: str
    changes: tuple[Change, ...]
    edit: Edit
    unmatched: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def modules(self) -> int:
        """Modules that change: targets of all adapters, biases apart."""
        return len({(c.adapter, c.site.module) for c in self.changes if not is_bias(c.site.module)})

    @property
    def inputs(self) -> dict[str, Path]:
        """Files whose sha256 goes into the provenance."""
        folder = self.graph.path.parent
        found = {f"base/{path.relative_to(folder).as_posix()}": path for path in self.graph.files}
        for number, adapter in enumerate(self.adapters, 1):
            found.update({f"adapter{number}/{path.name}": path for path in adapter.metadata.weights})
        return found

    @property
    def resolved(self) -> dict[str, dict[str, str]]:
        """For each module its weights in the graph, and what found them."""
        found: dict[str, dict[str, str]] = {}
        for site in (change.site for change in self.changes):
            entry = found.setdefault(site.module, {"weight": site.weight.value.name, "resolver": site.resolver})
            if site.weight.value.name not in entry["weight"].split(", "):
                entry["weight"] += f", {site.weight.value.name}"
        return found


def prepare_export(
    graph: Graph,
    adapters: Sequence[Adapter],
    strengths: Sequence[float] | None = None,
    mode: str | None = None,
    base_weights: Model | None = None,
    allow_unmatched: bool = False,
) -> Export:
    """Find every target in the graph and work out the new graph, before anything is written.

    ``mode`` None: fold, or branch where a target is quantised. Raises MatchError, naming what is left, unless
    ``allow_unmatched``; FormatError for a quantised target that is to be folded; what `resolve` raises.
    """
    if mode is not None and mode not in MODES:
        raise UsageError(f"unknown mode {mode!r}", hint=f"one of {', '.join(MODES)}")
    given = strengths_of(adapters, strengths)
    values, changes, unmatched = Changes(), [], []
    for number, (adapter, strength) in enumerate(zip(adapters, given, strict=True)):
        check_values(adapter, values)
        sites, left = resolve(graph, adapter, base_weights)
        changes += [Change(site, strength, number) for site in sites]
        unmatched += left
    if unmatched and not allow_unmatched:
        raise MatchError(
            f"{len(unmatched)} of {sum(len(a.updates) + len(a.carried) for a in adapters)} "
            "parts of the adapter have no target in the graph",
            some(unmatched),
            _hint(base_weights),
            list(map(str, unmatched)),
        )
    chosen = mode or ("branch" if any(change.site.quantised for change in changes) else "fold")
    if chosen == "fold":
        _check_foldable(changes)
    warnings = [*values.warnings, *(w for a in adapters for w in a.metadata.warnings)]
    edit = _build(chosen, graph, changes)
    names = tuple(u.name for u in unmatched)
    return Export(graph, tuple(adapters), given, chosen, tuple(changes), edit, names, tuple(warnings))


def _hint(base_weights: Model | None) -> str:
    if base_weights is None:
        return "--base-weights MODEL matches by value where names are gone; --allow-unmatched goes on with the rest"
    return "is this the graph of the base it was trained on? --allow-unmatched goes on with the rest"


def _check_foldable(changes: Sequence[Change]) -> None:
    """Raise FormatError where folding would round the change away."""
    for change in changes:
        if change.site.quantised and change.strength:
            raise FormatError(
                f"this weight is quantised ({change.site.quantised}): folded into it, the update would be lost",
                f"{change.site.spelling} -> {change.site.weight.value.name}",
                "--mode branch keeps it, or fold into the float graph and quantise that again",
            )


def _build(mode: str, graph: Graph, changes: Sequence[Change]) -> Edit:
    """The new graph, by mode."""
    build: Callable[[Graph, Sequence[Change]], Edit] = getattr(import_module(f"loratool.onnx.{mode}"), mode)
    return build(graph, changes)


def run_export(
    planned: Export | FolderExport,
    out: str | Path,
    *,
    verify: bool | None = None,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> ExportReport:
    """Write the graph, prove it, and only then let it appear under its name.

    ``verify`` None: where onnxruntime is there. Raises LoratoolError (output exists, out of disk, no onnxruntime),
    NumericError, VerifyError.
    """
    if not isinstance(planned, Export):
        from loratool.ops.export_folder import run_folder

        return run_folder(planned, out, verify=verify, overwrite=overwrite, device=device, progress=progress)
    began, path = time.perf_counter(), Path(out)
    check(planned, path, overwrite, verify)
    proof = _prover(verify)
    with staged_beside(path, overwrite) as folder:
        written = write_graph(
            planned.edit,
            folder / path.name,
            inputs=planned.inputs,
            metadata=provenance(planned),
            device=device,
            progress=progress,
        )
        files = write_adapters(planned, path, folder, written.outcome.hashes)
        beside = {path.with_name(file.name): file.stat().st_size for file in files}
        proven = proof(planned, written.output, files)
    return _report(planned, path, written, beside, proven, time.perf_counter() - began)


def _report(
    planned: Export, path: Path, written: Written, beside: Mapping[Path, int], proven: Verification, seconds: float
) -> ExportReport:
    """What was written to ``path`` and, with their sizes, to the files ``beside`` it; and what proved it."""
    return ExportReport(
        output=str(path),
        mode=planned.mode,
        modules=planned.modules,
        resolved=planned.resolved,
        unmatched=planned.unmatched,
        adapters=tuple(map(str, beside)),
        external_data=str(path.with_name(external_name(path))) if written.external_data else None,
        verified=proven.verified,
        max_abs_diff=proven.max_abs_diff,
        max_effect=proven.max_effect,
        providers=proven.providers,
        bytes_written=written.bytes_written + sum(beside.values()),
        seconds=round(seconds, 3),
        peak_bytes=peak_bytes(),
        lost_to_rounding=written.outcome.tally.lost_to_rounding,
        content_hash=written.outcome.content_hash,
        operation="export-onnx",
        version=__version__,
        strengths=planned.strengths,
        inputs=dict(sorted(written.outcome.hashes.items())),
        warnings=(*planned.warnings, *proven.notes),
    )


def check(planned: Export | FolderExport, out: str | Path, overwrite: bool, verify: bool | None = None) -> None:
    """Check where the output goes, that there is room, and what is to prove it. Raises LoratoolError."""
    if not isinstance(planned, Export):
        from loratool.ops import export_folder

        return export_folder.check(planned, out, overwrite, verify)
    _prover(verify)
    given = {f"adapter {n}": a.metadata.path for n, a in enumerate(planned.adapters, 1) if a.metadata.path}
    path = Path(out)
    check_output(planned.graph, path, lay_out(planned.edit, external_name(path)), overwrite, given)
    for beside in adapter_files(planned, path):
        prepare_output(beside, overwrite, given)


def adapter_files(planned: Export, out: Path) -> list[Path]:
    """The files of the adapters that are inputs, beside ``out``, in their order; none in other modes."""
    from loratool.onnx.inputs import adapter_paths

    if planned.mode != "inputs":
        return []
    return adapter_paths(out, [a.metadata.path for a in planned.adapters])


def write_adapters(planned: Export, out: Path, folder: Path, hashes: Mapping[str, str]) -> list[Path]:
    """Write the files of the adapters that are inputs into ``folder``; where they are."""
    from loratool.onnx.container import write_container
    from loratool.onnx.inputs import adapter_file, model_version

    files = [folder / path.name for path in adapter_files(planned, out)]
    for number, file in enumerate(files):
        held = adapter_file(planned.graph, planned.changes, number, model_version(hashes))
        write_container(file, held)
    return files


def provenance(planned: Export) -> dict[str, str]:
    """What the output says of its making, beside the hashes of the inputs."""
    return {
        "loratool.operation": "export-onnx",
        "loratool.mode": planned.mode,
        "loratool.strengths": json.dumps(list(planned.strengths)),
    }


def _prover(verify: bool | None) -> Callable[[Export, Path, Sequence[Path]], Any]:
    """What proves an output. Raises LoratoolError where a proof is asked for and onnxruntime is missing."""
    from loratool.onnx.verify import BaseError, Verification, has_onnxruntime, onnxruntime
    from loratool.onnx.verify import verify as prove

    if verify is False or (verify is None and not has_onnxruntime()):
        notes = () if verify is False else ("not verified: onnxruntime is not installed",)
        return lambda planned, output, files: Verification(False, notes=notes)
    onnxruntime()

    def proof(planned: Export, output: Path, files: Sequence[Path]) -> Verification:
        reference = output.parent / "reference" / "loratool-reference.onnx"
        try:
            return prove(planned.graph, _trials(planned, output, files, reference), scratch=output.parent)
        except BaseError as error:
            if verify:
                raise
            return Verification(False, notes=(f"not verified: {error.what}",))
        finally:
            remove(reference.parent)

    return proof


def _trials(planned: Export, output: Path, files: Sequence[Path], reference: Path) -> Iterator[Trial]:
    """What the output is held against: side branches; those themselves, against one matrix for each change.

    Adapters that are inputs are tried one by one, each against a reference in the place of the one before.
    """
    from loratool.onnx.branch import branch
    from loratool.onnx.verify import Trial

    for number, file in enumerate(files or [None]):
        own = [change for change in planned.changes if file is None or change.adapter == number]
        remove(reference.parent)
        reference.parent.mkdir()
        edit = branch(planned.graph, own, dense=planned.mode == "branch")
        write_graph(edit, reference, inputs={}, metadata={}, shared=True)
        yield Trial(output, reference, file)


def describe(planned: Export | FolderExport, output: str | Path) -> dict[str, Any]:
    """A plan as plain data: every module, every tensor, what will be read and written."""
    if not isinstance(planned, Export):
        from loratool.ops import export_folder

        return export_folder.describe(planned, output)
    out = Path(output)
    layout = lay_out(planned.edit, external_name(out))
    threads = thread_count()
    return {
        "output": str(out),
        "mode": planned.mode,
        "modules": planned.modules,
        "resolved": planned.resolved,
        "unmatched": list(planned.unmatched),
        "external_data": str(out.with_name(external_name(out))) if layout.external else None,
        "adapters": [str(path) for path in adapter_files(planned, out)],
        "bytes_to_read": sum(path.stat().st_size for path in planned.inputs.values()),
        "bytes_to_write": layout.bytes_written,
        "disk_needed": layout.bytes_written,
        "peak_memory": Plan((OutputFile(out.name, layout.steps, {}),)).peak_memory(threads),
        "threads": threads,
        "tensors": [described(step, _action(step, planned.edit)) for step in layout.steps],
        "warnings": list(planned.warnings),
    }


def _action(step: Step, edit: Edit) -> str:
    return "merge" if step.parts else "new" if step.name in edit.values else "copy"


def described(step: Step, action: str) -> dict[str, Any]:
    """One tensor of a plan as plain data."""
    return {
        "name": step.name,
        "action": action,
        "dtype": step.dtype,
        "shape": list(step.shape),
        "bytes": step.nbytes,
        "modules": [part.module for part in step.parts],
    }
