"""The options that a checkpoint states, so that a configuration need not."""

import pytest

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.describe import described_options, tokenizer_spec
from ee_llm.checkpoint.read import CONFIG
from ee_llm.config import load_config
from tests.unit.checkpoint.checkpoints import reseal, write_checkpoint

EXITS = {"exits.boundaries": (2, 4), "exits.temperatures": (1.5, 0.5), "exits.output": "own"}


def checkpoint_of(output, **options):
    path = write_checkpoint(output)
    config = load_config(None, {"model.shape": "llama-tiny"} | options)
    (path / CONFIG).write_text(config.to_toml())
    reseal(path)
    return path, config


def test_a_model_without_exits_does_not_state_any(tmp_path):
    path, config = checkpoint_of(tmp_path)
    options = described_options(path, {})
    assert options["model"] == config.model.model_dump()
    assert "exits" not in options


@pytest.mark.parametrize(("context", "expected"), [(256, 256), (2048, 2048), (131072, 2048)])
def test_tokenizer_and_bounded_sequence_length(tmp_path, context, expected):
    """With sequences of 131072 tokens, the model's context, the first step took minutes."""
    path, _ = checkpoint_of(tmp_path, **{"model.max_seq_length": context})
    assert described_options(path, {})["data"] == {"tokenizer": "bytes", "seq_length": expected}


def test_the_end_token_applies_only_to_the_checkpoints_tokenizer(tmp_path):
    path, _ = checkpoint_of(tmp_path, **{"data.eos_token": "<end>"})
    assert described_options(path, {})["data"]["eos_token"] == "<end>"
    assert "eos_token" not in described_options(path, {"data": {"tokenizer": "bytes"}})["data"]


def test_tokenizer_of_a_run_directory(tmp_path):
    path, _ = checkpoint_of(tmp_path / "run")
    other = tmp_path / "folder"
    other.mkdir()
    (other / "tokenizer.json").touch()
    assert tokenizer_spec(str(tmp_path / "run")) == tokenizer_spec(str(path)) == "bytes"
    for spec in ("bytes", str(other), "nowhere"):
        assert tokenizer_spec(spec) == spec


def test_exits_keep_heads_and_temperatures(tmp_path):
    path, config = checkpoint_of(tmp_path, **EXITS)
    tuned = load_config(None, {"tuning.checkpoint": "runs/a"}, described_options(tmp_path, {}))
    assert tuned.model == config.model
    assert tuned.exits == config.exits
    assert directory.find_latest(tmp_path) == path


def test_added_exits_have_temperature_one(tmp_path):
    checkpoint_of(tmp_path, **EXITS)
    below = described_options(tmp_path, {"exits": {"boundaries": [2, 3, 4]}})
    assert below["exits"]["temperatures"] == (1.5, 1.0, 0.5)
    given = {"tuning.checkpoint": "runs/a", "exits.boundaries": (2, 3, 4)}
    assert load_config(None, given, below).exits.output == "own"
    for wrong in (3, [[2]], [None, 4], "2 4"):
        below = described_options(tmp_path, {"exits": {"boundaries": wrong}})
        assert below["exits"]["boundaries"] == (2, 4)
