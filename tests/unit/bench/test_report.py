"""Test that the training benchmarks run and write their figures, and their calculations."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ee_llm.errors import ConfigError
from ee_llm.pipeline import PieceCost
from ee_llm.pipeline.planner.costs import Pieces
from ee_llm.training.profile import median_pieces
from tools.bench import report, train_overhead, train_throughput
from tools.bench.live_bytes import LiveBytes
from tools.bench.overhead_runs import FOUR_STAGES, Sizes, make_config
from tools.bench.ranks import run_ranks
from tools.bench.train_overhead import best_split, makespan
from tools.bench.train_throughput import Options, flops_per_token
from tools.bench.train_throughput import make_config as make_throughput_config

pytestmark = pytest.mark.thorough

BENCHES = Path(__file__).resolve().parents[3] / "tools" / "bench"
SIZES = Sizes(num_layers=8, hidden_size=32, num_heads=2, vocab_size=64, seq_length=16)
STANDARD, NAIVE, DEFERRED, _, BOTH = FOUR_STAGES


def run(name: str, path: Path, options: dict[str, int]) -> dict:
    """Run a benchmark with the documented command and return the JSON that it writes."""
    command = [sys.executable, str(BENCHES / f"{name}.py"), "--json", str(path)]
    command += [text for option, value in options.items() for text in (f"--{option}", str(value))]
    on_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=on_cpu)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert set(written) == {"machine", "rows", "figures"}
    return written


def test_train_overhead_writes_its_figures(tmp_path):
    written = run(
        "train_overhead",
        tmp_path / "overhead.json",
        {"num-layers": 4, "hidden-size": 32, "num-heads": 2, "vocab-size": 512, "seq-length": 16}
        | {"micro-batch-size": 1, "num-microbatches": 6, "simulated-microbatches": 8, "rounds": 2},
    )
    figures = written["figures"]
    assert {"step_time_ratio_naive", "step_time_ratio_best"} <= set(figures)
    # Bytes are counted, not measured, so they are the same on every machine.
    assert figures["peak_bytes_ratio_best"] == 1.0
    assert figures["peak_bytes_ratio_naive"] > 2.0
    layouts = {row["layout"] for row in written["rows"]}
    assert {"P=2 real", "P=2 simulated", "P=4 simulated"} <= layouts


def test_train_throughput_writes_its_figure(tmp_path):
    pytest.importorskip("transformers")
    written = run(
        "train_throughput",
        tmp_path / "throughput.json",
        {"num-layers": 1, "seq-length": 16, "micro-batch-size": 1, "rounds": 2, "threads": 1},
    )
    assert written["figures"]["tokens_per_s_ratio"] > 0
    assert [row["side"] for row in written["rows"]] == ["ee_llm", "transformers"]


@pytest.mark.parametrize("bench", [train_overhead, train_throughput])
def test_explicit_options_take_precedence_over_quick(bench):
    plain = report.read_options(bench.Options, bench.QUICK, [])
    assert plain == bench.Options()
    for args in (["--quick", "--rounds", "5"], ["--rounds", "5", "--quick"]):
        quick = report.read_options(bench.Options, bench.QUICK, args)
        assert quick == bench.Options(**bench.QUICK | {"quick": True, "rounds": 5})


def test_forked_ranks_are_refused_if_a_gpu_is_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES="):
        run_ranks(1, print)


def test_a_number_of_layers_that_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match="--num-layers 6"):
        train_overhead.main(train_overhead.Options(num_layers=6))


def test_live_bytes_count_only_storages_created_while_active():
    weight = torch.ones(100, 10, requires_grad=True)
    existing = torch.zeros(100)
    counter = LiveBytes()
    with counter:
        existing.add_(1)  # in-place operations and views create no storage
        existing[:10].view(2, 5)
        assert counter.peak == 0
        with counter.marked():
            logits = weight * 2  # 4,000 bytes, released below
            probabilities = logits.exp()  # 4,000 bytes, kept for the backward pass
        del logits
        loss = probabilities.sum()
        del probabilities
        assert counter.marked_peak == 8000
        assert 8000 <= counter.peak < 8100
        third = torch.ones(100, 10)  # in addition to the 4,000 bytes that the graph keeps
        assert 8000 <= counter.peak < 8100
        loss.backward()
        del third, loss
    assert counter.marked_peak == 8000


def test_a_ratio_of_medians_has_the_quartiles_of_rounds():
    ratio = report.ratio_of_medians([2.0, 4.0, 6.0], [1.0, 1.0, 3.0])
    assert ratio == (4.0, 2.0, 3.0)
    assert report.ratio_of_medians([3.0], [2.0]) == (1.5, 1.5, 1.5)


@pytest.fixture
def pieces() -> Pieces:
    """A layer takes 1 + 2, and each head, including the final one, 1 + 1.5."""
    head = PieceCost(1.0, 1.5)
    return Pieces(PieceCost(1.0, 2.0), PieceCost(0.0, 0.0), head, head)


def test_exits_on_middle_stages_cost_no_time(pieces):
    """Check EE-LLM's claim in simulation: these exits run while their stage would be idle."""
    standard, naive, both = (makespan(SIZES, v, 4, pieces) for v in (STANDARD, NAIVE, BOTH))
    assert both == pytest.approx(standard)
    assert naive > standard


def test_the_best_split_has_fewer_layers_on_a_stage_with_a_costly_exit(pieces):
    costly = replace(pieces, final=PieceCost(2.0, 4.0))
    split = best_split(SIZES, STANDARD, 4, costly)
    assert sum(split) == SIZES.num_layers
    assert split[-1] == 1
    assert makespan(SIZES, STANDARD, 4, costly, split) < makespan(SIZES, STANDARD, 4, costly)


def test_stage_costs_are_the_sums_of_their_pieces():
    pieces = Pieces(
        PieceCost(1, 2, 0.5),
        PieceCost(0.5, 0.25),
        PieceCost(3, 4, 2),
        PieceCost(5, 6, 3),
        communication=0.1,
    )
    stages = pieces.costs(make_config(SIZES, BOTH, 4)).stages
    assert [stage.forward for stage in stages] == [2.5, 2, 2, 2]
    assert [stage.backward for stage in stages] == [4.25, 4, 4, 4]
    assert [stage.weight for stage in stages] == [1, 1, 1, 1]
    assert [stage.exits for stage in stages] == [(), ((3, 4, 2),), ((3, 4, 2),), ((5, 6, 3),)]
    post = pieces.costs(make_config(SIZES, DEFERRED, 4)).stages
    assert [stage.exits for stage in post] == [((3, 4, 2),), ((3, 4, 2),), (), ((5, 6, 3),)]


def test_median_pieces_have_the_median_of_each_cost():
    def pieces(n: float) -> Pieces:
        heads = (PieceCost(n, -n, n / 2) for _ in range(3))
        return Pieces(PieceCost(n, -n, 2 * n), *heads, communication=n)

    assert median_pieces([pieces(n) for n in (1.0, 5.0, 2.0)]) == pieces(2.0)


def test_a_token_takes_six_flops_per_weight_of_a_product():
    config = make_throughput_config(Options(seq_length=64))
    layer = 4 * 288 * 288 + 3 * 288 * 768
    expected = 6 * (8 * layer + 288 * 4096) + 6 * 8 * 288 * 64
    assert flops_per_token(config) == expected
