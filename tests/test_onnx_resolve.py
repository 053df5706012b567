"""Which weights of a graph an adapter's modules are: each exporter, each optimiser, and what must be refused.

Numbers of traps are those of the fact sheet onnx.md, section 8.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.errors import MatchError
from loratool.kinds.rescale import IA3
from loratool.model import Model, read_model
from loratool.onnx.graph import Graph, read_graph
from loratool.onnx.operands import module_names, operands, path_module
from loratool.onnx.resolve import Site, resolve
from loratool.tensors import Tensor
from loratool.update import LowRank, Update
from tests.onnx_models import MODELS, Graphs, make, make_genai, quiet
from tests.samples import normal

NAMES = tuple(MODELS)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """The torch checkpoint of a graph, by model name."""
    from safetensors.torch import save_file

    @cache
    def saved(name: str) -> Model:
        folder = tmp_path_factory.mktemp(f"{name}-weights")
        model = make(name)
        with quiet():
            if hasattr(model, "save_pretrained"):
                model.save_pretrained(folder)
            else:
                save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        return read_model(folder)

    return saved


def found(graph: Path, adapter: Path | Adapter, base: Model | None = None) -> tuple[Graph, list[Site]]:
    """The graph and the sites of an adapter that has none unmatched."""
    read = read_graph(graph)
    sites, unmatched = resolve(read, adapter if isinstance(adapter, Adapter) else loratool.read(adapter), base)
    assert not unmatched, unmatched[0]
    return read, sites


def low(**modules: tuple[int, int]) -> Adapter:
    """A LoRA of some modules by their shapes [out,in]; double underscores are dots."""
    updates: dict[str, Update] = {
        name.replace("__", "."): LowRank(normal(2, i), normal(o, 2, seed=1)) for name, (o, i) in modules.items()
    }
    return Adapter(updates, {}, Metadata("peft"))


def parameters(name: str) -> dict[str, np.ndarray]:
    """The weights of the torch model in torch.nn.Linear's orientation, tied ones at both ends."""
    from transformers.pytorch_utils import Conv1D

    turned = {f"{path}.weight" for path, module in make(name).named_modules() if isinstance(module, Conv1D)}
    values = {key: value.detach().numpy() for key, value in make(name).named_parameters(remove_duplicate=False)}
    return {key: value.T if key in turned else value for key, value in values.items()}


def held(site: Site) -> np.ndarray:
    """The module's weight as the graph holds it, in torch's orientation."""
    values = site.weight.tensor.array()
    layout = site.operands[0].layout
    values = values.T if layout == "transposed" else np.moveaxis(values, -1, 1) if layout == "nhwc" else values
    return values if site.rows is None else values[site.rows]


def check_values(name: str, sites: list[Site]) -> None:
    """Each site holds the very values that its module has in torch."""
    known = parameters(name)
    for site in sites:
        np.testing.assert_array_equal(held(site), known[f"{site.module}.weight"], err_msg=site.module)


# ---------------------------------------------------------------- exporters


@pytest.mark.parametrize(
    ("name", "exporter"),
    [*((name, "dynamo") for name in NAMES), *((name, "torchscript") for name in ("llama", "bert", "twins", "packed"))],
)
def test_every_target_is_found_with_its_own_values(graphs: Graphs, name: str, exporter: str) -> None:
    """Square weights hide a wrong orientation from their shape, not from their values."""
    _, sites = found(graphs.export(name, exporter), graphs.adapter(name))
    check_values(name, sites)
    assert {site.resolver for site in sites} == {"scopes" if exporter == "dynamo" and name != "packed" else "path"}


@pytest.mark.parametrize(("name", "exporter"), [("llama", "torchscript"), ("gpt2", "dynamo"), ("unet", "dynamo")])
def test_every_weight_of_a_graph_has_a_name(graphs: Graphs, name: str, exporter: str) -> None:
    graph = read_graph(graphs.export(name, exporter))
    told = [module_names(graph, operand) for operand in operands(graph)]
    modules = {key.removesuffix(".weight") for key, value in parameters(name).items() if value.ndim > 1}
    assert {next(iter(names.values())) for names in told} == modules


