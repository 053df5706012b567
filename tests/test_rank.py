"""Which rank is needed: spectra, the noise edge, proposals, the table, and the pictures."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool import compute, plots, show
from loratool.errors import LoratoolError, MatchError, UsageError
from loratool.ops.rank import noise_edge, singular_values
from loratool.tensors import Tensor, write_safetensors
from tests.test_extract import full_rank, low_rank, optimum, retuned, run


def pair(folder: Path, differences: dict[str, np.ndarray], dtype: str = "F32") -> tuple[Path, Path]:
    """BASE and TUNED files whose difference is this."""
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, by in zip(paths, (0, 1), strict=True):
        path.unlink(missing_ok=True)
        write_safetensors(path, {f"{n}.weight": Tensor.of(by * d, dtype) for n, d in differences.items()}, {})
    return paths


def planted(rank: int, out: int, inner: int, noise: float, seed: int = 0) -> np.ndarray:
    """A low rank and noise; the smallest planted singular value is three times the noise's largest for ``noise`` 1."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (out, inner))
    edge = np.sqrt(out) + np.sqrt(inner)
    values = 3 * edge * np.linspace(3, 1, rank)
    return ((left * values) @ right.T + noise * rng.standard_normal((out, inner))).astype(np.float32)


# ---------------------------------------------------------------- spectra


def test_spectra_of_two_models(base: Callable[..., Path], tmp_path: Path) -> None:
    """Singular values as LAPACK's in float64; energy and error begin at rank 1 and end at 1 and 0."""
    tuned = retuned(base("gpt2"), tmp_path / "tuned", low_rank(6))
    report = compute.rank(base("gpt2"), tuned)
    wanted = optimum(base("gpt2"), tuned)
    wanted["lm_head.weight"] = wanted["transformer.wte.weight"]  # tied
    assert {f"{m.module}.weight" for m in report.modules} == wanted.keys()
    for module in report.modules:
        values = wanted[f"{module.module}.weight"]
        kept = np.cumsum(values**2) / (values**2).sum()
        assert np.abs(np.array(module.singular_values) - values).max() < 1e-6 * values[0]
        np.testing.assert_allclose(module.energy, kept, rtol=1e-7)
        np.testing.assert_allclose(module.error, np.sqrt(np.maximum(0, 1 - kept)), atol=1e-6)
        assert module.energy[-1] == 1 and module.error[-1] == 0 and len(module.error) == len(values)
        assert module.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2)
        assert module.proposed_rank == 6 and module.needed(0.95) == (kept < 0.95).sum() + 1
    assert report.relative_error < 1e-6


