"""Merging: PEFT's own weights, rounded once; every other byte as it was; all or nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.architectures import Slot
from loratool.devices import choose
from loratool.errors import FormatError, LoratoolError, MatchError, NumericError, UsageError
from loratool.model import read_model
from loratool.ops.changes import _parts
from loratool.ops.merge import run_merge
from loratool.ops.verify import ulps
from loratool.plan import OutputFile, Part, Plan, Run, Step
from loratool.tensors import Tensor, numpy_dtype, read_safetensors, write_safetensors
from loratool.update import Dense, DoRA, Update
from tests import models, samples
from tests.samples import DEVICES, fingerprint, lora_file, low, magnitude, normal

Make = Callable[..., Path]
TIED = ("llama_tied", "gpt2", "whisper", "t5")
ENDS = ("embedding", "dora_embedding", "mixed", "head", "tied", "modules_to_save")  # kinds that reach a tied weight
REFUSED = (("t5", "head"), ("t5", "modules_to_save"))  # see test_ties
APART = [(n, k) for n, k in models.PAIRS if not (n in TIED and k in ENDS)]  # PEFT merges these right


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor of a model, in the order of files and bytes."""
    model = read_model(path)
    return {name: at[0].tensor for name, at in model.parameters.items()}


def values(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.array().copy() for name, tensor in stored(path).items()}


def assert_untouched(base: Path, merged: Path, touched: set[str]) -> None:
    """Names, order, dtypes, shapes and metadata are kept; what no update touches is byte-identical."""
    one, other = read_model(base), read_model(merged)
    assert [w.name for w in one.weights] == [w.name for w in other.weights]
    for before, after in zip(one.weights, other.weights, strict=True):
        assert list(before.file.tensors) == list(after.file.tensors)
        metadata = [(k, v) for k, v in after.file.metadata.items() if not k.startswith("loratool.")]
        assert metadata == list(before.file.metadata.items())
        for name, tensor in before.file.tensors.items():
            found = after.file.tensors[name]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
            assert found.same_bytes(tensor) is (name not in touched), name


# -- PEFT as the oracle --------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize(("name", "kind"), [pair for pair in models.PAIRS if pair not in REFUSED])
def test_a_merged_folder_says_what_peft_says_unmerged(
    name: str, kind: str, base: Make, lora: Make, tmp_path: Path
) -> None:
    """Every kind of adapter on every model, ties included; the folder loads as the base does."""
    import torch

    loratool.merge(base(name), lora(name, kind), out=tmp_path / "out")
    found, expected = models.logits(tmp_path / "out"), models.logits(base(name), lora(name, kind))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def peft_touched(name: str, base: Path, lora: Path) -> tuple[dict[str, Any], set[str]]:
    """PEFT's float32 merge, and the tensors it changed."""
    from safetensors.torch import load_file

    merged = models.peft_merged(base, lora)
    plain = {key: t for file in base.glob("*.safetensors") for key, t in load_file(file).items()}
    return merged, {key for key, t in plain.items() if not t.float().equal(merged[key])}


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "kind"), [p for p in APART if p[1] in ("patterns", "dora", "conv", "bias_all", "mixed")]
)
def test_float32_weights_are_pefts_and_the_rest_is_the_bases(
    name: str, kind: str, base: Make, lora: Make, tmp_path: Path
) -> None:
    loratool.merge(base(name), lora(name, kind), out=tmp_path / "out")
    expected, touched = peft_touched(name, base(name), lora(name, kind))
    assert_untouched(base(name), tmp_path / "out", touched)
    for key, found in values(tmp_path / "out").items():
        np.testing.assert_allclose(found, expected[key].numpy(), rtol=0, atol=3e-6)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "kind", "dtype", "shards"),
    [
        ("llama", "rslora_patterns", "bfloat16", "40KB"),
        ("llama", "dora", "bfloat16", None),
        ("llama", "embedding", "float16", "40KB"),
        ("gpt2", "patterns", "float16", None),
        ("gpt2", "lora_bias", "bfloat16", "20KB"),
        ("bert", "dora_embedding", "mixed", "20KB"),
        ("whisper", "bias_lora_only", "bfloat16", None),
        ("qwen2_vl", "dora_conv", "bfloat16", "20KB"),
        ("qwen2_vl", "mixed", "mixed", None),
        ("t5", "dora_patterns", "float16", None),
        ("convnet", "conv", "float16", None),
        ("convnet", "lora_bias", "mixed", None),
    ],
)
def test_half_precision_is_the_float32_merge_rounded_once(
    name: str, kind: str, dtype: str, shards: str | None, base: Make, lora: Make, tmp_path: Path
) -> None:
    """llm traps 57 and 59: one rounding, so hardly an element differs and none by more than one place."""
    import torch

    there = base(name, dtype=dtype, max_shard_size=shards)
    loratool.merge(there, lora(name, kind), out=tmp_path / "out")
    assert shards is None or len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    expected, touched = peft_touched(name, there, lora(name, kind))
    assert_untouched(there, tmp_path / "out", touched)
    total = different = 0
    for key, tensor in stored(tmp_path / "out").items():
        wanted = expected[key].to(getattr(torch, numpy_dtype(tensor.dtype).name)).contiguous()
        raw = wanted.reshape(-1).view(torch.uint8).numpy().view(numpy_dtype(tensor.dtype))
        if tensor.dtype == "F32":
            np.testing.assert_allclose(tensor.array().reshape(-1), raw, rtol=0, atol=3e-6)
            continue
        apart = ulps(tensor.array().reshape(-1), raw)
        assert apart.max(initial=0) <= 1, key
        different, total = different + int((apart > 0).sum()), total + apart.size
    assert different <= 3e-4 * total


@pytest.mark.peer
def test_a_real_model_and_a_lora_really_trained_on_it(minilm: tuple[Path, Path], tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import BertModel

    base, lora = minilm
    report = loratool.merge(base, lora, out=tmp_path / "out")
    sentences = [sentence for pair in models.SYNONYMS for sentence in pair]
    plain = BertModel.from_pretrained(base, add_pooling_layer=False)
    with torch.no_grad():
        before = models.embed(plain, sentences)
        expected = models.embed(PeftModel.from_pretrained(plain, lora).merge_and_unload(), sentences)
        found = models.embed(BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=False), sentences)
    assert report.modules == 36 and not report.unmatched
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, before, atol=0.05)


