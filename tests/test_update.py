"""The laws of the algebra, against torch and float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.devices import NativeWorker, TorchWorker, Worker, choose
from loratool.errors import FormatError, MatchError, NumericError
from loratool.kinds.based import Hira
from loratool.kinds.entries import AdditiveEntry, Entry
from loratool.kinds.hadamard import LoHa
from loratool.kinds.kronecker import LoKr
from loratool.kinds.patch import Padded
from loratool.kinds.sparse import Sparse
from loratool.kinds.truncated import Truncated
from loratool.onnx.turned import Turned
from loratool.ops.verify import ulps
from loratool.tensors import Tensor
from loratool.update import AdditiveRows, Dense, DoRA, LowRank, Rows, Sum, Update, as_low_rank, trimmed
from tests import samples
from tests.laws import examples
from tests.samples import ADDITIVE, DEVICES, UPDATES, low, magnitude, normal

every_additive = pytest.mark.parametrize("name", ADDITIVE)
every = pytest.mark.parametrize("name", UPDATES)


def weight(update: Update, seed: int = 40) -> np.ndarray:
    return normal(*update.shape, seed=seed).array()


def close(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    scale = max(1.0, float(np.abs(other).max(initial=0)))
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


@st.composite
def low_ranks(draw: st.DrawFn) -> LowRank:
    """LoRAs of every shape, kernel, rank, alpha, dtype and layer."""
    o, i, r = (draw(st.integers(1, 9)) for _ in range(3))
    layer = draw(st.sampled_from(("plain", "transposed", "embedding")))
    kernel = draw(st.lists(st.integers(1, 3), max_size=3)) if layer == "plain" else []
    dtype = st.sampled_from(("F32", "F64", "BF16", "F16"))
    return LowRank(
        normal(r, i, *kernel, dtype=draw(dtype)),
        normal(o, r, *(1 for _ in kernel), dtype=draw(dtype), seed=1),
        alpha=draw(st.none() | st.floats(-64, 64)),
        rank_stabilised=draw(st.booleans()),
        layer=layer,
    )


# -- updates around another ----------------------------------------------------------------------------------


AROUND: dict[str, tuple[str, Any]] = {  # what is its own, of kind, shape and slots; and how it is made
    "rows": ("shape", lambda inner: Rows(inner, 2, 4)),
    "additive_rows": ("shape", lambda inner: AdditiveRows(inner, 2, 4)),
    "dora": ("kind magnitude", lambda inner: DoRA(inner, magnitude(7))),
    "entry": ("shape", lambda inner: Entry(inner, 9, 5, 0, 1, 8)),
    "additive_entry": ("shape", lambda inner: AdditiveEntry(inner, 9, 5, 0, 1, 8)),
    "padded": ("", Padded),
    "truncated": ("kind diagonal", lambda inner: Truncated(inner, normal(3))),
    "hira": ("kind", Hira),
    "turned": ("shape", lambda inner: Turned(inner, (5, 7), "transposed")),
}


@pytest.mark.parametrize("name", AROUND)
def test_an_update_around_another_says_as_that_one_does(name: str) -> None:
    own, make = AROUND[name]
    inner = low(rank_stabilised=True)
    update, again = make(inner), replace(make(inner))
    for word in ("kind", "shape", "rank", "alpha", "scaling"):
        assert (getattr(update, word) == getattr(inner, word)) == (word not in own.split())
    assert {**inner.slots, **update.slots} == update.slots
    assert update.slots.keys() - inner.slots.keys() == {*own.split()} - {"kind", "shape"}
    assert again == update and hash(again) == hash(update)
    assert update != make(low(alpha=1.0, rank_stabilised=True))


# -- additive kinds ------------------------------------------------------------------------------------------


@examples(150)
@given(low_ranks(), st.floats(-3, 3), st.data())
def test_low_rank_laws(update: LowRank, by: float, data: st.DataObject) -> None:
    """scaled, factors and row blocks all say what the formula says."""
    up, down = (np.float64(t.array().astype(np.float64)) for t in (update.up, update.down))
    expected = (up.reshape(up.shape[:2]) @ down.reshape(len(down), -1)) * update.scaling
    expected = (expected.T if update.layer == "transposed" else expected).reshape(update.shape)
    close(update.delta(), expected)
    close(update.scaled(by).delta(), by * expected)
    left, right = update.factors()
    close((left @ right).reshape(update.shape), expected)
    start = data.draw(st.integers(0, update.shape[0]))
    stop = data.draw(st.integers(start, update.shape[0]))
    close(update.delta(start, stop), expected[start:stop], 1e-6)


def test_scaling_is_alpha_by_rank_or_by_its_root() -> None:
    """llm trap 17, 34: rank-stabilised divides by the root of the module's own rank; no alpha is scaling 1."""
    assert low(r=4, alpha=6.0).scaling == 1.5
    assert low(r=4, alpha=6.0, rank_stabilised=True).scaling == 3.0
    assert low(r=4, alpha=None).scaling == low(r=4, alpha=None, rank_stabilised=True).scaling == 1.0


