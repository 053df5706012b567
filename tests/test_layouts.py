"""Experts one by one or stacked, projections fused or apart: the same change of the model, whoever names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool
from loratool.adapter import Adapter, Metadata
from loratool.architectures.layouts import heads_of
from loratool.errors import MatchError
from loratool.kinds.experts import Experts
from loratool.model import read_model
from loratool.tensors import Tensor
from loratool.update import DoRA, LowRank, Update
from tests import samples

E, H, I, R = 4, 16, 24, 2  # noqa: E741  (experts, width, width inside, rank)
rng = np.random.default_rng(3)


def values(*shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * 0.3).astype(np.float32)


def lora(out: int, inner: int, alpha: float = 3.0) -> LowRank:
    return LowRank(Tensor.of(values(R, inner)), Tensor.of(values(out, R)), alpha=alpha)


# what changes: the true delta of each expert's projection [o,i]
GATE, UP, DOWN = ([lora(*shape) for _ in range(E)] for shape in ((I, H), (I, H), (H, I)))


def one_by_one(prefix: str, leaves: tuple[str, str, str]) -> dict[str, Update]:
    roles = zip(leaves, (GATE, UP, DOWN), strict=True)
    return {f"{prefix}.{n}.{leaf}": loras[n] for leaf, loras in roles for n in range(E)}


def stacked(prefix: str, leaves: tuple[str, str] = ("gate_up_proj", "down_proj")) -> dict[str, Update]:
    """As PEFT holds them: one pair for all experts; gate and up share a rank here."""
    from loratool.update import stack

    both = [stack([gate, up], (I, I)) for gate, up in zip(GATE, UP, strict=True)]
    return {
        f"{prefix}.{leaves[0]}": Experts.packed([low for low in both if isinstance(low, LowRank)]),
        f"{prefix}.{leaves[1]}": Experts.packed(DOWN),
    }


LAYER = "model.layers.0"
ADAPTERS: Mapping[str, Callable[[], dict[str, Update]]] = {
    "mixtral's names": lambda: one_by_one(f"{LAYER}.block_sparse_moe.experts", ("w1", "w3", "w2")),
    "others' names": lambda: one_by_one(f"{LAYER}.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "stacks": lambda: stacked(f"{LAYER}.mlp.experts"),
    "stacks the other way round": lambda: {
        name: experts.flipped()
        for name, experts in stacked(f"{LAYER}.mlp.experts").items()
        if isinstance(experts, Experts)
    },
    "granite's stacks": lambda: stacked(f"{LAYER}.block_sparse_moe", ("input_linear", "output_linear")),
}
TINY: dict[str, Any] = {
    **{"vocab_size": 32, "hidden_size": H, "intermediate_size": I, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 8, "num_local_experts": E, "num_experts_per_tok": 2},
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"moe_intermediate_size": I, "shared_expert_intermediate_size": I, "num_experts": E},
    "gpt_oss": {"pad_token_id": 0},
    "granitemoe": {},
}


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of a tiny model as transformers saves it."""

    def build(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"moe-{name}"
        if not folder.exists():
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**TINY, **MODELS[name]})).save_pretrained(
                folder
            )
        return folder

    return build


def in_memory(folder: Path) -> dict[str, np.ndarray]:
    """A model's parameters as transformers 5 holds them."""
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()
    return {name: value.numpy() for name, value in state.items()}


