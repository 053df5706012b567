"""Adapters folded into ONNX graphs, against PEFT in onnxruntime and dense references; laws; hostile files.

Numbers of traps are those of the fact sheet onnx.md, section 8.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.cli import main
from loratool.devices import choose
from loratool.errors import FormatError, LoratoolError, MatchError, NumericError
from loratool.onnx.fold import Edit, write_graph
from loratool.onnx.graph import read_graph
from loratool.onnx.operands import Layout
from loratool.onnx.resolve import logical
from loratool.onnx.turned import Turned, restored, stored
from loratool.onnx.wire import Hole, skim, unskim
from loratool.plan import OutputFile, Part, Plan, Run, Step, thread_count
from loratool.tensors import Tensor, write_safetensors
from loratool.update import Dense, DoRA, LowRank, Replace, Update
from tests.onnx_models import MODELS, Graphs, feed, forward, make, run
from tests.samples import UPDATES, low, normal

MODULE = "fc"


def export(base: Path, *adapters: Path | Adapter, out: Path, **options: Any) -> Any:
    """An unverified export: what it is held against is the tests' own."""
    return loratool.export_onnx(base, *adapters, out=out, **{"verify": False, **options})


def folded(base: Path, *adapters: Path | Adapter, **options: Any) -> Path:
    """The output of an export beside its base."""
    number = len(list(base.parent.glob("out*.onnx")))
    out = base.parent / f"out{number}.onnx"
    export(base, *adapters, out=out, **options)
    return out


