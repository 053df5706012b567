"""What `loratool formats` says of each format and kind is what the format does with adapters of that kind.

An adapter of every form of every kind goes through each format that is written, and its effect on a weight is
compared; the README's table says the same. ``make readme`` writes that table anew.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from loratool import cli
from loratool.adapter import Adapter, Metadata
from loratool.formats import FORMATS, by_name, table
from loratool.formats.base import IMAGE_FORMATS, Evidence
from loratool.formats.llm import Uniform
from loratool.kinds import based, composed, factored
from loratool.kinds.glora import GLoRA
from loratool.kinds.kronecker import LoKr
from loratool.kinds.rescale import IA3
from loratool.kinds.rotation import BOFT, OFT, PeftBOFT, PeftOFT
from loratool.kinds.tokens import Tokens
from loratool.kinds.truncated import Truncated
from loratool.tensors import Tensor
from loratool.update import Dense, DoRA, Update
from tests.samples import UPDATES, loha, low, magnitude, normal, tuners

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- written by: make readme -->\n", "<!-- end -->\n"
HEIGHT, WIDTH = 8, 12
SIZE = (HEIGHT, WIDTH)
TUNERS = tuners(HEIGHT, WIDTH)
ROAD = next(update for update in TUNERS.values() if isinstance(update, based.Road))

Form = Mapping[str, Update]  # what stands behind the module's name -> update


def _plain(*updates: Update) -> tuple[Form, ...]:
    return tuple({"": update} for update in updates)


def _places() -> Tensor:
    """Twenty entries of a weight."""
    return Tensor.of(np.stack(np.unravel_index(np.arange(0, 60, 3), SIZE)).astype(np.int32))


FORMS: Mapping[str, tuple[Form, ...]] = {
    **{update.kind: _plain(update) for update in reversed(TUNERS.values())},  # the first of each kind
    "lora": _plain(low(*SIZE)),
    "dora": _plain(DoRA(low(*SIZE), magnitude(HEIGHT))),
    "kasa": _plain(Truncated(low(*SIZE), normal(3))),
    "bone": _plain(factored.Bone(block=normal(5, HEIGHT), size=SIZE)),
    "loha": _plain(loha(*SIZE)),
    "lokr": _plain(
        LoKr(w1=normal(2, 3), w2_a=normal(4, 1, seed=1), w2_b=normal(1, 4, seed=2), alpha=3.0),
        LoKr(w1=normal(2, 3), w2=normal(4, 4, seed=1), alpha=3.0),
    ),
    "glora": _plain(
        GLoRA(normal(WIDTH, 2), normal(2, WIDTH), normal(HEIGHT, 2), normal(2, WIDTH, seed=1), alpha=3.0),
        TUNERS["peft_glora"],
    ),
    "ia3": _plain(IA3(normal(HEIGHT), weight=SIZE), IA3(normal(1, WIDTH), True, 1.0, weight=SIZE)),
    "oft": _plain(OFT(normal(2, 4, 4), weight=SIZE), PeftOFT(normal(3, 6), neumann_terms=5, weight=SIZE)),
    "boft": _plain(
        BOFT(normal(2, 2, 4, 4), weight=SIZE), PeftBOFT(normal(1, 3, 4, 4), magnitude(HEIGHT, 1), weight=SIZE)
    ),
    "full": _plain(Dense(normal(*SIZE))),
    "norm": _plain(Dense(normal(HEIGHT), kind="norm")),
    "ln_tuning": _plain(based.LnTuning(normal(HEIGHT))),
    "beft": ({".bias": based.BiasShift(normal(HEIGHT))},),
    "trainable_tokens": _plain(Tokens.at([1, 3], normal(2, WIDTH))),
    "shira": _plain(composed.Shira(values=normal(20), index=_places(), size=SIZE)),  # as many as PEFT's rank 1 has
    "road": ({"": ROAD, ".bias": replace(ROAD, of_bias=True, size=())},),
}

# where an adapter of a kind lies in a language model, and in an image model
NAMES = {
    "norm": ("model.layers.0.input_layernorm", "unet.mid_block.attentions.0.norm"),
    "ln_tuning": ("model.layers.0.input_layernorm", "unet.mid_block.attentions.0.norm"),
    "trainable_tokens": ("model.embed_tokens", "text_encoder.text_model.embeddings.token_embedding"),
}
USUAL = ("model.layers.0.mlp.up_proj", "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
LLAMA = {
    **{"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": HEIGHT, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16},
}


def made(kind: str, form: Form, image: bool) -> Adapter:
    """An adapter of one module."""
    name = NAMES.get(kind, USUAL)[image]
    told = Metadata("sample", architecture="sd1") if image else Metadata("sample", base_config=LLAMA)
    return Adapter({name + leaf: update for leaf, update in form.items()}, {}, told)


def effect(update: Update, shape: tuple[int, ...]) -> np.ndarray:
    """What an update makes of some weight of that shape; what is not known of it is as large as the usual one."""
    shape = tuple(known or size for known, size in zip(shape, SIZE, strict=False))
    sized = update.sized(shape)
    assert sized is not None
    return sized.apply(normal(*shape, seed=5).array())


def outcome(name: str, kind: str, form: Form, folder: Path) -> str:
    """What becomes of an adapter in a format that is written: exact, rewritten or no."""
    format, adapter = by_name(name), made(kind, form, name in IMAGE_FORMATS)
    lost = format.losses(adapter)
    if lost:
        assert {loss.name for loss in lost} <= adapter.updates.keys()
        return "no"
    path = folder / f"{name}-{kind}-{len(list(folder.iterdir()))}"
    format.write(adapter, path)
    scaling = Uniform.of(adapter.updates.values()).scaling if name in ("loralib", "torchtune") else None  # told by hand
    again = format.read(Evidence(path, allow_pickle=True, scaling=scaling)).updates
    for target, update in adapter.updates.items():
        one, other = (effect(u, update.shape) for u in (again[target], update))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5, err_msg=f"{name}: {kind}")
    same = all(type(again[target]) is type(update) for target, update in adapter.updates.items())
    return "exact" if same else "rewritten"


@pytest.mark.parametrize("name", [format.name for format in FORMATS if format.writes])
def test_the_table_says_what_a_format_does_with_every_kind(name: str, tmp_path: Path) -> None:
    found = {}
    for kind, forms in FORMS.items():
        outcomes = {outcome(name, kind, form, tmp_path) for form in forms}
        found[kind] = min(outcomes) if len(outcomes) == 1 else "partly" if "no" in outcomes else "rewritten"
    assert found == table.detail(by_name(name)), "correct loratool/formats/table.py"


def test_every_kind_has_a_sample() -> None:
    assert set(FORMS) == set(table.KINDS), "give FORMS one of it"
    assert all(update.kind == kind for kind, forms in FORMS.items() for form in forms for update in form.values())


@pytest.mark.parametrize("name", [format.name for format in FORMATS if format.writes])
def test_what_is_not_lost_is_written(name: str, tmp_path: Path) -> None:
    """Also of kinds that only some of their forms can say: SHiRA of as many values as no rank of PEFT's has."""
    for kind, update in UPDATES.items():
        adapter = made("lora", {"": update}, name in IMAGE_FORMATS)
        if not by_name(name).losses(adapter):
            by_name(name).write(adapter, tmp_path / kind)
    assert {"lora", "lora_rank_stabilised"} <= {path.name for path in tmp_path.iterdir()}
    assert ("shira" in {path.name for path in tmp_path.iterdir()}) is (name in ("raw", "kohya", "lycoris", "comfyui"))


