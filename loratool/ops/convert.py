"""What a conversion does between reading and writing: names from a base, dtype, provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.adapter import Adapter
from loratool.errors import FormatError, MatchError, NumericError, some
from loratool.files import CHUNK
from loratool.hashes import sha256
from loratool.lazy import np
from loratool.model import Model
from loratool.names import match, module_of
from loratool.ops.changes import extreme
from loratool.ops.compare import norm
from loratool.ops.spectral import Result, summarise
from loratool.tensors import CONTENT_HASH, FLOATS, Tensor
from loratool.update import Additive, Sum, Update


def fit(adapter: Adapter, model: Model, allow_unmatched: bool = False) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter under the base's own names and orientations, and what has no place in it.

    Raises MatchError when something has none, unless ``allow_unmatched`` (it then keeps its name).
    """
    matches, unmatched = match(adapter, model)
    if unmatched and not allow_unmatched:
        raise MatchError(
            f"{len(unmatched)} of {len(adapter.updates)} modules have no target in the base",
            some(unmatched),
            "is this the base it was trained on? --allow-unmatched converts all the same",
            list(map(str, unmatched)),
        )
    updates = dict(adapter.updates)
    spellings = dict(adapter.spellings)
    for found in matches:
        if found.how == "layout" and not (found.place.whole and found.update is updates.get(found.target)):
            continue  # its base has it in parts: it keeps its own name
        del updates[found.target]
        # a renamed place goes by the base's name; rows of a fused weight keep the module's own
        named = found.how != "exact" and found.place.whole and not found.place.transposed
        name = module_of(found.place.tensor) if named else found.target
        updates[name] = found.update
        spellings[name] = adapter.spelling(found.target)
    return replace(adapter, updates=updates, spellings=spellings), tuple(str(u) for u in unmatched)


def cast(adapter: Adapter, dtype: str | None) -> Adapter:
    """The adapter with every floating tensor stored as ``dtype`` (a safetensors name; None keeps each).

    Raises NumericError where a value overflows, or where a whole factor would vanish.
    """
    if dtype is None:
        return adapter

    def stored(name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype not in FLOATS or tensor.dtype == dtype:
            return tensor
        to = tensor.cast(dtype)
        before, after = extreme(tensor), extreme(to)
        if np.isfinite(before) and (not np.isfinite(after) or (before > 0 and after == 0)):
            what = "overflows" if after else "vanishes"
            raise NumericError(f"a value of {before:g} {what} in {dtype}", name, "choose a wider --dtype")
        return to

    made: dict[int, Tensor] = {}  # what modules share they share afterwards

    def once(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = stored(name, tensor)
        return made[id(tensor)]

    updates = {name: _each(update, lambda t, n=name: once(n, t)) for name, update in adapter.updates.items()}
    carried = {name: stored(name, tensor) for name, tensor in adapter.carried.items()}
    return replace(adapter, updates=updates, carried=carried)


def recast(result: Result, dtype: str | None) -> Result:
    """A computed adapter stored as ``dtype``, with what rounding adds to its error (at right angles to what was cut).

    Raises what `cast` raises.
    """
    if dtype is None:
        return result
    adapter = cast(result.adapter, dtype)
    squares: dict[str, tuple[float, float]] = {}
    for module in result.modules:
        before, after = result.adapter.updates.get(module.module), adapter.updates.get(module.module)
        if not isinstance(before, Additive) or not isinstance(after, Additive):
            squares[module.module] = (0.0, 0.0)
            continue
        whole = norm(before) ** 2 / max(1 - module.relative_error**2, 1e-30)
        lost = module.relative_error**2 * whole + norm(Sum((before, after.scaled(-1.0)))) ** 2
        squares[module.module] = (lost, whole)
    return summarise(adapter, squares, result.warnings)


def _each(update: Update, change) -> Update:  # type: ignore[no-untyped-def]
    """An update with ``change`` applied to each of its tensors."""
    changed = {}
    for field in fields(update):  # type: ignore[arg-type]
        value = getattr(update, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif isinstance(value, Update):
            changed[field.name] = _each(value, change)
        elif isinstance(value, tuple) and value and isinstance(value[0], Update):
            changed[field.name] = tuple(_each(part, change) for part in value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            changed[field.name] = tuple(map(change, value))
    return replace(update, **changed)  # type: ignore[type-var]


def describe(adapter: Adapter) -> dict[str, Any]:
    """Every tensor that a conversion takes along, and a bound of the memory it takes."""
    named = [
        (adapter.spelling(name), slot, tensor)
        for name, update in adapter.updates.items()
        for slot, tensor in update.slots.items()
    ]
    named += [(adapter.spelling(name), "carried", tensor) for name, tensor in adapter.carried.items()]
    nbytes = sum(tensor.nbytes for _, _, tensor in named)
    return {
        "bytes_to_read": sum(path.stat().st_size for path in adapter.metadata.weights),
        "bytes_to_write": nbytes,
        "disk_needed": nbytes,
        "peak_memory": CHUNK + 4 * 4 * max((tensor.size for _, _, tensor in named), default=0),
        "tensors": [
            {"name": name, "action": slot, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes}
            for name, slot, t in named
        ],
    }


def input_hashes(inputs: Mapping[str, Path]) -> dict[str, str]:
    """The sha256 of every input file."""
    return {name: sha256(path) for name, path in sorted(inputs.items())}


def with_provenance(adapter: Adapter, operation: str, inputs: Mapping[str, str], **more: object) -> Adapter:
    """The adapter with this operation, the version and the sha256 of every input in its metadata."""
    strings = {k: v for k, v in adapter.metadata.strings.items() if not k.startswith("loratool.")}
    strings |= {
        "loratool.version": __version__,
        "loratool.operation": operation,
        "loratool.inputs": json.dumps(dict(inputs)),
        CONTENT_HASH: "",
    }
    strings |= {f"loratool.{key}": json.dumps(value) for key, value in more.items()}
    return adapter.with_metadata(strings=strings)


def require_scaling(adapter: Adapter) -> None:
    """Raise FormatError where the file does not tell its scaling: a conversion would lose or invent it."""
    if not adapter.metadata.scaling_known:
        raise FormatError("the file does not tell its scaling", adapter.metadata.path, "give --scaling (alpha / rank)")
