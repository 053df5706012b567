"""Every kind of update in the files of image models: as LyCORIS saves it, read, applied, and written in each format.

The oracle is LyCORIS' own forward pass or merge. Numbers in brackets are those of the list of known traps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratool import api
from loratool.adapter import Adapter
from loratool.errors import FormatError, LoratoolError
from loratool.formats import by_name, detect
from loratool.formats.base import Evidence
from loratool.formats.dialects import READ
from tests import diffusion
from tests.diffusion import save

torch = pytest.importorskip("torch")
pytest.importorskip("lycoris")

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "unet.mid_block.resnets.0.conv1"
POINT = "unet.mid_block.attentions.0.proj_in"
NORM = "unet.mid_block.attentions.0.norm"
PREFIXES = {  # where LyCORIS' slots are seen: format, and how a module is spelled
    "kohya": lambda name: "lora_unet_" + name.removeprefix("unet.").replace(".", "_"),
    "lycoris": lambda name: "lycoris_" + name.removeprefix("unet.").replace(".", "_"),
    "": lambda name: name,  # mixed: LyCORIS' slots behind a component
}


@cache
def layer(name: str) -> Any:
    torch.manual_seed(1)
    made = {
        LINEAR: lambda: torch.nn.Linear(12, 8),
        CONV: lambda: torch.nn.Conv2d(6, 8, 3, padding=1),
        POINT: lambda: torch.nn.Conv2d(6, 8, 1),
        NORM: lambda: torch.nn.GroupNorm(2, 8),
    }
    return made[name]()


def module(kind: str, name: str, dim: int = 2, alpha: float = 3.0, **options: Any) -> Any:
    """A module of LyCORIS with random parameters."""
    from lycoris.wrapper import network_module_dict

    base = layer(name)
    torch.manual_seed(2)
    found = network_module_dict[kind]("x", base, 1.0, dim, alpha, **options)
    for key, parameter in found.named_parameters():
        if "dora_scale" in key or key == "scalar":
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    if kind == "full":  # once it runs, it holds the changed weight itself
        found.weight.data += base.weight.data
        found.bias.data += base.bias.data
        found.is_diff = False
    return found


def norm() -> Any:
    from lycoris.modules.norms import NormModule

    base = layer(NORM)
    torch.manual_seed(2)
    found = NormModule("x", base)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return found


MODULES: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora": (LINEAR, lambda: module("locon", LINEAR)),
    "lora, rank-stabilised [3]": (LINEAR, lambda: module("locon", LINEAR, rs_lora=True)),
    "lora with a trained scalar": (LINEAR, lambda: module("locon", LINEAR, use_scalar=True)),
    "locon": (CONV, lambda: module("locon", CONV)),
    "locon, Tucker": (CONV, lambda: module("locon", CONV, use_tucker=True)),
    "locon, pointwise": (POINT, lambda: module("locon", POINT)),
    "dora by output": (LINEAR, lambda: module("locon", LINEAR, weight_decompose=True)),
    "dora by input": (LINEAR, lambda: module("locon", LINEAR, weight_decompose=True, wd_on_out=False)),
    "dora of a convolution by output": (CONV, lambda: module("locon", CONV, weight_decompose=True)),
    "dora of a convolution by input": (CONV, lambda: module("locon", CONV, weight_decompose=True, wd_on_out=False)),
    "loha [2]": (LINEAR, lambda: module("loha", LINEAR)),
    "loha of a convolution": (CONV, lambda: module("loha", CONV)),
    "loha, Tucker [25]": (CONV, lambda: module("loha", CONV, use_tucker=True)),
    "loha, rank-stabilised [3]": (LINEAR, lambda: module("loha", LINEAR, rs_lora=True)),
    "dora of a loha": (LINEAR, lambda: module("loha", LINEAR, weight_decompose=True)),
    "lokr": (LINEAR, lambda: module("lokr", LINEAR, 1)),
    "lokr, both factorised": (LINEAR, lambda: module("lokr", LINEAR, 1, decompose_both=True, factor=4)),
    "lokr, both whole [1]": (LINEAR, lambda: module("lokr", LINEAR, 10000, 10000.0)),
    "lokr of a convolution": (CONV, lambda: module("lokr", CONV, 1)),
    "lokr, Tucker [25]": (CONV, lambda: module("lokr", CONV, 1, use_tucker=True)),
    "full": (CONV, lambda: module("full", CONV)),
    "ia3 of outputs": (LINEAR, lambda: module("ia3", LINEAR)),
    "ia3 of inputs": (LINEAR, lambda: module("ia3", LINEAR, train_on_input=True)),
    "ia3 of a convolution": (CONV, lambda: module("ia3", CONV, train_on_input=True)),
    "glora": (LINEAR, lambda: module("glora", LINEAR)),
    "glora of a convolution": (CONV, lambda: module("glora", CONV)),
    "diag-oft": (LINEAR, lambda: module("diag-oft", LINEAR, 4)),
    "diag-oft, constrained [45]": (LINEAR, lambda: module("diag-oft", LINEAR, 4, constraint=0.01)),
    "diag-oft, rescaled": (CONV, lambda: module("diag-oft", CONV, 4, rescaled=True)),
    "boft [46]": (LINEAR, lambda: module("boft", LINEAR, 2)),
    "boft of a convolution": (CONV, lambda: module("boft", CONV, 2)),
    "norm": (NORM, norm),
}


def tensors(name: str, spelled: str) -> dict[str, Any]:
    """What LyCORIS saves of a module under a name."""
    made = MODULES[name][1]()
    state = made.custom_state_dict() or made.state_dict()
    return {f"{spelled}.{key}": value.detach().clone() for key, value in state.items()}


@cache
def expected(name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The weight and the bias of the layer as LyCORIS runs or merges it, in float64."""
    target, make = MODULES[name]
    weight, bias = layer(target).weight.detach(), layer(target).bias.detach()
    made = make()
    if name.startswith(("norm", "full", "diag-oft", "boft", "glora")):
        merged, merged_bias = made.get_merged_weight()
        return merged.detach().numpy(), None if merged_bias is None else merged_bias.detach().numpy()
    made.apply_to()
    try:
        probe = torch.eye(weight[0].numel()).reshape(-1, *weight.shape[1:])  # each input, each place of the kernel
        if weight.dim() == 4:
            output = torch.nn.functional.conv2d(probe, weight) * 0 + _run(made, probe, weight)
        else:
            output = made(probe)
        return (output.flatten(1) - bias).T.reshape(weight.shape).detach().numpy(), None
    finally:
        layer(target).forward = made.org_forward


