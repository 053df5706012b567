"""One sample of every kind of update, for the laws that hold for all of them; small files. numpy only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import loratool
from loratool import native
from loratool.adapter import Adapter, Metadata
from loratool.kinds import based, composed, factored
from loratool.kinds.glora import GLoRA
from loratool.kinds.hadamard import LoHa
from loratool.kinds.kronecker import LoKr
from loratool.kinds.patch import Padded
from loratool.kinds.rescale import IA3
from loratool.kinds.rotation import BOFT, OFT, PeftBOFT, PeftOFT, PeftOldOFT, SegmentOFT
from loratool.kinds.sparse import Sparse
from loratool.tensors import Tensor, write_safetensors
from loratool.update import Dense, DoRA, LowRank, Sum, Update

# every arithmetic of the processor that this installation has
DEVICES = ("cpu-numpy", "cpu-torch", *(("cpu-native",) if native.available() else ()))


def normal(*shape: int, dtype: str = "F32", seed: int = 0) -> Tensor:
    """Standard normal values."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)
    return Tensor.of(values, dtype)


def low(o: int = 7, i: int = 5, r: int = 3, *kernel: int, seed: int = 0, **more: Any) -> LowRank:
    """A LoRA of an [o,i,*kernel] weight, alpha 6 unless said otherwise."""
    return LowRank(
        down=normal(r, i, *kernel, seed=seed),
        up=normal(o, r, *(1 for _ in kernel), seed=seed + 1),
        **{"alpha": 6.0} | more,
    )


def tucker(o: int = 7, i: int = 5, r: int = 3, *kernel: int, **more: Any) -> LowRank:
    """A LoRA with a core: down and up are 1x1, the kernel lies in mid."""
    ones = (1,) * len(kernel)
    down, up, mid = normal(r, i, *ones), normal(o, r, *ones, seed=1), normal(r, r, *kernel, seed=2)
    return LowRank(down, up, mid, **{"alpha": 6.0} | more)


def magnitude(*shape: int) -> Tensor:
    """Positive values."""
    return Tensor.of(1 + np.abs(normal(*shape, seed=9).array()))


def loha(o: int = 7, i: int = 5, r: int = 2, seed: int = 0, **more: Any) -> LoHa:
    """A LoHa of an [o,i] weight, alpha 3 unless said otherwise."""
    a, b = normal(o, r, seed=seed), normal(r, i, seed=seed + 1)
    return LoHa(a, b, normal(o, r, seed=seed + 2), normal(r, i, seed=seed + 3), **{"alpha": 3.0} | more)


def tucker_loha(o: int = 7, i: int = 5, r: int = 2, *kernel: int, **more: Any) -> LoHa:
    """A LoHa around two cores, its outer factors stored transposed."""
    one, other = (normal(r, o), normal(r, i, seed=1)), (normal(r, o, seed=2), normal(r, i, seed=3))
    t1, t2 = normal(r, r, *kernel, seed=4), normal(r, r, *kernel, seed=5)
    return LoHa(*one, *other, t1, t2, **{"alpha": 3.0} | more)


def lokr(**more: Any) -> LoKr:
    """A LoKr of a [12,10] weight: w1 [3,2] whole, w2 a pair [4,2] [2,5], alpha 3."""
    given = {"w1": normal(3, 2), "w2_a": normal(4, 2, seed=1), "w2_b": normal(2, 5, seed=2), "alpha": 3.0}
    return LoKr(**{**given, **more})


