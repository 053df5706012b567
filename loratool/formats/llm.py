"""What the dialects of language-model trainers share: name templates, one scaling for all, rows of rotary heads,
experts held as one stack.

Modules go by their Hugging Face names in an `Adapter`; each expert of a mixture has a module of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, Loss, Metadata, is_bias
from loratool.architectures.llm import EMBEDDING_LEAVES
from loratool.architectures.table import NameTable
from loratool.errors import FormatError, MatchError
from loratool.files import read_json
from loratool.formats.base import CONFIG, Evidence
from loratool.lazy import np
from loratool.tensors import FLOATS, Tensor, blocks, numpy_dtype
from loratool.update import DoRA, Layer, LowRank, Update, as_low_rank

if TYPE_CHECKING:
    from loratool.kinds.experts import Experts

# ---------------------------------------------------------------- names

# How Hugging Face spells the body of one model in several places: (as met, as the tables of dialects have it).
_BODIES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
    ("", "model."),
    ("", "transformer."),
    ("", "gpt_neox."),
)


@dataclass(frozen=True)
class Templates:
    """Pairs of module names, Hugging Face's and a dialect's, in which ``{}`` stands for a number (layer, expert).

    Raises ValueError when the pairs are not one-to-one.
    """

    pairs: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        assert self._table  # one-to-one, and each side has as many numbers
        if any(one.count("{}") != other.count("{}") for one, other in self.pairs):
            raise ValueError("the two sides of a pair have other numbers")

    @cached_property
    def _table(self) -> NameTable:
        return NameTable(self.pairs)

    def there(self, name: str) -> str | None:
        """The dialect's name of a module, also where its body is spelled otherwise."""
        bodies = (new + name.removeprefix(old) for old, new in _BODIES if name.startswith(old))
        found = (_translated(self._table.forward, spelled) for spelled in (name, *bodies))
        return next((other for other in found if other), None)

    def back(self, name: str) -> str | None:
        """The Hugging Face name of a dialect's module."""
        return _translated(self._table.backward, name)


def _translated(table: Mapping[str, str], name: str) -> str | None:
    parts = name.split(".")
    template = table.get(".".join("{}" if part.isdecimal() else part for part in parts))
    return template.format(*(part for part in parts if part.isdecimal())) if template else None


# (where the experts of a layer lie, their leaf) of one expert's module -> of the stack of all
ExpertLeaves = Mapping[tuple[str, str], tuple[str, str]]


def expert_of(name: str) -> tuple[str, str, int, str] | None:
    """(what comes before, the word before the number, number, leaf) of one expert's module:
    ``model.layers.0``, ``mlp.experts``, 3, ``gate_proj``. None where the name is no expert's."""
    parts = name.split(".")
    if len(parts) < 5 or not parts[-2].isdecimal() or parts[-3] != "experts":
        return None
    return ".".join(parts[:-4]), ".".join(parts[-4:-2]), int(parts[-2]), parts[-1]


# ---------------------------------------------------------------- the base


def base_config(adapter: Adapter) -> Mapping[str, Any]:
    """The configuration of an adapter's base: as given, or of the local folder that the adapter names; else empty.

    Of a model of several parts it is that of the text model.
    """
    config = adapter.metadata.base_config
    name = adapter.metadata.base_model
    if not config and name and (Path(name) / "config.json").is_file():
        found = read_json(Path(name) / "config.json")
        config = found if isinstance(found, dict) else {}
    return text_config(config)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a configuration, those of its text model first."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def is_tied(config: Mapping[str, Any], default: bool = False) -> bool:
    """Whether a configuration says that the output projection is the embedding."""
    return bool(config.get("tie_word_embeddings", default))


