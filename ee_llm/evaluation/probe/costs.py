"""The cost of an exit's head in layers, when decoding one token."""

import statistics
from dataclasses import dataclass

from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.evaluation.calibration.collector import final_head_cost, head_cost
from ee_llm.evaluation.probe.backbone import probed_config
from ee_llm.inference.execution.runner import Runner
from ee_llm.inference.execution.stage import ModelStage, partition_layers
from ee_llm.inference.exits.new_exits import tensors_with_new_exits
from ee_llm.inference.scheduling.config import SchedulerConfig

NUM_ROUNDS = 7
"""Rounds of measurements."""


@dataclass(frozen=True)
class Latency:
    """Measured seconds of one token.

    Attributes:
        layer: Seconds of a layer.
        head: Seconds of an early exit's head.
        final_head: Seconds of the final exit's head, which has no translator.
    """

    layer: float
    head: float
    final_head: float


def weight_ratios(config: Config) -> tuple[float, float]:
    """Return the weights of the heads of a least-squares and of the final exit, in layers."""
    probed = probed_config(config, (1,))
    return head_cost(probed), final_head_cost(probed)


def measure_latency(reader: TensorReader) -> Latency:
    """Return the time of a layer and of heads on this machine, without other sequences.

    The passes are those of generation. The exit is after the first layer, so that the time of its
    head is not lost in that of the layers before it, and the layer is the mean of the others, whose
    weights no cache keeps. Both are medians of several rounds.

    Args:
        reader: The checkpoint, whose model has two layers or more.
    """
    config = probed_config(reader.config(), (1,))
    (layer_ranges,) = partition_layers(config)
    scheduler_config = SchedulerConfig(max_num_seqs=1, num_blocks=2, max_pending=1)
    num_positions = scheduler_config.num_blocks * scheduler_config.block_size
    tensors = tensors_with_new_exits(reader, config)
    stage = ModelStage(config, tensors, num_positions, layer_ranges)
    runner = Runner(stage, scheduler_config, config.model.max_seq_length)
    rounds = [runner.profile((1,)) for _ in range(NUM_ROUNDS)]
    num_layers = layer_ranges[1].last - layer_ranges[1].first + 1
    return Latency(
        statistics.median(passes.time(1, 1) for passes, _ in rounds) / num_layers,
        *(statistics.median(heads.time(s, 1) for _, heads in rounds) for s in (0, 1)),
    )
