"""Fixtures that share what is slow to make; see tests/models.py for what is in them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import models, onnx_models


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of bundled samples."""
    return models.FIXTURES


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`base("llama", dtype="bfloat16", max_shard_size="20KB")`: a model folder; read it only."""

    @cache
    def make(name: str, **options: Any) -> Path:
        return models.build(name, tmp_path_factory.mktemp(name), **options)

    return make


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory, base: Callable[..., Path]) -> Callable[..., Path]:
    """`lora("llama", "dora", dtype="bfloat16")`: an adapter folder for `base("llama")`; read it only."""

    @cache
    def make(name: str, kind: str = "plain", **options: Any) -> Path:
        return models.adapter(name, base(name), tmp_path_factory.mktemp(f"{name}-{kind}"), kind, **options)

    return make


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, adapter) of a real model and a LoRA really trained on it."""
    return models.trained_minilm(tmp_path_factory.mktemp("minilm"))


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of published adapters; skips where it is absent."""
    return models.real_adapters()


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> onnx_models.Graphs:
    """`graphs.export("llama")`, `graphs.adapter("llama")`: tiny ONNX graphs and their adapters; read them only."""
    return onnx_models.Graphs(tmp_path_factory.mktemp("onnx"))