@pytest.fixture
def at(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a shared graph, with its data, in the test's own folder."""

    def copied(path: Path) -> Path:
        for file in path.parent.glob(f"{path.name}*"):
            if file.name in (path.name, f"{path.name}_data"):
                shutil.copy(file, tmp_path)
        return tmp_path / path.name

    return copied


def initializers(path: Path) -> dict[str, np.ndarray]:
    """Every initializer of the main graph, in order, by onnx' own reader."""
    model = onnx.load(path)
    return {tensor.name: numpy_helper.to_array(tensor, str(path.parent)) for tensor in model.graph.initializer}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def close(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], base: Sequence[np.ndarray]) -> None:
    """The outputs are the wanted ones up to rounding, and the change from the base is visible."""
    for one, other, before in zip(found, wanted, base, strict=True):
        assert np.abs(other - before).max() > 0.05
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def graph_of(path: Path, nodes: list[Any], weights: dict[str, Any], width: int = 5, **model: Any) -> Path:
    """A graph of x [batch,width] -> y; weights are arrays or tensor messages."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [w if isinstance(w, TensorProto) else numpy_helper.from_array(w, name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "g", [given], [made], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8, **model), path)
    return path


def linear(path: Path, weight: np.ndarray, name: str = "w") -> Path:
    """x @ weight.T, as torch exports a Linear without bias."""
    nodes = [helper.make_node("MatMul", ["x", name], ["y"], f"/{MODULE}/MatMul")]
    return graph_of(path, nodes, {name: np.ascontiguousarray(weight.T)}, weight.shape[1])


def adapter(update: Update, module: str = MODULE) -> Adapter:
    return Adapter({module: update}, {}, Metadata("raw"))


def values(*shape: int, seed: int = 5) -> np.ndarray:
    return normal(*shape, seed=seed).array()


# ---------------------------------------------------------------- PEFT is the oracle


@pytest.mark.peer
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "twins"])
def test_a_folded_graph_gives_what_peft_gives(graphs: Graphs, at: Any, name: str, exporter: str) -> None:
    """Unmerged PEFT: of tied weights each end separately. Traps 1 (square weights), 3 (GPT-2), 5 (tied), 24."""
    base = at(graphs.export(name, exporter))
    out = folded(base, graphs.adapter(name))
    close(run(out, feed(name)), graphs.reference(name, graphs.adapter(name)), run(base, feed(name)))
    before, after = onnx.load(base), onnx.load(out)
    assert (before.ir_version, before.opset_import) == (after.ir_version, after.opset_import)
    names = [tensor.name for tensor in before.graph.initializer]
    assert [tensor.name for tensor in after.graph.initializer][: len(names)] == names


@pytest.mark.peer
@pytest.mark.parametrize("how", ["basic", "extended", "fused", "external"])
def test_optimised_graphs_give_what_peft_gives(graphs: Graphs, at: Any, tmp_path: Path, how: str) -> None:
    weights = tmp_path / "weights"
    make("bert").save_pretrained(weights)
    base = at(graphs.variant("bert", how))
    out = folded(base, graphs.adapter("bert"), base_weights=weights)
    close(run(out, feed("bert")), graphs.reference("bert", graphs.adapter("bert")), run(base, feed("bert")))


@pytest.mark.peer
def test_merging_a_tied_head_would_change_the_embedding_too(graphs: Graphs, at: Any) -> None:  # trap 5
    from peft import PeftModel

    out = folded(at(graphs.export("llama_tied", "dynamo")), graphs.adapter("llama_tied"))
    peft = PeftModel.from_pretrained(make("llama_tied"), graphs.adapter("llama_tied"))
    merged = forward(peft.merge_and_unload(), feed("llama_tied"))
    assert np.abs(run(out, feed("llama_tied"))[0] - merged[0]).max() > 0.1


@pytest.mark.peer
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_a_layer_of_equal_values_keeps_its_own(graphs: Graphs, at: Any, exporter: str) -> None:  # trap 6
    base = at(graphs.export("twins", exporter))
    chosen = graphs.adapter("twins", targets=("a", "c"))
    out = folded(base, chosen)
    close(run(out, feed("twins")), graphs.reference("twins", chosen), run(base, feed("twins")))


@pytest.mark.peer
@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 1}, "use_rslora": True},  # trap 17
        {"use_dora": True},
        {"lora_bias": True, "targets": ("fc1", "fc2", "q_proj")},
        {"bias": "all"},
        {"modules_to_save": ["fc1", "layer_norm1"], "targets": ("q_proj", "fc2")},
    ],
    ids=lambda config: next(iter(config)),
)
def test_every_way_of_peft(graphs: Graphs, at: Any, config: dict[str, Any]) -> None:
    chosen = graphs.adapter("clip", **config)
    for exporter in ("torchscript", "dynamo"):
        base = at(graphs.export("clip", exporter))
        close(run(folded(base, chosen), feed("clip")), graphs.reference("clip", chosen), run(base, feed("clip")))


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "tuner", "config"),
    [
        ("llama", "LoHa", {"r": 3, "target_modules": ["q_proj", "down_proj"]}),
        ("unet", "LoKr", {"r": 3, "target_modules": ["to_q", "conv_in"]}),
        ("llama", "IA3", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("gpt2", "IA3", {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"]}),
        ("bert", "HRA", {"r": 4, "target_modules": ["query", "dense"]}),
        ("bert", "LNTuning", {"target_modules": ["LayerNorm"]}),
    ],
)
def test_other_tuners_of_peft(
    graphs: Graphs, at: Any, tmp_path: Path, name: str, tuner: str, config: dict[str, Any]
) -> None:
    import peft
    import torch

    model = peft.get_peft_model(make(name), getattr(peft, f"{tuner}Config")(**config))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    base = at(graphs.export(name, "dynamo"))
    wanted = forward(model.eval(), feed(name))
    close(run(folded(base, tmp_path / "adapter"), feed(name)), wanted, run(base, feed(name)))


@pytest.mark.peer
@pytest.mark.parametrize("name", ["gpt2", "twins"])
def test_dora_from_the_weights_of_the_graph(graphs: Graphs, at: Any, name: str) -> None:
    targets = {"gpt2": ("c_attn", "c_fc", "c_proj"), "twins": ("a", "c")}[name]
    chosen = graphs.adapter(name, targets=targets, use_dora=True)
    base = at(graphs.export(name))
    close(run(folded(base, chosen), feed(name)), graphs.reference(name, chosen), run(base, feed(name)))


@pytest.mark.peer
@pytest.mark.parametrize(
    "config",
    [
        {"targets": ("q_proj",), "trainable_token_indices": {"embed_tokens": [3, 5, 9]}},
        {"targets": ("embed_tokens", "q_proj")},
        {"targets": ("embed_tokens", "q_proj"), "ensure_weight_tying": True},
        {"targets": ("q_proj",), "modules_to_save": ["lm_head"]},
        {"targets": ("q_proj",), "modules_to_save": ["embed_tokens"]},
    ],
    ids=["tokens", "table", "both", "whole head", "whole table"],
)
def test_each_end_of_a_tied_pair_is_as_peft_runs_it(graphs: Graphs, at: Any, config: dict[str, Any]) -> None:  # trap 5
    base, chosen = at(graphs.export("llama_tied", "dynamo")), graphs.adapter("llama_tied", **config)
    close(
        run(folded(base, chosen), feed("llama_tied")),
        graphs.reference("llama_tied", chosen),
        run(base, feed("llama_tied")),
    )


def test_two_graphs_of_one_model_in_other_layouts(graphs: Graphs, at: Any, tmp_path: Path) -> None:  # trap 2
    """onnxslim turns MatMul + Add into Gemm with transB: the same layer needs the other orientation."""
    base = at(graphs.export("bert"))
    model = onnx.load(base)
    turned = 0
    tables = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tables and "pooler" not in node.name:
            value = numpy_helper.to_array(tables[node.input[1]])
            tables[node.input[1]].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value.T), node.input[1]))
            node.op_type, turned = "FusedMatMul", turned + 1
            node.domain = "com.microsoft"
            node.attribute.append(helper.make_attribute("transB", 1))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "turned.onnx")
    assert turned == 12
    one, other = (folded(path, graphs.adapter("bert")) for path in (base, tmp_path / "turned.onnx"))
    np.testing.assert_allclose(run(one, feed("bert"))[0], run(other, feed("bert"))[0], atol=1e-5)


def test_strengths_and_several_adapters(graphs: Graphs, at: Any) -> None:
    """The sum of strength x change; each weight rounded once."""
    base = at(graphs.export("llama"))
    one, other = graphs.adapter("llama"), graphs.adapter("llama", targets=("q_proj", "gate_proj"), seed=1)
    before = initializers(base)
    deltas = [
        {n: v.astype(np.float64) - before[n] for n, v in initializers(folded(base, a)).items()} for a in (one, other)
    ]
    both = initializers(folded(base, one, other, strengths=[0.5, -2.0]))
    assert both.keys() == before.keys()
    for name, value in both.items():
        wanted = before[name] + 0.5 * deltas[0][name] - 2 * deltas[1][name]
        np.testing.assert_allclose(value, wanted, atol=1e-6, err_msg=name)


# ---------------------------------------------------------------- every kind, in every layout


def cases() -> list[tuple[str, Layout, bool]]:
    """Every kind, in the layouts that its weight can have, whole and as rows of a fused weight."""
    found: list[tuple[str, Layout, bool]] = []
    for kind, update in UPDATES.items():
        turned: Layout = "transposed" if len(update.shape) == 2 else "nhwc"
        fused = (False,) if getattr(update, "layer", "") == "embedding" else (False, True)
        found += [(kind, layout, f) for layout in ("plain", turned) for f in fused if len(update.shape) > 1]
    return found


@pytest.mark.parametrize(("kind", "layout", "fused"), cases())
def test_every_kind_in_every_layout(kind: str, layout: Layout, fused: bool) -> None:
    """A turned update of the stored tensor is the update of the module's weight, turned."""
    update: Any = logical(UPDATES[kind], "fc")
    update = update.sized(tuple(n or 8 for n in update.shape))  # where the file does not tell
    out, *rest = update.shape
    base = values(2 * out, *rest) if fused else values(*update.shape)
    rows = np.random.default_rng(1).permutation(2 * out)[:out] if fused else None
    wanted = base.copy()
    wanted[slice(None) if rows is None else rows] = update.apply(base if rows is None else base[rows], 0.75)

    held = restored(Tensor.of(base), layout)
    step = Step("w", "w", held, "F32", (Part(stored(update, held.shape, layout, rows), 0.75, 0, held.rows, "fc"),))
    np.testing.assert_allclose(ran(step), restored(Tensor.of(wanted), layout).array(), rtol=1e-5, atol=1e-5)


