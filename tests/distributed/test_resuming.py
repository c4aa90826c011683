"""Stopping and resuming equals an uninterrupted run, in the same layout or another."""

import json
import os
import signal

import pytest

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import TensorReader
from ee_llm.training import trainer
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    assert_equal_bits,
    events,
    layout,
    log_of,
    losses_of,
    make_config,
    tensors_of,
    train_here,
    train_ranks,
    training_log,
    validation_log,
)

SIGTERM_STATUS = f"TrainingInterrupted: {128 + signal.SIGTERM}"


# The smallest pipeline that fits a filling microbatch in warm-up and cool-down.
FILLED = layout(1, 3) | {
    "parallel.layer_split": (1, 1, 2),
    "parallel.fill_warmup": 1,
    "parallel.fill_cooldown": 1,
}


# A weight on both stages, with sizes at which megatron-core would pad a separate gradient bucket of
# this weight.
ONE_TIED_EXIT = {
    "exits.boundaries": (3,),
    "exits.weights": (0.5,),
    "training.dtype": "bfloat16",
}


def _stop_at(step, rank, number=signal.SIGTERM):
    def fault(model, here):
        if here == step and model.grid.rank == rank:
            os.kill(os.getpid(), number)

    return fault


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, {}),
        (2, layout(1, 2)),
        (4, layout(2, 1) | {"training.dtype": "bfloat16"}),
        (4, layout(2, 2, sequence=True)),
        (4, layout(1, 2) | {"parallel.virtual": 2}),
        (
            2,
            layout(1, 2) | {"parallel.schedule": "zero-bubble-exits", "training.dtype": "bfloat16"},
        ),
        (3, FILLED),
        (4, layout(1, 2) | ONE_TIED_EXIT),
    ],
    ids=[
        "single",
        "pp2",
        "tp2-dp2-bf16",
        "tp2-pp2-sp",
        "vp2-pp2-dp2",
        "zb-bf16",
        "filled",
        "pp2-dp2-bf16",
    ],
)
def test_resuming_equals_an_uninterrupted_run(tmp_path, corpus, world_size, options):
    """20 steps equal 10, a signal on one rank, and 10 more, bit for bit, with dropout."""
    options = options | {
        "training.steps": 20,
        "model.dropout": 0.1,
        "training.eval_interval": 8,
        "training.eval_steps": 1,
    }
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    [whole, *_] = train_ranks(world_size, make_config(straight, corpus, **options))

    config = make_config(stopped, corpus, **options)
    ends = train_ranks(world_size, config, _stop_at(10, rank=world_size - 1))
    assert ends == [SIGTERM_STATUS] * world_size
    assert directory.find_latest(stopped).name == "step-00000010"
    assert [line["signal"] for line in events(stopped, "interrupted")] == ["SIGTERM"]
    [resumed, *_] = train_ranks(world_size, config)

    assert whole.endswith("step-00000020")
    assert resumed.endswith("step-00000020")
    assert_equal_bits(whole, resumed)
    assert training_log(stopped) == training_log(straight)
    assert len(training_log(stopped)) == 20
    for step, line in validation_log(straight).items():
        again = validation_log(stopped)[step]
        assert {**again, "time": 0} == {**line, "time": 0}


def test_dropout_is_on(tmp_path, corpus):
    """Otherwise the test above would not notice a lost random generator."""
    for dropout in (0.0, 0.1):
        options = {"training.steps": 1, "model.dropout": dropout}
        train_ranks(1, make_config(tmp_path / str(dropout), corpus, **options))
    assert losses_of(tmp_path / "0.0") != losses_of(tmp_path / "0.1")


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory, corpus):
    output = tmp_path_factory.mktemp("four")
    options = {"training.steps": 6, "checkpoint.interval": 3, **layout(2, 2)}
    train_ranks(4, make_config(output, corpus, **options))
    return output


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, {}),
        (2, layout(1, 2)),
        (2, layout(1, 1)),
        (4, layout(2, 1, sequence=True)),
        (2, layout(1, 2) | {"parallel.virtual": 2}),
        (2, layout(1, 2) | {"parallel.schedule": "zero-bubble"}),
    ],
    ids=["single", "pp2", "dp2", "tp2-dp2-sp", "vp2-pp2", "zb-pp2"],
)
def test_resuming_in_another_layout(tmp_path, corpus, four_ranks, world_size, options):
    """Covers parameters, moments, step counts and the data's position, saved with TP2 x PP2."""
    source = four_ranks / "checkpoints" / "step-00000003"
    options = options | {"training.steps": 6, "checkpoint.resume": str(source)}
    train_ranks(world_size, make_config(tmp_path, corpus, **options))
    found = losses_of(tmp_path)
    assert found == pytest.approx(losses_of(four_ranks, steps=(4, 5, 6)), rel=1e-6)
    assert len(found) == 3 * 4


