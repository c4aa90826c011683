"""The trainer as a whole: its arithmetic, its layouts, stopping and going on, bad steps."""

import json
import math
import os
import signal

import pytest
import torch

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.data.batches import BatchShape, TrainingBatches
from ee_llm.data.dataset import RowOptions, open_blend
from ee_llm.inference.reference import ReferenceModel, load_reference
from ee_llm.training.inputs import open_data
from ee_llm.training.parallel import StageOnData
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    EOD,
    assert_equal_bits,
    events,
    layout,
    log_of,
    make_config,
    tensors_of,
    train_here,
    train_ranks,
    training_log,
    validation_log,
    write_corpus,
)

SIGTERM_STATUS = f"TrainingInterrupted: {128 + signal.SIGTERM}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def losses(output, steps=None):
    """The losses of every exit and the gradient norm, by (step, name)."""
    return {
        (step, name): value
        for step, line in training_log(output).items()
        for name, value in line.items()
        if ("loss" in name or name == "grad-norm") and (steps is None or step in steps)
    }


# The arithmetic.


def plain_training(config: Config, initial: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    """The same training as a plain loop: one model, one batch, torch's AdamW, all by hand."""
    weights = {name: tensor.double().requires_grad_() for name, tensor in initial.items()}
    model = ReferenceModel(config, weights, torch.float64)
    model._tensors = weights
    decayed = [w for w in weights.values() if w.dim() > 1]
    others = [w for w in weights.values() if w.dim() == 1]
    options = config.optimizer
    adam = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(options.beta1, options.beta2),
        eps=options.eps,
    )
    size = config.training.global_batch_size
    blend = open_blend(
        config.data.prefixes,
        "train",
        seq_length=config.data.seq_length,
        options=RowOptions(eod=EOD, vocab_size=config.model.vocab_size),
        seed=config.training.seed,
        split=config.data.split,
    )
    batches = TrainingBatches(blend, BatchShape(size, size))
    history = []
    for step in range(1, config.training.steps + 1):
        [batch] = next(batches)
        warm = min(1.0, (step - 1) / config.exits.schedule_steps)
        final = config.exits.weights
        exit_weights = [0.1 + warm * (weight - 0.1) for weight in final] + [1.0]
        sums = dict.fromkeys(model.boundaries, 0.0)
        for row in range(size):
            logits = model.forward(batch.tokens[row])
            for boundary in model.boundaries:
                token = torch.nn.functional.cross_entropy(
                    logits[boundary], batch.labels[row], reduction="none"
                )
                sums[boundary] = sums[boundary] + (token * batch.loss_mask[row]).sum()
        means = {b: total / batch.loss_mask.sum() for b, total in sums.items()}
        adam.zero_grad()
        sum(w * means[b] for w, b in zip(exit_weights, model.boundaries, strict=True)).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), options.clip_grad)
        for group in adam.param_groups:
            group["lr"] = options.lr * min(1.0, step / options.warmup_steps)
        adam.step()
        history.append({**{b: m.item() for b, m in means.items()}, "norm": norm.item()})
    return history


def _initial_weights(config):
    from ee_llm import platform
    from ee_llm.training.parallel import ParallelModel

    grid = platform.initialize()
    model = ParallelModel(config, grid, torch.float64)
    return {name: p.detach().numpy() for name, p in model.stages[0].named_parameters()}