def size(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these fields that is set, a positive number; None where there is none. Raises FormatError."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if type(value) is not int or not 0 < value < 1 << 31:
                raise FormatError(f"the base's configuration says {name} = {str(value)[:40]!r}, which is no size")
            return value
    return None


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model: of the queries, and of keys and values."""

    queries: int
    keys: int

    def of(self, leaf: str) -> int | None:
        """The heads of a projection that rotary embeddings turn; None for all others."""
        return {"q_proj": self.queries, "k_proj": self.keys}.get(leaf)


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """The heads that a configuration (of Hugging Face, or of mistral: params.json) tells."""
    config = text_config(config)
    queries = size(config, "num_attention_heads", "n_head", "n_heads")
    keys = size(config, "num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_head_kv")
    return Heads(queries, keys or queries) if queries else None


# ---------------------------------------------------------------- rows of rotary heads


def interleaved(rows: int, heads: int) -> np.ndarray:
    """Which rows, in order, make halves into pairs: Hugging Face's rotary layout into Meta's (llama.cpp's)."""
    _check_heads(rows, heads)
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def halved(rows: int, heads: int) -> np.ndarray:
    """Which rows, in order, make pairs into halves: the inverse of `interleaved`."""
    _check_heads(rows, heads)
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def ungrouped(rows: int, queries: int, hidden: int) -> np.ndarray:
    """The order that makes [q..., k, v] of each head, or group of heads, into all q, all k, all v."""
    head = hidden // queries if queries else 0
    groups = (rows // head - queries) // 2 if head else 0
    if head == 0 or groups < 1 or queries % groups or (queries + 2 * groups) * head != rows:
        raise FormatError(
            f"{rows} rows are not {queries} heads and their keys and values", hint="is this its base model?"
        )
    grouped = np.arange(rows).reshape(groups, -1, head)
    return np.concatenate([part.reshape(-1) for part in (grouped[:, :-2], grouped[:, -2], grouped[:, -1])])


def _check_heads(rows: int, heads: int) -> None:
    if rows % (2 * heads):
        raise FormatError(f"{rows} rows are not {heads} heads of even size", hint="is this its base model?")


def taken(tensor: Tensor, order: np.ndarray) -> Tensor:
    """The rows of a tensor in another order."""
    return Tensor(tensor.dtype, (len(order), *tensor.shape[1:]), lambda a, b: tensor.array()[order[a:b]])


def reordered(update: Update, order: np.ndarray) -> Update:
    """An update (LoRA, or DoRA by output) with its output rows in another order."""
    if isinstance(update, DoRA):
        flat = update.magnitude.reshape(update.magnitude.size)
        direction = reordered(update.direction, order)
        assert isinstance(direction, LowRank)
        return replace(update, direction=direction, magnitude=taken(flat, order))
    assert isinstance(update, LowRank)
    return replace(update, up=taken(update.up, order))


def unreadable(update: Update, error: FormatError) -> Update:
    """An update whose shapes are known while its values are not: reading them raises ``error``."""

    def refuse(start: int, stop: int) -> np.ndarray:
        raise error

    def shut(low: Update) -> LowRank:
        assert isinstance(low, LowRank)
        return replace(low, up=Tensor(low.up.dtype, low.up.shape, refuse))

    if isinstance(update, DoRA):
        magnitude = Tensor(update.magnitude.dtype, update.magnitude.shape, refuse)
        return replace(update, direction=shut(update.direction), magnitude=magnitude)
    return shut(update)


# ---------------------------------------------------------------- factors


def factor_pair(
    down: Tensor,
    up: Tensor,
    scaling: float | None,
    magnitude: Tensor | None = None,
    layer: Layer = "plain",
    where: object = "",
) -> Update:
    """The update of down [r,i] and up [o,r], which ``scaling`` multiplies; a DoRA by output with a magnitude [o].

    Raises FormatError for factors that are no pair of matrices of floating numbers.
    """
    for tensor in (down, up, *([magnitude] if magnitude else [])):
        if tensor.dtype not in FLOATS:
            raise FormatError(f"a factor is stored as {tensor.dtype}", where)
    if len(down.shape) != 2 or len(up.shape) != 2:
        raise FormatError(f"factors of shapes {list(down.shape)} and {list(up.shape)} are no pair of matrices", where)
    try:
        low = LowRank(down, up, alpha=None if scaling is None else scaling * down.shape[0], layer=layer)
        return DoRA(low, magnitude, 0) if magnitude else low
    except FormatError as error:
        raise FormatError(error.what, where, error.hint) from None


def transposed(tensor: Tensor, where: object) -> Tensor:
    """The transpose of a matrix. Raises FormatError for what is none."""
    if len(tensor.shape) != 2:
        raise FormatError(f"a factor of shape {list(tensor.shape)} is no matrix", where)
    return tensor.T


def is_embedding(module: str) -> bool:
    """Whether a module is a table of rows, as its name tells."""
    return module.rpartition(".")[2] in EMBEDDING_LEAVES


def low_rank(update: Update) -> LowRank | None:
    """The plain LoRA of an update, of a DoRA that of its direction; None where there is none."""
    return as_low_rank(update.direction if isinstance(update, DoRA) else update)


def simple(update: Update) -> Update:
    """An update as its plain LoRA, a DoRA as it is."""
    if isinstance(update, DoRA):
        return update
    low = low_rank(update)
    assert low is not None  # the losses said so
    return low


def no_pair(name: str, update: Update, dora: bool = False) -> str | None:
    """Why factors (and, for ``dora``, magnitudes) do not say an update; None where they do."""
    if is_bias(name):
        return "a bias update"
    if isinstance(update, DoRA):
        if not dora:
            return "a DoRA magnitude"
        if update.axis != 0:
            return "a DoRA magnitude for each input"
    low = low_rank(update)
    if low is None:
        return f"an update of kind {update.kind} has no plain LoRA form"
    return "a convolution" if len(low.down.shape) != 2 else None


Reason = Callable[[str, Update], str | None]


def lost(adapter: Adapter, reason: Reason) -> list[Loss]:
    """What a format of factors cannot say: updates for which ``reason`` has one, and all that is carried whole."""
    found: dict[str, Loss] = {}
    for name, update, spelling in _apart(adapter):
        if why := reason(name, update):
            found.setdefault(spelling, Loss(spelling, why))
    return [*found.values(), *(Loss(adapter.spelling(n), "a tensor trained whole") for n in adapter.carried)]


def said(adapter: Adapter, reason: Reason) -> dict[str, Update]:
    """The updates for which there is no reason not to say them; stacked experts one by one."""
    return {name: update for name, update, _ in _apart(adapter) if reason(name, update) is None}


def _apart(adapter: Adapter) -> Iterator[tuple[str, Update, str]]:
    """(name, update, spelling) of all updates, as plain LoRAs where they have one; those of stacks of experts one by
    one where the base tells how."""
    from loratool.kinds.experts import Experts

    config: Mapping[str, Any] | None = None
    for name, update in adapter.updates.items():
        parts: Mapping[str, Update] = {}
        if isinstance(update, Experts):
            config = base_config(adapter) if config is None else config
            parts = one_by_one(name, update, config)
        for own, part in (parts or {name: update}).items():
            yield own, part if isinstance(part, DoRA) else as_low_rank(part) or part, adapter.spelling(name)


def commonest(values: Iterable[Any], default: Any = None) -> Any:
    """The value that most have; the first of them where several do."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default


def padded(low: LowRank, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """down [rank,i] and up [o,rank] whose product times ``scaling`` is the delta: zeros fill the rank."""
    down, up = low.down, multiplied(low.up.reshape(*low.up.shape[:2]), low.scaling, scaling)
    more = rank - low.rank
    if more == 0:
        return down, up
    wide = Tensor(up.dtype, (up.shape[0], rank), lambda a, b: np.pad(up.load(a, b), ((0, 0), (0, more))))
    return Tensor.joined([down, zeros(down.dtype, more, down.shape[1])]), wide


@dataclass(frozen=True)
class Uniform:
    """One rank and one scaling for all modules, for formats that know no more: the largest, and what most have."""

    rank: int
    scaling: float

    @staticmethod
    def of(updates: Iterable[Update]) -> Uniform:
        """What suits these updates best."""
        lows = [low for update in updates if (low := low_rank(update))]
        return Uniform(
            max((low.rank for low in lows), default=8),
            commonest((low.scaling for low in lows if low.scaling), 0.0),
        )

    @property
    def alpha(self) -> float:
        """What divided by the rank is the scaling."""
        return self.scaling * self.rank

    def pair(self, update: Update) -> tuple[Tensor, Tensor]:
        """down [rank,i] and up [o,rank] of an update that has a plain LoRA."""
        low = low_rank(update)
        assert low is not None  # the losses said so
        return padded(low, self.rank, self.scaling)


def zeros(dtype: str, *shape: int) -> Tensor:
    """A tensor of zeros."""
    return Tensor(dtype, shape, lambda a, b: np.zeros((b - a, *shape[1:]), numpy_dtype(dtype)))


def multiplied(tensor: Tensor, scaling: float, unit: float) -> Tensor:
    """A factor whose product had ``scaling``, for a reader that multiplies by ``unit``.

    Stored as it was where that is exact, else in float32. Raises FormatError where nothing can be said with 0.
    """
    if scaling == unit:
        return tensor
    if unit == 0 and scaling != 0:
        raise FormatError("a scaling of 0 cannot be made up for")
    by = scaling / unit if unit else 0.0
    narrow = numpy_dtype(tensor.dtype)
    wide = np.dtype(np.float64 if tensor.dtype == "F64" else np.float32)

    def load(start: int, stop: int) -> np.ndarray:
        return (tensor.float(start, stop) * wide.type(by)).astype(wide)

    def exact(start: int, stop: int) -> bool:
        with np.errstate(over="ignore"):
            values = load(start, stop)
            return np.array_equal(values.astype(narrow).astype(wide), values)

    if math.frexp(by)[0] in (0.5, -0.5) and all(exact(*block) for block in blocks(tensor)):
        return Tensor(tensor.dtype, tensor.shape, lambda a, b: load(a, b).astype(narrow))
    return Tensor("F64" if wide == np.float64 else "F32", tensor.shape, load)


def narrowed(tensor: Tensor) -> Tensor:
    """A tensor for readers that have no float64; `rounded` says what that costs."""
    return tensor.cast("F32") if tensor.dtype == "F64" else tensor


def rounded(adapter: Adapter, reason: Reason) -> list[Loss]:
    """The losses of `narrowed`: what is said of float64 values that float32 does not hold."""
    found: dict[str, Loss] = {}
    for name, update, spelling in _apart(adapter):
        doubles = {slot: tensor for slot, tensor in update.slots.items() if tensor.dtype == "F64"}
        wide = [slot for slot, tensor in doubles.items() if not narrowed(tensor).same_values(tensor)]
        if wide and reason(name, update) is None:
            found.setdefault(spelling, Loss(spelling, f"no float64: {' and '.join(wide)} would be rounded to float32"))
    return list(found.values())


# ---------------------------------------------------------------- experts


def gathered(updates: Mapping[str, Update], leaves: ExpertLeaves) -> dict[str, dict[int, Update]]:
    """The experts' updates by the name of their stack in a dialect, by number."""
    found: dict[str, dict[int, Update]] = {}
    for name, update in updates.items():
        expert = expert_of(name)
        if expert and (expert[1], expert[3]) in leaves:
            middle, leaf = leaves[expert[1], expert[3]]
            found.setdefault(f"{expert[0]}.{middle}.{leaf}", {})[expert[2]] = update
    return found


def in_stack(name: str, leaves: ExpertLeaves) -> bool:
    """Whether a module is an expert that a dialect holds in a stack."""
    expert = expert_of(name)
    return expert is not None and (expert[1], expert[3]) in leaves


def stacked(experts: Mapping[int, Update], count: int, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """down [E,rank,i] and up [E,o,rank] of a stack of experts; those without an update are zero."""
    lows = {number: low_rank(update) for number, update in experts.items()}
    pairs = {number: padded(low, rank, scaling) for number, low in lows.items() if low}
    some_down, some_up = next(iter(pairs.values()))
    none = zeros(some_down.dtype, *some_down.shape), zeros(some_up.dtype, *some_up.shape)
    downs, ups = zip(*(pairs.get(number, none) for number in range(count)), strict=True)
    down, up = Tensor.joined(downs), Tensor.joined(ups)
    return (
        down.reshape(count, down.shape[0] // count, *down.shape[1:]),
        up.reshape(count, up.shape[0] // count, *up.shape[1:]),
    )


def unstacked(down: Tensor, up: Tensor, where: object) -> list[tuple[Tensor, Tensor]]:
    """The pairs of each expert of a stack down [E,r,i], up [E,o,r]; a first axis of 1 stands for all.

    Raises FormatError where the two do not have as many experts.
    """
    if len(down.shape) != 3 or len(up.shape) != 3:
        raise FormatError(f"factors of shapes {list(down.shape)} and {list(up.shape)} are no stack of experts", where)
    count = max(down.shape[0], up.shape[0])
    if {down.shape[0], up.shape[0]} - {1, count} or 0 in (*down.shape, *up.shape) or count > 1 << 16:
        raise FormatError(f"stacks of {down.shape[0]} and {up.shape[0]} experts", where)
    return [(_one(down, number), _one(up, number)) for number in range(count)]


def _one(tensor: Tensor, number: int) -> Tensor:
    """One expert's matrix of a stack."""
    at = number if tensor.shape[0] > 1 else 0
    _, rows, columns = tensor.shape
    return Tensor(tensor.dtype, (rows, columns), lambda a, b: tensor.load(at, at + 1)[0, a:b])


def one_by_one(name: str, stack: Experts, config: Mapping[str, Any]) -> dict[str, Update]:
    """The LoRA of each projection of each expert of a stack, by the names that transformers 4 has for them.

    Empty where the configuration does not tell the layout, or the shapes are of no model like it.
    """
    from loratool.architectures.layouts import ONE_BY_ONE, STACKS, Naming
    from loratool.layouts import expert_of

    kind, expert = str(config.get("model_type")), expert_of(name)
    layout = STACKS.get(kind)
    hidden, inner = size(config, "hidden_size"), size(config, "moe_intermediate_size", "intermediate_size")
    if layout is None or layout.transposed is None or expert is None or not hidden or not inner:
        return {}
    shape = {"down": (hidden, inner), "gate_up": (2 * inner, hidden)}.get(expert.role, (inner, hidden))  # [o,i]
    try:
        orders = stack.orders(layout.transposed)
    except MatchError:  # square, and nothing tells which axis is the input
        return {}
    turned = next((one for one in orders if one.shape[1:] == (shape[::-1] if layout.transposed else shape)), None)
    if turned is None:
        return {}
    parts = name.split(".")
    before = parts[:-2] if parts[-2] == "experts" else parts[:-1]
    naming = ONE_BY_ONE.get(kind, Naming(before[-1]))
    where = ".".join([*before[:-1], naming.block, "experts"])
    leaves = dict(zip(("gate", "up", "down"), naming.leaves, strict=True))
    found: dict[str, Update] = {}
    flipped = (turned.order == "transposed") != layout.transposed
    for number in range(stack.experts):
        one = replace(turned, order="plain").expert(number)
        one = replace(one, down=one.up.T, up=one.down.T) if flipped else one  # now up @ down is the delta [o,i]
        if expert.role != "gate_up":
            found[f"{where}.{number}.{leaves[expert.role]}"] = one
            continue
        halves = (slice(0, None, 2), slice(1, None, 2)) if layout.interleaved else (slice(0, inner), slice(inner, None))
        for role, half in zip(("gate", "up"), halves, strict=True):
            found[f"{where}.{number}.{leaves[role]}"] = replace(one, up=taken(one.up, np.arange(2 * inner)[half]))
    return found


def expert_count(config: Mapping[str, Any], experts: Iterable[int], where: object) -> int:
    """The experts of a layer: as the base's configuration says, else as many as have updates.

    Raises FormatError where an update is beyond them.
    """
    known = size(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    needed = max(experts) + 1
    if known and needed > known:
        raise FormatError(f"expert {needed - 1} of a base that has {known}", where)
    return known or needed


# ---------------------------------------------------------------- configurations


def config_beside(evidence: Evidence) -> Mapping[str, Any]:
    """adapter_config.json in the folder of the tensors, whatever their file is called; empty where there is none."""
    path = evidence.beside(CONFIG)
    found = read_json(path) if path else {}
    if not isinstance(found, dict):
        raise FormatError("the configuration is not a JSON object", path or "")
    return found


def told_scaling(config: Mapping[str, Any], evidence: Evidence) -> Callable[[int, object], float | None]:
    """lora_alpha / r of a configuration, or what the user says, as a function of a module's rank and place.

    Raises FormatError for numbers that are none, and where r is not the rank.
    """
    r, alpha = config.get("r"), config.get("lora_alpha")
    for name, value in (("r", r), ("lora_alpha", alpha)):
        if value is not None and (type(value) not in (int, float) or not abs(value) < 1e300):
            raise FormatError(f"{name} is {str(value)[:40]!r}, not a number", evidence.path)

    def scaling(rank: int, where: object) -> float | None:
        if evidence.scaling is not None or r is None or alpha is None:
            return evidence.scaling
        if rank != r or rank == 0:
            raise FormatError(
                f"the configuration says rank {r}, the tensors have rank {rank}: the scaling is unknown",
                where,
                "correct r in adapter_config.json, or give --scaling",
            )
        return float(alpha / rank)

    return scaling


# ---------------------------------------------------------------- metadata


def metadata(evidence: Evidence, format: str, **more: Any) -> Metadata:
    """What a file of a dialect says beside its tensors; ``more`` are fields that are not the usual ones."""
    usual: dict[str, Any] = {
        "path": evidence.path,
        "weights": (evidence.weights,),
        "strings": evidence.file.metadata,
        "base_config": evidence.base_config,
    }
    return Metadata(format, **{**usual, **more})


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts names with their numbers in order: layer 2 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]
