"""The trainer: its arithmetic, its layouts and its reports."""

import os

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.config import Config
from ee_llm.data.batches import BatchShape, TrainingBatches
from ee_llm.data.dataset import RowOptions, open_blend
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    EOS,
    layout,
    log_of,
    losses_of,
    make_config,
    train_here,
    train_ranks,
    training_log,
)


def plain_training(config: Config, initial: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    """Train with a plain loop over one model and one batch, with torch's AdamW."""
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
        options=RowOptions(eos_token_id=EOS, vocab_size=config.model.vocab_size),
        seed=config.training.seed,
        fractions=config.data.split,
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
    from ee_llm import distributed
    from ee_llm.training.parallel import ParallelModel

    grid = distributed.initialize()
    model = ParallelModel(config, grid, torch.float64)
    return {name: p.detach().numpy() for name, p in model.stages[0].named_parameters()}


def test_training_equals_a_plain_loop(tmp_path, corpus):
    """Covers the gradients of all microbatches, exit weights from step 0, learning rates from step
    1, weight decay groups, clipping, Adam and the order of the data.
    """
    config = make_config(
        tmp_path,
        corpus,
        **{
            "training.dtype": "float64",
            "optimizer.schedule": "constant",
            "optimizer.decay_steps": None,
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
        assert found == pytest.approx(wanted, rel=1e-10), f"step {step}"


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
    return losses_of(output)


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_does_not_depend_on_the_layout(tmp_path, corpus, single_process, name):
    """Covers, over several steps, sums of tied weights, norms that count copies once, sharded
    optimizer state, and state that a step leaves for the next.
    """
    world_size, options = LAYOUTS[name]
    train_ranks(
        world_size, make_config(tmp_path, corpus, **options, **{"model.tie_embeddings": True})
    )
    found = losses_of(tmp_path)
    assert found == pytest.approx(single_process, rel=1e-5)
    assert len(found) == 5 * 4
    learnt = found[1, "lm loss"] - found[5, "lm loss"]
    assert learnt > 0.3, "the loss does not go down"


def test_bfloat16(tmp_path, corpus):
    """With float32 masters, over pipeline and data ranks, losses stay close to float32."""
    train_ranks(1, make_config(tmp_path / "32", corpus, **{"training.steps": 12}))
    options = {"training.dtype": "bfloat16", "training.steps": 12, **layout(1, 2)}
    train_ranks(4, make_config(tmp_path / "16", corpus, **options))
    found, expected = losses_of(tmp_path / "16"), losses_of(tmp_path / "32")
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=0.1 if key[1] == "grad-norm" else 0.03), key
    assert found[12, "lm loss"] < found[1, "lm loss"] - 1


def test_first_step_does_not_count_in_the_speed(tmp_path, corpus):
    """Its one-time initialization would distort the first figures."""
    train_ranks(1, make_config(tmp_path, corpus, **{"training.steps": 3}))
    lines = {line["step"]: line for line in log_of(tmp_path) if "learning-rate" in line}
    assert "tokens-per-second" not in lines[1]
    assert lines[2]["tokens-per-second"] > 0
    assert lines[3]["iteration-time"] > 0


def _with_ballast(config):
    """Train with half a GiB more resident memory on rank 1."""
    ballast = torch.ones(2**27) if os.environ["RANK"] == "1" else None
    end = train_here(config)
    del ballast
    return end


def test_peak_memory_is_that_of_the_fullest_rank(tmp_path, corpus):
    for name, function in (("plain", train_here), ("full", _with_ballast)):
        options = {"training.steps": 1, **layout(1, 2)}
        run_ranks(2, function, make_config(tmp_path / name, corpus, **options))
    plain, full = (log_of(tmp_path / name)[0]["peak-memory-gib"] for name in ("plain", "full"))
    assert full == pytest.approx(plain + 0.5, abs=0.1)
