"""Costs of the configured model are measured in one process, and can be read from a file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ee_llm.config import load_config
from ee_llm.errors import ConfigError
from ee_llm.pipeline.planner.costs import read_pieces
from ee_llm.training.profile import profile, random_batch

pytestmark = pytest.mark.thorough

MODEL = """\
[model]
num_layers = 8
hidden_size = 32
num_heads = 2
vocab_size = 32768
max_seq_length = 128
[exits]
boundaries = [2, 4]
weights = [0.25, 0.5]
head = {head}
[parallel]
pipeline = 2
[training]
dtype = "float32"
recompute = "{recompute}"
"""


@pytest.mark.parametrize(("head", "recompute"), [('["norm"]', "none"), ('["mlp"]', "full")])
def test_measured_costs_are_written_and_read_again(tmp_path, head, recompute):
    path, costs = tmp_path / "run.toml", tmp_path / "costs.json"
    path.write_text(MODEL.format(head=head, recompute=recompute))
    command = [
        sys.executable,
        "-m",
        "ee_llm",
        "plan",
        "--config",
        str(path),
        "--json",
        "-",
    ]

    def run(*arguments):
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=Path(__file__).parents[3],
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    measured = run("--profile", "--costs-output", str(costs))
    pieces = read_pieces(costs)
    times = (*pieces.layer, *pieces.embedding[:2], *pieces.exit, *pieces.final)
    assert min(times) > 0
    assert pieces.communication == 0
    # The vocabulary is 1024 times as wide as the model: a head takes 80 times a layer's work.
    assert pieces.final.total > pieces.layer.total
    assert measured["unit"] in ("s", "ms")
    assert run("--costs", str(costs)) == measured


def test_tensor_parallel_models_cannot_be_measured():
    values = {"model.shape": "llama-tiny", "parallel.tensor": 2}
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 2: .* --costs costs\.json"):
        profile(load_config(None, values))


def test_random_batches_are_deterministic():
    config = load_config(None, {"model.shape": "llama-tiny", "training.micro_batch_size": 4})
    one, other = random_batch(config), random_batch(config)
    assert one.tokens.shape == one.labels.shape == one.positions.shape == (4, 256)
    assert one.tokens.equal(other.tokens)
    assert one.tokens[:, 1:].equal(one.labels[:, :-1])
