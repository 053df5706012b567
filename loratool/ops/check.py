"""Will an engine accept an adapter? A table of what it takes, and for each no the command that mends it.

Engines read some fields of a configuration and ignore others, which changes the result in silence; here each rule
looks at the updates themselves. Source: formats documents, llm.md section 9 and diffusion.md section 13.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from loratool.adapter import Adapter, Loss, is_bias
from loratool.errors import UsageError
from loratool.kinds.experts import Experts
from loratool.update import LowRank


@dataclass(frozen=True)
class Finding:
    """One rule of an engine: whether the adapter keeps it, what was found, and the command that mends it."""

    rule: str
    ok: bool
    found: str
    fix: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The fields of ``check --json``."""

    adapter: str
    engine: str
    accepted: bool
    checks: tuple[Finding, ...]
    warnings: tuple[str, ...]


Rule = Callable[["Question"], Finding]


@dataclass(frozen=True)
class Engine:
    """One engine: the rules it has, the formats it reads, and the one to write for it; ``rank`` is its usual limit."""

    rules: tuple[Rule, ...]
    reads: frozenset[str]
    format: str
    rank: int = 0
    ranks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What a rule may look at: the adapter, what the user calls it, and what the engine's own format cannot say."""

    adapter: Adapter
    name: str
    engine: Engine
    max_rank: int
    losses: Sequence[Loss] = ()

    @property
    def lows(self) -> dict[str, LowRank | Experts]:
        """The plain LoRAs by module."""
        return {n: u for n, u in self.adapter.modules().items() if isinstance(u, (LowRank, Experts))}

    @property
    def largest(self) -> int:
        """The largest rank of the adapter."""
        return max((u.rank or 0 for u in self.adapter.modules().values()), default=0)

    def convert(self, more: str) -> str:
        """A conversion of the adapter."""
        return f"loratool convert {self.name} -o OUT {more}"


# ---------------------------------------------------------------- rules


def _container(question: Question) -> Finding:
    own, engine = question.adapter.metadata.format, question.engine
    base = " --base BASE" if engine.format == "gguf" else ""  # whose architecture the names go by
    return Finding("format", own in engine.reads, own, question.convert(f"--to {engine.format}{base}"))


def _plain(question: Question) -> Finding:
    """Plain LoRA only."""
    others = Counter(u.kind for u in question.adapter.modules().values() if not isinstance(u, (LowRank, Experts)))
    base = " --base BASE" if any(u.needs_base for u in question.adapter.modules().values()) else ""
    fix = f"loratool resize {question.name} -o OUT --rank {question.largest or 16}{base}"
    return Finding("plain LoRA", not others, _counted(others) or "every module", fix)


def _rank(question: Question) -> Finding:
    fits = question.largest <= question.max_rank
    fix = f"loratool resize {question.name} -o OUT --rank {question.max_rank}"
    return Finding("rank", fits, f"{question.largest}, at most {question.max_rank}", fix)


def _one_scaling(question: Question) -> Finding:
    """One alpha / r for all modules: patterns are ignored."""
    scalings = Counter(f"{low.scaling:g}" for low in question.lows.values())
    return Finding("one scaling", len(scalings) < 2, _counted(scalings), question.convert("--to peft --uniform"))


def _not_stabilised(question: Question) -> Finding:
    """alpha / r, not alpha / sqrt(r): use_rslora is ignored."""
    some = sum(low.rank_stabilised for low in question.lows.values())
    found = f"{some} modules of {len(question.lows)} rank-stabilised" if some else "alpha / r"
    return Finding("scaling alpha / r", not some, found, question.convert("--to peft --uniform"))


def _nothing_whole(question: Question) -> Finding:
    whole = list(question.adapter.carried)
    fix = f"loratool merge BASE {question.name} -o MERGED"
    return Finding("no whole tensors", not whole, _some(whole) or "none", fix)


def _no_biases(question: Question) -> Finding:
    biases = [name for name in question.adapter.updates if is_bias(name)]
    fix = f"loratool merge BASE {question.name} -o MERGED"
    return Finding("no biases", not biases, _some(biases) or "none", fix)


