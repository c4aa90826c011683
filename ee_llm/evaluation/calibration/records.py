"""What every exit would have done on held-out text, and the outcome of any thresholds on it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Aggregate = Literal["mean", "increase", "any"]
"""The loss of a window: the mean loss of its tokens; their mean, at least 0 and at most 1; or the
greatest loss of a token."""


@dataclass(frozen=True)
class Outcome:
    """What thresholds do to each token.

    Attributes:
        exits: Index [t] of the exit that each token takes: 0 is the first early exit, and the
            number of early exits is the final one.
        losses: Loss [t] of each token, 0 at the final exit.
    """

    exits: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Records:
    """Confidences and losses of all early exits on held-out text, teacher-forced.

    One pass over the text gives the outcome of any thresholds, because the hidden states of a row
    do not depend on the exits of other rows.

    Attributes:
        boundaries: Boundaries of the early exits, in increasing order.
        confidence: Confidence [e, t] of each early exit for each token.
        losses: Loss [e, t] of each token that takes this exit, such as 1 if its most probable token
            is not that of the final exit. The final exit has none.
        windows: Number [t] of the window of each token, in increasing order from 0.
        aggregate: The loss of a window.
        compares_exits: Whether the confidence of an exit is only valid if all exits before it are
            on, because it compares them.
    """

    boundaries: tuple[int, ...]
    confidence: Tensor
    losses: Tensor
    windows: Tensor
    aggregate: Aggregate = "mean"
    compares_exits: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return self.confidence.shape[1]

    @property
    def num_windows(self) -> int:
        """Number of windows, which are treated as independent."""
        return int(self.windows[-1]) + 1 if len(self.windows) else 0

    def outcome(self, thresholds: Sequence[float | None]) -> Outcome:
        """Return what happens to each token with these thresholds; None turns an exit off."""
        final = len(self.boundaries)
        exits = torch.full((self.num_tokens,), final)
        losses = torch.zeros(self.num_tokens, dtype=torch.float64)
        for index in reversed(range(final)):
            threshold = thresholds[index]
            if threshold is None:
                continue
            is_confident = self.confidence[index] >= threshold
            exits[is_confident] = index
            losses[is_confident] = self.losses[index, is_confident].double()
        return Outcome(exits, losses)

    def window_losses(self, losses: Tensor) -> Tensor:
        """Return the loss [w] of each window, in [0, 1], from the losses [t] of its tokens."""
        found = torch.zeros(self.num_windows, dtype=torch.float64)
        if self.aggregate == "any":
            return found.scatter_reduce_(0, self.windows, losses.double(), "amax")
        found.index_add_(0, self.windows, losses.double())
        means = found / torch.bincount(self.windows, minlength=self.num_windows)
        return means.clamp(0.0, 1.0) if self.aggregate == "increase" else means

    def part(self, windows: Tensor) -> "Records":
        """Return the records of some windows, in the order given; a window may occur repeatedly."""
        starts = torch.searchsorted(self.windows, torch.arange(self.num_windows + 1))
        columns = [torch.arange(int(starts[w]), int(starts[w + 1])) for w in windows.tolist()]
        numbers = [torch.full((len(c),), n) for n, c in enumerate(columns)]
        chosen = torch.cat(columns) if columns else torch.empty(0, dtype=torch.long)
        return replace(
            self,
            confidence=self.confidence[:, chosen],
            losses=self.losses[:, chosen],
            windows=torch.cat(numbers) if numbers else torch.empty(0, dtype=torch.long),
        )
