"""Decode one sequence at a time with the reference model: plain, slow and exact.

This defines the strategies. Each new token costs a forward over the whole sequence, so every
earlier position is computed to the exit's depth and never approximated, except by `propagate`,
whose approximation is its definition.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.errors import RequestError
from ee_llm.inference.decoding.settings import (
    CONTRASTS,
    Contrast,
    resolve_contrast,
    strategy_of,
)
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.outputs import RequestOutput, TokenOutput
from ee_llm.inference.request import FinishReason
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.sampling.sampler import mask_banned, sample
from ee_llm.inference.strategies import STRATEGIES, Strategy
from ee_llm.inference.verification.confidences import RowConfidences, walk_exits
from ee_llm.inference.verification.contrasted import contrasted_logits, finite_logits


@torch.no_grad()
def generate_reference(
    model: ReferenceModel,
    prompt_token_ids: Sequence[int],
    policy: ExitPolicy,
    sampling_params: SamplingParams,
    strategy: Strategy = "exact",
    eos_token_ids: Collection[int] = (),
    on_token: Callable[[TokenOutput], None] | None = None,
    contrast: Contrast | None = None,
) -> RequestOutput:
    """Return the continuation of a prompt, decided token by token.

    With `exact` a token exits at the first exit whose confidence reaches its threshold, else at the
    final exit. `propagate` decides likewise, but freezes the row there (see `ReferenceModel.walk`).
    `full` always exits at the final exit. So does `self-speculative`, since drafts change only the
    cost. `sled` and `dola` exit there too, and draw from the contrasted logits. There is no support
    for stop strings.

    Args:
        model: The reference model.
        prompt_token_ids: Token ids of the prompt.
        policy: Exit policy for the model's exits.
        sampling_params: How tokens are drawn and when the generation ends.
        strategy: Decoding strategy.
        eos_token_ids: End tokens of the model.
        on_token: Called with each token once it is decided.
        contrast: Settings of `sled` and `dola`; None for the defaults.

    Raises:
        RequestError: The prompt is empty, too long or has ids beyond the vocabulary, or the policy
            or the contrast does not fit the model.
    """
    policy = policy_in_force(model, policy, strategy)
    if len(prompt_token_ids) == 0:
        raise RequestError("The prompt is empty. Give at least one token.")
    if contrast is None and strategy in CONTRASTS:
        contrast = CONTRASTS[strategy]()
    if contrast is not None:
        contrast = resolve_contrast(contrast, model.config)
        assert strategy_of(contrast) == strategy, f"{contrast} is for another strategy"
    params, vocab_size = sampling_params, model.config.model.vocab_size
    tokens: list[TokenOutput] = []
    sequence = list(prompt_token_ids)
    finish_reason: FinishReason = "length"
    while len(tokens) < params.max_tokens:
        exits = [token.exit for token in tokens]
        frozen_at = frozen_boundaries(model, len(prompt_token_ids), exits, strategy)
        banned = params.banned_token_ids(len(tokens), eos_token_ids, vocab_size)
        tokens.append(_decide(model, sequence, frozen_at, policy, params, banned, contrast))
        sequence.append(tokens[-1].token_id)
        if on_token:
            on_token(tokens[-1])
        if len(tokens) > params.min_tokens:
            if sequence[-1] in eos_token_ids and not params.ignore_eos:
                finish_reason = "eos"
                break
            if sequence[-1] in params.stop_token_ids:
                finish_reason = "stop"
                break
        if len(sequence) > model.config.model.max_seq_length:
            finish_reason = "context"
            break
    return RequestOutput(
        request_id="reference",
        prompt_token_ids=tuple(prompt_token_ids),
        token_ids=tuple(token.token_id for token in tokens),
        exits=tuple(token.exit for token in tokens),
        confidences=tuple(token.confidence for token in tokens),
        logprobs=tuple(token.logprob for token in tokens),
        finish_reason=finish_reason,
        policy=policy,
        sampling_params=params,
        strategy=strategy,
        num_layers=model.num_layers,
        eos_token_ids=tuple(eos_token_ids),
        contrast=contrast,
    )


def policy_in_force(model: ReferenceModel, policy: ExitPolicy, strategy: Strategy) -> ExitPolicy:
    """Return the policy as the strategy applies it to the model; raises RequestError."""
    policy.check_fits(model.config.exits.boundaries)
    if strategy not in STRATEGIES:
        raise RequestError(f"strategy {strategy!r} is unknown. Use one of {', '.join(STRATEGIES)}.")
    return policy.under(strategy)


def frozen_boundaries(
    model: ReferenceModel, num_prompt: int, exits: Sequence[int], strategy: Strategy
) -> list[int] | None:
    """Return the boundary at which each row of a sequence is frozen; None if no row is.

    The sequence is a prompt and one token for each of `exits`. Row num_prompt - 1 + i decided new
    token i and exited at exits[i]; the row of the last token is not frozen.
    """
    if strategy != "propagate":
        return None
    return [model.num_layers] * (num_prompt - 1) + [*exits, model.num_layers]


def _decide(
    model: ReferenceModel,
    sequence: Sequence[int],
    frozen_at: Sequence[int] | None,
    policy: ExitPolicy,
    params: SamplingParams,
    banned: Sequence[int],
    contrast: Contrast | None,
) -> TokenOutput:
    """Return the token that the newest row decides, with earlier rows frozen at `frozen_at`."""
    for boundary, confidence, logits in _evaluated(model, sequence, frozen_at, policy, contrast):
        if boundary == model.num_layers or policy.exits(boundary, confidence):
            masked = mask_banned(logits[None], [banned])[0]
            token = sample(masked, params, len(sequence) - 1, sequence)
            logprob = float(logits.double().log_softmax(dim=-1)[token])
            return TokenOutput(token, boundary, confidence, logprob)
    raise AssertionError("the walk ends with the final exit")


def _evaluated(
    model: ReferenceModel,
    sequence: Sequence[int],
    frozen_at: Sequence[int] | None,
    policy: ExitPolicy,
    contrast: Contrast | None,
) -> Iterator[tuple[int, float, Tensor]]:
    """Yield the exits that may decide about the newest row, its confidence and its logits [v]."""
    tokens, last = torch.tensor(sequence), model.num_layers
    if contrast is not None:
        (row,) = contrasted_logits(model, tokens, contrast, slice(-1, None))
        yield last, float(policy.confidence(row.logits)), row.logits
        return
    permitted = [b for b in policy.boundaries if policy.threshold(b) is not None]
    measured = RowConfidences(policy.measure, 1, model.gate)
    newest, first = torch.tensor([len(sequence) - 1]), torch.tensor([0])
    for exit in walk_exits(model, tokens, frozen_at, (*permitted, last)):
        logits = finite_logits(model, exit.boundary, exit.hidden[newest])
        if exit.boundary == last:
            yield last, float(policy.confidence(logits[0])), logits[0]
        else:
            x, before = exit.x[newest], exit.before[newest]
            [confidence] = measured.at(exit.boundary, x, before, first, logits)
            yield exit.boundary, confidence.value, logits[0]
