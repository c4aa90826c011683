"""Records of a made-up model whose true risk is known."""

import torch

from ee_llm.evaluation.calibration.records import Records
from ee_llm.evaluation.calibration.search import Costs

COSTS = Costs((8, 16), num_layers=24, head=1.0)


def make_records(num_windows: int, seed: int, length: int = 64) -> Records:
    """Return records in which exits are right about as often as they are confident.

    Windows differ in difficulty, so that the tokens of a window are not independent. The exit at 8
    is overconfident and the one at 16 underconfident, so that equal thresholds are not best.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_windows, length)
    difficulty = torch.rand(num_windows, 1, generator=generator).expand(shape)
    confidence, losses = [], []
    for power, skill in ((2.0, 0.45), (0.7, 1.3)):
        ability = torch.rand(shape, generator=generator) ** (difficulty + 0.3)
        confidence.append(ability ** (1 / power))
        is_wrong = torch.rand(shape, generator=generator) > ability ** (0.1 / skill)
        losses.append(is_wrong.float() * (ability < 0.995))
    windows = torch.arange(num_windows).repeat_interleave(length)
    return Records(
        (8, 16),
        torch.stack(confidence).flatten(1),
        torch.stack(losses).flatten(1),
        windows,
    )
