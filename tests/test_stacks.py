"""Stacked experts in the commands that choose ranks: each expert is a module of its own, the stack is packed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.errors import MatchError, UsageError
from loratool.kinds.experts import Experts
from loratool.model import read_model
from loratool.ops.add import add
from loratool.ops.combine import Recipe, combine
from loratool.ops.rank import rank_adapter
from loratool.ops.resize import resize
from loratool.ops.spectral import Choice
from loratool.ops.stacks import apart, stacks_of, together
from loratool.tensors import Tensor
from tests import samples
from tests.samples import assert_same_adapter, low, normal

E, R = 3, 4
NAME = "mlp.experts.down_proj"


def stack(seed: int = 0, r: int = R, **more: Any) -> Experts:
    return Experts(normal(E * r, 5, seed=seed), normal(7, r * E, seed=seed + 1), E, **{"alpha": 6.0} | more)


def adapter(update: Experts, **others: Any) -> Adapter:
    return Adapter({NAME: update, **others}, {}, Metadata("sample"))


def delta(found: Adapter) -> np.ndarray:
    update = found.updates[NAME]
    assert isinstance(update, Experts)
    return update.delta()


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ v[:rank])


@pytest.mark.parametrize("order", ["plain", "transposed", "model", "shape"])
def test_apart_and_together_is_the_same(order: Any) -> None:
    whole = adapter(stack(order=order), other=low())
    pieces = apart(whole)
    assert list(pieces.updates) == [*(f"{NAME}.{n}" for n in range(E)), "other"]
    assert_same_adapter(together(pieces, stacks_of([whole])), whole)


@pytest.mark.parametrize("order", ["plain", "transposed"])
def test_each_expert_is_resized_to_its_best(order: Any, tmp_path: Path) -> None:
    whole = adapter(stack(order=order))
    result = resize(whole, Choice(2))
    expected = np.stack([best(one, 2) for one in delta(whole)])
    np.testing.assert_allclose(delta(result.adapter), expected, atol=1e-5)
    assert [module.rank for module in result.modules] == [2] * E
    error = np.linalg.norm(delta(whole) - expected) / np.linalg.norm(delta(whole))
    assert result.relative_error == pytest.approx(error, rel=1e-4)
    loratool.write(result.adapter, tmp_path / "x", format="peft")
    assert loratool.read(tmp_path / "x").updates[NAME].rank == 2


def test_experts_of_different_ranks_are_padded() -> None:
    """PEFT has one rank for a stack: the largest that an expert needs."""
    up = normal(7, R, E).array().copy()
    up[:, 1:, 0] = 0  # the first expert is of rank one, the second of rank two
    up[:, 2:, 1] = 0
    whole = adapter(Experts(normal(E * R, 5), Tensor.of(up.reshape(7, -1)), E, 6.0))
    result = resize(whole, Choice(error=1e-4))
    assert [module.rank for module in result.modules] == [1, 2, 4]
    assert result.adapter.updates[NAME].rank == 4
    np.testing.assert_allclose(delta(result.adapter), delta(whole), atol=2e-3)


@pytest.mark.parametrize("rank", [None, 3])
def test_stacks_add_up(rank: int | None) -> None:
    one, other = adapter(stack()), adapter(stack(7, 2, alpha=5.0, rank_stabilised=True))
    result = add([one, other], [0.5, -2.0], rank)
    expected = 0.5 * delta(one) - 2.0 * delta(other)
    if rank:
        expected = np.stack([best(matrix, rank) for matrix in expected])
    np.testing.assert_allclose(delta(result.adapter), expected, atol=5e-5)
    assert NAME not in add([one, one], [1.0, -1.0]).adapter.updates


def test_an_expert_that_vanishes_is_zero_in_its_stack() -> None:
    one = stack()
    up = one.up.array().copy().reshape(7, R, E)
    up[:, :, 1:] = 0
    first_only = Experts(one.down, Tensor.of(up.reshape(7, -1)), E, 6.0)
    result = add([adapter(one), adapter(first_only)], [1.0, -1.0])
    expected = one.delta().copy()
    expected[0] = 0
    np.testing.assert_allclose(delta(result.adapter), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear"])
def test_stacks_are_combined_expert_by_expert(method: str) -> None:
    one, other = stack(), stack(5)
    recipe = Recipe(method, density=0.6, rank=R)
    found = combine([adapter(one), adapter(other)], recipe).adapter
    alone = [Adapter({f"{NAME}.{n}": s.expert(n) for n in range(E)}, {}, Metadata("x")) for s in (one, other)]
    each = combine(alone, recipe).adapter.updates
    expected = np.stack([each[f"{NAME}.{n}"].delta() for n in range(E)])  # type: ignore[attr-defined]
    np.testing.assert_allclose(delta(found), expected, atol=1e-5)


def test_each_expert_has_its_spectrum() -> None:
    report = rank_adapter(adapter(stack()))
    assert [module.module for module in report.modules] == [f"{NAME}.{n}" for n in range(E)]
    values = np.linalg.svd(stack().delta()[1], compute_uv=False)[:R]
    np.testing.assert_allclose(report.modules[1].singular_values[:R], values, rtol=1e-4)


def test_stacks_of_other_sizes_do_not_go_together() -> None:
    other = Experts(normal(2 * R, 5), normal(7, 2 * R), 2, 6.0)
    with pytest.raises(MatchError, match="stacks of 3 and of 2 experts"):
        add([adapter(stack()), adapter(other)])


# -- extraction ----------------------------------------------------------------------------------------------


def models_of(folder: Path, model_type: str, *shape: int) -> tuple[Path, Path, np.ndarray]:
    """Two models that differ in a stack by rank two for each expert but the last; and the difference."""
    change = np.stack([low(*shape[1:], 2, seed=n).delta() for n in range(shape[0])])
    change[-1] = 0
    before = normal(*shape, seed=20).array()
    paths = []
    for name, values in (("base", before), ("tuned", before + change)):
        tensors = {NAME: Tensor.of(values), "mlp.experts.down_proj_bias": normal(shape[0], 2)}
        paths.append(samples.model(folder / name, tensors, {"model_type": model_type}))
    return paths[0], paths[1], (before + change) - before


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_are_extracted_one_by_one(model_type: str, tmp_path: Path) -> None:
    base, tuned, change = models_of(tmp_path, model_type, 3, 9, 8)
    report = loratool.extract(base, tuned, rank=4, out=tmp_path / "lora")
    found = loratool.read(tmp_path / "lora").updates[NAME]
    assert isinstance(found, Experts) and (found.experts, found.rank) == (3, 4) and not report.carried
    (fitting,) = [one for one in found.orders(model_type == "gpt_oss") if one.shape == change.shape]
    np.testing.assert_allclose(fitting.delta(), change, atol=1e-5)
    assert {module.module for module in report.modules} == {f"{NAME}.0", f"{NAME}.1"}
    loratool.merge(base, tmp_path / "lora", out=tmp_path / "merged")
    merged, wanted = (read_model(p).parameters[NAME][0].tensor.array() for p in (tmp_path / "merged", tuned))
    np.testing.assert_allclose(merged, wanted, atol=1e-5)


def test_stacks_without_a_difference_are_left_out(tmp_path: Path) -> None:
    base, _, _ = models_of(tmp_path, "mixtral", 3, 9, 8)
    loratool.extract(base, base, rank=4, out=tmp_path / "lora")
    assert not loratool.read(tmp_path / "lora").updates


def test_a_size_holds_for_stacks(tmp_path: Path) -> None:
    """Experts of one stack are stored with one rank, also those that need none."""
    before, change = normal(12, 40, 30).array(), np.zeros((12, 40, 30), np.float32)
    change[0] = normal(40, 30, seed=1).array()
    base, tuned = (samples.model(tmp_path / name, {NAME: Tensor.of(v)}) for name, v in
                   (("base", before), ("tuned", before + change)))  # fmt: skip
    loratool.extract(base, tuned, max_size=20_000, out=tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size <= 20_000
    with pytest.raises(UsageError, match="rank 1 of all modules is larger"):
        loratool.extract(base, tuned, max_size=4_000, out=tmp_path / "none")


def test_a_size_is_used_by_stacks(tmp_path: Path) -> None:
    """No further rank of all experts would fit."""
    before, change = (normal(12, 40, 30, seed=seed).array() for seed in (0, 1))
    base, tuned = (samples.model(tmp_path / name, {NAME: Tensor.of(v)}) for name, v in
                   (("base", before), ("tuned", before + change)))  # fmt: skip
    loratool.extract(base, tuned, max_size=60_000, out=tmp_path / "lora")
    size = (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    assert 60_000 - 4 * 12 * (40 + 30) - 64 < size <= 60_000
