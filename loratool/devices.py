"""Where the arithmetic runs: compiled loops, numpy, or torch on a processor or an accelerator.

All follow one contract, block by block: stored bytes -> float32 (or wider) -> stored bytes, rounded once to nearest
even. The compiled loops (native.c) do it in one pass and give the same bits everywhere; an installation without them
uses numpy, which starts in a tenth of a second, or torch, which needs a second to import and then converts faster:
there `choose` weighs the work, and nothing of the machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loratool import native
from loratool.errors import LoratoolError, UsageError
from loratool.lazy import np
from loratool.tensors import Array, Tensor, numpy_dtype, to_odd

# nanoseconds per element and thread, for widening, adding a rank-16 product and rounding; for bfloat16 torch measured
# no faster over a whole merge, for float16 numpy converts in software
_NUMPY_COST: Mapping[str, float] = {"F64": 2.0, "F32": 1.6, "BF16": 1.1, "F16": 8.0}
_TORCH_COST = 1.1
_APART = 512  # bytes
_TORCH_IMPORT = 2.4e9  # nanoseconds of two threads


class Merged(NamedTuple):
    """A block in its stored dtype, how many of its values were to change, and how many of these did not."""

    out: np.ndarray
    nonzero: int
    lost: int


class Worker:
    """One thread's means of computing; numpy on the processor.

    Arrays it returns live in memory that it uses again: each is good until the next call of the same method.
    """

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}

    def _scratch(self, use: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Memory kept for one use: fresh pages cost more than the arithmetic on them."""
        wanted = np.dtype(dtype)
        nbytes = math.prod(shape) * wanted.itemsize
        kept = self._memory.get(use)
        if kept is None or len(kept) < nbytes:
            kept = self._memory[use] = np.empty(nbytes, np.uint8)
        return np.asarray(kept[:nbytes].view(wanted).reshape(shape))

    def load(self, tensor: Tensor) -> Array:
        """A factor as a float32 (or wider) array on the device."""
        return tensor.float()

    def place(self, values: np.ndarray) -> Array:
        """An array in ordinary memory, on the device."""
        return values

    def home(self, values: Array) -> np.ndarray:
        """An array of the device, in ordinary memory."""
        return np.asarray(values)

    def finish(self) -> None:
        """Wait until everything that was begun is done: other workers may use it."""

    def buffer(self, nbytes: int) -> np.ndarray:
        """Bytes of ordinary memory to read a block into."""
        return self._scratch("read", (nbytes,), np.uint8)

    def widen(self, block: np.ndarray) -> Array:
        """A stored block in float32 or wider on the device."""
        if block.dtype in (np.float64, np.float32):
            return block
        wide = self._scratch("wide", block.shape, np.float32)
        np.copyto(wide, block)
        return wide

    def add_product(self, wide: Array, up: Array, down: Array) -> Array:
        """wide [rows,i] + up [rows,r] @ down [r,i]; may reuse the memory of ``wide``."""
        dtype = np.result_type(up, down)
        kept = self._scratch("product", wide.shape, dtype)
        if np.may_share_memory(kept, wide):  # the sum so far, of several adapters
            kept = self._scratch("next product", wide.shape, dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found when it is rounded
            product = np.matmul(up, down, out=kept)
            return np.add(product, wide, out=product if product.dtype == wide.dtype else None)

    def merged(
        self, stored: np.ndarray, factors: Sequence[tuple[Array, Array]], dtype: str, dense: bool
    ) -> Merged | None:
        """``stored`` [rows,i] plus the sum of up [rows,r] @ down [r,i], rounded, all in one pass.

        None where this worker takes one step after the other: `widen`, `add_product`, `narrow`. Where factors are
        ``dense`` no element of their product is taken to be zero.
        """
        return None

    def dense(self, values: Array) -> bool:
        """Whether no element is zero."""
        return bool(values.all())

    def narrow(self, values: Array, dtype: str) -> np.ndarray:
        """Values rounded once to nearest even into the stored dtype, in ordinary memory."""
        if values.dtype == numpy_dtype(dtype):
            return np.asarray(values)
        out = self._scratch("narrow", values.shape, numpy_dtype(dtype))
        if values.dtype == np.float64 and out.itemsize < 4:
            values = to_odd(values)
        with np.errstate(over="ignore"):
            np.copyto(out, values, casting="unsafe")
        return out

    def count_nonzero(self, values: Array) -> int:
        """How many elements are not zero."""
        return int(np.count_nonzero(np.not_equal(values, 0, out=self._scratch("mask", values.shape, np.bool_))))

    def count_equal(self, one: np.ndarray, other: np.ndarray) -> int:
        """How many stored values of two blocks of one dtype have the same bytes."""
        width = f"u{one.dtype.itemsize}"
        mask = self._scratch("mask", one.shape, np.bool_)
        return int(np.count_nonzero(np.equal(one.view(width), other.view(width), out=mask)))

    def magnitude(self, values: Array) -> float:
        """An upper bound of the absolute values (the Euclidean norm); NaN or infinity where one is among them."""
        flat = values.reshape(-1)
        with np.errstate(over="ignore"):
            return math.sqrt(float(np.dot(flat, flat)))


class NativeWorker(Worker):
    """The same with the compiled loops, for what they know."""

    def widen(self, block: np.ndarray) -> Array:
        if block.dtype.itemsize != 2 or not native.handles(block.dtype):
            return super().widen(block)
        wide = self._scratch("wide", block.shape, np.float32)
        native.widen(np.ascontiguousarray(block), wide)
        return wide

    def merged(
        self, stored: np.ndarray, factors: Sequence[tuple[Array, Array]], dtype: str, dense: bool
    ) -> Merged | None:
        known = stored.dtype == numpy_dtype(dtype) and native.handles(stored.dtype)
        if not known or any(factor.dtype != np.float32 for pair in factors for factor in pair):
            return None
        ups, downs = zip(*factors, strict=True)
        up, down = (ups[0], downs[0]) if len(factors) == 1 else (np.concatenate(ups, 1), np.concatenate(downs))
        # not a whole number of pages away from what was read: loads that follow a store would wait for it
        memory = self._scratch("merged", (stored.nbytes + _APART,), np.uint8)
        out = memory[_APART:].view(stored.dtype).reshape(stored.shape)
        room = self._scratch("room", (up.shape[1] * native.panel(up.shape[1], stored.shape[1]),), np.float32)
        kept, zeros = native.merge(stored, up, down, out, room, count_zeros=not dense)
        if kept < 0:  # not finite: step by step it is told what
            return None
        return Merged(out, out.size - zeros, max(0, kept - zeros))

    def narrow(self, values: Array, dtype: str) -> np.ndarray:
        stored = numpy_dtype(dtype)
        if values.dtype == np.float32 and stored.itemsize == 2 and native.handles(stored):
            out = self._scratch("narrow", values.shape, stored)
            if native.narrow(np.ascontiguousarray(values), out):
                return out
        return super().narrow(values, dtype)


class TorchWorker(Worker):
    """The same with torch; on CUDA through pinned memory, on a stream of the worker's own.

    Several workers at once are the double buffer: while one computes, others read, copy and write.
    """

    def __init__(self, device: str) -> None:
        import torch

        super().__init__()
        self.torch, self.device = torch, torch.device(device)
        self.stream: Any = None
        if self.device.type == "cuda":  # device and stream are the calling thread's own
            torch.cuda.set_device(self.device)
            self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            torch.cuda.set_stream(self.stream)

    def _tensor(self, array: np.ndarray) -> Any:
        """A torch tensor over a numpy array's memory."""
        if array.dtype.name in ("float32", "float64", "float16"):
            return self.torch.from_numpy(array)
        raw = self.torch.from_numpy(array.view(f"i{array.dtype.itemsize}"))
        return raw.view(getattr(self.torch, array.dtype.name))

    def _scratch(self, use: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Kept memory, pinned for the traffic with CUDA."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if self.stream is not None and use in ("read", "narrow") and len(self._memory.get(use, b"")) < nbytes:
            self._memory[use] = self.torch.empty(nbytes, dtype=self.torch.uint8, pin_memory=True).numpy()
        return super()._scratch(use, shape, dtype)

    def load(self, tensor: Tensor) -> Array:
        return self.torch.from_numpy(np.array(tensor.float())).to(self.device)

    def place(self, values: np.ndarray) -> Array:
        return self.torch.from_numpy(values).to(self.device)

    def home(self, values: Array) -> np.ndarray:
        return np.asarray(values.cpu().numpy())

    def finish(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def widen(self, block: np.ndarray) -> Array:
        stored = self._tensor(block)
        if self.device.type == "cpu" and stored.dtype not in (self.torch.float32, self.torch.float64):
            return self._tensor(self._scratch("wide", block.shape, np.float32)).copy_(stored)
        wide = self.torch.float64 if block.dtype == np.float64 else self.torch.float32
        return stored.to(self.device, non_blocking=True).to(wide)

    def add_product(self, wide: Array, up: Array, down: Array) -> Array:
        dtype = self.torch.promote_types(wide.dtype, up.dtype)
        out = None  # on an accelerator torch keeps freed memory itself
        if self.device.type == "cpu" and dtype == self.torch.float32:
            out = self._tensor(self._scratch("product", tuple(wide.shape), np.float32))
        return self.torch.addmm(wide.to(dtype), up.to(dtype), down.to(dtype), out=out)

    def narrow(self, values: Array, dtype: str) -> np.ndarray:
        out = self._scratch("narrow", tuple(values.shape), numpy_dtype(dtype))
        stored = self._tensor(out)
        if values.dtype == self.torch.float64 and out.itemsize < 4:
            values = self._tensor(to_odd(values.cpu().numpy()))
        rounded = values if self.device.type == "cpu" else values.to(stored.dtype)
        stored.copy_(rounded, non_blocking=self.stream is not None)
        self.finish()
        return out

    def count_nonzero(self, values: Array) -> int:
        return int(self.torch.count_nonzero(values))

    def magnitude(self, values: Array) -> float:
        if self.device.type == "cpu":
            return super().magnitude(values.numpy())
        return float(self.torch.linalg.vector_norm(values))


@dataclass(frozen=True)
class Device:
    """A choice of arithmetic; ``name`` stands in the provenance, since rounding may differ in the last place."""

    name: str
    worker: Callable[[], Worker] = field(repr=False)
    threads: int = 0


def choose(device: str, elements: Mapping[str, int]) -> Device:
    """The device for this work: ``elements`` counts the values to change by stored dtype.

    ``auto`` and ``cpu`` are the processor. Raises UsageError for an unknown name, LoratoolError when the
    accelerator is not there.
    """
    if device in ("auto", "cpu") and native.available():
        device = "cpu-native"
    if device in ("auto", "cpu"):
        saved = sum(n * (_NUMPY_COST.get(dtype, 2.0) - _TORCH_COST) for dtype, n in elements.items())
        device = "cpu-torch" if saved > _TORCH_IMPORT else "cpu-numpy"
    if device == "cpu-numpy":
        return Device(device, Worker)
    if device == "cpu-native":
        if not native.available():
            raise LoratoolError("the compiled loops are not in this installation", device, "use --device cpu")
        return Device(device, NativeWorker)
    if device == "cpu-torch":
        import torch

        torch.set_num_threads(1)  # one thread per worker: the blocks are what runs in parallel
        return Device(device, lambda: TorchWorker("cpu"))
    if not re.fullmatch(r"cuda(:\d+)?|mps", device):
        raise UsageError("unknown device", repr(device), "one of auto, cpu, cuda, cuda:N, mps")
    _require(device)
    return Device(device, lambda: TorchWorker(device))


def _require(device: str) -> None:
    """Raise LoratoolError when an accelerator is not there."""
    import torch

    if device == "mps":
        there = torch.backends.mps.is_available()
    else:
        index = int(device.partition(":")[2] or 0)
        there = torch.cuda.is_available() and index < torch.cuda.device_count()
    if not there:
        raise LoratoolError("this device is not available", device, "use --device cpu")
    # float32 products in full precision, as on the processor
    torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit numpy's BLAS to one thread: workers run side by side, and the sum's order stays the same."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield
