"""SVDs against numpy's in float64; ranks and sizes against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool import linalg
from loratool.linalg import allocate, exact_svd, rank_for_error, recompress, relative_error, truncated_svd
from tests.laws import examples


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def spectrum(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


def assert_svd(found: linalg.Truncation, dense: np.ndarray, atol: float) -> None:
    """Singular values as numpy's, orthonormal vectors, the product the matrix."""
    scale = float(np.linalg.norm(dense)) or 1.0
    count = len(found.values)
    np.testing.assert_allclose(found.values, spectrum(dense)[:count], rtol=0, atol=atol * scale)
    real = int((found.values > 1e-9 * scale).sum())
    np.testing.assert_allclose(found.up[:, :real].T @ found.up[:, :real], np.eye(real), atol=1e3 * atol)
    np.testing.assert_allclose(found.down[:real] @ found.down[:real].T, np.eye(real), atol=1e3 * atol)
    np.testing.assert_allclose((found.up * found.values) @ found.down, dense, rtol=0, atol=atol * scale)


@examples(60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))
def test_recompress_is_the_svd_of_the_product(o: int, i: int, r: int, twice: int) -> None:
    """Also with dependent columns, and with ranks beyond the matrix."""
    up, down = random(o, r), random(r, i, seed=1)
    up[:, : min(twice, r)] = up[:, [-1]]
    assert_svd(recompress(up, down), up @ down, 1e-12)


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e30])
@pytest.mark.parametrize("kind", ["independent", "dependent", "zero column", "zero", "graded", "unbalanced"])
def test_recompress_of_hard_factors(kind: str, factor: float) -> None:
    up, down = random(30, 6), random(6, 20, seed=1)
    if kind == "dependent":
        up[:, 3:] = up[:, :3] @ random(3, 3, seed=2)
    elif kind == "zero column":
        up[:, 2] = 0
    elif kind == "zero":
        up[:] = 0
    elif kind == "graded":
        up *= 10.0 ** -np.arange(6)
    elif kind == "unbalanced":
        up, down = up * 10.0 ** np.arange(6), down / 10.0 ** np.arange(6)[:, None]
    up, down = up * factor, down * factor
    found = recompress(up, down)
    assert_svd(found, up @ down, 1e-11)
    assert (found.values > 0).sum() == {"dependent": 3, "zero column": 5, "zero": 0}.get(kind, 6)
    assert found.energy == pytest.approx(np.linalg.norm(up @ down) ** 2, rel=1e-10)


def test_nearly_dependent_factors_take_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gram matrix would lose half of the digits: QR does not."""
    up, down = random(40, 4), random(4, 30, seed=1)
    up[:, 3] = up[:, 2] + 1e-7 * up[:, 3]
    down[3], down[2] = down[3] * 1e3, -down[3] * 1e3 + down[2]
    assert_svd(recompress(up, down), up @ down, 1e-12)
    monkeypatch.setattr(linalg, "_INDEPENDENT", 0.0)
    with pytest.raises(AssertionError):
        assert_svd(recompress(up, down), up @ down, 1e-12)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-9, 0.0])
def test_distance_is_that_of_the_products(size: float) -> None:
    """However close these are: no cancellation."""
    up, down = random(30, 5), random(5, 20, seed=1)
    found = recompress(up, down)
    kept = found.cut(5).factors()
    other_up, other_down = kept[0] + size * random(30, 5, seed=2), kept[1] + size * random(5, 20, seed=3)
    wide = np.longdouble
    gap = float(np.linalg.norm(up.astype(wide) @ down.astype(wide) - other_up.astype(wide) @ other_down.astype(wide)))
    assert math.sqrt(found.distance(other_up, other_down)) == pytest.approx(gap, rel=1e-4, abs=1e-12)
    smaller = found.cut(2)
    apart = np.linalg.norm(up @ down - (smaller.up * smaller.values) @ smaller.down)
    assert math.sqrt(found.distance(*smaller.factors())) == pytest.approx(apart, rel=1e-9)
    assert found.error(2) == pytest.approx(apart / np.linalg.norm(up @ down), rel=1e-9)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (1, 5), (20, 20)])
def test_exact_svd(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    assert_svd(exact_svd(matrix), matrix, 1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 4.0])
def test_truncated_svd_is_near_the_best(decay: float) -> None:
    left, right = np.linalg.qr(random(1000, 900))[0], np.linalg.qr(random(900, 900, seed=1))[0]
    values = np.arange(1, 901.0) ** -decay
    matrix = ((left * values) @ right).astype(np.float32)
    found = truncated_svd(matrix, 16)
    up, down = found.factors()
    best = math.sqrt(float(np.square(values[16:]).sum()))
    assert np.linalg.norm(matrix - up.astype(np.float64) @ down) <= best * 1.0005 + 1e-6
    again = truncated_svd(matrix, 16)
    assert (again.up == found.up).all() and (again.down == found.down).all()


# -- ranks ---------------------------------------------------------------------------------------------------


@examples(100)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.floats(0.001, 1))
def test_the_smallest_rank_that_suffices(values: list[float], error: float) -> None:
    ordered = np.array(sorted(values, reverse=True))
    energy = float(np.square(ordered).sum())
    rank = rank_for_error(ordered, energy, error)
    left = [math.sqrt(float(np.square(ordered[n:]).sum())) for n in range(len(ordered) + 1)]
    assert left[rank] <= error * left[0] * (1 + 1e-9)
    assert rank == 0 or left[rank - 1] > error * left[0] * (1 - 1e-9) or energy == 0


def test_small_rests_keep_their_digits() -> None:
    values = np.array([1.0, 1e-9, 1e-10])
    energy = float(np.square(values).sum())
    assert relative_error(values, energy, 1) == pytest.approx(math.hypot(1e-9, 1e-10), rel=1e-9)
    assert [rank_for_error(values, energy, e) for e in (1e-8, 5e-10, 5e-11)] == [1, 2, 3]
    assert relative_error(values[:1], 4.0, 1) == pytest.approx(math.sqrt(0.75))
    assert rank_for_error(np.array([2.0, 0.0, 0.0]), 4.0, 1e-9) == 1


def test_all_energy_is_the_true_rank() -> None:
    up = np.repeat(random(9, 2), 2, axis=1)
    found = recompress(up, random(4, 7, seed=1))
    assert rank_for_error(found.values, found.energy, linalg.error_for_energy(1.0)) == 2


@examples(40)
@given(st.integers(0, 60), st.integers(0, 1000))
def test_an_allocation_is_within_one_rank_of_the_best(budget: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spectra = {name: np.sort(rng.random(3) * 10.0 ** rng.integers(-1, 2))[::-1] for name in "abc"}
    costs = {name: int(rng.integers(1, 10)) for name in "abc"}

    def kept(ranks: tuple[int, ...]) -> float:
        return sum(float(np.square(spectra[n][:r]).sum()) for n, r in zip("abc", ranks, strict=True))

    def price(ranks: tuple[int, ...]) -> int:
        return sum(costs[n] * r for n, r in zip("abc", ranks, strict=True))

    found = tuple(allocate(spectra, costs, budget).values())
    assert price(found) <= budget
    best = max(kept(ranks) for ranks in itertools.product(range(4), repeat=3) if price(ranks) <= budget)
    assert kept(found) >= best - max(float(values[0]) ** 2 for values in spectra.values())
    if len(set(costs.values())) == 1:
        assert kept(found) == pytest.approx(best)
    left = budget - price(found)
    assert all(costs[n] > left for n, r in zip("abc", found, strict=True) if r < 3 and spectra[n][r] > 0)
