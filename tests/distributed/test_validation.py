"""Validation losses equal those of inference, in any layout."""

import math

import pytest
import torch

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import load_reference
from ee_llm.training.inputs import open_data
from tests.distributed.runs import (
    layout,
    make_config,
    train_ranks,
    validation_log,
)


def _reference_losses(config, checkpoint):
    """Return the validation loss of every exit from the reference of inference, token by token."""
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
def test_losses_of_inference_equal_those_of_training(tmp_path, corpus, family, head):
    """The trained stages and the reference of inference are the same model.

    Both must agree on names, splits and orders of tensors, rotary embeddings and exits. The
    validation data end within a batch and within a sequence.
    """
    options = {
        "model.family": family,
        "exits.head": head,
        "exits.temperatures": (1.5, 0.8),
        "model.dropout": 0.2,  # only in training
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
    """The last global batch is not full: one rank has only padding."""
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
        off = {"training.eval_interval": 0, "training.steps": 1}
        train_ranks(1, make_config(tmp_path / str(number), corpus, **options, **off))
        assert validation_log(tmp_path / str(number)) == {}
