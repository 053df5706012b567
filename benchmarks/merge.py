"""`make bench`: a streamed merge beside ``cp -r`` and beside PEFT's merge_and_unload + save_pretrained.

Whole processes, one after the other in turn, medians; peak memory is that of each process (its own VmHWM, as the
kernel accounts it). Run it on a quiet machine, on tmpfs: files on disk vary too much to compare.

    python -m benchmarks.merge [--model 1b|8b] [--rank 16] [--runs 5] [--folder /dev/shm] [--device cpu] [--no-peft]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
SETUP = """
import sys
from pathlib import Path
from benchmarks import synthetic
shapes = {"1b": synthetic.LLAMA_1B, "8b": synthetic.LLAMA_8B}[sys.argv[1]]
synthetic.write_base(Path(sys.argv[2]), shapes)
synthetic.write_adapter(Path(sys.argv[3]), shapes, int(sys.argv[4]))
"""


@dataclass
class Figures:
    """What the runs of one command took."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def row(self, name: str, reference: float) -> str:
        """One line: median (least to most) seconds, ratio to the reference, CPU seconds, peak memory."""
        middle = statistics.median(self.seconds)
        spread = f"({min(self.seconds):.2f} to {max(self.seconds):.2f})"
        peak = statistics.median(self.peaks) / 2**20
        cpu = statistics.median(self.cpu)
        return f"{name:24} {middle:7.2f} s {spread:18} {middle / reference:6.2f} x cp {cpu:7.2f} s cpu {peak:8.0f} MiB"


def run(command: list[str], figures: Figures | None) -> None:
    """Run one process to its end and note what it took."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    if figures is not None:
        figures.seconds.append(time.perf_counter() - began)
        figures.cpu.append(usage.ru_utime + usage.ru_stime)
        figures.peaks.append(usage.ru_maxrss * 1024)


def main() -> None:
    """Run every command in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("1b", "8b"), default="1b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm" if Path("/dev/shm").is_dir() else "."))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-peft", action="store_true")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="loratool-bench-", dir=options.folder))
    try:
        compare(work, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def compare(work: Path, options: argparse.Namespace) -> None:
    """Time the commands in turn, one warm-up round first."""
    base, adapter, out = (str(work / name) for name in ("base", "adapter", "out"))
    run([sys.executable, "-c", SETUP, options.model, base, adapter, str(options.rank)], None)
    merge = [sys.executable, "-m", "loratool", "merge", base, adapter, "-o", out, "--device", options.device, "-q"]
    commands = {"cp -r": ["cp", "-r", base, out], "loratool merge": merge}
    if not options.no_peft:
        commands["PEFT merge and save"] = [sys.executable, "-c", PEFT, base, adapter, out]
    figures = {name: Figures() for name in commands}
    time.sleep(4)  # digests of files younger than that are not remembered
    for turn in range(options.runs + 1):
        for name, command in commands.items():
            run(command, figures[name] if turn else None)
            shutil.rmtree(out)
    print(f"{options.model} bf16, rank {options.rank}, {options.runs} runs, medians (least to most):")
    reference = statistics.median(figures["cp -r"].seconds)
    for name, found in figures.items():
        print(found.row(name, reference))


if __name__ == "__main__":
    main()
