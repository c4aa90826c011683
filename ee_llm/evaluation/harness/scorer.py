"""Score given tokens in forward passes over many windows, as a strategy predicts them.

Every scored token is predicted from the true tokens before it (teacher forcing), by the exit that
the strategy takes at that position.

Legend of shapes: t rows of a pass, s scored rows, r some of them, b boundaries, h hidden, v
vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ee_llm.config import Config
from ee_llm.evaluation.harness.scoring_pass import Score, ScoringPass, Window, aligned, live_ranges
from ee_llm.inference.decoding.contrast import contrast_logits
from ee_llm.inference.decoding.settings import Contrast
from ee_llm.inference.execution.attention import Batch
from ee_llm.inference.execution.head import HiddenRows
from ee_llm.inference.execution.stage import ModelStage, Projection, partition_layers
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.strategies import Strategy
from ee_llm.inference.verification.confidences import RowConfidences

MAX_ROWS = 2048  # of a pass, unless one window has more
MAX_LOGITS = 1 << 22  # logits that are computed at once, unless one row has more


class Scorer:
    """A model on this device that scores windows."""

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        longest: int,
        policy: ExitPolicy,
        strategy: Strategy,
        contrast: Contrast | None = None,
    ) -> None:
        """Build the model.

        Args:
            config: The model's configuration.
            tensors: The weights, all of one dtype and device.
            longest: Greatest number of tokens of a window.
            policy: Exit policy; strategies of full depth turn all exits off.
            strategy: With `exact`, the first exit whose confidence reaches its threshold predicts
                the token. With `propagate`, the hidden state at that exit also takes the place of
                deeper ones for the keys and values that later tokens see. With `full` and
                `self-speculative`, the final exit predicts every token. With `sled` and `dola`, its
                logits are contrasted with early ones.
            contrast: Settings of `sled` and `dola`, for the model (see `resolve_contrast`).
        """
        self.longest = longest
        self._config, self._contrast = config, contrast
        self._policy = policy.under(strategy)
        self._freezes = strategy == "propagate"
        self._num_positions = max(MAX_ROWS, aligned(longest))
        (layer_ranges,) = partition_layers(config)
        self._stage = ModelStage(config, tensors, self._num_positions, layer_ranges)
        permitted = [b for b in policy.boundaries if self._policy.threshold(b) is not None]
        own_heads = contrast is not None and contrast.head == "exits"
        early = contrast.layers if contrast is not None and own_heads else ()
        assert isinstance(early, tuple), "resolved settings list their boundaries"
        self._projections = {
            b: self._stage.projection(config, tensors, b)
            for b in {*permitted, *early, config.model.num_layers}
        }
        self._permitted = (*permitted, config.model.num_layers)

    def score(self, windows: Sequence[Window]) -> Iterator[Score]:
        """Yield the scores of windows, in order.

        Raises RunError if a log probability is not finite.
        """
        batch: list[Window] = []
        size = 0
        for window in windows:
            length = aligned(len(window.tokens))
            if batch and size + length > self._num_positions:
                yield from self._score(batch)
                batch, size = [], 0
            batch.append(window)
            size += length
        if batch:
            yield from self._score(batch)

    @torch.no_grad()
    def _score(self, windows: Sequence[Window]) -> Iterator[Score]:
        """Yield the scores of windows that fit into one pass."""
        one = ScoringPass(windows, self._stage.device)
        final = self._config.model.num_layers
        undecided = list(range(len(one.rows)))
        frozen: set[int] = set()
        batch = self._batch(one, frozen)
        x = self._stage.embed(one.tokens, batch.positions)
        early = _EarlyRows(self._contrast, one.rows)
        confidences = RowConfidences(self._policy.measure, len(one.rows), self._stage.gate)
        early.add(0, x)
        for index, layer_range in enumerate(self._stage.layer_ranges):
            boundary = layer_range.last
            hidden = self._stage.run(index, x, batch, early.add)
            x = hidden.x
            if early.wants_exit(boundary):
                early.features[boundary] = self._features(index, hidden, batch, one, undecided)
            if boundary not in self._permitted:
                continue
            features = self._features(index, hidden, batch, one, undecided)
            exited = self._decide(boundary, hidden, features, one, undecided, early, confidences)
            undecided = [row for row in undecided if row not in exited]
            if not undecided:
                break
            if self._freezes and exited and boundary < final:
                frozen |= {one.row_numbers[row] for row in exited}
                batch = self._batch(one, frozen)
        yield from one.scores()

    def _decide(
        self,
        boundary: int,
        hidden: HiddenRows,
        features: Tensor,
        one: ScoringPass,
        undecided: Sequence[int],
        early: "_EarlyRows",
        confidences: RowConfidences,
    ) -> set[int]:
        """Record the predictions of the rows that take an exit, and return their indices.

        Args:
            boundary: The exit.
            hidden: All rows at its boundary.
            features: Input [r, h] of its output projection, for the undecided rows.
            one: The pass.
            undecided: Indices [r] of these rows among the scored ones.
            early: The early rows for `sled` and `dola`.
            confidences: Measures confidence.
        """
        num_logits = self._stage.num_logits * (1 + early.num_boundaries)
        exited: set[int] = set()
        for chunk in torch.arange(len(undecided)).split(max(1, MAX_LOGITS // num_logits)):
            logits = self._projections[boundary](features[chunk])
            if self._contrast is not None:
                indices = torch.tensor(undecided)[chunk]
                parts = early.logits(indices, self._stage, self._projections)
                logits = contrast_logits(logits, parts, [self._contrast] * len(chunk))
            logits = logits if logits.dtype == torch.float64 else logits.float()
            threshold = self._policy.threshold(boundary)
            if threshold is None:
                takes = [True] * len(chunk)
            else:  # Compare as the engine does, in the precision of the threshold.
                indices = torch.tensor(undecided)[chunk]
                at = hidden.select(one.rows[indices.to(one.rows.device)])
                measured = confidences.at(boundary, at.x, at.before, indices, logits)
                takes = [confidence.value >= threshold for confidence in measured]
            rows = [undecided[i] for i, took in zip(chunk.tolist(), takes, strict=True) if took]
            if rows:
                one.record(rows, logits[torch.tensor(takes, device=logits.device)], boundary)
                exited.update(rows)
        return exited

    def _features(
        self,
        index: int,
        hidden: HiddenRows,
        batch: Batch,
        one: ScoringPass,
        rows: Sequence[int],
    ) -> Tensor:
        """Return the input [r, h] of an exit's output projection for the given scored rows."""
        numbers = one.rows[torch.tensor(rows, device=one.rows.device)]
        if not self._stage.has_block(index):
            return self._stage.features(index, hidden.select(numbers), batch)
        others = set(range(len(one.tokens))) - set(numbers.tolist())
        return self._stage.features(index, hidden, self._batch(one, others))

    def _batch(self, one: ScoringPass, frozen: set[int]) -> Batch:
        live = live_ranges(one.runs, frozen) if frozen else None
        return one.table.batch(one.runs, live, self._stage.cache_dtype)


