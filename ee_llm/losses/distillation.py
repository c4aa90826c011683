"""Distillation of exits: the divergence from the final exit, and agreement with it.

Shapes: s sequence, b microbatch, v vocabulary, t tensor-parallel ranks.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Distillation(NamedTuple):
    """The objective of an exit that learns the distribution of the final exit.

    Attributes:
        teacher_logits: This rank's shard of the final exit's logits [s, b, v / t], without
            gradient.
        temperature: Divisor of both logits in the divergence.
        adds_labels: Whether the cross entropy with the labels is added to the divergence.
    """

    teacher_logits: torch.Tensor
    temperature: float
    adds_labels: bool


def vocab_parallel_divergence(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return T^2 KL(p || q) of every token in nats [s, b].

    With temperature T, p = softmax(teacher_logits / T) and q = softmax(logits / T). The factor T^2
    keeps the size of the gradient T (q - p) comparable between temperatures (Hinton et al.,
    arXiv 1503.02531, section 2.1).

    The computation is in float32, or in float64 for float64 logits, with two all-reduces: of the
    maxima, and of the sums. There is only a first derivative, of the logits, and one backward pass.

    Args:
        logits: This rank's consecutive shard of the vocabulary [s, b, v / t].
        teacher_logits: The same shard of the teacher's logits.
        temperature: T, greater than 0.
        group: The tensor-parallel ranks; by default, the vocabulary is not sharded.
    """
    loss: torch.Tensor = _VocabParallelDivergence.apply(logits, teacher_logits, temperature, group)
    return loss


class _VocabParallelDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        sharded = group is not None and dist.get_world_size(group) > 1
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        student = logits.to(wide) / temperature
        teacher = teacher_logits.to(wide) / temperature
        tops = torch.stack([student.amax(dim=-1), teacher.amax(dim=-1)])
        if sharded:
            dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=group)
        student -= tops[0].unsqueeze(-1)
        teacher -= tops[1].unsqueeze(-1)
        # KL = sum_i p_i (teacher_i - student_i) - log Z_p + log Z_q, with the shifted logits.
        difference = teacher - student
        q, p = student.exp_(), teacher.exp_()
        sums = torch.stack([q.sum(dim=-1), p.sum(dim=-1), (p * difference).sum(dim=-1)])
        if sharded:
            dist.all_reduce(sums, group=group)
        total_q, total_p, cross = sums
        loss = cross / total_p - total_p.log() + total_q.log()
        q /= total_q.unsqueeze(-1)
        q -= p.div_(total_p.unsqueeze(-1))
        ctx.save_for_backward(q)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return loss * temperature**2

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True runs backward with gradients enabled.
            raise RuntimeError("vocab_parallel_divergence has no second derivative")
        (difference,) = ctx.saved_tensors
        # Overwrite the saved tensor, which is no longer needed.
        grad = difference.mul_(grad_loss.unsqueeze(-1) * ctx.temperature)
        return grad.to(ctx.dtype), None, None, None


def vocab_parallel_argmax(
    logits: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Return the most probable token of every position, the lowest among equals, int64 [s, b].

    Args:
        logits: This rank's consecutive shard of the vocabulary [s, b, v / t].
        group: The tensor-parallel ranks; by default, the vocabulary is not sharded.
    """
    top, token = logits.max(dim=-1)
    if group is None or dist.get_world_size(group) == 1:
        return token
    best = top.clone()
    dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
    token += dist.get_rank(group) * logits.shape[-1]
    token[top != best] = torch.iinfo(token.dtype).max
    dist.all_reduce(token, op=dist.ReduceOp.MIN, group=group)
    return token
