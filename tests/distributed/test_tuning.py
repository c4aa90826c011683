"""EE-Tuning: what is trained and what is frozen, in any layout."""

import functools
import shutil
from pathlib import Path

import pytest
import torch

from ee_llm import distributed
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.checkpoint.read import TensorReader
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    assert_equal_bits,
    events,
    layout,
    log_of,
    losses_of,
    make_config,
    train_ranks,
    training_log,
)
from tests.distributed.test_parallel_parity import (
    make_batches,
    relative_error,
    unsharded_gradients,
)
from tests.distributed.test_parallel_parity import make_config as make_parity_config
from tests.distributed.tuning_runs import (
    SIX_LAYERS,
    TUNED,
    TWO_EXITS,
    dense_config,
    tune,
    tuning_config,
)

distributed.enable_megatron()
from ee_llm.training.parallel import ParallelModel

# (tensor, pipeline, data, sequence parallel); of four stages the second and third have no exit
LAYOUTS = {
    "pp2": (1, 2, 1, False),
    "pp4": (1, 4, 1, False),
    "tp2": (2, 1, 1, False),
    "tp2-sp": (2, 1, 1, True),
    "pp2-dp2": (1, 2, 2, False),
}
VARIANTS = {
    "norm heads, own outputs": {"exits.output": "own"},
    "mlp heads, tied": {"exits.head": ("mlp", "norm"), "exits.output": "tied"},
    "block heads, own, pre": {
        "exits.head": ("block", "norm"),
        "exits.output": "own",
        "exits.placement": "pre",
    },
    "gpt, mlp heads, shared, recomputed, dynamic weights, naive": {
        "model.family": "gpt",
        "exits.head": ("mlp", "norm"),
        "exits.output": "shared",
        "exits.dynamic_token_weights": True,
        "exits.temperatures": (2.0, 0.5),
        "exits.deferred": False,
        "training.recompute": "full",
        "data.reset_positions": True,
    },
}


def _gradients(variant, shape, micro_batch_size):
    """Return the losses and gradients of this rank by name."""
    tensor, pipeline, _, _ = shape
    config = make_parity_config(TWO_EXITS | variant, shape, micro_batch_size)
    grid = distributed.initialize(tensor=tensor, pipeline=pipeline, timeout_s=30)
    model = ParallelModel(config, grid, torch.float64)
    losses = model.forward_backward(make_batches(config, grid), step=0)
    assert not any(
        hasattr(parameter, "main_grad") or parameter.grad is not None
        for stage in model.stages
        for parameter in stage.parameters()
        if not parameter.requires_grad
    )
    return losses, {name: g.numpy() for name, g in unsharded_gradients(model).items()}


@functools.lru_cache(maxsize=1)
def full_model(items):
    """Train the full model in one process; the gradients of its exits equal those of tuning."""
    losses, gradients = run_ranks(1, _gradients, dict(items), (1, 1, 1, False), 2)[0]
    return losses, {n: g for n, g in gradients.items() if n.startswith(("exits.2", "exits.5"))}


@pytest.mark.parametrize("name", ["single", *LAYOUTS])
@pytest.mark.parametrize("variant", VARIANTS, scope="module")
def test_gradients_equal_those_of_full_training_in_any_layout(variant, name):
    """Only exits have gradients. These do not depend on whether the rest is trained, so that full
    training, which other tests check, is the reference for every layout.
    """
    options = VARIANTS[variant]
    losses, gradients = full_model(tuple(options.items()))
    shape = LAYOUTS.get(name, (1, 1, 1, False))
    world_size = shape[0] * shape[1] * shape[2]
    seen = set()
    for found_losses, found in run_ranks(world_size, _gradients, options | TUNED, shape, 1):
        assert found_losses == pytest.approx({b: losses[b] for b in (2, 5)}, rel=1e-9)
        for key, gradient in found.items():
            expected = torch.from_numpy(gradients[key])
            assert relative_error(torch.from_numpy(gradient), expected) < 1e-9, key
        seen |= set(found)
    assert seen == set(gradients)


def _built(config, world_size):
    shape = (1, world_size, 1, False)
    config = make_parity_config(config, shape, 1)
    grid = distributed.initialize(pipeline=world_size, timeout_s=30)
    [stage] = ParallelModel(config, grid, torch.float32).stages
    parameters = dict(stage.named_parameters())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    return sorted(parameters), sum(p.numel() for p in parameters.values()), trained


FOUR_EXITS = {
    **TUNED,
    "model.num_layers": 6,
    "exits.boundaries": (1, 2, 3, 5),
    "exits.output": "own",
    "tuning.exits": (1, 3),
}


