"""Losses of exits: vocabulary-parallel cross entropy, exit weights by step, dynamic token weights.

Shapes: s sequence, b microbatch, v vocabulary, t tensor-parallel ranks.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

WeightSchedule = Literal["constant", "linear", "cosine"]


def scheduled_weight(
    schedule: WeightSchedule, initial: float, final: float, num_steps: int, step: int
) -> float:
    """Return an exit's loss weight at `step`, a pure function: no state to save or to resume.

    `constant` is `final` throughout; `linear` and `cosine` move from `initial` at step 0 to `final`
    at `num_steps` and stay there: a warm-up where `initial` is the smaller, else a cool-down.
    """
    if schedule == "constant" or step >= num_steps:
        return final
    progress = step / num_steps
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return initial + (final - initial) * progress


class TokenLoss(NamedTuple):
    """Cross entropy in nats, and the largest probability, without a gradient; both [s, b]."""

    loss: torch.Tensor
    top_probability: torch.Tensor


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None = None
) -> TokenLoss:
    """Return every token's cross entropy from logits whose vocabulary is split over `group`.

    `logits` is [s, b, v / t], this rank's consecutive part of the vocabulary; `labels` is [s, b] of
    global token ids. Computed in float32, in float64 for float64 logits. Two all-reduces: of the
    maxima, and of the sums of exponentials together with the label's logit. Has a first derivative
    only and one backward pass: a second of either raises RunError.
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
            # The same numbers in one kernel, half the time: the largest shifted logit is 0.
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
        top_probability = total.reciprocal()  # the largest shifted logit is 0
        ctx.mark_non_differentiable(top_probability)
        return total.log() - label_logit, top_probability

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if torch.is_grad_enabled():  # which create_graph=True asks of backward functions
            raise RuntimeError("vocab_parallel_cross_entropy has no second derivative")
        probabilities, local, mine = ctx.saved_tensors
        scale = grads[0].unsqueeze(-1)
        # d loss / d logit = p - [label]; written over the probabilities, which nobody needs again.
        grad = probabilities.mul_(scale)
        grad.scatter_add_(-1, local, -(scale * mine.unsqueeze(-1)))
        return grad.to(ctx.dtype), None, None


class ExitLoss(NamedTuple):
    """Sums over a microbatch's valid tokens in nats: what is trained, and the plain loss."""

    objective: torch.Tensor
    reported: torch.Tensor


def exit_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    dynamic_token_weights: bool = False,
) -> ExitLoss:
    """Return an exit's loss summed over the valid tokens of one microbatch.

    `logits` is [s, b, v / t], `labels` and `loss_mask` are [s, b]. With `dynamic_token_weights`
    each token's loss is multiplied by the exit's own detached largest probability (EE-Tuning,
    2402.00518). The caller divides by the global number of valid tokens, so that sums over
    microbatches and ranks do not depend on how the batch was split.
    """
    token = vocab_parallel_cross_entropy(logits, labels, group)
    masked = token.loss * loss_mask
    reported = masked.detach().sum()
    objective = (masked * token.top_probability).sum() if dynamic_token_weights else masked.sum()
    return ExitLoss(objective, reported)
