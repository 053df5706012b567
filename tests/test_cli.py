"""The command line keeps its contract: exit codes, JSON, messages, and nothing written but what is said."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import loratool
from fixtures.say import speak
from loratool import api, cli
from loratool.errors import LoratoolError
from tests.laws import examples

ROOT = Path(__file__).parent.parent
CONVERTING = ("inspect", "formats", "convert", "check", "merge", "unmerge", "verify", "compare")
COMPUTING = ("extract", "resize", "add", "subtract", "combine", "rank")
COMMANDS = (*CONVERTING, *COMPUTING, "export-onnx")
FORMATS = ("peft", "kohya", "diffusers", "raw")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON document of the strict kind."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("inspect", path)`: the command line in this process. Mistakes of loratool itself fail the test."""
    monkeypatch.setenv("LORATOOL_CACHE", "off")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent")
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in signals]

    def call(*words: Any) -> Result:
        capsys.readouterr()
        try:
            cli.main([str(word) for word in words])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)
        found = Result(code, *capsys.readouterr())
        assert "mistake in loratool" not in found.err, found.err
        assert "Traceback" not in found.err
        if code not in (0, 130):
            assert re.match(r"error: \S", found.err.partition("\nerror: ")[0] if code != 7 else found.err), found.err
        return found

    return call


@pytest.fixture
def peft(fixtures: Path) -> Path:
    return fixtures / "adapters/peft"


@pytest.fixture
def raw(fixtures: Path) -> Path:
    return fixtures / "adapters/raw.safetensors"


@pytest.fixture
def kohya(fixtures: Path) -> Path:
    return fixtures / "adapters/kohya.safetensors"


@pytest.fixture
def llama(fixtures: Path) -> Path:
    return fixtures / "base"


@pytest.fixture
def adapter(peft: Path, tmp_path: Path) -> Path:
    """A copy of the PEFT adapter to spoil."""
    return Path(shutil.copytree(peft, tmp_path / "adapter"))


def configure(adapter: Path, **changes: Any) -> Path:
    """Change fields of a PEFT configuration; ``...`` drops one."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return adapter


def change(adapter: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    """Change the tensors of a PEFT adapter."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    return adapter


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return dict(file.metadata() or {})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pair(module: str, rank: int = 2, alpha: float | None = None, scale: float = 1.0) -> dict[str, np.ndarray]:
    """A LoRA of an 8 x 6 weight, as raw files have it."""
    random = np.random.default_rng(rank)
    found = {
        f"{module}.lora_A.weight": random.standard_normal((rank, 6)).astype(np.float32),
        f"{module}.lora_B.weight": (scale * random.standard_normal((8, rank))).astype(np.float32),
    }
    return found if alpha is None else {**found, f"{module}.alpha": np.array(alpha, np.float32)}


# ---------------------------------------------------------------- help and usage


def test_help_lists_every_command(run: Run) -> None:
    found = run("--help")
    assert (found.code, found.err) == (0, "")
    listed = [line.split()[0] for line in found.out.partition("Commands:")[2].splitlines() if line.strip()]
    assert tuple(listed) == COMMANDS
    assert run("-h").out == found.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, run: Run) -> None:
    found = run(command, "--help")
    assert (found.code, found.err) == (0, "")
    assert found.out.startswith(f"Usage: loratool {command}")
    assert "--json" in found.out
    example = found.out.rpartition("Example: loratool ")[2].split()
    assert example[0] == command
    with cli.app.make_context("loratool", list(example)) as context:  # all of its words are understood
        assert cli.app.commands[command].make_context(command, example[1:], parent=context)
    assert max(map(len, found.out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("inspect", "--json --tensors --norms --allow-pickle --scaling -v -q --debug"),
        ("convert", "-o --to --from --base --dtype --allow-loss --allow-unmatched --overwrite --dry-run --scaling"),
        ("merge", "-o -s --strength --dtype --device --allow-unmatched --overwrite --dry-run --allow-pickle"),
        ("verify", "--merged -s --strength --device --allow-pickle"),
        ("compare", "--json --base"),
        *((command, "--device --json") for command in (*COMPUTING, "convert", "compare")),
    ],
)
def test_the_options_of_the_contract_are_there(command: str, options: str, run: Run) -> None:
    words = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", run(command, "--help").out))
    assert set(options.split()) <= words


def test_version(run: Run) -> None:
    assert run("--version") == Result(0, f"loratool {loratool.__version__}\n", "")


def test_no_command_is_a_usage_error_that_helps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith("Usage: loratool")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("inspect", "ADAPTER"),
        ("inspect A B", "unexpected extra argument"),
        ("inspect A --bogus", "--bogus"),
        ("bogus", "bogus"),
        ("merge BASE -o OUT", "ADAPTER"),
        ("merge BASE A", "--out"),
        ("merge BASE A -o OUT -s much", "much"),
        ("merge BASE A -o OUT -s", "-s"),
        ("merge BASE A -o OUT -s 1 -s 2", "2 strengths for 1 adapter"),
        ("merge BASE A B -o OUT -s 1", "1 strengths for 2 adapters"),
        ("merge BASE A -o OUT -s nan", "finite"),
        ("merge BASE A -o OUT -s inf", "finite"),
        ("merge BASE A -o OUT --dtype fp8", "fp8"),
        ("merge BASE A -o OUT --device abacus", "abacus"),
        ("verify BASE A", "--merged"),
        ("verify BASE A --merged BASE -s 1 -s 2", "2 strengths"),
        ("verify BASE A --merged BASE --tolerance -1", "tolerance"),
        ("convert A -o OUT", "--to"),
        ("convert A -o OUT --to bogus", "bogus"),
        ("convert A -o OUT --to raw --from bogus", "bogus"),
        ("convert A -o OUT --to raw --dtype int8", "int8"),
        ("compare A", "SECOND"),
        ("convert A -o - --to raw", "stdout"),
        ("merge BASE A -o -", "stdout"),
        ("resize A -o OUT --rank 2 --device cuda", "resize computes on the processor, not on cuda"),
    ],
)
def test_usage_errors(words: str, what: str, run: Run, llama: Path, peft: Path, raw: Path, tmp_path: Path) -> None:
    paths = {"BASE": llama, "A": peft, "B": raw, "OUT": tmp_path / "out"}
    found = run(*(paths.get(word, word) for word in words.split()))
    assert (found.code, found.out) == (2, "")
    assert what.lower() in found.err.lower()
    assert "\nhint: " in found.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["inspect EMPTY", "merge EMPTY A -o OUT", "merge BASE A EMPTY -o OUT"])
def test_an_empty_argument_is_told_not_taken_for_this_folder(words: str, run: Run, llama: Path, peft: Path) -> None:
    paths = {"BASE": llama, "A": peft, "EMPTY": ""}
    found = run(*(paths.get(word, word) for word in words.split()))
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: an empty argument, loratool ")
    assert "''" in found.err


def test_an_unknown_format_names_the_known(run: Run, peft: Path, tmp_path: Path) -> None:
    found = run("convert", peft, "-o", tmp_path / "x", "--to", "bogus")
    assert all(name in found.err for name in FORMATS)


# ---------------------------------------------------------------- errors are two lines


def test_an_error_is_one_line_and_a_hint(run: Run, tmp_path: Path) -> None:
    found = run("inspect", "org/name")
    assert found.code == 1
    error, hint = found.err.splitlines()
    assert error == "error: no such adapter, org/name"
    assert hint.startswith("hint: this looks like a hub reference")


