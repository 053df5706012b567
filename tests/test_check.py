"""What engines accept: each rule sees what breaks it, and the command that it names mends it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.cli import main
from loratool.errors import FormatError, UsageError
from loratool.ops.check import ENGINES
from loratool.ops.uniform import uniform
from loratool.tensors import Tensor
from loratool.update import Dense, DoRA, LowRank, Update
from tests.samples import low, magnitude, normal, tucker


def peft(path: Path, updates: dict[str, Update], **carried: Tensor) -> Path:
    loratool.write(
        Adapter(updates, {n.replace("__", "."): t for n, t in carried.items()}, Metadata("raw")), path, format="peft"
    )
    return path


PLAIN: dict[str, Update] = {
    f"layers.0.self_attn.{leaf}_proj": low(8, 8, 4, alpha=8.0, seed=n) for n, leaf in enumerate("qkvo")
}
BROKEN: dict[str, dict[str, Any]] = {
    "one scaling": {"updates": {**PLAIN, "layers.0.mlp.up_proj": low(8, 8, 4, alpha=2.0)}},
    "rank": {"updates": {**PLAIN, "layers.0.mlp.up_proj": low(80, 80, 66, alpha=132.0)}},
    "plain LoRA": {"updates": {name: DoRA(u, magnitude(8)) for name, u in PLAIN.items() if isinstance(u, LowRank)}},
    "no whole tensors": {"updates": PLAIN, "norm__weight": normal(8)},
    "no biases": {"updates": {**PLAIN, "layers.0.self_attn.q_proj.bias": Dense(normal(8), 2.0, "bias")}},
    "scaling alpha / r": {
        "updates": {n: replace(u, rank_stabilised=True) for n, u in PLAIN.items() if isinstance(u, LowRank)}
    },
    "fused attention": {"updates": {n: u for n, u in PLAIN.items() if "v_proj" not in n}},
}


def test_a_plain_adapter_is_accepted(tmp_path: Path) -> None:
    for engine in ("vllm", "sglang", "onnxruntime"):
        report = loratool.check(peft(tmp_path / engine, PLAIN), engine=engine)
        assert report.accepted and not any(one.fix for one in report.checks)


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_sees_what_breaks_it(rule: str, tmp_path: Path) -> None:
    """llm trap 20 among them: SGLang knows one rank, one alpha, and no rank stabilisation."""
    report = loratool.check(peft(tmp_path / "lora", **BROKEN[rule]), engine="sglang")
    assert [one.rule for one in report.checks if not one.ok] == [rule]
    assert not report.accepted


@pytest.mark.parametrize("rule", ["one scaling", "rank", "scaling alpha / r"])
def test_the_command_that_is_named_mends_it(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = peft(tmp_path / "lora", **BROKEN[rule])
    (fix,) = (one.fix for one in loratool.check(path, engine="sglang").checks if not one.ok)
    out = tmp_path / "mended"
    words = [str(out) if word == "OUT" else word for word in shlex.split(fix)]
    main(words[1:])
    assert loratool.check(out, engine="sglang").accepted
    if rule != "rank":
        assert loratool.compare(path, out).relative_difference < 1e-7


def test_a_regular_expression_for_targets_is_mended(tmp_path: Path) -> None:
    import json

    path = peft(tmp_path / "lora", PLAIN)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": r".*\.(q|k|v|o)_proj"}))
    assert [c.rule for c in loratool.check(path, engine="sglang").checks if not c.ok] == ["list of targets"]
    loratool.convert(path, tmp_path / "mended", to="peft", uniform=True)
    assert loratool.check(tmp_path / "mended", engine="sglang").accepted


def test_the_formats_of_engines(tmp_path: Path) -> None:
    path = peft(tmp_path / "lora", PLAIN)
    for name, engine in ENGINES.items():
        if name == "llama.cpp":  # whose names go by the base's architecture
            with pytest.raises(FormatError, match="architecture"):
                loratool.check(path, engine=name)
            continue
        told = {one.rule: one.ok for one in loratool.check(path, engine=name).checks}
        assert told.get("format", True) == (not engine.format or "peft" in engine.reads)
    kohya = tmp_path / "kohya.safetensors"
    unet = {"unet.mid_block.attentions.0.proj_in": low(1280, 1280, 2, 1, 1)}
    loratool.write(Adapter(unet, {}, Metadata("raw", architecture="sd1")), kohya, format="kohya")
    assert loratool.check(kohya, engine="comfyui").accepted
    assert loratool.check(kohya, engine="diffusers").accepted
    assert not loratool.check(kohya, engine="vllm").accepted


def test_limits_that_an_engine_does_not_have(tmp_path: Path) -> None:
    path = peft(tmp_path / "lora", PLAIN)
    assert loratool.check(path, engine="vllm", max_rank=8).accepted
    assert not loratool.check(path, engine="vllm", max_rank=1).accepted
    for engine, rank in (("vllm", 17), ("sglang", 0), ("unheard", 8)):
        with pytest.raises(UsageError):
            loratool.check(path, engine=engine, max_rank=rank)


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    path = peft(tmp_path / "lora", BROKEN["one scaling"]["updates"])
    with pytest.raises(SystemExit) as caught:
        main(["check", str(path), "--for", "vllm", "--json"])
    assert caught.value.code == 5
    found = json.loads(capsys.readouterr().out)
    assert found["engine"] == "vllm" and found["accepted"] is False
    assert {"rule", "ok", "found", "fix"} == found["checks"][0].keys()


# ---------------------------------------------------------------- convert --uniform


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_uniform_keeps_every_delta(dtype: str) -> None:
    updates: dict[str, Update] = {
        "a": low(7, 5, 3, alpha=6.0),
        "b": replace(low(7, 5, 2, alpha=4.0), rank_stabilised=True),
        "c": LowRank(normal(4, 5, dtype=dtype), normal(7, 4, dtype=dtype), alpha=3.0),
        "d": low(7, 5, 1, alpha=-1.0),
        "e": low(7, 5, 1, alpha=None),
        "f": tucker(7, 5, 3, 3, 2),
        "g": DoRA(low(7, 5, 2, alpha=1.0), magnitude(7)),
        "h": low(7, 5, 2, alpha=0.0),
        "a.bias": Dense(normal(7), 2.0, "bias"),
        "z": Dense(normal(7, 5)),
    }
    made = uniform(Adapter(updates, {}, Metadata("raw", config={"r": 8, "use_rslora": True, "peft_type": "LORA"})))
    lows = [u.direction if isinstance(u, DoRA) else u for n, u in made.updates.items() if n not in ("a.bias", "z")]
    assert {(low.rank, low.alpha, low.rank_stabilised) for low in lows if isinstance(low, LowRank)} == {
        (4, lows[0].alpha, False)
    }
    assert dict(made.metadata.config) == {"peft_type": "LORA"}
    for name, update in updates.items():
        base = np.random.default_rng(1).standard_normal(update.shape).astype(np.float32)
        np.testing.assert_allclose(made.updates[name].apply(base), update.apply(base), rtol=1e-5, atol=1e-6)


def test_uniform_keeps_factors_that_need_no_change_byte_for_byte() -> None:
    one = LowRank(normal(4, 5, dtype="BF16"), normal(7, 4, dtype="BF16"), alpha=8.0)
    made = uniform(Adapter({"a": one, "b": replace(one, alpha=4.0), "c": one}, {}, Metadata("raw"))).updates
    assert made["a"].slots["up"].same_bytes(one.up) and made["b"].slots["up"].dtype == "BF16"  # halves are exact
