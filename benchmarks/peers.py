"""What others take for the same work, and how exact it is: one module of each shape, timed and multiplied.

A sample file holds `<module>.up` and `<module>.down` (and `.up2`, `.down2` of a second adapter), or `<module>.base`
and `<module>.tuned`. A peer runs in a process of its own, writes the factors that it found as `<module>.up` and
`.down`, and prints its seconds for each module as JSON:

    python -m benchmarks.peers thin|peft|kohya-resize|kohya-extract SAMPLE OUT RANK [--kohya DIR]

``--kohya`` is a checkout of kohya-ss/sd-scripts: its own `resize_lora_model` and `svd` run, on the processor. What its
package `library` would load around them (a whole checkpoint, image libraries) is replaced by stand-ins.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import json
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Figures
from loratool.tensors import Tensor, write_safetensors

Factors = tuple[np.ndarray, np.ndarray]
Sample = Mapping[str, Mapping[str, Tensor]]  # module -> part -> tensor


# ---------------------------------------------------------------- asking a peer


def ask(peer: str, sample: Sample, counts: Mapping[str, int], rank: int, work: Path, *more: str) -> Figures:
    """The figures of a peer for all modules that have the shapes of the sample's, its worst excess among them."""
    from safetensors.numpy import load_file

    given, out = work / f"{peer}-sample.safetensors", work / f"{peer}-out.safetensors"
    write_safetensors(given, {f"{m}.{part}": t for m, parts in sample.items() for part, t in parts.items()}, {})
    command = [sys.executable, "-m", "benchmarks.peers", peer, str(given), str(out), str(rank), *more]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{told.stderr[-4000:]}")
    seconds: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    made = load_file(out)
    factors = {m: (made[f"{m}.up"], made[f"{m}.down"]) for m in sample}
    for path in (given, out):
        path.unlink()
    total = sum(counts[m] * seconds[m] for m in sample)
    note = f"{len(sample)} modules took {sum(seconds.values()):.1f} s: multiplied to {sum(counts.values())}"
    return Figures(
        [total], excess=excess(sample, factors, rank), note=note if len(sample) < sum(counts.values()) else ""
    )


# ---------------------------------------------------------------- accuracy

_optima: dict[tuple[str, int], float] = {}


def excess(sample: Sample, found: Mapping[str, Factors], rank: int) -> float:
    """The worst ||D - up @ down|| / optimum - 1 over the sample, in float64; each optimum is computed once."""
    worst = -1.0
    for module, parts in sample.items():
        change = difference(parts)
        key = f"{module} {sum(t.size for t in parts.values())} {np.abs(change).sum():.17g}", rank
        if key not in _optima:
            side = change if change.shape[0] >= change.shape[1] else change.T
            _optima[key] = float(np.sqrt(np.maximum(np.linalg.eigvalsh(side.T @ side)[:-rank], 0.0).sum()))
        up, down = (factor.astype(np.float64) for factor in found[module])
        up, down = up.reshape(len(up), -1), down.reshape(len(down), -1)
        worst = max(worst, float(np.linalg.norm(change - up @ down)) / _optima[key] - 1)
    return worst


def difference(parts: Mapping[str, Tensor]) -> np.ndarray:
    """The matrix to approximate [o,i*k], in float64."""
    wide = {part: tensor.float().astype(np.float64) for part, tensor in parts.items()}
    wide = {part: values.reshape(len(values), -1) for part, values in wide.items()}
    if "base" in wide:
        return np.asarray(wide["tuned"] - wide["base"])
    whole = wide["up"] @ wide["down"]
    return np.asarray(whole + wide["up2"] @ wide["down2"] if "up2" in wide else whole)


def ours(path: Path, names: Mapping[str, str]) -> dict[str, Factors]:
    """The factors that loratool reads from an adapter, for the sample's modules and the names they have in it."""
    import loratool

    updates = loratool.read(path).updates
    return {module: updates[name].factors() for module, name in names.items()}  # type: ignore[attr-defined]


# ---------------------------------------------------------------- the peers, each in its process

Peer = Callable[[Mapping[str, Any], int], tuple[Any, Any]]


def thin(parts: Mapping[str, Any], rank: int) -> tuple[Any, Any]:
    """The thin SVD of the dense matrix by torch."""
    import torch

    whole = parts["tuned"].float() - parts["base"].float() if "base" in parts else _product(parts)
    up, values, down = torch.linalg.svd(whole, full_matrices=False)
    root = values[:rank].sqrt()
    dtype = next(iter(parts.values())).dtype
    return (up[:, :rank] * root).to(dtype), (down[:rank] * root[:, None]).to(dtype)


def _product(parts: Mapping[str, Any]) -> Any:
    return parts["up"].float().flatten(1) @ parts["down"].float().flatten(1)


