"""Side branches: PEFT's own outputs from graphs whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import loratool
from loratool.errors import MatchError, NumericError
from loratool.model import Model, read_model
from loratool.onnx.branch import branch
from loratool.onnx.fold import Change, write_graph
from loratool.onnx.graph import read_graph
from loratool.onnx.operands import operands, path_module
from loratool.onnx.quantised import dequantised
from loratool.onnx.resolve import resolve
from tests import samples
from tests.onnx_models import Graphs, active, feed, forward, make, optimised, past, run, session

pytestmark = pytest.mark.peer


def branched(
    base: Path, out: Path, *adapters: Path, strengths: Sequence[float] = (), base_weights: Model | None = None
) -> Path:
    """A graph with side branches."""
    graph = read_graph(base)
    found = []
    for number, adapter in enumerate(adapters):
        sites, unmatched = resolve(graph, loratool.read(adapter), base_weights)
        assert not unmatched, [str(one) for one in unmatched]
        found += [Change(site, (strengths or (1.0,) * len(adapters))[number], number) for site in sites]
    write_graph(branch(graph, found), out, inputs={}, metadata={})
    onnx.checker.check_model(out, full_check=False)
    return out


def assert_close(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], by: float = 2e-5) -> None:
    """Outputs that agree to ``by`` of their size."""
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(one - other).max() <= by * np.abs(other).max(), np.abs(one - other).max()


CASES = [
    *(
        (name, exporter)
        for name in ("llama", "gpt2", "bert", "clip", "t5", "whisper", "unet")
        for exporter in ("torchscript", "dynamo")
    ),
    ("packed", "torchscript"),
    ("llama_tied", "torchscript"),
    ("llama_tied", "dynamo"),
]


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_branches_give_what_peft_gives(graphs: Graphs, tmp_path: Path, name: str, exporter: str) -> None:
    base, adapter = graphs.export(name, exporter), graphs.adapter(name)
    found = run(branched(base, tmp_path / "out.onnx", adapter), feed(name))
    assert_close(found, graphs.reference(name, adapter))


@pytest.mark.parametrize(
    ("name", "how", "exporter"),
    [
        ("bert", "basic", "torchscript"),  # Gemm
        ("bert", "extended", "torchscript"),  # FusedGemm: the branch goes below the activation
        ("bert", "fused", "torchscript"),  # Attention, EmbedLayerNormalization: onto the weight
        ("gpt2", "fused", "torchscript"),
        ("clip", "external", "dynamo"),
    ],
)
def test_branches_in_changed_graphs(graphs: Graphs, tmp_path: Path, name: str, how: str, exporter: str) -> None:
    base, adapter = graphs.variant(name, how, exporter), graphs.adapter(name)
    model = None
    if how == "fused" and name == "bert":
        folder = tmp_path / "base"
        make(name).save_pretrained(folder)
        model = read_model(folder)
    found = run(branched(base, tmp_path / "out.onnx", adapter, base_weights=model), feed(name))
    assert_close(found, graphs.reference(name, adapter))


def test_branches_in_half_precision(graphs: Graphs, tmp_path: Path) -> None:
    base, adapter = graphs.variant("llama", "half"), graphs.adapter("llama")
    out = branched(base, tmp_path / "out.onnx", adapter)
    assert_close(run(out, feed("llama")), graphs.reference("llama", adapter), by=1e-2)
    added = [t for t in onnx.load(out).graph.initializer if "lora_" in t.name]
    assert added and {tensor.data_type for tensor in added} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(
    ("name", "how"), [("llama", "nbits"), ("whisper", "qdq"), ("whisper", "dynamic"), ("twins", "qdq")]
)
def test_quantised_weights_keep_the_update(graphs: Graphs, tmp_path: Path, name: str, how: str) -> None:
    # onnx.md trap 27: a change of 1 % of the weights; codes would not even notice
    base, adapter = graphs.variant(name, how), graphs.adapter(name)
    out = branched(base, tmp_path / "out.onnx", adapter, strengths=[0.1])
    before, after = run(base, feed(name))[0], run(out, feed(name))[0]
    weak = graphs.reference(name, adapter, strength=0.1)[0] - graphs.reference(name)[0]
    assert cosine(after - before, weak) > 0.9  # what is missing is the rounding of int8 activations
    assert 0.8 < np.linalg.norm(after - before) / np.linalg.norm(weak) < 1.25
    assert initializers(out)[: len(initializers(base))] == initializers(base)


def test_integer_products_are_known_by_their_biases(graphs: Graphs, tmp_path: Path) -> None:
    """The quantiser drops what dynamo noted; behind Cast and Mul, the bias still has its name."""
    base, adapter = graphs.variant("whisper", "dynamic", "dynamo"), graphs.adapter("whisper")
    report = loratool.export_onnx(base, adapter, out=tmp_path / "out.onnx")
    assert report.verified and {entry["resolver"] for entry in report.resolved.values()} == {"bias"}
    before, after = run(base, feed("whisper"))[0], run(tmp_path / "out.onnx", feed("whisper"))[0]
    wanted = graphs.reference("whisper", adapter)[0] - graphs.reference("whisper")[0]
    assert cosine(after - before, wanted) > 0.85


@pytest.mark.parametrize("how", ["nbits", "dynamic"])
def test_quantised_weights_without_names_are_known_by_their_rows(graphs: Graphs, tmp_path: Path, how: str) -> None:
    base, adapter, folder = graphs.variant("llama", how, "dynamo"), graphs.adapter("llama"), tmp_path / "base"
    with pytest.raises(MatchError, match="only values can tell"):
        loratool.export_onnx(base, adapter, out=tmp_path / "out.onnx")
    make("llama").save_pretrained(folder)
    report = loratool.export_onnx(base, adapter, out=tmp_path / "out.onnx", base_weights=folder)
    assert report.verified and {entry["resolver"] for entry in report.resolved.values()} == {"values"}
    same = branched(graphs.variant("llama", how), tmp_path / "same.onnx", adapter)  # its names are there
    assert_close(run(tmp_path / "out.onnx", feed("llama")), run(same, feed("llama")), by=1e-2)


def test_int4_weights_are_understood(graphs: Graphs, tmp_path: Path) -> None:
    """PEFT on a model whose weights are what the codes stand for gives the same outputs."""
    base, adapter = graphs.variant("llama", "nbits"), graphs.adapter("llama")
    graph, model = read_graph(base), make("llama")
    sites, _ = resolve(graph, loratool.read(adapter))
    known = {path_module(op.use.node.proto.name.replace("_Q4", "")): op for op in operands(graph)}
    assert {site.quantised for site in sites} == {"MatMulNBits"}
    for module, operand in known.items():
        if operand.quantised:
            model.get_submodule(module).weight.data.copy_(torch_tensor(dequantised(graph, operand)))
    assert_close(run(base, feed("llama")), forward(model, feed("llama")))
    out = branched(base, tmp_path / "out.onnx", adapter)
    assert_close(run(out, feed("llama")), graphs.reference("llama", adapter, model=model))


def test_two_adapters_add_up(graphs: Graphs, tmp_path: Path) -> None:
    base = graphs.export("clip")
    one, other = graphs.adapter("clip"), graphs.adapter("clip", ("q_proj", "fc1"), seed=1, r=5)
    found = run(branched(base, tmp_path / "out.onnx", one, other, strengths=[0.5, -1.5]), feed("clip"))
    assert_close(found, graphs.reference("clip", one, other, strength=(0.5, -1.5)))


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"v_proj": 1}},
        {"modules_to_save": ["fc2"], "target_modules": ["q_proj", "fc1"]},
        {"bias": "lora_only", "target_modules": ["q_proj", "fc1"]},
    ],
    ids=lambda config: "-".join(config)[:20],
)
def test_other_kinds(graphs: Graphs, tmp_path: Path, config: dict[str, Any]) -> None:  # onnx.md trap 17
    base, adapter = graphs.export("clip"), graphs.adapter("clip", **config)
    found = run(branched(base, tmp_path / "out.onnx", adapter), feed("clip"))
    assert_close(found, graphs.reference("clip", adapter))


def test_dora_of_int4_weights(graphs: Graphs, tmp_path: Path) -> None:
    base, adapter = graphs.variant("llama", "nbits"), graphs.adapter("llama", ("q_proj", "down_proj"), use_dora=True)
    graph, model = read_graph(base), make("llama")
    for operand in operands(graph):
        module = path_module(operand.use.node.proto.name.replace("_Q4", ""))
        if operand.quantised:
            model.get_submodule(module).weight.data.copy_(torch_tensor(dequantised(graph, operand)))
    out = branched(base, tmp_path / "out.onnx", adapter)
    assert_close(run(out, feed("llama")), graphs.reference("llama", adapter, model=model))


@pytest.mark.parametrize("mode", ["fold", "branch", "inputs"])
def test_graphs_of_genais_builder(graphs: Graphs, tmp_path: Path, mode: str) -> None:  # onnx.md trap 13
    """Fused qkv, rotary positions and the past inside the attention node, whose free sizes it alone tells."""
    adapter, out = graphs.adapter("genai"), tmp_path / "out.onnx"
    report = loratool.export_onnx(graphs.export("genai", "fp32"), adapter, out=out, mode=mode, verify=True)
    assert report.verified and report.modules == 10
    found = session(out).run(["logits"], feed("genai") | past(), active(*map(Path, report.adapters)))
    assert_close(found, graphs.reference("genai", adapter))


def test_int4_graphs_of_genais_builder(graphs: Graphs, tmp_path: Path) -> None:  # onnx.md trap 13
    """Branches by default, in the fused node; the effect is that of the float graph."""
    base, adapter, out = graphs.export("genai", "int4"), graphs.adapter("genai"), tmp_path / "out.onnx"
    report = loratool.export_onnx(base, adapter, out=out, verify=True)
    assert report.verified and report.mode == "branch"
    before, after = (session(path).run(["logits"], feed("genai") | past())[0] for path in (base, out))
    wanted = graphs.reference("genai", adapter)[0] - graphs.reference("genai")[0]
    assert cosine(after - before, wanted) > 0.9


@pytest.mark.parametrize("damage", ["bits", "block_size", "scales", "points"])
def test_blocks_that_are_not_understood_are_refused(graphs: Graphs, tmp_path: Path, damage: str) -> None:
    """A DoRA needs what the codes stand for."""
    proto = onnx.load(graphs.variant("llama", "nbits"))
    for node in (node for node in proto.graph.node if node.op_type == "MatMulNBits"):
        for attribute in node.attribute:
            if attribute.name == damage:
                attribute.i = 3
        if damage == "points":
            node.input.extend(["points"])
    kept = [tensor for tensor in proto.graph.initializer if not tensor.name.endswith("_scales")]
    if damage == "scales":
        others = [
            numpy_helper.from_array(np.ones(3, np.float32), t.name) for t in proto.graph.initializer if t not in kept
        ]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend([*kept, *others])
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 3), np.uint8), "points"))
    base = tmp_path / "base.onnx"
    onnx.save(proto, base)
    adapter = graphs.adapter("llama", ("q_proj", "down_proj"), use_dora=True)
    with pytest.raises(MatchError, match="not understood"):
        branched(base, tmp_path / "out.onnx", adapter)


def test_names_stay_and_bytes_repeat(graphs: Graphs, tmp_path: Path) -> None:
    base, adapter = graphs.export("unet", "dynamo"), graphs.adapter("unet")
    out, again = branched(base, tmp_path / "out.onnx", adapter), branched(base, tmp_path / "again.onnx", adapter)
    assert out.read_bytes() == again.read_bytes()
    one, other = onnx.load(base), onnx.load(out)
    assert initializers(out)[: len(initializers(base))] == initializers(base)
    kept = [node.name for node in other.graph.node if node.name in {n.name for n in one.graph.node}]
    assert kept == [node.name for node in one.graph.node]
    assert (one.graph.input, one.graph.output) == (other.graph.input, other.graph.output)
    assert (one.ir_version, one.opset_import) == (other.ir_version, other.opset_import)


def test_fused_convolutions_and_groups(tmp_path: Path) -> None:
    """The branch goes below an activation that is part of the node; grouped convolutions get one dense branch."""
    random = np.random.default_rng(0)
    weights = {"conv.weight": random.standard_normal((4, 4, 3, 3), np.float32)}
    weights["deep.weight"] = random.standard_normal((4, 1, 3, 3), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["c"], "/conv/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "/Relu"),
        helper.make_node("Conv", ["r", "deep.weight"], ["y"], "/deep/Conv", group=4, strides=[2, 2], pads=[1] * 4),
    ]
    base = tmp_path / "base.onnx"
    x, y = (helper.make_tensor_value_info(name, 1, ["n", 4, "h", "w"]) for name in "xy")
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), base)
    fused = optimised(base, "extended", tmp_path / "fused.onnx")
    assert "FusedConv" in {node.op_type for node in onnx.load(fused).graph.node}
    updates = {"conv": samples.low(4, 4, 2, 3, 3), "deep": samples.low(4, 1, 2, 3, 3)}
    adapter = samples.lora_file(tmp_path / "lora.safetensors", updates)
    for tensor, name in zip(stored, weights, strict=True):
        wanted = weights[name] + updates[name.removesuffix(".weight")].delta()
        tensor.CopyFrom(numpy_helper.from_array(wanted.astype(np.float32), name))
    merged = helper.make_graph(nodes, "g", [x], [y], stored)
    onnx.save(helper.make_model(merged, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    inputs = {"x": random.standard_normal((2, 4, 8, 8), np.float32)}
    wanted_outputs = run(tmp_path / "m.onnx", inputs)
    for source in (base, fused):
        assert_close(run(branched(source, tmp_path / f"out-{source.name}", adapter), inputs), wanted_outputs)


def test_branches_of_an_if_share_their_factors(tmp_path: Path) -> None:  # onnx.md trap 14
    random = np.random.default_rng(0)
    weight = random.standard_normal((5, 7), np.float32)  # [in,out]
    y = helper.make_tensor_value_info("y", 1, [3, 7])

    def side(word: str) -> Any:
        product = helper.make_node("MatMul", ["x", "w"], [f"{word}_p"], "/proj/MatMul")
        return helper.make_graph([product, helper.make_node(word, [f"{word}_p"], ["y"])], word, [], [y])

    choose = helper.make_node("If", ["c"], ["y"], "choose", then_branch=side("Tanh"), else_branch=side("Neg"))
    inputs = [helper.make_tensor_value_info("x", 1, [3, 5]), helper.make_tensor_value_info("c", 9, [])]
    graph = helper.make_graph([choose], "g", inputs, [y], [numpy_helper.from_array(weight, "w")])
    base = tmp_path / "base.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), base)
    update = samples.low(7, 5, 2)
    adapter = samples.lora_file(tmp_path / "lora.safetensors", {"proj": update})
    out = branched(base, tmp_path / "out.onnx", adapter)
    x = random.standard_normal((3, 5), np.float32)
    product = x @ (weight + update.delta().T)
    assert_close(run(out, {"x": x, "c": np.array(True)}), [np.tanh(product)])
    assert_close(run(out, {"x": x, "c": np.array(False)}), [-product])
    assert initializers(out) == ["w", "proj.lora_A.weight", "proj.lora_B.weight"]


def test_operators_that_round_at_once_are_refused(graphs: Graphs, tmp_path: Path) -> None:
    """Integers in, integers out: there is no float to add to."""
    base, adapter = graphs.variant("whisper", "qoperator"), graphs.adapter("whisper")
    with pytest.raises(MatchError, match="QLinear") as error:
        branched(base, tmp_path / "out.onnx", adapter)
    assert "QDQ" in error.value.hint


def test_a_factor_that_overflows_is_named(graphs: Graphs, tmp_path: Path) -> None:  # onnx.md trap 26
    base, adapter = graphs.variant("llama", "half"), graphs.adapter("llama")
    with pytest.raises(NumericError, match="F16"):
        branched(base, tmp_path / "out.onnx", adapter, strengths=[1e7])


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


def initializers(path: Path) -> list[str]:
    return [tensor.name for tensor in onnx.load(path).graph.initializer]


def torch_tensor(values: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values))
