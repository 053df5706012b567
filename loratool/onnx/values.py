"""Weights told by their values: what a graph without names holds, by the checkpoint that it was made from.

Each output row of a weight is known by its first values, in the graph's dtype. A weight whose rows are those of one
module is that module; one whose rows are several modules' is fused, and the rows say where each lies, whatever the
order (one below the other, or interleaved head by head).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.architectures.llm import EMBEDDING_LEAVES, tie_of
from loratool.errors import MatchError
from loratool.lazy import np
from loratool.model import Model
from loratool.names import Names, Unmatched, stores_transposed
from loratool.onnx.operands import Layout, Operand
from loratool.tensors import FLOATS, Tensor, blocks, numpy_dtype

if TYPE_CHECKING:
    from loratool.onnx.resolve import Site

COLUMNS = 64  # leading values of a row that it is known by
_CLOSE = 2.0**-7  # relative difference that a conversion to 16 bits on another way may leave
Rows = np.ndarray


@dataclass(frozen=True, eq=False)
class _Known:
    """One module of the checkpoint: its name and the keys of its rows."""

    module: str
    keys: np.ndarray  # [out] uint64


def identify(found: Sequence[Operand], base: Model) -> Iterator[tuple[Operand, list[tuple[str, Rows | None]]]]:
    """For each operand that holds modules of ``base``: their names, and which rows of it each is (None: the whole)."""
    tables: dict[tuple[str, tuple[int, ...]], list[_Known]] = {}
    for operand in found:
        weight = operand.weight
        if operand.quantised or operand.refused or not weight.floating or len(operand.shape) < 2:
            continue
        kind = (weight.tensor.dtype, operand.shape[1:])
        if kind not in tables:
            tables[kind] = list(_known(base, *kind))
        keys = row_keys(leading(weight.tensor, operand.layout))
        parts = _whole(operand, keys, tables[kind], base) or _fused(keys, tables[kind])
        if parts:
            yield operand, parts


def _known(base: Model, dtype: str, inner: tuple[int, ...]) -> Iterator[_Known]:
    """The modules of the checkpoint whose rows have the shape ``inner``."""
    for name, tensor in torch_matrices(base):
        if tensor.shape[1:] == inner:
            yield _Known(name.removesuffix(".weight"), row_keys(leading(tensor.cast(dtype))))


def torch_matrices(base: Model) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the checkpoint with two axes or more, in torch.nn.Linear's orientation."""
    renamed = base.architecture is not None
    for name, slot in base.places.items():
        if name.endswith(".weight") and not (renamed and slot.tensor == name):
            tensor = torch_weight(base, name)
            if tensor is not None:
                yield name, tensor


def torch_weight(base: Model, name: str) -> Tensor | None:
    """A weight of the checkpoint in torch.nn.Linear's orientation; None for what is no matrix of floats."""
    tensor = base.rows_of(base.places[name])
    if len(tensor.shape) < 2 or tensor.dtype not in FLOATS:
        return None
    if len(tensor.shape) == 2 and (base.places[name].transposed or stores_transposed(base.places[name].tensor, base)):
        return tensor.T
    return tensor


def leading(tensor: Tensor, layout: Layout = "plain") -> np.ndarray:
    """The first values of each output row, [out, at most COLUMNS], as stored."""
    if layout == "transposed":
        rows = tensor.load(0, min(COLUMNS, tensor.rows))
        return np.ascontiguousarray(rows.T)
    found = []
    for start, stop in blocks(tensor):
        values = tensor.load(start, stop)
        values = np.moveaxis(values, -1, 1) if layout == "nhwc" else values
        found.append(np.array(values.reshape(stop - start, -1)[:, :COLUMNS]))
    return np.concatenate(found) if found else np.empty((0, 0), numpy_dtype(tensor.dtype))


