"""`map`: a dialect that the user describes, in a small text file (``--map FILE``): names of modules, and suffixes.

A line is ``THEIRS -> OURS``; what follows ``#`` at the beginning of a line or after a space is a comment::

    # names of modules; {} stands for a number
    net.layer_{}.query -> model.layers.{}.self_attn.q_proj
    net.layer_{}.kv    -> model.layers.{}.self_attn.k_proj + model.layers.{}.self_attn.v_proj
    enc.*              -> text_encoder.*
    # names of tensors: what a module's name is followed by
    .my_down -> down

- What begins with a letter or a digit is a module. The numbers go over in their order; they have at most nine digits,
  and no digit stands beside a ``{}``. ``+`` lists the modules whose rows are stacked in it, all of equal height. ``*``
  at the end of both sides is the rest of the name; other lines go first, then the longest. A map without modules
  takes their names as they are. Modules are named as the base names them; those of image models as diffusers does,
  behind the pipeline component.
- All else is a suffix, and ``OURS`` what it holds: `down`, `up`, `alpha` or another of `SLOTS`; with ``.T`` its
  transpose; `ignore` leaves it out, with a warning. A map without suffixes has those of the known dialects.

Names are one-to-one: neither two lines for one name, nor two lines that give one. Nothing in a map is run, and no
pattern of it can take long. It is asked before all known formats (but not of what PEFT's configuration describes), and
reads a file if it knows one of its tensors; then it must know all. A missing alpha means scaling 1, with a warning, as
in `raw`. Read only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from loratool.adapter import Adapter, Metadata
from loratool.architectures import Architecture, identify, told
from loratool.architectures.base import Piece, Shape
from loratool.errors import FormatError, LoratoolError, UsageError, some
from loratool.files import existing
from loratool.formats import dialects, peft
from loratool.formats.base import Evidence, Format
from loratool.keys import Layout
from loratool.tensors import Tensor

SLOTS = tuple(dict.fromkeys(slot for slot, _ in dialects.READ.aliases))
IGNORE = "ignore"
_SIZE, _PATTERNS = 1 << 20, 1024  # the bytes of a map, and its lines with {} or *
_NUMBER = re.compile(r"\{\}|[0-9]+")
_CLOSE = re.compile(r"\{\}(\{\}|[0-9])|[0-9]\{\}")  # where one number ends and another begins would be a guess
_COMMENT = re.compile(r"(^|\s)#.*")


class Line(NamedTuple):
    """One line of a map."""

    theirs: str
    ours: tuple[str, ...]
    number: int

    @property
    def is_suffix(self) -> bool:
        """Whether it names a tensor of a module, not a module."""
        return not (self.theirs[:1].isalnum() or self.theirs[:1] in "{*")

    @property
    def is_open(self) -> bool:
        """Whether it is the beginning of names."""
        return self.theirs.endswith("*")


@dataclass
class _Names:
    """Names with ``{}`` for numbers, no two of which have a name in common."""

    exact: dict[str, Line] = field(default_factory=dict)
    numbered: dict[str, list[tuple[list[str], Line]]] = field(default_factory=dict)

    def find(self, name: str) -> tuple[Line, list[str]] | None:
        """The line of a name and the numbers in it."""
        if name in self.exact:
            return self.exact[name], []
        own = _NUMBER.findall(name)
        for numbers, line in self.numbered.get(_NUMBER.sub("{}", name), ()):
            pairs = list(zip(numbers, own, strict=True))
            if all(_is_number(value) if wanted == "{}" else wanted == value for wanted, value in pairs):
                return line, [str(int(value)) for wanted, value in pairs if wanted == "{}"]
        return None

    def add(self, name: str, line: Line) -> Line | None:
        """Take a name in, those with numbers first; the line that has it already, if one has."""
        numbers = _NUMBER.findall(name)
        alike = self.numbered.get(_NUMBER.sub("{}", name), [])
        for others, other in alike:
            if all(one == two or "{}" in (one, two) for one, two in zip(numbers, others, strict=True)):
                return other
        if "{}" in numbers:
            self.numbered.setdefault(_NUMBER.sub("{}", name), alike).append((numbers, line))
            return None
        known = self.exact.get(name)
        self.exact[name] = known or line
        return known


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


@dataclass(frozen=True)
class Map:
    """A map that was read and checked."""

    path: Path
    lines: tuple[Line, ...]
    names: _Names
    starred: Mapping[str, str]
    """Beginnings of names -> what stands there instead, the longest first."""

    @cached_property
    def suffixes(self) -> Layout | None:
        """The suffixes of its own."""
        own = tuple((line.ours[0], line.theirs) for line in self.lines if line.is_suffix)
        return Layout((), own) if own else None

    def split(self, key: str) -> tuple[str, str] | None:
        """(module, slot) of a tensor's name, None where no suffix fits."""
        return self.suffixes.split(key) if self.suffixes else dialects.READ.split(peft.without_adapter_name(key))

    def modules(self, name: str) -> tuple[str, ...]:
        """The modules that a module of the file is, by rows; none where the map does not know it."""
        if found := self.names.find(name):
            line, numbers = found
            return tuple(_filled(ours, numbers) for ours in line.ours)
        start = next((start for start in self.starred if name.startswith(start) and name != start), None)
        return () if start is None else (self.starred[start] + name[len(start) :],)

    def knows(self, key: str) -> bool:
        """Whether it has words for a tensor."""
        found = self.split(key)
        return found is not None and (found[1] == IGNORE or bool(self.modules(found[0])))


