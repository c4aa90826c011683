"""Decoding one sequence at a time with the reference model: plain, slow and exact.

This is the meaning of the strategies. Each new token costs a forward over the whole sequence, so
every earlier position is computed to the exit's depth, never approximated: but for `propagate`,
whose approximation is its definition.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.errors import RequestError
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.request import FinishReason
from ee_llm.inference.sampling.sampler import SamplingParams, sample
from ee_llm.inference.strategies import STRATEGIES, Strategy


@dataclass(frozen=True)
class RequestOutput:
    """A finished sequence and all that its tokens are a function of, but for the weights.

    prompt, tokens: token ids; a final end or stop token is among `tokens`.
    exits: the boundary each token left at. confidences: what the policy measured there.
    logprobs: each token's log probability in its exit's own distribution, before sampling settings.
    finish_reason: "eos" an end token, "stop" a stop token, "length" as many tokens as asked for,
    "context" the sequence is longer than the model's max_seq_length and no row can follow, "abort"
    it was given up, "error" it could not go on, for the reason in `error`; it may have no token.
    policy: the one in force; the strategies "full" and "self-speculative" have every exit off.
    num_drafted, num_accepted: tokens that "self-speculative" drafted, and those that the model
    confirmed.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    exits: tuple[int, ...]
    confidences: tuple[float, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy: ExitPolicy
    sampling: SamplingParams
    strategy: Strategy
    num_drafted: int = 0
    num_accepted: int = 0
    error: str | None = None

    @property
    def mean_depth(self) -> float:
        """Return the mean number of layers that the new tokens took; 0 if there are none."""
        return sum(self.exits) / max(1, len(self.exits))


@dataclass(frozen=True)
class TokenOutput:
    """One new token: its id, the boundary it left at, its confidence and log probability."""

    token: int
    exit: int
    confidence: float
    logprob: float


@torch.no_grad()
def generate_reference(
    model: ReferenceModel,
    prompt: Sequence[int],
    policy: ExitPolicy,
    sampling: SamplingParams,
    strategy: Strategy = "exact",
    max_new_tokens: int = 64,
    eos_token_ids: Collection[int] = (),
    stop_tokens: Collection[int] = (),
    on_token: Callable[[TokenOutput], None] | None = None,
) -> RequestOutput:
    """Return the continuation of `prompt`, decided token by token.

    exact: a token leaves at the first exit whose confidence reaches its threshold, else at the
    final one. propagate: likewise, but its row is then frozen there (see `ReferenceModel.walk`).
    full: always at the final one; verify, too: drafts are to change the cost alone. It ends after
    any of `eos_token_ids` or `stop_tokens`. `on_token` is called with each decision as it
    falls. Raises RequestError for an empty or overlong prompt, ids beyond the vocabulary, a policy
    for other exits than the model's, or fewer than 1 new token.
    """
    policy = policy_in_force(model, policy, strategy)
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens {max_new_tokens} must be at least 1")
    if len(prompt) == 0:
        raise RequestError("the prompt is empty; give at least one token")
    token_outputs: list[TokenOutput] = []
    sequence = list(prompt)
    finish_reason: FinishReason = "length"
    while len(token_outputs) < max_new_tokens:
        exits = [token_output.exit for token_output in token_outputs]
        left_at = rows_left_at(model, len(prompt), exits, strategy)
        token_outputs.append(_decide(model, sequence, left_at, policy, sampling))
        sequence.append(token_outputs[-1].token)
        if on_token:
            on_token(token_outputs[-1])
        if token_outputs[-1].token in eos_token_ids:
            finish_reason = "eos"
            break
        if token_outputs[-1].token in stop_tokens:
            finish_reason = "stop"
            break
        if len(sequence) > model.config.model.max_seq_length:
            finish_reason = "context"
            break
    return RequestOutput(
        prompt=tuple(prompt),
        tokens=tuple(token_output.token for token_output in token_outputs),
        exits=tuple(token_output.exit for token_output in token_outputs),
        confidences=tuple(token_output.confidence for token_output in token_outputs),
        logprobs=tuple(token_output.logprob for token_output in token_outputs),
        finish_reason=finish_reason,
        policy=policy,
        sampling=sampling,
        strategy=strategy,
    )


def policy_in_force(model: ReferenceModel, policy: ExitPolicy, strategy: Strategy) -> ExitPolicy:
    """Return `policy` as the strategy applies it to the model, or raise RequestError."""
    policy.check_fits(model.config.exits.boundaries)
    if strategy not in STRATEGIES:
        raise RequestError(f"strategy {strategy!r} is unknown; choose of {', '.join(STRATEGIES)}")
    return policy.under(strategy)


def rows_left_at(
    model: ReferenceModel, num_prompt: int, exits: Sequence[int], strategy: Strategy
) -> list[int] | None:
    """Return at which boundary each row of a sequence is frozen, None if none is.

    The sequence is a prompt and a token for each of `exits`: row num_prompt - 1 + i decided new
    token i and left at exits[i]; the row of the last token is live.
    """
    if strategy != "propagate":
        return None
    return [model.num_layers] * (num_prompt - 1) + [*exits, model.num_layers]


def finite_logits(model: ReferenceModel, boundary: int, hidden: Tensor) -> Tensor:
    """Return the exit's logits [..., v], or raise RequestError where one is NaN or infinite."""
    logits = model.logits(boundary, hidden)
    if not torch.isfinite(logits).all():
        raise RequestError(
            f"the exit at boundary {boundary} gives logits that are not finite in {model.dtype};"
            " are the weights damaged, or is this dtype too narrow for them?"
        )
    return logits


def _decide(
    model: ReferenceModel,
    sequence: Sequence[int],
    left_at: Sequence[int] | None,
    policy: ExitPolicy,
    sampling: SamplingParams,
) -> TokenOutput:
    """Return the decision of the newest row, the earlier ones being frozen at `left_at`."""
    for boundary, hidden in model.walk(torch.tensor(sequence), left_at):
        final = boundary == model.num_layers
        if not final and policy.threshold(boundary) is None:
            continue
        logits = finite_logits(model, boundary, hidden[-1])
        confidence = float(policy.confidence(logits))
        if final or policy.leaves(boundary, confidence):
            token = sample(logits, sampling, len(sequence) - 1, sequence)
            logprob = float(logits.double().log_softmax(dim=-1)[token])
            return TokenOutput(token, boundary, confidence, logprob)
    raise AssertionError("the walk ends with the final exit")
