"""Tiny ONNX graphs of real architectures, with PEFT adapters and PEFT's own outputs.

    graphs = Graphs(folder)
    graphs.export("llama", "torchscript")            a graph as an exporter writes it
    graphs.optimised(path, "extended"), graphs.half(path), graphs.external(path), graphs.quantised(path, "qdq")
    graphs.adapter("llama")                          a PEFT adapter of it, random but visible
    graphs.reference("llama", adapter)               PEFT's unmerged outputs on `feed("llama")`
    run(path, feed("llama"))                         onnxruntime's

The dynamo exporter needs seconds for each model, so its graphs lie in fixtures/onnx; `python -m tests.onnx_models`
makes them anew. Everything is made once in a test session. torch is imported inside the functions.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tests.models import FIXTURES, trained, visible

FROZEN = FIXTURES / "onnx"
SLOW = ("unet", "t5", "llama")  # for the TorchScript exporter
TEXT: dict[str, Any] = {"vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}


@dataclass(frozen=True)
class Model:
    """How a torch model is made and traced, and what of it an adapter targets."""

    make: Callable[[], Any]
    inputs: tuple[str, ...]  # of `feed`, in the order of the forward pass
    targets: list[str]
    dynamic: bool = True  # batch and sequence are free
    frozen: Mapping[str, Any] = field(default_factory=dict)  # options of the dynamo exporter
    forward: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the forward pass


def make_llama(tied: bool = False, heads: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **TEXT,
        **EAGER,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**TEXT, **EAGER, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False))


def make_bert() -> Any:
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=48, max_position_embeddings=32, **size, **EAGER))


def make_clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(**TEXT, **EAGER, **size, max_position_embeddings=16, projection_dim=16))


def make_t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    size = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**TEXT, **size, use_cache=False))


def make_whisper() -> Any:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        **TEXT,
        **EAGER,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=8,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperModel(config).get_encoder()


def make_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        norm_num_groups=2,
        attention_head_dim=2,
    )


def make_twins() -> Any:
    """Layers of equal values: exporters keep one weight, or one node, for both."""
    import torch

    class Twins(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 6, bias=False)
            self.c, self.d = torch.nn.Conv1d(6, 6, 3, padding=1), torch.nn.Conv1d(6, 6, 3, padding=1)
            self.e, self.f = torch.nn.Embedding(48, 6), torch.nn.Embedding(48, 6)

        def forward(self, input_ids: Any) -> Any:
            hidden = self.e(input_ids) + 0.5 * self.f(input_ids).flip(-1)
            hidden = self.b(self.a(hidden).tanh())
            return self.d(self.c(hidden.transpose(1, 2)).tanh())

    return Twins()


def make_packed() -> Any:
    """A small decoder; its hand-written graph (`packed`) has q, k and v in one MatMul, as genai's builder does."""
    import torch
    from torch.nn import Linear

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = Linear(12, 16, bias=False), Linear(12, 8, bias=False)
            self.v_proj, self.o_proj = Linear(12, 8, bias=False), Linear(16, 12, bias=False)

        def forward(self, hidden: Any) -> Any:
            batch, length, _ = hidden.shape
            q, k, v = (
                proj(hidden).reshape(batch, length, -1, 8).transpose(1, 2)
                for proj in (self.q_proj, self.k_proj, self.v_proj)
            )
            weights = (q @ k.transpose(2, 3)).softmax(-1)
            return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, length, 16))

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()

    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens, self.layers = torch.nn.Embedding(48, 12), torch.nn.ModuleList([Layer(), Layer()])

    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lm_head = Body(), Linear(12, 48, bias=False)

        def forward(self, input_ids: Any) -> Any:
            hidden = self.model.embed_tokens(input_ids)
            for layer in self.model.layers:
                hidden = hidden + layer.self_attn(hidden)
            return self.lm_head(hidden)

    return Packed()


