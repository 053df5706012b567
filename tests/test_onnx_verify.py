"""The proof by running: what it accepts, what it refuses, and what it says of onnxruntime itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import loratool
from loratool.errors import LoratoolError, VerifyError
from loratool.onnx import verify as proof
from loratool.onnx.feeds import feeds, head_sizes, vocabulary
from loratool.onnx.graph import read_graph
from loratool.onnx.verify import BaseError, Trial, verify
from tests import samples
from tests.onnx_models import Graphs

pytestmark = pytest.mark.peer
Change = Callable[[np.ndarray], np.ndarray]


def changed(source: Path, out: Path, node: str, change: Change) -> Path:
    """The graph with the weight of one node changed."""
    proto = onnx.load(source)
    (name,) = (n.input[1] for n in proto.graph.node if n.name == node)
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            values = change(numpy_helper.to_array(tensor)).astype(numpy_helper.to_array(tensor).dtype)
            tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(proto, out)
    return out


def small(path: Path, inputs: list[Any], nodes: list[Any], outputs: list[str], **weights: np.ndarray) -> Path:
    """A graph of a few nodes."""
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    stored = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, made, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, path)
    return path


def given(name: str, kind: int, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


Q_PROJ = "/model/layers.0/self_attn/q_proj/MatMul"


@pytest.fixture
def delta() -> np.ndarray:
    """A change of a square weight: its transpose fits as well."""
    random = np.random.default_rng(0)
    return 0.2 * random.standard_normal((16, 2)) @ random.standard_normal((2, 16))


def test_a_right_change_is_proven(graphs: Graphs, tmp_path: Path, delta: np.ndarray) -> None:
    base = graphs.export("llama")
    right = changed(base, tmp_path / "right.onnx", Q_PROJ, lambda w: w + delta)
    found = verify(read_graph(base), [Trial(right, right)])
    assert found.verified and found.max_abs_diff == 0 and found.max_effect is not None and found.max_effect > 0.01
    assert found.providers == ("CPUExecutionProvider",) and not found.notes


def test_rounding_is_no_fault(graphs: Graphs, tmp_path: Path, delta: np.ndarray) -> None:
    base = graphs.export("llama")
    right = changed(base, tmp_path / "right.onnx", Q_PROJ, lambda w: w + delta)
    near = changed(base, tmp_path / "near.onnx", Q_PROJ, lambda w: (w + delta) * (1 + 1e-6))
    found = verify(read_graph(base), [Trial(near, right)])
    assert found.verified and found.max_abs_diff is not None and 0 < found.max_abs_diff < 1e-4


def test_a_transposed_change_fails(graphs: Graphs, tmp_path: Path, delta: np.ndarray) -> None:  # onnx.md trap 1
    base = graphs.export("llama")
    right = changed(base, tmp_path / "right.onnx", Q_PROJ, lambda w: w + delta)
    wrong = changed(base, tmp_path / "wrong.onnx", Q_PROJ, lambda w: w + delta.T)
    with pytest.raises(VerifyError, match="changed graph is wrong") as error:
        verify(read_graph(base), [Trial(wrong, right)])
    assert error.value.exit_code == 7


@pytest.mark.parametrize("by", [0.95, 1.05, -1.0])
def test_a_change_of_another_size_fails(graphs: Graphs, tmp_path: Path, delta: np.ndarray, by: float) -> None:
    base = graphs.export("llama")
    right = changed(base, tmp_path / "right.onnx", Q_PROJ, lambda w: w + delta)
    wrong = changed(base, tmp_path / "wrong.onnx", Q_PROJ, lambda w: w + by * delta)
    with pytest.raises(VerifyError):
        verify(read_graph(base), [Trial(wrong, right)])


def test_a_lost_change_fails(graphs: Graphs, tmp_path: Path, delta: np.ndarray) -> None:
    base = graphs.export("llama")
    right = changed(base, tmp_path / "right.onnx", Q_PROJ, lambda w: w + 1e-4 * delta)
    with pytest.raises(VerifyError, match="lost"):
        verify(read_graph(base), [Trial(base, right)])


def test_no_change_is_said_to_have_no_effect(graphs: Graphs) -> None:  # onnx.md trap 36
    base = graphs.export("llama")
    found = verify(read_graph(base), [Trial(base, base)])
    assert not found.verified and found.max_effect == 0 and found.max_abs_diff == 0
    assert any("no effect" in note for note in found.notes)


def test_nan_fails(graphs: Graphs, tmp_path: Path, delta: np.ndarray) -> None:
    base = graphs.export("llama")
    right = changed(base, tmp_path / "right.onnx", Q_PROJ, lambda w: w + delta)
    broken = changed(base, tmp_path / "nan.onnx", Q_PROJ, lambda w: w * np.nan)
    with pytest.raises(VerifyError, match="NaN"):
        verify(read_graph(base), [Trial(broken, right)])


def test_a_graph_in_half_precision(graphs: Graphs, tmp_path: Path, delta: np.ndarray) -> None:
    base = graphs.variant("llama", "half")
    right = changed(base, tmp_path / "right.onnx", Q_PROJ, lambda w: w + 3 * delta)
    near = changed(base, tmp_path / "near.onnx", Q_PROJ, lambda w: (w + 3 * delta) * 1.0005)
    wrong = changed(base, tmp_path / "wrong.onnx", Q_PROJ, lambda w: w + 3 * delta.T)
    assert verify(read_graph(base), [Trial(near, right)]).verified
    with pytest.raises(VerifyError):
        verify(read_graph(base), [Trial(wrong, right)])


@pytest.mark.parametrize("mode", ["fold", "branch", "inputs"])
def test_bfloat16_is_widened_to_run(graphs: Graphs, tmp_path: Path, mode: str) -> None:  # onnx.md trap 25
    """onnxruntime has no bfloat16 on the processor: the comparison says how it was done."""
    base, adapter = graphs.variant("clip", "bfloat16"), graphs.adapter("clip")
    report = loratool.export_onnx(base, adapter, out=tmp_path / "out.onnx", mode=mode, verify=True)
    assert report.verified and any("float32" in warning for warning in report.warnings)
    assert report.max_effect is not None and report.max_effect > 0.1
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert TensorProto.BFLOAT16 in kinds and TensorProto.FLOAT not in kinds
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("out.")]


def test_a_wrong_change_of_bfloat16_fails(graphs: Graphs, tmp_path: Path, delta: np.ndarray) -> None:
    base = graphs.variant("llama", "bfloat16")
    right = changed(base, tmp_path / "right.onnx", Q_PROJ, lambda w: w.astype(np.float32) + 3 * delta)
    wrong = changed(base, tmp_path / "wrong.onnx", Q_PROJ, lambda w: w.astype(np.float32) + 3 * delta.T)
    assert verify(read_graph(base), [Trial(right, right)]).verified
    with pytest.raises(VerifyError):
        verify(read_graph(base), [Trial(wrong, right)])


# -- onnxruntime itself --------------------------------------------------------------------------------------


def test_a_base_that_does_not_open_is_blamed(graphs: Graphs, tmp_path: Path) -> None:  # onnx.md trap 35
    path = small(
        tmp_path / "base.onnx",
        [given("x", TensorProto.FLOAT, 2)],
        [helper.make_node("NoSuchOperator", ["x"], ["y"], domain="no.such")],
        ["y"],
    )
    with pytest.raises(BaseError, match="cannot open the base graph"):
        verify(read_graph(path), [Trial(path, path)])


def test_a_base_that_does_not_run_is_blamed(tmp_path: Path) -> None:
    shape = np.array([3, 7])
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    path = small(tmp_path / "base.onnx", [given("x", TensorProto.FLOAT, "n")], nodes, ["y"], shape=shape)
    with pytest.raises(BaseError, match="cannot run the base graph"):
        verify(read_graph(path), [Trial(path, path)])


def test_a_base_without_known_inputs_is_not_proven(tmp_path: Path) -> None:
    """Exported all the same, where no proof was asked for."""
    inputs = [given("x", TensorProto.FLOAT, 2, 4), given("s", TensorProto.STRING, 2)]
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["y"], "/a/MatMul"),
        helper.make_node("Identity", ["s"], ["z"]),
    ]
    base = small(tmp_path / "base.onnx", inputs, nodes, ["y"], **{"a.weight": np.ones((4, 3), np.float32)})
    adapter = samples.lora_file(tmp_path / "lora.safetensors", {"a": samples.low(3, 4, 2)})
    report = loratool.export_onnx(base, adapter, out=tmp_path / "out.onnx")
    assert not report.verified and any("not verified" in warning for warning in report.warnings)
    with pytest.raises(BaseError, match="cannot run the base graph"):
        loratool.export_onnx(base, adapter, out=tmp_path / "again.onnx", verify=True)
    assert not (tmp_path / "again.onnx").exists()


class Broken:
    """A package that fails while it is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "onnxruntime":
            raise RuntimeError("numpy.dtype size changed")


