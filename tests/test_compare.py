"""Adapters are compared by what they do, whatever their factors look like."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.errors import MatchError
from loratool.ops.compare import norm, product_norm
from loratool.tensors import Tensor
from loratool.update import Dense, DoRA, LowRank, Sum, Update
from tests import samples
from tests.laws import examples
from tests.samples import lora_file, low, magnitude, normal


def adapter(**updates: Update) -> Adapter:
    return Adapter({k.replace("__", "."): u for k, u in updates.items()}, {}, Metadata("test"))


def dense(update: Any) -> np.ndarray:
    return np.asarray(update.delta(), np.float64)


def expected(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Relative difference and cosine in dense float64."""
    one, other = (np.concatenate([pair[n].reshape(-1) for pair in pairs]) for n in (0, 1))
    apart = np.linalg.norm(one - other) / np.linalg.norm(one)
    return float(apart), float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def gauged(update: LowRank, seed: int = 7) -> LowRank:
    """The same delta from other factors: up R, R^-1 down."""
    turn = np.random.default_rng(seed).standard_normal((update.rank, update.rank)) + 2 * np.eye(update.rank)
    up, down = update.up.array().astype(np.float64), update.down.array().astype(np.float64)
    turned = np.linalg.inv(turn) @ down.reshape(len(down), -1)
    up = (up.reshape(up.shape[:2]) @ turn).reshape(up.shape)
    return replace(update, up=Tensor.of(up), down=Tensor.of(turned.reshape(down.shape)))


@examples(60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.floats(0.1, 4))
def test_factors_give_the_dense_result(o: int, i: int, r: int, other_r: int, alpha: float) -> None:
    """Also where the ranks differ, or are larger than the matrix."""
    one, other = low(o, i, r, alpha=alpha), low(o, i, other_r, seed=5)
    found = loratool.compare(adapter(m=one), adapter(m=other))
    apart, cosine = expected([(dense(one), dense(other))])
    assert found.relative_difference == pytest.approx(apart, rel=1e-5)
    assert found.cosine == pytest.approx(cosine, abs=1e-5)
    assert norm(one) == pytest.approx(float(np.linalg.norm(dense(one))), rel=1e-6)


def test_the_whole_adapter_counts_by_size() -> None:
    """Frobenius over all modules, not the mean over them."""
    ones = {"a": low(), "b": low(9, 4, seed=3, alpha=0.5), "c": low(7, 5, 2, 3, 3)}
    others = {"a": low(seed=8), "b": low(9, 4, 1, seed=3), "c": low(7, 5, 3, 3, 3, seed=2)}
    found = loratool.compare(adapter(**ones), adapter(**others))
    apart, cosine = expected([(dense(ones[n]), dense(others[n])) for n in ones])
    assert found.relative_difference == pytest.approx(apart, rel=1e-5)
    assert found.cosine == pytest.approx(cosine, abs=1e-5)
    for module in found.modules:
        pair = [(dense(ones[module.module]), dense(others[module.module]))]
        assert (module.relative_difference, module.cosine) == pytest.approx(expected(pair), rel=1e-4)


@pytest.mark.parametrize("update", [low(), low(7, 5, 3, 3, 2), low(2, 3, 9), low(layer="embedding")])
def test_it_is_blind_to_the_gauge(update: LowRank) -> None:
    found = loratool.compare(adapter(m=update), adapter(m=gauged(update)))
    assert found.relative_difference < 1e-6
    assert found.cosine == pytest.approx(1.0)


def test_it_is_blind_to_alpha_rank_and_form() -> None:
    """Scaling folded in, padded ranks, sums, cores, whole deltas, 1x1 kernels: the same update."""
    one = low()
    scaled = replace(one, alpha=3.0, up=Tensor.of(2 * one.up.array()))
    padded = LowRank(
        Tensor.of(np.vstack((one.down.array(), normal(2, 5).array()))),
        Tensor.of(np.hstack((one.up.array(), np.zeros((7, 2), np.float32)))),
        alpha=10.0,
    )
    halves = Sum((one.scaled(0.5), one.scaled(0.5)))
    whole = Dense(Tensor.of(one.delta()))
    kernel = replace(one, down=one.down.reshape(3, 5, 1, 1), up=one.up.reshape(7, 3, 1, 1))
    for other in (scaled, padded, halves, whole, kernel):
        assert loratool.compare(adapter(m=one), adapter(m=other)).relative_difference < 1e-6
        assert loratool.compare(adapter(m=other), adapter(m=one)).relative_difference < 1e-6
    core = samples.tucker(7, 5, 3, 3)
    folded = Dense(Tensor.of(core.delta()))
    assert loratool.compare(adapter(m=core), adapter(m=folded)).relative_difference < 1e-6


def test_the_same_adapter_differs_by_exactly_nothing() -> None:
    same = {name: u for name, u in samples.ADDITIVE.items()}
    found = loratool.compare(adapter(**same), adapter(**same))
    assert found.relative_difference == 0.0 and found.cosine == pytest.approx(1.0)
    assert not found.only_in_first and not found.only_in_second


def test_a_transposed_layer_is_compared_as_it_acts() -> None:
    plain = low(6, 6)
    found = loratool.compare(adapter(m=plain), adapter(m=plain.oriented("transposed")))
    assert found.relative_difference < 1e-6


@pytest.mark.parametrize(("by", "apart", "cosine"), [(2.0, 1.0, 1.0), (-1.0, 2.0, -1.0), (0.0, 1.0, 0.0)])
def test_multiples(by: float, apart: float, cosine: float) -> None:
    found = loratool.compare(adapter(m=low()), adapter(m=low().scaled(by)))
    assert found.relative_difference == pytest.approx(apart)
    assert found.cosine == pytest.approx(cosine)