def test_spectra_of_an_adapter(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    """From the factors alone; no noise edge, since the trainer chose the rank."""
    report = compute.rank(lora("llama", "patterns"))
    updates = loratool.read(lora("llama", "patterns")).updates
    assert {m.module for m in report.modules} == set(updates)
    for module in report.modules:
        update: Any = updates[module.module]
        values = np.linalg.svd(update.delta().astype(np.float64), compute_uv=False)[: update.rank]
        np.testing.assert_allclose(module.singular_values, values, rtol=1e-5)
        kept = np.cumsum(values**2) / (values**2).sum()
        assert module.noise_edge is None and module.proposed_rank == (kept < 0.95).sum() + 1
    assert report.proposed_parameters == sum(m.proposed_rank * sum(m.shape) for m in report.modules)


def test_dora_needs_its_base(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    with pytest.raises(MatchError, match="base"):
        compute.rank(lora("llama", "dora"))
    assert len(compute.rank(lora("llama", "dora"), base=base("llama")).modules) == 84


def test_an_untrained_adapter_and_identical_models(base: Callable[..., Path], tmp_path: Path) -> None:
    """Zeros have no spectrum to divide by."""
    down, up = Tensor.of(np.ones((2, 8), np.float32)), Tensor.of(np.zeros((6, 2), np.float32))
    write_safetensors(tmp_path / "zero.safetensors", {"a.lora_A.weight": down, "a.lora_B.weight": up}, {})
    reading = loratool.Reading(scaling=1.0)
    (module,) = compute.rank(tmp_path / "zero.safetensors", reading=reading).modules
    assert module.stable_rank == 0 and set(module.error) == {0.0} and module.proposed_rank == 1
    assert compute.rank(base("llama"), base("llama")).modules == ()


@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_singular_values_by_row_blocks(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    matrix = planted(5, *shape, 0.3)
    values, energy = singular_values(matrix)
    np.testing.assert_allclose(values, np.linalg.svd(matrix.astype(np.float64), compute_uv=False), rtol=1e-9)
    assert energy == pytest.approx((matrix.astype(np.float64) ** 2).sum())


# ---------------------------------------------------------------- the noise edge and proposals


@pytest.mark.parametrize(("out", "inner"), [(400, 400), (600, 200), (128, 700)])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_noise_edge_finds_the_planted_rank(rank: int, out: int, inner: int, tmp_path: Path) -> None:
    """Gavish and Donoho: above it signal alone, whatever the noise's size, also for stored bfloat16."""
    for number, noise in enumerate((1.0, 0.01)):
        matrix = planted(rank, out, inner, noise, seed=number)
        files = pair(tmp_path, {"a": matrix, "b": 1e-3 * matrix}, "BF16" if number else "F32")
        report = compute.rank(*files)
        assert [m.proposed_rank for m in report.modules] == [rank, rank]
        for module in report.modules:
            assert module.noise_edge is not None
            assert module.singular_values[rank - 1] > module.noise_edge > module.singular_values[rank]


def test_without_noise_the_edge_is_what_single_precision_holds(tmp_path: Path) -> None:
    matrix = planted(7, 300, 200, 0.0)
    assert [m.proposed_rank for m in compute.rank(*pair(tmp_path, {"a": matrix})).modules] == [7]
    assert noise_edge(np.array([2.0, 0.0, 0.0]), (3, 3)) == pytest.approx(2e-6)
    # the paper's table: 2.858 times the median for square matrices, 1.43 for ever longer ones
    assert noise_edge(np.ones(3), (3, 3)) == pytest.approx(2.86)
    assert noise_edge(np.ones(3), (3, 3_000_000)) == pytest.approx(1.43, rel=1e-4)


def test_pure_noise_is_proposed_by_energy(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).standard_normal((60, 50)).astype(np.float32)
    (module,) = compute.rank(*pair(tmp_path, {"a": noise})).modules
    assert module.noise_edge is not None and module.singular_values[0] < module.noise_edge
    assert module.proposed_rank == module.needed(0.95) > 25


@pytest.mark.parametrize("budget", [{"energy": 0.8}, {"error": 0.3}, {"rank": 5}, {"error": 0.1, "rank": 4}])
def test_budgets_are_those_of_extract(budget: dict[str, Any], base: Callable[..., Path], tmp_path: Path) -> None:
    tuned = retuned(base("llama"), tmp_path / "tuned", full_rank)
    proposed = compute.rank(base("llama"), tuned, **budget)
    made = compute.extract(base("llama"), tuned, tmp_path / "lora", **budget)
    assert {m.module: m.proposed_rank for m in proposed.modules} == {m.module: m.rank for m in made.modules}
    assert proposed.relative_error == pytest.approx(made.relative_error, rel=1e-4)
    assert proposed.proposed_parameters == made.parameters


def test_a_size_budget_counts_the_stored_dtype(base: Callable[..., Path], tmp_path: Path) -> None:
    """A file of bfloat16 holds twice the ranks."""
    before = base("llama", dtype="bfloat16")
    tuned = retuned(before, tmp_path / "tuned", full_rank)
    proposed = compute.rank(before, tuned, max_size=80_000)
    wide = compute.rank(base("llama"), retuned(base("llama"), tmp_path / "wide", full_rank), max_size=80_000)
    assert 2 * proposed.proposed_parameters < 80_000
    assert 1.6 * wide.proposed_parameters < proposed.proposed_parameters
    assert len({m.proposed_rank for m in proposed.modules}) > 1


def test_a_rank_is_no_larger_than_the_update(lora: Callable[..., Path]) -> None:
    assert {m.proposed_rank for m in compute.rank(lora("llama"), rank=64).modules} == {4}
    assert {m.proposed_rank for m in compute.rank(lora("llama"), rank=3).modules} == {3}


# ---------------------------------------------------------------- the command line


def test_json(lora: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rank", lora("llama"), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert {"module", "singular_values", "energy", "error", "proposed_rank"} <= said["modules"][0].keys()
    assert len(said["modules"][0]["energy"]) == len(said["modules"][0]["error"]) == 4


def test_the_table(
    lora: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piped: every module by its full name. On a terminal of 80 columns: no line is longer."""
    assert run("rank", lora("llama")) == 0
    whole = capsys.readouterr().out
    assert "model.layers.11.self_attn.q_proj" in whole and "█" in whole and len(whole.splitlines()) == 84 + 3
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    report = compute.rank(lora("llama"))
    long = tuple(replace(m, singular_values=m.singular_values * 400) for m in report.modules[:20])
    show.show_ranks(replace(report, modules=long))
    lines = capsys.readouterr().out.replace("\033[1m", "").replace("\033[0m", "").splitlines()
    assert max(map(len, lines)) <= 80 and sum("_proj" in line for line in lines) == 20 and "…" in "".join(lines)


def test_bars() -> None:
    """Relative to the first; of a long spectrum ranks that grow by a factor, first and last among them."""
    assert show.spark([8.0, 4.0, 0.0]) == "█▅▁" and show.spark([]) == show.spark([0.0]) == ""
    assert show.spark([1.0] * 4 + [0.0] * 996) == "█" * 4 + "▁" * 12


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind", ["png", "svg", "html"])
def test_pictures(kind: str, lora: Callable[..., Path], tmp_path: Path) -> None:
    """The same report gives the same bytes; names are shown as they are, markup and formulas included."""
    pytest.importorskip("matplotlib")
    lora = functools.partial(lora, "gpt2")
    path = tmp_path / f"plot.{kind.upper() if kind == 'png' else kind}"
    report = compute.rank(lora(), plot=path)
    first = path.read_bytes()
    assert first.startswith({"png": b"\x89PNG", "svg": b"<?xml", "html": b"<!DOCTYPE html>"}[kind])
    names = iter(("a.$x^{<script>&", "b.$\\frac", "c"))
    hostile = replace(report, modules=tuple(replace(m, module=n) for m, n in zip(report.modules, names, strict=False)))
    compute.rank(lora(), plot=path, overwrite=True)
    assert path.read_bytes() == first
    plots.plot_ranks(hostile, tmp_path / f"hostile.{kind}")
    data = (tmp_path / f"hostile.{kind}").read_bytes()
    assert b"<script>" not in data
    if kind == "html":
        assert b"<svg" in data and b"<?xml" not in data and b"a.$x^{&lt;script&gt;&amp;" in data
        assert b"http" not in data.replace(b"http://www.w3.org", b"").replace(b"http://purl.org", b"").replace(
            b"https://matplotlib.org", b""
        ).replace(b"http://creativecommons.org", b"")


def test_a_picture_of_nothing(base: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    compute.rank(base("llama"), base("llama"), plot=tmp_path / "none.svg")
    assert (tmp_path / "none.svg").stat().st_size > 1000


def test_what_cannot_be_drawn_is_told_first(
    lora: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown kinds, existing files, missing packages: before anything is computed."""
    monkeypatch.setattr(compute, "rank_adapter", lambda *_: pytest.fail("computed"))
    with pytest.raises(UsageError, match=r"plot\.jpg"):
        compute.rank(lora("llama"), plot=tmp_path / "plot.jpg")
    (tmp_path / "plot.svg").write_text("mine")
    with pytest.raises(LoratoolError, match="exists"):
        compute.rank(lora("llama"), plot=tmp_path / "plot.svg")
    with pytest.raises(LoratoolError, match="parent"):
        compute.rank(lora("llama"), plot=tmp_path / "none" / "plot.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LoratoolError, match="matplotlib") as missing:
        compute.rank(lora("llama"), plot=tmp_path / "other.svg")
    assert missing.value.exit_code == 1 and "loratool[plot]" in missing.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plot.svg"]


def test_plot_exit_codes(lora: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.svg"
    assert run("rank", lora("llama"), "--plot", path) == 0 and run("rank", lora("llama"), "--plot", path) == 1
    assert run("rank", lora("llama"), "--plot", path, "--overwrite") == 0
    assert run("rank", lora("llama"), "--plot", tmp_path / "plot.pdf") == 2
