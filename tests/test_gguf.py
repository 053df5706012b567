"""Adapters of llama.cpp: what is written is what its converter writes, read by the gguf package and by ourselves."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.architectures.llama_cpp import LLAMA_CPP
from loratool.errors import FormatError, LoratoolError, LossError
from loratool.tensors import Tensor
from loratool.update import Dense, DoRA
from tests import llm
from tests.llm import HEAD, HIDDEN, INNER, KV, LLAMA, VOCAB, Q, delta, low
from tests.samples import UPDATES, magnitude, normal

ALL_HEADS = {"num_attention_heads": Q, "num_key_value_heads": KV, "hidden_size": Q * HEAD}
WIDE = Q * HEAD  # hidden size where the projections are fused

ATTENTION = {name: shape for name, shape in LLAMA.items() if "layers.1.self_attn" in name}
FUSED = {"attn.c_attn": (3 * WIDE, WIDE), "attn.c_proj": (WIDE, WIDE), "mlp.c_fc": (INNER, WIDE)}
MODELS: Mapping[str, Mapping[str, llm.Shape]] = {
    **dict.fromkeys(("llama", "mistral", "granite", "smollm3", "qwen2", "qwen3", "stablelm", "olmo2"), LLAMA),
    "gemma2": {name: shape for name, shape in LLAMA.items() if name != "lm_head"},
    "mixtral": ATTENTION
    | {"model.layers.0.block_sparse_moe.gate": (3, HIDDEN)}
    | llm.experts({"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}, "block_sparse_moe.experts"),
    "qwen2_moe": ATTENTION
    | {"model.layers.0.mlp.shared_expert.up_proj": (INNER, HIDDEN)}
    | llm.experts({"gate_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}),
    "phi3": {"model.layers.0.self_attn.qkv_proj": (48, HIDDEN), "model.layers.0.mlp.gate_up_proj": (28, HIDDEN)},
    "phi": {"model.layers.0.self_attn.q_proj": (24, 20), "model.layers.0.mlp.fc2": (20, 14)},
    "gpt2": {f"transformer.h.0.{name}": shape for name, shape in FUSED.items()} | {"transformer.wte": (VOCAB, WIDE)},
    "gpt_neox": {"gpt_neox.layers.0.attention.query_key_value": (3 * WIDE, WIDE), "gpt_neox.embed_in": (VOCAB, WIDE)},
    "bloom": {"transformer.h.1.self_attention.query_key_value": (3 * WIDE, WIDE)},
    "falcon": {"transformer.h.1.self_attention.query_key_value": ((Q + 2 * KV) * HEAD, WIDE)},
}


def config_of(model_type: str) -> dict[str, Any]:
    heads = ALL_HEADS if model_type in ("gpt_neox", "bloom", "falcon", "gpt2") else {}
    return {**llm.CONFIG, **heads, "model_type": model_type}


def written(adapter: Adapter, folder: Path, name: str = "x.gguf", **options: Any) -> Path:
    loratool.write(adapter, folder / name, format="gguf", **options)
    return folder / name


def stored(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(pairs, tensors) as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    pairs = {name: field.contents() for name, field in reader.fields.items()}
    return pairs, {t.name: values_of(t) for t in reader.tensors}


def values_of(tensor: Any) -> np.ndarray:
    if tensor.tensor_type.name == "BF16":
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.asarray(tensor.data)


def as_llama_cpp(path: Path) -> dict[str, np.ndarray]:
    """The delta of each tensor as llama.cpp computes it: src/llama-adapter.h, `get_scale`, and build_lora_mm."""
    pairs, tensors = stored(path)
    alpha = np.float64(pairs.get("adapter.lora.alpha", 0.0))
    found = {}
    for key in (key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")):
        a, b = (tensors[f"{key}.{half}"].astype(np.float64) for half in ("lora_a", "lora_b"))
        rank = b.shape[-1]
        scale = alpha / rank if alpha else 1.0
        found[key] = scale * (a @ b.swapaxes(-1, -2) if key == "token_embd.weight" else b @ a)
    return found


# -- the converter's own transformations of a base weight, by the definition --------------------------------------


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def ungrouped(weight: np.ndarray, heads: int, groups: int) -> np.ndarray:
    """FalconModel and, with as many groups as heads, GPTNeoXModel and BloomModel of convert_hf_to_gguf."""
    size = len(weight) // (heads + 2 * groups)
    qkv = weight.reshape(groups, heads // groups + 2, size, -1)
    parts = (qkv[:, :-2], qkv[:, -2], qkv[:, -1])
    return np.concatenate([part.reshape(-1, weight.shape[1]) for part in parts])


Convert = Callable[[np.ndarray], np.ndarray]
EXPECTED: Mapping[str, tuple[str, str, Convert]] = {  # model type: (module, tensor, what happens to its rows)
    "llama": ("model.layers.1.self_attn.q_proj", "blk.1.attn_q", lambda w: permuted(w, Q)),
    "mistral": ("model.layers.0.self_attn.k_proj", "blk.0.attn_k", lambda w: permuted(w, KV)),
    "granite": ("model.layers.0.self_attn.v_proj", "blk.0.attn_v", lambda w: w),
    "smollm3": ("model.layers.1.self_attn.o_proj", "blk.1.attn_output", lambda w: w),
    "qwen2": ("model.layers.1.self_attn.q_proj", "blk.1.attn_q", lambda w: w),
    "gemma2": ("model.layers.1.mlp.gate_proj", "blk.1.ffn_gate", lambda w: w),
    "phi3": ("model.layers.0.mlp.gate_up_proj", "blk.0.ffn_up", lambda w: w),
    "phi": ("model.layers.0.mlp.fc2", "blk.0.ffn_down", lambda w: w),
    "gpt2": ("transformer.h.0.attn.c_attn", "blk.0.attn_qkv", lambda w: w),
    "gpt_neox": ("gpt_neox.layers.0.attention.query_key_value", "blk.0.attn_qkv", lambda w: ungrouped(w, Q, Q)),
    "bloom": ("transformer.h.1.self_attention.query_key_value", "blk.1.attn_qkv", lambda w: ungrouped(w, Q, Q)),
    "falcon": ("transformer.h.1.self_attention.query_key_value", "blk.1.attn_qkv", lambda w: ungrouped(w, Q, KV)),
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_rows_are_ordered_as_the_base_is(model_type: str, tmp_path: Path) -> None:
    """llm.md trap 44: only lora_b is reordered, and what it adds is what the converter makes of the delta."""
    module, key, convert = EXPECTED[model_type]
    adapter = llm.adapter(MODELS[model_type], config_of(model_type))
    path = written(adapter, tmp_path)
    update = adapter.updates[module]
    assert np.allclose(as_llama_cpp(path)[f"{key}.weight"], convert(delta(update)), rtol=1e-6, atol=1e-6)
    tensors = stored(path)[1]
    assert np.array_equal(tensors[f"{key}.weight.lora_a"], update.slots["down"].array())
    assert np.array_equal(tensors[f"{key}.weight.lora_b"], convert(update.slots["up"].array()))


def test_embeddings_are_transposed(tmp_path: Path) -> None:
    adapter = llm.adapter(LLAMA)
    path = written(adapter, tmp_path)
    tensors = stored(path)[1]
    assert tensors["token_embd.weight.lora_a"].shape == (VOCAB, 3)
    assert tensors["token_embd.weight.lora_b"].shape == (HIDDEN, 3)
    assert np.allclose(as_llama_cpp(path)["token_embd.weight"], delta(adapter.updates["model.embed_tokens"]))
    assert np.allclose(as_llama_cpp(path)["output.weight"], delta(adapter.updates["lm_head"]))


@pytest.mark.parametrize(("model_type", "leaf", "key"), [("mixtral", "w1", "gate"), ("qwen2_moe", "down_proj", "down")])
def test_experts_lie_in_one_stack(model_type: str, leaf: str, key: str, tmp_path: Path) -> None:
    adapter = llm.adapter(MODELS[model_type], config_of(model_type) | {"num_local_experts": 4})
    found = as_llama_cpp(written(adapter, tmp_path))[f"blk.0.ffn_{key}_exps.weight"]
    where = "block_sparse_moe" if model_type == "mixtral" else "mlp"
    assert len(found) == 4
    for number in range(3):
        expected = delta(adapter.updates[f"model.layers.0.{where}.experts.{number}.{leaf}"])
        assert np.allclose(found[number], expected, rtol=1e-6, atol=1e-6)
    assert not found[3].any()  # the base has a fourth, which the adapter does not change


def test_the_pairs_are_the_converter_s(tmp_path: Path) -> None:
    pairs, tensors = stored(written(llm.adapter(ATTENTION), tmp_path))
    assert pairs["general.type"] == "adapter"
    assert pairs["general.architecture"] == "llama"
    assert pairs["adapter.type"] == "lora"
    assert pairs["adapter.lora.alpha"] == 6.0
    assert pairs["general.file_type"] == gguf.LlamaFileType.ALL_F32
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_a", "lora_b"}
    assert all(t.data_offset % 32 == 0 for t in reader.tensors)


@pytest.mark.parametrize(("dtype", "kind"), [("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"), ("F64", "F32")])
def test_stored_types(dtype: str, kind: str, tmp_path: Path) -> None:
    adapter = llm.adapter(ATTENTION, dtype=dtype)
    path = written(adapter, tmp_path)
    assert {t.tensor_type.name for t in gguf.GGUFReader(path).tensors} == {kind}
    assert stored(path)[0]["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[kind]
    llm.assert_same_deltas(adapter, loratool.read(path))


def test_one_alpha_for_all_and_the_rest_folded(tmp_path: Path) -> None:
    """llm.md trap 19: patterns and rank-stabilised scalings survive; llama.cpp has one alpha and each its rank."""
    names = list(ATTENTION)
    updates = {
        names[0]: low(ATTENTION[names[0]], 3, 6.0),
        names[1]: low(ATTENTION[names[1]], 2, 6.0),  # another rank alone folds nothing
        names[2]: low(ATTENTION[names[2]], 4, 6.0, rank_stabilised=True),
        names[3]: low(ATTENTION[names[3]], 2, 0.7, dtype="BF16"),
    }
    adapter = Adapter(updates, {}, Metadata("sample", base_config=llm.CONFIG))
    path = written(adapter, tmp_path)
    found = as_llama_cpp(path)
    assert stored(path)[0]["adapter.lora.alpha"] == 6.0
    for name, key, rows in zip(names, "qkvo", (Q, KV, 0, 0), strict=True):
        tensor = f"blk.1.attn_{'output' if key == 'o' else key}.weight"
        expected = permuted(delta(updates[name]), rows) if rows else delta(updates[name])
        assert np.allclose(found[tensor], expected, rtol=1e-6, atol=1e-6), name
    tensors = stored(path)[1]
    assert np.array_equal(permuted(updates[names[0]].up.array(), Q), tensors["blk.1.attn_q.weight.lora_b"])
    llm.assert_same_deltas(adapter, loratool.read(path))


def test_a_scaling_that_is_a_power_of_two_away_keeps_its_dtype(tmp_path: Path) -> None:
    names = list(ATTENTION)
    updates = {names[0]: low(ATTENTION[names[0]], 4, 8.0, "F16"), names[1]: low(ATTENTION[names[1]], 4, 8.0, "F16")}
    updates[names[2]] = low(ATTENTION[names[2]], 4, 16.0, "F16")
    adapter = Adapter(updates, {}, Metadata("sample", base_config=llm.CONFIG))
    path = written(adapter, tmp_path)
    assert {t.tensor_type.name for t in gguf.GGUFReader(path).tensors} == {"F16"}
    llm.assert_same_deltas(adapter, loratool.read(path), 0)


@pytest.mark.parametrize("alpha", [0.0, None, 0.1, 1e-300, 1e39])
def test_odd_alphas(alpha: float | None, tmp_path: Path) -> None:
    """To llama.cpp an alpha of 0 means a scaling of 1; float32 does not hold all alphas."""
    name = "model.layers.1.self_attn.v_proj"
    update = low(LLAMA[name], alpha=alpha)
    if alpha == 1e39:
        update = replace(update, up=Tensor.of(update.up.array() * np.float32(1e-30)))
    adapter = Adapter({name: update}, {}, Metadata("sample", base_config=llm.CONFIG))
    path = written(adapter, tmp_path)
    found = as_llama_cpp(path)["blk.1.attn_v.weight"]
    assert np.allclose(found, delta(update), rtol=1e-6, atol=1e-30)
    assert np.allclose(delta(loratool.read(path).updates[name]), delta(update), rtol=1e-6, atol=1e-30)


# -- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("more", [{}, {"rank": 5, "alpha": 2.5, "dtype": "BF16"}, {"rank": 1, "alpha": None}])
def test_read_back_by_delta(model_type: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Also without the base: what is needed of its configuration stands in the file."""
    adapter = llm.adapter(MODELS[model_type], config_of(model_type), **more)
    path = written(adapter, tmp_path)
    again = loratool.read(path)
    assert again.metadata.format == "gguf"
    llm.assert_same_deltas(adapter, again)
    assert written(again, tmp_path, "y.gguf").read_bytes() == path.read_bytes()


