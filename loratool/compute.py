"""The public functions that compute adapters: extract, resize, add, combine, ...; `loratool.api` has the others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loratool import __version__, formats
from loratool.adapter import Adapter, strengths_of
from loratool.api import AnyPath, Base, Reading, Source, flattened, model_of, read
from loratool.errors import LoratoolError, UsageError
from loratool.files import prepare_output, staged
from loratool.formats.base import Evidence, Format
from loratool.hashes import sha256
from loratool.lazy import np
from loratool.model import Model
from loratool.names import present
from loratool.ops.changes import Changes, check_values
from loratool.ops.convert import recast, with_provenance
from loratool.ops.rank import RankReport, rank_adapter, rank_models
from loratool.ops.spectral import Choice, ModuleResult, Result
from loratool.plan import Progress
from loratool.plots import plot_ranks, prepare_plot
from loratool.tensors import parse_dtype


@dataclass(frozen=True)
class ComputeReport:
    """What was written; the fields of ``extract/resize/add/subtract/combine --json``.

    ``relative_error`` is that of the whole adapter in the Frobenius norm, of what was written.
    """

    output: str
    format: str
    ranks: Mapping[str, int]
    parameters: int
    bytes: int
    relative_error: float
    modules: tuple[ModuleResult, ...]
    carried: tuple[str, ...]
    losses: tuple[str, ...]
    operation: str
    version: str
    inputs: Mapping[str, str]
    strengths: tuple[float, ...]
    warnings: tuple[str, ...]
    details: Mapping[str, object] = field(default_factory=dict)
    dry_run: bool = False


@dataclass(frozen=True)
class _Output:
    """Where and how a computed adapter is written."""

    path: Path
    format: Format
    overwrite: bool = False
    allow_loss: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class _Sources:
    """The adapters that another is computed from, and the base where there is one."""

    adapters: tuple[Adapter, ...]
    base: Model | None

    @property
    def paths(self) -> dict[str, Path]:
        """What the output may not overwrite."""
        found = {f"adapter {n}": a.metadata.path for n, a in enumerate(self.adapters, 1) if a.metadata.path}
        return found if self.base is None else {**found, "the base": self.base.path}

    @property
    def weights(self) -> dict[str, Path]:
        """The files whose sha256 goes into the provenance."""
        found = {f"adapter{n}/{p.name}": p for n, a in enumerate(self.adapters, 1) for p in a.metadata.weights}
        return found | {f"base/{w.name}": w.file.path for w in (self.base.weights if self.base else ())}

    def output(self, out: AnyPath, to: str | None, overwrite: bool, allow_loss: bool, dry_run: bool) -> _Output:
        """The output that was asked for, in the first one's format unless ``to`` names another. Nothing is written."""
        path = prepare_output(out, overwrite, self.paths)
        chosen = formats.to_write(to, self.adapters[0].metadata.format)
        return _Output(path, chosen, overwrite, allow_loss, dry_run)

    def strengths(self, given: Sequence[float] | None) -> tuple[float, ...]:
        """The strengths of all adapters: 1 where none are given."""
        return strengths_of(self.adapters, given)


