"""A map of the user's own names: it reads what the numbers say, and refuses by name what it does not know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool import api, cli
from loratool.adapter import Adapter
from loratool.errors import FormatError, LoratoolError, UsageError
from loratool.formats.mapped import read_map
from loratool.tensors import Tensor, read_safetensors, write_safetensors
from loratool.update import Additive, DoRA
from tests.laws import examples
from tests.samples import model, normal, peft_folder, peft_pair

MAP = """\
# a trainer of our own
net.layer_{}.query -> model.layers.{}.self_attn.q_proj
net.layer_{}.kv    -> model.layers.{}.self_attn.k_proj + model.layers.{}.self_attn.v_proj  # stacked
net.head           -> lm_head

.my_down  -> down
.my_up    -> up
.my_alpha -> alpha
"""


def stored(o: int = 6, i: int = 4, r: int = 2, *, alpha: float | None = 1.0, seed: int = 0) -> dict[str, Tensor]:
    found = {".my_down": normal(r, i, seed=seed), ".my_up": normal(o, r, seed=seed + 1)}
    return found if alpha is None else found | {".my_alpha": Tensor.of(np.float32(alpha))}


def put(**modules: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {module + suffix: tensor for module, own in modules.items() for suffix, tensor in own.items()}


FILE = put(
    **{
        "net.layer_0.query": stored(seed=1),
        "net.layer_11.query": stored(seed=2, alpha=4.0),
        "net.layer_0.kv": stored(8, seed=3),
        "net.head": stored(seed=4),
    }
)


def save(folder: Path, tensors: Mapping[str, Tensor] = FILE, text: str = MAP) -> tuple[Path, api.Reading]:
    write_safetensors(folder / "odd.safetensors", tensors, {"note": "kept"})
    (folder / "names.map").write_text(text)
    return folder / "odd.safetensors", api.Reading(map=folder / "names.map")


def read(folder: Path, tensors: Mapping[str, Tensor] = FILE, text: str = MAP, **more: Any) -> Adapter:
    path, reading = save(folder, tensors, text)
    return api.read(path, reading=reading, **more)


def delta(adapter: Adapter, name: str) -> np.ndarray:
    update = adapter.updates[name]
    assert isinstance(update, Additive)
    return update.delta()


def dense(module: str, scaling: float = 0.5, tensors: Mapping[str, Tensor] = FILE) -> np.ndarray:
    up, down = (tensors[f"{module}.{half}"].array().astype(np.float64) for half in ("my_up", "my_down"))
    return scaling * up @ down


def close(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


# -- what it reads ------------------------------------------------------------------------------------------------


def test_modules_numbers_and_scalings_are_those_of_the_map(tmp_path: Path) -> None:
    adapter = read(tmp_path)
    close(delta(adapter, "model.layers.0.self_attn.q_proj"), dense("net.layer_0.query"))
    close(delta(adapter, "model.layers.11.self_attn.q_proj"), dense("net.layer_11.query", 2.0))
    close(delta(adapter, "lm_head"), dense("net.head"))
    assert adapter.spelling("model.layers.11.self_attn.q_proj") == "net.layer_11.query"
    assert (adapter.metadata.format, adapter.metadata.strings["note"], adapter.metadata.warnings) == ("map", "kept", ())


def test_stacked_rows_are_split_into_equal_parts(tmp_path: Path) -> None:
    adapter, whole = read(tmp_path), dense("net.layer_0.kv")
    close(delta(adapter, "model.layers.0.self_attn.k_proj"), whole[:4])
    close(delta(adapter, "model.layers.0.self_attn.v_proj"), whole[4:])
    assert len(adapter.updates) == 5


def test_rows_that_are_no_equal_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"7 rows are not 2 equal parts, .*net\.layer_0\.kv"):
        read(tmp_path, put(**{"net.layer_0.kv": stored(7)}))


def test_a_transposed_factor_a_magnitude_and_a_bias(tmp_path: Path) -> None:
    tensors = {"a.down": normal(4, 2), "a.up": normal(6, 2), "a.m": normal(6), "a.b": normal(6, seed=8)}
    adapter = read(tmp_path, tensors, "a -> x.y\n.down -> down.T\n.up -> up\n.m -> magnitude\n.b -> diff_b\n")
    update = adapter.updates["x.y"]
    assert isinstance(update, DoRA)
    close(update.direction.delta(), tensors["a.up"].array() @ tensors["a.down"].array().T)
    close(delta(adapter, "x.y.bias"), tensors["a.b"].array())


def test_every_kind_of_the_known_slots_can_be_said(tmp_path: Path) -> None:
    one, two, three, four = normal(6, 2), normal(2, 4), normal(6, 2, seed=1), normal(2, 4, seed=1)
    tensors = {"m/w1": one, "m/w2": two, "m/w3": three, "m/w4": four, "m/a": Tensor.of(np.float32(3))}
    slots = "/w1 -> hada_w1_a\n/w2 -> hada_w1_b\n/w3 -> hada_w2_a\n/w4 -> hada_w2_b\n/a -> alpha"
    expected = 1.5 * (one.array() @ two.array()) * (three.array() @ four.array())
    close(delta(read(tmp_path, tensors, "m -> n\n" + slots), "n"), expected)


def test_a_map_without_suffixes_has_those_of_the_known_dialects(tmp_path: Path) -> None:
    pair = {"a.0.lora_down.weight": normal(2, 4), "a.0.lora_up.weight": normal(6, 2), "a.1.lora_A": normal(2, 4)}
    adapter = read(tmp_path, pair | {"a.1.lora_B": normal(6, 2)}, "a.{} -> b.{}.c")
    assert list(adapter.updates) == ["b.0.c", "b.1.c"]


def test_a_map_without_modules_takes_their_names_as_they_are(tmp_path: Path) -> None:
    adapter = read(tmp_path, put(**{"model.norm.0": stored()}), ".my_down->down\n.my_up->up\n.my_alpha->alpha")
    assert list(adapter.updates) == ["model.norm.0"]


def test_a_star_is_the_rest_and_what_is_longer_or_exact_goes_first(tmp_path: Path) -> None:
    text = "* -> any.*\nn.a.* -> a.*\nn.* -> n2.*\nn.a.{} -> number.{}\n"
    tensors = put(**{name: stored() for name in ("n.a.3", "n.a.b.3", "n.c", "z")})
    adapter = read(tmp_path, tensors, text + MAP[MAP.index(".my_down") :])
    assert list(adapter.updates) == ["number.3", "a.b.3", "n2.c", "any.z"]


def test_a_missing_alpha_is_scaling_1_and_a_warning_or_what_the_user_says(tmp_path: Path) -> None:
    tensors = put(**{"net.head": stored(alpha=None)})
    path, reading = save(tmp_path, tensors)
    adapter = api.read(path, reading=reading)
    close(delta(adapter, "lm_head"), dense("net.head", 1.0, tensors))
    assert adapter.metadata.warnings == ("alpha is missing for 1 of 1 modules: their scaling is 1",)
    told = api.read(path, reading=api.Reading(scaling=0.25, map=reading.map))
    close(delta(told, "lm_head"), dense("net.head", 0.25, tensors))


def test_what_the_map_leaves_out_is_a_warning(tmp_path: Path) -> None:
    adapter = read(tmp_path, FILE | {"net.head.step": normal(1)}, MAP + ".step -> ignore\n")
    assert len(adapter.updates) == 5
    assert adapter.metadata.warnings == ("left out, as the map says: net.head.step",)


def test_an_image_model_is_known_by_the_names_of_the_map(tmp_path: Path) -> None:
    tensors = put(**{f"b{n}.{leaf}": stored(3072, 3072) for n in range(3) for leaf in "qk"})
    where = "transformer.transformer_blocks.{}.attn.to_"
    text = f"b{{}}.q -> {where}q\nb{{}}.k -> {where}k\n" + MAP[MAP.index(".my_down") :]
    path, reading = save(tmp_path, tensors, text)
    adapter = api.read(path, reading=reading)
    assert adapter.metadata.architecture is not None
    api.convert(path, tmp_path / "out.safetensors", to="diffusers", reading=reading)
    again = api.read(tmp_path / "out.safetensors")
    assert again.updates.keys() == adapter.updates.keys()
    update = again.updates["transformer.transformer_blocks.2.attn.to_q"]
    assert isinstance(update, Additive)
    up, down = tensors["b2.q.my_up"].array(), tensors["b2.q.my_down"].array()
    close(update.delta(5, 9), 0.5 * up[5:9] @ down)


@given(st.lists(st.integers(0, 999_999_999), min_size=1, max_size=4), st.data())
@examples(50)
def test_numbers_go_over_wherever_they_stand(numbers: list[int], data: Any) -> None:
    glue = [data.draw(st.sampled_from([".x.", "_", ".layer", "y", ".block_"])) for _ in numbers]
    template = "n" + "".join(f"{text}{{}}" for text in glue) + ".e"
    ours = ".".join(["m", *("{}" for _ in numbers), "f"])
    line = read_map_of(f"{template} -> {ours}")
    name = template.format(*numbers)
    assert line.modules(name) == (".".join(["m", *map(str, numbers), "f"]),)
    assert line.modules(name + "0") == line.modules("0" + name) == line.modules(name.replace(".e", "x.e")) == ()


def read_map_of(text: str) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "map").write_text(text)
        return read_map(Path(folder) / "map")


def test_the_map_of_the_readme(tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    text = readme.partition("### A dialect of your own")[2].partition("```text\n")[2].partition("```")[0]
    turned = {name: t.T if name.endswith(".my_up") else t for name, t in FILE.items() if "head" not in name}
    own = read(tmp_path)
    (tmp_path / "readme").mkdir()
    adapter = read(tmp_path / "readme", turned, text)
    assert adapter.updates.keys() == own.updates.keys() - {"lm_head"}
    for name in adapter.updates:
        close(delta(adapter, name), delta(own, name))


# -- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["net.layer_0.other.my_down", "net.layer_x.query.my_up", "net.head.scale_x", "net.layer_{}.query.my_up"]
)
def test_a_tensor_that_the_map_does_not_know_is_refused_by_name(key: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="1 tensors of 13 have no line in the map") as error:
        read(tmp_path, FILE | {key: normal(2, 4)})
    assert error.value.items == (key,) and key in error.value.where


def test_a_number_has_no_parts(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no rows"):
        read(tmp_path, {"a.d": Tensor.of(np.float32(1))}, "a -> b + c\n.d -> diff")


@pytest.mark.parametrize("height", [4, 8])
def test_a_bias_of_another_height_than_its_weight_has_no_such_parts(height: int, tmp_path: Path) -> None:
    tensors = {"a.d": normal(2, 4), "a.u": normal(6, 2), "a.b": normal(height)}
    with pytest.raises(FormatError, match="a bias of shape"):
        read(tmp_path, tensors, "a -> b + c\n.d -> down\n.u -> up\n.b -> diff_b")


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"half a pair.*net\.head|net\.head"):
        read(tmp_path, {"net.head.my_down": normal(2, 4)})


def test_two_modules_of_the_file_that_are_one_are_refused(tmp_path: Path) -> None:
    tensors = put(**{"net.layer_1.query": stored(), "net.layer_01.query": stored()})
    with pytest.raises(FormatError, match=r"two modules of the file are model\.layers\.1\.self_attn\.q_proj"):
        read(tmp_path, tensors)


def test_two_tensors_for_one_slot_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="two tensors for down of one module"):
        read(tmp_path, FILE | {"net.head.d": normal(2, 4)}, MAP + ".d -> down\n")


def test_what_is_no_matrix_has_no_transpose(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="has no transpose"):
        read(tmp_path, {"a.d": normal(2, 4, 1), "a.u": normal(6, 2)}, "a -> b\n.d -> down.T\n.u -> up")


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("a -> b\nc d", "is not THEIRS -> OURS", "line 2"),
        ("a -> b -> c", "is not THEIRS -> OURS", "line 1"),
        ("a ->", "a name is missing", "line 1"),
        ("a -> b +", "a name is missing", "line 1"),
        ("a.{} -> b", "as many {}", "line 1"),
        ("a.{} -> b.{} + c", "as many {}", "line 1"),
        ("a.{}{} -> b.{}.{}", "beside another", "line 1"),
        ("a.{}1 -> b.{}", "beside another", "line 1"),
        ("a.{x} -> b.{x}", "a brace that is not", "line 1"),
        ("a b -> c", "has a space", "line 1"),
        ("a.* -> b", "end of both sides", "line 1"),
        ("a.*.c -> b.*.c", "end of both sides", "line 1"),
        ("a.* -> b.* + c.*", "end of both sides", "line 1"),
        ("a.{}.* -> b.{}.*", "none beside a", "line 1"),
        (".a -> dwon", "nothing that a tensor can be", "line 1"),
        (".a -> down + up", "nothing that a tensor can be", "line 1"),
        ("a -> b\n\na -> c", "the same name twice", r"line 3 \(and line 1\)"),
        (".a -> down\n.a -> up", "the same name twice", r"line 2 \(and line 1\)"),
        ("a -> b\nc -> b", "stands twice", r"line 2 \(and line 1\)"),
        ("a -> b + b", "stands twice", "line 1"),
        ("a.{} -> b.{} + b.{}", "stands twice", "line 1"),
        ("a.{} -> b.{}\na.7 -> c", "in common", r"line 2 \(and line 1\)"),
        ("a.{}.1 -> b.{}\na.2.{} -> c.{}", "in common", r"line 2 \(and line 1\)"),
        ("a.{} -> b.{}\nc.{} -> b.{}", "stands twice", r"line 2 \(and line 1\)"),
        ("# nothing\n", "no lines", ""),
        (
            "\n".join(f"a{chr(97 + n % 26) * (n // 26 + 1)}{{}} -> b{n}.{{}}" for n in range(1025)),
            "more than 1,024",
            "",
        ),
    ],
)
def test_a_wrong_line_is_an_error_with_its_number(text: str, what: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=what.replace("{", r"\{").replace("}", r"\}")) as error:
        read(tmp_path, text=text)
    assert error.match(where)


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"a" * ((1 << 20) + 1)])
def test_what_is_no_text_or_too_long_is_refused(data: bytes, tmp_path: Path) -> None:
    path, reading = save(tmp_path)
    (tmp_path / "names.map").write_bytes(data)
    with pytest.raises(FormatError, match="map"):
        api.read(path, reading=reading)


def test_a_map_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    path, _ = save(tmp_path)
    for other, what in ((tmp_path / "none", "no such map"), (tmp_path, "cannot read the map")):
        with pytest.raises(LoratoolError, match=what):
            api.read(path, reading=api.Reading(map=other))


def test_literal_lines_of_a_large_model_are_found_at_once() -> None:
    found = read_map_of("\n".join(f"x.{n}.w -> y.{n}" for n in range(20_000)))
    assert found.modules("x.19999.w") == ("y.19999",) and found.modules("x.20000.w") == ()


# -- beside the known formats -------------------------------------------------------------------------------------


def test_a_file_that_the_map_does_not_know_is_read_as_what_it_is(tmp_path: Path) -> None:
    _, reading = save(tmp_path)
    folder = peft_folder(tmp_path / "peft", peft_pair("model.layers.0.self_attn.q_proj"))
    assert api.read(folder, reading=reading).metadata.format == "peft"
    pair = {"lora_unet_x.lora_down.weight": normal(2, 4)}
    write_safetensors(tmp_path / "no.safetensors", pair, {})
    with pytest.raises(FormatError, match=r"lora_unet_x|no tensor of it"):
        api.read(tmp_path / "no.safetensors", reading=reading)
    write_safetensors(tmp_path / "what.safetensors", {"what": normal(2)}, {})
    with pytest.raises(FormatError, match=r"and the map .*names\.map knows no tensor of it"):
        api.read(tmp_path / "what.safetensors", reading=reading)


def test_what_peft_s_configuration_describes_is_peft_s(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft", peft_pair("model.layers.0.self_attn.q_proj"))
    (tmp_path / "all.map").write_text("* -> x.*")
    assert api.read(folder, reading=api.Reading(map=tmp_path / "all.map")).metadata.format == "peft"


def test_what_loratool_wrote_stays_what_it_is(tmp_path: Path) -> None:
    path, reading = save(tmp_path, text="* -> x.*\n" + MAP[MAP.index(".my_down") :])
    api.convert(path, tmp_path / "raw.safetensors", to="raw", reading=reading)
    again = api.read(tmp_path / "raw.safetensors", reading=reading)
    assert again.metadata.format == "raw" and "x.net.head" in again.updates


def test_a_map_and_another_format_are_a_contradiction(tmp_path: Path) -> None:
    path, reading = save(tmp_path)
    assert api.detect(path, reading=reading)[0] == "map"
    assert api.read(path, format="map", reading=reading).metadata.format == "map"
    with pytest.raises(UsageError, match="a map and a format"):
        api.read(path, format="kohya", reading=reading)
    with pytest.raises(UsageError, match="no map"):
        api.read(path, format="map")
    with pytest.raises(UsageError, match="only read"):
        api.convert(path, tmp_path / "out", to="map", reading=reading)


# -- the command line ---------------------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        cli.main([str(word) for word in words])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def test_every_command_that_reads_an_adapter_takes_a_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = save(tmp_path)
    option = ("--map", tmp_path / "names.map")
    code, out, _ = call(capsys, "inspect", path, "--json", *option)
    found = json.loads(out)
    assert (code, found["format"], found["modules"]) == (0, "map", 4)  # as stored: k and v are one
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": (6, 4) for n in (0, 11)} | {"lm_head.weight": (6, 4)}
    shapes |= {f"model.layers.0.self_attn.{leaf}_proj.weight": (4, 4) for leaf in "kv"}
    values = {name: normal(*shape, seed=7) for name, shape in shapes.items()}
    base = model(tmp_path / "base", values)
    assert call(capsys, "merge", base, path, "-o", tmp_path / "merged", *option)[0] == 0
    assert call(capsys, "verify", base, path, "--merged", tmp_path / "merged", *option)[0] == 0
    merged = read_safetensors(tmp_path / "merged" / "model.safetensors")
    v_proj = "model.layers.0.self_attn.v_proj.weight"
    close(merged.tensors[v_proj].array(), values[v_proj].array() + dense("net.layer_0.kv")[4:])
    code, _, said = call(capsys, "resize", path, "--rank", 1, "-o", tmp_path / "small.safetensors", *option)
    assert code == 0, said
    assert api.read(tmp_path / "small.safetensors").metadata.format == "raw"


def test_a_wrong_map_is_exit_3_with_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = save(tmp_path, text=MAP + "net.tail -> lm_head\n")
    code, out, err = call(capsys, "inspect", path, "--map", tmp_path / "names.map")
    assert (code, out) == (3, "")
    assert "names.map: line 9 (and line 4)" in err and "Traceback" not in err
