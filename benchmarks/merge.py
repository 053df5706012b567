"""`make bench`: a streamed merge beside ``cp -r`` and beside PEFT's merge_and_unload + save_pretrained.

Whole processes, one after the other in turn, medians; peak memory is that of each process (its own VmHWM, as the
kernel accounts it). Run it on a quiet machine, on tmpfs: files on disk vary too much to compare; there a merge is
flushed, and a copy only where ``sync`` follows.

    python -m benchmarks.merge [--model 1b|8b] [--rank 16] [--runs 5] [--folder /dev/shm] [--device cpu] [--no-peft]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.timing import in_turn, options, run, show, workplace

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


def main() -> None:
    """Run every command in turn and print the medians."""
    parser = options(__doc__, 5)
    parser.add_argument("--model", choices=("1b", "8b"), default="1b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-peft", action="store_true")
    given = parser.parse_args()
    with workplace(given.folder) as work:
        compare(work, given)


def compare(work: Path, given: argparse.Namespace) -> None:
    """Time the commands in turn, one warm-up round first."""
    base, adapter, out = (str(work / name) for name in ("base", "adapter", "out"))
    run([sys.executable, "-c", SETUP, given.model, base, adapter, str(given.rank)])
    merge = [sys.executable, "-m", "loratool", "merge", base, adapter, "-o", out, "--device", given.device, "-q"]
    flushed = ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', base, out]
    commands = {"cp -r": ["cp", "-r", base, out], "cp -r, sync": flushed, "loratool merge": merge}
    if not given.no_peft:
        commands["PEFT merge and save"] = [sys.executable, "-c", PEFT, base, adapter, out]
    time.sleep(4)  # digests of files younger than that are not remembered
    figures = in_turn(commands, given.runs, Path(out))
    show(f"{given.model} bf16, rank {given.rank}, {given.runs} runs", figures, "cp -r")


if __name__ == "__main__":
    main()
