"""The certificate: check every exit and token of a finished sequence with one forward."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.errors import RequestError
from ee_llm.inference.decoding.settings import CONTRASTS, strategy_of
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.sampling.sampler import mask_banned, sample, token_margin
from ee_llm.inference.verification.confidences import (
    Confidence,
    RowConfidences,
    walk_exits,
)
from ee_llm.inference.verification.contrasted import (
    ContrastedRow,
    contrast_margin,
    contrasted_logits,
    finite_logits,
)
from ee_llm.inference.verification.reference_decoding import frozen_boundaries, policy_in_force


@dataclass(frozen=True)
class Divergence:
    """A place where a finished sequence differs from its definition.

    Attributes:
        index: Index of the generated token, from 0.
        kind: "exit" if the token did not exit at the first confident exit, "token" if its exit
            would have drawn another token.
        found: The boundary or token id in the sequence.
        expected: The boundary or token id by definition. For a token that exited too early under
            `propagate`, it is the final exit, because the row was frozen and the confidence at
            deeper exits is therefore unknown.
        margin: The smallest numerical error that explains the divergence: in confidence for "exit"
            (infinite if no error explains it), in logits divided by the temperature for "token"
            (see `token_margin` and, for `sled` and `dola`, `contrast_margin`).
    """

    index: int
    kind: Literal["exit", "token"]
    found: int
    expected: int
    margin: float


@dataclass(frozen=True)
class Tolerance:
    """The greatest margins that rounding explains, of tokens and of exits."""

    token: float
    exit: float

    def explains(self, divergence: Divergence) -> bool:
        """Return whether rounding explains a divergence; a tolerance of 0 explains none."""
        margin = self.token if divergence.kind == "token" else self.exit
        return 0.0 < margin >= divergence.margin


def tolerance(dtype: torch.dtype) -> Tolerance:
    """Return the margins for a dtype: 64 of its epsilons in logits, a quarter of it in confidence.

    Logits are around ten and are sums of rounded products of a rounded hidden state;
    d p / d logit = p (1 - p) is at most 1/4. In float64 rounding explains nothing.
    """
    token = 0.0 if dtype == torch.float64 else 64 * torch.finfo(dtype).eps
    return Tolerance(token, token / 4)


@torch.no_grad()
def verify_trace(model: ReferenceModel, output: RequestOutput) -> list[Divergence]:
    """Return every divergence of `output` from its teacher-forced definition; [] proves it.

    A token is compared with the exit it claims (with the expected exit if the claimed one does not
    exist or is off), so that a wrong exit does not count twice. In float64 there must be no
    divergence. In lower precision the margins distinguish rounding from errors.

    Raises:
        RequestError: The sequence or its policy does not fit the model.
    """
    policy = policy_in_force(model, output.policy, output.strategy)
    num_prompt, num_new = len(output.prompt_token_ids), len(output.token_ids)
    if num_new == 0 or num_prompt == 0 or len(output.exits) != num_new:
        raise RequestError(
            f"A prompt of {num_prompt} tokens, {num_new} new tokens and {len(output.exits)} exits"
            " are not a finished sequence."
        )
    if not 0 <= output.token_ids[-1] < model.config.model.vocab_size:  # the token without a row
        raise RequestError(
            f"Token id {output.token_ids[-1]} is outside model.vocab_size ="
            f" {model.config.model.vocab_size}."
        )
    sequence = [*output.prompt_token_ids, *output.token_ids]
    rows = slice(num_prompt - 1, len(sequence) - 1)
    if output.contrast is not None or output.strategy in CONTRASTS:
        return _verify_contrasted(model, output, sequence, rows)
    permitted = [exit for exit in policy.boundaries if policy.threshold(exit) is not None]
    # Under propagate, a row says nothing beyond the exit it claims, if that exit exists.
    last_exits = [model.num_layers] * num_new
    if output.strategy == "propagate":
        last_exits = [e if e in permitted else model.num_layers for e in output.exits]
    frozen_at = frozen_boundaries(model, num_prompt, last_exits[:-1], output.strategy)
    logits: dict[int, dict[int, Tensor]] = {}  # {boundary: {index: [v]}}
    confidences: dict[int, dict[int, Confidence]] = {}
    measured = RowConfidences(policy.measure, num_new, model.gate)
    tokens = torch.tensor(sequence[:-1])
    for exit in walk_exits(model, tokens, frozen_at, (*permitted, model.num_layers)):
        boundary = exit.boundary
        indices = [index for index, last in enumerate(last_exits) if last >= boundary]
        numbers = torch.tensor(indices, dtype=torch.int64) + rows.start
        values = finite_logits(model, boundary, exit.hidden[numbers])
        logits[boundary] = dict(zip(indices, values, strict=True))
        if boundary in permitted:
            x, before = exit.x[numbers], exit.before[numbers]
            found_here = measured.at(boundary, x, before, numbers - rows.start, values)
            confidences[boundary] = dict(zip(indices, found_here, strict=True))
    divergences = []
    for index, found in enumerate(output.exits):
        at_exits = {exit: of[index] for exit, of in confidences.items() if index in of}
        confident = [exit for exit, one in at_exits.items() if policy.exits(exit, one.value)]
        expected = confident[0] if confident else model.num_layers
        if found != expected:
            margin = _exit_margin(policy, at_exits, found) if found in logits else math.inf
            divergences.append(Divergence(index, "exit", found, expected, margin))
        row = logits[found if found in logits else expected][index]
        wrong = _wrong_token(output, index, row, rows.start + index, sequence)
        if wrong is not None:
            divergences.append(wrong)
    return divergences


def _verify_contrasted(
    model: ReferenceModel, output: RequestOutput, sequence: list[int], rows: slice
) -> list[Divergence]:
    """Return the divergences of an output of `sled` or `dola`, whose tokens all exit last."""
    contrast = output.contrast
    if contrast is None or strategy_of(contrast) != output.strategy:
        raise RequestError(
            f"strategy {output.strategy!r} does not go with contrast = {contrast}, so the output"
            " cannot be verified."
        )
    divergences = []
    found = contrasted_logits(model, torch.tensor(sequence[:-1]), contrast, rows)
    for index, row in enumerate(found):
        if output.exits[index] != model.num_layers:
            divergences.append(
                Divergence(index, "exit", output.exits[index], model.num_layers, math.inf)
            )
        wrong = _wrong_token(output, index, row.logits, rows.start + index, sequence, row)
        if wrong is not None:
            divergences.append(wrong)
    return divergences


def _wrong_token(
    output: RequestOutput,
    index: int,
    logits: Tensor,
    position: int,
    sequence: list[int],
    contrasted: ContrastedRow | None = None,
) -> Divergence | None:
    """Return the divergence of a token if logits [v], perhaps `contrasted`, do not draw it."""
    params, token = output.sampling_params, output.token_ids[index]
    banned = params.banned_token_ids(index, output.eos_token_ids, len(logits))
    masked, history = mask_banned(logits[None], [banned])[0], sequence[: position + 1]
    drawn = sample(masked, params, position, history)
    if token == drawn:
        return None
    margin = math.inf
    if token in banned:
        pass  # No error explains it.
    elif contrasted is not None and output.contrast is not None:
        margin = contrast_margin(
            contrasted, output.contrast, params, position, token, history, banned
        )
    else:
        margin = token_margin(masked, params, position, token, history)
    return Divergence(index, "token", token, drawn, margin)


def _exit_margin(policy: ExitPolicy, at_exits: dict[int, Confidence], found: int) -> float:
    """Return the least error of the confidences that explains exiting at `found`.

    Every shallower exit must fall below its threshold, and `found` must rise to its own.
    """
    errors = [0.0]
    for exit, one in at_exits.items():
        if exit <= found:
            sign = 1.0 if exit < found else -1.0
            threshold = policy.threshold(exit) or 0.0
            exchanged = max(one.error, sign * (one.other - threshold))
            errors.append(min(sign * (one.value - threshold), exchanged))
    return max(errors)
