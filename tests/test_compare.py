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
from loratool.kinds.experts import Experts
from loratool.ops.compare import norm, product_norm
from loratool.tensors import Tensor
from loratool.update import Dense, DoRA, LowRank, Sum, Update, stack
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


# -- the same experts, one by one and in stacks ----------------------------------------------------------------


def experts(kind: str, *, square: bool = False, rank_up: int = 2) -> tuple[Adapter, Adapter]:
    """One adapter of three experts, one by one and stacked as a model of type ``kind`` has them."""
    o, i = (6, 6) if square else (6, 4)
    gates = [low(o, i, 2, seed=2 * n) for n in range(3)]
    ups = [low(o, i, rank_up, seed=30 + 2 * n) for n in range(3)]
    downs = [low(i, o, 2, seed=60 + 2 * n) for n in range(3)]
    lists = {"gate_proj": gates, "up_proj": ups, "down_proj": downs}
    alone = {f"layers.0.mlp.experts.{n}.{leaf}": many[n] for leaf, many in lists.items() for n in range(3)}
    both = [stack([gate, up], (o, o)) for gate, up in zip(gates, ups, strict=True)]
    if kind == "gpt_oss":  # gate and up take turns
        order = np.arange(2 * o).reshape(2, o).T.reshape(-1)
        both = [replace(one, up=Tensor.of(one.up.array()[order])) for one in both if isinstance(one, LowRank)]
    stacks = {"gate_up_proj": Experts.packed([one for one in both if isinstance(one, LowRank)])}
    stacks["down_proj"] = Experts.packed(downs)
    if kind == "gpt_oss":
        stacks = {leaf: update.flipped() for leaf, update in stacks.items()}
    metadata = Metadata("test", base_config={"model_type": kind})
    other = {f"model.layers.0.mlp.experts.{leaf}": update for leaf, update in stacks.items()}
    return Adapter(alone, {}, metadata), Adapter(other, {}, metadata)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("kind", "square"), [("mixtral", False), ("qwen3_moe", True), ("gpt_oss", False)])
def test_experts_one_by_one_are_the_stack_of_them(kind: str, square: bool, back: bool) -> None:
    """Of gate and up the factors are one above the other: rank 2 r. llm trap 5: and alpha keeps the scaling."""
    alone, stacked = experts(kind, square=square)
    found = loratool.compare(*((stacked, alone) if back else (alone, stacked)))
    assert found.relative_difference < 1e-6 and len(found.modules) == 9
    assert not found.only_in_first and not found.only_in_second


def test_an_expert_that_differs_is_named() -> None:
    alone, stacked = experts("mixtral")
    name = "layers.0.mlp.experts.1.up_proj"
    other = replace(alone, updates={**alone.updates, name: alone.updates[name].scaled(2.0)})  # type: ignore[attr-defined]
    far = {m.module: m.relative_difference for m in loratool.compare(other, stacked).modules}
    assert far.pop(name) == pytest.approx(0.5)
    assert max(far.values()) < 1e-6


def test_experts_of_a_stack_that_only_pad_it_are_none() -> None:
    """A stack has a place for each expert; zeros in it are no update."""
    alone, stacked = experts("mixtral")
    name = "layers.0.mlp.experts.1.down_proj"
    less = replace(alone, updates={n: u for n, u in alone.updates.items() if n != name})
    downs = [low(4, 6, 2, seed=60), low(4, 6, 2).scaled(0.0), low(4, 6, 2, seed=64)]
    padded = replace(
        stacked, updates={**stacked.updates, "model.layers.0.mlp.experts.down_proj": Experts.packed(downs)}
    )
    found = loratool.compare(less, padded)
    assert found.relative_difference < 1e-6 and not found.only_in_second
    found = loratool.compare(less, stacked)  # there it is more than padding
    assert found.only_in_second == ("layers.0.mlp.experts.1.down_proj",)


def test_halves_that_nothing_tells_apart_are_refused() -> None:
    alone, stacked = (one.with_metadata(base_config={}) for one in experts("mixtral"))
    with pytest.raises(MatchError, match="gate and up") as caught:
        loratool.compare(alone, stacked)
    assert "--base" in caught.value.hint