def _run(made: Any, probe: Any, weight: Any) -> Any:
    """The layer run without padding: one value for each kernel-sized input."""
    padding, made.kw_dict["padding"] = made.kw_dict.get("padding"), (0, 0)
    own, layer(CONV).padding = layer(CONV).padding, (0, 0)
    try:
        return made(probe)
    finally:
        made.kw_dict["padding"], layer(CONV).padding = padding, own


def read(path: Path, format: str | None = None, **options: Any) -> Adapter:
    evidence = Evidence(path, **options)
    if format:
        assert detect(evidence)[0].name == format
    return detect(evidence)[0].read(evidence)


def assert_weights(adapter: Adapter, name: str) -> None:
    """The adapter makes the weight and the bias that LyCORIS makes."""
    target = MODULES[name][0]
    weight, bias = expected(name)
    update = adapter.updates[target].sized(weight.shape)
    assert update is not None
    base = layer(target).weight.detach().numpy()
    np.testing.assert_allclose(update.apply(base), weight, rtol=0, atol=2e-6)
    changed = bias is not None and not np.array_equal(bias, layer(target).bias.detach())
    assert (f"{target}.bias" in adapter.updates) == changed
    if changed:
        own = adapter.updates[f"{target}.bias"].apply(layer(target).bias.detach().numpy())
        np.testing.assert_allclose(own, bias, rtol=0, atol=2e-6)


