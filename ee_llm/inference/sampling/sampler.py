"""Draw tokens from logits, greedily or with noise that is a pure function of its key.

Sampling is argmax(logits / T + g) with one Gumbel number g per vocabulary entry, which draws from
softmax(logits / T) (Gumbel 1954; Maddison et al., arXiv 1411.0030). g is a function of (seed,
position, vocabulary id) only, so it does not depend on other rows, vocabulary shards or the device.

Legend of shapes: r rows, v vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ee_llm.inference.sampling.noise import gumbel_noise, integer_exp
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.sampling.top_k import greatest

# Number of most probable tokens that are sorted at first; a top-p set rarely needs more.
NUM_SORTED = 1024
# On a CPU, tokens are drawn for at most this many logits at once, so that temporaries stay in its
# cache.
NUM_CACHED = 2**15
_MAX_PENALISED = 1e300  # greatest absolute value of a penalised logit


def draw(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    histories: Sequence[Sequence[int]],
) -> Tensor:
    """Return the tokens [r], int64, drawn from logits [r, v].

    The token of a row is a pure function of the row's own arguments: neither other rows nor the
    device change it.

    Args:
        logits: Logits [r, v].
        params: Sampling parameters of each row.
        positions: Position of each row; the row at position p draws the token at p + 1.
        histories: Tokens at positions 0 .. positions[i] of each row; read only with a repetition
            penalty.
    """
    if all(p.is_plain_greedy for p in params):
        return logits.argmax(dim=-1)
    num_rows = len(params)
    if logits.device.type == "cpu":
        num_rows = max(1, NUM_CACHED // logits.shape[1])
    parts = [slice(row, row + num_rows) for row in range(0, len(params), num_rows)]
    return torch.cat(
        [_draw(logits[part], params[part], positions[part], histories[part]) for part in parts]
    )


def mask_banned(logits: Tensor, banned: Sequence[Sequence[int]]) -> Tensor:
    """Return logits [r, v] with -inf for the ids banned[i] of row i.

    The result is `logits` itself if no id is banned.
    """
    if not any(banned):
        return logits
    rows = [row for row, ids in enumerate(banned) for _ in ids]
    at = torch.tensor([rows, [i for ids in banned for i in ids]], device=logits.device)
    return logits.index_put((at[0], at[1]), logits.new_tensor(-math.inf))


def sample(
    logits: Tensor, params: SamplingParams, position: int, history: Sequence[int] = ()
) -> int:
    """Return the token that `draw` draws from the logits [v] of a single row."""
    return int(draw(logits[None], [params], [position], [history]))


def token_margin(
    logits: Tensor, params: SamplingParams, position: int, token: int, history: Sequence[int] = ()
) -> float:
    """Return the least error m of logits [v] that explains `token`; 0 if they draw it.

    An error m moves any two penalised logits / T (T is 1 if greedy) by m relative to each other,
    and any sum of probabilities by m. It explains `token` if the token can then be in the top-k,
    top-p and min-p set, and every rival can be overtaken or fall out of that set. The arguments are
    those of `draw` for one row.
    """
    penalised = _penalised(logits[None], [params], [position], [history])[0]
    if params.temperature == 0.0:
        return float(penalised.max() - penalised[token])
    if token == sample(logits, params, position, history):
        return 0.0
    scaled = _scaled(penalised, params.temperature)
    ids = torch.arange(len(scaled), device=scaled.device)
    scores = scaled + gumbel_noise(params.seed, position, ids)
    num_kept = min(params.top_k or len(scaled), len(scaled))
    top_p = params.top_p if params.top_p < 1.0 else math.inf
    least = _log_share(params.min_p)  # bound of a logit minus the greatest one
    ordered = scaled.sort(descending=True).values
    share = (scaled - ordered[:num_kept].logsumexp(dim=0)).exp()
    mass = torch.cat((torch.zeros_like(share[:1]), share.sort(descending=True).values.cumsum(0)))
    # The greatest of all other logits: for the most probable token itself, the second one.
    other = torch.where(ids == scaled.argmax(), ordered[1:2], ordered[:1])

    def is_explained(error: float) -> bool:
        num_before = int((scaled > scaled[token] + error).sum())
        if num_before >= num_kept or mass[num_before] >= top_p + error:
            return False
        if scaled[token] - ordered[0] < least - error:
            return False
        rivals = scores > scores[token] + error
        num_through = torch.searchsorted(-ordered, -(scaled[rivals] - error), right=True)
        falls_out = mass[num_through] - share[rivals] >= top_p - error
        falls_out |= (scaled - other)[rivals] - error < least
        return bool(((num_through > num_kept) | falls_out).all())

    allowed = ordered[ordered > -math.inf]
    low, high = 0.0, float(max(ordered[0] - allowed[-1], scores.max() - scores[token]))
    for _ in range(60):  # Bisection: every error above an explaining one explains too.
        middle = (low + high) / 2
        low, high = (low, middle) if is_explained(middle) else (middle, high)
    return high


def _draw(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    histories: Sequence[Sequence[int]],
) -> Tensor:
    """Return the tokens [r] that `draw` draws, for all rows at once."""
    precise = _penalised(logits, params, positions, histories)
    tokens = precise.argmax(dim=-1)
    sampled_rows = [row for row, p in enumerate(params) if p.temperature > 0.0]
    if sampled_rows:
        rows = torch.tensor(sampled_rows, device=logits.device)
        tokens[rows] = _sampled(
            precise[rows],
            [params[row] for row in sampled_rows],
            [positions[row] for row in sampled_rows],
        )
    return tokens


def _penalised(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    histories: Sequence[Sequence[int]],
) -> Tensor:
    """Return logits [r, v] in float64, after each row's repetition penalty."""
    rows: list[int] = []
    seen: list[int] = []
    penalties: list[float] = []
    for row, (p, history) in enumerate(zip(params, histories, strict=True)):
        if p.repetition_penalty != 1.0:
            assert history, "the history of a row contains at least its own token"
            rows += [row] * len(history)
            seen += history
            penalties += [p.repetition_penalty] * len(history)
    precise = logits.double()
    if not rows:
        return precise
    at = torch.tensor([rows, seen], device=logits.device)
    penalty = torch.tensor(penalties, dtype=torch.float64, device=logits.device)
    before = precise[at[0], at[1]]
    # Extreme penalties would overflow to infinity, and infinities cancel to NaN.
    after = torch.where(before > 0.0, before / penalty, before * penalty)
    after = torch.where(before.isinf(), before, after.clamp(-_MAX_PENALISED, _MAX_PENALISED))
    # A token that occurs twice is written twice, with the same value.
    return precise.index_put((at[0], at[1]), after)