def test_names_agree_with_the_gguf_package() -> None:
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    for model_type, known in LLAMA_CPP.items():
        arch = architectures[known.name]
        table = gguf.get_tensor_name_map(arch, 2)
        tensors = {gguf.TENSOR_NAMES[tensor].format(bid=1) for tensor in gguf.MODEL_TENSORS[arch]}
        for name, key in known.pairs:
            assert key.format(1) in tensors, (model_type, key)
            asked = name.replace("model.layers.{}.block_sparse_moe.experts", "layers.{}.feed_forward.experts")
            assert table.get_name(asked.format(1)) == key.format(1), (model_type, name)


def test_names_of_vision_language_models(tmp_path: Path) -> None:
    shapes = {name.replace("model.", "model.language_model."): shape for name, shape in ATTENTION.items()}
    config = {"model_type": "llava", "text_config": dict(llm.CONFIG)}
    found = as_llama_cpp(written(llm.adapter(shapes, config), tmp_path))
    assert "blk.1.attn_q.weight" in found


# -- what cannot be said -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "update", "reason"),
    [
        ("model.layers.0.self_attn.q_proj", DoRA(low((24, 20)), magnitude(24)), "DoRA"),
        ("model.layers.0.self_attn.v_proj.bias", Dense(normal(12), kind="bias"), "bias"),
        ("model.layers.0.mlp.up_proj", UPDATES["dense"], "no plain LoRA form"),
        ("model.layers.0.mlp.up_proj", UPDATES["lora_conv2d"], "convolution"),
        ("model.layers.0.mlp.router", low((7, 5)), "no tensor of llama"),
        ("score", low((7, 5)), "no tensor of llama"),
    ],
)
def test_losses_are_named(name: str, update: Any, reason: str, tmp_path: Path) -> None:
    kept = llm.adapter(ATTENTION)
    spoken = {name: f"base_model.model.{name}"}
    adapter = replace(kept, updates={**kept.updates, name: update}, spellings=spoken)
    with pytest.raises(LossError) as caught:
        written(adapter, tmp_path)
    (loss,) = caught.value.losses
    assert loss.startswith(spoken[name]) and reason in loss
    assert not (tmp_path / "x.gguf").exists()
    path = written(adapter, tmp_path, allow_loss=True)
    assert loratool.read(path).updates.keys() == kept.updates.keys()