def make_genai() -> Any:
    """A Llama whose graphs onnxruntime-genai's builder wrote: heads of 16, as its rotary kernel wants."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **TEXT,
        **EAGER,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, Model] = {
    "llama": Model(make_llama, ("input_ids", "attention_mask"), ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
    "llama_tied": Model(
        lambda: make_llama(tied=True), ("input_ids", "attention_mask"), ["lm_head", "q_proj", "down_proj"]
    ),
    "gpt2": Model(make_gpt2, ("input_ids", "attention_mask"), ["c_attn", "c_fc", "c_proj", "wte"]),
    "bert": Model(make_bert, ("input_ids", "attention_mask"), ["query", "value", "dense", "word_embeddings"]),
    "clip": Model(make_clip, ("input_ids",), ["q_proj", "v_proj", "fc1", "fc2", "token_embedding"]),
    "t5": Model(
        make_t5, ("input_ids", "attention_mask", "decoder_input_ids"), ["q", "v", "o", "wi", "wo"], dynamic=False
    ),
    "whisper": Model(make_whisper, ("input_features",), ["q_proj", "v_proj", "fc1", "fc2"], dynamic=False),
    "unet": Model(
        make_unet,
        ("sample", "timestep", "encoder_hidden_states"),
        ["to_q", "to_v", "to_out.0", "net.0.proj", "conv1", "conv_in", "proj_in", "time_emb_proj"],
        dynamic=False,
    ),
    "twins": Model(make_twins, ("input_ids",), ["a", "c", "e"]),
    "packed": Model(make_packed, ("input_ids",), ["q_proj", "v_proj", "o_proj"]),
}


BUILT: dict[str, Model] = {  # no exporter's: graphs of onnxruntime-genai's builder
    "genai": Model(make_genai, ("input_ids", "attention_mask"), ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
}


def about(name: str) -> Model:
    """What a model of that name is."""
    return (MODELS | BUILT)[name.removesuffix("_static")]


def make(name: str) -> Any:
    """The torch model, the same values each time, every parameter visible in the output."""
    import torch

    if name == "bert_static":
        name = "bert"
    torch.manual_seed(zlib.crc32(name.encode()))
    model = about(name).make().eval()
    for parameter, value in model.named_parameters():
        value.data.copy_(visible(parameter, value))
    if name == "twins":
        for one, other in (("b", "a"), ("d", "c"), ("f", "e")):
            getattr(model, one).load_state_dict(getattr(model, other).state_dict())
    return model


def feed(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a graph by name."""
    random = np.random.default_rng(seed)
    ids = random.integers(3, 48, (2, 7))
    known = {
        "input_ids": ids,
        "attention_mask": np.ones((2, 7), np.int64),
        "decoder_input_ids": ids[:, :4],
        "input_features": random.standard_normal((2, 8, 16), np.float32),
        "sample": random.standard_normal((1, 4, 8, 8), np.float32),
        "timestep": np.array([5]),
        "encoder_hidden_states": random.standard_normal((1, 5, 12), np.float32),
    }
    return {key: known[key] for key in about(name).inputs}


def past(layers: int = 2) -> dict[str, np.ndarray]:
    """What a graph of onnxruntime-genai's builder is given beside its other inputs: nothing yet."""
    none = np.zeros((2, 1, 0, 16), np.float32)
    return {f"past_key_values.{n}.{word}": none for n in range(layers) for word in ("key", "value")}


