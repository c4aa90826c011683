"""Forward passes over whole windows of given tokens, for statistics at every exit.

Legend of shapes: t tokens of a window, r rows with logits, h hidden, v vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.config import Config
from ee_llm.inference.choices import HiddenMeasure
from ee_llm.inference.execution.attention import Batch, BlockTable, Run
from ee_llm.inference.execution.head import HiddenRows
from ee_llm.inference.execution.stage import (
    ModelStage,
    Projection,
    make_shard,
    partition_layers,
)


@dataclass(frozen=True)
class ExitInput:
    """The rows of a window at the boundary of an exit.

    Attributes:
        boundary: The boundary.
        rows: The rows.
    """

    boundary: int
    rows: HiddenRows
    _batch: Batch
    _stage: ModelStage
    _index: int

    @property
    def hidden(self) -> Tensor:
        """Residual stream [t, h] at the boundary."""
        return self.rows.x

    @property
    def is_final(self) -> bool:
        """Whether this is the final exit."""
        return self._stage.is_final(self._index)

    def features(self) -> Tensor:
        """Return the input [t, h] of the exit's output projection."""
        return self._stage.features(self._index, self.rows, self._batch)

    def translator_input(self) -> Tensor:
        """Return the input [t, h] of the exit's translator: its hidden state behind other parts."""
        return self._stage.features(self._index, self.rows, self._batch, of_trunk=True)

    def confidences(self, measure: HiddenMeasure) -> Tensor:
        """Return the confidence [t] of the exit by a measure of hidden states, float64."""
        return self._stage.hidden_confidences(self._index, self.rows, measure)


class TeacherForced:
    """A model, or its first layers, that runs whole windows over all its ranks.

    Attributes:
        boundaries: Boundaries of the exits on this rank's pipeline stage, in order of depth.
        earlier: Boundaries of the exits on the stages before it, in order of depth.
        first_id: Vocabulary id of the first logit of this tensor-parallel rank.
        num_logits: Number of logits of this rank.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        max_length: int,
        ranks: distributed.InferenceGrid | None = None,
        *,
        last: int | None = None,
    ) -> None:
        """Build this rank's part of the model.

        Args:
            config: The model's configuration.
            tensors: The weights, all of one dtype and device.
            max_length: Greatest number of tokens of a window.
            ranks: The ranks that run the model together; all of them see the same windows.
            last: Number of layers to run; None for all.

        Raises:
            RequestError: The model cannot be split over the ranks.
        """
        num_stages, stage = (1, 0) if ranks is None else (ranks.num_stages, ranks.stage)
        last = config.model.num_layers if last is None else last
        layer_ranges = [r for r in partition_layers(config, num_stages)[stage] if r.last <= last]
        self._config, self._tensors, self._ranks = config, tensors, ranks
        self._has_previous, self._has_next = stage > 0, stage + 1 < num_stages
        shard = make_shard(config, ranks)
        self._stage = ModelStage(config, tensors, max_length, layer_ranges, shard)
        self._table = BlockTable(1, 1, max_length, self._stage.device)
        self.boundaries = tuple(r.last for r in layer_ranges if r.has_exit)
        self.earlier = tuple(b for b in config.exits.boundaries if b < layer_ranges[0].first)
        self.first_id, self.num_logits = self._stage.first_id, self._stage.num_logits

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""
        return self._stage.dtype

    def projection(self, boundary: int) -> Projection:
        """Return the output projection of an exit of the model, which may be on another stage."""
        return self._stage.projection(self._config, self._tensors, boundary)

    def early_logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's logits [r, v / n] of the final exit for the residual stream [r, h].

        Args:
            hidden: Rows at any boundary. The last stage alone has the final exit.
        """
        return self._stage.early_logits(hidden, has_norm=True)

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, on_layer: Callable[[int, Tensor], None] | None = None
    ) -> Iterator[ExitInput]:
        """Yield the rows at each exit of this rank's stage, in order of depth.

        Exhaust the iterator: the next stage gets its rows at the end.

        Args:
            tokens: Token ids [t].
            on_layer: Called after each layer with its number and the residual stream [t, h].
        """
        stage = self._stage
        batch = self._table.batch([Run(0, 0, len(tokens), 0)], None, stage.cache_dtype)
        if self._has_previous:
            assert self._ranks is not None
            _, x = self._ranks.receive_previous(stage.hidden_size, stage.dtype)
        else:
            x = stage.embed(tokens.to(stage.device), batch.positions)
        for index, layer_range in enumerate(stage.layer_ranges):
            rows = stage.run(index, x, batch, on_layer)
            x = rows.x
            if layer_range.has_exit:
                yield ExitInput(layer_range.last, rows, batch, stage, index)
        if self._has_next:
            assert self._ranks is not None
            self._ranks.send_next(b"", x)
