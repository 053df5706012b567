"""The dialects of language-model trainers: MLX, torchtune, mistral-finetune, Tinker, LitGPT, loralib.

Each is checked against its own definition of the delta, written down here anew, and there and back.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.errors import FormatError, LoratoolError, LossError
from loratool.formats import FORMATS, by_name
from loratool.formats import llm as shared
from loratool.formats.base import IMAGE_FORMATS, Evidence
from loratool.gguf import write_gguf
from loratool.kinds.experts import Experts
from loratool.pickles import looks_pickled, write_pickle
from loratool.tensors import Tensor, read_safetensors, write_safetensors
from loratool.update import Dense, DoRA, LowRank, Update
from tests import llm
from tests.laws import examples
from tests.llm import CONFIG, HEAD, HIDDEN, INNER, KV, LLAMA, VOCAB, Q, delta, low
from tests.samples import UPDATES, magnitude, normal

BODY = {name: shape for name, shape in LLAMA.items() if "layers" in name}
PICKLES = loratool.Reading(allow_pickle=True)


def scaled(by: float) -> loratool.Reading:
    return loratool.Reading(allow_pickle=True, scaling=by)


def written(adapter: Adapter, folder: Path, format: str, name: str = "out", **options: Any) -> Path:
    loratool.write(adapter, folder / name, format=format, **options)
    return folder / name


def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's rows of q or k in Meta's order: hf_to_tune of torchtune's convert_weights."""
    head = len(weight) // heads
    return weight.reshape(heads, 2, head // 2, -1).swapaxes(1, 2).reshape(len(weight), -1)


# -- names, rows, factors: what they share -------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "heads"), [(24, 4), (24, 1), (24, 12), (2, 1)])
def test_orders_of_rotary_rows_undo_each_other(rows: int, heads: int) -> None:
    one, other = shared.interleaved(rows, heads), shared.halved(rows, heads)
    assert sorted(one) == list(range(rows))
    assert np.array_equal(one[other], np.arange(rows)) and np.array_equal(other[one], np.arange(rows))
    weight = np.arange(rows * 3.0).reshape(rows, 3)
    assert np.array_equal(weight[one], pairs(weight, heads))


def test_templates_are_one_to_one_in_both_directions() -> None:
    table = shared.Templates((("model.layers.{}.a", "blk.{}.b"), ("model.x.{}.{}", "y.{}.{}")))
    for name, other in (("model.layers.12.a", "blk.12.b"), ("model.x.1.2", "y.1.2")):
        assert (table.there(name), table.back(other)) == (other, name)
    assert table.there("model.language_model.layers.3.a") == "blk.3.b" == table.there("layers.3.a")
    assert table.there("model.layers.x.a") is None and table.back("blk.b") is None
    with pytest.raises(ValueError, match="one-to-one"):
        shared.Templates((("a", "b"), ("c", "b")))
    with pytest.raises(ValueError, match="numbers"):
        shared.Templates((("a.{}", "b"),))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("by", [1.0, 2.0, 0.25, -1.0, 3.0, 1 / 3, 0.0])
def test_a_factor_of_another_scaling(dtype: str, by: float) -> None:
    """Kept in its dtype where that is exact, else float32; never rounded to 16 bits."""
    tensor = normal(5, 4, dtype=dtype)
    found = shared.multiplied(tensor, by, 1.0)
    wide = np.float64 if dtype == "F64" else np.float32
    assert np.array_equal(found.float(), tensor.array().astype(wide) * wide(by))
    assert found.dtype == (dtype if by in (1, 2, 0.25, -1) or dtype == "F64" else "F32")
    assert np.array_equal(found.load(1, 3), found.array()[1:3])


def test_a_power_of_two_that_overflows_or_vanishes_is_kept_in_float32() -> None:
    for value, by in ((60000.0, 4.0), (1e-7, 1 / 4)):
        found = shared.multiplied(llm.tensor([[value]], "F16"), by, 1.0)
        assert found.dtype == "F32" and found.array()[0, 0] == np.float32(np.float16(value)) * np.float32(by)


# -- MLX -----------------------------------------------------------------------------------------------------------


def fused_by_mlx(folder: Path) -> dict[str, np.ndarray]:
    """The delta of each module as mlx-lm's `fuse` computes it."""
    scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    tensors = {
        k: t.float().astype(np.float64) for k, t in read_safetensors(folder / "adapters.safetensors").tensors.items()
    }
    found = {}
    for module in (key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")):
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
        if a.ndim == 3:
            found[module] = scale * b @ a
        else:
            found[module] = scale * (a @ b if module.endswith("embed_tokens") else b.T @ a.T)
    return found


def test_the_real_mlx_file(real: Path) -> None:
    """llm.md trap 18: the scale is used as it is; the alpha beside it is a decoy."""
    path = real / "llm" / "mlx-qwen2.5-0.5b"
    adapter = loratool.read(path)
    assert adapter.metadata.format == "mlx" and len(adapter.updates) == 8
    assert {update.scaling for update in adapter.updates.values()} == {10.0}
    found = fused_by_mlx(path)
    for name, update in adapter.updates.items():
        assert np.allclose(delta(update), found[name], rtol=1e-12, atol=0)
    name = "model.layers.23.self_attn.v_proj"
    assert adapter.updates[name].shape == (128, 896)


def test_the_real_mlx_file_there_and_back(real: Path, tmp_path: Path) -> None:
    path = real / "llm" / "mlx-qwen2.5-0.5b"
    out = written(loratool.read(path), tmp_path, "mlx")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["num_layers"] == 4
    assert config["lora_parameters"] == {
        "rank": 8, "alpha": 16, "dropout": 0.0, "scale": 10.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]
    }  # fmt: skip
    one, other = (read_safetensors(folder / "adapters.safetensors").tensors for folder in (path, out))
    assert one.keys() == other.keys()
    assert all(tensor.same_bytes(other[name]) for name, tensor in one.items())


def test_mlx_has_one_scale_and_one_rank(tmp_path: Path) -> None:
    names = list(BODY)[:4]
    updates = {
        names[0]: low(LLAMA[names[0]], 4, 8.0),
        names[1]: low(LLAMA[names[1]], 4, 8.0),
        names[2]: low(LLAMA[names[2]], 2, 3.0, dtype="BF16"),
        names[3]: low(LLAMA[names[3]], 3, 6.0, rank_stabilised=True),
    }
    adapter = Adapter(updates, {}, Metadata("sample", base_config=CONFIG))
    out = written(adapter, tmp_path, "mlx")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 2
    assert {k: config["lora_parameters"][k] for k in ("rank", "scale", "dropout")} == {
        "rank": 4,
        "scale": 2.0,
        "dropout": 0.0,
    }
    for name, found in fused_by_mlx(out).items():
        assert np.allclose(found, delta(updates[name]), rtol=1e-6, atol=1e-6), name
    tensors = read_safetensors(out / "adapters.safetensors").tensors
    assert {t.shape[1] for k, t in tensors.items() if k.endswith("lora_a")} == {4}
    assert tensors[f"{names[0]}.lora_a"].shape == (HIDDEN, 4)
    llm.assert_same_deltas(adapter, loratool.read(out))


@pytest.mark.parametrize(
    ("config", "keys", "layers"), [(CONFIG, "self_attn.k_proj", 1), ({}, "model.layers.1.self_attn.k_proj", -1)]
)
def test_mlx_names_modules_within_layers_where_their_number_is_known(
    config: Mapping[str, Any], keys: str, layers: int, tmp_path: Path
) -> None:
    """`keys` are names within the last `num_layers`, or whole; mlx-lm refuses tensors that it did not expect."""
    name = "model.layers.1.self_attn.k_proj"
    out = written(llm.adapter({name: LLAMA[name], "model.embed_tokens": (VOCAB, HIDDEN)}, config), tmp_path, "mlx")
    found = json.loads((out / "adapter_config.json").read_text())
    assert found["num_layers"] == layers
    assert set(found["lora_parameters"]["keys"]) == {keys, "model.embed_tokens"}


@pytest.mark.parametrize("where", ["mlp", "block_sparse_moe"])
def test_mlx_experts(where: str, tmp_path: Path) -> None:
    leaves = {"mlp": ("gate_proj", "down_proj"), "block_sparse_moe": ("w1", "w2")}[where]
    shapes = dict(zip(leaves, ((INNER, HIDDEN), (HIDDEN, INNER)), strict=True))
    adapter = llm.adapter(llm.experts(shapes, f"{where}.experts"), {"num_local_experts": 4})
    out = written(adapter, tmp_path, "mlx")
    found = fused_by_mlx(out)
    for leaf, other in zip(leaves, ("gate_proj", "down_proj"), strict=True):
        stack = found[f"model.layers.0.{where}.switch_mlp.{other}"]
        assert len(stack) == 4 and not stack[3].any()
        for n in range(3):
            expected = delta(adapter.updates[f"model.layers.0.{where}.experts.{n}.{leaf}"])
            assert np.allclose(stack[n], expected, rtol=1e-6, atol=1e-6)
    again = loratool.read(out)
    kept = {name: update for name, update in again.updates.items() if name in adapter.updates}
    llm.assert_same_deltas(adapter, replace(again, updates=kept))
    assert not any(delta(again.updates[name]).any() for name in again.updates.keys() - kept.keys())


def test_older_stacks_of_experts_are_flat(tmp_path: Path) -> None:
    down, up = normal(6, HIDDEN), normal(3, INNER, 2)
    key = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {f"{key}.lora_a": down, f"{key}.lora_b": up}
    adapter = loratool.read(mlx_folder(tmp_path / "x", tensors))
    for n in range(3):
        expected = 20.0 * up.array()[n] @ down.array()[2 * n : 2 * n + 2]
        assert np.allclose(
            delta(adapter.updates[f"model.layers.0.mlp.experts.{n}.up_proj"]), expected, rtol=1e-5, atol=1e-5
        )


def test_mlx_dora(tmp_path: Path) -> None:
    """m is one norm a row of the weight, of an Embedding too; PEFT's is another there, and so a loss."""
    plain = low(LLAMA["model.layers.1.mlp.up_proj"])
    table = low((VOCAB, HIDDEN), layer="embedding")
    updates = {
        "model.layers.1.mlp.up_proj": DoRA(plain, magnitude(INNER)),
        "model.embed_tokens": DoRA(table, magnitude(VOCAB)),
    }
    adapter = Adapter(updates, {}, Metadata("sample", base_config=CONFIG))
    out = written(adapter, tmp_path, "mlx")
    assert json.loads((out / "adapter_config.json").read_text())["fine_tune_type"] == "dora"
    again = loratool.read(out)
    llm.assert_same_deltas(adapter, again)
    weight = normal(VOCAB, HIDDEN, seed=77).array()
    value = weight + delta(table)
    expected = updates["model.embed_tokens"].magnitude.array()[:, None] * value / np.linalg.norm(value, axis=1)[:, None]
    assert np.allclose(again.updates["model.embed_tokens"].apply(weight), expected, atol=1e-5)
    by_dim = DoRA(table, magnitude(HIDDEN), axis=1)
    with pytest.raises(LossError, match="1 of 1") as caught:
        written(replace(adapter, updates={"model.embed_tokens": by_dim}), tmp_path, "mlx", "y")
    assert "for each input" in caught.value.losses[0]


TIED = {**CONFIG, "tie_word_embeddings": True}
UNHEADED = {name: shape for name, shape in LLAMA.items() if name != "lm_head"}


def test_to_mlx_a_tied_embedding_is_also_the_output_projection(tmp_path: Path) -> None:
    """llm.md trap 38: one LoRA of both ends; merged once, the tie stays."""
    adapter = llm.adapter({"model.embed_tokens": (VOCAB, HIDDEN)}, CONFIG)
    out, base = written(adapter, tmp_path, "mlx"), llm.base(tmp_path / "base", UNHEADED, TIED)
    assert loratool.read(out).updates.keys() == {"model.embed_tokens"}
    both = loratool.read(out, base=base)
    assert both.updates.keys() == {"model.embed_tokens", "lm_head"}
    table = both.updates["model.embed_tokens"]
    assert np.array_equal(delta(both.updates["lm_head"]), delta(table))
    loratool.merge(base, out, out=tmp_path / "merged")
    merged = read_safetensors(tmp_path / "merged" / "model.safetensors").tensors
    weight = read_safetensors(base / "model.safetensors").tensors["model.embed_tokens.weight"].array()
    assert np.allclose(merged["model.embed_tokens.weight"].array(), weight + delta(table), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    again = written(both, tmp_path, "mlx", "again")
    assert (again / "adapters.safetensors").read_bytes() == (out / "adapters.safetensors").read_bytes()


@pytest.mark.parametrize("names", [["lm_head"], ["model.embed_tokens"], ["lm_head", "model.embed_tokens"]])
def test_one_end_of_a_tied_pair_is_a_loss_to_mlx(names: list[str], tmp_path: Path) -> None:
    adapter = llm.adapter({name: LLAMA[name] for name in names}, TIED)
    with pytest.raises(LossError) as caught:
        written(adapter, tmp_path, "mlx")
    assert [loss.partition(":")[0] for loss in caught.value.losses] == names
    if "lm_head" in names:
        with pytest.raises(LossError):
            written(adapter, tmp_path, "torchtune")


def mlx_folder(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    path.mkdir()
    write_safetensors(path / "adapters.safetensors", tensors, {})
    usual = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}
    (path / "adapter_config.json").write_text(json.dumps(usual if config is None else config))
    return path


def mlx_pair(module: str = "model.layers.0.self_attn.q_proj", rank: int = 2) -> dict[str, Tensor]:
    return {f"{module}.lora_a": normal(HIDDEN, rank), f"{module}.lora_b": normal(rank, Q * HEAD)}


def test_mlx_full_fine_tuning_is_carried_whole(tmp_path: Path) -> None:
    path = mlx_folder(
        tmp_path / "x", {"model.norm.weight": normal(4), "model.wte.weight": normal(3, 4)}, {"fine_tune_type": "full"}
    )
    adapter = loratool.read(path)
    assert not adapter.updates and adapter.carried.keys() == {"model.norm.weight", "transformer.wte.weight"}


def test_older_versions_of_mlx_vlm(tmp_path: Path) -> None:
    """llm.md trap 33: their scale was alpha, then alpha / rank; the file does not tell which."""
    tensors = {"language_model.model.layers.0.self_attn.q_proj.A": normal(HIDDEN, 2)}
    tensors["language_model.model.layers.0.self_attn.q_proj.B"] = normal(2, Q * HEAD)
    path = mlx_folder(tmp_path / "x", tensors, {"rank": 2, "alpha": 16.0, "dropout": 0.0})
    assert loratool.detect(path)[0] == "mlx"
    with pytest.raises(FormatError, match="scaling"):
        loratool.convert(path, tmp_path / "y", to="peft")
    (update,) = loratool.read(path, reading=scaled(8.0)).updates.values()
    a, b = (tensor.array() for tensor in tensors.values())
    assert np.allclose(delta(update), 8.0 * (a @ b).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"lora_parameters": {"rank": 2, "alpha": 16, "dropout": 0.0}}, "has no lora_parameters.scale"),
        ({"rank": 2, "alpha": 16.0, "dropout": 0.0}, "mlx-vlm used to multiply by alpha"),  # llm.md trap 33
        ({}, "no adapter_config.json"),
    ],
)
def test_mlx_without_a_scale_is_refused_unless_told(config: dict[str, Any], word: str, tmp_path: Path) -> None:
    path = mlx_folder(tmp_path / "x", mlx_pair(), config)
    assert any(word in warning for warning in loratool.inspect(path).warnings)
    with pytest.raises(FormatError, match="does not tell its scaling") as caught:
        loratool.convert(path, tmp_path / "y", to="peft")
    assert "--scaling" in caught.value.hint
    assert {u.scaling for u in loratool.read(path, reading=scaled(3.0)).updates.values()} == {3.0}


