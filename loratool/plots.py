"""Pictures of spectra, drawn with matplotlib (extra ``plot``): .png, .svg, or .html with the picture in it."""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import LoratoolError, UsageError
from loratool.files import prepare_output, staged

if TYPE_CHECKING:
    from loratool.ops.rank import RankReport, Spectrum

KINDS = ("png", "svg", "html")
_ROWS = 40  # modules that are drawn with a bar each; more are grouped by the last segment of their names


def prepare_plot(path: str | os.PathLike[str], overwrite: bool, inputs: Mapping[str, Path] | None = None) -> Path:
    """Check that a picture can be drawn and written there, before anything is computed.

    Raises UsageError for an unknown kind of file, LoratoolError where it exists or matplotlib is missing.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise UsageError("unknown kind of picture", os.fspath(path), "a name that ends in .png, .svg or .html")
    found = prepare_output(path, overwrite, inputs)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise LoratoolError("matplotlib is not installed", hint="pip install 'loratool[plot]'") from None
    return found


def plot_ranks(report: RankReport, path: Path, overwrite: bool = False) -> None:
    """Draw singular values, the energy at each rank, and the proposed ranks; the same report gives the same bytes."""
    kind = path.suffix.lower().removeprefix(".")
    with _style():
        data = _drawn(report.modules, "png" if kind == "png" else "svg")
    if kind == "html":
        data = _page(report, data.decode())
    with staged(path, overwrite) as temporary:
        temporary.write_bytes(data)


def _style() -> Any:
    """No display, no dates, no random ids, and names as they are written."""
    import matplotlib

    matplotlib.use("Agg")
    return matplotlib.rc_context({"svg.hashsalt": "loratool", "text.parse_math": False, "font.size": 9})


def _drawn(modules: Sequence[Spectrum], kind: str) -> bytes:
    from matplotlib.figure import Figure

    bars = _bars(modules)
    figure = Figure(figsize=(11, 4 + 0.18 * len(bars)), layout="constrained")
    top = figure.add_gridspec(2, 2, height_ratios=(3.5, 0.5 + 0.18 * len(bars)))
    spectra, energies, ranks = (figure.add_subplot(place) for place in (top[0, 0], top[0, 1], top[1, :]))
    _lines(spectra, energies, modules)
    ranks.barh([name for name, _ in bars], [rank for _, rank in bars], color="tab:blue")
    ranks.invert_yaxis()
    ranks.set_title("proposed rank" + ("" if len(bars) == len(modules) else ", mean of the modules of one name"))
    for row, (_, rank) in enumerate(bars):
        ranks.text(rank, row, f" {rank:g}", va="center")
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return file.getvalue()


def _lines(spectra: Any, energies: Any, modules: Sequence[Spectrum]) -> None:
    """One line a module, coloured by the last segment of its name."""
    from matplotlib import colormaps

    leaves = sorted({_leaf(m) for m in modules})
    for module in modules:
        colour = colormaps["tab10"](leaves.index(_leaf(module)) % 10)
        ranks = range(1, len(module.energy) + 1)
        style: dict[str, Any] = {"color": colour, "linewidth": 0.8, "marker": "." if len(ranks) < 2 else None}
        if module.singular_values and module.singular_values[0] > 0:
            spectra.plot(ranks, [max(v, 1e-30) for v in module.singular_values], **style)
            spectra.plot(
                module.proposed_rank, module.singular_values[module.proposed_rank - 1], "o", color=colour, ms=3
            )
        energies.plot(ranks, module.energy, **style)
    for leaf in leaves[:10]:
        energies.plot([], [], color=colormaps["tab10"](leaves.index(leaf)), label=leaf)
    for share in (0.9, 0.95, 0.99):
        energies.axhline(share, color="grey", linewidth=0.5, linestyle=":")
    spectra.set(title="singular values (dot: proposed rank)", xlabel="rank", xscale="log", yscale="log")
    largest = max((m.singular_values[0] for m in modules if m.singular_values), default=0.0)
    if largest > 0:
        spectra.set_ylim(1e-6 * largest, 2 * largest)
    energies.set(title="energy kept", xlabel="rank", xscale="log", ylim=(0, 1.02))
    if leaves:
        energies.legend(loc="lower right", fontsize="small")


def _leaf(module: Spectrum) -> str:
    """The last segment of a name that is no number."""
    return next((part for part in reversed(module.module.split(".")) if not part.isdigit()), module.module)


def _bars(modules: Sequence[Spectrum]) -> list[tuple[str, float]]:
    """What gets a bar, and how long it is."""
    if len(modules) <= _ROWS:
        return [(m.module, m.proposed_rank) for m in modules]
    groups: dict[str, list[int]] = {}
    for module in modules:
        groups.setdefault(_leaf(module), []).append(module.proposed_rank)
    return [(name, round(sum(ranks) / len(ranks), 1)) for name, ranks in list(groups.items())[:_ROWS]]


def _page(report: RankReport, picture: str) -> bytes:
    """A page that needs nothing else: the picture and a table."""
    inline = re.sub(r"^.*?(?=<svg)", "", picture, count=1, flags=re.DOTALL)
    rows = "\n".join(
        f"<tr><td>{html.escape(m.module)}<td>{'x'.join(map(str, m.shape))}<td>{m.stable_rank:.1f}"
        f"<td>{m.needed(0.9)}<td>{m.needed(0.95)}<td>{m.needed(0.99)}<td>{m.proposed_rank}"
        for m in report.modules
    )
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>loratool rank</title>
<style>body {{ font-family: sans-serif; margin: 2em }} td, th {{ padding: 0 1em 0 0; text-align: left }}
svg {{ max-width: 100%; height: auto }}</style></head><body>
<h1>Which rank is needed</h1>
<p>Proposed: {report.proposed_parameters:,} parameters, relative error {report.relative_error:.3g}.</p>
{inline}
<table><tr><th>module<th>shape<th>stable rank<th>90%<th>95%<th>99%<th>proposed</tr>
{rows}
</table></body></html>
"""
    return page.encode()
