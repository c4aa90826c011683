"""Pipeline schedules as data: per rank, a list of actions such as `2F0`.

A plan defines which rank computes which action in which order, and nothing else. `lower` adds the
communication and proves that the plan can be executed, `simulate` predicts its time and memory,
`runtime` executes it. Pure Python.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from ee_llm.errors import PlanError


class Op(StrEnum):
    """The kind of an action. Only F, B and W compute; lowering adds the others.

    In a plan with W, which computes the weight gradients, B does not compute them.
    """

    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"
    SEND_FORWARD = "SF"
    RECV_FORWARD = "RF"
    SEND_BACKWARD = "SB"
    RECV_BACKWARD = "RB"

    @property
    def computes(self) -> bool:
        """Return whether the action is computation of a stage, not communication."""
        return self in (Op.FORWARD, Op.BACKWARD, Op.WEIGHT)


_ACTION = re.compile(r"(\d+)(SF|RF|SB|RB|F|B|W)(\d+)")


class Action(NamedTuple):
    """One step of one rank: `2F0` is the forward of microbatch 0 on stage 2.

    The stage is always the one that acts: `2SF0` sends the output of 2F0, `3RF0` receives it, and
    `3SB0` sends the gradient of that output back to `2RB0`.
    """

    stage: int
    op: Op
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.microbatch}"

    def __repr__(self) -> str:
        return str(self)

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Return the action that prints as `text`. Raises PlanError if there is none."""
        match = _ACTION.fullmatch(text)
        if match is None:
            raise PlanError(
                f"{text!r} is not an action. Give stage, operation ({', '.join(Op)}) and "
                "microbatch, as in 2F0."
            )
        stage, op, microbatch = match.groups()
        return cls(int(stage), Op(op), int(microbatch))


class Visit(NamedTuple):
    """The stages that one microbatch visits.

    It runs forward on stages 0 .. depth-1, then backward on stages depth-1 .. first_backward.
    first_backward == depth means no backward.
    """

    depth: int
    first_backward: int


@dataclass(frozen=True)
class Plan:
    """The actions of every rank, in order, and the visits that they must accomplish.

    Attributes:
        ranks: The actions of each rank.
        stage_ranks: The rank of each stage. A rank may have several stages.
        visits: The stages that each microbatch must visit. They are redundant with the actions, so
            that a missing action is noticed.
        splits_backward: Whether each B computes only the gradient of the stage's input, and a
            separate W the gradients of its layers' weights.
        splits_exits: Whether W also computes the gradients of the exits' weights.
        local_backwards: Stages on which every microbatch has a B of the exits only, whose gradient
            does not reach the stage's own layers (EE-Tuning). The visits then have no backward.
        distills: Whether a B is of the exits only and receives and sends, instead of a gradient,
            the hidden state of the final exit, whose distribution the exits learn.
    """

    ranks: tuple[tuple[Action, ...], ...]
    stage_ranks: tuple[int, ...]
    visits: tuple[Visit, ...]
    splits_backward: bool = False
    splits_exits: bool = False
    local_backwards: tuple[int, ...] = ()
    distills: bool = False

    @property
    def is_frozen(self) -> bool:
        """Return whether only exits run backward."""
        return bool(self.local_backwards) or self.distills

    @property
    def num_ranks(self) -> int:
        """Return the number of pipeline ranks."""
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        """Return the number of stages over all ranks."""
        return len(self.stage_ranks)

    @property
    def num_microbatches(self) -> int:
        """Return the number of microbatches, including those that visit few stages."""
        return len(self.visits)

    @property
    def full_visit(self) -> Visit:
        """Return the visit of every stage, forward and, unless backwards are local, backward."""
        first_backward = self.num_stages if self.local_backwards else 0
        return Visit(depth=self.num_stages, first_backward=first_backward)

    @cached_property
    def work(self) -> frozenset[Action]:
        """Return the F, B and W actions that the visits require."""
        backward = (Op.BACKWARD, Op.WEIGHT) if self.splits_backward else (Op.BACKWARD,)

        def has_backward(stage: int, visit: Visit) -> bool:
            return stage >= visit.first_backward or stage in self.local_backwards

        return frozenset(
            Action(stage, op, microbatch)
            for microbatch, visit in enumerate(self.visits)
            for stage in range(visit.depth)
            for op in (Op.FORWARD, *(backward if has_backward(stage, visit) else ()))
        )

    def source(self, action: Action) -> Action | None:
        """Return the action on the neighbouring stage whose result this one receives, if any."""
        return self._neighbour(action, {Op.FORWARD: -1, Op.BACKWARD: 1, Op.WEIGHT: 0}[action.op])

    def target(self, action: Action) -> Action | None:
        """Return the action on the neighbouring stage that receives this one's result, if any."""
        return self._neighbour(action, {Op.FORWARD: 1, Op.BACKWARD: -1, Op.WEIGHT: 0}[action.op])

    def dependencies(self, action: Action) -> tuple[Action, ...]:
        """Return the actions that must end before this F, B or W can end."""
        before = {Op.BACKWARD: Op.FORWARD, Op.WEIGHT: Op.BACKWARD}
        own = (action._replace(op=before[action.op]),) if action.op in before else ()
        source = self.source(action)
        return own if source is None else (*own, source)

    def has_backward(self, action: Action) -> bool:
        """Return whether the action's microbatch runs backward on the action's stage."""
        return action._replace(op=Op.BACKWARD) in self.work

    def has_any_backward(self, microbatch: int) -> bool:
        """Return whether the microbatch runs backward on any stage."""
        visit = self.visits[microbatch]
        return visit.first_backward < visit.depth or bool(self.local_backwards)

    def crosses_ranks(self, first: Action, second: Action) -> bool:
        """Return whether the stages of two actions are on different ranks."""
        return self.stage_ranks[first.stage] != self.stage_ranks[second.stage]

    def without_communication(self) -> "Plan":
        """Return the plan before lowering."""
        ranks = tuple(tuple(a for a in actions if a.op.computes) for actions in self.ranks)
        return Plan(
            ranks,
            self.stage_ranks,
            self.visits,
            self.splits_backward,
            self.splits_exits,
            self.local_backwards,
            self.distills,
        )

    def _neighbour(self, action: Action, offset: int) -> Action | None:
        if offset == 0:  # the result of W stays on its stage
            return None
        if action.op is Op.BACKWARD and self.local_backwards:
            return None
        neighbour = action._replace(stage=action.stage + offset)
        return neighbour if neighbour in self.work else None


