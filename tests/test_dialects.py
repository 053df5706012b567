"""Dialects of image models that are only read; numbers in brackets are those of the list of known traps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratool import api
from loratool.adapter import Adapter
from loratool.architectures import architecture
from loratool.errors import FormatError, MatchError, UsageError
from loratool.formats import FORMATS, attn_procs, cloneofsimo, detect, diffusers_old
from loratool.formats.base import Evidence
from tests import diffusion, models
from tests.diffusion import factors, layers, read, save

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")


def real(name: str) -> Path:
    """A published file; skips where it is absent."""
    return models.real_adapters() / "diffusion" / name


def found(path: Path, format: str, **options: Any) -> Adapter:
    """The adapter of a file, which must be recognised as that format."""
    evidence = Evidence(path, **options)
    assert detect(evidence)[0].name == format
    return detect(evidence)[0].read(evidence)


def assert_deltas(adapter: Adapter, pairs: diffusion.Pairs, alpha: float | None = None) -> None:
    """The adapter changes these modules, by these factors and this scaling; small deltas are computed."""
    assert adapter.updates.keys() == pairs.keys()
    for name, pair in pairs.items():
        update: Any = adapter.updates[name]
        for factor, stored in zip(pair, (update.down, update.up), strict=True):
            assert np.array_equal(stored.array(), factor), name
        assert update.scaling == (1.0 if alpha is None else alpha / len(pair[0])), name
        if pair[0][0].numel() * len(pair[1]) < 1 << 18:
            expected = diffusion.delta(pair, alpha)
            np.testing.assert_allclose(update.delta().reshape(expected.shape), expected, atol=1e-6, err_msg=name)


# -- cloneofsimo -----------------------------------------------------------------------------------------------


CLASSES = ("CrossAttention", "Attention", "GEGLU")
LEAVES = {
    "Attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "GEGLU": ("ff.net.0.proj",),
    "ResnetBlock2D": ("conv1", "time_emb_proj", "conv2", "conv_shortcut"),
}


def walked(model: str, *classes: str) -> list[str]:
    """The UNet's modules as diffusers registers them, but for GEGLU: it once stood between the two attentions."""
    leaves = tuple(f".{leaf}" for name in classes for leaf in LEAVES.get(name, ()))
    names = [n for n in layers(model, conv=True) if n.startswith("unet.") and n.endswith(leaves)]

    def place(name: str) -> tuple[int, int]:
        block = name.partition(".attn")[0].partition(".ff.")[0]
        first = next(n for n, other in enumerate(names) if other.startswith(block))
        return first, ("attn1" not in name) + ("attn2" in name) if block != name else names.index(name)

    return sorted(names, key=place)


def walked_clip(model: str) -> list[str]:
    count = diffusion.CLIPS[model][0][2]
    prefix = "text_encoder.text_model.encoder.layers"
    return [f"{prefix}.{n}.self_attn.{leaf}_proj" for n in range(count) for leaf in ("k", "v", "q", "out")]


def numbered(names: list[str], component: str, pairs: diffusion.Pairs) -> dict[str, Any]:
    """The tensors of these modules in cloneofsimo's names."""
    tensors = {}
    for n, name in enumerate(names):
        tensors[f"{component}:{n}:down"], tensors[f"{component}:{n}:up"] = pairs[name]
    return tensors


def with_classes(*unet: str) -> dict[str, str]:
    return {"unet": json.dumps(unet), "text_encoder": '["CLIPAttention"]', "<s1>": "<embed>"}


@pytest.mark.parametrize(
    ("model", "classes"), [("sd1", CLASSES[:1]), ("sd2", CLASSES), ("sd1", (*CLASSES, "ResnetBlock2D"))]
)
def test_indices_are_places_in_the_walk_through_the_model_41(
    model: str, classes: tuple[str, ...], tmp_path: Path
) -> None:
    unet, clip = walked(model, "Attention", *classes[1:]), walked_clip(model)
    assert "mid_block" in unet[-1]
    pairs = factors({name: layers(model, conv=True)[name] for name in (*unet, *clip)}, rank=1)
    tensors = numbered(unet, "unet", pairs) | numbered(clip, "text_encoder", pairs) | {"<s1>": torch.ones(8)}
    adapter = found(save(tmp_path / "file", tensors, with_classes(*classes)), "cloneofsimo")
    assert_deltas(adapter, pairs)
    assert adapter.metadata.architecture == model
    assert adapter.spelling(clip[1]) == "text_encoder:1"
    assert {update.alpha for update in adapter.updates.values()} == {None}


