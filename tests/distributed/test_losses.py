"""Cross entropy with the vocabulary split over two ranks, against torch's cross entropy."""

import pytest
import torch
import torch.nn.functional as F

from ee_llm import distributed
from ee_llm.losses.exit_losses import exit_loss, vocab_parallel_cross_entropy
from tests.distributed.harness import run_ranks

LENGTH, BATCH, VOCAB = 4, 3, 10
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def full_logits(dtype):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(LENGTH, BATCH, VOCAB, generator=generator, dtype=torch.float64) * 4
    logits[0, 0, 7] = 500.0  # the maximum is on one rank, and the loss is far above the others
    logits[1, 1] = -2e4
    logits[2, 2, :5] = -300.0
    labels = torch.randint(0, VOCAB, (LENGTH, BATCH), generator=generator)
    labels[0, 0], labels[1, 0], labels[2, 0] = 1, 4, 5  # both sides of the border
    return logits.to(dtype), labels


def _split(dtype):
    grid = distributed.initialize(tensor=2, timeout_s=20)
    full, labels = full_logits(dtype)
    local = full.chunk(2, dim=-1)[grid.tensor_rank].clone().requires_grad_()
    loss, top = vocab_parallel_cross_entropy(local, labels, grid.tensor_group)
    weights = torch.linspace(-1, 2, LENGTH * BATCH).view(LENGTH, BATCH)
    (loss * weights).sum().backward()
    dynamic = exit_loss(local, labels, weights, group=grid.tensor_group, dynamic_token_weights=True)
    return [x.detach().double() for x in (loss, top, local.grad, *dynamic)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_split_vocabulary_equals_torch(dtype):
    full, labels = full_logits(dtype)
    wide = full.double().requires_grad_()
    weights = torch.linspace(-1, 2, LENGTH * BATCH).view(LENGTH, BATCH)
    loss = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none")
    loss = loss.view(LENGTH, BATCH)
    (loss * weights).sum().backward()
    top = wide.detach().softmax(-1).amax(-1)
    assert loss.max() > 400
    found = run_ranks(2, _split, dtype)
    tolerance = TOLERANCE[torch.float32 if dtype == torch.bfloat16 else dtype]

    def close(one, other, tolerance=tolerance):
        torch.testing.assert_close(one, other.detach(), rtol=tolerance, atol=tolerance)

    for rank_loss, rank_top, _, objective, reported in found:
        close(rank_loss, loss)
        close(rank_top, top)
        close(objective, (loss * top * weights).sum(), 10 * tolerance)
        close(reported, (loss * weights).sum(), 10 * tolerance)
    close(torch.cat([rank[2] for rank in found], dim=-1), wide.grad, TOLERANCE[dtype])


def test_losses_are_bit_identical_on_all_ranks():
    """Tensor ranks must make equal decisions from a loss (a skipped step, an exit)."""
    one, other = run_ranks(2, _split, torch.float32)
    for index in (0, 1, 3, 4):
        assert torch.equal(one[index], other[index])
