"""An update of a module's weight as an update of the tensor that a graph stores: turned, and among other rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from loratool.lazy import np
from loratool.onnx.operands import Layout
from loratool.tensors import Array, Tensor, numpy_dtype
from loratool.update import Around, DoRA, Load, LowRank, Prepared, Replace, Update

Block = tuple[int, int, Array]


def stored(update: Update, shape: tuple[int, ...], layout: Layout, rows: np.ndarray | None = None) -> Update:
    """``update`` of a module's weight as that of a tensor of ``shape``, which holds it in ``layout``.

    ``rows`` are the rows of the whole weight (torch's orientation) that the module is; the others stay.
    """
    if isinstance(update, LowRank) and update.mid is None:
        return _low_rank(update, shape, layout, rows)
    if rows is None and layout == "plain":
        return update
    if rows is None and layout == "transposed" and isinstance(update, DoRA) and isinstance(update.direction, LowRank):
        return update.oriented("transposed")
    if rows is None and isinstance(update, Replace):
        return Replace(restored(update.value, layout))
    return Turned(update, shape, layout, None if rows is None else tuple(rows.tolist()))


def _low_rank(update: LowRank, shape: tuple[int, ...], layout: Layout, rows: np.ndarray | None) -> LowRank:
    if rows is not None:
        out = shape[-1] if layout == "transposed" else shape[0]
        update = replace(update, up=_spread(update.up, rows, out))
    if layout == "transposed":
        return update.oriented("transposed")
    if layout == "nhwc":
        order = (0, *range(2, len(update.down.shape)), 1)
        return replace(update, down=_lazily(update.down, order))
    return update


def restored(tensor: Tensor, layout: Layout) -> Tensor:
    """A weight in torch's orientation as a graph stores it in ``layout``."""
    if layout == "transposed":
        return tensor.T
    return _lazily(tensor, (0, *range(2, len(tensor.shape)), 1)) if layout == "nhwc" else tensor


def _lazily(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """``tensor`` with its axes in another order, the first one staying."""
    shape = tuple(tensor.shape[n] for n in order)
    return Tensor(
        tensor.dtype, shape, lambda start, stop: np.ascontiguousarray(tensor.load(start, stop).transpose(order))
    )


def _spread(up: Tensor, rows: np.ndarray, out: int) -> Tensor:
    """An up factor [o,r,*1] among the rows of a larger one [out,r,*1], zero elsewhere."""
    source = np.full(out, -1)
    source[rows] = np.arange(len(rows))

    def load(start: int, stop: int) -> np.ndarray:
        wanted = source[start:stop]
        values = np.zeros((stop - start, *up.shape[1:]), numpy_dtype(up.dtype))
        values[wanted >= 0] = up.array()[wanted[wanted >= 0]]
        return values

    return Tensor(up.dtype, (out, *up.shape[1:]), load)


@dataclass(frozen=True)
class Turned(Around):
    """Any update, of any kind, of a weight that a tensor of ``stored_shape`` holds in ``layout``, at ``rows``.

    The kinds work by rows of the module's weight; here these lie across the stored rows, so the change of the whole
    weight is worked out when the factors are loaded and held in float32.
    """

    inner: Update
    stored_shape: tuple[int, ...]
    layout: Layout
    rows: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape

    def prepare(self, load: Load, strength: float = 1.0) -> Prepared:
        inner = self.inner.prepare(Tensor.float, strength)  # on the processor, wherever the blocks are
        change: list[np.ndarray] = []

        def scan(found: Iterable[Block]) -> None:
            blocks = [np.array(_plain(base)) for _, _, base in found]
            whole = np.concatenate(blocks).reshape(self.stored_shape)
            change[:] = [self._change(inner, whole).reshape(self.stored_shape[0], -1)]

        return Prepared(lambda start, stop, base: _beside(change[0][start:stop], base), scan)

    def _change(self, inner: Prepared, whole: np.ndarray) -> np.ndarray:
        """The change of the whole stored weight."""
        change = np.zeros_like(whole)
        ours, theirs = _turn(whole, self.layout), _turn(change, self.layout)  # torch's orientation, views
        rows = slice(None) if self.rows is None else np.array(self.rows)
        base = np.ascontiguousarray(ours[rows]).reshape(len(ours[rows]), -1)
        if inner.scan is not None:
            inner.scan([(0, len(base), base)])
        theirs[rows] = np.asarray(inner.delta(0, len(base), base)).reshape(ours[rows].shape)
        return change


def _turn(values: np.ndarray, layout: Layout) -> np.ndarray:
    """A stored weight in torch's orientation: a view."""
    if layout == "transposed":
        return values.T
    return np.moveaxis(values, -1, 1) if layout == "nhwc" else values


def _plain(array: Array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _beside(values: np.ndarray, base: Any) -> Array:
    """``values`` where ``base`` is: on the processor, or on a device."""
    return values if isinstance(base, np.ndarray) else base.new_tensor(values)
