"""Writes a model as a checkpoint of Megatron-LM or EE-LLM, with one file per rank.

The names and layouts come from their documentation, not from the code under test.
"""

import argparse
import collections
import enum
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ee_llm.config import Config
from tests.unit.inference.models import split_qkv

PADDED = 16
"""The number of padding rows of embeddings."""


def arguments_of(config: Config, tensor: int, pipeline: int, **changes: Any) -> argparse.Namespace:
    """Return the arguments of a run that trained this model. A change to `...` removes one."""
    model, exits = config.model, config.exits
    is_llama = model.family == "llama"
    is_pre = exits.placement == "pre"
    arguments = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "kv_channels": model.head_dim,
        "group_query_attention": model.num_kv_heads < model.num_heads,
        "num_query_groups": model.num_kv_heads if model.num_kv_heads < model.num_heads else 1,
        "max_position_embeddings": model.max_seq_length,
        "position_embedding_type": "rope" if model.position == "rope" else "learned_absolute",
        "add_position_embedding": True,
        "rotary_percent": 1.0,
        "rotary_seq_len_interpolation_factor": None,
        "normalization": "RMSNorm" if is_llama else "LayerNorm",
        "norm_epsilon": model.norm_eps,
        "swiglu": is_llama,
        "add_bias_linear": not is_llama,
        "bias_gelu_fusion": model.gelu == "tanh",
        "openai_gelu": False,
        "onnx_safe": None,
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "padded_vocab_size": model.vocab_size + PADDED,
        "vocab_size": model.vocab_size,
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": "/somewhere/tokenizer.model",
        "init_method_std": 0.01,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": None,
        "num_experts": None,
        "params_dtype": torch.float32,
        "hidden_dropout": 0.1,
        "model_type": None,
        "train_iters": 100,
        "data_path": ["/somewhere/corpus"],
        "exit_layer_nums": [b + is_pre for b in exits.boundaries],
        "exit_layer_weight": list(exits.weights),
        "exit_layer_temperature": list(exits.temperatures),
        "pre_exit": is_pre,
        "use_exit_norm": "norm" in exits.head,
        "use_exit_mlp": "mlp" in exits.head,
        "use_exit_block": "block" in exits.head,
        "untie_exit_output_weights": exits.output == "own",
    } | changes
    return argparse.Namespace(**{k: v for k, v in arguments.items() if v is not ...})


