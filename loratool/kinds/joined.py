"""Updates of one kind put together again from their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from loratool.tensors import Tensor
from loratool.update import Update

Kind = TypeVar("Kind", bound=Update)


def joined(
    first: Kind, parts: Sequence[Update], heights: Sequence[int], cut: Sequence[str], columns: Sequence[str] = ()
) -> Kind | None:
    """The update whose rows are ``parts``, of the kind of ``first``; None where they are of none.

    The fields ``cut`` of the parts are put one below the other, ``columns`` side by side; all others must be the same.
    """
    if any(
        type(part) is not type(first) or part.shape[0] not in (0, h) for part, h in zip(parts, heights, strict=True)
    ):
        return None
    changes: dict[str, Any] = {}
    for field in fields(first):  # type: ignore[arg-type]
        values = [getattr(part, field.name) for part in parts]
        if field.name == "weight":
            changes["weight"] = _weight(values, sum(heights))
        elif field.name in (*cut, *columns) and all(isinstance(value, Tensor) for value in values):
            turned = [value.T for value in values] if field.name in columns else values
            if len({value.shape[1:] for value in turned}) > 1:
                return None
            whole = Tensor.joined(turned)
            changes[field.name] = whole.T if field.name in columns else whole
        elif not all(_same(values[0], value) for value in values[1:]):
            return None
    return replace(first, **changes)  # type: ignore[type-var]


def _weight(shapes: Sequence[tuple[int, ...] | None], height: int) -> tuple[int, ...] | None:
    """The shape of the whole weight, where all parts know theirs."""
    rests = {shape and shape[1:] for shape in shapes}
    (rest, *others) = rests
    return (height, *rest) if rest is not None and not others else None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or one.same_bytes(other)
    return bool(one == other)
