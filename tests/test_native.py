"""The compiled loops against an exact reference, against numpy, and an installation without them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import loratool
from loratool import native
from loratool.devices import NativeWorker, Worker, choose
from loratool.errors import LoratoolError, NumericError
from loratool.plan import OutputFile, Part, Plan, Run, Step
from loratool.tensors import Tensor, read_safetensors
from tests.samples import lora_file, low, model, normal

ROOT = Path(loratool.__file__).parent.parent
KINDS = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
LARGEST = {"F32": 0x7F7FFFFF, "BF16": 0x7F7F7FFF, "F16": 0x477FEFFF}  # bits of the last float32 that rounds to finite
compiled = pytest.mark.skipif(not native.available(), reason="no compiled loops in this installation")
has_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32, rounded once: exact in float64 but for the sum, which is rounded to odd before."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    other = total - product
    missed = (product - (total - other)) + (c - other)  # Knuth's two-sum
    even = total.view(np.int64) % 2 == 0
    total = np.where((missed != 0) & even, np.nextafter(total, np.copysign(np.inf, missed)), total)
    return total.astype(np.float32)


def chain(base: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """round(base + up @ down), the product summed in ascending order by fused operations."""
    total = np.zeros(base.shape, np.float32)
    for k in range(up.shape[1]):
        total = fma(up[:, k : k + 1], down[k], total)
    return (base.astype(np.float32) + total).astype(base.dtype)


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")


def merged(base: np.ndarray, up: np.ndarray, down: np.ndarray, counting: bool = True) -> tuple[np.ndarray, int, int]:
    """The merged block, how many values kept their bits, and how many products are zero."""
    out = np.empty_like(base)
    room = np.empty(up.shape[1] * native.panel(up.shape[1], base.shape[1]), np.float32)
    return out, *native.merge(base, up, down, out, room, counting)


@has_compiler
def test_where_there_is_a_compiler_the_loops_are_built() -> None:
    """Else all that follows would be skipped, and CI would try nothing but numpy."""
    assert native.LIBRARY.exists()


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(1, 1, 1), (5, 15, 3), (6, 16, 4), (7, 17, 16), (13, 100, 5), (12, 2064, 2), (3, 40, 300)],
)
def test_a_merge_is_the_chain_of_fused_operations(kind: str, rows: int, columns: int, rank: int) -> None:
    """For any number of rows and columns, beside those that are worked on together; the bits, and how many are kept."""
    base = normal(rows, columns, dtype=kind, seed=1).array()
    up, down = normal(rows, rank, seed=2).array() * 0.01, normal(rank, columns, seed=3).array() * 0.1
    for some in (up, np.asfortranarray(up), np.repeat(up, 2, 0)[::2]):
        for other in (down, np.asfortranarray(down), np.repeat(down, 2, 1)[:, ::2]):
            for counting in (True, False):
                out, kept, zeros = merged(base, some, other, counting)
                assert bits(out).tolist() == bits(chain(base, up, down)).tolist()
                assert kept == np.count_nonzero(bits(out) == bits(base)) and zeros == 0


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_make_no_difference(kind: str) -> None:
    base = normal(50, 70, dtype=kind, seed=4).array()
    up, down = normal(50, 8, seed=5).array(), normal(8, 70, seed=6).array()
    whole = merged(base, up, down)[0]
    for height in (1, 6, 7, 32):
        parts = [merged(base[i : i + height], up[i : i + height], down)[0] for i in range(0, 50, height)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (6, 16), (20, 50)])
def test_products_that_are_zero_are_counted(kind: str, rows: int, columns: int) -> None:
    """Whole rows and columns of them, and those where the terms cancel."""
    base = normal(rows, columns, dtype=kind, seed=1).array()
    up, down = normal(rows, 2, seed=2).array(), normal(2, columns, seed=3).array()
    up[::3], down[:, ::4] = 0, 0
    down[1, 1::4] = down[0, 1::4]
    up[1::3, 1] = -up[1::3, 0]
    out, kept, zeros = merged(base, up, down)
    product = chain(np.zeros(base.shape, np.float32), up, down)
    assert zeros == np.count_nonzero(product == 0) > rows // 3 * columns // 4
    assert kept == np.count_nonzero(bits(out) == bits(base)) >= zeros


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [(0, 0), (0, 15), (6, 17), (7, 3)])
def test_what_is_not_finite_is_found(kind: str, at: tuple[int, int]) -> None:
    """NaN, an infinity and a value that rounds to one, in the base or in the sum; nothing else."""
    zeros, ones = np.zeros((8, 18), KINDS[kind]), np.ones((1, 18), np.float32)
    for value in (np.nan, np.inf, -np.inf):
        base = zeros.copy()
        base[at] = value
        assert merged(base, np.ones((8, 1), np.float32), ones)[1] == -1
    up = np.zeros((8, 1), np.float32)
    for sign in (0, 1 << 31):
        bits(up)[at[0]] = LARGEST[kind] | sign
        assert merged(zeros, up, ones)[1] >= 0
        bits(up)[at[0]] = (LARGEST[kind] + 1) | sign
        assert merged(zeros, up, ones)[1] == -1


@compiled
@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_widening_every_value(kind: str) -> None:
    stored = np.arange(1 << 16, dtype=np.uint16).view(KINDS[kind])
    for count in (1 << 16, 65535, 3):
        out = np.empty(count, np.float32)
        native.widen(stored[:count], out)
        wanted = stored[:count].astype(np.float32)
        assert (np.isnan(out) == np.isnan(wanted)).all()
        assert (bits(out) == bits(wanted))[~np.isnan(wanted)].all()


@compiled
@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_narrowing_rounds_as_numpy_does(kind: str) -> None:
    """All float32 whose lowest eight bits are zero, every tie among them; and as many with random ones."""
    high = np.arange(1 << 24, dtype=np.uint32) << 8
    high = high[(high & 0x7FFFFFFF) <= LARGEST[kind]]
    for low_bits in (0, np.random.default_rng(0).integers(0, 256, high.size, np.uint32)):
        values = (high | low_bits).view(np.float32)
        values = values[(bits(values) & 0x7FFFFFFF) <= LARGEST[kind]]
        out = np.empty(values.size, KINDS[kind])
        assert native.narrow(values, out)
        assert (bits(out) == bits(values.astype(KINDS[kind]))).all()
    for wild in (np.nan, np.inf, -np.inf, np.uint32(LARGEST[kind] + 1).view(np.float32)):
        assert not native.narrow(np.array([1, wild], np.float32), np.empty(2, KINDS[kind]))


@compiled
@pytest.mark.parametrize("kind", [*KINDS, "F64"])
def test_the_worker_gives_what_numpy_gives(kind: str) -> None:
    """Where the loops know nothing (float64, what is not finite) it is numpy's."""
    native_worker, worker = NativeWorker(), Worker()
    values = np.array([[1.0, -0.0, 1e-9, 3.14159, -2.5], [6e4, 1e-40, 0.1, -1e-6, 7.0]], np.float64)
    values = values if kind == "F64" else values.astype(np.float32)
    for some in (values, values.T, values[:, ::2], np.array([[np.nan, 3.4e38]], values.dtype)):
        with np.errstate(over="ignore"):
            one, other = native_worker.narrow(some, kind), worker.narrow(some, kind)
        assert one.tobytes() == other.tobytes()
        assert native_worker.widen(one).tobytes() == worker.widen(other).tobytes()


