"""`python -m benchmarks.resize`: another rank for whole adapters, and SVD combination, beside what others do.

loratool as whole processes in turn with ``cp`` of the file, on a Llama of 1B (112 modules) and on the UNet of SDXL (722
modules). The peers take minutes to hours: one module of each shape is timed and multiplied, without their reading and
writing. They are the dense thin ``torch.linalg.svd`` of the product; PEFT's ``add_weighted_adapter`` by SVD of two
adapters (beside ``loratool combine --method svd``); and, with ``--kohya DIR``, networks/resize_lora.py of a checkout of
kohya-ss/sd-scripts. Run it on a quiet machine, on tmpfs.

    python -m benchmarks.resize [--rank 64] [--new 16] [--runs 3] [--folder /dev/shm] [--kohya DIR] [--no-peers]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.timing import Figures, divisible, in_turn, options, run, show, workplace
from loratool.tensors import Tensor, write_safetensors
from loratool.update import LowRank

SETUP = """
import sys
from pathlib import Path
from benchmarks import resize, synthetic
work, rank, divide = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for seed in (1, 2):
    shapes = synthetic.LLAMA_1B.divided(divide)
    synthetic.write_adapter(work / f"llama{seed}", shapes, rank, "BF16", seed, falling=True)
    resize.write_unet(work / f"sdxl{seed}.safetensors", rank, seed, divide)
"""


def write_unet(path: Path, rank: int, seed: int = 1, divide: int = 1) -> None:
    """A kohya file of the modules of SDXL's UNet that are usually trained: 722 linear layers."""
    from loratool.architectures import architecture
    from tests.diffusion import layers

    known = architecture("sdxl")
    assert known is not None
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    for name, (out, inner) in layers("sdxl").items():
        if name.startswith("unet."):
            module = known.kohya().forward[name]
            down = rng.standard_normal((rank, inner // divide), dtype=np.float32) * 0.02
            up = rng.standard_normal((out // divide, rank), dtype=np.float32) * 0.02
            up *= np.arange(1, rank + 1, dtype=np.float32) ** -0.5
            tensors[f"{module}.lora_down.weight"] = Tensor.of(down, "F16")
            tensors[f"{module}.lora_up.weight"] = Tensor.of(up, "F16")
            tensors[f"{module}.alpha"] = Tensor.of(np.float32(rank))
    write_safetensors(path, tensors, {"ss_network_module": "networks.lora"})


@dataclass(frozen=True)
class Sample:
    """One module of each shape of an adapter: its factors, how often the shape occurs, and the module's name."""

    parts: Mapping[str, Mapping[str, Tensor]]
    counts: Mapping[str, int]
    names: Mapping[str, str]

    @staticmethod
    def of(one: Path, other: Path) -> Sample:
        """The sample of an adapter, and its pairs with those of a second one; scaling goes into up."""
        import loratool

        updates, seconds = loratool.read(one).updates, loratool.read(other).updates
        shapes = Counter(update.shape for update in updates.values())
        first = {update.shape: name for name, update in reversed(updates.items())}
        parts: dict[str, Mapping[str, Tensor]] = {}
        for n, name in enumerate(first.values()):
            pairs = (updates[name], seconds[name])
            assert all(isinstance(low, LowRank) for low in pairs)
            (up, down), (up2, down2) = (low.factors() for low in pairs)  # type: ignore[attr-defined]
            dtype = updates[name].slots["up"].dtype
            named = {"up": up, "down": down, "up2": up2, "down2": down2}
            parts[f"m{n}"] = {part: Tensor.of(values, dtype) for part, values in named.items()}
        counts = {f"m{n}": shapes[shape] for n, shape in enumerate(first)}
        return Sample(parts, counts, {f"m{n}": name for n, name in enumerate(first.values())})

    def single(self) -> dict[str, Mapping[str, Tensor]]:
        """The first adapter's factors alone."""
        return {m: {part: t for part, t in found.items() if not part.endswith("2")} for m, found in self.parts.items()}


def main() -> None:
    """Print a table for each of both adapters."""
    parser = options(__doc__, 3)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--kohya", type=Path, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--no-peers", action="store_true")
    divisible(parser)
    given = parser.parse_args()
    with workplace(given.folder) as work:
        run([sys.executable, "-c", SETUP, str(work), str(given.rank), str(given.divide)])
        llama = [work / f"llama{seed}" for seed in (1, 2)]
        compare("Llama 1B, bf16", llama, llama[0] / "adapter_model.safetensors", given)
        sdxl = [work / f"sdxl{seed}.safetensors" for seed in (1, 2)]
        compare("SDXL UNet, fp16", sdxl, sdxl[0], given)


def compare(title: str, sources: list[Path], weights: Path, given: argparse.Namespace) -> None:
    """Time the commands in turn, one warm-up round first, then the peers."""
    work, new = sources[0].parent, str(given.new)
    out = work / "out"
    sample = Sample.of(sources[0], sources[1])
    loratool = [sys.executable, "-m", "loratool"]
    resize = [*loratool, "resize", str(sources[0]), "-o", str(out), "-q"]
    both, end = [*map(str, sources)], ["-o", str(out), "-q"]
    commands = {
        "cp": ["cp", str(weights), str(out)],
        f"resize --rank {new}": [*resize, "--rank", new],
        "resize --energy 0.9": [*resize, "--energy", "0.9"],
        "resize --max-size (half)": [*resize, "--max-size", str(weights.stat().st_size // 2)],
        f"add A B --rank {new}": [*loratool, "add", *both, *end, "--rank", new],
        "combine A B --method svd": [*loratool, "combine", *both, *end, "--method", "svd", "--rank", new],
        "subtract A A": [*loratool, "subtract", both[0], both[0], *end],
        "add A A": [*loratool, "add", both[0], both[0], *end],
    }
    exact: dict[str, float] = {}

    def after(name: str) -> None:
        parts = {f"resize --rank {new}": sample.single(), "combine A B --method svd": sample.parts}.get(name)
        if parts is not None:
            exact[name] = peers.excess(parts, peers.ours(out, sample.names), given.new)

    figures = in_turn(commands, given.runs, out, after)
    for name, excess in exact.items():
        figures[name].excess = excess
    if not given.no_peers:
        figures |= others(sample, work, given)
    size = weights.stat().st_size / 1e6
    show(f"{title}, rank {given.rank} to {new}, {size:.0f} MB, {given.runs} runs", figures, "cp")


def others(sample: Sample, work: Path, given: argparse.Namespace) -> dict[str, Figures]:
    """What peers take for all modules, from one of each shape."""
    one, counts, new = sample.single(), sample.counts, given.new
    found = {"torch.linalg.svd, thin": peers.ask("thin", one, counts, new, work)}
    if len(counts) < 6:  # those of SDXL are as many minutes again, and say the same
        found["PEFT add_weighted_adapter"] = peers.ask("peft", sample.parts, counts, new, work)
    elif given.kohya:
        found["kohya resize_lora"] = peers.ask("kohya-resize", one, counts, new, work, "--kohya", str(given.kohya))
    return found


if __name__ == "__main__":
    main()
