"""What adapters, together, do to a model: every tensor accounted for before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loratool.adapter import Adapter, is_bias
from loratool.architectures import Slot
from loratool.architectures.llm import VOCABULARY_LEAVES, Tie, tie_of
from loratool.errors import FormatError, MatchError, NumericError
from loratool.kinds.patch import Padded
from loratool.kinds.tokens import Tokens
from loratool.lazy import np
from loratool.model import Location, Model
from loratool.names import Names, Unmatched, has_number, leaf, match, module_of
from loratool.ops.quantised import refuse_quantised
from loratool.plan import Part
from loratool.scaled import LARGEST
from loratool.tensors import FLOATS, Tensor, blocks, peak
from loratool.update import LowRank, Replace, Rows, Update, rows, trimmed


@dataclass
class Changes:
    """Parts to add to each tensor, tensors that replace the base's, tensors that are new, and what found no place.

    ``grown`` are those that are replaced by themselves with more inputs.
    """

    parts: dict[str, list[Part]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    unmatched: list[Unmatched] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    grown: set[str] = field(default_factory=set)
    modules: int = 0
    untied: Tie | None = None

    @property
    def touched(self) -> set[str]:
        """Names of the base's tensors that change."""
        return set(self.parts) | set(self.replaced)


def account(model: Model, adapters: Sequence[Adapter], strengths: Sequence[float]) -> Changes:
    """Everything that ``adapters`` times ``strengths`` change in ``model``.

    Raises FormatError (unknown scaling, quantised target), MatchError (shapes, conflicts), NumericError (NaN or
    infinity in an adapter).
    """
    tie, headed = with_head(model)
    changes = Changes()
    for adapter, strength in zip(adapters, strengths, strict=True):
        check_values(adapter, changes)
        refuse_quantised(model, adapter)
        _place_updates(changes, adapter, strength, _trained_on(headed, adapter))
        _place_carried(changes, adapter, strength, headed)
    if tie is not None:
        _settle_tie(changes, tie, model)
    _put_tokens(changes, headed)
    _check_vocabulary(changes, model)
    for name in changes.touched:
        dtype = headed.parameters[name][0].tensor.dtype
        if dtype in LARGEST and name in changes.parts:
            continue  # 8-bit floating point: `loratool.scaled` knows it, or refuses
        if dtype not in FLOATS:
            raise FormatError(
                f"a quantised weight ({dtype}) cannot be changed yet", name, "give the base in 16 or 32 bit"
            )
    return changes


_LAST = frozenset(["up", "value", "magnitude"])


def check_values(adapter: Adapter, changes: Changes) -> None:
    """Raise for NaN, infinities and unknown scalings; warn of an adapter that changes nothing."""
    where = adapter.metadata.path
    if not adapter.metadata.scaling_known:
        raise FormatError("the file does not tell its scaling", where, "give --scaling (alpha / rank)")
    # a fresh LoRA has an up factor of zeros; of a kind without one, any tensor that is not zero counts
    tells = {n: _LAST if _LAST & u.slots.keys() else u.slots.keys() for n, u in adapter.updates.items()}
    named = ((n, s, t) for n, u in adapter.updates.items() for s, t in u.slots.items())
    carried = ((n, "value", t) for n, t in adapter.carried.items())
    trained = False
    for name, slot, tensor in (*named, *carried):
        largest = extreme(tensor)
        if not np.isfinite(largest):
            raise NumericError("NaN or infinity in the adapter", f"{where}: {adapter.spelling(name)} ({slot})")
        trained = trained or (largest > 0 and slot in tells.get(name, _LAST))
    for name, update in adapter.updates.items():
        if not np.isfinite(update.scaling):
            raise NumericError(f"the scaling is {update.scaling}", f"{where}: {adapter.spelling(name)}")
    if not trained:
        changes.warnings.append(f"{where}: every up factor is zero: an untrained adapter, it changes nothing")


def extreme(tensor: Tensor) -> float:
    """The largest absolute value of a tensor; NaN or infinity where there is one."""
    load = tensor.load if tensor.dtype in FLOATS else tensor.float
    found = (peak(load(start, stop)) for start, stop in blocks(tensor))
    return max(found, key=lambda p: (np.isnan(p), p), default=0.0)


