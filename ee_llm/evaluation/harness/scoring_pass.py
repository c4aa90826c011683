"""Windows of tokens to score, and the rows of one forward pass over several of them.

Legend of shapes: s scored rows, r some of them, v vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_llm.errors import RunError
from ee_llm.inference.execution.attention import BlockTable, Run

BLOCK = 16  # positions by which windows are aligned in the cache


@dataclass(frozen=True)
class Window:
    """Tokens to run, and the continuations to score.

    Attributes:
        tokens: Input tokens: a context, and a continuation without its last token.
        continuations: Continuations of equal length n, with equal tokens but for the last one. They
            are the targets of the last n rows.
    """

    tokens: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) >= self.num_scored, "the rows of another window would be scored"

    @property
    def num_scored(self) -> int:
        """Number of rows whose next token is scored."""
        return len(self.continuations[0])


@dataclass(frozen=True)
class Score:
    """What the model says about the continuations of a window.

    Attributes:
        logprobs: Log probability of each continuation, in nats.
        is_greedy: Whether greedy decoding would generate each continuation.
        exits: Boundary of the exit that predicted each scored row.
    """

    logprobs: tuple[float, ...]
    is_greedy: tuple[bool, ...]
    exits: tuple[int, ...]


class ScoringPass:
    """The rows of a pass, and what is known of those that are scored."""

    def __init__(self, windows: Sequence[Window], device: torch.device) -> None:
        self._windows = windows
        longest = max(len(window.tokens) for window in windows)
        self.table = BlockTable(len(windows), aligned(longest) // BLOCK, BLOCK, device)
        self.runs: list[Run] = []
        self.row_numbers: list[int] = []  # of the scored rows in the pass
        targets: list[list[int]] = []
        first = block = 0
        most = max(len(window.continuations) for window in windows)
        for slot, window in enumerate(windows):
            length = len(window.tokens)
            for position in range(0, length, BLOCK):
                self.table.set(slot, position // BLOCK, block)
                block += 1
            self.runs.append(Run(slot, 0, length, first))
            first += length
            self.row_numbers += range(first - window.num_scored, first)
            for column in zip(*window.continuations, strict=True):
                targets.append([*column, *[0] * (most - len(column))])
        tokens = [token for window in windows for token in window.tokens]
        self.tokens = torch.tensor(tokens, device=device)
        self.rows = torch.tensor(self.row_numbers, device=device)
        self._targets = torch.tensor(targets, device=device)
        self._logprobs = torch.full(self._targets.shape, torch.nan, dtype=torch.float64)
        self._greedy = torch.zeros(self._targets.shape, dtype=torch.bool)
        self._exits = [0] * len(self.row_numbers)

    def record(self, rows: Sequence[int], logits: Tensor, boundary: int) -> None:
        """Store what an exit's logits [r, v] predict at the given scored rows."""
        targets = self._targets[torch.tensor(rows, device=logits.device)]
        logprobs = logits.log_softmax(dim=-1).gather(-1, targets).double()
        if not logprobs.isfinite().all():
            raise RunError(
                f"a log probability of the exit after layer {boundary} is not finite. Use dtype ="
                " float32, and check the checkpoint if it still is not."
            )
        self._logprobs[rows] = logprobs.cpu()
        self._greedy[rows] = (logits.argmax(dim=-1, keepdim=True) == targets).cpu()
        for row in rows:
            self._exits[row] = boundary

    def scores(self) -> Iterator[Score]:
        """Yield the score of each window."""
        start = 0
        for window in self._windows:
            stop, count = start + window.num_scored, len(window.continuations)
            yield Score(
                tuple(self._logprobs[start:stop, :count].sum(dim=0).tolist()),
                tuple(self._greedy[start:stop, :count].all(dim=0).tolist()),
                tuple(self._exits[start:stop]),
            )
            start = stop


def live_ranges(runs: Sequence[Run], frozen: set[int]) -> list[Run]:
    """Return the rows of `runs` whose numbers are not in `frozen`, in runs as long as possible."""
    found = []
    for run in runs:
        start = run.first
        for row in range(run.first, _end(run) + 1):
            if row == _end(run) or row in frozen:
                if row > start:
                    shift = run.start - run.first
                    found.append(Run(run.slot, start + shift, row + shift, start))
                start = row + 1
    return found


def _end(run: Run) -> int:
    return run.first + run.num_rows


def aligned(length: int) -> int:
    """Return the number of positions in the cache that a window of this length takes."""
    return -(-length // BLOCK) * BLOCK
