"""The cost of an exit's head in layers, when decoding one token."""

import statistics
from dataclasses import dataclass

from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.evaluation.calibration.collector import head_cost
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
        head: Seconds of an exit's head.
    """

    layer: float
    head: float


def weight_ratio(config: Config) -> float:
    """Return the weights of a least-squares exit's head over those of a layer."""
    return head_cost(probed_config(config, (1,)))


def measure_latency(reader: TensorReader) -> Latency:
    """Return the time of a layer and of an exit's head on this machine, without other sequences.

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
        statistics.median(heads.time(0, 1) for _, heads in rounds),
    )
