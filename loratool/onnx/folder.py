"""A graph of a model folder: transformers or diffusers load it, torch's exporter writes it.

Batch and sequence (and height and width) stay free. Language models are exported without a cache of keys and values:
the whole sequence in, its logits out. The newer exporter (dynamo) is tried first, then the older one (TorchScript).
Nothing of the folder is executed: no remote code, no pickles.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loratool.errors import FormatError, LoratoolError
from loratool.files import read_json
from loratool.model import read_model
from loratool.tensors import DTYPES, FLOATS

INSTALL = "pip install 'loratool[export]'"
BATCH, LENGTH, SIDE = 2, 5, 16  # of the inputs that a model is traced with; no two free sizes alike, none of them 1
Shape = tuple[int, ...]
OPSET = 18  # of the older exporter
EXPORTERS = ("dynamo", "torchscript")


@dataclass(frozen=True)
class Given:
    """One input: what its values are, its shape, and the axes that stay free."""

    kind: str  # "ids", "ones", "noise", "time"
    shape: Shape
    free: Mapping[int, str]


def export_folder(folder: Path, out: Path) -> dict[str, Given]:
    """Write the graph of the model in ``folder`` to ``out``, its values beside it where they are large; its inputs.

    Raises LoratoolError (a missing package, an exporter that fails), FormatError (not a folder of one model, or of a
    kind whose inputs are not known).
    """
    torch = _package("torch")
    _package("onnxscript")
    with _quiet(), torch.no_grad():
        model = load(folder)
        given = inputs_of(model)
        values = {name: _values(torch, entry, model) for name, entry in given.items()}
        outputs = _outputs(model, values)
        _only_tensors(model, list(values))
        _export(torch, model, given, values, outputs, out)
    return given


def check_folder(folder: Path) -> None:
    """Raise what `export_folder` would refuse, as far as that can be told without loading anything."""
    config = _config(folder)
    for name in ("torch", "onnxscript", "diffusers" if "_class_name" in config else "transformers"):
        if find_spec(name) is None:
            raise LoratoolError(f"exporting a model folder needs the package {name}", hint=INSTALL)


def _package(name: str) -> Any:
    """A package of the extra. Raises LoratoolError with the line that installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise LoratoolError(f"exporting a model folder needs {name}: {error}", hint=INSTALL) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, logs and progress bars of other libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


# ---------------------------------------------------------------- loading


def load(folder: Path) -> Any:
    """The model of a folder, as it is stored, ready to be traced. Raises FormatError, LoratoolError."""
    config = _config(folder)
    library = "diffusers" if "_class_name" in config else "transformers"
    package = _package(library)
    name = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    cls = getattr(package, name, None) if isinstance(name, str) and name.isidentifier() else None
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise FormatError(
            f"{library} has no model {name!r}", folder / "config.json", "export it yourself, give the .onnx"
        )
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if library == "transformers":
        options |= {"dtype": "auto", "attn_implementation": "eager", "trust_remote_code": False}
    else:
        options |= {"torch_dtype": _stored_dtype(folder)}
    try:
        with _no_progress(package):
            model, info = cls.from_pretrained(folder, **options)
    except Exception as error:
        raise LoratoolError(f"{library} cannot load the model: {_first_line(error)}", folder) from None
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise FormatError(f"the checkpoint lacks {len(missing)} tensors of a {name}", f"{folder}: {missing[0]}")
    for part in (model.config, *(getattr(model.config, n, None) for n in ("text_config", "decoder"))):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return model.eval()


def _stored_dtype(folder: Path) -> Any:
    """The dtype that most values of a model have."""
    sizes: dict[str, int] = {}
    for weights in read_model(folder).weights:
        for tensor in weights.file.tensors.values():
            if tensor.dtype in FLOATS:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return getattr(_package("torch"), DTYPES[max(sizes, key=sizes.__getitem__, default="F32")].torch)


def _config(folder: Path) -> Mapping[str, Any]:
    if (folder / "model_index.json").exists():
        raise FormatError(
            "a pipeline has several models", folder, "give one component: its transformer/ or unet/ folder"
        )
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else None
    if not isinstance(config, dict):
        raise FormatError("no config.json that tells what model this is", folder)
    return config


