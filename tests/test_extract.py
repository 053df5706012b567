"""Extraction: merge(BASE, extract(BASE, TUNED)) is TUNED up to the stated error, in every layout that merge reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool import compute
from loratool.cli import main
from loratool.devices import one_blas_thread
from loratool.errors import FormatError, LossError, MatchError, NumericError, UsageError
from loratool.linalg import adaptive_svd, truncated_svd
from loratool.model import read_model
from loratool.ops import extract as ops
from loratool.tensors import Tensor, read_safetensors, write_safetensors
from tests import models, samples
from tests.test_merge_diffusion import TINY, single_file

Change = Callable[[str, np.ndarray], "np.ndarray | Tensor | None"]


def retuned(base: Path, out: Path, change: Change, dtype: str | None = None) -> Path:
    """A copy of a model with other values: ``change`` of every tensor in float32, None to leave it out."""
    if base.is_dir():
        shutil.copytree(base, out)
    files = [(p, out / p.relative_to(base)) for p in base.rglob("*.safetensors")] if base.is_dir() else [(base, out)]
    for source, target in files:
        tensors = {}
        file = read_safetensors(source)
        for name, tensor in file.tensors.items():
            made = change(name, tensor.array().astype(np.float32)) if tensor.dtype[0] in "BF" else tensor
            if made is not None:
                tensors[name] = made if isinstance(made, Tensor) else Tensor.of(made, dtype or tensor.dtype)
        target.unlink(missing_ok=True)
        write_safetensors(target, tensors, file.metadata)
    for index in out.glob("*.index.json") if out.is_dir() else ():
        table = json.loads(index.read_text())
        there = {n: p.name for p in out.glob("*.safetensors") for n in read_safetensors(p).tensors}
        index.write_text(json.dumps({**table, "weight_map": there}))
    return out


def low_rank(rank: int, size: float = 0.1, vectors: bool = True, only: str = "") -> Change:
    """A difference of this rank in every matrix, and another in every vector; of what has ``only`` in its name."""
    rng = np.random.default_rng(5)

    def change(name: str, values: np.ndarray) -> np.ndarray:
        if only not in name or values.size == 0:
            return values
        if values.ndim < 2:
            return values + size * rng.standard_normal(values.shape, np.float32) if vectors else values
        rest = values.size // len(values)
        delta = rng.standard_normal((len(values), rank)) @ rng.standard_normal((rank, rest)) / np.sqrt(rest)
        return (values + size * delta.reshape(values.shape)).astype(np.float32)

    return change


def values_of(path: Path) -> dict[str, np.ndarray]:
    return {n: at[0].tensor.array().astype(np.float64) for n, at in read_model(path).parameters.items()}


def assert_same_model(merged: Path, tuned: Path, tolerance: float = 2e-6) -> None:
    one, other = values_of(merged), values_of(tuned)
    assert one.keys() == other.keys()
    for name, wanted in other.items():
        scale = np.abs(wanted).max(initial=1e-9)
        np.testing.assert_allclose(one[name], wanted, rtol=0, atol=tolerance * scale, err_msg=name)


def round_trip(base: Path, tuned: Path, folder: Path, **options: Any) -> compute.ComputeReport:
    """extract and merge back into ``folder/merged``."""
    report = compute.extract(base, tuned, folder / "lora", **{"rank": 4, **options})
    loratool.merge(base, folder / "lora", out=folder / f"merged{base.suffix}")
    return report


# ---------------------------------------------------------------- language models


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "bert", "t5", "whisper", "qwen2_vl", "convnet"])
def test_enough_rank_reproduces_the_tuned_model(name: str, base: Callable[..., Path], tmp_path: Path) -> None:
    """Linear, Conv1D (transposed), Embedding, Conv1d, 2d, 3d; norms and biases whole; ties kept."""
    before = base(name)
    tuned = retuned(before, tmp_path / "tuned", low_rank(4))
    report = round_trip(before, tuned, tmp_path)
    assert_same_model(tmp_path / "merged", tuned)
    assert report.relative_error < 1e-6 and max(m.relative_error for m in report.modules) < 2e-6
    assert (tmp_path / "merged" / "config.json").read_bytes() == (before / "config.json").read_bytes()
    matrices = {n for n, v in values_of(before).items() if v.ndim > 1}
    assert {f"{m.module}.weight" for m in report.modules} >= {n for n in matrices if n not in report.carried}
    assert set(report.carried) <= {n for n, v in values_of(before).items() if v.ndim < 2 or v.shape[1] == 1}


def peft_logits(base: Path, adapter: Path) -> Any:
    """What PEFT's model says; nothing that it trains is missing in the file, and the file has nothing more."""
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    model = PeftModel.from_pretrained(models.load_model(base), adapter).eval()
    wanted, found = set(get_peft_model_state_dict(model)), set(load_peft_weights(adapter, device="cpu"))
    missing = {name for name in wanted - found if not name.endswith("base_layer.weight")}  # copies of the base's
    assert not missing and not found - wanted
    return models.logits(model)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "bert", "convnet"])
