"""The base again, bit for bit, from a merged model and the undo file that was written with it.

Each tensor of the base is a lazy one, made from the merged rows when its block is written: so unmerging is a plan like
any other. Nothing appears unless the merged model is the one, and what comes out is the base.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from loratool import __version__, kinds
from loratool.devices import choose
from loratool.errors import FormatError, VerifyError
from loratool.files import check_space, inside, prepare_output, staged, walk
from loratool.lazy import np
from loratool.model import Model, WeightFile, by_step_name
from loratool.ops.merge import peak_bytes
from loratool.ops.undo import UNDO, UNDO_HASH, file_digest, is_plain, restore, text_hash, unblob
from loratool.plan import OutputFile, Part, Plan, Progress, Run, Step, Writer, thread_count
from loratool.tensors import (
    CONTENT_HASH,
    DTYPES,
    SafetensorsFile,
    Tensor,
    block_digest,
    block_rows,
    content_hash,
    digest,
    numpy_dtype,
    read_safetensors,
)


@dataclass(frozen=True)
class UnmergeReport:
    """What an unmerge did; the fields of ``unmerge --json``."""

    output: str
    tensors_restored: int
    tensors_copied: int
    bytes_written: int
    seconds: float
    peak_bytes: int
    content_hash: str
    operation: str
    version: str


@dataclass
class _Unmerge:
    """An undo file, read and held against the merged model: the plan that restores the base."""

    path: Path
    file: SafetensorsFile
    words: Mapping[str, Any]
    merged: Model
    digests: dict[str, dict[int, bytes]] = field(default_factory=dict)
    """Of the merged rows that others are made from."""
    copied: set[str] = field(default_factory=set)
    restored: int = 0

    def plan(self) -> tuple[Plan, dict[str, bytes]]:
        """The weight files to write, and their headers."""
        outputs, heads = [], {}
        there = {weights.name: weights for weights in self.merged.weights}
        for number, words in enumerate(self.words["files"]):
            name = words["name"] if self.words["folder"] else self.merged.weights[0].name
            inside(self.merged.path.parent, name, allow_links=True)  # the name may not lead elsewhere
            if name not in there or name in heads:
                raise VerifyError("the merged model lacks a weight file", f"{self.merged.path}: {name}", _OTHER)
            steps = tuple(self._step(there[name], entry) for entry in words["tensors"])
            outputs.append(OutputFile(name, steps, {}))
            heads[name] = unblob(self._tensor(f"header.{number}"))
        return Plan(tuple(outputs)), heads

    def _tensor(self, name: Any) -> Tensor:
        if not isinstance(name, str) or name not in self.file.tensors:
            raise FormatError("the undo file is damaged: a part is missing", f"{self.path}: {str(name)[:80]}")
        return self.file.tensors[name]

    def _step(self, weights: WeightFile, entry: Mapping[str, Any]) -> Step:
        key, name = entry["key"], weights.prefix + entry["key"]
        if len(self.merged.parameters.get(name, ())) > 1:
            name = f"{name} ({weights.name})"
        now = weights.file.tensors.get(key)
        if "whole" in entry:
            self.restored += 1
            base = self._tensor(entry["whole"])
        elif now is None:
            raise VerifyError("the merged model lacks a tensor", f"{weights.file.path}: {key}", _OTHER)
        elif "blocks" in entry:
            self.restored += 1
            base = self._restored(name, now, entry)
        else:
            self.copied.add(name)
            base = now
        return Step(name, key, base, base.dtype)

    def _restored(self, name: str, now: Tensor, entry: Mapping[str, Any]) -> Tensor:
        """A tensor whose rows are made from the merged ones, block by block."""
        blocks, lengths = self._tensor(entry["blocks"]), self._tensor(entry["lengths"])
        if list(now.shape) != entry["shape"]:
            where = f"{self.merged.path}: {name}"
            raise VerifyError("the merged model has other shapes than were merged", where, _OTHER)
        rows = block_rows(now.shape)
        count = math.ceil(now.rows / rows) if now.size else 0
        ends = list(accumulate(map(int, lengths.array().reshape(-1)), initial=0))
        if len(ends) != count + 1 or blocks.shape != (ends[-1],) or sorted(ends) != ends:
            raise FormatError("the undo file is damaged: blocks of impossible lengths", f"{self.path}: {name}")
        parts = [self._part(words, now) for words in entry["parts"]] if "parts" in entry else None
        dtype = numpy_dtype(entry["dtype"])

        def load(start: int, stop: int) -> np.ndarray:
            index = start // rows
            data = blocks.load(ends[index], ends[index + 1]).tobytes()
            values = now.load(start, stop).reshape(stop - start, -1)
            self.digests.setdefault(name, {})[start] = block_digest(values)
            return restore(data, values, dtype, parts, start).reshape(stop - start, *now.shape[1:])

        return Tensor(entry["dtype"], now.shape, load)

    def _part(self, words: Mapping[str, Any], now: Tensor) -> Part:
        """A part of a delta. Raises FormatError where it does not fit the tensor."""
        update = kinds.unspelled(words["update"], self.file.tensors, set())
        part = Part(update, float(words["strength"]), int(words["start"]), int(words["stop"]), "")
        columns = math.prod(now.shape[1:])
        fits = 0 <= part.start < part.stop <= now.rows and update.shape[0] == part.stop - part.start
        if not (is_plain(part) and fits and math.prod(update.shape[1:]) == columns):
            raise FormatError("the undo file is damaged: a part that does not fit", self.path)
        return part

    def check_merged(self, digests: Mapping[str, bytes]) -> None:
        """Raise VerifyError unless the merged model holds, tensor by tensor, what was merged."""
        found = content_hash(
            (name, tensor.dtype, tensor.shape, self._digest(name, tensor, digests))
            for name, tensor in by_step_name(self.merged).items()
        )
        if found != self.words["merged"]:
            raise VerifyError(_ANOTHER, self.merged.path, _OTHER)

    def _digest(self, name: str, tensor: Tensor, digests: Mapping[str, bytes]) -> bytes:
        """The digest of a merged tensor: taken on the way where it was read, else now."""
        if name in self.digests:
            return b"".join(d for _, d in sorted(self.digests[name].items()))
        return digests.get(name, b"") if name in self.copied else digest(tensor)


_ANOTHER = "this is not the merged model that the undo file belongs to"
_OTHER = "give the model that this undo file was written with, unchanged"


def read_undo(path: Path) -> tuple[SafetensorsFile, Mapping[str, Any]]:
    """An undo file and its description, its content checked. Raises FormatError."""
    file = read_safetensors(path)
    if UNDO not in file.metadata:
        raise FormatError("this is no undo file", path, "give the file that merge --undo wrote")
    text = file.metadata[UNDO]
    found = content_hash((n, t.dtype, t.shape, digest(t)) for n, t in file.tensors.items())
    if (file.metadata.get(CONTENT_HASH), file.metadata.get(UNDO_HASH)) != (found, text_hash(text)):
        raise FormatError("the undo file is damaged: its content is not what was written", path)
    try:
        words = json.loads(text)
        _check_words(words)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FormatError("the undo file is damaged: its description is malformed", path) from None
    return file, words


def _check_words(words: Any) -> None:
    """Raise KeyError, TypeError or ValueError unless the description has every part it needs."""
    if words["version"] != 1:
        raise ValueError("written by a newer loratool")
    names = [*words["rewritten"], *words["kept"], *(file["name"] for file in words["files"])]
    texts = [*names, words["merged"], words["base"], *words["rewritten"].values(), *words["kept"].values()]
    texts += [entry["key"] for file in words["files"] for entry in file["tensors"]]
    for entry in (entry for file in words["files"] for entry in file["tensors"] if "blocks" in entry):
        texts += [entry["blocks"], entry["lengths"], DTYPES[entry["dtype"]].name]
        list(entry["shape"])
        for part in entry.get("parts", ()):
            float(part["strength"]), int(part["start"]), int(part["stop"]), part["update"]
    if not all(isinstance(text, str) for text in texts) or not isinstance(words["folder"], bool):
        raise TypeError("a name is no text")


def prepare_unmerge(
    merged: Model, undo: Path, out: str | Path, overwrite: bool
) -> tuple[Path, _Unmerge, Plan, dict[str, bytes]]:
    """Work out an unmerge: where it goes, what is restored, the weight files and their headers.

    Raises what `unmerge` raises before it writes.
    """
    file, words = read_undo(undo)
    path = prepare_output(out, overwrite, {"the merged model": merged.path, "the undo file": undo})
    said = merged.weights[0].file.metadata.get(CONTENT_HASH)
    if words["folder"] != merged.is_folder or (said is not None and said != words["merged"]):
        raise VerifyError(_ANOTHER, merged.path, _OTHER)
    work = _Unmerge(undo, file, words, merged)
    plan, heads = work.plan()
    check_space(path.parent, sum(map(len, heads.values())) + plan.bytes_written)
    return path, work, plan, heads


def describe(merged: Model, undo: Path, out: str | Path, overwrite: bool) -> dict[str, Any]:
    """An unmerge as plain data, for a dry run."""
    path, work, plan, heads = prepare_unmerge(merged, undo, out, overwrite)
    nbytes = sum(map(len, heads.values())) + plan.bytes_written
    threads = thread_count()
    return {
        "output": str(path),
        "tensors_restored": work.restored,
        "tensors_copied": len(plan.steps) - work.restored,
        "bytes_to_read": plan.bytes_read + undo.stat().st_size,
        "bytes_to_write": nbytes,
        "disk_needed": nbytes,
        "peak_memory": plan.peak_memory(threads),
        "threads": threads,
        "files": sorted({*work.words["rewritten"], *work.words["kept"]}),
        "tensors": [
            {
                "name": step.name,
                "file": output.name,
                "action": "copy" if step.name in work.copied else "restore",
                "dtype": step.dtype,
                "shape": list(step.shape),
                "bytes": step.nbytes,
            }
            for output in plan.outputs
            for step in output.steps
        ],
    }


def unmerge(
    merged: Model,
    undo: Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Write the base that ``merged`` was made from, bit for bit.

    Raises VerifyError when ``merged`` is another model than the undo file was written with, FormatError when the undo
    file is damaged, LoratoolError (output exists, I/O, out of disk).
    """
    began = time.perf_counter()
    path, work, plan, heads = prepare_unmerge(merged, undo, out, overwrite)
    words, total = work.words, sum(map(len, heads.values())) + plan.bytes_written
    with staged(path, overwrite) as temporary:
        folder = temporary if words["folder"] else path.parent
        if words["folder"]:
            temporary.mkdir()
            _restore_small(work, temporary)
        else:
            plan, heads = _under(plan, temporary.name), {temporary.name: next(iter(heads.values()))}
        run = _write(plan, heads, folder, progress)
        work.check_merged(run.digests)
        if run.outcome.content_hash != words["base"]:
            raise VerifyError("what came out is not the base: the merged model or the undo file was changed", undo)
    return UnmergeReport(
        output=str(path),
        tensors_restored=work.restored,
        tensors_copied=len(plan.steps) - work.restored,
        bytes_written=total,
        seconds=round(time.perf_counter() - began, 3),
        peak_bytes=peak_bytes(),
        content_hash=words["base"],
        operation="unmerge",
        version=__version__,
    )


def _write(plan: Plan, heads: Mapping[str, bytes], folder: Path, progress: Progress | None) -> Run:
    """Write the weight files."""
    with closing(Writer(folder, plan.outputs, {name: len(head) for name, head in heads.items()})) as writer:
        run = Run(plan, writer, choose("cpu", {}), thread_count())
        done = 0
        for count in run:
            done += count
            if progress is not None:
                progress(done, run.total)
        for name, head in heads.items():
            writer.write(name, 0, head)
    return run


def _under(plan: Plan, name: str) -> Plan:
    (output,) = plan.outputs
    return replace(plan, outputs=(replace(output, name=name),))


def _restore_small(work: _Unmerge, folder: Path) -> None:
    """The files beside the weights: the base's own, and no others. Raises VerifyError where one was changed."""
    there = {name.as_posix() for name in walk(work.merged.path)}
    for name, blob in work.words["rewritten"].items():
        target = inside(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(unblob(work._tensor(blob)))
    for name, digest_ in work.words["kept"].items():
        source, target = inside(work.merged.path, name), inside(folder, name)
        if name not in there or file_digest(source) != digest_:
            raise VerifyError("a file of the merged model was changed", source, _OTHER)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