@contextmanager
def _no_progress(package: Any) -> Iterator[None]:
    """The library's progress bars off."""
    switch: Any = package.utils.logging
    shown = getattr(switch, "is_progress_bar_enabled", lambda: True)()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            switch.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


# ---------------------------------------------------------------- inputs


def inputs_of(model: Any) -> dict[str, Given]:
    """The inputs that a model is exported with, in the order of its forward pass. Raises FormatError."""
    make = _INPUTS.get(type(model).__name__)
    if make is not None:
        return make(model.config)
    return _transformers(model)


_ROWS = {0: "batch", 1: "sequence"}
_IMAGE = {0: "batch", 2: "height", 3: "width"}


def _transformers(model: Any) -> dict[str, Given]:
    """Inputs of transformers' models, by the words of their forward pass."""
    import inspect

    config, words = model.config, inspect.signature(model.forward).parameters
    ids = Given("ids", (BATCH, LENGTH), _ROWS)
    known: dict[str, Callable[[], Given]] = {
        "input_ids": lambda: ids,
        "input_features": lambda: Given(
            "noise", (BATCH, config.num_mel_bins, 2 * config.max_source_positions), {0: "batch"}
        ),
        "pixel_values": lambda: _pixels(config),
        "attention_mask": lambda: Given("ones", (BATCH, LENGTH), _ROWS),
        "decoder_input_ids": lambda: Given("ids", (BATCH, LENGTH - 1), {0: "batch", 1: "decoder_sequence"}),
    }
    found = {name: make() for name, make in known.items() if name in words}
    if "input_ids" not in found:
        found.pop("attention_mask", None)
    if not set(found) & {"input_ids", "input_features", "pixel_values"}:
        raise FormatError(
            f"the inputs of a {type(model).__name__} are not known here", hint="export it, give the .onnx"
        )
    if not getattr(config, "is_encoder_decoder", False):
        found.pop("decoder_input_ids", None)
    return {name: found[name] for name in words if name in found}


def _pixels(config: Any) -> Given:
    own = getattr(config, "vision_config", config)
    size = own.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return Given("noise", (BATCH, own.num_channels, height, width), {0: "batch"})


