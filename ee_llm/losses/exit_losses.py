"""Exit losses: vocabulary-parallel cross entropy, weight schedules and dynamic token weights.

Shapes: s sequence, b microbatch, v vocabulary, t tensor-parallel ranks.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from ee_llm.losses.distillation import Distillation, vocab_parallel_divergence

WeightSchedule = Literal["constant", "linear", "cosine"]


def scheduled_weight(
    schedule: WeightSchedule, initial: float, final: float, num_steps: int, step: int
) -> float:
    """Return an exit's loss weight at `step`.

    `constant` is always `final`. `linear` and `cosine` change from `initial` at step 0 to `final`
    at `num_steps` and then stay constant: a warm-up if `initial` is smaller, else a cool-down. The
    function has no state to save or resume.
    """
    if schedule == "constant" or step >= num_steps:
        return final
    progress = step / num_steps
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return initial + (final - initial) * progress


class TokenLoss(NamedTuple):
    """Cross entropy in nats, and the largest probability without gradient; both [s, b]."""

    loss: torch.Tensor
    top_probability: torch.Tensor


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None = None
) -> TokenLoss:
    """Return the cross entropy of every token from logits with a sharded vocabulary.

    The computation is in float32, or in float64 for float64 logits, with two all-reduces: of the
    maxima, and of the sums of exponentials together with the label's logit. There is only a first
    derivative and one backward pass; a second one of either raises RuntimeError.

    Args:
        logits: This rank's consecutive shard of the vocabulary [s, b, v / t].
        labels: Global token ids [s, b].
        group: The tensor-parallel ranks; by default, the vocabulary is not sharded.
    """
    return TokenLoss(*_VocabParallelCrossEntropy.apply(logits, labels, group))


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_ranks = dist.get_world_size(group) if group is not None else 1
        rank = dist.get_rank(group) if num_ranks > 1 else 0
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        top = logits.amax(dim=-1).to(wide)
        if num_ranks > 1:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)

        local = labels - rank * logits.shape[-1]
        mine = (local >= 0) & (local < logits.shape[-1])
        local = local.where(mine, torch.zeros_like(local)).unsqueeze(-1)
        label_logit = logits.gather(-1, local).squeeze(-1).to(wide) - top
        label_logit = label_logit.where(mine, label_logit.new_zeros(()))
        if num_ranks == 1:
            # The largest shifted logit is 0, so one kernel gives the same values in half the time.
            probabilities = logits.softmax(dim=-1, dtype=wide)
            total = probabilities.amax(dim=-1).reciprocal()
        else:
            exponentials = (logits.to(wide) - top.unsqueeze(-1)).exp_()
            sums = torch.stack([exponentials.sum(dim=-1), label_logit])
            dist.all_reduce(sums, group=group)
            total, label_logit = sums[0], sums[1]
            probabilities = exponentials.div_(total.unsqueeze(-1))
        ctx.save_for_backward(probabilities, local, mine)
        ctx.dtype = logits.dtype
        top_probability = total.reciprocal()  # The largest shifted logit is 0.
        ctx.mark_non_differentiable(top_probability)
        return total.log() - label_logit, top_probability

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph=True runs backward with gradients enabled.
            raise RuntimeError("vocab_parallel_cross_entropy has no second derivative")
        probabilities, local, mine = ctx.saved_tensors
        scale = grads[0].unsqueeze(-1)
        # d loss / d logit = p - [label]. Overwrite the probabilities, which are no longer needed.
        grad = probabilities.mul_(scale)
        grad.scatter_add_(-1, local, -(scale * mine.unsqueeze(-1)))
        return grad.to(ctx.dtype), None, None


class ExitLoss(NamedTuple):
    """Sums over the valid tokens of a microbatch in nats.

    Attributes:
        objective: The loss to minimize.
        reported: The same loss without dynamic token weights and without gradient.
    """

    objective: torch.Tensor
    reported: torch.Tensor


def exit_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    dynamic_token_weights: bool = False,
    distillation: Distillation | None = None,
) -> ExitLoss:
    """Return the loss of an exit, summed over the valid tokens of a microbatch.

    It is the cross entropy with the labels unless `distillation` says otherwise. The caller divides
    it by the global number of valid tokens, so that sums over microbatches and ranks do not depend
    on how the batch is split.

    Args:
        logits: This rank's shard of the logits [s, b, v / t].
        labels: Global token ids [s, b].
        loss_mask: 1 for valid tokens, else 0, [s, b].
        group: The tensor-parallel ranks.
        dynamic_token_weights: Multiply each token's loss by the exit's own detached largest
            probability (EE-Tuning, 2402.00518), at temperature 1 whatever the divergence's.
        distillation: The divergence to add to the cross entropy or to replace it by.
    """
    loss: torch.Tensor | float = 0.0
    top_probability: torch.Tensor | None = None
    if distillation is None or distillation.adds_labels:
        loss, top_probability = vocab_parallel_cross_entropy(logits, labels, group)
    elif dynamic_token_weights:
        top_probability = vocab_parallel_cross_entropy(logits.detach(), labels, group)[1]
    if distillation is not None:
        teacher_logits, temperature, _ = distillation
        loss = loss + vocab_parallel_divergence(logits, teacher_logits, temperature, group)
    masked = loss * loss_mask
    reported = masked.detach().sum()
    if top_probability is not None and dynamic_token_weights:
        masked = masked * top_probability
    return ExitLoss(masked.sum(), reported)
