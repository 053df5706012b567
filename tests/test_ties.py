"""Tied weights: one change for both ends keeps the tie, anything else unties them; llm traps 37 to 43."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.errors import MatchError
from loratool.model import read_model
from loratool.update import Dense, LowRank
from tests import models, samples
from tests.samples import lora_file, low, normal

Make = Callable[..., Path]
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
LM = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True, "vocab_size": 7}


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {name: at[0].tensor.array() for name, at in read_model(folder).parameters.items()}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def head_of(embedding: LowRank) -> LowRank:
    """The same delta for the output projection, [vocab,dim] as well."""
    return embedding.oriented("plain")


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    tensors = {f"{EMBEDDING}.weight": normal(7, 5), "model.layers.0.q.weight": normal(7, 5, seed=1)}
    return samples.model(tmp_path / "base", tensors, LM)


# -- PEFT as the oracle --------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "whisper"])
@pytest.mark.parametrize("kind", ["head", "embedding", "dora_embedding", "modules_to_save"])
def test_one_end_alone_unties_and_equals_peft_unmerged(
    name: str, kind: str, base: Make, lora: Make, tmp_path: Path
) -> None:
    """llm traps 37, 39 and 40: PEFT's own merge moves both ends; a reload without the flag would drop the head."""
    import torch

    loratool.merge(base(name), lora(name, kind), out=tmp_path / "out")
    found, expected = models.logits(tmp_path / "out"), models.logits(base(name), lora(name, kind))
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    before, after = arrays(base(name)), arrays(tmp_path / "out")
    (added,) = after.keys() - before.keys()
    assert added.removesuffix(".weight") in ("lm_head", "proj_out")
    assert list(after)[: len(before)] == list(before)


@pytest.mark.peer
def test_pefts_own_merge_would_be_wrong(base: Make, lora: Make) -> None:
    """Why unmerged is the oracle: if this fails, PEFT has mended it and the merge can be the oracle again."""
    import torch

    there, adapter = base("llama_tied"), lora("llama_tied", "head")
    merged = models.load_peft(there, adapter).merge_and_unload()
    assert not torch.allclose(models.logits(merged), models.logits(there, adapter), atol=1e-2)


@pytest.mark.peer
def test_both_ends_alike_keep_the_tie_and_change_it_once(base: Make, lora: Make, tmp_path: Path) -> None:
    """llm trap 38: PEFT adds the delta twice."""
    import torch

    there, adapter = base("llama_tied"), lora("llama_tied", "tied")
    loratool.merge(there, adapter, out=tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    before, after = arrays(there), arrays(tmp_path / "out")
    assert before.keys() == after.keys()
    name = "model.embed_tokens.weight"
    update = loratool.read(adapter).updates["model.embed_tokens"]
    np.testing.assert_allclose(after[name] - before[name], update.delta(), atol=1e-6)  # type: ignore[attr-defined]
    found, expected = models.logits(tmp_path / "out"), models.logits(there, adapter)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["head", "modules_to_save"])
def test_t5_cannot_be_untied(kind: str, base: Make, lora: Make, tmp_path: Path) -> None:
    """A tied T5 head scales its input: untying would change more than the weight."""
    with pytest.raises(MatchError, match=r"cannot be untied.*lm_head / shared") as caught:
        loratool.merge(base("t5"), lora("t5", kind), out=tmp_path / "out")
    assert caught.value.exit_code == 4 and not (tmp_path / "out").exists()


# -- small models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [HEAD, EMBEDDING])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_the_other_end_keeps_the_bases_weight(end: str, strength: float, tied: Path, tmp_path: Path) -> None:
    update = low(layer="embedding" if end == EMBEDDING else "plain")
    loratool.merge(tied, lora_file(tmp_path / "x", {end: update}), strengths=[strength], out=tmp_path / "out")
    plain, found = normal(7, 5).array(), arrays(tmp_path / "out")
    np.testing.assert_allclose(found[f"{end}.weight"], plain + strength * update.delta(), atol=1e-6)
    (other,) = {HEAD, EMBEDDING} - {end}
    assert found[f"{other}.weight"].tobytes() == plain.tobytes()


def test_ends_that_change_differently_are_both_written(tied: Path, tmp_path: Path) -> None:
    """Each its own update; different strengths of the same one untie as well."""
    embedding = low(layer="embedding")
    both = lora_file(tmp_path / "both", {HEAD: low(seed=5), EMBEDDING: embedding})
    loratool.merge(tied, both, out=tmp_path / "out")
    plain, found = normal(7, 5).array(), arrays(tmp_path / "out")
    np.testing.assert_allclose(found[f"{HEAD}.weight"], plain + low(seed=5).delta(), atol=1e-6)
    np.testing.assert_allclose(found[f"{EMBEDDING}.weight"], plain + embedding.delta(), atol=1e-6)
    ends = [
        lora_file(tmp_path / "head", {HEAD: head_of(embedding)}),
        lora_file(tmp_path / "embedding", {EMBEDDING: embedding}),
    ]
    loratool.merge(tied, ends, strengths=[1.0, 0.5], out=tmp_path / "apart")
    found = arrays(tmp_path / "apart")
    np.testing.assert_allclose(found[f"{HEAD}.weight"], plain + embedding.delta(), atol=1e-6)
    np.testing.assert_allclose(found[f"{EMBEDDING}.weight"], plain + 0.5 * embedding.delta(), atol=1e-6)


