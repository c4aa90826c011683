"""Load the model and prompts of decode.py, and truncate the model for a dense control."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.checkpoint.read import TensorReader, resolve_checkpoint
from ee_llm.config import Config
from ee_llm.data.dataset import SPLITS, split_documents
from ee_llm.data.indexed import IndexedTokens

QUICKSTART = "To train a model, run ./scripts/quickstart.sh."


@dataclass(frozen=True)
class Model:
    """A model: its configuration, its tensors by name, and text that it was not trained on."""

    config: Config
    tensors: dict[str, Tensor]
    text: list[int]


@dataclass(frozen=True)
class Weights:
    """The number of weights that a token is multiplied by: in a layer, and in each head."""

    layer: int
    heads: dict[int, int]


def count_weights(model: Model) -> Weights:
    """Return the numbers of weights, including norms and biases."""
    config = model.config
    boundaries = (*config.exits.boundaries, config.model.num_layers)
    output = config.model.vocab_size * config.model.hidden_size

    def count(prefix: str) -> int:
        own = {n: t for n, t in model.tensors.items() if n.startswith(prefix)}
        return sum(t.numel() for n, t in own.items() if not n.endswith("output.weight"))

    return Weights(count("layers.1."), {b: output + count(f"exits.{b}.") for b in boundaries})


def open_model(checkpoint: Path) -> Model:
    """Return the model of a run directory or checkpoint, with the validation text of its run.

    Raises:
        ValueError: The checkpoint or the text does not exist, or the model has no early exit.
    """
    try:
        path = resolve_checkpoint(checkpoint)
    except ValueError as error:
        raise ValueError(f"{error} {QUICKSTART}") from error
    reader = TensorReader(path)
    config = reader.config()
    if not config.exits.boundaries:
        raise ValueError(f"{path}: the model has no early exit. {QUICKSTART}")
    tensors = {name: reader.tensor(name) for name in reader.names()}
    return Model(config, tensors, _validation_text(config, path.parent.parent))


def random_model(shape: str) -> Model:
    """Return a model of a ready-made shape, with random weights and text.

    Its exits are at 1/4 and 1/2 of its depth. The model is suited to measuring the cost and
    correctness of passes, but not how often tokens exit.

    Raises:
        ValueError: The shape does not exist.
    """
    num_layers = Config.model_validate({"model": {"shape": shape}}).model.num_layers
    exits = {"boundaries": [num_layers // 4, num_layers // 2]}
    config = Config.model_validate({"model": {"shape": shape}, "exits": exits})
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, size in tensor_shapes(config).items():
        is_norm = len(size) == 1
        noise = torch.randn(size, generator=generator)
        tensors[name] = 1.0 + 0.1 * noise if is_norm else noise * (2.0 / size[-1]) ** 0.5
    text = torch.randint(config.model.vocab_size, (1 << 16,), generator=generator)
    return Model(config, tensors, text.tolist())


def excerpts(text: list[int], count: int, length: int) -> list[tuple[int, ...]]:
    """Return `count` excerpts of `length` tokens, evenly spaced and without overlap.

    Raises:
        ValueError: The text is too short.
    """
    if count * length > len(text):
        raise ValueError(
            f"{count} excerpts of {length} tokens do not fit into the {len(text)} tokens of"
            " validation text. Use smaller batches or prompts."
        )
    starts = [index * (len(text) - length) // max(1, count - 1) for index in range(count)]
    return [tuple(text[start : start + length]) for start in starts]


def nearest_exit(config: Config, depth: int) -> int:
    """Return the boundary of the exit nearest to `depth` layers; of two, the deeper one."""
    boundaries = (*config.exits.boundaries, config.model.num_layers)
    return min(reversed(boundaries), key=lambda boundary: abs(boundary - depth))


def truncate(model: Model, depth: int) -> Model:
    """Return the dense model of the first `depth` layers and one head.

    The head is that of the nearest exit if exits consist of a norm and a projection, and the final
    head otherwise.
    """
    config, tensors = model.config, model.tensors
    last = config.model.num_layers
    assert 1 <= depth <= last, f"{depth} of {last} layers"
    exit = nearest_exit(config, depth) if config.exits.head == ("norm",) else last
    sizes = {"num_layers": depth, "tie_embeddings": False, "shape": None}
    shorter = Config.model_validate({"model": config.model.model_dump() | sizes})
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("embedding.")}
    for name, tensor in tensors.items():
        if name.startswith("layers.") and int(name.split(".")[1]) <= depth:
            kept[name] = tensor
        if name.startswith(f"exits.{exit}.norm."):
            kept[name.replace(f"exits.{exit}.", f"exits.{depth}.")] = tensor
    kept["output.weight"] = tensors[output_weight_name(config, exit)]
    return Model(shorter, kept, model.text)


def _validation_text(config: Config, run: Path) -> list[int]:
    """Return the validation tokens of a run's first data set.

    The run directory is searched first, because the quick start stores its data there. The path
    in the configuration may be relative to the directory in which training was started.
    """
    if not config.data.prefixes:
        raise ValueError(f"{run}: the model was trained without data.prefixes. {QUICKSTART}")
    prefix = Path(config.data.prefixes[0])
    in_run = run / "data" / prefix.name
    try:
        data = IndexedTokens(in_run if Path(f"{in_run}.idx").exists() else prefix)
    except ValueError as error:
        raise ValueError(f"Cannot read the text of the prompts: {error} {QUICKSTART}") from error
    part = SPLITS.index("validation")
    if config.data.split[part] <= 0:
        raise ValueError(f"data.split = {list(config.data.split)} has no validation text")
    documents = split_documents(data.num_documents, config.data.split)[part]
    tokens = data.tokens[data.bounds[documents.start] : data.bounds[documents.stop]]
    return np.asarray(tokens, dtype=np.int64).tolist()
