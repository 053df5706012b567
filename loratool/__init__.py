"""loratool reads, writes and computes with LoRA-family adapters.

>>> import loratool
>>> adapter = loratool.read("adapter/")
>>> loratool.write(adapter, "adapter.safetensors", format="kohya")
>>> loratool.merge("base/", "adapter/", out="merged/")

Names are loaded when first used: importing the package costs next to nothing, and torch is imported only where it
computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "loratool.adapter",
    "LoratoolError": "loratool.errors",
    "Reading": "loratool.api",
    "add": "loratool.compute",
    "check": "loratool.api",
    "combine": "loratool.compute",
    "compare": "loratool.api",
    "convert": "loratool.api",
    "detect": "loratool.api",
    "export_onnx": "loratool.api",
    "extract": "loratool.compute",
    "inspect": "loratool.api",
    "list_formats": "loratool.api",
    "merge": "loratool.api",
    "plan_convert": "loratool.api",
    "plan_export_onnx": "loratool.api",
    "plan_merge": "loratool.api",
    "rank": "loratool.compute",
    "read": "loratool.api",
    "resize": "loratool.compute",
    "subtract": "loratool.compute",
    "unmerge": "loratool.api",
    "verify": "loratool.api",
    "write": "loratool.api",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from loratool.adapter import Adapter as Adapter
    from loratool.api import Reading as Reading
    from loratool.api import check as check
    from loratool.api import compare as compare
    from loratool.api import convert as convert
    from loratool.api import detect as detect
    from loratool.api import export_onnx as export_onnx
    from loratool.api import inspect as inspect
    from loratool.api import list_formats as list_formats
    from loratool.api import merge as merge
    from loratool.api import plan_convert as plan_convert
    from loratool.api import plan_export_onnx as plan_export_onnx
    from loratool.api import plan_merge as plan_merge
    from loratool.api import read as read
    from loratool.api import unmerge as unmerge
    from loratool.api import verify as verify
    from loratool.api import write as write
    from loratool.compute import add as add
    from loratool.compute import combine as combine
    from loratool.compute import extract as extract
    from loratool.compute import rank as rank
    from loratool.compute import resize as resize
    from loratool.compute import subtract as subtract
    from loratool.errors import LoratoolError as LoratoolError


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loratool' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
