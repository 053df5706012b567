"""raw holds everything: what is written is read back the same, field by field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter
from loratool.errors import FormatError, LoratoolError
from loratool.tensors import Tensor, write_safetensors
from loratool.update import Dense, DoRA, LowRank, Sum
from tests import samples
from tests.samples import assert_same, assert_same_adapter, low, magnitude, normal


def written(adapter: Adapter, folder: Path) -> Adapter:
    loratool.write(adapter, folder / "x.safetensors", format="raw")
    return loratool.read(folder / "x.safetensors")


def file_of(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    write_safetensors(folder / "x.safetensors", tensors, metadata or {})
    return folder / "x.safetensors"


def pair(module: str, down: str = ".lora_A.weight", up: str = ".lora_B.weight") -> dict[str, Tensor]:
    return {module + down: low().down, module + up: low().up}


@pytest.mark.parametrize("name", samples.UPDATES)
def test_one_update_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    adapter = samples.adapter(name)
    assert_same_adapter(adapter, written(adapter, tmp_path))


def test_everything_at_once_comes_back_with_what_it_carries(tmp_path: Path) -> None:
    adapter = samples.adapter()
    again = written(adapter, tmp_path)
    assert_same_adapter(adapter, again)
    assert again.metadata.strings == adapter.metadata.strings
    assert again.metadata.config == adapter.metadata.config
    assert again.metadata.base_model == adapter.metadata.base_model


def test_what_is_read_is_written_byte_for_byte(tmp_path: Path) -> None:
    again = written(samples.adapter(), tmp_path)
    loratool.write(again, tmp_path / "y.safetensors", format="raw")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_a_sum_keeps_its_own_kinds_and_its_biases(tmp_path: Path) -> None:
    """A module and its bias share a name in the file; several updates of one do too."""
    bias = Sum((Dense(normal(7), 2.0, "bias"), Dense(normal(7, seed=5), 0.5, "bias")))
    adapter = replace(samples.adapter("sum"), updates={"m": samples.UPDATES["sum"], "m.bias": bias})
    assert_same_adapter(adapter, written(adapter, tmp_path))


def test_a_whole_tensor_may_be_called_like_a_factor(tmp_path: Path) -> None:
    """Modules named `up` and `down` exist; what is carried may end in anything."""
    names = ("mlp.up.weight", "mlp.down.weight", "gate.scale", "mlp.lora_down")
    adapter = replace(samples.adapter("lora"), carried={name: normal(4, seed=n) for n, name in enumerate(names)})
    assert_same_adapter(adapter, written(adapter, tmp_path))


def test_the_factors_are_named_as_the_contract_says(tmp_path: Path) -> None:
    from loratool.tensors import read_safetensors

    written(samples.adapter("lora"), tmp_path)
    stored = read_safetensors(tmp_path / "x.safetensors")
    module = "block.0.lora"
    assert set(stored.tensors) == {f"{module}.lora_A.weight", f"{module}.lora_B.weight", f"{module}.alpha"}
    assert stored.tensors[f"{module}.alpha"].shape == ()
    assert stored.tensors[f"{module}.alpha"].dtype == "F32"


# -- what others write ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (".lora_A", ".lora_B"),
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora_down.weight", ".lora_up.weight"),
        (".lora_down", ".lora_up"),
        (".down.weight", ".up.weight"),
    ],
)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_foreign_spellings(down: str, up: str, alpha: float | None, tmp_path: Path) -> None:
    tensors = pair("net.0.proj", down, up)
    if alpha is not None:
        tensors["net.0.proj.alpha"] = Tensor.of(np.array([alpha], np.float32))
    found = loratool.read(file_of(tmp_path, tensors))
    assert found.metadata.format == "raw"
    assert_same(found.updates["net.0.proj"], low(alpha=alpha))
    assert bool(found.metadata.warnings) is (alpha is None)


def test_a_missing_alpha_is_scaling_1_or_what_the_user_says(tmp_path: Path) -> None:
    """llm trap 34: never the alpha of another module."""
    path = file_of(tmp_path, pair("a") | pair("b") | {"b.alpha": Tensor.of(np.float32(6))})
    assert {n: u.scaling for n, u in loratool.read(path).updates.items()} == {"a": 1.0, "b": 2.0}
    told = loratool.read(path, reading=loratool.Reading(scaling=5.0))
    assert {n: u.scaling for n, u in told.updates.items()} == {"a": 5.0, "b": 2.0}


@pytest.mark.parametrize(
    ("slot", "shape", "axis"),
    [
        (".lora_magnitude_vector", (7,), 0),
        (".lora_magnitude_vector.weight", (7,), 0),
        (".dora_scale", (7, 1), 0),
        (".dora_scale", (1, 5), 1),
    ],
)
def test_a_magnitude_says_its_axis(slot: str, shape: tuple[int, ...], axis: int, tmp_path: Path) -> None:
    found = loratool.read(file_of(tmp_path, pair("m") | {"m" + slot: magnitude(*shape)})).updates["m"]
    assert_same(found, DoRA(low(alpha=None), magnitude(*shape), axis))


def test_lora_bias_is_scaled_as_its_pair(tmp_path: Path) -> None:
    """llm trap 35."""
    tensors = pair("m") | {"m.alpha": Tensor.of(np.float32(6)), "m.lora_B.bias": normal(7)}
    found = loratool.read(file_of(tmp_path, tensors)).updates["m.bias"]
    assert isinstance(found, Dense) and found.scaling == 2.0


def test_whole_deltas_and_whole_tensors(tmp_path: Path) -> None:
    tensors = pair("m") | {"m.diff_b": normal(7), "n.diff": normal(7, 5), "norm.weight": normal(7)}
    found = loratool.read(file_of(tmp_path, tensors))
    assert_same(found.updates["n"], Dense(normal(7, 5)))
    assert_same(found.updates["m.bias"], Dense(normal(7), 1.0, "bias"))
    assert list(found.carried) == ["norm.weight"]


def test_a_module_with_a_pair_and_a_whole_delta_is_their_sum(tmp_path: Path) -> None:
    """CLI law 1: one module of two kinds is summed, never the last one taken."""
    found = loratool.read(file_of(tmp_path, pair("m") | {"m.diff": normal(7, 5, seed=3)})).updates["m"]
    expected = low(alpha=None).delta() + normal(7, 5, seed=3).array()
    np.testing.assert_allclose(found.delta(), expected, atol=1e-6)  # type: ignore[attr-defined]


# -- what is refused -----------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "no_up": ({**pair("m"), "n.lora_A.weight": low().down}, "half a pair: n has down but no up"),
    "no_down": ({**pair("m"), "n.lora_B.weight": low().up}, "half a pair: n has up but no down"),
    "alpha_alone": ({**pair("m"), "n.alpha": normal()}, "n has alpha but no factors"),
    "two_spellings": (pair("m") | pair("m", ".lora_down.weight", ".lora_up.weight"), "two tensors for down"),
    "ranks": ({"m.lora_A.weight": normal(3, 5), "m.lora_B.weight": normal(7, 2)}, "rank mismatch"),
    "integers": ({"m.lora_A.weight": Tensor.of(np.ones((3, 5), np.int8)), "m.lora_B.weight": low().up}, "as I8"),
    "unknown": (pair("m") | {"m.mystery": normal(3)}, "meaning is unknown"),
    "dora_and_diff": (pair("m") | {"m.dora_scale": magnitude(7), "m.diff": normal(7, 5)}, "cannot be added"),
    "long_alpha": (pair("m") | {"m.alpha": normal(2)}, "one value expected"),
    "magnitude": (pair("m") | {"m.dora_scale": magnitude(6)}, "does not fit 7 outputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name: str, tmp_path: Path) -> None:
    tensors, message = REFUSED[name]
    with pytest.raises(FormatError, match=message) as caught:
        loratool.read(file_of(tmp_path, tensors))
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "extra",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"m": 3}',
        '{"m": {"new": 1}}',
        '{"m": {"rank_stabilised": "false"}}',
        '{"m": {"layer": "upside down"}}',
        '{"m": {"layer": []}}',
        '{"m": {"axis": 7}}',
        '{"m": {"axis": true}}',
    ],
)
def test_hostile_metadata_is_refused(extra: str, tmp_path: Path) -> None:
    tensors = pair("m") | {"m.lora_magnitude_vector": magnitude(7)}
    with pytest.raises(FormatError, match=r"loratool\.modules"):
        loratool.read(file_of(tmp_path, tensors, {"loratool.modules": extra}))


@pytest.mark.parametrize("source", ["{", "[]", '"text"', '{"config": 3}', '{"base_model": 3}'])
def test_a_hostile_source_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"loratool\.source"):
        loratool.read(file_of(tmp_path, pair("m"), {"loratool.source": source}))


@pytest.mark.parametrize("more", [{"scaling": "x"}, {"kind": 3}, {"scaling": None}])
def test_hostile_words_on_a_whole_delta_are_refused(more: dict[str, Any], tmp_path: Path) -> None:
    path = file_of(tmp_path, pair("m") | {"n.diff": normal(7, 5)}, {"loratool.modules": json.dumps({"n": more})})
    with pytest.raises(FormatError):
        loratool.read(path)


def test_an_existing_output_stays(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("mine")
    with pytest.raises(LoratoolError, match="output exists") as caught:
        written(samples.adapter("lora"), tmp_path)
    assert caught.value.exit_code == 1
    assert (tmp_path / "x.safetensors").read_text() == "mine"


def test_an_update_is_read_from_the_file_when_used(tmp_path: Path) -> None:
    """Headers only: factors are handles into the file."""
    found = written(samples.adapter("lora"), tmp_path).updates["block.0.lora"]
    assert isinstance(found, LowRank)
    assert found.down.region is not None and found.up.region is not None
