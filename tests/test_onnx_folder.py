"""Graphs from model folders: merged, exported by torch, and equal to PEFT."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import loratool
from loratool.errors import FormatError, LoratoolError, LossError, MatchError, UsageError, VerifyError
from loratool.onnx import folder as exporter
from loratool.onnx.container import read_container
from loratool.onnx.graph import read_graph
from loratool.onnx.inputs import check_adapter
from tests.onnx_models import Graphs, active, feed, forward, make, quiet, run, session
from tests.test_onnx_branch import assert_close

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model folders by name."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("folders") / name
            with quiet():
                make(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture
def torchscript(monkeypatch: pytest.MonkeyPatch) -> None:
    """The older exporter alone: it is ten times as fast."""
    monkeypatch.setattr(exporter, "EXPORTERS", ("torchscript",))


def inputs(path: Path, name: str) -> dict[str, np.ndarray]:
    """What the graph asks for, of other sizes than it was traced with."""
    wanted = [entry.name for entry in session(path).get_inputs()]
    known = feed(name) | {"attention_mask": np.ones((2, 7), np.int64)}
    return {key: known[key] for key in wanted}


def test_the_dynamo_exporter(graphs: Graphs, folders: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapter, out = graphs.adapter("clip"), tmp_path / "out.onnx"
    report = loratool.export_onnx(folders("clip"), adapter, out=out, verify=False)
    assert report.mode == "fold" and report.modules == 9 == len(report.resolved)
    assert {entry["resolver"] for entry in report.resolved.values()} == {"scopes"}
    assert_close(run(out, inputs(out, "clip")), graphs.reference("clip", adapter))
    proto = onnx.load(out)
    sizes = [dim.dim_param for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", "sequence"] and proto.graph.output[0].name == "last_hidden_state"
    assert str(Path.cwd()) not in out.read_bytes().decode("latin-1")  # onnx.md trap 37
    assert "stack_trace" not in out.read_bytes().decode("latin-1")
    said = {entry.key: entry.value for entry in proto.metadata_props}
    assert {"base/config.json", "base/model.safetensors"} < set(json.loads(said["loratool.inputs"]))
    assert {path.name for path in tmp_path.iterdir()} == {"out.onnx", "out.onnx.data"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("torchscript")
@pytest.mark.parametrize(("name", "verify"), [("llama", True), ("gpt2", False), ("bert", False), ("t5", False)])
def test_merged_folders_equal_peft(graphs: Graphs, folders: Any, tmp_path: Path, name: str, verify: bool) -> None:
    adapter, out = graphs.adapter(name), tmp_path / "out.onnx"
    report = loratool.export_onnx(folders(name), adapter, out=out, strengths=[0.5], verify=verify)
    assert report.verified == verify and report.strengths == (0.5,)
    assert not verify or (report.max_effect is not None and report.max_effect > 0.1)
    assert_close(run(out, inputs(out, name)), graphs.reference(name, adapter, strength=0.5), by=5e-5)


@pytest.mark.usefixtures("torchscript")
def test_tied_ends_go_their_own_ways(graphs: Graphs, folders: Any, tmp_path: Path) -> None:  # onnx.md trap 5
    """As PEFT's unmerged model, and not as its merged one."""
    from peft import PeftModel

    adapter, out = graphs.adapter("llama_tied"), tmp_path / "out.onnx"
    assert loratool.export_onnx(folders("llama_tied"), adapter, out=out).verified
    found = run(out, inputs(out, "llama_tied"))
    assert_close(found, graphs.reference("llama_tied", adapter), by=5e-5)
    merged = PeftModel.from_pretrained(make("llama_tied"), adapter).merge_and_unload()
    assert np.abs(found[0] - forward(merged.eval(), feed("llama_tied"))[0]).max() > 0.1


@pytest.mark.usefixtures("torchscript")
def test_a_component_of_a_pipeline(folders: Any, graphs: Graphs, tmp_path: Path) -> None:
    adapter, out = graphs.adapter("unet", ("to_q", "to_v", "conv1")), tmp_path / "out.onnx"
    assert loratool.export_onnx(folders("unet"), adapter, out=out, verify=False).modules > 5
    values = feed("unet") | {"timestep": np.array([5])}
    assert_close(run(out, values), graphs.reference("unet", adapter), by=1e-4)
    assert [d.dim_param for d in onnx.load(out).graph.input[0].type.tensor_type.shape.dim if d.dim_param] == [
        "batch",
        "height",
        "width",
    ]


@pytest.mark.usefixtures("torchscript")
@pytest.mark.parametrize("mode", ["branch", "inputs"])
def test_other_modes_begin_with_the_base(graphs: Graphs, folders: Any, tmp_path: Path, mode: str) -> None:
    adapter, out = graphs.adapter("clip"), tmp_path / "out.onnx"
    report = loratool.export_onnx(folders("clip"), adapter, out=out, mode=mode)
    assert report.verified and report.mode == mode
    files = [Path(path) for path in report.adapters]
    for file in files:
        check_adapter(read_graph(out), read_container(file))
    found = session(out).run(None, inputs(out, "clip"), active(*files))
    assert_close(found, graphs.reference("clip", adapter))
    with pytest.raises(LossError if mode == "inputs" else AssertionError):
        loratool.export_onnx(
            folders("clip"), graphs.adapter("clip", use_dora=True), out=tmp_path / "dora.onnx", mode=mode
        )
        raise AssertionError


