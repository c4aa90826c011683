"""The deferral of rows in an engine that several candidates use in turns."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from ee_llm.inference.engine import Engine
from ee_llm.inference.engine_base import EngineBase
from ee_llm.inference.scheduling.deferral import Deferral

_State = tuple[Deferral | None, list[int]]
"""The deferral of an engine, and the number of rows that each segment waits for."""


class CandidateDeferrals:
    """Gives each candidate what it would have in an engine of its own.

    Deferral learns exit rates and latencies from passes, so candidates must not share them.
    """

    def __init__(self, engine: EngineBase) -> None:
        """Start from the present state of an engine; only `Engine` defers rows."""
        self._engine = engine if isinstance(engine, Engine) else None
        self._start = self._state()
        self._states: dict[int, _State] = {}

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Let the engine use and update the state of one candidate."""
        engine = self._engine
        if engine is None or self._start is None:
            yield
            return
        state = self._states.get(index) or copy.deepcopy(self._start)
        engine.deferral, engine.scheduler.deferral_targets = state
        yield
        self._states[index] = engine.deferral, engine.scheduler.deferral_targets

    def reset(self) -> None:
        """Forget what all candidates have learned."""
        self._states.clear()

    def _state(self) -> _State | None:
        if self._engine is None or self._engine.deferral is None:
            return None
        return self._engine.deferral, self._engine.scheduler.deferral_targets
