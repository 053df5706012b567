"""References to the Hugging Face hub, ``org/name[@revision]``: found in the hub's cache, or fetched into it.

The cache holds ``models--org--name/snapshots/COMMIT/...``, links to ``blobs``, and for each branch or tag a file
``refs/REVISION`` with its commit. The network is touched by huggingface_hub only, and never with HF_HUB_OFFLINE=1.
Source: huggingface_hub 1 and 2 (`constants`, `file_download`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from loratool.errors import LoratoolError

_REFERENCE = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w-][\w./-]*))?")
_FILES = (".safetensors", ".onnx", ".onnx_adapter", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".json")
_TRUE = ("1", "ON", "YES", "TRUE")


def looks_hosted(text: str) -> bool:
    """Whether a text that is no local path reads as ``org/name[@revision]``; in a folder ``org`` it is a path.

    So is a file's name: a slip of the pen is no reason to ask the network.
    """
    if text.endswith(_FILES) or ".." in text or Path(text.split("/")[0]).exists():
        return False
    return _REFERENCE.fullmatch(text) is not None


def snapshot(reference: str, what: str) -> Path:
    """The local folder of a hub reference. Raises LoratoolError where it can neither be found nor fetched."""
    found = _REFERENCE.fullmatch(reference)
    assert found is not None
    repo, revision = found["repo"], found["revision"] or "main"
    cached = _cached(repo, revision)
    begin = "this looks like a hub reference, which"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
        if cached is None:
            hint = f"{begin} is not in the hub's cache, {_cache()}, and HF_HUB_OFFLINE forbids to fetch it"
            raise LoratoolError(f"no such {what}", reference, hint)
        return cached
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        if cached is None:
            hint = f"{begin} only huggingface_hub can fetch: pip install 'loratool[hub]', or give a local path"
            raise LoratoolError(f"no such {what}", reference, hint) from None
        return cached
    try:
        return Path(snapshot_download(repo, revision=revision, cache_dir=_cache()))
    except Exception as error:  # its errors are of many families: no such name, no access, no network
        said = " ".join(str(error).split()) or type(error).__name__
        raise LoratoolError(f"no such {what}", reference, f"{begin} cannot be fetched: {said[:300]}") from None


def _cache() -> Path:
    """The hub's cache, where its own library looks."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HOME") or f"{home}/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{hub}/hub"
    return Path(os.path.expandvars(cache)).expanduser()


def _cached(repo: str, revision: str) -> Path | None:
    """The snapshot of a revision (a branch, a tag, a whole commit) that the cache holds."""
    folder = _cache() / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    found = folder / "snapshots" / commit
    return found if commit and "/" not in commit and commit not in (".", "..") and found.is_dir() else None
