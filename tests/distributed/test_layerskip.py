"""Layer dropout, weights by depth and curricula do not depend on the layout, and resume exactly."""

from pathlib import Path

import pytest
import torch

from ee_llm import distributed
from ee_llm.config import load_config
from ee_llm.training.optimizer import build_optimizer, take_step
from ee_llm.training.parallel import ParallelModel
from ee_llm.training.schedule import exit_weights
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    assert_equal_bits,
    layout,
    losses_of,
    tensors_of,
    train_ranks,
    training_log,
)
from tests.distributed.runs import make_config as run_config
from tests.distributed.test_parallel_parity import (
    compare,
    losses_and_gradients,
    make_batches,
    make_config,
    unsharded_gradients,
)
from tests.distributed.zero_runs import BACKENDS, needs_deepspeed

ROOT = Path(__file__).resolve().parents[2]
SINGLE = (1, 1, 1, False)
DROPOUT = {"layer_dropout.max_probability": 0.6}
DEPTH = {
    "exits.boundaries": "all",
    "exits.weights": (),
    "exits.weighting": "depth",
    "exits.depth_scale": 0.5,
    "exits.norm": "shared",
}
ROTATION = DEPTH | {"exits.curriculum": "rotational", "exits.rotation_interval": 2}
VARIANTS = {
    "dropout": DROPOUT,
    "dropout of the whole batch": {"layer_dropout.max_probability": 0.99},
    "dropout, mlp heads, resets": DROPOUT
    | {"exits.head": ("mlp", "norm"), "data.reset_positions": True},
    "dropout, gpt, full recomputation": DROPOUT
    | {"model.family": "gpt", "training.recompute": "full"},
    "layerskip": DROPOUT | ROTATION,
    "layerskip, gpt, pre, tied": DROPOUT
    | ROTATION
    | {"model.family": "gpt", "exits.placement": "pre", "model.tie_embeddings": True},
}
SPREADS = {
    "tp2": ((2, 1, 1, False), {}),
    "tp2-sp": ((2, 1, 1, True), {}),
    "pp2": ((1, 2, 1, False), {}),
    "pp2-vp2": ((1, 2, 1, False), {"parallel.virtual": 2}),
    "pp2-zb": ((1, 2, 1, False), {"parallel.schedule": "zero-bubble-exits"}),
    "dp2": ((1, 1, 2, False), {}),
    "pp2-dp2": ((1, 2, 2, False), {}),
    "tp2-pp2-sp": ((2, 2, 1, True), {}),
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("variant", VARIANTS, scope="module")
def test_gradients_equal_the_single_process(variant, spread):
    layout_, options = SPREADS[spread]
    micro_batch_size = 1 if layout_[2] == 1 else 2
    compare(VARIANTS[variant], layout_, micro_batch_size, torch.float64, 1e-9, options)


def test_microbatches_of_one_four_and_eight_drop_the_same_samples():
    for micro_batch_size in (1, 4, 8):
        compare(DROPOUT, SINGLE, micro_batch_size, torch.float64, 1e-9)


def test_dropout_changes_the_gradients_and_probability_zero_does_not():
    """A probability that drops no sample gives the plain gradients, bit for bit."""
    plain, zero, tiny, dropped = (
        run_ranks(1, losses_and_gradients, options, SINGLE, 2)[0]
        for options in (
            {},
            {"layer_dropout.max_probability": 0.0},
            {"layer_dropout.max_probability": 1e-300},
            DROPOUT,
        )
    )
    for losses, gradients in (zero, tiny):
        assert losses == plain[0]
        assert all((gradient == plain[1][name]).all() for name, gradient in gradients.items())
    assert dropped[0] != plain[0]


def _dropped_on_data_ranks() -> list[dict[int, list[int]]]:
    config = make_config(DROPOUT, (1, 1, 2, False), 2)
    grid = distributed.initialize(timeout_s=30)
    model = ParallelModel(config, grid, torch.float64)
    model.forward_backward(make_batches(config, grid), step=0)
    [stage] = model._on_data.values()
    return [{number: r.tolist() for number, r in kept.items()} for kept in stage.kept_rows]


def test_data_parallel_ranks_drop_different_samples():
    one, other = run_ranks(2, _dropped_on_data_ranks)
    assert one != other


def _evaluate() -> tuple[list[float], list[float]]:
    results = []
    grid = distributed.initialize(timeout_s=30)
    for options in (DROPOUT | ROTATION, DEPTH):
        config = make_config(options)
        model = ParallelModel(config, grid, torch.float64)
        model.forward_backward(make_batches(config, grid), step=0)
        results.append(model.evaluate([make_batches(config, grid)]).losses)
    return tuple(results)


def test_evaluation_drops_nothing_and_computes_all_exits():
    [(found, expected)] = run_ranks(1, _evaluate)
    assert found == expected
    assert sorted(found) == [1, 2, 3, 4]


def _computed(options: dict, pipeline: int, steps: int):
    """Return, for every step, the reported losses, the exits that ran, and their gradients."""
    config = make_config(options, (1, pipeline, 1, False))
    grid = distributed.initialize(pipeline=pipeline, timeout_s=30)
    model = ParallelModel(config, grid, torch.float64)
    ran: set[int] = set()
    for stage in model.stages:
        original = stage.exit_logits

        def logits(boundary, *args, original=original):
            ran.add(boundary)
            return original(boundary, *args)

        stage.exit_logits = logits
    results = []
    for step in range(steps):
        ran.clear()
        losses = model.forward_backward(make_batches(config, grid), step)
        gradients = {name: g.numpy() for name, g in unsharded_gradients(model).items()}
        results.append((losses, set(ran), gradients))
    return results


@pytest.mark.parametrize("deferred", [True, False], ids=["deferred", "naive"])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_exits_that_the_rotation_disables_are_not_computed(pipeline, deferred):
    """R = 2 over layers 1..3: layers 1 and 3, then layer 2 and the final one, 3."""
    options = ROTATION | {
        "exits.boundaries": (2, 3),
        "exits.output": "own",
        "exits.deferred": deferred,
    }
    ranks = run_ranks(pipeline, _computed, options, pipeline, 3)
    for step, expected in enumerate([{2, 4}, {3, 4}, {2, 4}]):
        assert set().union(*(rank[step][1] for rank in ranks)) == expected
        for rank in ranks:
            losses, _, gradients = rank[step]
            assert set(losses) == expected
            for name, gradient in gradients.items():
                if name.startswith("exits.") and name.endswith("output.weight"):
                    assert (gradient != 0).any() == (int(name.split(".")[1]) in expected)


def test_weights_of_a_run_are_those_of_the_equations():
    """L = 4, e_scale = 0.5: e = (0, 0.5, 1.5, 4.5)."""
    rotation = make_config(ROTATION)
    assert exit_weights(rotation, 0) == {3: 1.5 / 6, 4: 4.5 / 6}
    assert exit_weights(rotation, 1) == {2: 0.5 / 5, 4: 4.5 / 5}
    gradual = make_config(DEPTH | {"exits.curriculum": "gradual", "training.steps": 16})
    assert exit_weights(gradual, 1) == {4: 1.0}
    assert exit_weights(gradual, 2) == {3: 1.5 / 6, 4: 4.5 / 6}
    assert exit_weights(gradual, 4) == {2: 0.5 / 6.5, 3: 1.5 / 6.5, 4: 4.5 / 6.5}


def test_a_shared_norm_trains_with_the_gradients_of_all_exits():
    """Its gradient is the sum of those of separate norms."""
    own = run_ranks(1, losses_and_gradients, DEPTH | {"exits.norm": "own"}, SINGLE, 2)[0][1]
    shared = run_ranks(1, losses_and_gradients, DEPTH, SINGLE, 2)[0][1]
    names = [f"exits.{boundary}.norm.weight" for boundary in (1, 2, 3, 4)]
    total = sum(own[name] for name in names)
    assert not (own[names[1]] == own[names[3]]).all()
    for name in names:
        assert shared[name] == pytest.approx(total, rel=1e-12)


def _norms(pipeline: int) -> tuple[float, dict[str, float]]:
    """Return the gradient norm of a step, and the squared norm of each of this rank's gradients."""
    config = make_config(DEPTH, (1, pipeline, 1, False))
    grid = distributed.initialize(pipeline=pipeline, timeout_s=30)
    model = ParallelModel(config, grid, torch.float64)
    options = config.optimizer
    optimizer = build_optimizer(model.chunks, options, data_size=1, dtype=torch.float64)
    model.forward_backward(make_batches(config, grid), step=0)
    squares = {name: (g**2).sum().item() for name, g in unsharded_gradients(model).items()}
    return take_step(optimizer, clip_grad=0.0).grad_norm, squares


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_shared_norm_counts_once_in_the_gradient_norm(pipeline):
    ranks = run_ranks(pipeline, _norms, pipeline)
    squares = {name: square for _, part in ranks for name, square in part.items()}
    copies = [f"exits.{boundary}.norm.weight" for boundary in (1, 2, 3)]
    assert all(squares[name] > 0 for name in copies)
    expected = sum(square for name, square in squares.items() if name not in copies) ** 0.5
    assert all(norm == pytest.approx(expected, rel=1e-9) for norm, _ in ranks)


def _options(**others: object) -> dict[str, object]:
    values = {
        "exits.boundaries": "all",
        "exits.weights": (),
        "exits.weighting": "depth",
        "exits.norm": "shared",
        "exits.curriculum": "rotational",
        "exits.rotation_interval": 3,
        "layer_dropout.max_probability": 0.6,
        "layer_dropout.schedule": "exponential",
        "training.steps": 8,
    }
    return values | others


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, {}),
        (2, {"training.dtype": "bfloat16"}),
        (2, layout(2, 1, sequence=True)),
        (4, layout(1, 2) | {"training.dtype": "bfloat16"}),
    ],
    ids=["single", "dp2-bf16", "tp2-sp", "pp2-dp2-bf16"],
)
def test_resuming_is_bit_identical(tmp_path, corpus, world_size, options):
    """8 steps equal 5 and 3 more. Data-parallel ranks have a distributed optimizer."""
    values = _options(**options)
    straight = run_config(tmp_path / "straight", corpus, **values)
    [whole, *_] = train_ranks(world_size, straight)
    stopped = {"checkpoint.interval": 5, "checkpoint.keep_last": 1}
    config = run_config(tmp_path / "stopped", corpus, **values | stopped)
    train_ranks(world_size, config, _fail_in_step_6)
    [resumed, *_] = train_ranks(world_size, config)
    assert_equal_bits(whole, resumed)
    assert training_log(tmp_path / "straight") == training_log(tmp_path / "stopped")
    norms = [t for name, t in tensors_of(whole).items() if _is_norm(name)]
    assert len(norms) >= 4
    assert all(torch.equal(norm, norms[0]) for norm in norms)
    assert not torch.equal(norms[0], torch.ones_like(norms[0]))