def extract(
    base: Base,
    tuned: Base,
    out: AnyPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    max_size: int | None = None,
    to: str = "peft",
    include: str | None = None,
    exclude: str | None = None,
    dtype: str = "keep",
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    allow_loss: bool = False,
    dry_run: bool = False,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> ComputeReport:
    """Write the LoRA of TUNED - BASE to ``out``: merge(BASE, out) gives TUNED up to the stated error.

    ``rank`` for all, or the smallest that keeps ``energy`` / reaches ``error`` (``rank`` the cap), or what loses least
    for ``max_size`` bytes. ``include`` and ``exclude`` are regular expressions searched in module names. The factors
    are stored in the base's own dtype unless ``dtype`` is fp32, fp16 or bf16; bf16 adds 0.24% of the norm. Raises
    MatchError for models that do not fit, before the first SVD; UsageError; NumericError; LossError.
    """
    from loratool.ops.extract import extract as compute
    from loratool.ops.extract import longest_needed

    choice, reading, chosen = Choice(rank, energy, error, max_size), reading or Reading(), formats.to_write(to)
    one, other = model_of(base, reading), model_of(tuned, reading)
    path = prepare_output(out, overwrite, {"the base": one.path, "the tuned model": other.path})
    output = _Output(path, chosen, overwrite, allow_loss, dry_run)
    inputs = {f"base/{w.name}": w.file.path for w in one.weights}
    inputs |= {f"tuned/{w.name}": w.file.path for w in other.weights}
    hashes = _hashed(inputs) if max_size is not None else {}

    def size(made: Adapter) -> int:
        return _size(with_provenance(made, "extract", hashes, needed=longest_needed(made)), chosen)

    result = compute(
        one,
        other,
        choice,
        include=include,
        exclude=exclude,
        dtype=parse_dtype(dtype),
        to_device=_to(device),
        seed=seed,
        check=lambda planned: formats.check_losses(planned, chosen, allow_loss),
        size_of=size,
        progress=progress,
    )
    return _write(result, output, "extract", inputs, details={"needed": result.needed})


def resize(
    adapter: Source,
    out: AnyPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    max_size: int | None = None,
    base: Base | None = None,
    to: str | None = None,
    dtype: str = "keep",
    overwrite: bool = False,
    allow_loss: bool = False,
    dry_run: bool = False,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> ComputeReport:
    """Write ``adapter`` with other ranks, the best in the Frobenius norm; beyond what there is, padded with zeros.

    The arguments choose ranks as in `extract`. Raises MatchError for kinds that need ``base`` when none is given.
    """
    from loratool.ops.resize import resize as compute

    choice, stored = Choice(rank, energy, error, max_size), parse_dtype(dtype)
    sources = _read([adapter], base, reading)
    output = sources.output(out, to, overwrite, allow_loss, dry_run)
    hashes = _hashed(sources.weights) if max_size is not None else {}

    def size(made: Adapter) -> int:
        return _size(with_provenance(made, "resize", hashes), output.format)

    result = compute(sources.adapters[0], choice, sources.base, stored, size, progress)
    return _write(result, output, "resize", sources.weights)


def add(
    *adapters: Source | Sequence[Source],
    out: AnyPath,
    strengths: Sequence[float] | None = None,
    rank: int | None = None,
    base: Base | None = None,
    to: str | None = None,
    dtype: str = "keep",
    overwrite: bool = False,
    allow_loss: bool = False,
    dry_run: bool = False,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> ComputeReport:
    """Write the sum of strength x update: exact by concatenation, or the best of ``rank``; stored as ``dtype``."""
    from loratool.ops.add import add as compute

    stored, sources = parse_dtype(dtype), _read(flattened(adapters), base, reading)
    output = sources.output(out, to, overwrite, allow_loss, dry_run)
    result = recast(compute(sources.adapters, strengths, rank, sources.base, progress), stored)
    return _write(result, output, "add", sources.weights, sources.strengths(strengths))


def subtract(
    *adapters: Source | Sequence[Source],
    out: AnyPath,
    strengths: Sequence[float] | None = None,
    rank: int | None = None,
    base: Base | None = None,
    to: str | None = None,
    dtype: str = "keep",
    overwrite: bool = False,
    allow_loss: bool = False,
    dry_run: bool = False,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> ComputeReport:
    """Write the first adapter minus the others; the rules of `add`."""
    from loratool.ops.add import subtract as compute

    stored, sources = parse_dtype(dtype), _read(flattened(adapters), base, reading)
    output = sources.output(out, to, overwrite, allow_loss, dry_run)
    result = recast(compute(sources.adapters, strengths, rank, sources.base, progress), stored)
    return _write(result, output, "subtract", sources.weights, sources.strengths(strengths))


def combine(
    *adapters: Source | Sequence[Source],
    out: AnyPath,
    method: str,
    strengths: Sequence[float] | None = None,
    density: float | None = None,
    seed: int = 0,
    rank: int | None = None,
    base: Base | None = None,
    to: str | None = None,
    dtype: str = "keep",
    overwrite: bool = False,
    allow_loss: bool = False,
    dry_run: bool = False,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> ComputeReport:
    """Write the adapters combined by ``method``: linear, svd, ties, dare, dare_ties, magnitude_prune, knots.

    ``density`` (0.5 where none is given) is the share of entries kept by the methods that drop some, ``seed`` that of
    dare; ``rank`` that of the result, else each module's largest. Raises UsageError, MatchError, NumericError.
    """
    from loratool.ops.combine import Recipe
    from loratool.ops.combine import combine as compute

    recipe, stored = Recipe(method, density, seed, rank), parse_dtype(dtype)
    sources = _read(flattened(adapters), base, reading)
    output = sources.output(out, to, overwrite, allow_loss, dry_run)
    result = recast(compute(sources.adapters, recipe, strengths, sources.base, progress), stored)
    return _write(result, output, "combine", sources.weights, sources.strengths(strengths), recipe.details())


def rank(
    source: AnyPath | Adapter,
    tuned: Base | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    max_size: int | None = None,
    base: Base | None = None,
    reading: Reading | None = None,
    progress: Progress | None = None,
    plot: AnyPath | None = None,
    overwrite: bool = False,
) -> RankReport:
    """The spectrum of every update of an adapter, or of ``tuned`` - ``source`` for two models; a proposed rank each.

    ``plot`` draws it into a file (.png, .svg, .html) with the extra ``plot``; that the file can be written is checked
    first.
    """
    reading = reading or Reading()
    asked = (rank, energy, error, max_size) != (None, None, None, None)
    choice = Choice(rank, energy, error, max_size) if asked else None
    picture = None if plot is None else prepare_plot(plot, overwrite)
    if tuned is not None:
        if isinstance(source, Adapter):
            raise UsageError("two models, or one adapter")
        report = rank_models(model_of(source, reading), model_of(tuned, reading), choice, progress)
    else:
        found = _read([source], base, reading)
        report = rank_adapter(found.adapters[0], choice, found.base)
    if picture is not None:
        plot_ranks(report, picture, overwrite)
    return report


def _read(adapters: Sequence[Source], base: Base | None, reading: Reading | None) -> _Sources:
    """Adapters whose values are sound. Raises UsageError for none, FormatError for an unknown scaling, NumericError."""
    if not adapters:
        raise UsageError("no adapter given")
    model = None if base is None else model_of(base, reading or Reading())
    found = []
    for source in adapters:
        adapter = source if isinstance(source, Adapter) else read(source, base=model, reading=reading)
        check_values(adapter, Changes())
        found.append(adapter if model is None else present(adapter, model))
    return _Sources(tuple(found), model)


def _hashed(inputs: Mapping[str, Path]) -> dict[str, str]:
    return {name: sha256(path) for name, path in sorted(inputs.items())}


def _size(adapter: Adapter, chosen: Format) -> int:
    """Bytes of the weights file that ``chosen`` writes: measured, since every format has its own names."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "adapter")
        chosen.write(adapter, path)
        return _weights_file(path).stat().st_size


def _weights_file(path: Path) -> Path:
    return Evidence(path).weights


def _to(device: str) -> Callable[[np.ndarray], Any] | None:
    """What moves a matrix to the device; None for the processor. Raises UsageError, LoratoolError."""
    from loratool.devices import choose

    if choose(device, {}).name.startswith("cpu"):
        return None
    if device == "mps":
        raise LoratoolError("this device has no float64, which singular values need", device, "use --device cpu")
    import torch

    return lambda values: torch.from_numpy(values).to(device)


def _put(adapter: Adapter, output: _Output) -> int:
    """Write an adapter, complete or not at all; the bytes of its weights file."""
    with staged(output.path, output.overwrite) as temporary:
        output.format.write(adapter, temporary)
    return _weights_file(output.path).stat().st_size


def _write(
    result: Result,
    output: _Output,
    operation: str,
    inputs: Mapping[str, Path],
    strengths: Sequence[float] = (),
    details: Mapping[str, object] | None = None,
) -> ComputeReport:
    """Write a computed adapter, complete or not at all, and report it; ``details`` are of the operation.

    A dry run does everything but leave an output, so that it refuses what the run would.
    """
    more = {**({"strengths": list(strengths)} if strengths else {}), **(details or {})}
    hashes, chosen = _hashed(inputs), output.format
    adapter = with_provenance(result.adapter, operation, hashes, **more)
    losses = formats.check_losses(adapter, chosen, output.allow_loss)
    size = _size(adapter, chosen) if output.dry_run else _put(adapter, output)
    ranks = Counter(update.rank for update in adapter.modules().values() if update.rank is not None)
    tensors = [t for u in adapter.updates.values() for t in u.slots.values()]
    return ComputeReport(
        output=os.fspath(output.path),
        format=chosen.name,
        ranks={str(rank): ranks[rank] for rank in sorted(ranks)},
        parameters=sum(t.size for t in (*tensors, *adapter.carried.values())),
        bytes=size,
        relative_error=result.relative_error,
        modules=result.modules,
        carried=tuple(adapter.carried),
        losses=tuple(map(str, losses)),
        operation=operation,
        version=__version__,
        inputs=hashes,
        strengths=tuple(strengths),
        warnings=(*result.warnings, *chosen.notes(adapter)),
        details=dict(details or {}),
        dry_run=output.dry_run,
    )