def ran(step: Step, device: str = "cpu-numpy") -> np.ndarray:
    """The stored values that a run makes of one tensor."""
    made = np.empty((step.shape[0], int(np.prod(step.shape[1:]))), np.float32)

    class Kept:
        def block(self, output: OutputFile, step: Step, start: int, data: np.ndarray) -> None:
            made[start : start + len(data)] = data.view(np.float32)

    list(Run(Plan((OutputFile("o", (step,), {}),)), Kept(), choose(device, {}), thread_count()))
    return made.reshape(step.shape)


def test_turned_updates_on_torch() -> None:
    update, base = UPDATES["dora_by_input"], values(7, 5)
    held = Tensor.of(np.ascontiguousarray(base.T))
    step = Step("w", "w", held, "F32", (Part(Turned(update, (5, 7), "transposed"), 1.0, 0, 5, "fc"),))
    np.testing.assert_allclose(ran(step, "cpu-torch"), update.apply(base).T, atol=1e-5)


def test_gemm_scales_its_product(tmp_path: Path) -> None:
    """y = alpha * x @ w: the change is divided by alpha."""
    weight, update = values(7, 5), low()
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], "/fc/Gemm", alpha=0.25, transB=1)]
    base = graph_of(tmp_path / "g.onnx", nodes, {"w": weight})
    x = {"x": values(3, 5, seed=8)}
    (before,), (after,) = run(base, x), run(folded(base, adapter(update)), x)
    np.testing.assert_allclose(after - before, x["x"] @ update.delta().T, atol=1e-5)
    with pytest.raises(LoratoolError, match="scaled product"):
        folded(base, adapter(DoRA(update, Tensor.of(np.ones(7, np.float32)))))


def test_a_whole_weight_is_put_in_its_place_bit_for_bit(tmp_path: Path) -> None:
    new = values(7, 5, seed=9) * 1e-6
    base = linear(tmp_path / "g.onnx", 1000 * values(7, 5))
    out = folded(base, Adapter({}, {"fc.weight": Tensor.of(new)}, Metadata("peft")))
    np.testing.assert_array_equal(initializers(out)["w"], new.T)


def test_flattened_names_are_looked_up_in_the_graph(graphs: Graphs, at: Any) -> None:
    """kohya's names of a model that no table knows."""
    base, chosen = at(graphs.export("unet")), graphs.adapter("unet", targets=("to_q", "to_out.0", "conv_in"))
    source = loratool.read(chosen)
    tensors = {}
    for name, update in source.updates.items():
        assert isinstance(update, LowRank)
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": update.down, f"{flat}.lora_up.weight": update.up}
        tensors[f"{flat}.alpha"] = Tensor.of(np.float32(update.explicit_alpha))
    write_safetensors(base.with_name("kohya.safetensors"), tensors, {})
    one, other = folded(base, chosen), folded(base, base.with_name("kohya.safetensors"))
    before, first, second = map(initializers, (base, one, other))
    assert {n: v.tobytes() for n, v in first.items()} == {n: v.tobytes() for n, v in second.items()}
    assert sum(before[n].tobytes() != first[n].tobytes() for n in before) == len(source.updates)


# ---------------------------------------------------------------- copy on write


def test_a_transposed_table_is_copied_for_the_head(tmp_path: Path) -> None:  # trap 9
    """optimum re-ties heads: the product reads a Transpose of the table. The table's own path stays as it is."""
    table = values(9, 5)
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT64),
        helper.make_node("Gather", ["embed.weight", "ids"], ["h"], "/embed/Gather"),
        helper.make_node("Identity", ["embed.weight"], ["same"]),
        helper.make_node("Transpose", ["same"], ["turned"], "/lm_head/Transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["h", "turned"], ["y"], "/lm_head/MatMul"),
    ]
    base = graph_of(tmp_path / "g.onnx", nodes, {"embed.weight": table}, width=4)
    update = low(9, 5)
    ids = {"x": np.array([[1, 8, 3, 0]], np.float32)}
    out = folded(base, adapter(update, "lm_head"))
    np.testing.assert_allclose(run(out, ids)[0], table[[[1, 8, 3, 0]]] @ (table + update.delta()).T, atol=1e-5)
    stored_ = initializers(out)
    np.testing.assert_array_equal(stored_["embed.weight"], table)
    assert list(stored_) == ["embed.weight", "lm_head.weight"]
    embedding = LowRank(normal(2, 5), normal(9, 2, seed=1), layer="embedding")
    both = folded(base, Adapter({"lm_head": update, "embed": embedding}, {}, Metadata("raw")))
    wanted = (table + embedding.delta())[[[1, 8, 3, 0]]] @ (table + update.delta()).T
    np.testing.assert_allclose(run(both, ids)[0], wanted, atol=1e-5)


