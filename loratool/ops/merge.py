"""Merge adapters into a base model, streamed: base + sum of strength x update, rounded once."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.adapter import Adapter, strengths_of
from loratool.devices import choose
from loratool.errors import MatchError, some
from loratool.files import check_space, prepare_output, staged
from loratool.hashes import sha256
from loratool.model import Model, WeightFile, stale_copies
from loratool.ops.changes import Changes, account
from loratool.ops.replicate import replicated
from loratool.ops.undo import check_undo, recording
from loratool.plan import Outcome, OutputFile, Plan, Progress, Run, Step, Writer, eight_bit, thread_count
from loratool.scaled import LARGEST, Change, Scaled, scaled
from loratool.tensors import FLOATS, Tensor, header_bytes

_STALE = ("sshs_", "modelspec.hash_sha256", "loratool.")  # hashes of what the tensors were before
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; the fields of ``merge --json``."""

    output: str
    modules: int
    tensors_changed: int
    tensors_copied: int
    bytes_written: int
    seconds: float
    peak_bytes: int
    unmatched: tuple[str, ...]
    lost_to_rounding: float
    rounding_error: float | None
    content_hash: str
    operation: str
    version: str
    strengths: tuple[float, ...]
    inputs: Mapping[str, str]
    device: str
    warnings: tuple[str, ...]
    undo: str | None


@dataclass(frozen=True)
class Merge:
    """A merge worked out and not yet run: the plan, and what it came from."""

    model: Model
    adapters: tuple[Adapter, ...]
    strengths: tuple[float, ...]
    changes: Changes
    plan: Plan

    @property
    def tensors_changed(self) -> int:
        """Tensors that are computed, replaced or new."""
        return len(self.plan.steps) - self.tensors_copied

    @property
    def tensors_copied(self) -> int:
        """Tensors whose bytes stay."""
        base = {id(at.tensor) for places in self.model.parameters.values() for at in places}
        return sum(not step.computes and id(step.base) in base for step in self.plan.steps)


def prepare_merge(
    model: Model,
    adapters: Sequence[Adapter],
    strengths: Sequence[float] | None = None,
    dtype: str | None = None,
    allow_unmatched: bool = False,
) -> Merge:
    """Account for every tensor and lay out the output.

    ``dtype`` (a safetensors name) stores every floating tensor so; None keeps each as it is. Raises MatchError, naming
    what is left and the nearest module, unless ``allow_unmatched``; and what `account` raises.
    """
    given = strengths_of(adapters, strengths)
    model, replicated_documents = replicated(model, adapters)
    changes = account(model, adapters, given)
    if changes.unmatched and not allow_unmatched:
        raise MatchError(
            f"{len(changes.unmatched)} of {sum(len(a.updates) + len(a.carried) for a in adapters)} "
            "parts of the adapter have no target in the base",
            some(changes.unmatched),
            "is this the base it was trained on? --allow-unmatched merges the rest",
            list(map(str, changes.unmatched)),
        )
    eight = _eight_bit(model, changes)
    outputs = tuple(_output(model, weights, changes, eight, dtype) for weights in model.weights)
    plan = Plan(
        outputs=outputs,
        documents={**replicated_documents, **_documents(model, outputs, changes, dtype)},
        copies=_copies(model, adapters),
        inputs=_inputs(model, adapters),
        warnings=(*changes.warnings, *_warnings(model, adapters, outputs)),
    )
    return Merge(model, tuple(adapters), given, changes, plan)


def _output(
    model: Model, weights: WeightFile, changes: Changes, eight: Mapping[str, Scaled], dtype: str | None
) -> OutputFile:
    """One weight file: the base's tensors in their order, then what is new."""
    steps = [_step(model, weights, key, tensor, changes, dtype) for key, tensor in weights.file.tensors.items()]
    steps = [_rescaled(step, eight.get(weights.prefix + step.key)) for step in steps]
    if weights is _file_for_new(model, changes):
        for name, tensor in changes.added.items():
            tied = changes.untied is not None and name == f"{changes.untied.head}.weight"
            base = changes.replaced.get(name, tensor) if tied else tensor
            parts = tuple(changes.parts.get(name, ())) if tied else ()
            steps.append(Step(name, name, base, _stored(tensor, dtype), parts))
    metadata = {k: v for k, v in weights.file.metadata.items() if not k.startswith(_STALE)}
    return OutputFile(weights.name, tuple(steps), metadata)


