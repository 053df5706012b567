"""Prove that a merged model is what it claims: the merge replayed against it, block by block."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from loratool import native
from loratool.devices import choose
from loratool.errors import LoratoolError, VerifyError
from loratool.lazy import np
from loratool.model import Model, by_step_name
from loratool.ops.merge import Merge, MergeReport, report
from loratool.plan import OutputFile, Progress, Run, Step, thread_count
from loratool.tensors import Tensor


@dataclass(frozen=True)
class Failure:
    """One tensor that is not what the merge gives: ``ulps`` the largest difference in units of the last place."""

    module: str
    why: str
    ulps: int | None = None
    elements: int | None = None


@dataclass(frozen=True)
class VerifyReport(MergeReport):
    """A merge's report, and whether MERGED agrees with it."""

    ok: bool
    failures: tuple[Failure, ...]


@dataclass
class _Comparer:
    """Takes the blocks of the replay and holds them against the merged model's."""

    merged: Mapping[str, Tensor]
    tolerance: int
    worst: dict[str, tuple[int, int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def block(self, output: OutputFile, step: Step, start: int, data: np.ndarray) -> None:
        """Compare rows from ``start`` on."""
        found = self.merged.get(step.name)
        if found is None or (found.dtype, found.shape) != (step.dtype, step.shape):
            return
        other = found.load(start, start + len(data)).reshape(data.shape)
        if data.tobytes() == other.tobytes():
            return
        apart = ulps(data, other)
        largest, count = int(apart.max(initial=0)), int((apart > self.tolerance).sum())
        if count:
            with self.lock:
                before = self.worst.get(step.name, (0, 0))
                self.worst[step.name] = (max(before[0], largest), before[1] + count)


def ulps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The distance of two arrays of one dtype in units of the last place (integers: of their bit patterns)."""
    width = one.dtype.itemsize
    a, b = (x.reshape(-1).view(f"u{width}").astype(object if width == 8 else np.int64) for x in (one, other))
    if one.dtype.kind in "fV" or one.dtype.name.startswith(("bfloat", "float")):
        sign = 1 << (8 * width - 1)
        a, b = (np.where(x >= sign, sign - 1 - x, x) for x in (a, b))  # ordered as the values are
    return np.asarray(np.abs(a - b))


def verify(
    merge: Merge,
    merged: Model,
    *,
    device: str = "auto",
    tolerance: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Replay ``merge`` and compare ``merged`` with it, tensor by tensor, block by block.

    ``device`` ``auto`` replays with the arithmetic that ``merged`` says it was made with. ``tolerance`` allows so many
    units of the last place, for models merged by other tools or devices.
    """
    began = time.perf_counter()
    said = merged.weights[0].file.metadata.get("loratool.device", "") if device == "auto" else ""
    if said == "cpu-native" and not native.available():
        hint = "--device cpu --tolerance 1 compares with numpy's (float32 may need more)"
        raise LoratoolError("made by the compiled loops, which this installation lacks", str(merged.path), hint)
    chosen = choose(said if said.startswith("cpu-") else device, merge.plan.changed)
    tensors = by_step_name(merged)
    comparer = _Comparer(tensors, tolerance)
    run = Run(merge.plan, comparer, chosen, threads or thread_count())
    done = 0
    for count in run:
        done += count
        if progress is not None:
            progress(done, run.total)
    failures = (*_missing(merge, tensors), *(_different(n, w) for n, w in sorted(comparer.worst.items())))
    base = report(merge, str(merged.path), run.outcome, chosen.name, time.perf_counter() - began)
    return VerifyReport(
        **{**base.__dict__, "operation": "verify", "bytes_written": 0}, ok=not failures, failures=failures
    )


def _missing(merge: Merge, merged: Mapping[str, Tensor]) -> list[Failure]:
    """Tensors that one side lacks, or holds in another shape or dtype."""
    wanted = {step.name: step for step in merge.plan.steps}
    found = [Failure(name, "missing in the merged model") for name in wanted if name not in merged]
    found += [Failure(name, "only in the merged model") for name in merged if name not in wanted]
    for name, step in wanted.items():
        if name in merged and (merged[name].dtype, merged[name].shape) != (step.dtype, step.shape):
            has = f"{merged[name].dtype} {list(merged[name].shape)}"
            found.append(Failure(name, f"is {has}, should be {step.dtype} {list(step.shape)}"))
    return found


def _different(name: str, worst: tuple[int, int]) -> Failure:
    largest, count = worst
    return Failure(name, f"{count:,} elements differ, by up to {largest:,} units of the last place", largest, count)


def require(report: VerifyReport) -> None:
    """Raise VerifyError, naming the first failures, unless the proof holds."""
    if not report.ok:
        some = "; ".join(f"{f.module}: {f.why}" for f in report.failures[:3])
        count = "1 tensor is" if len(report.failures) == 1 else f"{len(report.failures):,} tensors are"
        raise VerifyError(f"{count} not what the merge gives", some)
