"""Output appears whole or not at all, links and names stay inside their folder, digests are remembered truly."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratool import files, hashes
from loratool.errors import FormatError, LoratoolError

# ---------------------------------------------------------------- staged output


def make_file(path: Path, text: str) -> None:
    path.write_text(text)


def make_folder(path: Path, text: str) -> None:
    (path / "inner").mkdir(parents=True)
    (path / "inner/a").write_text(text)


MAKERS: dict[str, Callable[[Path, str], None]] = {"file": make_file, "folder": make_folder}


def content(path: Path) -> tuple[str, str]:
    """(kind, text) of what `MAKERS` made."""
    return ("folder", (path / "inner/a").read_text()) if path.is_dir() else ("file", path.read_text())


@pytest.mark.parametrize("kind", MAKERS)
def test_staged_output_appears_at_the_end(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with files.staged(out) as temporary:
        MAKERS[kind](temporary, "new")
        assert not out.exists()
        assert temporary.parent == out.parent  # a rename within one file system
    assert content(out) == (kind, "new")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", MAKERS)
def test_the_longest_name_that_a_file_may_have(kind: str, tmp_path: Path) -> None:
    out = tmp_path / ("ü" * 127)  # 254 bytes of 255
    for text in ("one", "two"):
        with files.staged(out, overwrite=True) as temporary:
            MAKERS[kind](temporary, text)
        assert content(out) == (kind, text)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(kind: str, error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), files.staged(tmp_path / "out") as temporary:
        MAKERS[kind](temporary, "half")
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", MAKERS)
def test_an_error_of_writing_names_the_output(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    where = out / "inner/a" if kind == "folder" else out

    def inner(temporary: Path) -> Path:
        MAKERS[kind](temporary, "half")
        return temporary / "inner/a" if kind == "folder" else temporary

    for error, told in (
        (lambda path: OSError(28, "No space left on device", str(path)), where),
        (lambda path: OSError(28, "No space left on device"), out),
        (lambda path: files.cannot_write(OSError(28, ""), path), where),
    ):
        with pytest.raises(LoratoolError) as caught, files.staged(out) as temporary:
            raise error(inner(temporary))
        assert str(caught.value) == f"cannot write: No space left on device, {told}"
        assert caught.value.hint == "free some space"
    with pytest.raises(OSError, match="input"), files.staged(out) as temporary:
        raise OSError(5, "Input/output error", "input")
    with pytest.raises(LoratoolError) as caught, files.staged_beside(out) as folder:
        raise OSError(27, "", str(folder / "data"))
    assert caught.value.where == str(tmp_path / "data")


@pytest.mark.parametrize("old", MAKERS)
@pytest.mark.parametrize("new", MAKERS)
def test_overwriting_replaces_the_old_output(old: str, new: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    MAKERS[old](out, "old")
    with files.staged(out, overwrite=True) as temporary:
        MAKERS[new](temporary, "new")
        assert content(out) == (old, "old")
    assert content(out) == (new, "new")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("new", MAKERS)
@pytest.mark.parametrize("target", ["nowhere", "file", "folder"])
def test_overwriting_a_link_spares_what_it_points_to(new: str, target: str, tmp_path: Path) -> None:
    aim, out = tmp_path / "aim", tmp_path / "out"
    if target in MAKERS:
        MAKERS[target](aim, "precious")
    out.symlink_to(aim)
    with files.staged(out, overwrite=True) as temporary:
        MAKERS[new](temporary, "new")
    assert not out.is_symlink()
    assert content(out) == (new, "new")
    assert target == "nowhere" or content(aim) == (target, "precious")


@pytest.mark.parametrize("old", MAKERS)
@pytest.mark.parametrize("new", MAKERS)
def test_a_failure_while_overwriting_keeps_the_old_output(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    MAKERS[old](out, "old")

    def fail(*_: object) -> None:
        raise OSError("the rename fails")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the rename fails"), files.staged(out, overwrite=True) as temporary:
        MAKERS[new](temporary, "new")
    assert content(out) == (old, "old")
    assert list(tmp_path.iterdir()) == [out]


def test_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(LoratoolError, match="output exists"), files.staged(out) as temporary:
        temporary.write_text("mine")
        out.write_text("another's")
    assert out.read_text() == "another's"
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture
def ended() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leftover(out: Path, pid: int, more: str = "") -> Path:
    """What a run of this machine with that id leaves when it is killed."""
    return out.with_name(f".{out.name}.loratool-{files._host()}-{pid}-7f00{more}")


def test_the_leftovers_of_killed_runs_are_swept_and_no_others(tmp_path: Path, ended: int) -> None:
    out = tmp_path / "out[1]*"  # no wildcard
    MAKERS["folder"](leftover(out, ended), "half")
    leftover(out, ended, "-2").write_text("half")
    kept = [
        leftover(out, os.getppid()),  # still runs
        leftover(tmp_path / "out1", ended),  # of another output
        tmp_path / f".{out.name}.loratool-0badf00d-{ended}-7f00",  # of another machine
        tmp_path / f".{out.name}.loratool-notes",
    ]
    for path in kept:
        path.write_text("")
    with files.staged(out) as temporary:
        temporary.write_text("new")
    assert set(tmp_path.iterdir()) == {out, *kept}


@pytest.mark.parametrize("kind", MAKERS)
def test_an_output_lost_to_a_kill_between_two_renames_comes_back(kind: str, tmp_path: Path, ended: int) -> None:
    out = tmp_path / "out"
    MAKERS[kind](leftover(out, ended, ".old"), "old")
    MAKERS[kind](leftover(out, ended), "half")
    with pytest.raises(ValueError, match="again"), files.staged(out, overwrite=True):
        raise ValueError("fails again")
    assert content(out) == (kind, "old")
    assert list(tmp_path.iterdir()) == [out]


def test_the_old_output_goes_where_the_new_one_stands(tmp_path: Path, ended: int) -> None:
    out = tmp_path / "out"
    out.write_text("new")
    leftover(out, ended, ".old").write_text("old")
    with pytest.raises(ValueError, match="again"), files.staged(out, overwrite=True):
        raise ValueError("fails again")
    assert out.read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


# ---------------------------------------------------------------- where output may go


def test_an_output_needs_a_parent_and_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert files.prepare_output("out", False) == Path("out")  # the current folder, without a slash
    (tmp_path / "file").write_text("")
    for out, why in (("no/out", "parent"), ("file/out", "parent"), (".", "name"), ("..", "name"), ("/", "name")):
        with pytest.raises(LoratoolError, match=why):
            files.prepare_output(out, True)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
def test_an_existing_output_is_refused_unless_overwritten(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    MAKERS[kind](out, "") if kind in MAKERS else out.symlink_to("nowhere")
    with pytest.raises(LoratoolError, match="output exists"):
        files.prepare_output(out, False)
    assert files.prepare_output(out, True) == out


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("in", "overwrite the base"),
        ("in/x", "inside the base"),
        ("in/inner/x", "inside the base"),
        ("other/../in", "overwrite the base"),
        ("link", "overwrite the base"),
        ("link/x", "inside the base"),
        (".", "overwrite the base"),
    ],
)
def test_an_output_may_not_touch_an_input(out: str, why: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    MAKERS["folder"](here / "in", "")
    (here / "other").mkdir()
    (here / "link").symlink_to("in")
    path = here if out == "." else here / out
    with pytest.raises(LoratoolError, match=why):
        files.prepare_output(path, True, {"the base": here / "in"})
    assert files.prepare_output(here / "new", True, {"the base": here / "in"})


def test_an_input_file_is_not_overwritten_but_its_folder_may_be_used(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    base.write_text("")
    with pytest.raises(LoratoolError, match="overwrite the base"):
        files.prepare_output(base, True, {"the base": base})
    assert files.prepare_output(tmp_path / "x", True, {"the base": base})


def test_a_parent_that_is_not_writable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(LoratoolError, match="not writable"):
        files.prepare_output(tmp_path / "out", False)


def test_too_little_space_is_noticed_before(tmp_path: Path) -> None:
    files.check_space(tmp_path, 1)
    with pytest.raises(LoratoolError, match="out of disk"):
        files.check_space(tmp_path, 1 << 60)


# ---------------------------------------------------------------- inputs that are not there


@pytest.mark.parametrize(
    ("path", "hub"),
    [
        *(("org/name", True), ("org/name@main", True), ("org/name.onnx", False), ("org/a.safetensors", False)),
        *(("name", False), ("./o/n", False), ("a/b/c", False), ("/o/n", False)),
    ],
)
def test_what_looks_like_a_hub_reference_is_named(
    path: str, hub: bool, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(offline)
    with pytest.raises(LoratoolError, match="no such model") as caught:
        files.existing(path, "model")
    assert ("hub reference" in caught.value.hint) is hub
    assert caught.value.exit_code == 1


def test_a_local_path_wins_over_a_hub_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert files.existing("org/name") == Path("org/name")
    with pytest.raises(LoratoolError) as caught:
        files.existing("org/other")
    assert not caught.value.hint  # org is here, so a path was meant


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty, and no network."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def cached(cache: Path, commit: str, revision: str = "") -> Path:
    """A snapshot of org/name in a hub cache, as huggingface_hub lays it out."""
    repository = cache / "models--org--name"
    folder = repository / "snapshots" / commit
    for path in (folder, repository / "blobs", (repository / "refs" / revision).parent):
        path.mkdir(parents=True, exist_ok=True)
    (repository / "blobs/aa").write_text(commit)
    (folder / "config.json").symlink_to("../../blobs/aa")
    if revision:
        (repository / "refs" / revision).write_text(commit)
    return folder


@pytest.mark.parametrize("where", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_a_hub_reference_is_found_in_the_cache(where: str, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(offline)
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(where, str(offline))
    below = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub", "HOME": ".cache/huggingface/hub"}
    cache = offline / below.get(where, ".")
    main, other = cached(cache, "c0ffee", "main"), cached(cache, "beef", "refs/pr/1")
    assert files.existing("org/name", "model") == main
    assert files.existing("org/name@main", "adapter") == main
    assert files.existing("org/name@c0ffee", "model") == main
    assert files.existing("org/name@refs/pr/1", "model") == other
    assert files.inside(main, "config.json").read_text() == "beef"  # both link to one blob
    for missing in ("org/name@v2", "org/other", "org/name@../x", "org/name@..", "../name", "org/name/x"):
        with pytest.raises(LoratoolError, match="no such model") as caught:
            files.existing(missing, "model")
        assert caught.value.exit_code == 1
    with pytest.raises(LoratoolError, match="no such map"):
        files.existing("org/name", "map")


@pytest.mark.peer
def test_the_hubs_own_library_finds_the_same(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    monkeypatch.chdir(offline)
    one, other = "c0ffee" * 6 + "beef", "beef" * 10
    cached(offline, one, "main")
    cached(offline, other, "v1")
    for reference, revision in (("org/name", None), ("org/name@v1", "v1"), (f"org/name@{other}", other)):
        found = snapshot_download("org/name", revision=revision, cache_dir=offline, local_files_only=True)
        assert files.existing(reference, "model") == Path(found)


@pytest.mark.parametrize("library", [True, False])
def test_a_hub_reference_is_fetched_unless_that_is_forbidden(
    library: bool, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def fetch(repo: str, *, revision: str, cache_dir: Path) -> str:
        asked.append((repo, revision, cache_dir))
        if repo == "org/secret":
            raise ValueError("401\nno access")
        return str(cached(offline, "c0ffee", revision))

    known = type("Hub", (), {"snapshot_download": staticmethod(fetch)}) if library else None
    monkeypatch.setitem(sys.modules, "huggingface_hub", known)
    monkeypatch.chdir(offline)
    with pytest.raises(LoratoolError, match="no such model, org/name") as caught:
        files.existing("org/name", "model")
    assert "HF_HUB_OFFLINE" in caught.value.hint
    assert not asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    if library:
        assert files.existing("org/name@v1", "model").name == "c0ffee"
        assert asked == [("org/name", "v1", offline)]
        with pytest.raises(LoratoolError, match="no such model, org/secret") as caught:
            files.existing("org/secret", "model")
        assert "401 no access" in caught.value.hint
        return
    with pytest.raises(LoratoolError, match="no such model, org/name") as caught:
        files.existing("org/name", "model")
    assert "pip install 'loratool[hub]'" in caught.value.hint
    main = cached(offline, "c0ffee", "main")
    assert files.existing("org/name", "model") == main


def test_a_pipe_is_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for look in (lambda: files.existing(tmp_path / "pipe"), lambda: list(files.walk(tmp_path))):
        with pytest.raises(FormatError, match="neither a file nor a folder"):
            look()
    with pytest.raises(LoratoolError, match="the output is neither"):
        files.prepare_output(tmp_path / "pipe", overwrite=True)


def test_a_broken_link_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(LoratoolError, match="broken link"):
        files.existing(tmp_path / "link")


# ---------------------------------------------------------------- names and links inside a folder


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a\\..\\x", "..\\x", "C:\\x", "C:x", "a\0b"])
def test_a_name_may_not_lead_out_of_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="unsafe path"):
        files.inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "..a", "a..b/c", ".hidden"])
def test_plain_names_are_fine(name: str, tmp_path: Path) -> None:
    assert files.inside(tmp_path, name) == tmp_path / name


def test_links_may_not_leave_their_folder(tmp_path: Path) -> None:
    model, secret = tmp_path / "model", tmp_path / "secret"
    for folder in (model, secret):
        folder.mkdir()
        (folder / "real").write_text("")
    (model / "fine").symlink_to("real")
    (model / "out").symlink_to("../secret/real")
    (model / "absolute").symlink_to(secret / "real")
    (model / "way").symlink_to("../secret")
    assert files.inside(model, "fine") == model / "fine"
    for name in ("out", "absolute", "way/real"):
        with pytest.raises(FormatError, match="leaves its folder"):
            files.inside(model, name)
        assert files.inside(model, name, allow_links=True).exists()


def test_walking_a_folder(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    for name in ("unet/w", "b", "a"):
        (model / name).write_text("")
    (model / "fine").symlink_to("a")
    assert [path.as_posix() for path in files.walk(model)] == ["a", "b", "fine", "unet/w"]
    (tmp_path / "secret").write_text("")
    (model / "z").symlink_to("../secret")
    with pytest.raises(FormatError, match="leaves its folder"):
        list(files.walk(model))
    assert len(list(files.walk(model, allow_links=True))) == 5
    (model / "y").symlink_to("unet")
    with pytest.raises(FormatError, match="linked folder"):
        list(files.walk(model, allow_links=True))


@pytest.mark.parametrize("component", ["", "unet/"])
def test_a_hub_cache_may_link_to_its_own_blobs(component: str, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    for path in (repository / "blobs/aa", tmp_path / "models--org--other/blobs/bb", repository / "refs"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    folder = repository / "snapshots/c0ffee" / component
    folder.mkdir(parents=True)
    up = "../" * (3 if component else 2)
    (folder / "model.safetensors").symlink_to(f"{up}blobs/aa")
    assert [p.name for p in files.walk(folder)] == ["model.safetensors"]
    assert files.inside(folder, "model.safetensors").exists()
    for name, aim in (("refs", f"{up}refs"), ("other", f"{up}../models--org--other/blobs/bb")):
        (folder / name).symlink_to(aim)
        with pytest.raises(FormatError, match="leaves its folder"):
            files.inside(folder, name)


# ---------------------------------------------------------------- reading


def test_an_error_of_reading_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match=re.escape(f"cannot read: Is a directory, {tmp_path}")):
        files.FileBytes(tmp_path).read(0, 1)


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    file = files.FileBytes(tmp_path / "f")
    assert bytes(file.read(2, 3)) == b"234"
    with pytest.raises(FormatError, match="ends early"):
        file.read(8, 3)


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git-LFS pointer"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"PK\x03\x04\0\0\x08\x08", "zip archive"),
        (b"\x80\x02}q\x00(X\x00", "pickle"),
        (b"<!DOCTYPE html>", "web page"),
    ],
)
def test_foreign_files_are_named(head: bytes, what: str) -> None:
    with pytest.raises(FormatError, match=what):
        files.reject_foreign(head, Path("f"))


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x10280, 0x04034B50])
def test_a_header_length_that_looks_like_a_magic_number_is_none(length: int, tmp_path: Path) -> None:
    from loratool.pickles import looks_pickled

    head = length.to_bytes(8, "little") + b'{"a":{'
    files.reject_foreign(head, Path("f"))
    (tmp_path / "f").write_bytes(head)
    assert not looks_pickled(tmp_path / "f")


@pytest.mark.parametrize(
    "data",
    [b"{", b"\xff\xfe", b'{"a": ' + b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}"],
    ids=["cut", "bytes", "deep", "digits"],
)
def test_hostile_json_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(FormatError, match="not valid JSON"):
        files.read_json(tmp_path / "config.json")


def test_json_is_bounded_in_size_and_may_have_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(path) == {"a": 1}
    with pytest.raises(FormatError, match="larger than 5 bytes"):
        files.read_json(path, limit=5)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(FormatError, match="git-LFS pointer"):
        files.read_json(path)


# ---------------------------------------------------------------- digests


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's file, for files of any size and age."""
    monkeypatch.setenv("LORATOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_GRAIN", 0.0)
    monkeypatch.setattr(hashes, "CHUNK", 1)
    return tmp_path / "cache/loratool/sha256.json"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def forge(cache: Path, path: Path, *entry: Any) -> None:
    """Make the cache say something else, to see whether it is asked."""
    table = json.loads(cache.read_text())
    identity = table[str(path.resolve())][0]
    table[str(path.resolve())] = entry[0] if entry else [identity, "remembered"]
    cache.write_text(json.dumps(table))


