"""Writes checkpoints with optimizer state, generators and a data position, without a run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.state import TrainState
from ee_llm.checkpoint.surgery.rewrite import specs_of
from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from ee_llm.cli.main import main
from ee_llm.config import Config
from tests.unit.inference.models import random_tensors, tiny_config

STATE = TrainState(step=7, consumed_samples=56, skipped_steps=1, extra={"note": "x"})
FILES = {"rng/rank-00000.safetensors": b"generators", "huggingface/config.json": b"{}"}
LAYOUT = {"world": 2, "tensor": 1, "pipeline": 2, "data": 1, "stages": 2}
KINDS = ("exp_avg", "exp_avg_sq", "fp32_param")
HEADS: dict[str, dict[str, Any]] = {
    "norm": {},
    "own outputs": {"output": "own"},
    "mlp": {"head": ("mlp", "norm")},
    "translator": {"head": ("translator", "norm")},
    "block": {"head": ("block", "mlp", "norm"), "output": "own"},
    "bare": {"head": (), "output": "tied"},
}


def tiny(family: str = "llama", **options: Any) -> Config:
    sizes = {"vocab_size": 260} | ({"num_kv_heads": 4} if family == "gpt" else {})
    return tiny_config(family, **{**sizes, **options})


def save(
    output: Path,
    config: Config | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: bool = True,
    state: TrainState = STATE,
    scale: float = 1.0,
) -> TensorReader:
    """Write a checkpoint of random tensors, optimizer state included, with the byte tokenizer.

    `scale` multiplies the embedding.
    """
    config = config or tiny()
    tensors = random_tensors(config, seed, dtype)
    tensors["embedding.word.weight"] *= scale
    if optimizer:
        generator = torch.Generator().manual_seed(seed)
        for name in list(tensors):
            shape = tensors[name].shape
            for kind in KINDS:
                moment = torch.randn(shape, generator=generator)
                tensors[f"optimizer.state.{kind}.{name}"] = moment
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    facts = {"optimizer_steps": 6, "layout": LAYOUT} if optimizer else {}
    path = write_checkpoint(
        output, config, specs, tensors.__getitem__, state=state, facts=facts, files=FILES
    )
    return TensorReader(path)


def save_tuned(output: Path, **parallel: Any) -> TensorReader:
    """Write a checkpoint of a run that tuned exits 1 and 3, which has only their moments."""
    values = tiny(boundaries=(1, 3)).model_dump()
    values["tuning"] = {"checkpoint": "before", "exits": (1, 3)}
    values["parallel"] |= parallel
    config = Config(**values)
    source = save(output / "whole", config)
    own = (".exits.1.", ".exits.3.")
    specs = specs_of(source)
    specs = {n: s for n, s in specs.items() if n in source.names() or any(e in n for e in own)}
    path = write_checkpoint(output / "part", config, specs, source.tensor, state=STATE)
    return TensorReader(path)


def all_tensors(reader: TensorReader) -> dict[str, Tensor]:
    return {n: reader.tensor(n) for n in (*reader.names(), *reader.names(optimizer=True))}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_resumes_alike(found: TensorReader, source: TensorReader) -> None:
    """Assert that a run resumes from the first checkpoint as from the second."""
    for name in ("state.json", *FILES):
        assert (found.path / name).read_bytes() == (source.path / name).read_bytes()
    for name in ("step", "optimizer_steps", "layout", "tokenizer"):
        assert found.manifest[name] == source.manifest[name]


def run(*arguments: object) -> None:
    assert main(["checkpoint", *map(str, arguments)]) == 0


def refusal(capsys, *arguments: object) -> str:
    assert main(["checkpoint", *map(str, arguments)]) == 2
    return " ".join(capsys.readouterr().err.split())