def test_training_is_what_a_plain_loop_does(tmp_path, corpus):
    """Guards every factor at once: gradients of all microbatches once, exit weights from step 0,
    learning rates from step 1, decay groups, clipping, Adam, the order of the data.
    """
    config = make_config(
        tmp_path,
        corpus,
        **{
            "training.dtype": "float64",
            "optimizer.schedule": "constant",
            "optimizer.clip_grad": 0.5,
            "optimizer.weight_decay": 0.5,
            "exits.weight_schedule": "linear",
            "exits.initial_weights": (0.1, 0.1),
            "exits.schedule_steps": 3,
            "model.tie_embeddings": True,
        },
    )
    [initial] = run_ranks(1, _initial_weights, config)
    expected = plain_training(config, {n: torch.from_numpy(a) for n, a in initial.items()})
    train_ranks(1, config)
    assert any(line["norm"] > 0.5 for line in expected), "nothing is clipped"
    for step, line in training_log(tmp_path).items():
        wanted = expected[step - 1]
        found = {
            1: line["exit 1 loss"],
            2: line["exit 2 loss"],
            4: line["lm loss"],
            "norm": line["grad-norm"],
        }
        # megatron-core sums up the norm in float32, and clipping passes its rounding on.
        assert found.pop("norm") == pytest.approx(wanted.pop("norm"), rel=1e-6), f"step {step}"
        assert found == pytest.approx(wanted, rel=1e-7), f"step {step}"


LAYOUTS = {
    "pp2": (2, layout(1, 2)),
    "tp2": (2, layout(2, 1)),
    "dp2": (2, layout(1, 1)),
    "tp2-pp2-sp": (4, layout(2, 2, sequence=True)),
    "pp2-dp2": (4, layout(1, 2)),
    "tp2-dp2": (4, layout(2, 1)),
}


@pytest.fixture(scope="module")
def single_process(tmp_path_factory, corpus):
    output = tmp_path_factory.mktemp("single")
    train_ranks(1, make_config(output, corpus, **{"model.tie_embeddings": True}))
    return losses(output)


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_does_not_depend_on_the_layout(tmp_path, corpus, single_process, name):
    """Over several steps: sums of tied weights, norms that count a copy twice, optimizers that
    split their state, and what a step leaves behind for the next.
    """
    world_size, options = LAYOUTS[name]
    train_ranks(
        world_size, make_config(tmp_path, corpus, **options, **{"model.tie_embeddings": True})
    )
    found = losses(tmp_path)
    assert found == pytest.approx(single_process, rel=1e-5)
    assert len(found) == 5 * 4
    learnt = found[1, "lm loss"] - found[5, "lm loss"]
    assert learnt > 0.3, "the loss does not go down"


def test_bfloat16(tmp_path, corpus):
    """With float32 masters, over pipeline and data ranks, it stays close to float32."""
    train_ranks(1, make_config(tmp_path / "32", corpus, **{"training.steps": 12}))
    options = {"training.dtype": "bfloat16", "training.steps": 12, **layout(1, 2)}
    train_ranks(4, make_config(tmp_path / "16", corpus, **options))
    found, expected = losses(tmp_path / "16"), losses(tmp_path / "32")
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=0.1 if key[1] == "grad-norm" else 0.03), key
    assert found[12, "lm loss"] < found[1, "lm loss"] - 1


# Stopping and going on.


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
    ],
    ids=["single", "pp2", "tp2-dp2-bf16", "tp2-pp2-sp"],
)
def test_going_on_is_as_not_having_stopped(tmp_path, corpus, world_size, options):
    """20 steps equal 10, a signal on one rank, and 10 more: bit for bit, with dropout."""
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
    """Else the test above would not see a lost random generator."""
    for dropout in (0.0, 0.1):
        options = {"training.steps": 1, "model.dropout": dropout}
        train_ranks(1, make_config(tmp_path / str(dropout), corpus, **options))
    assert losses(tmp_path / "0.0") != losses(tmp_path / "0.1")


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory, corpus):
    output = tmp_path_factory.mktemp("four")
    options = {"training.steps": 6, "checkpoint.interval": 3, **layout(2, 2)}
    train_ranks(4, make_config(output, corpus, **options))
    return output


@pytest.mark.parametrize(
    ("world_size", "options"),
    [(1, {}), (2, layout(1, 2)), (2, layout(1, 1)), (4, layout(2, 1, sequence=True))],
    ids=["single", "pp2", "dp2", "tp2-dp2-sp"],
)
def test_going_on_under_another_layout(tmp_path, corpus, four_ranks, world_size, options):
    """Parameters, moments, step counts and the data's position, saved under TP2 x PP2."""
    source = four_ranks / "checkpoints" / "step-00000003"
    options = options | {"training.steps": 6, "checkpoint.resume": str(source)}
    train_ranks(world_size, make_config(tmp_path, corpus, **options))
    found = losses(tmp_path)
    assert found == pytest.approx(losses(four_ranks, steps=(4, 5, 6)), rel=1e-6)
    assert len(found) == 3 * 4


