"""Train variants of a model on real pipeline ranks, and measure their time and memory."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.config import Config, load_config
from ee_llm.training.optimizer import build_optimizer, take_step
from ee_llm.training.parallel import ParallelModel, StageOnData
from ee_llm.training.profile import random_batch
from tools.bench.live_bytes import LiveBytes

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, its batches and the measurement."""

    num_layers: int = 8
    """Number of layers, a multiple of 4. The exits are at a quarter and at half of the depth."""
    hidden_size: int = 288
    """Hidden size."""
    num_heads: int = 6
    """Number of attention heads."""
    vocab_size: int = 4096
    """Vocabulary size. The embedding is also the output weight of every exit."""
    seq_length: int = 256
    """Number of tokens per sequence."""
    micro_batch_size: int = 2
    """Number of sequences per microbatch."""
    num_microbatches: int = 8
    """Number of microbatches per step of the real ranks."""
    simulated_microbatches: int = 64
    """Number of microbatches per simulated step; EE-LLM's Table 1 uses 64."""
    rounds: int = 15
    """Number of rounds; each measures all variants in turn."""


@dataclass(frozen=True)
class Variant:
    """A way to train the model. `exits` are fractions of the depth."""

    name: str
    exits: tuple[float, ...] = ()
    deferred: bool = True
    placement: str = "post"


def variants(*exits: float) -> list[Variant]:
    """Return the variants of EE-LLM's Table 1 with exits at these fractions of the depth."""
    return [
        Variant("standard"),
        Variant("naive", exits, deferred=False),
        Variant("deferred", exits),
        Variant("pre-exit", exits, deferred=False, placement="pre"),
        Variant("both", exits, placement="pre"),
    ]


# With two stages, only a single exit, on stage 0, can run while its stage waits for the final exit.
TWO_STAGES = [*variants(1 / 2), Variant("deferred, 2 exits", (1 / 4, 1 / 2))]
FOUR_STAGES = variants(1 / 4, 1 / 2)


def make_config(
    sizes: Sizes, variant: Variant, num_stages: int, layer_split: Sequence[int] = ()
) -> Config:
    """Return the configuration of a variant, with tied weights as in EE-LLM's 1.3B model."""
    boundaries = tuple(round(depth * sizes.num_layers) for depth in variant.exits)
    return load_config(
        None,
        {
            "model.num_layers": sizes.num_layers,
            "model.hidden_size": sizes.hidden_size,
            "model.num_heads": sizes.num_heads,
            "model.vocab_size": sizes.vocab_size,
            "model.tie_embeddings": True,
            "data.seq_length": sizes.seq_length,
            "exits.boundaries": boundaries,
            "exits.weights": (0.25, 0.5)[: len(boundaries)],
            "exits.output": "tied",
            "exits.deferred": variant.deferred,
            "exits.placement": variant.placement,
            "parallel.pipeline": num_stages,
            "parallel.layer_split": tuple(layer_split),
            "parallel.timeout_s": TIMEOUT_S,
            "training.micro_batch_size": sizes.micro_batch_size,
            "training.global_batch_size": sizes.micro_batch_size * sizes.num_microbatches,
            "training.dtype": "float32",
        },
    )


class Run:
    """The training of one variant on this rank."""

    def __init__(self, config: Config, grid: distributed.Grid) -> None:
        self.config = config
        self.model = ParallelModel(config, grid, torch.float32)
        self.optimizer = build_optimizer(
            self.model.chunks, config.optimizer, data_size=1, dtype=torch.float32
        )
        self.batches = [random_batch(config)] * self.model.num_microbatches

    def step(self) -> tuple[float, float]:
        """Take a step; return the seconds of its passes and of the whole step."""
        dist.barrier()
        start = time.perf_counter()
        self.model.forward_backward(self.batches, 0)
        passes = time.perf_counter()
        take_step(self.optimizer, clip_grad=1.0)
        dist.barrier()
        return passes - start, time.perf_counter() - start

    def count_bytes(self) -> tuple[int, int]:
        """Return this stage's peaks in bytes: of tensors that exits create, and of all tensors."""
        counter = LiveBytes()
        with _marking_exits(counter), counter:
            self.model.forward_backward(self.batches, 0)
        return counter.marked_peak, counter.peak


@contextmanager
def _marking_exits(counter: LiveBytes) -> Iterator[None]:
    original = StageOnData.exit_loss

    def exit_loss(self: StageOnData, microbatch: int, index: int, tap: torch.Tensor) -> Any:
        with counter.marked():
            return original(self, microbatch, index, tap)

    StageOnData.exit_loss = exit_loss  # type: ignore[method-assign]
    try:
        yield
    finally:
        StageOnData.exit_loss = original  # type: ignore[method-assign]


@dataclass(frozen=True)
class RankResult:
    """The results of one rank by variant: seconds per round, peak bytes; seconds of a message."""

    passes: dict[str, list[float]]
    steps: dict[str, list[float]]
    exit_bytes: dict[str, int]
    total_bytes: dict[str, int]
    hop: float


def run_variants(
    sizes: Sizes, wanted: Sequence[Variant], num_stages: int, num_rounds: int
) -> RankResult:
    """Train all variants in turn on this rank, then count the bytes of one more step of each."""
    grid = distributed.initialize(pipeline=num_stages, timeout_s=TIMEOUT_S)
    try:
        runs = {v.name: Run(make_config(sizes, v, num_stages), grid) for v in wanted}
        passes: dict[str, list[float]] = {name: [] for name in runs}
        steps: dict[str, list[float]] = {name: [] for name in runs}
        names = list(runs)
        for index in range(-1 if num_rounds else 0, num_rounds):
            shift = index % len(names)  # no variant always runs after the same other variant
            for name in names[shift:] + names[:shift]:
                pass_seconds, step_seconds = runs[name].step()
                if index >= 0:  # the first round allocates
                    passes[name].append(pass_seconds)
                    steps[name].append(step_seconds)
        peaks = {name: run.count_bytes() for name, run in runs.items()}
        return RankResult(
            passes,
            steps,
            {name: exits for name, (exits, _) in peaks.items()},
            {name: total for name, (_, total) in peaks.items()},
            _hop_seconds(next(iter(runs.values())).model),
        )
    finally:
        distributed.shutdown()


def _hop_seconds(model: ParallelModel, num_rounds: int = 20) -> float:
    """Return the median seconds to send a hidden state from rank 0 to 1: half of a round trip."""
    spec = model.hidden_spec()
    hidden = torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device)
    samples = []
    for _ in range(num_rounds):
        dist.barrier()
        start = time.perf_counter()
        if model.grid.rank == 0:
            dist.send(hidden, 1)
            dist.recv(hidden, 1)
        elif model.grid.rank == 1:
            dist.recv(hidden, 0)
            dist.send(hidden, 0)
        samples.append((time.perf_counter() - start) / 2)
    return statistics.median(samples)
