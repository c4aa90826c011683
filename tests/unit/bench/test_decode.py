"""Test that the decoding benchmark runs, writes its figures and rejects invalid options."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.data.indexed import IndexedWriter
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import SelfSpeculation
from ee_llm.inference.verification.reference_decoding import generate_reference
from tests.unit.inference.models import random_tensors, random_tokens, save_model, tiny_config
from tools.bench import decode, report
from tools.bench.decode_model import open_model
from tools.bench.decode_pipeline import Result, mean_stages
from tools.bench.decode_quality import depth_of
from tools.bench.decode_rows import (
    DEFERRED,
    EXACT,
    FULL,
    PEER,
    PROPAGATE,
    SELF_SPECULATIVE,
    TRUNCATED,
)
from tools.bench.decode_setup import Options

pytestmark = pytest.mark.thorough

BENCH = Path(__file__).resolve().parents[3] / "tools" / "bench" / "decode.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run directory like that of the quick start, with checkpoint and data."""
    output = tmp_path_factory.mktemp("run")
    config = tiny_config()
    data = {"prefixes": (str(output / "elsewhere" / "corpus"),), "split": (0.5, 0.5, 0.0)}
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    save_model(output, config, random_tensors(config, dtype=torch.float32))
    (output / "data").mkdir()
    with IndexedWriter(output / "data" / "corpus", "uint16") as writer:
        writer.add(random_tokens(2400).tolist(), [600] * 4)
        writer.commit()
    return output


def test_shape_uses_random_weights(tmp_path):
    path = tmp_path / "decode.json"
    command = [sys.executable, str(BENCH), "--json", str(path), "--quick", "--no-peers"]
    command += ["--shape", "llama-tiny", "--thresholds", "0.001", "--batches", "1"]
    command += ["--prompt-tokens", "6", "--new-tokens", "4", "--rounds", "1"]
    command += ["--attention", "plain", "--cuda-graphs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(path.read_text())["figures"]
    assert figures["certificate_pass_rate"] == 1.0
    assert "pp2_latency_efficiency" not in figures
    without = [word for word in command if word not in ("--thresholds", "0.001")]
    done = subprocess.run(without, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "--shape llama-tiny has random weights and needs --thresholds" in done.stderr


def test_prompts_come_from_the_validation_data_in_the_run_directory(trained):
    model = open_model(trained)
    assert model.text == random_tokens(2400)[1200:].tolist()


def test_the_benchmark_writes_its_figures(trained, tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "decode.json"
    command = [sys.executable, str(BENCH), "--json", str(path), "--quick"]
    command += ["--checkpoint", str(trained), "--batches", "1", "8", "16", "32"]
    command += ["--prompt-tokens", "6", "--new-tokens", "12", "--rounds", "1", "--dtype", "float64"]
    command += ["--thresholds", "0.3", "off", "--draft-length", "2", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert set(written) == {"machine", "rows", "figures"}
    figures = written["figures"]
    assert set(figures) == {
        "full_vs_hf_b1",
        "full_vs_hf_b16",
        "exact_efficiency_b1",
        "exact_regime_efficiency_b8",
        "exact_regime_efficiency_b16",
        "exact_regime_efficiency_b32",
        "exact_vs_full_min",
        "exact_vs_full_steady_min",
        "verify_vs_hf_assisted_b1",
        "certificate_pass_rate",
        "divergence_rate",
        "pp2_latency_efficiency",
    }
    assert all(math.isfinite(value) for value in figures.values())
    # In float64 nothing may diverge, and self-speculative generates the dense model's text.
    assert figures["certificate_pass_rate"] == 1.0
    assert figures["divergence_rate"] == 0.0
    rows = [row for row in written["rows"] if "side" in row]
    for row in rows:
        if row["side"] in (FULL, SELF_SPECULATIVE, PEER):
            assert (row["agreement"], row["common_prefix"]) == (1.0, 12.0)
        if row["side"] in (EXACT, DEFERRED):
            assert 1.0 < row["mean_depth"] < 4.0
            assert row["heads_per_token"] > 1.0
    depths = {
        row["mean_depth"] for row in rows if row["side"] in (EXACT, DEFERRED) and row["batch"] > 8
    }
    assert len(depths) <= 2  # deferral changes no exit
    names = [row["name"] for row in written["rows"] if "name" in row]
    assert names[:2] == ["exits by confidence", "exits at random rows"]
    assert "exits at random rows" in done.stdout


def test_explicit_options_take_precedence_over_quick():
    plain = report.read_options(Options, decode.QUICK, [])
    assert plain == Options()
    quick = report.read_options(Options, decode.QUICK, ["--rounds", "5", "--quick"])
    assert quick == Options(**decode.QUICK | {"quick": True, "rounds": 5})


def test_the_error_for_a_missing_checkpoint_says_how_to_train_one(tmp_path):
    with pytest.raises(ValueError, match=r"quickstart\.sh"):
        decode.main(Options(checkpoint=tmp_path / "none"))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"new_tokens": 30, "prompt_tokens": 6}, "max_seq_length = 32"),
        ({"batches": ()}, "--batches"),
        ({"batches": (0,)}, "--batches"),
        ({"rounds": 0}, "--rounds 0"),
        ({"new_tokens": 1}, "--new-tokens 1"),
        ({"draft_length": 0}, "--draft-length 0"),
        ({"thresholds": ("off",)}, "no exit is in use"),
        ({"thresholds": (2.0,)}, "2.0"),
        ({"batches": (101,)}, "do not fit"),
    ],
)
def test_errors_name_invalid_options(trained, given, named):
    options = {
        "new_tokens": 4,
        "prompt_tokens": 6,
        "batches": (1,),
        "thresholds": (0.3,),
    } | given
    with pytest.raises(ValueError, match=named):
        decode.prepare(Options(checkpoint=trained, dtype="float64", peers=False, **options))