def forward(model: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a torch model, in the order of an exported graph."""
    import torch

    with torch.no_grad():
        found = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return [value.numpy() for value in tensors(found)]


def tensors(output: Any) -> tuple[Any, ...]:
    """The tensors among what a forward pass gives."""
    import torch

    values = [output] if isinstance(output, torch.Tensor) else list(dict(output).values())
    return tuple(value for value in values if isinstance(value, torch.Tensor))


def run(path: Path, inputs: Mapping[str, np.ndarray], level: str = "basic", **options: Any) -> list[np.ndarray]:
    """onnxruntime's outputs."""
    found: list[np.ndarray] = session(path, level).run(None, dict(inputs), **options)
    return found


def session(path: Path, level: str = "basic") -> Any:
    """A session on the processor that says nothing."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS(level)
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


ALIVE: list[Any] = []  # options do not hold their adapters: one that is gone is no adapter, without a word


def active(*paths: Path) -> Any:
    """RunOptions with adapter files switched on."""
    import onnxruntime as ort

    options = ort.RunOptions()
    for path in paths:
        adapter = ort.LoraAdapter()
        adapter.Load(str(path))
        options.add_active_adapter(adapter)
        ALIVE.append(adapter)
    return options


def LEVELS(level: str) -> Any:
    import onnxruntime as ort

    levels = ort.GraphOptimizationLevel
    return getattr(
        levels, {"none": "ORT_DISABLE_ALL", "all": "ORT_ENABLE_ALL"}.get(level, f"ORT_ENABLE_{level.upper()}")
    )


# -- exporters -----------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Any:
    """Exporters speak of deprecations and of torchvision."""
    import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def export(name: str, exporter: str, path: Path, model: Any = None, **options: Any) -> Path:
    """Writes the graph of a model as one file; exporter "dynamo" or "torchscript"."""
    import torch

    model = make(name) if model is None else model
    given = {key: torch.from_numpy(value) for key, value in feed(name).items()}
    free = about(name).dynamic and not name.endswith("_static")
    plain = type(model).forward  # in its place one of tensors only: exporters fill in the defaults of all others
    model.forward = lambda *values: tensors(plain(model, **dict(zip(given, values, strict=True))))
    common: dict[str, Any] = {"args": tuple(given.values()), "f": path, "input_names": list(given), **options}
    with quiet(), torch.no_grad():
        if exporter == "torchscript":
            axes = {key: {0: "batch", 1: "sequence"} for key in given} if free else None
            torch.onnx.export(model, dynamo=False, opset_version=18, dynamic_axes=axes, **common)
        else:
            shapes = [dict.fromkeys(range(value.ndim), torch.export.Dim.DYNAMIC) for value in given.values()]
            torch.onnx.export(
                model,
                dynamo=True,
                dynamic_shapes=(tuple(shapes),) if free else None,
                external_data=False,
                verbose=False,
                **common,
            )
    return path


class Graphs:
    """Graphs, adapters and references below one folder, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cache  # noqa: B019
    def export(self, name: str, exporter: str = "torchscript", **options: Any) -> Path:
        """A graph as the exporter writes it; those that take seconds are frozen in fixtures."""
        path = self.folder / f"{'-'.join(map(str, (name, exporter, *options.values())))}.onnx"
        if name == "packed":
            return packed(path)
        held = FROZEN / (f"{name}.onnx.gz" if exporter == "dynamo" else f"{name}-{exporter}.onnx.gz")
        if held.exists() and not options:
            path.write_bytes(gzip.decompress(held.read_bytes()))
            return path
        return export(name, exporter, path, **options)

    def adapter(self, name: str, targets: tuple[str, ...] = (), seed: int = 0, **config: Any) -> Path:
        """A PEFT folder with random factors."""
        import torch
        from peft import LoraConfig, get_peft_model

        chosen = {"r": 3, "lora_alpha": 6, "target_modules": list(targets) or about(name).targets, **config}
        word = zlib.crc32(repr((name, seed, sorted(map(str, chosen.items())))).encode())
        folder = self.folder / f"{name}-lora-{word:08x}"
        if folder.exists():
            return folder
        model = get_peft_model(make(name), LoraConfig(**chosen))
        torch.manual_seed(word)
        for parameter, value in model.named_parameters():
            if value.requires_grad:
                value.data.copy_(trained(parameter, value))
        with quiet():
            model.save_pretrained(folder)
        return folder

    @cache  # noqa: B019
    def variant(self, name: str, how: str, exporter: str = "torchscript") -> Path:
        """An export changed afterwards: basic, extended, all, fused, half, bfloat16, external, qdq, qoperator, ..."""
        source = self.export(name, exporter)
        out = self.folder / f"{source.stem}-{how}.onnx"
        if how in ("basic", "extended", "all"):
            return optimised(source, how, out)
        if how in ("qdq", "qoperator", "dynamic", "nbits"):
            return quantised(source, how, out, feed(name))
        if how == "fused":
            return fused(source, name, out)
        if how == "bfloat16":
            return export(name, exporter, out, make(name).bfloat16())
        return {"half": half, "external": external}[how](source, out)

    def reference(
        self, name: str, *adapters: Path, strength: float | tuple[float, ...] = 1.0, model: Any = None
    ) -> list[np.ndarray]:
        """PEFT's unmerged outputs of several adapters at once, each as strong as said; without any the base model's."""
        from peft import PeftModel

        model = make(name) if model is None else model
        strengths = strength if isinstance(strength, tuple) else (strength,) * len(adapters)
        for number, folder in enumerate(adapters):
            if number == 0:
                model = PeftModel.from_pretrained(model, folder, adapter_name="0")
            else:
                model.load_adapter(folder, adapter_name=str(number))
        if adapters:
            model.base_model.set_adapter([str(number) for number in range(len(adapters))])
            for layer in (m for m in model.modules() if hasattr(m, "set_scale")):
                for number, by in enumerate(strengths):
                    if str(number) in layer.scaling:
                        layer.scaling[str(number)] *= by
        return forward(model.eval(), feed(name))


# -- variants ------------------------------------------------------------------------------------------------


def saved(proto: Any, path: Path) -> Path:
    import onnx

    onnx.save(proto, path)
    return path


def optimised(source: Path, level: str, out: Path) -> Path:
    """What onnxruntime saves after optimising: level basic, extended or all."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = LEVELS(level), 4
    options.optimized_model_filepath = str(out)
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return out


def fused(source: Path, kind: str, out: Path) -> Path:
    """What onnxruntime's transformers optimizer makes: fused attention, no paths. kind bert, gpt2, clip or unet."""
    from onnxruntime.transformers import optimizer

    with quiet(), redirect_stderr(io.StringIO()):
        found = optimizer.optimize_model(str(source), model_type=kind, num_heads=2, hidden_size=16, opt_level=0)
        found.save_model_to_file(str(out))
    return out


def half(source: Path, out: Path) -> Path:
    """The graph in float16, inputs and outputs in float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return saved(convert_float_to_float16(onnx.load(source), keep_io_types=True), out)


def external(source: Path, out: Path) -> Path:
    """The graph with its weights in a file beside it."""
    import onnx

    data = f"{out.name}_data"
    onnx.save(onnx.load(source), out, save_as_external_data=True, location=data, size_threshold=256)
    return out


def quantised(source: Path, how: str, out: Path, inputs: Mapping[str, np.ndarray]) -> Path:
    """int8 with scales found on ``inputs`` ("qdq", "qoperator") or when run ("dynamic"), or int4 blocks ("nbits")."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    class Once(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [dict(inputs)]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    weights = {"per_channel": True, "weight_type": quantization.QuantType.QInt8}
    with quiet():
        if how in ("qdq", "qoperator"):
            form = {"qdq": quantization.QuantFormat.QDQ, "qoperator": quantization.QuantFormat.QOperator}[how]
            quantization.quantize_static(source, out, Once(), quant_format=form, **weights)
        elif how == "dynamic":
            quantization.quantize_dynamic(source, out, **weights)
        else:
            quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=16, is_symmetric=True)
            quantizer.process()
            saved(quantizer.model.model, out)
    return out


