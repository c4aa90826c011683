"""From logits to a token: greedy or sampled, with noise that is a pure function of its key.

Sampling is argmax(logits / T + g) with one Gumbel number g per vocabulary entry, which draws from
softmax(logits / T) (Gumbel 1954; Maddison et al., arXiv 1411.0030). g is a function of (seed,
position, vocabulary id) alone: neighbours in a batch, shards of the vocabulary and devices do not
matter.

Legend of shapes: v vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature: 0 takes the most probable token (the lowest id of equals); else logits are divided
    by it. top_k: only the k most probable tokens, 0 for all. top_p: then the fewest most probable
    ones that hold this share of the probability, 1 for all. seed: 0 to 2**63 - 1.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature {self.temperature} must be finite and at least 0 (0 is greedy)"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be at least 1, or 0 for no limit")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]; 1 means no limit")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is not in 0 .. 2**63 - 1")


def sample(logits: Tensor, sampling: Sampling, position: int) -> int:
    """Return the token drawn from logits [v] for the row at `position` (it becomes position + 1).

    A pure function of its arguments, the same on every device as far as the logits are the same.
    """
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scaled, scores = _scores(logits, sampling, position)
    return int(scores.masked_fill(~_kept(scaled, sampling), -math.inf).argmax())


def token_margin(logits: Tensor, sampling: Sampling, position: int, token: int) -> float:
    """Return how far logits [v] are from drawing `token`: 0 if they do, else the least error m.

    An error m moves any two of logits / T (logits if greedy) by m against each other, and any sum
    of probabilities by m. It explains `token` if that may then be in the top-k and top-p set, and
    each rival be overtaken or outside of the set.
    """
    if sampling.temperature == 0.0:
        return float(logits.double().max() - logits[token])
    if token == sample(logits, sampling, position):
        return 0.0
    scaled, scores = _scores(logits, sampling, position)
    num_kept = sampling.top_k or len(scaled)
    top_p = sampling.top_p if sampling.top_p < 1.0 else math.inf
    ordered = scaled.sort(descending=True).values
    share = (scaled - ordered[:num_kept].logsumexp(dim=0)).exp()
    mass = torch.cat((torch.zeros_like(share[:1]), share.sort(descending=True).values.cumsum(0)))

    def is_explained(error: float) -> bool:
        num_before = int((scaled > scaled[token] + error).sum())
        if num_before >= num_kept or mass[num_before] >= top_p + error:
            return False
        rivals = scores > scores[token] + error
        num_through = torch.searchsorted(-ordered, -(scaled[rivals] - error), right=True)
        falls_out = mass[num_through] - share[rivals] >= top_p - error
        return bool(((num_through > num_kept) | falls_out).all())

    low, high = 0.0, float(max(ordered[0] - ordered[-1], scores.max() - scores[token]))
    for _ in range(60):  # what explains it is monotone in the error
        middle = (low + high) / 2
        low, high = (low, middle) if is_explained(middle) else (middle, high)
    return high


def gumbel_noise(seed: int | Tensor, position: int | Tensor, ids: Tensor) -> Tensor:
    """Return standard Gumbel numbers, float64, for int64 vocabulary `ids`.

    `seed` (0 to 2**63 - 1) and `position` (0 to 2**32 - 1) may be int64 tensors that broadcast
    with `ids`. Bit-identical on every device and for every shape: integers and correctly rounded
    arithmetic only, so it must not be compiled into fused multiply-adds.
    """
    high, low = _philox(seed, position, ids)
    uniform = ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52  # exact, in (0, 1)
    return -_log(-_log(uniform))


def _scores(logits: Tensor, sampling: Sampling, position: int) -> tuple[Tensor, Tensor]:
    """Return logits / T and the same with noise, both [v] in float64."""
    scaled = logits.double() / sampling.temperature
    ids = torch.arange(len(scaled), device=scaled.device)
    return scaled, scaled + gumbel_noise(sampling.seed, position, ids)


def _kept(scaled: Tensor, sampling: Sampling) -> Tensor:
    """Return which tokens [v] are in the top-k set, and within it in the top-p set."""
    num_kept = sampling.top_k or len(scaled)
    # Stable, so that of equal logits the lowest ids are kept, on every device.
    ordered, order = scaled.sort(descending=True, stable=True)
    kept = torch.arange(len(scaled), device=scaled.device) < num_kept
    if sampling.top_p < 1.0:
        share = ordered[:num_kept].softmax(dim=0)
        before = share.cumsum(dim=0) - share  # of the tokens that come first
        kept[:num_kept] &= before < sampling.top_p
    return torch.empty_like(kept).scatter_(0, order, kept)


def _philox(seed: int | Tensor, position: int | Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return two words of 32 random bits for each key, as int64 tensors.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): counter
    (id, position, 0, 0), key (low and high half of the seed). int64 products wrap around; the masks
    take the unsigned words out of them.
    """
    seed, position = (torch.as_tensor(part, device=ids.device) for part in (seed, position))
    key0, key1 = seed & MASK32, seed >> 32
    zero = torch.zeros((), dtype=torch.int64, device=ids.device)
    c0, c1, c2, c3 = ids, position, zero, zero
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32 & MASK32) ^ c1 ^ key0,
            product1 & MASK32,
            (product0 >> 32 & MASK32) ^ c3 ^ key1,
            product0 & MASK32,
        )
        key0, key1 = key0 + 0x9E3779B9 & MASK32, key1 + 0xBB67AE85 & MASK32
    return c0, c1


def _log(x: Tensor) -> Tensor:
    """Return the natural logarithm of positive float64 x, within a few units in the last place.

    torch.log differs in its last bit between devices, and between a vector's body and its rest.
    With x = m 2^e, m in [sqrt(1/2), sqrt(2)), t = (m - 1) / (m + 1): log x = e log 2 + 2 artanh t.
    """
    mantissa, exponent = torch.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, 2.0 * mantissa, mantissa)
    exponent = exponent.double() - small.double()
    t = (mantissa - 1.0) / (mantissa + 1.0)  # |t| <= 0.172
    square = t * t
    series = torch.zeros_like(x)
    for odd in range(23, 0, -2):  # the first term left out is below 1e-19
        series = series * square + 1.0 / odd
    return exponent * math.log(2.0) + 2.0 * t * series