def test_a_transposed_head_lends_its_weight_to_the_table(tmp_path: Path) -> None:  # trap 9
    """The genai builder keeps the head [in,vocab] only; the table is its Transpose."""
    table = values(9, 5)
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT64),
        helper.make_node("Transpose", ["lm_head.MatMul.weight"], ["table"], perm=[1, 0]),
        helper.make_node("Gather", ["table", "ids"], ["h"], "/model/embed_tokens/Gather"),
        helper.make_node("MatMul", ["h", "lm_head.MatMul.weight"], ["y"], "/lm_head/MatMul"),
    ]
    base = graph_of(tmp_path / "g.onnx", nodes, {"lm_head.MatMul.weight": np.ascontiguousarray(table.T)}, width=4)
    update = LowRank(normal(2, 5), normal(9, 2, seed=1), layer="embedding")
    ids = {"x": np.array([[1, 8, 3, 0]], np.float32)}
    out = folded(base, adapter(update, "model.embed_tokens"))
    wanted = (table + update.delta())[[[1, 8, 3, 0]]] @ table.T
    np.testing.assert_allclose(run(out, ids)[0], wanted, atol=1e-5)


def test_branches_of_an_if_are_one_module(tmp_path: Path) -> None:  # trap 14
    """optimum's merged decoders: both branches take the same weight of the main graph. It changes once."""
    branches = {}
    for branch, by in (("then_branch", 1.0), ("else_branch", 2.0)):
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"], "/fc/MatMul"),
            helper.make_node("Mul", ["h", "by"], [f"{branch}_y"]),
        ]
        out = helper.make_tensor_value_info(f"{branch}_y", TensorProto.FLOAT, None)
        scale = numpy_helper.from_array(np.array(by, np.float32), "by")
        branches[branch] = helper.make_graph(nodes, branch, [], [out], [scale])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], **branches),
    ]
    weight, update = values(7, 5), low()
    weights = {"w": np.ascontiguousarray(weight.T), "zero": np.array(0, np.float32)}
    out = folded(graph_of(tmp_path / "g.onnx", nodes, weights), adapter(update))
    for x, by in ((np.ones((1, 5), np.float32), 1), (-np.ones((1, 5), np.float32), 2)):
        np.testing.assert_allclose(run(out, {"x": x})[0], by * x @ (weight + update.delta()).T, atol=1e-5)
    assert list(initializers(out)) == ["w", "zero"]


def test_constants_and_weights_inside_a_subgraph(tmp_path: Path) -> None:
    weight, update = values(7, 5), low()
    constant = numpy_helper.from_array(np.ascontiguousarray(weight.T), "c")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("MatMul", ["x", "c"], ["y"], "/fc/MatMul"),
    ]
    x = {"x": values(2, 5, seed=6)}
    out = folded(graph_of(tmp_path / "g.onnx", nodes, {}), adapter(update))
    np.testing.assert_allclose(run(out, x)[0], x["x"] @ (weight + update.delta()).T, atol=1e-5)

    y = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    inner = [helper.make_node("MatMul", ["x", "w"], ["z"], "/fc/MatMul")]
    graph = helper.make_graph(inner, "b", [], [y], [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")])
    nodes = [
        helper.make_node("Greater", ["one", "zero"], ["true"]),
        helper.make_node("If", ["true"], ["y"], then_branch=graph, else_branch=graph),
    ]
    weights = {"one": np.array(1, np.float32), "zero": np.array(0, np.float32)}
    out = folded(graph_of(tmp_path / "h.onnx", nodes, weights), adapter(update))
    np.testing.assert_allclose(run(out, x)[0], x["x"] @ (weight + update.delta()).T, atol=1e-5)


@pytest.mark.parametrize("name", ["w", "same"])
def test_a_weight_that_is_an_output_keeps_its_value(tmp_path: Path, name: str) -> None:
    """The weight itself, or what an Identity makes of it."""
    weight, update = values(7, 5), low()
    base = linear(tmp_path / "g.onnx", weight)
    model = onnx.load(base)
    model.graph.node.append(helper.make_node("Identity", ["w"], ["same"]))
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [5, 7]))
    onnx.save(model, base)
    x = {"x": values(2, 5, seed=6)}
    y, w = run(folded(base, adapter(update)), x)
    np.testing.assert_array_equal(w, weight.T)
    np.testing.assert_allclose(y, x["x"] @ (weight + update.delta()).T, atol=1e-5)


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64", "F32"])
def test_rounded_once_to_the_stored_dtype(tmp_path: Path, dtype: str) -> None:
    weight, update = Tensor.of(values(7, 5)).cast(dtype), low()
    wide = np.asarray(weight.array(), np.float64 if dtype == "F64" else np.float32)
    wanted = Tensor.of(update.apply(wide)).cast(dtype).array()
    message = TensorProto(name="w", data_type={"F16": 10, "BF16": 16, "F64": 11, "F32": 1}[dtype], dims=[7, 5])
    message.raw_data = weight.array().tobytes()
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], "/fc/Gemm", transB=1)]
    out = folded(graph_of(tmp_path / "g.onnx", nodes, {"w": message}), adapter(update))
    found = read_graph(out).weights
    tensor = next(weight.tensor for weight in found.values())
    assert tensor.dtype == dtype and tensor.array().tobytes() == wanted.tobytes()


