"""The LoRA of a full fine-tune: truncated SVD of TUNED - BASE, tensor pair by tensor pair."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from loratool.adapter import Adapter, Metadata
from loratool.architectures import Slot
from loratool.architectures.llm import EMBEDDING_LEAVES, Tie, experts_transposed
from loratool.devices import one_blas_thread
from loratool.errors import FormatError, LossError, MatchError, NumericError, UsageError, some
from loratool.kinds.experts import Experts
from loratool.lazy import np
from loratool.linalg import EXACT_SIDE, Truncation, adaptive_svd, exact_svd, rank_for_error, to_numpy, truncated_svd
from loratool.model import Location, Model, pick
from loratool.names import Names, Unmatched, has_number, module_of, stores_transposed
from loratool.ops.changes import extreme, with_head
from loratool.ops.spectral import Choice, ModuleResult, Piece, Result, SizeOf, bounded_size, fit_size
from loratool.ops.stacks import hollow, together
from loratool.plan import Progress, counted, thread_count
from loratool.tensors import DTYPES, FLOATS, Array, Tensor
from loratool.update import Layer, LowRank, Update, trimmed

ToDevice = Callable[[np.ndarray], Array]
Done = TypeVar("Done")

SHARES = (0.90, 0.95, 0.99)  # of the energy, for which the ranks needed are told
FLOOR = 1e-7  # relative error below which float32 differences hold nothing but rounding
_HEADS = frozenset(("lm_head", "embed_out", "embed_tokens", "embed_in", "wte", "shared", "tok_embeddings"))
_SECONDS = 10.0  # for all matching of --include and --exclude


# ---------------------------------------------------------------- what there is to extract


@dataclass(frozen=True)
class View:
    """One weight in a file: (rows of) a stored tensor, or the transpose of these."""

    tensor: Tensor
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.tensor.shape[::-1] if self.transposed else self.tensor.shape

    def handle(self) -> Tensor:
        """The weight as a tensor of its own."""
        return self.tensor.T if self.transposed else self.tensor

    def float(self) -> np.ndarray:
        """The weight in float32 or wider, [o,i*k]."""
        values = self.tensor.float()
        return values.T if self.transposed else values.reshape(len(values), -1)


@dataclass(frozen=True)
class Pair:
    """One weight in both models; ``layer`` is how the base's module stores it."""

    name: str
    base: View
    tuned: View
    layer: Layer

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as its factors are held: [o,i,*k]."""
        return self.base.shape[::-1] if self.layer == "transposed" else self.base.shape

    @property
    def short(self) -> int:
        """The largest rank that it can have."""
        return min(self.shape[0], math.prod(self.shape[1:]))

    @property
    def nbytes(self) -> int:
        """Bytes as the base stores it."""
        return math.prod(self.shape) * DTYPES[self.base.tensor.dtype].bits // 8

    def difference(self) -> np.ndarray | None:
        """TUNED - BASE of the stored values in float32, [o,i*k]; None where there is none.

        Raises NumericError for NaN and infinities.
        """
        change = np.subtract(self.tuned.float(), self.base.float()).astype(np.float32, copy=False)
        flat = change.reshape(-1) if change.flags.c_contiguous else change.T.reshape(-1)
        with np.errstate(all="ignore"):
            finite = bool(np.isfinite(np.dot(flat, flat)))
        if not finite and not np.isfinite(change).all():
            if self.base.handle().same_bytes(self.tuned.handle()):
                return None
            raise NumericError("NaN or infinity in the difference", self.name)
        if not change.any():
            return None
        return np.ascontiguousarray(change.T if self.layer == "transposed" else change)


@dataclass
class Survey:
    """Two models held against each other: what will be factored, and what is carried whole, names first."""

    pairs: list[Pair] = field(default_factory=list)
    carried: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    stacks: dict[str, Experts] = field(default_factory=dict)
    prefix: str = ""

    def require(self) -> None:
        """Raise MatchError for everything that does not fit, at once."""
        if self.missing:
            hint = "are these the right two models? --exclude leaves modules out"
            raise MatchError(
                f"the tuned model lacks {len(self.missing)} tensors of the base", some(self.missing), hint, self.missing
            )
        if self.misfits:
            raise MatchError("shapes differ", some(self.misfits), "--exclude leaves modules out", self.misfits)


class Chosen:
    """--include and --exclude: regular expressions searched in module names, all together bounded in time."""

    def __init__(self, include: str | None, exclude: str | None) -> None:
        self.include, self.exclude = _compiled(include, "--include"), _compiled(exclude, "--exclude")
        self.seconds = _SECONDS
        self.any = False

    def __call__(self, name: str) -> bool:
        """Whether a module is chosen. Raises UsageError where that takes too long."""
        began = time.monotonic()
        try:
            wanted = self.include is None or self._found(self.include, name)
            wanted = wanted and not (self.exclude is not None and self._found(self.exclude, name))
        except TimeoutError:
            raise UsageError("the regular expression takes too long to match", name) from None
        self.seconds -= time.monotonic() - began
        self.any = self.any or wanted
        return wanted

    def _found(self, pattern: object, name: str) -> bool:
        return pattern.search(name, timeout=max(self.seconds, 1e-3)) is not None  # type: ignore[attr-defined]


def _compiled(text: str | None, option: str) -> object:
    import regex

    try:
        return None if text is None else regex.compile(text)
    except (regex.error, RecursionError, OverflowError) as error:
        raise UsageError(f"{option} is no regular expression: {error}", repr(text)) from None


def survey(base: Model, tuned: Model, include: str | None = None, exclude: str | None = None) -> Survey:
    """Match the two models' tensors. All mismatches are found here, before the first SVD.

    Raises MatchError for a tensor that TUNED lacks or whose shape differs (but for another vocabulary, whose
    embedding and head are carried whole), FormatError for quantised tensors that differ, UsageError for an impossible
    regular expression or one that chooses nothing.
    """
    chosen = Chosen(include, exclude)
    tie, base = with_head(base)
    tuned = with_head(tuned)[1]
    found, names, seen = Survey(prefix=component_prefix(base)), Names(tuned.places), set()
    for name, slot in _canonical(base):
        wanted = chosen(found.prefix + owner(name))
        hit = _counterpart(names, name, tie)
        if isinstance(hit, str):
            seen.add(tuned.places[hit].tensor)
        if not wanted:
            found.left_out.append(name)
        elif isinstance(hit, Unmatched):
            found.missing.append(str(hit))
        else:
            _enter(found, name, slot, tuned.places[hit], base, tuned)
    for name, at in tuned.parameters.items():
        if name not in seen and chosen(found.prefix + owner(name)):
            found.carried[name] = at[0].tensor
    if not chosen.any:
        raise UsageError("--include and --exclude leave no module", repr(include or exclude))
    found.require()
    for name, tensor in found.carried.items():
        if not np.isfinite(extreme(tensor)):
            raise NumericError("NaN or infinity in the tuned model", name)
    return found


def owner(name: str) -> str:
    """The module of a weight or bias."""
    return module_of(name).removesuffix(".bias")


def component_prefix(model: Model) -> str:
    """The pipeline component that a model is by itself, as formats of diffusion adapters put it before names."""
    config = model.configs.get("", {}) if len(model.configs) == 1 else {}
    kind = str(config.get("_class_name", ""))
    if config.get("model_type") == "clip_text_model":
        return "text_encoder_2." if model.path.name.endswith("_2") else "text_encoder."
    if kind.startswith("UNet") or (not config and {"down_blocks", "mid_block"} <= _heads(model)):
        return "unet."
    return "transformer." if "Transformer" in kind else ""


def _heads(model: Model) -> set[str]:
    """The first segments of all names."""
    return {name.partition(".")[0] for name in model.parameters}


def _canonical(model: Model) -> Iterator[tuple[str, Slot]]:
    """Every parameter once, under the name that formats know: reference names where an architecture is known."""
    named = {slot: name for name, slot in model.places.items()}  # reference names come last
    whole = {slot.tensor for slot in named if slot != Slot(slot.tensor)}
    for slot, name in named.items():
        if slot != Slot(slot.tensor) or slot.tensor not in whole:
            yield name, slot


def _counterpart(names: Names, name: str, tie: Tie | None) -> str | Unmatched:
    """The tuned model's name of a parameter; that of the embedding for a head tied to it."""
    hit = names.find(name)
    if isinstance(hit, Unmatched) and tie is not None and name == f"{tie.head}.weight":
        hit = names.find(f"{tie.embedding}.weight")
    return hit if isinstance(hit, Unmatched) else hit[0]