def test_snapshots_of_mlx_have_the_folder_s_configuration(tmp_path: Path) -> None:
    path = mlx_folder(tmp_path / "x", mlx_pair())
    write_safetensors(path / "0000100_adapters.safetensors", mlx_pair(rank=3), {})
    adapter = loratool.read(path / "0000100_adapters.safetensors")
    assert [(u.rank, u.scaling) for u in adapter.updates.values()] == [(3, 20.0)]


@pytest.mark.parametrize(
    ("tensors", "config", "what"),
    [
        ({"m.lora_a": normal(4, 2)}, None, "half a pair"),
        ({"m.lora_a": normal(4, 2), "m.lora_b": normal(3, 5)}, None, "rank mismatch"),
        ({"m.lora_a": normal(4), "m.lora_b": normal(4)}, None, "no matrix"),
        ({**mlx_pair(), "model.norm.weight": normal(3)}, None, "meaning is unknown"),
        (mlx_pair(), {"fine_tune_type": "dora", "lora_parameters": {"scale": 1.0}}, "magnitudes are missing"),
        (mlx_pair(), {"lora_parameters": {"scale": "big"}}, "not a number"),
        (mlx_pair(), {"lora_parameters": {"scale": True}}, "not a number"),
        ({"x.y.proj.lora_a": normal(2, 2, 4), "x.y.proj.lora_b": normal(2, 3, 2)}, None, "not known"),
        (
            {f"a.b.mlp.switch_mlp.up_proj.lora_{h}": normal(n, 3, 3) for h, n in (("a", 2), ("b", 3))},
            None,
            "stacks of 2 and 3",
        ),
    ],
)
def test_malformed_mlx_is_refused(tensors: Any, config: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=what):
        loratool.read(mlx_folder(tmp_path / "x", tensors, config))