# -- small models, by the formula ----------------------------------------------------------------------------

CONFIG = {"vocab_size": 11, "torch_dtype": "float32"}


def weights(dtype: str = "F32") -> dict[str, Tensor]:
    return {
        "layers.0.q.weight": normal(7, 5, dtype=dtype, seed=50),
        "layers.0.q.bias": normal(7, dtype=dtype, seed=51),
        "layers.1.q.weight": normal(7, 5, dtype=dtype, seed=52),
        "norm.weight": normal(5, seed=53),
        "steps": Tensor.of(np.array([3], np.int64)),
    }


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return samples.model(tmp_path / "base", weights(), CONFIG)


@pytest.fixture
def q(tmp_path: Path) -> Path:
    return lora_file(tmp_path / "q.safetensors", {"layers.0.q": low()})


def expected_of(base: Tensor, *updates: tuple[Update, float]) -> np.ndarray:
    """W + sum of strength x (W' - W) in float64."""
    plain = base.array().astype(np.float64)
    return plain + sum(s * (u.apply(plain) - plain) for u, s in updates)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, -1.25), (0.0, 1.0), (0.0, 0.0)])
def test_several_adapters_with_strengths(dtype: str, strengths: tuple[float, float], tmp_path: Path) -> None:
    """Each is relative to the unmerged base: the order does not matter; for DoRA W + s (W' - W). llm trap 25.

    diffusion trap 47: a strength counts once.
    """
    base = samples.model(tmp_path / "base", weights(dtype))
    updates: list[Update] = [low(seed=20), DoRA(low(seed=30), magnitude(7))]
    loras = [lora_file(tmp_path / f"{n}", {"layers.0.q": u}) for n, u in enumerate(updates)]
    loratool.merge(base, *loras, strengths=strengths, out=tmp_path / "out")
    loratool.merge(base, loras[::-1], strengths=strengths[::-1], out=tmp_path / "turned")
    wanted = expected_of(weights(dtype)["layers.0.q.weight"], *zip(updates, strengths, strict=True))
    for out in ("out", "turned"):
        found = values(tmp_path / out)["layers.0.q.weight"]
        assert found.dtype == numpy_dtype(dtype)
        if dtype in ("F32", "F64"):
            np.testing.assert_allclose(found, wanted, atol=3e-6)
        else:
            assert ulps(found, Tensor.of(wanted).cast(dtype).array()).max() <= 1


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_sum_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    """llm trap 57: exact against float64 where every product is; two adapters are not rounded between."""
    digits = 8 if dtype == "BF16" else 11
    one = Tensor.of(np.ones((1, 1), np.float32))
    ulp = 2.0 ** (1 - digits)
    halves = [Tensor.of(np.full((1, 1), ulp * part, np.float32)) for part in (0.375, 0.375)]
    base = samples.model(tmp_path / "base", {"q.weight": one.cast(dtype)})
    loras = [
        lora_file(tmp_path / f"{n}", {"q": samples.LowRank(one, half, alpha=1.0)}) for n, half in enumerate(halves)
    ]
    loratool.merge(base, *loras, out=tmp_path / "out")
    assert values(tmp_path / "out")["q.weight"].item() == 1 + ulp
    loratool.merge(base, loras[0], out=tmp_path / "alone")
    assert values(tmp_path / "alone")["q.weight"].item() == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_float64_adapter_is_rounded_once_too(device: str, tmp_path: Path) -> None:
    """A stop-over at float32 would round twice: 1 + half an ulp + a little is more than half."""
    base = samples.model(tmp_path / "base", {"q.weight": Tensor.of(np.ones((1, 1), np.float32), "BF16")})
    little = np.array([[2.0**-8 + 2.0**-40]])
    update = samples.LowRank(Tensor.of(np.ones((1, 1))), Tensor.of(little), alpha=1.0)
    loratool.merge(base, lora_file(tmp_path / "x", {"q": update}), device=device, out=tmp_path / "out")
    assert values(tmp_path / "out")["q.weight"].item() == 1 + 2.0**-7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16", "F16"])
@pytest.mark.parametrize("wide", [False, True])
def test_many_adapters_of_one_weight(device: str, dtype: str, wide: bool, tmp_path: Path) -> None:
    """Whatever memory the blocks reuse, every adapter and the base itself are in the sum."""
    base = samples.model(tmp_path / "base", {"q.weight": normal(7, 5, dtype=dtype, seed=50)})
    updates = [low(seed=n) for n in range(4)]
    if wide:
        updates = [replace(u, down=u.down.cast("F64")) for u in updates]
    loras = [lora_file(tmp_path / f"{n}", {"q": u}) for n, u in enumerate(updates)]
    strengths = [1.0, -0.5, 2.0, 0.25]
    loratool.merge(base, loras, strengths=strengths, device=device, out=tmp_path / "out")
    wanted = expected_of(normal(7, 5, dtype=dtype, seed=50), *zip(updates, strengths, strict=True))
    found = values(tmp_path / "out")["q.weight"]
    if dtype in ("F32", "F64"):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    else:
        assert ulps(found, Tensor.of(wanted).cast(dtype).array()).max() <= 1


def test_strengths_are_given_once_each_or_not_at_all(small: Path, q: Path, tmp_path: Path) -> None:
    for strengths in ((1.0,), (1.0, 2.0, 3.0)):
        with pytest.raises(UsageError, match="strengths for 2 adapters"):
            loratool.merge(small, q, q, strengths=strengths, out=tmp_path / "out")
    for strength in (np.nan, np.inf):
        with pytest.raises(UsageError, match="finite"):
            loratool.merge(small, q, strengths=[strength], out=tmp_path / "out")


@pytest.mark.parametrize("name", ["lora_transposed", "lora_embedding", "lora_conv2d", "lora_tucker", "dense", "sum"])
def test_other_kinds_of_update(name: str, tmp_path: Path) -> None:
    update = samples.UPDATES[name]
    weight = normal(*update.shape, seed=60)
    config = {"model_type": "gpt2"} if "transposed" in name else {}
    base = samples.model(tmp_path / "base", {"h.0.mlp.c_fc.weight": weight}, config)
    loratool.merge(base, lora_file(tmp_path / "x", {"h.0.mlp.c_fc": update}), out=tmp_path / "out")
    found = values(tmp_path / "out")["h.0.mlp.c_fc.weight"]
    np.testing.assert_allclose(found, expected_of(weight, (update, 1.0)), atol=3e-6)


