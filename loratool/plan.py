"""What will be read, computed and written, tensor by tensor; and the one way to run it.

A plan is a list of independent steps: each output tensor depends on one base tensor and a few updates. It runs in
row blocks of fixed size on any number of threads, with the same bytes for any number, and holds a few blocks and the
factors in hand in memory, never a tensor, a shard or a model.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

from loratool.devices import Device, Worker, one_blas_thread
from loratool.errors import NumericError
from loratool.files import cannot_write
from loratool.lazy import np
from loratool.scaled import LARGEST, Scaled
from loratool.tensors import (
    DTYPES,
    Tensor,
    block_digest,
    block_rows,
    byte_count,
    content_hash,
    numpy_dtype,
)
from loratool.update import Prepared, Update

GROUP = 8  # blocks of one task
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""
Made = TypeVar("Made")


def counted(results: Iterable[Made], sizes: Iterable[int], progress: Progress | None) -> list[Made]:
    """All results; ``progress`` is told of each as it comes, by the bytes of what it is made from."""
    weights, made = list(sizes), []
    total, done = sum(weights), 0
    for result, size in zip(results, weights, strict=True):
        made.append(result)
        done += size
        if progress is not None:
            progress(done, total)
    return made


@dataclass(frozen=True)
class Part:
    """One update of one tensor: rows [start, stop) of it, times a strength."""

    update: Update
    strength: float
    start: int
    stop: int
    module: str


@dataclass(frozen=True)
class Step:
    """One output tensor: ``base`` as it is, or with ``parts`` added, stored as ``dtype``; 8-bit ones with scales."""

    name: str
    key: str
    base: Tensor
    dtype: str
    parts: tuple[Part, ...] = ()
    scaled: Scaled | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.base.shape

    @property
    def nbytes(self) -> int:
        """Bytes it will have."""
        return byte_count(self.dtype, self.shape)

    @property
    def computes(self) -> bool:
        """Whether values change; otherwise bytes are copied."""
        return bool(self.parts) or self.dtype != self.base.dtype


@dataclass(frozen=True)
class OutputFile:
    """One weight file to write: its tensors in the order of their bytes, and its metadata."""

    name: str
    steps: tuple[Step, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """Everything a run will do: weight files to compute, small files to write, files to copy, inputs to hash."""

    outputs: tuple[OutputFile, ...]
    documents: Mapping[str, bytes] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)
    inputs: Mapping[str, Path] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Every tensor of every file."""
        return tuple(step for output in self.outputs for step in output.steps)

    @property
    def bytes_read(self) -> int:
        """Bytes of base tensors and factors that will be read."""
        factors = sum(part.update.nbytes for step in self.steps for part in step.parts)
        return sum(step.base.nbytes for step in self.steps) + factors

    @property
    def bytes_written(self) -> int:
        """Bytes that will be written, headers apart."""
        copied = sum(path.stat().st_size for path in self.copies.values())
        return sum(step.nbytes for step in self.steps) + copied + sum(map(len, self.documents.values()))

    @property
    def changed(self) -> Mapping[str, int]:
        """Elements to compute, by stored dtype."""
        counts: dict[str, int] = {}
        for step in self.steps:
            if step.computes:
                counts[step.base.dtype] = counts.get(step.base.dtype, 0) + step.base.size
        return counts

    def peak_memory(self, threads: int) -> int:
        """A bound of the working memory in bytes: blocks of every thread, and the factors of their tensors."""
        block = max((_block_bytes(step) for step in self.steps), default=0)
        factors = sorted((_factor_bytes(step) for step in self.steps), reverse=True)
        return threads * block + sum(factors[:threads])