# -- npz -----------------------------------------------------------------------------------------------------------


def npz(path: Path, arrays: Mapping[str, np.ndarray], packed: bool = False) -> Path:
    (np.savez_compressed if packed else np.savez)(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, "V2"])
def test_npz(dtype: Any, packed: bool, tmp_path: Path) -> None:
    """llm.md trap 68: nothing tells the scaling of an npz, and nothing is guessed."""
    tensors = {name: tensor.array() for name, tensor in mlx_pair().items()}
    half = {name: Tensor.of(values, "BF16").array() for name, values in tensors.items()}
    stored = (
        {n: v.view(np.uint16).view("V2") for n, v in half.items()}
        if dtype == "V2"
        else {n: v.astype(dtype) for n, v in tensors.items()}
    )
    path = npz(tmp_path / "adapters.npz", stored, packed)
    with pytest.raises(FormatError, match="scaling"):
        loratool.convert(path, tmp_path / "y", to="peft")
    for place in (path, tmp_path):
        adapter = loratool.read(place, reading=scaled(2.0))
        (update,) = adapter.updates.values()
        a, b = (np.asarray(half[n] if dtype == "V2" else stored[n], np.float64) for n in stored)
        assert np.allclose(delta(update), 2.0 * b.T @ a.T, rtol=1e-6, atol=1e-6)
        assert update.slots["down"].dtype == {"V2": "BF16", np.float16: "F16", np.float64: "F64"}.get(dtype, "F32")
        assert np.array_equal(update.slots["up"].load(3, 5), update.slots["up"].array()[3:5])


def member(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def described(descr: str = "'<f4'", shape: str = "(2, 2)", order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"
    return (text + "\n").encode()


HOSTILE = [
    ("dtype .O", member(described("'|O'"), bytes(32))),
    ("malformed header", member(b"__import__('os').mkdir('run')\n")),
    ("no tensor's", member(described("[('a', '<f4')]"), bytes(16))),
    ("no tensor's", member(described("'<U4'"), bytes(64))),
    ("bytes do not hold", member(described(shape="(99999999999, 99999999999)"), bytes(16))),
    ("bytes do not hold", member(described(shape=f"({1 << 47}, {1 << 47}, {1 << 47})"), bytes(16))),
    ("is no shape", member(described(shape="(-2, -2)"), bytes(16))),
    ("is no shape", member(described(shape=f"({1 << 50},)"), bytes(16))),
    ("15 bytes do not hold", member(described(), bytes(15))),
    ("17 bytes do not hold", member(described(), bytes(17))),
    ("malformed header", member(described(shape="(2, 2)") + b" " * 20_000, bytes(16))),
    ("malformed header", b"hello"),
    ("malformed header", b""),
    ("npy version|malformed header", b"\x93NUMPY\x09\x00" + bytes(64)),
    ("malformed header", member(b"(" * 5000)),
]


@pytest.mark.parametrize(("what", "content"), HOSTILE)
def test_hostile_members_of_an_npz_are_refused(what: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "adapters.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m.lora_a.npy", content)
    with pytest.raises(FormatError, match=what):
        loratool.inspect(path)
    assert not Path("run").exists()


def test_hostile_npz_archives_are_refused(tmp_path: Path) -> None:
    good = member(described(), bytes(16))
    twice, bomb = tmp_path / "twice.npz", tmp_path / "bomb.npz"
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("m.npy", good)
        archive.writestr("m.npy", good)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m.npy", member(described(shape="(1000, 1000)"), bytes(4_000_000)))
    data = bytearray(bomb.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 20 : at + 24] = (100).to_bytes(4, "little")  # a hundred bytes claim to hold four million
    bomb.write_bytes(data)
    for path, what in ((twice, "occurs twice"), (bomb, "100 bytes claim to unpack to 4,000,")):
        with pytest.raises(FormatError, match=what):
            loratool.inspect(path)
    whole = npz(
        tmp_path / "x.npz", {"m.lora_a": np.ones((40, 2), np.float32), "m.lora_b": np.ones((2, 30), np.float32)}, True
    )
    content = whole.read_bytes()
    for length in range(4, len(content), 61):
        whole.write_bytes(content[:length])
        with pytest.raises(FormatError):
            loratool.inspect(whole)
    damaged = bytearray(content)
    damaged[70:90] = bytes(20)
    whole.write_bytes(damaged)
    with pytest.raises(FormatError):
        loratool.read(whole).updates["m"].slots["up"].array()


# -- torchtune -----------------------------------------------------------------------------------------------------


def state_of(path: Path) -> dict[str, np.ndarray]:
    state = torch.load(path, weights_only=True)
    return {name: tensor.double().numpy() for name, tensor in state.get("model", state).items()}


TORCHTUNE = {
    "model.": "",
    "self_attn.o_proj": "attn.output_proj",
    "self_attn": "attn",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "lm_head": "output",
}


def torchtune_names(name: str) -> str:
    for old, new in TORCHTUNE.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize(
    ("model_type", "turned"), [("llama", True), ("mistral", True), ("gemma2", True), ("qwen2", False)]
)
def test_torchtune(model_type: str, turned: bool, tmp_path: Path) -> None:
    """llm.md trap 45: rows of q and k in pairs; torchtune leaves Qwen's as they are."""
    shapes = {name: shape for name, shape in LLAMA.items() if name != "model.embed_tokens"}
    adapter = llm.adapter(shapes, {**CONFIG, "model_type": model_type}, rank=4, alpha=8.0, dtype="BF16")
    out = written(adapter, tmp_path, "torchtune")
    found = state_of(out)
    assert len(found) == 2 * len(shapes)
    for name, update in adapter.updates.items():
        module = torchtune_names(name)
        product = 2.0 * found[f"{module}.lora_b.weight"] @ found[f"{module}.lora_a.weight"]
        heads = {"q_proj": Q, "k_proj": KV}.get(name.rpartition(".")[2]) if turned else None
        expected = delta(update) if heads is None else pairs(delta(update), heads)
        assert np.allclose(product, expected, rtol=1e-9, atol=1e-9), name
    base = llm.base(tmp_path / "base", config=adapter.metadata.base_config)
    llm.assert_same_deltas(adapter, loratool.read(out, base=base, reading=scaled(2.0)))


def test_torchtune_s_scaling_is_in_the_configuration_beside(tmp_path: Path) -> None:
    adapter = llm.adapter(BODY, rank=4, alpha=8.0)
    adapter.updates["model.layers.0.mlp.up_proj"] = low(LLAMA["model.layers.0.mlp.up_proj"], 2, 5.0)  # type: ignore[index]
    out = written(adapter, tmp_path, "torchtune", "adapter_0.pt")
    base = llm.base(tmp_path / "base")
    with pytest.raises(FormatError, match="pickle"):
        loratool.read(out)
    with pytest.raises(FormatError, match="scaling"):
        loratool.convert(out, tmp_path / "y", to="peft", base=base, reading=PICKLES)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"}))
    again = loratool.read(out, base=base, reading=PICKLES)
    assert again.metadata.format == "torchtune"
    llm.assert_same_deltas(adapter, again)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 8}))
    with pytest.raises(FormatError, match="says rank 8"):
        loratool.read(out, base=base, reading=PICKLES)


