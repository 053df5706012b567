"""How many examples a property test tries: few and the same ones each time, or many new ones with `make fuzz`."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_TIMES = int(os.environ.get("FUZZ", "0"))


def examples(count: int) -> settings:
    """The settings of a property test of ``count`` examples; ``FUZZ=n`` makes it n times as many, drawn at random."""
    return settings(
        max_examples=count * (_TIMES or 1),
        derandomize=not _TIMES,  # a commit passes or fails, whoever tests it
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
