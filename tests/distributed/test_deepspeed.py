"""DeepSpeed as the engine: the same numbers and checkpoints as with megatron-core."""

import math

import pytest
import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.checkpoint.read import TensorReader
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    assert_equal_bits,
    events,
    layout,
    losses_of,
    make_config,
    train_here,
    training_log,
    validation_log,
)
from tests.distributed.tuning_runs import dense_config, tune, tuning_config
from tests.distributed.zero_runs import (
    BACKENDS,
    MODEL,
    all_numbers,
    assert_same_course,
    assert_same_end,
    needs_deepspeed,
    parts_held,
    run,
    trained,
)

distributed.enable_megatron()
from ee_llm.training.parallel import ParallelModel
from ee_llm.training.zero import model

pytestmark = needs_deepspeed
ZERO_2, ZERO_3 = BACKENDS["zero-2"], BACKENDS["zero-3"]
slow = pytest.mark.slow
FLOAT32 = 1e-4  # after some steps; with megatron-core one process and two differ by 1e-5 as well


@pytest.fixture(scope="module")
def megatron(tmp_path_factory, corpus):
    """Train in two processes with megatron-core and its distributed optimizer."""
    return run(tmp_path_factory.mktemp("megatron"), corpus)


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [
        ("zero-1", 2),
        ("zero-2-offload", 2),
        ("zero-3", 2),
        pytest.param("zero-3", 1, marks=slow),
        pytest.param("zero-1-offload", 2, marks=slow),
        pytest.param("zero-2", 2, marks=slow),
        pytest.param("zero-3-offload", 2, marks=slow),
        pytest.param("zero-2", 1, marks=slow),
    ],
)
def test_run_equals_that_of_megatron(tmp_path, corpus, megatron, engine, world_size):
    """In losses, gradient norms, validation, parameters and moments; some steps are clipped."""
    run(tmp_path, corpus, world_size, **BACKENDS[engine])
    assert_same_course(tmp_path, megatron, 1e-5)
    assert_same_end(tmp_path, megatron, FLOAT32)
    norms = [value for (_, name), value in losses_of(tmp_path).items() if name == "grad-norm"]
    assert max(norms) > 1.0  # optimizer.clip_grad
    [found], [expected] = (validation_log(output).values() for output in (tmp_path, megatron))
    keys = [name for name in expected if name.endswith("validation")]
    assert [found[key] for key in keys] == pytest.approx([expected[key] for key in keys], rel=1e-5)
    rates = [line["learning-rate"] for line in training_log(tmp_path).values()]
    assert rates == [line["learning-rate"] for line in training_log(megatron).values()]


VARIANTS = {
    "gpt, untied, recomputed": {
        "model.family": "gpt",
        "model.position": "learned",
        "model.num_kv_heads": 4,
        "model.tie_embeddings": False,
        "exits.output": "shared",
        "training.recompute": "full",
    },
    "own outputs of exits whose weight ends at 0, blocks": {
        "exits.head": ("block", "norm"),
        "exits.output": "own",
        "exits.dynamic_token_weights": True,
        "exits.initial_weights": (0.4, 0.5),
        "exits.weights": (0.0, 0.0),
        "exits.weight_schedule": "linear",
        "exits.schedule_steps": 2,
        "optimizer.clip_grad": 0.0,
        "data.mask_after_eos": True,
    },
}


@pytest.mark.parametrize(
    "engine",
    [pytest.param("zero-2", marks=slow), "zero-3", pytest.param("zero-3-offload", marks=slow)],
)
@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=slow) if "gpt" in name else name for name in VARIANTS]
)
def test_other_models(tmp_path, corpus, variant, engine):
    """An exit of weight 0 has gradients of 0, not those of the previous step (ZeRO-3)."""
    options = VARIANTS[variant]
    run(tmp_path / "megatron", corpus, **options)
    run(tmp_path / "zero", corpus, **options | BACKENDS[engine])
    assert_same_course(tmp_path / "zero", tmp_path / "megatron", 1e-5)
    assert_same_end(tmp_path / "zero", tmp_path / "megatron", FLOAT32)


def _held(config):
    groups = len(dist.distributed_c10d._world.pg_map)
    held = {}
    start = model.ZeroModel.start

    def observed(self):
        nonlocal groups
        groups = len(dist.distributed_c10d._world.pg_map)
        start(self)
        groups = len(dist.distributed_c10d._world.pg_map) - groups

    step = model.ZeroModel.take_step

    def counted(self):
        result = step(self)
        held.update(parts_held(self))
        return result

    model.ZeroModel.start, model.ZeroModel.take_step = observed, counted
    train_here(config)
    return held, groups