def test_torchtune_magnitudes_turn_with_their_rows(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj"
    update = DoRA(low(LLAMA[name]), magnitude(KV * HEAD))
    adapter = Adapter({name: update}, {}, Metadata("sample", base_config=CONFIG))
    out = written(adapter, tmp_path, "torchtune")
    stored = state_of(out)["layers.0.attn.k_proj.magnitude"]
    assert np.array_equal(stored, pairs(update.magnitude.array()[:, None], KV)[:, 0])
    llm.assert_same_deltas(adapter, loratool.read(out, base=llm.base(tmp_path / "base"), reading=scaled(2.0)))


def test_torchtune_without_a_base_shows_headers_only(tmp_path: Path) -> None:
    out = written(llm.adapter(BODY), tmp_path, "torchtune")
    assert len(loratool.inspect(out, reading=PICKLES).targets) == len(BODY)
    blind = loratool.read(out, reading=scaled(2.0))
    with pytest.raises(FormatError, match="goes by the base"):
        delta(blind.updates["model.layers.0.self_attn.q_proj"])
    with pytest.raises(FormatError, match="goes by the base"):
        written(llm.adapter(BODY, {}), tmp_path, "torchtune", "y")
    with pytest.raises(FormatError, match="not known for models of type phi3"):
        written(llm.adapter(BODY, {**CONFIG, "model_type": "phi3"}), tmp_path, "torchtune", "y")


# -- mistral-finetune ----------------------------------------------------------------------------------------------


MIXTRAL = {
    "model.layers.0.self_attn.q_proj": (Q * HEAD, HIDDEN),
    "model.layers.0.self_attn.k_proj": (KV * HEAD, HIDDEN),
    "model.layers.0.block_sparse_moe.gate": (3, HIDDEN),
    **llm.experts({"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}, "block_sparse_moe.experts"),
}


@pytest.mark.parametrize("shapes", [BODY, MIXTRAL])
@pytest.mark.parametrize(
    "more", [{}, {"rank": 4, "alpha": 8.0, "dtype": "BF16"}, {"rank": 4, "alpha": 4.0, "dtype": "F16"}]
)
def test_mistral(shapes: Mapping[str, llm.Shape], more: dict[str, Any], tmp_path: Path) -> None:
    """llm.md traps 32, 45: the scaling is whoever loads the file's, 2.0; one dtype; rows of q and k in pairs."""
    adapter = llm.adapter(shapes, **more)
    out = written(adapter, tmp_path, "mistral")
    file = read_safetensors(out)
    assert len({tensor.dtype for tensor in file.tensors.values()}) == 1
    assert all("lora" in key for key in file.tensors)
    for name, update in adapter.updates.items():
        module = (
            name.replace("model.", "", 1).replace("block_sparse_moe", "feed_forward").replace("mlp", "feed_forward")
        )
        for leaf, other in (
            ("q", "wq"),
            ("k", "wk"),
            ("v", "wv"),
            ("o", "wo"),
            ("gate", "w1"),
            ("down", "w2"),
            ("up", "w3"),
        ):
            module = module.replace(f"self_attn.{leaf}_proj", f"attention.{other}").replace(f"{leaf}_proj", other)
        a, b = (file.tensors[f"{module}.lora_{half}.weight"].float().astype(np.float64) for half in "AB")
        heads = {"q_proj": Q, "k_proj": KV}.get(name.rpartition(".")[2])
        expected = delta(update) if heads is None else pairs(delta(update), heads)
        assert np.allclose(2.0 * b @ a, expected, rtol=1e-6, atol=1e-6), name
    llm.assert_same_deltas(adapter, loratool.read(out))  # the heads and the scaling are noted


def test_mistral_s_tensors_have_one_dtype(tmp_path: Path) -> None:
    """The one that most have; what rounding the others loses is named, and only that (CLI law 1)."""
    shapes = {name: shape for name, shape in BODY.items() if "v_proj" in name}
    adapter = llm.adapter(shapes, rank=4, alpha=8.0, dtype="BF16")
    wide, same = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
    rounded = low(LLAMA[same], 4, 8.0, dtype="BF16")
    exact = replace(rounded, down=rounded.down.cast("F32"), up=rounded.up.cast("F32"))
    mixed = replace(adapter, updates={**adapter.updates, wide: low(LLAMA[wide], 4, 8.0), same: exact})
    losses = by_name("mistral").losses(mixed)
    assert [loss.name for loss in losses] == [wide] and "rounds lora_A and lora_B to BF16" in losses[0].reason
    by_name("mistral").write(mixed, tmp_path / "out.safetensors")
    tensors = read_safetensors(tmp_path / "out.safetensors").tensors
    assert {tensor.dtype for tensor in tensors.values()} == {"BF16"}
    found = tensors["layers.1.feed_forward.w3.lora_A.weight"].array()
    assert np.array_equal(found, low(LLAMA[wide], 4).down.cast("BF16").array())


@pytest.mark.parametrize("format", ["mlx", "gguf", "tinker"])
def test_what_a_format_without_float64_rounds_is_a_loss(format: str) -> None:
    """Named by module; values that float32 holds are said in silence (CLI law 1)."""
    module = "model.layers.1.self_attn.v_proj"
    down, up = normal(4, LLAMA[module][1]).array().astype(np.float64), normal(LLAMA[module][0], 4)
    exact, wide = (LowRank(Tensor.of(values), up, alpha=8.0) for values in (down, down / 3.0))
    adapter = llm.adapter({module: LLAMA[module]}, rank=4, alpha=8.0)
    assert not by_name(format).losses(replace(adapter, updates={module: exact}))
    (loss,) = by_name(format).losses(replace(adapter, updates={module: wide}))
    assert loss.name == module and "down would be rounded to float32" in loss.reason


def test_a_scaling_that_mistral_s_dtype_cannot_hold_is_a_loss(tmp_path: Path) -> None:
    """Its 2.0 leaves a factor of 0.15 to lora_B, which bfloat16 rounds; a power of two is said exactly."""
    shapes = {name: shape for name, shape in BODY.items() if "v_proj" in name}
    losses = by_name("mistral").losses(llm.adapter(shapes, rank=4, alpha=1.2, dtype="BF16"))
    assert [loss.name for loss in losses] == list(shapes)
    assert all("rounds lora_B to BF16" in loss.reason for loss in losses)
    assert not by_name("mistral").losses(llm.adapter(shapes, rank=4, alpha=1.0, dtype="BF16"))
    assert not by_name("mistral").losses(llm.adapter(shapes, rank=4, alpha=1.2))


def foreign_mistral(folder: Path, params: Any = None) -> tuple[Path, Adapter]:
    """A file as mistral-finetune leaves it, and what it means at a scaling of 2."""
    adapter = llm.adapter(BODY, rank=4, alpha=8.0)
    file = read_safetensors(written(adapter, folder, "mistral", "ours"))
    path = folder / "checkpoint" / "lora.safetensors"
    path.parent.mkdir()
    write_safetensors(path, file.tensors, {})
    if params is not None:
        (path.parent / "params.json").write_text(json.dumps(params))
    return path, adapter


def test_mistral_parameters_beside_the_file(tmp_path: Path) -> None:
    params = {
        "dim": 20,
        "n_heads": Q,
        "n_kv_heads": KV,
        "head_dim": HEAD,
        "lora": {"enable": True, "rank": 4, "scaling": 2.0},
    }
    path, adapter = foreign_mistral(tmp_path, params)
    for place in (path, path.parent):
        llm.assert_same_deltas(adapter, loratool.read(place))
    assert {u.scaling for u in loratool.read(path, reading=scaled(1.0)).updates.values()} == {1.0}
    (path.parent / "params.json").write_text(json.dumps({"lora": {"scaling": "much"}}))
    with pytest.raises(FormatError, match="not a number"):
        loratool.read(path)


def test_mistral_without_parameters_is_refused_unless_told(tmp_path: Path) -> None:
    path, adapter = foreign_mistral(tmp_path)
    assert loratool.detect(path)[0] == "mistral"
    assert loratool.inspect(path).targets[0].scaling is None
    base = llm.base(tmp_path / "base")
    with pytest.raises(FormatError, match="scaling") as caught:
        loratool.convert(path, tmp_path / "y", to="peft", base=base)
    assert "--scaling" in caught.value.hint
    llm.assert_same_deltas(adapter, loratool.read(path, base=base, reading=scaled(2.0)))
    with pytest.raises(FormatError, match="heads are unknown"):
        loratool.convert(path, tmp_path / "y", to="peft", reading=scaled(2.0))


# -- what plain LoRA cannot say ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [f.name for f in FORMATS if f.writes and "dora" not in f.kinds])
def test_a_magnitude_is_never_dropped_in_silence(format: str, tmp_path: Path) -> None:
    """llm trap 26: PEFT's own conversion to LoRA drops it, and the weights are others'."""
    name = "model.layers.0.self_attn.v_proj"
    update = DoRA(low(LLAMA[name], 2), Tensor.of(np.ones(LLAMA[name][0], np.float32)))
    adapter = replace(llm.adapter({}), updates={name: update})
    assert [loss.name for loss in by_name(format).losses(adapter)] == [name]
    with pytest.raises(LossError):
        loratool.write(adapter, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


# -- from any to any -----------------------------------------------------------------------------------------------

LANGUAGES = [f.name for f in FORMATS if f.writes and f.name not in (*IMAGE_FORMATS, "onnx-adapter")]


WHOLE = {**CONFIG, "intermediate_size": INNER, "vocab_size": VOCAB}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llm.base(tmp_path_factory.mktemp("any") / "base", config=WHOLE)


@examples(40)
@given(data=st.data())
def test_any_adapter_keeps_its_deltas_from_any_dialect_to_any(
    data: st.DataObject, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever modules, ranks, alphas and dtypes; what a dialect cannot say it names, and changes nothing else."""
    names = data.draw(st.lists(st.sampled_from(sorted(LLAMA)), min_size=1, max_size=5, unique=True), label="modules")
    updates: dict[str, Update] = {}
    for seed, name in enumerate(names):
        rank, alpha = data.draw(st.integers(1, 5)), data.draw(st.sampled_from((None, 0.3, 4.0, 7e4)))
        dtype, stable = data.draw(st.sampled_from(("F32", "BF16", "F16"))), data.draw(st.booleans())
        layer: Any = "embedding" if name.endswith("embed_tokens") else "plain"
        updates[name] = low(LLAMA[name], rank, alpha, dtype, 2 * seed, rank_stabilised=stable, layer=layer)
    source = adapter = Adapter(updates, {}, Metadata("raw", base_config=WHOLE))
    way = data.draw(st.lists(st.sampled_from(LANGUAGES), min_size=2, max_size=4), label="way")
    out = tmp_path_factory.mktemp("way")
    for number, to in enumerate(way):
        format = by_name(to)
        lost = {loss.name for loss in format.losses(adapter)}
        if lost:
            assert lost <= {adapter.spelling(name) for name in adapter.updates}, (to, lost)
            continue
        path = written(adapter, out, to, f"{number}")
        told = shared.Uniform.of(adapter.updates.values()).scaling if to in ("loralib", "torchtune") else None
        reading = loratool.Reading(allow_pickle=True, scaling=told)
        adapter = loratool.read(path, base=folder, reading=reading)
        assert not any(
            delta(u).any() for n, u in adapter.updates.items() if n not in updates
        )  # the rest of what is fused
        llm.assert_same_deltas(source, replace(adapter, updates={n: adapter.updates[n] for n in updates}), 3e-6)


# -- Tinker --------------------------------------------------------------------------------------------------------

PREFIX = "base_model.model.model"


def tinker_file(folder: Path, tensors: Mapping[str, Tensor], config: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {})
    told = {"r": 2, "lora_alpha": 8, "peft_type": "LORA"} if config is None else config
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def tinker_pair(module: str, down: tuple[int, ...], up: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    return {
        f"{PREFIX}.{module}.lora_A.weight": normal(*down, seed=seed),
        f"{PREFIX}.{module}.lora_B.weight": normal(*up, seed=seed + 1),
    }


@pytest.mark.parametrize(("a", "b"), [(3, 3), (1, 3), (3, 1)])
def test_tinker_experts_are_shared_or_each_its_own(a: int, b: int, tmp_path: Path) -> None:
    tensors = tinker_pair("layers.0.mlp.experts.w1", (a, 2, HIDDEN), (b, INNER, 2))
    tensors |= tinker_pair("layers.0.mlp.experts.w3", (a, 2, HIDDEN), (b, INNER, 2), 4)
    tensors |= tinker_pair("layers.0.mlp.experts.w2", (a, 2, INNER), (b, HIDDEN, 2), 8)
    adapter = loratool.read(tinker_file(tmp_path / "x", tensors))
    assert adapter.metadata.format == "tinker" and len(adapter.updates) == 9
    for word, leaf in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        down, up = (tensors[f"{PREFIX}.layers.0.mlp.experts.{word}.lora_{h}.weight"].array() for h in "AB")
        for n in range(3):
            expected = 4.0 * up[n if b > 1 else 0] @ down[n if a > 1 else 0]
            found = delta(adapter.updates[f"model.layers.0.mlp.experts.{n}.{leaf}"])
            assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_tinker_s_output_projection_goes_where_the_base_has_it(tmp_path: Path) -> None:
    """llm.md trap 42: of a tied model it is the embedding."""
    tensors = tinker_pair("unembed_tokens", (2, HIDDEN), (VOCAB, 2))
    folder = tinker_file(tmp_path / "x", tensors)
    weights = [tensor.array() for tensor in tensors.values()]
    expected = 4.0 * weights[1] @ weights[0]
    assert np.allclose(delta(loratool.read(folder).updates["lm_head"]), expected, rtol=1e-5)
    tied = llm.base(
        tmp_path / "tied", {n: s for n, s in LLAMA.items() if n != "lm_head"}, {**CONFIG, "tie_word_embeddings": True}
    )
    update = loratool.read(folder, base=tied).updates["model.embed_tokens"]
    assert update.shape == (VOCAB, HIDDEN) and np.allclose(delta(update), expected, rtol=1e-5)
    assert loratool.read(folder, base=llm.base(tmp_path / "base")).updates.keys() == {"lm_head"}


def test_tinker_s_parts_of_a_fused_projection(tmp_path: Path) -> None:
    where = "layers.1.linear_attn"
    rows = {"in_proj_q": 8, "in_proj_k": 8, "in_proj_v": 12}
    tensors = {
        k: t
        for n, (part, o) in enumerate(rows.items())
        for k, t in tinker_pair(f"{where}.{part}", (2, 20), (o, 2), 3 * n).items()
    }
    adapter = loratool.read(tinker_file(tmp_path / "x", tensors))
    (name,) = adapter.updates
    assert name == f"model.{where}.in_proj_qkv"
    parts = [
        4.0
        * tensors[f"{PREFIX}.{where}.{p}.lora_B.weight"].array()
        @ tensors[f"{PREFIX}.{where}.{p}.lora_A.weight"].array()
        for p in rows
    ]
    assert np.allclose(delta(adapter.updates[name]), np.concatenate(parts), rtol=1e-5, atol=1e-5)
    lacking = {key: tensor for key, tensor in tensors.items() if "in_proj_k" not in key}
    with pytest.raises(FormatError, match="places are unknown"):
        loratool.read(tinker_file(tmp_path / "y", lacking))


def test_tinker_names_of_gpt_oss_and_empty_projections(tmp_path: Path) -> None:
    tensors = tinker_pair("layers.0.attn.q_proj", (2, 20), (24, 2)) | tinker_pair("unembed_tokens", (2, 20), (9, 2))
    tensors |= tinker_pair("layers.0.mlp.experts.w3", (3, 0, 20), (3, 14, 0))
    assert loratool.read(tinker_file(tmp_path / "x", tensors)).updates.keys() == {
        "model.layers.0.self_attn.q_proj",
        "lm_head",
    }


def test_an_ordinary_adapter_of_tinker_is_peft_s(tmp_path: Path) -> None:
    folder = tinker_file(tmp_path / "x", tinker_pair("layers.0.self_attn.q_proj", (2, 20), (24, 2)))
    assert loratool.detect(folder)[0] == "peft"


@pytest.mark.parametrize("more", [{}, {"rank": 4, "alpha": 1.0, "dtype": "BF16"}])
def test_tinker_there_and_back(more: dict[str, Any], tmp_path: Path) -> None:
    shapes = {n: s for n, s in LLAMA.items() if "embed" not in n} | llm.experts(
        {"gate_proj": (14, 20), "down_proj": (20, 14)}
    )
    adapter = llm.adapter(shapes, **more)
    adapter.updates["lm_head"] = low(shapes["lm_head"], 2, 7.0)  # type: ignore[index]
    out = written(adapter, tmp_path, "tinker")
    keys = read_safetensors(out).tensors
    assert keys[f"{PREFIX}.layers.0.mlp.experts.w1.lora_B.weight"].shape[:2] == (3, 14)
    assert f"{PREFIX}.unembed_tokens.lora_A.weight" in keys
    again = loratool.read(out)
    assert again.metadata.format == "tinker"
    llm.assert_same_deltas(adapter, again)


@pytest.mark.parametrize(
    ("config", "what"),
    [({"r": 2, "lora_alpha": 8, "use_rslora": True}, "use_rslora"), ({"r": 4, "lora_alpha": 8}, "says rank 4"),
     ({"r": 2, "lora_alpha": "x"}, "not a number"), ([], "not a JSON object")],
)  # fmt: skip
def test_odd_configurations_of_tinker_are_refused(config: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=what):
        loratool.read(tinker_file(tmp_path / "x", tinker_pair("unembed_tokens", (2, 20), (9, 2)), config))


# -- LitGPT --------------------------------------------------------------------------------------------------------


def litgpt_delta(
    state: Mapping[str, np.ndarray], module: str, flags: tuple[bool, ...], sizes: tuple[int, ...]
) -> np.ndarray:
    """LoRAQKVLinear.get_lora_AB without its scaling: part i of lora_A meets its rows of lora_B; zeros elsewhere."""
    a, b = state[f"{module}.lora_A"], state[f"{module}.lora_B"]
    r, row, group, found = b.shape[1], 0, 0, []
    for on, size in zip(flags, sizes, strict=True):
        if on:
            found.append(b[row : row + size] @ a[group * r : (group + 1) * r])
            row, group = row + size, group + 1
        else:
            found.append(np.zeros((size, a.shape[1])))
    return np.concatenate(found)


FULL = {**CONFIG, "intermediate_size": INNER}
SIZES = (Q * HEAD, KV * HEAD, KV * HEAD)


@pytest.mark.parametrize(
    "leaves", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj"), ("k_proj",), ("o_proj", "up_proj", "v_proj")]
)
@pytest.mark.parametrize("more", [{"rank": 4, "alpha": 8.0}, {"alpha": 2.0, "dtype": "BF16"}])
def test_litgpt(leaves: tuple[str, ...], more: dict[str, Any], tmp_path: Path) -> None:
    """llm.md trap 47: q, k and v in one pair of factors, and split again at the same rank."""
    shapes = {name: shape for name, shape in BODY.items() if name.endswith(leaves)}
    shapes.pop(f"model.layers.0.self_attn.{leaves[0]}")  # a layer that lacks one: zeros
    adapter = llm.adapter(shapes, FULL, **more)
    out = written(adapter, tmp_path, "litgpt", "lit_model.pth.lora")
    state, hyper = state_of(out), torch.load(out, weights_only=True)["hyperparameters"]
    scaling = hyper["lora_alpha"] / hyper["lora_r"]
    flags = tuple(f"{part}_proj" in leaves for part in "qkv")
    assert tuple(hyper[f"lora_{part}"] for part in ("query", "key", "value")) == flags
    assert hyper["lora_mlp"] is ("up_proj" in leaves) and hyper["lora_projection"] is ("o_proj" in leaves)
    per_layer = any(flags) + ("o_proj" in leaves) + 3 * ("up_proj" in leaves)
    assert len(state) == 2 * 2 * per_layer  # the whole MLP, and every layer
    for layer in range(2):
        whole = scaling * litgpt_delta(state, f"transformer.h.{layer}.attn.qkv", flags, SIZES)
        for part, rows in zip("qkv", np.split(whole, np.cumsum(SIZES)[:-1]), strict=True):
            update = adapter.updates.get(f"model.layers.{layer}.self_attn.{part}_proj")
            assert np.allclose(rows, 0 if update is None else delta(update), rtol=1e-6, atol=1e-6)
    again = loratool.read(out, reading=PICKLES)  # the settings are noted beside the model
    kept = {name: update for name, update in again.updates.items() if name in adapter.updates}
    llm.assert_same_deltas(adapter, replace(again, updates=kept))
    assert not any(delta(update).any() for name, update in again.updates.items() if name not in kept)


@pytest.mark.parametrize(
    ("model_type", "name", "groups"),
    [
        ("gpt_neox", "gpt_neox.layers.{}.attention.query_key_value", Q),
        ("falcon", "transformer.h.{}.self_attention.query_key_value", KV),
    ],
)
def test_litgpt_projections_that_are_fused_there_too(model_type: str, name: str, groups: int, tmp_path: Path) -> None:
    """All q, all k, all v in LitGPT; by head, or group of heads, in transformers: qkv_reassemble."""
    hidden = Q * HEAD
    rows = (Q + 2 * groups) * HEAD
    config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_attention_heads": Q,
        "num_kv_heads": groups,
        "num_hidden_layers": 2,
    }
    adapter = llm.adapter({name.format(n): (rows, hidden) for n in range(2)}, config, rank=2, alpha=4.0)
    out = written(adapter, tmp_path, "litgpt")
    found = 2.0 * litgpt_delta(
        state_of(out), "transformer.h.1.attn.qkv", (True,) * 3, (hidden, groups * HEAD, groups * HEAD)
    )
    grouped = delta(adapter.updates[name.format(1)]).reshape(groups, Q // groups + 2, HEAD, hidden)
    expected = [grouped[:, :-2], grouped[:, -2], grouped[:, -1]]
    assert np.allclose(found, np.concatenate([part.reshape(-1, hidden) for part in expected]), rtol=1e-6, atol=1e-6)
    llm.assert_same_deltas(adapter, loratool.read(out, reading=PICKLES))


def litgpt_folder(folder: Path, hyper: str | None, model: str | None = None) -> Path:
    """A folder as `litgpt finetune lora` leaves it: q and v of one layer, rank 2."""
    folder.mkdir()
    state = {"transformer.h.0.attn.qkv.lora_A": normal(4, HIDDEN), "transformer.h.0.attn.qkv.lora_B": normal(36, 2)}
    torch.save(
        {"model": {name: torch.from_numpy(t.array().copy()) for name, t in state.items()}},
        folder / "lit_model.pth.lora",
    )
    if hyper is not None:
        (folder / "hyperparameters.yaml").write_text(hyper)
    if model is not None:
        (folder / "model_config.yaml").write_text(model)
    return folder


HYPER = """checkpoint_dir: checkpoints/org/model
lora_r: 2
lora_alpha: 16 # usual
lora_query: true
lora_key: false
lora_value: true
data:
  class_path: x
"""
YAML = f"""name: Llama-3
mlp_class_name: LLaMAMLP
n_head: {Q}
n_query_groups: {KV}
head_size: {HEAD}
n_embd: {HIDDEN}
"""


def test_a_folder_of_litgpt(tmp_path: Path) -> None:
    path = litgpt_folder(tmp_path / "x", HYPER, YAML)
    adapter = loratool.read(path, reading=PICKLES)
    assert {name: (u.shape, u.scaling) for name, u in adapter.updates.items()} == {
        "model.layers.0.self_attn.q_proj": ((24, 20), 8.0), "model.layers.0.self_attn.v_proj": ((12, 20), 8.0)
    }  # fmt: skip
    expected = 8.0 * normal(36, 2).array()[24:] @ normal(4, HIDDEN).array()[2:]
    assert np.allclose(delta(adapter.updates["model.layers.0.self_attn.v_proj"]), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("hyper", "model", "what"),
    [
        (None, YAML, "nothing tells which"),
        (HYPER.replace("lora_key: false", "lora_key: true"), YAML, "of q, k, v with"),
        (HYPER, YAML.replace("n_head: 4", "n_head: 2"), "of q, k, v with"),
        (HYPER, None, "architecture is unknown"),
        (HYPER, "mlp_class_name: LLaMAMLP\n", "heads, which are unknown"),
        (HYPER, "mlp_class_name: LLaMAMLP\nn_head: many\nn_embd: 3\n", "no size"),
        (HYPER.replace("lora_r: 2", "lora_r: 3"), YAML, "says rank 3"),
    ],
)
def test_litgpt_without_its_settings_is_refused(hyper: Any, model: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=what):
        loratool.read(litgpt_folder(tmp_path / "x", hyper, model), reading=PICKLES)


def test_litgpt_is_told_by_its_settings_file(tmp_path: Path) -> None:
    """What the file cannot say is in the report."""
    folder = tmp_path / "peft"
    loratool.write(llm.adapter({n: s for n, s in BODY.items() if "v_proj" in n}), folder, format="peft")
    report = loratool.convert(folder, tmp_path / "x", to="litgpt", base=llm.base(tmp_path / "base", config=FULL))
    assert any("lora_r 3, lora_alpha 6" in warning and "lora_value true" in warning for warning in report.warnings)
    assert len(report.content_hash) == 64


# -- loralib -------------------------------------------------------------------------------------------------------


def pickled(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    torch.save({name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in tensors.items()}, path)
    return path


def merged_linear(a: np.ndarray, b: np.ndarray, enabled: list[bool]) -> np.ndarray:
    """MergedLinear.merge_AB with its grouped convolution, [o,i]."""
    product = torch.nn.functional.conv1d(torch.tensor(a)[None], torch.tensor(b)[..., None], groups=sum(enabled))[
        0
    ].numpy()
    whole = np.zeros((len(enabled), len(b) // sum(enabled), a.shape[1]), a.dtype)
    whole[enabled] = product.reshape(sum(enabled), -1, a.shape[1])
    return whole.reshape(-1, a.shape[1])


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True]])
def test_loralib_merged_projections(enabled: list[bool], tmp_path: Path) -> None:
    count = sum(enabled)
    a, b = normal(2 * count, 8).array(), normal(8 * count, 2).array()
    key = "transformer.h.0.attn.c_attn"
    path = pickled(tmp_path / "x.pt", {f"{key}.lora_A": a, f"{key}.lora_B": b})
    adapter = loratool.read(path, reading=scaled(4.0))
    assert adapter.metadata.format == "loralib"
    assert np.allclose(delta(adapter.updates[key]), 4.0 * merged_linear(a, b, enabled), rtol=1e-5, atol=1e-6)
    assert any("taken to be q and v" in w for w in adapter.metadata.warnings) is (count == 2)
    state = state_of(written(adapter, tmp_path, "loralib"))
    assert np.array_equal(state[f"{key}.lora_A"], a) and np.array_equal(state[f"{key}.lora_B"], b)


def test_loralib_has_no_scaling(tmp_path: Path) -> None:
    """llm.md trap 68."""
    path = pickled(
        tmp_path / "x.pt", {"m.lora_A": np.ones((2, 4), np.float32), "m.lora_B": np.ones((3, 2), np.float32)}
    )
    with pytest.raises(FormatError, match="pickle"):
        loratool.read(path)
    assert loratool.inspect(path, reading=PICKLES).targets[0].scaling is None
    with pytest.raises(FormatError, match="scaling"):
        loratool.convert(path, tmp_path / "y", to="peft", reading=PICKLES)
    assert loratool.convert(path, tmp_path / "y", to="peft", reading=scaled(0.5)).modules == 1


def test_loralib_embeddings_and_biases(tmp_path: Path) -> None:
    a, b, bias = normal(2, VOCAB).array(), normal(6, 2).array(), normal(5).array()
    path = pickled(tmp_path / "x.pt", {"model.embed_tokens.lora_A": a, "model.embed_tokens.lora_B": b, "m.bias": bias})
    adapter = loratool.read(path, reading=scaled(1.0))
    assert np.allclose(delta(adapter.updates["model.embed_tokens"]), (b @ a).T, rtol=1e-5)
    assert np.array_equal(adapter.carried["m.bias"].array(), bias)
    state = state_of(written(adapter, tmp_path, "loralib"))
    assert np.array_equal(state["model.embed_tokens.lora_A"], a) and np.array_equal(state["m.bias"], bias)


def test_loralib_convolutions_are_known_by_the_base(tmp_path: Path) -> None:
    """llm.md trap 31: ConvLoRA is the product read as the weight; PEFT's factors are of another layout."""
    o, i, k, r = 5, 4, 3, 2
    a, b = normal(r * k, i * k).array(), normal(o * k, r * k).array()
    path = pickled(tmp_path / "x.pt", {"conv.lora_A": a, "conv.lora_B": b})
    from tests import samples

    base = samples.model(tmp_path / "base", {"conv.weight": normal(o, i, k, k)})
    update = loratool.read(path, base=base, reading=scaled(2.0)).updates["conv"]
    assert isinstance(update, LowRank) and update.shape == (o, i, k, k) and update.scaling == 2.0
    assert np.allclose(update.delta(), 2.0 * (b @ a).reshape(o, i, k, k), rtol=1e-5, atol=1e-5)
    wrong = samples.model(tmp_path / "wrong", {"conv.weight": normal(o, i, k + 1, k + 1)})
    with pytest.raises(FormatError, match="of a weight"):
        loratool.read(path, base=wrong, reading=scaled(2.0))


@pytest.mark.parametrize("more", [{}, {"rank": 4, "alpha": 1.0, "dtype": "BF16"}])
def test_loralib_there_and_back(more: dict[str, Any], tmp_path: Path) -> None:
    adapter = llm.adapter(LLAMA, **more)
    adapter.updates["lm_head"] = low(LLAMA["lm_head"], 2, 9.0)  # type: ignore[index]
    out = written(adapter, tmp_path, "loralib")
    scaling = adapter.updates["model.layers.0.self_attn.q_proj"].scaling
    llm.assert_same_deltas(adapter, loratool.read(out, reading=scaled(scaling)))
    assert out.read_bytes() == written(adapter, tmp_path, "loralib", "again").read_bytes()


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"m.lora_A": np.ones((2, 4))}, "half a pair"),
        ({"m.lora_A": np.ones((2, 4)), "m.lora_B": np.ones((3, 2)), "m.weight": np.ones((3, 4))}, "merged into them"),
        ({"m.lora_A": np.ones((3, 4)), "m.lora_B": np.ones((3, 2))}, "rank mismatch"),
        ({"m.lora_A": np.ones((8, 4)), "m.lora_B": np.ones((8, 2))}, "4 groups"),
        ({"m.lora_A": np.ones(4), "m.lora_B": np.ones(4)}, "factors"),
        ({"m.lora_A": np.ones((2, 4), np.int32), "m.lora_B": np.ones((3, 2))}, "factors I32"),
    ],
)
def test_malformed_loralib_is_refused(tensors: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=what):
        loratool.read(pickled(tmp_path / "x.pt", tensors), reading=PICKLES)


# -- experts that are stacked in the adapter ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["plain", "transposed", "model"])
@pytest.mark.parametrize(
    ("model_type", "transposed", "interleaved"),
    [("qwen3_moe", False, False), ("mixtral", False, False), ("gpt_oss", True, True), ("llama4_text", True, False)],
)
def test_stacked_experts_are_written_one_by_one(
    model_type: str, transposed: bool, interleaved: bool, order: Any, tmp_path: Path
) -> None:
    """llm.md traps 3, 6, 8: PEFT's packing of 3-D experts, for formats that hold each expert or their own stack."""
    config = {"model_type": model_type, "hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_experts": 3}
    stack = (2 * INNER, HIDDEN)  # [o,i] of gate and up
    across = (order == "transposed") != transposed if order != "model" else False
    out, inner = stack[::-1] if across else stack
    packed = Experts(normal(3 * 2, inner), normal(out, 2 * 3), 3, 4.0, order=order)
    block = "feed_forward" if model_type == "llama4_text" else "mlp"
    name = f"model.layers.0.{block}.experts.gate_up_proj"
    adapter = Adapter({name: packed}, {}, Metadata("sample", base_config=config))
    told = replace(packed, order=("transposed" if transposed else "plain") if order == "model" else order)
    dense = told.delta()  # as the base stores it: [E,o,i], or [E,i,o]
    expected = dense.swapaxes(1, 2) if transposed else dense
    halves = (expected[:, 0::2], expected[:, 1::2]) if interleaved else (expected[:, :INNER], expected[:, INNER:])
    again = loratool.read(written(adapter, tmp_path, "mlx"))
    where, leaves = ("block_sparse_moe", ("w1", "w3")) if model_type == "mixtral" else (block, ("gate_proj", "up_proj"))
    assert len(again.updates) == 6
    for leaf, half in zip(leaves, halves, strict=True):
        for n in range(3):
            found = again.updates[f"model.layers.0.{where}.experts.{n}.{leaf}"]
            assert np.allclose(delta(found), half[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"model_type": "qwen3_moe"}, {"model_type": "unknown", "hidden_size": 20}])
def test_stacked_experts_of_an_unknown_layout_are_a_loss(config: dict[str, Any], tmp_path: Path) -> None:
    packed = Experts(normal(6, HIDDEN), normal(2 * INNER, 6), 3)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(LossError) as caught:
        written(Adapter({name: packed}, {}, Metadata("sample", base_config=config)), tmp_path, "mlx")
    assert [loss.partition(":")[0] for loss in caught.value.losses] == [name]


# -- dialects that are PEFT's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        # Unsloth: one long regular expression for its targets, a quantised base's name
        (
            "unsloth",
            {
                "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj|down_proj).*?)"
                r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj|down_proj)))",
                "base_model_name_or_path": "unsloth/llama-3.2-1b-bnb-4bit",
                "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
                "peft_version": "0.18.0",
                "lora_dropout": 0,
            },
        ),
        # Megatron-Bridge and NeMo-Automodel: PEFT's folder, target_modules by leaf
        (
            "megatron",
            {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.0},
        ),
    ],
)
def test_what_unsloth_and_megatron_export_is_peft(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    shapes = {n: s for n, s in BODY.items() if n.endswith(("q_proj", "v_proj", "down_proj"))}
    adapter = llm.adapter(shapes, rank=4, alpha=8.0, dtype="BF16")
    tensors = {
        f"base_model.model.{module}.lora_{half}.weight": tensor
        for module, update in adapter.updates.items()
        for half, tensor in zip("AB", update.slots.values(), strict=True)
    }
    folder = tmp_path / name
    folder.mkdir()
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    base = llm.base(tmp_path / "base")
    found = loratool.read(folder, base=base)
    assert found.metadata.format == "peft"
    llm.assert_same_deltas(adapter, found)
    loratool.convert(folder, tmp_path / "x.gguf", to="gguf", base=base)
    llm.assert_same_deltas(adapter, loratool.read(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    "key",
    [
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",
        "model.layers.0.lora_kqv_adapter.linear_in.weight",
    ],
)
def test_nemo_s_own_checkpoints_are_refused_by_name(key: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {key: normal(2, 3)}, {})
    with pytest.raises(FormatError, match="NeMo"):
        loratool.detect(tmp_path / "x.safetensors")


# -- all of them ---------------------------------------------------------------------------------------------------

ALL = ("gguf", "mlx", "torchtune", "litgpt", "loralib", "mistral", "tinker")


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize(
    ("name", "update"),
    [
        ("model.layers.0.self_attn.v_proj.bias", Dense(normal(12), kind="bias")),
        ("model.layers.0.mlp.up_proj", UPDATES["dense"]),
        ("model.layers.0.mlp.up_proj", UPDATES["lora_conv2d"]),
        ("model.layers.0.mlp.up_proj", UPDATES["dora_by_input"]),
    ],
)
def test_losses_are_named_before_anything_is_written(format: str, name: str, update: Any, tmp_path: Path) -> None:
    kept = llm.adapter({name: shape for name, shape in BODY.items() if "v_proj" in name}, FULL)
    if isinstance(update, DoRA):
        kept = replace(kept, updates={})
    adapter = replace(
        kept,
        updates={**kept.updates, name: update},
        carried={"model.norm.weight": normal(20)},
        spellings={name: "stored name"},
    )
    with pytest.raises(LossError) as caught:
        written(adapter, tmp_path, format)
    assert [loss.partition(":")[0] for loss in caught.value.losses] == ["stored name", "model.norm.weight"]
    assert not list(tmp_path.iterdir())
    if kept.updates:
        out = written(adapter, tmp_path, format, allow_loss=True)
        again = loratool.read(out, base=llm.base(tmp_path / "base", config=FULL), reading=scaled(2.0))
        llm.assert_same_deltas(kept, again)


@pytest.mark.parametrize("one", ALL)
@pytest.mark.parametrize("other", ALL)
def test_any_to_any_by_delta(one: str, other: str, tmp_path: Path) -> None:
    """One scaling, 2, so that files which do not tell theirs can be told; ranks and dtypes differ."""
    names = [name for name in BODY if "layers.1" in name or "v_proj" in name]
    updates = {
        n: low(LLAMA[n], 2 + k % 3, 4.0 + 2 * (k % 3), ("F32", "F16")[k % 2], 3 * k) for k, n in enumerate(names)
    }
    adapter = Adapter(updates, {}, Metadata("sample", base_config=FULL))
    base = llm.base(tmp_path / "base", config=FULL)
    first = written(adapter, tmp_path, one, "one")
    loratool.convert(first, tmp_path / "other", to=other, base=base, reading=scaled(2.0))
    found = loratool.read(tmp_path / "other", base=base, reading=scaled(2.0))
    assert found.metadata.format == other
    kept = {name: update for name, update in found.updates.items() if name in updates}
    tolerance = 1e-3 if "mistral" in (one, other) else 1e-6  # one dtype for all: rounded once
    llm.assert_same_deltas(adapter, replace(found, updates=kept), tolerance)
    assert not any(delta(update).any() for name, update in found.updates.items() if name not in updates)


SHAPES = [(), (0,), (1,), (7,), (0, 3), (3, 0), (1, 1), (2, 3), (2, 2, 2), (1, 0, 2), (2, 3, 4, 5)]


@pytest.mark.parametrize("format", ALL)
def test_factors_of_any_shape_and_type_are_read_or_refused(format: str, tmp_path: Path) -> None:
    """Whatever a file holds in the place of a factor, the only error is one of loratool's own."""
    shapes = {name: LLAMA[name] for name in ("model.embed_tokens", "model.layers.1.self_attn.q_proj")}
    shapes |= llm.experts({"gate_proj": (INNER, HIDDEN)}, count=2) if format in ("gguf", "mlx", "tinker") else {}
    adapter = llm.adapter(shapes, {**FULL, "model_type": "qwen2_moe" if format in ("gguf", "mlx") else "llama"})
    out = written(adapter, tmp_path, format, allow_loss=True)
    file = Evidence(out, allow_pickle=True).file
    base = llm.base(tmp_path / "base", config=FULL)
    for number, key in enumerate(sorted(file.tensors)):
        for shape in SHAPES:
            odd = Tensor.of(np.ones(shape, np.int32 if number % 3 == 0 and shape == (2, 3) else np.float32))
            tensors = dict(file.tensors) | {key: odd}
            path = rewritten(out, tensors, file, tmp_path / "odd")
            try:
                found = loratool.read(path, base=base, reading=scaled(2.0), format=format)
                for update in found.updates.values():
                    for tensor in update.slots.values():
                        tensor.float()
            except LoratoolError as error:
                assert error.what


def rewritten(like: Path, tensors: Mapping[str, Tensor], file: Any, to: Path) -> Path:
    """The tensors in a container like another's."""
    if like.is_dir():
        to.mkdir(exist_ok=True)
        (to / "adapters.safetensors").unlink(missing_ok=True)
        write_safetensors(to / "adapters.safetensors", tensors, {})
        (to / "adapter_config.json").write_bytes((like / "adapter_config.json").read_bytes())
        return to
    to.unlink(missing_ok=True)
    if "general.type" in file.metadata:
        own = ("general.architecture", "general.type", "adapter.type", "loratool.base")
        words = {key: file.metadata[key] for key in own}
        write_gguf(to, {**words, "adapter.lora.alpha": 6.0}, tensors)
    elif looks_pickled(like):
        beside = {key: json.loads(value) for key, value in file.metadata.items()}
        write_pickle(to, {k: t for k, t in tensors.items() if t.size}, beside or None)
    else:
        write_safetensors(to, tensors, file.metadata)
    return to


@pytest.mark.parametrize("format", ALL)
def test_computed_adapters_are_written_too(format: str, tmp_path: Path) -> None:
    """resize, with ranks of its own and within a size, and add: the base tells what the format needs."""
    base, out = llm.base(tmp_path / "base", config=FULL), tmp_path / "out"
    folder = written(llm.adapter(BODY, {}, rank=6, alpha=12.0), tmp_path, "peft", "peft")
    whole = loratool.resize(folder, tmp_path / "whole", rank=6, base=base, to=format)
    report = loratool.resize(folder, out, max_size=whole.bytes * 2 // 3, base=base, to=format)
    assert report.bytes <= whole.bytes * 2 // 3
    made = loratool.read(out, base=base, reading=scaled(2.0))
    assert max(update.rank or 0 for update in made.updates.values()) < 6
    twice = loratool.add(folder, folder, out=out, base=base, to=format, overwrite=True)
    assert twice.format == format and twice.relative_error < 1e-6


@pytest.mark.parametrize("format", ALL)
def test_the_same_adapter_gives_the_same_bytes(format: str, tmp_path: Path) -> None:
    adapter = llm.adapter({name: shape for name, shape in BODY.items() if "v_proj" in name}, FULL)
    files = [written(adapter, tmp_path, format, name) for name in ("one", "two")]
    if files[0].is_dir():
        files = [folder / "adapters.safetensors" for folder in files]
    assert files[0].read_bytes() == files[1].read_bytes()


# -- the command line ----------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line in this process."""
    from loratool import cli

    code = 0
    try:
        cli.main([str(word) for word in words])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "mistake in loratool" not in said.err
    return code, said.out, said.err


def test_exit_codes_and_hints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(llm.adapter(LLAMA, {}), tmp_path, "peft", "peft")
    archive = npz(tmp_path / "x.npz", {name: tensor.array() for name, tensor in mlx_pair().items()})
    base, out = llm.base(tmp_path / "base", config={**FULL, "tie_word_embeddings": True}), tmp_path / "out"
    code, _, said = command(capsys, "convert", archive, "-o", out, "--to", "peft")
    assert code == 3 and "hint: give --scaling" in said
    code, _, said = command(capsys, "convert", folder, "-o", out, "--to", "gguf")
    assert code == 3 and "hint: give --base" in said
    for more in ((), ("--dry-run",)):
        code, _, said = command(capsys, "convert", folder, "-o", out, "--to", "gguf", "--base", base, *more)
        assert code == 5 and "base_model.model.lm_head" in said
        assert not out.exists()
    code, said, _ = command(
        capsys, "convert", folder, "-o", out, "--to", "gguf", "--base", base, "--allow-loss", "--json"
    )
    assert code == 0 and json.loads(said)["modules"] == len(LLAMA) - 1
    code, said, _ = command(capsys, "inspect", out, "--json")
    found = json.loads(said)
    assert (code, found["format"], found["architecture"], found["modules"]) == (0, "gguf", "llama", len(LLAMA) - 1)
    code, said, _ = command(capsys, "formats", "--json")
    assert {row["name"] for row in json.loads(said) if row["reads"] and row["writes"]} >= set(ALL)