def test_a_token_s_vector_travels_along_under_the_name_that_others_read(tmp_path: Path) -> None:
    clip = walked_clip("sd1")
    pairs = factors({name: layers("sd1")[name] for name in clip}, rank=1)
    tensors = numbered(clip, "text_encoder", pairs) | {"<s1>": torch.arange(8.0)}
    adapter = found(save(tmp_path / "file", tensors, with_classes()), "cloneofsimo")
    assert list(adapter.carried) == ["bundle_emb.<s1>.emb_params"]
    assert adapter.spelling("bundle_emb.<s1>.emb_params") == "<s1>"
    api.write(adapter, tmp_path / "kohya", format="kohya")
    assert torch.equal(diffusion.load(tmp_path / "kohya")["bundle_emb.<s1>.emb_params"], torch.arange(8.0))


def test_a_base_names_the_modules_of_a_model_of_another_size(tmp_path: Path) -> None:
    names = walked("tiny", "Attention")
    pairs = factors({name: layers("tiny")[name] for name in names})
    path = save(tmp_path / "file", numbered(names, "unet", pairs), with_classes("Attention"))
    with pytest.raises(FormatError, match="fit no known model") as error:
        read(cloneofsimo, path)
    assert "--base" in error.value.hint
    assert_deltas(found(path, "cloneofsimo", modules=tuple(sorted(layers("tiny")))), pairs)
    with pytest.raises(FormatError, match="fit no known model"):
        read(cloneofsimo, path, modules=tuple(names[1:]))


BROKEN_INDICES = {
    "a gap": ({"unet:0:up": None, "unet:0:down": None}, {}, "gaps"),
    "half a pair": ({"unet:3:up": None}, {}, "half a pair"),
    "no classes": ({}, {"unet": None}, "does not say which layers"),
    "classes that are no list": ({}, {"unet": "1"}, "does not say which layers"),
    "a class that is not known": ({}, {"unet": '["Attention", "VAE"]'}, "VAE"),
    "a class that is no name": ({}, {"unet": "[[]]"}, "whose order is not known"),
    "another model": ({"vae:0:up": torch.ones(2, 1), "vae:0:down": torch.ones(1, 2)}, {}, "vae"),
    "an unknown tensor": ({"unet:0:middle": torch.ones(2, 1)}, {}, "meaning is unknown"),
    "an index twice": ({"unet:00:up": torch.ones(2, 1), "unet:00:down": torch.ones(1, 2)}, {}, "no known model has"),
    "an index of thousands of digits": ({f"unet:{'9' * 5000}:up": torch.ones(2, 1)}, {}, "half a pair"),
    "a factor of one axis": ({"unet:0:up": torch.ones(320)}, {}, "fit no known model"),
}