@pytest.mark.parametrize("format", PREFIXES)
@pytest.mark.parametrize("name", MODULES)
def test_what_lycoris_saves_is_read_as_it_runs(name: str, format: str, tmp_path: Path) -> None:
    spelled = PREFIXES[format](MODULES[name][0])
    path = save(tmp_path / "file", tensors(name, spelled))
    adapter = read(path, format)
    assert_weights(adapter, name)
    assert adapter.spelling(MODULES[name][0]) == spelled


# -- writing each kind in each format --------------------------------------------------------------------------------


LOST: dict[str, tuple[str, ...]] = {  # format -> the samples that it cannot say
    "kohya": (),
    "lycoris": (),
    "raw": (),
    "comfyui": ("ia3", "diag-oft, constrained", "diag-oft, rescaled"),
    "diffusers": ("lokr, both whole", "full", "ia3", "glora", "diag-oft", "boft", "norm", "dora by input", "by input"),
}


def is_lost(name: str, format: str) -> bool:
    return any(name.startswith(beginning) or name.endswith(beginning) for beginning in LOST[format])


@pytest.mark.parametrize("format", LOST)
@pytest.mark.parametrize("name", MODULES)
def test_every_kind_in_every_format_keeps_the_weights_or_is_named(name: str, format: str, tmp_path: Path) -> None:
    target = MODULES[name][0]
    spelled = PREFIXES["kohya"](target)
    source = read(save(tmp_path / "file", tensors(name, spelled)), "kohya", modules=(target,))
    sized = {n: u.sized(layer(target).weight.shape) or u for n, u in source.updates.items()}
    source = Adapter(sized, source.carried, source.metadata, source.spellings)
    losses = api.write(source, tmp_path / "out", format=format, allow_loss=True)
    assert bool(losses) == is_lost(name, format), losses
    assert all(loss.name.startswith(spelled) for loss in losses)
    if not losses:
        assert_weights(read(tmp_path / "out"), name)


@pytest.mark.parametrize("name", MODULES)
def test_what_kohya_s_own_files_hold_is_written_byte_for_byte(name: str, tmp_path: Path) -> None:
    """But for the dtype of alpha, which is float32."""
    spelled = PREFIXES["kohya"](MODULES[name][0])
    own = tensors(name, spelled)
    api.write(read(save(tmp_path / "file", own)), tmp_path / "out", format="kohya")
    written = diffusion.load(tmp_path / "out")
    assert written.keys() == own.keys()
    for key, tensor in own.items():
        same = tensor.float() if key.endswith(".alpha") else tensor
        assert torch.equal(written[key], same), key
        assert written[key].dtype == same.dtype, key


# -- hostile files ---------------------------------------------------------------------------------------------------


