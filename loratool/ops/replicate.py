"""A model whose layers are stacked anew: PEFT's `layer_replication`, whose adapters count the new layers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratool.adapter import Adapter
from loratool.errors import FormatError, MatchError
from loratool.model import Model, WeightFile

_STACKS = ("model.layers", "layers", "bert.encoder.layer", "encoder.layer", "transformer.h", "h")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_MOST = 4096  # layers of a model that is believed


def replication(adapter: Adapter) -> list[int] | None:
    """The original layer of each new one, None where the adapter leaves the layers alone. Raises FormatError."""
    told = adapter.metadata.config.get("layer_replication")
    if not told:
        return None
    where = adapter.metadata.path
    if not isinstance(told, list) or not all(_is_range(part) for part in told):
        raise FormatError("layer_replication is no list of ranges [start, end)", where)
    if sum(end - start for start, end in told) > _MOST:
        raise FormatError(f"layer_replication makes more than {_MOST} layers", where)
    return [layer for start, end in told for layer in range(start, end)]


def _is_range(part: Any) -> bool:
    pair = isinstance(part, list) and len(part) == 2 and all(type(n) is int for n in part)
    return pair and 0 <= part[0] < part[1]


def shared_layers(adapters: Sequence[Adapter]) -> list[int] | None:
    """The `replication` that all of them have. Raises MatchError where they disagree."""
    maps = [replication(adapter) for adapter in adapters]
    if any(layers != maps[0] for layers in maps[1:]):
        raise MatchError("adapters for different stacks of layers", hint="merge the one with layer_replication first")
    return maps[0] if maps else None


def replicated(model: Model, adapters: Sequence[Adapter]) -> tuple[Model, dict[str, bytes]]:
    """The model that the adapters were trained on, and the documents of its folder that tell its layers.

    The model itself and none where no adapter replicates layers. Raises MatchError where adapters disagree, and where
    the model has not these layers.
    """
    layers = shared_layers(adapters)
    if layers is None:
        return model, {}
    stack = _stack(model, max(layers) + 1)
    weights = tuple(_with_layers(file, stack, layers) for file in model.weights)
    sizes = {file.name: sum(tensor.nbytes for tensor in file.file.tensors.values()) for file in weights}
    indexes = {name: _reindexed(index, stack, layers, sizes) for name, index in model.index_files.items()}
    configs = {prefix: _recounted(config, stack, layers) for prefix, config in model.configs.items()}
    documents = {name: json.dumps(index, indent=2).encode() + b"\n" for name, index in indexes.items()}
    for prefix, config in configs.items():
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        documents[prefix.replace(".", "/") + "config.json"] = text.encode()
    return replace(model, weights=weights, index_files=indexes, configs=configs), documents


def _stack(model: Model, count: int) -> str:
    """The path of the layers in parameter names. Raises MatchError where there are not so many."""
    numbers: dict[str, set[int]] = {}
    for name in model.parameters:
        if found := re.match(rf"({'|'.join(map(re.escape, _STACKS))})\.(\d{{1,5}})\.", name):
            numbers.setdefault(found[1], set()).add(int(found[2]))
    if len(numbers) != 1:
        raise MatchError("layer_replication needs a model with one stack of layers", model.path)
    stack, have = numbers.popitem()
    if not set(range(count)) <= have:
        raise MatchError(f"layer_replication counts {count} layers, {stack} has {len(have)}", model.path)
    return stack


def _copies(key: str, stack: str, layers: Sequence[int]) -> list[str]:
    """The new names of a parameter: one for each place of its layer, itself where it is in none."""
    found = re.match(rf"{re.escape(stack)}\.(\d{{1,5}})\.", key)
    if found is None:
        return [key]
    rest = key[found.end() :]
    return [f"{stack}.{new}.{rest}" for new, old in enumerate(layers) if old == int(found[1])]


def _with_layers(weights: WeightFile, stack: str, layers: Sequence[int]) -> WeightFile:
    tensors = {new: t for key, t in weights.file.tensors.items() for new in _copies(key, stack, layers)}
    return replace(weights, file=replace(weights.file, tensors=tensors))


def _reindexed(index: Mapping[str, Any], stack: str, layers: Sequence[int], sizes: Mapping[str, int]) -> dict[str, Any]:
    """An index of the new names; ``sizes`` are the bytes of the tensors of each file."""
    named = {new: shard for key, shard in index["weight_map"].items() for new in _copies(key, stack, layers)}
    changed = {**index, "weight_map": named}
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        total = sum(sizes.get(shard, 0) for shard in set(index["weight_map"].values()))
        changed["metadata"] = {**index["metadata"], "total_size": total}
    return changed


def _recounted(config: Mapping[str, Any], stack: str, layers: Sequence[int]) -> dict[str, Any]:
    """A configuration with the new number of layers, and its lists of one entry a layer put in the new order."""
    before = next((config[key] for key in _COUNTS if type(config.get(key)) is int), None)
    changed = dict(config)
    for key, value in config.items():
        if key in _COUNTS and value == before:
            changed[key] = len(layers)
        elif isinstance(value, list) and len(value) == before and "layer" in key:
            changed[key] = [value[layer] for layer in layers]
    return changed
