"""How results look on a terminal. Called by the command line only; prints to stdout."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratool.api import ConvertReport, FormatRow
    from loratool.compute import ComputeReport
    from loratool.ops.check import CheckReport
    from loratool.ops.compare import Comparison
    from loratool.ops.export_onnx import ExportReport
    from loratool.ops.inspect import Inspection, Target
    from loratool.ops.merge import MergeReport
    from loratool.ops.rank import RankReport
    from loratool.ops.unmerge import UnmergeReport
    from loratool.ops.verify import VerifyReport

_ABRIDGED = 24  # rows of a long list on a terminal


def printable(text: str) -> str:
    """Text without control characters, which a hostile file could steer the terminal with."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def bold(text: str) -> str:
    """Text that stands out, on a terminal that can and may."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Aligned lines of name and value."""
    rows = [(name, printable(str(value))) for name, value in pairs if value not in (None, "", ())]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(_hanging(f"  {name:<{width}}  ", value))


def _columns() -> int:
    """The width of the terminal; no bound where there is none."""
    return max(40, shutil.get_terminal_size((100, 24)).columns) if sys.stdout.isatty() else 1 << 30


def _hanging(begin: str, text: str) -> str:
    """Text that goes on below itself where a line ends; a word is never broken, so that paths can be copied."""
    if len(begin) + len(text) <= _columns():
        return begin + text
    lines = textwrap.wrap(text, _columns() - len(begin), break_long_words=False, break_on_hyphens=False)
    return begin + f"\n{' ' * len(begin)}".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, without the empty ones; on a terminal a long list is abridged, and fits the line."""
    shown = [[printable(cell) for cell in row] for row in rows]
    cut = len(shown) - _ABRIDGED if sys.stdout.isatty() and len(shown) > _ABRIDGED + 4 else 0
    shown = shown[:_ABRIDGED] if cut else shown
    columns = [(title, *cells) for title, *cells in zip(head, *shown, strict=True) if any(cells) or not shown]
    widths = _fitting([max(map(len, column)) for column in columns])
    for n, row in enumerate(zip(*columns, strict=True)):
        line = "  ".join(f"{_cut(cell, width):<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        print("  " + (bold(line) if n == 0 else line))
    if cut:
        print(f"  ... and {cut:,} more (all of them when piped, or with --json)")


def _fitting(widths: list[int]) -> list[int]:
    """Widths of columns for which the line has room: the widest give way."""
    room = _columns() - 2 * len(widths)
    while sum(widths) > room and max(widths) > 12:
        widths[widths.index(max(widths))] -= 1
    return widths


def _cut(cell: str, room: int) -> str:
    """As much of a cell as there is room for: of a name the end, of a text the beginning."""
    if len(cell) <= room:
        return cell
    return f"{cell[: room - 1]}…" if " " in cell else f"…{cell[1 - room :]}"


def counts(values: Mapping[str, int]) -> str:
    """``8 x 96, 16 x 2``: how often each value occurs; alone where there is one."""
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} x {count:,}" for value, count in values.items())


def show_inspection(path: str, found: Inspection, targets: bool) -> None:
    """The facts of one adapter."""
    print(bold(printable(path)))
    lows = [t for t in found.targets if t.rank is not None]
    facts(
        (
            ("format", found.format),
            ("architecture", found.architecture),
            ("base model", found.base_model),
            (
                "modules",
                f"{found.modules:,} ({', '.join(f'{k} {n:,}' for k, n in found.kinds.items()) or 'none'})",
            ),
            ("rank", counts(found.ranks)),
            ("alpha", _spread([t.alpha for t in lows])),
            ("scaling", _spread([t.scaling for t in lows])),
            (
                "carried",
                f"{len(found.carried):,} whole tensors: {_some(found.carried)}" if found.carried else "",
            ),
            ("dtype", counts(found.dtypes)),
            ("parameters", f"{found.parameters:,}"),
            ("size", size(found.bytes)),
            ("trained for", _some(_leaves(found.targets))),
        )
    )
    if targets:
        print()
        table(
            ("module", "kind", "rank", "scaling", "shape", "dtype", "norm"),
            [_target_row(t) for t in found.targets],
        )


def _target_row(target: Target) -> tuple[str, ...]:
    scaling = "unknown" if target.scaling is None else f"{target.scaling:g}"
    norm = "" if target.norm is None else f"{target.norm:.4g}"
    shape = "x".join(map(str, target.shape))
    return target.module, target.kind, str(target.rank or "-"), scaling, shape, target.dtype, norm


def _leaves(targets: Sequence[Target]) -> list[str]:
    """The last segments of the modules' names, a number with what stands before it."""
    names = (t.module.removesuffix(".bias").split(".") for t in targets)
    return sorted({".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1] for parts in names})


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


def _spread(values: Sequence[float | None]) -> str:
    """One value, or the range."""
    if None in values:
        return "unknown" if all(v is None for v in values) else "partly unknown"
    known = sorted({v for v in values if v is not None})
    if not known:
        return ""
    return f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g} to {known[-1]:g} ({len(known)} values)"


def show_formats(rows: Sequence[FormatRow]) -> None:
    """The table of formats: a line each, on a terminal wrapped to its width."""
    if not sys.stdout.isatty():
        cells = [(r.name, _yes(r.reads), _yes(r.writes), ", ".join(r.kinds), r.title) for r in rows]
        table(("format", "reads", "writes", "kinds", "what"), cells)
        return
    every = {kind for row in rows for kind in row.detail}
    width = min(120, max(72, shutil.get_terminal_size((100, 24)).columns))
    name = max(len(row.name) for row in rows)
    left = width - name - 14  # without the names, "writes" and the space between
    what = min(44, left // 2)
    print("  " + bold(f"{'format':<{name}}  writes  {'what':<{what}}  kinds"))
    for row in rows:
        title, kinds = row.title.removesuffix(", read only"), _kinds(row, every)
        parts = zip_longest(textwrap.wrap(title, what), textwrap.wrap(kinds, left - what), fillvalue="")
        for n, (one, other) in enumerate(parts):
            begin = f"{row.name:<{name}}  {_yes(row.writes):<6}" if n == 0 else " " * (name + 8)
            print(f"  {begin}  {one:<{what}}  {other}".rstrip())
    print()
    for note in _NOTES:
        print(textwrap.fill(note, width, initial_indent="  ", subsequent_indent="  "))


_NOTES = (
    "All are read. kinds: those that a format has words for; others are written where they are exactly one of these "
    "(a LoHa is a LoRA of higher rank), else refused. --json and the README tell of each kind.",
    "--map FILE reads one more: names of your own.",
)


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _kinds(row: FormatRow, every: set[str]) -> str:
    return "all of these" if set(row.kinds) == every else ", ".join(row.kinds)


def show_conversion(report: ConvertReport) -> None:
    """What a conversion wrote."""
    print(f"wrote {bold(printable(report.output))}")
    facts(
        (
            ("format", f"{report.source_format} -> {report.format}"),
            ("modules", f"{report.modules:,}" + (f" ({len(report.losses):,} parts lost)" if report.losses else "")),
            ("written", size(report.bytes_written)),
            ("content", report.content_hash[:16]),
        )
    )


def show_merge(report: MergeReport) -> None:
    """What a merge wrote."""
    print(f"merged into {bold(printable(report.output))}")
    missed = report.rounding_error
    facts(
        (
            ("modules", f"{report.modules:,} applied"),
            (
                "tensors",
                f"{report.tensors_changed:,} changed, {report.tensors_copied:,} copied byte for byte",
            ),
            (
                "written",
                f"{size(report.bytes_written)} in {report.seconds:.2f} s, {size(report.peak_bytes)} of memory",
            ),
            ("rounding", f"{report.lost_to_rounding:.2%} of the changes too small for the stored dtype"),
            *(() if missed is None else (("8 bits", f"rounding misses {missed:.1%} of the change (Frobenius)"),)),
            ("content", report.content_hash[:16]),
            *((("undo", printable(report.undo)),) if report.undo else ()),
        )
    )


def show_export(report: ExportReport) -> None:
    """What an export wrote, and whether it was proven."""
    print(f"exported {bold(printable(report.output))} ({report.mode})")
    ways = Counter(entry["resolver"] for entry in report.resolved.values())
    proof = "not run"
    if report.max_effect is not None:
        ran = ", ".join(report.providers)
        proof = f"{'proven' if report.verified else 'no visible effect'} in onnxruntime ({ran}): "
        proof += f"changes outputs by up to {report.max_effect:.3g}, {report.max_abs_diff:.2g} from side branches"
    facts(
        (
            ("modules", f"{report.modules:,} applied; found by {counts(ways)}"),
            ("adapters", ", ".join(map(printable, report.adapters))),
            ("data", printable(report.external_data or "")),
            (
                "written",
                f"{size(report.bytes_written)} in {report.seconds:.2f} s, {size(report.peak_bytes)} of memory",
            ),
            ("rounding", f"{report.lost_to_rounding:.2%} of the changes too small for the stored dtype"),
            ("verified", proof),
        )
    )


def show_check(report: CheckReport) -> None:
    """What an engine says to an adapter, and what to do about each no."""
    verdict = "accepts" if report.accepted else "does not accept"
    print(f"{bold(report.engine)} {verdict} {printable(report.adapter)}")
    table(("", "rule", "found"), [("yes" if c.ok else "no", c.rule, c.found) for c in report.checks])
    for fix in dict.fromkeys(c.fix for c in report.checks if c.fix):
        print(f"  try: {printable(fix)}")
    for note in report.warnings:
        print(f"  note: {printable(note)}")


def show_unmerge(report: UnmergeReport) -> None:
    """What an unmerge wrote."""
    print(f"restored {bold(printable(report.output))}, bit for bit")
    facts(
        (
            (
                "tensors",
                f"{report.tensors_restored:,} restored, {report.tensors_copied:,} copied byte for byte",
            ),
            (
                "written",
                f"{size(report.bytes_written)} in {report.seconds:.2f} s, {size(report.peak_bytes)} of memory",
            ),
            ("content", report.content_hash[:16]),
        )
    )


def show_verification(report: VerifyReport) -> None:
    """Whether a merged model was proven."""
    if report.ok:
        tensors = report.tensors_changed + report.tensors_copied
        print(f"verified {bold(printable(report.output))}: all {tensors:,} tensors are as the merge gives them")
        return
    print(f"{bold(printable(report.output))} is not the merge:")
    table(("tensor", "why"), [(failure.module, failure.why) for failure in report.failures])


def show_comparison(found: Comparison, every: bool) -> None:
    """How far two adapters are apart."""
    facts(
        (
            ("relative difference", f"{found.relative_difference:.3g}"),
            ("cosine", f"{found.cosine:.6f}"),
            ("modules compared", f"{len(found.modules):,}"),
            ("only in the first", _some(found.only_in_first)),
            ("only in the second", _some(found.only_in_second)),
            ("not counted without --base", _some(found.not_counted)),
        )
    )
    ranked = sorted(found.modules, key=lambda d: -d.relative_difference)
    rows = [d for d in ranked if every or d.relative_difference > 1e-6]
    if rows:
        print()
        table(
            ("module", "difference", "cosine"),
            [(d.module, f"{d.relative_difference:.3g}", f"{d.cosine:.6f}") for d in rows],
        )


def show_plan(plan: Mapping[str, Any]) -> None:
    """Every tensor of a plan, then the sums."""
    rows = [
        (t["name"], t["action"], t["dtype"], "x".join(map(str, t["shape"])), ", ".join(t.get("modules", ())))
        for t in plan["tensors"]
    ]
    converting = "source_format" in plan
    table(
        ("module", "tensor", "dtype", "shape", "") if converting else ("tensor", "action", "dtype", "shape", "by"), rows
    )
    print()
    facts((title, text) for title, key, say in _PLAN if key in plan and (text := say(plan)))


_Say = Callable[[Mapping[str, Any]], str]
_PLAN: tuple[tuple[str, str, _Say], ...] = (  # what is said of a plan that has the key
    ("output", "output", lambda plan: str(plan["output"])),
    ("modules", "modules", lambda plan: f"{plan['modules']:,}"),
    ("changed", "tensors_changed", lambda plan: f"{plan['tensors_changed']:,} tensors"),
    ("restored", "tensors_restored", lambda plan: f"{plan['tensors_restored']:,} tensors"),
    ("copied", "files", lambda plan: f"{plan['tensors_copied']:,} tensors, {len(plan['files'])} other files"),
    ("arithmetic", "device", lambda plan: f"{plan['device']}, {plan['threads']} threads"),
    ("format", "source_format", lambda plan: f"{plan['source_format']} -> {plan['format']}"),
    ("unmatched", "unmatched", lambda plan: _some(plan["unmatched"])),
    ("to read", "bytes_to_read", lambda plan: size(plan["bytes_to_read"])),
    ("to write", "bytes_to_write", lambda plan: size(plan["bytes_to_write"])),
    ("disk needed", "disk_needed", lambda plan: size(plan["disk_needed"])),
    ("memory", "peak_memory", lambda plan: f"{size(plan['peak_memory'])} for blocks and factors"),
)


def show_computed(report: ComputeReport) -> None:
    """What a computed adapter is, and how far it is from what was asked."""
    print(f"{'would write' if report.dry_run else 'wrote'} {bold(printable(report.output))} ({report.format})")
    facts(
        (
            ("modules", f"{sum(report.ranks.values()):,}"),
            ("rank", counts(report.ranks) if report.ranks else ""),
            ("carried", f"{len(report.carried):,} whole tensors: {_some(report.carried)}" if report.carried else ""),
            ("parameters", f"{report.parameters:,}"),
            ("size", size(report.bytes)),
            (
                "error",
                f"{report.relative_error:.3g} of the whole ({1 - report.relative_error**2:.4%} of the energy kept)",
            ),
        )
    )
    if any(m.relative_error > 1e-6 for m in report.modules):
        print()
        worst = sorted(report.modules, key=lambda m: -m.relative_error)
        shares = list(dict.fromkeys(share for m in worst for share in getattr(m, "needed", ())))
        rows = [
            (m.module, str(m.rank), f"{m.relative_error:.3g}", f"{m.energy:.2%}", *_needed(m, shares)) for m in worst
        ]
        if shares:
            whole = (f"{report.relative_error:.3g}", f"{1 - report.relative_error**2:.2%}")
            rows.append(("all", "", *whole, *_ranks(report.details.get("needed", {}), shares, "")))
        table(("module", "rank", "error", "energy", *shares), rows)
        if shares:
            print(f"\n  {', '.join(shares)}: the rank that keeps so much of the energy, where it is known")


def _needed(module: Any, shares: Sequence[str]) -> list[str]:
    """The ranks that an extracted module needs; ``>16`` where it is more than what was computed."""
    return _ranks(getattr(module, "needed", {}), shares, f">{module.rank}")


def _ranks(needed: Any, shares: Sequence[str], unknown: str) -> list[str]:
    return [unknown if needed.get(share) is None else str(needed[share]) for share in shares]


_SHARES = (0.90, 0.95, 0.99)


def show_ranks(report: RankReport) -> None:
    """The spectrum of each module as bars, the ranks that keep 90, 95 and 99 percent, and the proposal."""
    rows = [
        (
            m.module,
            spark(m.singular_values),
            f"{m.stable_rank:.1f}",
            *(str(m.needed(share)) for share in _SHARES),
            str(m.proposed_rank),
        )
        for m in report.modules
    ]
    table(("module", "spectrum", "stable", *(f"{share:.0%}" for share in _SHARES), "proposed"), rows)
    print()
    proposed = f"{report.proposed_parameters:,} parameters, error {report.relative_error:.3g} of the whole"
    facts((("proposed", proposed),))


def spark(values: Sequence[float], width: int = 16) -> str:
    """Descending values as a line of bars, relative to the first; of many, those at ranks that grow by a factor."""
    if not values or values[0] <= 0:
        return ""
    steps = (round(len(values) ** (n / (width - 1))) - 1 for n in range(width))
    picked = [values[n] for n in steps] if len(values) > width else list(values)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * value / values[0]))] for value in picked)
