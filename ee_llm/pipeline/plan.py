"""Pipeline schedules as data: per rank, a list of actions such as `2F0`.

A plan says who computes what in which order and nothing else. `lower` adds the communication and
proves the plan sound, `simulate` times it, `runtime` carries it out. Pure Python.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from ee_llm.errors import PlanError


class Op(StrEnum):
    """What an action does. Only F, B and W compute; the others are added by lowering.

    Where a plan has W, the gradients of weights, B leaves them to it.
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
        """Whether this is work of a stage, not communication."""
        return self in (Op.FORWARD, Op.BACKWARD, Op.WEIGHT)


_ACTION = re.compile(r"(\d+)(SF|RF|SB|RB|F|B|W)(\d+)")


class Action(NamedTuple):
    """One step of one rank: `2F0` is the forward of microbatch 0 on stage 2.

    The stage is always the one that acts: `2SF0` sends the output of 2F0, `3RF0` receives it, and
    `3SB0` returns to `2RB0` the gradient of that output.
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
        """Return the action that prints as `text`; ValueError if there is none."""
        match = _ACTION.fullmatch(text)
        if match is None:
            raise PlanError(
                f"{text!r} is no action: expected stage, operation ({', '.join(Op)}) and "
                f"microbatch, as in 2F0"
            )
        stage, op, microbatch = match.groups()
        return cls(int(stage), Op(op), int(microbatch))


class Visit(NamedTuple):
    """How far one microbatch travels: down to `depth`, and how far back.

    Forward on stages 0 .. depth-1, then backward on stages depth-1 .. first_backward;
    first_backward == depth means that there is no backward at all.
    """

    depth: int
    first_backward: int


@dataclass(frozen=True)
class Plan:
    """What every rank does, in order, and the visits that this is to accomplish.

    ranks: per rank, its actions. stage_ranks: per stage, the rank that holds it (a rank may hold
    several). visits: per microbatch, which stages it has to see; stated apart from the lists so
    that an action missing from them is known to be missing. splits_backward: whether every B, the
    gradient of the stage's input, has a W of its own, the gradients of its layers' weights;
    splits_exits: whether that W also makes those of its exits' weights. local_backwards: stages
    where every microbatch has a B of its exits alone, whose gradient goes no further, not even into
    the stage's own layers (EE-Tuning); its visits then have no backward.
    """

    ranks: tuple[tuple[Action, ...], ...]
    stage_ranks: tuple[int, ...]
    visits: tuple[Visit, ...]
    splits_backward: bool = False
    splits_exits: bool = False
    local_backwards: tuple[int, ...] = ()

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
        """Return the number of microbatches, those that visit few stages included."""
        return len(self.visits)

    @property
    def whole_visit(self) -> Visit:
        """The visit that sees every stage, forward and back, where there is a way back."""
        first_backward = self.num_stages if self.local_backwards else 0
        return Visit(depth=self.num_stages, first_backward=first_backward)

    @cached_property
    def work(self) -> frozenset[Action]:
        """The F, B and W actions that the visits call for."""
        back = (Op.BACKWARD, Op.WEIGHT) if self.splits_backward else (Op.BACKWARD,)

        def turns(stage: int, visit: Visit) -> bool:
            return stage >= visit.first_backward or stage in self.local_backwards

        return frozenset(
            Action(stage, op, microbatch)
            for microbatch, visit in enumerate(self.visits)
            for stage in range(visit.depth)
            for op in (Op.FORWARD, *(back if turns(stage, visit) else ()))
        )

    def source(self, action: Action) -> Action | None:
        """Return the action on the neighbouring stage whose result this one takes, if any."""
        return self._neighbour(action, {Op.FORWARD: -1, Op.BACKWARD: 1, Op.WEIGHT: 0}[action.op])

    def target(self, action: Action) -> Action | None:
        """Return the action on the neighbouring stage that takes this one's result, if any."""
        return self._neighbour(action, {Op.FORWARD: 1, Op.BACKWARD: -1, Op.WEIGHT: 0}[action.op])

    def needs(self, action: Action) -> tuple[Action, ...]:
        """Return the actions that must be over before this F, B or W can be completed."""
        before = {Op.BACKWARD: Op.FORWARD, Op.WEIGHT: Op.BACKWARD}
        own = (action._replace(op=before[action.op]),) if action.op in before else ()
        source = self.source(action)
        return own if source is None else (*own, source)

    def has_backward(self, action: Action) -> bool:
        """Return whether the action's microbatch runs backward on the action's stage."""
        return action._replace(op=Op.BACKWARD) in self.work

    def goes_back(self, microbatch: int) -> bool:
        """Return whether the microbatch runs backward on any stage."""
        visit = self.visits[microbatch]
        return visit.first_backward < visit.depth or bool(self.local_backwards)

    def crosses_ranks(self, one: Action, other: Action) -> bool:
        """Return whether the two actions' stages lie on different ranks."""
        return self.stage_ranks[one.stage] != self.stage_ranks[other.stage]

    def without_communication(self) -> "Plan":
        """Return the plan as it was before lowering."""
        ranks = tuple(tuple(a for a in actions if a.op.computes) for actions in self.ranks)
        return Plan(
            ranks,
            self.stage_ranks,
            self.visits,
            self.splits_backward,
            self.splits_exits,
            self.local_backwards,
        )

    def _neighbour(self, action: Action, towards: int) -> Action | None:
        if towards == 0:  # the work of W stays on its stage
            return None
        if action.op is Op.BACKWARD and self.local_backwards:
            return None
        neighbour = action._replace(stage=action.stage + towards)
        return neighbour if neighbour in self.work else None


def one_f_one_b(num_stages: int, num_microbatches: int) -> Plan:
    """Return the 1F1B plan, one stage per rank (Narayanan et al., arXiv 2104.04473, section 2.2).

    Rank i runs P-1-i forwards ahead and then alternates, so that it holds the activations of at
    most P-i microbatches, however many there are.
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
    """Return the plan that runs every microbatch forward and nothing backward (evaluation).

    Rank r holds the stages r, r + num_ranks, ..., `num_chunks` of them; as in interleaved 1F1B,
    groups of `num_ranks` microbatches pass one after the other.
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
            raise PlanError(f"{name} is {value}: a plan needs at least 1")


def step_grid(
    ranks: Sequence[Sequence[Action]], marked: Collection[tuple[int, int]] = (), around: int = 6
) -> str:
    """Return the rank x step grid, the `marked` (rank, step) cells in >arrows<.

    With marks, only steps up to `around` away from one are shown. A mark one past a rank's last
    action shows as >end<.
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
