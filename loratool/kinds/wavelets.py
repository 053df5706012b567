"""One level of the inverse wavelet transform along one axis, with Daubechies' filters.

The filters are found from their definition (Daubechies 1988): of all polynomials with N zeros at -1 whose
even coefficients are orthonormal, the one with its other zeros inside the unit circle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from loratool.errors import FormatError
from loratool.lazy import np


def order(family: str) -> int:
    """N of the filter that a name means: ``db1`` (or ``haar``) to ``db10``. Raises FormatError for others."""
    found = re.fullmatch(r"db([1-9]|10)", "db1" if family == "haar" else family)
    if found is None:
        raise FormatError(f"the wavelet {family!r} is not supported", hint="db1 to db10 are")
    return int(found[1])


def low_pass(n: int) -> np.ndarray:
    """The 2n coefficients of the synthesis low-pass filter dbn, of sum sqrt(2)."""
    half = [math.comb(n - 1 + k, k) for k in range(n)]  # P(y), with y = (2 - z - 1/z) / 4
    zeros: list[complex] = []
    for y in np.roots(half[::-1]):
        pair = np.roots([1, 4 * y - 2, 1])  # z + 1/z = 2 - 4y
        zeros.append(pair[np.argmin(np.abs(pair))])
    found = np.real(np.poly([-1.0] * n + zeros))
    return np.asarray(found * (math.sqrt(2) / found.sum()))


@dataclass(frozen=True)
class Synthesis:
    """What turns bands of a side, low half and high half, into ``length`` values.

    The side is padded by the filter's length less 2, and to an even number, before the transform.
    """

    low: np.ndarray
    length: int

    @property
    def padded(self) -> int:
        """Length of both bands together."""
        return -(-(self.length + len(self.low) - 2) // 2) * 2

    def rows(self, bands: Callable[[int, int], np.ndarray], start: int, stop: int) -> np.ndarray:
        """Values [start, stop) along the first axis; ``bands`` gives rows of both bands, the low half first."""
        taps, half = len(self.low), self.padded // 2
        at = np.arange(start, stop) + taps - 2  # value m is the sum over j of filter[m - 2j] x band[j]
        high = self.low[::-1] * (-1.0) ** np.arange(taps)
        first, last = max(0, (int(at[0]) - taps + 2) // 2), min(half, int(at[-1]) // 2 + 1)
        total: np.ndarray | float = 0.0
        for offset, weights in ((0, self.low), (half, high)):
            band = bands(offset + first, offset + last)
            place = at[:, None] - 2 * np.arange(first, last)  # [values,j]
            known = (place >= 0) & (place < taps)
            total = total + np.where(known, weights[np.clip(place, 0, taps - 1)], 0.0) @ band
        return np.asarray(total)


def synthesis(family: str, length: int) -> Synthesis:
    """The synthesis of a side of ``length`` with a filter of that name. Raises FormatError."""
    return Synthesis(low_pass(order(family)), length)