SHAPES = [(), (2, 6), (0, 6), (2, 3, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_no_tensor_under_any_suffix_is_more_than_a_clean_error(
    shape: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    """Alone, and in the place of that tensor in a sound module."""
    odd = torch.ones(shape).to(getattr(torch, dtype))
    pair = {f"{SPELLED}.lora_down.weight": torch.ones(2, 12), f"{SPELLED}.lora_up.weight": torch.ones(8, 2)}
    refused = 0
    for _, suffix in READ.aliases:
        for held in ({}, pair):
            path = save(tmp_path / "file", {**held, f"{SPELLED}{suffix}": odd})
            try:
                adapter = by_name("kohya").read(Evidence(path))
                assert all(math.isfinite(update.scaling) for update in adapter.updates.values())
            except LoratoolError as error:
                refused += 1
                assert error.where
    assert refused > len(READ.aliases)


def test_small_factors_that_claim_a_huge_weight_are_not_multiplied_out(tmp_path: Path) -> None:
    """Files of a few kilobytes could keep a writer busy for years."""
    wide = {"lokr_w1": (500, 500), "lokr_w2_a": (500, 400), "lokr_w2_b": (400, 500)}
    held = {f"{SPELLED}.{slot}": torch.ones(shape) for slot, shape in wide.items()}
    adapter = by_name("kohya").read(Evidence(save(tmp_path / "file", held)))
    assert adapter.updates[LINEAR].shape == (250_000, 250_000)
    assert [loss.name for loss in by_name("diffusers").losses(adapter)] == [SPELLED]
    assert not by_name("kohya").losses(adapter)
    lora = {"lora_down.weight": (2, 250_000), "lora_up.weight": (250_000, 2)}
    held |= {f"{SPELLED}.{slot}": torch.ones(shape) for slot, shape in lora.items()}
    both = by_name("kohya").read(Evidence(save(tmp_path / "both", held)))
    reasons = [loss.reason for loss in by_name("kohya").losses(both)]
    assert "larger than any weight" in reasons[0]


# -- single stored forms ---------------------------------------------------------------------------------------------


SPELLED = PREFIXES["kohya"](LINEAR)
WEIGHT = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32))


def applied(tmp_path: Path, slots: dict[str, Any], metadata: dict[str, str] | None = None) -> np.ndarray:
    """W' - W for these slots of one Linear module."""
    path = save(tmp_path / "file", {f"{SPELLED}.{slot}": tensor for slot, tensor in slots.items()}, metadata)
    update = read(path, "kohya").updates[LINEAR].sized((8, 12))
    assert update is not None
    return update.apply(WEIGHT.astype(np.float64)) - WEIGHT


def test_the_alpha_of_a_rank_stabilised_glora_is_raw_3(tmp_path: Path) -> None:
    slots = {f"{leaf}.weight": normal(*shape) for leaf, shape in GLORA.items()} | {"alpha": torch.tensor(3.0)}
    plain = applied(tmp_path, slots)
    told = applied(tmp_path, slots, {"ss_network_args": '{"rs_lora": "True"}'})
    np.testing.assert_allclose(told, plain * math.sqrt(2), rtol=1e-5)


GLORA = {"a1": (12, 2), "a2": (2, 12), "b1": (8, 2), "b2": (2, 12)}


def test_the_old_layout_of_glora(tmp_path: Path) -> None:
    new = {leaf: normal(*shape) for leaf, shape in GLORA.items()}
    old = {"a1": new["a2"], "a2": new["a1"], "b1": new["b2"], "b2": new["b1"]}
    one, other = (applied(tmp_path, {f"{k}.weight": t for k, t in slots.items()}) for slots in (new, old))
    np.testing.assert_array_equal(one, other)


def test_a_scale_stands_in_the_place_of_alpha_and_rank(tmp_path: Path) -> None:
    """Section 1.1: of AUTOMATIC1111."""
    down, up = normal(2, 12), normal(8, 2)
    slots = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(7.0), "scale": torch.tensor(0.25)}
    np.testing.assert_allclose(applied(tmp_path, slots), 0.25 * (up @ down).numpy(), atol=1e-5)


def test_single_entries_beside_a_lora(tmp_path: Path) -> None:
    """As LyCORIS extracts them; ComfyUI does not read them, so it gets the whole delta."""
    down, up = normal(2, 12), normal(8, 2)
    residual = torch.zeros(8, 12)
    residual[3, 5], residual[7, 11] = 2.0, -1.0
    entries = residual.to_sparse().coalesce()
    slots = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor([2.0])}
    slots |= {"bias_indices": entries.indices().to(torch.int16), "bias_values": entries.values()}
    slots["bias_size"] = torch.tensor((8, 12)).to(torch.int16)
    expected = (up @ down + residual).numpy()
    np.testing.assert_allclose(applied(tmp_path, slots), expected, atol=1e-5)
    api.convert(tmp_path / "file", tmp_path / "again", to="kohya")
    assert diffusion.load(tmp_path / "again").keys() == diffusion.load(tmp_path / "file").keys()
    api.convert(tmp_path / "file", tmp_path / "comfyui", to="comfyui")
    assert list(diffusion.load(tmp_path / "comfyui")) == [f"{SPELLED}.diff"]
    with pytest.raises(FormatError, match="belong together"):
        applied(tmp_path, {key: tensor for key, tensor in slots.items() if key != "bias_size"})