def _sampled(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """Return the tokens [r] drawn from penalised logits [r, v] at temperatures above 0."""
    scaled = _scaled(logits, _column(logits, [p.temperature for p in params]))
    seed = torch.tensor([p.seed for p in params], device=logits.device)
    position = torch.tensor(positions, device=logits.device)
    kept = _kept(scaled, params)
    if kept is None:
        ids = torch.arange(scaled.shape[1], device=logits.device)
        return (scaled + gumbel_noise(seed[:, None], position[:, None], ids)).argmax(dim=-1)
    row, ids = kept.nonzero(as_tuple=True)  # Noise is expensive: compute it only for these.
    scores = torch.full_like(scaled, -math.inf)
    scores[row, ids] = scaled[row, ids] + gumbel_noise(seed[row], position[row], ids)
    return scores.argmax(dim=-1)


def _scaled(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Return logits [.., v] minus the greatest of each row, divided by the temperature.

    The subtraction comes first, since a logit divided by a tiny temperature overflows to infinity.
    """
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def _kept(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor | None:
    """Return a mask [r, v] of the tokens that may be drawn; None for all of them."""
    limited = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1.0]
    is_floored = any(p.min_p for p in params)
    if not limited and not is_floored:
        return None
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if limited:
        rows = torch.tensor(limited, device=scaled.device)
        kept[rows] = _most_probable(scaled[rows], [params[row] for row in limited])
    if is_floored:
        # p >= min_p max(p), which does not depend on how top-k and top-p renormalise p.
        least = _column(scaled, [_log_share(p.min_p) for p in params])
        kept &= scaled >= scaled.amax(dim=-1, keepdim=True) + least
    return kept


def _most_probable(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return a mask [r, v] of the tokens in the top-p set within the top-k set.

    Of equal logits, those with the lowest ids are in the set. Probabilities are integers, in units
    of 2**-bits of the greatest one, so that their sums do not depend on the order.
    """
    size = scaled.shape[1]
    bits = 62 - size.bit_length()  # so that a sum over the vocabulary fits into int64
    max_kept = torch.tensor([min(p.top_k or size, size) for p in params], device=scaled.device)
    max_kept = max_kept[:, None]
    # Rounding cannot reach a share above 1, so this keeps all tokens.
    top_p = _column(scaled, [p.top_p if p.top_p < 1.0 else 2.0 for p in params])
    full_total = torch.zeros_like(max_kept)
    if any(p.top_k == 0 for p in params):
        share = integer_exp(scaled - scaled.amax(dim=-1, keepdim=True), bits)
        full_total = share.sum(dim=-1, keepdim=True)
    width = min(size, max(NUM_SORTED, *(p.top_k for p in params)))
    while True:
        ordered = scaled.topk(width, dim=-1).values
        in_top_k = torch.arange(width, device=scaled.device) < max_kept
        share = integer_exp(ordered - ordered[:, :1], bits) * in_top_k
        total = torch.where(max_kept > width, full_total, share.sum(dim=-1, keepdim=True))
        before = share.cumsum(dim=-1) - share  # of the more probable tokens
        num_kept = (in_top_k & (before.double() < top_p * total.double())).sum(-1, keepdim=True)
        if width == size or bool(((num_kept < width) | (num_kept == max_kept)).all()):
            break
        width = size
    return greatest(scaled, ordered.gather(-1, num_kept - 1), num_kept)


def _log_share(share: float) -> float:
    """Return log(share); -inf for 0."""
    return math.log(share) if share > 0.0 else -math.inf


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    """Return float64 `values` [r, 1] on the device of `like`."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
