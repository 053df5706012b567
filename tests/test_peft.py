"""PEFT folders: read and written as PEFT itself does, and what is no plain LoRA is refused by name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loratool
from loratool.adapter import Adapter
from loratool.errors import FormatError, LossError
from loratool.formats import by_name
from loratool.formats.peft import normalise, types
from loratool.formats.peft.config import Patterns
from loratool.tensors import Tensor, read_safetensors, write_safetensors
from loratool.update import Dense, DoRA, LowRank, Sum
from tests import models, samples
from tests.laws import examples
from tests.samples import PEFT_CONFIG, assert_same_adapter, low, magnitude, normal, peft_folder, peft_pair

Make = Callable[..., Path]
PREFIX = "base_model.model."
MODULE = "model.layers.0.self_attn.q_proj"
PAIR = peft_pair(MODULE)
CONFIG = dict(PEFT_CONFIG)
every_pair = pytest.mark.parametrize(("name", "kind"), models.PAIRS)


def folder_of(path: Path, tensors: Mapping[str, Tensor] = PAIR, config: Mapping[str, Any] | None = CONFIG) -> Path:
    return peft_folder(path, tensors, config)


def rewritten(adapter: Adapter, folder: Path) -> Path:
    loratool.write(adapter, folder / "again", format="peft")
    return folder / "again"


# -- what PEFT writes ----------------------------------------------------------------------------------------


@every_pair
def test_a_folder_is_read_and_written_byte_for_byte(name: str, kind: str, lora: Make, tmp_path: Path) -> None:
    source = lora(name, kind)
    adapter = loratool.read(source)
    again = rewritten(adapter, tmp_path)
    files = [folder / "adapter_model.safetensors" for folder in (source, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (source, again)]
    ignored = {"fan_in_fan_out"}  # PEFT takes it from the class of the layer
    assert {k: v for k, v in configs[0].items() if k not in ignored} == {
        k: v for k, v in configs[1].items() if k not in ignored
    }
    assert_same_adapter(adapter, loratool.read(again))


DEEP = [("llama", "rslora_patterns"), ("llama", "dora_patterns")]


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n, k in models.PAIRS if n in ("llama_tied", "gpt2", "convnet") or "conv" in k or (n, k) in DEEP],
)
def test_a_configuration_made_anew_says_the_same(name: str, kind: str, base: Make, lora: Make, tmp_path: Path) -> None:
    """PEFT loads it without a missing or unexpected key, to the very same weights in the very same layers."""
    import torch
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    again = rewritten(loratool.read(lora(name, kind)).with_metadata(config={}), tmp_path)
    one, other = (PeftModel.from_pretrained(models.load_model(base(name)), at) for at in (lora(name, kind), again))
    loaded = set_peft_model_state_dict(other, load_peft_weights(again, device="cpu"))
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [key for key, value in states[0].items() if not torch.equal(value, states[1][key])] == []
    layers = zip(one.modules(), other.modules(), strict=True)
    scalings = [(a.scaling, b.scaling) for a, b in layers if hasattr(a, "scaling") and hasattr(a, "lora_A")]
    assert scalings and all(a == b for a, b in scalings)
    biases = {"bias_all": "all", "bias_lora_only": "lora_only"}
    assert json.loads((again / "adapter_config.json").read_text())["bias"] == biases.get(kind, "none")


@every_pair
def test_every_tensor_is_an_update_or_carried(name: str, kind: str, lora: Make) -> None:
    """CLI law 1: nothing is skipped in silence."""
    adapter = loratool.read(lora(name, kind))
    stored = read_safetensors(lora(name, kind) / "adapter_model.safetensors").tensors
    assert sum(len(u.slots) for u in adapter.updates.values()) + len(adapter.carried) == len(stored)
    assert set(adapter.spellings) >= {*adapter.modules(), *adapter.carried}
    kinds = {type(u) for u in adapter.modules().values()}
    assert kinds == {DoRA if "dora" in kind else LowRank}


def test_metadata_and_tokenizer_files_travel(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "x")
    write_safetensors(tmp_path / "y", PAIR, {"format": "pt", "trained_by": "me"})
    shutil.move(tmp_path / "y", source / "adapter_model.safetensors")
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (source / name).write_text(name)
    again = rewritten(loratool.read(source), tmp_path)
    assert (again / "tokenizer.json").read_text() == "tokenizer.json"
    assert (again / "chat_template.jinja").is_file() and not (again / "README.md").exists()
    assert read_safetensors(again / "adapter_model.safetensors").metadata["trained_by"] == "me"


def test_targets_that_exist_nowhere_do_no_harm(tmp_path: Path) -> None:
    """llm trap 12: the tensors tell what was trained; other names in the configuration are those of other models."""
    config = CONFIG | {"target_modules": ["q", "k", "v", "q_proj"], "rank_pattern": {"nowhere": 7}}
    adapter = loratool.read(folder_of(tmp_path / "x", config=config))
    assert list(adapter.updates) == [MODULE] and adapter.updates[MODULE].rank == low().rank
    assert list(loratool.read(rewritten(adapter, tmp_path)).updates) == [MODULE]


# -- rank_pattern and alpha_pattern --------------------------------------------------------------------------

PIECES = st.sampled_from(("layers", "1", "11", "q_proj", "proj", "_proj", "attn", "X", "mlp"))
NAMES = st.lists(PIECES, min_size=1, max_size=4).map(".".join)
KEYS = NAMES | st.sampled_from(
    (r"layers.1.q", r".*attn.*", "^q_proj", "^layers.1.q_proj", "(q|k)_proj", r"layers\.1+\..*", "proj|mlp", r"q_proj$")
)


@pytest.mark.peer
@examples(300)
@given(st.lists(KEYS, max_size=4, unique=True), NAMES)
def test_patterns_match_as_in_peft(keys: list[str], module: str) -> None:
    """llm trap 14: regular expressions with a dot boundary in front; the first in order wins."""
    from peft.utils.other import get_pattern_key

    table = {key: number for number, key in enumerate(keys)}
    expected = table.get(get_pattern_key(table.keys(), module), -1)
    assert Patterns(table, "rank_pattern", Path("x")).get(module, -1) == expected


@pytest.mark.peer
@examples(80)
@given(st.dictionaries(NAMES, st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=6))
def test_patterns_that_are_written_say_what_is_meant(table: dict[str, tuple[int, int]]) -> None:
    """A name that is the tail of another gets its own rank and alpha."""
    from peft.utils.other import get_pattern_key

    from loratool.formats.peft.writing_config import configuration

    plain = {name: low(r=rank, alpha=float(alpha)) for name, (rank, alpha) in table.items()}
    config = configuration(samples.adapter("lora").with_metadata(config={}), plain, False)
    for name, (rank, alpha) in table.items():
        for field, default, value in (("rank_pattern", "r", rank), ("alpha_pattern", "lora_alpha", alpha)):
            found = config[field].get(get_pattern_key(config[field].keys(), name), config[default])
            assert found == value, (field, name, config[field])


def test_a_catastrophic_pattern_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLI law 7: regexes are bounded."""
    monkeypatch.setattr(Patterns, "seconds", 0.2)
    name = "a" * 60 + "!"
    tensors = peft_pair(name)
    for field in ("rank_pattern", "alpha_pattern"):
        path = folder_of(tmp_path / field, tensors, CONFIG | {field: {"(a|a|aa)+(a|a)+b": 4}})
        with pytest.raises(FormatError, match=f"{field} take too long"):
            loratool.read(path)