def expected(transposed: bool, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    """What gate_up [E,2I,H] and down [E,H,I] change by, as the model holds them."""
    gate, up, down = (np.stack([low.delta() for low in loras]) for loras in (GATE, UP, DOWN))
    both = np.stack([gate, up], 2).reshape(E, 2 * I, H) if interleaved else np.concatenate([gate, up], 1)
    return (both.swapaxes(1, 2), down.swapaxes(1, 2)) if transposed else (both, down)


@pytest.mark.parametrize("names", ADAPTERS)
@pytest.mark.parametrize("model", MODELS)
def test_experts_of_any_naming_reach_any_layout(
    names: str, model: str, moe: Callable[[str], Path], tmp_path: Path
) -> None:
    if model == "gpt_oss" and "stacks" in names:
        pytest.skip("its own stacks interleave gate and up: these are another model's")
    base = moe(model)
    loratool.merge(base, Adapter(ADAPTERS[names](), {}, Metadata("raw")), out=tmp_path / "merged")
    before, after = in_memory(base), in_memory(tmp_path / "merged")
    changed = {name: after[name] - before[name] for name in before if not np.array_equal(after[name], before[name])}
    assert len(changed) == 2
    both = next(v for n, v in changed.items() if n.endswith("experts.gate_up_proj"))
    down = next(v for n, v in changed.items() if n.endswith("experts.down_proj"))
    wanted = expected(model == "gpt_oss", model == "gpt_oss")
    np.testing.assert_allclose(both, wanted[0], atol=2e-6)
    np.testing.assert_allclose(down, wanted[1], atol=2e-6)


def test_the_merge_of_experts_is_proven_and_undone(moe: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = Adapter(ADAPTERS["others' names"](), {}, Metadata("raw"))
    loratool.merge(moe("gpt_oss"), adapter, out=tmp_path / "merged", undo=tmp_path / "undo")
    assert loratool.verify(moe("gpt_oss"), adapter, merged=tmp_path / "merged").ok
    loratool.unmerge(tmp_path / "merged", tmp_path / "again", undo=tmp_path / "undo")
    assert list(samples.fingerprint(tmp_path / "again").values()) == list(samples.fingerprint(moe("gpt_oss")).values())


def test_an_expert_that_needs_the_base_is_given_its_own_rows(tmp_path: Path) -> None:
    stack = values(E, 2 * I, H)
    base = samples.model(
        tmp_path / "base", {f"{LAYER}.mlp.experts.gate_up_proj": Tensor.of(stack)}, {"model_type": "qwen3_moe"}
    )
    dora = DoRA(UP[2], Tensor.of(np.abs(values(I)) + 1))
    adapter = Adapter({f"{LAYER}.mlp.experts.2.up_proj": dora}, {}, Metadata("raw"))
    loratool.merge(base, adapter, out=tmp_path / "merged")
    merged = read_model(tmp_path / "merged").parameters[f"{LAYER}.mlp.experts.gate_up_proj"][0].tensor.array()
    wanted = stack.copy()
    wanted[2, I:] = dora.apply(stack[2, I:])
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)


def merged_stack(
    tmp_path: Path, shape: tuple[int, ...], config: dict[str, Any], name: str, update: Update
) -> np.ndarray:
    stack = values(*shape)
    tensors = {f"{LAYER}.mlp.experts.gate_up_proj": Tensor.of(stack), "lm_head.weight": Tensor.of(values(3, 3))}
    base = samples.model(tmp_path / "base", tensors, config)
    loratool.merge(base, Adapter({name: update}, {}, Metadata("raw")), out=tmp_path / "merged")
    merged = read_model(tmp_path / "merged").parameters[f"{LAYER}.mlp.experts.gate_up_proj"][0].tensor.array()
    return np.asarray(merged - stack)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_type_with_both_orientations_is_told_by_its_shapes(transposed: bool, tmp_path: Path) -> None:
    shape = (E, H, 2 * I) if transposed else (E, 2 * I, H)
    config = {"model_type": "qwen3_vl_moe"}
    change = merged_stack(tmp_path, shape, config, f"{LAYER}.mlp.experts.1.gate_proj", GATE[1])
    wanted = np.zeros((E, 2 * I, H), np.float32)
    wanted[1, :I] = GATE[1].delta()
    np.testing.assert_allclose(change, wanted.swapaxes(1, 2) if transposed else wanted, atol=1e-6)


def test_what_the_type_does_not_tell_is_never_guessed(tmp_path: Path) -> None:
    gate = f"{LAYER}.mlp.experts.1.gate_proj"
    with pytest.raises(MatchError, match="how gate and up are stored"):
        merged_stack(tmp_path / "a", (E, 2 * I, H), {"model_type": "unheard_of"}, gate, GATE[1])
    with pytest.raises(MatchError, match="square"):
        square = lora(H, 2 * H)  # gate and up together are 2H x 2H
        merged_stack(tmp_path / "b", (E, 2 * H, 2 * H), {"model_type": "qwen3_vl_moe"}, gate, square)
    with pytest.raises(MatchError, match="no expert 7"):
        merged_stack(tmp_path / "c", (E, 2 * I, H), {"model_type": "mixtral"}, f"{LAYER}.mlp.experts.7.w1", GATE[1])
    with pytest.raises(MatchError, match="shapes differ"):
        merged_stack(tmp_path / "d", (E, 2 * I, H), {"model_type": "mixtral"}, gate, lora(I, H + 1))
    with pytest.raises(MatchError, match="shapes differ"):
        merged_stack(tmp_path / "e", (E, H, 2 * I), {"model_type": "mixtral"}, gate, GATE[1])


def test_an_expert_of_a_layer_that_is_not_there_is_unmatched(tmp_path: Path) -> None:
    with pytest.raises(MatchError, match="no target"):
        merged_stack(tmp_path, (E, 2 * I, H), {"model_type": "mixtral"}, "model.layers.1.mlp.experts.0.w1", GATE[0])


# ---------------------------------------------------------------- fused projections

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
HD = 3
Q, K = 4 * HD, 2 * HD


def test_parts_reach_a_fused_projection_in_blocks(tmp_path: Path) -> None:
    fused = values(Q + 2 * K, 5)
    base = samples.model(
        tmp_path / "base", {f"{LAYER}.self_attn.qkv_proj.weight": Tensor.of(fused)}, {"model_type": "phi3", **HEADS}
    )
    parts = {"q_proj": lora(Q, 5), "v_proj": lora(K, 5)}
    adapter = Adapter({f"{LAYER}.self_attn.{leaf}": low for leaf, low in parts.items()}, {}, Metadata("raw"))
    loratool.merge(base, adapter, out=tmp_path / "merged")
    merged = read_model(tmp_path / "merged").parameters[f"{LAYER}.self_attn.qkv_proj.weight"][0].tensor.array()
    wanted = fused.copy()
    wanted[:Q] += parts["q_proj"].delta()
    wanted[Q + K :] += parts["v_proj"].delta()
    np.testing.assert_allclose(merged, wanted, atol=1e-6)


@pytest.mark.parametrize(("kind", "keys"), [("gpt_neox", 4), ("falcon", 2), ("falcon", 1)])
def test_parts_reach_a_projection_interleaved_by_head(kind: str, keys: int, tmp_path: Path) -> None:
    config = {"model_type": kind, "num_attention_heads": 4, "num_kv_heads": keys, "new_decoder_architecture": keys == 2}
    fused = values((4 + 2 * keys) * HD, 5)
    name = "transformer.h.0.self_attention.query_key_value.weight"
    base = samples.model(tmp_path / "base", {name: Tensor.of(fused)}, config)
    sizes = {"q_proj": 4, "k_proj": keys, "v_proj": keys}
    parts = {leaf: lora(heads * HD, 5) for leaf, heads in sizes.items()}
    adapter = Adapter({f"transformer.h.0.self_attention.{n}": low for n, low in parts.items()}, {}, Metadata("raw"))
    loratool.merge(base, adapter, out=tmp_path / "merged")
    merged = read_model(tmp_path / "merged").parameters[name][0].tensor.array()
    q, k, v = (low.delta().reshape(keys, -1, HD, 5) for low in parts.values())
    wanted = fused + np.concatenate([q, k, v], axis=1).reshape(fused.shape)  # [group, q.. k v, head, in]
    np.testing.assert_allclose(merged, wanted, atol=1e-6)


def test_a_fused_projection_reaches_its_parts(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.self_attn.{n}_proj.weight": Tensor.of(values(s, 5)) for n, s in (("q", Q), ("k", K), ("v", K))}
    tensors |= {f"{LAYER}.mlp.{n}_proj.weight": Tensor.of(values(7, 5)) for n in ("gate", "up")}
    base = samples.model(tmp_path / "base", tensors, {"model_type": "llama", **HEADS})
    qkv, both = lora(Q + 2 * K, 5), lora(14, 5)
    updates: dict[str, Update] = {f"{LAYER}.self_attn.qkv_proj": qkv, f"{LAYER}.mlp.gate_up_proj": both}
    loratool.merge(base, Adapter(updates, {}, Metadata("raw")), out=tmp_path / "merged")
    merged = {n: at[0].tensor.array() for n, at in read_model(tmp_path / "merged").parameters.items()}
    change = {n.split(".")[-2]: merged[n] - tensors[n].array() for n in merged}
    rows = np.concatenate([change[n] for n in ("q_proj", "k_proj", "v_proj")])
    np.testing.assert_allclose(rows, qkv.delta(), atol=1e-6)
    np.testing.assert_allclose(np.concatenate([change["gate_proj"], change["up_proj"]]), both.delta(), atol=1e-6)


def test_heads_of_configurations() -> None:
    assert heads_of({"num_attention_heads": 8, "num_key_value_heads": 2}) == (8, 2)
    assert heads_of({"text_config": {"num_attention_heads": 8}}) == (8, 8)
    assert heads_of({"num_attention_heads": 8, "num_key_value_heads": 3}) is None
    assert heads_of({"num_attention_heads": "8"}) is None
    assert heads_of({}) is None


# ---------------------------------------------------------------- modules that changed their names

RENAMED = [
    ("vit.encoder.layer.3.attention.attention.query", "vit.layers.3.attention.q_proj"),
    ("encoder.layer.3.attention.output.dense", "layers.3.attention.o_proj"),
    ("vit.encoder.layer.3.intermediate.dense", "vit.layers.3.mlp.fc1"),
    ("model.layers.1.block_sparse_moe.gate", "model.layers.1.mlp.gate"),
    ("model.layers.1.block_sparse_moe.gate", "model.layers.1.mlp.router"),
    ("backbone.layers.2.mixer.in_proj", "model.layers.2.mixer.in_proj"),
    ("model.layers.2.block_sparse_moe.router.layer", "model.layers.2.block_sparse_moe.router"),
    ("language_model.model.layers.1.mlp.up_proj", "model.language_model.layers.1.mlp.up_proj"),
    ("language_model.lm_head", "lm_head"),
    ("embed_out", "lm_head"),
]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("one", "other"), RENAMED)
def test_names_of_both_versions_of_transformers_are_found(one: str, other: str, back: bool, tmp_path: Path) -> None:
    """llm trap 16 among them: the modules of ViT in transformers 5."""
    theirs, ours = (one, other) if back else (other, one)
    tensors = {f"{theirs}.weight": Tensor.of(values(7, 5)), "other.norm.weight": Tensor.of(values(7))}
    base = samples.model(tmp_path / "base", tensors)
    update = lora(7, 5)
    loratool.merge(base, Adapter({ours: update}, {}, Metadata("raw")), out=tmp_path / "merged")
    merged = read_model(tmp_path / "merged").parameters[f"{theirs}.weight"][0].tensor.array()
    np.testing.assert_allclose(merged - tensors[f"{theirs}.weight"].array(), update.delta(), atol=1e-6)


# ---------------------------------------------------------------- convert --layout

FOUR, FIVE = "transformers-4", "transformers-5"


def relaid(updates: dict[str, Update], layout: str, config: dict[str, Any]) -> Adapter:
    from loratool.ops.relayout import relayout

    return relayout(Adapter(updates, {}, Metadata("raw", base_config=config)), layout)


def one_of_each(model: str) -> dict[str, Update]:
    if model == "mixtral":
        return ADAPTERS["mixtral's names"]()
    return ADAPTERS["others' names"]()


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_experts_are_stacked_and_taken_apart_again(model: str) -> None:
    config = {"model_type": model, "hidden_size": H, "num_local_experts": E, "num_experts": E}
    alone = one_of_each(model)
    five = relaid(alone, FIVE, config)
    assert set(five.updates) == {f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj"}
    wanted = expected(False, False)
    for name, change in zip(("gate_up_proj", "down_proj"), wanted, strict=True):
        update = five.updates[f"{LAYER}.mlp.experts.{name}"]
        assert isinstance(update, Experts)
        np.testing.assert_allclose(update.delta(), change, atol=2e-6)
    four = relaid(dict(five.updates), FOUR, config)
    assert set(four.updates) == set(alone)
    for name, update in four.updates.items():
        assert isinstance(update, LowRank)
        np.testing.assert_allclose(update.delta(), alone[name].apply(np.zeros(update.shape, np.float32)), atol=2e-6)


def test_an_expert_without_an_update_and_one_of_another_rank_are_padded() -> None:
    config = {"model_type": "mixtral", "hidden_size": H, "num_local_experts": E}
    wide = LowRank(Tensor.of(values(3, I)), Tensor.of(values(H, 3)), alpha=1.0)
    prefix = f"{LAYER}.block_sparse_moe.experts"
    made = relaid({f"{prefix}.1.w2": DOWN[1], f"{prefix}.3.w2": wide, f"{prefix}.0.w3": UP[0]}, FIVE, config).updates
    down, both = made[f"{LAYER}.mlp.experts.down_proj"], made[f"{LAYER}.mlp.experts.gate_up_proj"]
    assert isinstance(down, Experts) and isinstance(both, Experts)
    change = np.zeros((E, H, I), np.float32)
    change[1], change[3] = DOWN[1].delta(), wide.delta()
    np.testing.assert_allclose(down.delta(), change, atol=2e-6)
    change = np.zeros((E, 2 * I, H), np.float32)
    change[0, I:] = UP[0].delta()
    np.testing.assert_allclose(both.delta(), change, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "four", "five"),
    [
        ("llava", "language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("llava", "language_model.lm_head", "lm_head"),
        ("qwen2_vl", "model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("qwen2_vl", "visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
        ("gpt_neox", "embed_out", "lm_head"),
        ("llama", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    ],
)
def test_prefixes_of_both_versions(kind: str, four: str, five: str) -> None:
    config = {"model_type": kind}
    for given, layout, wanted in ((four, FIVE, five), (five, FIVE, five), (five, FOUR, four), (four, FOUR, four)):
        assert list(relaid({given: lora(7, 5)}, layout, config).updates) == [wanted]


def test_a_layout_that_nothing_tells_is_refused() -> None:
    experts = one_of_each("mixtral")
    with pytest.raises(MatchError, match="type of the base model"):
        relaid(experts, FIVE, {})
    with pytest.raises(MatchError, match="how the experts"):
        relaid(experts, FIVE, {"model_type": "gpt_oss"})
    with pytest.raises(MatchError, match="expert 3 of 2"):
        relaid(experts, FIVE, {"model_type": "mixtral", "num_local_experts": 2})


def test_peft_loads_experts_that_were_stacked(moe: Callable[[str], Path], tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    alone = Adapter(one_of_each("mixtral"), {}, Metadata("raw"))
    loratool.write(alone, tmp_path / "four.safetensors", format="raw")
    loratool.convert(tmp_path / "four.safetensors", tmp_path / "five", to="peft", base=moe("mixtral"), layout=FIVE)
    loratool.merge(moe("mixtral"), alone, out=tmp_path / "merged")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")(tokens).logits
        model = AutoModelForCausalLM.from_pretrained(moe("mixtral"), dtype="float32")
        plain = model(tokens).logits
        adapted = PeftModel.from_pretrained(model, tmp_path / "five")(tokens).logits
    assert (merged - plain).abs().max() > 1e-3
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- PEFT's own merge of whole families

STACKS_OF = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SMALL: dict[str, Any] = {**TINY, "pad_token_id": 0, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
OWN: dict[str, tuple[dict[str, Any], list[str]]] = {  # what differs from SMALL, and the parameters that are stacks
    "opt": ({"ffn_dim": 24, "word_embed_proj_dim": H, "max_position_embeddings": 16}, []),
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None}, []),
    "gpt_neox": ({"rotary_pct": 0.5}, []),
    "phi3": ({}, []),
    "qwen3_moe": ({**MODELS["qwen2_moe"], "num_hidden_layers": 2}, []),
    "mixtral": ({}, STACKS_OF),
    "minimax_m2": ({"num_local_experts": E}, []),
    "deepseek_v3": (
        {
            **{"moe_intermediate_size": I, "n_routed_experts": E, "n_group": 1, "topk_group": 1, "q_lora_rank": 6},
            **{"kv_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4},
            **{"num_experts_per_tok": 2, "num_hidden_layers": 2, "first_k_dense_replace": 1},
        },
        STACKS_OF,
    ),
    "gpt_oss": ({}, STACKS_OF),
}


ROUTED = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "minimax_m2")


@pytest.mark.peer
@pytest.mark.parametrize("name", OWN)
def test_families_are_merged_as_peft_merges_them(name: str, tmp_path: Path) -> None:
    """Every linear layer, and stacks of experts: the weights that transformers loads are those of PEFT's merge.

    Where the stacks are not named, PEFT names them itself for some families, and the routers with them.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    own, parameters = OWN[name]
    torch.manual_seed(0)
    settings = {key: value for key, value in {**SMALL, **own}.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings))
    model.save_pretrained(tmp_path / "base")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", init_lora_weights=False)
    config.target_parameters = parameters or None
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "lora")
    wanted = tuned.merge_and_unload().state_dict()
    loratool.merge(tmp_path / "base", tmp_path / "lora", out=tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").state_dict()
    changed = {key for key in before if not torch.equal(before[key], wanted[key])}
    assert len(changed) >= 4 and any("experts" in key for key in changed) is (name in ROUTED)
    assert {key for key in before if not torch.equal(before[key], found[key])} == changed
    for key in changed:
        torch.testing.assert_close(found[key], wanted[key], atol=1e-6, rtol=1e-5)