def packed(out: Path) -> Path:
    """The graph of the model "packed", written as onnxruntime-genai's builder names and fuses it."""
    import onnx
    from onnx import helper

    state = {name: value.detach().numpy() for name, value in make("packed").named_parameters()}
    nodes: list[Any] = []
    weights: dict[str, np.ndarray] = {"model.embed_tokens.weight": state["model.embed_tokens.weight"]}
    weights |= {"shape": np.array([0, 0, -1, 8]), "flat": np.array([0, 0, 16]), "parts": np.array([16, 8, 8])}

    def node(op: str, name: str, *given: str, count: int = 1, **attributes: Any) -> Any:
        made = [f"{name}/output_{n}" for n in range(count)]
        nodes.append(helper.make_node(op, list(given), made, name, **attributes))
        return made if count > 1 else made[0]

    def matmul(path: str, given: str, *sources: str) -> Any:
        name = path.strip("/").replace("/", ".") + ".MatMul.weight"
        weights[name] = np.concatenate([state[source] for source in sources]).T.copy()
        return node("MatMul", f"{path}/MatMul", given, name)

    hidden = node("Gather", "/model/embed_tokens/Gather", "model.embed_tokens.weight", "input_ids")
    for n in range(2):
        path, source = f"/model/layers.{n}/attn", f"model.layers.{n}.self_attn"
        qkv = matmul(f"{path}/qkv_proj", hidden, *(f"{source}.{p}_proj.weight" for p in "qkv"))
        heads = [
            node("Reshape", f"{path}/Reshape_{p}", part, "shape")
            for p, part in zip("qkv", node("Split", f"{path}/Split", qkv, "parts", count=3, axis=-1), strict=True)
        ]
        q, v = (node("Transpose", f"{path}/Transpose_{i}", heads[i], perm=[0, 2, 1, 3]) for i in (0, 2))
        k = node("Transpose", f"{path}/Transpose_1", heads[1], perm=[0, 2, 3, 1])
        weighed = node("Softmax", f"{path}/Softmax", node("MatMul", f"{path}/scores", q, k), axis=-1)
        mixed = node("Transpose", f"{path}/back", node("MatMul", f"{path}/mix", weighed, v), perm=[0, 2, 1, 3])
        given = node("Reshape", f"{path}/flat", mixed, "flat")
        hidden = node("Add", f"{path}/Add", hidden, matmul(f"{path}/o_proj", given, f"{source}.o_proj.weight"))
    weights["lm_head.MatMul.weight"] = state["lm_head.weight"].T.copy()
    nodes.append(helper.make_node("MatMul", [hidden, "lm_head.MatMul.weight"], ["logits"], "/lm_head/MatMul"))
    ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch_size", "sequence_length"])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch_size", "sequence_length", 48])
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "main_graph", [ids], [logits], stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], producer_name="onnxruntime-genai")
    proto.ir_version = 10
    return saved(proto, out)


