"""`loratool export-onnx` beside ``cp`` and beside onnx.load, numpy, onnx.save, on a graph with external data.

Layers of 4096 x 4096 in float32, 64 MiB each; 16 of them are 1 GiB, 36 are more than protobuf can hold. Whole processes
in turn, medians. Of the peak of a verified run most is the graph's own data, mapped by onnxruntime.

    python -m benchmarks.export_onnx [--layers 16] [--rank 16] [--runs 5] [--folder /dev/shm]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.timing import in_turn, options, run, show, workplace

WIDTH = 4096
SETUP = """
import sys
from pathlib import Path
from benchmarks.export_onnx import write_adapter, write_graph
write_graph(Path(sys.argv[1]), int(sys.argv[3]))
write_adapter(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
"""
WHOLE = """
import sys, onnx
from onnx import numpy_helper
from loratool import read
base, adapter, out = sys.argv[1:]
model, updates = onnx.load(base), list(read(adapter).updates.values())
for tensor, update in zip(model.graph.initializer, updates):
    value = numpy_helper.to_array(tensor) + update.delta().T
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
onnx.save(model, out, save_as_external_data=True, location="out.data")
"""


def write_graph(path: Path, layers: int) -> None:
    """A chain of products, named as TorchScript's exporter names them."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    block = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32) / WIDTH**0.5
    nodes, weights = [], []
    with open(path.with_name("base.data"), "wb") as file:
        for n in range(layers):
            place = {"location": "base.data", "offset": file.tell(), "length": block.nbytes}
            weights.append(TensorProto(name=f"onnx::MatMul_{n}", data_type=1, dims=[WIDTH, WIDTH], data_location=1))
            for key, value in place.items():
                weights[-1].external_data.add(key=key, value=str(value))
            file.write(np.roll(block, n, 0).tobytes())
            names = [f"h{n}", weights[-1].name]
            nodes.append(helper.make_node("MatMul", names, [f"h{n + 1}"], f"/layers.{n}/fc/MatMul"))
    ends = (helper.make_tensor_value_info(name, 1, ["batch", WIDTH]) for name in ("h0", f"h{layers}"))
    graph = helper.make_graph(nodes, "bench", [next(ends)], [next(ends)], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


def write_adapter(path: Path, layers: int, rank: int) -> None:
    """A LoRA of every layer."""
    import numpy as np

    import loratool
    from loratool.adapter import Adapter, Metadata
    from loratool.tensors import Tensor
    from loratool.update import LowRank, Update

    rng = np.random.default_rng(1)
    updates: dict[str, Update] = {}
    for n in range(layers):
        down, up = (Tensor.of(rng.standard_normal(s, np.float32) * 0.01) for s in ((rank, WIDTH), (WIDTH, rank)))
        updates[f"layers.{n}.fc"] = LowRank(down, up, alpha=float(rank))
    loratool.write(Adapter(updates, {}, Metadata("raw")), path, format="raw")


def main() -> None:
    """Run every command in turn and print the medians."""
    parser = options(__doc__, 5)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    given = parser.parse_args()
    with workplace(given.folder) as work:
        compare(work, given)


def compare(work: Path, given: argparse.Namespace) -> None:
    """Time the commands in turn, one warm-up round first."""
    base, adapter, out = work / "base.onnx", work / "adapter.safetensors", work / "out"
    files = [str(base), str(adapter)]
    run([sys.executable, "-c", SETUP, *files, str(given.layers), str(given.rank)])
    export = [sys.executable, "-m", "loratool", "export-onnx", *files, "-o", str(out / "out.onnx"), "-q"]
    commands = {
        "cp": ["cp", str(base), str(work / "base.data"), str(out)],
        "export-onnx --no-verify": [*export, "--no-verify"],
        "export-onnx": export,
    }
    if given.layers * WIDTH**2 * 4 < 2 << 30:
        commands["onnx.load and save"] = [sys.executable, "-c", WHOLE, *files, str(out / "out.onnx")]
    time.sleep(4)  # digests of files younger than that are not remembered
    figures = in_turn(commands, given.runs, out, prepare=out.mkdir)
    size = given.layers * WIDTH**2 * 4 / 2**30
    show(f"{size:.2f} GiB of float32, rank {given.rank}, {given.runs} runs", figures, "cp")


if __name__ == "__main__":
    main()