def _block_bytes(step: Step) -> int:
    """Memory of one block of a tensor on its way: as stored, in and out, and wide, value and change."""
    rows = block_rows(step.shape)
    elements = rows * (step.base.size // max(step.base.rows, 1))
    stored = elements * (DTYPES[step.base.dtype].bits + DTYPES[step.dtype].bits) // 8
    mixed = max((part.update.mixes for part in step.parts), default=1)
    reached = min(rows + 2 * mixed, step.base.rows) * (elements // rows) if mixed > 1 else 0  # read, turned, kept
    return stored + (elements * 4 * 4 if step.computes else 0) + reached * 4 * 6


def _factor_bytes(step: Step) -> int:
    """Memory of a tensor's factors in float32: read, and scaled; and of what is made of them."""
    sizes = (t.size for p in step.parts for t in p.update.slots.values() if p.update.kind != "full")
    return 2 * 4 * sum(sizes) + 4 * sum(part.update.makes for part in step.parts)


@dataclass
class Tally:
    """What the blocks of a run add up to."""

    nonzero: int = 0
    lost: int = 0
    squares: list[tuple[float, float]] = field(default_factory=list)
    """Of every block in 8 bits: the sums of squares of what rounding missed, and of the change."""

    def add(self, nonzero: int, lost: int, squares: tuple[float, float] | None = None) -> None:
        """Count one block."""
        self.nonzero += nonzero
        self.lost += lost
        if squares is not None:
            self.squares.append(squares)

    @property
    def lost_to_rounding(self) -> float:
        """Share of the non-zero delta entries that did not change the stored value."""
        return self.lost / self.nonzero if self.nonzero else 0.0

    @property
    def rounding_error(self) -> float | None:
        """||stored - exact|| / ||change|| (Frobenius) over what is stored in 8 bits; None where nothing is."""
        if not self.squares:
            return None
        missed, change = (math.fsum(column) for column in zip(*self.squares, strict=True))  # in whatever order
        return math.sqrt(missed / change) if change else 0.0


class Consumer(Protocol):
    """What is done with the blocks of the output: written, or compared. Called from several threads."""

    def block(self, output: OutputFile, step: Step, start: int, data: np.ndarray) -> None:
        """Take the stored values of rows [start, start + len(data)) of one tensor."""


@dataclass(frozen=True)
class Outcome:
    """What a run found out."""

    hashes: Mapping[str, str]
    content_hash: str
    tally: Tally


class Run:
    """A plan under way: iterate to carry it out; each item is a number of bytes done. Then ask ``outcome``."""

    def __init__(self, plan: Plan, consumer: Consumer, device: Device, threads: int) -> None:
        self.plan, self.consumer, self.device, self.threads = plan, consumer, device, threads
        self._local = threading.local()
        self._lock = threading.Lock()
        self._prepared: dict[int, _Shared] = {}
        self._tally = Tally()
        self._digests: dict[str, dict[int, bytes]] = {}
        self._hashes: dict[str, str] = {}
        self._stop = threading.Event()

    def __iter__(self) -> Iterator[int]:
        done: SimpleQueue[int | None] = SimpleQueue()
        outputs, inputs = iter(self.plan.outputs), iter(self.plan.inputs.items())
        lanes = [self._lane(outputs, inputs) for _ in range(self.threads)]
        with one_blas_thread(), ThreadPoolExecutor(self.threads) as pool:
            workers = [pool.submit(self._work, lanes[n:] + lanes[:n], done) for n in range(self.threads)]
            try:
                for _ in workers:
                    yield from iter(done.get, None)  # None: one worker has no more to do
                for worker in workers:
                    worker.result()
            finally:
                self._stop.set()

    @property
    def total(self) -> int:
        """Bytes that the items add up to."""
        return sum(step.nbytes for step in self.plan.steps) + sum(p.stat().st_size for p in self.plan.inputs.values())

    @property
    def outcome(self) -> Outcome:
        """Hashes and counts, once the run is through."""
        digests = self.digests
        return Outcome(
            dict(self._hashes),
            content_hash((s.name, s.dtype, s.shape, digests.get(s.name, b"")) for s in self.plan.steps),
            self._tally,
        )

    @property
    def digests(self) -> dict[str, bytes]:
        """The digest of every tensor, its blocks in order."""
        return {name: b"".join(d for _, d in sorted(found.items())) for name, found in self._digests.items()}

    def _lane(self, outputs: Iterator[OutputFile], inputs: Iterator[tuple[str, Path]]) -> Iterator[Callable[[], int]]:
        """Tasks of one worker. Each takes files of its own while there are some: a file is written by one at a time."""
        for output in outputs:
            yield from (partial(self._hash, *one) for one in islice(inputs, 1))
            for step in output.steps:
                yield from (partial(self._group, output, step, start, stop) for start, stop in _groups(step))
        yield from (partial(self._hash, *one) for one in inputs)

    def _work(self, lanes: Sequence[Iterator[Callable[[], int]]], done: SimpleQueue[int | None]) -> None:
        """Do the tasks of the first lane, then help with the others."""
        try:
            for lane in lanes:
                while not self._stop.is_set() and (task := self._next(lane)) is not None:
                    done.put(task())
        except BaseException:
            self._stop.set()
            raise
        finally:
            done.put(None)

    def _next(self, lane: Iterator[Callable[[], int]]) -> Callable[[], int] | None:
        """The next task of a lane, which several workers may ask."""
        with self._lock:
            return next(lane, None)

    def _hash(self, name: str, path: Path) -> int:
        from loratool.hashes import sha256

        self._hashes[name] = sha256(path, self._stop)
        return path.stat().st_size

    def _group(self, output: OutputFile, step: Step, start: int, stop: int) -> int:
        """Rows [start, stop) of one tensor, block by block."""
        worker = self._worker()
        rows = block_rows(step.shape)
        shared = self._shared(step) if step.parts else None
        try:
            prepared = shared.get(worker) if shared else ()
            for first in range(start, stop, rows):
                if self._stop.is_set():
                    return 0
                last = min(first + rows, stop)
                data = self._block(worker, step, prepared, first, last)
                self._digests.setdefault(step.name, {})[first] = block_digest(data)
                self.consumer.block(output, step, first, data)
        finally:
            self._release(step)
        return step.nbytes * (stop - start) // max(step.base.rows, 1)

    def _worker(self) -> Worker:
        if not hasattr(self._local, "worker"):
            self._local.worker = self.device.worker()
        return self._local.worker  # type: ignore[no-any-return]

    def _shared(self, step: Step) -> _Shared:
        with self._lock:
            return self._prepared.setdefault(id(step), _Shared(step))

    def _release(self, step: Step) -> None:
        """Forget a tensor's factors after its last group."""
        with self._lock:
            shared = self._prepared.get(id(step))
            if shared and shared.finished():
                del self._prepared[id(step)]

    def _block(self, worker: Worker, step: Step, prepared: Sequence[Prepared], first: int, last: int) -> np.ndarray:
        """The stored values of one block [rows, -1]."""
        stored = read_block(worker, step.base, first, last)
        if not step.computes:
            return stored
        products = _products(step.parts, prepared, first, last)
        if step.scaled is None and products.factors:
            merged = worker.merged(stored, products.factors, step.dtype, products.dense)
            if merged is not None:
                with self._lock:
                    self._tally.add(merged.nonzero, merged.lost)
                return merged.out
        base = worker.widen(stored) if step.scaled is None else worker.place(step.scaled.widened(stored, first))
        if not step.parts:
            return checked(worker, base, worker.narrow(base, step.dtype), step)

        def wide(part: Part, update: Prepared, start: int, stop: int) -> Any:
            """The base rows that an update reaches for, beyond those it changes."""
            assert update.reach is not None
            low, high = update.reach(start - part.start, stop - part.start)
            rows = step.base.slice(part.start + low, part.start + high)
            if step.scaled is not None:
                stored = rows.load(0, high - low).reshape(high - low, -1)
                return worker.place(step.scaled.widened(stored, part.start + low))
            return worker.load(rows).reshape(high - low, -1)  # not into kept memory

        value, nonzero = _changed(worker, step.parts, prepared, products, first, last, base, wide)
        fitted = value if step.scaled is None else worker.place(step.scaled.divided(worker.home(value), first))
        out = checked(worker, fitted, worker.narrow(fitted, step.dtype), step)
        if out.dtype == stored.dtype:
            same = worker.count_equal(out, stored)
            squares = _squares(step, first, worker.home(base), worker.home(value), out) if eight_bit(step) else None
            with self._lock:
                self._tally.add(nonzero, max(0, same - (out.size - nonzero)), squares)
        return out


def _changed(
    worker: Worker,
    parts: Sequence[Part],
    prepared: Sequence[Prepared],
    products: _Products,
    first: int,
    last: int,
    base: Any,
    wide: Callable[[Part, Prepared, int, int], Any],
) -> tuple[Any, int]:
    """Rows [first, last) with the deltas of all parts added, and how many elements of the delta are not zero.

    A product of factors without a zero is taken to have none: an exact cancellation is not looked for.
    """
    if products.factors and products.dense:
        value = base
        for up, down in products.factors:
            value = worker.add_product(value, up, down)
        return value, math.prod(base.shape)
    change = base * 0
    for part, update in zip(parts, prepared, strict=True):
        start, stop = max(first, part.start), min(last, part.stop)  # a part may be rows of a fused weight
        if start < stop:
            rows = slice(start - first, stop - first)
            own = base[rows] if update.reach is None else wide(part, update, start, stop)
            change[rows] += update.delta(start - part.start, stop - part.start, own)
    nonzero = worker.count_nonzero(change)
    change += base
    return change, nonzero


class _Products(NamedTuple):
    """What adds up to the change of some rows, up [rows,r] and down [r,-1] of every part; whether none holds a zero.

    Without factors the change is no sum of products, or of some of the rows only.
    """

    factors: Sequence[tuple[Any, Any]]
    dense: bool


def _products(parts: Sequence[Part], prepared: Sequence[Prepared], first: int, last: int) -> _Products:
    """The products that change rows [first, last), of the parts that reach them."""
    factors, dense = [], True
    for part, update in zip(parts, prepared, strict=True):
        if part.stop <= first or last <= part.start:
            continue
        if update.factors is None or first < part.start or part.stop < last:
            return _Products((), False)
        up, down = update.factors
        factors.append((up[first - part.start : last - part.start], down))
        dense = dense and update.dense
    return _Products(factors, dense)


def eight_bit(step: Step) -> bool:
    """Whether a tensor is stored in 8-bit floating point, where rounding can take a good part of a change."""
    return step.dtype in LARGEST


def _squares(step: Step, first: int, base: np.ndarray, value: np.ndarray, out: np.ndarray) -> tuple[float, float]:
    """Sums of squares over a block [rows,-1] in 8 bits: of what rounding ``value`` to ``out`` missed, of the change."""
    stored = out.astype(np.float32) if step.scaled is None else step.scaled.widened(out, first, step.scaled.new())
    missed, change = (np.square(d, dtype=np.float64).sum() for d in (stored - value, value - base))
    return float(missed), float(change)


def _with_density(worker: Worker, prepared: Prepared) -> Prepared:
    """Mark a product whose factors have no zero."""
    if prepared.factors is None:
        return prepared
    return replace(prepared, dense=all(map(worker.dense, prepared.factors)))


class _Shared:
    """The factors of one tensor, loaded by the first thread that needs them and shared by all."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.left = len(list(_groups(step)))
        self._lock = threading.Lock()
        self._ready: list[Prepared] | None = None

    def get(self, worker: Worker) -> list[Prepared]:
        with self._lock:
            if self._ready is None:
                ready = [part.update.prepare(worker.load, part.strength) for part in self.step.parts]
                for part, prepared in zip(self.step.parts, ready, strict=True):
                    if prepared.scan is not None:
                        prepared.scan(_walk(worker, self.step, part))
                self._ready = [_with_density(worker, prepared) for prepared in ready]
                worker.finish()
            return self._ready

    def finished(self) -> bool:
        self.left -= 1
        return self.left <= 0


def _walk(worker: Worker, step: Step, part: Part) -> Iterator[tuple[int, int, Any]]:
    """The row blocks of the base that one part changes, widened."""
    rows = block_rows(step.base.shape)
    for first in range(part.start, part.stop, rows):
        last = min(first + rows, part.stop)
        stored = read_block(worker, step.base, first, last)
        wide = worker.widen(stored) if step.scaled is None else worker.place(step.scaled.widened(stored, first))
        yield first - part.start, last - part.start, wide


def read_block(worker: Worker, tensor: Tensor, first: int, last: int) -> np.ndarray:
    """Rows [first, last) as stored, [rows, -1]; from a file straight into the worker's buffer."""
    if tensor.region is None:
        return np.ascontiguousarray(tensor.load(first, last)).reshape(last - first, -1)
    row = tensor.region.nbytes // max(tensor.rows, 1)
    data = worker.buffer((last - first) * row)
    tensor.region.file.read_into(memoryview(data), tensor.region.offset + first * row)
    if DTYPES[tensor.dtype].bits < 8:
        return data.reshape(last - first, -1)
    return data.view(numpy_dtype(tensor.dtype)).reshape(last - first, -1)


def checked(worker: Worker, wide: Any, out: np.ndarray, step: Step) -> np.ndarray:
    """``out``, the rounded values. Raises NumericError when NaN or an infinity is among them."""
    limit = {"F16": 65504.0, "BF16": 3.38e38, "F32": 3.4e38, "F64": 1e300}.get(step.dtype, 0.0)
    if worker.magnitude(wide) < limit:  # no element exceeds the norm
        return out
    finite = np.isfinite(out.astype(np.float32) if out.dtype.itemsize < 4 else out)
    if finite.all():
        return out
    value = float(np.asarray(out, np.float64)[~finite][0])
    what = "NaN" if np.isnan(value) else f"overflow of {step.dtype}"
    modules = ", ".join(part.module for part in step.parts)
    raise NumericError(f"{what} in the result", step.name, f"changed by {modules}" if modules else "")


def _groups(step: Step) -> Iterator[tuple[int, int]]:
    """Row ranges of the tasks of one tensor."""
    size = block_rows(step.shape) * GROUP
    for start in range(0, step.base.rows if step.base.size else 0, size):
        yield start, min(start + size, step.base.rows)


class Writer:
    """Writes the blocks of output files into a folder at known offsets; headers come last."""

    def __init__(self, folder: Path, outputs: Sequence[OutputFile], heads: Mapping[str, int]) -> None:
        self._paths = {output.name: folder / output.name for output in outputs}
        self._offsets: dict[tuple[str, str], int] = {}
        self._fds: dict[str, int] = {}
        try:
            for output in outputs:
                position = heads[output.name]
                for step in output.steps:
                    self._offsets[output.name, step.key] = position
                    position += step.nbytes
                self._fds[output.name] = self._create(self._paths[output.name], position)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _create(path: Path, size: int) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        os.ftruncate(fd, size)
        return fd

    def block(self, output: OutputFile, step: Step, start: int, data: np.ndarray) -> None:
        """Write rows from ``start`` on."""
        row = step.nbytes // max(step.base.rows, 1)
        self.write(output.name, self._offsets[output.name, step.key] + start * row, memoryview(data.view(np.uint8)))

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """Write bytes at an offset of one file."""
        view = memoryview(data).cast("B")
        while len(view):
            try:
                count = os.pwrite(self._fds[name], view, offset)
            except OSError as error:
                raise cannot_write(error, self._paths[name]) from None
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Close every file."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def thread_count() -> int:
    """Threads that a run uses: the processors this process may use, at most eight (beyond that I/O is the limit)."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, available))
