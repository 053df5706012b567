"""LoRA variants of PEFT whose factors are held in a form of their own, written out as those of a plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.errors import FormatError
from loratool.lazy import np
from loratool.tensors import Tensor

_GROUP = 256  # the largest pooling group that is believed


def plain_factors(config: Mapping[str, Any], module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """(A [r,i], B [o,r], gain) of a module as a plain LoRA has them; its delta is to be multiplied by the gain.

    Raises FormatError without a place where the configuration or the shapes do not fit the variant.
    """
    if config.get("use_qalora"):
        return _pooled(config, a, b)
    if config.get("use_bdlora"):
        return (*_block_diagonal_pair(config["use_bdlora"], module, a, b), 1.0)
    return a, b, 1.0


def _pooled(config: Mapping[str, Any], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """QALoRA: inputs are averaged in groups of g and multiplied by the number n of groups (llm.md 1.12)."""
    g = config.get("qalora_group_size", 16)
    if type(g) is not int or not 1 <= g <= _GROUP or len(a.shape) != 2:
        raise FormatError(f"qalora_group_size is {g!r} for a factor of shape {list(a.shape)}")
    wide = Tensor(a.dtype, (a.shape[0], a.shape[1] * g), lambda start, stop: a.load(start, stop).repeat(g, axis=1))
    return wide, b, a.shape[1] / g


def _block_diagonal_pair(words: Any, module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """BD-LoRA: of one factor only the blocks on the diagonal are stored, one below the other."""
    if not isinstance(words, Mapping):
        raise FormatError("use_bdlora is no table")
    found = [side for side in "ab" if _meant(module, words.get(f"target_modules_bd_{side}"))]
    if len(found) > 1:
        raise FormatError("use_bdlora means both factors of one module")
    if not found and words.get("match_strict", True):
        raise FormatError("use_bdlora means neither factor of this module")
    blocks = words.get("nblocks", 1)
    return (
        block_diagonal(a, blocks) if found == ["a"] else a,
        block_diagonal(b, blocks) if found == ["b"] else b,
    )


def _meant(module: str, patterns: Any) -> bool:
    """PEFT's rule: a pattern stands anywhere in the module's name."""
    if not isinstance(patterns, list | None) or not all(isinstance(pattern, str) for pattern in patterns or []):
        raise FormatError("use_bdlora has a list of names that is none")
    return any(pattern in module for pattern in patterns or [])


def block_diagonal(stored: Tensor, blocks: Any) -> Tensor:
    """[rows, columns of a block] -> [rows, blocks x columns]: each block in columns of its own, zeros beside it."""
    if type(blocks) is not int or blocks < 1 or len(stored.shape) != 2 or stored.shape[0] % blocks:
        raise FormatError(f"{blocks!r} blocks of a factor of shape {list(stored.shape)}")
    rows, columns = stored.shape

    def load(start: int, stop: int) -> np.ndarray:
        values = stored.load(start, stop)
        whole = np.zeros((stop - start, blocks, columns), values.dtype)
        whole[np.arange(stop - start), np.arange(start, stop) * blocks // rows] = values
        return whole.reshape(stop - start, -1)

    return Tensor(stored.dtype, (rows, blocks * columns), load)