WHOLE_LOKR = {"w1": normal(3, 2), "w2": normal(4, 5, seed=1), "w2_a": None, "w2_b": None}
LYCORIS: Mapping[str, Update] = {
    "loha": loha(),
    "loha_half_precision": replace(loha(7, 6), w1_a=normal(7, 2, dtype="F16"), w2_b=normal(2, 6, dtype="BF16")),
    "loha_of_two_widths": replace(loha(), w1_a=normal(7, 2, dtype="F64")),
    "loha_flattened": loha(7, 5 * 6, weight=(7, 5, 3, 2)),
    "loha_tucker": tucker_loha(7, 5, 2, 3, 2),
    "lokr": lokr(),
    "lokr_whole": lokr(**WHOLE_LOKR, stated_rank=2),
    "lokr_both_factorised": lokr(w1=None, w1_a=normal(3, 2, seed=3), w1_b=normal(2, 2, seed=4)),
    "lokr_flattened": lokr(w2_b=normal(2, 5 * 6, seed=2), weight=(12, 10, 3, 2)),
    "lokr_tucker": lokr(w2_a=normal(2, 4), w2_b=normal(2, 5), t2=normal(2, 2, 2, 1, 3, dtype="BF16")),
    "dora_of_loha": DoRA(loha(), magnitude(7, 1)),
    "dora_of_lokr_by_input": DoRA(lokr(), magnitude(1, 10), axis=1),
    "ia3": IA3(normal(7), weight=(7, 5)),
    "ia3_on_input": IA3(normal(1, 5, 1, 1), on_input=True, weight=(7, 5, 3, 2)),
    "ia3_transposed": IA3(normal(7, 1), centre=1.0, layer="transposed", weight=(5, 7)),
    "padded": Padded(low()),
    "sparse": Sparse(Tensor.of(np.array([[1, 6, 1], [2, 0, 4]])), normal(3), Tensor.of(np.array([7, 5])), 0.5),
    "glora": GLoRA(normal(5, 2), normal(2, 5), normal(7, 2), normal(2, 5, seed=1), alpha=3.0),
    "glora_old": GLoRA(normal(2, 5), normal(5, 2), normal(2, 5, seed=1), normal(7, 2), rank_stabilised=True),
    "glora_conv": GLoRA(normal(5, 2, 1, 1), normal(2, 5, 1, 1), normal(7, 2, 1, 1), normal(2, 5, 3, 2)),
    "oft": OFT(normal(3, 4, 4), magnitude(12, 1), alpha=0.05, weight=(12, 5)),
    "oft_direct": OFT(normal(3, 4, 4), direct=True, weight=(12, 5, 2)),
    "oft_transposed": OFT(normal(3, 4, 4), magnitude(12), layer="transposed", weight=(5, 12)),
    "oft_of_segments": SegmentOFT((normal(2, 3, 3), normal(2, 4, 4)), alpha=0.1, weight=(14, 5)),
    "boft": BOFT(normal(2, 2, 6, 6), magnitude(12, 1), weight=(12, 5)),
    "peft_oft": PeftOFT(normal(2, 6), neumann_terms=0, weight=(7, 8)),
    "peft_oft_shared": PeftOFT(normal(1, 6), block_share=True, neumann_terms=3, eps=0.2, weight=(5, 2, 2, 4)),
    "peft_oft_transposed": PeftOFT(normal(2, 6), neumann_terms=2, layer="transposed", weight=(8, 7)),
    "peft_old_oft": PeftOldOFT(normal(2, 4, 4), magnitude(7, 1), weight=(7, 8)),
    "peft_boft": PeftBOFT(normal(2, 2, 4, 4), magnitude(7, 1), weight=(7, 8)),
}


def whole(*shape: int, limit: int, dtype: str = "I32") -> Tensor:
    """Integers below ``limit``, all different where they fit."""
    drawn = np.random.default_rng([limit, *shape]).permutation(limit)
    return Tensor.of(np.resize(drawn, shape).astype(dtype.replace("I", "int").replace("U", "uint")))