@pytest.mark.parametrize("words", ["inspect {}", "convert {} -o out --to raw", "compare {} {}"])
def test_an_adapter_that_is_not_there(words: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(*words.replace("{}", "not/here/a dapter").split(" "))  # also: a name with a blank, in two words
    assert found.code in (1, 2)
    found = run(*(word.replace("{}", "not/here/a dapter") for word in words.split()))
    assert (found.code, found.err) == (1, "error: no such adapter, not/here/a dapter\n")


def test_a_base_that_is_not_there(run: Run, peft: Path, tmp_path: Path) -> None:
    found = run("merge", "meta/llama@main", peft, "-o", tmp_path / "x")
    assert found.code == 1
    assert found.err.startswith("error: no such model, meta/llama@main\nhint: this looks like a hub reference")


def test_debug_shows_a_traceback_and_keeps_the_code(
    capsys: pytest.CaptureFixture[str], peft: Path, tmp_path: Path
) -> None:
    for words, code in (
        (("inspect", "not-here", "--debug"), 1),
        (("convert", str(peft), "-o", str(tmp_path / "x"), "--to", "?", "--debug"), 2),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (code, "")
        assert err.startswith("Traceback")
        assert "\nerror: " in err


def test_a_mistake_of_loratool_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, peft: Path
) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(api, "inspect", wrong)
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", str(peft)])
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert re.fullmatch(r"error: a mistake in loratool itself: KeyError.*\nhint: .*--debug.*\n", err)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "out"), MemoryError()])
def test_system_errors_are_told_in_one_line(
    error: Exception, run: Run, monkeypatch: pytest.MonkeyPatch, peft: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(api, "inspect", fail)
    found = run("inspect", peft)
    assert found.code == 1
    assert found.err in ("error: No space left on device, out\n", "error: out of memory\n")


def test_options_of_one_call_do_not_stay(run: Run, raw: Path, tmp_path: Path) -> None:
    quiet = save_file(pair("a"), tmp_path / "a.safetensors") or run("inspect", tmp_path / "a.safetensors", "-q")
    assert quiet.err == ""
    assert "alpha is missing" in run("inspect", tmp_path / "a.safetensors").err


# ---------------------------------------------------------------- inspect

INSPECT = {
    "format": str,
    "architecture": (str, type(None)),
    "base_model": (str, type(None)),
    "kinds": dict,
    "modules": int,
    "parameters": int,
    "bytes": int,
    "dtypes": dict,
    "ranks": dict,
    "targets": list,
    "carried": list,
    "metadata": dict,
    "warnings": list,
}
TARGET = {"module": str, "kind": str, "rank": int, "alpha": float, "scaling": float, "shape": list, "dtype": str}


def has(table: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """The fields are there and of their types."""
    for name, kind in fields.items():
        assert name in table
        assert isinstance(table[name], kind), (name, table[name])
        assert isinstance(table[name], bool) == (kind is bool), name


@pytest.mark.parametrize("which", ["peft", "raw.safetensors", "kohya.safetensors", "diffusers.safetensors"])
def test_inspect_json(which: str, run: Run, fixtures: Path) -> None:
    path = fixtures / "adapters" / which
    found = run("inspect", path, "--json")
    assert (found.code, found.err) == (0, "")
    has(found.json, INSPECT)
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    stored = {key: value for key, value in load_file(weights).items() if not key.endswith(".alpha")}
    assert found.json["format"] == path.stem
    assert found.json["modules"] == sum(found.json["kinds"].values()) == len(stored) / 2
    assert found.json["kinds"] == {"lora": found.json["modules"]}
    assert found.json["parameters"] == sum(value.size for value in stored.values())
    assert found.json["bytes"] == weights.stat().st_size
    assert found.json["dtypes"] == {"F32": len(stored)}
    assert sum(found.json["ranks"].values()) == found.json["modules"]
    assert found.json["metadata"] == metadata(weights)
    for target in found.json["targets"]:
        has(target, TARGET)
        assert math.isclose(target["scaling"], target["alpha"] / target["rank"])
        assert found.json["ranks"][str(target["rank"])]


def test_inspect_for_people(run: Run, peft: Path) -> None:
    found = run("inspect", peft)
    assert (found.code, found.err) == (0, "")
    lines = {words[0]: words[1:] for line in found.out.splitlines() if (words := line.split())}
    assert lines["format"] == ["peft"]
    assert lines["modules"] == ["14", "(lora", "14)"]
    assert lines["dtype"] == ["F32"]


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/adapter_model.safetensors", "{}/../peft", "{}//"])
def test_an_adapter_may_be_spelled_in_many_ways(spelling: str, run: Run, peft: Path) -> None:
    found = run("inspect", spelling.format(peft), "--json")
    assert found.json == run("inspect", peft, "--json").json


@pytest.mark.parametrize("name", ["with blank", "über-ß", "-dash", "%s{}", "new\nline"])
def test_odd_paths(name: str, run: Run, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(raw, name)
    assert run("inspect", "--", name).code == 0
    found = run("convert", "--to", "peft", "-o", f"{name}.peft", "--json", "--", name)
    assert (found.code, found.json["output"]) == (0, f"{name}.peft")
    assert (tmp_path / f"{name}.peft/adapter_config.json").exists()


def test_inspect_tensors_and_norms(run: Run, raw: Path) -> None:
    plain, listed = run("inspect", raw).out, run("inspect", raw, "--tensors").out
    assert listed.startswith(plain)
    modules = [line.split()[0] for line in listed.removeprefix(plain).splitlines() if line.strip()][1:]
    assert modules == [t["module"] for t in run("inspect", raw, "--json").json["targets"]]
    tensors = load_file(raw)
    for target in run("inspect", raw, "--norms", "--json").json["targets"]:
        up, down = (tensors[f"{target['module']}.{side}.weight"] for side in ("lora_B", "lora_A"))
        assert math.isclose(target["norm"], target["scaling"] * float(np.linalg.norm(up @ down)), rel_tol=1e-5)


def test_inspect_without_a_configuration(run: Run, adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    found = run("inspect", adapter, "--json")
    assert found.code == 0
    assert {target["scaling"] for target in found.json["targets"]} == {None}
    assert any("does not tell its scaling" in warning for warning in found.json["warnings"])
    assert "warning: " in run("inspect", adapter).err
    told = run("inspect", adapter, "--json", "--scaling", "0.25")
    assert {target["scaling"] for target in told.json["targets"]} == {0.25}


@pytest.mark.parametrize("words", ["convert {} -o {out} --to raw", "merge {base} {} -o {out}", "compare {} {}"])
def test_an_unknown_scaling_is_refused_unless_given(
    words: str, run: Run, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    (adapter / "adapter_config.json").unlink()
    given_paths = [w.format(adapter, base=llama, out=tmp_path / "out") for w in words.split()]
    found = run(*given_paths)
    assert found.code == 3
    assert "--scaling" in found.err
    assert not (tmp_path / "out").exists()
    assert run(*given_paths, "--scaling", "2").code == 0


def test_inspect_warns_of_a_missing_alpha(run: Run, tmp_path: Path) -> None:
    save_file(pair("a") | pair("b", alpha=2), tmp_path / "x.safetensors")
    found = run("inspect", tmp_path / "x.safetensors", "--json").json
    assert [(t["module"], t["alpha"], t["scaling"]) for t in found["targets"]] == [("a", None, 1), ("b", 2, 1)]
    assert [w for w in found["warnings"] if "alpha is missing for 1 of 2" in w] == found["warnings"]


@pytest.mark.parametrize(("ratio", "odd"), [(51, True), (50, False)])
def test_inspect_warns_of_scalings_far_apart(ratio: float, odd: bool, run: Run, tmp_path: Path) -> None:
    save_file(pair("a", alpha=2) | pair("b", rank=4, alpha=4 * ratio), tmp_path / "x.safetensors")
    warnings = run("inspect", tmp_path / "x.safetensors", "--json").json["warnings"]
    assert any(f"varies {ratio}-fold" in warning for warning in warnings) is odd


@pytest.mark.parametrize("split", [True, False])
def test_inspect_warns_of_split_qkv(split: bool, run: Run, kohya: Path, tmp_path: Path) -> None:
    args = {"ss_network_args": json.dumps({"split_qkv": str(split)})}
    save_file(load_file(kohya), tmp_path / "x.safetensors", metadata(kohya) | args)
    warnings = run("inspect", tmp_path / "x.safetensors", "--json").json["warnings"]
    assert any("split_qkv" in warning for warning in warnings) is split


def test_warnings_go_to_stderr_and_quiet_silences_them(run: Run, tmp_path: Path) -> None:
    save_file(pair("a"), tmp_path / "x.safetensors")
    loud, quiet = run("inspect", tmp_path / "x.safetensors"), run("inspect", tmp_path / "x.safetensors", "-q")
    assert loud.err == "warning: alpha is missing for 1 of 1 modules: their scaling is 1\n"
    assert (quiet.out, quiet.err) == (loud.out, "")


def test_control_characters_do_not_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    save_file(pair("a\x1b[2Jb\x9b\r\u202e"), tmp_path / "x.safetensors", {"k": "\x1b[2J"})
    found = run("inspect", tmp_path / "x.safetensors", "--tensors")
    assert found.code == 0
    assert r"a\x1b[2Jb\x9b\r\u202e" in found.out
    bad = run("convert", tmp_path / "x.safetensors", "-o", tmp_path / "y", "--to", "kohya")
    assert bad.code == 5
    assert not {"\x1b", "\x9b", "\r"} & set(found.out + bad.err)


def test_text_that_utf8_cannot_say_is_no_mistake(run: Run, adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace('"fixtures/base"', r'"lone \ud800"'))
    assert run("inspect", adapter).code == 0
    assert run("inspect", adapter, "--json").json["base_model"] == "lone \ud800"


@pytest.mark.parametrize("given", ["", "--allow-pickle"])
def test_a_pickle_is_read_only_on_the_users_word(given: str, run: Run, real: Path, tmp_path: Path) -> None:
    for words in (("inspect",), ("convert", "--to", "raw", "-o", tmp_path / "out")):
        found = run(*words, real / "llm/peft-bin", "--json", *given.split())
        if given:
            assert found.code == 0
            assert found.json["modules"] == 12
        else:
            assert found.code == 3
            assert "--allow-pickle" in found.err


def test_a_hostile_pickle_does_not_run(run: Run, adapter: Path, tmp_path: Path) -> None:
    import pickle

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    (adapter / "adapter_model.safetensors").unlink()
    for protocol in (2, 4):
        (adapter / "adapter_model.bin").write_bytes(pickle.dumps({"a": Hostile()}, protocol))
        for words in ((), ("--allow-pickle",)):
            found = run("inspect", adapter, *words)
            assert found.code == 3
        assert "weights_only" not in found.err  # torch's advice is to run it
        assert found.err.startswith(
            ("error: a pickle that is more than tensors: it would call posix.mkdir, ", "error: not a readable pickle ")
        )
    assert not (tmp_path / "run").exists()


REAL = """
diffusion/cloneofsimo-lora_disney.safetensors diffusion/diffusers-attn-procs.safetensors
diffusion/diffusers-lora-down.safetensors llm/mlx-qwen2.5-0.5b llm/peft-bin llm/peft-gpt2
"""


@pytest.mark.parametrize("name", REAL.split())
def test_real_adapters_are_read(name: str, run: Run, real: Path) -> None:
    found = run("inspect", real / name, "--json", "--allow-pickle")
    assert (found.code, found.err) == (0, "")
    has(found.json, INSPECT)
    assert found.json["modules"] > 0


def test_formats(run: Run) -> None:
    found = run("formats", "--json")
    for row in found.json:
        has(row, {"name": str, "reads": bool, "writes": bool, "kinds": list})
    assert {row["name"] for row in found.json} >= set(FORMATS)
    listed = [line.split()[0] for line in run("formats").out.splitlines()[1:]]
    assert listed == [row["name"] for row in found.json]


# ---------------------------------------------------------------- convert


@pytest.mark.parametrize("to", FORMATS)
def test_convert_json_and_provenance(to: str, run: Run, kohya: Path, tmp_path: Path) -> None:
    found = run("convert", kohya, "-o", tmp_path / "out", "--to", to, "--json")
    assert (found.code, found.err) == (0, "")
    report = found.json
    has(report, {"output": str, "format": str, "source_format": str, "losses": list, "unmatched": list})
    inputs = {"adapter/kohya.safetensors": sha256(kohya)}
    assert report["inputs"] == inputs
    assert (report["operation"], report["version"]) == ("convert", loratool.__version__)
    weights = tmp_path / "out/adapter_model.safetensors" if to == "peft" else tmp_path / "out"
    said = metadata(weights)
    assert said["loratool.operation"] == "convert"
    assert said["loratool.version"] == loratool.__version__
    assert json.loads(said["loratool.inputs"]) == inputs
    assert said["loratool.content_hash"] == report["content_hash"] != ""
    assert report["bytes_written"] == sum(map(len, everything(tmp_path).values()))
    kept = {key: value for key, value in metadata(kohya).items() if key.startswith("ss_")}
    assert kept.items() <= said.items()
    again = run("compare", kohya, tmp_path / "out", "--json").json
    assert again["relative_difference"] < 1e-6


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui", "peft", "raw"])
def test_hashes_of_the_source_do_not_stay(to: str, run: Run, kohya: Path, tmp_path: Path) -> None:
    stale = {"sshs_model_hash": "dead", "sshs_legacy_hash": "beef", "modelspec.hash_sha256": "0xabc"}
    save_file(load_file(kohya), tmp_path / "in", metadata(kohya) | stale | {"custom": "kept"})
    assert run("convert", tmp_path / "in", "-o", tmp_path / "out", "--to", to).code == 0
    said = metadata(tmp_path / "out" / "adapter_model.safetensors" if to == "peft" else tmp_path / "out")
    assert said["custom"] == "kept"
    assert not {key: value for key, value in stale.items() if said.get(key) == value}


def test_provenance_is_of_the_last_operation(run: Run, raw: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("convert", raw, "-o", one, "--to", "raw").code == 0
    assert run("convert", one, "-o", two, "--to", "raw", "--dtype", "bf16").code == 0
    assert json.loads(metadata(two)["loratool.inputs"]) == {"adapter/one": sha256(one)}
    assert metadata(one)["loratool.content_hash"] != metadata(two)["loratool.content_hash"]


def test_the_content_hash_is_of_the_content(run: Run, raw: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("convert", raw, "-o", tmp_path / name, "--to", "raw").code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors = load_file(raw)
    tensors["model.layers.0.mlp.up_proj.lora_B.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "changed")
    assert run("convert", tmp_path / "changed", "-o", tmp_path / "c", "--to", "raw").code == 0
    assert metadata(tmp_path / "a")["loratool.content_hash"] != metadata(tmp_path / "c")["loratool.content_hash"]


@pytest.mark.parametrize("allow", [False, True])
def test_each_loss_is_named_in_the_sources_spelling(allow: bool, run: Run, peft: Path, tmp_path: Path) -> None:
    keys = load_file(peft / "adapter_model.safetensors")
    names = {key.removesuffix(".lora_A.weight") for key in keys if key.endswith(".lora_A.weight")}
    words = ("convert", peft, "-o", tmp_path / "out", "--to", "kohya", *(["--allow-loss"] if allow else []))
    for more in (("--dry-run",), ()):
        found = run(*words, *more)
        assert found.code == (0 if allow else 5)
        lines = found.err.splitlines()
        for name in names:
            assert sum(f"{name}:" in line and not line.startswith("error") for line in lines) == 1
    if allow:
        report = json.loads(run(*words, "--overwrite", "--json").out)
        assert {loss.partition(":")[0] for loss in report["losses"]} == names
        assert report["modules"] == 0
    else:
        assert "--allow-loss" in lines[-1]
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", "F16"), ("bf16", "BF16"), ("fp32", "F32"), ("keep", "F32")])
def test_convert_to_a_dtype(dtype: str, stored: str, run: Run, raw: Path, tmp_path: Path) -> None:
    assert run("convert", raw, "-o", tmp_path / "x", "--to", "raw", "--dtype", dtype).code == 0
    assert run("inspect", tmp_path / "x", "--json").json["dtypes"] == {stored: 28}


@pytest.mark.parametrize(("scale", "what"), [(1e30, "overflow"), (1e-30, "vanish")])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_values_that_a_dtype_cannot_hold(scale: float, what: str, more: tuple[str], run: Run, tmp_path: Path) -> None:
    save_file(pair("m.a", alpha=2, scale=scale), tmp_path / "x.safetensors")
    words = ("convert", tmp_path / "x.safetensors", "-o", tmp_path / "y", "--to", "raw", *more, "--dtype")
    found = run(*words, "fp16")
    assert found.code == 6
    assert what in found.err
    assert "m.a" in found.err
    assert not (tmp_path / "y").exists()
    assert run(*words, "bf16").code == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("command", ["merge", "convert"])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_nan_and_infinity_are_refused(
    value: float, command: str, more: tuple[str], run: Run, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    change(adapter, lambda tensors: np.put(tensors[key], 5, value))
    words = ("merge", llama, adapter) if command == "merge" else ("convert", adapter, "--to", "raw")
    found = run(*words, "-o", tmp_path / "out", *more)
    assert found.code == 6
    assert key.removesuffix(".lora_B.weight") in found.err
    assert not (tmp_path / "out").exists()


def test_json_has_null_where_there_is_no_number(run: Run, tmp_path: Path) -> None:
    save_file(pair("a", alpha=2, scale=0), tmp_path / "zero")
    save_file(pair("a", alpha=2, scale=math.nan), tmp_path / "nan")
    assert run("inspect", tmp_path / "nan", "--norms", "--json").json["targets"][0]["norm"] is None
    save_file(pair("a", alpha=2, scale=1), tmp_path / "one")
    assert run("compare", tmp_path / "zero", tmp_path / "one", "--json").json["relative_difference"] is None
    found = run("compare", tmp_path / "zero", tmp_path / "nan", "--json")
    assert (found.code, found.out) == (6, "")


def test_an_overflow_of_the_merge_is_refused(run: Run, llama: Path, peft: Path, tmp_path: Path) -> None:
    found = run("merge", llama, peft, "-o", tmp_path / "out", "-s", "1e30", "--dtype", "fp16")
    assert found.code == 6
    assert not list(tmp_path.iterdir())


def test_convert_with_a_base(run: Run, raw: Path, llama: Path, kohya: Path, tmp_path: Path) -> None:
    short = {key.removeprefix("model."): value for key, value in load_file(raw).items()}
    save_file(short, tmp_path / "short.safetensors")
    words = ("convert", tmp_path / "short.safetensors", "--to", "raw", "-o")
    assert run(*words, tmp_path / "x", "--base", llama).code == 0
    modules = [t["module"] for t in run("inspect", tmp_path / "x", "--json").json["targets"]]
    assert sorted(modules) == sorted(t["module"] for t in run("inspect", raw, "--json").json["targets"])
    other = ("convert", kohya, "--to", "raw", "--base", llama, "-o", tmp_path / "y")
    found = run(*other)
    assert found.code == 4
    assert found.err.count("nearest: ") >= 289
    assert not (tmp_path / "y").exists()
    assert run(*other, "--allow-unmatched").code == 0
    found = run(
        "convert", raw, "--to", "raw", "--base", llama / "model-00001-of-00002.safetensors", "-o", tmp_path / "z"
    )
    assert found.code == 4  # half of the model


def test_convert_reads_as_the_format_that_is_said(run: Run, raw: Path, peft: Path, tmp_path: Path) -> None:
    assert run("convert", raw, "-o", tmp_path / "x", "--to", "peft", "--from", "raw").code == 0
    assert run("convert", peft, "-o", tmp_path / "y", "--to", "raw", "--from", "kohya").code == 3


# ---------------------------------------------------------------- merge and verify

MERGE = {
    "output": str,
    "modules": int,
    "tensors_copied": int,
    "bytes_written": int,
    "seconds": float,
    "peak_bytes": int,
    "unmatched": list,
    "lost_to_rounding": float,
    "content_hash": str,
}


def test_merge_and_verify_json(run: Run, llama: Path, peft: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    merged = run("merge", llama, peft, "-o", out, "-s", "-0.5", "--json")
    assert (merged.code, merged.err) == (0, "")
    report = merged.json
    has(report, MERGE)
    assert (report["modules"], report["tensors_copied"], report["unmatched"]) == (14, 7, [])
    assert report["strengths"] == [-0.5]
    inputs = {f"base/{path.name}": sha256(path) for path in llama.glob("*.safetensors")}
    inputs["adapter1/adapter_model.safetensors"] = sha256(peft / "adapter_model.safetensors")
    assert report["inputs"] == inputs
    for path in out.glob("*.safetensors"):
        said = metadata(path)
        assert json.loads(said["loratool.inputs"]) == inputs
        assert json.loads(said["loratool.strengths"]) == [-0.5]
        assert said["loratool.operation"] == "merge"
        assert said["loratool.version"] == loratool.__version__
        assert said["loratool.content_hash"] == report["content_hash"]
    assert everything(out).keys() == everything(llama).keys()

    proof = run("verify", llama, peft, "--merged", out, "-s", "-0.5", "--json")
    assert (proof.code, proof.err) == (0, "")
    has(proof.json, {**MERGE, "ok": bool, "failures": list})
    assert proof.json["ok"]

    doubt = run("verify", llama, peft, "--merged", out, "--json")
    assert doubt.code == 7
    assert not doubt.json["ok"]
    assert len(doubt.json["failures"]) == 14
    assert all(isinstance(failure["ulps"], int) and failure["ulps"] > 0 for failure in doubt.json["failures"])
    assert doubt.err.startswith("error: 14 tensors are not what the merge gives, model.layers.0")


def test_the_tours_models_say_what_they_learnt(run: Run, llama: Path, peft: Path, tmp_path: Path) -> None:
    """In numpy as in transformers (`test_models`): base as it is, merged and taken back."""
    assert speak(llama) == "The captain drinks a cup of tea."
    run("merge", llama, peft, "-o", tmp_path / "merged", "--undo", tmp_path / "undo")
    assert speak(tmp_path / "merged") == "The captain drinks a keg of rum, arr!"
    run("unmerge", tmp_path / "merged", "-o", tmp_path / "base", "--undo", tmp_path / "undo")
    assert speak(tmp_path / "base") == "The captain drinks a cup of tea."


def test_a_merge_is_taken_back(run: Run, llama: Path, peft: Path, tmp_path: Path) -> None:
    merged, undo, again = tmp_path / "merged", tmp_path / "undo", tmp_path / "again"
    dry = run("merge", llama, peft, "-o", merged, "--undo", undo, "--dry-run")
    assert dry.code == 0 and not list(tmp_path.iterdir())
    told = run("merge", llama, peft, "-o", merged, "--undo", undo, "--json").json
    assert told["undo"] == str(undo) and undo.stat().st_size > 0
    plan = run("unmerge", merged, "-o", again, "--undo", undo, "--dry-run", "--json").json
    assert plan["tensors_restored"] == told["tensors_changed"] and not again.exists()
    report = run("unmerge", merged, "-o", again, "--undo", undo, "--json").json
    assert report["tensors_restored"] == told["tensors_changed"]
    for path in sorted(llama.iterdir()):
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert run("unmerge", llama, "-o", tmp_path / "x", "--undo", undo).code == 7
    assert run("unmerge", merged, "-o", tmp_path / "x", "--undo", merged / "config.json").code == 3
    assert run("unmerge", merged, "-o", tmp_path / "x", "--undo", tmp_path / "none").code == 1
    assert run("unmerge", merged, "-o", tmp_path / "x").code == 2
    assert run("unmerge", merged, "-o", again, "--undo", undo, "--overwrite").out.startswith("restored ")


def test_verify_for_people(run: Run, llama: Path, peft: Path, tmp_path: Path) -> None:
    assert run("merge", llama, peft, "-o", tmp_path / "m").code == 0
    assert run("verify", llama, peft, "--merged", tmp_path / "m").out.startswith("verified ")
    found = run("verify", llama, peft, "--merged", llama)
    assert found.code == 7
    assert found.out.count("units of the last place") == 14


@pytest.mark.parametrize(
    "base", ["tiny-sd", "tiny-sd/", "tiny-sd/unet", "tiny-sd/unet/diffusion_pytorch_model.safetensors"]
)
def test_a_base_may_be_a_pipeline_a_component_or_a_file(base: str, run: Run, fixtures: Path, tmp_path: Path) -> None:
    source, whole = f"{fixtures}/{base}", base.rstrip("/") == "tiny-sd"
    words = ("merge", source, fixtures / "adapters/diffusers.safetensors", "-o", tmp_path / "out", "--json")
    found = run(*words, *([] if whole else ["--allow-unmatched"]))
    assert found.code == 0
    assert (found.json["modules"], len(found.json["unmatched"])) == ((289, 0) if whole else (277, 12))
    assert (tmp_path / "out").is_dir() == Path(source).is_dir()


def test_what_is_not_applied_is_named(run: Run, fixtures: Path, tmp_path: Path) -> None:
    words = ("merge", fixtures / "tiny-sd/unet", fixtures / "adapters/kohya.safetensors", "-o", tmp_path / "out")
    refused = run(*words)
    assert refused.code == 4
    assert sum(line.startswith("  lora_te_") for line in refused.err.splitlines()) == 12
    assert not list(tmp_path.iterdir())
    allowed = run(*words, "--allow-unmatched")
    assert allowed.code == 0
    assert allowed.err.count("warning: not applied: lora_te_") == 12


def test_the_wrong_base_names_everything_that_is_left(run: Run, llama: Path, kohya: Path, tmp_path: Path) -> None:
    for more in ((), ("--dry-run",)):
        found = run("merge", llama, kohya, "-o", tmp_path / "out", *more)
        assert found.code == 4
        lines = [line for line in found.err.splitlines() if line.startswith("  lora_")]
        assert len(lines) == 289
        assert all("nearest: " in line for line in lines)
        assert "--allow-unmatched" in found.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_shape_that_differs(run: Run, llama: Path, adapter: Path, tmp_path: Path) -> None:
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    change(adapter, lambda tensors: tensors.update({key: tensors[key][:-1]}))
    found = run("merge", llama, adapter, "-o", tmp_path / "out")
    assert found.code == 4
    assert "layers.1.mlp.up_proj" in found.err
    assert not (tmp_path / "out").exists()


def test_verbose_says_what_was_read(run: Run, llama: Path, peft: Path, raw: Path, tmp_path: Path) -> None:
    words = ("merge", llama, peft, raw, "--dry-run", "-o", tmp_path / "a")
    loud, plain = run(*words, "-v"), run(*words)
    assert (loud.out, plain.err) == (plain.out, "")
    one = run("convert", raw, "--to", "peft", "--dry-run", "-o", tmp_path / "a", "--verbose")
    assert one.err == f"{raw}: raw, 14 modules\n"
    assert [line.partition(": ")[2] for line in loud.err.splitlines()] == [
        "peft, 14 modules",
        "raw, 14 modules",
    ]


# ---------------------------------------------------------------- dry runs


def test_a_dry_merge_lists_every_tensor_and_writes_nothing(run: Run, llama: Path, peft: Path, tmp_path: Path) -> None:
    words = ("merge", llama, peft, "-o", tmp_path / "out", "--dry-run")
    plan = run(*words, "--json")
    assert (plan.code, plan.err) == (0, "")
    numbers = ("bytes_to_read", "bytes_to_write", "peak_memory", "disk_needed")
    assert all(isinstance(plan.json[name], int) and plan.json[name] > 0 for name in numbers)
    names = {name for path in llama.glob("*.safetensors") for name in load_keys(path)}
    assert {tensor["name"] for tensor in plan.json["tensors"]} == names
    assert {t["name"] for t in plan.json["tensors"] if t["action"] == "merge"} == {n for n in names if "_proj" in n}
    piped = run(*words).out
    assert all(name in piped for name in names)
    assert "memory" in piped
    assert "disk needed" in piped
    assert not list(tmp_path.iterdir())
    assert run(*words[:-1]).code == 0
    assert plan.json["bytes_to_write"] == pytest.approx(sum(map(len, everything(tmp_path).values())), rel=0.1)


def load_keys(path: Path) -> set[str]:
    with safe_open(path, "np") as file:
        return set(file.keys())


@pytest.mark.parametrize("to", FORMATS)
def test_a_dry_conversion_lists_every_tensor_and_writes_nothing(to: str, run: Run, kohya: Path, tmp_path: Path) -> None:
    words = ("convert", kohya, "-o", tmp_path / "out", "--to", to, "--dry-run")
    plan = run(*words, "--json")
    assert (plan.code, plan.err) == (0, "")
    assert {t["name"] for t in plan.json["tensors"]} == {key.split(".")[0] for key in load_keys(kohya)}
    assert len(plan.json["tensors"]) == 2 * 289
    numbers = ("bytes_to_read", "bytes_to_write", "peak_memory", "disk_needed")
    assert all(isinstance(plan.json[name], int) and plan.json[name] > 0 for name in numbers)
    assert len(run(*words).out.splitlines()) > 2 * 289
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "code"),
    [
        ("missing/out", 1),
        ("there", 1),
        ("{base}", 1),
        ("{base}/in", 1),
        ("{adapter}", 1),
        ("{adapter}/in", 1),
        ("fine", 0),
    ],
)
@pytest.mark.parametrize("command", ["merge", "convert"])
def test_a_dry_run_refuses_as_the_real_one(
    out: str, code: int, command: str, run: Run, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    (tmp_path / "there").write_text("precious")
    path = tmp_path / out.format(base=base, adapter=adapter)
    words = ("merge", base, adapter) if command == "merge" else ("convert", adapter, "--to", "peft", "--base", base)
    before = everything(tmp_path)
    more: tuple[str, ...] = () if out == "there" else ("--overwrite",)
    found = [run(*words, "-o", path, *dry, *more) for dry in (("--dry-run",), ())]
    assert [f.code for f in found] == [code, code]
    if code:
        assert found[0].err == found[1].err
        assert everything(tmp_path) == before
    else:
        assert everything(tmp_path).items() >= before.items()


# ---------------------------------------------------------------- output


@pytest.mark.parametrize("old", ["file", "folder"])
@pytest.mark.parametrize("to", ["raw", "peft"])
def test_overwrite_replaces_what_was_there(old: str, to: str, run: Run, raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "old").mkdir(parents=True) if old == "folder" else out.write_text("old")
    words = ("convert", raw, "-o", out, "--to", to)
    found = run(*words)
    assert found.code == 1
    assert "--overwrite" in found.err
    assert run(*words, "--overwrite").code == 0
    assert out.is_dir() == (to == "peft")
    assert not (out / "old").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_an_output_in_the_current_folder(
    run: Run, llama: Path, peft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("merge", llama, peft, "-o", "out").code == 0
    assert run("merge", llama, peft, "-o", "-out").code == 0
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert run("merge", llama, peft, "-o", "../out2").code == 0
    assert everything(tmp_path / "out") == everything(tmp_path / "out2") == everything(tmp_path / "-out")


def test_a_failed_run_leaves_the_old_output(run: Run, llama: Path, peft: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert run("merge", llama, peft, "-o", out, "-s", "1e30", "--dtype", "fp16", "--overwrite").code == 6
    assert everything(tmp_path) == {"out/precious": b"x"}


def test_the_base_of_a_conversion_is_an_input_too(run: Run, raw: Path, llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    before = everything(base)
    found = run("convert", raw, "-o", base, "--to", "peft", "--base", base, "--overwrite")
    assert found.code == 1
    assert "overwrite the base" in found.err
    assert everything(base) == before


# ---------------------------------------------------------------- compare


def test_compare_json(run: Run, peft: Path, raw: Path, tmp_path: Path) -> None:
    tensors = load_file(raw)
    dropped = {key: value for key, value in tensors.items() if "layers.1.mlp.up_proj" not in key}
    scaled = {key: np.array(2 * value) if key.endswith(".alpha") else value for key, value in dropped.items()}
    save_file(scaled, tmp_path / "x.safetensors")
    has(same := run("compare", peft, raw, "--json").json, {"relative_difference": (int, float), "cosine": float})
    assert same["relative_difference"] == 0
    assert (same["only_in_first"], same["only_in_second"], len(same["modules"])) == ([], [], 14)
    apart = run("compare", raw, tmp_path / "x.safetensors", "--json").json
    assert apart["only_in_first"] == ["model.layers.1.mlp.up_proj"]
    assert len(apart["modules"]) == 13
    for module in apart["modules"]:
        has(module, {"module": str, "relative_difference": float, "cosine": float})
        assert math.isclose(module["relative_difference"], 1, rel_tol=1e-6)
        assert math.isclose(module["cosine"], 1, rel_tol=1e-6)
    shown = run("compare", raw, tmp_path / "x.safetensors").out
    assert "only in the first" in shown
    assert shown.count("model.layers.0") == 7


# ---------------------------------------------------------------- hostile and broken input

PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)
FOREIGN = {
    "empty": b"",
    "short": b"{}",
    "png": PNG,
    "json": b'{"a": 1}' * 10,
    "random": bytes(np.random.default_rng(0).integers(0, 256, 4096, np.uint8)),
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "gguf": b"GGUF" + bytes(64),
    "zip": b"PK\x03\x04" + bytes(64),
    "html": b"<!DOCTYPE html><html></html>",
    "header of nothing": (2).to_bytes(8, "little") + b"{}",
    "huge header": (1 << 62).to_bytes(8, "little") + b"{" + bytes(64),
    "deep header": (100_008).to_bytes(8, "little") + b'{"a":   ' + b"[" * 100_000,
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("command", ["inspect", "convert", "merge adapter", "merge base", "compare"])
def test_foreign_files(what: str, command: str, run: Run, raw: Path, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(FOREIGN[what])
    out = ("-o", tmp_path / "out")
    words = {
        "inspect": ("inspect", path),
        "convert": ("convert", path, "--to", "raw", *out),
        "merge adapter": ("merge", llama, path, *out),
        "merge base": ("merge", path, raw, *out),
        "compare": ("compare", raw, path),
    }
    found = run(*words[command])
    if (what, command) == ("header of nothing", "merge base"):
        assert found.code == 4  # a model without tensors
    else:
        assert found.code == 3
        assert "x.safetensors" in found.err
    if what == "lfs":
        assert "git-LFS pointer" in found.err
        assert "git lfs pull" in found.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [4, 8, 100, 2000, -1])
def test_truncated_files(keep: int, run: Run, raw: Path, peft: Path, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw.read_bytes()[:keep])
    assert run("inspect", path).code == 3
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    shard = base / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    assert run("merge", base, peft, "-o", tmp_path / "out").code == 3
    assert not (tmp_path / "out").exists()


def test_bytes_behind_the_last_tensor_are_refused(run: Run, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(raw.read_bytes() + b"\0")
    assert run("inspect", tmp_path / "x").code == 3


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"),
        lambda t: t.pop("base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"),
        lambda t: t.update({"base_model.model.model.layers.1.mlp.up_proj.lora_A.weight": np.ones((3, 64), np.float32)}),
        lambda t: t.update({"base_model.model.model.layers.1.mlp.up_proj.lora_A.weight": np.ones((0, 64), np.float32)}),
        lambda t: t.update({"base_model.model.model.layers.1.mlp.up_proj.lora_A.weight": np.ones(4, np.float32)}),
        lambda t: t.update({"base_model.model.model.layers.1.mlp.up_proj.lora_A.weight": np.ones((4, 64), np.int8)}),
        lambda t: t.update({"base_model.model.model.layers.1.mlp.up_proj.vera_lambda_b": np.ones(4, np.float32)}),
        lambda t: t.clear(),
    ],
    ids=["no up", "no down", "rank", "rank 0", "a vector", "integers", "another tuner", "nothing"],
)
def test_malformed_pairs(
    edit: Callable[[dict[str, np.ndarray]], Any], run: Run, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    change(adapter, edit)
    found = run("convert", adapter, "-o", tmp_path / "out", "--to", "raw")
    if load_keys(adapter / "adapter_model.safetensors"):
        assert found.code == 3
        assert "layers.1.mlp.up_proj" in found.err
        assert run("merge", llama, adapter, "-o", tmp_path / "out").code == 3
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"r": "8"},
        {"r": None},
        {"r": [8]},
        {"r": 1e400},
        {"lora_alpha": None},
        {"lora_alpha": "16"},
        {"lora_alpha": True},
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"lora_alpha": 10**400},
        {"rank_pattern": [1]},
        {"rank_pattern": "x"},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"q_proj": "4"}},
        {"alpha_pattern": 5},
        {"alpha_pattern": {"q_proj": None}},
        {"peft_type": "PROMPT_TUNING"},
        {"peft_type": ["LORA"]},
    ],
    ids=repr,
)
def test_hostile_configurations(changes: dict[str, Any], run: Run, adapter: Path) -> None:
    # r = 8 is meant by pattern nowhere: without them the modules of rank 8 go by it
    found = run("inspect", configure(adapter, **changes))
    assert found.code == 3
    assert "adapter" in found.err.partition("\n")[0]


@pytest.mark.parametrize(
    "text", ["[]", '"x"', "null", "5", "{", "", "{" + '"a":{' * 50_000, '{"r":' + "9" * 5000 + "}"], ids=lambda t: t[:8]
)
def test_a_configuration_that_is_no_table(text: str, run: Run, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(text)
    found = run("inspect", adapter)
    assert found.code == 3
    assert "adapter_config.json" in found.err


@pytest.mark.parametrize("field", ["target_modules", "task_type", "base_model_name_or_path", "inference_mode"])
@pytest.mark.parametrize("value", [..., None, 5, [], {"a": 1}], ids=["missing", "null", "5", "list", "table"])
def test_fields_that_do_not_matter_do_no_harm(field: str, value: Any, run: Run, adapter: Path) -> None:
    assert run("inspect", configure(adapter, **{field: value}), "--json").json["modules"] == 14


def test_a_pattern_that_takes_forever_is_refused(run: Run, adapter: Path) -> None:
    found = run("inspect", configure(adapter, rank_pattern={"(([a-z._0-9])+)+#": 4}))
    assert found.code == 3


def test_a_configuration_counts_for_its_own_file_only(run: Run, adapter: Path, kohya: Path) -> None:
    shutil.copy(kohya, adapter / "kohya.safetensors")
    assert run("inspect", adapter / "kohya.safetensors", "--json").json["format"] == "kohya"
    (adapter / "adapter_model.safetensors").rename(adapter / "renamed.safetensors")
    (adapter / "kohya.safetensors").unlink()
    assert run("inspect", adapter / "renamed.safetensors", "--json").json["format"] == "peft"


def test_links_may_not_leave_an_adapter(run: Run, adapter: Path, peft: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (adapter / name).unlink()
        (adapter / name).symlink_to(peft / name)
        found = run("inspect", adapter)
        assert found.code == 3
        assert "--allow-links" in found.err
        assert run("inspect", adapter, "--allow-links").code == 0
    link = adapter.parent / "link"
    link.symlink_to(peft)
    assert run("inspect", link).code == 0  # a path that the user names may be a link


def test_an_adapter_is_no_base_and_a_base_no_adapter(run: Run, peft: Path, llama: Path, tmp_path: Path) -> None:
    assert run("merge", peft, peft, "-o", tmp_path / "out").code == 3
    assert run("merge", llama, llama, "-o", tmp_path / "out").code == 3
    assert run("inspect", llama / "model-00001-of-00002.safetensors").code == 3


# ---------------------------------------------------------------- fuzz: nothing but LoratoolErrors

HERE = ROOT / "fixtures/adapters"
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=2)
FIELDS = """
r lora_alpha rank_pattern alpha_pattern target_modules peft_type use_rslora use_dora fan_in_fan_out modules_to_save
init_lora_weights base_model_name_or_path bias lora_bias
"""


def endure(path: Path, out: Path) -> None:
    """Everything that may be asked of an adapter: nothing but LoratoolErrors may come of it."""
    try:
        adapter = loratool.read(path)
        api.inspect(adapter, norms=True)
    except LoratoolError:
        return
    for to in FORMATS:
        try:
            report = api.convert(adapter, out / to, to=to, allow_loss=True, overwrite=True)
        except LoratoolError:
            continue
        assert not report.modules or loratool.read(out / to)


@examples(80)
@given(
    change=st.dictionaries(
        st.sampled_from(FIELDS.split()),
        VALUES,
        max_size=3,
    )
)
def test_any_configuration(tmp_path_factory: pytest.TempPathFactory, change: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    configure(Path(shutil.copytree(HERE / "peft", folder / "adapter")), **change)
    endure(folder / "adapter", folder)


def header_of(path: Path, most: int = 12) -> tuple[dict[str, Any], bytes]:
    """The header of a file's first tensors, and their bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"][:most]
    end = max(header[name]["data_offsets"][1] for name in names)
    kept = {name: value for name, value in header.items() if name in names or name == "__metadata__"}
    return kept, data[8 + length : 8 + length + end]


ENTRIES = VALUES | st.fixed_dictionaries(
    {
        "dtype": SCALARS | st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "F4", "I64", "BOOL", "C64"]),
        "shape": SCALARS | st.lists(st.integers(-1, 5) | SCALARS, max_size=5),
        "data_offsets": SCALARS | st.lists(st.integers(-1, 600) | SCALARS, max_size=3),
    }
)
TEXTS = st.text(max_size=8) | VALUES.map(json.dumps)
KEYS = (
    "loratool.modules",
    "loratool.source",
    "lora_adapter_metadata",
    "ss_network_args",
    "ss_network_module",
    "format",
)


@pytest.mark.parametrize("name", ["raw", "kohya", "diffusers"])
@examples(80)
@given(data=st.data())
def test_any_header(name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    header, body = header_of(HERE / f"{name}.safetensors")
    names = st.sampled_from([key for key in header if key != "__metadata__"])
    entries = data.draw(st.dictionaries(names, ENTRIES, max_size=1))
    renamed = data.draw(st.dictionaries(names, st.text(max_size=12), max_size=1))
    said = data.draw(st.dictionaries(st.sampled_from(KEYS), TEXTS, max_size=2))
    table = {renamed.get(key, key): entries.get(key, value) for key, value in header.items()}
    table["__metadata__"] = {**header.get("__metadata__", {}), **said}
    text = json.dumps(table).encode()
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    endure(folder / "x.safetensors", folder)


@examples(80)
@given(data=st.binary(max_size=64) | st.binary(max_size=64).map(lambda b: len(b).to_bytes(8, "little") + b"{" + b))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "x").write_bytes(data)
    with pytest.raises(LoratoolError):
        loratool.read(folder / "x")


# ---------------------------------------------------------------- processes of their own


def spawn(*words: Any, script: str = "", **options: Any) -> subprocess.Popen[str]:
    """The command line in a process; ``script`` runs before it."""
    code = f"import sys, time\n{script}\nfrom loratool.cli import main\nmain(sys.argv[1:])"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], **options)


ALONE = os.environ | {"PYTHONPATH": str(ROOT), "LORATOOL_CACHE": "off"}
HEAVY = ("torch", "numpy", "typer", "pydantic", "rich", "regex", "loratool.ops.merge", "loratool.plan")
TELL = f"import atexit; atexit.register(lambda: print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr))"


@pytest.mark.parametrize(
    ("words", "allowed"),
    [("--help", set()), ("merge --help", set()), ("inspect {}", {"regex"}), ("formats", {"regex"})],
)
def test_what_only_looks_imports_little(words: str, allowed: set[str], fixtures: Path) -> None:
    adapters = fixtures / "adapters"
    for path in ("peft", "kohya.safetensors") if "{}" in words else ("",):
        process = spawn(*words.format(adapters / path).split(), script=TELL)
        _, err = process.communicate()
        assert process.returncode == 0
        assert set(json.loads(err.strip().splitlines()[-1].replace("'", '"'))) <= allowed


@pytest.mark.parametrize("name", ["über", "lone-\udcff"])
def test_a_terminal_of_few_letters_is_no_mistake(name: str, raw: Path, tmp_path: Path) -> None:
    shutil.copy(raw, tmp_path / name)
    for words in (("inspect", name), ("inspect", name, "--json"), ("convert", name, "--to", "peft", "-o", "out")):
        process = spawn(*words, cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)})
        _, err = process.communicate()
        assert (process.returncode, err) == (0, "")


def test_libraries_do_not_talk_into_errors(llama: Path, peft: Path, tmp_path: Path) -> None:
    process = spawn("merge", llama, peft, "-o", tmp_path / "out", "-s", "1e30", "--dtype", "fp16")
    out, err = process.communicate()
    assert (process.returncode, out) == (6, "")
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error", "hint"]


def test_python_m_loratool(peft: Path) -> None:
    words = [sys.executable, "-m", "loratool", "inspect", str(peft / "not-here")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no such adapter, ")


SLOW = """
from loratool.plan import Writer
block = Writer.block
def slow(self, *rest):
    time.sleep(0.3)
    block(self, *rest)
Writer.block = slow
"""


@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGHUP, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_an_interrupted_merge_leaves_no_half_output(
    sent: signal.Signals, code: int, run: Run, llama: Path, peft: Path, tmp_path: Path
) -> None:
    before = everything(llama)
    process = spawn("merge", llama, peft, "-o", tmp_path / "out", script=SLOW)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out*/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    out, err = process.communicate()
    assert (process.returncode, out) == (code, "")
    assert not (tmp_path / "out").exists()
    assert everything(llama) == before
    if code == 130:
        assert err == "interrupted: nothing was written\n"
        assert not list(tmp_path.iterdir())
    assert run("merge", llama, peft, "-o", tmp_path / "out").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_merge_under_nohup_goes_on(llama: Path, peft: Path, tmp_path: Path) -> None:
    ignore = "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    hung = "import loratool.ops.merge as m; run = m.run_merge\n"
    hung += "m.run_merge = lambda *a, **k: (os.kill(os.getpid(), signal.SIGHUP), run(*a, **k))[1]"
    process = spawn("merge", llama, peft, "-o", tmp_path / "out", script=ignore + hung)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert (tmp_path / "out").exists()


FINALISER = """
from loratool.plan import Run
import os, signal
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
iterate = Run.__iter__
def told(self):
    Swallows()
    yield from iterate(self)
Run.__iter__ = told
"""


def test_a_signal_that_falls_into_a_finaliser_is_not_lost(llama: Path, peft: Path, tmp_path: Path) -> None:
    process = spawn("merge", llama, peft, "-o", tmp_path / "out", script=FINALISER)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "interrupted: nothing was written\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
@pytest.mark.parametrize("words", ["inspect {} --tensors", "merge {base} {} -o out", "inspect not-here"])
def test_a_closed_stream_is_no_mistake(closed: str, words: str, llama: Path, peft: Path, tmp_path: Path) -> None:
    line = f"{sys.executable} -m loratool {words.format(peft, base=llama)} {closed}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == (1 if "not-here" in words else 0), done.stderr
    assert "mistake" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full and RLIMIT_FSIZE as Linux has them")
@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("merge {base} {peft} -o out", "out/model.safetensors.index.json"),
        ("convert {kohya} -o out --to raw", "out"),
        ("convert {kohya} -o out --to peft", "out/adapter_model.safetensors"),
        ("add {kohya} {kohya} -o out", "out"),
    ],
)
def test_a_full_disk_names_the_output_and_leaves_nothing(
    words: str, where: str, llama: Path, peft: Path, kohya: Path, tmp_path: Path
) -> None:
    """The temporary's own name, which nobody asked for, is not told."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    process = spawn(*words.format(base=llama, peft=peft, kohya=kohya).split(), script=limit, cwd=tmp_path, env=ALONE)
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert err.splitlines() == [f"error: cannot write: File too large, {where}", "hint: see ulimit -f"]
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_is_no_mistake(llama: Path, peft: Path, tmp_path: Path) -> None:
    process = spawn(
        "merge",
        llama,
        peft,
        "-o",
        tmp_path / "out",
        "--dry-run",
        script="import os; os.read(0, 1)",
        stdin=subprocess.PIPE,
    )
    assert process.stdout and process.stdin and process.stderr
    process.stdout.close()
    process.stdin.write("x")
    process.stdin.close()
    assert process.wait() == 1
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals")
def test_on_a_terminal_lists_are_abridged_and_a_bar_is_drawn(fixtures: Path, tmp_path: Path) -> None:
    base, adapter = fixtures / "tiny-sd", fixtures / "adapters/kohya.safetensors"
    master, slave = os.openpty()
    words = ("merge", base, adapter, "-o", tmp_path / "out")
    dry = spawn(*words, "--dry-run", stdout=slave, stderr=subprocess.PIPE)
    shown = read_terminal(master, dry)
    assert dry.returncode == 0
    assert "more (all of them when piped, or with --json)" in shown
    assert shown.count("\n") < 60
    real = spawn(*words, "--json", stderr=slave, stdout=subprocess.PIPE)
    bar = read_terminal(master, real)
    assert "merging" in bar
    assert "/? bytes" not in bar  # it waits until it knows how much there is
    assert json.loads(real.stdout.read() if real.stdout else "")["modules"] == 289
    os.close(slave)
    os.close(master)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals")
@pytest.mark.parametrize(
    ("word", "command"),
    [
        ("resizing", "resize {peft} --rank 2 -o out"),
        ("adding", "add {peft} {raw} -o out"),
        ("subtracting", "subtract {peft} {raw} -o out"),
        ("combining", "combine {peft} {raw} --method svd -o out"),
        ("combining", "combine {peft} {raw} --method ties -o out"),
        ("comparing", "compare {peft} {raw}"),
    ],
)
def test_what_computes_draws_a_bar_too(word: str, command: str, peft: Path, raw: Path, tmp_path: Path) -> None:
    master, slave = os.openpty()
    words = [str(tmp_path / w) if w == "out" else w for w in command.format(peft=peft, raw=raw).split()]
    process = spawn(*words, "--json", stderr=slave, stdout=subprocess.PIPE)
    assert word in read_terminal(master, process)
    assert process.returncode == 0 and process.stdout and json.load(process.stdout)
    os.close(slave)
    os.close(master)


@pytest.mark.parametrize(
    "command", ["inspect {kohya} --tensors", "merge {base} {peft} -o out --dry-run", "rank {peft}"]
)
@pytest.mark.parametrize("columns", [60, 100])
def test_lines_fit_the_terminal(
    command: str, columns: int, llama: Path, peft: Path, kohya: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(peft, "a")
    os.symlink(kohya, "k")
    master, slave = os.openpty()
    env = ALONE | {"COLUMNS": str(columns), "NO_COLOR": "1"}
    words = command.format(base=llama, peft="a", kohya="k").split()
    shown = read_terminal(master, spawn(*words, stdout=slave, stderr=subprocess.PIPE, env=env))
    assert "\033" not in shown
    lines = shown.replace("\r", "").splitlines()
    assert len(lines) > 14
    assert max(map(len, lines)) <= columns
    assert any("q_proj" in line for line in lines)  # the ends of names tell them apart
    os.close(slave)
    os.close(master)


def test_dare_by_its_short_name(run: Run, peft: Path, raw: Path, tmp_path: Path) -> None:
    """The contract says dare; PEFT's name for it is dare_linear."""
    for method in ("dare", "dare_linear"):
        found = run("combine", peft, raw, "-o", tmp_path / method, "--method", method, "--seed", "3", "--json")
        assert found.code == 0
    assert everything(tmp_path / "dare") == everything(tmp_path / "dare_linear")


@pytest.mark.parametrize("look", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_bold_is_for_terminals_that_can_and_may(look: dict[str, str], raw: Path) -> None:
    master, slave = os.openpty()
    env = {name: value for name, value in ALONE.items() if name != "NO_COLOR"} | {"TERM": "xterm"} | look
    shown = read_terminal(master, spawn("inspect", raw, stdout=slave, stderr=subprocess.PIPE, env=env))
    assert ("\033[1m" in shown) is not bool(look)
    os.close(slave)
    os.close(master)


def read_terminal(master: int, process: subprocess.Popen[str]) -> str:
    """What a process shows on a terminal."""
    import select

    shown = b""
    while process.poll() is None or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.05)[0]:
            shown += os.read(master, 1 << 16)
    return shown.decode(errors="replace")


@pytest.mark.parametrize(
    "words",
    [
        ("resize", "PEFT", "--rank", "2"),
        ("add", "PEFT", "PEFT", "-s", "1", "-s", "-0.5"),
        ("subtract", "PEFT", "PEFT"),
        ("combine", "PEFT", "PEFT", "--method", "ties", "--rank", "2"),
        ("extract", "BASE", "BASE", "--rank", "2"),
    ],
    ids=lambda words: words[0],
)
def test_a_dry_run_that_computes_writes_nothing(
    words: tuple[str, ...], run: Run, llama: Path, peft: Path, tmp_path: Path
) -> None:
    """It tells what the run tells, and refuses what the run refuses."""
    paths = {"PEFT": peft, "BASE": llama}
    words = tuple(paths.get(word, word) for word in words)
    out = tmp_path / "out"
    dry = run(*words, "-o", out, "--dry-run", "--json").json
    assert not list(tmp_path.iterdir()) and dry.pop("dry_run") is True
    wet = run(*words, "-o", out, "--json").json
    assert wet.pop("dry_run") is False and out.exists()
    assert dry == wet
    assert run(*words, "-o", out, "--dry-run").code == run(*words, "-o", out).code == 1