def test_the_same_change_of_two_adapters_keeps_the_tie(tied: Path, tmp_path: Path) -> None:
    embedding = low(layer="embedding")
    ends = [
        lora_file(tmp_path / "head", {HEAD: head_of(embedding)}),
        lora_file(tmp_path / "embedding", {EMBEDDING: embedding}),
    ]
    loratool.merge(tied, ends, out=tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    found = arrays(tmp_path / "out")
    assert f"{HEAD}.weight" not in found
    np.testing.assert_allclose(found[f"{EMBEDDING}.weight"], normal(7, 5).array() + embedding.delta(), atol=1e-6)


def test_a_copy_of_the_base_beside_the_update_is_no_change(tied: Path, tmp_path: Path) -> None:
    """llm traps 38 and 40: `embed_tokens.base_layer.weight` equal to the base keeps a tie that both ends keep."""
    embedding = low(layer="embedding")
    updates = {HEAD: head_of(embedding), EMBEDDING: embedding}
    lora = lora_file(tmp_path / "x", updates, model__embed_tokens__weight=normal(7, 5))
    loratool.merge(tied, lora, out=tmp_path / "out")
    found = arrays(tmp_path / "out")
    np.testing.assert_allclose(found[f"{EMBEDDING}.weight"], normal(7, 5).array() + embedding.delta(), atol=1e-6)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True


@pytest.mark.parametrize(("rows", "strength"), [(7, 1.0), (7, 0.5), (9, 1.0)])
def test_the_base_that_the_update_was_trained_on_replaces_the_bases(rows: int, strength: float, tmp_path: Path) -> None:
    """llm traps 40 and 41: `embed_tokens.base_layer.weight` is no delta, and knows no strength."""
    tensors = {f"{EMBEDDING}.weight": normal(7, 5), f"{HEAD}.weight": normal(7, 5, seed=1)}
    base = samples.model(tmp_path / "base", tensors, LM | {"tie_word_embeddings": False})
    own, update = normal(rows, 5, seed=8), low(rows, 5, layer="embedding")
    head = {"lm_head__weight": normal(rows, 5, seed=2)} if rows > 7 else {}
    lora = lora_file(tmp_path / "x", {EMBEDDING: update}, model__embed_tokens__weight=own, **head)
    loratool.merge(base, lora, strengths=[strength], out=tmp_path / "out")
    found = arrays(tmp_path / "out")
    np.testing.assert_allclose(found[f"{EMBEDDING}.weight"], own.array() + strength * update.delta(), atol=1e-6)
    assert config_of(tmp_path / "out")["vocab_size"] == rows == len(found[f"{HEAD}.weight"])


def test_a_longer_vocabulary_of_a_tied_model(tied: Path, tmp_path: Path) -> None:
    """llm trap 41: both ends have as many rows, whichever of them the adapter changes."""
    own, update = normal(9, 5, seed=8), low(9, 5, layer="embedding")
    trained = lora_file(tmp_path / "trained", {EMBEDDING: update}, model__embed_tokens__weight=own)
    loratool.merge(tied, trained, out=tmp_path / "apart")
    found = arrays(tmp_path / "apart")
    np.testing.assert_allclose(found[f"{EMBEDDING}.weight"], own.array() + update.delta(), atol=1e-6)
    assert found[f"{HEAD}.weight"].tobytes() == own.array().tobytes()
    assert config_of(tmp_path / "apart")["vocab_size"] == 9
    whole = lora_file(tmp_path / "whole", {"model.layers.0.q": low()}, model__embed_tokens__weight=own)
    loratool.merge(tied, whole, out=tmp_path / "together")
    found = arrays(tmp_path / "together")
    assert found[f"{EMBEDDING}.weight"].tobytes() == own.array().tobytes() and f"{HEAD}.weight" not in found
    assert config_of(tmp_path / "together")["tie_word_embeddings"] is True


def test_a_whole_head_unties_and_a_whole_pair_stays(tied: Path, tmp_path: Path) -> None:
    """llm traps 39 and 43: two tensors are written only where the configuration says so."""
    whole = normal(7, 5, seed=9)
    head = lora_file(tmp_path / "head", {"model.layers.0.q": low()}, lm_head__weight=whole)
    loratool.merge(tied, head, out=tmp_path / "apart")
    found = arrays(tmp_path / "apart")
    assert found[f"{HEAD}.weight"].tobytes() == whole.array().tobytes()
    assert found[f"{EMBEDDING}.weight"].tobytes() == normal(7, 5).array().tobytes()
    assert config_of(tmp_path / "apart")["tie_word_embeddings"] is False
    pair = lora_file(
        tmp_path / "pair", {"model.layers.0.q": low()}, lm_head__weight=whole, model__embed_tokens__weight=whole
    )
    loratool.merge(tied, pair, out=tmp_path / "together")
    assert f"{HEAD}.weight" not in arrays(tmp_path / "together")
    assert arrays(tmp_path / "together")[f"{EMBEDDING}.weight"].tobytes() == whole.array().tobytes()
    assert config_of(tmp_path / "together")["tie_word_embeddings"] is True


def test_an_untied_head_stands_in_the_index(tmp_path: Path) -> None:
    from tests.test_merge import assert_index

    tensors = {f"{EMBEDDING}.weight": normal(7, 5, dtype="BF16"), "model.layers.0.q.weight": normal(7, 5, seed=1)}
    base = samples.model(tmp_path / "base", tensors, LM, shards=2)
    loratool.merge(base, lora_file(tmp_path / "x", {HEAD: low()}), out=tmp_path / "out")
    assert_index(tmp_path / "out")
    dtypes = {name: at[0].tensor.dtype for name, at in read_model(tmp_path / "out").parameters.items()}
    assert dtypes[f"{HEAD}.weight"] == "BF16"


@pytest.mark.parametrize("where", ["top", "text", "both", "silent"])
def test_every_word_on_the_tie_is_changed(where: str, tmp_path: Path) -> None:
    """Also in `text_config`, and where the configuration leaves the default to its class."""
    config: dict[str, Any] = {**LM, "text_config": {"model_type": "llama", "tie_word_embeddings": True}}
    if where in ("text", "silent"):
        del config["tie_word_embeddings"]
    if where in ("top", "silent"):
        del config["text_config"]["tie_word_embeddings"]
    base = samples.model(tmp_path / "base", {f"{EMBEDDING}.weight": normal(7, 5)}, config)
    loratool.merge(base, lora_file(tmp_path / "x", {HEAD: low()}), out=tmp_path / "out")
    found = config_of(tmp_path / "out")
    assert found["tie_word_embeddings"] is found["text_config"]["tie_word_embeddings"] is False
    assert {k: v for k, v in found.items() if k not in ("tie_word_embeddings", "text_config")} == {
        k: v for k, v in config.items() if k not in ("tie_word_embeddings", "text_config")
    }


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_on_disk_too(same: bool, tmp_path: Path) -> None:
    """Some checkpoints hold both: each end gets what is its own."""
    tensors = {f"{EMBEDDING}.weight": normal(7, 5), f"{HEAD}.weight": normal(7, 5)}
    base = samples.model(tmp_path / "base", tensors, LM)
    embedding = low(layer="embedding")
    updates = {EMBEDDING: embedding, **({HEAD: head_of(embedding)} if same else {})}
    loratool.merge(base, lora_file(tmp_path / "x", updates), out=tmp_path / "out")
    found = arrays(tmp_path / "out")
    changed = normal(7, 5).array() + embedding.delta()
    np.testing.assert_allclose(found[f"{EMBEDDING}.weight"], changed, atol=1e-6)
    np.testing.assert_allclose(found[f"{HEAD}.weight"], changed if same else normal(7, 5).array(), atol=1e-6)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is same


@pytest.mark.parametrize(
    "config",
    [
        LM | {"tie_word_embeddings": False},
        LM | {"architectures": ["LlamaModel"]},
        {"model_type": "llama", "tie_word_embeddings": True},
    ],
)
def test_a_head_that_is_not_tied_has_no_place(config: dict[str, Any], tmp_path: Path) -> None:
    """CLI law 1: where the architecture has no tied head, a LoRA of it is left over, and said so."""
    base = samples.model(tmp_path / "base", {f"{EMBEDDING}.weight": normal(7, 5)}, config)
    with pytest.raises(MatchError, match="lm_head"):
        loratool.merge(base, lora_file(tmp_path / "x", {HEAD: low()}), out=tmp_path / "out")


def test_other_layers_of_a_tied_model_leave_the_tie_alone(tied: Path, tmp_path: Path) -> None:
    loratool.merge(tied, lora_file(tmp_path / "x", {"model.layers.0.q": low()}), out=tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (tied / "config.json").read_bytes()
    assert arrays(tmp_path / "out").keys() == arrays(tied).keys()


def test_dense_updates_of_both_ends(tied: Path, tmp_path: Path) -> None:
    """What is not seen to be the same change is written twice, and right."""
    delta = Dense(normal(7, 5, seed=4))
    loratool.merge(tied, lora_file(tmp_path / "x", {HEAD: delta, EMBEDDING: delta}), out=tmp_path / "out")
    found = arrays(tmp_path / "out")
    for end in {HEAD, EMBEDDING} & {name.removesuffix(".weight") for name in found}:
        np.testing.assert_allclose(found[f"{end}.weight"], normal(7, 5).array() + delta.delta(), atol=1e-6)
    assert (f"{HEAD}.weight" in found) is (config_of(tmp_path / "out")["tie_word_embeddings"] is False)
