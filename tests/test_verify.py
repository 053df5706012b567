"""verify proves a merge, tensor by tensor, and names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loratool
from loratool.errors import MatchError, VerifyError
from loratool.ops.verify import require, ulps
from loratool.tensors import Tensor, read_safetensors, write_safetensors
from loratool.update import DoRA
from tests import models, samples
from tests.samples import DEVICES, lora_file, low, magnitude, normal


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {f"layers.{n}.q.weight": normal(300, 1300, dtype="BF16", seed=n) for n in range(3)}
    return samples.model(tmp_path / "base", tensors | {"norm.weight": normal(5), "steps": Tensor.of(np.int64(3))})


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    two = DoRA(low(300, 1300, 4, seed=3), magnitude(300))
    return lora_file(tmp_path / "lora", {"layers.0.q": low(300, 1300, 4), "layers.1.q": two})


@pytest.fixture
def merged(base: Path, lora: Path, tmp_path: Path) -> Path:
    loratool.merge(base, lora, strengths=[0.5], out=tmp_path / "merged")
    return tmp_path / "merged"


def changed(merged: Path, name: str, new: Tensor | None) -> None:
    """Another tensor, or none, of that name in the merged model."""
    file = merged / "model.safetensors"
    stored = read_safetensors(file)
    tensors = {key: Tensor.of(tensor.array().copy()) for key, tensor in stored.tensors.items() if key != name}
    file.unlink()
    write_safetensors(file, tensors | ({name: new} if new else {}), stored.metadata)


def test_our_own_merge_is_right(base: Path, lora: Path, merged: Path) -> None:
    report = loratool.verify(base, lora, merged=merged, strengths=[0.5])
    assert report.ok and report.failures == ()
    assert report.operation == "verify" and report.bytes_written == 0 and report.modules == 2
    assert report.content_hash == read_safetensors(merged / "model.safetensors").metadata["loratool.content_hash"]
    require(report)


@pytest.mark.parametrize("strength", [1.0, -0.5, 0.49])
def test_another_strength_is_noticed(strength: float, base: Path, lora: Path, merged: Path) -> None:
    report = loratool.verify(base, lora, merged=merged, strengths=[strength])
    assert not report.ok
    assert {failure.module for failure in report.failures} == {"layers.0.q.weight", "layers.1.q.weight"}
    with pytest.raises(VerifyError, match="2 tensors are not what the merge gives") as caught:
        require(report)
    assert caught.value.exit_code == 7


def test_the_base_itself_is_no_merge(base: Path, lora: Path) -> None:
    assert len(loratool.verify(base, lora, merged=base).failures) == 2


@pytest.mark.parametrize(
    "name", ["layers.0.q.weight", "layers.1.q.weight", "layers.2.q.weight", "norm.weight", "steps"]
)
@pytest.mark.parametrize("byte", [0, -1])
def test_one_flipped_bit_is_found(name: str, byte: int, base: Path, lora: Path, merged: Path) -> None:
    """Wherever it is: in the first block or the last, in what was merged or copied."""
    region = read_safetensors(merged / "model.safetensors").tensors[name].region
    assert region is not None
    data = bytearray((merged / "model.safetensors").read_bytes())
    data[region.offset + (0 if byte == 0 else region.nbytes - 2)] ^= 1
    (merged / "model.safetensors").write_bytes(data)
    (failure,) = loratool.verify(base, lora, merged=merged, strengths=[0.5]).failures
    assert failure.module == name and failure.elements == 1 and failure.ulps and failure.ulps > 0


def test_a_difference_is_told_in_ulps(base: Path, lora: Path, merged: Path) -> None:
    name = "layers.0.q.weight"
    values = read_safetensors(merged / "model.safetensors").tensors[name].array().copy()
    bits = values.view(np.int16)
    bits[0, :2], bits[299, 7] = bits[0, :2] + 1, bits[299, 7] - 3
    changed(merged, name, Tensor.of(values))
    (failure,) = loratool.verify(base, lora, merged=merged, strengths=[0.5]).failures
    assert (failure.ulps, failure.elements) == (3, 3)
    assert "3 elements differ, by up to 3 units" in failure.why
    (failure,) = loratool.verify(base, lora, merged=merged, strengths=[0.5], tolerance=1).failures
    assert failure.elements == 1
    assert loratool.verify(base, lora, merged=merged, strengths=[0.5], tolerance=3).ok


def test_missing_added_and_converted_tensors_are_named(base: Path, lora: Path, merged: Path) -> None:
    changed(merged, "norm.weight", None)
    changed(merged, "stranger.weight", normal(2))
    changed(merged, "steps", Tensor.of(np.int32(3)))
    changed(merged, "layers.2.q.weight", normal(300, 1300, dtype="BF16", seed=2).reshape(1300, 300))
    report = loratool.verify(base, lora, merged=merged, strengths=[0.5])
    assert {failure.module: failure.why for failure in report.failures} == {
        "norm.weight": "missing in the merged model",
        "stranger.weight": "only in the merged model",
        "steps": "is I32 [], should be I64 []",
        "layers.2.q.weight": "is BF16 [1300, 300], should be BF16 [300, 1300]",
    }


@pytest.mark.parametrize("whole_shard", [False, True])
def test_what_an_index_places_where_it_is_not_is_missing(whole_shard: bool, tmp_path: Path) -> None:
    """A proof that fails (7), not a model that cannot be read (3)."""
    weights = {name: normal(7, 5, seed=n) for n, name in enumerate(("q.weight", "k.weight"))}
    folder = samples.model(tmp_path / "base", weights, shards=2)
    adapter = lora_file(tmp_path / "x", {"q": low()})
    loratool.merge(folder, adapter, out=tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / "out" / index["k.weight"]
    shard.unlink()
    if not whole_shard:
        write_safetensors(shard, {"other": normal(2, 2)}, {})
    report = loratool.verify(folder, adapter, merged=tmp_path / "out")
    assert not report.ok
    assert ("k.weight", "missing in the merged model") in {(f.module, f.why) for f in report.failures}


def test_a_merge_in_shards_or_in_one_file_is_the_same_proof(base: Path, lora: Path, merged: Path) -> None:
    assert loratool.verify(base, lora, merged=merged / "model.safetensors", strengths=[0.5]).ok


def test_what_cannot_be_merged_cannot_be_verified(base: Path, merged: Path, tmp_path: Path) -> None:
    with pytest.raises(MatchError):
        loratool.verify(base, lora_file(tmp_path / "x", {"mystery": low()}), merged=merged)


@pytest.mark.parametrize("device", DEVICES)
def test_the_proof_uses_the_arithmetic_of_the_merge(device: str, base: Path, lora: Path, tmp_path: Path) -> None:
    """A float32 merge of other devices differs in the last place; the metadata tell which it was."""
    loratool.merge(base, lora, dtype="fp32", device=device, out=tmp_path / "out")
    report = loratool.verify(base, lora, dtype="fp32", merged=tmp_path / "out")
    assert report.ok and report.device == device


@pytest.mark.peer
def test_pefts_own_merge_passes_within_a_tolerance(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    there = models.build("llama", tmp_path / "llama", dtype="bfloat16")
    adapter = models.adapter("llama", there, tmp_path / "adapter", "patterns")
    weights = models.peft_merged(there, adapter)
    (tmp_path / "peft").mkdir()
    save_file({k: t.to(torch.bfloat16) for k, t in weights.items()}, tmp_path / "peft" / "model.safetensors")
    assert loratool.verify(there, adapter, merged=tmp_path / "peft", tolerance=1).ok
    assert not loratool.verify(there, adapter, merged=there, tolerance=1).ok


# -- units of the last place ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        (1.0, 1.0, 0),
        (1.0, np.nextafter(np.float32(1), np.float32(2)), 1),
        (0.0, -0.0, 1),
        (-1e-45, 1e-45, 3),
        (2.0, 1.0, 2**23),
    ],
)
def test_ulps_of_float32(one: float, other: float, apart: int) -> None:
    pair = np.array([one], np.float32), np.array([other], np.float32)
    assert ulps(*pair).item() == ulps(*pair[::-1]).item() == apart


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int8", "uint8", "int64"])
def test_ulps_of_every_dtype_do_not_overflow(dtype: str) -> None:
    raw = np.array([0, 1, -1, 127], np.int8).repeat(np.dtype(dtype).itemsize).view(dtype)
    apart = ulps(raw[:, None].repeat(4, 1), raw[None].repeat(4, 0))
    assert (apart >= 0).all() and apart.max() < 2**64
    assert [int(n) for n in np.diag(apart.reshape(4, 4))] == [0] * 4


@given(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(bool))
def test_neighbours_are_one_apart(value: float) -> None:
    there = np.array([value], np.float32)
    assert ulps(there, np.nextafter(there, np.float32(np.inf))).item() == 1