def test_only_stages_up_to_the_last_tuned_exit_are_built_without_validation():
    """Layers and exits after it, and exits that are not tuned, take no memory."""
    options = FOUR_EXITS | {"exits.weights": (1.0,) * 4, "training.eval_interval": 0}
    ranks = run_ranks(3, _built, options, 3)
    layers = [{name.split(".")[1] for name in r[0] if name.startswith("layers.")} for r in ranks]
    exits = [{name.split(".")[1] for name in r[0] if name.startswith("exits.")} for r in ranks]
    assert layers == [{"1"}, {"2"}, {"3"}]
    assert exits == [{"1"}, set(), {"3"}]
    assert not any("output.weight" in r[0] for r in ranks)
    hidden, vocab, ffn = 16, 48, 24
    layer = hidden * (hidden + 2 * 8) + hidden * hidden + 3 * hidden * ffn + 2 * hidden
    head = hidden + vocab * hidden
    assert [r[1] for r in ranks] == [vocab * hidden + layer + head, layer, layer + head]
    assert [r[2] for r in ranks] == [head, 0, head]


def test_validation_needs_the_whole_model_but_not_the_other_exits():
    options = FOUR_EXITS | {"exits.weights": (1.0,) * 4}
    ranks = run_ranks(3, _built, options, 3)
    layers = [{name.split(".")[1] for name in r[0] if name.startswith("layers.")} for r in ranks]
    exits = [{name.split(".")[1] for name in r[0] if name.startswith("exits.")} for r in ranks]
    assert layers == [{"1"}, {"2"}, {"3", "4", "5", "6"}]
    assert exits == [{"1"}, set(), {"3", "6"}]


@pytest.fixture(scope="module")
def dense(tmp_path_factory, corpus):
    """Train a checkpoint without exits in float64 over two pipeline and two data ranks."""
    output = tmp_path_factory.mktemp("dense")
    train_ranks(4, dense_config(output, corpus, **layout(1, 2), **{"training.dtype": "float64"}))
    return output


RUNS = {
    "pp2": (2, layout(1, 2)),
    "pp4": (4, layout(1, 4)),
    "tp2-sp": (2, layout(2, 1, sequence=True)),
    "dp2": (2, layout(1, 1)),
    # megatron-core's distributed optimizer does not support float64
    "pp2-dp2-float32": (4, layout(1, 2) | {"training.dtype": "float32"}),
}
UNCLIPPED = {"optimizer.clip_grad": 0.0, "training.dtype": "float64"}
VALIDATED = UNCLIPPED | {"training.eval_interval": 5, "training.eval_steps": 2}


@pytest.fixture(scope="module")
def single_process(tmp_path_factory, corpus, dense):
    """Tune in one process, with validation."""
    output = tmp_path_factory.mktemp("single")
    tune(1, tuning_config(output, corpus, dense, **VALIDATED))
    return output


@pytest.mark.parametrize("name", RUNS)
def test_runs_do_not_depend_on_the_layout(tmp_path, corpus, dense, single_process, name):
    """Covers losses, validation and the checkpoint, from a partial load to the last step."""
    world_size, options = RUNS[name]
    tolerance = 1e-9 if "training.dtype" not in options else 1e-5
    tune(world_size, tuning_config(tmp_path, corpus, dense, **VALIDATED | options))

    def losses(output: Path):
        of_steps = {k: v for k, v in losses_of(output).items() if k[1] != "grad-norm"}
        [validation] = [line for line in log_of(output) if "exit 2 loss validation" in line]
        return of_steps | {k: v for k, v in validation.items() if k.endswith("validation")}

    assert losses(tmp_path) == pytest.approx(losses(single_process), rel=tolerance)
    assert len(losses(tmp_path)) == 5 * 2 + 5, "steps; the losses and agreement of a validation"
    found, expected = (TensorReader(output) for output in (tmp_path, single_process))
    assert found.names() == expected.names()
    for key in found.names():
        error = relative_error(found.tensor(key), expected.tensor(key))
        assert error < 100 * tolerance, f"{key}: relative error {error:.1e}"
    learnt = losses_of(tmp_path)
    assert learnt[5, "exit 5 loss"] < learnt[1, "exit 5 loss"] - 0.1


def assert_frozen(before: Path | str, after: Path | str, but: tuple[str, ...]) -> None:
    """Assert that all tensors except those of some exits are bit-identical in `after`."""
    one, other = TensorReader(before), TensorReader(after)
    names = [name for name in one.names() if not name.startswith(but)]
    assert len(names) > 20
    for name in names:
        assert one.dtype(name) == other.dtype(name)
        assert torch.equal(one.tensor(name), other.tensor(name)), name