def test_onnxruntime_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert not proof.has_onnxruntime()
    with pytest.raises(LoratoolError, match="dtype size") as error:
        proof.onnxruntime()
    assert error.value.exit_code == 1 and "pip install" in error.value.hint


def test_onnxruntime_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not proof.has_onnxruntime()
    with pytest.raises(LoratoolError) as error:
        proof.onnxruntime()
    assert error.value.exit_code == 1 and "pip install 'loratool[onnxruntime]'" in error.value.hint


def test_onnxruntime_that_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:  # onnx.md trap 33
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    assert not proof.has_onnxruntime()
    with pytest.raises(LoratoolError, match="empty") as error:
        proof.onnxruntime()
    assert "pip uninstall" in error.value.hint and "pip install" in error.value.hint


def test_cuda_that_does_not_work_is_noticed(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # onnx.md trap 34
    import onnxruntime

    base = graphs.export("twins")
    monkeypatch.setattr(proof, "_wanted", lambda ort: [proof.CUDA, proof.CPU])
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"):
        found = verify(read_graph(base), [Trial(base, base)])
    assert found.providers == ("CPUExecutionProvider",)
    assert any("CUDA" in note for note in found.notes)
    assert onnxruntime.get_available_providers()  # the real one was asked


def test_cuda_is_used_where_package_and_machine_have_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ort: Any = ModuleType("onnxruntime")
    ort.get_available_providers = lambda: ["TensorrtExecutionProvider", proof.CUDA, proof.CPU]
    monkeypatch.setattr(proof, "_DRIVER", tmp_path)
    assert proof._wanted(ort) == [proof.CUDA, proof.CPU]
    monkeypatch.setattr(proof, "_DRIVER", tmp_path / "absent")
    assert proof._wanted(ort) == [proof.CPU]


def test_torch_is_not_imported(graphs: Graphs) -> None:
    base = graphs.export("twins")
    code = (
        "import sys; from loratool.onnx.graph import read_graph; from loratool.onnx.verify import Trial, verify;"
        f"p = {str(base)!r}; verify(read_graph(p), [Trial(p, p)]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- inputs --------------------------------------------------------------------------------------------------


def test_one_symbol_is_one_size(tmp_path: Path) -> None:
    ints, floats = TensorProto.INT64, TensorProto.FLOAT
    path = small(
        tmp_path / "g.onnx",
        [
            given("input_ids", ints, "batch_size", "sequence_length"),
            given("attention_mask", ints, "batch_size", "past_sequence_length + sequence_length"),
            given("position_ids", ints, "batch_size", "sequence_length"),
            given("past_key_values.0.key", floats, "batch_size", 2, "past_sequence_length", 8),
            given("half_mask", TensorProto.FLOAT16, "batch_size", "total_sequence_length"),
            given("use_cache_branch", TensorProto.BOOL, 1),
            given("sample", floats, "s0", 4, "height", "width"),
            given("other", floats, "batch_size", "sequence_length", 3),
        ],
        [helper.make_node("Gather", ["table", "input_ids"], ["y"])],
        ["y"],
        table=np.zeros((5, 3), np.float32),
    )
    graph = read_graph(path)
    assert vocabulary(graph) == {"input_ids": 5}
    (one, other) = next(feeds(graph, 2))
    batch, length = one["input_ids"].shape
    assert one["input_ids"].dtype == np.int64 and one["input_ids"].max() < 5 <= one["input_ids"].size
    assert not np.array_equal(one["other"], other["other"])
    assert one["attention_mask"].shape == (batch, length) and one["attention_mask"].all()
    assert np.array_equal(one["position_ids"], [list(range(length))] * batch)
    assert one["past_key_values.0.key"].shape == (batch, 2, 0, 8)
    assert one["half_mask"].shape == (batch, length) and one["half_mask"].dtype == np.float16 and one["half_mask"].all()
    assert one["use_cache_branch"].tolist() == [False]
    assert one["sample"].shape[2] == one["sample"].shape[3] and one["sample"].shape[2] % 8 == 0
    assert one["other"].shape == (batch, length, 3)


def test_ids_stay_within_the_smallest_table(graphs: Graphs) -> None:
    for name in ("bert", "gpt2", "t5", "clip"):
        for exporter in ("torchscript", "dynamo"):
            found = vocabulary(read_graph(graphs.export(name, exporter)))
            assert found["input_ids"] == 48, (name, exporter)


def test_the_size_of_a_head_is_told_by_the_attention(graphs: Graphs) -> None:
    graph = read_graph(graphs.export("genai", "fp32"))
    assert head_sizes(graph) == {"kv_cache_dim": 16}
    for given in next(feeds(graph, 2)):
        assert given["past_key_values.0.key"].shape == (2, 1, 0, 16)
        assert given["attention_mask"].shape == given["input_ids"].shape


def test_free_channels_are_told_by_the_first_weight(tmp_path: Path) -> None:
    """As optimum exports image models: every axis is free, and one of them is not."""
    floats = TensorProto.FLOAT
    inputs = [
        given("sample", floats, "batch_size", "num_channels", "height", "width"),
        given("states", floats, "batch_size", "sequence_length", "feature_size"),
    ]
    nodes = [
        helper.make_node("Conv", ["sample", "conv"], ["y"], group=2, pads=[1] * 4),
        helper.make_node("Cast", ["states"], ["wide"], to=floats),
        helper.make_node("MatMul", ["wide", "product"], ["z"]),
    ]
    weights = {"conv": np.ones((4, 5, 3, 3), np.float32), "product": np.ones((11, 2), np.float32)}
    path = small(tmp_path / "g.onnx", inputs, nodes, ["y", "z"], **weights)
    found = next(feeds(read_graph(path), 1))[0]
    assert found["sample"].shape[:2] == (2, 10) and found["states"].shape == (2, 6, 11)
    assert verify(read_graph(path), [Trial(path, path)]).providers


def test_attributes_that_make_no_sense_leave_the_base_unproven(graphs: Graphs, tmp_path: Path) -> None:
    proto = onnx.load(graphs.export("genai", "fp32"))
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "num_heads":
                attribute.CopyFrom(helper.make_attribute("num_heads", 1.5))
    path = tmp_path / "base.onnx"
    onnx.save(proto, path)
    with pytest.raises(BaseError):
        verify(read_graph(path), [Trial(path, path)])


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.INT4])
def test_inputs_without_values_are_named(tmp_path: Path, kind: int) -> None:
    path = small(tmp_path / "g.onnx", [given("x", kind, 2)], [helper.make_node("Identity", ["x"], ["y"])], ["y"])
    with pytest.raises(LoratoolError, match="x"):
        next(feeds(read_graph(path), 1))


def test_huge_inputs_are_refused(tmp_path: Path) -> None:
    shape = (1 << 40, 1 << 20)
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    path = small(tmp_path / "g.onnx", [given("x", TensorProto.FLOAT, *shape)], nodes, ["y"])
    with pytest.raises(LoratoolError, match="too large"):
        next(feeds(read_graph(path), 1))
