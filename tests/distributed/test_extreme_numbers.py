"""A run works with the largest numbers that the configuration accepts."""

from pathlib import Path

import pytest

from ee_llm.config.limits import MAX_FACTOR, MAX_FLOAT, MAX_SEED, MAX_STEPS, MAX_TIMEOUT_S
from tests.distributed.runs import layout, make_config, train_ranks, training_log


@pytest.mark.parametrize("world_size", [1, 2])
def test_largest_numbers_train(tmp_path: Path, corpus: str, world_size: int) -> None:
    """Generators, process groups, logs and schedules accept the values that the checks accept."""
    config = make_config(
        tmp_path,
        corpus,
        **layout(1, world_size),
        **{
            "parallel.timeout_s": MAX_TIMEOUT_S,
            "parallel.forward_over_backward": MAX_FACTOR,
            "training.seed": MAX_SEED,
            "training.steps": 2,
            "training.max_bad_steps": MAX_STEPS,
            "training.eval_interval": MAX_STEPS,
            "training.eval_steps": MAX_STEPS,
            "optimizer.warmup_steps": MAX_STEPS - 1,
            "optimizer.decay_steps": MAX_STEPS,
            "optimizer.clip_grad": MAX_FLOAT,
            "optimizer.eps": 1.0,
            "exits.weight_schedule": "linear",
            "exits.schedule_steps": MAX_STEPS,
            "exits.temperatures": (MAX_FACTOR, 1.0),
            "checkpoint.interval": MAX_STEPS,
            "checkpoint.keep_last": MAX_STEPS,
            "model.rope_theta": MAX_FLOAT,
        },
    )
    paths = train_ranks(world_size, config)
    assert Path(paths[0]).name == "step-00000002"
    assert len(training_log(tmp_path)) == 2
