"""Measure how fast tokens are generated, and how fast they would be at full depth."""

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from ee_llm.inference.engine_base import EngineBase
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import Request

_NUM_REPEATED = 17  # tokens of a generation that are decoded again; the first one is not timed


@dataclass(frozen=True)
class Speed:
    """Speed of one generation or of a batch; values that were not measured are None.

    Attributes:
        time_to_first_token_s: Seconds from the request to its first token; None for a batch.
        tokens_per_second: Speed after the first token.
        acceptance: Share of drafted tokens that the full model confirmed, for self-speculation.
        full_tokens_per_second: Speed without drafts, for self-speculation.
    """

    time_to_first_token_s: float | None = None
    tokens_per_second: float | None = None
    acceptance: float | None = None
    full_tokens_per_second: float | None = None

    @property
    def against_full(self) -> float | None:
        """Speed relative to that at full depth; below 1, drafting costs more than it saves."""
        if self.tokens_per_second is None or self.full_tokens_per_second is None:
            return None
        return self.tokens_per_second / self.full_tokens_per_second

    def warning(self) -> str | None:
        """Return a warning if drafting is slower than not drafting."""
        if self.against_full is None or self.against_full >= 1.0:
            return None
        accepted = ""
        if self.acceptance is not None:
            accepted = f"; {self.acceptance:.0%} of the drafts were accepted"
        return (
            f"self-speculation is slower than full depth: {self.tokens_per_second:.1f} tokens/s"
            f" against {self.full_tokens_per_second:.1f}{accepted}. Use strategy ="
            " 'full', tune the exit that drafts, choose another draft_exit, or raise"
            " draft_threshold."
        )


class Stopwatch:
    """Times the tokens of one request as they are generated."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: float | None = None
        self._last = 0.0
        self._num_later = 0

    @property
    def is_running(self) -> bool:
        """Whether there was a token."""
        return self._first is not None

    def tick(self, num_tokens: int) -> None:
        """Record new tokens."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
        else:
            self._num_later += num_tokens

    def speed(self) -> Speed:
        """Return the speed so far."""
        if self._first is None:
            return Speed()
        seconds = self._last - self._first
        per_second = self._num_later / seconds if self._num_later else None
        return Speed(self._first - self._start, per_second)


def against_full(
    speed: Speed,
    engine: EngineBase,
    drafted: Items[tuple[Request, RequestOutput]],
    batch_size: int = 1,
) -> Speed:
    """Return the speed of self-speculating requests together with that at full depth.

    Decode the last tokens of up to `batch_size` outputs again at full depth, which gives the same
    tokens. The tokens before them serve as prompts, which are still in the cache. If the speed with
    drafts is not known, as for a batch, measure it in the same way.
    """
    num_drafted = sum(output.num_drafted for _, output in drafted)
    num_accepted = sum(output.num_accepted for _, output in drafted)
    speed = replace(speed, acceptance=num_accepted / num_drafted if num_drafted else None)
    long = [pair for pair in drafted if len(pair[1].token_ids) >= _NUM_REPEATED] or list(drafted)
    sample = long[:batch_size]
    num_tokens = min(_NUM_REPEATED, *(len(output.token_ids) for _, output in sample))
    if num_tokens < 2:
        return speed
    again = [
        replace(
            request,
            id=f"{request.id} again",
            prompt_token_ids=(*output.prompt_token_ids, *output.token_ids[:-num_tokens]),
            sampling_params=replace(
                request.sampling_params,
                max_tokens=num_tokens,
                min_tokens=0,
                stop=(),
                stop_token_ids=(),
                ignore_eos=True,
            ),
        )
        for request, output in sample
    ]
    if speed.tokens_per_second is None:
        speed = replace(speed, tokens_per_second=_decoding_speed(engine, again))
    full = [replace(request, strategy="full", speculation=None) for request in again]
    return replace(speed, full_tokens_per_second=_decoding_speed(engine, full))


def _decoding_speed(engine: EngineBase, requests: Items[Request]) -> float | None:
    """Return the tokens per second of requests that run together, once each has a token."""
    for request in requests:
        engine.add(request)
    waiting = {request.id for request in requests}
    start = end = 0.0
    num_tokens = 0
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter()
        if not waiting:
            num_tokens += sum(len(output.tokens) for output in outputs)
            end = now
            if any(output.request_output for output in outputs):
                break  # Fewer requests run from here on.
            continue
        waiting -= {output.request_id for output in outputs}
        start = now
    while engine.has_work:
        engine.step()
    return num_tokens / (end - start) if num_tokens else None
