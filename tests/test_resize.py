"""Other ranks: the best there are, against dense float64; what is written is what is reported."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool import cli, compute
from loratool.adapter import Adapter, Metadata
from loratool.errors import LoratoolError, MatchError, NumericError, UsageError
from loratool.formats import FORMATS
from loratool.tensors import Tensor, read_safetensors
from loratool.update import Dense, DoRA, LowRank, Sum, Update
from tests import diffusion, models, samples
from tests.samples import fingerprint, lora_file, low, magnitude, normal

MATRICES: dict[str, Any] = {n: u for n, u in samples.ADDITIVE.items() if n != "dense_norm"}
MATRICES["sum_of_orientations"] = Sum((low(6, 6, 2), low(6, 6, 1, seed=4, layer="transposed")))
LOW = {n: u for n, u in MATRICES.items() if isinstance(u, LowRank)}


def adapter(updates: dict[str, Update], **more: Any) -> Adapter:
    return Adapter({k.replace("__", "."): u for k, u in updates.items()}, {}, Metadata("raw", **more))


def resized(updates: dict[str, Update], path: Path, to: str = "raw", **options: Any) -> compute.ComputeReport:
    return compute.resize(adapter(updates), path, to=to, **options)


def dense(update: Any) -> np.ndarray:
    """The delta in float64 from the stored values; [o,i*k], as the base stores it."""
    if isinstance(update, Sum):
        return sum(dense(part) for part in update.parts)
    if isinstance(update, Dense):
        return update.scaling * update.value.array().astype(np.float64).reshape(update.shape[0], -1)
    if not isinstance(update, LowRank):
        wide = update.prepare(lambda tensor: tensor.array().astype(np.float64))
        return np.asarray(wide.delta(0, update.shape[0], None))
    up, down = (t.array().astype(np.float64) for t in (update.up, update.down))
    up = up.reshape(up.shape[:2])
    if update.mid is not None:
        core = update.mid.array().astype(np.float64)
        down = np.einsum("mn...,ni->mi...", core, down.reshape(down.shape[:2]))
    product = update.scaling * up @ down.reshape(len(down), -1)
    return product.T if update.layer == "transposed" else product


def optimum(matrix: np.ndarray, rank: int) -> float:
    """The least Frobenius error of that rank (Eckart and Young)."""
    return float(np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[rank:]))


# -- the best rank, of every kind -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("name", MATRICES)
def test_every_kind_against_dense(name: str, rank: int, tmp_path: Path) -> None:
    update = MATRICES[name]
    report = resized({"m": update}, tmp_path / "out", rank=rank)
    made = loratool.read(tmp_path / "out").updates["m"]
    whole = dense(update)
    error = float(np.linalg.norm(whole - dense(made)))
    size = float(np.linalg.norm(whole))
    half = any(t.dtype in ("BF16", "F16") for t in update.slots.values())
    kept = isinstance(update, LowRank) and rank >= update.rank
    rounding = 4e-3 if half and not kept else 2e-7
    assert made.rank == rank and made.shape == update.shape
    assert error <= optimum(whole, rank) * (1 + 1e-6) + rounding * size
    assert error >= optimum(whole, rank) * (1 - 1e-6) - 1e-12
    floor = 1e-7 if not isinstance(update, LowRank) else 1e-12  # whole deltas are computed in float32
    assert report.relative_error == pytest.approx(error / size if size else 0, rel=1e-5, abs=floor)
    assert report.modules[0].energy == pytest.approx(1 - report.relative_error**2)
    assert report.ranks == {str(rank): 1}


@pytest.mark.parametrize("name", LOW)
def test_dtype_layer_and_scaling_are_kept(name: str, tmp_path: Path) -> None:
    update = LOW[name]
    resized({"m": update}, tmp_path / "out", rank=2)
    made = loratool.read(tmp_path / "out").updates["m"]
    assert isinstance(made, LowRank)
    assert (made.down.dtype, made.up.dtype) == (update.down.dtype, update.up.dtype)
    assert (made.layer, made.rank_stabilised) == (update.layer, update.rank_stabilised)
    assert made.scaling == pytest.approx(update.scaling or 1.0)


@pytest.mark.parametrize("rank", [3, 5, 8])
@pytest.mark.parametrize("name", [n for n, u in LOW.items() if u.mid is None])
def test_padding_keeps_every_byte(name: str, rank: int, tmp_path: Path) -> None:
    update = LOW[name]
    report = resized({"m": update}, tmp_path / "out", rank=rank)
    made = loratool.read(tmp_path / "out").updates["m"]
    assert isinstance(made, LowRank) and made.rank == rank
    down, up = made.down.array(), made.up.array()
    assert down[:3].tobytes() == update.down.array().tobytes() and not down[3:].any()
    assert up[:, :3].tobytes() == update.up.array().tobytes() and not up[:, 3:].any()
    assert made.scaling == pytest.approx(update.scaling, rel=1e-15)
    assert report.relative_error < 1e-15


def test_the_same_rank_keeps_a_core(tmp_path: Path) -> None:
    core = samples.tucker(7, 5, 3, 3)
    assert resized({"m": core}, tmp_path / "out", rank=3).relative_error == 0
    samples.assert_same(core, loratool.read(tmp_path / "out").updates["m"])


def test_a_dense_change_larger_than_the_small_svd(tmp_path: Path) -> None:
    whole = normal(900, 800).array() * np.linspace(1, 0.01, 800, dtype=np.float32)
    report = resized({"m": Dense(Tensor.of(whole))}, tmp_path / "out", rank=8)
    best = optimum(whole.astype(np.float64), 8)
    assert report.relative_error * np.linalg.norm(whole.astype(np.float64)) == pytest.approx(best, rel=5e-4)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e18])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_tiny_and_huge_factors(scale: float, dtype: str, tmp_path: Path) -> None:
    down, up = (Tensor.of(t.array() * np.float32(scale), dtype) for t in (normal(4, 12), normal(9, 4)))
    update = LowRank(down, up, alpha=2.0)
    report = resized({"m": update}, tmp_path / "out", rank=2)
    made = loratool.read(tmp_path / "out").updates["m"]
    whole = dense(update)
    error = np.linalg.norm(whole - dense(made)) / np.linalg.norm(whole)
    assert report.relative_error == pytest.approx(error, rel=1e-6)
    assert error == pytest.approx(optimum(whole, 2) / np.linalg.norm(whole), rel=1e-6 if dtype == "F32" else 1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_what_fp16_cannot_hold_is_refused(scale: float, tmp_path: Path) -> None:
    update = LowRank(Tensor.of(normal(4, 12).array() * scale**3), normal(9, 4))
    with pytest.raises(NumericError, match="F16, deep"):
        resized({"deep": update}, tmp_path / "out", rank=2, dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_zero_and_rank_deficient_factors(tmp_path: Path) -> None:
    zero = replace(low(), up=Tensor.of(np.zeros((7, 3), np.float32)))
    twice = replace(low(9, 8, 4), up=Tensor.of(np.repeat(normal(9, 2).array(), 2, axis=1)))
    report = resized({"zero": zero, "twice": twice}, tmp_path / "out", rank=2)
    assert report.relative_error < 1e-7
    made = loratool.read(tmp_path / "out").updates
    assert not dense(made["zero"]).any()
    np.testing.assert_allclose(dense(made["twice"]), dense(twice), atol=1e-5)
    report = resized({"zero": zero, "twice": twice}, tmp_path / "energy", energy=1 - 1e-12)
    assert [m.rank for m in report.modules] == [1, 2]


# -- what stays, what is refused ------------------------------------------------------------------------------


def test_biases_norms_and_whole_tensors_stay(tmp_path: Path) -> None:
    given = samples.adapter()
    updates = {n: u for n, u in given.updates.items() if not u.needs_base}
    kept = {n: u for n, u in updates.items() if n.endswith((".bias", "dense_norm"))}
    report = compute.resize(replace(given, updates=updates), tmp_path / "out", rank=2, to="raw")
    made = loratool.read(tmp_path / "out")
    samples.assert_same_adapter(
        Adapter(kept, given.carried, given.metadata),
        Adapter({n: u for n, u in made.updates.items() if n in kept}, made.carried, made.metadata),
    )
    assert len(kept) == 3 and report.carried == tuple(given.carried)
    assert [m.rank for m in report.modules if m.module.endswith("dense_norm")] == [None]
    assert set(report.ranks) == {"2"}
    whole = [dense(u) for n, u in updates.items() if not n.endswith(".bias")]
    lost = [dense(u) - dense(made.updates[n]) for n, u in updates.items() if not n.endswith(".bias")]
    error = math.sqrt(sum(float((d * d).sum()) for d in lost) / sum(float((d * d).sum()) for d in whole))
    assert report.relative_error == pytest.approx(error, rel=1e-6)


def test_another_dtype_is_that_of_all(tmp_path: Path) -> None:
    given = samples.adapter()
    updates = {n: u for n, u in given.updates.items() if not u.needs_base}
    report = compute.resize(replace(given, updates=updates), tmp_path / "out", rank=4, to="raw", dtype="bf16")
    file = read_safetensors(tmp_path / "out")
    assert {t.dtype for n, t in file.tensors.items() if not n.endswith(".alpha")} == {"BF16"}
    made = loratool.read(tmp_path / "out")
    whole = [dense(u) for n, u in updates.items() if not n.endswith((".bias", "_norm"))]
    lost = [dense(u) - dense(made.updates[n]) for n, u in updates.items() if not n.endswith((".bias", "_norm"))]
    error = math.sqrt(sum(float((d * d).sum()) for d in lost) / sum(float((d * d).sum()) for d in whole))
    assert report.relative_error == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("name", [n for n, u in samples.UPDATES.items() if u.needs_base])
def test_dora_is_resized_with_its_base_only(name: str, tmp_path: Path) -> None:
    update = samples.UPDATES[name]
    weight = normal(*update.shape, seed=7)
    leaf = "embed_tokens" if "embedding" in name else "h.0.attn.c_attn" if "transposed" in name else "proj"
    config = {"model_type": "gpt2"} if "transposed" in name else {}
    base = samples.model(tmp_path / "base", {f"{leaf}.weight": weight}, config)
    path = lora_file(tmp_path / "lora.safetensors", {leaf: update})
    with pytest.raises(MatchError) as caught:
        compute.resize(path, tmp_path / "out", rank=2)
    assert "--base" in caught.value.hint and not (tmp_path / "out").exists()
    before = fingerprint(base)
    report = compute.resize(path, tmp_path / "out", rank=2, base=base)
    start = weight.array().astype(np.float64)
    change = (update.apply(start) - start).reshape(len(start), -1)
    made = dense(loratool.read(tmp_path / "out").updates[leaf])
    assert np.linalg.norm(change - made) == pytest.approx(optimum(change, 2), rel=1e-6)
    assert report.relative_error == pytest.approx(optimum(change, 2) / np.linalg.norm(change), rel=1e-5)
    assert any(key.startswith("base/") for key in report.inputs) and fingerprint(base) == before


# -- ranks that are chosen ------------------------------------------------------------------------------------


def decaying(o: int, i: int, r: int, by: float, seed: int = 0, dtype: str = "F32") -> LowRank:
    values = by ** np.arange(r)
    up = np.linalg.qr(normal(o, r, seed=seed).array())[0] * values
    down = np.linalg.qr(normal(i, r, seed=seed + 1).array())[0].T
    return LowRank(Tensor.of(down, dtype), Tensor.of(up, dtype), alpha=4.0)


SPECTRA: dict[str, Update] = {
    "fast": decaying(30, 20, 8, 0.3),
    "slow": decaying(20, 40, 8, 0.9, 3),
    "conv": low(9, 5, 6, 3, 3, seed=4),
    "full": Dense(normal(12, 10)),
}


@pytest.mark.parametrize("bound", [0.5, 0.1, 0.01, 1.0])
@pytest.mark.parametrize("kind", ["error", "energy"])
@pytest.mark.parametrize("cap", [None, 3])
def test_the_smallest_rank_that_suffices(kind: str, bound: float, cap: int | None, tmp_path: Path) -> None:
    allowed = bound if kind == "error" else math.sqrt(1 - bound)
    report = resized(SPECTRA, tmp_path / "out", rank=cap, **{kind: bound})
    for module in report.modules:
        whole = dense(SPECTRA[module.module])
        left = [optimum(whole, n) / np.linalg.norm(whole) for n in range(min(whole.shape) + 1)]
        # float32 sums of squares: what remains of all the energy is rounding
        least = next(n for n, rest in enumerate(left) if rest <= allowed + 1e-6)
        assert module.rank == max(1, min(least, cap or least)), module


def test_a_bound_holds_for_what_is_stored(tmp_path: Path) -> None:
    """bfloat16 takes two of a thousand: ranks make up for it."""
    update = decaying(40, 30, 12, 0.6, dtype="BF16")
    whole = dense(update)
    left = [optimum(whole, n) / np.linalg.norm(whole) for n in range(13)]
    for bound in (left[5] * 1.00001, 1e-4):
        report = resized({"m": update}, tmp_path / "out", error=bound, overwrite=True)
        made = dense(loratool.read(tmp_path / "out").updates["m"])
        assert np.linalg.norm(whole - made) / np.linalg.norm(whole) <= bound
        assert report.relative_error <= bound


def test_a_size_is_kept_and_used(tmp_path: Path) -> None:
    """In every format, whatever its header and patterns take; never more than one rank is left unspent."""
    names = [n for n in diffusion.layers("tiny") if n.startswith("unet.")][:24]
    shapes = {name: diffusion.layers("tiny")[name] for name in names}
    updates = {n: low(s[0], s[1], 6, *s[2:], seed=k) for k, (n, s) in enumerate(shapes.items())}
    source = Adapter(updates, {}, Metadata("diffusers", strings={"note": "ö" * 300}))
    most = max(4 * (s[0] + int(np.prod(s[1:]))) for s in shapes.values())
    # these have one rank for all modules, or no names for these
    languages = ("gguf", "mlx", "torchtune", "litgpt", "loralib", "mistral", "tinker")
    for format in (format for format in FORMATS if format.writes and format.name not in languages):
        whole = compute.resize(source, tmp_path / f"{format.name}-whole", rank=6, to=format.name)
        for share in (0.7, 0.85, 1.0, 1.2):
            limit = int(share * whole.bytes)
            out = tmp_path / f"{format.name}-{share}"
            report = compute.resize(source, out, max_size=limit, to=format.name)
            file = out / "adapter_model.safetensors" if out.is_dir() else out
            assert file.stat().st_size == report.bytes <= limit
            # one rank, with its words in the header, and what patterns take
            assert report.bytes > limit - most - 600 or report.relative_error == 0, (format.name, share)
            if share >= 1:
                assert report.relative_error == 0 and report.ranks == {"6": len(updates)}


def test_a_size_loses_least(tmp_path: Path) -> None:
    """Against every allocation of ranks that the file holds."""
    updates = {name: decaying(30, 30, 3, by, n) for n, (name, by) in enumerate([("a", 0.2), ("b", 0.9), ("c", 0.6)])}
    updates["b"] = updates["b"].scaled(3.0)
    small = resized(updates, tmp_path / "small", rank=1)
    unit = 4 * 60
    for more in range(7):
        limit = small.bytes + more * unit + 64
        report = resized(updates, tmp_path / "out", max_size=limit, overwrite=True)
        lost = {n: [optimum(dense(u), r) ** 2 for r in range(4)] for n, u in updates.items()}
        fits = [p for p in itertools.product((1, 2, 3), repeat=3) if sum(p) <= 3 + more]
        best = min(sum(lost[n][r] for n, r in zip(updates, ranks, strict=True)) for ranks in fits)
        whole = sum(lost[n][0] for n in updates)
        assert report.relative_error == pytest.approx(math.sqrt(best / whole), rel=1e-5, abs=1e-7)
        capped = resized(updates, tmp_path / "capped", max_size=limit, rank=2, overwrite=True)
        assert max(m.rank for m in capped.modules) <= 2


def test_a_size_that_is_too_small(tmp_path: Path) -> None:
    least = resized(SPECTRA, tmp_path / "least", rank=1).bytes
    assert resized(SPECTRA, tmp_path / "fits", max_size=least).bytes <= least
    with pytest.raises(UsageError, match="max-size"):
        resized(SPECTRA, tmp_path / "out", max_size=least - 1)
    assert not (tmp_path / "out").exists()


# -- formats and their metadata -------------------------------------------------------------------------------


def test_kohya_metadata_is_made_anew(tmp_path: Path) -> None:
    pairs = diffusion.factors(dict(list(diffusion.layers("sd1").items())[:6]), 8)
    told = {
        "ss_network_dim": "8",
        "ss_network_alpha": "8.0",
        "ss_network_args": json.dumps({"conv_dim": "8", "dropout": "0.1"}),
        "sshs_model_hash": "0" * 64,
        "ss_output_name": "name",
    }
    source = diffusion.save(tmp_path / "in.safetensors", diffusion.kohya(pairs, alpha=4.0), told)
    compute.resize(source, tmp_path / "out", rank=2)
    found = read_safetensors(tmp_path / "out").metadata
    assert (found["ss_network_dim"], found["ss_network_alpha"], found["ss_output_name"]) == ("2", "1", "name")
    assert json.loads(found["ss_network_args"]) == {"dropout": "0.1"}
    assert found.get("sshs_model_hash") != "0" * 64
    made = loratool.read(tmp_path / "out")
    for name, pair in pairs.items():
        assert np.linalg.norm(diffusion.delta(pair, 4.0).reshape(len(pair[1]), -1) - dense(made.updates[name])) == (
            pytest.approx(optimum(diffusion.delta(pair, 4.0).reshape(len(pair[1]), -1), 2), rel=1e-6)
        )
    compute.resize(source, tmp_path / "mixed", energy=0.6)
    found = read_safetensors(tmp_path / "mixed").metadata
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft", "raw"])
def test_formats_read_again_what_is_written(to: str, tmp_path: Path) -> None:
    shapes = [item for item in diffusion.layers("sd1").items() if len(item[1]) == 2][:8]
    updates: dict[str, Update] = {n: decaying(s[0], s[1], 6, 0.5 + k / 20, k) for k, (n, s) in enumerate(shapes)}
    source = Adapter(updates, {}, Metadata("diffusers"))
    report = compute.resize(source, tmp_path / "out", energy=0.9, to=to)
    assert len(report.ranks) > 1 and report.format == to
    made = loratool.read(tmp_path / "out").updates
    strip = "unet." if to == "peft" else ""
    lost = {n: dense(u) - dense(made[n.removeprefix(strip)]) for n, u in updates.items()}
    error = math.sqrt(
        sum(float((d * d).sum()) for d in lost.values()) / sum(float((dense(u) ** 2).sum()) for u in updates.values())
    )
    assert report.relative_error == pytest.approx(error, rel=1e-6)
    ranks = {n: made[n.removeprefix(strip)].rank for n in updates}
    assert {m.module: m.rank for m in report.modules} == ranks


@pytest.mark.peer
@pytest.mark.parametrize(
    ("model", "kind"),
    [("llama", "patterns"), ("llama", "rslora_patterns"), ("gpt2", "plain"), ("bert", "mixed"), ("convnet", "conv")],
)
@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.8}, {"rank": 7}])
def test_peft_gives_the_same_logits(
    model: str, kind: str, options: dict[str, Any], base: Any, lora: Any, tmp_path: Path
) -> None:
    """PEFT with the resized adapter gives what it gives with the dense best deltas merged."""
    import torch

    folder, given = base(model), lora(model, kind)
    report = compute.resize(given, tmp_path / "out", **options)
    ranks = {m.module: m.rank for m in report.modules}
    expected = models.load_model(folder)
    weights = dict(expected.named_modules())
    for name, update in loratool.read(given).updates.items():
        whole = dense(update)
        left, values, right = np.linalg.svd(whole, full_matrices=False)
        rank = ranks[name]
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        weight = weights[name.removeprefix("base_model.model.")].weight
        assert best.shape == tuple(weight.flatten(1).shape)
        weight.data += torch.from_numpy(best).float().reshape(weight.shape)
    found = models.logits(folder, tmp_path / "out")
    torch.testing.assert_close(found, models.logits(expected), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    if options == {"rank": 2}:
        assert config["r"] == 2 and config["rank_pattern"] == {}


@pytest.mark.peer
def test_biases_and_heads_travel_along(base: Any, lora: Any, tmp_path: Path) -> None:
    import torch

    for kind in ("lora_bias", "modules_to_save", "bias_all"):
        given, out = lora("bert", kind), tmp_path / kind
        assert compute.resize(given, out, rank=9).relative_error == 0
        torch.testing.assert_close(models.logits(base("bert"), out), models.logits(base("bert"), given))
        models.load_peft(base("bert"), out)


# -- the command line -----------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(map(str, words)))
        raise SystemExit(0)
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_json_has_the_fields_of_the_contract(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = lora_file(tmp_path / "in.safetensors", {"a": low(), "b": low(9, 4)})
    code, out, err = run(capsys, "resize", source, "-o", tmp_path / "out", "--rank", 2, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["ranks"] == {"2": 2} and found["bytes"] == (tmp_path / "out").stat().st_size
    assert found["parameters"] == 2 * (7 + 5) + 2 * (9 + 4)
    assert [set(m) for m in found["modules"]] == [{"module", "rank", "relative_error", "energy"}] * 2
    metadata = read_safetensors(tmp_path / "out").metadata
    assert metadata["loratool.operation"] == "resize" and metadata["loratool.content_hash"]
    assert json.loads(metadata["loratool.inputs"]) == found["inputs"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("", 2),
        ("--rank 0", 2),
        ("--rank -3", 2),
        ("--energy 0", 2),
        ("--energy 1.1", 2),
        ("--error nan", 2),
        ("--error 0.1 --energy 0.5", 2),
        ("--max-size 3", 2),
        ("--max-size 3XB", 2),
        ("--rank 2 --to nothing", 2),
        ("--rank 2 --dtype fp8", 2),
        ("--rank 2 --base nowhere", 1),
    ],
)
def test_usage_errors(words: str, code: int, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = lora_file(tmp_path / "in.safetensors", {"a": low()})
    found, _, err = run(capsys, "resize", source, "-o", tmp_path / "out", *words.split())
    assert found == code and err.startswith("error: "), err
    assert not (tmp_path / "out").exists()


def test_nan_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad = replace(low(), up=Tensor.of(np.full((7, 3), np.nan, np.float32)))
    source = lora_file(tmp_path / "in.safetensors", {"a": bad})
    assert run(capsys, "resize", source, "-o", tmp_path / "out", "--rank", 2)[0] == 6


def test_overwriting(tmp_path: Path) -> None:
    source = lora_file(tmp_path / "in.safetensors", {"a": low()})
    base = samples.model(tmp_path / "base", {"a.weight": normal(7, 5)})
    before = fingerprint(tmp_path)
    for out in (source, base, base / "inside"):
        with pytest.raises(LoratoolError):
            compute.resize(source, out, rank=2, overwrite=True, base=base)
    assert fingerprint(tmp_path) == before
    compute.resize(source, tmp_path / "out", rank=2)
    with pytest.raises(LoratoolError, match="exists"):
        compute.resize(source, tmp_path / "out", rank=1)
    compute.resize(source, tmp_path / "out", rank=1, overwrite=True)
    assert loratool.read(tmp_path / "out").updates["a"].rank == 1


def test_the_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    updates: dict[str, Update] = {f"m.{n}": low(300, 200, 24, seed=n) for n in range(6)}
    source = lora_file(tmp_path / "in.safetensors", updates)
    found = set()
    for threads in ("1", "2", "4"):
        out = tmp_path / f"out-{threads}"
        variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        command = [sys.executable, "-m", "loratool", "resize", str(source), "-o", str(out), "--energy", "0.7", "-q"]
        subprocess.run(command, check=True, env=os.environ | variables, capture_output=True)
        found.add(out.read_bytes())
    assert len(found) == 1


def test_resizing_needs_no_torch(tmp_path: Path) -> None:
    source = lora_file(tmp_path / "in.safetensors", {"a": low()})
    script = "import sys; from loratool import cli; cli.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", script, "resize", str(source), "-o", str(tmp_path / "out"), "--rank", "2"]
    subprocess.run(command, check=True, capture_output=True)


def test_a_report_is_plain_data(tmp_path: Path) -> None:
    json.dumps(asdict(resized({"m": low()}, tmp_path / "out", rank=1)))
    assert isinstance(samples.UPDATES["dora"], DoRA) and magnitude(3).shape == (3,)


# -- progress ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "work"),
    [
        (1, lambda a, out, **more: loratool.resize(a, out, rank=1, **more)),
        (2, lambda a, out, **more: loratool.resize(a, out, max_size=100_000, **more)),
        (2, lambda a, out, **more: loratool.add(a, a, out=out, **more)),
        (2, lambda a, out, **more: loratool.subtract(a, a, out=out, **more)),
        (2, lambda a, out, **more: loratool.combine(a, a, out=out, method="svd", **more)),
        (2, lambda a, out, **more: loratool.combine(a, a, out=out, method="ties", **more)),
        (2, lambda a, out, **more: loratool.compare(a, a, **more)),
    ],
)
def test_progress_is_told_module_by_module(times: int, work: Any, tmp_path: Path) -> None:
    """In bytes of the factors; twice those where each is looked at twice, or there are two adapters."""
    updates = {name: low(seed=n) for n, name in enumerate("abc")}
    file = lora_file(tmp_path / "x", updates)
    told: list[tuple[int, int]] = []
    work(file, tmp_path / "out.safetensors", progress=lambda *now: told.append(now))
    done, totals = zip(*told, strict=True)
    size = sum(t.nbytes for update in updates.values() for t in (update.down, update.up))
    assert set(totals) == {size * times} == {done[-1]}
    assert len(done) >= 3 and list(done) == sorted(set(done))