def one_f_one_b(num_stages: int, num_microbatches: int) -> Plan:
    """Return the 1F1B plan, one stage per rank (Narayanan et al., arXiv 2104.04473, section 2.2).

    Rank i runs P-1-i forwards and then alternates, so that it keeps the activations of at most P-i
    microbatches, regardless of their number.
    """
    _check_counts(num_stages, num_microbatches)
    ranks = []
    for stage in range(num_stages):
        forwards = [Action(stage, Op.FORWARD, m) for m in range(num_microbatches)]
        backwards = [Action(stage, Op.BACKWARD, m) for m in range(num_microbatches)]
        ahead = min(num_stages - 1 - stage, num_microbatches)
        actions = forwards[:ahead]
        for forward, backward in zip(forwards[ahead:], backwards, strict=False):
            actions += [forward, backward]
        ranks.append((*actions, *backwards[num_microbatches - ahead :]))
    visits = (Visit(depth=num_stages, first_backward=0),) * num_microbatches
    return Plan(tuple(ranks), tuple(range(num_stages)), visits)


def forward_only(num_ranks: int, num_microbatches: int, num_chunks: int = 1) -> Plan:
    """Return the plan that runs every microbatch forward only (evaluation).

    Rank r has the `num_chunks` stages r, r + num_ranks, .... As in interleaved 1F1B, groups of
    `num_ranks` microbatches pass one after the other.
    """
    _check_counts(num_ranks, num_microbatches)
    num_stages = num_ranks * num_chunks
    ranks = tuple(
        tuple(
            Action(stage, Op.FORWARD, m)
            for first in range(0, num_microbatches, num_ranks)
            for stage in range(rank, num_stages, num_ranks)
            for m in range(first, min(first + num_ranks, num_microbatches))
        )
        for rank in range(num_ranks)
    )
    visits = (Visit(depth=num_stages, first_backward=num_stages),) * num_microbatches
    return Plan(ranks, tuple(stage % num_ranks for stage in range(num_stages)), visits)


def _check_counts(num_stages: int, num_microbatches: int) -> None:
    for name, value in (("num_stages", num_stages), ("num_microbatches", num_microbatches)):
        if value < 1:
            raise PlanError(f"{name} = {value} is not valid. Give at least 1.")


def step_grid(
    ranks: Sequence[Sequence[Action]], marked: Collection[tuple[int, int]] = (), around: int = 6
) -> str:
    """Return the rank x step grid, with the `marked` (rank, step) cells in >arrows<.

    With marks, only steps at most `around` away from a mark are shown. A mark one past the last
    action of a rank shows as >end<.
    """
    columns = max((len(actions) for actions in ranks), default=0)
    columns = max([columns, *(step + 1 for _, step in marked)])
    first = max(0, min((step for _, step in marked), default=0) - around)
    last = min(columns, max((step for _, step in marked), default=columns) + around + 1)

    def cell(rank: int, step: int) -> str:
        actions = ranks[rank]
        text = str(actions[step]) if step < len(actions) else ""
        return f">{text or 'end'}<" if (rank, step) in marked else text

    rows = [["step", *(str(step) for step in range(first, last))]]
    for rank in range(len(ranks)):
        rows.append([f"rank {rank}", *(cell(rank, step) for step in range(first, last))])
    widths = [max(len(row[column]) for row in rows) for column in range(last - first + 1)]
    return "\n".join(
        " ".join(text.center(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
