"""`python -m benchmarks.resize`: another rank for whole adapters, beside what others do.

loratool as whole processes in turn with ``cp`` of the file (medians; wall, CPU and peak memory by ``os.wait4``), on a
Llama of 1B (112 modules) and on the UNet of SDXL (722 modules). Beside it what peers do in the same machine's time: the
dense ``torch.linalg.svd`` that kohya's resize takes of every product, measured on one module of each shape and
multiplied, and PEFT's ``add_weighted_adapter(combination_type="svd")`` on one layer of the Llama. Run it on a quiet
machine, on tmpfs.

    python -m benchmarks.resize [--rank 64] [--new 16] [--runs 3] [--folder /dev/shm] [--no-dense] [--no-peft]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.merge import Figures, run
from loratool.tensors import Tensor, read_safetensors, write_safetensors

SETUP = """
import sys
from pathlib import Path
from benchmarks import resize, synthetic
work, rank = Path(sys.argv[1]), int(sys.argv[2])
synthetic.write_adapter(work / "llama", synthetic.LLAMA_1B, rank, "BF16")
resize.write_unet(work / "sdxl.safetensors", rank)
"""
PEFT = """
import sys, time, torch
from peft import LoraConfig, get_peft_model
from benchmarks.synthetic import LLAMA_1B
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (out, inner) in LLAMA_1B.projections().items():
            setattr(self, name.replace(".", "_"), torch.nn.Linear(inner, out, bias=False))
config = lambda: LoraConfig(r=int(sys.argv[1]), target_modules="all-linear", init_lora_weights=False)
model = get_peft_model(Layer(), config())
model.add_adapter("other", config())
began = time.perf_counter()
model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", "svd", svd_rank=int(sys.argv[2]))
print(time.perf_counter() - began)
"""


def write_unet(path: Path, rank: int) -> None:
    """A kohya file of the modules of SDXL's UNet that are usually trained: 722 linear layers and 1x1 convolutions."""
    from loratool.architectures import architecture
    from tests.diffusion import layers

    known = architecture("sdxl")
    assert known is not None
    rng = np.random.default_rng(0)
    tensors: dict[str, Tensor] = {}
    for name, (out, inner, *kernel) in layers("sdxl").items():
        if name.startswith("unet."):
            module = known.kohya().forward[name]
            down = rng.standard_normal((rank, inner, *kernel), dtype=np.float32) * 0.02
            up = rng.standard_normal((out, rank, *kernel), dtype=np.float32) * 0.02
            tensors[f"{module}.lora_down.weight"] = Tensor.of(down, "F16")
            tensors[f"{module}.lora_up.weight"] = Tensor.of(up, "F16")
            tensors[f"{module}.alpha"] = Tensor.of(np.float32(rank / 2))
    write_safetensors(path, tensors, {"ss_network_module": "networks.lora"})


def dense_seconds(path: Path) -> tuple[float, int]:
    """What ``torch.linalg.svd`` of every product takes, from one module of each shape; and the modules."""
    import torch

    shapes: Counter[tuple[int, int]] = Counter()
    tensors = read_safetensors(path).tensors
    for name, up in tensors.items():
        for one, other in ((".lora_B.weight", ".lora_A.weight"), (".lora_up.weight", ".lora_down.weight")):
            if name.endswith(one):
                shapes[(up.shape[0], tensors[name.replace(one, other)].shape[1])] += 1
    total = 0.0
    for shape, count in shapes.items():
        product = torch.randn(shape[0], 64) @ torch.randn(64, shape[1])
        began = time.perf_counter()
        torch.linalg.svd(product, full_matrices=False)
        total += count * (time.perf_counter() - began)
    return total, sum(shapes.values())


def main() -> None:
    """Print the figures of both adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm" if Path("/dev/shm").is_dir() else "."))
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--no-peft", action="store_true")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="loratool-bench-", dir=options.folder))
    try:
        run([sys.executable, "-c", SETUP, str(work), str(options.rank)], None)  # children inherit their parent's peak
        compare("Llama 1B, bf16", work / "llama", work / "llama" / "adapter_model.safetensors", options)
        compare("SDXL UNet, fp16", work / "sdxl.safetensors", work / "sdxl.safetensors", options)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not options.no_peft:
        import subprocess

        command = [sys.executable, "-c", PEFT, str(options.rank), str(options.new)]
        seconds = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"PEFT add_weighted_adapter(svd) of two adapters, one layer of the Llama: {seconds:.1f} s")


def compare(title: str, source: Path, weights: Path, options: argparse.Namespace) -> None:
    """Time the commands in turn, one warm-up round first."""
    out = source.parent / "out"
    resize = [sys.executable, "-m", "loratool", "resize", str(source), "-o", str(out), "-q"]
    commands = {
        "cp": ["cp", str(weights), str(out)],
        f"--rank {options.new}": [*resize, "--rank", str(options.new)],
        "--energy 0.9": [*resize, "--energy", "0.9"],
        "--max-size (half)": [*resize, "--max-size", str(weights.stat().st_size // 2)],
        "add A A --rank": [
            *(sys.executable, "-m", "loratool", "add", str(source), str(source), "-o", str(out), "-q"),
            *("--rank", str(options.new)),
        ],
    }
    figures = {name: Figures() for name in commands}
    for turn in range(options.runs + 1):
        for name, command in commands.items():
            run(command, figures[name] if turn else None)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    print(f"{title}, rank {options.rank} to {options.new}, {weights.stat().st_size / 1e6:.0f} MB, {options.runs} runs:")
    for name, found in figures.items():
        print(found.row(name, sorted(figures["cp"].seconds)[len(figures["cp"].seconds) // 2]))
    if not options.no_dense:
        seconds, count = dense_seconds(weights)
        print(f"{'torch.linalg.svd, dense':24} {seconds:7.0f} s (one of each shape, times {count} modules)")


if __name__ == "__main__":
    main()
