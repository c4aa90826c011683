"""Measure how fast tokens come, and how fast they would come at full depth."""

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from ee_llm.inference.engine_base import EngineBase
from ee_llm.inference.request import Request
from ee_llm.inference.verification.reference_decoding import RequestOutput

_NUM_REPEATED = 17  # tokens of a generation that are decoded again; the first is not timed


@dataclass(frozen=True)
class Speed:
    """How fast one generation, or a batch of them, was made.

    time_to_first_token_s: from the request to its first token, None for a batch.
    tokens_per_second: after the first token, None if there was no later one.
    For self-speculation alone: acceptance, the share of drafted tokens that the model confirmed,
    and full_tokens_per_second, the speed without drafts. None elsewhere and where nothing could be
    measured.
    """

    time_to_first_token_s: float | None = None
    tokens_per_second: float | None = None
    acceptance: float | None = None
    full_tokens_per_second: float | None = None

    @property
    def against_full(self) -> float | None:
        """Return the speed over that at full depth; below 1 drafting costs more than it saves."""
        if self.tokens_per_second is None or self.full_tokens_per_second is None:
            return None
        return self.tokens_per_second / self.full_tokens_per_second

    def warning(self) -> str | None:
        """Return what to tell the user if drafting is slower than not drafting."""
        if self.against_full is None or self.against_full >= 1.0:
            return None
        accepted = ""
        if self.acceptance is not None:
            accepted = f"; {self.acceptance:.0%} of the drafts were accepted"
        return (
            f"self-speculation is slower than full depth: {self.tokens_per_second:.1f} tokens/s"
            f" against {self.full_tokens_per_second:.1f}{accepted}. Use --strategy full,"
            " tune the exit that drafts, choose another with --draft-exit, or raise"
            " --draft-threshold."
        )


class Stopwatch:
    """Times the tokens of one request as they come."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: float | None = None
        self._last = 0.0
        self._num_later = 0

    @property
    def is_running(self) -> bool:
        """Return whether there was a token."""
        return self._first is not None

    def tick(self, num_tokens: int) -> None:
        """Take note of new tokens."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
        else:
            self._num_later += num_tokens

    def speed(self) -> Speed:
        """Return what was measured so far."""
        if self._first is None:
            return Speed()
        seconds = self._last - self._first
        per_second = self._num_later / seconds if self._num_later else None
        return Speed(self._first - self._start, per_second)


def against_full(
    speed: Speed,
    decoder: EngineBase,
    drafted: Items[tuple[Request, RequestOutput]],
    batch_size: int = 1,
) -> Speed:
    """Return the speed of self-speculating requests beside that at full depth.

    The last tokens of up to `batch_size` generations are decoded again at full depth, where they
    are the same ones, with what is before them as prompts that the cache still holds. A speed that
    was not measured, as for a batch, is measured likewise, with drafts.
    """
    num_drafted = sum(generation.num_drafted for _, generation in drafted)
    num_accepted = sum(generation.num_accepted for _, generation in drafted)
    speed = replace(speed, acceptance=num_accepted / num_drafted if num_drafted else None)
    long = [pair for pair in drafted if len(pair[1].tokens) >= _NUM_REPEATED] or list(drafted)
    sample = long[:batch_size]
    num_tokens = min(_NUM_REPEATED, *(len(generation.tokens) for _, generation in sample))
    if num_tokens < 2:
        return speed
    again = [
        replace(
            request,
            id=f"{request.id} again",
            prompt=(*generation.prompt, *generation.tokens[:-num_tokens]),
            max_new_tokens=num_tokens,
            eos_token_ids=(),
            stop_tokens=(),
            stop_strings=(),
        )
        for request, generation in sample
    ]
    if speed.tokens_per_second is None:
        speed = replace(speed, tokens_per_second=_decoding_speed(decoder, again))
    full = [replace(request, strategy="full", draft=None) for request in again]
    return replace(speed, full_tokens_per_second=_decoding_speed(decoder, full))


def _decoding_speed(decoder: EngineBase, requests: Items[Request]) -> float | None:
    """Return the tokens per second of requests that run together, from when all have a token."""
    for request in requests:
        decoder.add(request)
    waiting = {request.id for request in requests}
    start = end = 0.0
    num_tokens = 0
    while decoder.has_work:
        outputs = decoder.step()
        now = time.perf_counter()
        if not waiting:
            num_tokens += sum(len(output.token_outputs) for output in outputs)
            end = now
            if any(output.generation for output in outputs):
                break  # fewer run from here on
            continue
        waiting -= {output.id for output in outputs}
        start = now
    while decoder.has_work:
        decoder.step()
    return num_tokens / (end - start) if num_tokens else None
