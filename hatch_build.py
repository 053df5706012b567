"""Builds loratool/native.c with the wheel, where a C compiler is at hand; without one the wheel is pure Python."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

SOURCE, LIBRARY = "loratool/native.c", "loratool/_native.so"
# contraction is what makes a product and a sum one fused operation, as the contract of native.c says
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-strict-aliasing", "-fPIC", "-shared", "-Wno-psabi")


class NativeBuildHook(BuildHookInterface[Any]):
    """Compiles one shared library that knows nothing of Python: a wheel for the platform, for any version of Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it packs the wheel (or points to the checkout, for ``pip install -e``)."""
        if why := compiled(Path(self.root)):
            self.app.display_warning(f"{SOURCE} is left out, numpy does its work: {why}")
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        platform = next(t.platform for t in sys_tags() if not t.platform.startswith(("manylinux", "musllinux")))
        build_data["tag"] = f"py3-none-{platform}"


def compiled(root: Path) -> str:
    """Compile the library; why it could not be done, or nothing."""
    (root / LIBRARY).unlink(missing_ok=True)
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    try:
        command = [*compiler, *FLAGS, "-o", LIBRARY, SOURCE]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"{command[0]} gave {done.returncode}"
