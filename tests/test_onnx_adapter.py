"""The format `onnx-adapter`: there and back, and as onnxruntime takes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.errors import FormatError, LossError
from loratool.onnx.container import Container, read_container, write_container
from loratool.tensors import Tensor
from loratool.update import Dense
from tests import samples
from tests.onnx_models import Graphs, active, feed, session
from tests.samples import UPDATES, low, normal
from tests.test_onnx_branch import assert_close

WRITTEN = [name for name in UPDATES if name.startswith(("lora", "sum")) and "three" not in name]


def adapter(**updates: object) -> Adapter:
    return Adapter({k.replace("__", "."): u for k, u in updates.items()}, {}, Metadata("sample"))  # type: ignore[misc]


@pytest.mark.parametrize("name", WRITTEN)
def test_deltas_come_back(tmp_path: Path, name: str) -> None:
    update = UPDATES[name]
    path = tmp_path / "x.onnx_adapter"
    loratool.write(adapter(block__proj=update), path, format="onnx-adapter")
    assert loratool.detect(path)[0] == "onnx-adapter"
    found = loratool.read(path).updates["block.proj"]
    wanted = update.delta()  # type: ignore[attr-defined]
    got = found.delta()  # type: ignore[attr-defined]
    turned = name == "lora_transposed"  # the graph holds torch.nn.Linear's orientation
    assert np.allclose(got.T if turned else got.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-6)


def test_keys_and_layouts(tmp_path: Path) -> None:
    held = adapter(
        a__proj=low(7, 5, 3),
        a__conv=low(7, 5, 3, 3, 3),
        a__table=low(7, 5, 3, layer="embedding"),
        a__proj__bias=Dense(normal(7), 0.5, "bias"),
    )
    loratool.write(held, tmp_path / "x", format="onnx-adapter")
    shapes = {name: tensor.shape for name, tensor in read_container(tmp_path / "x").tensors.items()}
    assert shapes == {
        "a.conv.lora_A.weight": (3, 5, 3, 3),
        "a.conv.lora_B.weight": (7, 3, 1, 1),
        "a.proj.bias.delta": (7,),
        "a.proj.lora_A.weight": (5, 3),
        "a.proj.lora_B.weight": (3, 7),
        "a.table.lora_embedding_A": (7, 3),
        "a.table.lora_embedding_B": (3, 5),
    }
    again = loratool.read(tmp_path / "x")
    loratool.write(again, tmp_path / "y", format="onnx-adapter")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert np.allclose(again.updates["a.proj.bias"].delta(), 0.5 * normal(7).array())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["dora", "dense", "sum_of_three"])
def test_other_kinds_are_losses(tmp_path: Path, name: str) -> None:
    with pytest.raises(LossError, match="proj"):
        loratool.write(adapter(proj=UPDATES[name]), tmp_path / "x", format="onnx-adapter")


@pytest.mark.peer
def test_a_converted_adapter_is_switched_on(graphs: Graphs, tmp_path: Path) -> None:
    """A graph with inputs of another adapter runs one that was converted."""
    base, one, other = graphs.export("clip"), graphs.adapter("clip"), graphs.adapter("clip", seed=1, r=5)
    report = loratool.export_onnx(base, one, out=tmp_path / "out.onnx", mode="inputs")
    converted = tmp_path / "other.onnx_adapter"
    loratool.convert(other, converted, to="onnx-adapter")
    assert sorted(read_container(converted).tensors) == sorted(read_container(Path(report.adapters[0])).tensors)
    found = session(tmp_path / "out.onnx").run(None, feed("clip"), active(converted))
    assert_close(found, graphs.reference("clip", other))
    compared = loratool.compare(one, report.adapters[0])
    assert compared.relative_difference < 1e-6


PAIR = {"a.lora_A.weight": normal(5, 3), "a.lora_B.weight": normal(3, 7)}
MALFORMED: dict[str, tuple[dict[str, Tensor], str]] = {
    "half a pair": ({"a.lora_A.weight": normal(5, 3)}, "half"),
    "another key": ({**PAIR, "a.scale": normal(1)}, "unknown"),
    "ranks that differ": ({**PAIR, "a.lora_A.weight": normal(5, 4)}, "rank"),
    "integers": ({**PAIR, "a.lora_A.weight": Tensor.of(np.ones((5, 3), np.int8))}, "floating"),
    "a matrix as a vector": ({"a.delta": normal(2, 2)}, "vector"),
    "a vector as a matrix": ({**PAIR, "a.lora_A.weight": normal(5)}, "matrix"),
    "a rank of nothing": ({"a.lora_A.weight": normal(5, 0), "a.lora_B.weight": normal(0, 7)}, "no LoRA pair"),
    "a convolution and a matrix": (
        {**PAIR, "a.lora_A.weight": normal(3, 5, 1, 1), "a.lora_B.weight": normal(2, 7)},
        "rank",
    ),
    "two of one kind": ({**PAIR, "a.lora_A.MatMul.weight": normal(5, 3)}, "two tensors"),
    "a table and a product": (
        {**PAIR, "a.lora_embedding_A": normal(5, 3), "a.lora_embedding_B": normal(3, 7)},
        "table",
    ),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_files_are_refused(tmp_path: Path, what: str) -> None:
    tensors, said = MALFORMED[what]
    write_container(tmp_path / "x.onnx_adapter", Container(tensors))
    with pytest.raises(FormatError, match=said):
        loratool.read(tmp_path / "x.onnx_adapter")


def test_a_folder_with_one_such_file(tmp_path: Path) -> None:
    write_container(tmp_path / "x.onnx_adapter", Container(PAIR))
    assert loratool.read(tmp_path).metadata.format == "onnx-adapter"
    assert samples.fingerprint(tmp_path)
