"""What the benchmarks share: whole processes timed in turn, and one table of what they took."""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Figures:
    """What the runs of one command took.

    ``excess`` is the worst ||D - D_r|| / optimum - 1 of its output, ``note`` what a reader must know of the figures.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    excess: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """The middle one of the wall-clock seconds."""
        return statistics.median(self.seconds)


def options(doc: str | None, runs: int) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm" if Path("/dev/shm").is_dir() else "."))
    return parser


def divisible(parser: argparse.ArgumentParser) -> None:
    """Add the option to make all layers narrower."""
    parser.add_argument("--divide", type=int, default=1, help="divide all widths, to try the benchmark itself")


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A folder that is gone at the end."""
    work = Path(tempfile.mkdtemp(prefix="loratool-bench-", dir=folder))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


_LAUNCH = """
import os, subprocess, sys, time
began = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(status != 0)
"""


def run(command: Sequence[str], figures: Figures | None = None) -> None:
    """Run one process to its end and note what it took.

    A small process starts it: a child's peak begins with that of its parent.
    """
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, *command]
    done = subprocess.run(launch, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stderr[-4000:]}")
    if figures is not None:
        seconds, cpu, peak = map(float, done.stdout.split())
        figures.seconds.append(seconds)
        figures.cpu.append(cpu)
        figures.peaks.append(int(peak) * 1024)


def in_turn(
    commands: Mapping[str, Sequence[str]],
    runs: int,
    out: Path,
    after: Callable[[str], None] = lambda name: None,
    prepare: Callable[[], None] = lambda: None,
    warm_up: bool = True,
) -> dict[str, Figures]:
    """Time the commands one after the other, ``runs`` times over, a round that does not count first.

    Each writes ``out``, which ``prepare`` made ready, ``after`` may look at, and which then goes.
    """
    figures = {name: Figures() for name in commands}
    for turn in range(runs + warm_up):
        for name, command in commands.items():
            prepare()
            run(command, figures[name] if turn or not warm_up else None)
            if turn == 0:
                after(name)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    return figures


def show(title: str, figures: Mapping[str, Figures], reference: str) -> None:
    """Print one table: medians (least to most), ratios to the reference, and what else is known."""
    accuracy = any(found.excess is not None for found in figures.values())
    print(f"\n{title}; medians (least to most)")
    ratio = f"x {reference}" if len(reference) < 7 else "ratio"
    head = f"{'':28} {'seconds':>9} {'':18} {ratio:>8} {'cpu s':>8} {'peak MiB':>9}"
    print(head + (f" {'excess':>9}" if accuracy else ""))
    for name, found in figures.items():
        spread = f"({min(found.seconds):.2f} to {max(found.seconds):.2f})" if len(found.seconds) > 1 else ""
        cpu = f"{statistics.median(found.cpu):.2f}" if found.cpu else ""
        peak = f"{statistics.median(found.peaks) / 2**20:.0f}" if found.peaks else ""
        by = found.median / figures[reference].median
        line = f"{name:28} {found.median:9.2f} {spread:18} {by:8.2f} {cpu:>8} {peak:>9}"
        excess = "" if found.excess is None else f"{found.excess:.1e}"
        print((line + (f" {excess:>9}" if accuracy else "") + ("  " + found.note if found.note else "")).rstrip())
    if accuracy:
        print("excess: the worst ||D - D_r|| / optimum - 1 of one module of each shape, as stored; optimum in float64")
