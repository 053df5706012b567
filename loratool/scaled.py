"""Weights stored in 8-bit floating point: read, changed in float32, and rounded again in the same scheme.

A stored weight W8 stands for W8 x scale, where a scale tensor lies beside it: one for the whole (ComfyUI's
``scale_weight``, compressed-tensors' ``weight_scale``), one for each output, or one for each block of rows and columns
(DeepSeek's ``weight_scale_inv``, which multiplies despite its name). A scale stays as it is unless the changed values
no longer fit; then it is what makes the largest of them fit. Source: formats document, llm.md section 7.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratool.errors import FormatError
from loratool.lazy import np
from loratool.tensors import Tensor, block_rows, numpy_dtype
from loratool.update import Prepared, Update

# the largest value of each 8-bit type
LARGEST: Mapping[str, float] = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
# how scales are named beside ``<module>.weight``; all of them multiply
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
# parameters that mean another scheme: 4 bits, mixtures of exponents, packed integers
FOREIGN = ("weight_packed", "weight_global_scale", "weight_scale_2", "weight_zero_point", "qweight", "SCB", "absmax")


@dataclass(frozen=True)
class Change:
    """One update of rows [start, stop) of a weight, times a strength."""

    update: Update
    strength: float
    start: int
    stop: int


@dataclass
class Scaled:
    """A weight [o,...] in 8 bits and its scales, as a grid [rows, columns] of blocks of equal size.

    ``changes`` are what a merge adds: the scales that its result needs are worked out once, when first asked for.
    """

    weight: Tensor
    scale: Tensor
    grid: tuple[int, int]
    block: tuple[int, int]
    changes: tuple[Change, ...] = ()
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _new: np.ndarray | None = None

    def old(self) -> np.ndarray:
        """The stored scales, [rows, columns] in float32."""
        return np.asarray(self.scale.float().reshape(self.grid), np.float32)

    def new(self) -> np.ndarray:
        """The scales of the result: the stored ones, larger where its values need it."""
        with self._lock:
            if self._new is None:
                self._new = self._worked_out()
            return self._new

    def tensor(self) -> Tensor:
        """The scales of the result, as the base stores them."""
        shape, dtype = self.scale.shape, numpy_dtype(self.scale.dtype)

        def load(start: int, stop: int) -> np.ndarray:
            values = self.new().astype(dtype).reshape(shape or (1,))
            return values[start:stop]

        return Tensor(self.scale.dtype, shape, load)

    def widened(self, stored: np.ndarray, first: int, scales: np.ndarray | None = None) -> np.ndarray:
        """Rows from ``first`` on as they are stored [rows,-1] -> their values in float32."""
        scales = self.old() if scales is None else scales
        return np.asarray(stored.astype(np.float32) * self._spread(scales, first, len(stored), stored.shape[1]))

    def divided(self, values: Any, first: int) -> Any:
        """Values [rows,-1] by the result's scales: what is rounded to 8 bits."""
        return values / self._spread(self.new(), first, len(values), values.shape[1])

    def _spread(self, scales: np.ndarray, first: int, rows: int, columns: int) -> np.ndarray:
        """The scale of every element of some rows, or what broadcasts to them."""
        tall, wide = self.block
        lines = scales[np.arange(first, first + rows) // tall]  # [rows, grid columns]
        return lines if self.grid[1] == 1 else np.repeat(lines, wide, axis=1)[:, :columns]

    def _worked_out(self) -> np.ndarray:
        """Scales for the largest changed value of each block."""
        old, most = self.old(), LARGEST[self.weight.dtype]
        peaks = np.zeros(self.grid, np.float32)
        prepared = [change.update.prepare(Tensor.float, change.strength) for change in self.changes]
        for change, one in zip(self.changes, prepared, strict=True):
            if one.scan is not None:
                one.scan((a - change.start, b - change.start, w) for a, b, w in self._walk(change.start, change.stop))
        for first, last, wide in self._walk(0, self.weight.rows):
            value = wide + sum(
                self._delta(c, p, first, last, wide) for c, p in zip(self.changes, prepared, strict=True)
            )
            for row, column, peak in self._peaks(np.abs(value), first):
                peaks[row, column] = max(peaks[row, column], peak)
        needed = peaks / np.float32(most)
        # rounded up in the dtype of the scales: no value may be beyond the largest
        up = needed.astype(numpy_dtype(self.scale.dtype)).astype(np.float32)
        up = np.where(up < needed, np.nextafter(needed.astype(numpy_dtype(self.scale.dtype)), np.inf), up)
        return np.where(peaks > old * most, up.astype(np.float32), old)

    def _walk(self, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
        rows = block_rows(self.weight.shape)
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            yield first, last, self.widened(self.weight.load(first, last).reshape(last - first, -1), first)

    def _delta(self, change: Change, prepared: Prepared, first: int, last: int, wide: np.ndarray) -> np.ndarray:
        found = np.zeros_like(wide)
        low, high = max(first, change.start), min(last, change.stop)
        if low < high:
            base = wide[low - first : high - first]
            if prepared.reach is not None:
                a, b = prepared.reach(low - change.start, high - change.start)
                rows = self.weight.load(change.start + a, change.start + b).reshape(b - a, -1)
                base = self.widened(rows, change.start + a)
            found[low - first : high - first] = prepared.delta(low - change.start, high - change.start, base)
        return found

    def _peaks(self, values: np.ndarray, first: int) -> Iterator[tuple[int, int, float]]:
        """The largest value of each block of the grid that some rows touch."""
        tall, wide = self.block
        for row in range(first // tall, (first + len(values) - 1) // tall + 1):
            lines = values[max(row * tall - first, 0) : (row + 1) * tall - first]
            for column in range(self.grid[1]):
                part = lines[:, column * wide : (column + 1) * wide] if self.grid[1] > 1 else lines
                yield row, column, float(part.max(initial=0.0))


def scaled(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[str, Scaled] | None:
    """The scale tensor's name and the weight with its scales; None for a weight without (its bits are its values).

    Raises FormatError for schemes that are not known.
    """
    module, _, leaf = name.rpartition(".")
    foreign = next((other for other in FOREIGN if f"{module}.{other}" in tensors), None)
    if foreign is not None:
        raise FormatError(f"a weight quantised with {foreign} cannot be changed yet", name, _HINT)
    beside = [f"{module}.{other}" for other in SCALES] if leaf == "weight" else [f"{name}_scale", f"{name}_scale_inv"]
    found = [other for other in beside if other in tensors]
    if not found:
        return None
    weight, scale = tensors[name], tensors[found[0]]
    if len(found) > 1 or scale.dtype not in ("F32", "F16", "BF16"):
        raise FormatError(f"scales of dtype {scale.dtype} are not understood", found[0], _HINT)
    return found[0], Scaled(weight, scale, *_grid(weight, scale, config, found[0]))


_HINT = "give the base in 16 or 32 bit"


def _grid(
    weight: Tensor, scale: Tensor, config: Mapping[str, Any], where: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of the grid of scales, and of one of its blocks. Raises FormatError where they do not fit."""
    out, inner = weight.shape[0], math.prod(weight.shape[1:])
    if scale.size == 1:
        return (1, 1), (out, inner)
    if scale.size == out and scale.shape[0] == out:
        return (out, 1), (1, inner)
    told = config.get("quantization_config")
    size = told.get("weight_block_size") if isinstance(told, dict) else None
    if len(scale.shape) == 2 and len(weight.shape) == 2:
        block = _block(size) or (-(-out // scale.shape[0]), -(-inner // scale.shape[1]))
        if scale.shape == (-(-out // block[0]), -(-inner // block[1])):
            return (scale.shape[0], scale.shape[1]), block
    raise FormatError(f"scales of shape {list(scale.shape)} for a weight of {list(weight.shape)}", where, _HINT)


def _block(size: object) -> tuple[int, int] | None:
    """A block size as configurations tell it."""
    if isinstance(size, Sequence) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None
