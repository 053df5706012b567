"""One sample of every kind of update, for the laws that hold for all of them; small files. numpy only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.tensors import Tensor, write_safetensors
from loratool.update import Dense, DoRA, LowRank, Sum, Update


def normal(*shape: int, dtype: str = "F32", seed: int = 0) -> Tensor:
    """Standard normal values."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)
    return Tensor.of(values, dtype)


def low(o: int = 7, i: int = 5, r: int = 3, *kernel: int, seed: int = 0, **more: Any) -> LowRank:
    """A LoRA of an [o,i,*kernel] weight, alpha 6 unless said otherwise."""
    return LowRank(
        down=normal(r, i, *kernel, seed=seed),
        up=normal(o, r, *(1 for _ in kernel), seed=seed + 1),
        **{"alpha": 6.0} | more,
    )


def tucker(o: int = 7, i: int = 5, r: int = 3, *kernel: int, **more: Any) -> LowRank:
    """A LoRA with a core: down and up are 1x1, the kernel lies in mid."""
    ones = (1,) * len(kernel)
    down, up, mid = normal(r, i, *ones), normal(o, r, *ones, seed=1), normal(r, r, *kernel, seed=2)
    return LowRank(down, up, mid, **{"alpha": 6.0} | more)


def magnitude(*shape: int) -> Tensor:
    """Positive values."""
    return Tensor.of(1 + np.abs(normal(*shape, seed=9).array()))


UPDATES: Mapping[str, Update] = {
    "lora": low(),
    "lora_without_alpha": low(alpha=None),
    "lora_alpha_zero": low(alpha=0.0),
    "lora_alpha_of_float64": low(alpha=0.1),
    "lora_bfloat16": LowRank(normal(3, 5, dtype="BF16"), normal(7, 3, dtype="F16"), alpha=1.5),
    "lora_of_two_widths": LowRank(low().down.cast("F64"), low().up, alpha=1.5),
    "lora_rank_stabilised": low(rank_stabilised=True),
    "lora_transposed": low(layer="transposed"),
    "lora_embedding": low(layer="embedding"),
    "lora_conv1d": low(7, 5, 3, 3),
    "lora_conv2d": low(7, 5, 3, 3, 2),
    "lora_pointwise": low(7, 5, 3, 1, 1),
    "lora_tucker": tucker(7, 5, 3, 3, 2),
    "lora_tucker_wide": replace(tucker(7, 5, 3, 2), mid=normal(3, 3, 2, dtype="F64")),
    "dora": DoRA(low(), magnitude(7)),
    "dora_column": DoRA(low(), magnitude(7, 1)),
    "dora_by_input": DoRA(low(), magnitude(1, 5), axis=1),
    "dora_by_input_flat": DoRA(low(), magnitude(5), axis=1),
    "dora_transposed": DoRA(low(layer="transposed"), magnitude(7)),
    "dora_embedding": DoRA(low(layer="embedding"), magnitude(5), axis=1),
    "dora_conv": DoRA(low(7, 5, 3, 3, 2), magnitude(1, 7, 1, 1)),
    "dense": Dense(normal(7, 5)),
    "dense_scaled": Dense(normal(7, 5), 0.25),
    "dense_norm": Dense(normal(7), kind="norm"),
    "sum": Sum((low(), low(7, 5, 2, seed=3, alpha=None))),
    "sum_of_three": Sum((low(), Dense(normal(7, 5)), low(7, 5, 1, seed=4, rank_stabilised=True))),
}
ADDITIVE: Mapping[str, Any] = {name: update for name, update in UPDATES.items() if not update.needs_base}


def adapter(*names: str) -> Adapter:
    """An adapter with the named samples, each on a module of its own; all of them and what travels along if none."""
    updates: dict[str, Update] = {f"block.{n}.{name}": UPDATES[name] for n, name in enumerate(names or UPDATES)}
    carried: dict[str, Tensor] = {}
    if not names:
        updates["block.0.lora.bias"] = Dense(normal(7), 2.0, "bias")
        updates["head.bias"] = Dense(normal(4, dtype="F16"), kind="bias")
        carried = {"score.weight": normal(2, 7, dtype="BF16"), "score.bias": normal(2), "norm.weight": normal(7)}
    metadata = Metadata("sample", strings={"format": "pt", "note": "größer"}, config={"r": 3}, base_model="org/base")
    return Adapter(updates, carried, metadata)


def assert_same_adapter(one: Adapter, other: Adapter) -> None:
    """Same targets, same updates field by field and byte for byte, same carried tensors."""
    assert one.updates.keys() == other.updates.keys()
    assert one.carried.keys() == other.carried.keys()
    for name, update in one.updates.items():
        assert_same(update, other.updates[name], name)
    for name, tensor in one.carried.items():
        assert tensor.same_bytes(other.carried[name]), name


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Updates, or values in them, that are the same."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.same_bytes(other), where
    elif isinstance(one, Update):
        for field in fields(one):  # type: ignore[arg-type]
            assert_same(getattr(one, field.name), getattr(other, field.name), f"{where}.{field.name}")
    elif isinstance(one, tuple):
        assert len(one) == len(other), where
        for a, b in zip(one, other, strict=True):
            assert_same(a, b, where)
    else:
        assert one == other, where


# -- files ---------------------------------------------------------------------------------------------------


def model(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, shards: int = 1
) -> Path:
    """A model folder of these tensors: one file, or shards with an index."""
    folder.mkdir(parents=True)
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    names = names if shards > 1 else ["model.safetensors"]
    keys = sorted(tensors)
    held = {name: keys[n::shards] for n, name in enumerate(names)}
    for name, own in held.items():
        write_safetensors(folder / name, {key: tensors[key] for key in own}, {"format": "pt"})
    if shards > 1:
        weight_map = {key: name for name, own in held.items() for key in own}
        size = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        index = json.dumps({"metadata": size, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)
    (folder / "config.json").write_text(json.dumps({"model_type": "test", **(config or {})}))
    return folder


def lora_file(path: Path, updates: Mapping[str, Update], **carried: Tensor) -> Path:
    """A raw adapter file."""
    metadata = Metadata("sample")
    loratool.write(
        Adapter(updates, {k.replace("__", "."): t for k, t in carried.items()}, metadata), path, format="raw"
    )
    return path


def fingerprint(path: Path) -> dict[str, str]:
    """sha256 of every file below a path: the same before and after means untouched."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


PEFT_CONFIG: Mapping[str, Any] = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}


def peft_folder(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = PEFT_CONFIG) -> Path:
    """A PEFT folder of these tensors, which need not be sound."""
    path.mkdir(exist_ok=True)
    write_safetensors(path / "adapter_model.safetensors", tensors, {"format": "pt"})
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def peft_pair(module: str, prefix: str = "base_model.model.") -> dict[str, Tensor]:
    """The factors of `low()` as PEFT names them."""
    return {f"{prefix}{module}.lora_A.weight": low().down, f"{prefix}{module}.lora_B.weight": low().up}