def test_model_is_bit_identical_after_a_hundred_steps(tmp_path, corpus, dense):
    """With weight decay, dropout and a narrower dtype than the checkpoint's. The optimizer has no
    state of the model.
    """
    options = {"training.steps": 100, "training.dtype": "bfloat16", "model.dropout": 0.3}
    config = tuning_config(tmp_path, corpus, dense, **options, **layout(1, 2))
    end = tune(2, config)
    assert_frozen(dense, end, ("exits.2.", "exits.5."))
    reader = TensorReader(end)
    assert reader.dtype("layers.1.mlp.linear_fc1.weight") == torch.float64
    assert reader.dtype("exits.2.norm.weight") == torch.bfloat16
    state = reader.names(optimizer=True)
    assert len(state) == 3 * 2 * 2  # two moments and a master, for norm and output of two exits
    assert all(".exits.2." in name or ".exits.5." in name for name in state)
    assert losses_of(tmp_path)[100, "exit 5 loss"] < losses_of(tmp_path)[1, "exit 5 loss"] - 1


def test_frozen_layers_have_no_dropout(tmp_path, corpus, dense):
    """Exits train on the hidden states of inference."""
    for name, dropout in (("with", 0.5), ("without", 0.0)):
        config = tuning_config(tmp_path / name, corpus, dense, **{"model.dropout": dropout})
        tune(1, config)
    assert losses_of(tmp_path / "with") == losses_of(tmp_path / "without")


def test_tuning_an_exit_does_not_change_others(tmp_path, corpus, dense):
    """An exit is added, then another, then the first is tuned further; the rest is unchanged."""
    first = tuning_config(
        tmp_path / "1", corpus, dense, **{"exits.boundaries": (2,), "exits.weights": (1.0,)}
    )
    tune(1, first)
    assert_frozen(dense, tmp_path / "1", ("exits.2.",))
    tune(2, tuning_config(tmp_path / "2", corpus, tmp_path / "1", **{"tuning.exits": (5,)}))
    assert_frozen(tmp_path / "1", tmp_path / "2", ("exits.5.",))
    assert training_log(tmp_path / "2")[1].keys() >= {"exit 5 loss"}
    assert "exit 2 loss" not in training_log(tmp_path / "2")[1]
    options = {"tuning.exits": (2,), **layout(1, 2)}
    tune(2, tuning_config(tmp_path / "3", corpus, tmp_path / "2", **options))
    assert_frozen(tmp_path / "2", tmp_path / "3", ("exits.2.",))
    assert not torch.equal(
        *(TensorReader(tmp_path / n).tensor("exits.2.output.weight") for n in "23")
    )
    # The first exit continues from its own weights.
    fresh, again = (losses_of(tmp_path / n)[1, "exit 2 loss"] for n in "13")
    assert again < fresh - 0.1


def test_exits_tuned_together_equal_exits_tuned_separately(tmp_path, corpus, dense):
    """Without clipping, which depends on all gradients, exits are independent."""
    together = tuning_config(tmp_path / "both", corpus, dense, **UNCLIPPED)
    one_exit = {"exits.boundaries": (2,), "exits.weights": (0.3,)}
    tune(1, together)
    tune(1, tuning_config(tmp_path / "2", corpus, dense, **UNCLIPPED, **one_exit))
    names = ("exits.2.norm.weight", "exits.2.output.weight")
    one, other = TensorReader(tmp_path / "both"), TensorReader(tmp_path / "2")
    for name in names:
        assert relative_error(one.tensor(name), other.tensor(name)) < 1e-12


NOTHING_ON_THE_FIRST_STAGE = {
    "exits.boundaries": (5,),
    "exits.weights": (1.0,),
    "exits.head": ("block", "norm"),
    "training.dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, {"exits.dynamic_token_weights": True}),
        (4, layout(1, 4)),
        (4, layout(1, 2) | NOTHING_ON_THE_FIRST_STAGE),
        (2, layout(2, 1, sequence=True) | {"exits.head": ("mlp", "norm"), "exits.output": "tied"}),
    ],
    ids=["single", "pp4", "pp2-dp2-bf16", "tp2-sp"],
)
def test_resuming_equals_an_uninterrupted_run(tmp_path, corpus, dense, world_size, options):
    """Bit for bit, with dropout in the heads, even if the first checkpoint no longer exists."""
    source = tmp_path / "source"
    source.symlink_to(dense)
    options = {"model.dropout": 0.1, "training.dtype": "float32"} | options
    plain = tuning_config(tmp_path / "a", corpus, dense, **options, **{"training.steps": 6})
    tune(world_size, plain)
    half = tuning_config(tmp_path / "b", corpus, source, **options, **{"training.steps": 3})
    tune(world_size, half)
    source.unlink()
    rest = options | {"training.steps": 6, "checkpoint.keep_last": 1, "checkpoint.interval": 1}
    tune(world_size, tuning_config(tmp_path / "b", corpus, source, **rest))
    assert_equal_bits(tmp_path / "a", tmp_path / "b")
    assert training_log(tmp_path / "a") == training_log(tmp_path / "b")
    assert len(events(tmp_path / "b", "saved")) == 4


