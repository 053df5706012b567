"""The command line: options, progress, exit codes. The only file that prints, exits or draws."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from loratool import __version__
from loratool.errors import LoratoolError, LossError, UsageError

if TYPE_CHECKING:
    from loratool.api import Reading
    from loratool.ops.merge import Merge, Progress

app = typer.Typer(
    name="loratool",
    help="Read, write, convert and merge LoRA-family adapters. Every tensor accounted for.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclasses.dataclass
class _State:
    """What the options common to all commands set."""

    debug: bool = False
    quiet: bool = False
    verbose: bool = False


_state = _State()


def _set(name: str) -> Callable[[bool], bool]:
    def callback(value: bool) -> bool:
        if value:
            setattr(_state, name, True)
        return value

    return callback


Adapters = Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Adapter folders or files.")]
AdapterArg = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter folder or file.")]
BaseArg = Annotated[str, typer.Argument(metavar="BASE", help="The base model: a folder or a checkpoint file.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Where to write; must not exist yet.")]
Strength = Annotated[
    list[float] | None,
    typer.Option("--strength", "-s", help="One for each adapter, in their order. [default: 1.0]", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan, every tensor; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")]
Unmatched = Annotated[bool, typer.Option("--allow-unmatched", help="Go on without what has no target in BASE.")]
AllowLoss = Annotated[bool, typer.Option("--allow-loss", help="Write what the format can say; list the rest.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
DTypeOption = Annotated[str, typer.Option("--dtype", help="Store as keep, fp32, fp16 or bf16.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickles (.bin, .pt), their tensors only.")]
Links = Annotated[bool, typer.Option("--allow-links", help="Follow links that leave a model's folder.")]
Scaling = Annotated[
    float | None,
    typer.Option("--scaling", help="alpha/rank, where a file does not tell.", show_default=False),
]
Debug = Annotated[bool, typer.Option("--debug", callback=_set("debug"), help="Show tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_set("quiet"), help="No messages.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", callback=_set("verbose"), help="More messages.")]
BaseOption = Annotated[str | None, typer.Option("--base", metavar="BASE", help="The base model.", show_default=False)]


def _version(value: bool) -> None:
    if value:
        print(f"loratool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command("inspect")
def inspect_command(
    adapter: AdapterArg,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every target.")] = False,
    norms: Annotated[bool, typer.Option("--norms", help="Also the size of each update (reads the factors).")] = False,
    json: Json = False,
    allow_pickle: Pickle = False,
    allow_links: Links = False,
    scaling: Scaling = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what an adapter holds: format, kinds, modules, ranks, scalings, what is odd. Headers only."""
    from loratool import api
    from loratool.show import show_inspection

    found = api.inspect(adapter, norms=norms, reading=_reading(allow_pickle, allow_links, scaling))
    if json:
        _print_json(dataclasses.asdict(found))
    else:
        show_inspection(adapter, found, tensors or norms)
        _warn(found.warnings)


@app.command("formats")
def formats_command(json: Json = False, debug: Debug = False) -> None:
    """List every format: what it is, what it can express."""
    from loratool import api
    from loratool.show import show_formats

    rows = api.list_formats()
    if json:
        _print_json([dataclasses.asdict(row) for row in rows])
    else:
        show_formats(rows)


@app.command("convert")
def convert_command(
    adapter: AdapterArg,
    out: Out,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="The format to write (see: loratool formats).")],
    source_format: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="Read as this format.", show_default=False)
    ] = None,
    base: BaseOption = None,
    dtype: DTypeOption = "keep",
    allow_loss: AllowLoss = False,
    allow_unmatched: Unmatched = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    allow_pickle: Pickle = False,
    allow_links: Links = False,
    scaling: Scaling = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert an adapter to another format: the same updates under other names."""
    from loratool import api
    from loratool.show import show_conversion

    report = api.convert(
        adapter,
        out,
        to=to,
        source_format=source_format,
        base=base,
        dtype=dtype,
        allow_loss=allow_loss,
        allow_unmatched=allow_unmatched,
        overwrite=overwrite,
        dry_run=dry_run,
        reading=_reading(allow_pickle, allow_links, scaling),
    )
    if json:
        _print_json(dataclasses.asdict(report))
    else:
        show_conversion(report, dry_run)
        _warn((*report.warnings, *(f"lost: {loss}" for loss in report.losses)))


@app.command("merge")
def merge_command(
    base: BaseArg,
    adapters: Adapters,
    out: Out,
    strength: Strength = None,
    dtype: DTypeOption = "keep",
    device: Device = "auto",
    allow_unmatched: Unmatched = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    allow_pickle: Pickle = False,
    allow_links: Links = False,
    scaling: Scaling = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge adapters into a base model: base + sum of strength x update, streamed, rounded once."""
    from loratool import api
    from loratool.ops.merge import run_merge
    from loratool.show import show_merge

    reading = _reading(allow_pickle, allow_links, scaling)
    planned = api.plan_merge(
        base, adapters, strength, dtype=dtype, allow_unmatched=allow_unmatched, reading=reading
    )
    if dry_run:
        _show_plan(planned, out, overwrite, device, json)
        return
    with _progress("merging", json) as progress:
        report = run_merge(planned, out, device=device, overwrite=overwrite, progress=progress)
    if json:
        _print_json(dataclasses.asdict(report))
    else:
        show_merge(report)
        _warn((*report.warnings, *(f"not applied: {name}" for name in report.unmatched)))


