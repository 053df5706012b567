"""A model on disk: one checkpoint file or a folder, described from its headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from loratool.architectures import Slot, identify_checkpoint
from loratool.errors import FormatError
from loratool.files import existing, inside, read_json, walk
from loratool.pickles import looks_pickled, read_pickle
from loratool.tensors import SafetensorsFile, Tensor, read_safetensors

_ADAPTER_FILES = frozenset(("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors"))
_INDEX = ".safetensors.index"
_PICKLED = re.compile(r"(diffusion_)?pytorch_model(-\d+-of-\d+)?(\.[a-z0-9]+)?\.bin$")
_UNREAD = (".bin", ".ckpt", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file of a model: its path relative to the model, and the component it belongs to."""

    name: str
    prefix: str
    file: SafetensorsFile


@dataclass(frozen=True)
class Location:
    """Where a parameter lies: its file and the handle of its values."""

    weights: WeightFile
    key: str
    tensor: Tensor


@dataclass(frozen=True)
class Model:
    """A base model.

    ``parameters`` maps full names (in a pipeline behind their component: ``unet.``) to every place they lie in: a
    folder may hold the same weights in several precisions. ``others`` are the remaining files, ``configs`` the
    config.json of each component by prefix.
    """

    path: Path
    weights: tuple[WeightFile, ...]
    others: tuple[str, ...] = ()
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    index_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        """Whether the model is a folder."""
        return bool(self.others) or self.path.is_dir()

    @property
    def pickled(self) -> bool:
        """Whether weights were read from pickles: what is made of the model is written as safetensors."""
        return any(weights.file.data_start == 0 for weights in self.weights)

    @cached_property
    def parameters(self) -> Mapping[str, tuple[Location, ...]]:
        """Every tensor by full name."""
        found: dict[str, tuple[Location, ...]] = {}
        for weights in self.weights:
            for key, tensor in weights.file.tensors.items():
                name = weights.prefix + key
                found[name] = (*found.get(name, ()), Location(weights, key, tensor))
        return found

    @cached_property
    def places(self) -> Mapping[str, Slot]:
        """Every name by which a parameter may be called -> the tensor (or rows of it) that it is."""
        places = {name: Slot(name) for name in self.parameters}
        if self.architecture:
            slots = self.architecture.checkpoint({name: at[0].tensor.shape for name, at in self.parameters.items()})
            places.update({n: s for n, s in slots.items() if s.tensor in self.parameters and n not in places})
        return places

    @cached_property
    def architecture(self) -> Any:
        """The known architecture of a single-file checkpoint with names of its own, else None."""
        if self.is_folder:
            return None
        return identify_checkpoint({name: at[0].tensor.shape for name, at in self.parameters.items()})

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Names of everything that has a weight, in every spelling."""
        return tuple(name.removesuffix(".weight") for name in self.places if name.endswith(".weight"))

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape of a tensor."""
        return self.parameters[name][0].tensor.shape

    def rows_of(self, slot: Slot) -> Tensor:
        """The rows of a stored tensor that a slot means, as they are stored. Raises MatchError."""
        return pick(self.parameters[slot.tensor][0].tensor, slot)

    def config_of(self, name: str) -> Mapping[str, Any]:
        """The configuration of the component that a tensor belongs to."""
        return self.configs.get(self.parameters[name][0].weights.prefix, {})


def pick(tensor: Tensor, slot: Slot) -> Tensor:
    """The rows of ``tensor`` that a slot means, as they are stored. Raises MatchError where it has no such rows."""
    if slot.whole:
        return tensor
    pieces = [tensor.slice(start, stop) for start, stop in slot.ranges(tensor.rows)]
    return pieces[0] if len(pieces) == 1 else Tensor.joined(pieces)


def read_model(path: str | Path, allow_links: bool = False, allow_pickle: bool = False, complete: bool = True) -> Model:
    """Describe the model at ``path`` from its headers.

    Where there are only pickles (.bin, .ckpt), ``allow_pickle`` reads their tensors; what is made of the model is
    written as safetensors, so they go by the names that those files will have. Unless it has to be ``complete``, an
    index may name shards and tensors that are not there. Raises LoratoolError (no such path) and FormatError (nothing
    to read, a damaged or hostile file, an index that disagrees with its shards).
    """
    found = existing(path, "model")
    if not found.is_dir():
        file = read_pickle(found, allow_pickle) if looks_pickled(found) else read_safetensors(found)
        return Model(found, (WeightFile(found.name, "", file),))
    if (found / "adapter_config.json").exists() and not (found / "config.json").exists():
        raise FormatError("this is an adapter, not a model", found)
    files = [name.as_posix() for name in walk(found, allow_links)]
    pipeline = "model_index.json" in files
    held = [name for name in files if _is_weights(name, pipeline, ".safetensors")]
    pickled = [name for name in files if _is_weights(name, pipeline, ".bin") and _without_twin(name, held)]
    if not held and pickled and not allow_pickle:
        read_pickle(found / pickled[0], allow_pickle)  # says why not
    read = pickled if allow_pickle else []
    weights = _opened(found, held, read, allow_links, allow_pickle)
    if not weights:
        unread = ", ".join(name for name in files if name.endswith(_UNREAD)) or "none"
        raise FormatError(
            f"no safetensors weights in this model (other weights: {unread})", found, "convert them to safetensors"
        )
    moved = [name for name in files if read and name.endswith(".bin.index.json")]
    others = tuple(name for name in files if name not in {*held, *read, *moved})
    model = Model(found, weights, others, _configs(found, files, pipeline), _index_files(found, files, moved))
    for name, index in model.index_files.items():
        _check_index(model, name, index, complete)
    return model