@pytest.mark.parametrize(("tensors", "strings", "said"), BROKEN_INDICES.values(), ids=BROKEN_INDICES)
def test_indices_that_mean_nothing_are_refused(
    tensors: dict[str, Any], strings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    names = walked("sd1", "Attention")
    own = numbered(names, "unet", factors({name: layers("sd1")[name] for name in names}, rank=1))
    tensors = {k: v for k, v in (own | tensors).items() if v is not None}
    strings = {k: v for k, v in (with_classes("Attention") | strings).items() if v is not None}
    with pytest.raises(FormatError, match=said):
        read(cloneofsimo, save(tmp_path / "file", tensors, strings))


@pytest.mark.parametrize("classes", [("Attention",), ("Attention", "GEGLU"), ()])
def test_a_pickled_list_of_factors_is_known_by_its_shapes_62(classes: tuple[str, ...], tmp_path: Path) -> None:
    names = walked("sd1", *classes) if classes else walked_clip("sd1")
    pairs = factors({name: layers("sd1")[name] for name in names}, rank=1)
    listed = [torch.nn.Parameter(factor) for name in names for factor in reversed(pairs[name])]
    torch.save(listed, tmp_path / "lora.pt")
    with pytest.raises(FormatError, match="pickle"):
        detect(Evidence(tmp_path / "lora.pt"))
    assert_deltas(found(tmp_path / "lora.pt", "cloneofsimo", allow_pickle=True), pairs)


def test_another_list_of_tensors_is_no_adapter(tmp_path: Path) -> None:
    for listed in ([torch.ones(2, 1)], [torch.ones(2)] * 2, [torch.ones(2, 1), torch.ones(2, 3)], []):
        torch.save(listed, tmp_path / "list.pt")
        with pytest.raises(FormatError, match="no known adapter"):
            detect(Evidence(tmp_path / "list.pt", allow_pickle=True))
    torch.save([torch.ones(2, 1), torch.ones(1, 3)], tmp_path / "list.pt")
    with pytest.raises(FormatError, match="1 pairs that fit no known model"):
        read(cloneofsimo, tmp_path / "list.pt", allow_pickle=True)


# -- diffusers of 2023 -------------------------------------------------------------------------------------------


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ATTENTION = [f"unet.{BLOCK}.attn1.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
CLIP = [f"text_encoder.text_model.encoder.layers.0.self_attn.{leaf}_proj" for leaf in ("q", "k", "v", "out")]
OLD_CLIP = [f"text_encoder.text_model.encoder.layers.0.self_attn.to_{leaf}_lora" for leaf in ("q", "k", "v", "out")]


def some(*names: str, **options: Any) -> diffusion.Pairs:
    return factors({name: layers("tiny", conv=True)[name] for name in names}, **options)


def lined(modules: dict[str, str], pairs: diffusion.Pairs, infix: str) -> dict[str, Any]:
    """Tensors ``<module><infix>.down.weight`` and ``.up.weight``."""
    tensors = {}
    for name, module in modules.items():
        tensors[f"{module}{infix}.down.weight"], tensors[f"{module}{infix}.up.weight"] = pairs[name]
    return tensors


def processors(names: list[str]) -> dict[str, str]:
    """The names of attention processors, with their component."""
    return {
        n: n.removesuffix(".0").replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.")
        for n in names
    }


@pytest.mark.parametrize("component", ["", "unet."])
def test_attention_processors_with_and_without_component_29(component: str, tmp_path: Path) -> None:
    pairs = some(*ATTENTION)
    modules = {n: m.replace("unet.", component, 1) for n, m in processors(ATTENTION).items()}
    path = save(tmp_path / "file", lined(modules, pairs, "_lora"))
    assert any("processor.to_out_lora.down" in key for key in diffusion.load(path))
    adapter = found(path, "attn-procs")
    assert_deltas(adapter, pairs)
    assert adapter.spelling(ATTENTION[3]) == f"{component}{BLOCK}.attn1.processor.to_out"


def test_the_text_encoder_had_the_names_of_the_unet_29(tmp_path: Path) -> None:
    pairs = some(*ATTENTION, *CLIP)
    tensors = lined(processors(ATTENTION), pairs, "_lora")
    tensors |= lined(dict(zip(CLIP, OLD_CLIP, strict=True)), pairs, "")
    assert_deltas(found(save(tmp_path / "file", tensors), "attn-procs"), pairs)


def test_generations_are_mixed_in_one_file(tmp_path: Path) -> None:
    """Processors, ``.lora.``, ``lora_linear_layer`` and PEFT's names, each on modules of its own."""
    others = [name.replace("attn1", "attn2") for name in ATTENTION]
    conv = "unet.down_blocks.0.resnets.0.conv1"
    pairs = some(*ATTENTION, *others, conv, *CLIP)
    tensors = lined(processors(ATTENTION), pairs, "_lora") | lined({n: n for n in others}, pairs, ".lora")
    tensors |= lined({n: n for n in CLIP}, pairs, ".lora_linear_layer")
    tensors |= diffusion.diffusers({conv: pairs[conv]})
    for format in (attn_procs, diffusers_old):
        assert_deltas(read(format, save(tmp_path / "file", tensors)), pairs)


def test_lora_down_of_the_unet_and_linear_layers_of_the_text_encoder(tmp_path: Path) -> None:
    conv = "unet.down_blocks.0.resnets.0.conv1"
    pairs = some(*ATTENTION, conv, *CLIP)
    tensors = lined({n: n for n in (*ATTENTION, conv)}, pairs, ".lora")
    tensors |= lined({n: n for n in CLIP}, pairs, ".lora_linear_layer")
    adapter = found(save(tmp_path / "file", tensors), "diffusers-old")
    assert_deltas(adapter, pairs)
    table = {"unet.r": 2, "unet.lora_alpha": 1, "text_encoder.r": 2, "text_encoder.lora_alpha": 4}
    told = read(diffusers_old, save(tmp_path / "told", tensors, {"lora_adapter_metadata": json.dumps(table)}))
    assert {u.scaling for n, u in told.updates.items() if n.startswith("unet.")} == {0.5}
    assert {u.scaling for n, u in told.updates.items() if n.startswith("text")} == {2.0}


@pytest.mark.peer
def test_diffusers_reads_its_old_names_as_the_same_modules(tmp_path: Path) -> None:
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    pairs = some(*ATTENTION, *CLIP)
    unet = lined(processors(ATTENTION), pairs, "_lora")
    clip = lined({n: n for n in CLIP}, pairs, ".lora_linear_layer")
    converted = convert_unet_state_dict_to_peft(dict(unet)) | convert_state_dict_to_peft(
        convert_state_dict_to_diffusers(dict(clip))
    )
    assert converted.keys() == diffusion.diffusers(pairs).keys()
    adapter = found(save(tmp_path / "file", unet | clip), "attn-procs")
    assert adapter.updates.keys() == {key.rpartition(".lora_")[0] for key in converted}


WRITTEN = [f.name for f in FORMATS if f.writes and f.name in ("kohya", "lycoris", "diffusers", "comfyui", "raw")]


# -- whole models ------------------------------------------------------------------------------------------------


def assert_products(adapter: Adapter, pairs: diffusion.Pairs) -> None:
    """The same modules; of each, what the update makes of one vector."""
    assert adapter.updates.keys() == pairs.keys()
    for name, (down, up) in pairs.items():
        update: Any = adapter.updates[name]
        vector = np.linspace(-1, 1, down[0].numel())
        ours = [update.slots[half].float().reshape(update.slots[half].rows, -1) for half in ("up", "down")]
        theirs = [factor.flatten(1).numpy() for factor in (up, down)]
        one, other = (b @ (a @ vector) for b, a in (ours, theirs))
        np.testing.assert_allclose(update.scaling * one, other, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_every_module_goes_through_every_format(model: str, tmp_path: Path) -> None:
    """The modules that diffusers' own model has, convolutions too, from each format to the next and back."""
    pairs = factors(layers(model, conv=True), rank=1)
    adapter = found(save(tmp_path / "source", diffusion.diffusers(pairs)), "diffusers")
    for number, to in enumerate(("kohya", "lycoris", "comfyui", "peft", "diffusers")):
        path = tmp_path / f"{number}"
        assert not api.write(adapter, path, format=to)
        adapter = api.read(path)
        assert_products(adapter, pairs)
        assert to == "peft" or adapter.metadata.architecture == model
    assert diffusion.load(path).keys() == diffusion.load(tmp_path / "source").keys()


# -- published files ---------------------------------------------------------------------------------------------


REAL = {
    "cloneofsimo-lora_disney.safetensors": ("cloneofsimo", 192, 2),
    "diffusers-attn-procs.safetensors": ("attn-procs", 128, 0),
    "diffusers-lora-down.safetensors": ("diffusers-old", 128, 0),
}


@pytest.mark.parametrize(("name", "expected"), REAL.items(), ids=REAL)
@pytest.mark.parametrize("to", WRITTEN)
def test_published_files_keep_every_delta_in_every_format(
    name: str, expected: tuple[str, int, int], to: str, tmp_path: Path
) -> None:
    format, modules, carried = expected
    source = found(real(name), format)
    assert (len(source.updates), len(source.carried), source.metadata.architecture) == (modules, carried, "sd1")
    losses = api.write(source, tmp_path / "out", format=to, allow_loss=True)
    assert len(losses) in (0, carried)
    assert all(loss.name in ("<s1>", "<s2>") for loss in losses)
    diffusion.same(source, api.read(tmp_path / "out"), list(source.updates)[::40])


@pytest.mark.parametrize("name", REAL)
def test_published_files_are_merged_into_a_single_file(name: str, tmp_path: Path) -> None:
    """Into the part of an SD1 checkpoint that has narrow layers; what has no place there is named, and insisted on."""
    source, known = api.read(real(name)), architecture("sd1")
    assert known
    part = r"up_blocks\.3\.attentions\.2\..*attn"
    slots = {n: known.checkpoint()[f"{n}.weight"] for n in source.updates if re.search(part, n)}
    shapes = {name: source.updates[name].shape for name in slots}
    weights = {slots[n].tensor: np.full(slots[n].stored(shapes[n]), 0.01 * k) for k, n in enumerate(slots)}
    save(tmp_path / "base.safetensors", {n: torch.from_numpy(w).half() for n, w in weights.items()})
    assert len(slots) == 8
    with pytest.raises(MatchError, match=f"{len(source.updates) + len(source.carried) - 8} of"):
        api.merge(tmp_path / "base.safetensors", source, out=tmp_path / "out.safetensors")
    report = api.merge(tmp_path / "base.safetensors", source, out=tmp_path / "out.safetensors", allow_unmatched=True)
    assert (report.modules, report.tensors_changed) == (8, 8)
    merged, before = (diffusion.load(tmp_path / f"{which}.safetensors") for which in ("out", "base"))
    for target, slot in slots.items():
        update: Any = source.updates[target]
        up, down = (update.slots[half].float().astype(np.float64) for half in ("up", "down"))
        change = update.scaling * up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        whole = before[slot.tensor].double().numpy() + change.reshape(before[slot.tensor].shape)
        np.testing.assert_allclose(merged[slot.tensor].double().numpy(), whole, rtol=2**-11, atol=2**-24)
        assert change.any() and not torch.equal(merged[slot.tensor], before[slot.tensor])


# -- what is not read, or not written ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["<s1>", "emb_params", "clip_l", "string_to_param.*"])
def test_a_textual_inversion_is_refused_by_name(key: str, tmp_path: Path) -> None:
    path = save(tmp_path / "file", {key: torch.ones(2, 8)})
    with pytest.raises(FormatError, match="textual inversion"):
        detect(Evidence(path))


def test_a_pickled_textual_inversion_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": torch.ones(2, 8)}, "name": "x"}, tmp_path / "emb.pt")
    with pytest.raises(FormatError, match="textual inversion"):
        detect(Evidence(tmp_path / "emb.pt", allow_pickle=True))


@pytest.mark.parametrize("name", [format.name for format in FORMATS if not format.writes])
def test_what_is_only_read_is_not_written(name: str, tmp_path: Path, fixtures: Path) -> None:
    rows = {row.name: (row.reads, row.writes) for row in api.list_formats()}
    assert rows[name] == (True, False)
    with pytest.raises(UsageError, match="only read"):
        api.convert(fixtures / "adapters" / "kohya.safetensors", tmp_path / "out", to=name)
    assert not list(tmp_path.iterdir())


def test_bookkeeping_of_sliders_is_left_out_with_a_word(tmp_path: Path) -> None:
    pairs = some(*ATTENTION)
    path = save(tmp_path / "file", diffusion.kohya(pairs) | {"_aux.scale": torch.ones(1), "_aux.x.y": torch.ones(1)})
    adapter = found(path, "kohya")
    assert_deltas(adapter, pairs, 1.0)
    assert "_aux.scale; _aux.x.y" in adapter.metadata.warnings[0]