@pytest.mark.parametrize("typed", ["float_data", "int32_data"])
def test_values_in_typed_fields(tmp_path: Path, typed: str) -> None:
    """Old files hold float32 in float_data and float16 as numbers in int32_data."""
    kind = np.float32 if typed == "float_data" else np.float16
    weight, update = values(7, 5).astype(kind), low()
    message = TensorProto(name="w", data_type=1 if typed == "float_data" else 10, dims=[7, 5])
    getattr(message, typed).extend((weight if typed == "float_data" else weight.view(np.uint16)).reshape(-1).tolist())
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], "/fc/Gemm", transB=1)]
    out = folded(graph_of(tmp_path / "g.onnx", nodes, {"w": message}), adapter(update))
    wanted = (weight.astype(np.float32) + update.delta()).astype(kind)
    np.testing.assert_array_equal(initializers(out)["w"], wanted)


def test_overflow_of_float16_is_an_error_that_names_the_weight(tmp_path: Path) -> None:  # trap 26
    base = linear(tmp_path / "g.onnx", np.full((7, 5), 60000, np.float16))
    with pytest.raises(NumericError, match="overflow of F16"):
        folded(base, adapter(Dense(Tensor.of(np.full((7, 5), 9000, np.float32)))))
    whole = {"fc.weight": Tensor.of(np.full((7, 5), 66000, np.float32))}
    with pytest.raises(NumericError, match="overflow of F16"):
        folded(base, Adapter({}, whole, Metadata("peft")))
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


# ---------------------------------------------------------------- external data


def external(path: Path, weight: np.ndarray | None = None, **entries: Any) -> Path:
    """A Linear whose weight [7,5] lies in a file beside it."""
    weight = values(7, 5) if weight is None else weight
    data = np.ascontiguousarray(weight.T).tobytes()
    path.with_name("data.bin").write_bytes(b"\0" * 64 + data)
    message = TensorProto(name="w", data_type=1, dims=[5, 7], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "data.bin", "offset": 64, "length": len(data), **entries}.items():
        if value is not None:
            message.external_data.add(key=key, value=str(value))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "/fc/MatMul")]
    return graph_of(path, nodes, {"w": message})


def test_external_data_go_to_one_fresh_file(graphs: Graphs, at: Any) -> None:  # trap 18
    base = at(graphs.variant("llama", "external"))
    before = [sha256(base), sha256(base.with_name(f"{base.name}_data"))]
    out = base.with_name("merged.onnx")
    report = export(base, graphs.adapter("llama"), out=out)
    data = base.with_name("merged.onnx.data")
    assert report.external_data == str(data) and data.is_file() and not data.is_symlink()
    assert {e.value for t in onnx.load(out, load_external_data=False).graph.initializer for e in t.external_data} >= {
        "merged.onnx.data"
    }
    onnx.checker.check_model(str(out))
    close(run(out, feed("llama")), graphs.reference("llama", graphs.adapter("llama")), run(base, feed("llama")))
    size, first = data.stat().st_size, sha256(data)
    export(base, graphs.adapter("llama"), out=out, overwrite=True)
    assert (data.stat().st_size, sha256(data)) == (size, first)
    assert [sha256(base), sha256(base.with_name(f"{base.name}_data"))] == before
    assert initializers(base).keys() == initializers(out).keys()


def test_what_no_adapter_touches_keeps_its_bytes(graphs: Graphs, at: Any) -> None:
    base = at(graphs.variant("llama", "external"))
    out = folded(base, graphs.adapter("llama", targets=("q_proj",)))
    before, after = initializers(base), initializers(out)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert len(changed) == 2 and {before[name].shape for name in changed} == {(16, 16)}
    untouched = folded(base, graphs.adapter("llama"), strengths=[0.0])
    assert {n: v.tobytes() for n, v in initializers(untouched).items()} == {n: v.tobytes() for n, v in before.items()}


def test_at_strength_0_a_negative_zero_stays_one(tmp_path: Path) -> None:
    base = linear(tmp_path / "g.onnx", np.full((7, 5), -0.0, np.float32))
    assert np.signbit(initializers(folded(base, adapter(low()), strengths=[0.0]))["w"]).all()


@pytest.mark.parametrize("target", ["data.bin", "sub/data.bin"])
def test_a_linked_data_file_inside_the_folder_is_read(tmp_path: Path, target: str) -> None:  # trap 19
    base = external(tmp_path / "g.onnx", location="linked.bin")
    if target != "data.bin":
        (tmp_path / "sub").mkdir()
        shutil.move(tmp_path / "data.bin", tmp_path / target)
    (tmp_path / "linked.bin").symlink_to(target)
    out = folded(base, adapter(low()))
    np.testing.assert_allclose(initializers(out)["w"], (values(7, 5) + low().delta()).T, atol=1e-6)