def _listed_targets(question: Question) -> Finding:
    """target_modules as a list: a regular expression is refused."""
    told = question.adapter.metadata.config.get("target_modules")
    regex = isinstance(told, str) and told not in ("all-linear", "all")
    found = f"the expression {told[:60]!r}" if regex and isinstance(told, str) else "a list"
    return Finding("list of targets", not regex, found, question.convert("--to peft --uniform"))


def _values_with_queries(question: Question) -> Finding:
    """q_proj and v_proj together: they are fused in the engine."""
    names = {name.rpartition(".")[0] for name in question.adapter.modules() if name.endswith(".q_proj")}
    alone = [name for name in names if f"{name}.v_proj" not in question.adapter.updates]
    found = f"q_proj without v_proj in {len(alone)} layers" if alone else "q_proj and v_proj together, or neither"
    return Finding("fused attention", not alone, found, "train with v_proj as well, or merge the adapter")


def _expressible(question: Question) -> Finding:
    """Nothing that the engine's own format has no words for."""
    lost = [f"{loss.name} ({loss.reason})" for loss in question.losses]
    fix = f"loratool merge BASE {question.name} -o MERGED"
    return Finding("every update applied", not lost, _some(lost, 3) or "all of them", fix)


def _counted(counter: Mapping[str, int]) -> str:
    return ", ".join(f"{value} x {count}" if len(counter) > 1 else value for value, count in counter.items())


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_SERVED = (_container, _plain, _rank, _one_scaling, _nothing_whole, _no_biases)
ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(
        _SERVED,
        frozenset(("peft",)),
        "peft",
        16,
        (1, 8, 16, 32, 64, 128, 256, 320, 512),
        ("start it with --max-lora-rank of at least the adapter's rank",),
    ),
    "sglang": Engine(
        (*_SERVED, _not_stabilised, _listed_targets, _values_with_queries), frozenset(("peft",)), "peft", 64
    ),
    "llama.cpp": Engine((_container, _rank, _expressible), frozenset(("gguf",)), "gguf"),
    "mlx": Engine((_container, _rank, _expressible), frozenset(("mlx",)), "mlx"),
    "onnxruntime": Engine(
        (_plain, _rank, _nothing_whole, _no_biases),
        frozenset(),
        "",
        notes=("loratool export-onnx BASE ADAPTER -o OUT.onnx --mode inputs writes the adapter for this graph",),
    ),
    "comfyui": Engine(
        (_container, _rank, _expressible),
        frozenset(("kohya", "comfyui", "lycoris", "attn-procs", "bfl", "ai-toolkit")),
        "comfyui",
    ),
    "diffusers": Engine(
        (_container, _rank, _expressible),
        frozenset(("diffusers", "diffusers-old", "attn-procs", "kohya", "comfyui", "xlabs", "bfl", "ai-toolkit")),
        "diffusers",
    ),
}


def engine(name: str) -> Engine:
    """The engine of that name. Raises UsageError."""
    found = ENGINES.get(name)
    if found is None:
        raise UsageError("unknown engine", repr(name), f"one of {', '.join(ENGINES)}")
    return found


def check(
    adapter: Adapter, name: str, max_rank: int | None = None, losses: Sequence[Loss] = (), called: str = "ADAPTER"
) -> CheckReport:
    """Hold an adapter against what the engine called ``name`` accepts.

    ``losses`` are those of the engine's own format, ``called`` is how commands name the adapter. Raises UsageError for
    an unknown engine or a limit that is no rank.
    """
    chosen = engine(name)
    if max_rank is not None and (max_rank < 1 or (chosen.ranks and max_rank not in chosen.ranks)):
        known = ", ".join(map(str, chosen.ranks)) or "1 or more"
        raise UsageError(f"{name} has no limit of rank {max_rank}", hint=f"one of {known}")
    question = Question(adapter, called, chosen, max_rank or chosen.rank or 1 << 30, losses)
    findings = tuple(rule(question) for rule in chosen.rules if rule is not _rank or question.max_rank < 1 << 30)
    shown = tuple(replace(one, fix="") if one.ok else one for one in findings)
    notes = (*chosen.notes, *(() if adapter.metadata.scaling_known else ("the file does not tell its scaling",)))
    return CheckReport(called, name, all(one.ok for one in shown), shown, notes)
