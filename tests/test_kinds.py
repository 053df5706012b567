"""The kinds of update beyond LoRA, against LyCORIS, PEFT and float64. Traps are those of the diffusion fact sheet."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loratool
from loratool.errors import FormatError, MatchError, NumericError
from loratool.kinds import rotation
from loratool.kinds.glora import GLoRA
from loratool.kinds.hadamard import LoHa
from loratool.kinds.kronecker import LoKr
from loratool.kinds.patch import Padded
from loratool.kinds.rescale import IA3
from loratool.kinds.rotation import BOFT, OFT, PeftBOFT, PeftOFT, PeftOldOFT, SegmentOFT
from loratool.kinds.sparse import Sparse
from loratool.plan import OutputFile, Part, Plan, Step
from loratool.tensors import Tensor, read_safetensors, write_safetensors
from loratool.update import Additive, Dense, DoRA, Sum, Update, rows, stack
from tests import samples
from tests.laws import examples
from tests.samples import DEVICES, LYCORIS, loha, lokr, magnitude, normal, tucker_loha
from tests.samples import WHOLE_LOKR as WHOLE


def close(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert one.shape == other.shape
    scale = max(1.0, float(np.abs(other).max(initial=0)))
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.array().astype(np.float64)


def base(*shape: int) -> np.ndarray:
    return np.random.default_rng(40).standard_normal(shape)


def torch_of(tensor: Tensor | np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.array(tensor.array() if isinstance(tensor, Tensor) else tensor))


# -- LoHa ----------------------------------------------------------------------------------------------------


def test_loha_is_the_product_of_two_products() -> None:
    """Section 3.3, in float64."""
    update = loha(12, 10)
    expected = 1.5 * (wide(update.w1_a) @ wide(update.w1_b)) * (wide(update.w2_a) @ wide(update.w2_b))
    close(update.delta(), expected)


def test_loha_scales_once() -> None:
    """Trap 2: alpha 3 of rank 2 is 1.5; LyCORIS' own get_diff_weight gives 2.25, its functional weight is right."""
    import torch
    from lycoris.functional.loha import diff_weight

    update = loha(12, 10)
    halves = [torch_of(t) for t in (update.w1_b, update.w1_a, update.w2_b, update.w2_a)]
    close(update.delta(), diff_weight(*halves, None, None, gamma=torch.tensor(1.5)))


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 3, 2)])
def test_a_loha_around_cores_is_stored_transposed(kernel: tuple[int, ...]) -> None:
    """Trap 25: w*_a is [r,o] there."""
    import torch
    from lycoris.functional.loha import diff_weight

    update = tucker_loha(6, 5, 2, *kernel)
    order = (update.w1_b, update.w1_a, update.w2_b, update.w2_a, update.t1, update.t2)
    assert update.shape == (6, 5, *kernel)
    close(update.delta(), diff_weight(*map(torch_of, order), gamma=torch.tensor(1.5)))


def test_a_loha_is_what_lycoris_runs() -> None:
    """Section 3.3: the module's own forward, of a convolution and of a Linear; trap 3: its alpha holds sqrt(r)."""
    import torch
    from lycoris.modules.loha import LohaModule

    for layer, options in (
        (torch.nn.Conv2d(6, 8, (3, 2)), {"use_tucker": True}),
        (torch.nn.Conv2d(6, 8, (3, 2)), {}),
        (torch.nn.Linear(6, 8), {"rs_lora": True}),
    ):
        torch.manual_seed(0)
        module = LohaModule("", layer, 1.0, 4, 6.0, **options)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        slots = {k: Tensor.of(v.detach().numpy()) for k, v in module.custom_state_dict().items()}
        alpha = slots.pop("alpha").item()
        update = LoHa(**{k.removeprefix("hada_"): t for k, t in slots.items()}, alpha=alpha)
        expected = layer.weight.detach() + module.get_weight(module.shape).detach()
        shape = tuple(layer.weight.shape)
        close(update.sized(shape).apply(layer.weight.detach().numpy()), expected)  # type: ignore[union-attr]


@pytest.mark.parametrize("update", [loha(40, 30, 3), loha(40, 30, 3, alpha=None), tucker_loha(40, 30, 3, 3, 2)])
def test_a_loha_is_a_lora_of_the_squared_rank(update: LoHa) -> None:
    """Section 3.3: row-wise Khatri-Rao products, exactly; alpha keeps the scaling."""
    low = update.low_rank()
    assert low is not None
    assert (low.rank, low.shape) == (9, update.shape)
    close(low.delta(), update.delta())
    assert (low.alpha is None) == (update.alpha is None)
    assert math.isclose(low.scaling, update.scaling)


def test_no_lora_where_its_rank_would_be_full() -> None:
    assert loha(9, 30, 3).low_rank() is None
    assert loha(10, 30, 3).low_rank() is not None


def test_a_flattened_kernel_unfolds_where_the_base_tells_it() -> None:
    """Section 3.3: w*_b of a convolution is [r,i*k], its shape does not tell the kernel."""
    flat = loha(12, 5 * 6)
    unfolded = flat.sized((12, 5, 3, 2))
    assert unfolded is not None
    assert unfolded.shape == (12, 5, 3, 2)
    close(unfolded.delta(), flat.delta().reshape(12, 5, 3, 2), 0)
    assert flat.sized((12, 5, 3, 3)) is None
    assert flat.sized((30, 12)) is None
    low = loha(40, 5 * 6, weight=(40, 5, 3, 2)).low_rank()
    assert low is not None
    assert low.down.shape == (4, 5, 3, 2)


# -- LoKr ----------------------------------------------------------------------------------------------------


PAIRS = {"w1": None, "w1_a": normal(3, 2, seed=3), "w1_b": normal(2, 2, seed=4)}
LOKRS = {
    "second_factorised": lokr(),
    "both_factorised": lokr(**PAIRS),
    "first_factorised": lokr(**{**WHOLE, **PAIRS}),
    "both_whole": lokr(**WHOLE),
    "conv_flat": lokr(w2_b=normal(2, 5 * 6, seed=2), weight=(12, 10, 3, 2)),
    "conv_unfolded": lokr(w2_b=normal(2, 5, 3, 2, seed=2)),
    "conv_whole": lokr(**{**WHOLE, "w2": normal(4, 5, 3, 2)}),
    "conv_3d": lokr(**{**WHOLE, "w2": normal(4, 5, 2, 3, 2)}),
    "tucker": lokr(w2_a=normal(2, 4), w2_b=normal(2, 5), t2=normal(2, 2, 3, 2)),
    "wide": lokr(w1=normal(1, 1), w2_a=normal(12, 2), w2_b=normal(2, 10)),
}


