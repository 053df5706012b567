"""numpy, imported when it is first used: describing an adapter from its headers needs none, and starts sooner.

``from loratool.lazy import np`` stands for ``import numpy as np``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["np"]

if TYPE_CHECKING:
    import numpy as np
else:

    class _Later:
        """A module that is imported by the first attribute asked of it."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            import importlib

            module = importlib.import_module(self._name)
            value = getattr(module, attribute)
            setattr(self, attribute, value)
            return value

    np = _Later("numpy")
