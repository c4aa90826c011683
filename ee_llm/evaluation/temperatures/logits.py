"""Log normalizers of logits at many temperatures, from vocabulary-parallel logits.

Legend of shapes: r rows, v vocabulary, n tensor-parallel ranks, k temperatures.
"""

import torch
from torch import Tensor

from ee_llm.evaluation.row_statistics import Gather, picked

_PER_OCTAVE = 3
_OCTAVES = 3  # on either side of 1

SCALES = tuple(
    2.0 ** (step / _PER_OCTAVE)
    for step in range(-_OCTAVES * _PER_OCTAVE, _OCTAVES * _PER_OCTAVE + 1)
)
"""The factors of logits, the inverse temperatures, in equal ratios: from 1/8 to 8."""


def scaled_normalizers(
    logits: Tensor, labels: Tensor, first_id: int, gather: Gather
) -> tuple[Tensor, Tensor]:
    """Return what the softmax of scaled logits gives a label; all ranks must call this together.

    With the gap g = max z - z_label and the normalizer N_s = log sum_v exp(s (z_v - max z)) of row
    z, the negative log probability of the label at temperature 1 / s is s g + N_s, and the greatest
    log probability is -N_s. The ranks exchange k + 2 numbers per row and rank.

    Args:
        logits: Logits [r, v / n] of the ids from `first_id` on.
        labels: Ids [r].
        first_id: Vocabulary id of the first column.
        gather: Exchange between the ranks.

    Returns:
        The gaps [r], and the normalizers [k, r] at `SCALES`.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    tops = logits.max(dim=-1).values
    gaps = logits - tops[:, None]
    sums: dict[int, Tensor] = {}
    for start in range(_PER_OCTAVE):
        weights = (gaps * SCALES[start]).exp_()
        for index in range(start, len(SCALES), _PER_OCTAVE):
            sums[index] = weights.sum(dim=-1)
            weights.square_()  # doubles the scale, and is faster than an exponential
    own = torch.stack([tops, *(sums[index] for index in range(len(SCALES)))], dim=-1)
    parts = gather(own).unflatten(-1, (-1, 1 + len(SCALES)))  # [r, n, 1 + k]
    greatest = parts[:, :, 0].max(dim=-1).values
    below = parts[:, :, :1] - greatest[:, None, None]
    totals = (parts[:, :, 1:] * (below * below.new_tensor(SCALES)).exp()).sum(dim=1)
    chosen = picked(logits, labels[:, None], first_id, gather)[:, 0]
    return greatest - chosen, totals.log().T