@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("/model/layers.0/self_attn/q_proj/MatMul", "model.layers.0.self_attn.q_proj"),
        ("/encoder/layer.0/output/dense/MatMul/MatMulAddFusion", "encoder.layer.0.output.dense"),
        ("fused /fc1/Gemm", "fc1"),
        ("NhwcConv_0-/conv_in/Conv", "conv_in"),
        ("/model/layers.0/attn/qkv_proj/MatMul_Q4", "model.layers.0.attn.qkv_proj"),
        ("/down/to_out.0/base_layer/MatMul", "down.to_out.0"),
        ("node_MatMul_58", ""),
        ("/MatMul", ""),
    ],
)
def test_paths_of_nodes(node: str, module: str) -> None:
    assert path_module(node) == module


def test_a_wrapped_export_matches_by_its_tail_and_an_ambiguous_tail_is_refused(
    graphs: Graphs, tmp_path: Path
) -> None:  # trap 15
    graph = graphs.export("bert")
    _, sites = found(graph, low(bert__encoder__layer__1__intermediate__dense=(24, 16)))
    assert [site.weight.shape for site in sites] == [(16, 24)]
    twice = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "/a/fc/MatMul"),
        helper.make_node("MatMul", ["h", "w"], ["y"], "/b/fc/MatMul"),
    ]
    _, unmatched = resolve(read_graph(graph_of(tmp_path / "g.onnx", twice, {"w": ones(3, 3)})), low(fc=(3, 3)))
    assert "ambiguous: a.fc.weight, b.fc.weight" in str(unmatched[0])


def test_no_two_axes_of_a_llama_are_alike() -> None:  # trap 38
    """But where a test is about squares: a transposition would show."""
    for made in (MODELS["llama"].make, make_genai):
        config = made().config
        sizes = (config.vocab_size, config.hidden_size, config.intermediate_size)
        assert len({*sizes, config.num_key_value_heads * config.head_dim}) == 4
    assert config.head_dim % 16 == 0  # of the last: genai's rotary kernel


def test_the_name_of_an_initializer_does_not_decide(graphs: Graphs) -> None:  # trap 4
    graph, sites = found(graphs.export("llama_tied", "dynamo"), graphs.adapter("llama_tied"))
    (head,) = [site for site in sites if site.module == "lm_head"]
    assert head.weight.value.name != "lm_head.weight"  # that one feeds the embedding
    assert {use.node.op for use in head.uses} == {"MatMul"}
    assert {use.node.op for use in graph.ends(next(v for v in graph.weights if v.name == "lm_head.weight"))} == {
        "Gather"
    }


def test_a_table_folded_away_is_named(graphs: Graphs) -> None:  # trap 8
    update = LowRank(normal(2, 16), normal(32, 2), layer="embedding")
    adapter = Adapter({"embeddings.position_embeddings": update}, {}, Metadata("peft"))
    _, unmatched = resolve(read_graph(graphs.export("bert_static", "dynamo")), adapter)
    assert "embeddings.position_embeddings" in str(unmatched[0]) and "folded" in str(unmatched[0])
    _, sites = found(graphs.export("bert", "dynamo"), adapter)
    assert sites[0].weight.shape == (32, 16)


def test_a_module_merged_into_its_twin_is_reported(graphs: Graphs, checkpoint: Any) -> None:  # trap 7
    graph = read_graph(graphs.export("twins", "dynamo"))
    update = LowRank(normal(2, 6), normal(48, 2), layer="embedding")
    _, unmatched = resolve(graph, Adapter({"f": update}, {}, Metadata("peft")))
    assert [u.name for u in unmatched] == ["f"]
    with pytest.raises(MatchError, match=r"merged f\.weight into this weight"):
        resolve(graph, Adapter({"e": update}, {}, Metadata("peft")), checkpoint("twins"))