def _unet(config: Any) -> dict[str, Given]:
    sizes = config.cross_attention_dim
    inner = sizes if isinstance(sizes, int) else sizes[0]
    if config.addition_embed_type not in (None, "text_time"):
        raise FormatError(
            f"a UNet with {config.addition_embed_type} is not known here", hint="export it, give the .onnx"
        )
    found = {
        "sample": Given("noise", (BATCH, config.in_channels, SIDE, SIDE), _IMAGE),
        "timestep": Given("time", (BATCH,), {0: "batch"}),
        "encoder_hidden_states": Given("noise", (BATCH, LENGTH, inner), _ROWS),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found["text_embeds"] = Given("noise", (BATCH, pooled), {0: "batch"})
        found["time_ids"] = Given("noise", (BATCH, 6), {0: "batch"})
    return found


def _flux(config: Any) -> dict[str, Given]:
    found = {
        "hidden_states": Given("noise", (BATCH, SIDE, config.in_channels), {0: "batch", 1: "image_sequence"}),
        "encoder_hidden_states": Given("noise", (BATCH, LENGTH, config.joint_attention_dim), _ROWS),
        "pooled_projections": Given("noise", (BATCH, config.pooled_projection_dim), {0: "batch"}),
        "timestep": Given("noise", (BATCH,), {0: "batch"}),
        "img_ids": Given("noise", (SIDE, 3), {0: "image_sequence"}),
        "txt_ids": Given("noise", (LENGTH, 3), {0: "sequence"}),
    }
    return {**found, "guidance": Given("noise", (BATCH,), {0: "batch"})} if config.guidance_embeds else found


def _sd3(config: Any) -> dict[str, Given]:
    return {
        "hidden_states": Given("noise", (BATCH, config.in_channels, SIDE, SIDE), _IMAGE),
        "encoder_hidden_states": Given("noise", (BATCH, LENGTH, config.joint_attention_dim), _ROWS),
        "pooled_projections": Given("noise", (BATCH, config.pooled_projection_dim), {0: "batch"}),
        "timestep": Given("time", (BATCH,), {0: "batch"}),
    }


_INPUTS: Mapping[str, Callable[[Any], dict[str, Given]]] = {
    "UNet2DConditionModel": _unet,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
}
_ADDED = ("text_embeds", "time_ids")  # of SDXL's UNet, which takes them in a table


def _values(torch: Any, given: Given, model: Any) -> Any:
    """Values of one input, the same each time."""
    generator = torch.Generator().manual_seed(0)
    if given.kind == "ids":
        text = getattr(model.config, "text_config", model.config)
        return torch.randint(0, text.vocab_size, given.shape, generator=generator)
    if given.kind == "ones":
        return torch.ones(given.shape, dtype=torch.long)
    if given.kind == "time":
        return torch.full(given.shape, 10, dtype=torch.long)
    return torch.randn(given.shape, generator=generator).to(model.dtype)


# ---------------------------------------------------------------- exporting


def _call(forward: Callable[..., Any], named: dict[str, Any]) -> Any:
    """A forward pass of named inputs."""
    added = {name: named.pop(name) for name in _ADDED if name in named}
    return forward(**named, **({"added_cond_kwargs": added} if added else {}))


def _tensors(output: Any) -> dict[str, Any]:
    """The tensors among what a forward pass gives, by name."""
    found = {"output": output} if hasattr(output, "shape") else dict(output)
    return {name: value for name, value in found.items() if hasattr(value, "shape")}


def _outputs(model: Any, values: Mapping[str, Any]) -> list[str]:
    """The names of a model's outputs."""
    return list(_tensors(_call(model.forward, dict(values))))


def _only_tensors(model: Any, names: list[str]) -> None:
    """Let the forward pass take its inputs in order and give tensors only: exporters fill in the defaults of others."""
    plain = model.forward
    model.forward = lambda *values: tuple(_tensors(_call(plain, dict(zip(names, values, strict=True)))).values())


def _export(
    torch: Any, model: Any, given: Mapping[str, Given], values: Mapping[str, Any], outputs: list[str], out: Path
) -> None:
    """Export by the newer exporter, or by the older one. Raises LoratoolError with what both said."""
    same: dict[str, Any] = {"input_names": list(values), "output_names": _distinct(outputs, values)}
    shapes = [dict.fromkeys(entry.free, torch.export.Dim.DYNAMIC) for entry in given.values()]
    axes = {name: dict(entry.free) for name, entry in given.items()}
    axes |= {name: {0: "batch"} for name in same["output_names"]}
    options: Mapping[str, dict[str, Any]] = {
        "dynamo": {"dynamo": True, "dynamic_shapes": (tuple(shapes),), "external_data": True, "verbose": False},
        "torchscript": {"dynamo": False, "dynamic_axes": axes, "opset_version": OPSET},
    }
    said = []
    for exporter in EXPORTERS:
        for left in out.parent.glob(f"{out.name}*"):
            left.unlink()
        try:
            torch.onnx.export(model, tuple(values.values()), str(out), **same, **options[exporter])
            return
        except Exception as error:  # an exporter may fail in any way
            said.append(_first_line(error))
    raise LoratoolError(f"torch cannot export this model: {'; '.join(said)}", hint="export it yourself, give the .onnx")


def name_sizes(model: Any, given: Mapping[str, Given]) -> None:
    """Give the free sizes of a graph's message the names of `Given`, in place of dynamo's s0, s1, ..."""
    names: dict[str, str] = {}
    for entry in model.graph.input:
        free = given[entry.name].free if entry.name in given else {}
        for axis, dim in enumerate(entry.type.tensor_type.shape.dim):
            if dim.dim_param and axis in free:
                names[dim.dim_param] = free[axis]
    for entry in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in entry.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), dim.dim_param)


def _distinct(outputs: list[str], inputs: Mapping[str, Any]) -> list[str]:
    """Output names that no input has."""
    return [f"{name}_out" if name in inputs else name for name in outputs]


__all__ = ["check_folder", "export_folder", "inputs_of", "load", "name_sizes"]