def _seen(config):
    """The tokens that one rank's training reads, without training on them."""
    seen = []

    def record(model, step):
        [stage] = model._on_data.values()
        seen.append([batch.tokens.tolist() for batch in stage.microbatches])

    train_here(config, record)
    return seen


def test_every_sample_is_read_once(tmp_path, corpus):
    """The position in the data is resumed exactly, skipped and interrupted steps included."""
    options = {"training.steps": 4, "checkpoint.interval": 2}
    [straight] = run_ranks(1, _seen, make_config(tmp_path / "a", corpus, **options))
    short = make_config(tmp_path / "b", corpus, **options | {"training.steps": 2})
    [first] = run_ranks(1, _seen, short)
    [second] = run_ranks(1, _seen, make_config(tmp_path / "b", corpus, **options))
    assert first + second == straight
    rows = [tuple(row[0]) for step in straight for row in step]
    assert len(set(rows)) == 16


def test_the_last_checkpoints_are_kept(tmp_path, corpus):
    options = {"checkpoint.interval": 1, "checkpoint.keep_last": 2}
    train_ranks(2, make_config(tmp_path, corpus, **options, **layout(1, 2)))
    names = sorted(os.listdir(tmp_path / "checkpoints"))
    assert names == ["latest", "step-00000004", "step-00000005"]
    assert len(events(tmp_path, "saved")) == 5


def test_a_finished_run_has_nothing_to_do(tmp_path, corpus, capfd):
    config = make_config(tmp_path, corpus, **{"training.steps": 1})
    [first] = train_ranks(1, config)
    before = tensors_of(first)
    capfd.readouterr()
    assert train_ranks(1, config) == [first]
    assert "nothing to do: training.steps = 1" in capfd.readouterr().err
    assert before.keys() == tensors_of(first).keys()
    assert len(training_log(tmp_path)) == 1


def test_the_precision_that_was_chosen_stays(tmp_path, corpus):
    """`auto` measures; another answer after a restart would not fit the checkpoint."""
    for chosen in ("bfloat16", "float32"):
        output = tmp_path / chosen
        train_ranks(
            1, make_config(output, corpus, **{"training.steps": 1, "training.dtype": chosen})
        )
        options = {"training.steps": 2, "training.dtype": "auto"}
        [end] = train_ranks(1, make_config(output, corpus, **options))
        assert end.endswith("step-00000002")
        assert TensorReader(end).config().training.dtype == chosen


def test_precision_auto_is_the_same_on_all_ranks(tmp_path, corpus):
    options = {"training.steps": 2, "training.dtype": "auto", **layout(1, 2)}
    [end, *_] = train_ranks(2, make_config(tmp_path, corpus, **options))
    assert TensorReader(end).config().training.dtype in ("float32", "bfloat16")


# Bad steps.


def _poison_gradient(steps, rank):
    def fault(model, here):
        if here in steps and model.grid.rank == rank:
            weights = dict(model.stages[0].named_parameters())
            layer = next(
                name for name in weights if name.endswith(".self_attention.linear_proj.weight")
            )
            weights[layer].main_grad[0, 0] = math.inf

    return fault


def _poison_loss(config, steps, rank):
    """Train with losses that are NaN at some steps (from 1) on one rank."""
    exit_loss, begin = StageOnData.exit_loss, StageOnData.begin
    began = [0]

    def count(self, microbatches, factors):
        began[0] += 1
        begin(self, microbatches, factors)

    def poisoned(self, microbatch, index, tap):
        loss = exit_loss(self, microbatch, index, tap)
        if began[0] in steps and os.environ["RANK"] == str(rank):
            boundary = self.stage.boundaries[index]
            self.sums[boundary] = self.sums[boundary] * math.nan
        return loss

    StageOnData.begin, StageOnData.exit_loss = count, poisoned
    return train_here(config)


