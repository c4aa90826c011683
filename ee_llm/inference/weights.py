"""The tensors that an inference model needs: their names and shapes, and a checked way to get them.

Legend of shapes: v vocabulary, h hidden, f feed-forward, d head dimension.
"""

from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import Tensor

from ee_llm.config import Config, ModelConfig

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(config: Config) -> Shapes:
    """Return the name and shape of every tensor of the model, exits included.

    The names are those of checkpoints, the same for every parallel layout.
    """
    model, exits = config.model, config.exits
    vocabulary = (model.vocab_size, model.hidden_size)
    shapes: Shapes = {"embedding.word.weight": vocabulary}
    if model.position == "learned":
        shapes["embedding.position.weight"] = (model.max_seq_length, model.hidden_size)
    for layer in range(1, model.num_layers + 1):
        shapes |= _layer_shapes(model, f"layers.{layer}")
    for boundary in exits.boundaries:
        name = f"exits.{boundary}"
        if "block" in exits.head:
            shapes |= _layer_shapes(model, f"{name}.block")
        if "mlp" in exits.head:
            shapes |= _norm_shapes(model, f"{name}.mlp_norm") | _mlp_shapes(model, f"{name}.mlp")
        if "norm" in exits.head:
            shapes |= _norm_shapes(model, f"{name}.norm")
        if exits.output == "own":
            shapes[f"{name}.output.weight"] = vocabulary
    shapes |= _norm_shapes(model, f"exits.{model.num_layers}.norm")
    if not model.tie_embeddings:
        shapes["output.weight"] = vocabulary
    return shapes


def take_tensors(
    config: Config,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Return the model's tensors by name, in `dtype` on `device`.

    Raises ValueError naming what is missing, what is there and unknown, or which shape is wrong.
    """
    shapes = tensor_shapes(config)
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    if missing or unknown:
        raise ValueError(
            "the weights do not fit the configuration: "
            + "; ".join(filter(None, [_listed("missing", missing), _listed("unknown", unknown)]))
            + _hint(missing, unknown)
            + ". Use the configuration that the weights were saved with."
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"tensor {name} has shape {tuple(tensors[name].shape)}, but the configuration asks"
                f" for {shape}. Use the configuration that the weights were saved with."
            )
    return {name: tensors[name].to(device=device, dtype=dtype) for name in shapes}


def _layer_shapes(model: ModelConfig, name: str) -> Shapes:
    q_per_group = model.num_heads // model.num_kv_heads
    qkv = (q_per_group + 2) * model.num_kv_heads * model.head_dim
    return (
        _norm_shapes(model, f"{name}.input_layernorm")
        | _linear_shapes(model, f"{name}.self_attention.linear_qkv", qkv, model.hidden_size)
        | _linear_shapes(
            model,
            f"{name}.self_attention.linear_proj",
            model.hidden_size,
            model.num_heads * model.head_dim,
        )
        | _norm_shapes(model, f"{name}.pre_mlp_layernorm")
        | _mlp_shapes(model, f"{name}.mlp")
    )


def _mlp_shapes(model: ModelConfig, name: str) -> Shapes:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    fc1 = 2 * ffn if model.family == "llama" else ffn  # [gate; up] of SwiGLU
    return _linear_shapes(model, f"{name}.linear_fc1", fc1, hidden) | _linear_shapes(
        model, f"{name}.linear_fc2", hidden, ffn
    )


def _norm_shapes(model: ModelConfig, name: str) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (model.hidden_size,)}
    if model.family == "gpt":
        shapes[f"{name}.bias"] = (model.hidden_size,)
    return shapes


def _linear_shapes(model: ModelConfig, name: str, outputs: int, inputs: int) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (outputs, inputs)}
    if model.family == "gpt":
        shapes[f"{name}.bias"] = (outputs,)
    return shapes


def _listed(word: str, names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{word} {shown}" + (f" and {len(names) - 3} more" if names[3:] else "") if names else ""


def _hint(missing: list[str], unknown: list[str]) -> str:
    near = get_close_matches(unknown[0], missing, n=1) if unknown else []
    return f" (is {unknown[0]} meant for {near[0]}?)" if near else ""
