"""Bases of 8-bit weights: changed in float32, rounded again in their own scheme, scales grown only where needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.errors import FormatError, NumericError
from loratool.model import read_model
from loratool.scaled import LARGEST
from loratool.tensors import Tensor, numpy_dtype
from loratool.update import DoRA, LowRank, Update
from tests import samples

O, I, R = 10, 14, 2  # noqa: E741  (outputs, inputs, rank)
rng = np.random.default_rng(11)


def lora(size: float = 0.2) -> LowRank:
    down, up = (rng.standard_normal(shape).astype(np.float32) * size for shape in ((R, I), (O, R)))
    return LowRank(Tensor.of(down), Tensor.of(up))


def eight(values: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(values.astype(np.float32).astype(numpy_dtype(dtype)))


def base_of(folder: Path, stored: np.ndarray, scales: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    tensors = {
        "a.weight": Tensor.of(stored),
        "b.weight": Tensor.of(stored),
        "norm.weight": Tensor.of(np.ones(3, np.float32)),
    }
    tensors |= {f"{module}.{name}": Tensor.of(values) for module in "ab" for name, values in scales.items()}
    return samples.model(folder, tensors, config)


def merged(base: Path, update: Update, out: Path) -> dict[str, np.ndarray]:
    report = loratool.merge(base, Adapter({"a": update}, {}, Metadata("raw")), out=out)
    assert any("8 bits" in warning for warning in report.warnings)
    return {name: at[0].tensor.array() for name, at in read_model(out).parameters.items()}


@pytest.mark.parametrize("dtype", LARGEST)
def test_without_scales_the_bits_are_the_values(dtype: str, tmp_path: Path) -> None:
    stored, update = eight(rng.standard_normal((O, I)), dtype), lora()
    base = base_of(tmp_path / "base", stored, {}, {})
    found = merged(base, update, tmp_path / "merged")
    wanted = eight(stored.astype(np.float32) + update.delta(), dtype)
    assert found["a.weight"].tobytes() == wanted.tobytes()
    assert found["b.weight"].tobytes() == stored.tobytes()


# llm trap 48: ``weight_scale_inv`` multiplies; llm trap 56: blocks of 4 and 5 are ragged at the ends of 10 and 14
SCHEMES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "one": ("scale_weight", (), {}),
    "one of one": ("weight_scale", (1,), {}),
    "by output": ("weight_scale", (O, 1), {}),
    "by output, flat": ("weight_scale", (O,), {}),
    "by block": ("weight_scale_inv", (3, 3), {"quantization_config": {"weight_block_size": [4, 5]}}),
    "by block, untold": ("weight_scale_inv", (2, 2), {}),
}


def spread(scale: np.ndarray) -> np.ndarray:
    """The scale of every element."""
    if scale.size == 1:
        return np.full((O, I), float(scale.reshape(-1)[0]), np.float32)
    if scale.size == O:
        return np.repeat(scale.reshape(O, 1), I, 1).astype(np.float32)
    tall, wide = (4, 5) if scale.shape == (3, 3) else (5, 7)
    return np.repeat(np.repeat(scale, tall, 0)[:O], wide, 1)[:, :I].astype(np.float32)


@pytest.mark.parametrize("size", [0.02, 2.0])
@pytest.mark.parametrize("name", SCHEMES)
def test_with_scales_the_change_is_made_in_float32(name: str, size: float, tmp_path: Path) -> None:
    leaf, shape, config = SCHEMES[name]
    scale = (rng.random(shape) * 1e-3 + 1e-3).astype(np.float32)
    stored = eight(rng.standard_normal((O, I)) * 120, "F8_E4M3")
    update = lora(size)
    base = base_of(tmp_path / "base", stored, {leaf: scale}, config)
    found = merged(base, update, tmp_path / "merged")
    old, new = spread(scale), spread(found[f"a.{leaf}"])
    value = stored.astype(np.float32) * old + update.delta()
    got = found["a.weight"].astype(np.float32) * new
    # within half a unit of the last place (three bits of fraction), or of the smallest number
    assert (np.abs(got - value) <= np.maximum(np.abs(value) / 16, new * 2.0**-10) * 1.001).all()
    assert ((new == old) | (np.abs(value) <= new * 448 * 1.0001)).all()
    assert (new >= old).all() and (size < 1 or (new > old).any())
    assert found["b.weight"].tobytes() == stored.tobytes()
    assert found[f"b.{leaf}"].tobytes() == scale.tobytes()


def test_a_block_whose_values_still_fit_keeps_its_scale_and_what_no_update_reaches_its_bits(tmp_path: Path) -> None:
    stored = eight(rng.standard_normal((O, I)) * 100, "F8_E4M3")
    scale = np.full((O, 1), 1e-3, np.float32)
    update = lora(2.0)
    up = update.up.array().copy()
    up[3:] = 0
    half = LowRank(update.down, Tensor.of(up))
    base = base_of(tmp_path / "base", stored, {"weight_scale": scale}, {})
    found = merged(base, half, tmp_path / "merged")
    assert (found["a.weight_scale"][3:] == scale[3:]).all() and (found["a.weight_scale"][:3] > scale[:3]).any()
    assert found["a.weight"][3:].tobytes() == stored[3:].tobytes()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_scales_keep_their_dtype_and_never_let_a_value_overflow(dtype: str, tmp_path: Path) -> None:
    stored = eight(rng.standard_normal((O, I)) * 150, "F8_E4M3")
    scale = np.asarray(np.full((O, 1), 0.01).astype(numpy_dtype(dtype)))
    found = merged(base_of(tmp_path / "base", stored, {"weight_scale": scale}, {}), lora(3.0), tmp_path / "merged")
    assert found["a.weight_scale"].dtype == scale.dtype
    assert np.isfinite(found["a.weight"].astype(np.float32)).all()


@pytest.mark.parametrize("scales", [{}, {"weight_scale": np.full((O, 1), 1.5, np.float32)}])
def test_the_report_says_how_much_of_the_change_rounding_missed(scales: dict[str, Any], tmp_path: Path) -> None:
    stored, update = eight(rng.standard_normal((O, I)), "F8_E4M3"), lora()
    base = base_of(tmp_path / "base", stored, scales, {})
    report = loratool.merge(base, Adapter({"a": update}, {}, Metadata("raw")), out=tmp_path / "merged")
    parameters = read_model(tmp_path / "merged").parameters
    scale = scales.get("weight_scale", np.float32(1))
    assert not scales or np.array_equal(parameters["a.weight_scale"][0].tensor.array(), scale)
    kept = parameters["a.weight"][0].tensor.array().astype(np.float64) * scale
    missed = kept - (stored.astype(np.float64) * scale + update.delta())
    assert report.rounding_error == pytest.approx(np.linalg.norm(missed) / np.linalg.norm(update.delta()), rel=1e-4)
    assert report.rounding_error > 0.05


def test_without_weights_in_8_bits_there_is_no_such_error(tmp_path: Path) -> None:
    base = samples.model(tmp_path / "base", {"a.weight": Tensor.of(np.ones((O, I), np.float32))}, {})
    report = loratool.merge(base, Adapter({"a": lora()}, {}, Metadata("raw")), out=tmp_path / "merged")
    assert report.rounding_error is None


def test_the_merge_is_proven_and_undone(tmp_path: Path) -> None:
    stored = eight(rng.standard_normal((O, I)) * 100, "F8_E4M3")
    base = base_of(tmp_path / "base", stored, {"weight_scale": np.full((O, 1), 1e-3, np.float32)}, {})
    adapter = Adapter(
        {"a": DoRA(lora(), Tensor.of(np.abs(rng.standard_normal(O)).astype(np.float32)))}, {}, Metadata("raw")
    )
    loratool.merge(base, adapter, out=tmp_path / "merged", undo=tmp_path / "undo")
    assert loratool.verify(base, adapter, merged=tmp_path / "merged").ok
    loratool.unmerge(tmp_path / "merged", tmp_path / "again", undo=tmp_path / "undo")
    assert list(samples.fingerprint(tmp_path / "again").values()) == list(samples.fingerprint(base).values())


def test_dora_sees_the_values_not_the_bits(tmp_path: Path) -> None:
    stored = eight(rng.standard_normal((O, I)) * 100, "F8_E4M3")
    scale = np.full((O, 1), 1e-3, np.float32)
    base = base_of(tmp_path / "base", stored, {"weight_scale": scale}, {})
    for axis, count in ((0, O), (1, I)):
        magnitude = np.abs(rng.standard_normal(count)).astype(np.float32) + 1
        dora = DoRA(lora(), Tensor.of(magnitude), axis)
        found = merged(base, dora, tmp_path / f"merged{axis}")
        value = dora.apply(stored.astype(np.float32) * scale)
        got = found["a.weight"].astype(np.float32) * found["a.weight_scale"]
        assert (np.abs(got - value) <= np.maximum(np.abs(value) / 15.9, 2e-5)).all()


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale_2", "weight_zero_point"])
def test_other_schemes_are_refused_by_name(leaf: str, tmp_path: Path) -> None:
    stored = eight(rng.standard_normal((O, I)), "F8_E4M3")
    base = base_of(tmp_path / "base", stored, {leaf: np.ones(1, np.float32)}, {})
    with pytest.raises(FormatError, match=leaf):
        merged(base, lora(), tmp_path / "merged")


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stored = eight(rng.standard_normal((O, I)), "F8_E4M3")
    for number, scale in enumerate((np.ones((3, 5), np.float32), np.ones(7, np.float32), np.ones((O, 1), np.int32))):
        config = {"quantization_config": {"weight_block_size": [4, 5]}}
        base = base_of(tmp_path / f"base{number}", stored, {"weight_scale": scale}, config)
        with pytest.raises(FormatError, match="scales"):
            merged(base, lora(), tmp_path / "merged")


def test_without_scales_an_overflow_is_refused(tmp_path: Path) -> None:
    stored = eight(rng.standard_normal((O, I)) * 400, "F8_E4M3")
    stored[np.isnan(stored.astype(np.float32))] = 448
    with pytest.raises(NumericError):
        merged(base_of(tmp_path / "base", stored, {}, {}), lora(9.0), tmp_path / "merged")
