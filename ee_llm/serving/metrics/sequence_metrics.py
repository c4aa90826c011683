"""Measure one sequence of a request from its steps, as they come from the engine."""

import asyncio

from ee_llm.inference.outputs import StepOutput
from ee_llm.inference.request import FinishReason
from ee_llm.serving.metrics.server_metrics import ServerMetrics


class SequenceMetrics:
    """Adds what a sequence takes to the metrics of the server.

    Times are those of the event loop at which steps come from the engine, so that they do not
    depend on how fast a client reads.
    """

    def __init__(self, metrics: ServerMetrics, num_prompt_tokens: int, arrived: float) -> None:
        """Begin to measure.

        Args:
            metrics: Metrics of the server.
            num_prompt_tokens: Number of tokens of the prompt.
            arrived: Time of the request by the clock of the event loop, in seconds.
        """
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._arrived = arrived
        self._last_s: float | None = None  # time of the last step with tokens
        self._is_over = False

    def add(self, step: StepOutput) -> None:
        """Measure a step; called in the event loop."""
        metrics, now = self._metrics, asyncio.get_running_loop().time()
        if step.tokens:
            if self._last_s is None:
                metrics.prompt_tokens.inc(self._num_prompt_tokens)
                metrics.first_token_s.observe(now - self._arrived)
            else:
                metrics.inter_token_s.observe(now - self._last_s)
            self._last_s = now
            metrics.generation_tokens.inc(len(step.tokens))
            for token in step.tokens:
                metrics.exit_depth.observe(token.exit)
        if step.request_output is not None:
            metrics.draft_tokens.inc(step.request_output.num_drafted)
            metrics.accepted_tokens.inc(step.request_output.num_accepted)
            metrics.request_s.observe(now - self._arrived)
            self._end(step.request_output.finish_reason)

    def close(self, reason: FinishReason) -> None:
        """Count the sequence as one that ended before its end, unless it is finished."""
        if not self._is_over:
            self._end(reason)

    def _end(self, reason: FinishReason) -> None:
        self._is_over = True
        self._metrics.finished[reason].inc()
