"""Tables of modules as text: one line a stored module, read both ways.

A line has three or four columns::

    double_blocks.#d.img_attn.qkv   transformer_blocks.#d.attn.{to_q,to_k,to_v}   hxh+
    final_layer.adaLN_modulation.1  ~norm_out.linear                              2hxh+
    guidance_in.in_layer            time_text_embed.guidance_embedder.linear_1    hx256+   guidance

The first is the name in the original repository (``=``: that of the second column), the second the reference name or
names, the third the shape of the reference's weight. ``{a,b}`` are alternatives: as many in both columns are pairs,
more in the second are one stored module whose rows they share, in that order. ``#d`` is a block's number, ``d`` being
the letter under which a size tells how many there are; any number is read. ``~``: the halves of the rows are swapped.
Axes are numbers, letters of a size, or multiples (``6h``); ``+`` stands where there is a bias; several references may
have shapes of their own, with commas between. ``name:scale`` says that the stored parameter is not called ``weight``,
``name:`` that the name is that of a parameter. The fourth column names what only some sizes have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import gcd
from typing import NamedTuple

from loratool.architectures.base import Ranges, Shape, flat

_INDEX = re.compile(r"#[a-z]?")
_NUMBER = re.compile(r"(?<![^_])(?:0|[1-9][0-9]{0,8})(?![^_])")  # as they are written: 007 is no 7
_BRACES = re.compile(r"\{([^{}]*)\}")
_AXIS = re.compile(r"(\d*)([a-wyz]?)$")

Numbers = tuple[int, ...]


class Axis(NamedTuple):
    """One axis of a shape: ``factor`` times the width that a size has under ``letter``, or just ``factor``."""

    factor: int
    letter: str

    def of(self, widths: Mapping[str, int]) -> int:
        return self.factor * (widths[self.letter] if self.letter else 1)


@dataclass(frozen=True)
class Size:
    """A published model: widths by letter, numbers of blocks by ``#letter``, and what it has that others lack."""

    name: str
    widths: Mapping[str, int]
    blocks: Mapping[str, int | range] = field(default_factory=dict)
    features: frozenset[str] = frozenset()

    def numbers(self, letter: str) -> range:
        """The numbers of the blocks under a letter."""
        count = self.blocks[letter]
        return range(count) if isinstance(count, int) else count