def lokr_reference(update: LoKr) -> np.ndarray:
    """Section 3.4 in float64, over named axes."""
    w1 = wide(update.w1) if update.w1 else wide(update.w1_a) @ wide(update.w1_b)  # type: ignore[arg-type]
    if update.w2:
        w2 = wide(update.w2)
    else:
        assert update.w2_a and update.w2_b
        if update.t2:
            w2 = np.einsum("ij...,ip,jq->pq...", wide(update.t2), wide(update.w2_a), wide(update.w2_b))
        else:
            w2 = np.tensordot(wide(update.w2_a), wide(update.w2_b), 1)
    product = np.einsum("ac,bd...->abcd...", w1, w2)
    return product.reshape(update.shape)


@pytest.mark.parametrize("name", LOKRS)
def test_lokr_is_the_kronecker_product(name: str) -> None:
    update = LOKRS[name]
    assert update.shape[:2] == (12, 10)
    close(update.delta(), lokr_reference(update) * (1.0 if name in ("both_whole", "conv_whole", "conv_3d") else 1.5))


@pytest.mark.parametrize("alpha", [1e4, 1e10, 0.0])
def test_alpha_of_two_whole_halves_says_nothing(alpha: float) -> None:
    """Trap 1: LyCORIS stores the rank that the user forced."""
    update = lokr(**WHOLE, alpha=alpha)
    close(update.delta(), np.kron(wide(update.w1), wide(update.w2)))  # type: ignore[arg-type]