@pytest.mark.parametrize("name", [n for n, u in samples.UPDATES.items() if u.shape and u.shape[0] > 1])
def test_swapped_halves_of_a_fused_weight_are_the_whole_or_refused_by_the_plan(name: str) -> None:
    """What the plan takes the run can do: rotations that mix rows of both halves are refused before anything runs."""
    update = samples.UPDATES[name]
    shape = tuple(size or 4 for size in update.shape)
    whole = normal(*shape, seed=60).array()
    change = (update.sized(shape) or update).apply(whole) - whole
    for cut in {shape[0] // 2, 1}:
        pieces = ((cut, shape[0]), (0, cut))  # the stored tensor holds what comes last first
        base, stored = (np.roll(value, cut, axis=0) for value in (whole, change))
        try:
            parts = list(_parts(update, Slot("w.weight", pieces, shape[0]), shape, 1.0, "m"))
        except FormatError as refused:
            assert str(refused.where) == "m -> w.weight"
            continue
        found = np.zeros_like(stored)
        for part in parts:
            found[part.start : part.stop] = (
                part.update.apply(base[part.start : part.stop]) - base[part.start : part.stop]
            )
        np.testing.assert_allclose(found, stored, atol=2e-5)


def test_biases_and_whole_tensors_follow_the_strength(small: Path, tmp_path: Path) -> None:
    """A tensor trained whole: W + s (W' - W); with strength 1 its very bytes."""
    norm = normal(5, dtype="BF16", seed=70)
    updates: dict[str, Update] = {"layers.0.q": low(), "layers.0.q.bias": Dense(normal(7), 0.5, "bias")}
    lora = lora_file(tmp_path / "x", updates, norm__weight=norm)
    for strength in (1.0, 0.25):
        out = tmp_path / f"{strength}"
        loratool.merge(small, lora, strengths=[strength], out=out)
        found = values(out)
        bias = expected_of(weights()["layers.0.q.bias"], (updates["layers.0.q.bias"], strength))
        np.testing.assert_allclose(found["layers.0.q.bias"], bias, atol=1e-6)
        plain = weights()["norm.weight"].array()
        np.testing.assert_allclose(found["norm.weight"], plain + strength * (norm.float() - plain), atol=1e-6)
    assert values(tmp_path / "1.0")["norm.weight"].tobytes() == norm.float().tobytes()


def test_a_new_head_is_added_whole(small: Path, tmp_path: Path) -> None:
    """llm trap 11: a classifier that the base does not have."""
    score = normal(2, 5, dtype="F16")
    report = loratool.merge(
        small, lora_file(tmp_path / "x", {"layers.0.q": low()}, score__weight=score), out=tmp_path / "out"
    )
    found = stored(tmp_path / "out")
    assert found["score.weight"].same_bytes(score)
    assert list(found)[:-1] == list(stored(small))
    assert report.tensors_copied == len(weights()) - 1


def test_a_new_head_stands_in_the_index(tmp_path: Path) -> None:
    """llm trap 55: total_size is bytes."""
    base = samples.model(tmp_path / "base", weights("BF16"), CONFIG, shards=2)
    score = normal(2, 5, dtype="F16")
    loratool.merge(base, lora_file(tmp_path / "x", {"layers.0.q": low()}, score__weight=score), out=tmp_path / "out")
    assert_index(tmp_path / "out")


def test_a_new_head_goes_where_the_index_looks(tmp_path: Path) -> None:
    """Not into a file that the index does not name."""
    base = samples.model(tmp_path / "base", weights(), CONFIG, shards=2)
    write_safetensors(base / "vision.safetensors", {"extra.weight": normal(2)}, {})
    lora = lora_file(tmp_path / "x", {"layers.0.q": low()}, score__weight=normal(2, 5))
    loratool.merge(base, lora, out=tmp_path / "out")
    assert_index(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["score.weight"] == "model-00002-of-00002.safetensors"


def assert_index(folder: Path) -> None:
    """The index names every tensor's file, and the bytes of them all."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {name: read_safetensors(folder / name).tensors for name in set(index["weight_map"].values())}
    assert index["weight_map"] == {key: name for name, tensors in shards.items() for key in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in shards.values() for t in tensors.values())


def test_a_resized_vocabulary_changes_the_configuration_and_the_index(tmp_path: Path) -> None:
    """llm traps 41 and 55."""
    tensors = {**weights(), "embed_tokens.weight": normal(11, 5)}
    base = samples.model(tmp_path / "base", tensors, CONFIG, shards=2)
    lora = lora_file(tmp_path / "x", {"layers.0.q": low()}, embed_tokens__weight=normal(13, 5, seed=4))
    loratool.merge(base, lora, out=tmp_path / "out")
    assert stored(tmp_path / "out")["embed_tokens.weight"].shape == (13, 5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 13
    assert_index(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_another_dtype_casts_every_floating_tensor(dtype: str, tmp_path: Path, q: Path) -> None:
    base = samples.model(tmp_path / "base", weights(), CONFIG, shards=2)
    loratool.merge(base, q, dtype=dtype, out=tmp_path / "out")
    name, torch_name = {"fp16": ("F16", "float16"), "bf16": ("BF16", "bfloat16"), "fp32": ("F32", "float32")}[dtype]
    found = stored(tmp_path / "out")
    assert {t.dtype for key, t in found.items() if key != "steps"} == {name}
    assert found["steps"].dtype == "I64"
    assert found["layers.1.q.weight"].same_bytes(weights()["layers.1.q.weight"].cast(name))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == torch_name
    assert_index(tmp_path / "out")


# -- the same bytes ------------------------------------------------------------------------------------------


def large(folder: Path, shards: int = 1) -> Path:
    """Several row blocks in a tensor, several tensors in a file."""
    tensors = {f"layers.{n}.q.weight": normal(600, 1300, dtype="BF16", seed=n) for n in range(3)}
    tensors |= {"layers.0.norm.weight": normal(1300), "steps": Tensor.of(np.int64(4))}
    return samples.model(folder, tensors, CONFIG, shards)


def large_lora(path: Path) -> Path:
    one, two = low(600, 1300, 4), low(600, 1300, 4, seed=3)
    return lora_file(path, {"layers.0.q": one, "layers.1.q": DoRA(two, magnitude(1300), axis=1)})


def test_any_number_of_threads_writes_the_same_bytes(tmp_path: Path) -> None:
    """CLI law 6."""
    planned = loratool.plan_merge(large(tmp_path / "base"), [large_lora(tmp_path / "lora")], [0.5])
    files = []
    for threads in (1, 2, 5):
        run_merge(planned, tmp_path / f"{threads}", threads=threads)
        files.append(fingerprint(tmp_path / f"{threads}"))
    assert len({tuple(found.values()) for found in files}) == 1


def test_the_content_hash_does_not_depend_on_shards(tmp_path: Path) -> None:
    lora = large_lora(tmp_path / "lora")
    reports = [loratool.merge(large(tmp_path / f"base{n}", n), lora, out=tmp_path / f"out{n}") for n in (1, 2, 3)]
    assert len({report.content_hash for report in reports}) == 1
    other = loratool.merge(tmp_path / "base1", lora, strengths=[0.5], out=tmp_path / "other")
    assert other.content_hash != reports[0].content_hash
    alone = loratool.merge(tmp_path / "base1" / "model.safetensors", lora, out=tmp_path / "alone.safetensors")
    assert alone.content_hash == reports[0].content_hash


def test_a_file_is_written_by_one_thread_while_there_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that write one file wait for each other: the first blocks of two threads are of two files."""
    monkeypatch.setattr("loratool.tensors.BLOCK", 8)
    outputs = [OutputFile(name, (Step(name, name, normal(400, 8), "F32"),), {}) for name in ("one", "other")]
    meeting, met = threading.Barrier(2), []

    class Both:
        def block(self, output: OutputFile, step: Step, start: int, data: np.ndarray) -> None:
            if len(met) < 2:
                met.append(output.name)
                meeting.wait(30)

    list(Run(Plan(tuple(outputs)), Both(), choose("cpu", {}), 2))
    assert sorted(met) == ["one", "other"]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_no_part_changes_keep_their_bits(device: str, tmp_path: Path) -> None:
    """-0 among them, which a sum with zero would make 0; beside a product, in one block and in blocks of their own."""
    base = Tensor.of(np.full((12, 5), -0.0, np.float32), "BF16")
    found = np.empty((12, 5), base.array().dtype)

    class Kept:
        def block(self, output: OutputFile, step: Step, start: int, data: np.ndarray) -> None:
            found[start : start + len(data)] = data

    for rows in (4, 12):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("loratool.tensors.BLOCK", rows * 5)
            step = Step("qkv", "qkv", base, "BF16", (Part(low(4), 1.0, 4, 8, "k"),))
            list(Run(Plan((OutputFile("o", (step,), {}),)), Kept(), choose(device, {}), 1))
        assert np.signbit(found[:4].astype(np.float32)).all() and np.signbit(found[8:].astype(np.float32)).all()
        assert (found[4:8] == low(4).delta().astype(found.dtype)).all()


def test_blocks_of_every_device_are_those_of_numpy(tmp_path: Path) -> None:
    lora = large_lora(tmp_path / "lora")
    base = large(tmp_path / "base")
    for device in DEVICES:
        loratool.merge(base, lora, device=device, out=tmp_path / device)
    one = values(tmp_path / "cpu-numpy")
    for device in DEVICES:
        other = values(tmp_path / device)
        apart = np.concatenate([ulps(a, other[name]).reshape(-1) for name, a in one.items()])
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-4


# -- what else a merge writes --------------------------------------------------------------------------------


def test_a_merged_folder_holds_every_file_of_the_base(small: Path, q: Path, tmp_path: Path) -> None:
    """CLI law 4."""
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_own.py", "assets/a/vocab.txt", ".hidden"):
        (small / name).parent.mkdir(parents=True, exist_ok=True)
        (small / name).write_text(name)
    (small / "modeling_own.py").chmod(0o555)
    loratool.merge(small, q, out=tmp_path / "out")
    before = {path.relative_to(small): path for path in small.rglob("*") if path.is_file()}
    after = {path.relative_to(tmp_path / "out"): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    assert [str(n) for n in before if before[n].read_bytes() != after[n].read_bytes()] == ["model.safetensors"]


def test_the_adapters_own_tokenizer_wins(base: Make, lora: Make, tmp_path: Path) -> None:
    import shutil

    there, own = tmp_path / "base", tmp_path / "lora"
    shutil.copytree(base("convnet"), there)
    shutil.copytree(lora("convnet"), own)
    for folder, name in (
        (there, "tokenizer.json"),
        (there, "merges.txt"),
        (own, "tokenizer.json"),
        (own, "vocab.json"),
    ):
        (folder / name).write_text(folder.name)
    loratool.merge(there, own, out=tmp_path / "out")
    found = {name: (tmp_path / "out" / name).read_text() for name in ("tokenizer.json", "merges.txt", "vocab.json")}
    assert found == {"tokenizer.json": "lora", "merges.txt": "base", "vocab.json": "lora"}
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_provenance(small: Path, q: Path, tmp_path: Path) -> None:
    """CLI law 5: every input by its sha256, in the file and in the report."""
    report = loratool.merge(small, q, q, strengths=[0.5, -2], out=tmp_path / "out")
    metadata = read_safetensors(tmp_path / "out" / "model.safetensors").metadata
    digest = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (small / "model.safetensors", q)}
    inputs = {
        "base/model.safetensors": digest[small / "model.safetensors"],
        "adapter1/q.safetensors": digest[q],
        "adapter2/q.safetensors": digest[q],
    }
    assert json.loads(metadata["loratool.inputs"]) == report.inputs == inputs
    assert metadata["loratool.operation"] == report.operation == "merge"
    assert metadata["loratool.version"] == report.version == loratool.__version__
    assert json.loads(metadata["loratool.strengths"]) == list(report.strengths) == [0.5, -2.0]
    assert metadata["loratool.content_hash"] == report.content_hash
    assert metadata["format"] == "pt"


def test_hashes_of_the_source_that_no_longer_hold_are_dropped(q: Path, tmp_path: Path) -> None:
    said = {"sshs_model_hash": "a", "modelspec.hash_sha256": "b", "modelspec.title": "kept", "loratool.undo": "c"}
    write_safetensors(tmp_path / "base.safetensors", weights(), said)
    loratool.merge(tmp_path / "base.safetensors", q, out=tmp_path / "out")
    metadata = read_safetensors(tmp_path / "out").metadata
    assert metadata["modelspec.title"] == "kept"
    assert not {"sshs_model_hash", "modelspec.hash_sha256", "loratool.undo"} & metadata.keys()


def test_the_report_counts(small: Path, q: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    report = loratool.merge(small, q, out=tmp_path / "out", progress=lambda *now: done.append(now))
    assert (report.modules, report.tensors_changed, report.tensors_copied) == (1, 1, 4)
    assert report.output == str(tmp_path / "out") and report.unmatched == () and report.seconds >= 0
    assert done[-1][0] == done[-1][1] > 0


def test_what_is_lost_to_rounding_is_counted(tmp_path: Path) -> None:
    """llm trap 54: an update below half a place of the weights disappears; zero deltas do not count."""
    base = samples.model(tmp_path / "base", {"q.weight": Tensor.of(np.ones((4, 4), np.float32), "BF16")})
    up = np.array([[0.0], [1e-4], [1e-4], [0.5]], np.float32)
    update = samples.LowRank(Tensor.of(np.ones((1, 4), np.float32)), Tensor.of(up), alpha=1.0)
    report = loratool.merge(base, lora_file(tmp_path / "x", {"q": update}), out=tmp_path / "out")
    assert report.lost_to_rounding == pytest.approx(2 / 3)


def test_an_untrained_adapter_is_a_warning(small: Path, tmp_path: Path) -> None:
    """llm trap 63."""
    still = replace(low(), up=Tensor.of(np.zeros((7, 3), np.float32)))
    report = loratool.merge(small, lora_file(tmp_path / "x", {"layers.0.q": still}), out=tmp_path / "out")
    assert any("untrained" in warning for warning in report.warnings)
    np.testing.assert_array_equal(values(tmp_path / "out")["layers.0.q.weight"], weights()["layers.0.q.weight"].array())


# -- refusals ------------------------------------------------------------------------------------------------


def refused(
    base: Path, lora: Any, tmp_path: Path, error: type[LoratoolError], message: str, **more: Any
) -> LoratoolError:
    """The merge fails so, leaves its inputs alone and nothing else behind."""
    before = fingerprint(tmp_path)
    with pytest.raises(error, match=message) as caught:
        loratool.merge(base, lora, out=more.pop("out", tmp_path / "out"), **more)
    assert fingerprint(tmp_path) == before
    assert not any(".loratool-" in path.name for path in tmp_path.rglob("*"))
    return caught.value


def poisoned(value: float, *shape: int) -> Tensor:
    array = normal(*shape).array().copy()
    array.reshape(-1)[-1] = value
    return Tensor.of(array)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["down", "up", "carried", "magnitude"])
def test_an_adapter_with_nan_is_refused(value: float, where: str, small: Path, tmp_path: Path) -> None:
    """llm trap 64."""
    update: Update = low()
    carried = {}
    if where == "carried":
        carried = {"norm__weight": poisoned(value, 5)}
    elif where == "magnitude":
        update = DoRA(low(), poisoned(value, 7))
    else:
        update = replace(low(), **{where: poisoned(value, *getattr(low(), where).shape)})
    lora = lora_file(tmp_path / "x", {"layers.0.q": update}, **carried)
    name = "norm" if carried else r"layers\.0\.q"
    error = refused(small, lora, tmp_path, NumericError, f"NaN or infinity in the adapter.*{name}")
    assert error.exit_code == 6


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_base_with_nan_where_it_is_changed_is_refused(dtype: str, q: Path, tmp_path: Path) -> None:
    tensors = {**weights(), "layers.0.q.weight": poisoned(np.nan, 7, 5).cast(dtype)}
    base = samples.model(tmp_path / "base", tensors)
    refused(base, q, tmp_path, NumericError, r"NaN in the result, layers\.0\.q\.weight")


def test_a_base_with_nan_elsewhere_is_copied(q: Path, tmp_path: Path) -> None:
    tensors = {**weights(), "layers.1.q.weight": poisoned(np.nan, 7, 5)}
    loratool.merge(samples.model(tmp_path / "base", tensors), q, out=tmp_path / "out")
    assert stored(tmp_path / "out")["layers.1.q.weight"].same_bytes(tensors["layers.1.q.weight"])


@pytest.mark.parametrize(("dtype", "large"), [("F16", 6e4), ("BF16", 3e38), ("F32", 3e38)])
def test_overflow_is_refused_and_names_the_tensor(dtype: str, large: float, tmp_path: Path) -> None:
    """llm trap 58: |x| > 65504."""
    weight = np.zeros((7, 5), np.float32)
    weight[6, 4] = large
    base = samples.model(tmp_path / "base", {"layers.0.q.weight": Tensor.of(weight, dtype)})
    ones = [Tensor.of(np.ones(shape, np.float32)) for shape in ((1, 5), (7, 1))]
    lora = lora_file(tmp_path / "x", {"layers.0.q": samples.LowRank(*ones, alpha=large)})
    error = refused(base, lora, tmp_path, NumericError, rf"overflow of {dtype} in the result, layers\.0\.q\.weight")
    assert "layers.0.q" in error.hint
    loratool.merge(base, lora, strengths=[0.01], out=tmp_path / "out")


def test_overflow_by_a_narrower_dtype_is_refused(q: Path, tmp_path: Path) -> None:
    base = samples.model(tmp_path / "base", {**weights(), "big.weight": Tensor.of(np.full((2, 2), 1e6, np.float32))})
    refused(base, q, tmp_path, NumericError, r"overflow of F16 in the result, big\.weight", dtype="fp16")


def test_dora_on_a_zero_row_is_refused(tmp_path: Path) -> None:
    base = samples.model(tmp_path / "base", {"q.weight": Tensor.of(np.zeros((7, 5), np.float32))})
    update = DoRA(replace(low(), up=Tensor.of(np.zeros((7, 3), np.float32))), magnitude(7))
    refused(base, lora_file(tmp_path / "x", {"q": update}), tmp_path, NumericError, "all-zero row")


def test_a_module_without_a_place_is_refused_before_anything_is_written(small: Path, tmp_path: Path) -> None:
    """CLI law 1."""
    lora = lora_file(tmp_path / "x", {"layers.0.q": low(), "layers.9.q": low()})
    error = refused(small, lora, tmp_path, MatchError, r"1 of 2 .*layers\.9\.q \(nearest: layers\.[01]\.q\)")
    assert error.exit_code == 4 and "--allow-unmatched" in error.hint
    report = loratool.merge(small, lora, out=tmp_path / "out", allow_unmatched=True)
    assert report.unmatched == ("layers.9.q",) and report.modules == 1


def test_a_shape_that_differs_is_refused_also_with_allow_unmatched(small: Path, tmp_path: Path) -> None:
    lora = lora_file(tmp_path / "x", {"layers.0.q": low(6, 5)})
    for allow in (False, True):
        refused(small, lora, tmp_path, MatchError, r"shapes differ.*layers\.0\.q", allow_unmatched=allow)


def test_a_whole_tensor_of_another_width_is_refused(small: Path, tmp_path: Path) -> None:
    lora = lora_file(tmp_path / "x", {"layers.0.q": low()}, layers__1__q__weight=normal(7, 6))
    refused(small, lora, tmp_path, MatchError, r"shape \[7, 6\] for \[7, 5\].*layers\.1\.q\.weight")


def test_two_heads_of_one_name_are_refused(small: Path, tmp_path: Path) -> None:
    loras = [lora_file(tmp_path / f"{n}", {"layers.0.q": low()}, score__weight=normal(2, 5, seed=n)) for n in (1, 2)]
    refused(small, loras, tmp_path, MatchError, r"different tensors of one name, score\.weight")
    loratool.merge(small, loras[0], loras[0], out=tmp_path / "out")


def test_a_quantised_weight_is_refused(q: Path, tmp_path: Path) -> None:
    tensors = {**weights(), "layers.0.q.weight": Tensor.of(np.ones((7, 5), np.int8))}
    refused(samples.model(tmp_path / "base", tensors), q, tmp_path, FormatError, r"quantised.*layers\.0\.q")


def test_adapters_of_two_bases_are_worth_a_word(small: Path, tmp_path: Path) -> None:
    """llm trap 65: shapes that fit both do not tell."""

    def of(folder: str, name: str) -> Path:
        config = {**samples.PEFT_CONFIG, "target_modules": ["q"], "base_model_name_or_path": name}
        return samples.peft_folder(tmp_path / folder, samples.peft_pair("layers.0.q"), config)

    one, twin, other = of("1", "org/one"), of("2", "org/one"), of("3", "org/other")
    alike = loratool.merge(small, one, twin, out=tmp_path / "out")
    assert not any("base models" in warning for warning in alike.warnings)
    apart = loratool.merge(small, one, other, out=tmp_path / "apart")
    assert "the adapters name different base models: org/one, org/other" in apart.warnings


@pytest.mark.parametrize("insist", [False, True])
def test_a_name_that_two_modules_end_in_means_neither(insist: bool, tmp_path: Path) -> None:
    """llm trap 9: GPT-2 has two ``c_proj`` a block; each LoRA goes to its own, and none is counted twice."""
    tensors = {f"h.{n}.{part}.c_proj.weight": normal(8, 8) for n in range(2) for part in ("attn", "mlp")}
    base = samples.model(tmp_path / "base", tensors, {"model_type": "gpt2"})
    updates = {f"transformer.{name.removesuffix('.weight')}": low(8, 8, seed=n) for n, name in enumerate(tensors)}
    report = loratool.merge(base, lora_file(tmp_path / "x", updates), out=tmp_path / "out")
    assert (report.modules, report.tensors_changed) == (4, 4)
    found = values(tmp_path / "out")
    for name, update in zip(tensors, updates.values(), strict=True):
        turned = update.oriented("transposed")
        np.testing.assert_allclose(found[name], expected_of(tensors[name], (turned, 1.0)), atol=3e-6)
    for less in ("transformer.h.0.c_proj", "c_proj", "transformer.h.2.mlp.c_proj"):
        lora = lora_file(tmp_path / less, {less: low(8, 8)})
        if not insist:
            with pytest.raises(MatchError, match="no target"):
                loratool.merge(base, lora, out=tmp_path / "no")
            continue
        report = loratool.merge(base, lora, out=tmp_path / f"{less}-out", allow_unmatched=True)
        assert report.tensors_changed == 0 and len(report.unmatched) == 1


def codes(*shape: int, dtype: Any = np.uint8) -> Tensor:
    return Tensor.of(np.ones(shape, dtype))


QUANTISED: dict[str, dict[str, Tensor]] = {  # beside or in place of a weight [8, 32]
    "NVFP4 of compressed-tensors [49]": {
        ".weight_packed": codes(8, 16),
        ".weight_scale": normal(8, 2, dtype="F16"),
        ".weight_global_scale": normal(1),
    },
    "NVFP4 of ModelOpt [49]": {
        ".weight": codes(8, 16),
        ".weight_scale": normal(8, 2, dtype="F16"),
        ".weight_scale_2": normal(1),
    },
    "packed int4 of compressed-tensors [50]": {
        ".weight_packed": codes(8, 4, dtype=np.int32),
        ".weight_scale": normal(8, 1),
        ".weight_shape": codes(2, dtype=np.int64),
    },
    "GPTQ [51]": {
        ".qweight": codes(4, 8, dtype=np.int32),
        ".qzeros": codes(1, 1, dtype=np.int32),
        ".scales": normal(1, 8),
        ".g_idx": codes(32, dtype=np.int32),
    },
    "bitsandbytes in 4 bits": {".weight": codes(128, 1), ".weight.absmax": normal(4), ".weight.quant_map": normal(16)},
    "bitsandbytes in 8 bits": {".weight": codes(8, 32, dtype=np.int8), ".SCB": normal(8)},
    "MLX": {".weight": codes(8, 4, dtype=np.uint32), ".scales": normal(8, 1), ".biases": normal(8, 1)},
}


@pytest.mark.parametrize("insist", [False, True])
@pytest.mark.parametrize("scheme", QUANTISED)
def test_a_weight_in_codes_is_refused_for_what_it_is(scheme: str, insist: bool, tmp_path: Path) -> None:
    """llm traps 49, 50 and 51: no other base, no module without a target, and nothing to insist on."""
    name = "model.layers.0.self_attn.q_proj"
    base = samples.model(tmp_path / "base", {f"{name}{end}": tensor for end, tensor in QUANTISED[scheme].items()})
    lora = lora_file(tmp_path / "x", {name.removeprefix("model."): low(8, 32)})
    with pytest.raises(FormatError, match="quantised weight") as caught:
        loratool.merge(base, lora, out=tmp_path / "out", allow_unmatched=insist)
    assert name in str(caught.value.where) and "16 bit" in caught.value.hint


@pytest.mark.parametrize("target", ["gate_up_proj", "1.gate_proj", "1.down_proj"])
def test_experts_in_codes_are_refused_for_what_they_are(target: str, tmp_path: Path) -> None:
    """llm trap 52: gpt-oss on disk."""
    layer = "model.layers.0.mlp.experts"
    tensors = {f"{layer}.gate_up_proj_blocks": codes(2, 12, 1, 16), f"{layer}.gate_up_proj_scales": codes(2, 12, 1)}
    tensors |= {f"{layer}.down_proj_blocks": codes(2, 32, 1, 16), f"{layer}.down_proj_scales": codes(2, 32, 1)}
    base = samples.model(tmp_path / "base", tensors, {"model_type": "gpt_oss"})
    with pytest.raises(FormatError, match="MXFP4"):
        loratool.merge(base, lora_file(tmp_path / "x", {f"{layer}.{target}": low(12, 32)}), out=tmp_path / "out")


def test_modules_beside_quantised_ones_are_merged(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn"
    quantised = {f"{name}.q_proj{end}": tensor for end, tensor in QUANTISED["GPTQ [51]"].items()}
    base = samples.model(tmp_path / "base", {**quantised, f"{name}.v_proj.weight": normal(8, 32)})
    assert loratool.merge(base, lora_file(tmp_path / "x", {f"{name}.v_proj": low(8, 32)}), out=tmp_path / "out").modules


def test_an_unknown_scaling_is_refused(small: Path, tmp_path: Path) -> None:
    lora = samples.peft_folder(tmp_path / "x", samples.peft_pair("layers.0.q"), None)
    error = refused(small, lora, tmp_path, FormatError, "does not tell its scaling")
    assert "--scaling" in error.hint


def test_no_adapter_and_a_wrong_dtype_are_usage_errors(small: Path, q: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter"):
        loratool.merge(small, out=tmp_path / "out")
    with pytest.raises(UsageError, match="dtype"):
        loratool.merge(small, q, out=tmp_path / "out", dtype="int4")
    with pytest.raises(UsageError, match="unknown device"):
        loratool.merge(small, q, out=tmp_path / "out", device="abacus")


def test_an_accelerator_that_is_not_there_is_no_crash(small: Path, q: Path, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="not available") as caught:
        loratool.merge(small, q, out=tmp_path / "out", device="cuda:99")
    assert caught.value.exit_code == 1 and not (tmp_path / "out").exists()


# -- outputs -------------------------------------------------------------------------------------------------


def test_an_output_is_replaced_only_on_request(small: Path, q: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    refused(small, q, tmp_path, LoratoolError, "output exists")
    loratool.merge(small, q, out=out, overwrite=True)
    assert not (out / "old").exists() and (out / "model.safetensors").is_file()


def test_a_failed_run_keeps_the_output_it_would_have_replaced(small: Path, q: Path, tmp_path: Path) -> None:
    loratool.merge(small, q, out=tmp_path / "out")
    bad = samples.model(tmp_path / "bad", {**weights(), "layers.0.q.weight": poisoned(np.nan, 7, 5)})
    refused(bad, q, tmp_path, NumericError, "NaN", overwrite=True)


@pytest.mark.parametrize("out", ["base", "base/model.safetensors", "base/below", "q.safetensors", "."])
def test_an_output_on_an_input_is_refused_even_with_overwrite(out: str, small: Path, q: Path, tmp_path: Path) -> None:
    refused(small, q, tmp_path, LoratoolError, "output", out=tmp_path / out, overwrite=True)


def test_a_missing_parent_is_refused(small: Path, q: Path, tmp_path: Path) -> None:
    refused(small, q, tmp_path, LoratoolError, "parent folder does not exist", out=tmp_path / "no" / "out")


@pytest.mark.parametrize("base", ["no", "no/model.safetensors"])
def test_a_missing_base_is_named(base: str, q: Path, tmp_path: Path) -> None:
    error = refused(tmp_path / base, q, tmp_path, LoratoolError, "no such model")
    assert error.exit_code == 1


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_full_disk_leaves_nothing(
    call: str, kind: str, small: Path, q: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    base = small if kind == "folder" else small / "model.safetensors"
    error = refused(base, q, tmp_path, LoratoolError, "cannot write: No space left")
    assert error.exit_code == 1


def test_too_little_space_is_noticed_before(
    small: Path, q: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10, 10, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(small, q, tmp_path, LoratoolError, "out of disk")


def test_a_target_that_cannot_be_written_is_refused(
    small: Path, q: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(small, q, tmp_path, LoratoolError, "not writable")
    monkeypatch.undo()
    monkeypatch.setattr(os, "pwrite", denied)
    refused(small, q, tmp_path, LoratoolError, "Read-only file system")


SLOW = """
    import sys, time
    from loratool import plan
    from loratool.cli import main

    def slow(self, *arguments, write=plan.Writer.block):
        write(self, *arguments)
        print("writing", flush=True)
        time.sleep(3)

    plan.Writer.block = slow
    main(sys.argv[1:])
"""


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130), (signal.SIGINT, 130)])
def test_a_run_that_is_killed_leaves_no_output_and_can_be_repeated(
    how: signal.Signals, code: int, small: Path, q: Path, tmp_path: Path
) -> None:
    """CLI law 2."""
    before = fingerprint(tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(SLOW), "merge", str(small), str(q), "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline().startswith("writing")
        began = time.monotonic()
        run.send_signal(how)
        assert run.wait(30) == code
        assert time.monotonic() - began < 25
    assert not (tmp_path / "out").exists()
    if how != signal.SIGKILL:
        assert fingerprint(tmp_path) == before
    loratool.merge(small, q, out=tmp_path / "out")
    assert {path for path in fingerprint(tmp_path) if "/out/" not in path} == set(before)
    assert loratool.verify(small, q, merged=tmp_path / "out").ok


# -- hostile bases -------------------------------------------------------------------------------------------


def sharded(tmp_path: Path) -> Path:
    return samples.model(tmp_path / "base", weights(), CONFIG, shards=2)


def reindexed(base: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index) or index))


HOSTILE: Mapping[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "outside": (lambda i: i["weight_map"].update({"steps": "../model.safetensors"}), "unsafe path"),
    "absolute": (lambda i: i["weight_map"].update({"steps": "/etc/passwd"}), "unsafe path"),
    "missing_shard": (lambda i: i["weight_map"].update({"steps": "model-3.safetensors"}), "is missing"),
    "missing_tensor": (lambda i: i["weight_map"].update({"x": "model-00001-of-00002.safetensors"}), "lacks it"),
    "wrong_shard": (
        lambda i: i["weight_map"].update(
            {k: "model-00001-of-00002.safetensors" for k, v in i["weight_map"].items() if "00002" in v}
        ),
        "lacks it",
    ),
    "no_text": (lambda i: i["weight_map"].update({"steps": 3}), "no weight_map"),
    "no_map": (lambda i: i.pop("weight_map") and None, "no weight_map"),
    "list": (lambda i: [i], "not a JSON object"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_refused(name: str, q: Path, tmp_path: Path) -> None:
    """CLI law 7."""
    base = sharded(tmp_path)
    change, message = HOSTILE[name]
    reindexed(base, change)
    refused(base, q, tmp_path, FormatError, f"{message}.*")


def test_a_shard_that_is_not_there_or_a_pointer_is_named(q: Path, tmp_path: Path) -> None:
    """llm trap 61."""
    base = sharded(tmp_path)
    shard = base / "model-00002-of-00002.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused(base, q, tmp_path, FormatError, "git-LFS pointer.*model-00002")
    shard.unlink()
    refused(base, q, tmp_path, FormatError, "model-00002-of-00002.safetensors' is missing")


def test_a_shard_that_the_index_does_not_name_is_not_skipped(q: Path, tmp_path: Path) -> None:
    """Base tensors outside the index are still copied or merged, never dropped."""
    base = sharded(tmp_path)
    write_safetensors(base / "extra.safetensors", {"extra.weight": normal(2)}, {})
    loratool.merge(base, q, out=tmp_path / "out")
    assert stored(tmp_path / "out").keys() == stored(base).keys()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "assets"])
def test_a_link_that_leaves_the_folder_is_refused(name: str, small: Path, q: Path, tmp_path: Path) -> None:
    """CLI law 7: a hostile folder points at the user's other files."""
    outside = tmp_path / "outside"
    if name == "assets":
        outside.mkdir()
        (outside / "secret").write_text("secret")
    elif name == "model.safetensors":
        (small / name).rename(outside)
    else:
        outside.write_text("secret")
    (small / name).symlink_to(outside)
    refused(small, q, tmp_path, FormatError, "link")
    if name != "assets":
        loratool.merge(small, q, out=tmp_path / "out", reading=loratool.Reading(allow_links=True))
        assert not (tmp_path / "out" / name).is_symlink()


def test_a_hub_cache_is_read_through_its_links(q: Path, tmp_path: Path) -> None:
    """snapshots/<commit>/file -> blobs/<hash>; the path that the user names may be a link itself."""
    repo = tmp_path / "models--org--name"
    snapshot = samples.model(repo / "snapshots" / "abc", weights(), CONFIG)
    (repo / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(repo / "blobs" / file.name)
        file.symlink_to(Path("..", "..", "blobs", file.name))
    (tmp_path / "link").symlink_to(snapshot)
    loratool.merge(tmp_path / "link", q, out=tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "model.h5"])
def test_weights_that_are_not_read_are_named(name: str, q: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / name).write_bytes(b"x")
    refused(base, q, tmp_path, FormatError, f"(no safetensors weights|a Python pickle).*{name}")


def test_other_forms_of_the_weights_are_copied_with_a_warning(small: Path, q: Path, tmp_path: Path) -> None:
    (small / "pytorch_model.bin").write_bytes(b"old")
    report = loratool.merge(small, q, out=tmp_path / "out")
    assert any("pytorch_model.bin" in warning for warning in report.warnings)


# -- the real world ------------------------------------------------------------------------------------------


def test_a_real_adapter_meets_the_wrong_base(real: Path, base: Make, tmp_path: Path) -> None:
    """Every one is merged or refused by name, none in silence."""
    with pytest.raises(MatchError, match=r"shapes differ|no target"):
        loratool.merge(base("gpt2"), real / "llm" / "peft-gpt2", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["plain", "dora", "dora_embedding", "rslora"])
def test_many_small_blocks_give_what_one_block_gives(
    kind: str, base: Make, lora: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row blocks == whole, through the merge itself; and the same bytes for any number of threads."""
    model, adapter = base("llama"), lora("llama", kind)
    loratool.merge(model, adapter, out=tmp_path / "whole")
    monkeypatch.setattr("loratool.tensors.BLOCK", 96)
    planned = [loratool.plan_merge(model, [adapter]) for _ in range(2)]
    for threads, merge in zip((1, 3), planned, strict=True):
        run_merge(merge, tmp_path / str(threads), threads=threads)
    whole, one, three = (
        {n: at[0].tensor.array() for n, at in read_model(tmp_path / name).parameters.items()}
        for name in ("whole", "1", "3")
    )
    for name, values in whole.items():
        np.testing.assert_allclose(one[name], values, rtol=1e-5, atol=1e-6)
        assert one[name].tobytes() == three[name].tobytes(), name
