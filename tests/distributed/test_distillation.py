"""Tuning towards the final exit's distribution, and agreement with it, in any layout."""

import functools

import pytest
import torch
import torch.nn.functional as F

from ee_llm import distributed
from ee_llm.losses.distillation import vocab_parallel_argmax, vocab_parallel_divergence
from tests.distributed.harness import run_ranks
from tests.distributed.runs import log_of, training_log
from tests.distributed.test_parallel_parity import (
    make_batches,
    make_config,
    relative_error,
    unsharded_gradients,
)
from tests.distributed.tuning_runs import TUNED, TWO_EXITS, dense_config, tune, tuning_config

distributed.enable_megatron()
from ee_llm.model.stage import Stage
from ee_llm.training.parallel import ParallelModel

# (tensor, pipeline, data, sequence parallel); of six stages two have an exit, the last one none
LAYOUTS = {
    "single": (1, 1, 1, False),
    "pp2": (1, 2, 1, False),
    "pp6": (1, 6, 1, False),
    "tp2": (2, 1, 1, False),
    "tp2-sp-pp2": (2, 2, 1, True),
    "pp2-dp2": (1, 2, 2, False),
}
VARIANTS = {
    "own outputs": {"tuning.objective": "distill", "exits.output": "own"},
    "tied everywhere, mlp heads": {
        "tuning.objective": "distill",
        "exits.head": ("mlp", "norm"),
        "exits.output": "tied",
        "model.tie_embeddings": True,
    },
    "gpt, both, temperature, dynamic weights, pre": {
        "model.family": "gpt",
        "tuning.objective": "both",
        "tuning.temperature": 2.0,
        "exits.output": "shared",
        "exits.placement": "pre",
        "exits.dynamic_token_weights": True,
        "exits.temperatures": (1.5, 1.0),
    },
}


def _plain(variant):
    """Return the losses and gradients of the exits by autograd on the whole model."""
    config = make_config(
        TWO_EXITS | {name: x for name, x in variant.items() if not name.startswith("tuning.")}
    )
    grid = distributed.initialize(timeout_s=30)
    stage = Stage(config, 0, torch.float64)
    batches = make_batches(config, grid)
    num_tokens = sum(batch.loss_mask.sum() for batch in batches)
    temperature = variant.get("tuning.temperature", 1.0)
    losses = dict.fromkeys((2, 5), 0.0)
    for batch in batches:
        _, taps = stage(batch.tokens, batch.positions)
        logits = {
            boundary: stage.exit_logits(boundary, tap, batch.positions)
            for boundary, tap in zip(stage.boundaries, taps, strict=True)
        }
        p = F.log_softmax(logits[6].detach() / temperature, dim=-1)
        for boundary, weight in ((2, 0.3), (5, 0.7)):
            q = F.log_softmax(logits[boundary] / temperature, dim=-1)
            loss = F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * temperature**2
            if variant["tuning.objective"] == "both":
                labels = batch.labels.t().unsqueeze(-1)
                log_probabilities = F.log_softmax(logits[boundary], dim=-1)
                loss = loss - log_probabilities.gather(-1, labels).squeeze(-1)
            masked = loss * batch.loss_mask.t() / num_tokens
            losses[boundary] += masked.sum().item()
            if config.exits.dynamic_token_weights:
                masked = masked * logits[boundary].detach().softmax(-1).amax(-1)
            (weight * masked.sum()).backward(retain_graph=True)
    return losses, {
        name: parameter.grad.numpy()
        for name, parameter in stage.named_parameters()
        if name.startswith(("exits.2", "exits.5"))
    }


@functools.lru_cache(maxsize=1)
def plain(items):
    return run_ranks(1, _plain, dict(items))[0]


def _tuned(variant, shape):
    tensor, pipeline, _, _ = shape
    config = make_config(TWO_EXITS | TUNED | variant, shape, 1)
    grid = distributed.initialize(tensor=tensor, pipeline=pipeline, timeout_s=30)
    model = ParallelModel(config, grid, torch.float64)
    losses = model.forward_backward(make_batches(config, grid), step=0)
    return losses, {name: g.numpy() for name, g in unsharded_gradients(model).items()}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS, scope="module")
def test_gradients_equal_plain_autograd_in_any_layout(variant, name):
    """Only exits have gradients: nothing flows into the teacher or the layers."""
    options, shape = VARIANTS[variant], LAYOUTS[name]
    losses, gradients = plain(tuple(options.items()))
    seen = set()
    for found_losses, found in run_ranks(shape[0] * shape[1] * shape[2], _tuned, options, shape):
        assert found_losses == pytest.approx(losses, rel=1e-9)
        for key, gradient in found.items():
            expected = torch.from_numpy(gradients[key])
            assert relative_error(torch.from_numpy(gradient), expected) < 1e-9, key
        seen |= set(found)
    assert seen == set(gradients)


