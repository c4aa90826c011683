"""Filled bubbles with the real model: the expected gradient is unchanged, partial visits work."""

import itertools

import pytest
import torch

from ee_llm import distributed
from tests.distributed.harness import run_ranks
from tests.distributed.test_parallel_parity import make_config, relative_error

distributed.enable_megatron()
from ee_llm.data import Microbatch
from ee_llm.training.parallel import ParallelModel

RANKS, ORDINARY = 3, 2
TIED = {
    "parallel.layer_split": (1, 1, 2),
    "exits.output": "tied",
    "model.tie_embeddings": True,
}


def microbatches(count: int) -> list[Microbatch]:
    """Return microbatches with uneven masks."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for number in range(count):
        tokens = torch.randint(0, 48, (1, 9), generator=generator)
        mask = torch.ones(1, 8)
        mask[0, : 2 * number] = 0
        made.append(Microbatch(tokens[:, :-1], tokens[:, 1:], mask, torch.arange(8)[None]))
    return made


def _model(grid, num_ordinary, **fills):
    options = {f"parallel.{name}": count for name, count in fills.items()}
    config = make_config(
        TIED | options | {"training.global_batch_size": num_ordinary}, (1, RANKS, 1, False), 1
    )
    return ParallelModel(config, grid, torch.float64)


def _gradients(model, batches):
    losses = model.forward_backward(batches, step=0)
    [stage] = model.stages
    return losses, {name: p.main_grad.clone() for name, p in stage.named_parameters()}


def _worst_bias(fills, mutate):
    """Return the largest relative error of the mean gradient over all assignments."""
    grid = distributed.initialize(pipeline=RANKS, timeout_s=30)
    count = ORDINARY + sum(fills.values())
    batches = microbatches(count)
    _, plain = _gradients(_model(grid, count), batches)
    model = _model(grid, ORDINARY, **fills)
    if mutate:
        model._scaling = type(model._scaling)(
            ((count / ORDINARY,) * count,) * RANKS, (1.0,) * RANKS
        )
    found = [
        _gradients(model, [batches[i] for i in order])[1]
        for order in itertools.permutations(range(count))
    ]
    return max(
        relative_error(torch.stack([g[name] for g in found]).mean(dim=0), expected)
        for name, expected in plain.items()
    )


@pytest.mark.parametrize(
    "fills",
    [
        {"fill_warmup": 1},
        {"fill_cooldown": 1},
        {"fill_warmup": 1, "fill_cooldown": 1},
    ],
    ids=["warm-up", "cool-down", "both"],
)
def test_mean_gradient_is_the_unscaled_one(fills):
    """This includes weights tied over all stages. Without rescaling the mean is biased."""
    assert max(run_ranks(RANKS, _worst_bias, fills, False)) < 1e-12
    assert max(run_ranks(RANKS, _worst_bias, fills, True)) > 1e-2


def _losses():
    grid = distributed.initialize(pipeline=RANKS, timeout_s=30)
    batches = microbatches(4)
    filled = _model(grid, ORDINARY, fill_warmup=1, fill_cooldown=1)
    losses, _ = _gradients(filled, batches)
    plain = _model(grid, 1)
    return losses, [plain.evaluate([[batch]]).losses for batch in batches]


def test_exits_report_the_mean_over_their_tokens():
    """The warm-up's fill ends on the first stage; the cool-down's trains only the last stage."""
    seen = {1: (0, 1, 2), 2: (0, 1), 4: (0, 1, 3)}
    tokens = [float(batch.loss_mask.sum()) for batch in microbatches(4)]
    for losses, singly in run_ranks(RANKS, _losses):
        for boundary, numbers in seen.items():
            total = sum(singly[m][boundary] * tokens[m] for m in numbers)
            expected = total / sum(tokens[m] for m in numbers)
            assert losses[boundary] == pytest.approx(expected, rel=1e-9), boundary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fill_warmup": 2},
            "parallel.fill_warmup = 2: the largest useful number is 1, not 2: the",
        ),
        ({"fill_cooldown": 2}, "parallel.fill_cooldown = 2: the largest useful number is 1, not 2"),
    ],
)
def test_too_many_fills_are_errors(options, message):
    with pytest.raises(Exception, match=message):
        run_ranks(RANKS, _refused, options)


def _refused(options):
    _model(distributed.initialize(pipeline=RANKS, timeout_s=30), ORDINARY, **options)
