"""sha256 of input files, remembered between runs.

Hashing a model takes as long as merging it, and the same base is merged many times. As git's index does for its
files, digests are remembered with the file's identity (path, device, inode, size, modification and change time in
nanoseconds) under the user's cache folder; any difference hashes anew. A file touched within the last seconds is
never remembered, for a later change within the clock's grain would not show. ``LORATOOL_CACHE=off`` switches it off.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from loratool.errors import LoratoolError
from loratool.files import CHUNK

_GRAIN = 3.0  # seconds
_KEEP = 4096  # digests
_LOCK = threading.Lock()


def sha256(path: Path, stop: threading.Event | None = None) -> str:
    """The sha256 of a file's bytes, in hex; at once where it is remembered. Ends early when ``stop`` is set."""
    identity = _identity(path)
    known = _load().get(str(path.resolve()))
    if isinstance(known, list) and len(known) == 2 and known[0] == identity:
        return str(known[1])
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    try:
        with open(path, "rb", buffering=0) as file:
            while not (stop and stop.is_set()) and (count := file.readinto(buffer)):
                digest.update(buffer[:count])
    except OSError as error:
        raise LoratoolError(f"cannot read: {error.strerror}", path) from None
    if not (stop and stop.is_set()) and _identity(path) == identity:
        _remember(path, identity, digest.hexdigest())
    return digest.hexdigest()


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _store() -> Path | None:
    """The file that digests are remembered in; None where they are not."""
    if os.environ.get("LORATOOL_CACHE") == "off":
        return None
    home = os.environ.get("LORATOOL_CACHE") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "loratool" / "sha256.json"


def _load() -> dict[str, list[object]]:
    store = _store()
    if store is None:
        return {}
    with suppress(OSError, ValueError):
        table = json.loads(store.read_bytes())
        if isinstance(table, dict):
            return table
    return {}


def _remember(path: Path, identity: list[int], digest: str) -> None:
    store = _store()
    if store is None or time.time_ns() - max(identity[3:]) < _GRAIN * 1e9 or identity[2] < CHUNK:
        return
    with _LOCK, suppress(OSError):
        table = _load()
        table.pop(str(path.resolve()), None)
        table[str(path.resolve())] = [identity, digest]
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary = store.with_name(f"{store.name}.{os.getpid()}")
        temporary.write_text(json.dumps(dict(list(table.items())[-_KEEP:])))
        os.replace(temporary, store)
