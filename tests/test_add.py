"""Sums of updates against dense float64: exact where they are stacked, the best where a rank is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool import compute
from loratool.adapter import Adapter, Metadata
from loratool.errors import LoratoolError, MatchError, NumericError, UsageError
from loratool.tensors import Tensor, read_safetensors
from loratool.update import Dense, DoRA, LowRank, Sum, Update
from tests import diffusion, models, samples
from tests.samples import fingerprint, lora_file, low, magnitude, normal, tucker
from tests.test_resize import dense, optimum, run


def adapter(updates: dict[str, Update], **carried: Tensor) -> Adapter:
    return Adapter(updates, {k.replace("__", "."): t for k, t in carried.items()}, Metadata("raw"))


def added(path: Path, *given: Any, what: str = "add", **options: Any) -> tuple[compute.ComputeReport, Adapter]:
    report = getattr(compute, what)(*given, out=path, **options)
    return report, loratool.read(path)


def expected(terms: list[tuple[float, Update]]) -> np.ndarray:
    return np.asarray(sum(strength * dense(update) for strength, update in terms))


# -- exact sums -----------------------------------------------------------------------------------------------

TERMS: dict[str, list[Update]] = {
    "ranks": [low(9, 8, 3), low(9, 8, 2, seed=4), low(9, 8, 1, seed=6)],
    "scalings": [low(9, 8, 3), low(9, 8, 2, seed=4, alpha=0.3), low(9, 8, 1, seed=6, alpha=None)],
    "rank-stabilised": [low(9, 8, 3, rank_stabilised=True), low(9, 8, 2, seed=4)],
    "negative and zero alpha": [low(9, 8, 3, alpha=-2.0), low(9, 8, 2, seed=4, alpha=0.0)],
    "more than the matrix": [low(4, 5, 3), low(4, 5, 4, seed=3)],
    "convolutions": [low(9, 4, 3, 3, 2), low(9, 4, 2, 3, 2, seed=3)],
    "pointwise and linear": [low(9, 8, 3, 1, 1), low(9, 8, 2, seed=4)],
    "tucker": [tucker(9, 4, 3, 3, 2), low(9, 4, 2, 3, 2, seed=3)],
    "embedding": [low(9, 8, 3, layer="embedding"), low(9, 8, 2, seed=4, layer="embedding")],
    "transposed": [low(9, 8, 3, layer="transposed"), low(9, 8, 2, seed=4, layer="transposed")],
    "sums": [Sum((low(9, 8, 1), low(9, 8, 2, seed=3))), low(9, 8, 1, seed=6)],
    "dense": [Dense(normal(9, 8), 0.3), Dense(normal(9, 8, seed=1))],
    "dense and low": [Dense(normal(9, 8)), low(9, 8, 2), low(9, 8, 1, 1, 1)],
    "bfloat16": [
        LowRank(normal(2, 8, dtype="BF16"), normal(9, 2, dtype="BF16", seed=1), alpha=2.0),
        LowRank(normal(3, 8, dtype="BF16", seed=2), normal(9, 3, dtype="BF16", seed=3), alpha=12.0),
    ],
    "bfloat16 of odd scalings": [
        LowRank(normal(2, 8, dtype="BF16"), normal(9, 2, dtype="BF16", seed=1), alpha=2.0),
        LowRank(normal(3, 8, dtype="BF16", seed=2), normal(9, 3, dtype="BF16", seed=3), alpha=1.0),
    ],
}


@pytest.mark.parametrize("strengths", [None, (1.0, -0.7), (-2.0, 0.3), (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("name", TERMS)
def test_sums_are_exact(name: str, strengths: tuple[float, float] | None, tmp_path: Path) -> None:
    """diffusion trap 48, llm traps 27 and 28: of deltas, not of factors; rank-stabilised ones by their own ranks."""
    updates = TERMS[name][: 2 if strengths else 3]
    terms = list(zip(strengths or (1.0,) * 3, updates, strict=False))
    given = [adapter({"m": update}) for update in updates]
    report, made = added(tmp_path / "out", *given, strengths=strengths)
    whole = expected(terms)
    scale = sum(abs(s) * float(np.linalg.norm(dense(u))) for s, u in terms)
    if not whole.any():
        assert not made.updates or not dense(made.updates["m"]).any()
        return
    error = float(np.linalg.norm(whole - dense(made.updates["m"])))
    assert error < 3e-7 * scale
    assert report.relative_error < 3e-7
    assert made.updates["m"].shape == terms[0 if terms[0][0] else 1][1].shape
    assert report.modules[0].rank == made.updates["m"].rank
    if strengths:
        metadata = read_safetensors(tmp_path / "out").metadata
        assert json.loads(metadata["loratool.strengths"]) == list(strengths)


def test_factors_are_kept_where_the_dtype_can_say_the_sum(tmp_path: Path) -> None:
    one, other = TERMS["bfloat16"]
    _, made = added(tmp_path / "out", adapter({"m": one}), adapter({"m": other}), strengths=(1.0, -0.5))
    found = made.updates["m"]
    assert isinstance(found, LowRank) and isinstance(one, LowRank) and isinstance(other, LowRank)
    assert (found.rank, found.up.dtype, found.down.dtype) == (5, "BF16", "BF16")
    assert found.down.array()[:2].tobytes() == one.down.array().tobytes()
    assert found.down.array()[2:].tobytes() == other.down.array().tobytes()
    assert np.array_equal(dense(found), expected([(1.0, one), (-0.5, other)]))
    _, made = added(tmp_path / "odd", *(adapter({"m": u}) for u in TERMS["bfloat16 of odd scalings"]))
    found = made.updates["m"]
    assert isinstance(found, LowRank) and (found.up.dtype, found.down.dtype) == ("F32", "BF16")


@pytest.mark.parametrize("what", ["add", "subtract", "combine"])
@pytest.mark.parametrize("rank", [None, 2])
def test_another_dtype_and_the_error_it_makes(what: str, rank: int | None, tmp_path: Path) -> None:
    terms = [low(9, 8, 3), low(9, 8, 2, seed=4)]
    more = {"method": "svd", "rank": rank or 5} if what == "combine" else {"rank": rank}
    report, written = added(
        tmp_path / "x.safetensors", *(adapter({"a": t}) for t in terms), what=what, dtype="bf16", **more
    )
    assert {t.dtype for t in written.updates["a"].slots.values()} == {"BF16"}
    wanted = expected([(1.0, terms[0]), (-1.0 if what == "subtract" else 1.0, terms[1])])
    lost = np.linalg.norm(dense(written.updates["a"]) - wanted) / np.linalg.norm(wanted)
    assert lost > 1e-3
    assert report.relative_error == pytest.approx(lost, rel=0.02)
    assert report.modules[0].relative_error == report.relative_error


def test_fp16_that_would_overflow_is_widened(tmp_path: Path) -> None:
    one = LowRank(normal(2, 8, dtype="F16"), Tensor.of(normal(9, 2).array() * 1e4, "F16"), alpha=2.0)
    _, made = added(tmp_path / "out", adapter({"m": one}), adapter({"m": low(9, 8).scaled(1e-3)}), strengths=(1, 64.0))
    whole = expected([(1.0, one), (64.0, low(9, 8).scaled(1e-3))])
    np.testing.assert_allclose(dense(made.updates["m"]), whole, rtol=1e-6, atol=1e-3)
    huge = replace(low(9, 8), alpha=1e39, down=Tensor.of(normal(3, 8).array() * 1e38))
    with pytest.raises(NumericError, match=r"overflows F32, m"):
        added(tmp_path / "more", adapter({"m": huge.scaled(1e-39)}), adapter({"m": huge.scaled(1e39)}))


def test_one_adapter_alone_keeps_its_factors(tmp_path: Path) -> None:
    update = low(9, 8, alpha=None)
    _, made = added(tmp_path / "out", adapter({"m": update}), strengths=[3.0])
    found = made.updates["m"]
    assert isinstance(found, LowRank) and found.scaling == 3.0
    assert found.up.same_bytes(update.up) and found.down.same_bytes(update.down)
    _, made = added(tmp_path / "minus", adapter({"m": update}), strengths=[-3.0])
    np.testing.assert_allclose(dense(made.updates["m"]), -3 * dense(update), rtol=1e-12)


def test_targets_of_one_adapter_only(tmp_path: Path) -> None:
    one = adapter({"layers.0.q": low(), "layers.0.k": low(9, 4)})
    bias = Dense(normal(6), 1.0, "bias")
    other = adapter({"layers.0.q": low(seed=5), "layers.1.q": low(6, 6), "layers.1.q.bias": bias})
    report, made = added(tmp_path / "out", one, other, what="subtract")
    assert set(made.updates) == {"layers.0.q", "layers.0.k", "layers.1.q", "layers.1.q.bias"}
    np.testing.assert_allclose(dense(made.updates["layers.0.k"]), dense(low(9, 4)), rtol=1e-6)
    np.testing.assert_allclose(dense(made.updates["layers.1.q"]), -dense(low(6, 6)), rtol=1e-6)
    np.testing.assert_array_equal(made.updates["layers.1.q.bias"].delta(), -normal(6).array())  # type: ignore[attr-defined]
    assert [m.module for m in report.modules] == ["layers.0.q", "layers.0.k", "layers.1.q"]


def test_names_that_leave_a_prefix_out_are_one_module(tmp_path: Path) -> None:
    one, other = adapter({"model.layers.0.q": low()}), adapter({"layers.0.q": low(seed=5)})
    _, made = added(tmp_path / "out", one, other)
    assert list(made.updates) == ["model.layers.0.q"]
    np.testing.assert_allclose(dense(made.updates["model.layers.0.q"]), dense(low()) + dense(low(seed=5)), atol=1e-5)


def test_how_a_layer_is_stored_is_a_hint(tmp_path: Path) -> None:
    """One file says that the base is transposed, the other does not know."""
    one, other = low(9, 4, layer="transposed"), low(9, 4, seed=5)
    _, made = added(tmp_path / "out", adapter({"m": one}), adapter({"m": other}))
    np.testing.assert_allclose(dense(made.updates["m"]), dense(one) + dense(other).T, atol=1e-5)


def test_a_kohya_and_a_diffusers_file(tmp_path: Path) -> None:
    shapes = dict(list(diffusion.layers("sd1").items())[:6])
    pairs, others = diffusion.factors(shapes, 3), diffusion.factors(shapes, 2)
    one = diffusion.save(tmp_path / "one.safetensors", diffusion.kohya(pairs, alpha=1.0))
    other = diffusion.save(tmp_path / "other.safetensors", diffusion.diffusers(others))
    for first, second in ((one, other), (other, one)):
        report, made = added(tmp_path / f"{first.stem}-first", first, second, strengths=(0.5, -1.5))
        assert report.format == ("kohya" if first is one else "diffusers") and len(report.modules) == 6
        for name in shapes:
            a, b = diffusion.delta(pairs[name], 1.0), diffusion.delta(others[name])
            whole = 0.5 * a - 1.5 * b if first is one else 0.5 * b - 1.5 * a
            found = dense(made.updates[name]).reshape(whole.shape)
            np.testing.assert_allclose(found, whole, rtol=0, atol=3e-7 * float(np.abs(whole).max()))


# -- what cancels, what depends -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_nothing_is_left_of_a_minus_a(scale: float, tmp_path: Path) -> None:
    given = samples.adapter()
    updates = {n: u for n, u in given.updates.items() if not u.needs_base}
    updates["big"] = LowRank(Tensor.of(normal(8, 300).array() * scale), Tensor.of(normal(200, 8).array() * scale))
    one = replace(given, updates=updates)
    report, made = added(tmp_path / "out", one, one, what="subtract", to="raw")
    assert not made.updates and not made.carried and report.ranks == {} and report.relative_error == 0
    assert {m.rank for m in report.modules} == {0}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_dependent_factors_are_compacted_without_loss(dtype: str, tmp_path: Path) -> None:
    down, up = normal(4, 30, dtype=dtype), normal(20, 4, dtype=dtype, seed=1)
    one, other = LowRank(down, up, alpha=4.0), LowRank(down, normal(20, 4, dtype=dtype, seed=2), alpha=1.0)
    report, made = added(tmp_path / "out", adapter({"m": one}), adapter({"m": other}), strengths=(1.0, -0.3))
    whole = expected([(1.0, one), (-0.3, other)])
    assert made.updates["m"].rank == 4
    error = np.linalg.norm(whole - dense(made.updates["m"])) / np.linalg.norm(whole)
    assert error < 3e-7 and report.relative_error == pytest.approx(error, rel=1e-3)


def test_dependent_ups_are_compacted_too(tmp_path: Path) -> None:
    """Where the downs differ: a column of one is among those of the other."""
    up, more = normal(20, 4, seed=1), normal(20, 2, seed=7).array()
    one = LowRank(normal(4, 30), up, alpha=4.0)
    other = LowRank(normal(3, 30, seed=3), Tensor.of(np.hstack((more, up.array()[:, :1]))), alpha=3.0)
    _, made = added(tmp_path / "out", adapter({"m": one}), adapter({"m": other}))
    whole = expected([(1.0, one), (1.0, other)])
    assert made.updates["m"].rank == 6
    assert np.linalg.norm(whole - dense(made.updates["m"])) < 3e-7 * np.linalg.norm(whole)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_an_adapter_added_to_itself_keeps_its_down(dtype: str, tmp_path: Path) -> None:
    one = LowRank(normal(4, 30, dtype=dtype), normal(20, 4, dtype=dtype, seed=1), alpha=2.0)
    twice = replace(one, alpha=6.0)
    report, made = added(tmp_path / "out", adapter({"m": one}), adapter({"m": twice}))
    found = made.updates["m"]
    assert isinstance(found, LowRank) and (found.rank, found.up.dtype) == (4, dtype)
    assert report.relative_error < 1e-13
    assert found.down.array().tobytes() == one.down.array().tobytes()
    assert np.array_equal(dense(found), 4 * dense(one))


# -- the best of a rank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4, 11])
@pytest.mark.parametrize("name", [n for n in TERMS if "alpha" not in n])
def test_the_best_of_a_rank(name: str, rank: int, tmp_path: Path) -> None:
    updates = TERMS[name][:2]
    terms = list(zip((1.0, -0.6), updates, strict=True))
    given = [adapter({"m": update}) for update in updates]
    report, made = added(tmp_path / "out", *given, strengths=(1.0, -0.6), rank=rank)
    whole = expected(terms)
    size, best = float(np.linalg.norm(whole)), optimum(whole, rank)
    error = float(np.linalg.norm(whole - dense(made.updates["m"])))
    rounding = 4e-3 if "bfloat16" in name else 3e-7
    assert made.updates["m"].rank == rank
    assert best * (1 - 1e-6) - 1e-6 * size <= error <= math.hypot(best * (1 + 1e-6), rounding * size)
    assert report.relative_error == pytest.approx(error / size, rel=1e-5, abs=2e-7)


def test_the_whole_error_counts_what_is_exact_too(tmp_path: Path) -> None:
    one = adapter({"a": low(), "norm": Dense(normal(7), kind="norm"), "b": Dense(normal(7, 5))})
    other = adapter({"a": low(seed=5)})
    report, made = added(tmp_path / "out", one, other, rank=2)
    whole = {"a": dense(low()) + dense(low(seed=5)), "norm": normal(7).array(), "b": dense(Dense(normal(7, 5)))}
    lost = sum(optimum(whole[n], 2) ** 2 for n in "ab")
    size = sum(float((w.astype(np.float64) ** 2).sum()) for w in whole.values())
    assert report.relative_error == pytest.approx(math.sqrt(lost / size), rel=1e-5)
    assert made.updates["norm"].kind == "norm" and report.ranks == {"2": 2}


@pytest.mark.parametrize("rank", [None, 2])
def test_dora_is_summed_with_its_base_only(rank: int | None, tmp_path: Path) -> None:
    update, other = DoRA(low(), magnitude(7)), low(seed=5)
    base = samples.model(tmp_path / "base", {"m.weight": normal(7, 5, seed=7)})
    one = lora_file(tmp_path / "one.safetensors", {"m": update})
    two = lora_file(tmp_path / "two.safetensors", {"m": other})
    for pair in ((one, two), (two, one)):
        with pytest.raises(MatchError) as caught:
            compute.add(*pair, out=tmp_path / "out", rank=rank)
        assert "--base" in caught.value.hint
    report, made = added(tmp_path / "out", one, two, base=base, strengths=(0.5, 2.0), rank=rank)
    start = normal(7, 5, seed=7).array().astype(np.float64)
    whole = 0.5 * (update.apply(start) - start) + 2 * dense(other)
    error = np.linalg.norm(whole - dense(made.updates["m"]))
    assert error == pytest.approx(optimum(whole, rank or 5), rel=1e-6, abs=1e-5)
    assert report.relative_error == pytest.approx(error / np.linalg.norm(whole), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("what", ["add", "subtract", "combine"])
def test_a_sum_that_depends_on_the_base_tells_how_large_it_grows(what: str, tmp_path: Path) -> None:
    base = samples.model(tmp_path / "base", {"m.weight": normal(7, 5, seed=7)})
    given = adapter({"m": DoRA(low(7, 5, 1), magnitude(7))}), adapter({"m": low(7, 5, 1, seed=5)})
    options: dict[str, Any] = {"base": base, **({"method": "linear"} if what == "combine" else {})}
    report, made = added(tmp_path / "out", *given, what=what, **options)
    assert made.updates["m"].rank == 5 and report.ranks == {"5": 1}
    assert report.warnings == (
        "the exact sum of what depends on the base has rank up to 5: m (rank 2 to 5); --rank N gives a small one",
    )
    assert not added(tmp_path / "small", *given, what=what, rank=2, **options)[0].warnings


# -- whole tensors --------------------------------------------------------------------------------------------


def test_whole_tensors(tmp_path: Path) -> None:
    head, other = normal(4, 7), normal(4, 7, seed=1)
    one, same = adapter({"m": low()}, head__weight=head), adapter({"m": low(seed=5)}, head__weight=head)
    bare, apart = adapter({"m": low(seed=5)}), adapter({"m": low(seed=5)}, head__weight=other)
    for given, strengths in (((one, bare), None), ((one, same), None), ((one, same), (0.3, 0.7)), ((bare, one), None)):
        _, made = added(tmp_path / "out", *given, strengths=strengths, overwrite=True)
        assert made.carried["head.weight"].same_bytes(head)
    _, made = added(tmp_path / "out", one, apart, strengths=(0.0, 1.0), overwrite=True)
    assert made.carried["head.weight"].same_bytes(other)
    _, made = added(tmp_path / "out", one, same, what="subtract", overwrite=True)
    assert not made.carried
    base = samples.model(tmp_path / "base", {"head.weight": normal(4, 7, seed=2), "m.weight": normal(7, 5)})
    for given, strengths in (((one, apart), None), ((one, bare), (0.5, 1.0)), ((one, same), (2.0, 1.0))):
        with pytest.raises(MatchError, match=r"head\.weight") as caught:
            added(tmp_path / "refused", *given, strengths=strengths)
        assert "--base" in caught.value.hint
        _, made = added(tmp_path / "out", *given, strengths=strengths, base=base, overwrite=True)
        start = normal(4, 7, seed=2).array()
        parts = [(s, a.carried.get("head.weight")) for s, a in zip(strengths or (1, 1), given, strict=True)]
        whole = start + sum(s * (t.array() - start) for s, t in parts if t)
        np.testing.assert_allclose(made.carried["head.weight"].array(), whole, rtol=1e-5, atol=1e-6)


def test_the_weight_that_an_update_was_trained_on_stays(tmp_path: Path) -> None:
    own = normal(7, 5, seed=8)
    one, other = adapter({"m": low()}, m__weight=own), adapter({"m": low(seed=5)}, m__weight=own)
    _, made = added(tmp_path / "out", one, other, strengths=(0.7, 0.9))
    assert made.carried["m.weight"].same_bytes(own)
    _, made = added(tmp_path / "zero", one, one, what="subtract")
    assert not made.carried


# -- PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize(("kinds", "rank"), [(("plain", "rslora_patterns"), None), (("patterns", "mixed"), None)])
@pytest.mark.parametrize("what", ["add", "subtract"])
def test_peft_loads_the_sum(
    what: str, kinds: tuple[str, str], rank: int | None, base: Any, lora: Any, tmp_path: Path
) -> None:
    import torch

    folder, given = base("llama"), [lora("llama", kind) for kind in kinds]
    getattr(compute, what)(*given, out=tmp_path / "out", strengths=(0.5, 1.5), rank=rank)
    model = models.load_model(folder)
    modules = dict(model.named_modules())
    for strength, path in zip((0.5, 1.5 if what == "add" else -1.5), given, strict=True):
        for name, update in loratool.read(path).updates.items():
            modules[name].weight.data += strength * torch.from_numpy(dense(update)).float()
    found = models.logits(folder, tmp_path / "out")
    torch.testing.assert_close(found, models.logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.peer
def test_a_target_set_of_another_kind_loads(base: Any, lora: Any, tmp_path: Path) -> None:
    """The first one's configuration (its modules_to_save, its excluded modules) is not the sum's."""
    first, second = lora("bert", "modules_to_save"), lora("bert", "plain")
    compute.subtract(first, first, second, out=tmp_path / "out")
    models.load_peft(base("bert"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["r"] == 4


# -- refusals -------------------------------------------------------------------------------------------------


def test_shapes_that_differ(tmp_path: Path) -> None:
    with pytest.raises(MatchError, match=r"\[7, 5\] and \[7, 6\], m"):
        added(tmp_path / "out", adapter({"m": low(7, 5)}), adapter({"m": low(7, 6)}))


@pytest.mark.parametrize("strengths", [(1.0,), (1.0, 1.0, 1.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_strengths_that_make_no_sense(strengths: tuple[float, ...], tmp_path: Path) -> None:
    for what in ("add", "subtract"):
        with pytest.raises(UsageError, match="strength"):
            added(tmp_path / "out", adapter({"m": low()}), adapter({"m": low()}), what=what, strengths=strengths)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("add {a} {b} -s 1", 2),
        ("add {a} {b} --rank 0", 2),
        ("add {a} {b} --rank -1", 2),
        ("subtract {a}", 2),
        ("add", 2),
        ("add {a} nowhere", 1),
        ("add {a} {b} --to nothing", 2),
        ("add {a} {dora}", 4),
        ("subtract {dora} {a} --rank 2", 4),
        ("add {a} {nan}", 6),
    ],
)
def test_exit_codes(words: str, code: int, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    nan = replace(low(), up=Tensor.of(np.full((7, 3), np.nan, np.float32)))
    updates = {"a": low(), "b": low(seed=3), "dora": DoRA(low(), magnitude(7)), "nan": nan}
    paths = {n: lora_file(tmp_path / f"{n}.safetensors", {"m": u}) for n, u in updates.items()}
    command = words.format(**paths).split()
    found, _, err = run(capsys, *command, "-o", tmp_path / "out")
    assert found == code and err.startswith("error: "), err
    assert code != 4 or "--base" in err
    assert not (tmp_path / "out").exists()


def test_json_and_determinism(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = [lora_file(tmp_path / f"{n}.safetensors", {"m": low(40, 30, 4, seed=n)}) for n in range(3)]
    found = []
    for out in (tmp_path / "one", tmp_path / "two"):
        code, text, _ = run(capsys, "add", *paths, "-s", 1, "-s", -0.5, "-s", 2, "-o", out, "--json")
        report = json.loads(text)
        assert code == 0 and report["ranks"] == {"12": 1} and report["strengths"] == [1, -0.5, 2]
        assert {"parameters", "bytes", "relative_error"} <= set(report)
        assert [set(m) for m in report["modules"]] == [{"module", "rank", "relative_error", "energy"}]
        found.append(out.read_bytes())
    assert found[0] == found[1]


def test_overwriting(tmp_path: Path) -> None:
    one = lora_file(tmp_path / "one.safetensors", {"m": low()})
    two = lora_file(tmp_path / "two.safetensors", {"m": low(seed=3)})
    before = fingerprint(tmp_path)
    for out in (one, two):
        with pytest.raises(LoratoolError, match="overwrite"):
            compute.add(one, two, out=out, overwrite=True)
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("work", [loratool.add, loratool.subtract, partial(loratool.combine, method="ties")])
def test_without_an_adapter_there_is_nothing_to_compute(work: Callable[..., object], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter given"):
        work(out=tmp_path / "out")
