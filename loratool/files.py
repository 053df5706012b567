"""Files in and out: reading at offsets, checking paths, and output that appears whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from loratool.errors import FormatError, LoratoolError
from loratool.hub import looks_hosted, snapshot

CHUNK = 4 << 20  # bytes read at a time where a whole file is walked
_SPACE = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space", errno.EFBIG: "see ulimit -f"}
_OLD = ".old"  # ends the name under which an output that is being replaced waits

_MAGIC = (
    (
        b"version https://git-lfs",
        "a git-LFS pointer, not the file itself",
        "fetch the real file: git lfs pull",
    ),
    (b"GGUF", "a GGUF file, read as an adapter only", "give the model in safetensors"),
    (b"PK\x03\x04", "a zip archive (a PyTorch pickle, or npz)", "convert it to safetensors first"),
    (b"\x80\x02", "a Python pickle", "convert it to safetensors first"),
    (b"<!DOCTYPE", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
)


class FileBytes:
    """One input file: read at offsets by any number of threads; opened on the first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    @cached_property
    def _fd(self) -> int:
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    @cached_property
    def size(self) -> int:
        """Bytes in the file."""
        return self.path.stat().st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` (bytes) from ``offset``. Raises FormatError when the file ends before."""
        with self._lock:  # only the first call opens; preadv itself needs no lock
            fd = self._fd
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise LoratoolError(f"cannot read: {os.strerror(error.errno or 0)}", self.path) from None
            if count == 0:
                raise FormatError("file ends early", self.path, "fetch or copy it again")
            done += count

    def read(self, offset: int, nbytes: int) -> bytearray:
        """``nbytes`` bytes from ``offset``."""
        data = bytearray(nbytes)
        self.read_into(memoryview(data), offset)
        return data

    def __del__(self) -> None:
        if "_fd" in self.__dict__:
            with suppress(OSError):
                os.close(self.__dict__["_fd"])


def reject_foreign(head: bytes, path: Path) -> None:
    """Raise FormatError naming what ``head``, the first bytes of ``path``, really is."""
    if head[8:9] == b"{":  # safetensors: the length of its header may look like any magic number
        return
    for magic, what, hint in _MAGIC:
        if head.startswith(magic):
            raise FormatError(f"this is {what}", path, hint)


def existing(path: str | os.PathLike[str], what: str = "input") -> Path:
    """``path`` if it exists; of a model or an adapter also the folder of a hub reference. Else LoratoolError."""
    found, text = Path(path), os.fspath(path)
    if found.exists():
        return _plain(found)
    if found.is_symlink():
        raise LoratoolError(f"{what} is a broken link", found)
    if what in ("model", "adapter") and looks_hosted(text):
        return snapshot(text, what)
    raise LoratoolError(f"no such {what}", text)


def walk(folder: Path, allow_links: bool = False) -> Iterator[Path]:
    """Every file below ``folder``, as paths relative to it, sorted.

    A link may not leave the folder or the hub cache it lies in, unless ``allow_links``
    (raises FormatError): hostile folders point at the user's other files.
    """
    for root, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        for name in [*folders, *sorted(names)]:
            path = Path(root, name)
            if path.is_symlink():
                if not allow_links:
                    check_link(path, folder)
                if path.is_dir():
                    raise FormatError("a linked folder inside a model folder is not followed", path)
            if not path.is_dir():
                yield _plain(path).relative_to(folder)


def _plain(path: Path) -> Path:
    """The path itself. Raises FormatError for a pipe or a device: opening one may wait forever."""
    if _special(path):
        raise FormatError("neither a file nor a folder", path, "write it to a file first: files are read at offsets")
    return path


def _special(path: Path) -> bool:
    return path.exists() and not (path.is_file() or path.is_dir())


def check_link(path: Path, folder: Path) -> None:
    """Raise FormatError when ``path``, inside ``folder``, leads outside of it and of its hub cache."""
    real, top = path.resolve(), folder.resolve()
    # a hub cache keeps <repo>/snapshots/<commit>/[component/]file -> <repo>/blobs/<hash>
    caches = [parent.parent / "blobs" for parent in top.parents if parent.name == "snapshots"]
    if not any(real.is_relative_to(allowed) for allowed in (top, *caches)):
        raise FormatError("a link leaves its folder", path, "copy the file into the folder, or give --allow-links")


def inside(folder: Path, name: str, allow_links: bool = False) -> Path:
    """The file ``name`` of ``folder``. Raises FormatError when the name or a link leads out of it."""
    parts = name.replace("\\", "/").split("/")
    if not name or name.startswith("/") or ".." in parts or "\0" in name or ":" in parts[0]:
        raise FormatError(f"unsafe path {name!r}", folder)
    path = folder / name
    if not allow_links:
        check_link(path, folder)
    return path


def prepare_output(out: str | os.PathLike[str], overwrite: bool, inputs: Mapping[str, Path] | None = None) -> Path:
    """Check that ``out`` may be written: parent there, not existing (or ``overwrite``), not an input."""
    path = Path(out)
    parent = path.parent
    if not parent.is_dir():
        raise LoratoolError("the output's parent folder does not exist", parent, "create it first")
    if path.name in ("", ".", ".."):
        raise LoratoolError("the output needs a name of its own", path)
    for what, source in (inputs or {}).items():
        here, there = path.resolve(), source.resolve()
        if here == there or here in there.parents:
            raise LoratoolError(f"the output would overwrite {what}", path, "choose another output path")
        if there.is_dir() and there in here.parents:
            raise LoratoolError(f"the output would lie inside {what}", path, "choose another output path")
    if _special(path):
        raise LoratoolError("the output is neither a file nor a folder", path, "give another path")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise LoratoolError("output exists", path, "give another path, or --overwrite to replace it")
    if not os.access(parent, os.W_OK):
        raise LoratoolError("the output's folder is not writable", parent)
    return path


def check_space(folder: Path, nbytes: int) -> None:
    """Raise LoratoolError when fewer than ``nbytes`` bytes are free where ``folder`` lies."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise LoratoolError(f"out of disk: {nbytes:,} bytes needed, {free:,} free", folder, "free some space")


@contextmanager
def staged(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``out`` to write to (a file or a folder), renamed to ``out`` at the end.

    Output appears under its final name only complete and flushed; on any failure what was
    written is removed and ``out`` stays as it was. What a killed run left behind goes first.
    """
    _sweep(out)
    temporary = out.with_name(f"{_prefix(out)}{os.getpid()}-{threading.get_ident():x}")
    try:
        with _named(out, temporary):
            yield temporary
            _flush(temporary)
        if (out.exists() or out.is_symlink()) and not overwrite:
            raise LoratoolError("output exists", out, "it appeared while this ran; give another path")
        _replace(temporary, out)
    finally:
        remove(temporary)


@contextmanager
def staged_beside(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder for an output of several files: at the end each takes its place beside ``out``, that last.

    As `staged`: all of them complete and flushed, or none. An old ``out`` goes before its other files are replaced,
    so that it never stands beside files that are not its own.
    """
    _sweep(out)
    temporary = out.with_name(f"{_prefix(out)}{os.getpid()}-{threading.get_ident():x}")
    temporary.mkdir()
    try:
        with _named(out.parent, temporary):
            yield temporary
            _flush(temporary)
        places = {path: out.with_name(path.name) for path in sorted(temporary.iterdir()) if path.name != out.name}
        for place in (out, *places.values()):
            if (place.exists() or place.is_symlink()) and not overwrite:
                raise LoratoolError("output exists", place, "it appeared while this ran; give another path")
        if places:
            remove(out)
        for path, place in places.items():
            _replace(path, place)
        _replace(temporary / out.name, out)
    finally:
        remove(temporary)


@contextmanager
def _named(out: Path, temporary: Path) -> Iterator[None]:
    """What goes wrong with a temporary is told of where it would go: the user never heard of the other name."""
    try:
        yield
    except LoratoolError as error:
        if str(temporary) not in error.where:
            raise
        where = error.where.replace(str(temporary), str(out))
        raise type(error)(error.what, where, error.hint, error.items) from None
    except OSError as error:  # without a name: of a file that is open
        name = error.filename2 or error.filename or temporary  # of a copy, the second is written
        if not error.errno or str(temporary) not in str(name):
            raise
        where = str(name).replace(str(temporary), str(out))
        raise cannot_write(error, where) from None


def cannot_write(error: OSError, where: object) -> LoratoolError:
    """What the system says of a write, and what to do about it."""
    number = error.errno or 0
    return LoratoolError(f"cannot write: {os.strerror(number)}", where, _SPACE.get(number, ""))


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _prefix(out: Path) -> str:
    """How the names of temporaries for ``out`` on this machine begin; of a long name by its digest."""
    encoded = os.fsencode(out.name)
    name = out.name if len(encoded) <= 160 else hashlib.sha256(encoded).hexdigest()
    return f".{name}.loratool-{_host()}-"


def _host() -> str:
    import socket

    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _sweep(out: Path) -> None:
    """Remove what killed runs on this machine left, and give back an old output that one was about to replace."""
    prefix = _prefix(out)
    for path in out.parent.glob(glob_escape(prefix) + "*"):
        pid = path.name[len(prefix) :].split("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and os.path.isdir("/proc"):
            if path.name.endswith(_OLD) and not os.path.lexists(out):
                os.rename(path, out)
            remove(path)


def glob_escape(text: str) -> str:
    """``text`` with the wildcard characters of glob patterns made literal."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _flush(path: Path) -> None:
    """fsync a file, or every file and folder below a folder."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    for entry in paths:
        fd = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as error:  # where space is taken late, a full disk shows here
            raise cannot_write(error, path) from None
        finally:
            os.close(fd)


def _replace(temporary: Path, out: Path) -> None:
    """Rename ``temporary`` to ``out``; an old ``out`` goes only once the new one stands."""
    old = out.with_name(temporary.name + _OLD)
    is_folder = out.is_dir() and not out.is_symlink()
    if is_folder or (os.path.lexists(out) and temporary.is_dir()):
        os.rename(out, old)
    try:
        os.replace(temporary, out)
    except BaseException:
        if os.path.lexists(old):
            os.rename(old, out)
        raise
    remove(old)
    fd = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: Path, limit: int = 64 << 20) -> Any:
    """The JSON document in a file. Raises FormatError when it is larger than ``limit`` bytes or no JSON."""
    import json

    try:
        if path.stat().st_size > limit:
            raise FormatError(f"JSON larger than {limit:,} bytes", path)
        data = path.read_bytes()
        reject_foreign(data, path)
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not valid JSON: {error}", path) from None
    except OSError as error:
        raise LoratoolError(f"cannot read: {error.strerror}", path) from None