def _opened(
    folder: Path, held: Iterable[str], pickled: Iterable[str], allow_links: bool, allow_pickle: bool
) -> tuple[WeightFile, ...]:
    """The weight files of a folder; what is pickled goes by the name of the file that it becomes."""
    found = []
    for name in held:
        found.append(WeightFile(name, _prefix(name), read_safetensors(inside(folder, name, allow_links))))
    for name in pickled:
        file = read_pickle(inside(folder, name, allow_links), allow_pickle)
        found.append(WeightFile(_as_safetensors(name), _prefix(name), file))
    return tuple(found)


def _configs(folder: Path, files: Iterable[str], pipeline: bool) -> dict[str, Mapping[str, Any]]:
    """The config.json of each component, by prefix."""
    named = [name for name in files if name.rpartition("/")[2] == "config.json" and (pipeline or "/" not in name)]
    return {_prefix(name): _table(folder / name) for name in named}


def _index_files(folder: Path, files: Iterable[str], moved: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """The indexes of shards, those of pickled shards (``moved``) as of the files which they become."""
    found = {name: _table(folder / name) for name in files if _INDEX in name and name.endswith(".json")}
    return found | {_as_safetensors(name): _renamed(_table(folder / name)) for name in moved}


def _prefix(name: str) -> str:
    """The component of a file, as it stands before parameter names."""
    folder = name.rpartition("/")[0]
    return folder.replace("/", ".") + "." if folder else ""


def _is_weights(name: str, pipeline: bool, ending: str) -> bool:
    """Whether a file of the folder holds the model's weights (in a pipeline: one folder down)."""
    own = name.rpartition("/")[2]
    if not own.endswith(ending) or own in _ADAPTER_FILES:
        return False
    named = ending == ".safetensors" or _PICKLED.match(own) is not None
    return named and name.count("/") <= (1 if pipeline else 0)


def _without_twin(name: str, held: Iterable[str]) -> bool:
    """Whether a pickle's component has no safetensors weights: else it is another form of the same."""
    return _prefix(name) not in {_prefix(other) for other in held}


def _as_safetensors(name: str) -> str:
    """The name of what a pickled weight file, or its index, becomes."""
    folder, slash, own = name.rpartition("/")
    named = own if own.startswith("diffusion_") else own.replace("pytorch_model", "model", 1)
    return f"{folder}{slash}{named.replace('.bin', '.safetensors', 1)}"


def _renamed(index: Mapping[str, Any]) -> Mapping[str, Any]:
    """The index of pickled shards as that of the safetensors files which they become."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        return index
    return {**index, "weight_map": {key: _as_safetensors(str(shard)) for key, shard in weight_map.items()}}


def _table(path: Path) -> Mapping[str, Any]:
    table = read_json(path)
    if not isinstance(table, dict):
        raise FormatError("not a JSON object", path)
    return table


def _check_index(model: Model, name: str, index: Mapping[str, Any], complete: bool) -> None:
    """An index must name shards of its own folder and, of a complete model, such as exist, and tensors in them."""
    where = model.path / name
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError("the index has no weight_map", where)
    folder = name.rpartition("/")[0]
    shards = {w.name: w.file for w in model.weights}
    for shard in set(weight_map.values()):
        inside(where.parent, shard)
    for key, shard in weight_map.items() if complete else ():
        file = shards.get(f"{folder}/{shard}" if folder else shard)
        if file is None:
            raise FormatError(f"the shard {shard!r} is missing", where, "fetch or copy the model again")
        if key not in file.tensors:
            raise FormatError(f"the index places {key} in {shard}, which lacks it", where)


def by_step_name(model: Model) -> dict[str, Tensor]:
    """A model's tensors under the names that the steps of a plan have: with the file where several hold the name."""
    named = {}
    for name, places in model.parameters.items():
        for at in places:
            named[name if len(places) == 1 else f"{name} ({at.weights.name})"] = at.tensor
    return named


def other_files(model: Model) -> dict[str, Path]:
    """The files of a model folder that are not weights, by relative name."""
    return {name: model.path / name for name in model.others}


def stale_copies(model: Model) -> list[str]:
    """Files that a merge copies although they hold the same weights in another form."""
    return [n for n in (*model.others, *(w.name for w in model.weights)) if _is_copy(n)]


def _is_copy(name: str) -> bool:
    return name.endswith(_UNREAD) or name.rpartition("/")[2].startswith("consolidated")
