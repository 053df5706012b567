"""What the factors under each module of a PEFT file change: wrappers are nested around parameters and attentions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import FormatError
from loratool.formats.peft.config import in_order, names, out_proj_times, parameters_of
from loratool.formats.peft.keys import OUT_PROJ, unnested


@dataclass(frozen=True)
class Place:
    """What the factors under one module of a file change: the target, the name that PEFT's patterns see, how often."""

    target: str
    rule: str
    stacked: bool = False
    times: float = 1.0


def places(grouped: Iterable[str], config: Mapping[str, Any], where: Path) -> dict[str, Place]:
    """The place of each module of a file. PEFT wraps a parameter by wrapping its module, several by nesting.

    Raises FormatError where a nesting means nothing, or the configuration does not name the parameters.
    """
    names(config, "target_parameters", where)
    by_module: dict[str, list[str]] = {}
    for module in grouped:
        by_module.setdefault(unnested(module), []).append(module)
    held = {module for modules in by_module.values() for module in modules}
    attentions = {m.removesuffix(OUT_PROJ) for m in held if m.endswith(OUT_PROJ)} & by_module.keys()
    found: dict[str, Place] = {}
    for module, wrappers in by_module.items():
        owner = wrappers[0].removesuffix(OUT_PROJ)
        if module in attentions:
            found[_only(wrappers, where)] = Place(f"{module}.in_proj_weight", module)
        elif owner != wrappers[0] and owner in attentions:
            found[_only(wrappers, where)] = Place(module, owner, times=out_proj_times(config))
        elif parameters := parameters_of(module, config, where, len(wrappers)):
            found.update(_parameter_places(module, wrappers, parameters, where))
        elif len(wrappers) == 1 and not wrappers[0].endswith(".base_layer"):
            found[wrappers[0]] = Place(module, module)
        else:
            raise FormatError(
                "nested wrappers of parameters that the configuration does not name",
                f"{where}: {module}",
                "name them in target_parameters of adapter_config.json",
            )
    return found


def _only(wrappers: Sequence[str], where: Path) -> str:
    if len(wrappers) > 1:
        raise FormatError("a MultiheadAttention that is wrapped twice", f"{where}: {wrappers[1]}")
    return wrappers[0]


def _parameter_places(module: str, wrappers: Sequence[str], parameters: Sequence[str], where: Path) -> dict[str, Place]:
    """The first registered parameter lies innermost, behind most ``.base_layer`` (llm.md 1.9)."""
    inside_out = sorted(wrappers, key=lambda wrapper: -len(wrapper))
    if len(inside_out) != len(parameters) or (len(parameters) > 1 and in_order(parameters) is None):
        raise FormatError(
            f"{len(inside_out)} wrapped parameters, and target_parameters names {', '.join(parameters)}: "
            "which is which is unknown",
            f"{where}: {module}",
        )
    found = {}
    for wrapper, parameter in zip(inside_out, parameters, strict=True):
        name = f"{module}.{parameter}"
        found[wrapper] = Place(module if parameter == "weight" else name, name, stacked=True)
    return found