@pytest.mark.parametrize(
    "engine",
    [name if name in ("zero-1", "zero-3") else pytest.param(name, marks=slow) for name in BACKENDS],
)
def test_each_process_has_its_shard(tmp_path, corpus, engine):
    """All ZeRO stages shard moments, and stage 3 also parameters except norms.

    DeepSpeed creates no process group, to which the timeout would not apply.
    """
    config = make_config(tmp_path, corpus, **MODEL | BACKENDS[engine])
    ranks = run_ranks(2, _held, config, timeout_s=120)
    total = all_numbers(tmp_path)
    for held, new_groups in ranks:
        assert new_groups == 0
        assert held["moments"] == pytest.approx(total, rel=0.05)  # two moments, half of each
        share = 0.1 if "zero-3" in engine else 1.0
        assert held["parameters"] <= share * total


BFLOAT16 = {"training.dtype": "bfloat16"}


@pytest.mark.parametrize("engine", [pytest.param("zero-2", marks=slow), "zero-3"])
def test_bfloat16_has_float32_masters(tmp_path, corpus, engine):
    """Rounding differs if a weight is used twice, but the loss curve does not."""
    run(tmp_path / "megatron", corpus, **BFLOAT16)
    run(tmp_path / "zero", corpus, **BFLOAT16 | BACKENDS[engine])
    assert_same_course(tmp_path / "zero", tmp_path / "megatron", 0.02)
    found, expected = (TensorReader(tmp_path / name) for name in ("zero", "megatron"))
    assert found.names(optimizer=True) == expected.names(optimizer=True)
    for name in found.names():
        master = found.tensor(f"optimizer.state.fp32_param.{name}")
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), found.tensor(name))
    assert not torch.equal(master.bfloat16().float(), master)


GOING_ON = {
    "zero-1": BACKENDS["zero-1"],
    "zero-2-offload-bf16": BACKENDS["zero-2-offload"] | BFLOAT16,
    "zero-3": ZERO_3,
    "zero-3-bf16": ZERO_3 | BFLOAT16,
}


@pytest.mark.parametrize(
    "name", [n if n == "zero-3" else pytest.param(n, marks=slow) for n in GOING_ON]
)
def test_resuming_equals_an_uninterrupted_run(tmp_path, corpus, name):
    """Bit for bit, with dropout. Three processes have shards of unequal length (ZeRO-3 pads)."""
    options = GOING_ON[name] | {"model.dropout": 0.1, "training.eval_interval": 0}
    world_size = 3 if name == "zero-3" else 2
    options["training.global_batch_size"] = 2 * world_size
    run(tmp_path / "a", corpus, world_size, **options, **{"training.steps": 6})
    run(tmp_path / "b", corpus, world_size, **options, **{"training.steps": 3})
    run(tmp_path / "b", corpus, world_size, **options, **{"training.steps": 6})
    assert_equal_bits(tmp_path / "a", tmp_path / "b")
    assert training_log(tmp_path / "a") == training_log(tmp_path / "b")


@pytest.mark.parametrize("engine", [pytest.param("zero-2", marks=slow), "zero-3"])
@pytest.mark.parametrize("first", ["megatron", "deepspeed"])
def test_run_resumes_with_the_other_engine(tmp_path, corpus, engine, first):
    """With its moments and step counts, also with another number of processes."""
    steps = {"training.eval_interval": 0}
    run(tmp_path / "a", corpus, **steps, **{"training.steps": 6})
    halves = [{}, BACKENDS[engine]]
    if first == "deepspeed":
        halves.reverse()
    run(tmp_path / "b", corpus, 2, **steps | halves[0], **{"training.steps": 3})
    run(tmp_path / "b", corpus, 1, **steps | halves[1], **{"training.steps": 6})
    assert_same_course(tmp_path / "b", tmp_path / "a", 1e-5)
    assert_same_end(tmp_path / "b", tmp_path / "a", FLOAT32)


def test_checkpoints_are_compatible(tmp_path, corpus, megatron):
    """Inference reads them, and a pipeline resumes from them."""
    run(tmp_path / "zero", corpus, **ZERO_3)
    logits = []
    for output in (tmp_path / "zero", megatron):
        reader = TensorReader(output)
        tensors = {name: reader.tensor(name) for name in reader.names()}
        model = ReferenceModel(reader.config(), tensors, torch.float32)
        logits.append(model.forward(torch.arange(10)))
    assert set(logits[0]) == {1, 2, 4}
    for boundary, found in logits[0].items():
        torch.testing.assert_close(found, logits[1][boundary], rtol=1e-4, atol=1e-4)
    onwards = {"training.steps": 7, "training.eval_interval": 0, **layout(1, 2)}
    run(tmp_path / "zero", corpus, **onwards)
    assert training_log(tmp_path / "zero").keys() == set(range(1, 8))


BAD = 3  # the bad step


def _bad_step(config, what):
    """Train with non-finite gradients but finite losses on one rank, or with a non-finite loss."""
    seen = {"step": 0}
    original = model.ZeroModel.forward_backward

    def forward_backward(self, microbatches, step, spans=None):
        seen["step"] = step + 1
        return original(self, microbatches, step, spans)

    forward, sums = model.Losses.forward, model.exit_sums

    def losses(self, microbatch):
        loss = forward(self, microbatch)
        bad = what == "gradient" and seen["step"] == BAD and dist.get_rank() == 1
        return loss * math.inf if bad and self.training else loss

    def exit_sums(*arguments):
        found = sums(*arguments)
        bad = what == "loss" and seen["step"] == BAD
        return {b: each._replace(loss=math.inf) if bad else each for b, each in found.items()}

    model.ZeroModel.forward_backward = forward_backward
    model.Losses.forward, model.exit_sums = losses, exit_sums
    return train_here(config)