@every_additive
def test_scaled_multiplies_the_delta(name: str) -> None:
    update = ADDITIVE[name]
    close(update.scaled(-1.5).delta(), -1.5 * update.delta())


@every_additive
def test_plus_adds_the_deltas(name: str) -> None:
    update = ADDITIVE[name]
    other = Dense(normal(*update.shape, seed=7), 0.5)
    close((update + other).delta(), update.delta() + other.delta())
    close((update + update).scaled(3).delta(), 6 * update.delta())


@every_additive
def test_factors_multiply_to_the_delta(name: str) -> None:
    update = ADDITIVE[name]
    pair = update.factors()
    parts = getattr(update, "parts", (update,))
    if all(isinstance(part, (LowRank, LoHa, LoKr)) for part in parts):
        assert pair is not None
    if any(isinstance(part, (Dense, Sparse)) for part in parts):
        assert pair is None
    if pair is not None:
        close((pair[0] @ pair[1]).reshape(update.shape), update.delta())


@every_additive
def test_as_low_rank_is_the_same_delta(name: str) -> None:
    update = ADDITIVE[name]
    plain = as_low_rank(update)
    assert (plain is None) is (update.factors() is None)
    if plain is not None:
        assert plain.mid is None
        assert trimmed(plain.shape) == trimmed(update.shape)
        close(plain.delta().reshape(update.shape), update.delta())


def test_parts_of_other_orientations_are_no_one_lora() -> None:
    assert as_low_rank(Sum((low(5, 5), low(5, 5, layer="transposed")))) is None


@every
@pytest.mark.parametrize("strength", [1.0, -0.5, 0.0])
def test_row_blocks_are_the_whole(name: str, strength: float) -> None:
    """For DoRA too, after its scan, and in any order of the blocks."""
    update = UPDATES[name]
    base = weight(update).reshape(update.shape[0], -1)
    rows = [(0, 2), (2, 3), (3, update.shape[0])]
    prepared = update.prepare(Tensor.float, strength)
    if prepared.scan is not None:
        prepared.scan((a, b, base[a:b]) for a, b in rows)
    reach = prepared.reach or (lambda a, b: (a, b))
    blocks = {a: prepared.delta(a, b, base[slice(*reach(a, b))]) for a, b in reversed(rows)}
    whole = update.apply(base.reshape(update.shape), strength).reshape(base.shape)
    close(base + np.concatenate([blocks[a] for a, _ in rows]), whole, 1e-6)


@every
def test_strength_multiplies_the_change(name: str) -> None:
    update = UPDATES[name]
    base = weight(update)
    change = update.apply(base) - base
    close(update.apply(base, -0.75) - base, -0.75 * change)
    close(update.apply(base, 0.0), base, 0)


def test_float64_factors_are_multiplied_in_float64() -> None:
    down, up = np.random.default_rng(0).standard_normal((2, 3, 3))
    update = LowRank(Tensor.of(down), Tensor.of(up), alpha=2.0)
    assert update.delta().dtype == np.float64
    close(update.delta(), 2 / 3 * up @ down, 1e-15)


def test_half_precision_factors_are_multiplied_in_float32() -> None:
    """llm trap 59: alpha times a bfloat16 factor in bfloat16 would lose bits."""
    update = LowRank(normal(3, 5, dtype="BF16"), normal(7, 3, dtype="BF16"), alpha=1.1)
    exact = (1.1 / 3) * update.up.array().astype(np.float64) @ update.down.array().astype(np.float64)
    close(update.delta(), exact, 1e-6)


