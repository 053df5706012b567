"""Combining adapters: each method against its definition, written here entry by entry in float64, and against PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool import cli
from loratool.adapter import Adapter, Metadata
from loratool.errors import MatchError, NumericError, UsageError
from loratool.ops.combine import ALIASES, METHODS, Recipe, combine, drop, elect, tied_knots, trim
from loratool.ops.spectral import Result
from loratool.tensors import Tensor
from loratool.update import Dense, LowRank, Update
from tests import models
from tests.samples import UPDATES, fingerprint, lora_file, low

OUT, IN = 9, 8  # outputs, inputs
FULL = 8  # the rank at which every result is exact
DENSE_METHODS = [m for m in METHODS if m not in ("linear", "svd")]


def adapter(**updates: Update) -> Adapter:
    return Adapter({name.replace("__", "."): update for name, update in updates.items()}, {}, Metadata("sample"))


def three() -> list[Adapter]:
    """Three adapters of one module: other ranks and scalings."""
    lows = low(OUT, IN, 2, seed=1), low(OUT, IN, 3, seed=5, alpha=4.0), low(OUT, IN, 1, seed=9, rank_stabilised=True)
    return [adapter(layer=one) for one in lows]


def exact(of: Adapter, name: str = "layer") -> np.ndarray:
    """scaling x up @ down in float64."""
    update = of.updates[name]
    assert isinstance(update, LowRank)
    up, down = update.up.float().astype(np.float64), update.down.float().astype(np.float64)
    return update.scaling * up @ down.reshape(len(down), -1)


def combined(adapters: Sequence[Adapter], method: str, strengths: Sequence[float] | None = None, **more: Any) -> Result:
    return combine(adapters, Recipe(method, **{"rank": FULL} | more), strengths)


def delta(result: Result, name: str = "layer") -> np.ndarray:
    return np.asarray(result.adapter.updates[name].delta(), np.float64)  # type: ignore[attr-defined]


def assert_close(one: np.ndarray, other: np.ndarray, within: float = 1e-5) -> None:
    assert np.linalg.norm(one - other) <= within * np.linalg.norm(other), np.linalg.norm(one - other)


# -- the definitions, entry by entry -------------------------------------------------------------------------


def trimmed(values: np.ndarray, density: float) -> np.ndarray:
    kept = sorted(range(values.size), key=lambda n: -abs(values.flat[n]))[
        : round(np.floor(density * values.size + 1e-9))
    ]
    made = np.zeros_like(values)
    for n in kept:
        made.flat[n] = values.flat[n]
    return made


def elected(values: Sequence[np.ndarray]) -> np.ndarray:
    made = np.zeros_like(values[0])
    for n in range(made.size):
        entries = [v.flat[n] for v in values]
        agreeing = [e for e in entries if e * sum(entries) > 0]
        made.flat[n] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return made


def ties_reference(values: Sequence[np.ndarray], strengths: Sequence[float], density: float) -> np.ndarray:
    return elected([s * trimmed(v, density) for v, s in zip(values, strengths, strict=True)])


def pruned_reference(values: Sequence[np.ndarray], strengths: Sequence[float], density: float) -> np.ndarray:
    return np.asarray(sum(s * trimmed(v, density) for v, s in zip(values, strengths, strict=True)))


def knots_reference(values: Sequence[np.ndarray], strengths: Sequence[float], density: float) -> np.ndarray:
    """From the dense matrices, side by side."""
    left, sizes, right = np.linalg.svd(np.hstack([s * v for v, s in zip(values, strengths, strict=True)]))
    count = int((sizes > 1e-9 * sizes[0]).sum())
    coordinates = np.split(sizes[:count, None] * right[:count], len(values), axis=1)
    return np.asarray(left[:, :count] @ elected([trimmed(c, density) for c in coordinates]))


REFERENCES = {"ties": ties_reference, "magnitude_prune": pruned_reference, "knots": knots_reference}


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("density", [0.2, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("strengths", [(1.0, 1.0, 1.0), (0.5, 2.0, -1.0), (1.0, 0.0, 3.0)])
def test_a_method_is_its_definition(method: str, density: float, strengths: tuple[float, ...]) -> None:
    adapters = three()
    found = combined(adapters, method, strengths, density=density)
    assert_close(delta(found), REFERENCES[method]([exact(a) for a in adapters], strengths, density))
    assert found.relative_error < 1e-6


@pytest.mark.parametrize("rank", [None, 1, 2, 5])
def test_linear_and_svd_are_the_sum_and_its_best_rank(rank: int | None) -> None:
    adapters, strengths = three(), (1.0, -2.0, 0.5)
    whole = sum(s * exact(a) for a, s in zip(adapters, strengths, strict=True))
    left, sizes, right = np.linalg.svd(whole, full_matrices=False)
    for method, default in (("linear", 6), ("svd", 3)):
        found = combined(adapters, method, strengths, rank=rank)
        kept = rank or default
        assert found.adapter.updates["layer"].rank == kept
        assert_close(delta(found), left[:, :kept] * sizes[:kept] @ right[:kept])
        assert found.relative_error == pytest.approx(np.sqrt((sizes[kept:] ** 2).sum() / (sizes**2).sum()), abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_error_is_that_of_what_was_written(method: str, dtype: str) -> None:
    adapters = [
        adapter(layer=replace(u, up=u.up.cast(dtype), down=u.down.cast(dtype)))
        for u in (a.updates["layer"] for a in three())
        if isinstance(u, LowRank)
    ]
    wide = [adapter(layer=replace(u, up=u.up.cast("F32"), down=u.down.cast("F32"))) for u in lows(adapters)]
    whole = delta(combined(wide, method))
    found = combined(adapters, method, rank=2)
    assert found.adapter.updates["layer"].slots["up"].dtype == dtype
    assert_relative = np.linalg.norm(delta(found) - whole) / np.linalg.norm(whole)
    assert found.relative_error == pytest.approx(assert_relative, rel=1e-4)
    assert found.modules[0].relative_error == found.relative_error


def lows(adapters: Sequence[Adapter]) -> list[LowRank]:
    return [u for a in adapters for u in a.updates.values() if isinstance(u, LowRank)]


def test_without_a_rank_each_module_keeps_its_largest() -> None:
    first = adapter(a=low(OUT, IN, 2, seed=1), b=low(OUT, IN, 1, seed=2))
    second = adapter(a=low(OUT, IN, 3, seed=3), c=low(OUT, IN, 4, seed=4))
    for method in DENSE_METHODS:
        ranks = {n: u.rank for n, u in combined([first, second], method, rank=None).adapter.updates.items()}
        assert ranks == {"a": 3, "b": 1, "c": 4}


def test_a_large_module_is_factored_near_its_best_rank() -> None:
    adapters = [adapter(layer=low(900, 800, 4, seed=seed)) for seed in (1, 5)]
    found = combined(adapters, "ties", rank=16)
    whole = elect(np.stack([trim(exact(a).astype(np.float32), 0.5).astype(np.float64) for a in adapters]))
    sizes = np.linalg.svd(whole, compute_uv=False)
    best = np.sqrt((sizes[16:] ** 2).sum() / (sizes**2).sum())
    assert best <= found.relative_error * (1 + 1e-6) <= best * 1.0005
    assert found.relative_error == pytest.approx(np.linalg.norm(delta(found) - whole) / np.linalg.norm(whole), rel=1e-5)


# -- DARE ----------------------------------------------------------------------------------------------------


def test_dare_keeps_with_the_probability_and_rescales() -> None:
    values = np.ones((300, 301), np.float32)
    for density in (0.1, 0.5, 0.9):
        found = drop(values, density, 0, "layer", 0)
        assert set(np.unique(found)) == {np.float32(0), np.float32(1) / np.float32(density)}
        spread = np.sqrt(density * (1 - density) / values.size)
        assert abs((found != 0).mean() - density) < 4 * spread
    assert drop(values, 1.0, 0, "layer", 0) is values


def test_the_draws_depend_on_seed_module_and_adapter_only() -> None:
    values = np.ones((600, 700), np.float32)  # more than one block
    one = drop(values, 0.5, 3, "layer", 1)
    assert np.array_equal(one, drop(values, 0.5, 3, "layer", 1))
    for other in (drop(values, 0.5, 4, "layer", 1), drop(values, 0.5, 3, "other", 1), drop(values, 0.5, 3, "layer", 2)):
        assert 0.49 < ((one != 0) == (other != 0)).mean() < 0.51
    half = one.reshape(-1) != 0
    assert 0.49 < (half[: 1 << 17] == half[1 << 18 : (1 << 18) + (1 << 17)]).mean() < 0.51, "blocks draw alike"


def test_the_draws_are_the_same_on_every_version_and_machine() -> None:
    kept = drop(np.ones(16, np.float32), 0.5, 0, "layer", 0) != 0
    assert "".join("01"[int(k)] for k in kept) == "1000011011111000"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_its_definition(method: str) -> None:
    adapters, strengths = three(), (1.0, 0.5, -1.0)
    dropped = [
        s * exact(a) * drop(np.ones((OUT, IN), np.float32), 0.4, 7, "layer", n)
        for n, (a, s) in enumerate(zip(adapters, strengths, strict=True))
    ]
    expected = sum(dropped) if method == "dare_linear" else elected(dropped)
    found = combined(adapters, method, strengths, density=0.4, seed=7)
    assert_close(delta(found), np.asarray(expected))
    assert not np.allclose(delta(combined(adapters, method, strengths, density=0.4, seed=8)), delta(found))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_other_modules_do_not_change_what_is_dropped(method: str) -> None:
    alone = combined([adapter(layer=low(OUT, IN)), adapter(layer=low(OUT, IN, seed=5))], method)
    first = adapter(before=low(OUT, IN, seed=3), layer=low(OUT, IN))
    beside = combined([first, adapter(layer=low(OUT, IN, seed=5), before=low(OUT, IN, seed=4))], method)
    assert np.array_equal(delta(alone), delta(beside))


# -- laws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dare_linear", "magnitude_prune", "svd"])
def test_at_density_one_it_is_the_sum(method: str) -> None:
    density = None if method == "svd" else 1.0
    assert_close(delta(combined(three(), method, density=density)), delta(combined(three(), "linear", rank=None)))


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_at_density_one_it_is_the_mean_of_the_elected_sign(method: str) -> None:
    assert_close(delta(combined(three(), method, density=1.0)), elected([exact(a) for a in three()]))


@pytest.mark.parametrize("method", METHODS)
def test_how_an_update_is_factored_does_not_matter(method: str) -> None:
    """B R and R^-1 A are the same update: methods on factors fail this."""
    other = []
    for update in lows(three()):
        mix = np.random.default_rng(update.rank).standard_normal((update.rank, update.rank)) + 2 * np.eye(update.rank)
        up, down = update.up.float() @ mix, np.linalg.solve(mix, update.down.float())
        other.append(adapter(layer=replace(update, up=Tensor.of(np.float32(up)), down=Tensor.of(np.float32(down)))))
    assert_close(delta(combined(other, method)), delta(combined(three(), method)), 2e-5)


@pytest.mark.parametrize("method", ["linear", "svd", "ties", "magnitude_prune", "knots"])
@pytest.mark.parametrize("strengths", [(1.0, 1.0, 1.0), (0.3, 0.7, -1.1)])
def test_the_order_of_adapters_does_not_matter(method: str, strengths: tuple[float, ...]) -> None:
    forth = combined(three(), method, strengths)
    back = combined(three()[::-1], method, strengths[::-1])
    assert_close(delta(back), delta(forth))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_bytes(method: str) -> None:
    one, other = (combined(three(), method, rank=3).adapter.updates["layer"].slots for _ in range(2))
    assert all(one[slot].same_bytes(other[slot]) for slot in one)


def test_a_module_that_some_lack_has_no_voice_there() -> None:
    one, other = low(OUT, IN, seed=1), low(OUT, IN, seed=5)
    adapters = [adapter(layer=one, alone=other), adapter(layer=other), adapter(layer=low(OUT, IN, seed=9))]
    alone = np.asarray(other.delta(), np.float64)
    assert_close(delta(combined(adapters, "ties", density=1.0), "alone"), alone)
    assert_close(delta(combined(adapters, "ties", density=0.5), "alone"), trimmed(alone, 0.5))
    assert_close(delta(combined(adapters, "dare_linear", [3, 1, 1], density=1.0), "alone"), 3 * alone)


def test_opposite_updates_elect_no_sign() -> None:
    one = low(OUT, IN)
    for method in ("ties", "knots", "svd", "magnitude_prune"):
        result = combined([adapter(layer=one), adapter(layer=one)], method, (1.0, -1.0))
        assert not result.adapter.updates, method
        assert result.relative_error == 0


def test_trimming_keeps_the_exact_count_and_the_first_of_equals() -> None:
    values = np.array([[1, -1, 1, 2], [1, 1, -3, 1]], np.float32)
    assert trim(values, 0.5).tolist() == [[1, -1, 0, 2], [0, 0, -3, 0]]
    assert trim(values, 1e-9).tolist() == [[0, 0, 0, 0], [0, 0, -3, 0]], "at least one"
    assert np.count_nonzero(trim(np.ones(100, np.float32), 0.29)) == 29, "0.29 x 100 is 28.999999999999996"
    assert np.count_nonzero(trim(np.zeros(4, np.float32), 0.5)) == 0


def test_an_election_takes_the_strengths_into_account() -> None:
    assert elect(np.array([[3.0], [-1.0], [-1.0]])).tolist() == [3.0]
    assert elect(np.array([[1.5], [-1.0], [-1.0]])).tolist() == [-1.0]
    assert elect(np.array([[2.0], [0.0], [4.0]])).tolist() == [3.0], "a zero has no voice"
    assert elect(np.array([[1.0], [-1.0]])).tolist() == [0.0]


def test_knots_needs_no_dense_matrix() -> None:
    """Rows 10^6 x 10^6 apart would not fit: the factors alone do."""
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal((200_000, 2)), rng.standard_normal((2, 100_000))) for _ in range(2)]
    up, down = tied_knots(pairs, 1.0)
    assert up.shape == (200_000, 4) and down.shape == (4, 100_000)
    assert np.allclose(up.T @ up, np.eye(4))


def test_knots_on_planted_tasks() -> None:
    """What the docstring says, small: untuned, on tasks that share a part, below ties, and both below the plain sum."""
    losses: dict[str, list[float]] = {"linear": [], "ties": [], "knots": []}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        common = rng.standard_normal((24, 2)) @ rng.standard_normal((2, 24))
        tasks = [4 * common + rng.standard_normal((24, 4)) @ rng.standard_normal((4, 24)) for _ in range(6)]
        adapters = []
        for task in tasks:
            left, sizes, right = np.linalg.svd(task)
            factors = np.float32(left[:, :6] * sizes[:6]), np.float32(right[:6])
            adapters.append(adapter(layer=LowRank(Tensor.of(factors[1]), Tensor.of(factors[0]))))
        for method, found in losses.items():
            merged = delta(combined(adapters, method, rank=24))
            found.append(np.mean([np.linalg.norm(merged - t) / np.linalg.norm(t) for t in tasks]))
    assert np.mean(losses["knots"]) < np.mean(losses["ties"]) < np.mean(losses["linear"])


# -- kinds, layers, what is no matrix ------------------------------------------------------------------------


@pytest.mark.parametrize("method", DENSE_METHODS)
@pytest.mark.parametrize("name", [n for n, u in UPDATES.items() if not u.needs_base and n != "lora_alpha_zero"])
def test_every_additive_kind(method: str, name: str) -> None:
    """At density 1 one adapter alone comes back, whatever its kind and layer."""
    update = UPDATES[name]
    found = combined([adapter(layer=update)], method, density=1.0, rank=None)
    made = found.adapter.updates["layer"]
    assert made.shape == update.shape
    whole = isinstance(made, Dense)  # which is held as the base stores it
    assert whole or getattr(made, "layer", "plain") == getattr(update, "layer", "plain")
    assert_close(delta(found), np.asarray(update.delta()), 1e-2 if "bfloat16" in name else 1e-5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", DENSE_METHODS)
def test_the_orientation_of_the_stored_weight_does_not_matter(method: str) -> None:
    plain = combined(three(), method, rank=2)
    turned = combined([adapter(layer=u.oriented("transposed")) for u in lows(three())], method, rank=2)
    hint = [adapter(layer=u.oriented("plain" if n else "transposed")) for n, u in enumerate(lows(three()))]
    for result in (turned, combined(hint, method, rank=2)):
        assert result.adapter.updates["layer"].shape == (IN, OUT)
        assert_close(delta(result).T, delta(plain))
        assert result.relative_error == pytest.approx(plain.relative_error, rel=1e-5)


@pytest.mark.parametrize("method", DENSE_METHODS)
def test_convolutions_biases_and_whole_matrices(method: str) -> None:
    def one(seed: int) -> Adapter:
        rng = np.random.default_rng(seed)
        bias, whole = (Tensor.of(rng.standard_normal(shape, np.float32)) for shape in ((OUT,), (OUT, IN)))
        conv, flat = low(OUT, 4, 2, 3, 3, seed=seed), low(OUT, 36, 2, seed=seed)
        flat = replace(
            flat, up=Tensor.of(conv.up.float().reshape(OUT, 2)), down=Tensor.of(conv.down.float().reshape(2, 36))
        )
        updates = {"conv": conv, "flat": flat, "conv.bias": Dense(bias, 2.0, "bias"), "whole": Dense(whole)}
        return Adapter(updates, {}, Metadata("sample"))

    pair = [one(1), one(5)]
    found = combined(pair, method, density=1.0, rank=None)
    assert found.adapter.updates["conv"].shape == (OUT, 4, 3, 3)
    assert_close(delta(found, "conv").reshape(OUT, 36), delta(found, "flat"))
    merge: Callable[..., Any] = sum if method in ("dare_linear", "magnitude_prune") else elected
    for name in ("conv.bias", "whole"):
        values = [np.asarray(a.updates[name].delta(), np.float64) for a in pair]  # type: ignore[attr-defined]
        if name == "whole" and method == "knots":
            continue
        assert isinstance(found.adapter.updates[name], Dense)
        assert_close(delta(found, name), np.asarray(merge(values)))
    if method == "knots":
        values = [np.asarray(a.updates["whole"].delta(), np.float64) for a in pair]  # type: ignore[attr-defined]
        assert_close(delta(found, "whole"), knots_reference(values, (1, 1), 1.0))
    assert isinstance(combined(pair, method).adapter.updates["whole"], LowRank)


def test_a_whole_matrix_beside_factors() -> None:
    """A dense update and a LoRA of a transposed weight meet in one orientation."""
    turned = low(OUT, IN, seed=5, layer="transposed")
    whole = Dense(Tensor.of(np.random.default_rng(0).standard_normal((IN, OUT), np.float32)))
    values = [np.asarray(u.delta(), np.float64) for u in (whole, turned)]
    for order in (1, -1):
        pair = [adapter(layer=u) for u in (whole, turned)[::order]]
        for rank in (None, FULL):
            assert_close(delta(combined(pair, "ties", density=0.5, rank=rank)), ties_reference(values, (1, 1), 0.5))


# -- PEFT ----------------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("method", ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5)])
def test_peft_on_dense_updates_agrees(method: str, weights: tuple[float, ...], monkeypatch: Any) -> None:
    """PEFT's ties elects without the weights: the same where these are alike. Its dare draws are replaced by ours."""
    import torch
    from peft.utils import merge_utils

    masks = iter([drop(np.ones((OUT, IN), np.float32), 0.5, 0, "layer", n) != 0 for n in range(3)])
    monkeypatch.setattr(torch, "bernoulli", lambda p: torch.from_numpy(next(masks)).to(p.dtype))
    tensors = [torch.from_numpy(exact(a)) for a in three()]
    name, density = ("task_arithmetic", ()) if method == "linear" else (method, (0.5,))
    theirs = getattr(merge_utils, name)(tensors, torch.tensor(weights, dtype=torch.float64), *density)
    assert_close(delta(combined(three(), method, weights)), theirs.numpy())


