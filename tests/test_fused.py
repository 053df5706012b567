"""Fused weights: rows of an update, rows stacked again; and any update taken apart and put together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import loratool
from loratool import kinds
from loratool.adapter import Adapter, Metadata
from loratool.errors import FormatError
from loratool.tensors import Tensor, write_safetensors
from loratool.update import AdditiveRows, Dense, DoRA, LowRank, Replace, Rows, Stacked, Sum, Update, rows, stack

rng = np.random.default_rng(7)


def tensor(*shape: int, dtype: str = "F32") -> Tensor:
    return Tensor.of(rng.standard_normal(shape), dtype)


def lora(out: int = 12, rank: int = 3, alpha: float | None = 2.0) -> LowRank:
    return LowRank(tensor(rank, 5), tensor(out, rank), alpha=alpha)


SPLITTABLE: dict[str, Update] = {
    "lora": lora(),
    "conv": LowRank(tensor(2, 5, 3, 3), tensor(12, 2, 1, 1), alpha=1.0),
    "tucker": LowRank(tensor(2, 5, 1, 1), tensor(12, 2, 1, 1), tensor(2, 2, 3, 3), 1.0),
    "full": Dense(tensor(12, 5), 0.5),
    "replace": Replace(tensor(12, 5)),
    "dora": DoRA(lora(), tensor(12, 1)),
    "sum": Sum((lora(), Dense(tensor(12, 5)))),
}


@pytest.mark.parametrize("name", SPLITTABLE)
def test_rows_change_the_base_as_the_whole_does(name: str) -> None:
    update = SPLITTABLE[name]
    base = rng.standard_normal(update.shape).astype(np.float32)
    whole = update.apply(base, 0.7)
    for start, stop in ((0, 4), (4, 9), (9, 12)):
        np.testing.assert_allclose(rows(update, start, stop).apply(base[start:stop], 0.7), whole[start:stop], rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in SPLITTABLE if n != "replace"])
def test_rows_stack_to_the_whole_again(name: str) -> None:
    update = SPLITTABLE[name]
    parts = [rows(update, *span) for span in ((0, 4), (4, 9), (9, 12))]
    again = stack(parts, (4, 5, 3))
    assert again is not None and again.rank == update.rank
    base = rng.standard_normal(update.shape).astype(np.float32)
    np.testing.assert_allclose(again.apply(base), update.apply(base), rtol=1e-6)


def test_a_lora_that_was_split_is_fused_at_its_rank_also_after_its_factors_were_copied() -> None:
    whole = lora()
    parts = [rows(whole, 0, 4), None, rows(whole, 9, 12)]
    copies = [part and replace(part, down=Tensor.of(part.slots["down"].array())) for part in parts]  # type: ignore[arg-type]
    for given in (parts, copies):
        again = stack(given, (4, 5, 3))
        assert isinstance(again, LowRank) and again.rank == whole.rank
        expected = whole.delta()
        expected[4:9] = 0
        np.testing.assert_array_equal(again.delta(), expected)


@pytest.mark.parametrize("alphas", [(2.0, 2.0), (2.0, 5.0), (None, None), (None, 1.0)])
def test_independent_loras_stack_block_diagonally(alphas: tuple[float | None, float | None]) -> None:
    one, other = lora(4, 3, alphas[0]), lora(6, 2, alphas[1])
    both = stack([one, other], (4, 6))
    assert isinstance(both, LowRank) and both.rank == 5
    np.testing.assert_allclose(both.delta(), np.concatenate([one.delta(), other.delta()]), rtol=1e-6)


def test_stored_dtype_survives_a_block_diagonal_stack_of_equal_scalings() -> None:
    one, other = (LowRank(tensor(2, 5, dtype="BF16"), tensor(4, 2, dtype="BF16"), alpha=4.0) for _ in range(2))
    both = stack([one, other], (4, 4))
    assert isinstance(both, LowRank) and both.up.dtype == both.down.dtype == "BF16"
    np.testing.assert_array_equal(both.delta(), np.concatenate([one.delta(), other.delta()]))


def test_what_has_no_common_form_is_stacked_as_it_is() -> None:
    parts = (Dense(tensor(4, 5)), None, lora(3))
    both = stack(parts, (4, 2, 3))
    assert isinstance(both, Stacked)
    expected = np.concatenate([parts[0].delta(), np.zeros((2, 5)), parts[2].delta()])
    np.testing.assert_allclose(both.delta(), expected, rtol=1e-6)
    for start, stop in ((0, 1), (3, 7), (4, 6), (5, 9)):
        np.testing.assert_allclose(both.delta(start, stop), expected[start:stop], rtol=1e-6)
    np.testing.assert_allclose(both.scaled(-2).delta(), -2 * expected, rtol=1e-6)


def test_a_dora_beside_an_unchanged_part_has_no_fused_form() -> None:
    assert stack([rows(SPLITTABLE["dora"], 0, 4), None], (4, 8)) is None


def test_a_magnitude_for_each_input_cannot_be_split() -> None:
    with pytest.raises(FormatError, match="each input"):
        rows(DoRA(lora(), tensor(1, 5), 1), 0, 4)


OTHERS: dict[str, Update] = {
    "rows": Rows(Replace(tensor(12, 5)), 2, 7),
    "rows of a sum": AdditiveRows(Sum((lora(), Dense(tensor(12, 5)))), 2, 7),
    "stacked": Stacked((lora(4), None), (4, 3)),
    "replace": Replace(tensor(12, 5)),
}


@pytest.mark.parametrize("name", [*OTHERS, *SPLITTABLE])
def test_any_update_is_taken_apart_and_put_together(name: str) -> None:
    update = {**OTHERS, **SPLITTABLE}[name]
    again = kinds.built(kinds.stored(update))
    assert again == update and type(again) is type(update)


@pytest.mark.parametrize("name", OTHERS)
def test_raw_carries_updates_of_every_kind(name: str, tmp_path: Path) -> None:
    update = OTHERS[name]
    path = tmp_path / "adapter.safetensors"
    loratool.write(Adapter({"a.b": update, "c": lora()}, {}, Metadata("raw")), path, format="raw")
    again = loratool.read(path)
    assert again.updates.keys() == {"a.b", "c"} and not again.carried
    base = rng.standard_normal(update.shape).astype(np.float32)
    np.testing.assert_array_equal(again.updates["a.b"].apply(base), update.apply(base))


@pytest.mark.parametrize(
    "words",
    [
        {"type": "Update"},
        {"type": "Unheard"},
        {"type": "LowRank", "down": tensor(3, 5)},
        {"type": "LowRank", "down": tensor(3, 5), "up": tensor(4, 3), "alpha": "2"},
        {"type": "LowRank", "down": tensor(3, 5), "up": tensor(4, 3), "alpha": float("nan")},
        {"type": "LowRank", "down": tensor(3, 5), "up": tensor(4, 3), "layer": "sideways"},
        {"type": "LowRank", "down": tensor(3, 5), "up": 3},
        {"type": "Dense", "value": tensor(3), "scale": 2},
        {"type": "Sum", "parts": tensor(3)},
    ],
)
def test_words_that_are_no_update_are_refused(words: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        kinds.built(words)


def test_a_projection_that_the_file_holds_fused_is_one_module(tmp_path: Path) -> None:
    path = tmp_path / "flux.safetensors"
    stored = {
        f"lora_unet_{place}.{slot}": tensor
        for place, out in (("double_blocks_0_img_attn_qkv", 9216), ("double_blocks_1_img_attn_proj", 3072))
        for slot, tensor in (
            ("lora_down.weight", tensor_of(2, 3072)),
            ("lora_up.weight", tensor_of(out, 2)),
            ("alpha", Tensor.of(np.float32(1))),
        )
    }
    write_safetensors(path, stored, {})
    assert len(loratool.read(path).updates) == 4
    found = loratool.inspect(path)
    assert found.modules == 2 and found.ranks == {"2": 2} and found.dtypes == {"BF16": 4}
    assert found.parameters == sum(t.size for name, t in stored.items() if "alpha" not in name)
    shapes = {target.module: target.shape for target in found.targets}
    assert shapes["lora_unet_double_blocks_0_img_attn_qkv"] == (9216, 3072)


def tensor_of(*shape: int) -> Tensor:
    return Tensor.of(np.zeros(shape, np.float32), "BF16")


def test_every_kind_is_in_the_registry() -> None:
    import importlib
    import pkgutil

    for module in pkgutil.iter_modules(kinds.__path__, "loratool.kinds."):
        importlib.import_module(module.name)
    waiting, found = [Update], set()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        found |= set() if kind.__abstractmethods__ else {(kind.__name__, kind.__module__)}
    ours = {(name, home) for name, home in found if home.startswith(("loratool.update", "loratool.kinds."))}
    assert ours <= set(kinds.KINDS.items())
    assert all(kinds.kind(name) is not None for name in kinds.KINDS)