@pytest.mark.parametrize(
    ("down", "up", "mid"),
    [
        ((3, 5), (7, 2), None),
        ((3,), (7, 3), None),
        ((3, 5), (7, 3, 2), None),
        ((0, 5), (7, 0), None),
        ((3, 5, 1, 1), (7, 3, 1, 1), (3, 2, 3, 3)),
        ((3, 5, 1, 1), (7, 3, 1, 1), (2, 3, 3, 3)),
    ],
)
def test_factors_that_do_not_chain_are_refused(down: Any, up: Any, mid: Any) -> None:
    with pytest.raises(FormatError, match=r"no LoRA pair|rank mismatch"):
        LowRank(normal(*down), normal(*up), mid and normal(*mid))


def test_a_convolution_is_neither_transposed_nor_a_table() -> None:
    with pytest.raises(FormatError, match="convolution"):
        low(7, 5, 3, 3, layer="embedding")


def test_sums_of_different_shapes_are_refused() -> None:
    with pytest.raises(MatchError, match="differ in shape"):
        low(7, 5) + low(7, 6)


# -- convolutions: torch as the oracle -----------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 1), (2, 3, 2)])
def test_a_convolution_is_down_then_up(kernel: tuple[int, ...]) -> None:
    import torch

    conv = getattr(torch.nn.functional, f"conv{len(kernel)}d")
    update = low(7, 5, 3, *kernel)
    pixels = torch.randn(2, 5, *(k + 4 for k in kernel), generator=torch.Generator().manual_seed(0))
    down, up = (torch.from_numpy(t.array()) for t in (update.down, update.up))
    chain = conv(conv(pixels, down), up) * update.scaling
    close(conv(pixels, torch.from_numpy(update.delta())).numpy(), chain.numpy())


@pytest.mark.parametrize("kernel", [(3,), (3, 2)])
def test_tucker_is_down_then_core_then_up(kernel: tuple[int, ...]) -> None:
    import torch

    conv = getattr(torch.nn.functional, f"conv{len(kernel)}d")
    update = samples.tucker(7, 5, 3, *kernel)
    pixels = torch.randn(2, 5, *(k + 4 for k in kernel), generator=torch.Generator().manual_seed(0))
    down, mid, up = (torch.from_numpy(update.slots[s].array()) for s in ("down", "mid", "up"))
    chain = conv(conv(conv(pixels, down), mid), up) * update.scaling
    assert update.shape == (7, 5, *kernel)
    close(conv(pixels, torch.from_numpy(update.delta())).numpy(), chain.numpy())


def test_an_embedding_is_looked_up() -> None:
    """PEFT's forward: rows of A transposed, times B transposed."""
    import torch

    a, b = normal(3, 11), normal(4, 3, seed=1)  # PEFT's A [r,entries], B [dim,r]
    update = LowRank(down=b.T, up=a.T, alpha=6.0, layer="embedding")
    table = torch.nn.functional.embedding(torch.arange(11), torch.from_numpy(a.array()).T)
    close(update.delta(), (table @ torch.from_numpy(b.array()).T * 2.0).numpy())


def test_transposed_is_the_transposed_delta() -> None:
    plain = low()
    close(plain.oriented("transposed").delta(), plain.delta().T, 0)


# -- DoRA ----------------------------------------------------------------------------------------------------

LAYERS = [
    (DoRA(low(), magnitude(7)), (1,)),
    (DoRA(low(), magnitude(5), axis=1), (0,)),
    (DoRA(low(layer="transposed"), magnitude(7)), (0,)),
    (DoRA(low(layer="transposed"), magnitude(5), axis=1), (1,)),
    (DoRA(low(layer="embedding"), magnitude(5), axis=1), (0,)),
    (DoRA(low(7, 5, 3, 3, 2), magnitude(1, 7, 1, 1)), (1, 2, 3)),
    (DoRA(low(7, 5, 3, 3, 2), magnitude(1, 5, 1, 1), axis=1), (0, 2, 3)),
]