def test_nothing_against_something_is_infinitely_far() -> None:
    zero = low().scaled(0.0)
    assert loratool.compare(adapter(m=zero), adapter(m=low())).relative_difference == math.inf
    assert loratool.compare(adapter(m=zero), adapter(m=zero)).relative_difference == 0.0


# -- what only one of them has -------------------------------------------------------------------------------


def test_modules_of_one_side_are_named_and_count_in_full() -> None:
    one = replace(adapter(a=low(), b=low(seed=3)), carried={"head.weight": normal(2), "x.bias": normal(2)})
    other = replace(adapter(a=low(), c=low(seed=4)), carried={"head.weight": normal(2), "y.bias": normal(2)})
    found = loratool.compare(one, other)
    assert found.only_in_first == ("b", "x.bias") and found.only_in_second == ("c", "y.bias")
    zero = np.zeros((7, 5))
    a, b, c = (dense(u) for u in (low(), low(seed=3), low(seed=4)))
    assert found.relative_difference == pytest.approx(expected([(a, a), (b, zero), (zero, c)])[0], rel=1e-5)
    assert [module.module for module in found.modules] == ["a"]


def test_prefixes_do_not_matter() -> None:
    """The same modules under the names of transformers 4 and 5, or without the class prefix."""
    one = adapter(model__layers__0__q=low(), model__layers__1__q=low(seed=3))
    for prefix in ("", "model__language_model__", "base__model__"):
        other = adapter(**{f"{prefix}layers__{n}__q": u for n, u in enumerate(one.updates.values())})
        found = loratool.compare(one, other)
        assert found.relative_difference == 0.0 and len(found.modules) == 2
        assert not found.only_in_first and not found.only_in_second


def test_carried_tensors_that_differ_are_named() -> None:
    """CLI law 1 for comparisons: two heads of one name and other values are not the same adapter."""
    one = replace(adapter(a=low()), carried={"head.weight": normal(2), "norm.weight": normal(3)})
    other = replace(adapter(a=low()), carried={"head.weight": normal(2, seed=1), "norm.weight": normal(3)})
    found = loratool.compare(one, other)
    assert "head.weight" in found.only_in_first and "head.weight" in found.only_in_second
    assert "norm.weight" not in found.only_in_first


# -- kinds that need the base --------------------------------------------------------------------------------


def test_dora_needs_the_base(tmp_path: Path) -> None:
    update = DoRA(low(), magnitude(7))
    one, other = adapter(q=update), adapter(q=low(seed=3))
    for pair in ((one, other), (other, one)):
        with pytest.raises(MatchError, match="needs the base") as caught:
            loratool.compare(*pair)
        assert caught.value.exit_code == 4 and "--base" in caught.value.hint
    base = normal(7, 5, seed=40)
    folder = samples.model(tmp_path / "base", {"q.weight": base})
    found = loratool.compare(one, other, base=folder)
    plain = base.array().astype(np.float64)
    apart, cosine = expected([(update.apply(plain) - plain, dense(low(seed=3)))])
    assert (found.relative_difference, found.cosine) == pytest.approx((apart, cosine), rel=1e-5)
    back = loratool.compare(other, one, base=folder)
    assert back.cosine == pytest.approx(cosine, rel=1e-5)
    assert loratool.compare(one, one, base=folder).relative_difference == 0.0


def test_dora_on_a_transposed_layer_is_turned_as_the_base_is(tmp_path: Path) -> None:
    update = DoRA(low(6, 6), magnitude(6))  # the file does not say that the base stores it transposed
    base = normal(6, 6, seed=40)
    folder = samples.model(tmp_path / "base", {"h.0.mlp.c_proj.weight": base}, {"model_type": "gpt2"})
    name = "h__0__mlp__c_proj"
    found = loratool.compare(adapter(**{name: update}), adapter(**{name: low(6, 6, seed=3)}), base=folder)
    plain = base.array().astype(np.float64)
    apart, _ = expected([(update.apply(plain.T).T - plain, dense(low(6, 6, seed=3)).T)])
    assert found.relative_difference == pytest.approx(apart, rel=1e-5)


def test_dora_by_columns_and_blocks_against_the_dense_result(tmp_path: Path) -> None:
    update, other = DoRA(low(700, 900, 4), magnitude(900), axis=1), low(700, 900, 2, seed=3)
    base = normal(700, 900, seed=40)
    folder = samples.model(tmp_path / "base", {"q.weight": base})
    found = loratool.compare(adapter(q=update), adapter(q=other), base=folder)
    plain = base.array().astype(np.float64)
    apart, _ = expected([(update.apply(plain) - plain, dense(other))])
    assert found.relative_difference == pytest.approx(apart, rel=1e-5)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(MatchError, match="shapes differ"):
        loratool.compare(adapter(m=low()), adapter(m=low(7, 6)))


def test_files_of_two_formats_are_compared(tmp_path: Path) -> None:
    one = lora_file(tmp_path / "raw", {"layers.0.q_proj": low()})
    other = samples.peft_folder(tmp_path / "peft", samples.peft_pair("layers.0.q_proj"))
    assert loratool.compare(one, other).relative_difference == 0.0


def test_the_norm_of_a_product_is_exact_where_it_cancels() -> None:
    """Squares of differences would lose half of the digits; QR does not."""
    up = np.random.default_rng(0).standard_normal((50, 4))
    down = np.random.default_rng(1).standard_normal((4, 60))
    stacked = np.hstack((up, -up)), np.vstack((down, down * (1 + 1e-12)))
    assert product_norm(*stacked) == pytest.approx(1e-12 * np.linalg.norm(up @ down), rel=1e-2)
