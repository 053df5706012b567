"""PyTorch pickles, read only on the user's word and then as tensors only."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.errors import FormatError
from loratool.tensors import DTYPES, SafetensorsFile, Tensor, numpy_dtype

_CALLED = re.compile(r"GLOBAL:? ([\w.]{1,100})")  # what torch's reader of tensors says of a function in a file
_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def looks_pickled(path: Path) -> bool:
    """Whether the first bytes are those of a pickle or of the zip archive PyTorch wraps it in."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head.startswith(_STARTS) and head[8:] != b"{"  # which a safetensors file may have for a length


def _is_zip(path: Path) -> bool:
    """Whether the tensors lie in an archive, from which they can be mapped instead of read."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_pickle(path: Path, allowed: bool) -> SafetensorsFile:
    """The tensors of a state dict, or of a list, saved with ``torch.save``; no code of the file is run.

    Raises FormatError unless ``allowed``, and where anything but tensors is in it.
    """
    if not allowed:
        raise FormatError(
            "a Python pickle, which can run code when opened",
            path,
            "--allow-pickle reads it, its tensors only; better convert it to safetensors",
        )
    state, notes = _table(_loaded(path), path)
    tensors = {str(name): _tensor(value, f"{path}: {name}") for name, value in state.items()}
    return SafetensorsFile(path, tensors, notes, 0)


def _loaded(path: Path) -> Any:
    """What a pickle holds, where that is nothing but tensors and tables of them."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # whatever a damaged pickle makes the unpickler stumble over
        called = _CALLED.search(str(error))
        if called:  # torch's own advice is to run it
            raise FormatError(f"a pickle that is more than tensors: it would call {called[1]}", path) from None
        said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        first = said.splitlines()[0] if said else type(error).__name__
        raise FormatError(f"not a readable pickle of tensors: {first[:200]}", path) from None


def _table(state: Any, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors by name, whichever trainer saved them, and the notes beside them."""
    import torch

    if isinstance(state, dict) and "string_to_param" in state:
        raise FormatError("a textual inversion, not an adapter", path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # a checkpoint of lightning
        state = state["state_dict"]
    if isinstance(state, list):  # the factors of cloneofsimo/lora, by position
        state = {str(position): value for position, value in enumerate(state)}
    notes: dict[str, str] = {}
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # a checkpoint of Lightning Fabric (LitGPT)
        notes = _notes(state, path)
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise FormatError("the pickle holds more than a table of tensors", path)
    return state, notes


def _tensor(value: Any, where: str) -> Tensor:
    """A handle over the memory of one of torch's tensors."""
    import torch

    spelling = {d.torch: d.name for d in DTYPES.values()}
    dtype = spelling.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or value.layout is not torch.strided:
        raise FormatError(f"a tensor of dtype {value.dtype}, layout {value.layout}", where)
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Tensor.of(raw.view(numpy_dtype(dtype)).reshape(tuple(value.shape)))


def _notes(state: Mapping[Any, Any], path: Path) -> dict[str, str]:
    """What stands beside the model in a checkpoint, as JSON. Raises FormatError for what JSON cannot say."""
    try:
        return {str(key): json.dumps(value) for key, value in state.items() if key != "model"}
    except (TypeError, ValueError, RecursionError):
        raise FormatError("the checkpoint holds more than a model and its settings", path) from None


def write_pickle(path: Path, tensors: Mapping[str, Tensor], beside: Mapping[str, Any] | None = None) -> None:
    """Write a state dict as ``torch.save`` does; with ``beside`` as the ``model`` of a checkpoint, next to these.

    The same tensors give the same bytes.
    """
    import torch

    state: dict[str, Any] = {}
    for name, tensor in tensors.items():
        dtype = getattr(torch, DTYPES[tensor.dtype].torch)
        data = bytearray(tensor.array().tobytes())
        state[name] = torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)
    buffer = io.BytesIO()  # the archive's folder would otherwise be named after the file
    torch.save(state if beside is None else {"model": state, **beside}, buffer)
    path.write_bytes(buffer.getvalue())