def test_a_hub_cache_is_read(tmp_path: Path) -> None:  # trap 19
    """snapshots/<commit>/model.onnx_data is a link to blobs/<hash>."""
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    base = external(folder / "g.onnx")
    shutil.move(folder / "data.bin", tmp_path / "blobs" / "123")
    (folder / "data.bin").symlink_to("../../blobs/123")
    shutil.move(base, tmp_path / "blobs" / "456")
    base.symlink_to("../../blobs/456")
    export(base, adapter(low()), out=tmp_path / "out.onnx")
    np.testing.assert_allclose(initializers(tmp_path / "out.onnx")["w"], (values(7, 5) + low().delta()).T, atol=1e-6)


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"location": "../data.bin"}, "unsafe path"),  # trap 21
        ({"location": "sub/../../data.bin"}, "unsafe path"),
        ({"location": "/etc/passwd"}, "unsafe path"),
        ({"location": "C:\\data.bin"}, "unsafe path"),
        ({"location": "missing.bin"}, "missing"),
        ({"location": "."}, "no regular file"),
        ({"location": None}, "one location"),
        ({"offset": 65}, "past the end"),  # trap 20
        ({"offset": 1 << 60}, "past the end"),
        ({"offset": -1}, "no size"),
        ({"offset": "1e3"}, "no size"),
        ({"length": 139}, "do not hold"),
        ({"length": 1 << 40}, "do not hold"),
        ({"length": None, "offset": 100}, "past the end"),
    ],
)
def test_hostile_external_data_are_refused(tmp_path: Path, entries: dict[str, Any], why: str) -> None:
    base = external(tmp_path / "g.onnx", **entries)
    with pytest.raises(FormatError, match=why):
        read_graph(base)


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    base = external(folder / "g.onnx")
    shutil.move(folder / "data.bin", tmp_path / "secret.bin")
    (folder / "data.bin").symlink_to("../secret.bin")
    with pytest.raises(FormatError, match="a link leaves its folder"):
        read_graph(base)
    assert read_graph(base, allow_links=True).weights
    (folder / "data.bin").unlink()
    os.mkfifo(folder / "data.bin")
    with pytest.raises(FormatError, match="no regular file"):
        read_graph(base)


def test_a_message_that_grows_too_large_goes_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protobuf ends at 2 GiB; well before that inline values go to the file beside it."""
    monkeypatch.setattr("loratool.onnx.fold.INLINE", 10_000)
    weight, update = values(64, 48), low(64, 48)
    base = linear(tmp_path / "g.onnx", weight)
    out = folded(base, adapter(update))
    assert out.stat().st_size < 2000 and out.with_name(f"{out.name}.data").stat().st_size == weight.nbytes
    np.testing.assert_allclose(initializers(out)["w"], (weight + update.delta()).T, atol=1e-5)


def test_a_graph_for_a_moment_borrows_the_data(tmp_path: Path) -> None:
    """What a proof is held against needs no copy of the base."""
    base = external(tmp_path / "g.onnx", values(64, 48))
    model = onnx.load(base, load_external_data=False)
    model.graph.initializer[0].dims[:] = [48, 64]
    onnx.save(model, base)
    (tmp_path / "scratch").mkdir()
    written = write_graph(
        Edit.of(read_graph(base)), tmp_path / "scratch" / "r.onnx", inputs={}, metadata={}, shared=True
    )
    assert written.external_data is None
    assert (tmp_path / "scratch" / "data.bin").samefile(tmp_path / "data.bin")
    (weight,) = read_graph(written.output).weights.values()
    np.testing.assert_array_equal(weight.tensor.array(), values(64, 48).T)


def test_external_data_of_constants_move_along(tmp_path: Path) -> None:
    """A Constant's or a subgraph's external values must not point to the base's file."""
    base = external(tmp_path / "g.onnx")
    model = onnx.load(base, load_external_data=False)
    weight = model.graph.initializer.pop()
    weight.name = "k"
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    onnx.save(model, base)
    out = folded(base, adapter(low(), "other"), allow_unmatched=True)
    (tmp_path / "data.bin").unlink()
    x = {"x": values(2, 5, seed=6)}
    np.testing.assert_allclose(run(out, x)[0], x["x"] @ values(7, 5).T, atol=1e-5)


# ---------------------------------------------------------------- hostile messages


def test_a_model_is_skimmed_and_put_together_again(graphs: Graphs) -> None:
    path = graphs.export("unet")
    found, model = skim(path), onnx.ModelProto()
    model.ParseFromString(found.message)
    holes = {
        proto.name: Hole(proto.name, hole[1])
        for proto, hole in zip(model.graph.initializer, found.holes, strict=True)
        if hole
    }
    assert len(holes) > 10
    assert len(found.message) <= path.stat().st_size - sum(hole.nbytes for hole in holes.values())
    data = path.read_bytes()
    at = {proto.name: hole[0] for proto, hole in zip(model.graph.initializer, found.holes, strict=True) if hole}
    pieces = [
        piece if isinstance(piece, bytes) else data[at[piece.name] : at[piece.name] + piece.nbytes]
        for piece in unskim(model, holes.get)
    ]
    assert onnx.ModelProto.FromString(b"".join(pieces)) == onnx.load(path)