def with_head(model: Model) -> tuple[Tie | None, Model]:
    """The model's tied pair, and the model with the output projection among its parameters, where it was left out."""
    if len(model.configs) != 1 or "" not in model.configs:
        return None, model
    tie = tie_of(model.configs[""], frozenset(model.modules))
    if tie is None:
        return None, model
    head, embedding = f"{tie.head}.weight", f"{tie.embedding}.weight"
    if head in model.parameters:
        return tie, model
    lent = tuple(Location(at.weights, head, at.tensor) for at in model.parameters[embedding])
    return tie, _with_parameters(model, {head: lent})


def _with_parameters(model: Model, more: Mapping[str, tuple[Location, ...]]) -> Model:
    """The model with other or further parameters, for looking them up."""
    twin = replace(model)
    twin.__dict__["parameters"] = {**model.parameters, **more}
    return twin


def _own(adapter: Adapter, name: str) -> bool:
    """Whether a carried tensor is the base weight that an update of the adapter was trained on."""
    return not is_bias(name) and module_of(name) in adapter.updates


def _trained_on(model: Model, adapter: Adapter) -> Model:
    """The model with the weights of other sizes (a longer vocabulary) that updates of ``adapter`` were trained on."""
    names, resized = Names(model.places), {}
    for name, tensor in adapter.carried.items():
        hit = names.find(name) if _own(adapter, name) else None
        if isinstance(hit, tuple) and model.places[hit[0]].whole:
            at = model.parameters[model.places[hit[0]].tensor][0]
            if tensor.shape != at.tensor.shape and tensor.shape[1:] == at.tensor.shape[1:]:
                resized[model.places[hit[0]].tensor] = (Location(at.weights, at.key, tensor),)
    return _with_parameters(model, resized) if resized else model


def _place_updates(changes: Changes, adapter: Adapter, strength: float, model: Model) -> None:
    matches, unmatched = match(adapter, model)
    changes.unmatched += [Unmatched(adapter.spelling(u.name), u.why) for u in unmatched]
    for found in matches:
        slot = found.place
        if strength:  # at strength 0 the base keeps its very bytes
            _grow(changes, found.update, slot, adapter.spelling(found.target), model)
            parts = _parts(found.update, slot, model.shape(slot.tensor), strength, adapter.spelling(found.target))
            changes.parts.setdefault(slot.tensor, []).extend(parts)
        changes.modules += not is_bias(found.target)


def _grow(changes: Changes, update: Update, slot: Slot, module: str, model: Model) -> None:
    """Zeros for the inputs that a weight does not have yet: the layer takes more channels."""
    grows = isinstance(update, Padded)
    if slot.tensor in changes.grown if not grows else slot.tensor in changes.touched - changes.grown:
        raise MatchError("one adapter grows a weight that another changes as it is", slot.tensor, "merge them in turn")
    if not isinstance(update, Padded):
        return
    if not slot.whole or slot.transposed:
        raise MatchError("a weight that is stored with others cannot grow", f"{module} -> {slot.tensor}")
    grown = update.grown(model.parameters[slot.tensor][0].tensor)
    if slot.tensor in changes.grown and changes.replaced[slot.tensor].shape != grown.shape:
        raise MatchError("two adapters grow one weight to different shapes", f"{module} -> {slot.tensor}")
    if slot.tensor not in changes.grown:
        was, now = model.shape(slot.tensor)[1], grown.shape[1]
        changes.warnings.append(f"{slot.tensor} takes {now} channels instead of {was}, as {module} needs")
    changes.replaced[slot.tensor] = grown
    changes.grown.add(slot.tensor)


def _parts(update: Update, slot: Slot, stored: Sequence[int], strength: float, module: str) -> Iterator[Part]:
    """An update of a parameter -> what it does to each piece of the stored tensor that the parameter is made of.

    Raises FormatError where the rows of an update cannot be told apart.
    """
    done = 0
    for start, stop in slot.ranges(stored[0] if stored else 1):
        try:
            piece = update if len(slot.pieces) == 1 else _apart(rows(update, done, done + stop - start))
        except FormatError as error:
            raise FormatError(error.what, f"{module} -> {slot.tensor}", error.hint) from None
        yield Part(piece, strength, start, stop, module)
        done += stop - start