@app.command("verify")
def verify_command(
    base: BaseArg,
    adapters: Adapters,
    merged: Annotated[str, typer.Option("--merged", metavar="MERGED", help="The merged model to prove.")],
    strength: Strength = None,
    dtype: DTypeOption = "keep",
    device: Device = "auto",
    tolerance: Annotated[int, typer.Option(min=0, help="Units of the last place that may differ.")] = 0,
    allow_unmatched: Unmatched = False,
    json: Json = False,
    allow_pickle: Pickle = False,
    allow_links: Links = False,
    scaling: Scaling = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove that MERGED is BASE with the adapters: the merge replayed against it, tensor by tensor."""
    from loratool import api
    from loratool.ops.verify import require
    from loratool.show import show_verification

    with _progress("verifying", json) as progress:
        report = api.verify(
            base,
            adapters,
            merged=merged,
            strengths=strength,
            dtype=dtype,
            device=device,
            tolerance=tolerance,
            allow_unmatched=allow_unmatched,
            reading=_reading(allow_pickle, allow_links, scaling),
            progress=progress,
        )
    if json:
        _print_json(dataclasses.asdict(report))
    else:
        show_verification(report)
    require(report)


@app.command("compare")
def compare_command(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="An adapter.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="Another adapter, of any format.")],
    base: BaseOption = None,
    json: Json = False,
    allow_pickle: Pickle = False,
    allow_links: Links = False,
    scaling: Scaling = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare two adapters by their updates themselves, module by module, whatever their factors look like."""
    from loratool import api
    from loratool.show import show_comparison

    found = api.compare(first, second, base=base, reading=_reading(allow_pickle, allow_links, scaling))
    if json:
        _print_json(dataclasses.asdict(found))
    else:
        show_comparison(found, _state.verbose)


def _reading(allow_pickle: bool, allow_links: bool, scaling: float | None) -> Reading:
    from loratool.api import Reading

    return Reading(allow_pickle, allow_links, scaling)


def _show_plan(planned: Merge, out: Path, overwrite: bool, device: str, json: bool) -> None:
    """The plan of a merge, after every check that the real run makes."""
    from loratool.devices import choose
    from loratool.ops.merge import check_output, describe
    from loratool.show import show_plan

    check_output(planned, out, overwrite)
    chosen = choose(device, planned.plan.changed)
    plan = describe(planned, out, chosen.name)
    if json:
        _print_json(plan)
    else:
        show_plan(plan)
        _warn(planned.plan.warnings)


def _print_json(value: Any) -> None:
    print(jsonlib.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False, default=str))


def _plain(value: Any) -> Any:
    """A value that JSON can say: NaN and infinities become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(text: str) -> None:
    if not _state.quiet:
        print(text, file=sys.stderr)


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        _say(f"warning: {warning}")


@contextmanager
def _progress(what: str, json: bool) -> Iterator[Progress | None]:
    """A bar on stderr where that is a terminal, else nothing."""
    if _state.quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _fail(error: LoratoolError) -> NoReturn:
    """One line of what and where, one of what to do, and the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    if isinstance(error, LossError):
        for loss in error.losses:
            print(f"  would lose {loss}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    raise SystemExit(error.exit_code)


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the contract's codes."""
    import click

    signal.signal(signal.SIGTERM, _interrupted)
    try:
        app(args=list(argv) if argv is not None else None, standalone_mode=False, prog_name="loratool")
        sys.stdout.flush()
    except LoratoolError as error:
        if _state.debug:
            raise
        _fail(error)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        raise SystemExit(2) from None
    except click.exceptions.Exit as error:
        raise SystemExit(error.exit_code) from None
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "loratool"
        _fail(UsageError(error.format_message().rstrip("."), hint=f"see {command} --help"))
    except (KeyboardInterrupt, click.Abort):
        print("interrupted: nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except MemoryError:
        _fail(LoratoolError("out of memory"))
    except OSError as error:
        if _state.debug:
            raise
        where = error.filename or ""
        _fail(LoratoolError(os.strerror(error.errno) if error.errno else str(error), where))


if __name__ == "__main__":
    main()