def test_damaged_files_are_refused_in_one_line(graphs: Graphs, tmp_path: Path) -> None:
    """Truncations and flipped bytes anywhere: an error of ours or a graph, never another exception."""
    data = graphs.export("twins").read_bytes()
    chosen = loratool.read(graphs.adapter("twins", bias="all"))
    random = np.random.default_rng(0)
    path = tmp_path / "g.onnx"
    refused = 0
    for number in range(120):
        damaged = bytearray(data)
        if number % 3 == 0:
            del damaged[random.integers(0, len(data)) :]
        for position in random.integers(0, max(len(damaged), 1), number % 3 * 4):
            damaged[position] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            planned = loratool.plan_export_onnx(path, [chosen])
            if number % 10 == 1:
                export(path, chosen, out=tmp_path / "out.onnx", overwrite=True)
            assert planned.modules == 3
        except LoratoolError:
            refused += 1
    assert 40 < refused < 120


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x80\x02}q", "pickle"),
        (b"\x08\x08", "not an ONNX model"),
        (b"\x3a\xff\xff\xff\xff\x7f", "truncated"),
        (b"\x0b\x0b", "no protobuf message"),
        (b"\xff" * 40, "malformed"),
        (b"\x3a\x00\x3a\x00", "occurs twice"),
        (b"\x12\x01\xff\x3a\x00\x42\x02\x10\x12", "producer_name is not UTF-8"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "g.onnx").write_bytes(data)
    with pytest.raises(FormatError, match=why):
        read_graph(tmp_path / "g.onnx")


def test_hostile_tensors_are_refused(tmp_path: Path) -> None:
    def refuse(why: str, *weights: TensorProto) -> None:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "/fc/MatMul")]
        base = graph_of(tmp_path / "g.onnx", nodes, {str(n): w for n, w in enumerate(weights)})
        with pytest.raises(FormatError, match=why):
            read_graph(base)

    good = numpy_helper.from_array(values(5, 7), "w")
    refuse("two initializers of one name", good, good)
    refuse("do not hold", TensorProto(name="w", data_type=1, dims=[5, 8], raw_data=good.raw_data))
    refuse("no shape", TensorProto(name="w", data_type=1, dims=[-5, 7]))
    refuse("no shape", TensorProto(name="w", data_type=1, dims=[1 << 40, 1 << 40]))
    refuse("no shape", TensorProto(name="w", data_type=1, dims=[1] * 100_000))
    refuse("0 values do not fill", TensorProto(name="w", data_type=1, dims=[1 << 40]))
    refuse("unknown data type", TensorProto(name="w", data_type=99, dims=[1], raw_data=b"0"))
    refuse("several places", TensorProto(name="w", data_type=1, dims=[1], raw_data=b"0000", float_data=[1.0]))
    big = numpy_helper.from_array(values(50, 70), "w")  # skimmed over
    refuse("do not hold", TensorProto(name="w", data_type=1, dims=[50, 71], raw_data=big.raw_data))
    refuse("several places", TensorProto(name="w", data_type=1, dims=[50, 70], raw_data=big.raw_data, float_data=[1.0]))


def test_a_cycle_of_nodes_ends(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["b"], ["a"]),
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("MatMul", ["x", "a"], ["y"], "/fc/MatMul"),
    ]
    with pytest.raises(MatchError, match="no target"):
        folded(graph_of(tmp_path / "g.onnx", nodes, {}), adapter(low()))


# ---------------------------------------------------------------- laws


def test_the_same_bytes_on_every_run(graphs: Graphs, at: Any) -> None:
    base = at(graphs.export("llama"))
    one, other = (folded(base, graphs.adapter("llama")) for _ in range(2))
    assert one != other and one.read_bytes() == other.read_bytes()


def test_provenance_holds_the_inputs(graphs: Graphs, at: Any) -> None:
    base, chosen = at(graphs.variant("llama", "external")), graphs.adapter("llama")
    out = folded(base, chosen, strengths=[0.5])
    told = {entry.key: entry.value for entry in onnx.load(out, load_external_data=False).metadata_props}
    assert json.loads(told["loratool.strengths"]) == [0.5]
    assert json.loads(told["loratool.inputs"]) == {
        f"base/{base.name}": sha256(base),
        f"base/{base.name}_data": sha256(base.with_name(f"{base.name}_data")),
        "adapter1/adapter_model.safetensors": sha256(chosen / "adapter_model.safetensors"),
    }
    again = folded(out, chosen, strengths=[-0.5])  # of a graph that has it, the provenance is made anew
    told = [entry.key for entry in onnx.load(again, load_external_data=False).metadata_props]
    assert len(told) == len(set(told))