def test_what_peft_cannot_say_is_asked_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts one by one are tens of thousands of modules: no question of each about all others."""
    asked: list[str] = []
    monkeypatch.setattr("loratool.formats.peft.writing.is_in_proj", lambda name: bool(asked.append(name)))
    many = adapter_of(**{f"layers.{n}.q_proj": low() for n in range(100)})
    assert not by_name("peft").losses(many)
    assert len(asked) <= 300


def test_slow_patterns_are_bounded_together() -> None:
    """A thousand modules cannot take a thousand times what one may."""
    patterns = Patterns({"(a|a|aa)+b": 4}, "rank_pattern", Path("x"))
    patterns.seconds = 0.2
    with pytest.raises(FormatError, match="take too long"):
        for n in range(10**6):
            patterns.get("a" * 18 + f".{n}", 0)
    assert patterns.seconds <= 0


@pytest.mark.parametrize("pattern", [{"(": 3}, ["q_proj"], "q_proj", {"q_proj": "3"}, {"q_proj": None}])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_malformed_pattern_is_refused(pattern: Any, field: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        loratool.read(folder_of(tmp_path / "x", config=CONFIG | {field: pattern}))


def test_rank_stabilised_scaling_uses_the_modules_own_rank(tmp_path: Path) -> None:
    """llm trap 17."""
    config = CONFIG | {"r": 9, "rank_pattern": {"q_proj": 3}, "use_rslora": True}
    found = loratool.read(folder_of(tmp_path / "x", config=config)).updates[MODULE]
    assert found.scaling == 6 / 3**0.5


def test_alpha_may_be_a_fraction_or_missing(tmp_path: Path) -> None:
    told = loratool.read(folder_of(tmp_path / "x", config=CONFIG | {"lora_alpha": 4.5}))
    assert told.updates[MODULE].scaling == 1.5
    config = {key: value for key, value in CONFIG.items() if key != "lora_alpha"}
    silent = loratool.read(folder_of(tmp_path / "y", config=config))
    assert silent.updates[MODULE].alpha == 8.0 and "lora_alpha" in silent.metadata.warnings[0]


# -- the spellings of llm.md 1.4 -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "down", "up"),
    [
        (f"{PREFIX}{MODULE}", "lora_A.default.weight", "lora_B.default.weight"),
        (f"{PREFIX}{MODULE}", "lora_A.weight", "lora_B.weight"),
        (f"{PREFIX}{MODULE}", "lora_A.lora.weight", "lora_B.lora.weight"),
        (f"{PREFIX}{MODULE}", "lora_A.q_proj.weight", "lora_B.q_proj.weight"),
        (f"{PREFIX}{MODULE}", "lora_A.weights.weight", "lora_B.weights.weight"),
        (f"{PREFIX}{MODULE}", "lora_A", "lora_B"),
        (f"{PREFIX}{MODULE}", "lora_A.default", "lora_B.default"),
        (f"{PREFIX}{PREFIX}{MODULE}", "lora_A.weight", "lora_B.weight"),
        (f"_orig_mod.{PREFIX}{MODULE}", "lora_A.weight", "lora_B.weight"),
        (f"module.{PREFIX}{MODULE}", "lora_A.weight", "lora_B.weight"),
        (f"module._orig_mod.{PREFIX}{MODULE}", "lora_A.weight", "lora_B.weight"),
        (f"{PREFIX}_orig_mod.{MODULE}", "lora_A.weight", "lora_B.weight"),
        (f"{PREFIX}_fsdp_wrapped_module.{MODULE}", "lora_A.weight", "lora_B.weight"),
        (f"{PREFIX}{MODULE.replace('.self', '._checkpoint_wrapped_module.self')}", "lora_A.weight", "lora_B.weight"),
        (MODULE, "lora_A.weight", "lora_B.weight"),
        (MODULE, "lora_A.default.weight", "lora_B.default.weight"),
    ],
)
def test_the_spellings_of_raw_dumps(module: str, down: str, up: str, tmp_path: Path) -> None:
    """llm trap 15 among them: the adapter's name goes, even where it is the name of a module."""
    tensors = {f"{module}.{down}": low().down, f"{module}.{up}": low().up}
    assert_same_adapter(loratool.read(folder_of(tmp_path / "x", tensors)), loratool.read(folder_of(tmp_path / "y")))


