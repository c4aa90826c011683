"""Noise and exponentials that are bit-identical for every device, tensor shape and batch.

All operations are on integers or correctly rounded, so other rows of the batch, vocabulary shards
and the device do not matter. Do not compile this code: fused multiply-adds would change the bits.
"""

import math

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
# log 2 in two parts (from fdlibm); the first has so few bits that its products with small k are
# exact.
LOG2_HIGH, LOG2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10


def gumbel_noise(seed: int | Tensor, position: int | Tensor, ids: Tensor) -> Tensor:
    """Return standard Gumbel numbers, float64, for int64 vocabulary `ids`.

    `seed` (0 to 2**63 - 1) and `position` (0 to 2**32 - 1) may be int64 tensors that broadcast
    with `ids`. Each number is a function of its own (seed, position, id) only.
    """
    seed, position = (torch.as_tensor(key, device=ids.device) for key in (seed, position))
    high, low = _philox(seed, position, ids)
    uniform = ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52  # exact, in (0, 1)
    return -_log(-_log(uniform))


def integer_exp(x: Tensor, bits: int) -> Tensor:
    """Return 2**bits exp(x) as int64 for float64 x <= 0 and bits <= 62.

    A sum of integers does not depend on its order. The error is about 2**-52 of the value plus one
    half. With x = k log 2 + r, |r| <= log(2) / 2: exp x = 2^k exp r, and exp r by Taylor's series.
    """
    x = x.clamp(min=-50.0)  # 2**62 exp(-50) is below one half
    power = (x * (1.0 / math.log(2.0))).round()
    rest = x - power * LOG2_HIGH - power * LOG2_LOW
    series = torch.zeros_like(x)
    for order in range(14, -1, -1):  # the first omitted term is below 1e-18
        series = series * rest + 1.0 / math.factorial(order)
    scale = (power.long() + (1023 + bits) << 52).view(torch.float64)  # 2**(k + bits), exactly
    return (series * scale).round().long()


def _philox(seed: Tensor, position: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return two 32-bit random words for each key, as int64 tensors.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): counter
    (id, position, 0, 0), key (low and high half of the seed). int64 products wrap around; the masks
    extract the unsigned words.
    """
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

    torch.log differs in its last bit between devices, and between the vectorised body of a tensor
    and its remainder.
    With x = m 2^e, m in [sqrt(1/2), sqrt(2)), t = (m - 1) / (m + 1): log x = e log 2 + 2 artanh t.
    """
    mantissa, exponent = torch.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, 2.0 * mantissa, mantissa)
    exponent = exponent.double() - small.double()
    t = (mantissa - 1.0) / (mantissa + 1.0)  # |t| <= 0.172
    square = t * t
    series = torch.zeros_like(x)
    for odd in range(23, 0, -2):  # the first omitted term is below 1e-19
        series = series * square + 1.0 / odd
    return exponent * math.log(2.0) + 2.0 * t * series