def test_the_output_is_whole_or_absent(graphs: Graphs, at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = at(graphs.variant("llama", "external"))
    out = base.with_name("merged.onnx")
    export(base, graphs.adapter("llama"), out=out, strengths=[0.5])
    before = {path.name: sha256(path) for path in base.parent.iterdir()}
    with pytest.raises(LoratoolError, match="output exists"):
        export(base, graphs.adapter("llama"), out=out)
    out.rename(base.with_name("kept.onnx"))
    with pytest.raises(LoratoolError, match=r"output exists, .*merged\.onnx\.data"):
        export(base, graphs.adapter("llama"), out=out)
    base.with_name("kept.onnx").rename(out)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(LoratoolError, match="No space left"):
        export(base, graphs.adapter("llama"), out=out, overwrite=True)
    assert {path.name: sha256(path) for path in base.parent.iterdir()} == before


def test_an_old_graph_never_stands_beside_new_data(graphs: Graphs, at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files cannot be renamed at once: whatever happens in between, there is no graph rather than a wrong one."""
    base = at(graphs.variant("llama", "external"))
    out = base.with_name("merged.onnx")
    export(base, graphs.adapter("llama"), out=out, strengths=[0.5])
    rename = os.replace

    def fail(source: Path, place: Path) -> None:
        if Path(place) == out:
            raise OSError(5, "Input/output error")
        rename(source, place)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        export(base, graphs.adapter("llama"), out=out, overwrite=True)
    assert not out.exists()
    monkeypatch.undo()
    export(base, graphs.adapter("llama"), out=out, overwrite=True)
    assert sorted(path.name for path in base.parent.iterdir() if path.name.startswith((".", "merged"))) == [
        "merged.onnx",
        "merged.onnx.data",
    ]


def test_the_base_is_never_the_output(graphs: Graphs, at: Any) -> None:
    base = at(graphs.variant("llama", "external"))
    with pytest.raises(LoratoolError, match="would overwrite the base"):
        export(base, graphs.adapter("llama"), out=base, overwrite=True)
    shutil.move(base.with_name(f"{base.name}_data"), base.with_name("merged.onnx.data"))
    model = onnx.load(base, load_external_data=False)
    for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data):
        if entry.key == "location":
            entry.value = "merged.onnx.data"
    onnx.save(model, base)
    with pytest.raises(LoratoolError, match="would overwrite the base"):
        export(base, graphs.adapter("llama"), out=base.with_name("merged.onnx"), overwrite=True)


def test_folding_needs_neither_torch_nor_onnxruntime(graphs: Graphs, at: Any) -> None:
    base = at(graphs.export("llama"))
    code = """
import sys
from loratool.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
assert not {'torch', 'onnxruntime'} & {*sys.modules}
"""
    arguments = ["export-onnx", base, graphs.adapter("llama"), "-o", base.with_name("o.onnx"), "--no-verify"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True)


def test_memory_stays_far_below_the_model(tmp_path: Path) -> None:  # traps 22, 23
    """64 MiB of weights, in the message itself and in a file beside it; one thread."""
    inline, outside = tmp_path / "inline.onnx", tmp_path / "outside.onnx"
    model = onnx.load(linear(inline, np.zeros((4096, 4096), np.float32)))
    onnx.save(model, outside, save_as_external_data=True, location="w.bin", size_threshold=0)
    loratool.write(adapter(low(4096, 4096, 2)), tmp_path / "adapter.safetensors", format="raw")
    code = """
import os, resource, sys, loratool.cli, onnx, onnx.numpy_helper, numpy
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for base in sys.argv[2:]:
    loratool.export_onnx(base, sys.argv[1], out=base + ".out", verify=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, *map(str, (tmp_path / "adapter.safetensors", inline, outside))]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 40 << 10  # KiB: a block of 4 MiB as read, in float32, with its change, and as written


# ---------------------------------------------------------------- the command


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
        raise SystemExit(0)
    return int(end.value.code or 0)


def test_the_command_reports_what_the_contract_says(graphs: Graphs, at: Any, capsys: Any) -> None:
    base, out = at(graphs.variant("llama", "external")), "merged.onnx"
    path = base.with_name(out)
    arguments = ("export-onnx", base, graphs.adapter("llama"), "-o", path, "-s", "0.5", "--no-verify", "--json")
    assert called(*arguments, "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert not path.exists() and plan["modules"] == 10 and plan["bytes_to_write"] > 10_000
    assert {row["action"] for row in plan["tensors"]} == {"merge", "copy"} and plan["peak_memory"] > 0
    assert called(*arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["output"], told["mode"], told["modules"]) == (str(path), "fold", 10)
    assert (told["verified"], told["max_abs_diff"], told["providers"]) == (False, None, [])
    assert told["external_data"] == f"{path}.data" and told["adapters"] == [] and told["unmatched"] == []
    weights = {row["name"] for row in plan["tensors"] if row["action"] == "merge"}
    assert {entry["weight"] for entry in told["resolved"].values()} == weights
    assert {entry["resolver"] for entry in told["resolved"].values()} == {"path"}
    assert called(*arguments) == 1  # it exists now
    assert called(*arguments, "--dry-run") == 1


def test_exit_codes(graphs: Graphs, at: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, chosen = at(graphs.export("llama")), graphs.adapter("llama")
    tail = ("-o", base.with_name("o.onnx"), "--no-verify")
    assert called("export-onnx", base, chosen, *tail, "-s", "1", "-s", "2") == 2
    assert called("export-onnx", base.with_name("none.onnx"), chosen, *tail) == 1
    assert called("export-onnx", base, graphs.adapter("clip"), *tail) == 4
    nameless = at(graphs.variant("llama", "extended", "dynamo"))
    capsys.readouterr()
    assert called("export-onnx", nameless, chosen, *tail) == 4
    assert "--base-weights" in capsys.readouterr().err
    quantised = at(graphs.variant("llama", "nbits"))
    assert called("export-onnx", quantised, chosen, *tail, "--mode", "fold") == 3
    assert "--mode branch" in capsys.readouterr().err
    assert called("export-onnx", base, graphs.adapter("clip"), *tail, "--allow-unmatched") == 0
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert called("export-onnx", base, chosen, *tail, "--overwrite") == 1
    assert "pip install 'loratool[onnx]'" in capsys.readouterr().err


def test_a_replacement_is_no_update(tmp_path: Path) -> None:
    """Two whole tensors, or one with a strength, are a way from the base to them."""
    weight, new = values(7, 5), values(7, 5, seed=9)
    base = linear(tmp_path / "g.onnx", weight)
    half = Adapter({}, {"fc.weight": Tensor.of(new)}, Metadata("peft"))
    out = initializers(folded(base, half, strengths=[0.5]))["w"]
    np.testing.assert_allclose(out, ((weight + new) / 2).T, atol=1e-6)
    both = folded(base, half, replace(half), strengths=[0.5, 0.5])
    np.testing.assert_allclose(initializers(both)["w"], new.T, atol=1e-6)
    assert isinstance(stored(Replace(Tensor.of(new)), (5, 7), "transposed"), Replace)