def _bad_megatron_step(config):
    original = ParallelModel.forward_backward

    def forward_backward(self, microbatches, step, spans=None):
        losses = original(self, microbatches, step, spans)
        if step + 1 == BAD:
            next(iter(self.stages[0].parameters())).main_grad.fill_(math.nan)
        return losses

    ParallelModel.forward_backward = forward_backward
    return train_here(config)


@pytest.mark.parametrize(
    ("engine", "what"),
    [
        pytest.param("zero-1", "loss", marks=slow),
        pytest.param("zero-1-offload", "gradient", marks=slow),
        pytest.param("zero-2", "gradient", marks=slow),
        ("zero-2-offload", "loss"),
        pytest.param("zero-2-bf16", "loss", marks=slow),
        ("zero-2-bf16", "gradient"),
        ("zero-3", "loss"),
        pytest.param("zero-3-offload", "gradient", marks=slow),
    ],
)
def test_bad_step_changes_nothing(tmp_path, corpus, engine, what):
    """Neither parameters, moments and step counts nor the gradients of the next step."""
    options = MODEL | {"training.eval_interval": 0}
    options |= BACKENDS.get(engine) or BACKENDS["zero-2"] | BFLOAT16
    ends = run_ranks(2, _bad_step, make_config(tmp_path / "zero", corpus, **options), what)
    assert len(events(tmp_path / "zero", "skipped")) == 1, ends
    plain = options | {"parallel.engine": "megatron"}
    plain |= {"deepspeed.zero_stage": 2, "deepspeed.offload_optimizer": False}
    run_ranks(1, _bad_megatron_step, make_config(tmp_path / "megatron", corpus, **plain))
    skipped = events(tmp_path / "megatron", "skipped") + events(tmp_path / "zero", "skipped")
    assert [line["step"] for line in skipped] == [BAD, BAD]
    steps = (BAD + 1, BAD + 2)
    tolerance = 0.02 if "bf16" in engine else 1e-5
    found, expected = (losses_of(tmp_path / name, steps) for name in ("zero", "megatron"))
    assert found == pytest.approx(expected, rel=tolerance)
    if "bf16" not in engine:
        assert_same_end(tmp_path / "zero", tmp_path / "megatron", FLOAT32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, corpus):
    """Train a checkpoint without exits."""
    output = tmp_path_factory.mktemp("dense")
    trained(2, dense_config(output, corpus))
    return output


@pytest.mark.parametrize(
    "engine",
    [pytest.param("zero-2", marks=slow), pytest.param("zero-2-offload", marks=slow), "zero-3"],
)
def test_tuning(tmp_path, corpus, dense, engine):
    """Only exits are trained and have optimizer state; the rest stays bit-identical."""
    options = {"training.eval_interval": 5, "training.eval_steps": 2}
    options |= {"exits.head": ("mlp", "norm"), "tuning.exits": (2, 5)}
    tune(2, tuning_config(tmp_path / "megatron", corpus, dense, **options))
    options |= BACKENDS[engine]
    tune(2, tuning_config(tmp_path / "zero", corpus, dense, **options))
    assert_same_course(tmp_path / "zero", tmp_path / "megatron", 1e-5)
    assert_same_end(tmp_path / "zero", tmp_path / "megatron", FLOAT32)
    before, after = TensorReader(dense), TensorReader(tmp_path / "zero")
    assert len(before.names()) > 20
    for name in before.names():
        assert torch.equal(before.tensor(name), after.tensor(name)), name
    state = after.names(optimizer=True)
    assert state
    assert all(".exits.2." in name or ".exits.5." in name for name in state)
    rest = options | {"training.steps": 7, "training.eval_interval": 0}
    tune(2, tuning_config(tmp_path / "zero", corpus, dense, **rest))
    assert training_log(tmp_path / "zero").keys() == set(range(1, 8))


def _full_disk(config):
    from ee_llm.checkpoint import write

    append, count = write._append, [0]

    def full(file, block):
        count[0] += 1
        if count[0] == 7:
            raise OSError(28, "No space left on device")
        return append(file, block)

    write._append = full
    try:
        return train_here(config)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def test_full_disk_ends_all_ranks(tmp_path, corpus):
    """The other ranks do not wait for tensors that rank 0 no longer writes."""
    config = make_config(tmp_path, corpus, **MODEL | ZERO_3)
    ends = run_ranks(2, _full_disk, config, timeout_s=60)
    assert all("No space left on device" in end and "cannot save" in end for end in ends), ends
    assert not list((tmp_path / "checkpoints").glob("step-*"))
