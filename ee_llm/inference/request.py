"""A generation request, and why a generation ends."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ee_llm.errors import RequestError
from ee_llm.inference.decoding.settings import CONTRASTS, Contrast, strategy_of
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import STRATEGIES, SelfSpeculation, Strategy

if TYPE_CHECKING:
    from ee_llm.inference.exits.policy import ExitPolicy

# eos: an end token of the model. stop: a stop token or stop string. length: max_tokens. context:
# the model has no more positions. abort: the caller aborted the request. error: the tokenizer
# cannot decode the tokens, or the logits are not finite.
FinishReason = Literal["eos", "stop", "length", "context", "abort", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt, and everything but the weights that determines its continuation.

    Attributes:
        id: Unique among the unfinished requests of an engine.
        prompt_token_ids: Token ids of the prompt, at least one.
        policy: Exit policy. Strategies of full depth (all but `exact` and `propagate`) turn all
            exits off.
        sampling_params: How tokens are drawn and when the generation ends; `n` must be 1.
        strategy: What happens once an exit is confident.
        speculation: How `self-speculative` drafts; None for the other strategies.
        eos_token_ids: End tokens of the model.
        special_texts: Ids and texts of the special tokens that stop strings may contain.
        tenant: Prompts share cached blocks only within one tenant.
        contrast: Settings of `sled` or `dola`, for the model (see `resolve_contrast`); None for the
            other strategies.

    Raises:
        RequestError: A field is not valid.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    policy: "ExitPolicy"
    sampling_params: SamplingParams = SamplingParams()  # noqa: RUF009
    strategy: Strategy = "exact"
    speculation: SelfSpeculation | None = None
    eos_token_ids: tuple[int, ...] = ()
    special_texts: tuple[tuple[int, str], ...] = ()
    tenant: str = ""
    contrast: Contrast | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise RequestError(
                f"strategy {self.strategy!r} is unknown. Use one of {', '.join(STRATEGIES)}."
            )
        if len(self.prompt_token_ids) == 0:
            raise RequestError("The prompt is empty. Give at least one token.")
        for token in self.prompt_token_ids:
            if type(token) is not int:
                raise RequestError(f"Token id {token!r} in the prompt is not an integer.")
        if self.sampling_params.n != 1:
            raise RequestError(
                f"n = {self.sampling_params.n}: an engine takes one sample per request. Add a"
                " request for each of SamplingParams.samples()."
            )
        if (self.speculation is None) == (self.strategy == "self-speculative"):
            raise RequestError(
                f"strategy {self.strategy!r} does not go with speculation = {self.speculation}."
                " Give a SelfSpeculation with strategy 'self-speculative' and with no other."
            )
        settings = None if self.contrast is None else strategy_of(self.contrast)
        if settings != (self.strategy if self.strategy in CONTRASTS else None):
            raise RequestError(
                f"strategy {self.strategy!r} does not go with contrast = {self.contrast}. Give an"
                " SLED with strategy 'sled', a DoLa with strategy 'dola', and None with others."
            )


@dataclass(frozen=True)
class ExitResult:
    """The decision of an exit about one row.

    Attributes:
        slot: Slot of the row's sequence.
        position: Position of the row.
        exited: Whether the token exits here; always True at the final exit.
        token: The token that this exit draws, -1 if the row does not exit.
        confidence: Confidence by the policy's measure.
        logprob: Log probability of the token in this exit's distribution.
        is_finite: Whether all logits of the row are finite. If not, the sequence ends with an
            error.
        top_logprobs: Most probable tokens of this exit and their log probabilities, if requested.
        predicted: If the row does not exit, the token ids of this exit that the measure of deeper
            exits needs.
    """

    slot: int
    position: int
    exited: bool
    token: int
    confidence: float
    logprob: float
    is_finite: bool = True
    top_logprobs: tuple[tuple[int, float], ...] = ()
    predicted: tuple[int, ...] = ()
