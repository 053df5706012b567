"""`loratool extract` beside a thin SVD by torch of the same differences.

A few layers of a Llama of 1B shapes, bfloat16, TUNED a low rank and noise away from BASE. Whole processes in turn,
medians; the worst excess is ||D - D_r|| / optimum - 1 of one module of each shape, the optimum from the thin SVD.

    python -m benchmarks.extract [--layers 2] [--rank 16] [--runs 3] [--folder /dev/shm] [--device cpu]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import loratool
from benchmarks import synthetic
from benchmarks.merge import Figures, run
from loratool.tensors import Tensor, read_safetensors, write_safetensors

THIN = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
base, tuned, out, rank = sys.argv[1:]
rank, made = int(rank), {}
for path in sorted(Path(base).glob("*.safetensors")):
    one, other = load_file(path), load_file(Path(tuned, path.name))
    for name, weight in one.items():
        if weight.ndim == 2:
            up, values, down = torch.linalg.svd(other[name].float() - weight.float(), full_matrices=False)
            root = values[:rank].sqrt()
            made[f"{name}.up"] = (up[:, :rank] * root).to(weight.dtype).contiguous()
            made[f"{name}.down"] = (down[:rank] * root[:, None]).to(weight.dtype).contiguous()
            print(name, (values[rank:].double().square().sum() / values.double().square().sum()).sqrt().item())
save_file(made, out)
"""


def write_pair(work: Path, layers: int) -> tuple[Path, Path]:
    """BASE, and TUNED: a difference of rank 24, descending, and noise of a tenth of it."""
    base, tuned = work / "base", work / "tuned"
    synthetic.write_base(base, replace(synthetic.LLAMA_1B, layers=layers, vocab=2048), shards=2)
    shutil.copytree(base, tuned, ignore=shutil.ignore_patterns("*.safetensors"))
    rng = np.random.default_rng(0)
    for path in sorted(base.glob("*.safetensors")):
        file = read_safetensors(path)
        moved = {n: _moved(t, rng) if len(t.shape) == 2 else t for n, t in file.tensors.items()}
        write_safetensors(tuned / path.name, moved, file.metadata)
    return base, tuned


def _moved(tensor: Tensor, rng: np.random.Generator) -> Tensor:
    out, inner = tensor.shape
    up = rng.standard_normal((out, 24), np.float32) * np.arange(1, 25, dtype=np.float32) ** -0.5
    delta = 1e-3 * (up @ rng.standard_normal((24, inner), np.float32) + 0.3 * rng.standard_normal(tensor.shape))
    return Tensor.of(tensor.float() + delta.astype(np.float32), tensor.dtype)


def excess(base: Path, tuned: Path, out: Path, rank: int) -> float:
    """The worst excess over the optimum, of one module of each shape, stored in float32."""
    files = zip(sorted(base.glob("*.safetensors")), sorted(tuned.glob("*.safetensors")), strict=True)
    pairs = [(read_safetensors(one).tensors, read_safetensors(other).tensors) for one, other in files]
    updates, seen, worst = loratool.read(out).updates, set(), 0.0
    for one, other in pairs:
        for name, tensor in one.items():
            if len(tensor.shape) == 2 and tensor.shape not in seen and name.removesuffix(".weight") in updates:
                seen.add(tensor.shape)
                change = other[name].float() - tensor.float()
                values = np.linalg.svd(change, compute_uv=False).astype(np.float64)
                miss = np.linalg.norm(change - updates[name.removesuffix(".weight")].delta())  # type: ignore[attr-defined]
                worst = max(worst, float(miss / np.sqrt((values[rank:] ** 2).sum())) - 1)
    return worst


def main() -> None:
    """Time both in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm" if Path("/dev/shm").is_dir() else "."))
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="loratool-bench-", dir=options.folder))
    try:
        compare(work, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def compare(work: Path, options: argparse.Namespace) -> None:
    """Time the commands, then measure the accuracy in float32."""
    base, tuned = write_pair(work, options.layers)
    out, rank = work / "lora", str(options.rank)
    extract = [sys.executable, "-m", "loratool", "extract", str(base), str(tuned), "-o", str(out), "--overwrite"]
    extract += ["--rank", rank, "--device", options.device, "-q"]
    thin = [sys.executable, "-c", THIN, str(base), str(tuned), str(work / "thin.safetensors"), rank]
    commands = {"loratool extract": extract, "torch.linalg.svd": thin}
    figures = {name: Figures() for name in commands}
    for _ in range(options.runs):
        for name, command in commands.items():
            run(command, figures[name])
    print(f"{options.layers} layers of 1B shapes, bf16, rank {rank}, {options.runs} runs, median (least to most):")
    for name, found in figures.items():
        middle, peak = statistics.median(found.seconds), statistics.median(found.peaks) / 2**20
        print(f"{name:18} {middle:7.2f} s ({min(found.seconds):.2f} to {max(found.seconds):.2f}) {peak:8.0f} MiB")
    ours, theirs = (statistics.median(figures[name].seconds) for name in commands)
    run([*extract, "--dtype", "fp32"], None)
    print(f"{theirs / ours:.1f} times as fast; worst excess {excess(base, tuned, out, options.rank):.1e}")


if __name__ == "__main__":
    main()