def test_whole_tensors_and_tied_heads_are_losses(tmp_path: Path) -> None:
    """llama.cpp refuses adapters with these: ggml-org/llama.cpp#9065, #11554."""
    tied = {**llm.CONFIG, "tie_word_embeddings": True}
    adapter = replace(llm.adapter(LLAMA, tied), carried={"model.norm.weight": normal(20)})
    with pytest.raises(LossError) as caught:
        written(adapter, tmp_path)
    assert [loss.partition(":")[0] for loss in caught.value.losses] == ["lm_head", "model.norm.weight"]


def test_the_base_must_be_known(tmp_path: Path) -> None:
    unknown = llm.adapter(ATTENTION, {})
    with pytest.raises(FormatError, match="architecture is unknown") as caught:
        written(unknown, tmp_path)
    assert "--base" in caught.value.hint
    with pytest.raises(FormatError, match="rwkv"):
        written(llm.adapter(ATTENTION, {"model_type": "rwkv"}), tmp_path)
    with pytest.raises(FormatError, match="heads are unknown"):
        written(llm.adapter(ATTENTION, {"model_type": "llama"}), tmp_path)
    with pytest.raises(FormatError, match="rows are not 5 heads"):
        written(llm.adapter(ATTENTION, {"model_type": "llama", "num_attention_heads": 5}), tmp_path)
    assert not list(tmp_path.iterdir())
    local = llm.base(tmp_path / "base")
    told = unknown.with_metadata(base_model=str(local))
    assert (
        as_llama_cpp(written(told, tmp_path)).keys()
        == as_llama_cpp(written(llm.adapter(ATTENTION), tmp_path, "y")).keys()
    )


