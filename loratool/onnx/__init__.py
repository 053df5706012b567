"""Adapters in ONNX graphs: read a graph without its weights, find each module's weight, write the graph anew."""

from __future__ import annotations

from typing import Any

from loratool.errors import LoratoolError


def require_onnx() -> Any:
    """The package onnx. Raises LoratoolError, naming the line that installs it, where it is missing."""
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError:
        raise LoratoolError("the package onnx is not installed", hint="pip install 'loratool[onnx]'") from None
    return onnx