def _step(model: Model, weights: WeightFile, key: str, tensor: Tensor, changes: Changes, dtype: str | None) -> Step:
    name = weights.prefix + key
    unique = name if len(model.parameters[name]) == 1 else f"{name} ({weights.name})"
    base = changes.replaced.get(name, tensor)
    return Step(unique, key, base, _stored(tensor, dtype), tuple(changes.parts.get(name, ())))


def _eight_bit(model: Model, changes: Changes) -> dict[str, Scaled]:
    """The changed weights that have scales, by their name and by that of their scales."""
    tensors = {name: at[0].tensor for name, at in model.parameters.items()}
    found: dict[str, Scaled] = {}
    for name, parts in changes.parts.items():
        if name not in tensors or tensors[name].dtype not in LARGEST:  # the head of tied weights may not be there
            continue
        held = scaled(name, tensors, model.config_of(name))
        if held is not None:
            scale, one = held
            one.changes = tuple(Change(p.update, p.strength, p.start, p.stop) for p in parts)
            found[name] = found[scale] = one
    return found


def _rescaled(step: Step, held: Scaled | None) -> Step:
    """A step of a weight with scales, or of the scales themselves."""
    if held is None:
        return step
    return replace(step, scaled=held) if step.parts else replace(step, base=held.tensor())


def _stored(tensor: Tensor, dtype: str | None) -> str:
    return dtype if dtype and tensor.dtype in FLOATS else tensor.dtype


def _file_for_new(model: Model, changes: Changes) -> WeightFile:
    """Where new tensors go: beside the tied embedding, or in the last file (of those that an index names)."""
    if changes.untied is not None:
        return model.parameters[f"{changes.untied.embedding}.weight"][0].weights
    named = {shard for index in model.index_files.values() for shard in index["weight_map"].values()}
    return next((w for w in reversed(model.weights) if w.name in named), model.weights[-1])


def _copies(model: Model, adapters: Sequence[Adapter]) -> dict[str, Path]:
    """Files to copy: the base folder's, the adapters' own tokenizer files winning."""
    if not model.is_folder:
        return {}
    copies = {name: model.path / name for name in model.others}
    tokenizer = "tokenizer/" if "model_index.json" in model.others else ""
    for adapter in adapters:
        copies.update({tokenizer + extra.name: extra for extra in adapter.metadata.extras})
    return copies


def _inputs(model: Model, adapters: Sequence[Adapter]) -> dict[str, Path]:
    """Files whose sha256 goes into the provenance."""
    inputs = {f"base/{weights.name}": weights.file.path for weights in model.weights}
    for number, adapter in enumerate(adapters, 1):
        inputs.update({f"adapter{number}/{path.name}": path for path in adapter.metadata.weights})
    return inputs


def _warnings(model: Model, adapters: Sequence[Adapter], outputs: Sequence[OutputFile]) -> list[str]:
    """What the user should know: stale copies of the weights, an adapter that is in the base already."""
    copies = stale_copies(model)
    found = [f"copied unmerged, other forms of the same weights: {', '.join(copies[:5])}"] if copies else []
    if eight := sum(eight_bit(step) and bool(step.parts) for output in outputs for step in output.steps):
        found.append(f"{eight} weights are stored in 8 bits: merged in float32 and rounded to 8 bits again")
    bases = sorted({adapter.metadata.base_model for adapter in adapters if adapter.metadata.base_model})
    if len(bases) > 1:
        found.append(f"the adapters name different base models: {', '.join(bases)}")
    if model.pickled:
        found.append("the base's weights are pickles: the output holds them as safetensors")
    said = {value for w in model.weights for value in _inputs_of(w.file.metadata).values()}
    for path in (path for adapter in adapters for path in adapter.metadata.weights):
        if said and sha256(path) in said:
            found.append(f"{path} has been merged into this base before")
    return found


