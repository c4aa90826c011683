"""From logits to a token: greedy or sampled, with noise that is a pure function of its key.

Sampling is argmax(logits / T + g) with one Gumbel number g per vocabulary entry, which draws from
softmax(logits / T) (Gumbel 1954; Maddison et al., arXiv 1411.0030). g is a function of (seed,
position, vocabulary id) alone: neighbours in a batch, shards of the vocabulary and devices do not
matter.

Legend of shapes: r rows, v vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_llm.errors import RequestError
from ee_llm.inference.sampling.noise import gumbel_noise, integer_exp

# So many most probable tokens are sorted at first; hardly ever does a top-p set need more.
NUM_SORTED = 1024
# On a CPU, rows of so many logits at most are drawn at once: their temporaries stay in its cache.
NUM_CACHED = 2**15
_LARGEST = 1e300  # of a penalised logit


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn: penalty, temperature, top-k, top-p, min-p, in this order.

    temperature: 0 takes the most probable token (the lowest id of equals); else logits are divided
    by it. top_k: only the k most probable tokens, 0 for all. top_p: then the fewest most probable
    ones that hold this share of the probability, 1 for all. min_p: then those of at least this
    share of the most probable one's probability, 0 for all (arXiv 2407.01082). seed: 0 to
    2**63 - 1. repetition_penalty: first of all, in greedy decoding too, the logits of tokens that
    the prompt or output has are divided by it if positive, else multiplied (CTRL, arXiv 1909.05858,
    section 4.1); 1 is off, under 1 favours them.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("top_k", "seed"):
            if type(getattr(self, name)) is not int:
                raise RequestError(f"{name} {getattr(self, name)!r} must be an integer")
        if not 0.0 <= self.temperature < math.inf:
            raise RequestError(
                f"temperature {self.temperature} must be finite and at least 0 (0 is greedy)"
            )
        if self.top_k < 0:
            raise RequestError(f"top_k {self.top_k} must be at least 1, or 0 for no limit")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p {self.top_p} is not in (0, 1]; 1 means no limit")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"seed {self.seed} is not in 0 .. 2**63 - 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise RequestError(f"min_p {self.min_p} is not in [0, 1]; 0 means no limit")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise RequestError(
                f"repetition_penalty {self.repetition_penalty} must be finite and above 0 (1 is"
                " off, above 1 discourages repetition)"
            )


def draw(
    logits: Tensor,
    settings: Sequence[SamplingParams],
    positions: Sequence[int],
    histories: Sequence[Sequence[int]],
) -> Tensor:
    """Return the tokens [r], int64, drawn from logits [r, v].

    The row at positions[i] draws the token at positions[i] + 1. histories[i] are all tokens at
    positions 0 .. positions[i], read only where there is a repetition penalty. A row's token is
    a pure function of its own arguments: the rows beside it do not change a bit, nor does a device.
    """
    if all(s.temperature == 0.0 and s.repetition_penalty == 1.0 for s in settings):
        return logits.argmax(dim=-1)
    num_rows = len(settings)
    if logits.device.type == "cpu":
        num_rows = max(1, NUM_CACHED // logits.shape[1])
    parts = [slice(row, row + num_rows) for row in range(0, len(settings), num_rows)]
    return torch.cat(
        [_draw(logits[part], settings[part], positions[part], histories[part]) for part in parts]
    )


def sample(
    logits: Tensor, sampling: SamplingParams, position: int, history: Sequence[int] = ()
) -> int:
    """Return the token drawn from logits [v] for the row at `position`: `draw` of a single row."""
    return int(draw(logits[None], [sampling], [position], [history]))


def token_margin(
    logits: Tensor, sampling: SamplingParams, position: int, token: int, history: Sequence[int] = ()
) -> float:
    """Return how far logits [v] are from drawing `token`: 0 if they do, else the least error m.

    An error m moves any two of the penalised logits / T (T is 1 if greedy) by m against each other,
    and any sum of probabilities by m. It explains `token` if that may then be in the top-k, top-p
    and min-p set, and each rival be overtaken or outside of the set. `history` is as for `draw`.
    """
    penalised = _penalised(logits[None], [sampling], [position], [history])[0]
    if sampling.temperature == 0.0:
        return float(penalised.max() - penalised[token])
    if token == sample(logits, sampling, position, history):
        return 0.0
    scaled = _scaled(penalised, sampling.temperature)
    ids = torch.arange(len(scaled), device=scaled.device)
    scores = scaled + gumbel_noise(sampling.seed, position, ids)
    num_kept = min(sampling.top_k or len(scaled), len(scaled))
    top_p = sampling.top_p if sampling.top_p < 1.0 else math.inf
    least = _log_share(sampling.min_p)  # of a token's logit less the greatest one
    ordered = scaled.sort(descending=True).values
    share = (scaled - ordered[:num_kept].logsumexp(dim=0)).exp()
    mass = torch.cat((torch.zeros_like(share[:1]), share.sort(descending=True).values.cumsum(0)))
    # The greatest of all others: for the most probable token itself, the second.
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

    low, high = 0.0, float(max(ordered[0] - ordered[-1], scores.max() - scores[token]))
    for _ in range(60):  # what explains it is monotone in the error
        middle = (low + high) / 2
        low, high = (low, middle) if is_explained(middle) else (middle, high)
    return high


def _draw(
    logits: Tensor,
    settings: Sequence[SamplingParams],
    positions: Sequence[int],
    histories: Sequence[Sequence[int]],
) -> Tensor:
    """Return the tokens [r] as `draw` does, of all rows at once."""
    precise = _penalised(logits, settings, positions, histories)
    tokens = precise.argmax(dim=-1)
    sampled = [row for row, sampling in enumerate(settings) if sampling.temperature > 0.0]
    if sampled:
        rows = torch.tensor(sampled, device=logits.device)
        tokens[rows] = _sampled(
            precise[rows], [settings[row] for row in sampled], [positions[row] for row in sampled]
        )
    return tokens


def _penalised(
    logits: Tensor,
    settings: Sequence[SamplingParams],
    positions: Sequence[int],
    histories: Sequence[Sequence[int]],
) -> Tensor:
    """Return logits [r, v] in float64, after each row's repetition penalty."""
    rows: list[int] = []
    seen: list[int] = []
    penalties: list[float] = []
    for row, (sampling, history) in enumerate(zip(settings, histories, strict=True)):
        if sampling.repetition_penalty != 1.0:
            assert history, "a row has its own token at least behind it"
            rows += [row] * len(history)
            seen += history
            penalties += [sampling.repetition_penalty] * len(history)
    precise = logits.double()
    if not rows:
        return precise
    at = torch.tensor([rows, seen], device=logits.device)
    penalty = torch.tensor(penalties, dtype=torch.float64, device=logits.device)
    before = precise[at[0], at[1]]
    # Extreme penalties would overflow to infinity, and infinities cancel to NaN.
    after = torch.where(before > 0.0, before / penalty, before * penalty)
    after = after.clamp(-_LARGEST, _LARGEST)
    # A token seen twice is written twice, with the same value.
    return precise.index_put((at[0], at[1]), after)


