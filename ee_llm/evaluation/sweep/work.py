"""The layers and heads that tokens used, and the speed-up that their cost allows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ee_llm.evaluation.calibration.search import Costs
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.strategies import SelfSpeculation, Strategy


@dataclass(frozen=True)
class Work:
    """What a token uses on average, as passes that read weights at batch 1.

    Decoding one token reads the weights of the layers and heads that it uses, which takes most of
    the time. Several tokens that run together in one pass read them once.

    Attributes:
        layers: Layers per token.
        heads: Heads per token: every exit that decides about the token or drafts it.
        final_heads: Those of the final exit among them.
        shares: Share of the tokens that each exit decided, the final one last.
    """

    layers: float
    heads: float
    final_heads: float
    shares: tuple[float, ...]

    def ideal_speedup(self, num_layers: int, head_cost: float, final_head_cost: float) -> float:
        """Return the speed-up over full depth if only reading weights took time.

        Args:
            num_layers: Number of layers of the model.
            head_cost: Weights of an early exit's head over those of a layer.
            final_head_cost: The same for the final exit, whose head lacks the other parts.
        """
        heads = head_cost * (self.heads - self.final_heads) + final_head_cost * self.final_heads
        return (num_layers + final_head_cost) / (self.layers + heads)


def work_of(
    outputs: Sequence[RequestOutput],
    strategy: Strategy | SelfSpeculation,
    boundaries: Iterable[int],
) -> Work:
    """Return the work of generations that were made by the same policy and strategy.

    Which exits compute their head depends on the measure of confidence (see `Costs`). A
    self-speculative cycle drafts with the layers up to an exit and its head, and then runs all
    other layers and the final head once; the last draft passes the exit's layers in addition.
    """
    exits = [exit for output in outputs for exit in output.exits]
    num_layers = outputs[0].num_layers
    ends = (*boundaries, num_layers)
    shares = tuple(exits.count(boundary) / len(exits) for boundary in ends)
    if isinstance(strategy, SelfSpeculation):
        assert strategy.draft_exit is not None, "candidates name the exit"
        num_drafted = sum(output.num_drafted for output in outputs)
        num_passes = len(exits) - sum(output.num_accepted for output in outputs)
        layers = num_drafted * strategy.draft_exit + num_passes * num_layers
        num_heads = num_drafted + num_passes
        return Work(layers / len(exits), num_heads / len(exits), num_passes / len(exits), shares)
    policy = outputs[0].policy
    costs = Costs(policy.boundaries, num_layers, measure=policy.measure)
    heads = dict(zip(ends, costs.heads(policy.thresholds).tolist(), strict=True))
    num_heads = sum(heads[exit] for exit in exits)
    return Work(sum(exits) / len(exits), num_heads / len(exits), shares[-1], shares)
