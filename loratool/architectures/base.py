"""What is known of a model family: its modules, their shapes, and every name they go by.

The reference namespace is diffusers' module names behind the name of the pipeline component, such as
``unet.mid_block.resnets.0.conv1`` or ``text_encoder.text_model.encoder.layers.0.mlp.fc1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from loratool.architectures.table import NameTable
from loratool.errors import MatchError

Shape = tuple[int, ...]

# How a name begins, and the component it then speaks of (kohya-ss/sd-scripts, KohakuBlueleaf/LyCORIS,
# huggingface/diffusers, ComfyUI). No prefix is the beginning of another.
PREFIXES: tuple[tuple[str, str], ...] = (
    ("lora_unet_", "unet"),
    ("oft_unet_", "unet"),
    ("lycoris_", "unet"),
    ("unet.", "unet"),
    ("diffusion_model.", "unet"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("text_encoder.", "text_encoder"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_h.transformer.", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
)

# transformers 5.6 dropped `text_model.` from CLIPTextModel: a body that begins with one of these lacks it.
_INSIDE_TEXT_MODEL = ("encoder_", "embeddings_", "final_layer_norm")


def flat(name: str) -> str:
    """``name`` as kohya writes it: dots become underscores."""
    return name.replace(".", "_")


def split(name: str) -> tuple[str, str] | None:
    """The component that ``name`` speaks of and its flattened body, or None for an unknown prefix.

    Mends what real files are known to have: ``lora_unet_unet_``, ``lora_unet__``, a trailing underscore,
    text encoder names without ``text_model``.
    """
    for prefix, component in PREFIXES:
        if name.startswith(prefix):
            body = flat(name[len(prefix) :]).strip("_").removeprefix(f"{component}_")
            lacking = component != "unet" and body.startswith(_INSIDE_TEXT_MODEL)
            return component, f"text_model_{body}" if lacking else body
    return None


Ranges = tuple[tuple[int, int], ...]
"""Row ranges [start, stop), in the order in which they are put one below the other."""


class Slot(NamedTuple):
    """Where a parameter lives inside a single-file checkpoint.

    It is the rows ``pieces`` of ``tensor``, one below the other, counted in units of which the tensor has ``of``: a
    query of three equal parts is ((0, 1),) of 3, swapped halves are ((1, 2), (0, 1)) of 2. If ``transposed``, it is
    the transpose of them.
    """

    tensor: str
    pieces: Ranges = ((0, 1),)
    of: int = 1
    transposed: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is the tensor as it stands, no rows of it, nor these in another order."""
        return self.pieces == ((0, self.of),)

    @property
    def units(self) -> int:
        """How many of the tensor's ``of`` units it takes."""
        return sum(stop - start for start, stop in self.pieces)

    def ranges(self, rows: int) -> Ranges:
        """The pieces in rows, where the tensor has ``rows``. Raises MatchError where these are no whole units."""
        if rows % self.of:
            raise MatchError(f"{rows} rows are not {self.of} equal parts", self.tensor)
        unit = rows // self.of
        return tuple((start * unit, stop * unit) for start, stop in self.pieces)

    def shape(self, stored: Shape) -> Shape:
        """The shape of its rows, where the tensor has shape ``stored``: as stored, not transposed."""
        return (sum(stop - start for start, stop in self.ranges(stored[0])), *stored[1:]) if stored else ()

    def stored(self, shape: Shape) -> Shape:
        """The shape of the whole of ``tensor`` where the parameter has ``shape``."""
        rows = (shape[0] * self.of // self.units, *shape[1:])
        return rows[::-1] if self.transposed else rows


class Piece(NamedTuple):
    """A reference module, and which rows of a stored module it is, one below the other."""

    reference: str
    rows: Ranges


class Segment(NamedTuple):
    """Part ``part`` of ``of`` equal ones of a reference module's rows."""

    reference: str
    part: int = 0
    of: int = 1


def _only(known: Sequence[Shape | None]) -> tuple[int, ...] | None:
    return None if None in known else tuple(shape[0] for shape in known if shape)


class Stored(NamedTuple):
    """A module as a format names it: the segments that its rows are, from the top.

    ``heights`` gives the rows of each segment, where the shapes of some of their modules are known (None for the
    others), and None where these do not tell.
    """

    name: str
    segments: tuple[Segment, ...]
    heights: Callable[[Sequence[Shape | None]], tuple[int, ...] | None] = _only


class Row(NamedTuple):
    """One weight-carrying module: its names, the shape of its weight, its place in a checkpoint.

    ``kohya`` is the one spelling that is written; ``bodies``, without prefix, are all that are read.
    """

    reference: str
    kohya: str
    bodies: tuple[str, ...]
    shape: Shape
    weight: Slot
    bias: Slot | None = None

    @property
    def component(self) -> str:
        return self.reference.partition(".")[0]


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model family: ``build`` makes its rows, once, when a table is first asked for.

    ``aliases`` are pairs (usual prefix, other prefix) of tensor names in single files; ``unflatten`` reads
    kohya names of models of this kind that have other numbers of blocks.
    """

    name: str
    title: str
    components: tuple[str, ...]
    build: Callable[[], Iterable[Row]] = field(repr=False)
    unflatten: Callable[[str], str | None] = field(repr=False)
    aliases: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def modules(self) -> tuple[str, ...]:
        """Every module that carries a weight (Linear, Conv, norms, embeddings), in reference names."""
        return tuple(self._shapes)

    def shapes(self) -> Mapping[str, Shape]:
        """The shape of each module's weight, by reference name."""
        return self._shapes

    def kohya(self) -> NameTable:
        """Reference names <-> the names that kohya-ss/sd-scripts writes."""
        return self._kohya

    def resolve(self, name: str) -> str | None:
        """The reference name of a module of this very architecture in any known spelling, or None."""
        found = split(name)
        return self._spellings.get(found) if found else None

    def pieces(self, name: str, shape: Shape = ()) -> tuple[Piece, ...]:
        """The reference modules that a stored module of that name and shape is, in any known spelling.

        Each with its rows; all of them where the module is not a fused one. Empty for an unknown name, and for a shape
        that has no such rows.
        """
        found = self.from_kohya(name)
        return (Piece(found, ((0, shape[0] if shape else 1),)),) if found else ()

    def stored(self, reference: str, world: str = "kohya", shape: Shape = ()) -> Stored | None:
        """The module, in the names of a world, that holds a reference module; None where it has none.

        Worlds are ``kohya``, ``native`` (the original repository's names, bare), ``comfy`` and ``diffusers``.
        """
        name = self._written(reference).get(world)
        return Stored(name, (Segment(reference),)) if name else None

    def _written(self, reference: str) -> Mapping[str, str]:
        slot = self.checkpoint().get(f"{reference}.weight")
        kohya = self.kohya().forward.get(reference)
        if slot is None or kohya is None:
            return {}
        component, _, body = reference.partition(".")
        ldm = slot.tensor.removesuffix(".weight").removeprefix("model.")
        comfy = ldm if component == "unet" else f"text_encoders.{self._clip(component)}.transformer.{body}"
        native = ldm.removeprefix("diffusion_model.") if component == "unet" else comfy
        return {"kohya": kohya, "comfy": comfy, "native": native, "diffusers": reference}

    def _clip(self, component: str) -> str:
        return "clip_g" if component == "text_encoder_2" else "clip_h" if self.name == "sd2" else "clip_l"

    def from_kohya(self, name: str) -> str | None:
        """The reference name of a kohya name, or None where it is no name of this kind of model.

        Reads what ``resolve`` reads and, beyond it, the names of models with other numbers of blocks.
        """
        if known := self.resolve(name):
            return known
        other = self.unflatten(name)
        return other if other and other.partition(".")[0] in self.components else None

    def checkpoint(self, tensors: Container[str] = ()) -> Mapping[str, Slot]:
        """Reference parameter names (``.weight``, ``.bias``) -> places in an LDM or SGM single file.

        Of the spellings that single files have, the usual one, unless ``tensors``, the names in the file at
        hand, has another.
        """
        if not tensors:
            return self._slots
        return {name: self._spelled(slot, tensors) for name, slot in self._slots.items()}

    def _spelled(self, slot: Slot, tensors: Container[str]) -> Slot:
        if slot.tensor in tensors:
            return slot
        for usual, other in self.aliases:
            name = other + slot.tensor.removeprefix(usual)
            if slot.tensor.startswith(usual) and name in tensors:
                return slot._replace(tensor=name)
        return slot

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        return tuple(self.build())

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return {row.reference: row.shape for row in self._rows}

    @cached_property
    def _kohya(self) -> NameTable:
        return NameTable(tuple((row.reference, row.kohya) for row in self._rows))

    @cached_property
    def _spellings(self) -> dict[tuple[str, str], str]:
        table: dict[tuple[str, str], str] = {}
        for row in self._rows:
            for body in row.bodies:
                if table.setdefault((row.component, body), row.reference) != row.reference:
                    raise ValueError(f"{body!r} is both {table[row.component, body]!r} and {row.reference!r}")
        return table

    @cached_property
    def _slots(self) -> dict[str, Slot]:
        slots = {f"{row.reference}.weight": row.weight for row in self._rows}
        slots |= {f"{row.reference}.bias": row.bias for row in self._rows if row.bias}
        NameTable(tuple((name, f"{slot.tensor} rows {slot.pieces} of {slot.of}") for name, slot in slots.items()))
        return slots


def agree(shape: Shape, expected: Shape) -> bool:
    """Whether an update of ``shape`` fits a weight of shape ``expected``; no shape, ``()``, fits all.

    Kernel axes may be flattened, or be absent where they are one by one; a length of 0 is one that is not known.
    """
    if 0 in shape:
        return all(own in (0, other) for own, other in zip(shape, expected, strict=False))
    return not shape or (shape[0] == expected[0] and math.prod(shape) == math.prod(expected))
