"""The kinds that only PEFT's LoRA files have: stacked experts, trainable tokens, KaSA. Dense float64 references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.errors import FormatError, MatchError, NumericError
from loratool.kinds import built, stored
from loratool.kinds.experts import Experts
from loratool.kinds.tokens import Tokens
from loratool.kinds.truncated import Truncated
from loratool.tensors import Tensor
from loratool.update import LowRank, Update
from tests.samples import assert_same, low, normal

E, R, O, I = 4, 2, 7, 5  # noqa: E741 - the axis letters of the house


def experts(**more: Any) -> Experts:
    return Experts(normal(E * R, I), normal(O, R * E, seed=1), E, **{"alpha": 6.0} | more)


def dense(update: Experts) -> np.ndarray:
    """PEFT's own einsum over its two packings: down expert by expert, up rank by rank."""
    down = update.down.array().astype(np.float64).reshape(E, R, -1)
    up = update.up.array().astype(np.float64).reshape(-1, R, E)
    value = np.einsum("ore,eri->eoi", up, down) * update.scaling
    return value.swapaxes(1, 2) if update.order == "transposed" else value


def tokens(entries: int = 0) -> Tokens:
    return Tokens(normal(3, 4), Tensor.of(np.array([6, 0, 2])), entries)


def kasa() -> Truncated:
    return Truncated(low(7, 5, 2), normal(2, seed=5))


# -- experts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["plain", "transposed"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_a_stack_is_the_packed_product(order: Any, stabilised: bool) -> None:
    """llm trap 3: the columns of up belong to the experts in turn, not in blocks."""
    update = experts(order=order, rank_stabilised=stabilised)
    expected = dense(update)
    assert update.shape == expected.shape == ((E, I, O) if order == "transposed" else (E, O, I))
    assert update.scaling == pytest.approx(6 / (2**0.5 if stabilised else 2))
    np.testing.assert_allclose(update.delta(), expected, atol=1e-5)
    blocks = [update.delta(start, stop) for start, stop in ((0, 1), (1, 3), (3, 4))]
    np.testing.assert_array_equal(np.concatenate(blocks), update.delta())
    contiguous = update.up.array().reshape(O, E, R).transpose(0, 2, 1).reshape(O, -1)
    wrong = Experts(update.down, Tensor.of(contiguous), E, 6.0)
    assert np.abs(wrong.delta().reshape(-1) - update.delta().reshape(-1)).max() > 0.1


@pytest.mark.parametrize("order", ["plain", "transposed"])
def test_each_expert_is_a_lora_of_its_own(order: Any) -> None:
    update = experts(order=order)
    lows = [update.expert(n) for n in range(E)]
    for n, one in enumerate(lows):
        np.testing.assert_allclose(one.delta(), dense(update)[n], atol=1e-5)
    again = Experts.packed(lows)
    assert_same(again, update)


def test_experts_of_other_scalings_are_packed_exactly() -> None:
    lows = [low(O, I, R, seed=n, alpha=float(n + 1)) for n in range(E)]
    found = Experts.packed(lows)
    np.testing.assert_allclose(found.delta(), np.stack([one.delta() for one in lows]), atol=1e-5)
    with pytest.raises(FormatError, match="make no stack"):
        Experts.packed([low(), low(r=2)])


@pytest.mark.parametrize("order", ["plain", "transposed"])
def test_flipped_factors_have_the_same_delta(order: Any) -> None:
    """What PEFT calls in and out follows a flag of the model: the same change can be told either way."""
    update = experts(order=order)
    turned = update.flipped()
    assert turned.shape == update.shape and turned.down.shape == (E * R, O)
    np.testing.assert_allclose(turned.delta(), update.delta(), atol=1e-5)
    np.testing.assert_allclose(update.scaled(-2).delta(), -2 * update.delta(), atol=1e-4)


def test_the_base_decides_the_order_and_a_square_one_does_not() -> None:
    """llm traps 6 and 7: by the shapes of both factors; a square expert needs the model, or is refused."""
    free = experts(order="model")
    assert [one.shape for one in free.orders(None)] == [(E, O, I), (E, I, O)]
    square = Experts(normal(E * R, O), normal(O, R * E), E, 6.0, order="model")
    assert [one.order for one in square.orders(True)] == ["transposed"]
    assert [one.order for one in square.orders(False)] == ["plain"]
    assert Experts(square.down, square.up, E, 6.0, order="transposed").orders(False)[0].order == "transposed"
    for update, known in ((square, None), (Experts(square.down, square.up, E, order="shape"), True)):
        with pytest.raises(MatchError, match="square"):
            update.orders(known)