def test_an_adapter_that_is_in_the_graph_is_not_folded_again(graphs: Graphs, tmp_path: Path) -> None:  # trap 16
    from peft import PeftModel

    from tests.onnx_models import export

    model = PeftModel.from_pretrained(make("clip"), graphs.adapter("clip", targets=("fc1",)))
    graph = export("clip", "torchscript", tmp_path / "peft.onnx", model.base_model.model)
    with pytest.raises(MatchError, match="the graph has this adapter already"):
        resolve(read_graph(graph), loratool.read(graphs.adapter("clip", targets=("fc1",))))
    _, sites = found(graph, graphs.adapter("clip", targets=("fc1",), seed=1))
    assert all("base_layer" not in site.module for site in sites) and len(sites) == 2


# ---------------------------------------------------------------- optimisers, fused weights, values


@pytest.mark.parametrize("how", ["basic", "extended"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "unet"])
def test_optimised_graphs_resolve_by_their_base_weights(graphs: Graphs, checkpoint: Any, name: str, how: str) -> None:
    _, sites = found(graphs.variant(name, how, "dynamo"), graphs.adapter(name), checkpoint(name))
    check_values(name, sites)


def test_without_names_only_values_tell(graphs: Graphs, checkpoint: Any) -> None:  # trap 10
    graph = read_graph(graphs.variant("llama", "extended", "dynamo"))
    _, unmatched = resolve(graph, loratool.read(graphs.adapter("llama")))
    assert len(unmatched) == 10 and "only values can tell" in str(unmatched[0])
    _, sites = found(graph.path, graphs.adapter("llama"), checkpoint("llama"))
    assert {site.resolver for site in sites} == {"values"}


def test_biases_name_their_modules(graphs: Graphs) -> None:  # trap 10
    _, sites = found(graphs.variant("whisper", "extended", "dynamo"), graphs.adapter("whisper"))
    assert {site.resolver for site in sites} == {"bias"}
    check_values("whisper", sites)


def test_a_bias_that_several_share_names_nobody(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "a", "one.bias"], ["h"]),
        helper.make_node("Gemm", ["h", "b", "one.bias"], ["y"]),
    ]
    weights = {"a": ones(3, 3), "b": 2 * ones(3, 3), "one.bias": ones(3)}
    _, unmatched = resolve(read_graph(graph_of(tmp_path / "g.onnx", nodes, weights)), low(one=(3, 3)))
    assert [u.name for u in unmatched] == ["one"]


def test_tied_ends_are_told_apart_by_what_takes_them(graphs: Graphs, checkpoint: Any) -> None:
    graph = graphs.variant("llama_tied", "extended", "dynamo")
    graph_, sites = found(graph, graphs.adapter("llama_tied"), checkpoint("llama_tied"))
    (head,) = [site for site in sites if site.module == "lm_head"]
    assert {use.node.op for use in head.uses} == {"MatMul"}
    _, unmatched = resolve(graph_, loratool.read(graphs.adapter("llama_tied")))  # no values: nothing is guessed
    assert "lm_head" in {u.name.rpartition(".")[2] for u in unmatched}
    whole = Adapter({}, {"lm_head.weight": normal(48, 16)}, Metadata("peft"))  # of the table's very shape
    assert [u.name for u in resolve(graph_, whole)[1]] == ["lm_head.weight"]
    assert len(found(graph, whole, checkpoint("llama_tied"))[1]) == 1


def test_fused_attention_is_found_row_by_row(graphs: Graphs, checkpoint: Any) -> None:
    _, sites = found(graphs.variant("bert", "fused"), graphs.adapter("bert"), checkpoint("bert"))
    fused = [site for site in sites if site.rows is not None]
    assert Counter(site.module.rpartition(".")[2] for site in fused) == {"query": 2, "value": 2}
    assert all(use.node.op == "Attention" for site in fused for use in site.uses)
    check_values("bert", sites)