@pytest.mark.usefixtures("torchscript")
def test_a_wrong_graph_is_not_let_out(
    graphs: Graphs, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof takes another way than the output: an export of the unmerged folder is found out."""
    from loratool.ops import export_folder

    good, base = export_folder.export_folder, folders("clip")
    monkeypatch.setattr(export_folder, "export_folder", lambda folder, out: good(base, out))
    with pytest.raises(VerifyError, match="lost"):
        loratool.export_onnx(base, graphs.adapter("clip"), out=tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("torchscript")
def test_without_a_proof_one_graph_is_enough(
    graphs: Graphs, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool.ops import export_folder

    seen: list[str] = []
    good = export_folder.export_folder
    monkeypatch.setattr(
        export_folder, "export_folder", lambda folder, out: seen.append(folder.name) or good(folder, out)
    )
    report = loratool.export_onnx(folders("clip"), graphs.adapter("clip"), out=tmp_path / "out.onnx", verify=False)
    assert seen == ["merged"] and not report.verified and report.max_effect is None
    assert_close(
        run(tmp_path / "out.onnx", inputs(tmp_path / "out.onnx", "clip")),
        graphs.reference("clip", graphs.adapter("clip")),
    )


@pytest.mark.usefixtures("torchscript")
def test_a_base_that_only_a_merge_reads_is_exported_unproven(graphs: Graphs, folders: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    base = tmp_path / "base"
    shutil.copytree(folders("clip"), base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    reading, adapter, out = loratool.Reading(allow_pickle=True), graphs.adapter("clip"), tmp_path / "out.onnx"
    report = loratool.export_onnx(base, adapter, out=out, reading=reading)
    assert not report.verified and any("not verified" in warning for warning in report.warnings)
    assert_close(run(out, inputs(out, "clip")), graphs.reference("clip", adapter))
    with pytest.raises(LoratoolError, match="cannot be proven"):
        loratool.export_onnx(base, adapter, out=tmp_path / "again.onnx", reading=reading, verify=True)


def test_base_weights_are_for_graphs(graphs: Graphs, folders: Any, tmp_path: Path) -> None:
    base = folders("clip")
    with pytest.raises(UsageError, match="base weights"):
        loratool.export_onnx(base, graphs.adapter("clip"), out=tmp_path / "out.onnx", base_weights=base)


# -- what is refused -----------------------------------------------------------------------------------------


def folder_with(path: Path, config: dict[str, Any] | None, **more: str) -> Path:
    from tests.samples import model, normal

    made = model(path, {"a.weight": normal(4, 4)})
    (made / "config.json").unlink()
    if config is not None:
        (made / "config.json").write_text(json.dumps(config))
    for name, text in more.items():
        (made / f"{name}.json").write_text(text)
    return made


def an_adapter(path: Path) -> Path:
    from tests.samples import lora_file, low

    return lora_file(path, {"a": low(4, 4)})


REFUSED: dict[str, tuple[dict[str, Any] | None, dict[str, str], str]] = {
    "no configuration": (None, {}, "config.json"),
    "an unknown model": ({"architectures": ["NoSuchModel"]}, {}, "NoSuchModel"),
    "no model at all": ({"architectures": ["__import__"]}, {}, "__import__"),
    "another thing of the library": ({"architectures": ["Trainer"]}, {}, "Trainer"),
    "weights that are missing": ({"architectures": ["BertModel"], "model_type": "bert"}, {}, "lacks"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_folders_that_are_refused(tmp_path: Path, what: str) -> None:
    config, more, said = REFUSED[what]
    base = folder_with(tmp_path / "base", config, **more)
    with pytest.raises(FormatError, match=said):
        loratool.export_onnx(base, an_adapter(tmp_path / "lora.safetensors"), out=tmp_path / "out.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "lora.safetensors"}


def test_a_pipeline_is_several_models(fixtures: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="pipeline") as error:
        exporter.check_folder(fixtures / "tiny-sd")
    assert "component" in error.value.hint


def test_missing_packages_are_named(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = folders("clip")
    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(LoratoolError, match="onnxscript") as error:
        exporter.check_folder(base)
    assert error.value.exit_code == 1 and "pip install 'loratool[export]'" in error.value.hint
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(LoratoolError, match="onnxscript"):
        exporter.export_folder(base, tmp_path / "out.onnx")


def test_modules_without_a_target_are_refused_before_anything_is_loaded(
    graphs: Graphs, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "load", lambda folder: pytest.fail("loaded"))
    with pytest.raises(MatchError):
        loratool.export_onnx(folders("clip"), an_adapter(tmp_path / "lora.safetensors"), out=tmp_path / "out.onnx")
    with pytest.raises(LoratoolError, match="exists"):
        loratool.export_onnx(folders("clip"), graphs.adapter("clip"), out=tmp_path / "lora.safetensors")


def test_an_exporter_that_fails_is_followed_by_the_other(
    graphs: Graphs, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    good = torch.onnx.export

    def export(*given: Any, **options: Any) -> Any:
        if options["dynamo"]:
            raise RuntimeError("no")
        return good(*given, **options)

    monkeypatch.setattr(torch.onnx, "export", export)
    report = loratool.export_onnx(folders("clip"), graphs.adapter("clip"), out=tmp_path / "out.onnx")
    assert report.verified and {entry["resolver"] for entry in report.resolved.values()} == {"path"}


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """No temporary folder stays, whatever happened."""
    yield
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