@pytest.mark.parametrize(
    "key",
    ["lora_magnitude_vector", *(f"lora_magnitude_vector{end}" for end in (".weight", ".default", ".default.weight"))],
)
def test_the_spellings_of_magnitudes(key: str, tmp_path: Path) -> None:
    tensors = {**PAIR, f"{PREFIX}{MODULE}.{key}": magnitude(7)}
    found = loratool.read(folder_of(tmp_path / "x", tensors, CONFIG | {"use_dora": True})).updates[MODULE]
    samples.assert_same(found, DoRA(low(), magnitude(7)))


@pytest.mark.parametrize("end", ["", ".default"])
def test_the_spellings_of_embeddings(end: str, tmp_path: Path) -> None:
    a, b = normal(3, 11), normal(4, 3, seed=1)
    name = f"{PREFIX}model.embed_tokens.lora_embedding"
    adapter = loratool.read(folder_of(tmp_path / "x", {f"{name}_A{end}": a, f"{name}_B{end}": b}))
    found = adapter.updates["model.embed_tokens"]
    assert isinstance(found, LowRank) and found.layer == "embedding" and found.shape == (11, 4)
    np.testing.assert_allclose(found.delta(), 2 * (b.array() @ a.array()).T, atol=1e-5)


def test_whole_modules_are_kept_and_their_originals_dropped(tmp_path: Path) -> None:
    """llm traps 11 and 40: heads are carried whatever modules_to_save says; base_layer is the base, no delta."""
    head, saved = f"{PREFIX}score", normal(2, 5)
    tensors = {
        **PAIR,
        f"{head}.modules_to_save.default.weight": saved,
        f"{head}.original_module.weight": normal(2, 5, seed=1),
        f"{PREFIX}classifier.bias": normal(2),
        f"{PREFIX}model.embed_tokens.base_layer.weight": normal(11, 4),
    }
    found = loratool.read(folder_of(tmp_path / "x", tensors))
    assert set(found.carried) == {"score.weight", "classifier.bias", "model.embed_tokens.weight"}
    assert found.carried["score.weight"].same_bytes(saved)
    assert list(found.updates) == [MODULE]


