"""The kinds of update beyond LoRA, one dataclass each; and how any update is taken apart and put together again.

A kind's fields are its tensors (or tuples of them, or None), updates inside it, and plain scalars: so a format that
carries every kind need not know any. Adding one: a dataclass, an entry in `KINDS`, a sample in the tests.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from loratool.errors import FormatError
from loratool.tensors import Tensor
from loratool.update import Update

# classes by the file that holds them, which is imported when one of them is needed
_HOMES: Mapping[str, tuple[str, ...]] = {
    "loratool.update": ("LowRank", "Dense", "Replace", "Sum", "DoRA", "Rows", "AdditiveRows", "Stacked"),
    "loratool.kinds.entries": ("Entry", "AdditiveEntry"),
    "loratool.kinds.experts": ("Experts",),
    "loratool.kinds.tokens": ("Tokens",),
    "loratool.kinds.truncated": ("Truncated",),
    "loratool.kinds.hadamard": ("LoHa",),
    "loratool.kinds.kronecker": ("LoKr",),
    "loratool.kinds.glora": ("GLoRA",),
    "loratool.kinds.rescale": ("IA3",),
    "loratool.kinds.rotation": ("OFT", "SegmentOFT", "BOFT", "PeftOFT", "PeftOldOFT", "PeftBOFT"),
    "loratool.kinds.sparse": ("Sparse",),
    "loratool.kinds.patch": ("Padded",),
    "loratool.kinds.factored": (
        "AdaLora",
        "Vera",
        "Pvera",
        "Delora",
        "Mixtures",
        "ChosenMixtures",
        "RandLora",
        "Gralora",
        "Miss",
        "Bone",
        "Unilora",
        "Tinylora",
    ),
    "loratool.kinds.composed": ("Fourier", "Wavelet", "Shira", "Supertuning", "Circulant"),
    "loratool.kinds.based": (
        "LnTuning",
        "BiasShift",
        "Householder",
        "Hira",
        "BlockAffine",
        "BoneAffine",
        "Road",
        "Glora",
        "Injection",
        "Subspace",
        "Frod",
        "Network",
    ),
}
KINDS: Mapping[str, str] = {name: home for home, names in _HOMES.items() for name in names}
_DEPTH = 8  # updates inside updates: rows of a sum of DoRAs is three


def kind(name: str) -> type[Update] | None:
    """The class of that name; None for one that is not known."""
    home = KINDS.get(name)
    found: type[Update] | None = None if home is None else getattr(importlib.import_module(home), name)
    return found


def stored(update: Update) -> dict[str, Any]:
    """An update as a JSON object whose leaves are scalars, and `Tensor`s.

    ``{"type": name of the class, field: value, ...}``; fields that have their default are left out.
    """
    found: dict[str, Any] = {"type": type(update).__name__}
    for field in fields(update):  # type: ignore[arg-type]
        value = getattr(update, field.name)
        if value != field.default:
            found[field.name] = _apart(value)
    return found


def _apart(value: Any) -> Any:
    """A field as JSON with tensors for leaves."""
    if isinstance(value, Update):
        return stored(value)
    return [_apart(item) for item in value] if isinstance(value, tuple) else value


def built(words: Mapping[str, Any]) -> Update:
    """The update that `stored` took apart. Raises FormatError for an unknown type or fields that do not fit it."""
    found = kind(str(words.get("type")))
    if found is None:
        raise FormatError(f"an update of unknown type {words.get('type')!r}", hint="written by a newer loratool?")
    known = {field.name for field in fields(found)}  # type: ignore[arg-type]
    given = {name: _together(value) for name, value in words.items() if name != "type"}
    if strangers := given.keys() - known:
        raise FormatError(f"{found.__name__} has no field {sorted(strangers)[0]!r}")
    hints = get_type_hints(found)
    for name, value in given.items():
        if not _is(hints[name], value):
            raise FormatError(f"{found.__name__} has a field {name} that cannot be {str(value)[:40]!r}")
    try:
        return found(**given)
    except TypeError as error:  # a field that is missing
        raise FormatError(f"the fields of {found.__name__} do not fit: {error}") from None


def _is(hint: Any, value: Any) -> bool:
    """Whether a value is of a field's type: classes, None, literals, unions and tuples are what fields have."""
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return value in inner
    if get_origin(hint) is tuple:
        rest = inner[:1] * len(value) if inner[-1] is ... and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(rest) == len(value) and all(map(_is, rest, value))
    if inner:
        return any(_is(one, value) for one in inner)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint or (isinstance(hint, type) and issubclass(hint, Update) and isinstance(value, hint))


def _together(value: Any) -> Any:
    """The inverse of `_apart`."""
    if isinstance(value, Mapping):
        return built(value)
    return tuple(_together(item) for item in value) if isinstance(value, list) else value


def spelled(
    update: Update, prefix: str, named: dict[int, str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An update as pure JSON, each tensor as ``{"tensor": name}``, and the tensors by name: ``<prefix>.<field>``.

    ``named`` holds the names of tensors (by id) that were spelled before: one that several updates share is named once.
    """
    words = stored(update)
    found = _leaves(words)
    names = {} if named is None else named
    for path, tensor in found.items():
        names.setdefault(id(tensor), f"{prefix}.{path}")
    return _named(words, names), {names[id(tensor)]: tensor for tensor in found.values()}


def unspelled(words: Any, tensors: Mapping[str, Tensor], used: set[str]) -> Update:
    """The update that `spelled` wrote; the names of its tensors are added to ``used``.

    Raises FormatError for anything that is none.
    """
    found = _resolved(words, tensors, used, 0)
    if not isinstance(found, dict):
        raise FormatError("words of an update that are no table")
    return built(found)


def _leaves(words: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of what `stored` gave, by their path: ``direction.down``, ``parts.0.up``."""
    if isinstance(words, Tensor):
        return {path: words}
    pairs = words.items() if isinstance(words, Mapping) else enumerate(words) if isinstance(words, list) else ()
    return {k: t for key, value in pairs for k, t in _leaves(value, f"{path}.{key}" if path else str(key)).items()}


def _named(words: Any, names: Mapping[int, str]) -> Any:
    """Words with names in the place of tensors."""
    if isinstance(words, Tensor):
        return {"tensor": names[id(words)]}
    if isinstance(words, dict):
        return {key: _named(value, names) for key, value in words.items()}
    return [_named(value, names) for value in words] if isinstance(words, list) else words


def _resolved(words: Any, tensors: Mapping[str, Tensor], used: set[str], depth: int) -> Any:
    """Words with tensors in the place of their names."""
    if depth > _DEPTH:
        raise FormatError("updates inside updates too deep to follow")
    if isinstance(words, dict) and words.keys() == {"tensor"}:
        name = words["tensor"]
        if not isinstance(name, str) or name not in tensors:
            raise FormatError(f"an update names a tensor {str(name)[:80]!r} that is not there")
        used.add(name)
        return tensors[name]
    if isinstance(words, dict):
        return {key: _resolved(value, tensors, used, depth + 1) for key, value in words.items()}
    return [_resolved(value, tensors, used, depth + 1) for value in words] if isinstance(words, list) else words
