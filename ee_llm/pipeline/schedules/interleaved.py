"""Interleaved 1F1B: several stages per rank, so that a pipeline fills and drains faster."""

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Action, Op, Plan, Visit


def interleaved(num_ranks: int, num_chunks: int, num_microbatches: int) -> Plan:
    """Return interleaved 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2).

    Rank r holds the stages r, r + P, r + 2 P, ..., `num_chunks` of them (Megatron's virtual
    pipeline size). Microbatches pass in groups of P: a rank runs a whole group through its first
    chunk, then through its second. With uniform costs the bubble is 1 / num_chunks of 1F1B's.

    Raises PlanError if the microbatches are not a multiple of the ranks: groups must be whole, or
    a rank would wait within a group for what it is itself to compute later.
    """
    for name, value in (("num_ranks", num_ranks), ("num_chunks", num_chunks)):
        if value < 1:
            raise PlanError(f"{name} is {value}: a plan needs at least 1")
    if num_microbatches < 1 or num_microbatches % num_ranks:
        raise PlanError(
            f"interleaved 1F1B passes microbatches in groups of {num_ranks}, one per pipeline "
            f"rank: {num_microbatches} microbatches are not a multiple of that"
        )
    ranks = tuple(
        _rank_actions(r, num_ranks, num_chunks, num_microbatches) for r in range(num_ranks)
    )
    num_stages = num_ranks * num_chunks
    visits = (Visit(depth=num_stages, first_backward=0),) * num_microbatches
    return Plan(ranks, tuple(stage % num_ranks for stage in range(num_stages)), visits)


def _rank_actions(
    rank: int, num_ranks: int, num_chunks: int, num_microbatches: int
) -> tuple[Action, ...]:
    order = [
        (chunk, microbatch)
        for group in range(0, num_microbatches, num_ranks)
        for chunk in range(num_chunks)
        for microbatch in range(group, group + num_ranks)
    ]
    forwards = [Action(chunk * num_ranks + rank, Op.FORWARD, m) for chunk, m in order]
    backwards = [
        Action((num_chunks - 1 - chunk) * num_ranks + rank, Op.BACKWARD, m) for chunk, m in order
    ]
    # Until the first gradient arrives: twice the way to the last rank, and all but the last chunk
    # of the first group.
    ahead = 2 * (num_ranks - 1 - rank) + (num_chunks - 1) * num_ranks
    if num_chunks == 1:
        ahead = num_ranks - 1 - rank  # plain 1F1B
    ahead = min(ahead, len(order))
    actions = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        actions += [forward, backward]
    return (*actions, *backwards[len(order) - ahead :])