@pytest.mark.parametrize(("marker", "by"), [(None, 1.0), (True, 2 * 3**0.5), (1, 6**0.5)])
def test_the_oft_of_onetrainer_rotates_inputs(marker: Any, by: float, tmp_path: Path) -> None:
    """Section 7.9: R = 1 + 2Q + 2Q^2 + 2Q^3 + Q^4 of blocks of 4, each given by its upper triangle."""
    triangles = 0.1 * normal(3, 6)
    slots = {"oft_R.weight": triangles} | ({} if marker is None else {"oft_R.scaled_oft": torch.tensor(marker)})
    q = torch.zeros(3, 4, 4, dtype=torch.float64)
    rows, columns = torch.triu_indices(4, 4, 1)
    q[:, rows, columns] = triangles.double() / by
    q = q - q.transpose(1, 2)
    turn = torch.eye(4) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    expected = np.einsum("onk,nlk->onl", WEIGHT.reshape(8, 3, 4), turn.numpy()).reshape(8, 12)
    np.testing.assert_allclose(applied(tmp_path, slots), expected - WEIGHT, atol=1e-5)


def test_an_old_oft_holds_the_rotation_itself(tmp_path: Path) -> None:
    turn = torch.linalg.qr(normal(2, 4, 4))[0]
    expected = np.einsum("nkm,nki->nmi", turn.numpy(), WEIGHT.reshape(2, 4, 12)).reshape(8, 12)
    np.testing.assert_allclose(applied(tmp_path, {"oft_diag": turn}), expected - WEIGHT, atol=1e-5)


def test_ia3_of_peft_is_around_one_and_that_of_lycoris_around_zero_44(tmp_path: Path) -> None:
    vector = normal(8)
    ours = applied(tmp_path, {"weight": vector, "on_input": torch.tensor(0)})
    np.testing.assert_allclose(ours, WEIGHT * vector.numpy()[:, None], atol=1e-6)
    theirs = applied(tmp_path, {"ia3_l": 1 + vector.reshape(8, 1)})
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_a_value_that_replaces_the_base_s(tmp_path: Path) -> None:
    value = normal(8, 12)
    np.testing.assert_allclose(applied(tmp_path, {"set_weight": value}), value.numpy() - WEIGHT, atol=1e-6)
    losses = api.write(read(tmp_path / "file"), tmp_path / "out", format="kohya", allow_loss=True)
    assert [loss.name for loss in losses] == [SPELLED]


def test_two_kinds_on_one_module_are_summed_55(tmp_path: Path) -> None:
    """Readers take the last one; here nothing is left out."""
    lora, whole = tensors("lora", SPELLED), {f"{SPELLED}.diff": normal(8, 12)}
    lokr = {key: t for key, t in tensors("lokr, both whole [1]", SPELLED).items() if not key.endswith(".alpha")}
    deltas = []
    for n, held in enumerate((lora, whole, lokr, lora | whole | lokr)):
        update: Any = read(save(tmp_path / f"{n}", held)).updates[LINEAR]
        deltas.append(update.delta())
    np.testing.assert_allclose(deltas[3], sum(deltas[:3]), atol=1e-5)


@pytest.mark.parametrize("slots", [{"oft_blocks": (2, 4, 4)}, {"weight": (8,), "on_input": ()}])
def test_kinds_that_do_not_add_up_are_refused_49(slots: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    held = {f"{SPELLED}.{slot}": torch.ones(shape) for slot, shape in slots.items()} | tensors("lora", SPELLED)
    with pytest.raises(FormatError, match="cannot be added"):
        read(save(tmp_path / "file", held))
