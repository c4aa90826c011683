"""What a checkpoint says so that a configuration need not."""

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.describe import described_options
from ee_llm.checkpoint.read import CONFIG
from ee_llm.config import load_config
from tests.unit.checkpoint.checkpoints import accept_sizes, write_checkpoint

EXITS = {"exits.boundaries": (2, 4), "exits.temperatures": (1.5, 0.5), "exits.output": "own"}


def checkpoint_of(output, **options):
    path = write_checkpoint(output)
    config = load_config(None, {"model.shape": "llama-tiny"} | options)
    (path / CONFIG).write_text(config.to_toml())
    accept_sizes(path)
    return path, config


def test_a_model_without_exits_leaves_them_free(tmp_path):
    path, config = checkpoint_of(tmp_path)
    assert described_options(path, {}) == {"model": config.model.model_dump()}


def test_exits_come_with_their_heads_and_temperatures(tmp_path):
    path, config = checkpoint_of(tmp_path, **EXITS)
    tuned = load_config(None, {"tuning.checkpoint": "runs/a"}, described_options(tmp_path, {}))
    assert tuned.model == config.model
    assert tuned.exits == config.exits
    assert directory.find_latest(tmp_path) == path


def test_exits_that_are_added_have_none(tmp_path):
    checkpoint_of(tmp_path, **EXITS)
    below = described_options(tmp_path, {"exits": {"boundaries": [2, 3, 4]}})
    assert below["exits"]["temperatures"] == (1.5, 1.0, 0.5)
    given = {"tuning.checkpoint": "runs/a", "exits.boundaries": (2, 3, 4)}
    assert load_config(None, given, below).exits.output == "own"
    for wrong in (3, [[2]], [None, 4], "2 4"):
        below = described_options(tmp_path, {"exits": {"boundaries": wrong}})
        assert below["exits"]["boundaries"] == (2, 4)