class Writer:
    """Writes a model to the files of `tensor` x `pipeline` ranks.

    version: the version of the format. Before 2, queries, keys and values have other orders.
    names: "ee-llm", "older" (before norms were renamed), or "core" (megatron-core's model).
    """

    def __init__(
        self,
        config: Config,
        tensors: dict[str, Tensor],
        tensor: int = 1,
        pipeline: int = 1,
        virtual: int = 1,
        version: float = 3.0,
        names: str = "ee-llm",
        **changes: Any,
    ) -> None:
        self.config, self.ours = config, tensors
        self.tensor, self.pipeline, self.virtual = tensor, pipeline, virtual
        self.version, self.names = version, names
        self.arguments = arguments_of(config, tensor, pipeline, **changes)
        self.is_pre = config.exits.placement == "pre"
        self.order = list(config.exits.boundaries)
        """The order of the exits in the arguments."""

    def write(self, path: Path) -> Path:
        """Write the files of a run, and return its directory."""
        for t in range(self.tensor):
            for p in range(self.pipeline):
                name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if self.pipeline > 1 else "")
                directory = path / "iter_0000012" / name
                directory.mkdir(parents=True)
                save(self.content(t, p), directory / "model_optim_rng.pt")
        (path / "latest_checkpointed_iteration.txt").write_text("12")
        return path

    def content(self, t: int, p: int) -> dict[str, Any]:
        """Return the content of a rank's file."""
        content: dict[str, Any] = {
            "args": self.arguments,
            "checkpoint_version": self.version,
            "iteration": 12,
        }
        for v in range(self.virtual):
            name = f"model{v}" if self.virtual > 1 else "model"
            content[name] = self.stage(t, v * self.pipeline + p)
        content["optimizer"] = {"state": collections.defaultdict(dict, {0: {"m": torch.ones(3)}})}
        content["rng_state"] = [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": numpy.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
            }
        ]
        return content

    def stage(self, t: int, stage: int) -> dict[str, Any]:
        """Return the state dictionary of tensor rank t of a stage."""
        num_stages = self.pipeline * self.virtual
        num_layers = self.config.model.num_layers // num_stages
        first = stage * num_layers
        layers = collections.OrderedDict()
        outputs = collections.OrderedDict()
        has_copy = stage == num_stages - 1
        for i in range(num_layers):
            layers |= self.layer(t, f"layers.{first + i + 1}", f"layers.{i}")
        for boundary in self.order:
            number = boundary + self.is_pre
            if first < number <= first + num_layers:
                layers |= self.exit(t, f"exits.{boundary}", f"layers.{number - 1 - first}")
                if self.config.exits.output == "own":
                    weight = self.padded(t, f"exits.{boundary}.output.weight")
                    outputs[f"{len(outputs)}.weight"] = weight
                has_copy = True
        language: dict[str, Any] = {}
        if stage == 0:
            words = {"weight": self.padded(t, "embedding.word.weight")}
            language["embedding"] = {"word_embeddings": words}
            if self.config.model.position == "learned":
                positions = {"weight": self.ours["embedding.position.weight"]}
                language["embedding"]["position_embeddings"] = positions
        if outputs:
            language["exit_output_layer"] = outputs
        if stage == num_stages - 1:
            final = f"exits.{self.config.model.num_layers}.norm"
            layers |= self.norm(final, "final_layernorm")
            if not self.config.model.tie_embeddings:
                language["output_layer"] = {"weight": self.padded(t, "output.weight")}
        language["transformer" if self.names == "older" else "encoder"] = layers
        model: dict[str, Any] = {"language_model": language}
        if has_copy and stage > 0 and self.config.model.tie_embeddings:
            copy = self.padded(t, "embedding.word.weight").clone()
            model["word_embeddings_for_head"] = {"weight": copy}
        return self.flat(model) if self.names == "core" else model

    def layer(self, t: int, ours: str, theirs: str) -> dict[str, Tensor]:
        core = self.names == "core"
        old = "attention" if self.names == "older" else "self_attention"
        # With an MLP in the exit, the layer's own MLP is called the trunk.
        trunk = ""
        boundary = int(ours.rpartition(".")[2]) if ours.startswith("layers") else -1
        if "mlp" in self.config.exits.head and boundary in self.config.exits.boundaries:
            trunk = "trunk."
        qkv = f"{old}.linear_qkv" if core else f"{old}.query_key_value"
        fc1 = "linear_fc1" if core else "dense_h_to_4h"
        found = self.norm(f"{ours}.input_layernorm", f"{theirs}.input_layernorm")
        for kind in ("weight", "bias"):
            if (name := f"{ours}.self_attention.linear_qkv.{kind}") in self.ours:
                found[f"{theirs}.{qkv}.{kind}"] = self.qkv(t, self.ours[name])
        dense = f"{theirs}.{old}." + ("linear_proj" if core else "dense")
        found |= self.row(t, f"{ours}.self_attention.linear_proj", dense)
        after = "pre_mlp_layernorm" if core else "post_attention_layernorm"
        found |= self.norm(f"{ours}.pre_mlp_layernorm", f"{theirs}.{after}")
        for x in "qk":
            if (name := f"{ours}.self_attention.{x}_layernorm.weight") in self.ours:
                found[f"{theirs}.{old}.{x}_layernorm.weight"] = self.ours[name]
        return found | self.mlp(t, f"{ours}.mlp", f"{theirs}.mlp.{trunk}", fc1)

    def mlp(self, t: int, ours: str, theirs: str, fc1: str) -> dict[str, Tensor]:
        found = {}
        for kind in ("weight", "bias"):
            if (tensor := self.ours.get(f"{ours}.linear_fc1.{kind}")) is not None:
                parts = tensor.chunk(2) if self.config.model.family == "llama" else [tensor]
                found[f"{theirs}{fc1}.{kind}"] = torch.cat([self.share(t, x) for x in parts])
        fc2 = "linear_fc2" if self.names == "core" else "dense_4h_to_h"
        return found | self.row(t, f"{ours}.linear_fc2", f"{theirs}{fc2}")

    def exit(self, t: int, ours: str, theirs: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if "norm" in self.config.exits.head:
            found |= self.norm(f"{ours}.norm", f"{theirs}.exit_norm")
        if "mlp" in self.config.exits.head:
            found |= self.mlp(t, f"{ours}.mlp", f"{theirs}.mlp.branch.", "dense_h_to_4h")
        if "block" in self.config.exits.head:
            found |= self.layer(t, f"{ours}.block", f"{theirs}.exit_block")
        return found

    def norm(self, ours: str, theirs: str) -> dict[str, Tensor]:
        if self.names == "ee-llm":
            theirs = theirs.replace("layernorm", "norm")
        if self.names == "core":  # as Transformer Engine fuses it with what comes next
            theirs = theirs.replace("input_layernorm", "self_attention.linear_qkv.layer_norm")
            theirs = theirs.replace("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm")
        between = "_" if theirs.endswith("layer_norm") else "."
        kinds = [kind for kind in ("weight", "bias") if f"{ours}.{kind}" in self.ours]
        return {f"{theirs}{between}{kind}": self.ours[f"{ours}.{kind}"] for kind in kinds}

    def row(self, t: int, ours: str, theirs: str) -> dict[str, Tensor]:
        found = {f"{theirs}.weight": self.share(t, self.ours[f"{ours}.weight"], dim=1)}
        if f"{ours}.bias" in self.ours:
            found[f"{theirs}.bias"] = self.ours[f"{ours}.bias"]
        return found

    def qkv(self, t: int, tensor: Tensor) -> Tensor:
        model = self.config.model
        q, k, v = split_qkv(self.config, tensor)
        groups = model.num_kv_heads // self.tensor
        heads = [x.view(model.num_kv_heads, -1, model.head_dim, *x.shape[1:]) for x in (q, k, v)]
        own = [x[t * groups : (t + 1) * groups] for x in heads]  # [group, head, width, h]
        if self.version >= 2:
            return torch.cat(own, dim=1).flatten(0, 2)
        stacked = torch.stack([x.flatten(0, 1) for x in own])  # [3, head, width, h]
        return (stacked if self.version == 0 else stacked.movedim(0, 2)).flatten(0, 2)

    def padded(self, t: int, name: str) -> Tensor:
        tensor = self.ours[name]
        return self.share(t, torch.cat([tensor, tensor.new_full((PADDED, tensor.shape[1]), 7.0)]))

    def share(self, t: int, tensor: Tensor, dim: int = 0) -> Tensor:
        return tensor.chunk(self.tensor, dim)[t].clone()

    def flat(self, model: dict[str, Any]) -> dict[str, Any]:
        language = model["language_model"]
        found = {f"decoder.{key}": tensor for key, tensor in language["encoder"].items()}
        for kind, table in language.get("embedding", {}).items():
            found[f"embedding.{kind}.weight"] = table["weight"]
        output = language.get("output_layer", model.get("word_embeddings_for_head"))
        if output:
            found["output_layer.weight"] = output["weight"]
        found["output_layer._extra_state"] = None
        return found


def save(content: dict[str, Any], path: Path) -> None:
    """Save with torch, with an enumeration of Megatron-LM in the arguments."""
    module = types.ModuleType("megatron.core.enums")
    module.ModelType = enum.Enum("ModelType", ["encoder_or_decoder"], module=module.__name__)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        if isinstance(content.get("args"), argparse.Namespace):
            content["args"].model_type = module.ModelType.encoder_or_decoder
        torch.save(content, path)
    finally:
        if content.get("args") is not None:
            content["args"].model_type = None
        if before is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = before
