"""What a format is: a record of functions, and the evidence they look at."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from loratool.adapter import Adapter, Loss
from loratool.errors import FormatError, UsageError
from loratool.files import check_link, existing, inside, read_json
from loratool.gguf import looks_gguf, read_gguf
from loratool.model import Model
from loratool.npz import looks_npz, read_npz
from loratool.onnx.container import looks_container, open_container
from loratool.pickles import looks_pickled, read_pickle
from loratool.tensors import SafetensorsFile, Tensor, canonical_order, header_bytes, read_safetensors

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors")
_PICKLED = ("adapter_model.bin", "pytorch_lora_weights.bin", "lit_model.pth.lora", "adapter_model.pt")
_SUFFIXES = (".safetensors", ".npz", ".gguf", ".onnx_adapter")


@dataclass(frozen=True)
class Evidence:
    """What lies at a path: an adapter file, or a folder with one and perhaps a configuration.

    Only headers are read. Raises what reading raises: LoratoolError (no such path), FormatError.
    """

    path: Path
    allow_pickle: bool = False
    allow_links: bool = False
    scaling: float | None = None
    modules: tuple[str, ...] = field(default=(), repr=False)
    """Module names of the base, where the caller knows it: what flattened names are looked up in."""
    base: Model | None = field(default=None, repr=False)
    """The base itself, where the caller knows it: its shapes, its numbers of heads."""
    map: Path | None = None
    """The user's own names (`loratool.formats.mapped`), where there are some."""

    @cached_property
    def weights(self) -> Path:
        """The file with the tensors."""
        path = existing(self.path, "adapter")
        if not path.is_dir():
            return path
        for name in (*_WEIGHTS, *_PICKLED):
            if (path / name).exists() or (path / name).is_symlink():
                return existing(inside(path, name, self.allow_links), "adapter")
        found = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and p.is_file())
        found = [p for p in found if p.suffix == _SUFFIXES[0]] or found  # beside others, safetensors
        if len(found) == 1:
            if found[0].is_symlink() and not self.allow_links:
                check_link(found[0], path)
            return found[0]
        names = ", ".join(p.name for p in found[:3]) or "none"
        raise FormatError(f"no adapter in this folder (tensor files: {names})", path, "name the adapter file")

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The JSON configuration beside the tensors; empty where there is none.

        Beside a file with the usual name of an adapter's weights it is that file's: other files have none.
        """
        folder = self.path if self.path.is_dir() else self.path.parent
        usual = (*_WEIGHTS, *_PICKLED)
        another = self.path.name not in usual and any((folder / name).exists() for name in usual)
        if not (folder / CONFIG).exists() or (folder is not self.path and another):
            return {}
        config = read_json(inside(folder, CONFIG, self.allow_links))
        if not isinstance(config, dict):
            raise FormatError("the configuration is not a JSON object", folder / CONFIG)
        return config

    @cached_property
    def file(self) -> SafetensorsFile:
        """The opened tensors."""
        if looks_gguf(self.weights):
            return read_gguf(self.weights)
        if looks_npz(self.weights):
            return read_npz(self.weights)
        if looks_container(self.weights):
            return open_container(self.weights)
        if looks_pickled(self.weights):
            return read_pickle(self.weights, self.allow_pickle)
        return read_safetensors(self.weights)

    def beside(self, name: str) -> Path | None:
        """The file of that name in the folder of the tensors, if it is there."""
        folder = self.weights.parent
        return inside(folder, name, self.allow_links) if (folder / name).is_file() else None

    @property
    def base_config(self) -> Mapping[str, Any]:
        """The configuration of the base, where the caller knows it."""
        return self.base.configs.get("", {}) if self.base else {}

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensor names."""
        return tuple(self.file.tensors)


def _read_only(adapter: Adapter, path: Path) -> None:
    raise UsageError("this format is only read", str(path))


@dataclass(frozen=True)
class Format:
    """One adapter format.

    ``sniff`` looks at headers only and says why it recognises the input (or None). ``losses`` is asked before
    anything is written. ``write`` gets a path that does not exist yet and creates it, a file or a folder;
    formats without it are only read. ``notes`` are what the user must tell the reader of a written file, because
    the file cannot.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    container: Literal["file", "folder"]
    sniff: Callable[[Evidence], str | None]
    read: Callable[[Evidence], Adapter]
    write: Callable[[Adapter, Path], None] = _read_only
    losses: Callable[[Adapter], list[Loss]] = lambda adapter: []
    notes: Callable[[Adapter], list[str]] = lambda adapter: []

    @property
    def writes(self) -> bool:
        """Whether it is written, not only read."""
        return self.write is not _read_only


# ---------------------------------------------------------------- what formats share

IMAGE_FORMATS = (  # whose targets are behind the pipeline component
    *("kohya", "lycoris", "diffusers", "diffusers-old", "attn-procs", "cloneofsimo"),
    *("xlabs", "bfl", "onetrainer", "ai-toolkit", "comfyui"),
)
_HASHES = ("sshs_model_hash", "sshs_legacy_hash")  # of kohya-ss/sd-scripts: made anew
_STALE = ("modelspec.hash_sha256",)
_LEGACY = (0x100000, 0x110000)  # the bytes of the file that the legacy hash looks at


def kept(strings: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of a source for a file of these ``tensors``: hashes are made anew, or dropped."""
    found = {key: value for key, value in strings.items() if key not in _STALE}
    if any(key in found for key in _HASHES):
        anew = dict(zip(_HASHES, _sshs(found, tensors), strict=True))
        found.update({key: value for key, value in anew.items() if key in found})
    return found


def _sshs(strings: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """kohya-ss/sd-scripts' two hashes of a file.

    Of all its data; and of the 64 KiB at 1 MiB of a file with the ``ss_`` part of the metadata only.
    """
    ordered = canonical_order(tensors)
    own = {key: value for key, value in strings.items() if key.startswith("ss_")}
    head = header_bytes(((name, t.dtype, t.shape) for name, t in ordered.items()), own)
    model, legacy = hashlib.sha256(), hashlib.sha256(head[slice(*_LEGACY)])
    position = len(head)
    for tensor in ordered.values():
        data = tensor.array().tobytes()
        model.update(data)
        start, stop = (max(edge - position, 0) for edge in _LEGACY)
        legacy.update(data[start:stop])
        position += len(data)
    return model.hexdigest(), legacy.hexdigest()[:8]
