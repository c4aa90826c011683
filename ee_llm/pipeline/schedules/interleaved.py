"""Interleaved 1F1B, which fills and drains a pipeline faster with several stages per rank."""

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Action, Op, Plan, Visit


def interleaved(num_ranks: int, num_chunks: int, num_microbatches: int) -> Plan:
    """Return interleaved 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2).

    Rank r has the `num_chunks` stages r, r + P, r + 2 P, ... (Megatron-LM's virtual pipeline size).
    Microbatches pass in groups of P: a rank runs a complete group through its first chunk, then
    through its second, and so on. With uniform costs the bubble is 1 / num_chunks of 1F1B's.

    Raises:
        PlanError: The number of microbatches is not a multiple of the number of ranks. In an
            incomplete group a rank would wait for a result that it computes later itself.
    """
    for name, value in (("num_ranks", num_ranks), ("num_chunks", num_chunks)):
        if value < 1:
            raise PlanError(f"{name} = {value} is not valid. Give at least 1.")
    if num_microbatches < 1 or num_microbatches % num_ranks:
        raise PlanError(
            f"{num_microbatches} microbatches do not fit interleaved 1F1B on {num_ranks} pipeline "
            f"ranks. Use a multiple of {num_ranks}."
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
    # Forwards before the first gradient arrives: twice the distance to the last rank, plus all but
    # the last chunk of the first group.
    ahead = 2 * (num_ranks - 1 - rank) + (num_chunks - 1) * num_ranks
    if num_chunks == 1:
        ahead = num_ranks - 1 - rank  # plain 1F1B
    ahead = min(ahead, len(order))
    actions = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        actions += [forward, backward]
    return (*actions, *backwards[len(order) - ahead :])
