"""The state of a request while it is decoded.

A sequence of n tokens has rows 0 .. n-1. The row at position p decides the token at p + 1, and the
newest row is the *frontier*. Segment s ends at exit s, the last segment at the final exit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ee_llm.inference.choices import Measure, logit_measure
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import ExitResult, FinishReason, Request
from ee_llm.inference.text.detokenizer import GeneratedText

NON_FINITE = (
    "an exit computed logits that are not finite. The weights are damaged, or the dtype is too"
    " narrow for them; try float32"
)


@dataclass(eq=False)  # Sequences compare by identity.
class Sequence:
    """An unfinished request: its tokens and, as watermarks, how many each segment has processed.

    Attributes:
        request: The request.
        boundaries: Boundaries of all exits, the final one last.
        max_length: Number of rows that the model has positions for.
        vocab_size: Number of token ids of the model.
        detokenize: Function from token ids to text; needed for stop strings only.
        tokens: The prompt, the decided tokens, then drafts that no full pass has confirmed yet.
        num_confirmed: Number of leading tokens that are not drafts.
        watermarks: watermarks[s] leading positions have been processed by segment s; they do not
            increase with s.
        declined: Deepest exit that the frontier did not take; -1 before the first.
        predicted: Token ids that this exit predicted, if the measure of deeper exits needs them.
        slot: Slot in the scheduler; -1 while the sequence waits.
        blocks: Blocks of the K/V cache, in order of positions.
        keys: Keys of the leading full blocks, by which other sequences find them.
        num_tabled: Number of blocks that the runner knows of.
        num_published: Number of blocks that the prefix cache knows of.
        num_cached: Number of leading positions that were in the prefix cache.
        waiting_since: Step at which rows of the sequence last ran.
        exits, confidences, logprobs, top_logprobs: See `RequestOutput`.
        num_drafted, num_accepted: See `RequestOutput`.
        num_rejections: Number of times that drafts were rejected.
        finish_reason: Why the sequence ended; None while it runs.
        error: Message of the finish reason `error`.
        is_tainted: Keys and values may be NaN or infinite, so the blocks must be zeroed before
            they are reused.
        may_draft: False after logits were not finite while drafts were present, which may have
            been the cause.
    """

    request: Request
    boundaries: tuple[int, ...]
    max_length: int
    vocab_size: int
    detokenize: Callable[[list[int]], str] | None = None
    tokens: list[int] = field(default_factory=list)
    num_confirmed: int = 0
    watermarks: list[int] = field(default_factory=list)
    declined: int = -1
    predicted: tuple[int, ...] = ()
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_tabled: int = 0
    num_published: int = 0
    num_cached: int = 0
    waiting_since: int = 0
    exits: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    num_drafted: int = 0
    num_rejections: int = 0
    num_accepted: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    is_tainted: bool = False
    may_draft: bool = True
    _counts: dict[int, int] = field(default_factory=dict)
    _num_counted: int = 0
    _text: GeneratedText | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)
        self.num_confirmed = len(self.tokens)
        self.watermarks = [0] * len(self.boundaries)
        self._thresholds = tuple(self._threshold(boundary) for boundary in self.boundaries)

    @property
    def num_prompt(self) -> int:
        """Number of prompt tokens."""
        return len(self.request.prompt_token_ids)

    @property
    def new_tokens(self) -> list[int]:
        """Tokens decided so far, without drafts."""
        return self.tokens[self.num_prompt : self.num_confirmed]

    @property
    def num_reusable(self) -> int:
        """Number of leading rows whose keys and values depend on their tokens only.

        Drafts may be rejected later, and `propagate` freezes the rows of new tokens.
        """
        if self.request.strategy == "propagate":
            return self.num_prompt - 1
        return self.num_confirmed

    @property
    def max_rows(self) -> int:
        """Greatest number of rows that the sequence can get."""
        return min(self.num_prompt + self.request.sampling_params.max_tokens - 1, self.max_length)

    @property
    def last_segment(self) -> int:
        """Number of the segment that ends at the final exit."""
        return len(self.boundaries) - 1

    @property
    def num_pending(self) -> int:
        """Number of positions that some but not all segments have processed."""
        return self.watermarks[0] - self.watermarks[-1]

    def decides_at(self, segment: int) -> bool:
        """Return whether the exit at the end of `segment` decides about the frontier."""
        if segment == self.last_segment:
            return True
        if self._thresholds[segment] is None or self.declined >= segment:
            return False
        speculation = self.request.speculation
        if speculation is None:
            return True
        if not self.may_draft:
            return False
        num_left = self.request.sampling_params.max_tokens - (len(self.tokens) - self.num_prompt)
        return (
            len(self.tokens) - self.num_confirmed < speculation.draft_length
            and num_left > 1
            and len(self.tokens) < self.max_length
        )

    def threshold(self, segment: int) -> float:
        """Return the least confidence that exits at the end of `segment`; 0 always exits."""
        threshold = self._thresholds[segment]
        assert threshold is not None, f"the exit after segment {segment} is off"
        return threshold

    def measure(self, segment: int) -> Measure:
        """Return the measure of confidence of the exit at the end of `segment`."""
        measure = self.request.policy.measure
        return measure if self.threshold(segment) > 0.0 else logit_measure(measure)

    def history(self, position: int) -> tuple[int, ...]:
        """Return the distinct tokens up to `position`, in any order, for a repetition penalty.

        The result is empty without a penalty. Counts are updated incrementally, since the position
        moves little between calls.
        """
        if self.request.sampling_params.repetition_penalty == 1.0:
            return ()
        self._count(position + 1)
        return tuple(self._counts)

    def banned(self, position: int) -> tuple[int, ...]:
        """Return the ids that the row at `position` may not draw."""
        index = position + 1 - self.num_prompt
        request = self.request
        return request.sampling_params.banned_token_ids(
            index, request.eos_token_ids, self.vocab_size
        )

    def _count(self, num_tokens: int) -> None:
        """Move the counts to those of the first `num_tokens` tokens."""
        for token in self.tokens[self._num_counted : num_tokens]:
            self._counts[token] = self._counts.get(token, 0) + 1
        for token in self.tokens[num_tokens : self._num_counted]:
            self._counts[token] -= 1
            if self._counts[token] == 0:
                del self._counts[token]
        self._num_counted = num_tokens

    def table_blocks(self) -> list[tuple[int, int, int]]:
        """Return the blocks that are new to the runner as (slot, index, block)."""
        start, self.num_tabled = self.num_tabled, len(self.blocks)
        return [(self.slot, index, self.blocks[index]) for index in range(start, self.num_tabled)]

    def is_frozen(self, position: int, segment: int) -> bool:
        """Return whether the row at `position` is frozen in `segment`, as `propagate` does."""
        index = position - (self.num_prompt - 1)
        if self.request.strategy != "propagate" or not 0 <= index < len(self.exits):
            return False
        return segment > 0 and self.exits[index] <= self.boundaries[segment - 1]

    def apply(self, segment: int, result: ExitResult) -> bool:
        """Apply an exit's result for a row; return whether results of later rows still count."""
        if not result.is_finite:
            self.finish_reason, self.error, self.is_tainted = "error", NON_FINITE, True
            return False
        if not result.exited:
            self.declined, self.predicted = segment, result.predicted
            return True
        self.declined, self.predicted = -1, ()
        is_final = segment == self.last_segment
        if self.request.speculation is not None and not is_final:
            assert result.position + 1 == len(self.tokens), "a draft follows the newest row"
            self.tokens.append(result.token)
            self.num_drafted += 1
            return True
        follows = result.position + 1
        is_confirmed = follows < len(self.tokens) and self.tokens[follows] == result.token
        if not is_confirmed:
            self.num_rejections += follows < len(self.tokens)
            self._count(min(self._num_counted, follows))
            del self.tokens[follows:]
            self.tokens.append(result.token)
            self.watermarks = [min(mark, follows) for mark in self.watermarks]
        self.num_accepted += is_confirmed
        self.num_confirmed = follows + 1
        self.exits.append(self.boundaries[segment])
        self.confidences.append(result.confidence)
        self.logprobs.append(result.logprob)
        self.top_logprobs.append(result.top_logprobs)
        self.finish_reason = self._finish_reason(result.token)
        return is_confirmed and self.finish_reason is None

    def restart(self) -> None:
        """Reset what depends on the cache and the rings; keep the decided tokens."""
        if len(self.tokens) > self.num_confirmed:  # Drafts are made again.
            self._count(min(self._num_counted, self.num_confirmed))
            del self.tokens[self.num_confirmed :]
            self.declined, self.predicted = -1, ()
        self.watermarks = [0] * len(self.boundaries)
        self.slot, self.blocks = -1, []
        self.num_tabled = self.num_published = self.num_cached = 0

    def output(self) -> RequestOutput:
        """Return the output of a finished sequence, without texts."""
        request, finish_reason = self.request, self.finish_reason
        assert finish_reason is not None, "the sequence is not finished"
        return RequestOutput(
            request_id=request.id,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=tuple(self.new_tokens),
            exits=tuple(self.exits),
            confidences=tuple(self.confidences),
            logprobs=tuple(self.logprobs),
            top_logprobs=tuple(self.top_logprobs) if request.sampling_params.logprobs else (),
            finish_reason=finish_reason,
            policy=request.policy.under(request.strategy),
            sampling_params=request.sampling_params,
            strategy=request.strategy,
            num_layers=self.boundaries[-1],
            eos_token_ids=request.eos_token_ids,
            num_drafted=self.num_drafted,
            num_accepted=self.num_accepted,
            error=self.error,
            contrast=request.contrast,
        )

    def _threshold(self, boundary: int) -> float | None:
        """Return the least confidence that exits at a boundary; None if the exit is off."""
        request, speculation = self.request, self.request.speculation
        if boundary == self.boundaries[-1]:
            return 0.0
        if speculation is not None:
            is_draft = boundary == speculation.draft_exit
            return (speculation.draft_threshold or 0.0) if is_draft else None
        return request.policy.under(request.strategy).threshold(boundary)

    def _finish_reason(self, token: int) -> FinishReason | None:
        params = self.request.sampling_params
        num_new = self.num_confirmed - self.num_prompt
        if num_new > params.min_tokens:
            if token in self.request.eos_token_ids and not params.ignore_eos:
                return "eos"
            if token in params.stop_token_ids:
                return "stop"
        try:
            if self._is_stopped(token):
                return "stop"
        except Exception as error:  # Any exception of the tokenizer ends only this request.
            self.error = f"the tokenizer cannot decode the tokens: {type(error).__name__}: {error}"
            return "error"
        if self.num_confirmed > self.max_length:
            return "context"
        return "length" if num_new >= params.max_tokens else None

    def _is_stopped(self, token: int) -> bool:
        """Return whether the newest token completed a stop string."""
        if not self.request.sampling_params.stop or self.detokenize is None:
            return False
        if self._text is None:
            self._text = GeneratedText.of_request(self.request, self.detokenize)
        self._text.add(token)
        return self._text.is_stopped