def _enter(found: Survey, name: str, slot: Slot, place: Slot, base: Model, tuned: Model) -> None:
    """Decide what becomes of one parameter."""
    at, to = _alike(base.parameters[slot.tensor], tuned.parameters[place.tensor])
    one, other = _view(at.tensor, slot), _view(to.tensor, place)
    if at.tensor.dtype not in FLOATS or to.tensor.dtype not in FLOATS:
        if not at.tensor.same_bytes(to.tensor):
            dtypes = " and ".join(dict.fromkeys((at.tensor.dtype, to.tensor.dtype)))
            raise FormatError(f"a tensor of dtype {dtypes} that differs", name, "give both models in 16 or 32 bit")
    elif trimmed(one.shape) != trimmed(other.shape):
        if not _another_vocabulary(name, one.shape, other.shape, base):
            found.misfits.append(f"{name} ({list(one.shape)} in the base, {list(other.shape)} in the tuned model)")
        elif not any(tensor is to.tensor for tensor in found.carried.values()):  # else a head tied in both
            found.carried[name] = to.tensor
    elif _is_stack(name, one.shape) and slot == Slot(slot.tensor) and base.architecture is None:
        _enter_stack(found, name, one.tensor, other.tensor, base)
    elif _worth(name, one.shape):
        found.pairs.append(Pair(name, one, other, _layer(name, slot, base)))
    elif not _same(one.handle(), other.handle()):
        found.carried[name] = other.handle().reshape(*one.shape)


