"""What can go wrong: one error family for each exit code.

Every error says *what* happened, *where* (file, module or tensor) and, where there is something to do
about it, a *hint*. The command line prints them as ``error: what, where`` and ``hint: what to do``; where an error is
about many *items*, each on a line of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 3  # items that the line of an error names


class LoratoolError(Exception):
    """Could not: a path that is not there, an existing output, I/O, a missing package (exit code 1)."""

    exit_code = 1

    def __init__(self, what: str, where: object = "", hint: str = "", items: Sequence[str] = ()) -> None:
        self.what, self.where, self.hint, self.items = what, str(where), hint, tuple(items)
        super().__init__(f"{what}, {self.where}" if self.where else what)


class UsageError(LoratoolError):
    """The call itself makes no sense: a wrong count of strengths, an unknown format name (exit code 2)."""

    exit_code = 2


class FormatError(LoratoolError):
    """Input not recognised, ambiguous, malformed, unsafe or unsupported (exit code 3)."""

    exit_code = 3


class MatchError(LoratoolError):
    """Adapter and base do not fit: a module without a target, a shape that differs (exit code 4)."""

    exit_code = 4


class LossError(LoratoolError):
    """The target format cannot say everything the adapter holds (exit code 5).

    ``losses`` names each lost module or tensor, in the source's spelling.
    """

    exit_code = 5

    @property
    def losses(self) -> tuple[str, ...]:
        """What would be lost."""
        return self.items


class NumericError(LoratoolError):
    """NaN, infinity or overflow (exit code 6)."""

    exit_code = 6


class VerifyError(LoratoolError):
    """A proof failed: the output is not what it claims to be (exit code 7)."""

    exit_code = 7


def some(items: Sequence[object], most: int = SHOWN) -> str:
    """The first few of many, for the line that says where."""
    return "; ".join(map(str, items[:most])) + ("; ..." if len(items) > most else "")
