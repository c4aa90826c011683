"""Errors of checkpoints that do not fit the run or contain malicious pickles."""

import pickle
import shutil

import pytest
import torch

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import CheckpointError
from ee_llm.checkpoint.sharded.load import load
from tests.distributed.harness import run_ranks
from tests.distributed.toy_run import HIDDEN, Layer, Run
from tests.unit.checkpoint.checkpoints import Payload, forget_checksums, reseal


def _load_errors(output, overrides, layout=(1, 1), dtype=torch.float32):
    run = Run(output, layout, dtype, **overrides)
    source = overrides.get("source", output)
    try:
        run.load(source)
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("fact", ["tokenizer", "optimizer_steps", "layout"])
def test_manifest_without_a_field(checkpoint, tmp_path, fact):
    output = tmp_path / "run"
    shutil.copytree(checkpoint, output)
    reseal(directory.find_latest(output), lambda facts: facts.pop(fact))
    [message] = run_ranks(1, _load_errors, output, {})
    assert f"manifest.json: {fact}: Field required" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.num_heads": 4}, "model.num_heads is 2 in the checkpoint and 4 in this run"),
        ({"model.rope_theta": 5e5}, "model.rope_theta is 10000.0 in the checkpoint and 500000.0"),
        ({"exits.boundaries": (2,)}, "exits.boundaries is [] in the checkpoint and [2] in"),
    ],
)
def test_another_model_names_the_option_and_both_values(checkpoint, overrides, expected):
    [message] = run_ranks(1, _load_errors, checkpoint, overrides)
    assert expected in message
    assert "config.toml" in message


@pytest.mark.parametrize("overrides", [{"model.dropout": 0.1}, {"optimizer.lr": 1.0}])
def test_options_that_may_change(checkpoint, overrides):
    assert run_ranks(1, _load_errors, checkpoint, overrides) == ["no error"]


def test_another_tokenizer(checkpoint, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text("{}")
    [message] = run_ranks(1, _load_errors, checkpoint, {"data.tokenizer": str(other)})
    assert "is not the tokenizer that" in message
    assert "Use 'bytes'" in message


def test_another_dtype_is_an_error(checkpoint):
    messages = run_ranks(2, _load_errors, checkpoint, {}, (1, 2), torch.bfloat16)
    assert len(set(messages)) == 1
    assert "are missing: optimizer.state.fp32_param.embedding.word.weight, " in messages[0]
    assert "check training.dtype" in messages[0]


def _load_other_tensors(output):
    run = Run(output, (1, 2))
    if run.grid.rank == 1:
        run.toy.layers.pop("4")
    names = {}
    for change in ("missing", "shape"):
        try:
            load(output, [run.toy], None, run.config)
        except CheckpointError as error:
            names[change] = str(error)
        extra = Layer(run.toy.config)
        if run.grid.rank == 1:
            run.toy.layers["4"] = extra
            extra.norm = torch.nn.RMSNorm(HIDDEN + 1)
    return names


def test_names_and_shapes_that_differ_are_listed(checkpoint):
    for names in run_ranks(2, _load_other_tensors, checkpoint):
        assert "4 tensors are not used by this run: layers.4.fc1.weight, " in names["missing"]
        assert "layers.4.norm.weight has shape [8], but [9] in this run" in names["shape"]


@pytest.mark.parametrize("place", [".metadata", "common.pt", "rng"])
def test_malicious_pickle_is_not_executed_on_resume(checkpoint, tmp_path, place):
    """megatron-core and torch would unpickle each of these (see test_safe for the byte entries)."""
    output, marker = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(checkpoint, output)
    step = directory.find_latest(output)
    file = step / "tensors" / place
    if place == "rng":
        file = step / "rng" / "rank-00001.safetensors"
    if place == "common.pt":
        torch.save(Payload(marker), file)
    else:
        file.write_bytes(pickle.dumps(Payload(marker)))
    forget_checksums(step)
    messages = run_ranks(2, _load_errors, output, {}, (1, 2))
    assert any(place in message for message in messages), messages
    assert "no error" not in messages
    assert not marker.exists()


def test_missing_checkpoint(tmp_path):
    messages = run_ranks(2, _load_errors, tmp_path / "none", {}, (1, 2))
    assert all("none does not exist: expected a run directory" in text for text in messages)
