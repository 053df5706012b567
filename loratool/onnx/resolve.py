"""Which weights of a graph the modules of an adapter are.

Every target must be found by exactly one way of reading the graph, and lands on every node that takes the module's
weight; what is not found is named with the reason. Source of the rules: see `loratool.onnx.operands`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from loratool.adapter import Adapter, is_bias, parameter
from loratool.architectures import Slot
from loratool.architectures.llm import CONV1D_NAMES, EMBEDDING_LEAVES
from loratool.errors import MatchError
from loratool.kinds.tokens import Tokens
from loratool.lazy import np
from loratool.model import Model
from loratool.names import Names, Unmatched
from loratool.onnx.graph import Graph, Use, Value, Weight
from loratool.onnx.operands import Operand, bias_of, module_names, operands, path_module, scope_module
from loratool.tensors import Tensor
from loratool.update import Replace, Update, rows

# a projection that graphs fuse -> the modules whose rows it holds, one below the other
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "to_qkv": ("to_q", "to_k", "to_v"),
}
_RENAMED = ((".self_attn.", ".attn."),)  # onnxruntime-genai


@dataclass(frozen=True, eq=False)
class Site:
    """One module of an adapter and the weight that it is in the graph.

    ``update`` changes the module's weight as torch has it ([out,in], OIHW, [entries,dim]; a vector), whatever the
    graph's layout. ``operands`` are the nodes that take it: one, or several of one module (branches of an If). All
    hold the same stored tensor, ``weight``. ``rows`` are the rows of a fused weight that the module is, None for the
    whole. ``spelling`` is the adapter's own name, ``resolver`` what found it: scopes, path, bias, name, values.
    """

    module: str
    update: Update
    weight: Weight
    operands: tuple[Operand, ...]
    resolver: str
    spelling: str
    rows: np.ndarray | None = field(default=None, repr=False)

    @property
    def uses(self) -> tuple[Use, ...]:
        """The inputs of nodes that are to see the change."""
        return tuple(operand.use for operand in self.operands)

    @property
    def quantised(self) -> str:
        """How the weight is quantised; empty where it is not."""
        return next((operand.quantised for operand in self.operands if operand.quantised), "")


@dataclass(frozen=True, eq=False)
class _Claim:
    """What one operand is said to be: a module, or ``rows`` of its stored weight (torch's orientation)."""

    operand: Operand
    source: str
    rows: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.operand.shape
        return shape if self.rows is None else (len(self.rows), *shape[1:])


def resolve(graph: Graph, adapter: Adapter, base_weights: Model | None = None) -> tuple[list[Site], list[Unmatched]]:
    """Where everything that ``adapter`` changes lies in ``graph``, and what has no place (with the reason).

    ``base_weights``, the torch checkpoint of the graph, finds by value what has lost its name, and proves the rest.
    Raises MatchError: a shape that differs, a weight that cannot be changed, two readings of one name, base weights
    that are not the graph's.
    """
    index = _Index(graph, base_weights)
    sites: list[Site] = []
    unmatched: list[Unmatched] = []
    for target, update in adapter.updates.items():
        vector = is_bias(target) or len(update.shape) == 1
        found = index.vector(target, update, adapter) if vector else index.weight(target, update, adapter)
        if isinstance(found, Unmatched) and update.homogeneous and is_bias(target) and index.has_no_bias(target):
            continue  # there is nothing to be rescaled
        sites += found if isinstance(found, list) else []
        unmatched += [found] if isinstance(found, Unmatched) else []
    for name, tensor in adapter.carried.items():
        found = index.carried(name, tensor, adapter)
        sites += found if isinstance(found, list) else []
        unmatched += [found] if isinstance(found, Unmatched) else []
    _check_taken(sites)
    if base_weights is not None:
        from loratool.onnx.values import confirm

        confirm(sites, base_weights, index.present)
    return sites, unmatched


class _Index:
    """The weights of a graph by module."""

    def __init__(self, graph: Graph, base: Model | None) -> None:
        self.graph = graph
        self.operands = tuple(operands(graph))
        self.claims: dict[str, list[_Claim]] = {}
        self.nameless: list[Operand] = []
        for operand in self.operands:
            told = module_names(graph, operand)
            if told:
                source, module = next(iter(told.items()))
                self.claims.setdefault(module, []).append(_Claim(operand, source))
            else:
                self.nameless.append(operand)
        if base is not None:
            self._by_value(base)
        self._fused()
        self.names = Names({f"{module}.weight": Slot(module) for module in self.claims})

    def _by_value(self, base: Model) -> None:
        """Operands without a sure name, by the base weights whose rows they hold."""
        from loratool.onnx.quantised import recognise
        from loratool.onnx.values import identify

        unsure = [c.operand for claims in self.claims.values() for c in claims if c.source not in ("scopes", "path")]
        told = list(identify([*self.nameless, *unsure], base))
        sure = {id(operand) for operand, _ in told}
        for module, claims in list(self.claims.items()):
            self.claims[module] = [c for c in claims if id(c.operand) not in sure]
        for operand, parts in told:
            for module, rows_ in parts:
                self.claims.setdefault(module, []).append(_Claim(operand, "values", rows_))
        self.claims = {module: claims for module, claims in self.claims.items() if claims}
        self.nameless = [operand for operand in self.nameless if id(operand) not in sure]
        for operand, module in list(recognise(self.graph, self.nameless, base)):
            self.claims.setdefault(module, []).append(_Claim(operand, "values"))
            self.nameless = [other for other in self.nameless if other is not operand]

    def _fused(self) -> None:
        """The parts of projections that the graph has fused."""
        for module, claims in list(self.claims.items()):
            parent, _, leaf = module.rpartition(".")
            for n, part in enumerate(FUSED.get(leaf, ())):
                name = f"{parent}.{part}" if parent else part
                if name not in self.claims:
                    self.claims[name] = [_Part(c.operand, c.source, None, n, len(FUSED[leaf])) for c in claims]

    def present(self, name: str) -> bool:
        """Whether the graph has a weight of that name, give or take leading segments."""
        return not isinstance(self.names.find(name), Unmatched)

    def find(self, target: str) -> tuple[str, str] | Unmatched:
        """The module of the graph that a target of the adapter means."""
        first = self.names.find(f"{target}.weight")
        if isinstance(first, Unmatched):
            for ours, theirs in _RENAMED:
                other = self.names.find(f"{target.replace(ours, theirs)}.weight")
                if ours in target and not isinstance(other, Unmatched):
                    return other
        return first

    def weight(self, target: str, update: Update, adapter: Adapter) -> list[Site] | Unmatched:
        """The sites of a module's weight."""
        spelling = adapter.spelling(target)
        hit = self.find(target)
        if isinstance(hit, Unmatched):
            return self._split(target, update, adapter) or Unmatched(spelling, self._why(target, update, hit.why))
        module = hit[0].removesuffix(".weight")
        kind = adapter.updates.get(target, update)  # of the layer, for a tensor that is carried along
        claims = [c for c in self.claims[module] if _same_kind(kind, c, module)]
        if not claims:
            return Unmatched(spelling, self._why(target, update, "the weight of that name is of another kind of layer"))
        self._check_applied(update, module, spelling)
        sites = self._sites(target, logical(update, target), claims, spelling)
        lent = self._lent(sites[0]) if isinstance(update, Tokens) else []
        return [*sites, *(site for site in lent if not any(t.endswith(site.module) for t in adapter.updates))]

    def _sites(self, target: str, update: Update, claims: Sequence[_Claim], spelling: str) -> list[Site]:
        """One site for each stored tensor that the claims mean."""
        by_weight: dict[Value, list[tuple[_Claim, Update]]] = {}
        for claim in claims:
            where = f"{spelling} -> {claim.operand.weight.value.name}"
            if claim.operand.refused:
                raise MatchError(f"this weight cannot be changed: {claim.operand.refused}", where)
            placed = _placed(claim, update)
            fitting = update.sized(placed.shape)
            if fitting is None:
                raise MatchError(
                    f"shapes differ: the adapter's update is {list(update.shape)}, "
                    f"the graph's weight {list(placed.shape)}",
                    where,
                    "the adapter was made for another base",
                )
            by_weight.setdefault(claim.operand.weight.value, []).append((placed, fitting))
        weights = [found[0][0].operand.weight for found in by_weight.values()]
        if any(not w.tensor.same_bytes(weights[0].tensor) for w in weights[1:]):
            names = ", ".join(w.value.name for w in weights[:3])
            raise MatchError("several weights of the graph are of one module", f"{spelling}: {names}")
        for found in by_weight.values():
            if len({(claim.operand.layout, claim.operand.gain) for claim, _ in found}) > 1:
                raise MatchError("nodes of one module take its weight in different ways", spelling)
        return [
            Site(
                target,
                found[0][1],
                found[0][0].operand.weight,
                tuple(claim.operand for claim, _ in found),
                found[0][0].source,
                spelling,
                found[0][0].rows,
            )
            for found in by_weight.values()
        ]

    def _lent(self, table: Site) -> list[Site]:
        """The head of a tied pair: PEFT's trained tokens are new at both ends, whichever they were trained at."""
        from loratool.onnx.values import leading

        found: list[Site] = []
        known = leading(table.weight.tensor, table.operands[0].layout)
        for operand in self.operands:
            if operand.table != table.operands[0].table and operand.shape == table.operands[0].shape:
                values = leading(operand.weight.tensor, operand.layout) if operand.weight.floating else None
                if values is not None and np.array_equal(values, known):
                    module = next(iter(module_names(self.graph, operand).values()), table.module)
                    found.append(replace(table, module=module, weight=operand.weight, operands=(operand,)))
        return found

    def _split(self, target: str, update: Update, adapter: Adapter) -> list[Site]:
        """The sites of a fused module that the graph has split: rows of the update each; none where it has not."""
        parent, _, leaf = target.rpartition(".")
        sites: list[Site] = []
        start = 0
        for part in FUSED.get(leaf, ()):
            hit = self.find(f"{parent}.{part}" if parent else part)
            if isinstance(hit, Unmatched):
                return []
            claims = self.claims[hit[0].removesuffix(".weight")]
            stop = start + claims[0].shape[0]
            if stop > update.shape[0] or any(isinstance(claim, _Part) for claim in claims):
                return []
            sites += self._sites(target, rows(logical(update, target), start, stop), claims, adapter.spelling(target))
            start = stop
        return sites if start == update.shape[0] else []

    def _why(self, target: str, update: Update, why: str) -> str:
        """Why a module has no place, as well as can be told."""
        if self.graph.model.functions:
            why = f"the graph has functions of its own, whose weights are not looked into; {why}"
        elif getattr(update, "layer", "") == "embedding" and "nearest" in why:
            why = f"no table of that name: the exporter folded it into a constant, or merged it into another; {why}"
        elif self.nameless:
            why = f"{len(self.nameless)} weights of this graph have no name, only values can tell; {why}"
        return why

    def _check_applied(self, update: Update, module: str, spelling: str) -> None:
        """A graph exported with this very adapter as branches must not get it twice."""
        down = update.slots.get("down")
        prefixes = (f"{module}.lora_A", f"{module}.default")
        for name, claims in self.claims.items():
            if down is None or len(down.shape) != 2 or not name.startswith(prefixes):
                continue
            for claim in claims:
                stored = claim.operand.weight.tensor
                held = stored.T if claim.operand.layout == "transposed" else stored
                if held.shape == down.shape and held.same_values(down):
                    raise MatchError("the graph has this adapter already, as branches", f"{spelling} -> {name}")

    # ------------------------------------------------------------ vectors and whole tensors

    def vector(self, target: str, update: Update, adapter: Adapter) -> list[Site] | Unmatched:
        """The sites of a bias, the weight of a normalisation, or another parameter that is no matrix."""
        spelling = adapter.spelling(target)
        uses, source = self._parameter(target if target in adapter.carried else parameter(target))
        if not uses:
            return Unmatched(spelling, f"no such parameter in the graph; {source}")
        by_weight: dict[Value, list[Operand]] = {}
        for use in uses:
            traced = self.graph.trace(use)
            if traced is not None:
                by_weight.setdefault(traced[0].value, []).append(Operand(use, *traced))
        sites = []
        for operands_ in by_weight.values():
            weight = operands_[0].weight
            fitting = update.sized(weight.shape)
            if fitting is None or not weight.floating:
                raise MatchError(
                    f"shapes differ: the adapter's is {list(update.shape)}, the graph's {list(weight.shape)}",
                    f"{spelling} -> {weight.value.name}",
                )
            sites.append(Site(target, fitting, weight, tuple(operands_), source, spelling))
        return sites

    def has_no_bias(self, target: str) -> bool:
        """Whether the module of a bias is in the graph, and nothing is added to its product."""
        hit = self.find(target.removesuffix(".bias"))
        claims = [] if isinstance(hit, Unmatched) else self.claims[hit[0].removesuffix(".weight")]
        return bool(claims) and all(bias_of(self.graph, claim.operand) is None for claim in claims)

    def carried(self, name: str, tensor: Tensor, adapter: Adapter) -> list[Site] | Unmatched:
        """The sites of a tensor that was trained whole; none where it is a copy of the graph's."""
        module = name.removesuffix(".weight")
        matrix = name.endswith(".weight") and len(tensor.shape) > 1
        whole = replace(adapter, spellings={**adapter.spellings, module: adapter.spelling(name)})
        found = self.weight(module, Replace(tensor), whole) if matrix else self.vector(name, Replace(tensor), adapter)
        if isinstance(found, list) and module in adapter.updates:
            return [site for site in found if not self._copies(site, tensor)]
        return found

    def _copies(self, site: Site, tensor: Tensor) -> bool:
        """Whether the adapter's own copy of a base weight is the graph's."""
        from loratool.onnx.values import holds

        if holds(site, tensor):
            return True
        raise MatchError("the adapter carries another base weight than the graph's", site.spelling)

    def _parameter(self, name: str) -> tuple[tuple[Use, ...], str]:
        """The inputs that take a vector parameter, and what found them; or none, and the nearest."""
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and not isinstance(hit := self.find(module), Unmatched):
            claims = self.claims[hit[0].removesuffix(".weight")]
            uses = [bias_of(self.graph, claim.operand) for claim in claims]
            known = tuple(use for use in uses if use is not None)
            if known and not any(claim.rows is not None or isinstance(claim, _Part) for claim in claims):
                return known, claims[0].source
        hit = self._vectors.find(name)
        if isinstance(hit, Unmatched):
            return (), hit.why
        value = self._vectors.places[hit[0]]
        uses_ = self.graph.ends(Value(0, str(value.tensor)))
        modules = {scope_module(use.node) or path_module(use.node.proto.name) for use in uses_}
        if len(uses_) > 1 and len(modules) > 1:
            uses_ = tuple(u for u in uses_ if self._is_in(u, module))
        return uses_, "name"

    def _is_in(self, use: Use, module: str) -> bool:
        """Whether a node belongs to a module, by its own word."""
        told = scope_module(use.node) or path_module(use.node.proto.name)
        return told == module or told.endswith(f".{module}") or module.endswith(f".{told}")

    @cached_property
    def _vectors(self) -> Names:
        """The initializers of the main graph that are no matrices, by name."""
        known = [v.name for v, w in self.graph.weights.items() if v.scope == 0 and w.floating and len(w.shape) == 1]
        return Names({name: Slot(name) for name in known})


@dataclass(frozen=True, eq=False)
class _Part(_Claim):
    """Part ``number`` of the ``count`` that a fused projection holds; how many rows each has, the updates tell."""

    number: int = 0
    count: int = 1


def _placed(claim: _Claim, update: Update) -> _Claim:
    """A claim with its rows: of a fused projection [q|k|v], k and v being alike, of [gate|up], equal halves."""
    if not isinstance(claim, _Part):
        return claim
    total, own = claim.operand.shape[0], update.shape[0]
    first = own if claim.number == 0 else total - (claim.count - 1) * own
    rest = (total - first) // max(claim.count - 1, 1)
    start = 0 if claim.number == 0 else first + (claim.number - 1) * rest
    if first <= 0 or first + (claim.count - 1) * rest != total or (rest if claim.number else first) != own:
        raise MatchError(f"{own} rows are no part of a fused projection of {total}", claim.operand.weight.value.name)
    return _Claim(claim.operand, claim.source, np.arange(start, start + own))


def _same_kind(update: Update, claim: _Claim, module: str) -> bool:
    """Whether an update of a table meets a table, and one of a product a product.

    Those that do not tell meet both, but where a mere name says what the weight is: of a tied pair either end may
    bear it.
    """
    layer, table = getattr(update, "layer", None), claim.operand.table
    if layer is not None and update.kind != "full":
        return bool((layer == "embedding") == table)
    return claim.source != "name" or (module.rpartition(".")[2] in EMBEDDING_LEAVES) == table


def logical(update: Update, target: str) -> Update:
    """The update as that of torch's Linear, whatever the base module was (transformers' Conv1D holds [in,out])."""
    turned: Any = getattr(update, "oriented", None)
    if turned is not None:
        return update if getattr(update, "layer", "plain") == "embedding" else turned("plain")
    if isinstance(update, Replace) and len(update.shape) == 2 and CONV1D_NAMES.search(f"{target}.weight"):
        return Replace(update.value.T)
    return update


def _check_taken(sites: Iterable[Site]) -> None:
    """Two targets of one adapter cannot mean the same rows of a weight at the same node."""
    taken: dict[tuple[int, int, int], Site] = {}
    for site in sites:
        first = -1 if site.rows is None else int(site.rows[0])
        for operand in site.operands:
            key = (id(operand.use.node), operand.use.slot, first)
            other = taken.setdefault(key, site)
            both = isinstance(other.update, Replace) != isinstance(site.update, Replace)
            if other is not site and not both:
                raise MatchError(
                    f"two modules of the adapter mean one weight, {site.weight.value.name}",
                    f"{other.spelling} and {site.spelling}",
                    "one of them is misnamed",
                )


__all__ = ["FUSED", "Site", "Unmatched", "logical", "resolve"]