def test_heads_that_are_interleaved_are_found_row_by_row(graphs: Graphs, checkpoint: Any) -> None:  # trap 12
    _, sites = found(graphs.variant("unet", "fused"), graphs.adapter("unet"), checkpoint("unet"))
    interleaved = [s for s in sites if s.rows is not None and (np.diff(s.rows) > 1).any()]
    assert {site.weight.value.name.split("_")[1] for site in interleaved} == {"QKV", "KV"}
    assert {operand.layout for site in sites for operand in site.operands} >= {"nhwc"}
    check_values("unet", sites)


def test_reordered_convolutions_are_refused_and_linears_are_not(graphs: Graphs) -> None:  # trap 11
    graph = graphs.variant("unet", "all")
    with pytest.raises(MatchError, match=r"NCHWc.*extended or below"):
        resolve(read_graph(graph), loratool.read(graphs.adapter("unet")))
    linear = graphs.adapter("unet", targets=("to_q", "to_v", "to_out.0"))
    found(graph, linear)


def test_a_graph_that_is_fused_by_name(graphs: Graphs, tmp_path: Path) -> None:  # trap 13
    _, sites = found(graphs.export("packed"), graphs.adapter("packed"))
    fused = [site for site in sites if site.rows is not None]
    assert {site.weight.value.name for site in fused} == {
        f"model.layers.{n}.attn.qkv_proj.MatMul.weight" for n in range(2)
    }
    check_values("packed", sites)


def test_a_fused_adapter_on_a_split_graph(graphs: Graphs) -> None:
    """Phi-3's qkv_proj on a graph with q, k and v: each gets its rows."""
    adapter = low(model__layers__0__self_attn__qkv_proj=(32, 16))
    _, sites = found(graphs.export("llama"), adapter)
    whole = adapter.updates["model.layers.0.self_attn.qkv_proj"].delta()  # type: ignore[attr-defined]
    deltas = [site.update.delta() for site in sites]  # type: ignore[attr-defined]
    assert [len(delta) for delta in deltas] == [16, 8, 8]
    np.testing.assert_array_equal(np.concatenate(deltas), whole)


def test_base_weights_of_another_model_are_refused(graphs: Graphs, checkpoint: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    for path in checkpoint("clip").path.iterdir():
        shutil.copy(path, tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    name = next(key for key in values if key.endswith("layers.1.mlp.fc2.weight"))
    values[name] = values[name][::-1].copy()
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(MatchError, match="not those of the graph"):
        found(graphs.export("clip"), graphs.adapter("clip"), read_model(tmp_path))
    found(graphs.export("clip"), graphs.adapter("clip", targets=("fc1",)), read_model(tmp_path))


def test_values_in_another_dtype(graphs: Graphs, checkpoint: Any) -> None:
    """A float16 graph of a float32 checkpoint: the checkpoint is rounded first."""
    graph = read_graph(graphs.variant("clip", "half"))
    proto = onnx.load(graph.path)
    for node in proto.graph.node:
        node.name = ""
    anonymous = graph.path.with_name("clip-anonymous.onnx")
    onnx.save(proto, anonymous)
    _, sites = found(anonymous, graphs.adapter("clip"), checkpoint("clip"))
    assert "values" in {site.resolver for site in sites}
    assert {site.weight.tensor.dtype for site in sites} == {"F16"}


# ---------------------------------------------------------------- what is refused, and shapes of graphs


def graph_of(path: Path, nodes: list[Any], weights: dict[str, np.ndarray], width: int = 3) -> Path:
    """A graph of x [?,width] -> y."""
    given = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, width])
    made = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [given], [made], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def ones(*shape: int) -> np.ndarray:
    return np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("op", "attributes", "shape", "layout"),
    [
        ("MatMul", {}, (3, 4), "transposed"),
        ("Gemm", {}, (3, 4), "transposed"),
        ("Gemm", {"transB": 1}, (4, 3), "plain"),
    ],
)
def test_the_operator_decides_the_layout(
    tmp_path: Path, op: str, attributes: dict[str, int], shape: tuple[int, int], layout: str
) -> None:
    nodes = [helper.make_node(op, ["x", "w"], ["y"], "/fc/MatMul", **attributes)]
    _, sites = found(graph_of(tmp_path / "g.onnx", nodes, {"w": ones(*shape)}), low(fc=(4, 3)))
    assert sites[0].operands[0].layout == layout


