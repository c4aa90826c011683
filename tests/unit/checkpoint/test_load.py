"""Which options a run may change when it goes on from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest

from ee_llm.checkpoint.load import compare_configs, compare_data
from ee_llm.checkpoint.safe import CheckpointError
from ee_llm.config import Config, load_config

SOURCE = Path("step-00000007/config.toml")


def make(**overrides: Any) -> Config:
    options = {
        "model.shape": "llama-tiny",
        "data.prefixes": ("here/a", "here/b"),
        "data.weights": (1.0, 2.0),
    }
    return load_config(None, options | overrides)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("training.seed", 5, "training.seed is 1234 in the checkpoint and 5 in this run"),
        ("data.prefixes", ("here/b", "here/a"), "data.prefixes is ['a', 'b'] in .* ['b', 'a'] in"),
        ("data.weights", (1.0, 3.0), "data.weights is [1.0, 2.0] in .* and [1.0, 3.0] in this"),
        ("data.split", (0.9, 0.1, 0.0), "data.split[0] is 0.98 in .* and 0.9 in this run"),
        ("data.seq_length", 32, "data.seq_length is 256 in the checkpoint and 32 in this run"),
    ],
)
def test_another_order_of_the_data_is_refused(name: str, value: object, expected: str) -> None:
    """The position is a number of samples: in another order it would repeat and skip some."""
    saved, current = make(), make(**{name: value})
    compare_configs(saved, current, SOURCE)  # the model is the same
    with pytest.raises(CheckpointError) as caught:
        compare_data(saved, current, SOURCE)
    found = str(caught.value)
    first, _, second = expected.partition(".*")
    assert found.startswith(f"{SOURCE} is of a run that reads its data in another order: {first}")
    assert second in found
    assert found.endswith("--output")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.prefixes", ("there/a", "b")),
        ("data.split", (0.98, 0.01, 0.01)),
        ("data.mask_after_eod", True),
        ("training.global_batch_size", 16),
        ("training.micro_batch_size", 2),
        ("training.steps", 5000),
        ("optimizer.lr", 1e-4),
    ],
)
def test_what_leaves_the_order_alone_is_free(name: str, value: object) -> None:
    compare_data(make(), make(**{name: value}), SOURCE)