class Part(NamedTuple):
    """A reference module among those that share a stored module's rows."""

    reference: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Line:
    """One stored module, with ``#`` for the numbers of blocks, and the reference modules that its rows are."""

    native: str
    parts: tuple[Part, ...]
    bias: bool = False
    parameter: str = "weight"
    swapped: bool = False
    feature: str = ""

    @cached_property
    def letters(self) -> tuple[str, ...]:
        """The letters of its blocks' numbers."""
        return tuple(_INDEX.findall(self.parts[0].reference))

    @property
    def whole(self) -> bool:
        """Whether its rows are those of one module, in their order."""
        return len(self.parts) == 1 and not self.swapped

    def ranges(self, stored: Shape, usual: Mapping[str, int]) -> tuple[Ranges, ...] | None:
        """The rows of each part, where the stored weight has shape ``stored``; None where it has no such parts (or none
        at all: a scalar counts as one row).

        Parts as high as the weight is wide are so here; the others share the rest. Where that does not come out (or
        the width is not known), the proportions are those of the ``usual`` widths.
        """
        if self.whole:
            return (((0, stored[0] if stored else 1),),)
        if not stored:
            return None
        if self.swapped:
            half = stored[0] // 2
            return (((half, stored[0]), (0, half)),) if stored[0] % 2 == 0 else None
        edges, found = 0, []
        heights = self._heights(stored, usual)
        for height in heights or ():
            found.append(((edges, edges + height),))
            edges += height
        return tuple(found) or None

    def _heights(self, stored: Shape, usual: Mapping[str, int]) -> tuple[int, ...] | None:
        rows = [part.axes[0] for part in self.parts]
        if len(set(rows)) == 1:
            return (stored[0] // len(rows),) * len(rows) if stored[0] % len(rows) == 0 else None
        if len(stored) > 1:
            wide = self.parts[0].axes[1]
            known = sum(axis == wide for axis in rows) * stored[1]
            others = [axis for axis in rows if axis != wide]
            if known and len(set(others)) == 1 and stored[0] > known and (stored[0] - known) % len(others) == 0:
                height = (stored[0] - known) // len(others)
                return tuple(stored[1] if axis == wide else height for axis in rows)
        heights = [axis.of(usual) for axis in rows]
        unit = gcd(*heights)
        units = sum(heights) // unit
        return tuple(h // unit * (stored[0] // units) for h in heights) if stored[0] % units == 0 else None

    def missing(self, known: Sequence[Shape | None], usual: Mapping[str, int]) -> tuple[int, ...] | None:
        """The heights of all parts, where the shapes of some are known; None where these do not tell the others'."""
        rows = [part.axes[0] for part in self.parts]
        heights = {axis: shape[0] for axis, shape in zip(rows, known, strict=True) if shape}
        for shape in known:
            if shape and len(shape) > 1 and len(self.parts[0].axes) > 1:
                heights.setdefault(self.parts[0].axes[1], shape[1])
        for axis, height in list(heights.items()):
            for other in rows:
                if height * other.of(usual) % axis.of(usual) == 0:
                    heights.setdefault(other, height * other.of(usual) // axis.of(usual))
        found = [shape[0] if shape else heights.get(axis) for axis, shape in zip(rows, known, strict=True)]
        return None if None in found else tuple(height for height in found if height is not None)

    def agrees(self, stored: Shape) -> bool:
        """Whether a shape, stored or of a part, has the line's proportions, where these do not depend on the size."""
        rows, wide = [part.axes[0] for part in self.parts], self.parts[0].axes[1:2]
        if len(stored) < 2 or not wide or {axis.letter for axis in (*rows, *wide)} != {wide[0].letter}:
            return True
        return stored[0] * wide[0].factor in {stored[1] * n for n in (rows[0].factor, sum(r.factor for r in rows))}

    def shape(self, part: Part, widths: Mapping[str, int]) -> Shape:
        """The shape of a part's weight."""
        return tuple(axis.of(widths) for axis in part.axes)

    def stored_shape(self, widths: Mapping[str, int]) -> Shape:
        """The shape of the stored weight."""
        first = self.shape(self.parts[0], widths)
        return (sum(part.axes[0].of(widths) for part in self.parts), *first[1:])


def filled(template: str, numbers: Sequence[int]) -> str:
    """A template with numbers in the places of its ``#``."""
    rest = iter(numbers)
    return _INDEX.sub(lambda _: str(next(rest)), template) if numbers else template


def table(text: str, **also: str) -> Table:
    """A table and its further spellings."""
    return Table(text, also)


def _lines(text: str, known: Mapping[str, tuple[tuple[Axis, ...], Line]] | None = None) -> Iterator[Line]:
    for row in text.strip().splitlines():
        cells = row.split()
        if cells and len(cells) not in ((2,) if known else (3, 4)):
            raise ValueError(f"a table's line has other columns: {row!r}")
        if cells:
            yield from _line(known or {}, *cells)


def _line(
    known: Mapping[str, tuple[tuple[Axis, ...], Line]], native: str, reference: str, shape: str = "", feature: str = ""
) -> Iterator[Line]:
    swapped, reference = reference.startswith("~"), reference.removeprefix("~")
    natives, references = expanded(reference if native == "=" else native), expanded(reference)
    each, more = divmod(len(references), len(natives))
    shapes = [_axes(axes) for axes in shape.removesuffix("+").split(",")]
    if more or not each or len(shapes) not in (1, each):
        raise ValueError(f"{native!r} and {reference!r} do not go together")
    for n, name in enumerate(natives):
        group = [r.partition(":")[0] for r in references[n * each : (n + 1) * each]]
        name, colon, parameter = name.partition(":")
        if known:
            like = known[group[0]][1]
            parts = tuple(Part(r, known[r][0]) for r in group)
            yield Line(name, parts, like.bias, parameter if colon else "weight", swapped, like.feature)
        else:
            parts = tuple(Part(r, axes) for r, axes in zip(group, shapes * (each // len(shapes)), strict=True))
            yield Line(name, parts, shape.endswith("+"), parameter if colon else "weight", swapped, feature)


def _axes(text: str) -> tuple[Axis, ...]:
    found = [_AXIS.match(axis) for axis in text.split("x")]
    return tuple(Axis(int(axis[1] or 1), axis[2]) for axis in found if axis)


def expanded(text: str) -> list[str]:
    """The names that a name with ``{a,b}`` stands for; the last braces vary fastest."""
    found = _BRACES.search(text)
    if found is None:
        return [text]
    before, words, after = text[: found.start()], found[1].split(","), expanded(text[found.end() :])
    return [before + word + rest for word in words for rest in after]


def skeleton(body: str) -> tuple[str, Numbers]:
    """A flattened name with ``#`` for its numbers, and these."""
    return _NUMBER.sub("#", body), tuple(int(n) for n in _NUMBER.findall(body))


def pattern(template: str) -> tuple[str, tuple[int | None, ...]]:
    """The skeleton of a template, and its numbers, None for those of blocks."""
    blank = "\0"
    body = flat(_INDEX.sub(blank, template))
    marks = re.findall(rf"(?<![^_])(?:[0-9]+|{blank})(?![^_])", body)
    return _NUMBER.sub("#", body).replace(blank, "#"), tuple(None if mark == blank else int(mark) for mark in marks)


class Hit(NamedTuple):
    """A line that a name means, and the numbers of its blocks."""

    line: Line
    numbers: Numbers

    @property
    def references(self) -> tuple[str, ...]:
        """The reference names of its parts."""
        return tuple(filled(part.reference, self.numbers) for part in self.line.parts)

    @property
    def native(self) -> str:
        """The name of the stored module."""
        return filled(self.line.native, self.numbers)


class Entry(NamedTuple):
    """A line, and which numbers a name must have to mean it: how many, those that are fixed, and those of blocks."""

    line: Line
    length: int
    fixed: tuple[tuple[int, int], ...]  # place, number
    free: tuple[int, ...]  # places

    def fits(self, numbers: Numbers) -> bool:
        """Whether a name with these numbers means the line."""
        return len(numbers) == self.length and all(numbers[place] == number for place, number in self.fixed)


Index = Mapping[str, tuple[Entry, ...]]
"""Lines by skeleton."""


@dataclass(frozen=True, eq=False)
class Table:
    """Lines, and every name that is read as one of them: those of the original repository, of others, and references.

    ``texts`` are further spellings, by the name of the world that has them: of some references, or of all; their
    shapes are not told again. Read when first used; raises ValueError for what is no table.
    """

    text: str
    texts: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """The lines of the original repository's names."""
        return tuple(_lines(self.text))

    @cached_property
    def also(self) -> Mapping[str, tuple[Line, ...]]:
        """The lines of further spellings."""
        axes = {part.reference: (part.axes, line) for line in self.lines for part in line.parts}
        return {world: tuple(_lines(more, axes)) for world, more in self.texts.items()}

    @cached_property
    def plain(self) -> tuple[Line, ...]:
        """Each reference as a stored module of its own: as diffusers' models have them."""
        return tuple(
            Line(part.reference, (part,), line.bias, line.parameter and "weight", feature=line.feature)
            for line in self.lines
            for part in line.parts
        )

    @cached_property
    def read(self) -> Index:
        """Lines by the names that stored modules have. Raises ValueError where a name means two things."""
        found: dict[str, list[Entry]] = {}
        for name, line in self._names():
            key, entry = _entry(name, line)
            entries = found.setdefault(key, [])
            twins = [
                one.line for one in entries if one.fixed == entry.fixed and one.line.parts[0].axes == line.parts[0].axes
            ]
            if not twins:
                entries.append(entry)
            elif not _same(twins[0], line):
                raise ValueError(f"{name!r} is both {twins[0].parts} and {line.parts}")
        return {key: tuple(entries) for key, entries in found.items()}

    def _names(self) -> Iterator[tuple[str, Line]]:
        """Every name of every line: of the module, and of a parameter that is called neither weight nor bias."""
        for line in (*self.lines, *(line for more in self.also.values() for line in more), *self.plain):
            yield line.native, line
            if line.parameter not in ("", "weight"):
                yield f"{line.native}.{line.parameter}", line

    @cached_property
    def written(self) -> Mapping[str, Index]:
        """By world, lines by the references that they hold; ``native`` is that of the original repository."""
        native = _by_reference(self.lines)
        worlds = {world: {**native, **_by_reference(more)} for world, more in self.also.items()}
        return {"native": native, "diffusers": _by_reference(self.plain), **worlds}

    def modules(self, size: Size) -> Iterator[Hit]:
        """Every stored module of a size."""
        for line in self.lines:
            if not line.feature or line.feature in size.features:
                yield from (Hit(line, n) for n in product(*(size.numbers(letter) for letter in line.letters)))

    def knows(self, body: tuple[str, Numbers]) -> bool:
        """Whether a flattened name is that of a stored module."""
        return any(entry.fits(body[1]) for entry in self.read.get(body[0], ()))

    def find(self, body: tuple[str, Numbers], shape: Shape = ()) -> Hit | None:
        """What a stored module's flattened name means; where several lines do, by the shape."""
        return _chosen(self.read.get(body[0], ()), body[1], shape)

    def holder(self, body: tuple[str, Numbers], shape: Shape = (), world: str = "native") -> Hit | None:
        """The line that holds a reference module, by the flattened name of that."""
        return _chosen(self.written.get(world, self.written["native"]).get(body[0], ()), body[1], shape)


def _same(one: Line, other: Line) -> bool:
    """Whether two lines of one name mean the same: a reference's own line may stand beside the native one's."""
    names = [[_INDEX.sub("#", part.reference) for part in line.parts] for line in (one, other)]
    return names[0] == names[1] and one.swapped == other.swapped


def _by_reference(lines: Sequence[Line]) -> Index:
    found: dict[str, list[Entry]] = {}
    for line in lines:
        for part in line.parts:
            key, entry = _entry(part.reference, line)
            found.setdefault(key, []).append(entry)
    return {key: tuple(entries) for key, entries in found.items()}


def _entry(template: str, line: Line) -> tuple[str, Entry]:
    key, numbers = pattern(template)
    fixed = tuple((n, told) for n, told in enumerate(numbers) if told is not None)
    return key, Entry(line, len(numbers), fixed, tuple(n for n, told in enumerate(numbers) if told is None))


def _chosen(entries: Sequence[Entry], numbers: Numbers, shape: Shape) -> Hit | None:
    """The line whose fixed numbers are these; of several that differ in meaning, the one that a matrix's shape tells.

    Where no shape does, none: the halves of a modulation may be swapped, or not.
    """
    found = [entry for entry in entries if entry.fits(numbers)]
    if any(not _same(found[0].line, entry.line) for entry in found[1:]):
        found = [entry for entry in found if len(shape) > 1 and entry.line.agrees(shape)]
    return Hit(found[0].line, tuple(numbers[place] for place in found[0].free)) if found else None
