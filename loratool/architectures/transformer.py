"""Diffusion transformers: architectures whose names are templates, so that any number of blocks is read.

A name is looked up in three steps: its prefix tells the component, its body loses its dots and numbers, and what is
left is looked up in the tables of `rows`. Widths are only needed where proportions are not told by a stored shape.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from loratool.architectures.base import (
    Architecture,
    Piece,
    Ranges,
    Segment,
    Shape,
    Slot,
    Stored,
    agree,
    flat,
)
from loratool.architectures.rows import Hit, Line, Numbers, Size, Table, skeleton
from loratool.architectures.table import NameTable

MAIN = "transformer"
MAINS = (MAIN, "transformer_2")  # Wan 2.2 has two of one kind

# How names begin, and what they then speak of: the main model, or a text encoder by the name that this world has for
# it (kohya-ss/sd-scripts, Nerogar/OneTrainer, LyCORIS, diffusers, ComfyUI). Longest first where one begins another.
DOTTED = (
    ("base_model.model.", ""),
    ("model.diffusion_model.", MAIN),
    ("diffusion_model.", MAIN),
    ("transformer.", MAIN),
    ("transformer_2.", "transformer_2"),
    ("unet.", MAIN),
    ("net.", MAIN),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("text_encoder_4.", "text_encoder_4"),
    ("text_conditioner.", "text_conditioner"),
)
FLAT = (
    ("lora_unet_", MAIN),
    ("lora_transformer_", MAIN),
    ("oft_unet_", MAIN),
    ("lycoris_", MAIN),
    ("Hunyuan_video_I2V_lora_", MAIN),  # of Tencent's trainer
    ("lora_te_", "te"),
    ("lora_te1_", "te1"),
    ("lora_te2_", "te2"),
    ("lora_te3_", "te3"),
    ("lora_te4_", "te4"),
)
_AGAIN = ("model_diffusion_model_", "diffusion_model_", "unet_")  # prefixes that stand twice in published files
_ADAPTER = "llm_adapter_"
_DEPTH = 6  # so many prefixes may stand before a name
# text encoders by their names in ComfyUI
_ENCODERS = frozenset(("clip_l", "clip_g", "clip_h", "t5xxl", "umt5xxl", "llama", "gemma2_2b", "mistral3_24b"))
_ENCODERS |= frozenset(("qwen25_7b", "qwen3_06b", "qwen3_4b", "qwen3_8b"))


class Spelled(NamedTuple):
    """A name taken apart: whom it speaks of, its body without dots and numbers, and the numbers."""

    role: str
    body: tuple[str, Numbers]


@lru_cache(1 << 15)
def spelled(name: str) -> Spelled:
    """``name`` taken apart; without a known prefix it speaks of the main model."""
    role, body = "", name
    head, inside, tail = name.removeprefix("text_encoders.").partition(".transformer.")
    flattened = next(((r, name[len(p) :]) for p, r in FLAT if name.startswith(p)), None)
    if flattened:
        role, body = flattened[0], _without(flattened[1].strip("_"), _AGAIN)
    elif inside and head in _ENCODERS:
        role, body = head, tail
    else:
        for _ in range(_DEPTH):
            prefix, found = next(((p, r) for p, r in DOTTED if body.startswith(p)), ("", ""))
            role, body = found or role, body[len(prefix) :]
    if body.startswith("sformer_blocks"):  # seen in published files: a prefix was cut off too long
        body = f"tran{body}"
    body = flat(body).strip("_")
    if role in ("", MAIN) and body.startswith(_ADAPTER):  # Anima keeps it inside its transformer, diffusers beside it
        role, body = "text_conditioner", body.removeprefix(_ADAPTER)
    return Spelled(role or MAIN, skeleton(body))


def _without(body: str, prefixes: tuple[str, ...]) -> str:
    for _ in range(_DEPTH):
        body = next((body[len(prefix) :] for prefix in prefixes if body.startswith(prefix)), body)
    return body


@dataclass(frozen=True, eq=False)
class Encoder:
    """A text encoder: its component, its modules, and how each world calls it.

    ``roles`` are what prefixes call it; ``kohya`` and ``comfy`` are the prefixes that are written. ``levels`` may stand
    before a body, or be missing there (``text_model.``, ``model.``).
    """

    component: str
    table: Table
    size: Size
    roles: tuple[str, ...]
    kohya: str
    comfy: str
    levels: tuple[str, ...] = ()

    def find(self, body: tuple[str, Numbers], shape: Shape) -> Hit | None:
        """What a flattened body means."""
        if found := self.table.find(body, shape):
            return found
        levels = sorted(map(flat, self.levels), key=len, reverse=True)
        bare = body[0].removeprefix(next((level for level in levels if body[0].startswith(level)), ""))
        names = (bare, *(level + bare for level in levels))
        return next((hit for name in names if (hit := self.table.find((name, body[1]), shape))), None)


class _Found(NamedTuple):
    """What a name means: the component, the line, and the usual widths there."""

    component: str
    hit: Hit
    widths: Mapping[str, int]

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(f"{self.component}.{reference}" for reference in self.hit.references)


@dataclass(frozen=True, eq=False)
class Transformer(Architecture):
    """A diffusion transformer. ``sizes`` are the published models, the first one being meant where none is told.

    ``flattened`` says whose names kohya's are: ``native`` or ``diffusers``.
    """

    table: Table = field(kw_only=True, repr=False)
    sizes: tuple[Size, ...] = field(kw_only=True, repr=False)
    encoders: tuple[Encoder, ...] = field(default=(), kw_only=True, repr=False)
    flattened: str = field(default="native", kw_only=True, repr=False)

    # ---------------------------------------------------------------- modules

    def shapes(self, size: Size | None = None) -> Mapping[str, Shape]:
        """The shape of each module's weight, by reference name, in a published size (the first one)."""
        if size is None:
            return self._usual_shapes
        return dict(self._modules(size))

    def modules(self) -> tuple[str, ...]:
        return tuple(self.shapes())

    def parameters(self, size: Size | None = None) -> Mapping[str, Shape]:
        """Every parameter of a published size by reference name: weights, biases, and those without a module."""
        size = size or self.sizes[0]
        found: dict[str, Shape] = {}
        for name, line, shape in self._lines(size):
            found[f"{name}.weight" if line.parameter else name] = shape
            if line.bias:
                found[f"{name}.bias"] = shape[:1]
        return found

    @cached_property
    def _usual_shapes(self) -> Mapping[str, Shape]:
        return dict(self._modules(self.sizes[0]))

    def _modules(self, size: Size) -> Iterator[tuple[str, Shape]]:
        yield from ((name, shape) for name, line, shape in self._lines(size) if line.parameter)

    def _lines(self, size: Size) -> Iterator[tuple[str, Line, Shape]]:
        mains = ((MAIN, hit, size) for hit in self.table.modules(size))
        texts = ((e.component, hit, e.size) for e in self.encoders for hit in e.table.modules(e.size))
        for component, hit, of in (*mains, *texts):
            for reference, part in zip(hit.references, hit.line.parts, strict=True):
                yield f"{component}.{reference}", hit.line, hit.line.shape(part, of.widths)

    # ---------------------------------------------------------------- reading

    def resolve(self, name: str) -> str | None:
        found = self._find(spelled(name))
        return found.references[0] if found and found.hit.line.whole else None

    def from_kohya(self, name: str) -> str | None:
        return self.resolve(name)

    def knows(self, name: str) -> bool:
        """Whether it is a name of this kind of model, fused or not."""
        found = spelled(name)
        return self.table.knows(found.body) if found.role in MAINS else self._find(found) is not None

    def pieces(self, name: str, shape: Shape = ()) -> tuple[Piece, ...]:
        found = self._find(spelled(name), shape)
        if found is None:
            return ()
        if not shape:
            return (Piece(found.references[0], ((0, 1),)),) if found.hit.line.whole else ()
        ranges = found.hit.line.ranges(shape, found.widths) or ()
        return tuple(map(Piece, found.references, ranges)) if ranges else ()

    def _find(self, name: Spelled, shape: Shape = ()) -> _Found | None:
        if name.role in MAINS:
            hit = self.table.find(name.body, shape)
            return _Found(name.role, hit, self.sizes[0].widths) if hit else None
        for encoder in self.encoders:
            if name.role in encoder.roles and (hit := encoder.find(name.body, shape)):
                return _Found(encoder.component, hit, encoder.size.widths)
        return None

    # ---------------------------------------------------------------- writing

    def stored(self, reference: str, world: str = "kohya", shape: Shape = ()) -> Stored | None:
        component, _, body = reference.partition(".")
        held = self._holder(component, skeleton(flat(body)), shape, world)
        if held is None:
            return None
        prefix, hit, widths = held
        references = [f"{component}.{name}" for name in hit.references]
        segments = tuple(map(Segment, references))
        if hit.line.swapped:
            segments = (Segment(references[0], 1, 2), Segment(references[0], 0, 2))
        name = flat(hit.native) if world == "kohya" else hit.native
        if world == "comfy" and hit.line.parameter not in ("", "weight"):
            name += f".{hit.line.parameter}"  # ComfyUI names modules by their weight, else by the parameter itself
        return Stored(prefix + name, segments, lambda known: _heights(hit.line, known, widths))

    def _holder(
        self, component: str, body: tuple[str, Numbers], shape: Shape, world: str
    ) -> tuple[str, Hit, Mapping[str, int]] | None:
        """What a module is called behind which prefix, and the usual widths."""
        if component == MAIN or (component in MAINS and world == "diffusers"):
            hit = self.table.holder(body, shape, self.flattened if world == "kohya" else world)
            prefix = {"kohya": "lora_unet_", "comfy": "diffusion_model.", "native": ""}.get(world, f"{component}.")
            return (prefix, hit, self.sizes[0].widths) if hit else None
        encoder = next((e for e in self.encoders if e.component == component), None)
        if encoder is None or (hit := encoder.table.holder(body, shape)) is None:
            return None
        prefix = {"kohya": encoder.kohya, "diffusers": f"{component}."}.get(world, encoder.comfy)
        return prefix, hit, encoder.size.widths

    @cached_property
    def _kohya(self) -> NameTable:
        """Of those modules that are no part of a fused one."""
        found = ((name, self.stored(name, shape=shape)) for name, shape in self.shapes().items())
        return NameTable(tuple((name, s.name) for name, s in found if s and s.segments == (Segment(name),)))

    # ---------------------------------------------------------------- single files

    def checkpoint(self, tensors: Container[str] = ()) -> Mapping[str, Slot]:
        """Reference parameter names -> places in a single file: of the original repository's names, ComfyUI's or
        diffusers', with or without prefix.

        ``tensors`` maps the names in the file at hand to their shapes: that tells the rows of fused modules.
        """
        shapes = tensors if isinstance(tensors, Mapping) and tensors else self._usual
        found: dict[str, Slot] = {}
        for name in shapes:
            for reference, slot in self._slots_of(name, shapes):
                found.setdefault(reference, slot)
        return found

    def _slots_of(self, name: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Slot]]:
        """The reference parameters that a stored tensor holds, and where in it."""
        module, _, leaf = name.rpartition(".")
        shape = shapes[name]
        wide = shapes.get(f"{module}.weight", shape) if leaf == "bias" else shape
        found = self._find(spelled(module), wide)
        if found is None or leaf not in (found.hit.line.parameter, "bias"):
            found, leaf = self._find(spelled(name), wide), ""
        if found is None or bool(leaf) != bool(found.hit.line.parameter):
            return
        suffix = {"": "", "bias": ".bias"}.get(leaf, ".weight")
        for reference, rows in zip(found.references, found.hit.line.ranges(wide, found.widths) or (), strict=False):
            yield f"{reference}{suffix}", slot_of(name, rows, wide[0] if wide else 1)

    @cached_property
    def _usual(self) -> Mapping[str, Shape]:
        """A single file of the first size."""
        found: dict[str, Shape] = {}
        size = self.sizes[0]
        mains = (("model.diffusion_model.", hit, size) for hit in self.table.modules(size))
        texts = ((e.comfy, hit, e.size) for e in self.encoders for hit in e.table.modules(e.size))
        for prefix, hit, of in (*mains, *texts):
            shape = hit.line.stored_shape(of.widths)
            found[f"{prefix}{hit.native}" + (hit.line.parameter and f".{hit.line.parameter}")] = shape
            if hit.line.bias:
                found[f"{prefix}{hit.native}.bias"] = shape[:1]
        return found

    # ---------------------------------------------------------------- recognition

    def known(self, bodies: Mapping[tuple[str, str], Mapping[Numbers, int]]) -> int:
        """How many names are of this kind of model: given are, by role and body, how many have which numbers."""
        total = 0
        for (role, body), numbers in bodies.items():
            if role in MAINS:
                entries = self.table.read.get(body, ())
                any_number = {entry.length for entry in entries if not entry.fixed}
                fits = (c for n, c in numbers.items() if len(n) in any_number or any(e.fits(n) for e in entries))
                total += sum(fits)
            else:
                total += sum(c for n, c in numbers.items() if self._find(Spelled(role, (body, n))))
        return total

    def evidence(self, modules: Mapping[str, Shape]) -> Evidence:
        """How well the modules of the main model fit, by their shapes."""
        found = ((self._find(spelled(name), shape), shape) for name, shape in modules.items())
        known = [(hit.hit, shape) for hit, shape in found if hit and hit.component in MAINS]
        lines = {id(hit.line): hit.line for hit, _ in known}
        shapes = Counter((id(hit.line), shape) for hit, shape in known)
        blocks = Counter((hit.line.letters, hit.line.feature, hit.numbers) for hit, _ in known)
        right = sum(count for (line, shape), count in shapes.items() if lines[line].agrees(shape))
        exact = [sum(c for (line, shape), c in shapes.items() if _exact(lines[line], shape, s)) for s in self.sizes]
        within = ((fits, *_within(size, blocks)) for fits, size in zip(exact, self.sizes, strict=True))
        # of a model of other widths, the number of blocks tells nothing
        return max(Evidence(right, fits, inside, share if fits else 0.0, len(known)) for fits, inside, share in within)


