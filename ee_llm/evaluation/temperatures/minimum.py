"""Find the temperature with the least cross entropy, and the distributions at any temperature.

Legend of shapes: t tokens, k scales of the grid.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_llm.evaluation.temperatures.logits import SCALES

_NUM_POINTS = 7
"""Points of the interpolating polynomial in log s: enough for temperatures within 0.1 %."""

_GOLDEN = (math.sqrt(5) - 1) / 2
_TOLERANCE = 1e-6  # of log s


@dataclass(frozen=True)
class Minimum:
    """The scale of logits with the least cross entropy.

    Attributes:
        scale: The factor of the logits, the inverse of the temperature.
        is_bracketed: Whether the grid has greater cross entropies on both sides, so that it is not
            an end of the grid.
    """

    scale: float
    is_bracketed: bool


@dataclass(frozen=True)
class ScaledTokens:
    """The distributions of one exit at the tokens of a text, at any temperature.

    Attributes:
        gaps: Greatest logit minus that of the label [t], float64.
        normalizers: Log normalizers [k, t] at `SCALES`; see `scaled_normalizers`.
    """

    gaps: Tensor
    normalizers: Tensor

    def loss(self, scale: float) -> float:
        """Return the mean cross entropy of the labels in nats, with logits times `scale`."""
        mean_normalizers = self.normalizers.mean(dim=1, dtype=torch.float64)
        return scale * float(self.gaps.mean()) + float(_interpolated(mean_normalizers, scale))

    def confidence(self, scale: float) -> Tensor:
        """Return the greatest probability [t], float64, with logits times `scale`."""
        return (-_interpolated(self.normalizers, scale).clamp(min=0)).exp()

    def minimum(self) -> Minimum:
        """Return the scale with the least loss, which is convex in the scale."""
        mean_normalizers = self.normalizers.mean(dim=1, dtype=torch.float64)
        gap = float(self.gaps.mean())
        losses = mean_normalizers + gap * mean_normalizers.new_tensor(SCALES)
        # Of equal losses, such as 0 of an exit that is certain and always agrees, the one nearest
        # to the present temperature.
        best = min(
            (losses == losses.min()).nonzero()[:, 0].tolist(),
            key=lambda index: abs(index - len(SCALES) // 2),
        )
        if best in (0, len(SCALES) - 1):
            return Minimum(SCALES[best], False)

        def loss(log_scale: float) -> float:
            scale = math.exp(log_scale)
            # One polynomial for all: where two meet, there could be a false minimum.
            return scale * gap + float(_interpolated(mean_normalizers, scale, around=best))

        # Golden-section search between the neighbours of the best point.
        low, high = math.log(SCALES[best - 1]), math.log(SCALES[best + 1])
        while high - low > _TOLERANCE:
            step = _GOLDEN * (high - low)
            if loss(high - step) < loss(low + step):
                high = low + step
            else:
                low = high - step
        found = (low + high) / 2
        is_better = loss(found) < float(losses[best])
        return Minimum(math.exp(found) if is_better else SCALES[best], True)


def _interpolated(normalizers: Tensor, scale: float, around: int | None = None) -> Tensor:
    """Return normalizers [...] at a scale from those [k, ...] of the grid, float64.

    They are smooth, so a polynomial in log s through some points of the grid is close to them.

    Args:
        normalizers: The normalizers at `SCALES`.
        scale: The scale.
        around: Index of the point in the middle of those of the polynomial; None for the nearest.
    """
    step = math.log(SCALES[1] / SCALES[0])
    place = math.log(scale / SCALES[0]) / step
    middle = round(place) if around is None else around
    first = min(max(middle - _NUM_POINTS // 2, 0), len(SCALES) - _NUM_POINTS)
    points = range(first, first + _NUM_POINTS)
    weights = [
        math.prod((place - other) / (point - other) for other in points if other != point)
        for point in points
    ]
    found = torch.zeros_like(normalizers[0], dtype=torch.float64)
    for point, weight in zip(points, weights, strict=True):
        found += weight * normalizers[point].double()
    return found
