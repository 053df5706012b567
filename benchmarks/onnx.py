"""A fold into a 1 GiB ONNX graph beside ``cp``, onnx.load + onnx.save, and a fold by hand between these two.

Whole processes, one after the other in turn, medians; peak memory is that of each process. Run it on a quiet machine,
on tmpfs.

    python -m benchmarks.onnx [--layers 16] [--size 4096] [--rank 16] [--runs 5] [--folder /dev/shm] [--no-onnx]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.timing import in_turn, options, run, show, workplace

SETUP = """
import sys
from pathlib import Path
from benchmarks.onnx import write
write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
"""
COPY = """
import sys, onnx
base, adapter, out = sys.argv[1:]
onnx.save(onnx.load(base), out, save_as_external_data=True, location="copy.data")
"""
BY_HAND = """
import sys, numpy as np, onnx
from onnx import numpy_helper
from safetensors.numpy import load_file
base, adapter, out = sys.argv[1:]
model, factors = onnx.load(base), load_file(adapter)
for tensor in model.graph.initializer:
    a, b = (factors[f"{tensor.name.removesuffix('.weight')}.lora_{half}.weight"] for half in "AB")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + (b @ a).T, tensor.name))
onnx.save(model, out, save_as_external_data=True, location="hand.data")
"""


def write(folder: Path, layers: int, size: int, rank: int) -> None:
    """A chain of MatMuls with external data, and a LoRA of all of them; a row of one weight at a time in memory."""
    import numpy as np
    import onnx
    from onnx import helper

    from loratool.tensors import Tensor, write_safetensors

    folder.mkdir()
    random = np.random.default_rng(0)
    nodes, weights, factors = [], [], {}
    with open(folder / "base.data", "wb") as data:
        for n in range(layers):
            name = f"layers.{n}.proj"
            nodes.append(
                helper.make_node("MatMul", [f"x{n}", f"{name}.weight"], [f"x{n + 1}"], f"/layers.{n}/proj/MatMul")
            )
            weight = onnx.TensorProto(name=f"{name}.weight", data_type=1, data_location=1, dims=[size, size])
            entries = {"location": "base.data", "offset": data.tell(), "length": 4 * size * size}
            for key, value in entries.items():
                weight.external_data.add(key=key, value=str(value))
            weights.append(weight)
            block = (random.standard_normal((64, size), np.float32) * size**-0.5).tobytes()
            for _ in range(size // 64):
                data.write(block)
            down = random.standard_normal((rank, size), np.float32) * size**-0.5
            factors[f"{name}.lora_A.weight"] = Tensor.of(down)
            factors[f"{name}.lora_B.weight"] = Tensor.of(0.1 * random.standard_normal((size, rank), np.float32))
    x, y = (helper.make_tensor_value_info(name, 1, ["n", size]) for name in ("x0", f"x{layers}"))
    graph = helper.make_graph(nodes, "chain", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    (folder / "base.onnx").write_bytes(model.SerializeToString())
    write_safetensors(folder / "lora.safetensors", factors, {"format": "pt"})


def main() -> None:
    """Run every command in turn and print the medians."""
    parser = options(__doc__, 5)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--no-onnx", action="store_true", help="leave out onnx.load and onnx.save (twice the graph)")
    given = parser.parse_args()
    with workplace(given.folder) as work:
        compare(work, given)


def compare(work: Path, given: argparse.Namespace) -> None:
    """Time the commands in turn, one warm-up round first."""
    folder, out = work / "given", work / "out"
    run([sys.executable, "-c", SETUP, str(folder), *map(str, (given.layers, given.size, given.rank))])
    files = [str(folder / "base.onnx"), str(folder / "lora.safetensors")]
    fold = [sys.executable, "-m", "loratool", "export-onnx", *files, "-o", str(out / "out.onnx"), "-q"]
    commands = {
        "cp": ["cp", str(folder / "base.data"), str(out / "copy")],
        "loratool fold": [*fold, "--no-verify"],
        "loratool fold, proven": [*fold, "--verify"],
    }
    if not given.no_onnx:
        commands["onnx.load, onnx.save"] = [sys.executable, "-c", COPY, *files, str(out / "out.onnx")]
        commands["the same, added between"] = [sys.executable, "-c", BY_HAND, *files, str(out / "out.onnx")]
    figures = in_turn(commands, given.runs, out, prepare=out.mkdir)
    size = given.layers * given.size**2 * 4 / 2**30
    show(f"{size:.2f} GiB, {given.layers} products, rank {given.rank}, {given.runs} runs", figures, "cp")


if __name__ == "__main__":
    main()