def row_keys(values: np.ndarray) -> np.ndarray:
    """A number for each row [rows, columns] -> [rows] uint64: equal for equal bits."""
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").astype(np.uint64)
    words = np.random.default_rng(0).integers(1, 1 << 62, bits.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    with np.errstate(over="ignore"):
        total = (bits ^ (bits << np.uint64(31))) @ words
    return np.asarray(total ^ (total >> np.uint64(29)))


def _whole(operand: Operand, keys: np.ndarray, known: Sequence[_Known], base: Model) -> list[tuple[str, Rows | None]]:
    """The one module that a weight is; none where several have its values."""
    names = [k.module for k in known if np.array_equal(k.keys, keys)]
    tie = tie_of(base.configs.get("", {}), frozenset(base.modules))
    if tie is not None and tie.embedding in names and tie.head not in names:
        names.append(tie.head)
    if len(names) > 1:
        tables = [name for name in names if name.rpartition(".")[2] in EMBEDDING_LEAVES]
        names = tables if operand.table else [name for name in names if name not in tables]
    return [(names[0], None)] if len(names) == 1 else []


def _fused(keys: np.ndarray, known: Sequence[_Known]) -> list[tuple[str, Rows | None]]:
    """The modules whose rows, all of them, a weight holds; and where."""
    sizes = [len(k.keys) for k in known]
    every = np.concatenate([k.keys for k in known]) if known else np.empty(0, np.uint64)
    owner = np.repeat(np.arange(len(known)), sizes)
    row = np.concatenate([np.arange(size) for size in sizes]) if known else owner
    order = np.argsort(every, kind="stable")
    first, last = (np.searchsorted(every[order], keys, side) for side in ("left", "right"))
    places: dict[int, np.ndarray] = {}
    before: tuple[int, int] | None = None
    for position, (low, high) in enumerate(zip(first, last, strict=True)):
        candidates = [(int(owner[n]), int(row[n])) for n in order[low:high][:64]]
        following = (before[0], before[1] + 1) if before else None
        before = following if following in candidates else candidates[0] if len(candidates) == 1 else None
        if before:
            at = places.setdefault(before[0], np.full(sizes[before[0]], -1))
            at[before[1]] = position
    return [(known[n].module, at) for n, at in places.items() if (at >= 0).all()]


def confirm(sites: Iterable[Site], base: Model, present: Callable[[str], bool]) -> None:
    """Check each site against the checkpoint; ``present`` tells whether the graph has a module.

    Raises MatchError where the values are not the graph's, and for a module that the exporter merged into the site's,
    its values being the same: it would change too.
    """
    names = Names(base.places)
    tie = tie_of(base.configs.get("", {}), frozenset(base.modules))
    ends = (f"{tie.head}.weight", f"{tie.embedding}.weight") if tie else ()
    vanished = [(name, tensor) for name, tensor in torch_matrices(base) if not present(name) and name not in ends]
    for site in sites:
        if site.quantised or len(site.weight.shape) < 2:
            continue
        hit = names.find(f"{site.module}.weight")
        if tie is not None and isinstance(hit, Unmatched) and site.module.endswith(tie.head):
            hit = names.find(f"{tie.embedding}.weight")
        own = "" if isinstance(hit, Unmatched) else hit[0]
        tensor = torch_weight(base, own) if own else None
        if tensor is None or not (holds(site, tensor) or _holds_rows(site, tensor)):
            raise MatchError(
                "the base weights are not those of the graph",
                f"{site.spelling} -> {site.weight.value.name}",
                "give the checkpoint that the graph was exported from",
            )
        for name, other in vanished:
            if name != own and other.shape == tensor.shape and holds(site, other):
                raise MatchError(
                    f"the exporter merged {name} into this weight, their values being equal: both would change",
                    f"{site.spelling} -> {site.weight.value.name}",
                )


def _holds_rows(site: Site, tensor: Tensor) -> bool:
    """Whether the graph's weight is some rows of ``tensor``: a fused module that the graph has split."""
    stored = row_keys(leading(site.weight.tensor, site.operands[0].layout))
    return len(stored) < tensor.rows and bool(
        np.isin(stored, row_keys(leading(tensor.cast(site.weight.tensor.dtype)))).all()
    )


def holds(site: Site, tensor: Tensor) -> bool:
    """Whether the graph's weight has the values of ``tensor`` (torch's orientation), as far as its dtype tells."""
    operand = site.operands[0]
    stored = leading(site.weight.tensor, operand.layout)
    stored = stored if site.rows is None else stored[site.rows]
    given = leading(tensor.cast(site.weight.tensor.dtype))
    if stored.shape != given.shape:
        return False
    one, other = stored.astype(np.float64), given.astype(np.float64)
    return bool((np.abs(one - other) <= _CLOSE * np.abs(other) + 1e-6).all())
