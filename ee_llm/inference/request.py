"""What is asked of the engine, and the state of a sequence while it is decoded; no torch.

A sequence of n tokens has rows 0 .. n-1; the row at position p decides the token at p + 1, and the
newest row is the *frontier*. Segment s ends at exit s, the last segment at the final exit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ee_llm.errors import RequestError
from ee_llm.inference.strategies import STRATEGIES, SelfSpeculation, Strategy
from ee_llm.inference.text.detokenizer import GeneratedText

if TYPE_CHECKING:
    from ee_llm.inference.exits.policy import ExitPolicy
    from ee_llm.inference.sampling.sampler import SamplingParams

# error: the tokenizer cannot decode the tokens, or an exit's logits are not finite.
FinishReason = Literal["eos", "stop", "length", "context", "abort", "error"]
NON_FINITE = (
    "an exit gave logits that are not finite; the weights are damaged, or the dtype is too narrow"
    " for them (try float32)"
)


@dataclass(frozen=True)
class Request:
    """A prompt and everything that its continuation is a function of, but for the weights.

    id: unique among the requests under way. prompt: token ids. policy: which exits, how confident;
    `full` and `self-speculative` have them all off. draft: for `self-speculative` alone.
    eos_token_ids, stop_tokens: ids that end the sequence, as does a text that holds one of
    stop_strings. special_texts: ids and texts of the special tokens that stop_strings are to find,
    as texts have none of them. tenant: prompts share cached blocks within one tenant only.
    """

    id: str
    prompt: tuple[int, ...]
    policy: "ExitPolicy"
    sampling: "SamplingParams"
    strategy: Strategy = "exact"
    draft: SelfSpeculation | None = None
    max_new_tokens: int = 64
    eos_token_ids: tuple[int, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    special_texts: tuple[tuple[int, str], ...] = ()
    tenant: str = ""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise RequestError(
                f"strategy {self.strategy!r} is unknown; choose of {', '.join(STRATEGIES)}"
            )
        if len(self.prompt) == 0:
            raise RequestError("the prompt is empty; give at least one token")
        for token in self.prompt:
            if type(token) is not int:
                raise RequestError(f"token id {token!r} in the prompt is no whole number")
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise RequestError(
                f"max_new_tokens {self.max_new_tokens!r} must be a whole number of at least 1"
            )
        if (self.draft is None) == (self.strategy == "self-speculative"):
            raise RequestError(
                f"strategy {self.strategy!r} with draft {self.draft}: verify needs a draft, and no"
                " other strategy has one"
            )
        if isinstance(self.stop_strings, str):
            raise RequestError(
                f"stop_strings is the string {self.stop_strings!r}; give a tuple of strings"
            )
        if "" in self.stop_strings:
            raise RequestError("a stop string is empty; leave it out")


@dataclass(frozen=True)
class ExitResult:
    """What an exit says about one row.

    left: whether its token leaves here (always true at the final exit). token: the one that this
    exit draws. confidence: the policy's measure. logprob: the token's, in this exit's distribution.
    is_finite: whether all of the row's logits are; otherwise its sequence ends here with an error.
    """

    slot: int
    position: int
    exited: bool
    token: int
    confidence: float
    logprob: float
    is_finite: bool = True


@dataclass(eq=False)  # each is itself, however like another one it stands
class Sequence:
    """A request under way: its tokens, and how far each segment has come (the watermarks).

    max_length: rows that the model has positions for. decode: tokens to text, for stop strings.
    tokens: prompt, decided tokens, then drafts that no deep pass has confirmed yet.
    watermarks[s]: leading positions that segment s has processed, not increasing in s.
    declined: the deepest exit that the frontier declined, -1 before the first.
    blocks: of the K/V cache, in order of positions; keys: of the leading full ones, as others may
    find them. num_tabled, num_published: how many of the blocks the runner and the cache know of.
    num_cached: leading positions that were in the cache. waiting_since: the step at which its
    rows last ran. error: the message that goes with the finish reason "error". is_tainted: its
    keys and values may hold NaN or infinity, so its blocks must be zeroed before they are reused.
    may_draft: False after logits were not finite beside drafts, which may have been the cause.
    """

    request: Request
    boundaries: tuple[int, ...]
    max_length: int
    decode: Callable[[list[int]], str] | None = None
    tokens: list[int] = field(default_factory=list)
    num_confirmed: int = 0
    watermarks: list[int] = field(default_factory=list)
    declined: int = -1
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
        self.tokens = list(self.request.prompt)
        self.num_confirmed = len(self.tokens)
        self.watermarks = [0] * len(self.boundaries)
        self._thresholds = tuple(self._threshold(boundary) for boundary in self.boundaries)

    @property
    def num_prompt(self) -> int:
        """Return the number of prompt tokens."""
        return len(self.request.prompt)

    @property
    def new_tokens(self) -> list[int]:
        """Return the tokens decided so far, without drafts."""
        return self.tokens[self.num_prompt : self.num_confirmed]

    @property
    def num_reusable(self) -> int:
        """Return how many leading rows have keys and values that follow from their tokens alone.

        Drafts may yet be taken back, and `propagate` freezes the rows of new tokens.
        """
        if self.request.strategy == "propagate":
            return self.num_prompt - 1
        return self.num_confirmed

    @property
    def most_rows(self) -> int:
        """Return how many rows it has at the end, unless it ends early."""
        return min(self.num_prompt + self.request.max_new_tokens - 1, self.max_length)

    @property
    def last_segment(self) -> int:
        """Return the number of the segment that ends at the final exit."""
        return len(self.boundaries) - 1

    @property
    def num_pending(self) -> int:
        """Return how many positions have been begun and are not through all segments."""
        return self.watermarks[0] - self.watermarks[-1]

    def decides_at(self, segment: int) -> bool:
        """Return whether the frontier, once through `segment`, is judged by the exit there."""
        if segment == self.last_segment:
            return True
        if self._thresholds[segment] is None or self.declined >= segment:
            return False
        draft = self.request.draft
        if draft is None:
            return True
        if not self.may_draft:
            return False
        num_left = self.request.max_new_tokens - (len(self.tokens) - self.num_prompt)
        return (
            len(self.tokens) - self.num_confirmed < draft.length
            and num_left > 1
            and len(self.tokens) < self.max_length
        )

    def threshold(self, segment: int) -> float:
        """Return the confidence at which the frontier leaves at the end of `segment`; 0: at any."""
        threshold = self._thresholds[segment]
        assert threshold is not None, f"the exit after segment {segment} is off"
        return threshold

    def history(self, position: int) -> tuple[int, ...]:
        """Return what tokens there are up to `position`, if a repetition penalty asks for them.

        Each once, in any order. Counts follow the position, which moves by a few at a time.
        """
        if self.request.sampling.repetition_penalty == 1.0:
            return ()
        self._count(position + 1)
        return tuple(self._counts)

    def _count(self, num_tokens: int) -> None:
        """Let the counts be those of the first `num_tokens` tokens."""
        for token in self.tokens[self._num_counted : num_tokens]:
            self._counts[token] = self._counts.get(token, 0) + 1
        for token in self.tokens[num_tokens : self._num_counted]:
            self._counts[token] -= 1
            if self._counts[token] == 0:
                del self._counts[token]
        self._num_counted = num_tokens

    def table_blocks(self) -> list[tuple[int, int, int]]:
        """Return the blocks that the runner knows not of, as (slot, index, block): now it will."""
        start, self.num_tabled = self.num_tabled, len(self.blocks)
        return [(self.slot, index, self.blocks[index]) for index in range(start, self.num_tabled)]

    def is_frozen(self, position: int, segment: int) -> bool:
        """Return whether the row at `position` keeps its state in `segment` (`propagate`)."""
        index = position - (self.num_prompt - 1)
        if self.request.strategy != "propagate" or not 0 <= index < len(self.exits):
            return False
        return segment > 0 and self.exits[index] <= self.boundaries[segment - 1]

    def settle(self, segment: int, result: ExitResult) -> bool:
        """Take an exit's verdict on a row; return whether later rows' verdicts still count."""
        if not result.is_finite:
            self.finish_reason, self.error, self.is_tainted = "error", NON_FINITE, True
            return False
        if not result.exited:
            self.declined = segment
            return True
        self.declined = -1
        is_final = segment == self.last_segment
        if self.request.draft is not None and not is_final:
            assert result.position + 1 == len(self.tokens), "a draft goes after the newest row"
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
        self.finish_reason = self._finish_reason(result.token)
        return is_confirmed and self.finish_reason is None

    def restart(self) -> None:
        """Forget what the cache and the rings held of this sequence, not what was decided."""
        if len(self.tokens) > self.num_confirmed:  # drafts are made anew
            self._count(min(self._num_counted, self.num_confirmed))
            del self.tokens[self.num_confirmed :]
            self.declined = -1
        self.watermarks = [0] * len(self.boundaries)
        self.slot, self.blocks = -1, []
        self.num_tabled = self.num_published = self.num_cached = 0

    def _threshold(self, boundary: int) -> float | None:
        """Return the confidence at which a token leaves at a boundary; None if the exit is off."""
        request, draft = self.request, self.request.draft
        if boundary == self.boundaries[-1]:
            return 0.0
        if draft is not None:
            return (draft.threshold or 0.0) if boundary == draft.boundary else None
        return request.policy.under(request.strategy).threshold(boundary)

    def _finish_reason(self, token: int) -> FinishReason | None:
        if token in self.request.eos_token_ids:
            return "eos"
        if token in self.request.stop_tokens:
            return "stop"
        try:
            if self._is_stopped(token):
                return "stop"
        except Exception as error:  # Whatever the tokenizer raises ends this request only.
            self.error = f"the tokenizer cannot decode the tokens: {type(error).__name__}: {error}"
            return "error"
        if self.num_confirmed > self.max_length:
            return "context"
        num_new = self.num_confirmed - self.num_prompt
        return "length" if num_new >= self.request.max_new_tokens else None

    def _is_stopped(self, token: int) -> bool:
        """Return whether the newest token completed a stop string."""
        request = self.request
        if not request.stop_strings or self.decode is None:
            return False
        if self._text is None:
            special = dict(request.special_texts)
            self._text = GeneratedText(self.decode, request.prompt, request.stop_strings, special)
        self._text.add(token)
        return self._text.is_stopped
