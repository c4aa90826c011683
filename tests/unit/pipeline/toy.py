"""A toy early-exit pipeline in float64, and its reference gradients from one autograd call."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ee_llm.model.deferred_gradients import WeightGradients
from ee_llm.pipeline import Plan
from ee_llm.pipeline.runtime import MessageSpec

ROWS, WIDTH, CLASSES = 3, 5, 4
SPEC = MessageSpec((ROWS, WIDTH), torch.float64, torch.device("cpu"))


@dataclass(frozen=True)
class Shape:
    """The layers and exits of each stage.

    Attributes:
        exits: A word per stage with one letter per exit: i for the stage's input, m for its middle,
            o for its output.
        frozen: Stages whose layers are not trained, but whose exits are.
        dead: Stages without any trained parameter, whose layers build no graph.
        split_exits: Whether heads also defer their weight gradients.
    """

    exits: tuple[str, ...]
    frozen: frozenset[int] = frozenset()
    dead: frozenset[int] = frozenset()
    split_exits: bool = False


class LiveCount:
    """Counts the exit graphs that are alive at once, by an object that each of them keeps."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[object] = weakref.WeakSet()
        self.peak = 0
        self.total = 0

    def watch(self, logits: Tensor) -> Tensor:
        return _Watched.apply(logits, self)


class _Token:
    pass


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, count):
        ctx.token = _Token()
        count.alive.add(ctx.token)
        count.total += 1
        count.peak = max(count.peak, len(count.alive))
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def inputs(microbatch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + microbatch)
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator)


def labels(microbatch: int, exit_key: int) -> Tensor:
    generator = torch.Generator().manual_seed(2000 + 10 * microbatch + exit_key)
    return torch.randint(CLASSES, (ROWS,), generator=generator)


class ToyStage(nn.Module):
    """One stage. Stages of equal number and shape have equal parameters."""

    def __init__(self, stage: int, shape: Shape) -> None:
        super().__init__()
        self.stage, self.kinds = stage, shape.exits[stage]
        self.first, self.last = stage == 0, stage == len(shape.exits) - 1
        generator = torch.Generator().manual_seed(stage)

        def matrix(rows: int) -> nn.Parameter:
            values = torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator)
            return nn.Parameter(values * 0.7)

        self.layers = nn.ParameterList([matrix(WIDTH), matrix(WIDTH)])
        self.heads = nn.ParameterList([matrix(CLASSES) for _ in self.kinds])
        self.dead = stage in shape.dead
        if stage in shape.frozen:
            self.layers.requires_grad_(False)
        if self.dead:
            self.requires_grad_(False)
        self.later = WeightGradients()
        self.split_exits = shape.split_exits
        self.live = LiveCount()
        self.grad_modes: list[bool] = []

    def forward(
        self, microbatch: int, hidden: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        assert (hidden is None) == self.first
        self.grad_modes.append(torch.is_grad_enabled())
        x = inputs(microbatch) if hidden is None else hidden
        if self.dead:
            x = x.detach()
        middle = x + torch.tanh(self.later.linear(x, self.layers[0]))
        output = middle + torch.tanh(self.later.linear(middle, self.layers[1]))
        places = {"i": x, "m": middle, "o": output}
        return None if self.last else output, tuple(places[kind] for kind in self.kinds)

    def exit_loss(self, microbatch: int, index: int, tap: Tensor) -> Tensor:
        head = self.heads[index]
        product = self.later.linear(tap, head) if self.split_exits else tap @ head.T
        logits = self.live.watch(product)
        target = labels(microbatch, index)
        return (0.3 + index) * nn.functional.cross_entropy(logits, target) / (1 + self.stage)

    def defer_weight_gradients(self) -> AbstractContextManager[Callable[[], None]]:
        return self.later.defer()

    def gradients(self) -> dict[str, Tensor | None]:
        return {f"{self.stage}.{name}": p.grad for name, p in self.named_parameters()}


def stages_of(shape: Shape, plan: Plan, rank: int) -> dict[int, ToyStage]:
    return {s: ToyStage(s, shape) for s, owner in enumerate(plan.stage_ranks) if owner == rank}


def reference(shape: Shape, plan: Plan) -> dict[str, Tensor | None]:
    """Return the gradients of the plan's visits from one backward call over all stages."""
    stages = [ToyStage(stage, shape) for stage in range(plan.num_stages)]
    losses = []
    for microbatch, visit in enumerate(plan.visits):
        hidden = None
        for stage in stages[: visit.depth]:
            with torch.set_grad_enabled(stage.stage >= visit.first_backward):
                hidden, taps = stage.forward(microbatch, hidden)
                if stage.stage < visit.first_backward < visit.depth:
                    continue  # its exits are neither trained nor reported
                losses += [stage.exit_loss(microbatch, i, tap) for i, tap in enumerate(taps)]
    total = sum(losses, torch.zeros((), dtype=torch.float64))
    if total.requires_grad:
        total.backward()
    return {name: g for stage in stages for name, g in stage.gradients().items()}


def assert_same_gradients(
    got: dict[str, Tensor | None], expected: dict[str, Tensor | None]
) -> None:
    for name, gradient in got.items():
        want = expected[name]
        if want is None:
            # A gradient of zero may be missing, any other may not.
            assert gradient is None or not gradient.any(), name
            continue
        assert gradient is not None, name
        torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-13, msg=name)