# -- the work it is spared -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1.0, 1e-2, 1e-5, 1e-9, 1e-13])
def test_small_differences_are_as_exact_as_large_ones(step: float) -> None:
    """From products of factors with themselves where that suffices, from QR where squares would cancel."""
    one = low(40, 30, 4)
    up, down = (one.slots[slot].array().astype(np.float64) for slot in ("up", "down"))
    turn = np.random.default_rng(2).standard_normal(up.shape)
    other = replace(one, up=Tensor.of(up + step * turn), down=Tensor.of(down))
    first = replace(one, up=Tensor.of(up), down=Tensor.of(down))
    found = loratool.compare(adapter(m=first), adapter(m=other))
    written = np.asarray(up + step * turn) - up  # what the sum could hold of the step
    exact = np.linalg.norm(written @ down) / np.linalg.norm(up @ down)
    assert found.relative_difference == pytest.approx(exact, rel=1e-5)


def test_only_what_is_nearly_the_same_is_factored(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any, **options: Any) -> None:
        raise AssertionError("QR of factors that are equal, or far apart")

    monkeypatch.setattr(np.linalg, "qr", never)
    one, other = low(40, 30, 4), low(40, 30, 4, seed=3)
    apart, cosine = expected([(dense(one), dense(other))])
    found = loratool.compare(adapter(m=one), adapter(m=other))
    assert (found.relative_difference, found.cosine) == pytest.approx((apart, cosine), abs=1e-5)
    twin = replace(one, up=Tensor.of(one.up.array().copy()))
    same = loratool.compare(adapter(m=one), adapter(m=twin))
    assert (same.relative_difference, same.cosine) == (0.0, pytest.approx(1.0))


# -- whole tensors -------------------------------------------------------------------------------------------


def test_without_the_base_whole_tensors_are_named_and_not_counted() -> None:
    """What they change is not known: only what they are."""
    one = replace(adapter(a=low()), carried={"head.weight": normal(2, 3), "norm.weight": normal(3)})
    other = replace(adapter(a=low()), carried={"head.weight": normal(2, 3, seed=1), "norm.weight": normal(3)})
    found = loratool.compare(one, other)
    assert found.relative_difference == 0.0 and found.not_counted == ("head.weight",)


def test_with_the_base_whole_tensors_count_as_what_they_change(tmp_path: Path) -> None:
    base = {"a.weight": normal(7, 5), "head.weight": normal(4, 3, seed=8), "wte.weight": normal(4, 3, seed=9)}
    folder = samples.model(tmp_path / "base", base)
    more, fewer = normal(6, 3, seed=1), normal(2, 3, seed=2)
    ones = {"head.weight": normal(4, 3, seed=3), "wte.weight": more, "score.weight": normal(2, 2)}
    others = {"head.weight": normal(4, 3, seed=4), "wte.weight": fewer, "new.weight": normal(2, 2, seed=5)}
    found = loratool.compare(
        replace(adapter(a=low()), carried=ones), replace(adapter(a=low(seed=3)), carried=others), base=folder
    )
    head, table = (base[name].array().astype(np.float64) for name in ("head.weight", "wte.weight"))
    grown = more.array() - np.vstack((table, np.zeros((2, 3))))  # rows that the base does not have are new
    none = np.zeros((2, 2))
    pairs = [
        (dense(low()), dense(low(seed=3))),
        (ones["head.weight"].array() - head, others["head.weight"].array() - head),
        (grown, np.zeros((6, 3))),
        (np.zeros((2, 3)), fewer.array() - table[:2]),
        (ones["score.weight"].array(), none),
        (none, others["new.weight"].array()),
    ]
    assert (found.relative_difference, found.cosine) == pytest.approx(expected(pairs), rel=1e-5)
    assert {m.module: m.relative_difference for m in found.modules} == pytest.approx(
        {"a": expected(pairs[:1])[0], "head.weight": expected(pairs[1:2])[0]}, rel=1e-5
    )
    assert found.only_in_first == ("wte.weight", "score.weight")
    assert found.only_in_second == ("wte.weight", "new.weight")
    assert not found.not_counted