def _sampled(
    logits: Tensor, settings: Sequence[SamplingParams], positions: Sequence[int]
) -> Tensor:
    """Return the tokens [r] drawn from penalised logits [r, v] at temperatures above 0."""
    scaled = _scaled(logits, _column(logits, [sampling.temperature for sampling in settings]))
    seed = torch.tensor([sampling.seed for sampling in settings], device=logits.device)
    position = torch.tensor(positions, device=logits.device)
    kept = _kept(scaled, settings)
    if kept is None:
        ids = torch.arange(scaled.shape[1], device=logits.device)
        return (scaled + gumbel_noise(seed[:, None], position[:, None], ids)).argmax(dim=-1)
    row, ids = kept.nonzero(as_tuple=True)  # noise is dear: only for these
    scores = torch.full_like(scaled, -math.inf)
    scores[row, ids] = scaled[row, ids] + gumbel_noise(seed[row], position[row], ids)
    return scores.argmax(dim=-1)


def _scaled(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Return logits [.., v] less the greatest of each row, divided by the temperature.

    The difference comes first: a logit divided by a tiny temperature overflows to infinity.
    """
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def _kept(scaled: Tensor, settings: Sequence[SamplingParams]) -> Tensor | None:
    """Return which tokens [r, v] may be drawn, None for all of them."""
    limited = [row for row, s in enumerate(settings) if s.top_k or s.top_p < 1.0]
    is_floored = any(sampling.min_p for sampling in settings)
    if not limited and not is_floored:
        return None
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if limited:
        rows = torch.tensor(limited, device=scaled.device)
        kept[rows] = _most_probable(scaled[rows], [settings[row] for row in limited])
    if is_floored:
        # p >= min_p max(p), of whatever share the sets before have left of the probability.
        least = _column(scaled, [_log_share(sampling.min_p) for sampling in settings])
        kept &= scaled >= scaled.amax(dim=-1, keepdim=True) + least
    return kept


def _most_probable(scaled: Tensor, settings: Sequence[SamplingParams]) -> Tensor:
    """Return which tokens [r, v] are in the top-k set, and within it in the top-p set.

    Of equal logits the lowest ids are. Probabilities are integers, in units of 2**-bits of the
    greatest one's, so that their sums are the same in any order.
    """
    size = scaled.shape[1]
    bits = 62 - size.bit_length()  # the sum of v of them fits
    most = torch.tensor([min(s.top_k or size, size) for s in settings], device=scaled.device)
    most = most[:, None]
    # Beyond 1 lies what rounding can not reach: all.
    top_p = _column(scaled, [s.top_p if s.top_p < 1.0 else 2.0 for s in settings])
    whole = torch.zeros_like(most)
    if any(sampling.top_k == 0 for sampling in settings):
        share = integer_exp(scaled - scaled.amax(dim=-1, keepdim=True), bits)
        whole = share.sum(dim=-1, keepdim=True)
    width = min(size, max(NUM_SORTED, *(sampling.top_k for sampling in settings)))
    while True:
        ordered = scaled.topk(width, dim=-1).values
        in_top_k = torch.arange(width, device=scaled.device) < most
        share = integer_exp(ordered - ordered[:, :1], bits) * in_top_k
        total = torch.where(most > width, whole, share.sum(dim=-1, keepdim=True))
        before = share.cumsum(dim=-1) - share  # of the tokens that come first
        num_kept = (in_top_k & (before.double() < top_p * total.double())).sum(-1, keepdim=True)
        if width == size or bool(((num_kept < width) | (num_kept == most)).all()):
            break
        width = size
    lowest = ordered.gather(-1, num_kept - 1)
    kept = scaled >= lowest
    if bool((kept.sum(dim=-1, keepdim=True) > num_kept).any()):  # more equals than there is room
        equals = scaled == lowest
        room = num_kept - (kept & ~equals).sum(dim=-1, keepdim=True)
        kept &= ~equals | (equals.cumsum(dim=-1) <= room)
    return kept


def _log_share(share: float) -> float:
    """Return log(share), minus infinity for 0."""
    return math.log(share) if share > 0.0 else -math.inf


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    """Return float64 `values` [r, 1] on the device of `like`."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
