"""The one interpreter of plans: carries out a rank's actions on its stages.

Schedules differ by their plans alone. Losses sit on every stage that has exits; each stage's
backward differentiates its own losses plus <g, x>, g being the gradient received for its output x
(EE-LLM, arXiv 2312.04916, Prop. 3.1; derived in docs/explanation/pipeline.md).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ee_llm.distributed import synchronize_stream
from ee_llm.distributed.point_to_point import Channel, Transport
from ee_llm.errors import PlanError
from ee_llm.pipeline.lower import LoweredPlan, counterpart
from ee_llm.pipeline.plan import Action, Op, step_grid
from ee_llm.pipeline.simulate import Span


class PipelineError(RuntimeError):
    """An action that failed; the message shows it in the plan, the cause is chained."""


class MessageSpec(NamedTuple):
    """Shape, type and device of the hidden state that stages hand on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class PipelineStage(Protocol):
    """What the runtime asks of a stage."""

    def forward(
        self, microbatch: int, hidden: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Return the output and the taps, the inputs of the exits on this stage.

        hidden is None on the first stage; the output may be None on the last. A tap may be the
        output itself, or the given hidden state.
        """

    def exit_loss(self, microbatch: int, index: int, tap: Tensor) -> Tensor:
        """Return the scalar loss of exit `index`, weighted and normalised, ready to be added."""

    def defer_weight_gradients(self) -> AbstractContextManager[Callable[[], None]]:
        """Keep weights out of the backward passes within; the function given adds them later.

        Asked for by plans that split the backward pass alone. Weights of exits among them, if and
        only if the plan splits those of exits too.
        """


Key = tuple[int, int]  # (stage, microbatch)


@dataclass
class _Visit:
    """What a stage keeps of a microbatch between its forward and its backward."""

    hidden: Tensor | None  # the input, a leaf that collects the gradient to be returned
    output: GradientEdge | None  # where the received gradient enters; holds no data of the output
    taps: tuple[Tensor, ...]  # of exits still to be computed
    losses: tuple[Tensor, ...]  # of exits already computed


class _Clock:
    """Seconds since it was made, the device's work included."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.began = 0.0
        self.exits = 0.0  # of what began then

    def now(self) -> float:
        synchronize_stream()
        return time.perf_counter() - self._start


class Runtime:
    """Carries out one rank's part of a plan, over and over."""

    def __init__(
        self,
        plan: LoweredPlan,
        rank: int,
        stages: Mapping[int, PipelineStage],
        transport: Transport | None,
        hidden: MessageSpec,
        deferred: bool = True,
    ) -> None:
        """Take what `lower` returned, this pipeline rank and its stages by their number.

        transport may be None where the rank has nobody to talk to. deferred computes the exits of
        a microbatch in its backward action, one at a time, so that at most one exit's graph is
        alive per stage; otherwise in its forward action, for comparison. A microbatch that has no
        backward on a stage runs there without a graph; its exits are computed, at once, if it has
        none on any stage. Where the plan's backwards are local, only exits have a graph, and their
        stage runs without one.

        Raises PlanError if the plan was not lowered, hence not proved, ValueError if the stages are
        not those of the rank.
        """
        if not isinstance(plan, LoweredPlan):
            raise PlanError("the plan has not been proved sound: pass what `lower(plan)` returns")
        expected = {stage for stage, owner in enumerate(plan.stage_ranks) if owner == rank}
        if set(stages) != expected:
            raise PlanError(f"rank {rank} holds stages {sorted(expected)}, got {sorted(stages)}")
        self._plan, self._rank, self._stages = plan, rank, stages
        self._transport, self._hidden, self._deferred = transport, hidden, deferred
        self._visits: dict[Key, _Visit] = {}
        # Results on their way to the neighbouring stage, keyed by the stage that made them.
        self._outputs: dict[Key, Tensor] = {}
        self._gradients: dict[Key, Tensor] = {}
        self._weights: dict[Key, Callable[[], None]] = {}
        self._clock: _Clock | None = None
        self._handlers = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.WEIGHT: self._weight,
            Op.SEND_FORWARD: self._send,
            Op.SEND_BACKWARD: self._send,
            Op.RECV_FORWARD: self._post_receive,
            Op.RECV_BACKWARD: self._post_receive,
        }

    def step(self, spans: list[Span] | None = None) -> None:
        """Run the whole plan once; gradients are added to the parameters' `.grad`.

        To `spans`, if given, are added the actions that compute and their times in seconds, from
        this call on; an action begins when what it waits for is there, or as much earlier as took
        the exits that it computed before. The device is then waited for around each action.

        Raises PipelineError, which shows the place in the plan. The transport cannot be used
        after that: messages of the failed step may still be under way.
        """
        actions = self._plan.ranks[self._rank]
        step = 0
        self._clock = None if spans is None else _Clock()
        try:
            for step, action in enumerate(actions):  # noqa: B007 (the place of a failure)
                self._handlers[action.op](action)
                if spans is not None and self._clock is not None and action.op.computes:
                    clock = self._clock
                    spans.append(Span(action, clock.began, clock.now(), clock.exits))
            step = len(actions)
            if self._transport is not None:
                self._transport.flush()
            left_over = [*self._visits, *self._outputs, *self._gradients, *self._weights]
            assert not left_over, f"results of (stage, microbatch) {left_over} were not used"
        except Exception as error:
            raise self._failure(step, error) from error
        finally:
            self._visits.clear()
            self._outputs.clear()
            self._gradients.clear()
            self._weights.clear()

    def _forward(self, action: Action) -> None:
        stage, key = self._stages[action.stage], (action.stage, action.microbatch)
        trains = self._plan.has_backward(action)
        hidden = self._result(action, self._outputs)
        self._begins()
        if hidden is not None and self._returns_gradient(action):
            hidden.requires_grad_()
        with torch.set_grad_enabled(trains and not self._plan.local_backwards):
            output, taps = stage.forward(action.microbatch, hidden)
        with torch.set_grad_enabled(trains):
            if self._plan.target(action) is not None:
                self._outputs[key] = self._checked(output).detach()
            if not trains:
                if not self._plan.goes_back(action.microbatch):  # an evaluation: its losses count
                    for index, tap in enumerate(taps):
                        stage.exit_loss(action.microbatch, index, tap)
                return
            losses: tuple[Tensor, ...] = ()
            if not self._deferred:
                losses = tuple(
                    stage.exit_loss(action.microbatch, index, tap) for index, tap in enumerate(taps)
                )
                taps = ()
        edge = get_gradient_edge(output) if output is not None and output.requires_grad else None
        self._visits[key] = _Visit(hidden, edge, taps, losses)

    def _backward(self, action: Action) -> None:
        key = (action.stage, action.microbatch)
        visit = self._visits.pop(key)
        self._begins()
        with self._split_off_weights(action):
            # The exits come before the received gradient is waited for: they do not need it.
            has_exits = bool(visit.taps)
            roots, gradients = self._exit_roots(action, visit)
            ahead = self._elapsed() if has_exits else 0.0
            received = self._result(action, self._gradients)
            self._begins(ahead)
            if received is not None and visit.output is not None:
                roots.append(visit.output)
                gradients.append(received)
            if roots:
                # Roots that coincide (a tap is the output, or the input) are summed by autograd.
                torch.autograd.backward(roots, gradients)
        if self._returns_gradient(action):
            assert visit.hidden is not None, f"{action} has no input to return a gradient of"
            gradient = visit.hidden.grad
            # Nothing here depends on the input in a differentiable way; the neighbour still waits.
            self._gradients[key] = torch.zeros_like(visit.hidden) if gradient is None else gradient

    @contextmanager
    def _split_off_weights(self, action: Action) -> Iterator[None]:
        if not self._plan.splits_backward:
            yield
            return
        with self._stages[action.stage].defer_weight_gradients() as add_weights:
            yield
        self._weights[action.stage, action.microbatch] = add_weights

    def _weight(self, action: Action) -> None:
        self._begins()
        self._weights.pop((action.stage, action.microbatch))()

    def _exit_roots(self, action: Action, visit: _Visit) -> tuple[list[GradientEdge], list[Tensor]]:
        # Where the exits' gradients enter the stage's graph. Edges hold no data, so that taps and
        # losses are let go before the stage's own backward.
        roots: list[GradientEdge] = []
        gradients: list[Tensor] = []
        for loss in visit.losses:
            if loss.requires_grad:
                roots.append(get_gradient_edge(loss))
                gradients.append(torch.ones_like(loss))
        for index, tap in enumerate(visit.taps):
            gradient = self._exit_gradient(action, index, tap)
            if gradient is not None:
                roots.append(get_gradient_edge(tap))
                gradients.append(gradient)
        visit.taps, visit.losses = (), ()
        return roots, gradients

    def _exit_gradient(self, action: Action, index: int, tap: Tensor) -> Tensor | None:
        # Cut off from the stage's graph, so that the exit's own graph dies before the next one's.
        leaf = tap.detach().requires_grad_(tap.requires_grad)
        with torch.enable_grad():
            loss = self._stages[action.stage].exit_loss(action.microbatch, index, leaf)
        if loss.requires_grad:
            loss.backward()
        return leaf.grad

    def _begins(self, exits: float = 0.0) -> None:
        # The action begins now, less the exits before it had to wait: the wait is idle time.
        if self._clock is not None:
            self._clock.began, self._clock.exits = self._clock.now() - exits, exits

    def _elapsed(self) -> float:
        return 0.0 if self._clock is None else self._clock.now() - self._clock.began

    def _returns_gradient(self, action: Action) -> bool:
        # Whether the stage before wants the gradient of this stage's input.
        return self._plan.target(action._replace(op=Op.BACKWARD)) is not None and (
            self._plan.has_backward(action)
        )

    def _result(self, action: Action, handed_over: dict[Key, Tensor]) -> Tensor | None:
        # What the neighbouring stage made for this action: on this rank, or sent by another.
        source = self._plan.source(action)
        if source is None:
            return None
        if not self._plan.crosses_ranks(source, action):
            return handed_over.pop((source.stage, source.microbatch))
        return self._wire().wait_receive(
            peer=self._plan.stage_ranks[source.stage],
            channel=_channel(source),
            tag=self._tag(source),
        )

    def _send(self, action: Action) -> None:
        results = self._outputs if action.op is Op.SEND_FORWARD else self._gradients
        self._wire().send(
            results.pop((action.stage, action.microbatch)),
            peer=self._plan.stage_ranks[counterpart(action).stage],
            channel=_channel(action),
            tag=self._tag(action),
        )

    def _post_receive(self, action: Action) -> None:
        source = counterpart(action)
        shape, dtype, device = self._hidden
        self._wire().post_receive(
            torch.empty(shape, dtype=dtype, device=device),
            peer=self._plan.stage_ranks[source.stage],
            channel=_channel(action),
            tag=self._tag(source),
        )

    def _tag(self, source: Action) -> int:
        # Names a message by the stage that made it.
        return source.microbatch * self._plan.num_stages + source.stage

    def _wire(self) -> Transport:
        assert self._transport is not None, "this rank has messages and no transport"
        return self._transport

    def _checked(self, output: Tensor | None) -> Tensor:
        shape, dtype, _ = self._hidden
        if output is None or tuple(output.shape) != tuple(shape) or output.dtype != dtype:
            got = "nothing" if output is None else f"{tuple(output.shape)} {output.dtype}"
            raise PlanError(f"the stage's output is {got}, its successor expects {shape} {dtype}")
        return output

    def _failure(self, step: int, error: Exception) -> PipelineError:
        actions = self._plan.ranks[self._rank]
        place = str(actions[step]) if step < len(actions) else "the end, with sends under way"
        picture = step_grid(self._plan.ranks, [(self._rank, step)])
        return PipelineError(
            f"pipeline rank {self._rank} failed at {place}: "
            f"{type(error).__name__}: {error}\n{picture}"
        )


def _channel(action: Action) -> Channel:
    forward = (Op.FORWARD, Op.SEND_FORWARD, Op.RECV_FORWARD)
    return "forward" if action.op in forward else "backward"