def _seen(config):
    """Return the tokens that one rank reads, without training on them."""
    seen = []

    def record(model, step):
        [stage] = model._on_data.values()
        seen.append([batch.tokens.tolist() for batch in stage.microbatches])

    train_here(config, record)
    return seen


def test_every_sample_is_read_once(tmp_path, corpus):
    """The position in the data is exact, also after skipped and interrupted steps."""
    options = {"training.steps": 4, "checkpoint.interval": 2}
    [straight] = run_ranks(1, _seen, make_config(tmp_path / "a", corpus, **options))
    short = make_config(tmp_path / "b", corpus, **options | {"training.steps": 2})
    [first] = run_ranks(1, _seen, short)
    [second] = run_ranks(1, _seen, make_config(tmp_path / "b", corpus, **options))
    assert first + second == straight
    rows = [tuple(row[0]) for step in straight for row in step]
    assert len(set(rows)) == 16


def test_filling_microbatches_are_read_in_order_and_once(tmp_path, corpus):
    """Steps of 4 + 2 samples read the same samples as more steps without filling."""
    plain = {"training.steps": 6, "training.global_batch_size": 4}
    [expected] = run_ranks(1, _seen, make_config(tmp_path / "plain", corpus, **plain))
    config = make_config(tmp_path / "filled", corpus, **FILLED | {"training.steps": 4})
    for found in run_ranks(3, _seen, config):
        assert [len(step) for step in found] == [6] * 4
        assert [row for step in found for row in step] == [row for step in expected for row in step]
    state = directory.find_latest(tmp_path / "filled") / "state.json"
    assert json.loads(state.read_text())["consumed_samples"] == 24


def test_the_last_checkpoints_are_kept(tmp_path, corpus):
    options = {"checkpoint.interval": 1, "checkpoint.keep_last": 2}
    train_ranks(2, make_config(tmp_path, corpus, **options, **layout(1, 2)))
    names = sorted(os.listdir(tmp_path / "checkpoints"))
    assert names == ["latest", "step-00000004", "step-00000005"]
    assert len(events(tmp_path, "saved")) == 5


def test_finished_run_has_nothing_to_do(tmp_path, corpus, capfd):
    config = make_config(tmp_path, corpus, **{"training.steps": 1})
    [first] = train_ranks(1, config)
    before = tensors_of(first)
    capfd.readouterr()
    assert train_ranks(1, config) == [first]
    assert "nothing to do: training.steps = 1" in capfd.readouterr().err
    assert before.keys() == tensors_of(first).keys()
    assert len(training_log(tmp_path)) == 1


def test_chosen_dtype_is_kept(tmp_path, corpus):
    """The option "auto" measures; another result after a restart would not fit the checkpoint."""
    for chosen in ("bfloat16", "float32"):
        output = tmp_path / chosen
        train_ranks(
            1, make_config(output, corpus, **{"training.steps": 1, "training.dtype": chosen})
        )
        options = {"training.steps": 2, "training.dtype": "auto"}
        [end] = train_ranks(1, make_config(output, corpus, **options))
        assert end.endswith("step-00000002")
        assert TensorReader(end).config().training.dtype == chosen


def test_automatic_dtype_is_equal_on_all_ranks(tmp_path, corpus):
    options = {"training.steps": 2, "training.dtype": "auto", **layout(1, 2)}
    [end, *_] = train_ranks(2, make_config(tmp_path, corpus, **options))
    assert TensorReader(end).config().training.dtype in ("float32", "bfloat16")


def test_signal_during_validation(tmp_path, corpus):
    """The run validates when it is resumed, because a validation may take too long.

    The same holds if it is interrupted there again, and for the validation of the last step.
    """
    options = {"training.steps": 4, "training.eval_interval": 2, **layout(1, 2)}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train_ranks(2, make_config(straight, corpus, **options))
    config = make_config(stopped, corpus, **options)
    for step in (2, 4):
        ends = train_ranks(2, config, _stop_at(step, 0, signal.SIGINT))
        assert ends == [f"TrainingInterrupted: {128 + signal.SIGINT}"] * 2
        assert directory.find_latest(stopped).name == f"step-0000000{step}"
        assert step not in validation_log(stopped)
        ends = run_ranks(2, _train_stopped_at_once, config)
        assert ends == [f"TrainingInterrupted: {128 + signal.SIGINT}"] * 2
        assert step not in validation_log(stopped)
    train_ranks(2, config)
    train_ranks(2, config)  # there is nothing to do
    names = ("lm loss validation", "exit 1 loss validation")
    found, expected = (
        [(line["step"], [line[name] for name in names]) for line in log_of(run) if names[0] in line]
        for run in (stopped, straight)
    )
    assert found == expected
    assert [step for step, _ in found] == [2, 4]


def _train_stopped_at_once(config):
    announce = trainer._Trainer.announce

    def announce_and_stop(self):
        announce(self)
        self.signals.received = signal.SIGINT

    trainer._Trainer.announce = announce_and_stop
    return train_here(config)
