"""PEFT's tuners whose delta is put together entry by entry: from frequencies, wavelets, single entries, circulants.

FourierFT (Gao et al. 2024), WaveFT (Bilican et al. 2025), SHiRA (Bhardwaj et al. 2024), SuperTuning, C3A (Chen et al.
2024). FourierFT and WaveFT store no places: these are the first of a permutation that a seed makes, torch's own, so
torch is imported when values are asked for. Formulas as huggingface/peft 0.21 computes them; o out, i in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from loratool.errors import FormatError
from loratool.kinds.tuner import Composed, axes, chained, double, entries, torch_of
from loratool.kinds.wavelets import Synthesis, order, synthesis
from loratool.lazy import np
from loratool.tensors import Tensor

Rows = Callable[[int, int], "np.ndarray"]


def places(count: int, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the first ``count`` entries of a random permutation of a matrix: torch's, of that seed.

    Raises LoratoolError where torch is not installed.
    """
    torch = torch_of("the places of these values")
    drawn = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:count]
    rows, columns = np.divmod(drawn.numpy(), shape[1])
    return rows, columns


def sparse(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, width: int) -> Rows:
    """What gives rows of a matrix of ``width`` columns that has ``values`` at some places; of one place they add up."""
    order = np.argsort(rows, kind="stable")
    rows, columns, values = rows[order], columns[order], values[order]

    def block(start: int, stop: int) -> np.ndarray:
        found = slice(*np.searchsorted(rows, (start, stop)))
        made = np.zeros((stop - start, width))
        np.add.at(made, (rows[found] - start, columns[found]), values[found])
        return made

    return block