def _checkpoints(output):
    return {
        int(path.name[-8:]): tensors_of(path)
        for path in directory.complete_steps(output / "checkpoints")
    }


def _same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["gradient", "loss"])
@pytest.mark.parametrize(
    ("world_size", "options"),
    [(2, layout(1, 2)), (2, layout(1, 1)), (2, layout(2, 1))],
    ids=["pp2", "dp2", "tp2"],
)
def test_a_bad_step_is_skipped_by_all(tmp_path, corpus, kind, world_size, options):
    """What is not finite on one rank changes nothing on any: no parameter, moment or count."""
    options = options | {"checkpoint.interval": 1, "model.tie_embeddings": True}
    config = make_config(tmp_path, corpus, **options)
    # Tensor ranks have one loss between them; the first one's is the one that is taken.
    rank = 0 if kind == "loss" and options["parallel.tensor"] == 2 else 1
    if kind == "gradient":
        train_ranks(world_size, config, _poison_gradient({3}, rank))
    else:
        run_ranks(world_size, _poison_loss, config, {3}, rank)
    saved = _checkpoints(tmp_path)
    assert sorted(saved) == [1, 2, 3, 4, 5]
    assert _same(saved[2], saved[3])
    for step in (1, 3, 4):
        assert not _same(saved[step], saved[step + 1])
    for tensors in saved.values():
        assert all(tensor.isfinite().all() for tensor in tensors.values())

    log = training_log(tmp_path)
    assert [log[step]["skipped iterations"] for step in range(1, 6)] == [0, 0, 1, 1, 1]
    [skipped] = events(tmp_path, "skipped")
    assert skipped["step"] == 3
    assert skipped["grad-norm"] is None
    poisoned = [name for name in skipped if "loss" in name and skipped[name] is None]
    assert bool(poisoned) == (kind == "loss")
    state = json.loads((tmp_path / "checkpoints/step-00000005/state.json").read_text())
    assert state["skipped_steps"] == 1
    assert state["consumed_samples"] == 5 * 4
    assert TensorReader(tmp_path).manifest["optimizer_steps"] == 4


def test_too_many_bad_steps_stop_the_run(tmp_path, corpus):
    """In a row, that is: two, a good one, then three. What is saved can be gone on from."""
    options = {"training.steps": 9, "training.max_bad_steps": 3, "checkpoint.interval": 1}
    config = make_config(tmp_path, corpus, **options, **layout(1, 2))
    bad = {2, 3, 5, 6, 7, 8}
    ends = train_ranks(2, config, _poison_gradient(bad, rank=1))
    for end in ends:
        assert end.startswith("TrainingStopped: 3 steps in a row (training.max_bad_steps)")
        assert f"saved in {tmp_path}/checkpoints/step-00000007" in end
        assert "optimizer.lr" in end
    saved = _checkpoints(tmp_path)
    assert max(saved) == 7
    assert _same(saved[4], saved[7])
    assert len(events(tmp_path, "stopped")) == 1
    [end, *_] = train_ranks(2, config)
    assert end.endswith("step-00000009")
    assert training_log(tmp_path)[9]["skipped iterations"] == 5
    assert all(tensor.isfinite().all() for tensor in tensors_of(end).values())


# Validation, and what is reported.


def _reference_losses(config, checkpoint):
    """The validation loss of every exit as the reference of inference has it, token by token."""
    _, validation = open_data(config, _Alone())
    model = load_reference(TensorReader(checkpoint))
    sums, count = dict.fromkeys(model.boundaries, 0.0), 0.0
    for batches in validation:
        for batch in batches:
            for tokens, labels, mask in zip(*batch[:3], strict=True):
                count += mask.sum().item()
                for boundary, logits in model.forward(tokens).items():
                    token = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                    sums[boundary] += (token * mask).sum().item()
    return {boundary: total / count for boundary, total in sums.items()}