def test_peft_loads_it_and_speaks_as_the_tuned_model(name: str, base: Callable[..., Path], tmp_path: Path) -> None:
    """No missing and no unexpected keys; exact at full rank, within the error below.

    diffusion trap 60: of convolutions the inputs and both axes of the kernel, in this order, are one axis.
    """
    before = base(name)
    tuned = retuned(before, tmp_path / "tuned", low_rank(3, 0.2))
    compute.extract(before, tuned, tmp_path / "lora", rank=3)
    wanted, plain = models.logits(tuned), models.logits(before)
    found = peft_logits(before, tmp_path / "lora")
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max() < (plain - wanted).abs().max()
    report = compute.extract(before, tuned, tmp_path / "less", rank=2)
    near = peft_logits(before, tmp_path / "less")
    assert 0.1 < report.relative_error < 0.6 and (near - wanted).norm() < (plain - wanted).norm()


@pytest.mark.parametrize("shards", [None, "20KB"])
@pytest.mark.parametrize(("one", "other"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("mixed", "float16")])
def test_dtypes_may_differ(one: str, other: str, shards: str | None, base: Callable[..., Path], tmp_path: Path) -> None:
    """The difference is taken in float32 from the stored values; factors take the base's dtype; within a rounding."""
    before = base("llama", dtype=one, max_shard_size=shards)
    tuned = retuned(base("llama", dtype=other), tmp_path / "tuned", low_rank(2))
    report = round_trip(before, tuned, tmp_path, rank=32)
    stored = {t.dtype for t in read_safetensors(tmp_path / "lora" / "adapter_model.safetensors").tensors.values()}
    half = one != "float32"
    assert ("BF16" in stored) == (half or other == "bfloat16") and report.relative_error < (0.004 if half else 1e-6)
    assert_same_model(tmp_path / "merged", tuned, 2**-8 if half else 2e-6)


def test_bfloat16_is_met_to_one_unit_of_the_last_place(base: Callable[..., Path], tmp_path: Path) -> None:
    before = base("llama", dtype="bfloat16")
    tuned = retuned(before, tmp_path / "tuned", low_rank(2, 0.05))
    round_trip(before, tuned, tmp_path, rank=32, dtype="fp32")
    assert_same_model(tmp_path / "merged", tuned, 0)
    shutil.rmtree(tmp_path / "merged")
    shutil.rmtree(tmp_path / "lora")
    round_trip(before, tuned, tmp_path, rank=32)
    merged = values_of(tmp_path / "merged")
    for name, wanted in values_of(tuned).items():
        apart = np.abs(merged[name] - wanted)
        moved = np.abs(wanted - values_of(before)[name]).max(initial=0.0)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(wanted), np.abs(merged[name])) + 1e-9)) - 7)
        assert (apart <= unit + 0.01 * moved).all(), name  # the factors are rounded to bfloat16 as well


def test_identical_models_give_an_empty_adapter(base: Callable[..., Path], tmp_path: Path) -> None:
    """Also where NaN stands in both; peft writes and reads it, and merging it changes nothing."""
    holes = retuned(base("llama"), tmp_path / "holes", lambda n, v: v * np.nan if "layers.3.mlp.up" in n else v)
    twin = retuned(holes, tmp_path / "twin", lambda n, v: v)
    for options in ({"rank": 4}, {"energy": 0.9}, {"max_size": 10**6}):
        report = compute.extract(holes, twin, tmp_path / "lora", overwrite=True, **options)
        assert (report.modules, report.carried, report.ranks, report.relative_error) == ((), (), {}, 0.0)
    assert not loratool.read(tmp_path / "lora").updates
    loratool.merge(base("llama"), tmp_path / "lora", out=tmp_path / "merged")
    assert_same_model(tmp_path / "merged", base("llama"), 0)