@pytest.mark.parametrize(("update", "over"), LAYERS)
def test_dora_is_magnitude_times_direction(update: DoRA, over: tuple[int, ...]) -> None:
    """llm trap 24: the norm runs over the inputs of a Linear, over the entries of an Embedding."""
    base = weight(update).astype(np.float64)
    value = base + update.direction.delta()
    shape = [1 if axis in over else n for axis, n in enumerate(value.shape)]
    expected = update.magnitude.array().reshape(shape) * value / np.sqrt((value**2).sum(over, keepdims=True))
    close(update.apply(weight(update)), expected, 2e-6)


@pytest.mark.parametrize(("update", "over"), LAYERS)
def test_dora_of_a_zero_update_with_the_norms_is_the_identity(update: DoRA, over: tuple[int, ...]) -> None:
    base = weight(update)
    norms = Tensor.of(np.sqrt((base.astype(np.float64) ** 2).sum(over)).astype(np.float32))
    still = DoRA(update.direction.scaled(0.0), norms, update.axis)
    close(still.apply(base), base, 1e-6)


@pytest.mark.parametrize(("update", "over"), LAYERS)
def test_dora_refuses_a_zero_row(update: DoRA, over: tuple[int, ...]) -> None:
    """No epsilon: 0/0 is said, not written."""
    still = DoRA(update.direction.scaled(0.0), update.magnitude, update.axis)
    base = weight(update)
    (kept,) = set(range(base.ndim)) - set(over)
    base[tuple(1 if axis == kept else slice(None) for axis in range(base.ndim))] = 0
    with pytest.raises(NumericError, match="all-zero row"):
        still.apply(base)


def test_a_magnitude_of_another_size_is_refused() -> None:
    with pytest.raises(FormatError, match="does not fit 7 outputs"):
        DoRA(low(), magnitude(5))
    with pytest.raises(FormatError, match="does not fit 5 inputs"):
        DoRA(low(), magnitude(7), axis=1)


# -- numpy and torch -----------------------------------------------------------------------------------------


def changed(worker: Worker, update: Update, base: np.ndarray, dtype: str) -> np.ndarray:
    flat = worker.widen(base.reshape(base.shape[0], -1))
    prepared = update.prepare(worker.load, 0.7)
    if prepared.scan is not None:
        prepared.scan([(0, len(base), flat)])
    return worker.narrow(flat + prepared.delta(0, len(base), flat), dtype)


@every
@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16", "F16"])
@pytest.mark.parametrize("device", DEVICES[1:])
def test_workers_agree_to_the_last_place(name: str, dtype: str, device: str) -> None:
    update = UPDATES[name]
    base = normal(*update.shape, dtype=dtype, seed=40).array()
    one, there = (changed(worker, update, base, dtype) for worker in (Worker(), choose(device, {}).worker()))
    assert one.dtype == there.dtype == base.dtype
    if dtype in ("F32", "F64"):  # where the sum cancels, an ulp of the result is far below one of its terms
        close(one, there, 1e-6 if dtype == "F32" else 3e-6)
    else:
        assert ulps(one, there).max() <= 1


@examples(60)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.sampled_from(("BF16", "F16", "F32")))
def test_numpy_and_torch_round_alike(values: list[float], dtype: str) -> None:
    """Once, to nearest even; overflow becomes infinity in both."""
    import torch

    array = np.array(values, np.float32)
    one = Worker().narrow(array, dtype)
    other = TorchWorker("cpu").narrow(torch.from_numpy(array), dtype)
    assert one.tobytes() == other.tobytes()
    assert Worker().widen(one).tobytes() == TorchWorker("cpu").widen(other).numpy().tobytes()


@pytest.mark.parametrize("worker", [Worker, NativeWorker, lambda: TorchWorker("cpu")])
def test_workers_measure(worker: Any) -> None:
    it = worker()
    block = it.widen(np.array([[3.0, 0.0], [0.0, -4.0]], np.float32))
    assert it.count_nonzero(block) == 2
    assert it.magnitude(block) >= 4.0
    assert not it.magnitude(it.widen(np.array([np.nan, 1.0], np.float32))) < 1e30
    assert not it.magnitude(it.widen(np.array([np.inf, 1.0], np.float32))) < 1e30