def _first_losses(tmp_path, corpus, checkpoint, name, **options):
    options = {**UNCLIPPED, "training.steps": 1, **options}
    tune(1, tuning_config(tmp_path / name, corpus, checkpoint, **options))
    return losses_of(tmp_path / name)


def test_copied_exits_start_like_their_source(tmp_path, corpus, dense):
    """An mlp head starts like the plain exit, a block before the last boundary like the model."""
    shared = {"exits.output": "shared"}
    plain = _first_losses(tmp_path, corpus, dense, "plain", **shared)
    mlp = _first_losses(tmp_path, corpus, dense, "mlp", **shared, **{"exits.head": ("mlp", "norm")})
    own = _first_losses(tmp_path, corpus, dense, "own", **{"exits.head": ("mlp", "norm")})
    block = _first_losses(
        tmp_path, corpus, dense, "block", **shared, **{"exits.head": ("block", "norm")}
    )
    random = _first_losses(tmp_path, corpus, dense, "random", **{"exits.initialization": "random"})
    for exit_ in ("exit 2 loss", "exit 5 loss"):
        assert mlp[1, exit_] == pytest.approx(plain[1, exit_], rel=1e-12)
        assert own[1, exit_] == pytest.approx(plain[1, exit_], rel=1e-12)
        assert abs(random[1, exit_] - plain[1, exit_]) > 0.01
    again = dense_config(
        tmp_path / "dense", corpus, **UNCLIPPED, **{"checkpoint.initial": str(dense)}
    )
    train_ranks(1, again)
    final = losses_of(tmp_path / "dense")[1, "lm loss"]
    assert block[1, "exit 5 loss"] == pytest.approx(final, rel=1e-12)


def test_tuned_checkpoint_is_compatible(tmp_path, corpus, dense):
    """Inference reads it, and full training starts from its parameters."""
    tuned = tmp_path / "tuned"
    tune(2, tuning_config(tuned, corpus, dense, **layout(1, 2), **{"training.dtype": "float64"}))
    model = ReferenceModel(TensorReader(tuned).config(), _tensors(tuned), torch.float64)
    logits = model.forward(torch.arange(10))
    assert set(logits) == {2, 5, 6}
    source = ReferenceModel(TensorReader(dense).config(), _tensors(dense), torch.float64)
    assert torch.equal(logits[6], source.forward(torch.arange(10))[6])

    options = {**SIX_LAYERS, **UNCLIPPED, **layout(1, 2), "exits.boundaries": (2, 5)}
    options |= {"exits.output": "own", "checkpoint.initial": str(tuned)}
    train_ranks(2, make_config(tmp_path / "trained", corpus, **options))
    found = losses_of(tmp_path / "trained")
    tune(1, tuning_config(tmp_path / "on", corpus, tuned, **UNCLIPPED))
    for exit_ in ("exit 2 loss", "exit 5 loss"):
        assert found[1, exit_] == pytest.approx(losses_of(tmp_path / "on")[1, exit_], rel=1e-9)
    assert len(TensorReader(tmp_path / "trained").names(optimizer=True)) == 2 * len(
        TensorReader(tuned).names()
    )


def _tensors(path):
    reader = TensorReader(path)
    return {name: reader.tensor(name) for name in reader.names()}


def _replace(there: Path, by: Path, model: ParallelModel, step: int) -> None:
    if step == 1:
        shutil.rmtree(there)
        shutil.copytree(by, there)


def test_replaced_checkpoint_is_not_saved_as_the_frozen_model(tmp_path, corpus, dense):
    """It is replaced between start and first save; the exits were not trained on its weights."""
    there, other = tmp_path / "dense", tmp_path / "other"
    shutil.copytree(dense, there)
    train_ranks(1, dense_config(other, corpus, **{"training.steps": 3, "training.seed": 5}))
    fault = functools.partial(_replace, there, other)
    [end] = train_ranks(1, tuning_config(tmp_path / "tuned", corpus, there), fault)
    assert "is not the model from which this run started" in end
    assert not list((tmp_path / "tuned").glob("checkpoints/step-????????"))