def _alike(base: Sequence[Location], tuned: Sequence[Location]) -> tuple[Location, Location]:
    """The copies to compare, where a folder holds a weight in several precisions: of one dtype, then the widest."""

    def worth(pair: tuple[Location, Location]) -> tuple[bool, int]:
        one, other = (at.tensor.dtype for at in pair)
        return one == other, DTYPES[one].bits + DTYPES[other].bits

    return max(((one, other) for one in base for other in tuned), key=worth)


def _view(tensor: Tensor, slot: Slot) -> View:
    return View(pick(tensor, slot), slot.transposed)


def _same(one: Tensor, other: Tensor) -> bool:
    other = other.reshape(*one.shape)
    return one.same_bytes(other) or one.same_values(other)


def _another_vocabulary(name: str, one: tuple[int, ...], other: tuple[int, ...], model: Model) -> bool:
    """Whether two shapes differ because one model has more tokens: an embedding, a head or its bias."""
    if one[1:] != other[1:] or len(one) > 2 or has_number(name.split(".")):
        return False
    slot = model.places[name]
    config = model.config_of(slot.tensor)
    text = config.get("text_config")
    told = [c["vocab_size"] for c in (config, text) if isinstance(c, dict) and "vocab_size" in c]
    return slot.whole and (one[0] in told if told else owner(name).rpartition(".")[2] in _HEADS)