def test_a_plain_lora_starts_without_the_other_kinds(tmp_path: Path) -> None:
    """What only another tuner, a pattern or the writer needs is not imported to describe a LoRA."""
    code = "import sys, loratool; loratool.read(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-c", code, str(folder_of(tmp_path))]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(loratool.__file__).parents[1])
    found = set(run.stdout.split())
    assert "loratool.formats.peft.reading" in found
    late = ("tuners", "rows", "writing", "writing_config", *types.HOMES)
    assert not found & {"numpy", "regex", "loratool.formats.slots", *(f"loratool.formats.peft.{name}" for name in late)}
    assert not [name for name in found if name.startswith(("loratool.kinds.", "loratool.onnx.graph"))]


def test_two_spellings_of_one_slot_are_refused(tmp_path: Path) -> None:
    """CLI law 1: never the last one taken."""
    tensors = {**PAIR, f"{MODULE}.lora_A.weight": low().down}
    with pytest.raises(FormatError, match="two tensors for down") as caught:
        loratool.read(folder_of(tmp_path / "x", tensors))
    assert "adapter_model.safetensors" in str(caught.value)


def test_two_spellings_of_one_whole_tensor_are_refused(tmp_path: Path) -> None:
    tensors = {**PAIR, f"{PREFIX}score.weight": normal(2, 5), "score.weight": normal(2, 5, seed=1)}
    with pytest.raises(FormatError, match=r"two tensors for score\.weight"):
        loratool.read(folder_of(tmp_path / "x", tensors))


@pytest.mark.parametrize("name", ["module.model.layers.0", "model.module.layers.0", "my_orig_mod.layer"])
def test_modules_called_like_wrappers_keep_their_names(name: str) -> None:
    """Only a leading `module.` is a wrapper's."""
    assert normalise(f"{PREFIX}{name}.lora_A.weight") == f"{name}.lora_A.weight"


def test_a_file_without_configuration_does_not_tell_its_scaling(tmp_path: Path) -> None:
    """llm trap 68: asked for, never guessed."""
    path = folder_of(tmp_path / "x", config=None)
    silent = loratool.read(path)
    assert not silent.metadata.scaling_known and silent.metadata.warnings
    told = loratool.read(path, reading=loratool.Reading(scaling=2.0))
    assert told.metadata.scaling_known and told.updates[MODULE].scaling == 2.0
    with pytest.raises(FormatError, match="does not tell its scaling"):
        loratool.write(silent, tmp_path / "y", format="raw")