def _exact(line: Line, shape: Shape, size: Size) -> bool:
    """Whether a stored weight, or the bias beside it, has that shape in a published size."""
    stored = line.stored_shape(size.widths)
    return bool(shape) and (agree(shape, stored) or (shape == stored[:1] and line.bias))


def _within(size: Size, blocks: Mapping[tuple[tuple[str, ...], str, Numbers], int]) -> tuple[int, float]:
    """How many modules have numbers of blocks that a size has, and the share of its blocks that these are."""
    inside, seen = 0, set()
    for (letters, feature, at), count in blocks.items():
        pairs = set(zip(letters, at, strict=True))
        here = all(n in size.numbers(letter) for letter, n in pairs)
        inside += count * (here and (not feature or feature in size.features))
        seen |= pairs
    all_blocks = sum(len(size.numbers(letter)) for letter in {letter for letter, _ in seen})
    return inside, len(seen) / all_blocks if all_blocks else 0.0


class Evidence(NamedTuple):
    """How well the modules of a main model fit a family: the more, the better, in this order.

    How many have the right proportions; the very shape that they have in one published size; a number of a block
    that there is; the share of the blocks that these are; and how many modules there are.
    """

    right: int
    exact: int
    inside: int
    share: float
    main: int


def _heights(line: Line, known: Sequence[Shape | None], widths: Mapping[str, int]) -> tuple[int, ...] | None:
    if not line.swapped:
        return line.missing(known, widths)
    shape = next((shape for shape in known if shape), None)
    return (shape[0] // 2,) * 2 if shape and shape[0] % 2 == 0 else None


def slot_of(tensor: str, ranges: Ranges, rows: int) -> Slot:
    """A slot of these rows of a tensor that has ``rows``, in the largest units."""
    unit = math.gcd(rows, *(edge for piece in ranges for edge in piece))
    if not unit:
        return Slot(tensor)
    return Slot(tensor, tuple((start // unit, stop // unit) for start, stop in ranges), rows // unit)


def transformer(
    name: str,
    title: str,
    table: Table,
    sizes: Sequence[Size],
    encoders: Sequence[Encoder] = (),
    flattened: str = "native",
) -> Transformer:
    """A family of diffusion transformers."""
    components = (MAIN, *(encoder.component for encoder in encoders))
    return Transformer(
        name,
        title,
        components,
        tuple,
        lambda _: None,
        table=table,
        sizes=tuple(sizes),
        encoders=tuple(encoders),
        flattened=flattened,
    )