def _filled(template: str, numbers: Iterable[str]) -> str:
    for number in numbers:
        template = template.replace("{}", number, 1)
    return template


# ---------------------------------------------------------------- the map


def read_map(path: Path) -> Map:
    """Read and check a map. Raises LoratoolError (no such file), and FormatError with the number of a wrong line."""
    lines = tuple(_lines(_text(existing(path, "map")), path))
    if not lines:
        raise FormatError("the map has no lines", path, "a line is: their.name.{}.a -> our.name.{}.b")
    seen: dict[str, Line] = {}
    for line in lines:
        _check(line, path)
        if (other := seen.setdefault(line.theirs, line)) is not line:
            raise _wrong("the same name twice", line, path, other)
    modules = [line for line in lines if not line.is_suffix]
    if sum("{}" in line.theirs or line.is_open for line in modules) > _PATTERNS:
        raise FormatError(f"more than {_PATTERNS:,} lines with {{}} or *", path)
    names = _one_to_one([line for line in modules if not line.is_open], path)
    starred = {line.theirs[:-1]: line.ours[0][:-1] for line in modules if line.is_open}
    longest = {start: starred[start] for start in sorted(starred, key=len, reverse=True)}
    return Map(path, lines, names, longest if modules else {"": ""})


def _one_to_one(lines: Iterable[Line], path: Path) -> _Names:
    """What finds the lines by their names. Raises FormatError where two have a name in common, on either side."""
    theirs, ours = _Names(), _Names()
    for line in sorted(lines, key=lambda line: "{}" not in line.theirs):
        for names, own in ((theirs, (line.theirs,)), (ours, line.ours)):
            for name in own:
                if other := names.add(name, line):
                    raise _wrong(f"{name} stands twice, or has a name in common with another", line, path, other)
    return theirs


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _SIZE:
            raise FormatError(f"a map of more than {_SIZE:,} bytes", path)
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError("a map is text in UTF-8", path) from None
    except OSError as error:
        raise LoratoolError(f"cannot read the map: {error.strerror}", path) from None


def _lines(text: str, path: Path) -> Iterator[Line]:
    for number, written in enumerate(text.split("\n"), 1):
        said = _COMMENT.sub("", written).strip()
        if not said:
            continue
        sides = [side.strip() for side in said.split("->")]
        line = Line(sides[0], tuple(part.strip() for part in sides[-1].split("+")), number)
        if len(sides) != 2:
            raise _wrong(f"{said[:60]!r} is not THEIRS -> OURS", line, path)
        if not line.theirs or not all(line.ours):
            raise _wrong("a name is missing", line, path)
        yield line


def _check(line: Line, path: Path) -> None:
    """Raise FormatError for a line that says nothing, or nothing certain."""
    if line.is_suffix:
        slot = line.ours[0]
        if len(line.ours) > 1 or slot.removesuffix(".T") not in (*SLOTS, IGNORE):
            raise _wrong(f"{' + '.join(line.ours)!r} is nothing that a tensor can be", line, path, hint=_SUFFIXES)
        return
    names = (line.theirs, *line.ours)
    stars = [name.count("*") for name in names]
    if any(stars) and (set(stars) != {1} or len(names) > 2 or not all(name.endswith("*") for name in names)):
        raise _wrong("a * is the end of both sides, and of one name each", line, path)
    counts = {name.count("{}") for name in names}
    if len(counts) > 1 or (any(stars) and counts != {0}):
        raise _wrong("both sides must have as many {}, and none beside a *", line, path)
    for name in names:
        if set(name.replace("{}", "")) & set("{} \t"):
            raise _wrong(f"{name!r} has a space, or a brace that is not {{}}", line, path)
        if _CLOSE.search(name):
            raise _wrong(f"a number stands beside another in {name}", line, path)


