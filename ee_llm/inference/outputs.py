"""Results of generation: tokens with their exits, finished requests, and steps of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ee_llm.inference.decoding.settings import Contrast
from ee_llm.inference.request import FinishReason
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import Strategy
from ee_llm.inference.text.html import colored_html

if TYPE_CHECKING:
    from ee_llm.inference.exits.policy import ExitPolicy

_MAX_SHOWN = 60  # characters of a text in a repr


@dataclass(frozen=True)
class TokenOutput:
    """One generated token.

    Attributes:
        token_id: Id of the token.
        exit: Boundary at which the token exited: the number of layers it used.
        confidence: Confidence of that exit by the policy's measure.
        logprob: Log probability of the token in that exit's distribution, before sampling
            parameters apply. With `sled` and `dola`, it is the distribution of the contrasted
            logits.
        text: Text that the token adds. It is empty if the text is not known, or if a later token
            completes it.
        top_logprobs: Most probable tokens of that exit and their log probabilities, if requested.
    """

    token_id: int
    exit: int
    confidence: float
    logprob: float
    text: str = ""
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, repr=False)
class RequestOutput:
    """A finished generation, and everything except the weights that determines its tokens.

    Attributes:
        request_id: Id of the request.
        prompt_token_ids: Token ids of the prompt.
        token_ids: Generated tokens, including a final end or stop token.
        exits: Boundary at which each token exited.
        confidences: Confidence of that exit by the policy's measure.
        logprobs: Log probability of each token in its exit's distribution, before sampling
            parameters apply.
        finish_reason: Why the generation ended: `eos`, `stop`, `length`, `context`, `abort` or
            `error`.
        policy: The exit policy used; with strategies of full depth, every exit is off.
        sampling_params: How the tokens were drawn.
        strategy: The decoding strategy.
        num_layers: Number of layers of the model, which is the boundary of the final exit.
        eos_token_ids: End tokens of the model.
        num_drafted: Number of tokens that `self-speculative` drafted.
        num_accepted: Number of drafted tokens that the full model confirmed.
        error: Error message if the finish reason is `error`.
        top_logprobs: For each token, the most probable tokens of its exit, if requested.
        prompt: Text of the prompt as the model sees it; None if it is not known.
        text: Generated text, which ends before a stop string; None if there is no tokenizer.
        pieces: Text of each token; concatenated, they are `text`.
        index: Number of this sample among the `n` samples of its prompt.
        contrast: Settings of the strategies `sled` and `dola`; None for the others.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    exits: tuple[int, ...]
    confidences: tuple[float, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy: "ExitPolicy"
    sampling_params: SamplingParams
    strategy: Strategy
    num_layers: int
    eos_token_ids: tuple[int, ...] = ()
    num_drafted: int = 0
    num_accepted: int = 0
    error: str | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = field(default=(), compare=False)
    prompt: str | None = None
    text: str | None = None
    pieces: tuple[str, ...] = ()
    index: int = 0
    contrast: Contrast | None = None

    @property
    def mean_depth(self) -> float:
        """Mean number of layers per generated token; 0 if there are no tokens."""
        return sum(self.exits) / max(1, len(self.exits))

    @property
    def tokens(self) -> tuple[TokenOutput, ...]:
        """The generated tokens, each with its exit, confidence and text."""
        return token_outputs(self, self.pieces)

    def __repr__(self) -> str:
        text = "" if self.text is None else f"text={_shortened(self.text)}, "
        return (
            f"RequestOutput({text}num_tokens={len(self.token_ids)},"
            f" mean_depth={self.mean_depth:.2f} of {self.num_layers},"
            f" finish_reason={self.finish_reason!r})"
        )

    def _repr_html_(self) -> str:
        """Return HTML that shows the text coloured by exit, for notebooks."""
        return colored_html(self.prompt or "", self.tokens, self.policy.boundaries, self.num_layers)


@dataclass(frozen=True)
class StepOutput:
    """New tokens of one request and, once it is finished, its whole output."""

    request_id: str
    tokens: tuple[TokenOutput, ...]
    request_output: RequestOutput | None = None


def token_outputs(output: RequestOutput, pieces: Sequence[str] = ()) -> tuple[TokenOutput, ...]:
    """Return the tokens of an output; pieces: their texts, if known."""
    count = len(output.token_ids)
    columns = zip(
        output.token_ids,
        output.exits,
        output.confidences,
        output.logprobs,
        pieces or [""] * count,
        output.top_logprobs or [()] * count,
        strict=True,
    )
    return tuple(TokenOutput(*column) for column in columns)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...")