def test_what_is_read_only_says_so() -> None:
    for format in FORMATS:
        told = table.detail(format)
        assert (set(told.values()) <= {"read", "no"}) is not format.writes
        assert all(told[kind] in ("exact", "partly", "read") for kind in table.kinds(format))


# -- as data, on a terminal, and in the README --------------------------------------------------------------------


def test_json_is_a_list_of_objects(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["formats", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [format.name for format in FORMATS]
    assert all({"name", "title", "reads", "writes", "kinds", "detail"} == row.keys() for row in rows.values())
    gguf = rows["gguf"]["detail"]
    assert [gguf[kind] for kind in ("lora", "loha", "lokr", "dora")] == ["exact", "rewritten", "partly", "no"]
    assert rows["xlabs"]["detail"]["lora"] == "read" and rows["raw"]["kinds"] == list(table.KINDS)


@pytest.mark.parametrize("columns", [80, 100, 240])
def test_a_terminal_of_100_columns_is_enough(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.main(["formats"])
    lines = re.sub(r"\033\[\d+m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= min(columns, 120)
    words = " ".join(lines).replace(",", "").split()
    assert {format.name for format in FORMATS} | set(table.KINDS) <= set(words)


def test_elsewhere_every_format_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["formats"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [format.name for format in FORMATS]
    assert ", ".join(by_name("peft").kinds) in "\n".join(lines)


MARKS = {"exact": "●", "rewritten": "○", "partly": "◐", "read": "r", "no": ""}
_WELL_KNOWN = "lora dora loha lokr ia3 glora boft oft full norm"  # the order of the columns; others after them
LEGEND = (
    "● read, and written as it is · ○ written exactly as another kind (a LoRA of higher rank, the whole difference) · "
    "◐ some forms of it are written (PEFT's OFT is not LyCORIS') · r read only · blank: refused"
)


@cache
def markdown() -> str:
    """The README's table: kinds that all formats treat alike share a column."""
    rows = {format: table.detail(format) for format in FORMATS}
    columns: dict[tuple[str, ...], list[str]] = {}
    for kind in table.KINDS:
        columns.setdefault(tuple(told[kind] for told in rows.values()), []).append(kind)
    shared = sorted(columns.values(), key=lambda own: (len(own) > 2, _WELL_KNOWN.find(own[0]) % 999))
    alike = [own for own in shared if len(own) > 2]
    heads = [", ".join(own) if len(own) < 3 else "abcdef"[alike.index(own)] for own in shared]
    lines = [f"| format | what | {' | '.join(heads)} |", f"| --- | --- |{' :-: |' * len(heads)}"]
    for format, told in rows.items():
        cells = " | ".join(MARKS[told[own[0]]] for own in shared)
        lines.append(f"| `{format.name}` | {format.title.removesuffix(', read only')} | {cells} |")
    groups = [f"{'abcdef'[n]}: {', '.join(own)}" for n, own in enumerate(alike)]
    return "\n".join([*lines, "", f"{LEGEND}.", "", *(f"- {group}" for group in groups), ""])


def test_the_table_of_the_readme_is_what_the_code_says() -> None:
    readme = README.read_text()
    assert readme.partition(BEGIN)[2].partition(END)[0] == markdown(), "make readme"


def write_readme() -> None:
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"the README has no {BEGIN.strip()}"
    README.write_text(before + begin + markdown() + end + after)


if __name__ == "__main__":
    write_readme()