@pytest.mark.peer
@pytest.mark.parametrize("method", ["ties", "knots"])
def test_peft_loads_the_result(base: Any, lora: Any, tmp_path: Path, method: str) -> None:
    import torch

    model, out = base("llama"), tmp_path / "out"
    report = loratool.combine(lora("llama"), lora("llama", "patterns"), out=out, method=method, strengths=[1.0, 0.5])
    assert report.relative_error > 0 and set(report.ranks) > {"4"}
    before = models.build("llama", tmp_path / "merged")
    loratool.merge(before, out, out=tmp_path / "applied")
    with torch.no_grad():
        difference = models.logits(model, out) - models.logits(tmp_path / "applied")
        effect = models.logits(model, out) - models.logits(model)
    assert float(difference.abs().max()) < 1e-3 * float(effect.abs().max())


# -- files, formats, the command line ------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two raw adapter files with two modules each, one of them shared."""
    one = {"model.a": low(OUT, IN, 2, seed=1), "model.b": low(OUT, IN, 3, seed=2)}
    other = {"model.a": low(OUT, IN, 3, seed=3), "model.c": low(OUT, IN, 1, seed=4)}
    return [lora_file(tmp_path / f"{n}.safetensors", u) for n, u in enumerate((one, other))]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
        raise SystemExit(0)
    return int(end.value.code or 0)


