"""Take a merge back: the base again, bit for bit, from the merged model and a small undo file.

The undo file is a safetensors file. For each changed tensor it holds either a *residual* - how far the base's bits are
from ``round(merged - delta)``, which is zero nearly everywhere - with the factors of the delta; or, where the delta is
no plain product, the base's bits themselves, exclusive-or'd with the merged ones. Both are cut into row blocks, split
into byte planes and deflated. Beside them: the headers of the base's weight files, and the small files that a merge
rewrote or added. The delta is formed by multiplications and additions in float32, one rank after the other, so that
any machine predicts the same bits.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool import __version__, kinds
from loratool.errors import FormatError, LoratoolError
from loratool.files import prepare_output
from loratool.lazy import np
from loratool.model import by_step_name
from loratool.plan import Consumer, OutputFile, Part, Step
from loratool.tensors import CONTENT_HASH, FLOATS, Tensor, block_digest, content_hash, digest, write_safetensors
from loratool.update import Dense, LowRank

if TYPE_CHECKING:
    from loratool.ops.merge import Merge

UNDO = "loratool.undo"  # metadata: the whole description, JSON
UNDO_HASH = "loratool.undo_hash"  # metadata: sha256 of that text
_TILE = 1 << 16  # elements of one step of the prediction: they stay in the second cache
_RANK = 256  # beyond it, a copy of the bits is read faster than predicted
_LEVEL = 1  # of deflate: the planes are nearly empty


# ---------------------------------------------------------------- the record of one tensor


def predictable(step: Step, base: Tensor) -> bool:
    """Whether the base of a tensor can be predicted from the merged one and the factors, bit for bit anywhere."""
    same = (base.dtype, base.shape) == (step.dtype, step.shape) and step.dtype in FLOATS[1:]
    plain = all(is_plain(part) for part in step.parts)
    return bool(step.parts) and same and plain and sum(part.update.rank or 1 for part in step.parts) <= _RANK


def is_plain(part: Part) -> bool:
    """Whether a delta is a product, or a whole, that needs no other operation (a Tucker core does)."""
    update = part.update
    return isinstance(update, Dense) or (isinstance(update, LowRank) and update.mid is None)


def predict(merged: np.ndarray, parts: Sequence[Part], start: int) -> np.ndarray:
    """round(merged - delta) of rows from ``start`` on, [rows, -1], in the dtype of ``merged``."""
    value = merged.astype(np.float32)
    for part in parts:
        low, high = max(part.start, start), min(part.stop, start + len(merged))
        if low < high:
            _subtract(value[low - start : high - start], part, low - part.start, high - part.start)
    with np.errstate(over="ignore"):
        return np.asarray(value.astype(merged.dtype))


def _subtract(value: np.ndarray, part: Part, first: int, last: int) -> None:
    """value [rows,-1] -= rows [first, last) of the delta: a fixed order of float32 operations, without BLAS."""
    prepared = part.update.prepare(_float32, part.strength)
    if prepared.factors is None:
        value -= prepared.delta(first, last, None)
        return
    up, down = prepared.factors[0][first:last], np.ascontiguousarray(prepared.factors[1])  # [rows,r], [r,-1]
    rows = max(1, _TILE // max(1, value.shape[1]))
    for top in range(0, len(value), rows):
        tile = value[top : top + rows]
        product = np.empty_like(tile)
        for column, row in zip(up[top : top + rows].T, down, strict=True):
            np.multiply(column[:, None], row, out=product)
            tile -= product


def _float32(tensor: Tensor) -> np.ndarray:
    return tensor.float().astype(np.float32, copy=False)


def packed(bits: np.ndarray) -> bytes:
    """Unsigned integers -> their byte planes, deflated."""
    return zlib.compress(np.ascontiguousarray(bits.reshape(-1, 1).view(np.uint8).T).tobytes(), _LEVEL)


def unpacked(data: bytes, count: int, width: int) -> np.ndarray:
    """``count`` unsigned integers of ``width`` bytes. Raises FormatError where the data are not these."""
    try:
        stream = zlib.decompressobj()
        planes = stream.decompress(data, count * width)
        whole = len(planes) == count * width and not stream.decompress(stream.unconsumed_tail, 1) and stream.eof
    except zlib.error:
        whole = False
    if not whole:
        raise FormatError("the undo file is damaged")
    return np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(width, count).T).view(f"u{width}").reshape(-1)


def _bits(values: np.ndarray) -> np.ndarray:
    """Stored values as unsigned integers of their width, flat."""
    return np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")


def _zigzag(difference: np.ndarray) -> np.ndarray:
    """Differences of unsigned integers (modulo their width) with small ones small: 0, -1, 1, -2, ... -> 0, 1, 2, 3."""
    signed = difference.view(f"i{difference.dtype.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * signed.dtype.itemsize - 1))).view(difference.dtype)


def _unzigzag(folded: np.ndarray) -> np.ndarray:
    one = folded.dtype.type(1)
    return np.asarray((folded >> one) ^ (~(folded & one) + one))


# ---------------------------------------------------------------- recording, beside the merge


class Recorder:
    """Passes the blocks of a merge on to its writer, and keeps what it takes to get the base's back."""

    def __init__(self, merge: Merge, writer: Consumer, spill: Any) -> None:
        self.merge, self.writer, self.spill = merge, writer, spill
        self.base = by_step_name(merge.model)
        self.blocks: dict[str, dict[int, tuple[int, int]]] = {}
        self.digests: dict[str, dict[int, bytes]] = {}
        self._lock = threading.Lock()
        self._end = 0

    def block(self, output: OutputFile, step: Step, start: int, data: np.ndarray) -> None:
        """Record and write rows from ``start`` on."""
        base = self.base.get(step.name)
        if base is not None and is_restored(step, base) and base.shape == step.shape:
            was = base.load(start, start + len(data)).reshape(len(data), -1)
            self.digests.setdefault(step.name, {})[start] = block_digest(was)
            self._keep(step.name, start, packed(_record(step, base, start, was, data)))
        elif base is not None and not is_restored(step, base):
            self.digests.setdefault(step.name, {})[start] = block_digest(data)
        self.writer.block(output, step, start, data)

    def _keep(self, name: str, start: int, data: bytes) -> None:
        with self._lock:
            self.spill.seek(self._end)
            self.spill.write(data)
            self.blocks.setdefault(name, {})[start] = (self._end, len(data))
            self._end += len(data)

    def write(self, path: Path, merged_hash: str) -> None:
        """Write the undo file."""
        tensors: dict[str, Tensor] = {}
        words = {
            "version": 1,
            "folder": self.merge.model.is_folder,
            "merged": merged_hash,
            "files": [self._file(n, output, tensors) for n, output in enumerate(self.merge.plan.outputs)],
            **self._small(tensors),
        }
        words["base"] = self._base_hash()
        text = json.dumps(words, sort_keys=True, separators=(",", ":"))
        metadata = {UNDO: text, UNDO_HASH: text_hash(text), CONTENT_HASH: "", "loratool.version": __version__}
        write_safetensors(path, tensors, metadata)

    def _file(self, number: int, output: OutputFile, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """One weight file: its header, and how each of its tensors comes back."""
        file = self.merge.model.weights[number].file
        with file.path.open("rb") as source:
            tensors[f"header.{number}"] = _blob(source.read(file.data_start))
        steps = {step.key: step for step in output.steps}
        entries = []
        for key in file.tensors:
            step = steps[key]
            entry: dict[str, Any] = {"key": key}
            base = self.base[step.name]
            if is_restored(step, base):
                entry |= self._tensor(f"{number}.{key}", step, base, tensors)
            entries.append(entry)
        return {"name": self.merge.model.weights[number].name, "tensors": entries}

    def _tensor(self, name: str, step: Step, base: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """One tensor's record: its blocks end to end and their lengths, and the factors of its prediction."""
        if base.shape != step.shape:  # replaced by one of another size: its bytes, as they are
            tensors[f"whole.{name}"] = base
            self.digests[step.name] = {0: digest(base)}
            return {"whole": f"whole.{name}"}
        spans = [span for _, span in sorted(self.blocks.get(step.name, {}).items())]
        tensors[f"blocks.{name}"] = _spilled(self.spill, spans)
        tensors[f"lengths.{name}"] = Tensor.of(np.array([length for _, length in spans], np.int64))
        entry: dict[str, Any] = {"blocks": f"blocks.{name}", "lengths": f"lengths.{name}"}
        entry |= {"dtype": base.dtype, "shape": list(base.shape)}
        if predictable(step, base):
            entry["parts"] = []
            for index, part in enumerate(step.parts):
                words, own = kinds.spelled(part.update, f"part.{name}.{index}")
                tensors.update(own)
                place = {"strength": part.strength, "start": part.start, "stop": part.stop}
                entry["parts"].append({**place, "update": words})
        return entry

    def _small(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Files of the folder that the merge rewrote (their bytes), kept (their digests) or added (left out)."""
        if not self.merge.model.is_folder:
            return {"rewritten": {}, "kept": {}}
        plan, rewritten, kept = self.merge.plan, {}, {}
        for name in self.merge.model.others:
            own = self.merge.model.path / name
            if name in plan.documents or plan.copies[name] != own:
                rewritten[name] = f"file.{name}"
                tensors[f"file.{name}"] = _blob(own.read_bytes())
            else:
                kept[name] = file_digest(own)
        return {"rewritten": rewritten, "kept": kept}

    def _base_hash(self) -> str:
        entries = (
            (name, t.dtype, t.shape, b"".join(d for _, d in sorted(self.digests.get(name, {}).items())))
            for name, t in self.base.items()
        )
        return content_hash(entries)


def is_restored(step: Step, base: Tensor) -> bool:
    """Whether a tensor of the output is other than the base's, so that a record is needed."""
    return step.computes or step.base is not base


def _record(step: Step, base: Tensor, start: int, was: np.ndarray, now: np.ndarray) -> np.ndarray:
    """What turns the merged rows into the base's: a residual, an exclusive or, or the bits themselves."""
    if predictable(step, base):
        return _zigzag(_bits(was) - _bits(predict(now, step.parts, start)))
    return _bits(was) ^ _bits(now) if was.dtype == now.dtype else _bits(was)


def restore(data: bytes, now: np.ndarray, dtype: Any, parts: Sequence[Part] | None, start: int) -> np.ndarray:
    """The inverse of `_record`: the base's rows [rows, -1]."""
    record = unpacked(data, now.size, dtype.itemsize)
    if parts is not None:
        record = _bits(predict(now, parts, start)) + _unzigzag(record)
    elif now.dtype == dtype:
        record = record ^ _bits(now)
    return np.asarray(record.view(dtype).reshape(now.shape))


def text_hash(text: str) -> str:
    """The sha256 of a description."""
    return hashlib.sha256(text.encode()).hexdigest()


def _blob(data: bytes) -> Tensor:
    """The bytes of a small file or a header, deflated."""
    return Tensor.of(np.frombuffer(zlib.compress(data, 9), np.uint8))


def unblob(tensor: Tensor, limit: int = 1 << 28) -> bytes:
    """The bytes of a small file or a header. Raises FormatError where they are damaged, or more than ``limit``."""
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(tensor.array().tobytes(), limit)
    except zlib.error:
        raise FormatError("the undo file is damaged") from None
    if not stream.eof:
        raise FormatError("the undo file is damaged")
    return data


def _spilled(spill: Any, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Pieces of the spill file end to end, as one tensor of bytes."""
    total = sum(length for _, length in spans)

    def load(start: int, stop: int) -> np.ndarray:
        found, position = [], 0
        for offset, length in spans:
            low, high = max(start, position), min(stop, position + length)
            if low < high:
                spill.seek(offset + low - position)
                found.append(spill.read(high - low))
            position += length
        return np.frombuffer(b"".join(found), np.uint8)

    return Tensor("U8", (total,), load)


def file_digest(path: Path) -> str:
    """The xxh3-128 digest of a file."""
    import xxhash

    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


@contextmanager
def recording(merge: Merge, writer: Consumer, undo: Path | None) -> Iterator[Recorder | None]:
    """A recorder in the writer's place, None without ``undo``; it keeps its blocks in a file without a name beside."""
    if undo is None:
        yield None
        return
    with tempfile.TemporaryFile(dir=undo.parent) as spill:  # in memory it would not be bounded
        yield Recorder(merge, writer, spill)


def check_undo(merge: Merge, undo: str | Path, out: str | Path, overwrite: bool) -> Path:
    """Check where the undo file goes. Raises LoratoolError."""
    if merge.model.pickled:
        hint = "keep the base, or merge into one of safetensors"
        raise LoratoolError("a base of pickles cannot be restored bit for bit", merge.model.path, hint)
    if any(adapter.metadata.config.get("layer_replication") for adapter in merge.adapters):
        raise LoratoolError("a merge that replicates layers cannot be undone", merge.model.path, "keep the base")
    path = prepare_output(undo, overwrite, {"the base": merge.model.path})
    target = Path(out).resolve()
    if path.resolve() == target or target in path.resolve().parents:
        raise LoratoolError("the undo file would lie in the output", path, "choose another path for it")
    if path.is_dir():
        raise LoratoolError("the undo file would replace a folder", path, "choose another path for it")
    return path
