"""Bases of pickles: read with --allow-pickle only, as tensors only, and written as safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import loratool
from loratool.api import Reading
from loratool.errors import FormatError, LoratoolError
from loratool.model import read_model
from tests.samples import lora_file, low, normal

SHAPES = {"a.weight": (7, 5), "b.weight": (4, 5), "a.bias": (7,)}
ALLOWED = Reading(allow_pickle=True)


def state(dtype: str = "bfloat16") -> dict[str, object]:
    import torch

    return {
        name: torch.from_numpy(normal(*shape).array().copy()).to(getattr(torch, dtype))
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder of two pickled shards."""
    import torch

    folder = tmp_path / "base"
    folder.mkdir()
    tensors = state()
    weight_map = {}
    for n, names in enumerate((["a.weight"], ["a.bias", "b.weight"]), 1):
        shard = f"pytorch_model-0000{n}-of-00002.bin"
        torch.save({name: tensors[name] for name in names}, folder / shard)
        weight_map.update(dict.fromkeys(names, shard))
    index = {"metadata": {"total_size": 124}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "test"}')
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return lora_file(tmp_path / "lora.safetensors", {"a": low()})


def test_pickles_are_refused_unless_allowed(base: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="pickle") as caught:
        loratool.merge(base, lora, out=tmp_path / "merged")
    assert "--allow-pickle" in str(caught.value.hint)


def test_a_merged_folder_holds_safetensors_and_an_index_that_agrees(base: Path, lora: Path, tmp_path: Path) -> None:
    report = loratool.merge(base, lora, out=tmp_path / "merged", reading=ALLOWED)
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert any("pickles" in warning for warning in report.warnings)
    merged = read_model(tmp_path / "merged")  # which checks the index
    before = read_model(base, allow_pickle=True)
    for name in ("a.bias", "b.weight"):
        assert merged.parameters[name][0].tensor.same_bytes(before.parameters[name][0].tensor)
    wanted = low().apply(before.parameters["a.weight"][0].tensor.float())
    np.testing.assert_allclose(merged.parameters["a.weight"][0].tensor.float(), wanted, rtol=2**-8, atol=1e-6)
    assert loratool.verify(base, lora, merged=tmp_path / "merged", reading=ALLOWED).ok


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_one_checkpoint_file(nested: bool, zipped: bool, lora: Path, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.ckpt"
    whole = {"state_dict": state("float32"), "global_step": 3} if nested else state("float32")
    torch.save(whole, path, _use_new_zipfile_serialization=zipped)
    loratool.merge(path, lora, out=tmp_path / "merged.safetensors", reading=ALLOWED)
    merged = read_model(tmp_path / "merged.safetensors").parameters
    assert merged.keys() == SHAPES.keys()
    wanted = low().apply(normal(7, 5).float())
    np.testing.assert_allclose(merged["a.weight"][0].tensor.float(), wanted, rtol=1e-6)


def test_safetensors_win_over_pickles_of_the_same(base: Path, lora: Path, tmp_path: Path) -> None:
    loratool.merge(base, lora, out=tmp_path / "once", reading=ALLOWED)
    (tmp_path / "once" / "pytorch_model.bin").write_bytes(b"\x80\x02 anything")
    report = loratool.merge(tmp_path / "once", lora, out=tmp_path / "twice", reading=ALLOWED)
    assert any("pytorch_model.bin" in warning for warning in report.warnings)


def test_code_in_a_pickle_is_not_run(base: Path, lora: Path, tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "ran",))

    (base / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps({"a.weight": Evil()}, protocol=2))
    with pytest.raises(FormatError):
        loratool.merge(base, lora, out=tmp_path / "merged", reading=ALLOWED)
    assert not (tmp_path / "ran").exists()


def test_a_base_of_pickles_cannot_be_undone(base: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="pickles"):
        loratool.merge(base, lora, out=tmp_path / "merged", undo=tmp_path / "undo", reading=ALLOWED)
    assert not (tmp_path / "merged").exists()


def test_a_diffusers_component_keeps_its_name(lora: Path, tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "unet"
    folder.mkdir()
    torch.save(state(), folder / "diffusion_pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    loratool.merge(folder, lora, out=tmp_path / "merged", reading=ALLOWED)
    assert (tmp_path / "merged" / "diffusion_pytorch_model.safetensors").exists()