def test_a_digest_is_remembered(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"data")
    assert hashes.sha256(path) == digest(b"data")
    forge(cache, path)
    assert hashes.sha256(path) == "remembered"
    (tmp_path / "link").symlink_to(path)
    assert hashes.sha256(tmp_path / "link") == "remembered"


@pytest.mark.parametrize("how", ["longer", "same size", "same size and time", "another file"])
def test_a_changed_file_is_hashed_anew(how: str, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"data")
    os.utime(path, (1, 1))
    hashes.sha256(path)
    forge(cache, path)
    if how == "another file":
        other = tmp_path / "g"
        other.write_bytes(b"DATA")
        os.utime(other, (1, 1))
        os.replace(other, path)
    else:
        time.sleep(0.02)  # past the clock's grain, which ctime has
        path.write_bytes(b"longer" if how == "longer" else b"DATA")
        if how.endswith("time"):
            os.utime(path, (1, 1))
    assert hashes.sha256(path) == digest(path.read_bytes())


def test_a_file_just_written_is_not_remembered(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_GRAIN", 60.0)
    (tmp_path / "f").write_bytes(b"data")
    assert hashes.sha256(tmp_path / "f") == digest(b"data")
    assert not cache.exists()


def test_small_files_are_not_remembered(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "CHUNK", 5)
    (tmp_path / "f").write_bytes(b"data")
    assert hashes.sha256(tmp_path / "f") == digest(b"data")
    assert not cache.exists()


def test_remembering_can_be_switched_off(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"data")
    hashes.sha256(path)
    forge(cache, path)
    before = cache.read_bytes()
    monkeypatch.setenv("LORATOOL_CACHE", "off")
    assert hashes.sha256(path) == digest(b"data")
    assert cache.read_bytes() == before


def test_a_cache_that_cannot_be_written_is_no_hindrance(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORATOOL_CACHE", str(tmp_path / "file"))  # a file where a folder is wanted
    (tmp_path / "f").write_bytes(b"data")
    assert hashes.sha256(tmp_path / "f") == digest(b"data")


@pytest.mark.parametrize("entry", [5, [], ["odd"], [[1, 2], "x"], "text", {"a": 1}])
def test_a_damaged_cache_is_not_believed(entry: Any, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"data")
    hashes.sha256(path)
    forge(cache, path, entry)
    assert hashes.sha256(path) == digest(b"data")
    cache.write_text("[" if entry == 5 else json.dumps(entry))
    assert hashes.sha256(path) == digest(b"data")


def test_the_cache_stays_small(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_KEEP", 3)
    for number in range(5):
        (tmp_path / str(number)).write_bytes(b"%d" % number)
        hashes.sha256(tmp_path / str(number))
    assert [Path(name).name for name in json.loads(cache.read_text())] == ["2", "3", "4"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises((LoratoolError, OSError), match="gone"):
        hashes.sha256(tmp_path / "gone")