def _apart(piece: Update) -> Update:
    """Rows of an update. Raises FormatError where the run could not give them: they need others of the base."""
    if isinstance(piece, Rows) and piece.needs_base:
        reach = piece.prepare(Tensor.float).reach
        if reach is not None:
            reach(0, piece.shape[0])
    return piece


def _place_carried(changes: Changes, adapter: Adapter, strength: float, model: Model) -> None:
    """Whole tensors: put in place of the base's, or added where the base has none (a new head)."""
    names = Names(model.places)
    for name, tensor in adapter.carried.items():
        hit = names.find(name)
        if isinstance(hit, Unmatched):
            if _place_in_pieces(changes, adapter, name, strength, model):
                continue
            if has_number(name.split(".")) or name.startswith("bundle_emb.") or any(w.prefix for w in model.weights):
                changes.unmatched.append(Unmatched(adapter.spelling(name), hit.why))
            else:
                _agree(changes.added, name, tensor)
                changes.warnings.append(f"new in the output, the base has no such tensor: {adapter.spelling(name)}")
            continue
        slot = model.places[hit[0]]
        own = _own(adapter, name)
        if own and slot.whole and tensor.same_values(model.parameters[slot.tensor][0].tensor):
            continue  # a copy of the base
        _replace(changes, slot, tensor, 1.0 if own else strength, adapter.spelling(name), model)


def _place_in_pieces(changes: Changes, adapter: Adapter, name: str, strength: float, model: Model) -> bool:
    """A whole stack of experts that the base holds in another layout: each piece put in its place."""
    tensor = adapter.carried[name]
    if len(tensor.shape) != 3:
        return False
    found, unmatched = match(replace(adapter, updates={module_of(name): Replace(tensor)}, carried={}), model)
    pieces = [(one.place, one.update.value) for one in found if isinstance(one.update, Replace)]
    if unmatched or not pieces or len(pieces) < len(found):
        return False
    for place, value in pieces:
        _replace(changes, place, value, strength, adapter.spelling(name), model)
    return True


def _replace(changes: Changes, slot: Slot, tensor: Tensor, strength: float, module: str, model: Model) -> None:
    """One whole tensor that stands in for the base's, or for rows of it."""
    stored = model.shape(slot.tensor)
    shape = slot.shape(stored)
    tensor = tensor.T if slot.transposed else tensor
    same = trimmed(tensor.shape) == trimmed(shape)
    if not same and (tensor.shape[1:] != shape[1:] or not slot.whole or strength != 1.0):
        raise MatchError(
            f"a whole tensor of shape {list(tensor.shape)} for {list(shape)}", f"{module} -> {slot.tensor}"
        )
    if strength == 0:
        return
    earlier = changes.replaced.get(slot.tensor)
    if earlier is not None and earlier.same_bytes(tensor):
        return
    others = changes.parts.get(slot.tensor, [])
    alone = earlier is None and not any(isinstance(part.update, Replace) for part in others)
    if slot.whole and strength == 1.0 and alone:
        changes.replaced[slot.tensor] = tensor.reshape(*stored) if same else tensor
        return
    parts = changes.parts.setdefault(slot.tensor, [])
    if earlier is not None:  # two of one tensor: W + (V1 - W) + s (V2 - W), both against the base
        if not same or trimmed(earlier.shape) != trimmed(shape):
            raise MatchError("two adapters carry different tensors of one name", module, "merge one after the other")
        del changes.replaced[slot.tensor]
        parts.append(Part(Replace(earlier), 1.0, 0, stored[0], module))
    parts.extend(_parts(Replace(tensor), slot, stored, strength, module))


