"""The proof by running: the changed graph does in onnxruntime what its side branches do, and does something.

The base, the changed graph and a reference (the base with unmerged side branches) run on the same random inputs, one
session at a time, from their files. Rounding is allowed for by the precision of the graph; the change itself must be
visible and right. onnxruntime is imported by the functions that need it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loratool.errors import LoratoolError, VerifyError
from loratool.lazy import np
from loratool.onnx.feeds import Feed, feeds
from loratool.onnx.graph import Graph, read_graph
from loratool.onnx.widen import widen, widen_adapter

INSTALL = "pip install 'loratool[onnxruntime]' (for a GPU: 'loratool[gpu]', never both)"
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_DRIVER = Path("/proc/driver/nvidia/version")
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
_INTEGER = ("QuantizeLinear", "DynamicQuantizeLinear", "MatMulNBits", "QLinearMatMul", "QAttention")
_OPTIONS = {CUDA: {"use_tf32": "0"}}  # else products of float32 have the precision of float16
SEEDS = 2


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do: ``noise`` to the outputs (their root mean square), ``share`` of the change itself."""

    noise: float
    share: float


# What is compared differs in where it rounds: weights once, products and sums at every node
TOLERANCES: Mapping[str, Tolerance] = {
    "F64": Tolerance(1e-12, 0.01),
    "F32": Tolerance(1e-5, 0.02),
    "F16": Tolerance(1e-2, 0.3),
    "BF16": Tolerance(2e-2, 0.5),
    "quantised": Tolerance(2e-2, 0.3),
}


@dataclass(frozen=True)
class Trial:
    """One changed graph and the graph that tells what it should do; ``active`` is an adapter file to switch on."""

    changed: Path
    reference: Path
    active: Path | None = None


@dataclass(frozen=True)
class Verification:
    """What the runs gave: the largest difference to the reference and to the base, over all outputs and feeds."""

    verified: bool
    max_abs_diff: float | None = None
    max_effect: float | None = None
    providers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class BaseError(LoratoolError):
    """onnxruntime cannot run the base itself (exit code 1)."""


def onnxruntime() -> Any:
    """The package onnxruntime. Raises LoratoolError, with the line that installs it, where it is missing or broken."""
    try:
        import onnxruntime as found
    except Exception as error:  # a broken installation may fail in any way
        raise LoratoolError(f"onnxruntime cannot be imported: {_first_line(error)}", hint=INSTALL) from None
    if not hasattr(found, "InferenceSession"):  # two distributions shared its folder, and one was removed
        hint = "pip uninstall onnxruntime onnxruntime-gpu, then " + INSTALL
        raise LoratoolError("onnxruntime is installed, but empty", hint=hint)
    return found


def has_onnxruntime() -> bool:
    """Whether onnxruntime is there and works."""
    try:
        onnxruntime()
    except LoratoolError:
        return False
    return True


def verify(base: Graph, trials: Iterable[Trial], scratch: Path | None = None) -> Verification:
    """Run ``base`` and every trial on the same inputs, and compare.

    A bfloat16 graph runs as float32, in files below ``scratch`` (a folder) for as long as this takes. Raises
    VerifyError (the change is lost, or differs from the reference by more than rounding), BaseError (the base does
    not run: the fault is not the change's), LoratoolError (no working onnxruntime).
    """
    kind = precision(base)
    if kind != "BF16":
        return _verify(base, trials, kind)
    with TemporaryDirectory(dir=scratch, prefix=".loratool-") as folder:
        wide = read_graph(widen(base.path, Path(folder, "base.onnx")))
        found = _verify(wide, _widened(trials, Path(folder)), kind)
    return replace(found, notes=(*found.notes, "compared in float32: the graph's own bfloat16 was widened to run it"))


def _widened(trials: Iterable[Trial], folder: Path) -> Iterator[Trial]:
    """Trials of graphs in float32, each in the place of the one before."""
    for trial in trials:
        for file in folder.glob("trial*"):
            file.unlink()
        yield Trial(
            widen(trial.changed, folder / "trial.onnx"),
            widen(trial.reference, folder / "trial-reference.onnx"),
            widen_adapter(trial.active, folder / "trial.onnx_adapter") if trial.active else None,
        )


