"""Runs passes: plans in, logits of the judged rows out; it decides nothing.

Legend of shapes: t rows of a part, r judged rows, h hidden, v vocabulary.
"""

import time
from collections.abc import Sequence as Items
from itertools import accumulate

import torch
from torch import Tensor

from ee_llm import platform
from ee_llm.inference.attention import Batch, Run, live_runs
from ee_llm.inference.execution import Execution, Executor
from ee_llm.inference.holding import Profile
from ee_llm.inference.judge import summarize
from ee_llm.inference.scheduler import Limits, Part, Plan, Span
from ee_llm.inference.stage import Stage
from ee_llm.inference.wire import decode_plan, encode_plan

# What the leading rank tells the others: nothing, a pass, a pass whose logits it needs not, to
# forget everything.
_HEARTBEAT, _WHOLE, _SHORT, _CLEAR = b"-", b"w", b"s", b"c"
ROWS_PROFILED = (1, 2, 4, 8, 16, 32, 64, 128)


class Runner:
    """One model with its cache, and a ring for the pending rows of each slot at each boundary."""

    def __init__(
        self,
        stage: Stage,
        limits: Limits,
        max_length: int,
        ranks: platform.ServingGrid | None = None,
        execution: Execution | None = None,
    ) -> None:
        self.stage = stage
        self._ranks = ranks
        self._last_told = time.monotonic()
        self._num_slots, self._num_pending = limits.max_sequences, limits.max_pending
        self._executor = Executor(stage, limits, max_length, execution)
        rows = limits.max_sequences * limits.max_pending
        hidden = stage.hidden_size
        self._rings = [
            torch.zeros(rows, hidden, dtype=stage.dtype, device=stage.device)
            for _ in stage.pieces[:-1]
        ]

    def run(self, plan: Plan) -> Tensor:
        """Return the logits [r, v] of the rows that the plan's heads name, in their order."""
        if self._ranks is None:
            return self._run(plan)
        self._tell(_WHOLE + encode_plan(plan))
        return self._ranks.gather(self._run(plan))

    def run_shortly(self, plan: Plan) -> Tensor:
        """Return summaries [r, 3 * ranks] of the logits in place of them, see `summarize`."""
        assert self._ranks is not None, "one rank has all logits"
        self._tell(_SHORT + encode_plan(plan))
        return self._ranks.gather(self._summary(plan))

    def clear(self) -> None:
        """Forget all keys, values and pending rows, on the ranks that follow too.

        What is not finite would spread: a masked value is multiplied with 0, not left out.
        """
        self._tell(_CLEAR)
        self._clear()

    def _clear(self) -> None:
        self.stage.clear()
        for ring in self._rings:
            ring.zero_()

    @property
    def has_followers(self) -> bool:
        """Return whether other ranks run what this one runs."""
        return self._ranks is not None and self._ranks.tensor_size > 1

    def follow(self) -> None:
        """Run what the leading rank runs, until it dismisses its followers."""
        assert self._ranks is not None, "there is nobody to follow"
        while message := self._ranks.tell():
            kind, plan = message[:1], message[1:]
            if kind == _WHOLE:
                self._ranks.gather(self._run(decode_plan(plan)))
            elif kind == _SHORT:
                self._ranks.gather(self._summary(decode_plan(plan)))
            elif kind == _CLEAR:
                self._clear()

    def dismiss(self) -> None:
        """Let the ranks that follow this one go."""
        self._tell(b"")

    def rest(self) -> None:
        """Tell the ranks that follow this one that it is there, if it is time to."""
        if self._ranks and time.monotonic() - self._last_told > self._ranks.timeout_s / 3:
            self._tell(_HEARTBEAT)

    def _tell(self, message: bytes) -> None:
        if self._ranks:
            self._ranks.tell(message)
            self._last_told = time.monotonic()

    def _summary(self, plan: Plan) -> Tensor:
        return summarize(self._run(plan), self.stage.first_id)

    @torch.no_grad()
    def _run(self, plan: Plan) -> Tensor:
        self._executor.prepare(plan.tables, plan.zeroed)
        x = attended = torch.empty(0)
        spans: tuple[Span, ...] = ()
        batch: Batch | None = None
        for part in plan.parts:
            if batch is None or part.spans != spans or batch.live is not None or part.frozen:
                batch = self._batch(part.spans, live_runs(runs_of(part.spans), part.frozen))
            if part.segment == 0:
                tokens = torch.tensor(plan.tokens, device=self.stage.device)
                x = self.stage.embed(tokens, batch.positions)
            elif part.spans != spans:  # rows that were left at this boundary go along
                if spans:
                    self._leave(part.segment - 1, x, spans)
                ring = self._rings[part.segment - 1]
                x = ring[self._places(part.spans)]
            spans = part.spans
            x, attended = self._executor.run(part.segment, x, batch)
            if part is not plan.parts[-1] and self.stage.has_block(part.segment):
                self.stage.run_block(part.segment, x, self._batch(part.spans, ()))
        last = plan.last_segment
        if last < len(self._rings):
            self._leave(last, x, spans)
        return self._judged(plan, x, attended)

    def profile(self, rows: Items[int] = ROWS_PROFILED) -> tuple[Profile, Profile]:
        """Return what passes of so many rows take without a head, and what the head adds.

        One row each of as many slots. For when nothing runs: it writes to the cache's block for
        padding, and to rings.
        """
        rows = tuple(count for count in rows if count <= self._num_slots) or (1,)
        passes, heads = [], []
        for segment in range(len(self.stage.pieces)):
            bare, judged = zip(*(self._seconds(segment, count) for count in rows), strict=True)
            passes.append(bare)
            heads.append(tuple(max(0.0, b - a) for a, b in zip(bare, judged, strict=True)))
        return Profile(rows, tuple(passes)), Profile(rows, tuple(heads))

    def _seconds(self, segment: int, num_rows: int) -> tuple[float, float]:
        """Return the least time of a few passes without and with the head, in turn.

        The first of each is for caches and allocators.
        """
        spans = tuple(Span(slot, 0, 1) for slot in range(num_rows))
        tokens = (0,) * num_rows if segment == 0 else ()
        times: list[list[float]] = [[], []]
        while len(times[0]) < 4 or (len(times[0]) < 20 and sum(map(sum, times)) < 0.04):
            for seconds, heads in zip(times, ((), spans), strict=True):
                start = time.perf_counter()
                self.run(Plan((Part(segment, spans),), tokens, heads, ()))
                platform.synchronize()
                seconds.append(time.perf_counter() - start)
        bare, judged = (min(seconds[1:]) for seconds in times)
        return bare, judged

    def _judged(self, plan: Plan, x: Tensor, attended: Tensor) -> Tensor:
        """Return the logits of the judged rows; an exit's block sees all rows in any case."""
        last, spans = plan.last_segment, plan.parts[-1].spans
        first = {run.slot: run.first - run.start for run in runs_of(spans)}
        judged = [Run(s.slot, s.start, s.stop, first[s.slot] + s.start) for s in plan.heads]
        batch = self._batch(spans, judged) if self.stage.has_block(last) else None
        return self.stage.logits(last, x, attended, judged, batch)

    def _batch(self, spans: Items[Span], live: Items[Run] | None) -> Batch:
        return self._executor.batch(runs_of(spans), live)

    def _leave(self, boundary: int, x: Tensor, spans: Items[Span]) -> None:
        self._rings[boundary].index_copy_(0, self._places(spans), x)

    def _places(self, spans: Items[Span]) -> Tensor:
        """Return where in a ring the rows of `spans` are [t]."""
        size = self._num_pending
        places = [s.slot * size + p % size for s in spans for p in range(s.start, s.stop)]
        return torch.tensor(places, dtype=torch.int64, device=self.stage.device)


def runs_of(spans: Items[Span]) -> list[Run]:
    """Return the rows of `spans`, numbered one after the other."""
    ends = accumulate(map(len, spans))
    return [Run(s.slot, s.start, s.stop, end - len(s)) for s, end in zip(spans, ends, strict=True)]