class _EarlyRows:
    """The scored rows at the boundaries whose logits `sled` and `dola` contrast with the last."""

    def __init__(self, contrast: Contrast | None, rows: Tensor) -> None:
        layers = () if contrast is None else contrast.layers
        assert isinstance(layers, tuple), "resolved settings list their boundaries"
        self._head = None if contrast is None else contrast.head
        self._boundaries = layers
        self._rows = rows
        self.features: dict[int, Tensor] = {}  # {boundary: [s, h]}

    @property
    def num_boundaries(self) -> int:
        """Number b of boundaries."""
        return len(self._boundaries)

    def wants_exit(self, boundary: int) -> bool:
        """Return whether the input of this exit's output projection is needed."""
        return self._head == "exits" and boundary in self._boundaries

    def add(self, boundary: int, x: Tensor) -> None:
        """Keep the scored ones of the rows [t, h] at a boundary if they are needed."""
        if self._head != "exits" and boundary in self._boundaries:
            self.features[boundary] = x[self._rows]

    def logits(
        self, indices: Tensor, stage: ModelStage, projections: Mapping[int, Projection]
    ) -> Tensor:
        """Return the early logits [r, b, v] of the scored rows with the given indices [r]."""
        parts = []
        for boundary in self._boundaries:
            features = self.features[boundary][indices.to(self._rows.device)]
            if self._head == "exits":
                parts.append(projections[boundary](features))
            else:
                parts.append(stage.early_logits(features, self._head == "final"))
        return torch.stack(parts, dim=1)
