"""`python -m benchmarks.extract`: the LoRA of a difference between two models, beside what others do.

Two pairs of models, TUNED a low rank and noise away from BASE: a few layers of a Llama of 1B shapes in bfloat16, and
one layer of each shape of SDXL's UNet in float16. Whole processes in turn: loratool (its factors stored as BASE is, and
in float32) and, with ``--mergekit BIN``, mergekit-extract-lora. In a process of their own, without reading and writing:
a thin ``torch.linalg.svd`` of every difference and, with ``--kohya DIR``, networks/extract_lora_from_models.py of a
checkout of kohya-ss/sd-scripts; of the Llama one module of each shape, multiplied. Run it on a quiet machine, on tmpfs.

    python -m benchmarks.extract [--layers 2] [--rank 16] [--runs 3] [--folder /dev/shm] [--device cpu]
                                 [--mergekit BIN] [--kohya DIR]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import peers, synthetic
from benchmarks.timing import divisible, in_turn, options, run, show, workplace
from loratool.tensors import Tensor, read_safetensors, write_safetensors

SETUP = """
import sys
from pathlib import Path
from benchmarks import extract
extract.write_llama(Path(sys.argv[1], "llama"), int(sys.argv[2]), int(sys.argv[3]))
extract.write_unet(Path(sys.argv[1], "sdxl"), int(sys.argv[3]))
"""


def write_llama(work: Path, layers: int, divide: int = 1) -> None:
    """BASE and TUNED of a few layers."""
    base, tuned = work / "base", work / "tuned"
    shapes = replace(synthetic.LLAMA_1B.divided(divide), layers=layers, vocab=2048)
    synthetic.write_base(base, shapes, shards=2)
    shutil.copytree(base, tuned, ignore=shutil.ignore_patterns("*.safetensors"))
    rng = np.random.default_rng(0)
    for path in sorted(base.glob("*.safetensors")):
        file = read_safetensors(path)
        moved = {n: _moved(t, rng) if n.endswith("_proj.weight") else t for n, t in file.tensors.items()}
        write_safetensors(tuned / path.name, moved, file.metadata)


def write_unet(work: Path, divide: int = 1) -> None:
    """BASE and TUNED of one layer of each shape of SDXL's UNet."""
    from tests.diffusion import layers

    work.mkdir()
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(shape for name, shape in layers("sdxl").items() if name.startswith("unet."))
    base = {f"layer{n}.weight": _normal(rng, (a // divide, b // divide)) for n, (a, b) in enumerate(shapes)}
    write_safetensors(work / "base.safetensors", base, {"format": "pt"})
    write_safetensors(work / "tuned.safetensors", {n: _moved(t, rng) for n, t in base.items()}, {"format": "pt"})


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return Tensor.of(rng.standard_normal(shape, np.float32) * 0.02, "F16")


def _moved(tensor: Tensor, rng: np.random.Generator) -> Tensor:
    """The tensor and a difference of rank 24, descending, and noise of a tenth of it."""
    out, inner = tensor.shape
    up = rng.standard_normal((out, 24), np.float32) * np.arange(1, 25, dtype=np.float32) ** -0.5
    delta = 1e-3 * (up @ rng.standard_normal((24, inner), np.float32) + 0.3 * rng.standard_normal(tensor.shape))
    return Tensor.of(tensor.float() + delta.astype(np.float32), tensor.dtype)


def pairs(base: Path, tuned: Path) -> dict[str, Mapping[str, Tensor]]:
    """The differing weights of two models by module."""
    found: dict[str, Mapping[str, Tensor]] = {}
    for path in sorted(base.glob("*.safetensors")) if base.is_dir() else [base]:
        one = read_safetensors(path).tensors
        other = read_safetensors(tuned / path.name if tuned.is_dir() else tuned).tensors
        names = (n for n in one if n.endswith("_proj.weight") or n.startswith("layer"))
        found |= {n.removesuffix(".weight"): {"base": one[n], "tuned": other[n]} for n in names}
    return found


def main() -> None:
    """Print a table for each of both pairs."""
    parser = options(__doc__, 3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mergekit", type=Path, help="the program mergekit-extract-lora")
    parser.add_argument("--kohya", type=Path, help="a checkout of kohya-ss/sd-scripts")
    divisible(parser)
    given = parser.parse_args()
    with workplace(given.folder) as work:
        run([sys.executable, "-c", SETUP, str(work), str(given.layers), str(given.divide)])
        llama, sdxl = work / "llama", work / "sdxl"
        title = f"{given.layers} layers of Llama 1B, bf16, rank {given.rank}"
        mergekit = [str(given.mergekit), "--base-model", str(llama / "base"), "--model", str(llama / "tuned")]
        mergekit += ["--out-path", str(work / "out"), "--max-rank", str(given.rank), "-e", "embed_tokens"]
        more = {"mergekit-extract-lora": mergekit} if given.mergekit else {}
        thin = {"torch.linalg.svd, thin": ["thin"]}
        compare(title, llama / "base", llama / "tuned", work, given, more, thin)
        theirs = {"kohya extract_lora": ["kohya-extract", "--kohya", str(given.kohya)]} if given.kohya else {}
        title = f"one layer of each shape of SDXL's UNet, fp16, rank {given.rank}"
        compare(title, sdxl / "base.safetensors", sdxl / "tuned.safetensors", work, given, {}, thin | theirs)


def compare(
    title: str,
    base: Path,
    tuned: Path,
    work: Path,
    given: argparse.Namespace,
    more: Mapping[str, list[str]],
    theirs: Mapping[str, list[str]],
) -> None:
    """Time the commands in turn, then the peers on one module of each shape."""
    out = work / "out"
    extract = [sys.executable, "-m", "loratool", "extract", str(base), str(tuned), "-o", str(out), "-q"]
    extract += ["--rank", str(given.rank), "--device", given.device]
    commands = {"loratool extract": extract, "loratool extract, fp32": [*extract, "--dtype", "fp32"], **more}
    whole = pairs(base, tuned)
    shapes = Counter(parts["base"].shape for parts in whole.values())
    first = {parts["base"].shape: name for name, parts in reversed(whole.items())}
    names = {f"m{n}": name for n, name in enumerate(first.values())}
    sample = {module: whole[name] for module, name in names.items()}
    exact: dict[str, float] = {}

    def after(name: str) -> None:
        exact[name] = peers.excess(sample, peers.ours(out, names), given.rank)

    figures = in_turn(commands, given.runs, out, after, warm_up=False)
    for name, excess in exact.items():
        figures[name].excess = excess
    counts = {f"m{n}": shapes[shape] for n, shape in enumerate(first)}
    for name, (peer, *options_) in theirs.items():
        figures[name] = peers.ask(peer, sample, counts, given.rank, work, *options_)
    show(f"{title}, {given.runs} runs", figures, "loratool extract")


if __name__ == "__main__":
    main()