@pytest.mark.parametrize("method", METHODS)
def test_the_json_report(method: str, files: list[Path], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.safetensors"
    assert run("combine", *files, "-o", out, "--method", method, "-s", 1, "-s", 0.5, "--seed", 3, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    found = loratool.read(out)
    assert {m["module"]: m["rank"] for m in report["modules"]} == {n: u.rank for n, u in found.updates.items()}
    assert all(set(m) == {"module", "rank", "relative_error", "energy"} for m in report["modules"])
    assert sum(report["ranks"].values()) == 3 and report["bytes"] == out.stat().st_size
    assert report["parameters"] == sum(t.size for u in found.updates.values() for t in u.slots.values())
    assert 0 <= report["relative_error"] < 1
    strings, inputs = found.metadata.strings, [fingerprint(f)[str(f)] for f in files]
    assert (report["operation"], report["strengths"]) == ("combine", [1.0, 0.5])
    density = None if method in ("linear", "svd") else 0.5
    assert report["details"] == {"method": method, "density": density, "seed": 3}
    assert strings["loratool.operation"] == "combine"
    told = {key: json.loads(strings[f"loratool.{key}"]) for key in ("method", "density", "seed", "strengths", "inputs")}
    assert list(told.pop("inputs").values()) == inputs
    assert told == {"method": method, "density": density, "seed": 3, "strengths": [1.0, 0.5]}


def test_the_formats_of_the_adapters_do_not_matter(files: list[Path], tmp_path: Path) -> None:
    peft = tmp_path / "peft"
    loratool.convert(files[1], peft, to="peft")
    plain = loratool.combine(files, out=tmp_path / "plain.safetensors", method="dare_ties", density=0.3)
    mixed = loratool.combine(files[0], peft, out=tmp_path / "mixed.safetensors", method="dare_ties", density=0.3)
    loratool.combine(files, out=tmp_path / "other", method="dare_ties", density=0.3, to="peft")
    assert (plain.format, mixed.format, plain.relative_error) == ("raw", "raw", mixed.relative_error)
    for other in ("mixed.safetensors", "other"):
        assert loratool.compare(tmp_path / "plain.safetensors", tmp_path / other).relative_difference < 1e-6


def test_carried_tensors_follow_the_rule_of_add(tmp_path: Path) -> None:
    norm = Tensor.of(np.arange(4, dtype=np.float32))
    one = Adapter({"layer": low(OUT, IN)}, {"norm.weight": norm}, Metadata("sample"))
    other = Adapter({"layer": low(OUT, IN, seed=5)}, {}, Metadata("sample"))
    for method in METHODS:
        assert combined([one, other], method).adapter.carried["norm.weight"].same_bytes(norm)
        with pytest.raises(MatchError, match="whole tensors"):
            combined([one, other], method, (0.5, 1.0))


@pytest.mark.parametrize("method", METHODS)
def test_a_kind_that_needs_the_base_is_refused_without(method: str) -> None:
    with pytest.raises(MatchError) as refused:
        combined([adapter(layer=UPDATES["dora"]), adapter(layer=low())], method)
    assert "--base" in refused.value.hint


@pytest.mark.peer
def test_dora_with_its_base(base: Any, lora: Any, tmp_path: Path) -> None:
    import torch

    out = tmp_path / "out"
    assert run("combine", lora("llama", "dora"), "-o", tmp_path / "no", "--method", "ties") == 4
    options = ("--method", "ties", "--density", 1, "--rank", 32)
    assert run("combine", lora("llama", "dora"), "-o", out, *options, "--base", base("llama")) == 0
    one, other = models.logits(base("llama"), out), models.logits(base("llama"), lora("llama", "dora"))
    assert torch.allclose(one, other, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_different_bases_are_refused(method: str, tmp_path: Path, capsys: Any) -> None:
    """llm trap 65."""
    one = lora_file(tmp_path / "one.safetensors", {"layer": low(OUT, IN)})
    other = lora_file(tmp_path / "other.safetensors", {"layer": low(OUT, IN + 1)})
    assert run("combine", one, other, "-o", tmp_path / "out.safetensors", "--method", method) == 4
    assert "shapes differ" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "tie"),
        (),
        ("--method", "ties", "--density", "0"),
        ("--method", "ties", "--density", "1.01"),
        ("--method", "dare_linear", "--density", "nan"),
        ("--method", "ties", "-s", "1"),
        ("--method", "linear", "-s", "1"),
        ("--method", "ties", "-s", "nan", "-s", "1"),
        ("--method", "ties", "--rank", "0"),
    ],
)
def test_wrong_usage(options: tuple[str, ...], files: list[Path], tmp_path: Path) -> None:
    before = fingerprint(tmp_path)
    assert run("combine", *files, "-o", tmp_path / "out.safetensors", *options) == 2
    assert fingerprint(tmp_path) == before