def _is_norm(name: str) -> bool:
    return name.startswith("exits.") and name.endswith("norm.weight")


def _fail_in_step_6(model, step):
    if step == 6:
        raise ValueError("stopped by the test")


@pytest.mark.parametrize(
    ("world_size", "options"),
    [(2, {}), (2, layout(1, 2)), (2, layout(2, 1))],
    ids=["dp2", "pp2", "tp2"],
)
def test_a_run_takes_the_same_steps_on_other_layouts(tmp_path, corpus, world_size, options):
    one = run_config(tmp_path / "one", corpus, **_options())
    other = run_config(tmp_path / "other", corpus, **_options(**options))
    train_ranks(1, one)
    train_ranks(world_size, other)
    assert losses_of(tmp_path / "other") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-3)


@pytest.mark.parametrize("initialization", ["copy", "random"])
def test_a_run_that_continues_a_model_starts_with_its_final_norm(tmp_path, corpus, initialization):
    """All exits of a run with a shared norm must start equal, whatever exits the model had."""
    plain = run_config(tmp_path / "plain", corpus, **{"training.steps": 3})
    [model] = train_ranks(1, plain)
    options = {
        "checkpoint.initial": model,
        "exits.initialization": initialization,
        "exits.output": "tied",
        "training.steps": 1,
        "layer_dropout.schedule": "constant",
        "optimizer.lr": 1e-30,
        "optimizer.decay_steps": None,
        "optimizer.warmup_steps": 0,
        "exits.rotation_interval": 1,
        "exits.curriculum": "none",
    }
    [continued] = train_ranks(1, run_config(tmp_path / "on", corpus, **_options(**options)))
    final = tensors_of(model)["exits.4.norm.weight"]
    found = tensors_of(continued)
    for boundary in (1, 2, 3, 4):
        torch.testing.assert_close(found[f"exits.{boundary}.norm.weight"], final)