def test_a_transpose_turns_the_layout(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], "/fc/MatMul"),
    ]
    _, sites = found(graph_of(tmp_path / "g.onnx", nodes, {"w": ones(4, 3)}), low(fc=(4, 3)))
    assert sites[0].operands[0].layout == "plain"


@pytest.mark.parametrize(
    ("node", "shape", "why"),
    [
        (helper.make_node("MatMul", ["w", "x"], ["y"], "/fc/MatMul"), (4, 3), "first factor"),
        (helper.make_node("Gemm", ["x", "w"], ["y"], "/fc/Gemm", transA=1), (3, 4), "its product is transposed"),
        (helper.make_node("MatMul", ["x", "w"], ["y"], "/fc/MatMul"), (2, 3, 4), "3 axes"),
        (helper.make_node("Gather", ["w", "x"], ["y"], "/fc/Gather", axis=1), (4, 3), "another axis"),
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"], "/fc/C"), (4, 3, 1), "transposed convolutions"),
    ],
)
def test_weights_that_cannot_be_changed_are_named(tmp_path: Path, node: Any, shape: tuple[int, ...], why: str) -> None:
    graph = read_graph(graph_of(tmp_path / "g.onnx", [node], {"w": ones(*shape)}))
    layer = "embedding" if node.op_type == "Gather" else "plain"
    update = LowRank(normal(2, 3), normal(4, 2), layer=layer)
    with pytest.raises(MatchError, match=why):
        resolve(graph, Adapter({"fc": update}, {}, Metadata("peft")))


def test_another_shape_is_refused(graphs: Graphs) -> None:
    with pytest.raises(MatchError, match=r"\[16, 15\].*\[16, 16\]"):
        resolve(read_graph(graphs.export("llama")), low(model__layers__0__self_attn__q_proj=(16, 15)))


def test_a_module_of_several_different_weights_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "/fc/MatMul"),
        helper.make_node("MatMul", ["h", "b"], ["y"], "/fc/MatMul_1"),
    ]
    graph = graph_of(tmp_path / "g.onnx", nodes, {"a": ones(3, 3), "b": 2 * ones(3, 3)})
    with pytest.raises(MatchError, match="several weights"):
        resolve(read_graph(graph), low(fc=(3, 3)))
    graph = graph_of(tmp_path / "h.onnx", nodes, {"a": ones(3, 3), "b": ones(3, 3)})  # one module called twice
    _, sites = found(graph, low(fc=(3, 3)))
    assert sorted(site.weight.value.name for site in sites) == ["a", "b"]


def test_a_weight_taken_in_two_layouts_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "/fc/MatMul"),
        helper.make_node("Gemm", ["h", "w"], ["y"], "/fc/Gemm", transB=1),
    ]
    with pytest.raises(MatchError, match="in different ways"):
        resolve(read_graph(graph_of(tmp_path / "g.onnx", nodes, {"w": ones(3, 3)})), low(fc=(3, 3)))


def test_two_targets_of_one_weight_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "/model/fc/MatMul")]
    graph = read_graph(graph_of(tmp_path / "g.onnx", nodes, {"w": ones(3, 4)}))
    with pytest.raises(MatchError, match="two modules of the adapter mean one weight"):
        resolve(graph, low(fc=(4, 3), model__fc=(4, 3)))


# ---------------------------------------------------------------- vectors and whole tensors