def _inputs_of(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """The sha256 of the inputs that a file says it was made from."""
    try:
        said = json.loads(metadata.get("loratool.inputs", "{}"))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _documents(model: Model, outputs: Sequence[OutputFile], changes: Changes, dtype: str | None) -> dict[str, bytes]:
    """Configuration and index files that the merge changes."""
    documents: dict[str, bytes] = {}
    for name, index in model.index_files.items():
        updated = _index(name, index, model, outputs)
        if updated != index or name not in model.others:  # that of pickled shards is no file of the base's
            documents[name] = json.dumps(updated, indent=2).encode() + b"\n"
    for prefix, config in model.configs.items():
        changed = dict(config)
        if changes.untied is not None:
            changed = _set_in_text(changed, "tie_word_embeddings", False, everywhere=True)
        for key, value in _resized(model, changes).items():
            changed = _set_in_text(changed, key, value)
        changed.update(_grown(model, changes, prefix))
        if dtype in _TORCH_NAMES:
            changed.update({k: _TORCH_NAMES[dtype] for k in ("torch_dtype", "dtype") if k in changed})
        if changed != config:
            name = prefix.replace(".", "/") + "config.json"
            documents[name] = json.dumps(changed, indent=2, ensure_ascii=False).encode() + b"\n"
    return documents


def _index(name: str, index: Mapping[str, Any], model: Model, outputs: Sequence[OutputFile]) -> dict[str, Any]:
    """An index with the new tensors and the new size in bytes."""
    folder = name.rpartition("/")[0]
    shards = set(index["weight_map"].values())
    own = {o.name.rpartition("/")[2]: o for o in outputs if o.name.rpartition("/")[0] == folder}
    files = [w.file for w in model.weights if w.name in {own[shard].name for shard in shards}]
    weight_map = dict(index["weight_map"])
    for shard in sorted(shards):
        weight_map.update({step.key: shard for step in own[shard].steps if step.key not in weight_map})
    updated = {**index, "weight_map": weight_map}
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        total = sum(step.nbytes for shard in shards for step in own[shard].steps)
        before = sum(tensor.nbytes for file in files for tensor in file.tensors.values())
        if weight_map != index["weight_map"] or total != before:
            updated["metadata"] = {**metadata, "total_size": total}
    return updated


def _set_in_text(config: Mapping[str, Any], key: str, value: Any, everywhere: bool = False) -> dict[str, Any]:
    """A configuration with ``key`` set, at the top and in the text model's own part, where it stands."""
    changed = dict(config)
    text = changed.get("text_config")
    if everywhere or key in changed:
        changed[key] = value
    if isinstance(text, dict) and (everywhere or key in text):
        changed["text_config"] = {**text, key: value}
    return changed


def _resized(model: Model, changes: Changes) -> dict[str, int]:
    """``vocab_size`` where a whole embedding with another number of rows replaces the base's."""
    for name, tensor in changes.replaced.items():
        rows = model.shape(name)[0] if name in model.parameters else tensor.rows
        if tensor.rows != rows and model.config_of(name).get("vocab_size") == rows:
            return {"vocab_size": tensor.rows}
    return {}


def _grown(model: Model, changes: Changes, prefix: str) -> dict[str, int]:
    """``in_channels`` where the first layer of an image model takes more; what it gives stays."""
    for name in changes.grown & model.parameters.keys():
        was, config = model.shape(name)[1], model.config_of(name)
        if model.parameters[name][0].weights.prefix == prefix and config.get("in_channels") == was:
            return {"in_channels": changes.replaced[name].shape[1], "out_channels": config.get("out_channels") or was}
    return {}


def run_merge(
    merge: Merge,
    out: str | Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    undo: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Carry out a merge: OUT appears complete and flushed, or not at all.

    ``undo`` is a file to write, from which and from OUT the base can be restored bit for bit. Raises LoratoolError
    (output exists, out of disk, I/O) and NumericError (NaN, overflow).
    """
    began = time.perf_counter()
    path, record = check_outputs(merge, out, undo, overwrite)
    chosen = choose(device, merge.plan.changed)
    with staged(path, overwrite) as temporary:
        folder = temporary if merge.model.is_folder else path.parent
        plan = merge.plan if merge.model.is_folder else _renamed(merge.plan, temporary.name)
        if merge.model.is_folder:
            temporary.mkdir()
            _copy_small(plan, temporary)
        heads = {o.name: len(_head(merge, o, chosen.name, _blank(plan))) for o in plan.outputs}
        with closing(Writer(folder, plan.outputs, heads)) as writer, recording(merge, writer, record) as recorder:
            run = Run(plan, recorder or writer, chosen, threads or thread_count())
            done = 0
            for count in run:
                done += count
                if progress is not None:
                    progress(done, run.total)
            outcome = run.outcome
            for output in plan.outputs:
                writer.write(output.name, 0, _head(merge, output, chosen.name, outcome))
            if recorder is not None and record is not None:
                with staged(record, overwrite) as half:
                    recorder.write(half, outcome.content_hash)
    return report(merge, str(path), outcome, chosen.name, time.perf_counter() - began, record)


def check_output(merge: Merge, out: str | Path, overwrite: bool) -> Path:
    """Check where the output goes, and that there is room. Raises LoratoolError."""
    inputs = {"the base": merge.model.path}
    inputs.update({f"adapter {n}": a.metadata.path for n, a in enumerate(merge.adapters, 1) if a.metadata.path})
    path = prepare_output(out, overwrite, inputs)
    check_space(path.parent, merge.plan.bytes_written)
    return path


def check_outputs(merge: Merge, out: str | Path, undo: str | Path | None, overwrite: bool) -> tuple[Path, Path | None]:
    """Check where the output and the undo file go, and that there is room. Raises LoratoolError."""
    path = check_output(merge, out, overwrite)
    return path, None if undo is None else check_undo(merge, undo, path, overwrite)


def _renamed(plan: Plan, name: str) -> Plan:
    """A single file is written under its temporary name."""
    (output,) = plan.outputs
    return replace(plan, outputs=(replace(output, name=name),))


def _copy_small(plan: Plan, folder: Path) -> None:
    """Everything of the folder that is not weights."""
    import shutil

    for name, source in plan.copies.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in plan.documents:
            shutil.copyfile(source, target)
            shutil.copymode(source, target)
            target.chmod(target.stat().st_mode | 0o200)
    for name, data in plan.documents.items():
        (folder / name).write_bytes(data)


def _blank(plan: Plan) -> Outcome:
    """An outcome of the right size, to know how long the headers will be."""
    from loratool.plan import Tally

    return Outcome(dict.fromkeys(plan.inputs, "0" * 64), "0" * 64, Tally())


def _head(merge: Merge, output: OutputFile, device: str, outcome: Outcome) -> bytes:
    """The header of one output file, provenance included."""
    metadata = {**output.metadata, **provenance("merge", merge.strengths, outcome, device)}
    return header_bytes(((s.key, s.dtype, s.shape) for s in output.steps), metadata)


def provenance(operation: str, strengths: Sequence[float], outcome: Outcome, device: str) -> dict[str, str]:
    """What every output says of its making, as safetensors metadata."""
    return {
        "loratool.version": __version__,
        "loratool.operation": operation,
        "loratool.strengths": json.dumps(list(strengths)),
        "loratool.inputs": json.dumps(dict(sorted(outcome.hashes.items()))),
        "loratool.content_hash": outcome.content_hash,
        "loratool.device": device,
    }


def report(
    merge: Merge, output: str, outcome: Outcome, device: str, seconds: float, undo: Path | None = None
) -> MergeReport:
    """The report of a finished run."""
    return MergeReport(
        output=output,
        modules=merge.changes.modules,
        tensors_changed=merge.tensors_changed,
        tensors_copied=merge.tensors_copied,
        bytes_written=merge.plan.bytes_written,
        seconds=round(seconds, 3),
        peak_bytes=peak_bytes(),
        unmatched=tuple(u.name for u in merge.changes.unmatched),
        lost_to_rounding=outcome.tally.lost_to_rounding,
        rounding_error=outcome.tally.rounding_error,
        content_hash=outcome.content_hash,
        operation="merge",
        version=__version__,
        strengths=merge.strengths,
        inputs=dict(sorted(outcome.hashes.items())),
        device=device,
        warnings=merge.plan.warnings,
        undo=None if undo is None else str(undo),
    )


def peak_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(merge: Merge, out: str | Path, device: str) -> dict[str, Any]:
    """A plan as plain data: every tensor, what will be read and written, and the bound of the working memory."""
    base = {id(at.tensor) for places in merge.model.parameters.values() for at in places}
    threads = thread_count()
    return {
        "output": str(out),
        "modules": merge.changes.modules,
        "tensors_changed": merge.tensors_changed,
        "tensors_copied": merge.tensors_copied,
        "unmatched": [u.name for u in merge.changes.unmatched],
        "bytes_to_read": merge.plan.bytes_read,
        "bytes_to_write": merge.plan.bytes_written,
        "disk_needed": merge.plan.bytes_written,
        "peak_memory": merge.plan.peak_memory(threads),
        "threads": threads,
        "device": device,
        "files": sorted({*merge.plan.copies, *merge.plan.documents}),
        "rewritten": sorted(merge.plan.documents),
        "tensors": [_describe(step, output.name, base) for output in merge.plan.outputs for step in output.steps],
        "warnings": list(merge.plan.warnings),
    }


def _describe(step: Step, file: str, base: set[int]) -> dict[str, Any]:
    own = id(step.base) in base
    action = ("merge" if step.parts else "cast" if step.computes else "copy") if own else "replace"
    return {
        "name": step.name,
        "file": file,
        "action": action,
        "dtype": step.dtype,
        "shape": list(step.shape),
        "bytes": step.nbytes,
        "modules": [part.module for part in step.parts],
    }
