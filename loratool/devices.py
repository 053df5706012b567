"""Where the arithmetic runs: numpy, or torch on a processor or an accelerator.

Both follow one contract, block by block: stored bytes -> float32 (or wider) -> stored bytes, rounded once to nearest
even. numpy starts in a tenth of a second; torch needs a second to import and then converts faster, so `choose`
weighs the work. The choice depends on the work alone, never on the machine, so results are reproducible.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loratool.errors import LoratoolError, UsageError
from loratool.tensors import Array, Tensor, numpy_dtype

# nanoseconds per element and thread, measured on one x86-64 server core: widen, add a rank-16 product, round
_NUMPY_COST: Mapping[str, float] = {"F64": 2.0, "F32": 1.2, "BF16": 1.8, "F16": 7.0}
_TORCH_COST = 1.1
_TORCH_IMPORT = 2.4e9  # nanoseconds of two threads


class Worker:
    """One thread's means of computing; numpy on the processor."""

    def load(self, tensor: Tensor) -> Array:
        """A factor as a float32 (or wider) array on the device."""
        return tensor.float()

    def buffer(self, nbytes: int) -> np.ndarray:
        """Bytes of ordinary memory to read a block into, good until the next call."""
        if len(self._bytes) < nbytes:
            self._bytes = np.empty(nbytes, np.uint8)
        return self._bytes[:nbytes]

    _bytes = np.empty(0, np.uint8)

    def widen(self, block: np.ndarray) -> Array:
        """A stored block in float32 or wider on the device."""
        return block if block.dtype == np.float64 else block.astype(np.float32)

    def narrow(self, values: Array, dtype: str) -> np.ndarray:
        """Values rounded once to nearest even into the stored dtype, in ordinary memory."""
        with np.errstate(over="ignore"):
            return np.asarray(values.astype(numpy_dtype(dtype), copy=False))

    def count_nonzero(self, values: Array) -> int:
        """How many elements are not zero."""
        return int(np.count_nonzero(values != 0))

    def magnitude(self, values: Array) -> float:
        """An upper bound of the absolute values (the Euclidean norm); NaN or infinity where one is among them."""
        flat = values.reshape(-1)
        return float(np.dot(flat, flat)) ** 0.5


class TorchWorker(Worker):
    """The same with torch; on an accelerator through pinned memory and a stream of the worker's own."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.device = torch, torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if self.cuda else None

    def _tensor(self, array: np.ndarray) -> Any:
        """A torch tensor over a numpy array's memory."""
        if array.dtype.name in ("float32", "float64", "float16"):
            return self.torch.from_numpy(array)
        raw = self.torch.from_numpy(array.view(f"u{array.dtype.itemsize}"))
        return raw.view(getattr(self.torch, array.dtype.name))

    def load(self, tensor: Tensor) -> Array:
        return self.torch.from_numpy(np.ascontiguousarray(tensor.float())).to(self.device)

    def buffer(self, nbytes: int) -> np.ndarray:
        if len(self._bytes) < nbytes:
            self._pinned = self.torch.empty(nbytes, dtype=self.torch.uint8, pin_memory=self.cuda)
            self._bytes = self._pinned.numpy()
        return self._bytes[:nbytes]

    def widen(self, block: np.ndarray) -> Array:
        wide = self.torch.float64 if block.dtype == np.float64 else self.torch.float32
        with self._on_stream():
            return self._tensor(block).to(self.device, non_blocking=True).to(wide)

    def narrow(self, values: Array, dtype: str) -> np.ndarray:
        with self._on_stream():
            out = values.to(getattr(self.torch, numpy_dtype(dtype).name))
            if self.cuda:
                host = self._host(out.numel() * out.element_size())[: out.numel() * out.element_size()]
                host.view(out.dtype).copy_(out.reshape(-1), non_blocking=True)
                self.stream.synchronize()
                return np.asarray(host.numpy().view(numpy_dtype(dtype))).reshape(tuple(out.shape))
        host = out.cpu().contiguous()
        raw = host.reshape(-1).view(self.torch.uint8).numpy()
        return np.asarray(raw.view(numpy_dtype(dtype))).reshape(tuple(host.shape))

    _out: Any = None

    def _host(self, nbytes: int) -> Any:
        """Pinned memory for a block on its way back."""
        if self._out is None or len(self._out) < nbytes:
            self._out = self.torch.empty(nbytes, dtype=self.torch.uint8, pin_memory=True)
        return self._out

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self.stream is None:
            yield
        else:
            with self.torch.cuda.stream(self.stream):
                yield

    def count_nonzero(self, values: Array) -> int:
        if self.device.type == "cpu":
            return super().count_nonzero(values.numpy())
        with self._on_stream():
            return int((values != 0).sum())

    def magnitude(self, values: Array) -> float:
        if self.device.type == "cpu":
            return super().magnitude(values.numpy())
        with self._on_stream():
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
    if device in ("auto", "cpu"):
        saved = sum(n * (_NUMPY_COST.get(dtype, 2.0) - _TORCH_COST) for dtype, n in elements.items())
        device = "cpu-torch" if saved > _TORCH_IMPORT else "cpu-numpy"
    if device == "cpu-numpy":
        return Device(device, Worker)
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
