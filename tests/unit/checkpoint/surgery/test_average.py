"""Averaging checkpoints of one model."""

import json

import pytest
import torch

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.state import TrainState
from tests.unit.checkpoint.surgery.sources import HEADS, refusal, run, save, tiny


@pytest.mark.parametrize(
    ("dtype", "sums"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float64),
    ],
)
def test_weights_are_the_mean(tmp_path, dtype, sums):
    """Sums need more precision than the weights have."""
    readers = [save(tmp_path / str(seed), seed=seed, dtype=dtype) for seed in range(3)]
    run("average", *(r.path for r in readers), "--output", tmp_path / "mean")
    mean = TensorReader(tmp_path / "mean")
    assert mean.names() == readers[0].names()
    narrow = 0
    for name in mean.names():
        tensors = [reader.tensor(name) for reader in readers]
        expected = torch.stack([t.to(sums) for t in tensors]).sum(dim=0) / 3
        assert mean.dtype(name) == dtype
        assert torch.equal(mean.tensor(name), expected.to(dtype))
        narrow += int(((tensors[0] + tensors[1] + tensors[2]) / 3 != expected.to(dtype)).sum())
    assert narrow > 100 or dtype == torch.float64


def test_the_average_has_no_optimizer_and_step_zero(tmp_path, capsys):
    readers = [
        save(tmp_path / str(step), seed=step, state=TrainState(step=step)) for step in (4, 9)
    ]
    run("average", *(r.path for r in readers), "--output", tmp_path / "mean")
    capsys.readouterr()
    run("info", tmp_path / "mean", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["optimizer"]["tensors"] == 0
    assert (facts["step"], [source["step"] for source in facts["mean_of"]]) == (0, [4, 9])
    mean = TensorReader(tmp_path / "mean")
    assert not (mean.path / "rng").exists()
    assert (mean.path / "huggingface" / "config.json").is_file()


def test_the_newest_of_a_run(tmp_path):
    """Checkpoints of one run directory, as written by training."""
    run_directory = tmp_path / "run"
    readers = []
    for step in (1, 2, 3):
        made = save(tmp_path / str(step), seed=step, state=TrainState(step=step))
        (run_directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        made.path.rename(run_directory / "checkpoints" / made.path.name)
        readers.append(TensorReader(run_directory / "checkpoints" / made.path.name))
    run("average", run_directory, "--last", 2, "--output", tmp_path / "a")
    run("average", readers[1].path, readers[2].path, "--output", tmp_path / "b")
    one, other = TensorReader(tmp_path / "a"), TensorReader(tmp_path / "b")
    for name in one.names():
        assert torch.equal(one.tensor(name), other.tensor(name))


def test_steps_above_the_newest_are_ignored(tmp_path):
    """They are from before the run went back to an older checkpoint."""
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for step in (1, 2, 5):
        made = save(tmp_path / str(step), seed=step, state=TrainState(step=step))
        made.path.rename(checkpoints / made.path.name)
    (checkpoints / "latest").write_text("step-00000002\n")
    run("average", tmp_path / "run", "--last", 2, "--output", tmp_path / "mean")
    mean = TensorReader(tmp_path / "mean").manifest["mean_of"]
    assert sorted(source["step"] for source in mean) == [1, 2]


OTHERS = {
    "model": (tiny(norm_eps=1e-3), "model.norm_eps is 1e-05 in the first and 0.001"),
    "depth": (tiny(num_layers=5), "model.num_layers is 4 in the first and 5 in the second"),
    "exits": (tiny(boundaries=(1, 3)), "exits.boundaries is (1, 2) in the first and (1, 3)"),
    "head": (tiny(**HEADS["own outputs"]), "exits.output is shared in the first and own"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_are_refused(tmp_path, capsys, case):
    config, expected = OTHERS[case]
    one, other = save(tmp_path / "one"), save(tmp_path / "other", config)
    found = refusal(capsys, "average", one.path, other.path, "--output", tmp_path / "mean")
    assert expected in found
    assert "Average checkpoints of one run" in found
    assert not (tmp_path / "mean").exists()


def test_other_dtypes_are_refused(tmp_path, capsys):
    one, other = save(tmp_path / "one"), save(tmp_path / "other", dtype=torch.float32)
    found = refusal(capsys, "average", one.path, other.path, "--output", tmp_path / "mean")
    assert "embedding.word.weight is torch.bfloat16 [260, 32] in the first" in found


def test_fewer_than_two_are_refused(tmp_path, capsys):
    one = save(tmp_path / "one")
    output = ("--output", tmp_path / "mean")
    assert "at least two checkpoints" in refusal(capsys, "average", one.path, *output)
    twice = refusal(capsys, "average", one.path, tmp_path / "one", *output)
    assert "is given more than once" in twice
    last = refusal(capsys, "average", tmp_path / "one", "--last", 2, *output)
    assert "has fewer checkpoints: step-00000007" in last
    both = refusal(capsys, "average", one.path, one.path, "--last", 2, *output)
    assert "--last 2: pass one run directory" in both