def _agree(table: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in table and not table[name].same_bytes(tensor):
        raise MatchError("two adapters carry different tensors of one name", name, "merge them one after the other")
    table[name] = tensor


def _settle_tie(changes: Changes, tie: Tie, model: Model) -> None:
    """Tied weights: one change for both ends keeps the tie (applied once); anything else unties them."""
    head, embedding = f"{tie.head}.weight", f"{tie.embedding}.weight"
    if head not in changes.touched and embedding not in changes.touched:
        return
    _lend_tokens(changes, head, embedding)
    on_disk = head in model.parameters
    whole = changes.replaced.get(embedding)
    longer = whole is not None and whole.rows != model.shape(embedding)[0]
    if whole is not None and longer and on_disk:  # another vocabulary: the head on disk goes along
        changes.replaced.setdefault(head, whole)
    if longer and not on_disk and head not in changes.touched and embedding not in changes.parts:
        return  # another vocabulary, trained whole: the head goes along
    if _same_change(changes, head, embedding):
        if not on_disk:
            changes.parts.pop(head, None)
            changes.replaced.pop(head, None)
        return
    if not tie.separable:
        raise MatchError(
            f"the adapter changes one end of tied weights, and {tie.head} cannot be untied in this architecture",
            f"{tie.head} / {tie.embedding}",
        )
    changes.untied = tie
    if not on_disk:  # the base that the embedding's update was trained on is the head's as well
        own = changes.replaced.get(embedding) if embedding in changes.parts else None
        changes.added[head] = own or model.parameters[embedding][0].tensor


def _check_vocabulary(changes: Changes, model: Model) -> None:
    """Raise MatchError where one end of the model gets another vocabulary and the other end, on disk, does not."""
    for name, tensor in changes.replaced.items():
        before = model.shape(name) if name in model.parameters else tensor.shape
        if tensor.rows == before[0] or model.config_of(name).get("vocab_size") != before[0]:
            continue
        others = [other for other in model.parameters if leaf(other) in VOCABULARY_LEAVES and other != name]
        behind = [other for other in others if model.shape(other) == before and other not in changes.replaced]
        if behind:
            raise MatchError(
                f"the adapter brings a vocabulary of {tensor.rows} for {module_of(name)}, "
                f"{module_of(behind[0])} keeps {before[0]}",
                model.path,
                "the adapter does not carry its other end: resize the base as it was for training",
            )


def _put_tokens(changes: Changes, model: Model) -> None:
    """Trained rows that alone change a table replace its rows bit for bit."""
    for name, parts in [*changes.parts.items()]:
        places = model.parameters[name]
        tokens = parts[0].update
        if len(parts) == len(places) == 1 and isinstance(tokens, Tokens) and parts[0].strength == 1.0:
            table = changes.replaced.get(name, places[0].tensor)
            if table.rows == parts[0].stop - parts[0].start and table.dtype in FLOATS:
                changes.replaced[name] = tokens.put_into(table)
                del changes.parts[name]


def _lend_tokens(changes: Changes, head: str, embedding: str) -> None:
    """Trained rows of a tied embedding are the head's as well, unless it has its own: so does PEFT."""
    rows_of = {
        name: [part for part in changes.parts.get(name, ()) if isinstance(part.update, Tokens)]
        for name in (head, embedding)
    }
    if rows_of[embedding] and not rows_of[head] and head not in changes.replaced:
        changes.parts.setdefault(head, []).extend(rows_of[embedding])
        if embedding in changes.replaced:  # the longer vocabulary that they were trained on
            changes.replaced.setdefault(head, changes.replaced[embedding])


def _same_change(changes: Changes, one: str, other: str) -> bool:
    """Whether two tensors get the very same replacement and parts."""
    first, second = changes.replaced.get(one), changes.replaced.get(other)
    if (first is None) != (second is None) or (first and second and not first.same_bytes(second)):
        return False
    parts, others = changes.parts.get(one, []), changes.parts.get(other, [])
    return len(parts) == len(others) and all(map(_same_part, parts, others))


def _same_part(one: Part, other: Part) -> bool:
    a, b = one.update, other.update
    if isinstance(a, Tokens) and isinstance(b, Tokens):
        return one.strength == other.strength and a.index.same_bytes(b.index) and a.value.same_bytes(b.value)
    if not isinstance(a, LowRank) or not isinstance(b, LowRank) or a.mid or b.mid:
        return False
    if (one.strength, a.scaling, a.shape) != (other.strength, b.scaling, b.shape):
        return False
    return all(np.array_equal(x, y) for x, y in zip(_factors(a), _factors(b), strict=True))


def _factors(update: LowRank) -> Iterable[np.ndarray]:
    return update.matrices(Tensor.float)
