"""Tiny training runs: data, configuration, injected faults, and readers of their results."""

import json
import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from ee_llm.config import Config, load_config
from ee_llm.data.indexed import IndexedWriter
from ee_llm.launch.logs import configure_logging
from ee_llm.training.parallel import ParallelModel
from ee_llm.training.trainer import TrainingInterrupted, TrainingStopped, train
from tests.distributed.harness import run_ranks

EOS = 256  # of the byte tokenizer
SENTENCE = "the quick brown fox jumps over a lazy dog and then it runs away from him"
WORDS = SENTENCE.split(" ")


def text(num_documents: int, seed: int = 0) -> list[str]:
    """Return sentences of few words, whose distribution a model learns quickly."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(5, 60))) + "." for _ in range(num_documents)
    ]


def write_random(output: Path, config: Config) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a checkpoint of random tensors; return its path and the tensors."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in tensor_shapes(config).items()
    }
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    return write_checkpoint(output, config, specs, tensors.__getitem__), tensors


def write_corpus(prefix: Path, num_documents: int = 60, extra: Sequence[int] = ()) -> str:
    """Write documents of the byte tokenizer, and `extra`, a document of any tokens."""
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for document in text(num_documents):
            writer.add([*document.encode(), EOS])
        if extra:
            writer.add(list(extra))
        writer.commit()
    return str(prefix)


def make_config(output: Path | str, prefix: str, **overrides: Any) -> Config:
    options: dict[str, Any] = {
        "output": str(output),
        "model.num_layers": 4,
        "model.hidden_size": 16,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.ffn_hidden_size": 24,
        "model.vocab_size": 258,
        "model.max_seq_length": 16,
        "model.init_std": 0.2,
        "exits.boundaries": (1, 2),
        "exits.weights": (0.3, 0.7),
        "exits.output": "tied",
        "data.prefixes": (prefix,),
        "data.split": (0.9, 0.1, 0.0),
        "optimizer.lr": 1e-2,
        "optimizer.warmup_steps": 2,
        "optimizer.decay_steps": 30,
        "training.steps": 5,
        "training.micro_batch_size": 1,
        "training.global_batch_size": 4,
        "training.dtype": "float32",
        "training.eval_interval": 0,
        "checkpoint.interval": 0,
        "checkpoint.keep_last": 0,
        "logging.interval": 1,
        "parallel.timeout_s": 30.0,
    }
    return load_config(None, options | overrides)


def layout(tensor: int, pipeline: int, sequence: bool = False) -> dict[str, Any]:
    return {
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "parallel.sequence": sequence,
    }


Fault = Callable[[ParallelModel, int], None]


def train_here(config: Config, fault: Fault | None = None) -> str:
    """Train as one rank and return the checkpoint's path, or the error that ended training.

    `fault(model, step)` is called after the gradients of every step (from 1).
    """
    configure_logging()
    if fault is not None:
        inject(fault)
    try:
        return str(train(config))
    except (TrainingStopped, TrainingInterrupted, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def inject(fault: Fault) -> None:
    """Call `fault` after the gradients of every step, for the rest of this process."""
    original = ParallelModel.forward_backward

    def forward_backward(
        self: ParallelModel, microbatches: Sequence[Any], step: int
    ) -> dict[int, float]:
        losses = original(self, microbatches, step)
        fault(self, step + 1)
        return losses

    ParallelModel.forward_backward = forward_backward  # type: ignore[method-assign]


def train_ranks(world_size: int, config: Config, fault: Fault | None = None) -> list[str]:
    return run_ranks(world_size, train_here, config, fault, timeout_s=120)


def log_of(output: Path | str) -> list[dict[str, Any]]:
    lines = (Path(output) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def training_log(output: Path | str) -> dict[int, dict[str, Any]]:
    """Return the reports of training steps, by step, without machine-dependent metrics."""
    machine_dependent = ("time", "tokens-per-second", "iteration-time", "peak-memory-gib")
    return {
        line["step"]: {name: value for name, value in line.items() if name not in machine_dependent}
        for line in log_of(output)
        if "learning-rate" in line and "event" not in line
    }


def losses_of(
    output: Path | str, steps: Collection[int] | None = None
) -> dict[tuple[int, str], float]:
    """Return the losses of every exit and the gradient norm, by (step, name)."""
    return {
        (step, name): value
        for step, line in training_log(output).items()
        for name, value in line.items()
        if ("loss" in name or name == "grad-norm") and (steps is None or step in steps)
    }


def validation_log(output: Path | str) -> dict[int, dict[str, float]]:
    return {line["step"]: line for line in log_of(output) if "lm loss validation" in line}


def events(output: Path | str, what: str) -> list[dict[str, Any]]:
    return [line for line in log_of(output) if line.get("event") == what]


def tensors_of(checkpoint: Path | str) -> dict[str, torch.Tensor]:
    """Return the unsharded parameters and optimizer state, by name."""
    reader = TensorReader(checkpoint)
    names = {*reader.names(), *reader.names(optimizer=True)}
    return {name: reader.tensor(name) for name in sorted(names)}


def assert_equal_bits(one: Path | str, other: Path | str) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    assert any("exp_avg" in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