@pytest.mark.parametrize("where", ["up_proj.weight", "norm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_the_tuned_model(where: str, value: float, base: Callable[..., Path], tmp_path: Path) -> None:
    def broken(name: str, values: np.ndarray) -> np.ndarray:
        return np.where(np.arange(values.size).reshape(values.shape) == 3, value, values) if where in name else values

    tuned = retuned(base("llama"), tmp_path / "tuned", broken)
    with pytest.raises(NumericError, match=where):
        compute.extract(base("llama"), tuned, tmp_path / "lora", rank=2)
    assert not (tmp_path / "lora").exists()


# ---------------------------------------------------------------- ties and vocabularies


def longer(name: str, values: np.ndarray) -> np.ndarray:
    """Four tokens more."""
    vocabulary = "embed_tokens" in name or "lm_head" in name
    return np.concatenate((values, values[:4] + 1)) if vocabulary else low_rank(2)(name, values)


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_another_vocabulary_is_carried_whole(name: str, base: Callable[..., Path], tmp_path: Path) -> None:
    tuned = retuned(base(name), tmp_path / "tuned", longer)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    report = round_trip(base(name), tuned, tmp_path)
    assert "model.embed_tokens.weight" in report.carried and ("lm_head.weight" in report.carried) == (name == "llama")
    assert_same_model(tmp_path / "merged", tuned)
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["vocab_size"] == 100 and merged["tie_word_embeddings"] == config["tie_word_embeddings"]


def one_end(name: str, values: np.ndarray) -> np.ndarray:
    return low_rank(2)(name, values) if "embed_tokens" in name else values


@pytest.mark.parametrize("told", [True, False])
def test_a_tie_that_tuning_broke(told: bool, base: Callable[..., Path], tmp_path: Path) -> None:
    """BASE tied; in TUNED only the embedding moved, the head lies beside it as it was: both are reproduced."""
    tuned = retuned(base("llama_tied"), tmp_path / "tuned", one_end)
    path = tuned / "model.safetensors"
    head = read_safetensors(base("llama_tied") / path.name).tensors["model.embed_tokens.weight"]
    write_safetensors(tmp_path / "new", {**read_safetensors(path).tensors, "lm_head.weight": head}, {})
    (tmp_path / "new").rename(path)
    if told:
        config = json.loads((tuned / "config.json").read_text())
        (tuned / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    report = round_trip(base("llama_tied"), tuned, tmp_path)
    assert [m.module for m in report.modules] == ["model.embed_tokens"] and not report.carried
    assert_same_model(tmp_path / "merged", tuned)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tie_that_tuning_made(base: Callable[..., Path], tmp_path: Path) -> None:
    """BASE untied, TUNED tied: the head's counterpart is TUNED's embedding."""
    tuned = retuned(base("llama"), tmp_path / "tuned", lambda n, v: None if "lm_head" in n else v)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    report = round_trip(base("llama"), tuned, tmp_path, rank=32)
    assert [m.module for m in report.modules] == ["lm_head"]
    merged = values_of(tmp_path / "merged")
    np.testing.assert_allclose(merged["lm_head.weight"], merged["model.embed_tokens.weight"], atol=1e-5)


def test_both_ends_of_a_tie_cost_one_factorisation(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    whole = ops.Pair.difference
    monkeypatch.setattr(ops.Pair, "difference", lambda pair: seen.append(pair.name) or whole(pair))
    tuned = retuned(base("llama_tied"), tmp_path / "tuned", one_end)
    report = compute.extract(base("llama_tied"), tuned, tmp_path / "lora", rank=2)
    assert {m.module for m in report.modules} == {"model.embed_tokens", "lm_head"}
    assert sum("embed" in name or "head" in name for name in seen) == 1


def test_a_tuned_file_without_configuration_is_tied_as_its_base(base: Callable[..., Path], tmp_path: Path) -> None:
    tuned = retuned(base("llama_tied"), tmp_path / "tuned", one_end)
    report = compute.extract(base("llama_tied"), tuned / "model.safetensors", tmp_path / "lora", rank=2)
    assert {m.module for m in report.modules} == {"model.embed_tokens", "lm_head"}


# ---------------------------------------------------------------- models that do not fit


def cut(part: str, rows: int | None) -> Change:
    return lambda n, v: (None if rows is None else v[:rows]) if part in n else low_rank(2)(n, v)


@pytest.mark.parametrize(
    ("part", "rows", "said"),
    [
        ("layers.2.mlp.up_proj", None, "lacks 1 tensors.*layers.2.mlp.up_proj"),
        ("layers.2.mlp.up_proj", 40, r"shapes differ.*layers.2.mlp.up_proj.*\[48, 32\].*\[40, 32\]"),
        ("layers.2.input_layernorm", 16, "shapes differ.*layers.2.input_layernorm"),
    ],
)
def test_misfits_are_found_before_the_first_svd(
    part: str, rows: int | None, said: str, base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops.Pair, "difference", lambda pair: pytest.fail("computed"))
    tuned = retuned(base("llama"), tmp_path / "tuned", cut(part, rows))
    with pytest.raises(MatchError, match=said):
        compute.extract(base("llama"), tuned, tmp_path / "lora", rank=2)
    assert not (tmp_path / "lora").exists()


def test_what_the_format_cannot_say_is_told_before_the_first_svd(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_made", lambda *_: pytest.fail("computed"))
    tuned = retuned(base("llama"), tmp_path / "tuned", low_rank(2))
    with pytest.raises(LossError, match="kohya"):
        compute.extract(base("llama"), tuned, tmp_path / "lora", rank=2, to="kohya")


def test_a_module_without_a_difference_is_no_loss(base: Callable[..., Path], tmp_path: Path) -> None:
    compute.extract(base("llama"), base("llama"), tmp_path / "lora.safetensors", rank=2, to="kohya")
    assert not loratool.read(tmp_path / "lora.safetensors", format="kohya").updates


def test_positions_are_no_vocabulary(base: Callable[..., Path], tmp_path: Path) -> None:
    """Another number of positions would need another configuration: refused."""
    tuned = retuned(base("gpt2"), tmp_path / "tuned", cut("wpe", 60))
    with pytest.raises(MatchError, match="wpe"):
        compute.extract(base("gpt2"), tuned, tmp_path / "lora", rank=2)


def test_a_tensor_that_only_the_tuned_model_has_is_carried(base: Callable[..., Path], tmp_path: Path) -> None:
    tuned = retuned(base("llama"), tmp_path / "tuned", lambda n, v: v)
    path = tuned / "model.safetensors"
    more = {**read_safetensors(path).tensors, "score.weight": Tensor.of(np.ones((3, 32), np.float32))}
    write_safetensors(tmp_path / "new", more, {})
    (tmp_path / "new").rename(path)
    report = round_trip(base("llama"), tuned, tmp_path)
    assert report.carried == ("score.weight",) and not report.modules
    assert_same_model(tmp_path / "merged", tuned, 0)


@pytest.mark.parametrize("both", [True, False])
def test_quantised_tensors_that_differ_are_refused(both: bool, base: Callable[..., Path], tmp_path: Path) -> None:
    def quantised(by: float) -> Change:
        return lambda n, v: Tensor.of(v * by, "F8_E4M3") if "up_proj" in n else v

    before = retuned(base("llama"), tmp_path / "base", quantised(1.0)) if both else base("llama")
    tuned = retuned(base("llama"), tmp_path / "tuned", quantised(2.0))
    with pytest.raises(FormatError, match=r"F8_E4M3.*up_proj"):
        compute.extract(before, tuned, tmp_path / "lora", rank=2)
    if both:  # the same bytes are no difference
        other = retuned(before, tmp_path / "other", lambda n, v: Tensor.of(v, "F8_E4M3") if "up_proj" in n else 2 * v)
        assert len(compute.extract(before, other, tmp_path / "lora", rank=2).modules) == 12 * 6 + 2


# ---------------------------------------------------------------- options


def test_include_and_exclude_choose_modules(base: Callable[..., Path], tmp_path: Path) -> None:
    """Searched in module names, a bias going with its module; what is left out may differ, lack or be of any shape."""
    tuned = retuned(base("gpt2"), tmp_path / "tuned", low_rank(2))
    options = {"include": r"attn\.c_attn$", "exclude": r"h\.1\."}
    report = compute.extract(base("gpt2"), tuned, tmp_path / "lora", rank=2, **options)
    assert [m.module for m in report.modules] == ["transformer.h.0.attn.c_attn"]
    assert report.carried == ("transformer.h.0.attn.c_attn.bias",)
    assert "left out" in report.warnings[0]
    lacking = retuned(base("llama"), tmp_path / "lacking", cut("layers.2.mlp.up_proj", None))
    found = compute.extract(base("llama"), lacking, tmp_path / "second", rank=2, exclude="up_proj")
    assert len(found.modules) == 12 * 6 + 2


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_bad_regular_expressions(option: str, base: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--{option}.*'\\(x'"):
        compute.extract(base("llama"), base("llama"), tmp_path / "lora", rank=2, **{option: "(x"})


def test_regular_expressions_are_bounded_in_time(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_SECONDS", 0.05)
    with pytest.raises(UsageError, match="too long"):
        ops.Chosen(None, "^(x|xx|(x+x*)+)+[^x]{2}$")("x" * 64 + "y")


def test_a_choice_of_nothing_is_a_mistake(base: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave no module"):
        compute.extract(base("llama"), base("llama"), tmp_path / "lora", rank=2, include="qproj")


def full_rank(name: str, values: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(len(name))
    return (values + 0.1 * rng.standard_normal(values.shape)).astype(np.float32) if "_proj" in name else values


def optimum(base: Path, tuned: Path) -> dict[str, np.ndarray]:
    """Singular values of every difference, by LAPACK in float64."""
    one, other = values_of(base), values_of(tuned)
    differences = {n: other[n] - one[n] for n in one if one[n].ndim > 1 and (one[n] != other[n]).any()}
    return {n: np.linalg.svd(d.reshape(len(d), -1), compute_uv=False) for n, d in differences.items()}


def test_rank_energy_and_error(base: Callable[..., Path], tmp_path: Path) -> None:
    """The best error at each rank; the smallest sufficient rank; the cap; a rank beyond the matrix is cut."""
    before = base("llama")
    tuned = retuned(before, tmp_path / "tuned", full_rank)
    spectra = optimum(before, tuned)
    for options in ({"rank": 5}, {"energy": 0.9}, {"error": 0.2}, {"error": 0.2, "rank": 9}, {"rank": 99}):
        report = compute.extract(before, tuned, tmp_path / "lora", overwrite=True, **options)
        lost = 0.0
        for module in report.modules:
            values = spectra[f"{module.module}.weight"]
            error = np.sqrt(np.append(np.cumsum(values[::-1] ** 2)[::-1], 0) / (values**2).sum())
            bound = {"energy": 0.1**0.5, "error": 0.2}.get(next(iter(options)), 0.0)
            wanted = min(int((error > bound).sum()) if bound else len(values), options.get("rank", 99))
            assert module.rank == wanted, (options, module)
            assert module.relative_error <= max(1.0005 * error[wanted], 1e-6)
            assert module.energy == pytest.approx(1 - module.relative_error**2)
            lost += module.relative_error**2 * (values**2).sum()
            for share in (0.9, 0.95, 0.99):
                assert module.needed[f"{share:.0%}"] == int((1 - error**2 < share).sum())
        whole = sum((v**2).sum() for v in spectra.values())
        assert report.relative_error == pytest.approx((lost / whole) ** 0.5)


def test_rounding_that_passes_the_bound_takes_one_rank_more(tmp_path: Path) -> None:
    """The error asked for is just that of rank 4: in float32 rank 4 has it, in bfloat16 the rank after."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 9)))[0] for n in (40, 30))
    values = 0.3 ** np.arange(9.0)
    base, tuned = (
        samples.model(tmp_path / name, {"m.weight": Tensor.of((by * (left * values) @ right.T).astype(np.float32))})
        for name, by in (("base", 0), ("tuned", 1))
    )
    error = float(np.sqrt((values[4:] ** 2).sum() / (values**2).sum())) * (1 + 1e-5)
    for dtype, rank in (("fp32", 4), ("bf16", 5)):
        report = compute.extract(base, tuned, tmp_path / dtype, error=error, dtype=dtype)
        assert report.modules[0].rank == rank and report.modules[0].relative_error <= error


def test_an_error_holds_for_what_is_written(base: Callable[..., Path], tmp_path: Path) -> None:
    """Rounding to bfloat16 adds to the error: further ranks make up for it, or a warning tells that none can."""
    before = base("llama")
    tuned = retuned(before, tmp_path / "tuned", full_rank)
    report = compute.extract(before, tuned, tmp_path / "lora", error=0.01, dtype="bf16")
    assert max(m.relative_error for m in report.modules) <= 0.01 and not report.warnings
    report = compute.extract(before, tuned, tmp_path / "more", error=0.0001, dtype="bf16")
    assert "rounding keeps" in report.warnings[0]


@pytest.mark.parametrize("to", ["peft", "raw"])
def test_max_size_spends_the_bytes_where_least_is_lost(to: str, base: Callable[..., Path], tmp_path: Path) -> None:
    """The file is no larger, nearly as large, and no exchange of ranks between modules would lose less."""
    before = base("llama")
    tuned = retuned(before, tmp_path / "tuned", lambda n, v: low_rank(3, 1.0)(n, full_rank(n, v)))
    size = 90_000
    report = compute.extract(before, tuned, tmp_path / "lora", max_size=size, to=to)
    file = tmp_path / "lora" / "adapter_model.safetensors" if to == "peft" else tmp_path / "lora"
    spectra, shapes = optimum(before, tuned), {n: v.shape for n, v in values_of(before).items()}
    least = 4 * min(sum(shapes[f"{m.module}.weight"]) for m in report.modules)  # bytes of one more rank
    assert (
        size - least - 64 < report.bytes == file.stat().st_size <= size
    )  # 64: digits of offsets and of what is needed
    assert len(report.ranks) > 1
    last, following = [], []
    for module in report.modules:
        name = f"{module.module}.weight"
        values = np.append(spectra[name] ** 2 / sum(shapes[name]), 0)
        last += [values[module.rank - 1]] if module.rank > 1 else []
        following.append(values[module.rank])
    assert min(last) >= 0.999 * max(following)
    with pytest.raises(UsageError, match="rank 1 of all"):
        compute.extract(before, tuned, tmp_path / "small", max_size=20_000)


def test_a_module_that_takes_far_more_than_its_share_of_the_bytes_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spectra are computed to a depth first: what takes all of it is computed further."""
    rng = np.random.default_rng(5)
    before = {f"{name}.weight": rng.standard_normal((64, 64), np.float32) for name in "abcdefghijkl"}
    after = {n: v + 1e-3 * np.outer(v[0], v[1]).astype(np.float32) for n, v in before.items()}
    after["a.weight"] = before["a.weight"] + 5 * np.linalg.qr(before["a.weight"])[0]
    base, tuned = (
        samples.model(tmp_path / name, {n: Tensor.of(v) for n, v in values.items()}, {})
        for name, values in (("base", before), ("tuned", after))
    )
    whole = compute.extract(base, tuned, tmp_path / "whole", max_size=33_000, to="raw")
    monkeypatch.setattr("loratool.linalg.EXACT_SIDE", 8)  # as for large modules: leading values only
    found = compute.extract(base, tuned, tmp_path / "found", max_size=33_000, to="raw")
    ranks = {m.module: m.rank for m in found.modules}
    assert ranks == {m.module: m.rank for m in whole.modules}
    assert ranks["a"] > 8 + 2 * 33_000 // (12 * 128 * 2) and set(ranks.values()) == {1, ranks["a"]}


def test_the_same_bytes_twice_whatever_the_threads(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = retuned(base("bert"), tmp_path / "tuned", low_rank(6))
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(ops, "thread_count", lambda n=threads: n)
        compute.extract(base("bert"), tuned, tmp_path / "lora", rank=3, overwrite=True)
        found.append([p.read_bytes() for p in sorted((tmp_path / "lora").iterdir())])
    assert found[0] == found[1]


def test_torch_computes_the_same(base: Callable[..., Path], tmp_path: Path) -> None:
    """The path of an accelerator, walked on the processor."""
    torch = pytest.importorskip("torch")
    tuned = retuned(base("llama"), tmp_path / "tuned", full_rank)
    one, other = read_model(base("llama")), read_model(tuned)
    plain = ops.extract(one, other, ops.Choice(rank=4))
    moved = ops.extract(one, other, ops.Choice(rank=4), to_device=torch.from_numpy)
    for a, b in zip(plain.modules, moved.modules, strict=True):
        assert (a.module, a.rank) == (b.module, b.rank) and a.relative_error == pytest.approx(b.relative_error, 1e-6)
    matrix = spectrum_of("power", 900, 800)[0]
    found = truncated_svd(torch.from_numpy(matrix), 8)
    assert found.error(8) == pytest.approx(truncated_svd(matrix, 8).error(8), rel=1e-4)


# ---------------------------------------------------------------- accuracy


def spectrum_of(kind: str, out: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix with a known kind of spectrum, and its singular values."""
    rng = np.random.default_rng(out + inner)
    short = min(out, inner)
    left, right = (np.linalg.qr(rng.standard_normal((n, short), np.float32))[0] for n in (out, inner))
    ranks = np.arange(1, short + 1)
    noise = rng.standard_normal((out, inner), np.float32) * 0.3 / np.sqrt(max(out, inner)) if kind == "noise" else 0.0
    values = {
        "fast": np.exp(-ranks / 8),
        "power": ranks**-0.7,
        "flat": 1 + 1e-3 / ranks,
        "noise": np.where(ranks <= 8, 3.5 - ranks / 4, 0.0),
    }[kind]
    matrix = ((left * values.astype(np.float32)) @ right.T + noise).astype(np.float32)
    exact = np.linalg.svd(matrix, compute_uv=False) if kind == "noise" else values
    return matrix, exact.astype(np.float64)


@pytest.mark.parametrize("kind", ["fast", "power", "flat", "noise"])
@pytest.mark.parametrize(("out", "inner"), [(300, 200), (1000, 800), (800, 1100)])
def test_within_five_ten_thousandths_of_the_optimum(kind: str, out: int, inner: int, tmp_path: Path) -> None:
    """Below and above the size up to which the SVD is exact; the error is that of the file itself."""
    matrix, values = spectrum_of(kind, out, inner)
    write_safetensors(tmp_path / "base.safetensors", {"a.weight": Tensor.of(0 * matrix)}, {})
    write_safetensors(tmp_path / "tuned.safetensors", {"a.weight": Tensor.of(matrix)}, {})
    for rank in (4, 16, 48):
        best = np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())
        report = compute.extract(
            tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "lora", rank=rank, overwrite=True
        )
        loaded = loratool.read(tmp_path / "lora").updates["a"]
        found = np.linalg.norm(matrix - loaded.delta().astype(np.float64)) / np.linalg.norm(matrix)  # type: ignore[attr-defined]
        assert found <= 1.0005 * best and report.relative_error == pytest.approx(found, rel=1e-3)
    (module,) = report.modules
    kept = np.cumsum(values**2) / (values**2).sum()
    for share in (0.9, 0.95, 0.99):
        wanted = int((kept < share).sum()) + 1
        known = wanted <= 48 or min(out, inner) <= 768
        assert module.needed[f"{share:.0%}"] == (wanted if known else None)  # type: ignore[attr-defined]


def test_low_rank_without_noise_is_exact_at_any_higher_rank() -> None:
    """A block Krylov basis beyond the matrix's own rank must not lose its orthogonality."""
    rng = np.random.default_rng(0)
    with one_blas_thread():
        for _ in range(3):
            matrix = (rng.standard_normal((1024, 8)) @ rng.standard_normal((8, 896))).astype(np.float32)
            for rank in (8, 128):
                up, down = truncated_svd(matrix, rank).factors()
                assert np.linalg.norm(matrix - up @ down) < 1e-6 * np.linalg.norm(matrix)


@pytest.mark.parametrize("kind", ["fast", "power", "noise"])
def test_the_smallest_rank_that_suffices(kind: str) -> None:
    """Also for errors that single precision cannot tell from the energies."""
    matrix, values = spectrum_of(kind, 1000, 800)
    error = np.sqrt(np.cumsum((values**2)[::-1])[::-1] / (values**2).sum())
    for bound in (0.5, 0.1, 1e-3, 1e-4) if kind == "fast" else (0.8,):
        wanted = int((error > bound).sum())
        with one_blas_thread():
            found = len(adaptive_svd(matrix, bound).values)
        assert wanted <= found <= wanted + 1, bound


@pytest.mark.peer
def test_a_real_model(minilm: tuple[Path, Path], tmp_path: Path) -> None:
    """MiniLM with a LoRA that was trained on it merged in, extracted again: the LoRA's own updates."""
    before, lora = minilm
    loratool.merge(before, lora, out=tmp_path / "tuned")
    report = round_trip(before, tmp_path / "tuned", tmp_path, rank=16, error=1e-3)
    trained = loratool.read(lora)
    assert {m.rank for m in report.modules} <= {3, 4, 5, 6, 7, 8} and len(report.modules) == len(trained.updates)
    found = loratool.compare(lora, tmp_path / "lora")
    assert found.relative_difference < 2e-3 and not found.only_in_first and not found.only_in_second
    assert_same_model(tmp_path / "merged", tmp_path / "tuned", 1e-3)


# ---------------------------------------------------------------- diffusion


@pytest.mark.parametrize("part", ["", "unet", "text_encoder"])
@pytest.mark.parametrize("to", ["peft", "kohya", "diffusers"])
def test_diffusers_folders(part: str, to: str, tmp_path: Path) -> None:
    """A pipeline, or one component: names behind their component, in formats that others read."""
    before = TINY / part
    change = low_rank(2, vectors=to == "peft")
    chosen = lambda n, v: v if "embedding" in n and "time" not in n and to != "peft" else change(n, v)  # noqa: E731
    tuned = retuned(before, tmp_path / "tuned", chosen)
    options = {"exclude": "^(vae|safety)|embeddings"} if to != "peft" else {}
    report = round_trip(before, tuned, tmp_path, to=to, dtype="fp32", **options)
    heads = {m.module.split(".")[0] for m in report.modules}
    assert heads == ({part} if part else {"unet", "text_encoder"} | ({"vae"} if to == "peft" else set()))
    assert report.relative_error < 2e-3  # the tuned values are rounded to float16
    if to == "peft":
        assert_same_model(tmp_path / "merged", tuned, 2e-3)
    keys = list(loratool.read(tmp_path / "lora").updates)
    assert to == "peft" or all(key.startswith(("unet.", "text_encoder.")) for key in keys)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_single_files_speak_reference_names(name: str, tmp_path: Path) -> None:
    """LDM and SGM names; the rows of OpenCLIP's in_proj and its transposed projection; back into the file."""
    before, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    single_file(before, name)
    retuned(before, tuned, low_rank(2, 0.3))
    report = round_trip(before, tuned, tmp_path, rank=4, dtype="fp32")
    assert_same_model(tmp_path / "merged.safetensors", tuned, 2e-3)
    known = {m.module for m in report.modules}
    assert any(n.startswith("unet.down_blocks.0.resnets") for n in known)
    if name != "sd1":
        text = "text_encoder_2" if name == "sdxl" else "text_encoder"
        assert f"{text}.text_model.encoder.layers.0.self_attn.k_proj" in known
    others = "first_stage_model|embedding|^text_encoder.*(pro|pos)"
    plain = retuned(before, tmp_path / "plain.safetensors", low_rank(2, 0.3, vectors=False))
    for to in ("kohya", "diffusers") if name == "sd2" else ():
        compute.extract(before, plain, tmp_path / to, rank=2, to=to, exclude=others)
        assert loratool.inspect(tmp_path / to).format == to


def test_a_single_file_beside_a_pipeline(tmp_path: Path) -> None:
    """BASE with diffusers names in folders, TUNED as one LDM file: the same weights under other names and shapes."""
    from loratool.architectures import architecture

    known = architecture("sd1")
    assert known is not None
    tuned = retuned(TINY, tmp_path / "pipeline", low_rank(2, vectors=False, only="attn"))
    slots = known.checkpoint()
    places = read_model(tuned).parameters
    ldm = {slots[n].tensor: at[0].tensor for n, at in places.items() if n in slots and slots[n].whole}
    write_safetensors(tmp_path / "ldm.safetensors", ldm, {})
    report = compute.extract(TINY, tmp_path / "ldm.safetensors", tmp_path / "lora", rank=2, exclude="^vae")
    same = compute.extract(TINY, tuned, tmp_path / "same", rank=2, exclude="^vae")
    assert {m.module for m in report.modules} == {m.module for m in same.modules}
    assert loratool.compare(tmp_path / "lora", tmp_path / "same").relative_difference < 1e-6


def test_of_two_precisions_the_like_are_compared(tmp_path: Path) -> None:
    """A folder that holds its weights twice: no rounding of the narrow copy gets into the difference."""
    before = tmp_path / "unet"
    shutil.copytree(TINY / "unet", before)
    path = before / "diffusion_pytorch_model.safetensors"
    rng = np.random.default_rng(1)
    wide = {
        k: Tensor.of(t.array().astype(np.float32) + 1e-5 * rng.random(t.shape, np.float32))
        for k, t in read_safetensors(path).tensors.items()
    }
    path.rename(before / "diffusion_pytorch_model.fp16.safetensors")
    write_safetensors(path, wide, {})
    write_safetensors(tmp_path / "tuned.safetensors", wide, {})
    report = compute.extract(before, tmp_path / "tuned.safetensors", tmp_path / "lora", rank=2)
    assert report.modules == () and report.carried == ()


# ---------------------------------------------------------------- the command line


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
        raise SystemExit(0)
    return int(ended.value.code or 0)


def test_exit_codes(base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = base("llama"), tmp_path / "lora"
    tuned = retuned(before, tmp_path / "tuned", low_rank(2))
    command = ("extract", before, tuned, "-o", out)
    assert run(*command, "--rank", 2, "--device", "cuda:99") == 1
    assert run(*command, "--rank", 2, "--device", "gpu") == 2
    assert run(*command) == 2 and run(*command, "--rank", 0) == 2 and run(*command, "--energy", 1.5) == 2
    assert run(*command, "--energy", 0.5, "--error", 0.5) == 2 and run(*command, "--max-size", "many") == 2
    assert run(*command, "--rank", 2, "--to", "nothing") == 2
    assert not out.exists()
    capsys.readouterr()
    assert run(*command, "--rank", 2, "--to", "kohya") == 5
    assert "model.norm" in capsys.readouterr().err and not out.exists()
    assert run(*command, "--rank", 2) == 0 and run(*command, "--rank", 2) == 1
    assert run(*command, "--rank", 2, "--overwrite") == 0
    assert run("extract", before, tuned, "-o", tuned, "--rank", 2, "--overwrite") == 1
    assert run("extract", before, tmp_path / "none", "-o", tmp_path / "x", "--rank", 2) == 1


def test_report(base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = retuned(base("llama"), tmp_path / "tuned", full_rank)
    assert run("extract", base("llama"), tuned, "-o", tmp_path / "lora", "--rank", 3, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert {"ranks", "parameters", "bytes", "relative_error", "modules"} <= said.keys()
    assert said["ranks"] == {"3": 84} and {"module", "rank", "relative_error", "energy"} <= said["modules"][0].keys()
    assert said["details"]["needed"].keys() == {"90%", "95%", "99%"}
    inputs = said["inputs"]
    assert set(inputs) == {"base/model.safetensors", "tuned/model.safetensors"}
    assert run("extract", base("llama"), tuned, "-o", tmp_path / "again", "--rank", 3) == 0
    table = capsys.readouterr().out
    assert "90%" in table and "  all " in table and "model.layers.11.mlp.up_proj" in table


def test_ranks_needed_are_told_only_where_they_are_known() -> None:
    """A truncated spectrum knows the whole energy, and no values beyond its own."""
    short = ops.Known(np.array([3.0, 2.0]), 18.0, False)
    whole = ops.Known(np.array([2.0, 1.0, 1.0]), 6.0, True)
    assert [ops.rank_for_share([short], s) for s in (0.5, 0.7, 0.9)] == [1, 2, None]
    assert [ops.rank_for_share([whole], s) for s in (0.5, 0.7, 0.9)] == [1, 2, 3]
    assert [ops.rank_for_share([short, whole], s) for s in (0.5, 0.7, 0.75, 0.8)] == [1, 2, 2, None]
