"""The command line: options, progress, exit codes. The only file that prints, exits or draws."""

from __future__ import annotations

import dataclasses
import functools
import json as jsonlib
import math
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from loratool import __version__
from loratool.errors import SHOWN, LoratoolError, UsageError

if TYPE_CHECKING:
    from loratool.adapter import Adapter
    from loratool.api import Reading
    from loratool.compute import ComputeReport
    from loratool.plan import Progress

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclasses.dataclass
class _State:
    """What the options common to all commands set, and whether a signal asked to stop."""

    debug: bool = False
    quiet: bool = False
    verbose: bool = False
    stopped: bool = False


_state = _State()
_HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # the terminal went away; Windows has no such signal


# ---------------------------------------------------------------- options that several commands share


def _flag(*names: str, help: str) -> Callable[[Command], Command]:
    return click.option(*names, is_flag=True, help=help)


def _common(command: Command) -> Command:
    """``-v``, ``-q`` and ``--debug``, which are kept in ``_state``."""

    def keep(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        setattr(_state, str(parameter.name), value or getattr(_state, str(parameter.name)))
        if _state.quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    for names, help in (
        (("--debug",), "Show tracebacks."),
        (("--quiet", "-q"), "No messages."),
        (("--verbose", "-v"), "More messages."),
    ):
        click.option(*names, is_flag=True, expose_value=False, callback=keep, help=help)(command)
    return command


def _reads(command: Command) -> Callable[..., Any]:
    """How inputs may be read; the command gets one ``reading``."""

    @_flag("--allow-pickle", help="Read pickles (.bin, .pt), their tensors only.")
    @_flag("--allow-links", help="Follow links that leave a folder.")
    @click.option("--scaling", type=float, metavar="X", help="alpha/rank, where a file does not tell.")
    @click.option(
        "--map", "names", metavar="FILE", help="Names of an adapter that no format knows, and what they mean."
    )
    @functools.wraps(command)
    def wrapped(allow_pickle: bool, allow_links: bool, scaling: float | None, names: str | None, **options: Any) -> Any:
        from loratool.api import Reading

        return command(reading=Reading(allow_pickle, allow_links, scaling, names), **options)

    return wrapped


_adapter = click.argument("adapter")
_adapters = click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
_base = click.argument("base")
_base_option = click.option("--base", metavar="BASE", help="The base model: a folder or a checkpoint file.")


def _no_stream(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """OUT, which is written at many places at once and so can be no pipe."""
    if value == "-":
        raise click.UsageError("OUT cannot be stdout: give a path (./- is a file of that name)", context)
    return value


_out = click.option(
    "--out", "-o", metavar="OUT", required=True, callback=_no_stream, help="Where to write; must not exist yet."
)
_strength = click.option(
    "--strength",
    "-s",
    type=float,
    metavar="S",
    multiple=True,
    help="One for each adapter, in their order.  [default: 1.0]",
)
_json = _flag("--json", help="One JSON document on stdout, nothing else there.")
_dry_run = _flag("--dry-run", help="Show the plan, every tensor; write nothing.")
_overwrite = _flag("--overwrite", help="Replace OUT where it exists.")
_allow_unmatched = _flag("--allow-unmatched", help="Go on without what has no target in BASE.")
_device = click.option(
    "--device", metavar="DEVICE", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)


def _only_cpu(context: click.Context, parameter: click.Parameter, value: str) -> None:
    if value not in ("auto", "cpu"):
        raise click.UsageError(f"{context.info_name} computes on the processor, not on {value}", context)


_cpu = click.option(
    "--device",
    metavar="DEVICE",
    default="auto",
    show_default=True,
    expose_value=False,
    callback=_only_cpu,
    help="auto or cpu: it computes on the processor.",
)
_dtype = click.option(
    "--dtype",
    type=click.Choice(("keep", "fp32", "fp16", "bf16")),
    default="keep",
    show_default=True,
    help="Store values so.",
)


_METHODS = ("linear", "svd", "ties", "dare", "dare_linear", "dare_ties", "magnitude_prune", "knots")
_to = click.option("--to", metavar="FORMAT", help="The format to write.  [default: the source's]")


class _Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes, or KB, MB, GB of 1000."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from loratool.ops.spectral import parse_size

        return parse_size(value) if isinstance(value, str) else int(value)


def _ranks(command: Command) -> Command:
    """How ranks are chosen."""
    for option in (
        click.option("--max-size", type=_Size(), help="Ranks that lose least for a file of this size, such as 50MB."),
        click.option("--error", type=float, metavar="F", help="The smallest rank with at most this relative error."),
        click.option(
            "--energy", type=float, metavar="F", help="The smallest rank that keeps this share of the energy."
        ),
        click.option("--rank", type=int, metavar="N", help="The rank; beside another choice, the cap."),
    ):
        option(command)
    return command


def _linear(command: Command) -> Command:
    """What add, subtract and combine have in common."""
    rank = click.option(
        "--rank",
        type=int,
        metavar="N",
        help="The best of this rank.  [default: exact sum; of other methods, each module's largest]",
    )
    loss = _flag("--allow-loss", help="Write what the format can say; list the rest.")
    strength = click.option(
        "--strength",
        "-s",
        "strengths",
        type=float,
        metavar="S",
        multiple=True,
        help="One for each adapter, in their order.  [default: 1.0]",
    )
    decorators = (
        _adapters,
        _out,
        strength,
        rank,
        _base_option,
        _to,
        _dtype,
        _cpu,
        loss,
        _overwrite,
        _dry_run,
        _json,
        _reads,
        _common,
    )
    return functools.reduce(lambda done, decorate: decorate(done), reversed(decorators), command)


# ---------------------------------------------------------------- commands


class _InOrder(click.Group):
    """Lists its commands in the order of their definition."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="loratool %(version)s")
def app() -> None:
    """Read, write, convert and merge LoRA-family adapters. Every tensor accounted for.

    BASE is a model: a folder (Hugging Face, diffusers) or one checkpoint file. ADAPTER is a folder or a file of any
    format; which one, its content tells. Both may be on the hub: org/name[@revision]. loratool COMMAND -h lists a
    command's options.
    """


def _command(name: str, summary: str, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A command with a line for the list of them, and one to copy."""
    return app.command(name, short_help=summary, epilog=f"Example: {example}")


@_command("inspect", "Show what an adapter holds, and what is odd.", "loratool inspect adapter/ --tensors")
@_adapter
@_flag("--tensors", help="List every target.")
@_flag("--norms", help="Also the size of each update (reads the factors).")
@_json
@_reads
@_common
def inspect_command(adapter: str, tensors: bool, norms: bool, json: bool, reading: Reading) -> None:
    """Show what an adapter holds: format, kinds, modules, ranks, scalings, what is odd. Headers only."""
    from loratool import api
    from loratool.show import show_inspection

    found = api.inspect(adapter, norms=norms, reading=reading)
    if json:
        _print_json(dataclasses.asdict(found))
    else:
        show_inspection(adapter, found, tensors or norms)
        _warn(found.warnings)


@_command("formats", "List every format.", "loratool formats --json")
@_json
@_common
def formats_command(json: bool) -> None:
    """List every format: what it is, what it can express."""
    from loratool import api
    from loratool.show import show_formats

    rows = api.list_formats()
    if json:
        _print_json([dataclasses.asdict(row) for row in rows])
    else:
        show_formats(rows)


@_command(
    "convert",
    "Convert an adapter to another format.",
    "loratool convert kohya.safetensors --to diffusers -o out.safetensors",
)
@_adapter
@_out
@click.option("--to", metavar="FORMAT", required=True, help="The format to write (see: loratool formats).")
@click.option("--from", "source_format", metavar="FORMAT", help="Read as this format.")
@_base_option
@click.option(
    "--layout",
    type=click.Choice(("transformers-4", "transformers-5")),
    help="Name modules, and stack experts, as that version does.",
)
@_flag("--uniform", help="One rank and one alpha for all modules: pad ranks, fold scalings.")
@_dtype
@_cpu
@_flag("--allow-loss", help="Write what the format can say; list the rest.")
@_allow_unmatched
@_overwrite
@_dry_run
@_json
@_reads
@_common
def convert_command(adapter: str, out: str, overwrite: bool, dry_run: bool, json: bool, **options: Any) -> None:
    """Convert an adapter to another format: the same updates under other names."""
    from loratool import api
    from loratool.show import show_conversion

    planned = api.plan_convert(adapter, out, overwrite=overwrite, **options)
    _explain(planned.adapter)
    if dry_run:
        _show_plan(planned.describe(), json)
        return
    report = api.run_convert(planned, overwrite=overwrite)
    if json:
        _print_json(dataclasses.asdict(report))
    else:
        show_conversion(report)
        _warn((*report.warnings, *(f"lost: {loss}" for loss in report.losses)))
        _warn(f"no target in the base: {name}" for name in report.unmatched)


@_command("check", "Tell whether an engine accepts an adapter.", "loratool check adapter/ --for vllm --max-rank 16")
@_adapter
@click.option("--for", "engine", metavar="ENGINE", required=True, help="vllm, sglang, llama.cpp, mlx, onnxruntime, ...")
@click.option("--max-rank", type=int, metavar="N", help="The largest rank that the engine is started with.")
@_base_option
@_json
@_reads
@_common
def check_command(adapter: str, json: bool, **options: Any) -> None:
    """Tell whether an engine accepts an adapter; for each no, the command that mends it.

    Engines: vllm, sglang, llama.cpp, mlx, onnxruntime, comfyui, diffusers. Exit code 5 where one would not accept it.
    """
    from loratool import api
    from loratool.show import show_check

    report = api.check(adapter, **options)
    if json:
        _print_json(dataclasses.asdict(report))
    else:
        show_check(report)
    if not report.accepted:
        raise SystemExit(5)


@_command("merge", "Merge adapters into a base model.", "loratool merge base/ style.safetensors -s 0.8 -o merged/")
@_base
@_adapters
@_out
@_strength
@_dtype
@_device
@click.option("--undo", metavar="FILE", help="Write what unmerge needs to restore BASE bit for bit.")
@_allow_unmatched
@_overwrite
@_dry_run
@_json
@_reads
@_common
def merge_command(
    base: str,
    adapters: Sequence[str],
    out: str,
    strength: Sequence[float],
    device: str,
    undo: str | None,
    overwrite: bool,
    dry_run: bool,
    json: bool,
    **options: Any,
) -> None:
    """Merge adapters into a base model: base + sum of strength x update, streamed, rounded once."""
    from loratool import api
    from loratool.devices import choose
    from loratool.ops.merge import check_outputs, describe, run_merge
    from loratool.show import show_merge

    planned = api.plan_merge(base, adapters, strength, **options)
    _explain(*planned.adapters)
    if dry_run:
        check_outputs(planned, out, undo, overwrite)
        _show_plan(describe(planned, out, choose(device, planned.plan.changed).name), json)
        return
    with _progress("merging") as progress:
        report = run_merge(planned, out, device=device, overwrite=overwrite, undo=undo, progress=progress)
    if json:
        _print_json(dataclasses.asdict(report))
    else:
        show_merge(report)
        _warn((*report.warnings, *(f"not applied: {name}" for name in report.unmatched)))


@_command(
    "unmerge",
    "Restore the base from a merged model, bit for bit.",
    "loratool unmerge merged/ --undo undo.safetensors -o base/",
)
@click.argument("merged")
@_out
@click.option("--undo", metavar="FILE", required=True, help="What merge --undo wrote.")
@_overwrite
@_dry_run
@_json
@_reads
@_common
def unmerge_command(merged: str, out: str, dry_run: bool, json: bool, **options: Any) -> None:
    """Restore the base that MERGED was made from, bit for bit; refuse any other model."""
    from loratool import api
    from loratool.show import show_unmerge

    if dry_run:
        _show_plan(api.plan_unmerge(merged, out, **options), json)
        return
    with _progress("unmerging") as progress:
        report = api.unmerge(merged, out, progress=progress, **options)
    if json:
        _print_json(dataclasses.asdict(report))
    else:
        show_unmerge(report)


@_command(
    "verify", "Prove that a model is the merge.", "loratool verify base/ style.safetensors -s 0.8 --merged merged/"
)
@_base
@_adapters
@click.option("--merged", metavar="MERGED", required=True, help="The merged model to prove.")
@_strength
@_dtype
@_device
@click.option(
    "--tolerance",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="Units of the last place that may differ.",
)
@_allow_unmatched
@_json
@_reads
@_common
def verify_command(base: str, adapters: Sequence[str], strength: Sequence[float], json: bool, **options: Any) -> None:
    """Prove that MERGED is BASE with the adapters: the merge replayed against it, tensor by tensor."""
    from loratool import api
    from loratool.ops.verify import require
    from loratool.show import show_verification

    with _progress("verifying") as progress:
        report = api.verify(base, *adapters, strengths=strength, progress=progress, **options)
    if json:
        _print_json(dataclasses.asdict(report))
    else:
        show_verification(report)
    require(report)


@_command("compare", "Tell how far two adapters are apart.", "loratool compare kohya.safetensors out.safetensors")
@click.argument("first")
@click.argument("second")
@_base_option
@_cpu
@_json
@_reads
@_common
def compare_command(first: str, second: str, json: bool, **options: Any) -> None:
    """Compare two adapters by their updates themselves, module by module, whatever their factors look like.

    The relative difference is ||FIRST - SECOND|| / ||FIRST|| in the Frobenius norm.
    """
    from loratool import api
    from loratool.show import show_comparison

    with _progress("comparing") as progress:
        found = api.compare(first, second, progress=progress, **options)
    if json:
        _print_json(dataclasses.asdict(found))
    else:
        show_comparison(found, _state.verbose)


@_command("extract", "Extract a LoRA from a full fine-tune.", "loratool extract base/ tuned/ --rank 16 -o adapter/")
@_base
@click.argument("tuned")
@_out
@_ranks
@click.option("--to", metavar="FORMAT", default="peft", show_default=True, help="The format to write.")
@click.option("--include", metavar="RE", help="Only modules in whose name it is found.")
@click.option("--exclude", metavar="RE", help="No modules in whose name it is found.")
@_dtype
@_device
@click.option("--seed", type=int, default=0, show_default=True, help="Of the randomised start.")
@_flag("--allow-loss", help="Write what the format can say; list the rest.")
@_overwrite
@_dry_run
@_json
@_reads
@_common
def extract_command(base: str, tuned: str, out: str, json: bool, **options: Any) -> None:
    """Extract the LoRA of TUNED - BASE by truncated SVD, and state its error.

    Merged into BASE it gives TUNED up to that error. Norms, biases and resized embeddings are carried whole.
    """
    from loratool import compute

    with _progress("extracting") as progress:
        report = compute.extract(base, tuned, out, progress=progress, **options)
    _computed(report, json)


@_command("resize", "Give an adapter another rank.", "loratool resize adapter/ --energy 0.95 -o smaller/")
@_adapter
@_out
@_ranks
@_base_option
@_to
@_dtype
@_cpu
@_flag("--allow-loss", help="Write what the format can say; list the rest.")
@_overwrite
@_dry_run
@_json
@_reads
@_common
def resize_command(adapter: str, out: str, json: bool, **options: Any) -> None:
    """Give an adapter another rank: the best in the Frobenius norm, from its factors alone."""
    from loratool import compute

    with _progress("resizing") as progress:
        report = compute.resize(adapter, out, progress=progress, **options)
    _computed(report, json)


@_command("add", "Add adapters.", "loratool add style/ detail/ -s 1 -s 0.5 -o both/")
@_linear
def add_command(adapters: Sequence[str], json: bool, **options: Any) -> None:
    """Add adapters: the linear sum of their updates, exact, or the best of --rank."""
    from loratool import compute

    with _progress("adding") as progress:
        report = compute.add(*adapters, progress=progress, **options)
    _computed(report, json)


@_command("subtract", "Subtract adapters from the first.", "loratool subtract both/ style/ -o rest/")
@_linear
def subtract_command(adapters: Sequence[str], json: bool, **options: Any) -> None:
    """Subtract adapters from the first, exactly, or the best of --rank."""
    from loratool import compute

    with _progress("subtracting") as progress:
        report = compute.subtract(*adapters, progress=progress, **options)
    _computed(report, json)


@_command(
    "combine",
    "Combine adapters: ties, dare, knots, ...",
    "loratool combine one/ two/ --method ties --density 0.5 -o both/",
)
@click.option(
    "--method",
    type=click.Choice(_METHODS),
    required=True,
    help="How; ties and dare as published.",
)
@click.option("--density", type=float, metavar="F", help="Share of the entries that is kept.  [default: 0.5]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of dare's choice of entries.")
@_linear
def combine_command(adapters: Sequence[str], json: bool, **options: Any) -> None:
    """Combine adapters on their true updates, however these are factored; written at --rank.

    linear: the sum, exact without --rank. svd: its best rank. magnitude_prune: the sum of the --density largest
    entries. ties: of these, the elected sign's mean. dare (also dare_linear), dare_ties: a random --density of the
    entries instead, rescaled. knots: ties in coordinates that the adapters share.
    """
    from loratool import compute

    with _progress("combining") as progress:
        report = compute.combine(*adapters, progress=progress, **options)
    _computed(report, json)


@_command("rank", "Tell which rank is needed.", "loratool rank base/ tuned/ --plot spectrum.html")
@click.argument("source", metavar="ADAPTER|BASE")
@click.argument("tuned", required=False)
@_ranks
@_base_option
@_cpu
@click.option("--plot", metavar="FILE", help="Draw it: FILE.png, FILE.svg or FILE.html (extra: plot).")
@_flag("--overwrite", help="Replace FILE where it exists.")
@_json
@_reads
@_common
def rank_command(source: str, tuned: str | None, json: bool, **options: Any) -> None:
    """Show the spectrum of an ADAPTER, or of TUNED - BASE: energy and error at each rank, a proposed rank."""
    from loratool import compute
    from loratool.show import show_ranks

    with _progress("measuring") as progress:
        report = compute.rank(source, tuned, progress=progress, **options)
    if json:
        _print_json(dataclasses.asdict(report))
    else:
        show_ranks(report)


@_command("export-onnx", "Export a merged ONNX graph.", "loratool export-onnx model.onnx adapter/ -o merged.onnx")
@_base
@_adapters
@_out
@_strength
@click.option("--mode", type=click.Choice(("fold", "branch", "inputs")), help="[default: fold; quantised: branch]")
@click.option("--base-weights", metavar="MODEL", help="The graph's checkpoint: find weights by value.")
@click.option("--verify/--no-verify", default=None, help="Run it in onnxruntime.  [default: where installed]")
@_device
@_allow_unmatched
@_overwrite
@_dry_run
@_json
@_reads
@_common
def export_onnx_command(base: str, adapters: Sequence[str], json: bool, **options: Any) -> None:
    """Export BASE, an .onnx file or a model folder, with the adapters in it; proven by running it.

    fold adds them to the weights; branch keeps them beside these; inputs makes them optional inputs, one
    .onnx_adapter file beside OUT for each ADAPTER.
    """
    from loratool import api
    from loratool.ops.export_onnx import check, describe, run_export
    from loratool.show import show_export

    run = {name: options.pop(name) for name in ("out", "verify", "device", "overwrite")}
    dry_run, strengths = options.pop("dry_run"), options.pop("strength")
    planned = api.plan_export_onnx(base, adapters, strengths, **options)
    _explain(*planned.adapters)
    if dry_run:
        check(planned, run["out"], run["overwrite"], run["verify"])
        _show_plan(describe(planned, run["out"]), json)
        return
    with _progress("exporting") as progress:
        report = run_export(planned, progress=progress, **run)
    if json:
        _print_json(dataclasses.asdict(report))
    else:
        show_export(report)
        _warn((*report.warnings, *(f"not applied: {name}" for name in report.unmatched)))


# ---------------------------------------------------------------- what they print, and how they end


def _computed(report: ComputeReport, json: bool) -> None:
    from loratool.show import show_computed

    if json:
        _print_json(dataclasses.asdict(report))
    else:
        show_computed(report)
        _warn((*report.warnings, *(f"lost: {loss}" for loss in report.losses)))


def _explain(*adapters: Adapter) -> None:
    """With ``-v``: what was read."""
    for adapter in adapters:
        if _state.verbose:
            _say(f"{adapter.metadata.path}: {adapter.metadata.format}, {len(adapter.modules()):,} modules")


def _show_plan(plan: Mapping[str, Any], json: bool) -> None:
    from loratool.show import show_plan

    if json:
        _print_json(plan)
    else:
        show_plan(plan)
        _warn((*plan["warnings"], *(f"would lose {loss}" for loss in plan.get("losses", ()))))


def _print_json(value: Any) -> None:
    print(jsonlib.dumps(_plain(value), indent=2, allow_nan=False, default=str))


def _plain(value: Any) -> Any:
    """A value that JSON can say: NaN and infinities become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(text: str) -> None:
    from loratool.show import printable

    if not _state.quiet:
        print(printable(text), file=sys.stderr)


def _warn(texts: Iterable[str]) -> None:
    for text in texts:
        _say(f"warning: {text}")


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """A bar on stderr where that is a terminal, else nothing."""
    if _state.quiet or not sys.stderr.isatty():
        yield _go_on
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        *(rich.TextColumn(what), rich.BarColumn(), rich.DownloadColumn()),
        *(rich.TransferSpeedColumn(), rich.TimeRemainingColumn()),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, visible=False)

        def advance(done: int, total: int) -> None:
            _go_on(done, total)
            bar.update(task, completed=done, total=total, visible=True)

        yield advance


def _fail(error: LoratoolError) -> NoReturn:
    """One line of what and where, one of what to do, and the exit code."""
    from loratool.show import printable

    lines = [f"error: {' '.join(str(error).split())}"]
    if len(error.items) > SHOWN:
        lines += [f"  {item}" for item in error.items]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    print(*map(printable, lines), sep="\n", file=sys.stderr)
    raise SystemExit(error.exit_code)


def _interrupted(*_: object) -> NoReturn:
    _state.stopped = True
    raise KeyboardInterrupt


def _unraisable(found: Any) -> None:
    """Say nothing of a signal that fell into a finaliser: `_go_on` sees to it."""
    if not issubclass(found.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(found)


def _go_on(done: int, total: int) -> None:
    """Stop after all where a signal fell into a finaliser, which Python does not let it leave."""
    if _state.stopped:
        raise KeyboardInterrupt


def _told(error: Exception) -> LoratoolError:
    """What went wrong, in the words of the contract."""
    if isinstance(error, LoratoolError):
        return error
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "loratool"
        return UsageError(error.format_message().rstrip("."), hint=f"see {command} --help")
    if isinstance(error, MemoryError):
        return LoratoolError("out of memory")
    if isinstance(error, OSError):
        return LoratoolError(os.strerror(error.errno) if error.errno else str(error), error.filename or "")
    return LoratoolError(
        f"a mistake in loratool itself: {type(error).__name__}: {error}",
        hint="please report it with what --debug shows",
    )


def _ready() -> None:
    """Signals that end a run in order, and streams that take whatever is said."""
    with suppress(ValueError):  # only the main thread may
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _interrupted)
        if signal.getsignal(_HANGUP) != signal.SIG_IGN:  # as nohup has it
            signal.signal(_HANGUP, _interrupted)
        sys.unraisablehook = _unraisable
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the caller; else the next file opened takes its number
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
    with suppress(AttributeError):  # a name that UTF-8 cannot say is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the contract's codes."""
    global _state
    _state = _State()
    argv = sys.argv[1:] if argv is None else argv
    _ready()
    try:
        if "" in argv:
            raise UsageError("an empty argument", f"loratool {shlex.join(argv)}", "a variable that is not set?")
        with warnings.catch_warnings(), app.make_context("loratool", list(argv)) as context:
            if not sys.warnoptions:  # what numpy and torch would warn of, the errors below say
                warnings.simplefilter("ignore")
            app.invoke(context)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        raise SystemExit(2) from None
    except click.exceptions.Exit as error:
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, click.Abort):
        print("interrupted: nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if _state.debug:
            import traceback

            traceback.print_exc()
        _fail(_told(error))


if __name__ == "__main__":
    main()
