"""The house rules: imports point down, one file speaks, nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import loratool
from tests import models

PACKAGE = Path(loratool.__file__).parent
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# from the ground up; a file imports from the floors below its own
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "lazy", "__init__"),
    ("hub", "native"),
    ("files",),
    ("tensors", "hashes"),
    ("update", "pickles", "gguf", "npz", "architectures/*"),
    ("kinds/*",),
    ("adapter", "keys", "linalg", "devices"),
    ("scaled",),
    ("model", "plan"),
    ("layouts",),
    ("names",),
    ("onnx/*",),
    ("formats/*", "ops/*"),
    ("api",),
    ("plots",),
    ("compute",),
    ("show",),
    ("cli",),
    ("__main__",),
)
TOGETHER = ("architectures", "formats", "kinds", "onnx", "ops")  # folders whose files may import each other


def floor(module: str) -> int:
    """The floor that a file stands on."""
    folder = f"{module.partition('/')[0]}/*"
    found = [n for n, floor in enumerate(FLOORS) if module in floor or ("/" in module and folder in floor)]
    assert len(found) == 1, f"{module} stands on no floor: add it to FLOORS"
    return found[0]


def imports(module: str) -> Iterator[str]:
    """The loratool files that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] != "loratool":
                continue
            tail = ["/".join(parts[1:stop]) for stop in range(len(parts), 0, -1)]
            yield next(t for found in tail for t in (found, f"{found}/__init__".lstrip("/")) if t in FILES)


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    for other in imports(module):
        if module == "__init__" or (other == "__init__" and floor(module) > 0):
            continue  # the public face is lazy; it lends its version
        beside = module.split("/")[0] == other.split("/")[0] and module.split("/")[0] in TOGETHER
        assert beside or floor(other) < floor(module), f"{module} imports {other}"


@pytest.mark.parametrize(("one", "other"), [("formats", "ops"), ("ops", "formats")])
def test_formats_and_operations_do_not_know_each_other(one: str, other: str) -> None:
    known = {m: set(imports(m)) for m in FILES if m.startswith(f"{one}/")}
    assert known
    assert not {m: found for m, found in known.items() if any(f.startswith(f"{other}/") for f in found)}


def test_nobody_imports_the_command_line() -> None:
    assert {m for m in FILES if {"cli", "show"} & set(imports(m))} == {"cli", "__main__"}


QUIETS = {"onnx/folder": {"logging", "warnings"}}  # it silences the libraries that it calls


@pytest.mark.parametrize("module", [m for m in FILES if m not in ("cli", "show", "__main__")])
def test_only_the_command_line_speaks(module: str) -> None:
    """No print, no exit, no logging, no warnings, no streams elsewhere."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("print", "input", "exit", "quit", "sys.exit", "os._exit"), f"{module}: {name}"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("sys.stdout", "sys.stderr", "sys.argv"), module
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "SystemExit" not in ast.unparse(node.exc), module
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None) or ""}
            assert not found & ({"logging", "warnings", "typer", "click", "rich"} - QUIETS.get(module, set())), module


HEAVY = ("torch", "transformers", "peft", "diffusers", "safetensors", "onnx", "onnxruntime", "scipy", "matplotlib")


@pytest.mark.parametrize("module", FILES)
def test_what_is_heavy_is_imported_where_it_is_used(module: str) -> None:
    for node in ast.parse(FILES[module].read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {*HEAVY}


def loaded(code: str, *arguments: str) -> tuple[set[str], str]:
    """What a fresh interpreter has imported after running this, and what it printed."""
    tail = "\nimport sys\nprint('\\n@', *(m for m in sys.modules if '.' not in m))"
    command = [sys.executable, "-c", code + tail, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    output, _, modules = run.stdout.rpartition("\n@")
    return set(modules.split()), output


CALL = """
from loratool.cli import main
import sys
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("merge", "--help"), ("formats",)])
def test_help_starts_without_torch(arguments: tuple[str, ...]) -> None:
    modules, output = loaded(CALL, *arguments)
    assert output.strip()
    assert not modules & {*HEAVY}
    assert "loratool" in modules


def test_importing_the_package_costs_next_to_nothing() -> None:
    modules, _ = loaded("import loratool; loratool.__version__; dir(loratool)")
    assert not modules & {*HEAVY, "numpy", "typer", "rich"}


@pytest.mark.parametrize("name", ["peft", "raw.safetensors", "kohya.safetensors", "diffusers.safetensors"])
@pytest.mark.parametrize("options", [(), ("--json",), ("--tensors",)])
def test_inspect_reads_headers_without_torch(name: str, options: tuple[str, ...]) -> None:
    path = str(models.FIXTURES / "adapters" / name)
    modules, output = loaded(CALL, "inspect", path, *options)
    assert output.strip()
    assert not modules & {*HEAVY}


@pytest.mark.parametrize("name", ["peft", "raw.safetensors", "kohya.safetensors", "diffusers.safetensors"])
def test_a_plain_lora_is_read_without_other_kinds(name: str) -> None:
    """What only another kind of update needs is imported when one is met."""
    code = "import sys, loratool; loratool.read(sys.argv[1]); print(*(m for m in sys.modules if '.kinds.' in m))"
    _, output = loaded(code, str(models.FIXTURES / "adapters" / name))
    assert not output.split()


@pytest.mark.parametrize("name", loratool.__all__)
def test_the_public_face_is_lazy_and_whole(name: str) -> None:
    found = getattr(loratool, name)
    assert name == "__version__" or found.__doc__, "every public name is documented"
    assert name in dir(loratool)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mrege'"):
        loratool.mrege  # noqa: B018


@pytest.mark.parametrize("module", FILES)
def test_every_file_and_public_thing_says_what_it_is(module: str) -> None:
    tree = ast.parse(FILES[module].read_text())
    if module != "ops/__init__":
        assert ast.get_docstring(tree) or module == "__main__", module
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}: {node.name}"


@pytest.mark.parametrize("module", FILES)
def test_nothing_is_left_to_do(module: str) -> None:
    text = FILES[module].read_text()
    assert not [word for word in ("TODO", "FIXME", "XXX", "breakpoint(") if word in text]
    assert "/home/" not in text and "/work/" not in text