def test_convert_with_a_base(tmp_path: Path) -> None:
    """PEFT's folder to GGUF and back is the same adapter; the report hashes what was written."""
    base, folder = llm.base(tmp_path / "base"), tmp_path / "peft"
    adapter = llm.adapter(LLAMA, alpha=5.0, rank_stabilised=True)
    loratool.write(adapter, folder, format="peft")
    report = loratool.convert(folder, tmp_path / "x.gguf", to="gguf", base=base)
    assert report.modules == len(LLAMA)
    pairs = stored(tmp_path / "x.gguf")[0]
    assert pairs["loratool.content_hash"] == report.content_hash
    assert json.loads(pairs["loratool.inputs"]) == report.inputs
    loratool.convert(tmp_path / "x.gguf", tmp_path / "again", to="peft")
    llm.assert_same_deltas(adapter, loratool.read(tmp_path / "again"))
    merged = loratool.merge(base, tmp_path / "x.gguf", out=tmp_path / "merged")
    assert merged.modules == len(LLAMA)
    assert loratool.verify(base, folder, merged=tmp_path / "merged", tolerance=1).ok


# -- files that others wrote ---------------------------------------------------------------------------------------


def foreign(path: Path, tensors: Mapping[str, np.ndarray], quantised: Any = None, **pairs: Any) -> Path:
    """A file of the gguf package."""
    writer = gguf.GGUFWriter(path, pairs.pop("arch", "llama"))
    writer.add_type(pairs.pop("type", "adapter"))
    writer.add_string("adapter.type", pairs.pop("adapter", "lora"))
    alpha = pairs.pop("alpha", 8.0)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in pairs.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(key.replace("__", "."), value)
    for name, values in tensors.items():
        if quantised is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name: str, shape: llm.Shape = (24, 32), rank: int = 32) -> dict[str, np.ndarray]:
    update = low(shape, rank)
    return {f"{name}.weight.lora_a": update.down.array(), f"{name}.weight.lora_b": update.up.array()}


