"""Execute plans: run the actions of a rank on its stages.

This is the interpreter of all schedules, which differ only in their plans. Every stage with exits
has losses. Its backward differentiates its own losses plus <g, x>, where g is the received gradient
of its output x (EE-LLM, arXiv 2312.04916, Prop. 3.1; derived in docs/explanation/pipeline.md).
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
    """An action failed. The message shows its place in the plan; the cause is chained."""


class MessageSpec(NamedTuple):
    """Shape, dtype and device of the hidden state that stages pass on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class PipelineStage(Protocol):
    """The interface of a stage to the runtime."""

    def forward(
        self, microbatch: int, hidden: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Return the output and the taps, which are the inputs of the exits on this stage.

        `hidden` is None on the first stage. The output may be None on the last stage. A tap may be
        the output itself, or `hidden`.
        """

    def exit_loss(self, microbatch: int, index: int, tap: Tensor) -> Tensor:
        """Return the scalar loss of exit `index`, weighted and normalized for summation."""

    def set_final_hidden(self, microbatch: int, hidden: Tensor) -> None:
        """Set the output of the last stage, before the losses of exits that distill."""

    def defer_weight_gradients(self) -> AbstractContextManager[Callable[[], None]]:
        """Defer the weight gradients of the backward passes within the context.

        The function that the context yields computes and adds them. Only plans that split the
        backward pass use this. The weights of exits are included if and only if the plan also
        splits the backward pass of exits.
        """


Key = tuple[int, int]  # (stage, microbatch)


@dataclass
class _Visit:
    """The state of a microbatch on a stage between its forward and its backward."""

    hidden: Tensor | None  # the input, a leaf that accumulates the gradient to return
    output: GradientEdge | None  # the root of the received gradient; keeps no data of the output
    taps: tuple[Tensor, ...]  # of exits that are not computed yet
    losses: tuple[Tensor, ...]  # of exits that are computed
    final_hidden: Tensor | None = None  # the output of the last stage, if exits distill


class _Clock:
    """Measures seconds since its construction, including the device's work."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.start_of_action = 0.0
        self.exits = 0.0  # seconds of exits at the start of the action

    def now(self) -> float:
        synchronize_stream()
        return time.perf_counter() - self._start


class Runtime:
    """Executes one rank's actions of a plan, once per step."""

    def __init__(
        self,
        plan: LoweredPlan,
        rank: int,
        stages: Mapping[int, PipelineStage],
        transport: Transport | None,
        hidden: MessageSpec,
        deferred: bool = True,
    ) -> None:
        """Set the plan and the stages of a rank.

        A microbatch without a backward on a stage runs there without an autograd graph. Its exits
        are computed in the forward action if it has no backward on any stage. If the plan is
        frozen, only exits have a graph.

        Args:
            plan: The plan that `lower` returned.
            rank: This pipeline rank.
            stages: The stages of this rank by number.
            transport: Sends and receives messages. May be None if the rank has none.
            hidden: The hidden states that stages pass on.
            deferred: Whether the exits of a microbatch are computed in its backward action, one
                after the other, so that at most one exit's graph is alive per stage. Otherwise they
                are computed in its forward action, for comparison, unless they distill.

        Raises:
            PlanError: The plan is not lowered, hence not proved, or the stages are not those of the
                rank.
        """
        if not isinstance(plan, LoweredPlan):
            raise PlanError("the plan is not lowered. Pass `lower(plan)`.")
        expected = {stage for stage, owner in enumerate(plan.stage_ranks) if owner == rank}
        if set(stages) != expected:
            raise PlanError(
                f"stages {sorted(stages)} are not those of rank {rank}: pass {sorted(expected)}"
            )
        self._plan, self._rank, self._stages = plan, rank, stages
        self._transport, self._hidden, self._deferred = transport, hidden, deferred
        self._visits: dict[Key, _Visit] = {}
        # Results for the neighbouring stage, by the stage that computed them.
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
        """Run all actions of the plan once and add gradients to the parameters' `.grad`.

        Args:
            spans: A list to which the F, B and W actions and their times are added, in seconds
                since the start of the call. An action starts when its dependencies are complete,
                or earlier by the time of the exits that it computes before it needs them. The
                device is synchronized around each action.

        Raises:
            PipelineError: An action failed. The transport cannot be used any more, because messages
                of the failed step may still be in flight.
        """
        actions = self._plan.ranks[self._rank]
        step = 0
        self._clock = None if spans is None else _Clock()
        try:
            for step, action in enumerate(actions):  # noqa: B007 (used when an action fails)
                self._handlers[action.op](action)
                if spans is not None and self._clock is not None and action.op.computes:
                    clock = self._clock
                    spans.append(Span(action, clock.start_of_action, clock.now(), clock.exits))
            step = len(actions)
            if self._transport is not None:
                self._transport.flush()
            unused = [*self._visits, *self._outputs, *self._gradients, *self._weights]
            assert not unused, f"results of (stage, microbatch) {unused} were not used"
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
        self._mark_start()
        if hidden is not None and self._returns_gradient(action):
            hidden.requires_grad_()
        with torch.set_grad_enabled(trains and not self._plan.is_frozen):
            output, taps = stage.forward(action.microbatch, hidden)
        with torch.set_grad_enabled(trains):
            if self._plan.target(action) is not None:
                self._outputs[key] = self._checked(output).detach()
            if not trains:
                if not self._plan.has_any_backward(action.microbatch):  # an evaluation
                    for index, tap in enumerate(taps):
                        stage.exit_loss(action.microbatch, index, tap)
                return
            if self._plan.distills:
                is_last = action.stage == self._plan.num_stages - 1
                self._visits[key] = _Visit(None, None, taps, (), output if is_last else None)
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
        if self._plan.distills:
            self._distill(action, visit)
            return
        self._mark_start()
        with self._deferred_weights(action):
            # Exits do not need the received gradient, so they run before the wait for it.
            has_exits = bool(visit.taps)
            roots, gradients = self._exit_roots(action, visit)
            early = self._elapsed() if has_exits else 0.0
            received = self._result(action, self._gradients)
            self._mark_start(early)
            if received is not None and visit.output is not None:
                roots.append(visit.output)
                gradients.append(received)
            if roots:
                # Autograd sums the gradients of equal roots: a tap may be the output or the input.
                torch.autograd.backward(roots, gradients)
        if self._returns_gradient(action):
            assert visit.hidden is not None, f"{action} has no input whose gradient it could return"
            gradient = visit.hidden.grad
            # The gradient is None if nothing here depends on the input; the neighbour expects one.
            self._gradients[key] = torch.zeros_like(visit.hidden) if gradient is None else gradient

    def _distill(self, action: Action, visit: _Visit) -> None:
        final_hidden = visit.final_hidden
        if final_hidden is None:
            final_hidden = self._result(action, self._gradients)
        assert final_hidden is not None, f"{action} has no hidden state of the final exit"
        self._mark_start()
        self._stages[action.stage].set_final_hidden(action.microbatch, final_hidden)
        for index, tap in enumerate(visit.taps):
            self._exit_gradient(action, index, tap)
        if self._plan.target(action) is not None:
            self._gradients[action.stage, action.microbatch] = final_hidden

    @contextmanager
    def _deferred_weights(self, action: Action) -> Iterator[None]:
        if not self._plan.splits_backward:
            yield
            return
        with self._stages[action.stage].defer_weight_gradients() as add_weights:
            yield
        self._weights[action.stage, action.microbatch] = add_weights

    def _weight(self, action: Action) -> None:
        self._mark_start()
        self._weights.pop((action.stage, action.microbatch))()

    def _exit_roots(self, action: Action, visit: _Visit) -> tuple[list[GradientEdge], list[Tensor]]:
        # The exits' gradients enter the stage's graph at these edges. Edges keep no data, so that
        # taps and losses are freed before the stage's own backward.
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
        # Detached from the stage's graph, so that the exit's graph is freed before the next exit's.
        leaf = tap.detach().requires_grad_(tap.requires_grad)
        with torch.enable_grad():
            loss = self._stages[action.stage].exit_loss(action.microbatch, index, leaf)
        if loss.requires_grad:
            loss.backward()
        return leaf.grad

    def _mark_start(self, exits: float = 0.0) -> None:
        # The action starts now, or `exits` seconds earlier if it computed exits before it waited.
        # The wait itself is idle time.
        if self._clock is not None:
            self._clock.start_of_action, self._clock.exits = self._clock.now() - exits, exits

    def _elapsed(self) -> float:
        return 0.0 if self._clock is None else self._clock.now() - self._clock.start_of_action

    def _returns_gradient(self, action: Action) -> bool:
        # Whether the previous stage needs the gradient of this stage's input.
        return (
            not self._plan.is_frozen
            and self._plan.target(action._replace(op=Op.BACKWARD)) is not None
            and self._plan.has_backward(action)
        )

    def _result(self, action: Action, local: dict[Key, Tensor]) -> Tensor | None:
        # The result of the neighbouring stage: from `local`, or received from another rank.
        source = self._plan.source(action)
        if source is None:
            return None
        if not self._plan.crosses_ranks(source, action):
            return local.pop((source.stage, source.microbatch))
        return self._require_transport().wait_receive(
            peer=self._plan.stage_ranks[source.stage],
            channel=_channel(source),
            tag=self._tag(source),
        )

    def _send(self, action: Action) -> None:
        results = self._outputs if action.op is Op.SEND_FORWARD else self._gradients
        self._require_transport().send(
            results.pop((action.stage, action.microbatch)),
            peer=self._plan.stage_ranks[counterpart(action).stage],
            channel=_channel(action),
            tag=self._tag(action),
        )

    def _post_receive(self, action: Action) -> None:
        source = counterpart(action)
        shape, dtype, device = self._hidden
        self._require_transport().post_receive(
            torch.empty(shape, dtype=dtype, device=device),
            peer=self._plan.stage_ranks[source.stage],
            channel=_channel(action),
            tag=self._tag(source),
        )

    def _tag(self, source: Action) -> int:
        # Identifies a message by the microbatch and the stage that computed it.
        return source.microbatch * self._plan.num_stages + source.stage

    def _require_transport(self) -> Transport:
        assert self._transport is not None, "this rank has messages but no transport"
        return self._transport

    def _checked(self, output: Tensor | None) -> Tensor:
        shape, dtype, _ = self._hidden
        if output is None or tuple(output.shape) != tuple(shape) or output.dtype != dtype:
            actual = "None" if output is None else f"{tuple(output.shape)} {output.dtype}"
            raise PlanError(
                f"the stage's output is {actual}, but the next stage expects {shape} {dtype}"
            )
        return output

    def _failure(self, step: int, error: Exception) -> PipelineError:
        actions = self._plan.ranks[self._rank]
        place = str(actions[step]) if step < len(actions) else "the end, with sends in flight"
        picture = step_grid(self._plan.ranks, [(self._rank, step)])
        return PipelineError(
            f"pipeline rank {self._rank} failed at {place}: "
            f"{type(error).__name__}: {error}\n{picture}"
        )


def _channel(action: Action) -> Channel:
    forward = (Op.FORWARD, Op.SEND_FORWARD, Op.RECV_FORWARD)
    return "forward" if action.op in forward else "backward"