@pytest.mark.parametrize(
    ("down", "up", "count"),
    [((8, 5), (7, 6), 4), ((8, 5), (7, 8), 3), ((8, 5), (7, 8), 0), ((8,), (7, 8), 4), ((8, 0), (7, 8), 4)],
)
def test_a_stack_that_does_not_chain_is_refused(down: tuple[int, ...], up: tuple[int, ...], count: int) -> None:
    with pytest.raises(FormatError):
        Experts(normal(*down), normal(*up), count)


# -- tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_tokens_are_replaced(strength: float) -> None:
    """llm trap 36: rows replace, they are not added."""
    base = normal(9, 4, seed=3).array()
    expected = base.copy()
    rows = [6, 0, 2]
    expected[rows] = base[rows] + strength * (normal(3, 4).array() - base[rows])
    update = tokens().sized((9, 4))
    assert update is not None and update.shape == (9, 4)
    np.testing.assert_allclose(update.apply(base, strength), expected, atol=1e-6)
    prepared = update.prepare(Tensor.float, strength)
    blocks = [prepared.delta(a, b, base[a:b]) for a, b in ((0, 1), (1, 7), (7, 9))]
    np.testing.assert_allclose(np.concatenate(blocks), expected - base, atol=1e-6)


def test_tokens_fit_tables_that_are_long_enough() -> None:
    assert tokens().sized((9, 5)) is None and tokens().sized((9,)) is None and tokens(9).sized((10, 4)) is None
    with pytest.raises(MatchError, match="token 6 is beyond the base's 6 rows"):
        tokens().sized((6, 4))


@pytest.mark.parametrize("index", [[1, 1, 2], [0, -1, 2], [0, 1], [[0], [1], [2]], [0.0, 1.0, 2.0]])
def test_indices_that_are_no_rows_are_refused(index: Any) -> None:
    with pytest.raises(FormatError):
        Tokens(normal(3, 4), Tensor.of(np.array(index)))


# -- KaSA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_kasa_drops_the_smallest_components(shape: tuple[int, int], strength: float) -> None:
    update = Truncated(low(*shape, 2), normal(2, seed=5))
    base = normal(*shape, seed=3).array()
    u, s, v = np.linalg.svd(base.astype(np.float64), full_matrices=False)
    pair = update.direction.up.array() * update.diagonal.array() @ update.direction.down.array() * 3.0
    expected = (u[:, :-2] * s[:-2]) @ v[:-2] + pair
    np.testing.assert_allclose(update.apply(base, strength), base + strength * (expected - base), atol=1e-5)


def test_kasa_of_nan_or_of_full_rank_is_refused() -> None:
    with pytest.raises(NumericError):
        kasa().apply(np.full((7, 5), np.nan, np.float32))
    with pytest.raises(FormatError, match="drop all"):
        Truncated(low(7, 3, 3), normal(3))
    with pytest.raises(FormatError, match="diagonal"):
        Truncated(low(7, 5, 2), normal(3))
    with pytest.raises(FormatError, match="Linear"):
        Truncated(LowRank(normal(2, 5, 3), normal(7, 2, 1)), normal(2))


# -- all of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [experts(), experts(order="model"), tokens(), tokens(9), kasa()])
def test_they_are_taken_apart_and_put_together(update: Update) -> None:
    """So that `raw` carries them."""
    assert_same(built(stored(update)), update)


@pytest.mark.parametrize("update", [experts(), tokens(9), kasa()])
def test_torch_gives_the_same(update: Update) -> None:
    from loratool.devices import TorchWorker

    base = normal(*update.shape, seed=3).array()
    worker = TorchWorker("cpu")
    flat = worker.widen(base.reshape(len(base), -1))
    prepared = update.prepare(worker.load)
    if prepared.scan is not None:
        prepared.scan([(0, 3, flat[:3]), (3, len(base), flat[3:])])
    found = np.concatenate([np.asarray(prepared.delta(a, b, flat[a:b])) for a, b in ((0, 3), (3, len(base)))])
    np.testing.assert_allclose(found.reshape(base.shape), update.apply(base) - base, atol=2e-5)


def test_raw_carries_them(tmp_path: Path) -> None:
    updates = {"m.experts.up_proj": experts(), "embed_tokens": tokens(), "q": kasa(), "p": experts(order="shape")}
    whole = Adapter(updates, {}, Metadata("sample", config={"trainable_token_indices": [6, 0, 2]}))
    loratool.write(whole, tmp_path / "x.safetensors", format="raw")
    again = loratool.read(tmp_path / "x.safetensors")
    for name, update in updates.items():
        assert_same(again.updates[name], update, name)