# -- what is refused, by name --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alora_invocation_tokens", [1, 2], "activated LoRA"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("enable_lora", [True, False, True], "merged projections"),
        ("use_bdlora", {"target_modules_bd_a": ["x"]}, "use_bdlora means neither"),
        ("kasa_config", {"beta": 1}, "lora_diag is missing"),
        *(
            ("init_lora_weights", init, f"{init}.*changed the base")
            for init in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "PiSSA")
        ),
    ],
)
def test_other_mathematics_is_refused_by_name(field: str, value: Any, message: str, tmp_path: Path) -> None:
    """llm traps 30, 36, 67."""
    with pytest.raises(FormatError, match=message):
        loratool.read(folder_of(tmp_path / "x", config=CONFIG | {field: value}))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_initialisers_that_leave_the_base_alone_are_read(init: Any, tmp_path: Path) -> None:
    assert loratool.read(folder_of(tmp_path / "x", config=CONFIG | {"init_lora_weights": init})).updates


@pytest.mark.parametrize("kind", ["lora", "Lora"])
def test_the_tuner_is_compared_without_case(kind: str, tmp_path: Path) -> None:
    assert loratool.read(folder_of(tmp_path / "x", config={**CONFIG, "peft_type": kind})).updates


HEAD = f"{PREFIX}{MODULE}"
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "no_up": ({f"{HEAD}.lora_A.weight": low().down}, {}, f"half a pair: {MODULE} has down but no up"),
    "no_down": ({f"{HEAD}.lora_B.weight": low().up}, {}, f"half a pair: {MODULE} has up but no down"),
    "magnitude_alone": ({f"{HEAD}.lora_magnitude_vector": magnitude(7)}, {}, "magnitude but no factors"),
    "rank_of_config": (PAIR, {"r": 4}, "says rank 4, the tensors have rank 3"),
    "rank_of_pattern": (PAIR, {"rank_pattern": {"q_proj": 2}}, "says rank 2, the tensors have rank 3"),
    "ranks": (
        {f"{HEAD}.lora_A.weight": normal(3, 5), f"{HEAD}.lora_B.weight": normal(7, 2)},
        {},
        "rank mismatch",
    ),
    "mixed_pair": (
        {f"{HEAD}.lora_A.weight": normal(3, 5), f"{HEAD}.lora_embedding_B": normal(7, 3)},
        {},
        "half a pair|Linear and of an Embedding",
    ),
    "both_pairs": (
        {**PAIR, f"{HEAD}.lora_embedding_A": normal(3, 5), f"{HEAD}.lora_embedding_B": normal(7, 3)},
        {},
        "Linear and of an Embedding",
    ),
    "zero3_empty": (
        {f"{HEAD}.lora_A.weight": normal(0), f"{HEAD}.lora_B.weight": normal(0)},
        {},
        "partial save",
    ),
    "zero3_flat": (
        {f"{HEAD}.lora_A.weight": normal(15), f"{HEAD}.lora_B.weight": normal(21)},
        {},
        "partial save",
    ),
    "zero3_rows": (
        {f"{HEAD}.lora_A.weight": normal(3, 0), f"{HEAD}.lora_B.weight": normal(7, 3)},
        {},
        "no LoRA pair",
    ),
    "no_magnitudes": (PAIR, {"use_dora": True}, "magnitudes are missing"),
    "integers": (
        {f"{HEAD}.lora_A.weight": Tensor.of(np.ones((3, 5), np.int8)), f"{HEAD}.lora_B.weight": low().up},
        {},
        "stored as I8",
    ),
    "alpha_text": (PAIR, {"lora_alpha": "6"}, "alpha is '6'"),
    "alpha_boolean": (PAIR, {"lora_alpha": True}, "alpha is True"),
    "unknown_tensor": ({**PAIR, f"{PREFIX}model.mystery": normal(3)}, {}, "meaning is unknown"),
    "unknown_kind": ({**PAIR, f"{PREFIX}proj.lora_route": normal(3)}, {}, "kind that is not supported"),
    "nested": (
        {
            f"{PREFIX}mlp.experts.base_layer.lora_A.weight": normal(3, 5),
            f"{PREFIX}mlp.experts.base_layer.lora_B.weight": normal(7, 3),
        },
        {},
        "nested wrappers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """llm trap 62 among them: partial ZeRO-3 saves."""
    tensors, changes, message = REFUSED[name]
    with pytest.raises(FormatError, match=message) as caught:
        loratool.read(folder_of(tmp_path / "x", tensors, CONFIG | changes))
    assert str(tmp_path / "x") in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '"LORA"', "3", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_malformed_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (folder_of(tmp_path / "x") / "adapter_config.json").write_text(text)
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        loratool.read(tmp_path / "x")


@pytest.mark.parametrize("value", [7, [], {}, None])
def test_a_peft_type_that_is_no_text_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        loratool.read(folder_of(tmp_path / "x", config={**CONFIG, "peft_type": value}))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """CLI law 7."""
    source = folder_of(tmp_path / "x")
    shutil.move(source / "adapter_model.safetensors", tmp_path / "elsewhere.safetensors")
    (source / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FormatError, match="link leaves its folder"):
        loratool.read(source)
    assert loratool.read(source, reading=loratool.Reading(allow_links=True)).updates


# -- pickles -------------------------------------------------------------------------------------------------


def pickled(folder: Path, state: Any, config: Mapping[str, Any] = CONFIG) -> Path:
    import torch

    folder.mkdir()
    torch.save(state, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


ALLOWED = loratool.Reading(allow_pickle=True)


def test_a_pickle_is_read_only_on_the_users_word(tmp_path: Path) -> None:
    import torch

    state = {key: torch.from_numpy(tensor.array().copy()) for key, tensor in PAIR.items()}
    path = pickled(tmp_path / "x", state)
    with pytest.raises(FormatError, match="pickle") as caught:
        loratool.read(path)
    assert "--allow-pickle" in caught.value.hint
    assert_same_adapter(loratool.read(path, reading=ALLOWED), loratool.read(folder_of(tmp_path / "y")))


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"x": bomb}])
@pytest.mark.parametrize("old", [False, True])
def test_a_malicious_pickle_runs_nothing(wrap: Any, old: bool, tmp_path: Path) -> None:
    """llm trap 60."""
    import torch

    path = pickled(tmp_path / "x", {})
    bomb = wrap(Malicious(str(tmp_path / "exploded")))
    torch.save(bomb, path / "adapter_model.bin", _use_new_zipfile_serialization=not old)
    for reading in (None, ALLOWED):
        with pytest.raises(FormatError):
            loratool.read(path, reading=reading)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("state", [{"a": 3}, [1, 2], {"a": {"b": 1}}, 7])
def test_a_pickle_of_other_things_is_refused(state: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="more than a table of tensors"):
        loratool.read(pickled(tmp_path / "x", state), reading=ALLOWED)


def test_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    path = pickled(tmp_path / "x", {})
    for data in (b"PK\x03\x04" + b"\0" * 50, b"\x80\x02}q\x00", b"\x80\x02garbage"):
        (path / "adapter_model.bin").write_bytes(data)
        with pytest.raises(FormatError, match="not a readable pickle"):
            loratool.read(path, reading=ALLOWED)


# -- what PEFT cannot say ------------------------------------------------------------------------------------


def adapter_of(**updates: Any) -> Adapter:
    found = samples.adapter("lora").with_metadata(config={})
    return Adapter({f"net.{name}": update for name, update in updates.items()}, {}, found.metadata)


@pytest.mark.parametrize(
    ("updates", "lost"),
    [
        ({"a": low(), "b": Dense(normal(7, 5))}, "net.b: an update of kind full"),
        ({"a": DoRA(low(), magnitude(5), 1)}, "net.a: a DoRA magnitude for each input"),
        ({"a": low(), "b": DoRA(low(), magnitude(7))}, "net.a: a LoRA beside DoRA"),
        ({"a": low(), "b.bias": Dense(normal(7), kind="bias")}, "net.b.bias: a bias delta without a LoRA"),
    ],
)
def test_what_peft_cannot_say_is_a_loss(updates: Any, lost: str, tmp_path: Path) -> None:
    adapter = adapter_of(**updates)
    with pytest.raises(LossError) as caught:
        loratool.write(adapter, tmp_path / "x", format="peft")
    assert len(caught.value.losses) == 1 and caught.value.losses[0].startswith(lost)
    assert not (tmp_path / "x").exists()
    loratool.write(adapter, tmp_path / "x", format="peft", allow_loss=True)
    kept = set(adapter.updates) - {lost.split(":")[0]}
    if kept:
        assert set(loratool.read(tmp_path / "x").updates) == kept


@pytest.mark.parametrize("name", ["lora_tucker", "lora_conv2d", "lora_without_alpha", "lora_alpha_zero", "sum"])
def test_what_has_a_lora_form_is_written_with_the_same_delta(name: str, tmp_path: Path) -> None:
    """An exact rewriting is no loss."""
    update = samples.ADDITIVE[name]
    loratool.write(adapter_of(m=update), tmp_path / "x", format="peft")
    found = loratool.read(tmp_path / "x").updates["net.m"]
    np.testing.assert_allclose(found.delta(), update.delta(), atol=1e-5)  # type: ignore[attr-defined]


def test_rank_stabilised_beside_plain_is_folded_into_alpha(tmp_path: Path) -> None:
    """use_rslora holds for all modules of a folder: the scalings stay what they were."""
    updates = {"a": low(rank_stabilised=True), "b": low(alpha=None), "c": Sum((low(), low(r=2, seed=3)))}
    loratool.write(adapter_of(**updates), tmp_path / "x", format="peft")
    found = loratool.read(tmp_path / "x").updates
    for name, update in updates.items():
        np.testing.assert_allclose(found[f"net.{name}"].delta(), update.delta(), atol=1e-5)  # type: ignore[attr-defined]


def test_lora_bias_of_another_scaling_is_rescaled(tmp_path: Path) -> None:
    """llm trap 35: PEFT multiplies lora_B.bias by the scaling of the pair."""
    updates = {"a": low(), "a.bias": Dense(normal(7), 0.5, "bias"), "b": low(seed=3)}
    loratool.write(adapter_of(**updates), tmp_path / "x", format="peft")
    found = loratool.read(tmp_path / "x").updates
    np.testing.assert_allclose(found["net.a.bias"].delta(), 0.5 * normal(7).array(), rtol=1e-6)  # type: ignore[attr-defined]
    assert not found["net.b.bias"].delta().any()  # type: ignore[attr-defined]


# -- the real world ------------------------------------------------------------------------------------------


def test_real_gpt2(real: Path) -> None:
    """llm trap 11: a whole head although modules_to_save is null."""
    found = loratool.read(real / "llm" / "peft-gpt2")
    assert {u.rank for u in found.updates.values()} == {8}
    assert "score.weight" in found.carried


def test_real_pickle(real: Path) -> None:
    with pytest.raises(FormatError, match="pickle"):
        loratool.read(real / "llm" / "peft-bin")
    found = loratool.read(real / "llm" / "peft-bin", reading=ALLOWED)
    assert found.updates and {u.kind for u in found.updates.values()} == {"lora"}


def test_a_bare_parameter_is_a_loss_where_peft_cannot_save_it(tmp_path: Path) -> None:
    """It is saved with its whole module: not where that one has a LoRA inside, or is the model itself."""
    adapter = loratool.read(folder_of(tmp_path / "in"))
    one = Tensor.of(np.ones(3, np.float32))
    inside = MODULE.rpartition(".")[0] + ".scale"
    for name in ("logit_scale", inside):
        bare = replace(adapter, carried={name: one})
        with pytest.raises(LossError, match=re.escape(name)):
            loratool.write(bare, tmp_path / name, format="peft")
        assert [loss.name for loss in loratool.write(bare, tmp_path / name, format="peft", allow_loss=True)] == [name]
        assert not loratool.read(tmp_path / name).carried
    loratool.write(replace(adapter, carried={"mixer.A_log": one}), tmp_path / "out", format="peft")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["mixer"]
    assert loratool.read(tmp_path / "out").carried["mixer.A_log"].same_bytes(one)


def test_a_module_to_save_is_meant_by_the_end_of_its_name(tmp_path: Path) -> None:
    """llm trap 10: `classifier` saves `pre_classifier` as well; what no entry means is refused."""
    tensors = {**PAIR, f"{PREFIX}net.pre_classifier.scale": normal(3)}
    found = loratool.read(folder_of(tmp_path / "x", tensors, CONFIG | {"modules_to_save": ["classifier"]}))
    assert set(found.carried) == {"net.pre_classifier.scale"}
    with pytest.raises(FormatError, match="meaning is unknown"):
        loratool.read(folder_of(tmp_path / "y", tensors, CONFIG | {"modules_to_save": ["pre_classifier.scale"]}))