def test_heads_from_the_base_or_not_at_all(tmp_path: Path) -> None:
    """Headers show what there is; values of q and k are refused until the heads are known."""
    shape = LLAMA["model.layers.1.self_attn.q_proj"]
    path = foreign(tmp_path / "x.gguf", pair("blk.1.attn_q", shape, 4) | pair("blk.1.attn_v", (12, 20), 4))
    name = "model.layers.1.self_attn.q_proj"
    found = loratool.inspect(path)
    assert {t.module: (t.rank, t.alpha, t.scaling) for t in found.targets}[name] == (4, 8.0, 2.0)
    blind = loratool.read(path)
    assert delta(blind.updates["model.layers.1.self_attn.v_proj"]).shape == (12, 20)
    with pytest.raises(FormatError, match="heads are unknown") as caught:
        loratool.convert(path, tmp_path / "out", to="peft")
    assert "--base" in caught.value.hint
    assert not (tmp_path / "out").exists()
    seen = loratool.read(path, base=llm.base(tmp_path / "base"))
    expected = 2.0 * low(shape, 4).up.array() @ low(shape, 4).down.array()
    assert np.allclose(permuted(delta(seen.updates[name]), Q), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_tensors(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = gguf.GGMLQuantizationType[kind]
    tensors = pair("blk.0.attn_v") | pair("blk.0.ffn_up_exps", (24, 32))
    tensors = {name: values[None].repeat(2, 0) if "exps" in name else values for name, values in tensors.items()}
    path = foreign(tmp_path / "x.gguf", tensors, quantised, arch="qwen3moe")
    adapter = loratool.read(path)
    update = adapter.updates["model.layers.0.self_attn.v_proj"]
    for slot, key in (("down", "lora_a"), ("up", "lora_b")):
        raw = tensors[f"blk.0.attn_v.weight.{key}"]
        expected = gguf.quants.dequantize(gguf.quants.quantize(raw, quantised), quantised)
        assert np.array_equal(update.slots[slot].array(), expected)
        assert np.array_equal(update.slots[slot].float(1, 3), expected[1:3])
        stack = adapter.updates["model.layers.0.mlp.experts.1.up_proj"].slots[slot]
        assert np.array_equal(stack.array(), expected)
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    again = loratool.read(path)
    with pytest.raises(LoratoolError) as caught:
        again.updates["model.layers.0.self_attn.v_proj"].slots["up"].array()
    assert caught.value.exit_code == 1 and "pip install 'loratool[gguf]'" in caught.value.hint


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_an_alpha_the_scaling_is_1(alpha: float | None, tmp_path: Path) -> None:
    path = foreign(tmp_path / "x.gguf", pair("blk.0.attn_v"), alpha=alpha)
    assert loratool.read(path).updates["model.layers.0.self_attn.v_proj"].scaling == 1.0


@pytest.mark.parametrize(
    ("tensors", "pairs", "what"),
    [
        (pair("blk.0.attn_v"), {"type": "model"}, "a GGUF model, not an adapter"),
        (pair("blk.0.attn_v"), {"type": "mmproj"}, "a GGUF mmproj"),
        (pair("blk.0.attn_v"), {"adapter": "control"}, "an adapter of type control"),
        (pair("blk.0.attn_v"), {"adapter__alora__invocation_tokens": [1, 2]}, "activated LoRA"),  # llm.md trap 67
        (pair("blk.0.attn_v"), {"arch": "rwkv6"}, "rwkv6, which is not known"),
        (pair("blk.0.attn_v"), {"alpha": float("nan")}, "not a number"),
        ({**pair("blk.0.attn_v"), "blk.0.attn_norm.weight": np.ones(4, np.float32)}, {}, "skips norms"),
        ({"blk.0.attn_v.weight.lora_a": np.ones((2, 3), np.float32)}, {}, "half a pair"),
        (pair("blk.0.time_mix_k"), {}, "no tensor of this name"),
        (
            pair("blk.0.attn_v", rank=3) | {"blk.0.attn_v.weight.lora_b": np.ones((4, 5), np.float32)},
            {},
            "rank mismatch",
        ),
        ({f"blk.0.attn_v.weight.lora_{h}": np.ones(4, np.float32) for h in "ab"}, {}, "no pair of matrices"),
        ({f"blk.0.attn_v.weight.lora_{h}": np.ones((4, 4), np.int32) for h in "ab"}, {}, "stored as I32"),
        ({f"token_embd.weight.lora_{h}": np.ones(4, np.float32) for h in "ab"}, {}, "no matrix"),
    ],
)
def test_what_is_no_lora_is_refused_by_name(tensors: Any, pairs: Any, what: str, tmp_path: Path) -> None:
    path = foreign(tmp_path / "x.gguf", tensors, **pairs)
    with pytest.raises(FormatError, match=what):
        loratool.inspect(path)


def test_a_model_in_gguf_is_no_base(tmp_path: Path) -> None:
    path = foreign(tmp_path / "x.gguf", {"blk.0.attn_v.weight": np.ones((4, 4), np.float32)}, type="model")
    with pytest.raises(FormatError, match="GGUF"):
        loratool.merge(path, path, out=tmp_path / "out")


# -- hostile files -------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def hostile(version: int = 3, tensors: int = 0, pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


MANY = (1 << 60) - 1
HOSTILE = {
    "GGUF version 1": hostile(1),
    "a big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "over the limits": hostile(3, MANY, MANY),
    "header is cut off": hostile(3, 0, 9999),
    "or over its limit": hostile(3, 0, 1, struct.pack("<Q", MANY)),
    "cut off, or over": hostile(3, 0, 1, text("k") + struct.pack("<IIQ", 9, 4, MANY)),
    "1,099,511,627,776 values": hostile(3, 0, 1, text("k") + struct.pack("<IIQ", 9, 8, 1 << 40)),
    "values of type 9": hostile(3, 0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1)),
    "unknown type 77": hostile(3, 0, 1, text("k") + struct.pack("<I", 77)),
    "no UTF-8": hostile(3, 0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", 0)),
    "a key occurs twice": hostile(3, 0, 2, 2 * (text("k") + struct.pack("<II", 4, 1))),
    "1073741824 axes": hostile(3, 1, 0, text("t") + struct.pack("<I", 1 << 30)),
    "truncated: the data": hostile(3, 1, 0, entry("t", (MANY, MANY)) + bytes(64)),
    "the data ends before": hostile(3, 1, 0, entry("t", (4, 4)) + bytes(16)),
    "before this tensor": hostile(3, 1, 0, entry("t", (1,), 0, 1 << 50) + bytes(64)),
    "no multiple of 32": hostile(3, 1, 0, entry("t", (1,), 0, 1) + bytes(64)),
    "a name occurs twice": hostile(3, 2, 0, 2 * entry("t", (1,)) + bytes(64)),
    "GGML type 12": hostile(3, 1, 0, entry("t", (256,), 12) + bytes(512)),
    "Q8_0 values of shape": hostile(3, 1, 0, entry("t", (31,), 8) + bytes(512)),
    "an alignment of 3": hostile(3, 0, 1, text("general.alignment") + struct.pack("<II", 4, 3)),
    "an alignment of 0": hostile(3, 0, 1, text("general.alignment") + struct.pack("<II", 4, 0)),
    "not a GGUF file": b"GGUF",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[what])
    with pytest.raises(FormatError, match=what):
        loratool.inspect(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = written(llm.adapter({"model.layers.1.self_attn.v_proj": (12, 20)}), tmp_path).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in {*range(4, len(whole) - 32, 37), len(whole) - 300}:
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            loratool.read(path).updates["model.layers.1.self_attn.v_proj"].slots["up"].array()


@pytest.mark.parametrize("note", ["[]", "{", '{"model_type": "llama", "evil": 1}', "[" * 9999])
def test_a_damaged_note_on_the_base_is_refused(note: str, tmp_path: Path) -> None:
    from loratool.gguf import write_gguf

    pairs = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "loratool.base": note}
    update = low((12, 20))
    tensors = {"blk.0.attn_v.weight.lora_a": update.down, "blk.0.attn_v.weight.lora_b": update.up}
    write_gguf(tmp_path / "x.gguf", pairs, tensors)
    with pytest.raises(FormatError, match=r"loratool\.base"):
        loratool.read(tmp_path / "x.gguf")