def test_the_example_trains(tmp_path, corpus):
    """examples/layerskip.toml, with smaller numbers."""
    small = {
        "output": str(tmp_path / "run"),
        "model.hidden_size": 48,
        "model.vocab_size": 258,
        "data.tokenizer": "bytes",
        "data.prefixes": (corpus,),
        "data.split": (0.8, 0.2, 0.0),
        "data.seq_length": 16,
        "training.steps": 8,
        "training.eval_interval": 4,
        "training.eval_steps": 1,
        "training.dtype": "float32",
        "optimizer.warmup_steps": 2,
        "logging.interval": 1,
    }
    config = load_config(ROOT / "examples" / "layerskip.toml", small)
    ends = train_ranks(2, config)
    assert all(end.endswith("step-00000008") for end in ends)
    seen = {name for _, name in losses_of(tmp_path / "run") if "loss" in name}
    assert seen == {"lm loss", *(f"exit {boundary} loss" for boundary in range(2, 8))}


@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero-2", "zero-3"])
def test_deepspeed_takes_the_same_steps_with_a_curriculum(tmp_path, corpus, engine):
    """It computes disabled exits too, because ZeRO needs a gradient of every parameter."""
    options = _options(**{"exits.norm": "own", "training.steps": 4})
    options = {name: value for name, value in options.items() if "dropout" not in name}
    train_ranks(2, run_config(tmp_path / "megatron", corpus, **options))
    train_ranks(2, run_config(tmp_path / "deepspeed", corpus, **options | BACKENDS[engine]))
    expected, found = losses_of(tmp_path / "megatron"), losses_of(tmp_path / "deepspeed")
    assert len(found) == 4 * 5
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