_SUFFIXES = f"a suffix is down, up, alpha, magnitude, ... (or {IGNORE}); a module begins with a letter or a digit"


def _wrong(what: str, line: Line, path: Path, other: Line | None = None, hint: str = "") -> FormatError:
    lines = f"line {line.number}" + (f" (and line {other.number})" if other and other is not line else "")
    return FormatError(what, f"{path}: {lines}", hint)


# ---------------------------------------------------------------- the adapter


def sniff(evidence: Evidence) -> str | None:
    """By one tensor that the map knows."""
    if evidence.map is None or "peft_type" in evidence.config:
        return None
    found = read_map(evidence.map)
    known = next((key for key in evidence.keys if found.knows(key)), None)
    return f"{evidence.map} knows {known}" if known else None


def read(evidence: Evidence) -> Adapter:
    """Read a file by a map. Raises FormatError for tensors that it does not know, and for what does not fit."""
    if evidence.map is None:
        raise UsageError("no map", evidence.path, "--map FILE says which name is which")
    mapping, file = read_map(evidence.map), evidence.file
    if unknown := [key for key in file.tensors if not mapping.knows(key)]:
        what = f"{len(unknown)} tensors of {len(file.tensors)} have no line in the map {evidence.map}"
        raise FormatError(what, f"{file.path}: {some(unknown)}", "add lines for them", unknown)
    modules, ignored = _grouped(file.tensors, mapping, file.path)
    scales = dialects.Scales(file.metadata, evidence)
    built = {spelled: dialects.build(spelled, stored, scales) for spelled, stored in modules.items()}

    def pieces(name: str, shape: Shape) -> tuple[Piece, ...]:
        return _pieces(mapping.modules(name), shape, f"{file.path}: {name}")

    names = dialects.Names(dialects.shapes(built), evidence, pieces)
    updates, spellings = dialects.collect(built, modules, names, file.path)
    known = _architecture({name: update.shape for name, update in updates.items()}, told(file.metadata))
    left_out = [f"left out, as the map says: {some(ignored)}"] if ignored else []
    metadata = Metadata(
        format="map",
        path=evidence.path,
        weights=(evidence.weights,),
        strings=file.metadata,
        architecture=known.name if known else None,
        warnings=(*left_out, *scales.warnings(modules), *dialects.remarks(built)),
    )
    return Adapter(updates, {}, metadata, spellings)


def _grouped(tensors: Mapping[str, Tensor], mapping: Map, where: Path) -> tuple[dict[str, dialects.Stored], list[str]]:
    """The modules of a file by their own names, and what is left out. Raises FormatError for what stands twice."""
    modules: dict[str, dialects.Stored] = {}
    ignored: list[str] = []
    meant: dict[str, str] = {}
    for key, tensor in tensors.items():
        module, slot = mapping.split(key) or (key, IGNORE)
        if slot == IGNORE:
            ignored.append(key)
            continue
        for target in mapping.modules(module):
            if (other := meant.setdefault(target, module)) != module:
                raise FormatError(f"two modules of the file are {target}", f"{where}: {other} and {module}")
        stored = modules.setdefault(module, dialects.Stored(module))
        own = slot.removesuffix(".T")
        if own in stored.slots:
            raise FormatError(f"two tensors for {own} of one module", f"{where}: {key}")
        if own != slot and len(tensor.shape) != 2:
            raise FormatError(f"{own} of shape {list(tensor.shape)} has no transpose", f"{where}: {key}")
        stored.slots[own], stored.keys[own] = tensor if own == slot else tensor.T, key
    return modules, ignored


def _pieces(modules: tuple[str, ...], shape: Shape, where: str) -> tuple[Piece, ...]:
    """The modules that a stored one is, each of as many of its rows."""
    height, rest = divmod(shape[0] if shape else len(modules), len(modules))
    if rest or not height:
        raise FormatError(f"{shape[0]} rows are not {len(modules)} equal parts", where)
    return tuple(Piece(name, ((n * height, (n + 1) * height),)) for n, name in enumerate(modules))


def _architecture(shapes: Mapping[str, Shape], hint: str | None) -> Architecture | None:
    """The image model whose modules these are."""
    own = {name: shape for name, shape in shapes.items() if dialects.has_component(name)}
    return identify({name: shape for name, shape in own.items() if not name.endswith(".bias")}, hint) if own else None


FORMAT = Format(
    name="map",
    title="names of your own, by --map FILE, read only",
    kinds=("lora", "dora", "loha", "lokr", "glora", "ia3", "oft", "boft", "full", "norm"),
    container="file",
    sniff=sniff,
    read=read,
)