def test_each_side_uses_its_strategy_and_engine(trained):
    options = Options(
        checkpoint=trained,
        dtype="float64",
        peers=False,
        batches=(2,),
        prompt_tokens=6,
        new_tokens=6,
        thresholds=(0.3,),
        draft_length=2,
    )
    bench = decode.prepare(options)
    made = decode.sides(bench, 2)
    assert list(made) == [*decode.STRATEGIES, TRUNCATED]
    for side, strategy in decode.STRATEGIES.items():
        found = made[side](0)
        assert {one.strategy for one in found.trace.generations} == {strategy}
        assert all(len(tokens) == 6 for tokens in found.tokens)
    drafted = [
        len(token_range)
        for one in made[SELF_SPECULATIVE](1).trace.passes
        for token_range in one.scheduler_output.logit_rows
    ]
    assert max(drafted) == 1 + SelfSpeculation(1, 2).draft_length
    (depth,) = bench.truncated.boundaries
    assert depth == depth_of(bench.controls[0]) < 4
    shorter = made[TRUNCATED](0).trace.generations
    assert {exit for one in shorter for exit in one.exits} == {depth}
    # Each side has its own state of deferral, except those that never defer.
    states = [bench.deferrals.get(side) for side in (FULL, DEFERRED, SELF_SPECULATIVE, PROPAGATE)]
    assert len({id(one) for one in (*states, bench.engine.deferral)}) == 5
    assert bench.deferrals.get(EXACT) is bench.deferrals.get(TRUNCATED) is None


def test_a_token_waits_for_the_stages_up_to_its_exit():
    """With two stages of two layers, the exits after layers 1 and 2 are in the first stage."""
    config = tiny_config()
    generation = generate_reference(
        ReferenceModel(config, random_tensors(config), torch.float64),
        [1, 2, 3],
        make_exit_policy(config.exits.boundaries, [1e-9, None]),
        SamplingParams(max_tokens=4),
    )
    assert mean_stages(config, [generation]) == 1.0
    mixed = replace(generation, exits=(1, 2, 4, 4))
    assert mean_stages(config, [mixed]) == 1.5
    result = Result(full=[3.0, 4.0, 5.0], exact=[2.0, 2.0, 2.0], mean_stages=1.25)
    assert result.efficiency == pytest.approx(2.0 / (2 / 1.25))