def _worth(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix of some size, its factors of rank 1 smaller than it is.

    Depthwise convolutions are not: PEFT's factors cannot say their groups.
    """
    if len(shape) < 2 or not name.endswith(".weight") or (len(shape) > 2 and shape[1] == 1):
        return False
    rest = math.prod(shape[1:])
    return shape[0] > 1 and rest > 1 and shape[0] + rest < shape[0] * rest


def _is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a stack of experts: bare, of three axes, each expert a matrix of some size."""
    bare = len(shape) == 3 and not name.endswith((".weight", ".bias"))
    return bare and shape[0] > 1 and _worth(".weight", shape[1:])


def _enter_stack(found: Survey, name: str, one: Tensor, other: Tensor, base: Model) -> None:
    """Each expert of a stack as a pair of its own, ``<name>.<number>``."""
    experts, *shape = one.shape
    layer: Layer = "transposed" if experts_transposed(base.config_of(name)) else "plain"
    for number in range(experts):
        at, to = (View(tensor.slice(number, number + 1).reshape(*shape)) for tensor in (one, other))
        found.pairs.append(Pair(f"{name}.{number}", at, to, layer))
    found.stacks[found.prefix + name] = hollow(experts, "transposed" if layer == "transposed" else "plain")


def _layer(name: str, slot: Slot, model: Model) -> Layer:
    shape = model.shape(slot.tensor)
    if len(shape) == 2 and slot == Slot(slot.tensor) and stores_transposed(slot.tensor, model):
        return "transposed"
    leaf = module_of(name).rpartition(".")[2]
    table = "emb" in leaf and shape[0] == model.config_of(slot.tensor).get("vocab_size")
    return "embedding" if len(shape) == 2 and (leaf in EMBEDDING_LEAVES or table) else "plain"


# ---------------------------------------------------------------- the extraction


@dataclass(frozen=True)
class Extracted(ModuleResult):
    """One module; ``needed`` is the rank that keeps each share of the energy, None where that is more than known."""

    needed: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Extraction(Result):
    """An extracted adapter; ``needed`` is the rank for all modules that keeps each share of the whole energy."""

    needed: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What is known of a spectrum: its leading values, all of them where ``complete``, and the whole energy."""

    values: np.ndarray
    energy: float
    complete: bool


@dataclass(frozen=True)
class Task:
    """How one difference is to be factored."""

    choice: Choice
    dtype: str | None = None
    to_device: ToDevice | None = None
    seed: int = 0

    @property
    def threads(self) -> int:
        """Modules at once: one BLAS thread each on the processor, one after the other on an accelerator."""
        return thread_count() if self.to_device is None else 1

    def truncate(self, change: np.ndarray, rank: int, bound: float | None = None) -> tuple[Truncation, Known]:
        """The leading part of a difference [o,i]: of ``rank``, or the smallest with error ``bound`` below it."""
        matrix = change if self.to_device is None else self.to_device(change)
        short = min(change.shape)
        rank = min(rank, short)
        if short <= EXACT_SIDE:
            whole = exact_svd(matrix)
            if bound is not None:
                rank = max(1, min(rank, rank_for_error(whole.values, whole.energy, bound)))
            return on_host(whole.cut(rank)), Known(whole.values, whole.energy, True)
        found = (
            truncated_svd(matrix, rank, self.seed) if bound is None else adaptive_svd(matrix, bound, rank, self.seed)
        )
        return on_host(found), Known(found.values, found.energy, len(found.values) == short)


@dataclass(frozen=True)
class Made:
    """A LoRA as it will be stored, what it misses of the difference, and what is known of the spectrum."""

    update: LowRank
    lost: float
    whole: float
    known: Known


def extract(
    base: Model,
    tuned: Model,
    choice: Choice,
    *,
    include: str | None = None,
    exclude: str | None = None,
    dtype: str | None = None,
    to_device: ToDevice | None = None,
    seed: int = 0,
    check: Callable[[Adapter], object] | None = None,
    size_of: SizeOf = bounded_size,
    progress: Progress | None = None,
) -> Extraction:
    """A LoRA of TUNED - BASE; merged into BASE it gives TUNED up to the stated error.

    Each difference is taken in float32 from the stored values and truncated within 1.0005 of the best error
    (`truncated_svd`); norms, biases, resized embeddings and what only TUNED has are carried whole. Factors are stored
    in ``dtype``, the base's own where None: rounding them to bfloat16 adds an error of 0.24% of the kept norm, to
    float16 0.03%, at right angles to the truncation's, and is in the errors told. (Solving the second factor anew
    against the rounded first takes back a fiftieth of that: what rounding adds lies outside the rank's own space.)
    Both ends of tied weights get the same factors, which keeps the tie.
    ``check`` sees the adapter as it will be, of rank 1 and all zero, before the first SVD; ``size_of`` weighs one for
    ``max_size``. Raises what `survey` and ``check`` raise, and NumericError for NaN or infinities.
    """
    found = survey(base, tuned, include, exclude)
    task = Task(choice, dtype, to_device, seed)
    if check is not None:
        _check_first(check, found, base, task)
    ranks: Mapping[str, int] = {}
    if choice.max_size is not None:
        weigh = lambda ranks: size_of(_planned(found, _evened(ranks, found), base, task))  # noqa: E731
        ranks = _evened(ranks_for_size(found, task, choice.max_size, weigh), found)
    make = lambda pair: _made(pair, task, ranks.get(pair.name))  # noqa: E731
    made = {p.name: m for p, m in each_pair(make, found.pairs, task.threads, progress) if m is not None}
    return _result(found, made, base, choice)


def _evened(ranks: Mapping[str, int], found: Survey) -> dict[str, int]:
    """Ranks with one for all experts of a stack, which are stored so: what they got together, shared out."""
    evened = dict(ranks)
    for stack, like in found.stacks.items():
        members = [f"{stack.removeprefix(found.prefix)}.{number}" for number in range(like.experts)]
        share = max(1, sum(ranks.get(name, 0) for name in members) // like.experts)
        evened.update({name: share for name in members if name in ranks})
    return evened


def _check_first(check: Callable[[Adapter], object], found: Survey, base: Model, task: Task) -> None:
    """Let ``check`` see what will come out; pairs are only read where it objects: one may hold no difference."""
    try:
        check(_planned(found, {pair.name: 1 for pair in found.pairs}, base, task))
    except LossError:
        changed = {pair.name: 1 for pair in found.pairs if pair.difference() is not None}
        check(_planned(found, changed, base, task))


def _planned(found: Survey, ranks: Mapping[str, int], base: Model, task: Task) -> Adapter:
    """The adapter of these ranks that will come out, all zero."""
    updates: dict[str, Update] = {}
    for pair in (pair for pair in found.pairs if pair.name in ranks):
        piece = Piece(_NOTHING, pair.shape, task.dtype or pair.base.tensor.dtype, pair.layer)
        updates[found.prefix + module_of(pair.name)] = piece.hollow(ranks[pair.name])
    carried = {found.prefix + n: t for n, t in found.carried.items()}
    return together(Adapter(updates, carried, _metadata(found, base)), found.stacks)


_NOTHING = Truncation(np.zeros((0, 0)), np.zeros(0), np.zeros((0, 0)), 0.0)


def each_pair(
    compute: Callable[[Pair], Done], pairs: Sequence[Pair], threads: int, progress: Progress | None = None
) -> Iterator[tuple[Pair, Done]]:
    """``compute`` of every pair, several at once; the two ends of tied weights are computed once.

    Every module runs on one BLAS thread, so that results do not depend on how many there are.
    """
    firsts: dict[tuple[int, int], Pair] = {}
    for pair in pairs:
        firsts.setdefault(_identity(pair), pair)
    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        made = counted(pool.map(compute, firsts.values()), (pair.nbytes for pair in firsts.values()), progress)
    results = dict(zip(firsts, made, strict=True))
    for pair in pairs:
        yield pair, results[_identity(pair)]


def _identity(pair: Pair) -> tuple[int, int]:
    """The same for pairs of the very same values."""
    return id(pair.base.tensor), id(pair.tuned.tensor)


def _made(pair: Pair, task: Task, given: int | None = None) -> Made | None:
    """The LoRA of one difference; None where there is none.

    Where an error is asked for, what rounding to the stored dtype adds to it is made up for by further rank.
    """
    change = pair.difference()
    if change is None:
        return None
    rank = given or task.choice.rank or pair.short
    goal = None if task.choice.bound is None else max(task.choice.bound, FLOOR)
    stored = task.dtype or pair.base.tensor.dtype
    bound = goal
    for _ in range(2):
        found, known = task.truncate(change, rank, bound)
        update = Piece(found, pair.shape, stored, pair.layer).low_rank(len(found.values))
        lost, whole = written_error(change, update)
        if goal is None or bound is None or lost <= goal**2 * whole or len(found.values) >= min(rank, pair.short):
            break
        rounding = lost / whole - found.error(len(found.values)) ** 2
        if goal**2 <= 1.1 * rounding:
            break
        bound = math.sqrt(goal**2 - 1.1 * max(rounding, 0.0))
    return Made(update, lost, whole, known)


def ranks_for_size(found: Survey, task: Task, size: int, weigh: Callable[[Mapping[str, int]], int]) -> dict[str, int]:
    """Ranks that lose least for a file of ``size`` bytes, by pair; ``weigh`` tells the bytes of one with ranks.

    Spectra are computed as far as they are needed: a module that gets all that is known of it is looked at again,
    twice as far. Factors are not kept.
    """
    pieces: dict[str, Piece] = {}
    pairs = {pair.name: pair for pair in found.pairs}
    units = sum(sum((p.shape[0], math.prod(p.shape[1:]))) * 2 for p in found.pairs)
    depth = 8 + 2 * size // max(units, 1)
    depths = {name: min(depth, pair.short) for name, pair in pairs.items()}
    ranks: dict[str, int] = {}
    todo = list(pairs)
    while todo:
        look = lambda pair: _spectrum(pair, task, depths[pair.name])  # noqa: E731
        for pair, piece in each_pair(look, [pairs[name] for name in todo], task.threads):
            if piece is not None:
                pieces[pair.name] = replace(piece, layer=pair.layer)
        limit = task.choice.rank or max((pair.short for pair in found.pairs), default=1)
        ranks = fit_size(pieces, task.choice, weigh) if pieces else {}
        todo = [n for n, rank in ranks.items() if rank >= depths[n] < min(limit, pairs[n].short)]
        depths.update({name: min(2 * depths[name], pairs[name].short) for name in todo})
    return ranks


def _spectrum(pair: Pair, task: Task, depth: int) -> Piece | None:
    """The leading ``depth`` singular values of one difference, without factors."""
    change = pair.difference()
    if change is None:
        return None
    found, _ = task.truncate(change, depth)
    bare = Truncation(found.up[:, :0], found.values, found.down[:0], found.energy)
    return Piece(bare, pair.shape, task.dtype or pair.base.tensor.dtype, pair.layer)


def on_host(found: Truncation) -> Truncation:
    """A truncation in ordinary memory, its factors in float32."""
    up, down = (np.array(to_numpy(factor), np.float32) for factor in (found.up, found.down))
    return Truncation(up, found.values, down, found.energy, found.complete)


def written_error(change: np.ndarray, made: LowRank) -> tuple[float, float]:
    """Squared norms of what a stored LoRA misses of a difference [o,i*k], and of the difference; by row blocks."""
    held = made.oriented("plain") if made.layer == "transposed" else made
    up, down = held.factors()
    lost = whole = 0.0
    step = max(1, (1 << 22) // change.shape[1])
    for start in range(0, len(change), step):
        rows = change[start : start + step]
        miss = rows - up[start : start + step] @ down
        lost += float(np.square(miss, dtype=np.float64).sum())
        whole += float(np.square(rows, dtype=np.float64).sum())
    return lost, whole


# ---------------------------------------------------------------- the report


def _result(found: Survey, made: Mapping[str, Made], base: Model, choice: Choice) -> Extraction:
    layers = {pair.name: pair.layer for pair in found.pairs}
    updates: dict[str, Update] = {}
    modules: list[Extracted] = []
    for name, one in made.items():
        module = found.prefix + module_of(name)
        updates[module] = replace(one.update, layer=layers[name])
        share = one.lost / one.whole
        needed = {f"{share:.0%}": rank_for_share([one.known], share) for share in SHARES}
        modules.append(Extracted(module, one.update.rank, math.sqrt(share), max(0.0, 1 - share), needed))
    lost, whole = sum(m.lost for m in made.values()), sum(m.whole for m in made.values())
    known = [one.known for one in made.values()]
    carried = {found.prefix + n: t for n, t in found.carried.items()}
    return Extraction(
        together(Adapter(updates, carried, _metadata(found, base)), found.stacks),
        tuple(modules),
        math.sqrt(lost / whole) if whole > 0 else 0.0,
        tuple(_warnings(found, modules, choice)),
        {f"{share:.0%}": rank_for_share(known, share) for share in SHARES} if known else {},
    )


def longest_needed(adapter: Adapter) -> dict[str, int]:
    """No shorter, as text, than `Extraction.needed` of an extraction that has these modules."""
    side = max((max(update.shape) for update in adapter.updates.values()), default=1)
    return {f"{share:.0%}": 10 ** max(len("null"), len(str(side))) - 1 for share in SHARES}


def _metadata(found: Survey, base: Model) -> Metadata:
    """The metadata of the adapter; names that begin with a pipeline component are those of diffusers."""
    components = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.")
    names = [found.prefix + pair.name for pair in found.pairs]
    diffusion = base.architecture is not None or "model_index.json" in base.others or found.prefix in components
    named = diffusion and any(name.startswith(components) for name in names)
    architecture = getattr(base.architecture, "name", None)
    return Metadata("diffusers" if named else "peft", base_model=str(base.path), architecture=architecture)


def _warnings(found: Survey, modules: Sequence[Extracted], choice: Choice) -> Iterator[str]:
    if found.left_out:
        yield f"{len(found.left_out):,} tensors are left out by --include and --exclude: {some(found.left_out)}"
    if choice.bound is None or choice.rank is not None:
        return
    missed = [m.module for m in modules if m.relative_error > max(choice.bound, FLOOR) * 1.001]
    if missed:
        yield f"rounding keeps {len(missed):,} modules from the error asked for: {some(missed)}; choose a wider --dtype"


def rank_for_share(spectra: Sequence[Known], share: float) -> int | None:
    """The smallest rank, the same for all, that keeps a share of their energy together; None where it is not known."""
    longest = max((len(one.values) for one in spectra), default=0)
    kept, energy, sure = np.zeros(longest), 0.0, longest
    for one in spectra:
        own = np.cumsum(np.square(np.asarray(one.values, np.float64)))
        energy += one.energy
        if len(own):
            kept += np.concatenate((own, np.full(longest - len(own), own[-1])))
        sure = sure if one.complete else min(sure, len(own))
    enough = np.nonzero(kept >= share * energy * (1 - 1e-9))[0]
    return int(enough[0]) + 1 if len(enough) and enough[0] < sure else None
