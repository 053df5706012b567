"""The one intermediate representation: module name -> Update, and what travels along."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratool.errors import UsageError
from loratool.tensors import Tensor
from loratool.update import Update


@dataclass(frozen=True)
class Metadata:
    """Where an adapter comes from and what its file said beside the tensors.

    ``strings`` is the metadata of the safetensors file, ``config`` a JSON configuration beside it (PEFT),
    ``base_config`` the config.json of the base where that is known, ``extras`` other files of its folder that a merged
    model should carry (tokenizer), ``warnings`` what is odd.
    ``scaling_known`` is False where the file does not tell the scaling.
    """

    format: str
    path: Path | None = None
    weights: tuple[Path, ...] = ()
    strings: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    base_config: Mapping[str, Any] = field(default_factory=dict)
    extras: tuple[Path, ...] = ()
    architecture: str | None = None
    base_model: str | None = None
    warnings: tuple[str, ...] = ()
    scaling_known: bool = True


@dataclass(frozen=True)
class Adapter:
    """Updates by target, whole tensors that travel along, and metadata.

    A target is a module path (its ``.weight`` is meant) or, for another parameter, the full parameter name
    (``....bias``). Diffusion modules carry their pipeline component (``unet.``, ``text_encoder.``).
    ``carried`` are whole tensors by parameter name: modules_to_save, biases, norms, embeddings; a carried weight
    whose module also has an update is the base that the update was trained on. ``spellings`` gives, for a target
    or a carried name, its name in the source file.
    """

    updates: Mapping[str, Update]
    carried: Mapping[str, Tensor]
    metadata: Metadata
    spellings: Mapping[str, str] = field(default_factory=dict)

    def spelling(self, name: str) -> str:
        """The source file's own name of a target or a carried tensor."""
        return self.spellings.get(name, name)

    def modules(self) -> dict[str, Update]:
        """The updates of weights: without those of biases."""
        return {name: update for name, update in self.updates.items() if not is_bias(name)}

    def with_metadata(self, **changes: Any) -> Adapter:
        """The same adapter with some metadata replaced."""
        return replace(self, metadata=replace(self.metadata, **changes))


@dataclass(frozen=True)
class Loss:
    """One thing that a target format cannot say: what, and whose (in the source's spelling)."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def is_bias(name: str) -> bool:
    """Whether a target or carried name is a bias parameter."""
    return name.endswith(".bias")


def parameter(target: str) -> str:
    """The parameter that a target means: modules stand for their weight."""
    return target if is_bias(target) else f"{target}.weight"


def strengths_of(adapters: Sequence[object], given: Sequence[float] | None) -> tuple[float, ...]:
    """One strength for each adapter, 1 where none are given.

    Raises UsageError for no adapter at all, and for strengths that are not one finite number each.
    """
    if not adapters:
        raise UsageError("no adapter given")
    if given and len(given) != len(adapters):
        what = f"{len(given)} strengths for {len(adapters)} adapters"
        raise UsageError(what, hint="give -s once for each adapter, or never")
    if not all(map(math.isfinite, given or ())):
        raise UsageError("a strength is not a finite number", hint="give numbers such as 0.8 or -1")
    return tuple(given) if given else (1.0,) * len(adapters)