def test_biases_norms_and_whole_weights_are_found(graphs: Graphs) -> None:
    carried = {
        "encoder.layers.0.self_attn.k_proj.bias": normal(16),
        "encoder.layers.0.layer_norm1.weight": normal(16),
        "encoder.layers.1.mlp.fc1.weight": normal(24, 16),
    }
    for exporter in ("torchscript", "dynamo"):
        _, sites = found(graphs.export("clip", exporter), Adapter({}, carried, Metadata("peft")))
        known = parameters("clip")
        for site, name in zip(sites, carried, strict=True):
            np.testing.assert_array_equal(held(site), known[name], err_msg=name)


def test_a_shared_gain_is_changed_for_its_own_module_only(tmp_path: Path) -> None:
    """Fresh norms are all ones: exporters keep one vector."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "one.weight"], ["h"], "/one/LayerNormalization"),
        helper.make_node("LayerNormalization", ["h", "one.weight"], ["y"], "/two/LayerNormalization"),
    ]
    graph = graph_of(tmp_path / "g.onnx", nodes, {"one.weight": ones(3)})
    _, sites = found(graph, Adapter({}, {"one.weight": normal(3)}, Metadata("peft")))
    assert [use.node.proto.name for use in sites[0].uses] == ["/one/LayerNormalization"]
    _, unmatched = resolve(read_graph(graph), Adapter({}, {"two.weight": normal(3)}, Metadata("peft")))
    assert [u.name for u in unmatched] == ["two.weight"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_rescaling_needs_no_bias_but_where_there_is_one(tmp_path: Path, bias: bool) -> None:
    """(IA)3 of outputs scales a bias along: one that is there and not found must not be passed over."""
    scale = IA3(normal(4, seed=3))
    adapter = Adapter({"q_proj": scale, "q_proj.bias": scale}, {}, Metadata("peft"))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "/qkv_proj/MatMul")]
    nodes += [helper.make_node("Add", ["h", "b"], ["y"])] if bias else []
    graph = graph_of(tmp_path / "g.onnx", nodes, {"w": ones(3, 12)} | ({"b": ones(12)} if bias else {}))
    update = scale.sized((4, 3))
    assert update is not None
    _, unmatched = resolve(read_graph(graph), replace(adapter, updates={**adapter.updates, "q_proj": update}))
    assert [u.name for u in unmatched] == (["q_proj.bias"] if bias else [])


def test_a_shared_vector_is_changed_for_its_own_module_only(tmp_path: Path) -> None:
    """Exporters keep one initializer for equal vectors: fresh biases are all zero."""
    nodes = [
        helper.make_node("Gemm", ["x", "a", "one.bias"], ["h"], "/one/Gemm"),
        helper.make_node("Gemm", ["h", "b", "one.bias"], ["y"], "/two/Gemm"),
    ]
    weights = {"a": ones(3, 3), "b": 2 * ones(3, 3), "one.bias": ones(3)}
    graph = graph_of(tmp_path / "g.onnx", nodes, weights)
    for module in ("one", "two"):
        _, sites = found(graph, Adapter({}, {f"{module}.bias": normal(3)}, Metadata("peft")))
        assert [use.node.proto.name for use in sites[0].uses] == [f"/{module}/Gemm"]


def test_the_adapters_copy_of_a_base_weight_is_no_change(graphs: Graphs) -> None:
    value = parameters("clip")["encoder.layers.0.mlp.fc1.weight"]
    update = low(encoder__layers__0__mlp__fc1=(24, 16)).updates
    for copy, same in ((value, True), (value + 1, False)):
        adapter = Adapter(update, {"encoder.layers.0.mlp.fc1.weight": Tensor.of(copy)}, Metadata("peft"))
        if same:
            assert len(found(graphs.export("clip"), adapter)[1]) == 1
        else:
            with pytest.raises(MatchError, match="another base weight"):
                found(graphs.export("clip"), adapter)