def tuners(o: int = 8, i: int = 12, r: int = 4) -> Mapping[str, Update]:
    """One update of an [o,i] weight of every kind that is PEFT's alone."""
    size, bank, theta = (o, i), normal(9, 4), normal(10)
    sizes = {"size": size}
    glora = {
        "bias_scale": normal(o),
        "bias_shift": normal(o, seed=1),
        "column": Tensor.of(np.zeros((i, 1), np.float32)),
    }
    seeded = {"values": normal(11), "scale": 5.0, **sizes}
    return {
        "adalora": factored.AdaLora(down=normal(r, i), up=normal(o, r), singular=normal(r, 1), alpha=3.0, init_r=6),
        "vera": factored.Vera(
            scale_up=normal(o), scale_down=normal(r), up=normal(o + 2, r), down=normal(r, i + 1), **sizes
        ),
        "pvera": factored.Pvera(
            scale_up=normal(o), scale_down=normal(2 * r), up=normal(o, r), down=normal(2 * r, i), **sizes
        ),
        "delora": factored.Delora(down=normal(r, i), up=normal(o, r), strength=normal(1), norm=magnitude(i)),
        "vblora": factored.Mixtures(
            logits_up=normal(o // 4, r, 9), logits_down=normal(r, i // 4, 9), bank=bank, topk=3
        ),
        "vblora_chosen": factored.ChosenMixtures(
            index_up=whole(o // 4, r, 2, limit=9, dtype="U8"),
            share_up=Tensor.of(np.full((o // 4, r, 1), 0.25, np.float32)),
            index_down=whole(r, i // 4, 2, limit=9, dtype="U8"),
            share_down=Tensor.of(np.full((r, i // 4, 1), 0.6, np.float32)),
            bank=bank,
        ),
        "randlora": factored.RandLora(
            scale=normal(3, 3), gamma=normal(3, o), down=normal(3, 1, o + 1), up=normal(i, 3, 3), alpha=2.0, **sizes
        ),
        "gralora": factored.Gralora(
            down=normal(2, i // 2, 4),
            up=normal(2, 4, o // 2),
            hybrid_down=normal(1, i),
            hybrid_up=normal(o, 1),
            alpha=5.0,
        ),
        "miss": factored.Miss(block=normal(5, o), **sizes),
        "miss_small": factored.Miss(block=normal(5, 4), small=True, layer="transposed", **sizes),
        "unilora": factored.Unilora(
            theta=theta,
            index_down=whole(r, i, limit=10),
            scale_down=normal(r, i),
            index_up=whole(o, r, limit=10),
            scale_up=normal(o, r),
        ),
        "tinylora": factored.Tinylora(
            thetas=(normal(3),), projection=normal(3, r, r), down=normal(r, i), up=normal(o, r)
        ),
        "fourierft": composed.Fourier(**seeded),
        "fourierft_transposed": composed.Fourier(**seeded, layer="transposed"),
        "waveft": composed.Wavelet(**seeded),
        "waveft_db3": composed.Wavelet(**seeded, family="db3"),
        "waveft_transposed": composed.Wavelet(**seeded, family="db2", layer="transposed"),
        "shira": composed.Shira(values=normal(7), index=whole(2, 7, limit=8), **sizes),
        "supertuning": composed.Supertuning(
            values=normal(7), index=whole(7, limit=96), down=normal(2, i), up=normal(o, 2), alpha=3.0
        ),
        "c3a": composed.Circulant(kernel=normal(2, 3, 4)),
        "hra": based.Householder(vectors=normal(i, r), **sizes),
        "hra_orthogonal": based.Householder(vectors=normal(i, r), orthogonal=True, **sizes),
        "hira": based.Hira(LowRank(normal(r, i), normal(o, r))),
        "hira_transposed": based.Hira(LowRank(normal(r, i), normal(o, r), layer="transposed")),
        "miss_bat": based.BlockAffine(block=normal(2, 4, 4), **sizes),
        "road": based.Road(theta=normal(o // 2), alphas=normal(o // 2, seed=1), group=4, **sizes),
        "road_4": based.Road(theta=normal(2 * o), alphas=normal(2 * o, seed=1), variant=4, group=8, **sizes),
        "peft_glora": based.Glora(scale=(normal(o, r), normal(r, i)), shift=(normal(o, 1),), **glora),
        "deft": based.Injection(basis=normal(o, r), content=normal(r, i), scale=0.5),
        "deft_transposed": based.Injection(basis=normal(o, r), content=normal(r, i), method="qr", layer="transposed"),
        "osf": based.Subspace(up=normal(o, 3), values=magnitude(3), down=normal(3, i)),
        "peanut": based.Network(
            down=normal(r, o), up=normal(o, r), encoders=(normal(r, r),), decoders=(normal(r, r, seed=1),), **sizes
        ),
        "frod": based.Frod(
            diagonal=magnitude(i),
            values=normal(5),
            basis=normal(i, i),
            index=whole(2, 5, limit=i, dtype="I64"),
            extent=Tensor.of(np.array([i, i])),
            **sizes,
        ),
    }


UPDATES: Mapping[str, Update] = {
    **LYCORIS,
    **tuners(),
    "lora": low(),
    "lora_without_alpha": low(alpha=None),
    "lora_alpha_zero": low(alpha=0.0),
    "lora_alpha_of_float64": low(alpha=0.1),
    "lora_bfloat16": LowRank(normal(3, 5, dtype="BF16"), normal(7, 3, dtype="F16"), alpha=1.5),
    "lora_of_two_widths": LowRank(low().down.cast("F64"), low().up, alpha=1.5),
    "lora_rank_stabilised": low(rank_stabilised=True),
    "lora_transposed": low(layer="transposed"),
    "lora_embedding": low(layer="embedding"),
    "lora_conv1d": low(7, 5, 3, 3),
    "lora_conv2d": low(7, 5, 3, 3, 2),
    "lora_pointwise": low(7, 5, 3, 1, 1),
    "lora_tucker": tucker(7, 5, 3, 3, 2),
    "lora_tucker_wide": replace(tucker(7, 5, 3, 2), mid=normal(3, 3, 2, dtype="F64")),
    "dora": DoRA(low(), magnitude(7)),
    "dora_column": DoRA(low(), magnitude(7, 1)),
    "dora_by_input": DoRA(low(), magnitude(1, 5), axis=1),
    "dora_by_input_flat": DoRA(low(), magnitude(5), axis=1),
    "dora_transposed": DoRA(low(layer="transposed"), magnitude(7)),
    "dora_embedding": DoRA(low(layer="embedding"), magnitude(5), axis=1),
    "dora_conv": DoRA(low(7, 5, 3, 3, 2), magnitude(1, 7, 1, 1)),
    "dense": Dense(normal(7, 5)),
    "dense_scaled": Dense(normal(7, 5), 0.25),
    "dense_norm": Dense(normal(7), kind="norm"),
    "sum": Sum((low(), low(7, 5, 2, seed=3, alpha=None))),
    "sum_of_three": Sum((low(), Dense(normal(7, 5)), low(7, 5, 1, seed=4, rank_stabilised=True))),
}
ADDITIVE: Mapping[str, Any] = {name: update for name, update in UPDATES.items() if not update.needs_base}


def adapter(*names: str) -> Adapter:
    """An adapter with the named samples, each on a module of its own; all of them and what travels along if none."""
    updates: dict[str, Update] = {f"block.{n}.{name}": UPDATES[name] for n, name in enumerate(names or UPDATES)}
    carried: dict[str, Tensor] = {}
    if not names:
        updates["block.0.lora.bias"] = Dense(normal(7), 2.0, "bias")
        updates["head.bias"] = Dense(normal(4, dtype="F16"), kind="bias")
        carried = {"score.weight": normal(2, 7, dtype="BF16"), "score.bias": normal(2), "norm.weight": normal(7)}
    metadata = Metadata("sample", strings={"format": "pt", "note": "größer"}, config={"r": 3}, base_model="org/base")
    return Adapter(updates, carried, metadata)


def assert_same_adapter(one: Adapter, other: Adapter) -> None:
    """Same targets, same updates field by field and byte for byte, same carried tensors."""
    assert one.updates.keys() == other.updates.keys()
    assert one.carried.keys() == other.carried.keys()
    for name, update in one.updates.items():
        assert_same(update, other.updates[name], name)
    for name, tensor in one.carried.items():
        assert tensor.same_bytes(other.carried[name]), name


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Updates, or values in them, that are the same."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.same_bytes(other), where
    elif isinstance(one, Update):
        for field in fields(one):  # type: ignore[arg-type]
            assert_same(getattr(one, field.name), getattr(other, field.name), f"{where}.{field.name}")
    elif isinstance(one, tuple):
        assert len(one) == len(other), where
        for a, b in zip(one, other, strict=True):
            assert_same(a, b, where)
    else:
        assert one == other, where


# -- files ---------------------------------------------------------------------------------------------------


def model(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, shards: int = 1
) -> Path:
    """A model folder of these tensors: one file, or shards with an index."""
    folder.mkdir(parents=True)
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    names = names if shards > 1 else ["model.safetensors"]
    keys = sorted(tensors)
    held = {name: keys[n::shards] for n, name in enumerate(names)}
    for name, own in held.items():
        write_safetensors(folder / name, {key: tensors[key] for key in own}, {"format": "pt"})
    if shards > 1:
        weight_map = {key: name for name, own in held.items() for key in own}
        size = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        index = json.dumps({"metadata": size, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)
    (folder / "config.json").write_text(json.dumps({"model_type": "test", **(config or {})}))
    return folder


def lora_file(path: Path, updates: Mapping[str, Update], **carried: Tensor) -> Path:
    """A raw adapter file."""
    metadata = Metadata("sample")
    loratool.write(
        Adapter(updates, {k.replace("__", "."): t for k, t in carried.items()}, metadata), path, format="raw"
    )
    return path


def fingerprint(path: Path) -> dict[str, str]:
    """sha256 of every file below a path: the same before and after means untouched."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


PEFT_CONFIG: Mapping[str, Any] = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}


def peft_folder(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = PEFT_CONFIG) -> Path:
    """A PEFT folder of these tensors, which need not be sound."""
    path.mkdir(exist_ok=True)
    write_safetensors(path / "adapter_model.safetensors", tensors, {"format": "pt"})
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def peft_pair(module: str, prefix: str = "base_model.model.") -> dict[str, Tensor]:
    """The factors of `low()` as PEFT names them."""
    return {f"{prefix}{module}.lora_A.weight": low().down, f"{prefix}{module}.lora_B.weight": low().up}
