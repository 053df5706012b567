"""Adapters as optional inputs: switched on run by run in onnxruntime, and nothing where none is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import loratool
from loratool.errors import FormatError, LoratoolError, LossError, MatchError, VerifyError
from loratool.onnx import branch
from loratool.onnx.container import Container, read_container, write_container
from loratool.onnx.fold import Change, write_graph
from loratool.onnx.graph import Graph, read_graph
from loratool.onnx.inputs import adapter_file, adapter_paths, check_adapter, inputs, model_version
from loratool.onnx.resolve import resolve
from loratool.onnx.verify import Trial, verify
from loratool.tensors import Tensor
from tests import samples
from tests.onnx_models import Graphs, active, feed, make, run, session
from tests.test_onnx_branch import assert_close, branched

pytestmark = pytest.mark.peer


def changes(graph: Graph, adapters: Sequence[Path], strengths: Sequence[float] = ()) -> list[Change]:
    found = []
    for number, adapter in enumerate(adapters):
        sites, unmatched = resolve(graph, loratool.read(adapter))
        assert not unmatched, [str(one) for one in unmatched]
        found += [Change(site, (strengths or (1.0,) * len(adapters))[number], number) for site in sites]
    return found


def exported(base: Path, folder: Path, *adapters: Path, strengths: Sequence[float] = ()) -> tuple[Path, list[Path]]:
    """A graph with optional inputs, and one file for each adapter."""
    graph = read_graph(base)
    found = changes(graph, adapters, strengths)
    out = folder / "out.onnx"
    written = write_graph(inputs(graph, found), out, inputs={"base/x": base}, metadata={})
    onnx.checker.check_model(out)
    paths = adapter_paths(out, adapters)
    for number, path in enumerate(paths):
        write_container(path, adapter_file(graph, found, number, model_version(written.outcome.hashes)))
        check_adapter(read_graph(out), read_container(path))
    return out, paths


@pytest.mark.parametrize(
    ("name", "exporter"),
    [
        ("llama", "dynamo"),
        ("gpt2", "dynamo"),
        ("clip", "torchscript"),
        ("unet", "dynamo"),
        ("packed", "x"),
        ("t5", "dynamo"),
    ],
)
def test_adapters_are_switched_on_run_by_run(  # onnx.md trap 29
    graphs: Graphs, tmp_path: Path, name: str, exporter: str
) -> None:
    base = graphs.export(name, exporter)
    one = graphs.adapter(name)
    few = tuple(target for target in ("q_proj", "c_fc", "to_q", "conv1", "wo") if target in str(one_targets(one)))
    other = graphs.adapter(name, few, seed=1, r=5)
    out, (first, second) = exported(base, tmp_path, one, other)
    opened = session(out)
    plain = run(base, feed(name))
    for files, wanted, by in (
        ((), plain, 1e-6),
        ((first,), graphs.reference(name, one), 2e-5),
        ((second,), graphs.reference(name, other), 2e-5),
        ((), plain, 1e-6),
    ):
        assert_close(opened.run(None, feed(name), active(*files)), wanted, by)
    required = [entry.name for entry in opened.get_inputs()]
    assert required == [entry.name for entry in session(base).get_inputs()]
    assert {entry.name for entry in opened.get_overridable_initializers()} == set(read_container(first).tensors)


def one_targets(adapter: Path) -> set[str]:
    return set(loratool.read(adapter).updates)


def test_strength_and_patterns_are_baked_in(graphs: Graphs, tmp_path: Path) -> None:  # onnx.md trap 17
    base = graphs.export("clip")
    adapter = graphs.adapter(
        "clip", use_rslora=True, rank_pattern={"layers.0.self_attn.q_proj": 5}, alpha_pattern={"v_proj": 1}
    )
    out, (file,) = exported(base, tmp_path, adapter, strengths=[-0.5])
    wanted = graphs.reference("clip", adapter, strength=-0.5)
    assert_close(session(out).run(None, feed("clip"), active(file)), wanted)


def test_each_module_has_a_rank_of_its_own(graphs: Graphs, tmp_path: Path) -> None:  # onnx.md trap 32
    out, _ = exported(graphs.export("llama"), tmp_path, graphs.adapter("llama"))
    symbols: dict[str, set[str]] = {}
    for entry in onnx.load(out).graph.input:
        if ".lora_" in entry.name:
            module = entry.name.partition(".lora_")[0]
            symbols.setdefault(module, set()).update(
                dim.dim_param for dim in entry.type.tensor_type.shape.dim if dim.dim_param
            )
    assert len(symbols) == 10 and len(set.union(*symbols.values())) == len(symbols)
    assert all(len(found) == 1 for found in symbols.values())


def test_convolutions_idle_on_zeros_of_rank_one(graphs: Graphs, tmp_path: Path) -> None:
    """onnxruntime leaves the result of a convolution over no channels unwritten: whatever lay there comes out."""
    out, (file,) = exported(graphs.export("unet"), tmp_path, graphs.adapter("unet"))
    proto = onnx.load(out)
    defaults = {t.name: t for t in proto.graph.initializer if ".lora_" in t.name}
    assert all(0 not in tensor.dims for tensor in defaults.values())
    assert not any(onnx.numpy_helper.to_array(tensor).any() for tensor in defaults.values())
    opened, plain = session(out), run(graphs.export("unet"), feed("unet"))
    for _ in range(3):  # after a run that leaves NaN behind
        bad = {name: value * np.nan if value.dtype == np.float32 else value for name, value in feed("unet").items()}
        opened.run(None, bad, active(file))
        assert_close(opened.run(None, feed("unet")), plain, 1e-6)


def test_opset_stays_and_old_files_get_the_ir_that_has_optional_inputs(
    graphs: Graphs, tmp_path: Path
) -> None:  # onnx.md trap 24
    proto = onnx.load(graphs.export("packed"))
    base = tmp_path / "base.onnx"
    proto.ir_version = 3
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in proto.graph.initializer
    )
    onnx.save(proto, base)
    out, (file,) = exported(base, tmp_path, graphs.adapter("packed"))
    found = onnx.load(out)
    assert found.ir_version == 4 and found.opset_import == proto.opset_import
    wanted = graphs.reference("packed", graphs.adapter("packed"))
    assert_close(session(out).run(None, feed("packed"), active(file)), wanted)


def test_quantised_graphs_take_adapters(graphs: Graphs, tmp_path: Path) -> None:
    base, adapter = graphs.variant("llama", "nbits"), graphs.adapter("llama")
    out, (file,) = exported(base, tmp_path, adapter)
    wanted = run(branched(base, tmp_path / "branch.onnx", adapter), feed("llama"))
    assert_close(session(out).run(None, feed("llama"), active(file)), wanted)


def test_fused_nodes_take_adapters_onto_their_weights(graphs: Graphs, tmp_path: Path) -> None:
    """Attention and EmbedLayerNormalization: nothing can be added behind the product."""
    folder, adapter = tmp_path / "base", graphs.adapter("bert")
    make("bert").save_pretrained(folder)
    base, out = graphs.variant("bert", "fused"), tmp_path / "out.onnx"
    report = loratool.export_onnx(base, adapter, out=out, mode="inputs", base_weights=folder)
    assert report.verified
    found = session(out).run(None, feed("bert"), active(Path(report.adapters[0])))
    assert_close(found, graphs.reference("bert", adapter))
    assert_close(run(out, feed("bert")), run(base, feed("bert")), 1e-6)


def test_half_precision(graphs: Graphs, tmp_path: Path) -> None:
    base, adapter = graphs.variant("llama", "half"), graphs.adapter("llama")
    out, (file,) = exported(base, tmp_path, adapter)
    assert {tensor.dtype for tensor in read_container(file).tensors.values()} == {"F16"}
    assert_close(session(out).run(None, feed("llama"), active(file)), graphs.reference("llama", adapter), by=1e-2)


def test_learned_biases_are_inputs_too(graphs: Graphs, tmp_path: Path) -> None:
    adapter = graphs.adapter("clip", ("q_proj", "fc1"), bias="lora_only")
    out, (file,) = exported(graphs.export("clip"), tmp_path, adapter)
    assert_close(session(out).run(None, feed("clip"), active(file)), graphs.reference("clip", adapter))
    assert_close(run(out, feed("clip")), run(graphs.export("clip"), feed("clip")), 1e-6)


def test_the_proof_runs_with_the_adapter_on_and_off(graphs: Graphs, tmp_path: Path) -> None:
    base, adapter, other = graphs.export("clip"), graphs.adapter("clip"), graphs.adapter("clip", seed=1)
    reference = branched(base, tmp_path / "reference.onnx", adapter)
    out, (file, wrong) = exported(base, tmp_path, adapter, other)
    found = verify(read_graph(base), [Trial(out, reference, file)])
    assert found.verified and found.max_effect is not None and found.max_effect > 0.1
    with pytest.raises(LoratoolError) as error:
        verify(read_graph(base), [Trial(out, reference, wrong)])
    assert error.value.exit_code == 7


def test_a_default_that_does_something_is_found_out(graphs: Graphs, tmp_path: Path) -> None:
    base, adapter = graphs.export("clip"), graphs.adapter("clip")
    reference = branched(base, tmp_path / "reference.onnx", adapter)
    out, (file,) = exported(base, tmp_path, adapter)
    proto = onnx.load(out)
    for tensor in proto.graph.initializer:
        if ".lora_" in tensor.name:
            values = 0.5 + onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, out)
    with pytest.raises(VerifyError, match="without an adapter"):
        verify(read_graph(base), [Trial(out, reference, file)])


def test_two_at_once_do_not_add_up(graphs: Graphs, tmp_path: Path) -> None:  # onnx.md trap 30
    """The first one wins, silently: why each file is for a run of its own."""
    one, other = graphs.adapter("clip"), graphs.adapter("clip", seed=1)
    out, (first, second) = exported(graphs.export("clip"), tmp_path, one, other)
    opened = session(out)
    both = opened.run(None, feed("clip"), active(first, second))
    assert_close(both, graphs.reference("clip", one))


# -- what does not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{"use_dora": True}, {"modules_to_save": ["fc2"], "target_modules": ["q_proj"]}])
def test_what_two_factors_cannot_say_is_a_loss(graphs: Graphs, tmp_path: Path, config: dict[str, Any]) -> None:
    graph = read_graph(graphs.export("clip"))
    with pytest.raises(LossError) as error:
        inputs(graph, changes(graph, [graphs.adapter("clip", **config)]))
    assert error.value.losses and "--mode fold" in error.value.hint


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


Q_PROJ = "encoder.layers.0.self_attn.q_proj"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "an extra key": (lambda t: t.update({"extra.lora_A.weight": samples.normal(2, 3)}), "no such optional input"),
    "a missing half": (without(f"{Q_PROJ}.lora_B.weight"), "missing"),
    "another dtype": (lambda t: t.update({n: v.cast("F16") for n, v in t.items()}), "F16"),
    "another shape": (lambda t: t.update({f"{Q_PROJ}.lora_A.weight": samples.normal(15, 3)}), "does not fit"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_does_not_fit_is_told_before_onnxruntime_does(
    graphs: Graphs, tmp_path: Path, name: str
) -> None:  # onnx.md trap 29
    damage, said = DAMAGES[name]
    out, (file,) = exported(graphs.export("clip"), tmp_path, graphs.adapter("clip"))
    held = read_container(file)
    tensors = dict(held.tensors)
    damage(tensors)
    with pytest.raises((FormatError, MatchError), match=said):
        check_adapter(read_graph(out), Container(tensors, held.adapter_version, held.model_version))


def test_a_file_for_another_base_is_refused(graphs: Graphs, tmp_path: Path) -> None:  # onnx.md trap 31
    out, (file,) = exported(graphs.export("clip"), tmp_path, graphs.adapter("clip"))
    held = read_container(file)
    with pytest.raises(MatchError, match="another base"):
        check_adapter(read_graph(out), Container(held.tensors, 1, held.model_version + 1))


# -- the file ------------------------------------------------------------------------------------------------


def container() -> Container:
    tensors = {
        "b.x": samples.normal(2, 3),
        "a": samples.normal(4, dtype="F16"),
        "é": samples.normal(2, 1, dtype="BF16"),
    }
    return Container({**tensors, "none": Tensor.of(np.zeros((3, 0), np.float32))}, 3, 7)


def same(one: Container, other: Container) -> bool:
    assert (one.adapter_version, one.model_version) == (other.adapter_version, other.model_version)
    assert sorted(one.tensors) == sorted(other.tensors)
    return all(tensor.same_bytes(other.tensors[name]) for name, tensor in one.tensors.items())


def test_onnxruntime_reads_what_is_written(tmp_path: Path) -> None:
    import onnxruntime as ort

    path, held = tmp_path / "x.onnx_adapter", container()
    assert write_container(path, held) == path.stat().st_size
    found = ort.AdapterFormat.read_adapter(str(path))
    assert (found.get_adapter_version(), found.get_model_version()) == (3, 7)
    values = found.get_parameters()
    assert {name: value.shape() for name, value in values.items()} == {
        n: list(t.shape) for n, t in held.tensors.items()
    }
    assert np.array_equal(values["b.x"].numpy(), held.tensors["b.x"].array())
    assert same(read_container(path), held)


def test_what_onnxruntime_writes_is_read(tmp_path: Path) -> None:
    import onnxruntime as ort

    written, held, path = ort.AdapterFormat(), container(), tmp_path / "x.onnx_adapter"
    written.set_adapter_version(3)
    written.set_model_version(7)
    floats = {name: tensor for name, tensor in held.tensors.items() if tensor.dtype != "BF16"}
    written.set_parameters({n: ort.OrtValue.ortvalue_from_numpy(t.array()) for n, t in floats.items()})
    written.export_adapter(str(path))
    assert same(read_container(path), Container(floats, 3, 7))


def test_the_order_of_tensors_does_not_matter(tmp_path: Path) -> None:
    held = container()
    turned = Container(dict(reversed(held.tensors.items())), 3, 7)
    write_container(tmp_path / "one", held)
    write_container(tmp_path / "other", turned)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx_adapter"
    write_container(path, container())
    data = path.read_bytes()
    for size in range(0, len(data), 3):  # cut anywhere
        path.write_bytes(data[:size])
        with pytest.raises(FormatError):
            for tensor in read_container(path).tensors.values():
                tensor.array()
    random = np.random.default_rng(0)
    for _ in range(300):  # one word changed: an error of ours, or other values
        at = 4 * int(random.integers(0, len(data) // 4))
        word = int(random.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, len(data), 64])).to_bytes(4, "little")
        path.write_bytes(data[:at] + word + data[at + 4 :])
        try:
            for tensor in read_container(path).tensors.values():
                tensor.array()
        except FormatError:
            pass


# -- the whole export ----------------------------------------------------------------------------------------


def test_export_writes_one_file_for_each_adapter(graphs: Graphs, tmp_path: Path) -> None:
    base, one, other = graphs.variant("clip", "external"), graphs.adapter("clip"), graphs.adapter("clip", seed=1, r=5)
    out = tmp_path / "out.onnx"
    report = loratool.export_onnx(base, one, other, out=out, strengths=[0.5, 2.0], mode="inputs")
    assert report.verified and report.mode == "inputs" and len(report.adapters) == 2
    assert [Path(path).parent for path in report.adapters] == [tmp_path] * 2
    assert {Path(p).name for p in report.adapters} | {"out.onnx", "out.onnx.data"} == {
        p.name for p in tmp_path.iterdir()
    }
    opened = session(out)
    for file, adapter, strength in zip(report.adapters, (one, other), (0.5, 2.0), strict=True):
        check_adapter(read_graph(out), read_container(Path(file)))
        wanted = graphs.reference("clip", adapter, strength=strength)
        assert_close(opened.run(None, feed("clip"), active(Path(file))), wanted)


def test_a_file_of_an_adapter_is_not_overwritten(graphs: Graphs, tmp_path: Path) -> None:
    base, adapter = graphs.export("packed"), graphs.adapter("packed")
    (path,) = adapter_paths(tmp_path / "out.onnx", [adapter])
    path.write_text("mine")
    with pytest.raises(LoratoolError, match="exists"):
        loratool.export_onnx(base, adapter, out=tmp_path / "out.onnx", mode="inputs")
    assert path.read_text() == "mine" and not (tmp_path / "out.onnx").exists()
    assert loratool.export_onnx(base, adapter, out=tmp_path / "out.onnx", mode="inputs", overwrite=True).verified
    assert read_container(path).tensors


def test_branches_are_proven_against_matrices(graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch that is wrong is not held against itself."""
    base, adapter = graphs.export("clip"), graphs.adapter("clip")
    assert loratool.export_onnx(base, adapter, out=tmp_path / "right.onnx", mode="branch").verified
    good = branch.joined
    monkeypatch.setattr(branch, "joined", lambda pairs: tuple(1.1 * half for half in good(pairs)))
    with pytest.raises(VerifyError):
        loratool.export_onnx(base, adapter, out=tmp_path / "wrong.onnx", mode="branch")
    assert not (tmp_path / "wrong.onnx").exists()