class _Alone:
    data_rank, data_size = 0, 1


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", ("norm",)), ("gpt", ("mlp", "norm")), ("llama", ("block", "norm"))],
)
def test_inference_has_the_losses_of_training(tmp_path, corpus, family, head):
    """The trained stages and the reference of inference are one model, whatever ranks trained it.

    Names, splits and orders of tensors, rotations, exits: all of it must have been understood
    alike on both sides. The validation data end within a batch, and within a sequence.
    """
    options = {
        "model.family": family,
        "exits.head": head,
        "exits.temperatures": (1.5, 0.8),
        "model.dropout": 0.2,  # of training alone
        "training.eval_interval": 5,
        "training.eval_steps": 50,
        "training.global_batch_size": 6,
        **layout(2, 2),
    }
    config = make_config(tmp_path, corpus, **options)
    [end, *_] = train_ranks(4, config)
    found = validation_log(tmp_path)
    assert sorted(found) == [5]
    expected = _reference_losses(config, end)
    for boundary, loss in expected.items():
        name = "lm loss" if boundary == 4 else f"exit {boundary} loss"
        assert found[5][f"{name} validation"] == pytest.approx(loss, rel=1e-5)
        assert found[5][f"{name} validation ppl"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert len(set(expected.values())) == 3


def test_validation_does_not_depend_on_data_ranks(tmp_path, corpus):
    """The last global batch is not full: some rank has nothing but padding."""
    found = []
    for world_size in (1, 2, 4):
        options = {"training.steps": 1, "training.eval_interval": 1, "training.eval_steps": 100}
        output = tmp_path / str(world_size)
        train_ranks(world_size, make_config(output, corpus, **options))
        line = validation_log(output)[1]
        found.append({name: line[name] for name in line if "validation" in name})
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


def test_validation_can_be_off(tmp_path, corpus):
    for number, options in enumerate(({"data.split": (1.0, 0.0, 0.0)}, {})):
        interval = {"training.eval_interval": 1 - number, "training.steps": 1}
        train_ranks(1, make_config(tmp_path / str(number), corpus, **options, **interval))
        assert validation_log(tmp_path / str(number)) == {}


def test_the_first_step_does_not_count_in_the_speed(tmp_path, corpus):
    """It makes what the other steps find ready; its time would spoil the first figures."""
    train_ranks(1, make_config(tmp_path, corpus, **{"training.steps": 3}))
    lines = {line["step"]: line for line in log_of(tmp_path) if "learning-rate" in line}
    assert "tokens-per-second" not in lines[1]
    assert lines[2]["tokens-per-second"] > 0
    assert lines[3]["iteration-time"] > 0


# What one rank meets, all hear of.


def _unreadable_at(config, step, rank):
    if os.environ["RANK"] == str(rank):
        read = TrainingBatches.__next__
        count = [0]

        def fail(self):
            count[0] += 1
            if count[0] == step:
                raise OSError(5, "Input/output error", "corpus.bin")
            return read(self)

        TrainingBatches.__next__ = fail
    try:
        return train_here(config)
    except OSError as error:
        return f"OSError: {error}"


def test_data_that_one_rank_can_not_read(tmp_path, corpus):
    config = make_config(tmp_path, corpus, **layout(1, 2))
    ends = run_ranks(2, _unreadable_at, config, 3, 1)
    assert ends[1].startswith("OSError: [Errno 5] Input/output error")
    assert ends[0].startswith("ValueError: rank 1: OSError: [Errno 5] Input/output error")


def test_a_signal_during_validation(tmp_path, corpus):
    """Validation may take longer than the time that is given; it is left out."""
    options = {"training.steps": 4, "training.eval_interval": 2, **layout(1, 2)}
    ends = train_ranks(2, make_config(tmp_path, corpus, **options), _stop_at(2, 0, signal.SIGINT))
    assert ends == [f"TrainingInterrupted: {128 + signal.SIGINT}"] * 2
    assert directory.find_latest(tmp_path).name == "step-00000002"
    assert validation_log(tmp_path) == {}