def _split_vocabulary():
    grid = distributed.initialize(tensor=2, timeout_s=20)
    logits, teacher = _logits()
    mine = logits.chunk(2, dim=-1)[grid.tensor_rank].clone().requires_grad_()
    shard = teacher.chunk(2, dim=-1)[grid.tensor_rank]
    loss = vocab_parallel_divergence(mine, shard, 1.5, grid.tensor_group)
    loss.sum().backward()
    token = vocab_parallel_argmax(mine.detach(), grid.tensor_group)
    return [x.detach() for x in (loss, mine.grad, token)]


def _logits():
    generator = torch.Generator().manual_seed(3)
    logits, teacher = torch.randn(2, 4, 3, 10, generator=generator, dtype=torch.float64)
    logits[0, 0, 7] = 500.0
    teacher[0, 0, 1] = 400.0
    logits[1, 1] = 0.25  # equal logits on both ranks
    logits[2, 2, 2] = logits[2, 2, 8] = 9.0
    return logits, teacher


def test_split_vocabulary_equals_the_whole():
    logits, teacher = _logits()
    logits.requires_grad_()
    loss = vocab_parallel_divergence(logits, teacher, 1.5)
    loss.sum().backward()
    ranks = run_ranks(2, _split_vocabulary)
    for found_loss, _, token in ranks:
        torch.testing.assert_close(found_loss, loss.detach())
        assert torch.equal(token, logits.detach().argmax(-1))
    assert torch.equal(ranks[0][0], ranks[1][0])
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks], dim=-1), logits.grad)


def _agreement(options, shape):
    """Return the losses and agreement of a validation of two global batches."""
    tensor, pipeline, _, _ = shape
    config = make_config(TWO_EXITS | options, shape, 1)
    grid = distributed.initialize(tensor=tensor, pipeline=pipeline, timeout_s=30)
    model = ParallelModel(config, grid, torch.float64)
    batches = make_batches(config, grid)
    return tuple(model.evaluate([batches, batches[::-1]]))


def _plain_agreement():
    config = make_config(TWO_EXITS)
    grid = distributed.initialize(timeout_s=30)
    stage = Stage(config, 0, torch.float64)
    agreeing, total = dict.fromkeys((2, 5), 0.0), 0.0
    for batch in make_batches(config, grid):
        _, taps = stage(batch.tokens, batch.positions)
        tokens = {
            boundary: stage.exit_logits(boundary, tap, batch.positions).argmax(-1)
            for boundary, tap in zip(stage.boundaries, taps, strict=True)
        }
        total += batch.loss_mask.sum().item()
        for boundary in agreeing:
            agrees = (tokens[boundary] == tokens[6]) * batch.loss_mask.t()
            agreeing[boundary] += agrees.sum().item()
    return {boundary: count / total for boundary, count in agreeing.items()}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("options", [{}, TUNED, TUNED | {"tuning.objective": "distill"}])
def test_validation_reports_agreement_and_the_final_loss(options, name):
    """Tuning on labels runs only the layers below the last exit in training, but here all."""
    shape = LAYOUTS[name]
    if options == TUNED and name == "pp6":
        shape = (1, 5, 1, False)  # as many stages as layers that training computes
    [expected] = run_ranks(1, _plain_agreement)
    assert all(0 < share < 1 for share in expected.values())
    [(losses, _)] = run_ranks(1, _agreement, {}, (1, 1, 1, False))
    for found, agreement in run_ranks(shape[0] * shape[1] * shape[2], _agreement, options, shape):
        assert agreement == pytest.approx(expected, rel=1e-12)
        assert found == pytest.approx(losses, rel=1e-9)
        assert sorted(found) == [2, 5, 6]


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_runs_distill_and_report_agreement(tmp_path, corpus, engine):
    """The divergence falls. The final exit, which is not trained, appears in validations only."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    dense = dense_config(tmp_path / "dense", corpus)
    tune(1, dense)
    config = tuning_config(
        tmp_path / "tuned",
        corpus,
        tmp_path / "dense",
        **{
            "tuning.objective": "distill",
            "parallel.engine": engine,
            "training.steps": 8,
            "training.eval_interval": 8,
            "training.eval_steps": 1,
            "optimizer.lr": 3e-3,
        },
    )
    tune(2 if engine == "deepspeed" else 1, config)
    log = training_log(tmp_path / "tuned")
    assert log[8]["exit 5 loss"] < log[1]["exit 5 loss"]
    assert log[1].keys() >= {"exit 2 loss", "exit 5 loss"}
    assert "lm loss" not in log[1]
    [validation] = [line for line in log_of(tmp_path / "tuned") if "lm loss validation" in line]
    assert 0 <= validation["exit 2 agreement validation"] <= 1
    assert "exit 6 agreement validation" not in validation
