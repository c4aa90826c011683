"""`ee-llm checkpoint` on checkpoints of runs with several ranks."""

import os
import subprocess
import sys

import pytest
import torch

from ee_llm.cli.main import main
from tests.distributed.runs import (
    assert_equal_bits,
    layout,
    losses_of,
    make_config,
    tensors_of,
    train_ranks,
    training_log,
)


def command(*arguments):
    assert main(["checkpoint", *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def source(tmp_path_factory, corpus):
    """Train six steps on one rank with dropout and keep a checkpoint of step 3."""
    output = tmp_path_factory.mktemp("source")
    options = {"training.steps": 6, "checkpoint.interval": 3, "model.dropout": 0.1}
    train_ranks(1, make_config(output, corpus, **options))
    return output / "checkpoints" / "step-00000003"


def go_on(output, corpus, checkpoint, world_size, **options):
    options = options | {"training.steps": 6, "checkpoint.resume": str(checkpoint)}
    [end, *_] = train_ranks(world_size, make_config(output, corpus, **options))
    assert end.endswith("step-00000006")
    return end


@pytest.mark.parametrize(
    ("world_size", "options", "resharded"),
    [
        (1, {}, ("--tensor", 2, "--pipeline", 2)),
        (4, layout(2, 2, sequence=True), ("--tensor", 2, "--pipeline", 2)),
        (2, layout(1, 2) | {"parallel.virtual": 2}, ("--pipeline", 2, "--virtual", 2)),
        (2, layout(1, 1), ("--pipeline", 4)),
    ],
    ids=["where-it-was-saved", "tp2-pp2-sp", "vp2-pp2", "dp2"],
)
def test_resuming_is_equal_to_the_original(
    tmp_path, corpus, source, world_size, options, resharded
):
    """Bit for bit, in its own layout, in another, and in the one that saved (with generators)."""
    command("reshard", source, *resharded, "--output", tmp_path / "cut")
    dropout = {"model.dropout": 0.1}
    one = go_on(tmp_path / "a", corpus, source, world_size, **options, **dropout)
    other = go_on(tmp_path / "b", corpus, tmp_path / "cut", world_size, **options, **dropout)
    assert_equal_bits(one, other)
    assert training_log(tmp_path / "a") == training_log(tmp_path / "b")
    if world_size == 1:
        assert_equal_bits(one, source.with_name("step-00000006"))


def test_run_resumes_with_another_exit(tmp_path, corpus, source):
    """Also with one exit less. The optimizer's state fits, and the other losses are unchanged."""
    command("add-exits", source, "--exits", 3, "--output", tmp_path / "more")
    command("remove-exits", source, "--exits", 1, "--output", tmp_path / "less")
    quiet = {"model.dropout": 0.0}
    go_on(tmp_path / "same", corpus, source, 1, **quiet)
    for name, boundaries, weights in (("more", (1, 2, 3), (0.3, 0.7, 0.0)), ("less", (2,), (0.7,))):
        exits = {"exits.boundaries": boundaries, "exits.weights": weights}
        go_on(tmp_path / f"on-{name}", corpus, tmp_path / name, 2, **exits, **layout(1, 2), **quiet)
    expected, found = losses_of(tmp_path / "same", {4}), losses_of(tmp_path / "on-more", {4})
    assert len(found) == len(expected) + 1
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("method", "layouts"),
    [
        ("class-aware", [(1, 1), (2, 1)]),
        ("least-squares", [(1, 1), (1, 2), (2, 2)]),
    ],
)
def test_exits_from_data_are_equal_on_all_layouts(tmp_path, corpus, source, method, layouts):
    dense = tmp_path / "dense"
    command("remove-exits", source, "--exits", 1, 2, "--output", dense)
    options = ["--exits", "1,3", "--initialization", method, "--data", corpus, "--json"]
    start = [sys.executable, "-m", "ee_llm", "checkpoint", "add-exits", str(dense), *options]
    found = []
    for tensor, pipeline in layouts:
        output = tmp_path / f"{tensor}-{pipeline}"
        ranks = ["--tensor", str(tensor)] + ["--pipeline", str(pipeline)] * (pipeline > 1)
        done = subprocess.run(
            [*start, *ranks, "--output", str(output)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        found.append(tensors_of(output))
    computed = "output.weight" if method == "class-aware" else "translator.weight"
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for boundary in (1, 3):
            name = f"exits.{boundary}.{computed}"
            torch.testing.assert_close(other[name], found[0][name], rtol=1e-4, atol=1e-5)