def _verify(base: Graph, trials: Iterable[Trial], kind: str) -> Verification:
    given, before, providers = _run_base(base)
    tolerance = TOLERANCES[kind]
    compared = [_compare(trial, given, before, tolerance) for trial in trials]
    notes = list(_notes(providers))
    if not all(found.expected for found in compared):
        notes.append("no effect: the adapter does not change any output")
    elif not all(found.visible for found in compared):
        notes.append("the effect is within the rounding of the graph: not proven")
    return Verification(
        verified=all(found.visible for found in compared),
        max_abs_diff=max((found.difference for found in compared), default=0.0),
        max_effect=max((found.effect for found in compared), default=0.0),
        providers=providers,
        notes=tuple(notes),
    )


def precision(graph: Graph) -> str:
    """The key of `TOLERANCES` for a graph: its coarsest numbers decide."""
    if any(node.op in _INTEGER for node in graph.nodes):
        return "quantised"
    stored = {weight.tensor.dtype for weight in graph.weights.values() if len(weight.shape) > 1}
    return next((dtype for dtype in ("BF16", "F16", "F32") if dtype in stored), "F64" if "F64" in stored else "F32")


# ---------------------------------------------------------------- running


def _run_base(base: Graph) -> tuple[list[Feed], list[Feed], tuple[str, ...]]:
    """The feeds that the base accepts, its outputs for them, and the providers that ran it."""
    try:
        session = _session(base.path)
    except Exception as error:
        raise BaseError(
            f"onnxruntime cannot open the base graph: {_first_line(error)}", base.path, "--no-verify exports regardless"
        ) from None
    failed: Exception = LoratoolError("it has no inputs")
    try:
        for given in feeds(base, SEEDS):
            try:
                return given, _outputs(session, given), tuple(session.get_providers())
            except Exception as error:
                failed = error
    except Exception as error:  # an input that no values can be made for, or attributes that make no sense
        failed = error
    raise BaseError(
        f"onnxruntime cannot run the base graph on random inputs: {_first_line(failed)}",
        base.path,
        "--no-verify exports regardless",
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _session(path: Path) -> Any:
    """A session that computes as the graph says, weights left in their files."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    providers = [(name, _OPTIONS.get(name, {})) for name in _wanted(ort)]
    return ort.InferenceSession(str(path), options, providers=providers)


def _wanted(ort: Any) -> list[str]:
    """CUDA where both the package and the machine have it; else the processor."""
    cuda = CUDA in ort.get_available_providers() and _DRIVER.exists()
    return [CUDA, CPU] if cuda else [CPU]


def _notes(providers: tuple[str, ...]) -> Iterator[str]:
    """What the user should know of the onnxruntime that ran."""
    if CUDA in _wanted(onnxruntime()) and CUDA not in providers:
        yield "CUDA is there, but onnxruntime could not use it: verified on the processor"
    installed = {entry.metadata["Name"] for entry in importlib.metadata.distributions()}
    both = sorted(installed & set(_DISTRIBUTIONS))
    if len(both) > 1:
        yield f"{' and '.join(both)} share one module name: keep only one of them"


def _outputs(session: Any, given: Sequence[Feed], active: Path | None = None) -> list[Feed]:
    """The outputs of a session by name, for every feed; with an adapter file switched on."""
    ort = onnxruntime()
    names = [output.name for output in session.get_outputs()]
    options = None
    if active is not None:
        options, adapter = ort.RunOptions(), ort.LoraAdapter()
        adapter.Load(str(active.resolve()))
        options.add_active_adapter(adapter)
    return [dict(zip(names, session.run(names, feed, options), strict=True)) for feed in given]


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True)
class _Found:
    """One trial: the largest difference and effect; whether a change was expected, and stands out from rounding."""

    difference: float
    effect: float
    expected: bool
    visible: bool


def _compare(trial: Trial, given: list[Feed], before: list[Feed], tolerance: Tolerance) -> _Found:
    """Run one trial and compare its outputs. Raises VerifyError."""
    try:
        session = _session(trial.changed)
        after = _outputs(session, given, trial.active)
        if trial.active is not None:
            _check_idle(_outputs(session, given), before, tolerance, trial.changed)
        del session
        should = _outputs(_session(trial.reference), given)
    except VerifyError:
        raise
    except Exception as error:
        raise VerifyError(f"onnxruntime cannot run the changed graph: {_first_line(error)}", trial.changed) from None
    outputs = {name: _sound(name, before, after, should, trial.changed) for name in _compared(before)}
    changes = [
        (not np.array_equal(wanted, base), not np.array_equal(is_, base)) for base, is_, wanted in outputs.values()
    ]
    if any(wanted for wanted, _ in changes) and not any(found for _, found in changes):
        raise VerifyError("the effect is lost: the changed graph gives what the base gives", trial.changed)
    found = [_judge(name, *values, tolerance, trial.changed) for name, values in outputs.items()]
    return _Found(
        difference=max((one.difference for one in found), default=0.0),
        effect=max((one.effect for one in found), default=0.0),
        expected=any(one.expected for one in found),
        visible=any(one.visible for one in found),
    )


def _compared(runs: Sequence[Feed]) -> list[str]:
    """The outputs to compare: floats, where there are any (others turn at the slightest rounding)."""
    floats = [name for name, value in runs[0].items() if value.dtype.kind == "f"]
    return floats or list(runs[0])


def _joined(runs: Sequence[Feed], name: str, where: Path) -> np.ndarray:
    """One output of all runs as one vector."""
    if any(name not in run for run in runs):
        raise VerifyError(f"the changed graph lacks the output {name}", where)
    return np.concatenate([run[name].astype(np.float64).reshape(-1) for run in runs])


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values * values))) if values.size else 0.0


def _sound(
    name: str, before: Sequence[Feed], after: Sequence[Feed], should: Sequence[Feed], where: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One output of the base, the changed graph and the reference, where it is finite. Raises VerifyError."""
    base, changed, wanted = (_joined(runs, name, where) for runs in (before, after, should))
    if not base.shape == changed.shape == wanted.shape:
        raise VerifyError(f"the output {name} has another shape than the base's", where)
    sound = np.isfinite(base) & np.isfinite(wanted)
    if not np.isfinite(changed[sound]).all():
        raise VerifyError(f"NaN or infinity in the output {name}, where the side branches give none", where)
    return base[sound], changed[sound], wanted[sound]


def _judge(
    name: str, base: np.ndarray, changed: np.ndarray, wanted: np.ndarray, tolerance: Tolerance, where: Path
) -> _Found:
    """Compare one output. Raises VerifyError."""
    difference, effect = np.abs(changed - wanted).max(initial=0.0), np.abs(changed - base).max(initial=0.0)
    expected, noise = _rms(wanted - base), tolerance.noise * _rms(wanted)
    if _rms(changed - wanted) > tolerance.share * expected + noise:
        raise VerifyError(
            f"the changed graph is wrong: the output {name} differs by {difference:.3g} from what side branches give "
            f"(the adapter should change it by up to {np.abs(wanted - base).max():.3g})",
            where,
        )
    return _Found(float(difference), float(effect), expected > 0, expected > noise)


def _check_idle(idle: Sequence[Feed], before: Sequence[Feed], tolerance: Tolerance, where: Path) -> None:
    """With no adapter switched on, the graph is the base. Raises VerifyError."""
    for name in _compared(before):
        off, base = _joined(idle, name, where), _joined(before, name, where)
        sound = np.isfinite(base)
        if off.shape != base.shape or _rms((off - base)[sound]) > tolerance.noise * _rms(base[sound]):
            raise VerifyError(f"without an adapter the output {name} is not the base's", where)