def test_peft_scales_two_whole_halves_too() -> None:
    """Section 3.10: the rank of PEFT's configuration counts, whatever is whole."""
    import torch
    from peft import LoKrConfig, get_peft_model

    for options in ({"r": 64}, {"r": 2}, {"r": 2, "decompose_both": True, "decompose_factor": 8}):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"x": torch.nn.Linear(24, 36, bias=False)})
        tuned = get_peft_model(model, LoKrConfig(**options, alpha=8, target_modules=["x"], init_weights=False))
        layer = tuned.base_model.model.x
        names = [n for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b") if "default" in getattr(layer, f"lokr_{n}")]
        slots = {name: Tensor.of(getattr(layer, f"lokr_{name}")["default"].detach().numpy()) for name in names}
        update = LoKr(**slots, alpha=8.0, stated_rank=options["r"])
        close(update.delta(), layer.get_delta_weight("default").detach())


def test_a_lokr_is_what_lycoris_runs() -> None:
    """Section 3.4 and traps 1, 3 and 25: the weight of LyCORIS' own modules, alpha read from their files."""
    import torch
    from lycoris.modules.lokr import LokrModule

    conv, linear = torch.nn.Conv2d(12, 16, (3, 2)), torch.nn.Linear(12, 16)
    for layer, dim, options in (
        (conv, 1, {"use_tucker": True}),
        (conv, 1, {}),
        (conv, 10000, {}),
        (linear, 10000, {}),
        (linear, 1, {"decompose_both": True, "factor": 8}),
        (linear, 1, {"rs_lora": True}),
    ):
        torch.manual_seed(0)
        module = LokrModule("", layer, 1.0, dim, 6.0, **options)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        slots = {k: Tensor.of(v.detach().numpy()) for k, v in module.custom_state_dict().items()}
        alpha = slots.pop("alpha").item()
        update = LoKr(**{k.removeprefix("lokr_"): t for k, t in slots.items()}, alpha=alpha)
        sized = update.sized(tuple(layer.weight.shape))
        assert isinstance(sized, Additive)
        close(sized.delta(), module.get_weight(layer.weight.shape).detach())


@pytest.mark.parametrize("name", LOKRS)
def test_a_lokr_is_a_lora_where_a_half_is_factorised(name: str) -> None:
    """Section 3.4: of the product of the ranks of its halves, without any decomposition."""
    update, low = LOKRS[name], LOKRS[name].low_rank()
    rank = {"both_whole": 8, "first_factorised": 8, "conv_whole": 8, "conv_3d": 8, "wide": 2}.get(name, 4)
    assert low is not None
    assert (low.rank, low.shape) == (rank, update.shape)
    close(low.delta(), update.delta())
    close(low.scaling, update.scaling, 1e-12)


def test_no_lora_of_a_lokr_of_full_rank() -> None:
    assert LoKr(normal(4, 4), w2=normal(5, 5)).low_rank() is None


@pytest.mark.parametrize("name", LOKRS)
def test_a_scaled_lokr_can_be_written_where_alpha_says_nothing(name: str) -> None:
    scaled = LOKRS[name].scaled(0.25)
    plain = scaled.folded()
    assert plain.stated_rank is None
    close(plain.delta(), LOKRS[name].delta() * 0.25)


def test_rows_of_a_lokr_are_a_lokr_where_they_are_rows_of_its_first_half() -> None:
    """Section 10: other rows of a fused weight are not."""
    update = LOKRS["conv_flat"]
    part = update.part(4, 12)
    assert isinstance(part, LoKr)
    close(part.delta(), update.delta()[4:12], 0)
    assert update.part(3, 12) is None
    first = LOKRS["both_factorised"].part(0, 8)
    assert first is not None
    close(first.delta(), LOKRS["both_factorised"].delta()[:8])


def test_rows_of_a_loha_are_a_loha() -> None:
    for update in (loha(12, 10), tucker_loha(12, 10, 2, 3, 2), loha(12, 30, weight=(12, 5, 3, 2))):
        close(update.part(3, 8).delta(), update.delta()[3:8], 1e-6)


BROKEN: list[Any] = [
    (lambda: replace(loha(12, 10), w2_b=normal(3, 10)), "rank mismatch in w2"),
    (lambda: LoHa(normal(4, 2), normal(2, 5), normal(4, 2), normal(2, 6)), "differ in shape"),
    (lambda: LoHa(normal(2, 4), normal(2, 5), normal(2, 4), normal(2, 5), normal(2, 2, 3)), "t1 and t2"),
    (lambda: LoHa(normal(2, 4), normal(2, 5), normal(2, 4), normal(2, 5), normal(3, 2, 3), normal(2, 2, 3)), "w1"),
    (lambda: loha(12, 10, weight=(12, 5, 3)), "for a weight of shape"),
    (lambda: LoKr(w1=normal(2, 2)), "w2 is stored as nothing"),
    (lambda: lokr(w2=normal(4, 5)), "w2 is stored as w2 and w2_a and w2_b"),
    (lambda: lokr(w2_b=None), "w2 is stored as w2_a"),
    (lambda: lokr(w1=normal(3)), "no matrix"),
    (lambda: lokr(w1=normal(3, 2, 3)), "no matrix"),
    (lambda: lokr(w2_a=normal(4, 0), w2_b=normal(0, 5)), "no matrix"),
    (lambda: lokr(**WHOLE, t2=normal(2, 2, 3)), "rank mismatch"),
    (lambda: lokr(w2_a=normal(2, 4), t2=normal(2, 3, 3)), "rank mismatch"),
    (lambda: lokr(stated_rank=0), "a rank of 0"),
    (lambda: IA3(normal(3, 2)), "no vector"),
    (lambda: IA3(normal(0)), "no vector"),
    (lambda: IA3(normal(3), weight=(4, 3)), "for a weight of shape"),
    (lambda: GLoRA(normal(5, 2), normal(2, 5), normal(7, 2), normal(2, 6)), "no GLoRA"),
    (lambda: GLoRA(normal(5), normal(2, 5), normal(7, 2), normal(2, 5)), "no GLoRA"),
    (lambda: OFT(normal(3, 4, 5)), "square blocks"),
    (lambda: OFT(normal(3, 4, 4), normal(11, 1)), "11 factors"),
    (lambda: OFT(normal(3, 4, 4), weight=(13, 2)), "for a weight of shape"),
    (lambda: BOFT(normal(3, 4, 4)), "square blocks"),
    (lambda: BOFT(normal(3, 2, 4, 4)), "interlock"),
    (lambda: BOFT(normal(2, 2, 3, 3)), "interlock"),
    (lambda: BOFT(normal(70, 2, 2, 2)), "interlock"),
    (lambda: PeftOFT(normal(3, 4)), "triangles"),
    (lambda: PeftOFT(normal(3, 3), block_share=True), "shared"),
    (lambda: PeftOFT(normal(3, 3), neumann_terms=10**9), "terms"),
    (lambda: SegmentOFT(()), "without a segment"),
    (lambda: PeftOFT(normal(3, 3), eps=-1.0).apply(base(2, 9)), "no longer than -1"),
    (lambda: PeftOldOFT(normal(3, 3, 3), eps=0.0).apply(base(9, 2)), "no longer than 0"),
]


@pytest.mark.parametrize(("make", "says"), BROKEN)
def test_tensors_that_do_not_fit_are_refused(make: Any, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        make()


# -- (IA)3 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_ia3_is_what_lycoris_runs(kind: str, on_input: bool) -> None:
    """Section 3.7: around 0."""
    import torch
    from lycoris.modules.ia3 import IA3Module

    layer = torch.nn.Linear(6, 8) if kind == "Linear" else torch.nn.Conv2d(6, 8, (3, 2))
    module = IA3Module("", layer, train_on_input=on_input)
    torch.nn.init.normal_(module.weight)
    update = IA3(Tensor.of(module.weight.detach().numpy()), on_input)
    expected, _ = module.get_merged_weight()
    close(update.apply(layer.weight.detach().numpy()), expected.detach())
    assert update.sized(tuple(layer.weight.shape)) is not None
    assert update.sized((7, 7)) is None


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Conv1D"])
def test_ia3_is_what_peft_merges(kind: str, feedforward: bool) -> None:
    """Section 3.10: around 1; on a transposed layer the axes change places, and the bias goes with the outputs."""
    import torch
    from peft import IA3Config, get_peft_model
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layers = {"Linear": torch.nn.Linear(6, 8), "Conv2d": torch.nn.Conv2d(6, 8, (3, 2)), "Conv1D": Conv1D(8, 6)}
    model = torch.nn.ModuleDict({"x": layers[kind]})
    torch.nn.init.normal_(model["x"].bias)
    before = {name: np.array(t.detach().numpy()) for name, t in model["x"].named_parameters()}
    config = IA3Config(
        target_modules=["x"],
        feedforward_modules=["x"] if feedforward else [],
        fan_in_fan_out=kind == "Conv1D",
        init_ia3_weights=False,
    )
    tuned = get_peft_model(model, config)
    vector = Tensor.of(tuned.base_model.model.x.ia3_l["default"].detach().numpy().copy())
    merged = tuned.merge_and_unload()["x"]
    layer: Any = "transposed" if kind == "Conv1D" else "plain"
    update = IA3(vector, feedforward, centre=1.0, layer=layer).sized(before["weight"].shape)
    assert update is not None
    close(update.apply(before["weight"]), merged.weight.detach())
    if not feedforward:
        bias = IA3(vector, centre=1.0, weight=(8,))
        close(bias.apply(before["bias"]), merged.bias.detach())


# -- GLoRA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "pointwise"])
def test_glora_is_what_lycoris_rebuilds(kind: str) -> None:
    """Section 3.8, scaled once; trap 3: alpha is stored raw where the training was rank-stabilised."""
    import torch
    from lycoris.modules.glora import GLoRAModule

    layers = {
        "Linear": torch.nn.Linear(6, 8),
        "Conv2d": torch.nn.Conv2d(6, 8, (3, 2)),
        "pointwise": torch.nn.Conv2d(6, 8, 1),
    }
    layer = layers[kind]
    for stabilised in (False, True):
        torch.manual_seed(0)
        module = GLoRAModule("", layer, 1.0, 4, 3.0, rs_lora=stabilised)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        slots = {
            k.removesuffix(".weight"): Tensor.of(v.detach().numpy()) for k, v in module.custom_state_dict().items()
        }
        alpha = slots.pop("alpha").item()
        update = GLoRA(**slots, alpha=alpha, rank_stabilised=stabilised)
        assert update.sized(tuple(layer.weight.shape)) is update
        close(update.apply(layer.weight.detach().numpy()), module.get_merged_weight()[0].detach())


def test_the_old_layout_of_glora_is_known_by_its_shapes() -> None:
    """Section 3.8: the roles are transposed."""
    w, slots = base(7, 5), (normal(2, 5), normal(5, 2, seed=1), normal(2, 5, seed=2), normal(7, 2, seed=3))
    a1, a2, b1, b2 = map(wide, slots)
    update = GLoRA(*slots, alpha=1.0)
    close(update.apply(w), w + 0.5 * (b2 @ b1 + (w @ a2) @ a1))
    assert update.shape == (7, 5)
    assert update.rank == 2
    close(update.part(2, 4).apply(w[2:4]), update.apply(w)[2:4])


# -- OFT and BOFT --------------------------------------------------------------------------------------------


def rotations(blocks: Tensor, limit: float = 0.0) -> np.ndarray:
    """Section 3.9: R of each block, in float64."""
    b = wide(blocks)
    q = b - b.swapaxes(-1, -2)
    norm = np.linalg.norm(q)
    q = q * (limit / norm) if 0 < limit < norm else q
    one = np.eye(b.shape[-1])
    return (one + q) @ np.linalg.inv(one - q)


def block_diagonal(blocks: np.ndarray) -> np.ndarray:
    n, b, _ = blocks.shape
    out = np.zeros((n * b, n * b))
    for k, block in enumerate(blocks):
        out[k * b : k * b + b, k * b : k * b + b] = block
    return out


@pytest.mark.parametrize("alpha", [None, 0.0, 0.01, 5.0])
def test_oft_turns_blocks_of_outputs(alpha: float | None) -> None:
    """Section 3.9; trap 45: the constraint is alpha times the outputs; 0 and none are no constraint."""
    w, blocks, rescale = base(12, 3, 2), normal(3, 4, 4), normal(12, 1, 1, seed=1)
    r = block_diagonal(rotations(blocks, (alpha or 0.0) * 12))
    turned = np.einsum("nm,n...->m...", r, w)
    close(OFT(blocks, None, alpha).apply(w), turned)
    close(OFT(blocks, rescale, alpha).apply(w), wide(rescale) * turned)
    close(OFT(blocks, rescale, alpha).apply(w, 0.3), w + 0.3 * (wide(rescale) * turned - w))


def test_an_old_oft_holds_the_rotation_itself() -> None:
    """Section 1.1, `oft_diag`."""
    w, blocks = base(12, 3), normal(3, 4, 4)
    close(OFT(blocks, alpha=0.01, direct=True).apply(w), block_diagonal(wide(blocks)).T @ w)


@pytest.mark.parametrize(("constraint", "rescaled"), [(0, False), (0, True), (0.01, True)])
@pytest.mark.parametrize("kind", ["diag_oft", "boft"])
def test_oft_and_boft_are_what_lycoris_merges(kind: str, constraint: float, rescaled: bool) -> None:
    """Section 3.9; trap 46: three axes and four."""
    import torch
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule

    module_class: Any = ButterflyOFTModule if kind == "boft" else DiagOFTModule
    for layer in (torch.nn.Linear(6, 16), torch.nn.Conv2d(6, 32, (3, 2))):
        torch.manual_seed(0)
        module = module_class("", layer, 1.0, 4, constraint=constraint, rescaled=rescaled)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        blocks, rescale = module.oft_blocks.detach(), module.rescale.detach() if rescaled else None
        update_class: Any = BOFT if blocks.ndim == 4 else OFT
        update = update_class(
            Tensor.of(blocks.numpy()), None if rescale is None else Tensor.of(rescale.numpy()), module.alpha.item()
        )
        assert update.kind == kind.removeprefix("diag_")
        close(update.apply(layer.weight.detach().numpy()), module.get_merged_weight()[0].detach())


def test_segments_of_kohyas_flux_oft_turn_apart() -> None:
    """Trap 46: a block set and a constraint for each segment of the fused outputs."""
    segments = normal(2, 3, 3), normal(2, 4, 4), normal(2, 3, 3, seed=5)
    w = base(20, 5)
    expected = np.concatenate(
        [
            block_diagonal(rotations(blocks, 0.05 * rows)).T @ part
            for blocks, rows, part in zip(segments, (6, 8, 6), np.split(w, [6, 14]), strict=True)
        ]
    )
    update = SegmentOFT(segments, 0.05)
    close(update.apply(w), expected)
    assert update.shape == (20, 0)
    one = update.part(6, 14)
    assert isinstance(one, OFT)
    close(one.apply(w[6:14]), expected[6:14])
    assert update.part(6, 13) is None


def peft_layer(config: Any, layer: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """PEFT's tuned layer, the weight before and the weight that it merges."""
    import torch
    from peft import get_peft_model

    before = np.array(layer.weight.detach().numpy())
    torch.manual_seed(0)
    tuned = get_peft_model(torch.nn.ModuleDict({"x": layer}), config)
    inner = tuned.base_model.model.x
    for name, parameter in tuned.named_parameters():
        if "oft" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    state = {n: np.array(t.detach().numpy()) for n, t in inner.named_parameters() if "oft" in n}
    inner.merge()
    return state, before, inner.get_base_layer().weight.detach().numpy()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4, 5, 7])
def test_oft_is_what_peft_merges(terms: int, shared: bool) -> None:
    """Section 3.10 and llm 1.6: on the inputs; the series and the exact transform turn in opposite directions."""
    import torch
    from peft import OFTConfig

    more = {"use_cayley_neumann": terms > 0, "num_cayley_neumann_terms": terms}
    config = OFTConfig(oft_block_size=4, target_modules=["x"], block_share=shared, **more)
    for layer in (torch.nn.Linear(12, 6), torch.nn.Conv2d(4, 6, 3)):
        state, before, merged = peft_layer(config, layer)
        (triangles,) = state.values()
        update = PeftOFT(Tensor.of(triangles), shared, terms)
        sized = update.sized(before.shape)
        assert sized is not None
        assert sized.shape == before.shape
        close(sized.apply(before), merged)


@pytest.mark.parametrize("terms", [0, 4, 5])
def test_onetrainer_turns_kernels_the_other_way(terms: int) -> None:
    """Section 1.1, `oft_R.weight`: inputs as PEFT does, but the weights of convolutions by R, pointwise ones too."""
    blocks = normal(3, 6)
    for kernel in ((), (1, 1), (3, 1)):
        w = base(5, 12 // math.prod(kernel), *kernel)
        backwards = PeftOFT(blocks, False, terms, kernels_back=True).sized(w.shape)
        assert backwards is not None
        r = PeftOFT(blocks, False, terms).apply(np.eye(12)).T
        flat = w.reshape(5, 12)
        close(backwards.apply(w).reshape(5, 12), flat @ r if kernel else flat @ r.T)
        close(PeftOFT(blocks, False, terms).apply(w).reshape(5, 12), flat @ r.T)


def test_a_constrained_oft_is_what_peft_merges() -> None:
    """`coft` shortens each block before the transform."""
    import torch
    from peft import OFTConfig

    config = OFTConfig(oft_block_size=4, target_modules=["x"], coft=True, eps=0.3)
    state, before, merged = peft_layer(config, torch.nn.Linear(12, 6))
    (triangles,) = state.values()
    close(PeftOFT(Tensor.of(triangles), eps=0.3).apply(before), merged)
    assert np.abs(PeftOFT(Tensor.of(triangles)).apply(before) - merged).max() > 0.1


def test_boft_is_what_peft_merges() -> None:
    import torch
    from peft import BOFTConfig

    for layer in (torch.nn.Linear(12, 6), torch.nn.Conv2d(4, 6, 3)):
        state, before, merged = peft_layer(BOFTConfig(boft_block_size=4, target_modules=["x"]), layer)
        slots = {name.split(".")[0]: Tensor.of(values) for name, values in state.items()}
        close(PeftBOFT(**slots).apply(before), merged)


def test_the_butterfly_of_boft_is_that_of_peft() -> None:
    """PEFT takes one factor only where its CUDA extension is missing: the matrices of its own code are built here."""
    import torch
    from peft.tuners.boft.layer import BOFTLayer

    factors, n, b = 3, 8, 4
    blocks, gain, w = normal(factors, n, b, b), normal(6, 1, seed=1), base(6, n * b)
    code: Any = BOFTLayer  # these methods do not look at the layer
    matrix = np.eye(n * b)
    for i in range(factors):
        order = code.block_butterfly_perm(None, n * b, n // 2**i, b // 2, factors - 1)
        p = code.perm2mat(None, order).double()
        turn = code.cayley_batch(None, torch_of(blocks)[i].double())
        matrix = (p @ torch.block_diag(*turn) @ p.T).numpy() @ matrix
    close(PeftBOFT(blocks, gain).apply(w), wide(gain) * (w @ matrix.T))


def test_ofts_of_older_peft() -> None:
    """oft_r with oft_s (0.14, 0.15) turns inputs, alone (0.11 to 0.13) outputs; checked once against 0.13 and 0.14."""
    blocks, gain = normal(3, 4, 4), normal(6, 1, seed=1)
    k = (wide(blocks) - wide(blocks).swapaxes(1, 2)) / 2
    r = block_diagonal(np.stack([(np.eye(4) - q) @ np.linalg.inv(np.eye(4) + q) for q in k]))
    w = base(6, 12)
    close(PeftOldOFT(blocks, gain).apply(w), wide(gain) * (w @ r.T))
    close(PeftOldOFT(blocks).apply(w.T), r.T @ w.T)


@pytest.mark.parametrize("shared", [False, True])
def test_the_bound_of_older_peft_goes_by_the_outputs(shared: bool) -> None:
    """`coft` before 0.16: eps x ceil(outputs / blocks)^2 / sqrt(stored blocks), though the inputs are turned."""
    blocks, gain, eps = normal(1 if shared else 3, 4, 4), normal(6, 1, seed=1), 0.2
    limit = eps * 2**2 / math.sqrt(len(blocks.array()))
    short = np.stack([b * min(1.0, limit / np.linalg.norm(b)) for b in wide(blocks)])
    update = PeftOldOFT(blocks, gain, shared, eps, weight=(6, 12))
    close(update.apply(base(6, 12)), replace(update, oft_r=Tensor.of(short), eps=None).apply(base(6, 12)))


@pytest.mark.parametrize(
    "update",
    [
        OFT(normal(3, 4, 4), normal(12, 1)),
        BOFT(normal(2, 2, 6, 6)),
        PeftOFT(normal(3, 6)),
        PeftBOFT(normal(1, 3, 4, 4), normal(7, 1)),
        IA3(normal(12)),
        IA3(normal(12), on_input=True),
    ],
)
def test_a_transposed_weight_is_changed_alike(update: Any) -> None:
    """As HF's Conv1D stores it; the axis that is turned or rescaled changes place."""
    rows_known = update.sized((12, 7)) is not None
    w = base(12, 7) if rows_known else base(7, 12)
    turned = update.oriented("transposed")
    assert turned.sized(w.T.shape) is not None
    close(turned.apply(w.T), update.apply(w).T)


def test_a_rotation_turns_and_does_not_stretch() -> None:
    """Norms and angles of the outputs stay; blocks of zeros change nothing at all."""
    w = base(12, 5).astype(np.float32)
    for update in (OFT(normal(3, 4, 4)), BOFT(normal(2, 2, 6, 6))):
        turned = update.apply(w)
        close(turned.T @ turned, w.T @ w)
        assert np.abs(turned - w).max() > 0.5
    for still in (OFT(Tensor.of(np.zeros((3, 4, 4), np.float32))), PeftOFT(Tensor.of(np.zeros((1, 10), np.float32)))):
        close(still.apply(w), w, 0)


def test_a_span_is_turned_once_for_all_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of kohya's OFT is a quarter of the outputs: far more rows than are held at once."""
    calls: list[int] = []
    turned = rotation._turned
    monkeypatch.setattr(rotation, "_turned", lambda *given: calls.append(given[1]) or turned(*given))
    update, w = OFT(normal(2, 6, 6), normal(12)), base(12, 5)
    prepared = update.prepare(Tensor.float)
    assert prepared.reach is not None
    found = [prepared.delta(n, n + 2, w[slice(*prepared.reach(n, n + 2))]) for n in range(0, 12, 2)]
    assert calls == [0, 6]
    close(w + np.concatenate(found), update.apply(w))


def test_parts_of_rotations_are_rotations() -> None:
    """Section 10: exact where block boundaries align, and where one constraint does not span them all."""
    w, update = base(12, 5), OFT(normal(3, 4, 4), normal(12, 1))
    part: Update | None = update.part(4, 12)
    assert part is not None
    close(part.apply(w[4:]), update.apply(w)[4:])
    for mixing in (update, BOFT(normal(1, 3, 4, 4))):
        with pytest.raises(FormatError, match="cannot be split"):
            rows(mixing, 2, 12)
    limited = OFT(normal(3, 4, 4), alpha=0.1)
    assert limited.part(4, 12) is None
    close(rows(limited, 4, 12).apply(w[4:]), limited.apply(w)[4:])
    inputs = PeftBOFT(normal(1, 1, 5, 5), normal(12, 1))
    close(inputs.part(3, 7).apply(w[3:7]), inputs.apply(w)[3:7])  # type: ignore[union-attr]


# -- DoRA of other kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_output", [True, False])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_dora_of_loha_and_lokr_is_what_lycoris_merges(kind: str, by_output: bool) -> None:
    """Section 3.12; the magnitude by input of a convolution whose kernel the factors hold flattened."""
    import torch
    from lycoris.functional.general import weight_decompose
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    made: Any = LohaModule if kind == "loha" else LokrModule
    for layer in (torch.nn.Linear(12, 16), torch.nn.Conv2d(12, 16, (3, 2))):
        torch.manual_seed(0)
        module = made("", layer, 1.0, 1, 3.0, weight_decompose=True, wd_on_out=by_output)
        for name, parameter in module.named_parameters():
            if name != "dora_scale":
                torch.nn.init.normal_(parameter, std=0.5)
        slots = {k: Tensor.of(v.detach().numpy().copy()) for k, v in module.custom_state_dict().items()}
        alpha, scale = slots.pop("alpha").item(), slots.pop("dora_scale")
        inner: Any = LoHa if kind == "loha" else LoKr
        direction = inner(**{k.partition("_")[2]: t for k, t in slots.items()}, alpha=alpha)
        update = DoRA(direction, scale, axis=0 if by_output else 1).sized(tuple(layer.weight.shape))
        assert update is not None
        weight = layer.weight.detach()
        value = weight + module.get_weight(layer.weight.shape).detach()
        expected = weight_decompose(value, module.dora_scale.detach(), 1.0, by_output)
        close(update.apply(weight.numpy()), expected)
        assert update.scaling == direction.scaling


def test_rows_of_a_dora_of_a_loha() -> None:
    update = DoRA(loha(12, 10), magnitude(12, 1))
    part, w = rows(update, 3, 9), base(12, 10)
    assert isinstance(part, DoRA)
    assert isinstance(part.direction, LoHa)
    close(part.apply(w[3:9]), update.apply(w)[3:9])


def test_a_magnitude_that_fits_neither_side_of_a_loha() -> None:
    with pytest.raises(FormatError, match="does not fit 12 outputs"):
        DoRA(loha(12, 10), normal(10))
    with pytest.raises(FormatError, match="does not fit 10 inputs"):
        DoRA(loha(12, 10), normal(3), axis=1)
    assert DoRA(loha(12, 10), normal(5), axis=1).sized((12, 10)) is None


# -- sparse residuals ----------------------------------------------------------------------------------------


def coordinates(matrix: np.ndarray, dtype: Any = np.int16) -> dict[str, Tensor]:
    """A matrix as LyCORIS' extraction stores it: 16-bit indices and size, float16 values."""
    places = np.nonzero(matrix)
    values = matrix[places].astype(np.float16)
    size = np.array(matrix.shape).astype(np.uint16).view(dtype)
    return {
        "indices": Tensor.of(np.array(places).astype(np.uint16).view(dtype)),
        "values": Tensor.of(values),
        "size": Tensor.of(size),
    }


def test_a_sparse_residual_is_its_entries() -> None:
    """Section 1.1, `bias_indices`; the kernel is flattened."""
    matrix = np.where(base(12, 30) > 1, base(12, 30), 0).astype(np.float16).astype(np.float64)
    update = Sparse(**coordinates(matrix), scaling=0.5)
    close(update.delta(), 0.5 * matrix)
    sized = update.sized((12, 5, 3, 2))
    assert isinstance(sized, Sparse)
    close(sized.delta(3, 7), 0.5 * matrix.reshape(12, 5, 3, 2)[3:7])
    assert update.sized((12, 5, 3)) is None


@pytest.mark.parametrize("shape", [(40000, 2), (2, 40000)])
def test_indices_beyond_32767_are_not_negative(shape: tuple[int, int]) -> None:
    """Section 1.1: int16 indices wrap, and so does the size."""
    matrix = np.zeros(shape)
    matrix[-1, -1], matrix[0, 1] = 2.0, 1.0
    update = Sparse(**coordinates(matrix))
    assert int(update.indices.array().min()) < 0
    assert update.shape == shape
    close(update.delta(), matrix, 0)


def test_a_residual_beside_a_convolution_takes_its_shape() -> None:
    """As LyCORIS' extraction writes them: factors of four axes, a residual of two."""
    conv, flat = samples.low(12, 5, 3, 3, 2), np.where(base(12, 30) > 1, 2.0, 0.0)
    whole = conv + Sparse(**coordinates(flat))
    assert whole.shape == (12, 5, 3, 2)
    close(whole.delta(), conv.delta() + flat.reshape(12, 5, 3, 2))
    both = Sum((loha(12, 30), Sparse(**coordinates(flat)))).sized((12, 5, 3, 2))
    assert both is not None
    close(both.delta(), (loha(12, 30).delta() + flat).reshape(12, 5, 3, 2))
    assert both.sized((12, 5, 3, 3)) is None
    with pytest.raises(MatchError, match="differ in shape"):
        conv + Sparse(**coordinates(flat[:, :29]))


def test_entries_that_occur_twice_are_summed() -> None:
    twice = Sparse(Tensor.of(np.array([[1, 1], [2, 2]])), Tensor.of(np.float32([1, 2])), Tensor.of(np.array([2, 3])))
    close(twice.delta(), [[0, 0, 0], [0, 0, 3]], 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": Tensor.of(np.array([2, 2]))}, "outside"),
        ({"size": Tensor.of(np.array([0, 0]))}, "outside"),
        ({"size": Tensor.of(np.float32([2, 3]))}, "stored as F32"),
        ({"indices": Tensor.of(np.array([[-1], [2]], np.int64))}, "outside"),
        ({"indices": Tensor.of(np.array([[0], [-1]], np.int64))}, "outside"),
        ({"indices": Tensor.of(np.array([1, 2]))}, "no sparse matrix"),
    ],
)
def test_indices_that_are_none_are_refused(changes: dict[str, Tensor], says: str) -> None:
    sound = Sparse(Tensor.of(np.array([[1], [2]])), Tensor.of(np.float32([1])), Tensor.of(np.array([2, 3])))
    with pytest.raises(FormatError, match=says):
        replace(sound, **changes)


# -- fused projections ---------------------------------------------------------------------------------------

SPLITS = {  # where rows that belong together stay so
    "oft_of_segments": (0, 6, 14),
    "oft_transposed": (0, 3, 5),
    "oft": (0, 4, 12),
    "lokr": (0, 4, 12),
    "peft_oft_transposed": (0, 4, 8),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_rows_of_a_fused_projection_are_put_together_again(name: str) -> None:
    """Section 10: what is split when it is read is written as it was, at the same rank."""
    update = LYCORIS[name]
    edges = next((e for start, e in SPLITS.items() if name.startswith(start)), (0, 3, update.shape[0]))
    spans = list(pairwise(edges)) if name != "boft" else [(0, 12)]
    if name == "dora_of_lokr_by_input":
        with pytest.raises(FormatError, match="cannot be split"):
            rows(update, *spans[0])
        return
    w = base(*update.shape)
    parts = [rows(update, *span) for span in spans]
    for part, (start, stop) in zip(parts, spans, strict=True):
        assert part.shape == (stop - start, *update.shape[1:])
        close(part.apply(w[start:stop]), update.apply(w)[start:stop])
    whole = stack(parts, [stop - start for start, stop in spans])
    assert type(whole) is type(update)
    assert (whole.rank, whole.shape) == (update.rank, update.shape)
    close(whole.apply(w), update.apply(w))


STILL = {"loha": 5, "loha_tucker": 5, "lokr": 8, "lokr_both_factorised": 4, "ia3": 5, "oft_direct": 4}


@pytest.mark.parametrize("name", [*STILL, "oft_of_segments"])
def test_rows_that_nothing_changes_are_of_the_same_kind(name: str) -> None:
    """Section 10: of a fused projection whose query alone was trained, the rest is zero, and no full matrix."""
    update, height = LYCORIS[name], STILL.get(name, 6)
    whole = stack([None, update], [height, update.shape[0]])
    assert type(whole) is type(update)
    assert whole.rank == update.rank
    w = base(height + update.shape[0], *update.shape[1:])
    fitted = whole.sized(w.shape)
    assert fitted is not None
    close(fitted.apply(w), np.concatenate([w[:height], update.apply(w[height:])]))


def test_segments_of_several_constraints_are_no_one_oft() -> None:
    one, other = OFT(normal(2, 3, 3), alpha=0.1), OFT(normal(2, 4, 4), alpha=0.1)
    both = stack([one, other], [6, 8])
    assert isinstance(both, SegmentOFT)
    w = base(14, 5)
    close(both.apply(w), np.concatenate([one.apply(w[:6]), other.apply(w[6:])]))
    free = stack([replace(one, alpha=None), OFT(normal(1, 3, 3))], [6, 3])
    assert isinstance(free, OFT)
    assert stack([one, replace(other, alpha=0.2)], [6, 8]) is None
    assert stack([one, OFT(normal(2, 4, 4), normal(8), alpha=0.1)], [6, 8]) is None
    assert stack([one, IA3(normal(8))], [6, 8]) is None
    assert isinstance(stack([one, None], [6, 9]), SegmentOFT)  # the constraint goes by the outputs of each
    assert stack([one, None], [6, 8]) is None  # no blocks of 3 in 8 rows
    assert stack([LYCORIS["oft"], None], [12, 4]) is None  # segments have no rescale
    assert stack([LYCORIS["glora"], None], [7, 7]) is None  # it mixes the inputs of all rows
    assert stack([LYCORIS["ia3_on_input"], None], [7, 7]) is None


def test_lohas_that_were_never_one_are_stacked_as_loras() -> None:
    """Block-diagonally, exactly."""
    parts = [loha(12, 30), loha(6, 30, seed=9)]
    whole = stack(parts, [12, 6])
    assert isinstance(whole, Additive)
    close(whole.delta(), np.concatenate([part.delta() for part in parts]))


# -- merges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_a_merge_by_small_blocks(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind at once, half of what it does, in blocks that cross those of the rotations."""
    monkeypatch.setattr("loratool.tensors.BLOCK", 25)
    monkeypatch.setattr("loratool.kinds.halves.BLOCK", 25)
    monkeypatch.setattr("loratool.kinds.rotation.BLOCK", 25)
    leaf = {name: f"h.{n}.{'mlp.c_fc' if 'transposed' in name else 'proj'}" for n, name in enumerate(LYCORIS)}
    weights = {name: normal(*update.shape, seed=60) for name, update in LYCORIS.items()}
    stored = {f"{leaf[name]}.weight": weight for name, weight in weights.items()}
    folder = samples.model(tmp_path / "base", stored, {"model_type": "gpt2"})
    lora = samples.lora_file(tmp_path / "x", {leaf[name]: update for name, update in LYCORIS.items()})
    loratool.merge(folder, lora, strengths=[0.5], out=tmp_path / "out", device=device)
    found = read_safetensors(tmp_path / "out" / "model.safetensors").tensors
    for name, update in LYCORIS.items():
        close(found[f"{leaf[name]}.weight"].array(), update.apply(wide(weights[name]), 0.5))
    assert loratool.verify(folder, lora, merged=tmp_path / "out", strengths=[0.5]).ok


@pytest.mark.parametrize("name", ["hra", "miss_bat", "road", "peft_glora", "osf", "peanut", "frod"])
def test_a_kind_that_needs_rows_of_outputs_says_so_of_a_conv1d(name: str, tmp_path: Path) -> None:
    update = samples.tuners()[name]
    shape = update.shape[::-1]
    folder = samples.model(tmp_path / "base", {"h.0.mlp.c_fc.weight": normal(*shape)}, {"model_type": "gpt2"})
    lora = samples.lora_file(tmp_path / "x", {"h.0.mlp.c_fc": update})
    with pytest.raises(MatchError, match=rf"{update.kind} is worked out by rows of outputs.*Conv1D") as caught:
        loratool.merge(folder, lora, out=tmp_path / "out")
    assert str(list(shape)) in str(caught.value) and "PEFT" in caught.value.hint


def test_the_rows_that_a_rotation_reaches_for_count_as_memory() -> None:
    def peak(update: Update) -> int:
        part = Part(update, 1.0, 0, 4096, "m")
        step = Step("m", "m", Tensor("F32", (4096, 4096), lambda start, stop: np.zeros((0,))), "F32", (part,))
        return Plan((OutputFile("f", (step,), {}),)).peak_memory(1)

    few, many = (Tensor.of(np.zeros((4096 // b, b, b), np.float32)) for b in (2, 1024))
    assert peak(OFT(many)) - peak(OFT(few)) > 1024 * 4096 * 4 * 5
    assert peak(PeftOFT(Tensor.of(np.zeros((4, 1024 * 1023 // 2), np.float32)))) < peak(OFT(many))


# -- weights that grow ---------------------------------------------------------------------------------------


def control(i: int = 8, seed: int = 0) -> Padded:
    return Padded(samples.low(7, i, 3, seed=seed))


def merged(folder: Path, out: Path, *updates: Update, strengths: Any = None) -> Any:
    files = [samples.lora_file(out.with_suffix(f".{n}"), {"img_in": update}) for n, update in enumerate(updates)]
    loratool.merge(folder, *files, strengths=strengths, out=out, undo=out.with_suffix(".undo"))
    return read_safetensors(out / "model.safetensors").tensors["img_in.weight"].array()


def test_a_weight_is_padded_with_zeros_before_it_changes(tmp_path: Path) -> None:
    """Section 1.1, `reshape_weight`; a base that has grown already is changed as it is."""
    update, narrow, tall = control(), normal(7, 5, seed=60), normal(7, 8, seed=61)
    folder = samples.model(tmp_path / "base", {"img_in.weight": narrow, "other": normal(3)})
    found = merged(folder, tmp_path / "out", update, control(seed=3), strengths=[0.5, -2.0])
    expected = np.pad(wide(narrow), [(0, 0), (0, 3)]) + 0.5 * update.delta() - 2.0 * control(seed=3).delta()
    close(found, expected)
    loratool.unmerge(tmp_path / "out", tmp_path / "back", undo=tmp_path / "out.undo")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    close(merged(folder, tmp_path / "still", update, strengths=[0.0]), narrow.array(), 0)
    grown = samples.model(tmp_path / "grown", {"img_in.weight": tall})
    close(merged(grown, tmp_path / "out2", update), wide(tall) + update.delta())


def test_a_weight_grows_for_one_adapter_only(tmp_path: Path) -> None:
    folder = samples.model(tmp_path / "base", {"img_in.weight": normal(7, 5, seed=60)})
    pairs = (control(), samples.low(7, 5)), (samples.low(7, 5), control()), (control(), control(9))
    for n, pair in enumerate(pairs):
        with pytest.raises(MatchError, match="grow"):
            merged(folder, tmp_path / f"out{n}", *pair)
    with pytest.raises(MatchError, match="shapes differ"):
        merged(folder, tmp_path / "out", control(4))
    with pytest.raises(FormatError, match="grows no weight"):
        Padded(Dense(normal(7)))


def test_a_padded_update_is_the_lora_within() -> None:
    update = control()
    low = update.low_rank()
    assert low is not None
    close(low.delta(), update.delta(), 0)
    close(update.scaled(3.0).delta(), 3 * update.delta())
    assert (update.kind, update.rank, update.alpha, update.scaling) == ("lora", 3, 6.0, 2.0)


def test_a_flux_takes_a_control_lora(tmp_path: Path) -> None:
    """Section 7.6: twice the channels, as diffusers expands the layer; the merged folder loads."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    plain = FluxTransformer2DModel(
        in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), **sizes
    )
    plain.save_pretrained(tmp_path / "flux")
    update = samples.low(32, 8, 3)
    lora = samples.lora_file(tmp_path / "x", {"transformer.x_embedder": update})
    report = loratool.merge(tmp_path / "flux", lora, out=tmp_path / "out")
    assert any("8 channels instead of 4" in warning for warning in report.warnings)
    tuned = FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    assert (tuned.config.in_channels, tuned.out_channels) == (8, 4)
    before = plain.x_embedder.weight.detach().numpy()
    close(tuned.x_embedder.weight.detach(), np.pad(before, [(0, 0), (0, 4)]) + update.delta())
    assert loratool.verify(tmp_path / "flux", lora, merged=tmp_path / "out").ok
    other = samples.lora_file(tmp_path / "y", {"transformer.context_embedder": samples.low(32, 16, 3)})
    with pytest.raises(MatchError, match="shapes differ"):
        loratool.merge(tmp_path / "flux", other, out=tmp_path / "no")


# -- laws over every shape -----------------------------------------------------------------------------------

sizes = st.integers(1, 6)
kernels = st.lists(st.integers(1, 3), max_size=3)
dtypes = st.sampled_from(("F32", "F64", "BF16", "F16"))


@st.composite
def halves(draw: st.DrawFn, h: int, w: int, kernel: tuple[int, ...], name: str) -> dict[str, Tensor]:
    """One half of a LoHa or LoKr [h,w,*k], stored in any of the ways there are."""
    way = draw(st.sampled_from(("whole", "pair", "unfolded", "core")))
    r, dtype = draw(sizes), draw(dtypes)
    if way == "core" and name != "w1":
        core = f"t{name[1]}"
        return {
            f"{name}_a": normal(r, h, dtype=dtype),
            f"{name}_b": normal(r, w, seed=1),
            core: normal(r, r, *kernel, seed=2),
        }
    if way == "whole":
        return {name: normal(h, w, *kernel, dtype=dtype)}
    inner = (w, *kernel) if way == "unfolded" else (w * math.prod(kernel),)
    return {f"{name}_a": normal(h, r, dtype=dtype), f"{name}_b": normal(r, *inner, seed=1)}


def assert_additive_laws(update: LoHa | LoKr, expected: np.ndarray, data: st.DataObject) -> None:
    """delta, scaled, row blocks, rows and the exact LoRA all say what the formula says."""
    o = update.shape[0]
    start = data.draw(st.integers(0, o - 1))
    stop = data.draw(st.integers(start + 1, o))
    close(update.delta(), expected)
    close(update.scaled(-0.5).delta(), -0.5 * expected)
    close(update.delta(start, stop), expected[start:stop])
    part, low = rows(update, start, stop), update.low_rank()
    assert isinstance(part, Additive)
    close(part.delta(), expected[start:stop])
    if low is not None:
        close(low.delta(), expected)
        close(low.down.float(low.rank - 1), low.down.float()[-1:], 0)
        assert low.rank < min(o, math.prod(update.shape[1:]))


@examples(60)
@given(st.data(), sizes, sizes, sizes, sizes, kernels, st.none() | st.floats(-9, 9))
def test_lokr_laws(data: st.DataObject, a: int, b: int, c: int, d: int, k: list[int], alpha: float | None) -> None:
    """Section 3.4, every stored variant."""
    kernel = tuple(k)
    slots = {**data.draw(halves(a, c, (), "w1")), **data.draw(halves(b, d, kernel, "w2"))}
    update = LoKr(**slots, alpha=alpha).sized((a * b, c * d, *kernel))
    assert isinstance(update, LoKr)
    whole = {"w1", "w2"} <= slots.keys()
    scaling = 1.0 if whole or alpha is None else alpha / (slots.get("w2_b") or slots["w1_b"]).shape[0]
    assert_additive_laws(update, scaling * lokr_reference(update), data)


@examples(60)
@given(st.data(), sizes, sizes, sizes, kernels, st.booleans(), st.none() | st.floats(-9, 9), dtypes)
def test_loha_laws(
    data: st.DataObject, o: int, i: int, r: int, k: list[int], core: bool, alpha: float | None, dtype: str
) -> None:
    """Section 3.3, flattened and around cores."""
    kernel = tuple(k)
    flat = replace(loha(o, i * math.prod(kernel), r), w2_a=normal(o, r, dtype=dtype))
    made = tucker_loha(o, i, r, *kernel) if core and kernel else flat
    update = replace(made, alpha=alpha).sized((o, i, *kernel))
    assert isinstance(update, LoHa)
    if made.t1 is None or made.t2 is None:
        one, other = wide(update.w1_a) @ wide(update.w1_b), wide(update.w2_a) @ wide(update.w2_b)
    else:
        pairs = ((update.w1_a, update.w1_b, made.t1), (update.w2_a, update.w2_b, made.t2))
        one, other = (np.einsum("ij...,ip,jr->pr...", wide(t), wide(x), wide(y)) for x, y, t in pairs)
    scaling = 1.0 if alpha is None else alpha / r
    assert_additive_laws(update, (scaling * one * other).reshape(update.shape), data)


# -- hostile tensors -----------------------------------------------------------------------------------------

KINDS: tuple[Any, ...] = (LoHa, LoKr, IA3, GLoRA, OFT, BOFT, PeftOFT, PeftOldOFT, PeftBOFT, Sparse, DoRA, Padded)


@st.composite
def anything(draw: st.DrawFn, hint: Any) -> Any:
    """A value of a field's type, sound or not: tensors of any small shape, integers among them."""
    shape = st.lists(st.integers(0, 4), max_size=4)
    if hint is Tensor:
        integers = draw(st.booleans())
        values = np.array(draw(st.integers(-2, 3))) if integers else normal(*draw(shape)).array()
        return Tensor.of(np.broadcast_to(values, draw(shape)).copy() if integers else values)
    inner = get_args(hint)
    if inner and get_origin(hint) is not tuple and get_origin(hint) is not Literal:
        return draw(anything(draw(st.sampled_from(inner))))
    known = {
        int: st.integers(-1, 4),
        float: st.sampled_from((0.0, -1.0, 2.0)),
        bool: st.booleans(),
        type(None): st.none(),
        Additive: st.sampled_from((loha(), lokr(), samples.low(4, 4), Dense(normal(4)))),
    }
    if hint in known:
        return draw(known[hint])
    return draw(st.sampled_from(inner)) if get_origin(hint) is Literal else tuple(draw(shape))


@examples(200)
@given(st.data())
def test_whatever_the_tensors_a_kind_refuses_or_works(data: st.DataObject) -> None:
    """Nothing but an error that says what is wrong; what is accepted can be applied to a weight of its shape."""
    kind = data.draw(st.sampled_from(KINDS))
    hints = {k: h for k, h in get_type_hints(kind).items() if k in {field.name for field in fields(kind)}}
    try:
        update = kind(**{name: data.draw(anything(hint), name) for name, hint in hints.items()})
        shape = tuple(n or data.draw(st.integers(1, 4)) for n in update.shape)
        fitted = update.sized(shape)
        if fitted is not None:
            with np.errstate(all="ignore"):
                assert fitted.apply(base(*shape)).shape == shape
    except (FormatError, NumericError):
        pass


def test_a_t_lora_is_refused_by_name(tmp_path: Path) -> None:
    """LyCORIS subtracts the factors that it began with, and does not save them."""
    slots = {"q_layer.weight": normal(2, 5), "p_layer.weight": normal(7, 2), "lambda_layer": normal(1, 2)}
    write_safetensors(tmp_path / "x.safetensors", {f"lora_unet_x.{name}": t for name, t in slots.items()}, {})
    with pytest.raises(FormatError, match="T-LoRA"):
        loratool.read(tmp_path / "x.safetensors")
