"""Names and shapes of a model's tensors, and checked access to them.

Legend of shapes: v vocabulary, h hidden, f feed-forward, d head dimension.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

import torch
from torch import Tensor

from ee_llm.architecture.gates import PREFIX, check_gates
from ee_llm.config import Config, ModelConfig
from ee_llm.errors import UserError

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(config: Config) -> Shapes:
    """Return the name and unsharded shape of every tensor of the model, exits included.

    Checkpoints use these names, whatever the parallel layout.
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
        if "translator" in exits.head:
            shapes[f"{name}.translator.weight"] = (model.hidden_size, model.hidden_size)
            shapes[f"{name}.translator.bias"] = (model.hidden_size,)
        if "norm" in exits.head:
            shapes |= _norm_shapes(model, f"{name}.norm")
        if exits.output == "own":
            shapes[f"{name}.output.weight"] = vocabulary
    shapes |= _norm_shapes(model, f"exits.{model.num_layers}.norm")
    if not model.tie_embeddings:
        shapes["output.weight"] = vocabulary
    return shapes


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each loaded on access."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without loading it."""


class Converted(LazyTensors):
    """Tensors in another dtype or on another device, each converted on access.

    Gates are not rounded below float32.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._tensors, self._dtype, self._device = tensors, dtype, device

    def __getitem__(self, name: str) -> Tensor:
        dtype = self._dtype
        if name.startswith(PREFIX):
            dtype = torch.promote_types(dtype, torch.float32)
        return self._tensors[name].to(device=self._device, dtype=dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without converting it."""
        return _shape(self._tensors, name)


def take_tensors(
    config: Config,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Mapping[str, Tensor]:
    """Return the model's tensors by name, each converted to `dtype` and `device` on access.

    The tensors of gates may be among them.

    Raises UserError naming the tensors that are missing or unknown, or the one with a wrong shape.
    """
    shapes = tensor_shapes(config)
    missing = [name for name in shapes if name not in tensors]
    gates = [name for name in tensors if name.startswith(PREFIX)]
    unknown = [name for name in tensors if name not in shapes and name not in gates]
    if missing or unknown:
        raise UserError(
            "the weights do not fit the configuration: "
            + "; ".join(filter(None, [_listed("missing", missing), _listed("unknown", unknown)]))
            + _hint(missing, unknown)
            + ". Use the configuration with which the weights were saved."
        )
    for name, shape in shapes.items():
        found = _shape(tensors, name)
        if found != shape:
            raise UserError(
                f"tensor {name} has shape {found}, but the configuration requires {shape}. Use the"
                " configuration with which the weights were saved."
            )
    check_gates(config, {name: _shape(tensors, name) for name in gates})
    return Converted(tensors, dtype, device)


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if isinstance(tensors, LazyTensors):
        return tensors.shape(name)
    return tuple(tensors[name].shape)


def _layer_shapes(model: ModelConfig, name: str) -> Shapes:
    q_per_group = model.num_heads // model.num_kv_heads
    qkv = (q_per_group + 2) * model.num_kv_heads * model.head_dim
    attention = f"{name}.self_attention"
    shapes = _norm_shapes(model, f"{name}.input_layernorm")
    shapes[f"{attention}.linear_qkv.weight"] = (qkv, model.hidden_size)
    if model.qkv_bias:
        shapes[f"{attention}.linear_qkv.bias"] = (qkv,)
    if model.qk_norm:
        shapes |= {f"{attention}.{x}_layernorm.weight": (model.head_dim,) for x in "qk"}
    return (
        shapes
        | _linear_shapes(
            model,
            f"{attention}.linear_proj",
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
