"""Diffusion transformers in every dialect: fused and split, under every name, with equal deltas.

Numbers in brackets are those of the list of known traps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratool import api
from loratool.adapter import Adapter
from loratool.architectures import TRANSFORMERS, architecture
from loratool.formats import by_name, detect
from loratool.formats.base import Evidence
from tests import diffusion
from tests.diffusion import Pairs, factors, save

torch = pytest.importorskip("torch")

FAMILIES = [known.name for known in TRANSFORMERS]


@cache
def modules(family: str) -> Mapping[str, tuple[int, ...]]:
    """The weights of the first block of each sort, and those outside of blocks, 1/32 as wide."""
    known = architecture(family)
    assert known is not None
    found = {}
    for name, shape in known.shapes().items():
        blocks = [int(number) for number in re.findall(r"s\.(\d+)\.", name)]
        if name.startswith("transformer.") and len(shape) > 1 and not any(blocks):
            found[name] = (*(max(axis // 32, 1) for axis in shape[:2]), *shape[2:])
    return found


def read(path: Path, format: str | None = None) -> Adapter:
    evidence = Evidence(path)
    if format:
        assert detect(evidence)[0].name == format, detect(evidence)
    return detect(evidence)[0].read(evidence)


def assert_same(adapter: Adapter, pairs: Pairs, alpha: float | None = None) -> None:
    """The adapter changes these modules, and just so, as it acts on a vector."""
    assert adapter.updates.keys() == pairs.keys()
    for name, pair in pairs.items():
        update: Any = adapter.updates[name]
        down, up = (factor.double().flatten(1).numpy() for factor in pair)
        vector = np.linspace(-1, 1, down.shape[1])
        ours, scaling = update.factors(), 1.0 if alpha is None else alpha / len(down)
        np.testing.assert_allclose(
            ours[0] @ (ours[1] @ vector), scaling * up @ (down @ vector), atol=1e-4, err_msg=name
        )


def written(adapter: Adapter, path: Path, to: str) -> Path:
    """A file of an adapter of which nothing is lost."""
    format = by_name(to)
    assert not format.losses(adapter)
    format.write(adapter, path)
    return path


# -- split modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_split_modules_go_through_every_format(family: str, tmp_path: Path) -> None:
    """From diffusers' names to all others and back; no family's names are another's."""
    pairs = factors(modules(family), rank=1)
    adapter = read(save(tmp_path / "source", diffusion.diffusers(pairs)), "diffusers")
    assert adapter.metadata.architecture == family
    assert_same(adapter, pairs)
    for to in ("kohya", "lycoris", "comfyui"):
        back = read(written(adapter, tmp_path / to, to), to)
        assert back.metadata.architecture == family
        assert_same(back, pairs)
    same = written(back, tmp_path / "same", "diffusers")
    assert {key for key in diffusion.load(same)} == {key for key in diffusion.load(tmp_path / "source")}


@pytest.mark.parametrize("to", ["raw", "peft"])
def test_formats_of_any_model_keep_what_is_split(to: str, tmp_path: Path) -> None:
    pairs = factors(modules("flux"), rank=1)
    source = save(tmp_path / "source", diffusion.diffusers(pairs))
    assert not api.convert(source, tmp_path / "out", to=to).losses
    api.convert(tmp_path / "out", tmp_path / "back", to="diffusers")
    assert_same(read(tmp_path / "back"), pairs)
