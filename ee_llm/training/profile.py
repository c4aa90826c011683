"""Measure the pieces of a model on this device, so that any pipeline of it can be simulated.

Shapes: s sequence, b microbatch, h hidden.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ee_llm import distributed
from ee_llm.config import Config, load_config
from ee_llm.data import Microbatch
from ee_llm.errors import ConfigError
from ee_llm.model.specs import uses_transformer_engine
from ee_llm.model.stage import Stage
from ee_llm.pipeline.planner.costs import Pieces
from ee_llm.pipeline.simulate import PieceCost
from ee_llm.training.optimizer import wrap_stages
from ee_llm.training.parallel import StageOnData
from ee_llm.training.precision import choose_dtype

NUM_ROUNDS = 10
MIDDLE_LAYERS = 2  # in the stage whose layers are timed


def profile(config: Config, num_rounds: int = NUM_ROUNDS) -> Pieces:
    """Return the median costs of the configuration's pieces, in its dtype on this device.

    Raises:
        ConfigError: One process cannot measure the pieces of this model.
    """
    return median_pieces(measure_pieces(config, random_batch(config), num_rounds))


def random_batch(config: Config) -> Microbatch:
    """Return a microbatch of random tokens, all valid. Every field is [b, s]."""
    rows, length = config.training.micro_batch_size, config.data.seq_length
    tokens = torch.randint(
        config.model.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(1)
    )
    positions = torch.arange(length).repeat(rows, 1)
    return Microbatch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, length), positions)


def median_pieces(rounds: Sequence[Pieces]) -> Pieces:
    """Return the median over the rounds of each cost separately."""

    def median(costs: Sequence[tuple[float, ...]]) -> list[float]:
        return [statistics.median(side) for side in zip(*costs, strict=True)]

    return Pieces(
        PieceCost(*median([r.layer for r in rounds])),
        PieceCost(*median([r.embedding for r in rounds])),
        PieceCost(*median([r.exit for r in rounds])),
        PieceCost(*median([r.final for r in rounds])),
        statistics.median([r.communication for r in rounds]),
    )


def measure_pieces(config: Config, batch: Microbatch, num_rounds: int) -> list[Pieces]:
    """Return the costs measured in each round. A round measures every piece once, in one process.

    Gradients are added to megatron-core's buffers, as in training. The weight part of a cost is 0
    if the backward pass of the layers cannot be split (with Transformer Engine).

    Raises:
        ConfigError: The model is tensor parallel.
    """
    tensor = config.parallel.tensor
    if tensor > 1:
        raise ConfigError(
            f"parallel.tensor = {tensor}: the costs are measured in one process, but {tensor} "
            "processes compute a layer. Measure a copy of the configuration with "
            "parallel.tensor = 1 (ee-llm plan --profile --costs-output costs.json), divide the "
            f"costs by the speed-up of {tensor} processes, and pass them with --costs costs.json."
        )
    distributed.initialize(seed=config.training.seed)
    try:
        dtype = distributed.DTYPES[choose_dtype(config)]
        timers = _timers(config, batch, dtype)
        rounds = []
        for index in range(num_rounds + 1):
            layer, embedding, exit_, final = (timer() for timer in timers)
            rounds.append(Pieces(layer, embedding, exit_, final))
            if index == 0:
                rounds.clear()  # the first round allocates
        return rounds
    finally:
        distributed.shutdown()


def _probe(config: Config, *, splits_backward: bool) -> Config:
    """Return a model of the same pieces in three stages. The middle stage ends with an exit."""
    values = config.model_dump()
    values["model"]["num_layers"] = MIDDLE_LAYERS + 2
    values["parallel"] |= {
        "pipeline": 3,
        "virtual": 1,
        "schedule": "zero-bubble-exits" if splits_backward else "1f1b",
        "layer_split": (1, MIDDLE_LAYERS, 1),
        "fill_warmup": 0,
        "fill_cooldown": 0,
    }
    values["exits"] |= {
        "boundaries": (1 + MIDDLE_LAYERS,),
        "placement": "post",
        "weights": (1.0,),
        "weight_schedule": "constant",
        "initial_weights": (),
        "temperatures": (),
    }
    return load_config(None, values)


def _timers(
    config: Config, batch: Microbatch, dtype: torch.dtype
) -> tuple[Callable[[], PieceCost], ...]:
    """Return functions that measure a layer, the embedding, an exit and the final exit."""
    plain, split = (_probe(config, splits_backward=splits) for splits in (False, True))
    stages = [Stage(plain, index, dtype) for index in range(3)]
    can_split = not uses_transformer_engine(stages[0].config)
    if can_split:
        stages += [Stage(split, index, dtype) for index in (1, 2)]
    chunks = wrap_stages(stages, stages[0].config, data_size=1, dtype=dtype)
    on_data = [StageOnData(chunk, plain) for chunk in chunks]
    batch = Microbatch(*(x.to(distributed.device()) for x in batch))
    for stage in on_data:
        stage.set_microbatches(
            [batch], dict.fromkeys(range(MIDDLE_LAYERS + 3), 1.0 / batch.tokens.numel())
        )
    first, middle, last = on_data[:3]
    split_middle, split_last = on_data[3:] if can_split else (None, None)
    length, width = batch.tokens.shape[1], config.model.hidden_size
    hidden = torch.randn(length, len(batch.tokens), width, dtype=dtype, device=distributed.device())

    def leaf() -> torch.Tensor:
        return hidden.detach().requires_grad_()

    def layer() -> PieceCost:
        # The forward pass returns taps but computes no exit, so this measures the layers only.
        def output(stage: StageOnData) -> torch.Tensor:
            return stage.forward(0, leaf())[0]

        cost = _time(output, middle, split_middle, hidden)
        return PieceCost(*(seconds / MIDDLE_LAYERS for seconds in cost))

    def embedding() -> PieceCost:
        words = first.stage.embedding
        assert words is not None, "the first stage has the embedding"
        return _time(lambda _: words(batch.tokens, batch.positions), first, None, hidden)

    def exit_on(stage: StageOnData, split_stage: StageOnData | None) -> Callable[[], PieceCost]:
        index = len(stage.stage.boundaries) - 1
        return lambda: _time(lambda s: s.exit_loss(0, index, leaf()), stage, split_stage, None)

    return layer, embedding, exit_on(middle, split_middle), exit_on(last, split_last)


def _time(
    compute: Callable[[StageOnData], torch.Tensor],
    stage: StageOnData,
    split_stage: StageOnData | None,
    gradient: torch.Tensor | None,
) -> PieceCost:
    """Return the seconds of `compute` and its backward pass on a stage.

    The weight part is measured on `split_stage`, a copy of the stage that defers its weight
    gradients. It is 0 without one.
    """
    distributed.synchronize()
    start = time.perf_counter()
    output = compute(stage)
    distributed.synchronize()
    between = time.perf_counter()
    output.backward(gradient)
    distributed.synchronize()
    forward, backward = between - start, time.perf_counter() - between
    if split_stage is None:
        return PieceCost(forward, backward)
    with split_stage.defer_weight_gradients() as add_weights:
        compute(split_stage).backward(gradient)
    distributed.synchronize()
    start = time.perf_counter()
    add_weights()
    distributed.synchronize()
    # Clock noise must not make the part exceed the whole.
    return PieceCost(forward, backward, min(time.perf_counter() - start, backward))