@compiled
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_merge_of_files(dtype: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All adapters in one pass: their factors side by side, strengths and scaling folded in; over several blocks."""
    monkeypatch.setattr("loratool.tensors.BLOCK", 64)
    base = normal(40, 30, dtype=dtype, seed=7)
    updates = [low(40, 30, 2 + n, seed=10 * n, alpha=2.0 + n) for n in range(count)]
    loras = [lora_file(tmp_path / f"{n}", {"q": update}) for n, update in enumerate(updates)]
    folder = model(tmp_path / "base", {"q.weight": base})
    report = loratool.merge(folder, loras, strengths=[0.5] * count, out=tmp_path / "out")
    assert report.device == "cpu-native"
    up = np.concatenate([u.up.float() * np.float32(0.5 * u.scaling) for u in updates], 1)
    down = np.concatenate([u.down.float() for u in updates])
    found = read_safetensors(tmp_path / "out" / "model.safetensors").tensors["q.weight"].array()
    assert bits(found).tolist() == bits(chain(base.array(), up, down)).tolist()
    unchanged = np.count_nonzero(bits(found) == bits(base.array()))
    assert report.lost_to_rounding == unchanged / base.size


@compiled
def test_parts_of_a_fused_weight_go_through_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that one part changes whole, though the others do not; not those of no part, nor across an edge."""
    monkeypatch.setattr("loratool.tensors.BLOCK", 20)
    made: list[bool] = []
    once = NativeWorker.merged

    def watched(worker: NativeWorker, *given: Any) -> Any:
        found = once(worker, *given)
        made.append(found is not None)
        return found

    monkeypatch.setattr(NativeWorker, "merged", watched)
    parts = (Part(low(4), 1.0, 0, 4, "q"), Part(low(6, seed=3), 1.0, 8, 14, "v"))
    step = Step("qkv", "qkv", normal(16, 5), "F32", parts)
    list(Run(Plan((OutputFile("o", (step,), {}),)), Nowhere(), choose("cpu-native", {}), 1))
    assert made == [True, True]


class Nowhere:
    """Takes blocks and forgets them."""

    def block(self, output: OutputFile, step: Step, start: int, data: np.ndarray) -> None:
        assert len(data) == 4


@compiled
def test_what_overflows_is_told_as_without_them(tmp_path: Path) -> None:
    base = model(tmp_path / "base", {"q.weight": Tensor.of(np.full((7, 5), 6e4, np.float32), "F16")})
    lora = lora_file(tmp_path / "x", {"q": low(alpha=1e6)})
    told = []
    for device in ("cpu-native", "cpu-numpy"):
        with pytest.raises(NumericError) as error:
            loratool.merge(base, lora, device=device, out=tmp_path / "out")
        told.append(str(error.value))
    assert told[0] == told[1] and "overflow of F16" in told[0]


# -- installations without them ------------------------------------------------------------------------------


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def test_without_them_numpy_does_the_work(missing: None, tmp_path: Path) -> None:
    base, lora = model(tmp_path / "base", {"q.weight": normal(7, 5)}), lora_file(tmp_path / "x", {"q": low()})
    assert loratool.merge(base, lora, out=tmp_path / "out").device == "cpu-numpy"
    assert loratool.verify(base, lora, merged=tmp_path / "out").ok


@compiled
def test_a_proof_without_them_says_how_it_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    base, lora = model(tmp_path / "base", {"q.weight": normal(7, 5)}), lora_file(tmp_path / "x", {"q": low()})
    loratool.merge(base, lora, out=tmp_path / "out", device="cpu-native")
    request.getfixturevalue("missing")
    with pytest.raises(LoratoolError, match="compiled loops") as error:
        loratool.verify(base, lora, merged=tmp_path / "out")
    assert "--device cpu --tolerance 1" in error.value.hint
    assert loratool.verify(base, lora, merged=tmp_path / "out", device="cpu", tolerance=1).ok


def test_a_damaged_library_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: None) -> None:
    (tmp_path / "none.so").write_bytes(b"no library")
    assert not native.available() and choose("cpu", {"F32": 1}).name == "cpu-numpy"


# -- how they are built --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", [pytest.param("", marks=has_compiler), "false", "/no/such/compiler"])
def test_the_wheel_holds_them_where_there_is_a_compiler(compiler: str, tmp_path: Path) -> None:
    """For any Python on this platform; without one it is pure Python, and says what is left out."""
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "loratool").mkdir()
    for name in ("__init__.py", "native.c", "native.py"):
        shutil.copy(ROOT / "loratool" / name, tmp_path / "loratool")
    (tmp_path / ".gitignore").write_text("*.so\n")
    environment = {**os.environ, "CC": compiler} if compiler else dict(os.environ)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    done = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = "loratool/_native.so" in zipfile.ZipFile(wheel).namelist()
    assert held == (not compiler)
    assert wheel.name.endswith("-py3-none-any.whl") == bool(compiler)
    assert "-py3-none-" in wheel.name
    assert ("numpy does its work" in done.stdout + done.stderr) == bool(compiler)
