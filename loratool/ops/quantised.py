"""Weights that are stored in codes which no merge can change: known by the tensors that lie beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loratool.adapter import Adapter, is_bias, parameter
from loratool.architectures import Slot
from loratool.errors import FormatError
from loratool.layouts import Expert, expert_of
from loratool.model import Model
from loratool.names import Names, Unmatched


class Scheme(NamedTuple):
    """What a tensor is called after its module, what lies beside it, and who stores weights so. Source: llm.md, 7."""

    ending: str
    beside: str
    name: str


SCHEMES = (
    Scheme(".qweight", ".qzeros", "GPTQ or AWQ"),
    Scheme(".weight_packed", ".weight_scale", "packed by compressed-tensors"),
    Scheme(".weight", ".weight_scale_2", "4 bits of ModelOpt"),
    Scheme(".weight", ".weight.absmax", "4 bits of bitsandbytes"),
    Scheme(".weight", ".SCB", "8 bits of bitsandbytes"),
    Scheme("_blocks", "_scales", "MXFP4"),
    Scheme(".weight", ".scales", "MLX"),
)


def refuse_quantised(model: Model, adapter: Adapter) -> None:
    """Raise FormatError for a target whose weight the base holds in codes, whatever shape these have."""
    held = {f"{module}.weight": scheme for module, scheme in _quantised(model)}
    if not held:
        return
    names = Names({name: Slot(name) for name in held})
    layers = {expert.layer: name for name in held if (expert := expert_of(name))}
    for target in adapter.updates:
        hit = names.find(parameter(target))
        name = _stack_of(expert_of(target), layers) if isinstance(hit, Unmatched) else hit[0]
        if name and not is_bias(target):
            where = f"{adapter.spelling(target)} -> {name.removesuffix('.weight')}"
            raise FormatError(f"a quantised weight ({held[name]}) cannot be changed", where, "give the base in 16 bit")


def _quantised(model: Model) -> Iterator[tuple[str, str]]:
    """(module, scheme) of the weights in codes."""
    for name in model.parameters:
        for scheme in SCHEMES:
            module = name.removesuffix(scheme.ending)
            if module != name and module + scheme.beside in model.parameters:
                yield module, f"{scheme.name}, by its {scheme.beside.lstrip('._')}"
                break


def _stack_of(expert: Expert | None, layers: dict[str, str]) -> str | None:
    """The stack in codes that holds an expert."""
    return None if expert is None else layers.get(expert.layer)