def peft(parts: Mapping[str, Any], rank: int) -> tuple[Any, Any]:
    """PEFT's ``add_weighted_adapter`` by SVD, with its defaults, of two adapters of one layer."""
    import torch
    from peft import LoraConfig, get_peft_model

    (out, old), inner = parts["up"].shape, parts["down"].shape[1]
    model = torch.nn.Sequential(torch.nn.Linear(inner, out, bias=False))
    peft_model = get_peft_model(model, LoraConfig(r=old, lora_alpha=old, target_modules=["0"]))
    peft_model.add_adapter("other", LoraConfig(r=old, lora_alpha=old, target_modules=["0"]))
    layer = peft_model.base_model.model[0]
    for name, number in (("default", ""), ("other", "2")):
        layer.lora_A[name].weight.data = parts[f"down{number}"].float()
        layer.lora_B[name].weight.data = parts[f"up{number}"].float()
    peft_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "svd", svd_rank=rank)
    dtype = parts["up"].dtype
    return layer.lora_B["both"].weight.data.to(dtype), layer.lora_A["both"].weight.data.to(dtype)


def kohya_resize(parts: Mapping[str, Any], rank: int) -> tuple[Any, Any]:
    """sd-scripts' networks/resize_lora.py."""
    import torch

    resize = importlib.import_module("networks.resize_lora")
    given = {f"m.lora_{half}.weight": parts[half].float() for half in ("down", "up")}
    made, _, _ = resize.resize_lora_model(given, rank, rank, torch.float16, "cpu", None, None, False)
    return made["m.lora_up.weight"], made["m.lora_down.weight"]


def kohya_extract(parts: Mapping[str, Any], rank: int) -> tuple[Any, Any]:
    """sd-scripts' networks/extract_lora_from_models.py, with its defaults (it clamps the largest 1% of the factors)."""
    import torch
    from safetensors.torch import load_file

    extract = importlib.import_module("networks.extract_lora_from_models")

    def unet(weight: Any) -> Any:
        block = type("Transformer2DModel", (torch.nn.Module,), {})()
        block.m = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        block.m.weight = torch.nn.Parameter(weight, requires_grad=False)
        whole = torch.nn.Module()
        whole.b = block
        return whole

    models = [unet(parts[name]) for name in ("base", "tuned")]
    nothing = torch.nn.Module()
    loaded = iter([(nothing, nothing, None, model, None, None) for model in models])
    extract.sdxl_model_util.load_models_from_sdxl_checkpoint = lambda *given: next(loaded)
    extract.args = types.SimpleNamespace(device=None)
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "lora.safetensors"))
        extract.svd("base", "tuned", out, rank, sdxl=True, save_precision="fp16", no_metadata=True)
        made = load_file(out)
    return made["lora_unet_b_m.lora_up.weight"], made["lora_unet_b_m.lora_down.weight"]


PEERS: Mapping[str, Peer] = {
    "thin": thin,
    "peft": peft,
    "kohya-resize": kohya_resize,
    "kohya-extract": kohya_extract,
}


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules for sd-scripts' `library`, whose every name is a class that does nothing."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        stood_in = name.partition(".")[0] == "library"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if stood_in else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)

        def attribute(name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            made: object = name  # a constant
            if spec.name == "library":
                made = importlib.import_module(f"library.{name}")
            elif not name.isupper():
                made = type(name, (), {"__init__": lambda self, *args, **kwargs: None})
            setattr(module, name, made)
            return made

        module.__getattr__ = attribute  # type: ignore[method-assign]
        if spec.name == "library.train_util":
            module.precalculate_safetensors_hashes = lambda *given: ("", "")  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _parts(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sample's modules, one at a time."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    for module in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        yield module, {n.rpartition(".")[2]: t for n, t in tensors.items() if n.rpartition(".")[0] == module}


def main() -> None:
    """Run one peer over a sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("sample")
    parser.add_argument("out")
    parser.add_argument("rank", type=int)
    parser.add_argument("--kohya", type=Path)
    given = parser.parse_args()
    if given.kohya:
        sys.path[:0] = [str(given.kohya), str(given.kohya / "networks")]
        sys.meta_path.insert(0, _StandIns())
    from safetensors.torch import save_file

    seconds, made = {}, {}
    with contextlib.redirect_stdout(sys.stderr):
        warm = next(_parts(given.sample))[1]
        PEERS[given.peer]({part: tensor[:32, :32].contiguous() for part, tensor in warm.items()}, 2)  # imports
        for module, parts in _parts(given.sample):
            began = time.perf_counter()
            up, down = PEERS[given.peer](parts, given.rank)
            seconds[module] = time.perf_counter() - began
            made |= {f"{module}.up": up.float().contiguous(), f"{module}.down": down.float().contiguous()}
    save_file(made, given.out)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