@dataclass(frozen=True, kw_only=True)
class Seeded(Composed):
    """Values at places of the [o,i] weight that ``seed`` draws."""

    values: Tensor
    scale: float = 1.0
    seed: int = 777

    def check(self) -> None:
        axes(1, spectrum=self.values)
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise FormatError(f"random_loc_seed is {self.seed}")

    @property
    def known(self) -> tuple[int, ...]:
        return (0, 0)

    @property
    def scaling(self) -> float:
        return self.scale

    def fits(self, plain: tuple[int, ...]) -> bool:
        return super().fits(plain) and plain[0] * plain[1] >= self.values.size

    @property
    def makes(self) -> int:
        return 4 * math.prod(self.plain)  # the permutation, twice as wide as float32, and a copy of it

    def placed(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the values in the weight as stored."""
        rows, columns = places(self.values.size, self.plain, self.seed)
        return (columns, rows) if self.layer == "transposed" else (rows, columns)


class Fourier(Seeded):
    """FourierFT: delta = scale x Re(ifft2(D)), D with ``values`` [n] at random places; ifft2 divides by o x i."""

    word: ClassVar[str] = "fourierft"

    def blocks(self) -> Rows:
        (rows, columns), (height, width) = self.placed(), self.shape
        order = np.argsort(columns, kind="stable")
        rows, columns, values = rows[order], columns[order], double(self.values)[order] * (self.scale / height)
        filled, first = np.unique(columns, return_index=True)

        def block(start: int, stop: int) -> np.ndarray:
            turns = np.outer(np.arange(start, stop), rows) % height  # exact, where an angle would lose digits
            waves = np.exp(2j * np.pi / height * turns) * values  # [rows,n]
            spectrum = np.zeros((stop - start, width), np.complex128)
            spectrum[:, filled] = np.add.reduceat(waves, first, axis=1)
            return np.fft.ifft(spectrum, axis=1).real

        return block


@dataclass(frozen=True, kw_only=True)
class Wavelet(Seeded):
    """WaveFT: ``values`` [n] are entries of the delta itself, or (``family``) of its wavelet transform of one level.

    The transform is of the weight padded evenly by as much as the filter needs, its four bands side by side; the
    middle of what it gives is the delta.
    """

    word: ClassVar[str] = "waveft"
    family: str = ""

    def check(self) -> None:
        super().check()
        if self.family:
            order(self.family)

    def blocks(self) -> Rows:
        rows, columns = self.placed()
        values = double(self.values) * self.scale
        if not self.family:
            return sparse(rows, columns, values, self.shape[1])
        down, right = (synthesis(self.family, side) for side in self.shape)
        bands = sparse(*self._in_bands(rows, columns, down, right), values, right.padded)

        def across(start: int, stop: int) -> np.ndarray:
            turned = bands(start, stop).T  # [padded i,rows]
            return right.rows(lambda first, last: turned[first:last], 0, self.shape[1]).T  # [rows,i]

        return lambda start, stop: down.rows(across, start, stop)

    def _in_bands(
        self, rows: np.ndarray, columns: np.ndarray, down: Synthesis, right: Synthesis
    ) -> tuple[np.ndarray, np.ndarray]:
        """The places in the padded bands. PEFT takes the two mixed bands for each other, so they change places."""
        rows = rows + (down.padded - self.shape[0]) // 2
        columns = columns + (right.padded - self.shape[1]) // 2
        low, left = down.padded // 2, right.padded // 2
        below, beyond = rows // low, columns // left
        return rows % low + beyond * low, columns % left + below * left


@dataclass(frozen=True, kw_only=True)
class Shira(Composed):
    """SHiRA: delta[index[0,n], index[1,n]] += values[n]; values [k], index [2,k]."""

    word: ClassVar[str] = "shira"
    indices: ClassVar[frozenset[str]] = frozenset(["index"])
    values: Tensor
    index: Tensor

    def check(self) -> None:
        axes(1, shira_weight=self.values)
        axes(2, shira_indices=self.index)
        chained(number_of_entries=(("shira_weight", self.values, 0), ("shira_indices", self.index, 1)))
        if self.index.shape[0] != 2:
            raise FormatError(f"shira_indices of shape {list(self.index.shape)}")

    @property
    def known(self) -> tuple[int, ...]:
        return (0, 0)

    def blocks(self) -> Rows:
        places = [entries(self.index.slice(n, n + 1), self.plain[n])[0] for n in (0, 1)]
        rows, columns = places[::-1] if self.layer == "transposed" else places
        return sparse(rows, columns, double(self.values), self.shape[1])


@dataclass(frozen=True, kw_only=True)
class Supertuning(Composed):
    """SuperTuning: entries of the weight, counted row by row, and a LoRA beside them.

    values [k], index [k]; down [r,i] and up [o,r] (both or none) with alpha / r.
    """

    word: ClassVar[str] = "supertuning"
    indices: ClassVar[frozenset[str]] = frozenset(["index"])
    values: Tensor
    index: Tensor
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float = 0.0

    def check(self) -> None:
        axes(1, supertuning_values=self.values, supertuning_indices=self.index)
        chained(number_of_entries=(("values", self.values, 0), ("indices", self.index, 0)))
        if (self.down is None) != (self.up is None):
            raise FormatError("half a pair of supertuning_lora_A and supertuning_lora_B")
        if self.down is not None and self.up is not None:
            axes(2, supertuning_lora_A=self.down, supertuning_lora_B=self.up)
            chained(rank=(("supertuning_lora_A", self.down, 0), ("supertuning_lora_B", self.up, 1)))

    @property
    def known(self) -> tuple[int, ...]:
        return (0, 0) if self.up is None or self.down is None else (self.up.shape[0], self.down.shape[1])

    @property
    def scaling(self) -> float:
        return self.alpha / self.down.shape[0] if self.down is not None else 1.0

    def blocks(self) -> Rows:
        height, width = self.plain
        index = entries(self.index, height * width)
        single = sparse(index // width, index % width, double(self.values), width)
        if self.down is None or self.up is None:
            return single
        up, down = double(self.up) * self.scaling, double(self.down)
        return lambda start, stop: single(start, stop) + up[start:stop] @ down


@dataclass(frozen=True, kw_only=True)
class Circulant(Composed):
    """C3A: circulant blocks, delta[m b + t, n b + u] = kernel[m,n,(u - t) mod b] / i; kernel [o/b,i/b,b]."""

    word: ClassVar[str] = "c3a"
    kernel: Tensor

    def check(self) -> None:
        axes(3, c3a_kernel=self.kernel)

    @property
    def known(self) -> tuple[int, ...]:
        high, wide, size = self.kernel.shape
        return (high * size, wide * size)

    def blocks(self) -> Rows:
        _, wide, size = self.kernel.shape
        kernel = double(self.kernel) / (wide * size)

        def block(start: int, stop: int) -> np.ndarray:
            turn = (np.arange(size) - np.arange(start, stop)[:, None]) % size  # [rows,b]
            found = kernel[np.arange(start, stop) // size]  # [rows,i/b,b]
            index = np.broadcast_to(turn[:, None], found.shape)
            return np.take_along_axis(found, index, -1).reshape(stop - start, -1)

        return block
