"""Truncated SVD, recompression of factor pairs, and the choice of ranks.

Written in the operations that numpy and torch share; arrays stay where they are. A spectrum is the descending list of
singular values of one update; energies are squared Frobenius norms.

Sources: Eckart and Young 1936 (best rank-r approximation); Musco and Musco 2015 (randomised block Krylov iteration);
Li and Zhang 2015 (its convergence).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratool.lazy import np
from loratool.tensors import Array
from loratool.update import namespace

EXACT_SIDE = 768  # below that, the eigenvalues of the small Gram matrix cost least and are exact
_INDEPENDENT = 1e-2  # what a column must have of its own for the Gram matrix to be used: then 12 digits are right
_TINY = 1e-140  # its square is still a normal number
_ROUNDING = 1e-13  # differences of sums of squares below that share are rounding
_CANCELS = 1e-8  # a difference of squares above that share of them has eight digits
EXCESS = 1e-4  # relative excess over the best rank-r error at which the iteration may stop


@dataclass(frozen=True)
class Truncation:
    """The leading part of an SVD: ``up [o,r] @ diag(values [r]) @ down [r,i]``, values descending.

    ``energy`` is ||D||_F^2 of the whole matrix, known exactly, so `error` is exact for these factors whatever the
    algorithm missed. ``complete`` says that no singular value is missing from ``values``.
    """

    up: Array
    values: np.ndarray
    down: Array
    energy: float
    complete: bool = False

    def error(self, rank: int) -> float:
        """The relative Frobenius error ||D - D_rank|| / ||D||; 0 for a zero matrix."""
        return relative_error(self.values, self.energy, rank)

    def cut(self, rank: int) -> Truncation:
        """The first ``rank`` of it."""
        return Truncation(self.up[:, :rank], self.values[:rank], self.down[:rank], self.energy)

    def factors(self) -> tuple[Array, Array]:
        """up [o,r] and down [r,i] whose product it is, the singular values shared evenly (half each)."""
        root = as_like(np.sqrt(self.values), self.up)
        return self.up * root[None, :], self.down * root[:, None]


def missing(values: np.ndarray, energy: float) -> np.ndarray:
    """What ranks 0, 1, ... leave of the energy, summed from the smallest: a small rest keeps its digits."""
    tails = np.concatenate((np.cumsum(np.square(np.asarray(values, np.float64))[::-1])[::-1], [0.0]))
    rest = energy - float(tails[0])
    found: np.ndarray = tails + (rest if rest > _ROUNDING * energy else 0.0)
    return found


def relative_error(values: np.ndarray, energy: float, rank: int) -> float:
    """||D - D_rank|| / ||D|| from singular values and the energy of the whole."""
    return math.sqrt(missing(values, energy)[min(rank, len(values))] / energy) if energy > 0 else 0.0


def as_like(values: np.ndarray, other: Array) -> Array:
    """numpy values as an array of the library, device and dtype of ``other``."""
    if isinstance(other, np.ndarray):
        return values.astype(other.dtype)
    return namespace(other).as_tensor(values, dtype=other.dtype, device=other.device)


def wide(array: Array) -> Array:
    """An array in float64."""
    return array.astype(np.float64, copy=False) if isinstance(array, np.ndarray) else array.double()


def to_numpy(array: Array) -> np.ndarray:
    """An array as numpy, wherever it is."""
    return array if isinstance(array, np.ndarray) else np.asarray(array.detach().cpu().numpy())


class Recompression(Truncation):
    """The whole SVD of a product of factors in float64; its singular vectors are formed when they are asked for.

    They are ``outer_up [o,p] @ inner_up [p,k]`` and ``inner_down [k,q] @ outer_down [q,i]``. Dependent factors show as
    values that are zero.
    """

    def __init__(self, up: tuple[Array, Array], values: np.ndarray, down: tuple[Array, Array]) -> None:
        given = {"values": values, "energy": float(np.square(values).sum()), "complete": True}
        given |= {"outer_up": up[0], "inner_up": up[1], "inner_down": down[0], "outer_down": down[1]}
        for name, value in given.items():
            object.__setattr__(self, name, value)

    outer_up: Array
    inner_up: Array
    inner_down: Array
    outer_down: Array

    @property
    def up(self) -> Array:
        """The left singular vectors [o,k]."""
        return self.outer_up @ self.inner_up

    @property
    def down(self) -> Array:
        """The right singular vectors [k,i]."""
        return self.inner_down @ self.outer_down

    def cut(self, rank: int) -> Truncation:
        """The best approximation of rank ``rank``."""
        up, down = self.outer_up @ self.inner_up[:, :rank], self.inner_down[:rank] @ self.outer_down
        return Truncation(up, self.values[:rank], down, self.energy)

    def distance(self, up: np.ndarray, down: np.ndarray) -> float:
        """||D - up @ down||_F^2 without the products, and without cancellation where it is small.

        up = U P + rest, down = Q V + rest: the four parts of the difference are orthogonal to each other.
        """
        inside_up = self.inner_up.T @ (self.outer_up.T @ up)  # P [k,r]
        inside_down = (down @ self.outer_down.T) @ self.inner_down.T  # Q [r,k]
        within = inside_up @ inside_down
        core = float(np.square(np.diag(self.values) - within).sum())
        rest = float(((up.T @ up) * (down @ down.T)).sum() - np.square(within).sum())
        if core + rest > _CANCELS * self.energy:
            return core + max(rest, 0.0)
        rest_up = up - self.outer_up @ (self.inner_up @ inside_up)
        rest_down = down - (inside_down @ self.inner_down) @ self.outer_down
        gram_up, gram_down = rest_up.T @ rest_up, rest_down @ rest_down.T
        sides = ((inside_up.T @ inside_up) * gram_down).sum() + (gram_up * (inside_down @ inside_down.T)).sum()
        return core + float(sides + (gram_up * gram_down).sum())


def recompress(up: Array, down: Array) -> Recompression:
    """The exact SVD of up [o,r] @ down [r,i] without the product: triangles of both factors, SVD of an r x r core.

    In float64, so that rank-deficient, zero and tiny factors are right; ranks beyond min(o, i) are cut.
    """
    left, inner_left, small_left = _triangle(wide(up))
    right, inner_right, small_right = _triangle(wide(down).T)
    inner_up, found, inner_down = namespace(up).linalg.svd(small_left @ small_right.T, full_matrices=False)
    values = to_numpy(found)
    terms = to_numpy((small_left * small_left).sum(0)) ** 0.5 * to_numpy((small_right * small_right).sum(0)) ** 0.5
    noise = 4 * len(terms) * np.finfo(np.float64).eps * float(terms.sum())  # of rounding, also where terms cancel
    values = np.where(values > noise, values, 0.0)
    return Recompression((left, inner_left @ inner_up), values, (inner_down @ inner_right.T, right.T))


def _triangle(factor: Array) -> tuple[Array, Array, Array]:
    """(Q, C, R): factor [n,r] = Q C R with Q C orthonormal and R small.

    From the Gram matrix (Q is then the factor itself), which is four times as fast, where its columns are well
    independent; else by Householder QR, whose digits dependence does not cost.
    """
    xp = namespace(factor)
    gram = factor.T @ factor
    norms = xp.sqrt(gram.diagonal())
    if factor.shape[0] >= factor.shape[1] and bool((norms > _TINY).all()) and bool(xp.isfinite(norms).all()):
        try:
            lower = xp.linalg.cholesky(gram / norms[:, None] / norms[None, :])
        except (np.linalg.LinAlgError, RuntimeError):  # numpy's and torch's: not positive definite
            lower = None
        if lower is not None and float(lower.diagonal().min()) > _INDEPENDENT:
            return factor, xp.linalg.inv(lower).T / norms[:, None], lower.T * norms[None, :]
    basis, triangle = xp.linalg.qr(factor)
    return basis, as_like(np.eye(len(triangle)), basis), triangle


def exact_svd(matrix: Array) -> Truncation:
    """The whole SVD of ``matrix`` [o,i], through the Gram matrix of the shorter side in float64.

    Squaring costs half the digits of the smallest singular values only: these are recomputed from the projections.
    """
    xp = namespace(matrix)
    tall = matrix.shape[0] >= matrix.shape[1]
    side = wide(matrix if tall else matrix.T)  # [long, short]
    _, vectors = xp.linalg.eigh(side.T @ side)
    short = vectors[:, ::-1] if xp is np else vectors.flip(1)  # descending
    image = side @ short  # [long, short]; its columns are the long vectors times the singular values
    norms = to_numpy((image * image).sum(0)) ** 0.5
    order = np.argsort(-norms, kind="stable")
    short, image, values = short[:, order.copy()], image[:, order.copy()], norms[order]
    safe = np.where(values > 0, values, 1.0)
    long = image / as_like(safe, image)[None, :]
    energy = float((side * side).sum())
    up, down = (long, short.T) if tall else (short, long.T)
    return Truncation(up, values, down, energy, complete=True)


def truncated_svd(matrix: Array, rank: int, seed: int = 0, most: int = 8) -> Truncation:
    """The best rank-``rank`` approximation of ``matrix`` [o,i] (float32), within `EXCESS` of the optimum.

    Randomised block Krylov iteration with Householder QR in the matrix's precision and small problems in float64; the
    captured energy is watched and the iteration stops when what another step could add, extrapolated from the last
    ones, is below the excess allowed. Where that is not reached in ``most`` steps, and for small matrices, the exact
    SVD. Seeded: the same input gives the same output.
    """
    short = min(matrix.shape)
    if short <= EXACT_SIDE or 3 * rank >= short:
        return exact_svd(matrix).cut(min(rank, short))
    krylov = Krylov(matrix, rank + 8, seed)
    captured = [krylov.captured(rank)]
    while krylov.steps < most and krylov.room:
        krylov.grow()
        captured.append(krylov.captured(rank))
        if _settled(captured, krylov.left(rank), krylov.energy):
            return krylov.truncation(rank)
    return exact_svd(matrix).cut(rank)


def _settled(captured: Sequence[float], left: float, energy: float) -> bool:
    """Whether the steps to come can add no more than the excess allows, judged by how the last ones shrank.

    The first step finds what stands out, so that only later ones tell how fast the rest comes in.
    """
    if left <= 1e-12 * energy:  # nothing that float32 can see
        return True
    if len(captured) < 4:
        return False
    last, before = captured[-1] - captured[-2], captured[-2] - captured[-3]
    ratio = min(0.9, max(last / before, 0.5)) if before > 0 else 0.9
    to_come = max(last, 0.0) * ratio / (1 - ratio)
    # error^2 may exceed the optimum's by (1 + EXCESS)^2 - 1 = 2 EXCESS of it
    return bool(to_come <= 2 * EXCESS * left)


class Krylov:
    """An orthonormal basis of the block Krylov space of D D^T, grown block by block, and D's projection onto it."""

    def __init__(self, matrix: Array, block: int, seed: int) -> None:
        self.matrix = matrix
        self.block = min(block, min(matrix.shape))
        self.energy = _energy(matrix)
        start = np.random.default_rng(seed).standard_normal((matrix.shape[1], self.block), dtype=np.float32)
        self.basis = namespace(matrix).linalg.qr(matrix @ as_like(start, matrix))[0]  # [o,b]
        self.image = self.basis.T @ matrix  # [b,i]
        self.steps = 0
        self._small: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def room(self) -> bool:
        """Whether another block fits."""
        return bool(self.basis.shape[1] + self.block <= min(self.matrix.shape))

    def grow(self) -> None:
        """Add one block: D (D^T last), orthogonalised against the basis: thrice, where hardly anything is new."""
        xp = namespace(self.matrix)
        new = self.matrix @ self.image[-self.block :].T  # [o,b]
        for _ in range(3):
            new = new - self.basis @ (self.basis.T @ new)
            new = xp.linalg.qr(new)[0]
        self.basis = xp.concatenate((self.basis, new), 1)
        self.image = xp.concatenate((self.image, new.T @ self.matrix), 0)
        self.steps += 1
        self._small = None

    def _eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """Singular values of the projection, descending, and the vectors within the basis; float64."""
        if self._small is None:
            gram = to_numpy(wide(self.image) @ wide(self.image).T)
            values, vectors = np.linalg.eigh(gram)
            self._small = np.sqrt(np.maximum(values[::-1], 0.0)), np.ascontiguousarray(vectors[:, ::-1])
        return self._small

    @property
    def values(self) -> np.ndarray:
        """Approximate singular values (from below), descending."""
        return self._eigen()[0]

    def captured(self, rank: int) -> float:
        """The energy of the best rank-``rank`` approximation within the basis."""
        return float(np.square(self.values[:rank]).sum())

    def left(self, rank: int) -> float:
        """The energy that the best rank-``rank`` approximation within the basis misses.

        Where that is next to nothing, rounding of the captured energy would hide it: it is measured.
        """
        whole = float(np.square(self.values).sum())
        missed = self.energy - whole
        if missed < 1e-5 * self.energy:
            missed = self._missed()
        return missed + float(np.square(self.values[rank:]).sum())

    def _missed(self) -> float:
        """||D - Q Q^T D||^2, a few rows at a time."""
        step = max(1, (1 << 22) // self.matrix.shape[1])
        spans = range(0, self.matrix.shape[0], step)
        rows = (self.matrix[n : n + step] - self.basis[n : n + step] @ self.image for n in spans)
        return sum(float((wide(block) ** 2).sum()) for block in rows)

    def truncation(self, rank: int) -> Truncation:
        """The best rank-``rank`` approximation within the basis; its energy agrees with what is `left`."""
        values, vectors = self._eigen()
        inner = as_like(vectors[:, :rank], self.basis)
        kept = values[:rank]
        down = (inner.T @ self.image) / as_like(np.where(kept > 0, kept, 1.0), self.basis)[:, None]
        return Truncation(self.basis @ inner, kept, down, self.captured(rank) + self.left(rank))


def _energy(matrix: Array) -> float:
    """||D||_F^2 in float64, a few rows at a time."""
    step = max(1, (1 << 22) // matrix.shape[1])
    return sum(float((wide(matrix[n : n + step]) ** 2).sum()) for n in range(0, matrix.shape[0], step))


def adaptive_svd(matrix: Array, error: float, cap: int | None = None, seed: int = 0) -> Truncation:
    """An approximation of the smallest rank whose relative Frobenius error is at most ``error`` (``cap`` at most).

    Grows a block Krylov basis until what it misses suffices, since the energy of the whole is known exactly; falls
    back to the exact SVD when the basis would be no small part of the matrix.
    """
    short = min(matrix.shape)
    limit = min(cap or short, short)
    if short <= EXACT_SIDE:
        whole = exact_svd(matrix)
        return whole.cut(min(limit, rank_for_error(whole.values, whole.energy, error)))
    guess = 16
    while True:
        guess = min(guess, limit)
        found = truncated_svd(matrix, guess, seed)
        if found.error(guess) <= error or guess == limit:
            return found.cut(rank_for_error(found.values, found.energy, error))
        guess *= 4 if guess < 64 else 2


def rank_for_error(values: np.ndarray, energy: float, error: float) -> int:
    """The smallest rank whose relative error is at most ``error``; all there are where none suffices."""
    enough = np.nonzero(missing(values, energy) <= error * error * energy * (1 + 1e-12))[0]
    return int(enough[0]) if len(enough) else len(values)


def error_for_energy(share: float) -> float:
    """The relative error that keeps ``share`` of the energy."""
    return math.sqrt(max(0.0, 1.0 - share))


def allocate(spectra: Mapping[str, np.ndarray], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks that lose least for ``budget``: every module's rank r costs ``costs[module]`` for each unit.

    Greedy by energy for cost, the optimum of this knapsack up to one item since spectra descend. Ranks may be 0.
    """
    offers = sorted(
        ((-(float(v) ** 2) / costs[name], name, k) for name, values in spectra.items() for k, v in enumerate(values)),
    )
    ranks = dict.fromkeys(spectra, 0)
    left = budget
    for gain, name, k in offers:
        if gain < 0 and k == ranks[name] and costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks
