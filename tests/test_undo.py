"""Undo: the base again, bit for bit; no other model is taken for the merged one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.errors import FormatError, LoratoolError, VerifyError
from loratool.ops.undo import packed, unpacked
from loratool.tensors import Tensor, read_safetensors, write_safetensors
from loratool.update import Dense, DoRA, LowRank, Update
from tests import samples
from tests.samples import fingerprint, lora_file, low, magnitude, normal, tucker

SHAPE = (7, 5)


def base_of(folder: Path, dtype: str = "BF16", shards: int = 1, **more: Tensor) -> Path:
    tensors = {"a.weight": normal(*SHAPE, dtype=dtype), "b.weight": normal(7, 5, 3, 2, dtype=dtype, seed=1)}
    tensors |= {"norm.weight": normal(7, dtype="F32"), "a.bias": normal(7, dtype=dtype, seed=2), **more}
    return samples.model(folder, tensors, shards=shards)


def there_and_back(base: Path, lora: Path | list[Path], tmp_path: Path, **options: Any) -> tuple[Path, Path]:
    """Merge with an undo file, unmerge, and compare every byte of every file."""
    merged, undo, again = tmp_path / "merged", tmp_path / "undo.safetensors", tmp_path / "again"
    before = fingerprint(base)
    loratool.merge(base, lora, out=merged, undo=undo, **options)
    loratool.unmerge(merged, again, undo=undo)
    assert list(fingerprint(again).values()) == list(before.values())
    assert [p.relative_to(again) for p in sorted(again.rglob("*"))] == [
        p.relative_to(base) for p in sorted(base.rglob("*"))
    ]
    return merged, undo


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("strength", [1.0, -0.3, 0.0])
def test_the_base_comes_back_bit_for_bit(dtype: str, strength: float, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", dtype, shards=2)
    lora = lora_file(tmp_path / "lora.safetensors", {"a": low(), "b": low(7, 5, 2, 3, 2), "a.bias": Dense(normal(7))})
    there_and_back(base, lora, tmp_path, strengths=[strength])


OTHERS: dict[str, dict[str, Update]] = {
    "dora": {"a": DoRA(low(), magnitude(7))},
    "tucker": {"b": tucker(7, 5, 3, 3, 2)},
    "full": {"a": Dense(normal(7, 5), 0.5)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_come_back_too(name: str, tmp_path: Path) -> None:
    there_and_back(base_of(tmp_path / "base"), lora_file(tmp_path / "lora.safetensors", OTHERS[name]), tmp_path)


def test_whole_tensors_new_ones_and_another_dtype(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", shards=2)
    carried = {"norm__weight": normal(7, seed=9), "score__weight": normal(2, 7)}
    lora = lora_file(tmp_path / "lora.safetensors", {"a": low()}, **carried)
    there_and_back(base, lora, tmp_path, dtype="fp32")


def test_a_longer_vocabulary_comes_back(tmp_path: Path) -> None:
    table = {"embed_tokens.weight": normal(11, 5), "a.weight": normal(7, 5)}
    base = samples.model(tmp_path / "base", table, {"vocab_size": 11})
    lora = lora_file(tmp_path / "lora.safetensors", {"a": low()}, embed_tokens__weight=normal(13, 5, seed=3))
    there_and_back(base, lora, tmp_path)


def test_several_adapters_and_a_single_file(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    write_safetensors(base, {"a.weight": normal(*SHAPE, dtype="F16")}, {"note": "mine"})
    loras = [lora_file(tmp_path / f"{n}.safetensors", {"a": low(seed=n)}) for n in range(3)]
    merged, undo, again = (tmp_path / f"{name}.safetensors" for name in ("merged", "undo", "again"))
    loratool.merge(base, loras, out=merged, undo=undo, strengths=[0.5, 2, -1])
    loratool.unmerge(merged, again, undo=undo)
    assert again.read_bytes() == base.read_bytes()


def test_many_blocks_and_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = tmp_path / "base.safetensors"
    write_safetensors(base, {"a.weight": Tensor.of(rng.standard_normal((4100, 512)), "BF16")}, {})
    pair = (Tensor.of(rng.standard_normal((4, 512)) * 1e-3, "F32"), Tensor.of(rng.standard_normal((4100, 4)), "F32"))
    lora = lora_file(tmp_path / "lora.safetensors", {"a": LowRank(*pair)})
    for name in ("one", "two"):
        loratool.merge(base, lora, out=tmp_path / f"{name}.merged", undo=tmp_path / f"{name}.undo")
    assert (tmp_path / "one.undo").read_bytes() == (tmp_path / "two.undo").read_bytes()
    loratool.unmerge(tmp_path / "one.merged", tmp_path / "again", undo=tmp_path / "two.undo")
    assert (tmp_path / "again").read_bytes() == base.read_bytes()
    # the change is a five hundredth of the weights: nearly every bit is predicted
    assert (tmp_path / "one.undo").stat().st_size < 0.05 * base.stat().st_size


def test_the_adapters_tokenizer_and_the_configuration_are_taken_back(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    (base / "tokenizer.json").write_text("the base's")
    (base / "merges.txt").write_text("kept")
    lora = samples.peft_folder(tmp_path / "lora", samples.peft_pair("a"))
    (lora / "tokenizer.json").write_text("the adapter's")
    (lora / "special_tokens_map.json").write_text("new")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["a"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    merged, _ = there_and_back(base, lora, tmp_path)
    assert (merged / "tokenizer.json").read_text() == "the adapter's"


# ---------------------------------------------------------------- refusals


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    base = base_of(tmp_path / "base")
    (base / "merges.txt").write_text("kept")
    lora = lora_file(tmp_path / "lora.safetensors", {"a": low()})
    loratool.merge(base, lora, out=tmp_path / "merged", undo=tmp_path / "undo")
    return tmp_path / "merged", tmp_path / "undo"


def another_strength(merged: Path) -> None:
    top = merged.parent
    loratool.merge(top / "base", top / "lora.safetensors", out=merged, strengths=[0.5], overwrite=True)


def rewrite(merged: Path, change: Any) -> None:
    path = merged / "model.safetensors"
    file = read_safetensors(path)
    tensors = {name: Tensor.of(t.array()) for name, t in file.tensors.items()}
    change(tensors)
    metadata = dict(file.metadata)
    path.unlink()
    write_safetensors(path, tensors, metadata)


def one_bit(name: str) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        values = tensors[name].array().copy()
        values.reshape(-1).view(np.uint8)[3] ^= 1
        tensors[name] = Tensor.of(values)

    return change


TAMPERED: dict[str, Any] = {
    "another strength": another_strength,
    "a bit of a changed tensor": lambda merged: rewrite(merged, one_bit("a.weight")),
    "a bit of a copied tensor": lambda merged: rewrite(merged, one_bit("b.weight")),
    "a tensor more": lambda merged: rewrite(merged, lambda tensors: tensors.update(more=normal(2))),
    "a tensor less": lambda merged: rewrite(merged, lambda tensors: tensors.pop("norm.weight")),
    "another shape": lambda merged: rewrite(merged, lambda tensors: tensors.update({"a.weight": normal(9, 5)})),
    "a file beside the weights": lambda merged: (merged / "merges.txt").write_text("other"),
    "the base itself": lambda merged: (shutil.rmtree(merged), shutil.copytree(merged.parent / "base", merged)),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_another_merged_model_is_refused(name: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    TAMPERED[name](made[0])
    with pytest.raises(VerifyError):
        loratool.unmerge(made[0], tmp_path / "again", undo=made[1])
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("where", [0.02, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_damaged_undo_file_is_refused(where: float, made: tuple[Path, Path], tmp_path: Path) -> None:
    data = bytearray(made[1].read_bytes())
    data[int(where * len(data))] ^= 0x11
    made[1].write_bytes(data)
    with pytest.raises(FormatError):
        loratool.unmerge(made[0], tmp_path / "again", undo=made[1])
    assert not (tmp_path / "again").exists()


def test_a_truncated_undo_file_and_one_that_is_none_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    for data in (made[1].read_bytes()[:-9], (made[0] / "model.safetensors").read_bytes(), b"", b"PK\x03\x04"):
        made[1].write_bytes(data)
        with pytest.raises(FormatError):
            loratool.unmerge(made[0], tmp_path / "again", undo=made[1])


def hostile(made: tuple[Path, Path], change: Any) -> None:
    """An undo file whose description was rewritten, hashes and all."""
    from loratool.ops.undo import UNDO, UNDO_HASH, text_hash

    file = read_safetensors(made[1])
    words = json.loads(file.metadata[UNDO])
    change(words)
    text = json.dumps(words)
    tensors = {name: Tensor.of(t.array()) for name, t in file.tensors.items()}
    made[1].unlink()
    write_safetensors(made[1], tensors, {**file.metadata, UNDO: text, UNDO_HASH: text_hash(text)})


def entry(words: Any) -> Any:
    return next(e for e in words["files"][0]["tensors"] if "blocks" in e)


HOSTILE: dict[str, Any] = {
    "a path out": lambda w: w["files"][0].update(name="../../x.safetensors"),
    "a small file out": lambda w: w["rewritten"].update({"../x": "header.0"}),
    "a kept file out": lambda w: w["kept"].update({"../base/config.json": "0"}),
    "a version to come": lambda w: w.update(version=2),
    "no files": lambda w: w.pop("files"),
    "a missing blob": lambda w: entry(w).update(blocks="none"),
    "other lengths": lambda w: entry(w).update(lengths=entry(w)["blocks"]),
    "rows beyond": lambda w: entry(w)["parts"][0].update(stop=70),
    "an unknown update": lambda w: entry(w)["parts"][0]["update"].update(type="Nothing"),
    "an unknown dtype": lambda w: entry(w).update(dtype="Q4"),
    "another dtype": lambda w: entry(w).update(dtype="F64"),
    "a table for a text": lambda w: w.update(base={}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_undo_file_writes_nothing(name: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    hostile(made, HOSTILE[name])
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises((FormatError, VerifyError)):
        loratool.unmerge(made[0], tmp_path / "again", undo=made[1])
    assert sorted(tmp_path.rglob("*")) == there


def test_a_bomb_is_not_unpacked() -> None:
    data = packed(np.zeros(1 << 20, np.uint16))
    with pytest.raises(FormatError):
        unpacked(data, 100, 2)
    with pytest.raises(FormatError):
        unpacked(data, 1 << 21, 2)


def test_where_the_undo_file_may_go(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora.safetensors"
    for undo in (made[1], base, base / "undo", tmp_path / "out" / "undo", tmp_path / "out"):
        with pytest.raises(LoratoolError):
            loratool.merge(base, lora, out=tmp_path / "out", undo=undo)
        assert not (tmp_path / "out").exists()


def test_a_failed_merge_leaves_no_undo_file(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "F16")
    lora = lora_file(tmp_path / "lora.safetensors", {"a": low(alpha=1e9)})
    with pytest.raises(LoratoolError):
        loratool.merge(base, lora, out=tmp_path / "out", undo=tmp_path / "undo")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "lora.safetensors"]


def test_an_adapter_in_memory_can_be_undone(tmp_path: Path) -> None:
    there_and_back(base_of(tmp_path / "base"), [Adapter({"a": low()}, {}, Metadata("raw"))], tmp_path)  # type: ignore[list-item]
