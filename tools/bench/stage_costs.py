"""Times the pieces of a model, so that a pipeline of any depth can be simulated from them.

Shapes: s sequence, b microbatch, h hidden.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ee_llm import platform
from ee_llm.config import Config, exit_stage, stage_layers
from ee_llm.data import Microbatch
from ee_llm.model.stage import Stage
from ee_llm.pipeline import Costs, ExitCost, StageCost
from ee_llm.training.optimizer import wrap_stages
from ee_llm.training.parallel import StageOnData


@dataclass(frozen=True)
class Pieces:
    """Seconds for one microbatch: one layer, the embedding, an early exit, the final exit.

    Exits include their loss; `hop` is the journey of a hidden state to the next rank.
    """

    layer: ExitCost
    embedding: ExitCost
    exit: ExitCost
    final: ExitCost
    hop: float = 0.0

    def costs(self, config: Config) -> Costs:
        """Return the costs of every stage of `config`, a model made of these pieces."""
        stages = []
        for index in range(config.parallel.pipeline):
            num_layers = len(stage_layers(config, index))
            forward, backward = (num_layers * seconds for seconds in self.layer)
            if index == 0:
                forward += self.embedding.forward
                backward += self.embedding.backward
            exits = [self.exit for b in config.exits.boundaries if exit_stage(config, b) == index]
            if index == config.parallel.pipeline - 1:
                exits.append(self.final)
            stages.append(StageCost(forward, backward, tuple(exits)))
        return Costs(tuple(stages), communication=self.hop)


def median_pieces(rounds: Sequence[Pieces]) -> Pieces:
    """Return the median over rounds of every cost by itself."""

    def median(costs: Sequence[ExitCost]) -> ExitCost:
        return ExitCost(*(statistics.median(side) for side in zip(*costs, strict=True)))

    return Pieces(
        median([r.layer for r in rounds]),
        median([r.embedding for r in rounds]),
        median([r.exit for r in rounds]),
        median([r.final for r in rounds]),
        statistics.median([r.hop for r in rounds]),
    )


def measure_pieces(config: Config, batch: Microbatch, num_rounds: int) -> list[Pieces]:
    """Return the costs measured in each round, all pieces in turn, on one rank.

    `config` is of a model with an exit on its second stage, of at least three stages. Gradients go
    into megatron-core's buffers, as in training.
    """
    platform.initialize(seed=config.training.seed)
    try:
        timers = _timers(config, batch)
        rounds = []
        for index in range(num_rounds + 1):
            layer, embedding, exit_cost, final = (timer() for timer in timers)
            rounds.append(Pieces(layer, embedding, exit_cost, final))
            if index == 0:
                rounds.clear()  # the first round allocates
        return rounds
    finally:
        platform.shutdown()


def _timers(config: Config, batch: Microbatch) -> tuple[Callable[[], ExitCost], ...]:
    dtype = torch.float32
    stages = [Stage(config, index, dtype) for index in (0, 1, config.parallel.pipeline - 1)]
    chunks = wrap_stages(stages, stages[0].config, data_size=1, dtype=dtype)
    first, middle, last = (StageOnData(chunk, config) for chunk in chunks)
    boundaries = (*config.exits.boundaries, config.model.num_layers)
    for stage in (first, middle, last):
        stage.begin([batch], dict.fromkeys(boundaries, 1.0 / batch.tokens.numel()))
    length, width = batch.tokens.shape[1], config.model.hidden_size
    hidden = torch.randn(length, len(batch.tokens), width, dtype=dtype, device=platform.device())

    def leaf() -> torch.Tensor:
        return hidden.detach().requires_grad_()

    def layer() -> ExitCost:
        middle_layers = len(middle.stage.layers)
        # Taps are handed out, but no exit is computed: this is the backbone alone.
        forward, backward = _time(lambda: middle.forward(0, leaf())[0], hidden)
        return ExitCost(forward / middle_layers, backward / middle_layers)

    def embedding() -> ExitCost:
        words = first.stage.embedding
        assert words is not None, "the first stage has the embedding"
        return _time(lambda: words(batch.tokens, batch.positions), hidden)

    def exit_on(stage: StageOnData) -> Callable[[], ExitCost]:
        index = len(stage.stage.boundaries) - 1
        return lambda: _time(lambda: stage.exit_loss(0, index, leaf()), None)

    return layer, embedding, exit_on(middle), exit_on(last)


def _time(compute: Callable[[], torch.Tensor], gradient: torch.Tensor | None) -> ExitCost:
    platform.synchronize()
    start = time.perf_counter()
    output = compute()
    platform.synchronize()
    between = time.perf_counter()
    output.backward(gradient)
    platform.synchronize()
    return ExitCost(between - start, time.perf_counter() - between)
