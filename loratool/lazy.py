"""numpy, imported when it is first used: describing an adapter from its headers needs none, and starts sooner.

``from loratool.lazy import np`` stands for ``import numpy as np`` with bfloat16 and the float8 types registered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["np"]

if TYPE_CHECKING:
    import numpy as np
else:

    class _Later:
        """A module that is imported by the first attribute asked of it."""

        def __getattr__(self, attribute: str) -> Any:
            import ml_dtypes  # noqa: F401  (registers its types with numpy)
            import numpy

            value = getattr(numpy, attribute)
            setattr(self, attribute, value)
            return value

    np = _Later()