def strip(path: Path, out: Path) -> Path:
    """The same graph without the stack traces, which are most of its bytes and name the exporter's folders."""
    import onnx

    proto = onnx.load(path)
    for node in proto.graph.node:
        kept = [entry for entry in node.metadata_props if not entry.key.endswith("stack_trace")]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(proto, out)
    return out


def freeze() -> None:
    """Makes fixtures/onnx anew; the builder's graphs need onnxruntime-genai (0.18), which the tests do without."""
    FROZEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in (*MODELS, "bert_static"):
            if name != "packed":
                path = export(name, "dynamo", Path(folder, f"{name}.onnx"))
                frozen(name, strip(path, path))
        for name in SLOW:
            frozen(f"{name}-torchscript", export(name, "torchscript", Path(folder, f"{name}-ts.onnx")))
        if find_spec("onnxruntime_genai"):
            for precision in ("fp32", "int4"):
                frozen(f"genai-{precision}", built(precision, Path(folder)))


def frozen(name: str, path: Path) -> None:
    (FROZEN / f"{name}.onnx.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def built(precision: str, folder: Path) -> Path:
    """What onnxruntime-genai's builder makes of the model "genai", as one file."""
    import onnx
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    source, out = folder / "genai", folder / f"genai-{precision}"
    make("genai").save_pretrained(source)
    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(48)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2").save_pretrained(source)
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    options = ["-m", str(source), "-o", str(out), "-p", precision, "-e", "cpu", "-c", str(folder / "cache")]
    subprocess.run([*builder, *options], check=True)
    return saved(onnx.load(out / "model.onnx"), folder / f"genai-{precision}.onnx")


if __name__ == "__main__":
    freeze()