def test_wrong_usage_of_the_library(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown method 'tie'"):
        loratool.combine(files, out=tmp_path / "out", method="tie")
    with pytest.raises(UsageError, match="no adapter given"):
        combine([], Recipe("ties"))


@pytest.mark.parametrize("method", DENSE_METHODS)
def test_what_is_not_finite_is_refused(method: str) -> None:
    bad = replace(low(OUT, IN), up=Tensor.of(np.full((OUT, 3), np.nan, np.float32)))
    with pytest.raises(NumericError):
        combined([adapter(layer=bad), adapter(layer=low(OUT, IN))], method)


def test_a_density_that_has_no_use_is_said_to_have_none(files: list[Path], tmp_path: Path, capsys: Any) -> None:
    assert run("combine", *files, "-o", tmp_path / "out.safetensors", "--method", "svd", "--density", "0.5") == 0
    assert "warning: svd keeps every entry" in capsys.readouterr().err


def test_the_command_line_knows_every_method() -> None:
    assert set(cli._METHODS) == {*METHODS, *ALIASES}


def test_the_short_name_of_a_method_is_the_method() -> None:
    assert Recipe("dare", 0.5) == Recipe("dare_linear", 0.5)
    assert Recipe("dare").details()["method"] == "dare_linear"


@pytest.mark.parametrize("name", ["add", "combine", "extract", "rank", "resize", "subtract"])
def test_the_public_face_has_it(name: str) -> None:
    from loratool import compute

    assert getattr(loratool, name) is getattr(compute, name) and name in loratool.__all__
