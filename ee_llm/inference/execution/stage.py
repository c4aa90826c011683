"""The part of a model that one rank runs: layer ranges and the heads of their exits.

A layer range is a segment or, where a pipeline stage ends within a segment, a part of one.

Legend of shapes: t rows, r rows with logits, h hidden, v vocabulary, n tensor-parallel ranks, c
positions in the cache, k key/value heads of this rank, d head dimension.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.architecture.partition import even_split
from ee_llm.architecture.tensor_parallel import DIVIDED_SIZES
from ee_llm.config import Config
from ee_llm.errors import RequestError
from ee_llm.inference.choices import HiddenMeasure
from ee_llm.inference.execution.attention import Batch, Run
from ee_llm.inference.execution.head import Head, HiddenRows, Projection
from ee_llm.inference.execution.layers import Layer, MakeLinear, Shard, rotations
from ee_llm.inference.execution.linear import Linear
from ee_llm.inference.execution.quantization import Int8Linear
from ee_llm.inference.scheduling.output import HiddenQuery


class LayerRange(NamedTuple):
    """Layers first .. last (numbered from 1), and whether an exit follows the last one."""

    first: int
    last: int
    has_exit: bool


def partition_layers(config: Config, num_stages: int = 1) -> list[list[LayerRange]]:
    """Return the layer ranges of each pipeline stage, split at the exits.

    Raises RequestError if there are more stages than layers.
    """
    num_layers = config.model.num_layers
    if num_stages > num_layers:
        raise RequestError(
            f"pipeline = {num_stages} is more than num_layers = {num_layers}. Use {num_layers}"
            " or less."
        )
    exits = (*config.exits.boundaries, num_layers)
    ends = accumulate(even_split(num_layers, num_stages))
    stages: list[list[LayerRange]] = []
    first = 1
    for end in ends:
        edges = sorted({*(b for b in exits if first <= b <= end), end})
        starts = [first, *(edge + 1 for edge in edges[:-1])]
        stages.append([LayerRange(a, b, b in exits) for a, b in zip(starts, edges, strict=True)])
        first = end + 1
    return stages


def check_layout(config: Config, tensor: int, pipeline: int) -> None:
    """Raise RequestError unless the model can be split over these tensor ranks and stages."""
    partition_layers(config, pipeline)
    sizes = {name: getattr(config.model, name) for name in DIVIDED_SIZES}
    for name, size in sizes.items():
        if size % tensor:
            common = math.gcd(*sizes.values())
            divisors = [n for n in range(1, common + 1) if common % n == 0]
            choices = " or ".join(map(str, divisors))
            raise RequestError(
                f"tensor = {tensor} does not divide {name} = {size}. Use tensor = {choices}."
            )


def make_shard(
    config: Config, ranks: distributed.InferenceGrid | None, linear: MakeLinear = Linear
) -> Shard:
    """Return this rank's share of a model; raises RequestError as `check_layout` does."""
    if ranks is None or ranks.tensor_size == 1:
        return Shard(linear=linear)
    check_layout(config, ranks.tensor_size, ranks.num_stages)
    return Shard(ranks.tensor_rank, ranks.tensor_size, ranks.reduce, linear)


class ModelStage:
    """Layer ranges of a model, with a cache for the keys and values of their layers."""

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        num_positions: int,
        layer_ranges: Sequence[LayerRange],
        shard: Shard | None = None,
    ) -> None:
        """Build the layers and allocate the cache.

        Args:
            config: The model's configuration.
            tensors: The weights, all of one dtype and device; only those of the layer ranges are
                read.
            num_positions: Number of positions in the cache.
            layer_ranges: The layer ranges.
            shard: This rank's tensor-parallel share.

        Raises:
            RequestError: There is no memory for the cache.
        """
        shard = shard or Shard()
        model = config.model
        self.layer_ranges = tuple(layer_ranges)
        weight = tensors[f"layers.{layer_ranges[0].first}.input_layernorm.weight"]
        self.dtype, self.device = weight.dtype, weight.device
        self.hidden_size, self._num_layers = model.hidden_size, model.num_layers
        self.num_ranks = shard.size  # ranks that share each layer
        self.num_logits = model.vocab_size // shard.size  # of this rank, for ids from first_id on
        self.first_id = shard.rank * self.num_logits
        self._rotations = rotations(model, self.dtype, self.device)
        if layer_ranges[0].first == 1:
            self._word_embedding = tensors["embedding.word.weight"]
            self._position_embedding = tensors.get("embedding.position.weight")
        self._layers = [
            [
                Layer(model, tensors, f"layers.{n}", shard)
                for n in range(layer_range.first, layer_range.last + 1)
            ]
            for layer_range in layer_ranges
        ]
        self._shard = shard
        self._outputs: dict[str, Linear | Int8Linear] = {}
        self._heads: list[Head | None] = []
        for layer_range in layer_ranges:
            self._heads.append(None)
            if layer_range.has_exit:
                projection = self.projection(config, tensors, layer_range.last)
                self._heads[-1] = Head(config, tensors, layer_range.last, projection, shard)
        self.cache_dtype = cache_dtype(self.dtype, self.device)
        shape = (num_positions, 2, model.num_kv_heads // shard.size, model.head_dim)
        num_pages = [len(layers) + self.has_block(n) for n, layers in enumerate(self._layers)]
        try:
            self._pages = [
                [
                    torch.zeros(shape, dtype=self.cache_dtype, device=self.device)
                    for _ in range(count)
                ]
                for count in num_pages
            ]
        except (RuntimeError, MemoryError) as error:
            size = math.prod(shape) * self.cache_dtype.itemsize * sum(num_pages)
            raise RequestError(
                f"no memory for the keys and values of {num_positions} positions on {self.device}:"
                f" they take {size / 2**30:,.1f} GiB. Use a smaller cache_tokens or max_num_seqs,"
                " or a smaller model."
            ) from error

    def projection(
        self, config: Config, tensors: Mapping[str, Tensor], boundary: int
    ) -> Projection:
        """Return the output projection of an exit of the model, which may be on another stage.

        Its weight is loaded unless an exit with the same weight is on this stage.
        """
        name, shard = output_weight_name(config, boundary), self._shard
        if name not in self._outputs:
            self._outputs[name] = shard.linear(shard.parameter(config.model, tensors, name))
        exits = config.exits
        temperatures = dict(zip(exits.boundaries, exits.temperatures, strict=True))
        return Projection(self._outputs[name], temperatures.get(boundary, 1.0))

    def clear(self) -> None:
        """Zero all keys and values."""
        for pages in chain.from_iterable(self._pages):
            pages.zero_()

    def zero(self, start: int, stop: int) -> None:
        """Zero the keys and values at positions start .. stop - 1 of the cache."""
        for pages in chain.from_iterable(self._pages):
            pages[start:stop].zero_()

    def compile(self) -> None:
        """Run all layers, including those of exits, through torch.compile."""
        blocks = [head.block for head in self._heads if head is not None and head.block is not None]
        for layer in (*blocks, *(layer for layers in self._layers for layer in layers)):
            layer.compile()

    def is_final(self, index: int) -> bool:
        """Return whether a layer range ends at the final exit."""
        return self.layer_ranges[index].last == self._num_layers

    def has_block(self, index: int) -> bool:
        """Return whether the exit of a layer range has a block, with keys and values of its own."""
        head = self._heads[index]
        return head is not None and head.block is not None

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the input [t, h] of layer 1 for token ids [t] at positions [t]."""
        x = self._word_embedding[tokens]
        if self._position_embedding is None:
            return x
        return x + self._position_embedding[positions]

    def run(
        self,
        index: int,
        x: Tensor,
        batch: Batch,
        on_layer: Callable[[int, Tensor], None] | None = None,
    ) -> HiddenRows:
        """Return rows [t, h] at the end of a layer range.

        Rows that are not live keep their state, but their keys and values are written too.

        Args:
            index: Index of the layer range.
            x: Rows [t, h].
            batch: Metadata of the rows.
            on_layer: Called after each layer with its number and the rows [t, h].
        """
        rotation = None if self._rotations is None else self._rotations[batch.positions]
        before = attended = x
        number = self.layer_ranges[index].first - 1
        for layer, pages in zip(self._layers[index], self._pages[index], strict=False):
            before = x
            after, attended = layer(x, pages, batch, rotation)
            x = after if batch.live is None else x.index_copy(0, batch.live, after)
            if on_layer is not None:
                number += 1
                on_layer(number, x)
        if batch.live is not None:
            attended = x.index_copy(0, batch.live, attended)
        return HiddenRows(x, attended, before)

    def run_block(self, index: int, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the live rows after the block of an exit, and before its MLP.

        The keys and values of all rows x [t, h] are written.
        """
        head = self._heads[index]
        assert head is not None, f"layer range {index} has no exit"
        assert head.block is not None, f"the exit of layer range {index} has no block"
        rotation = None if self._rotations is None else self._rotations[batch.positions]
        return head.block(x, self._pages[index][-1], batch, rotation)

    def features(
        self, index: int, hidden: HiddenRows, batch: Batch, *, of_trunk: bool = False
    ) -> Tensor:
        """Return the input [t, h] of the output projection of an exit, for all rows.

        Args:
            index: Index of the layer range.
            hidden: Rows as `run` returned them.
            batch: Metadata of the rows, all of which are live.
            of_trunk: Return the input [t, h] of the exit's translator instead.
        """
        head = self._heads[index]
        assert head is not None, f"layer range {index} has no exit"
        x, attended, _ = hidden
        if head.block is not None:
            x, attended = self.run_block(index, x, batch)
        return head.trunk(x, attended) if of_trunk else head.features(x, attended)

    def evaluate_exit(
        self,
        index: int,
        hidden: HiddenRows,
        rows: Sequence[Run],
        queries: Sequence[HiddenQuery],
        make_batch: Callable[[Sequence[Run]], Batch],
        gather: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, dict[int, float]]:
        """Return logits of the rows that need them, and the confidences that are known before.

        All tensor-parallel ranks call this together. They use the confidences of the first one, so
        that they compute logits of the same rows whatever rounding does.

        Args:
            index: Index of the layer range.
            hidden: Rows as `run` returned them.
            rows: The rows that the exit decides about. With queries, each has one row.
            queries: Those of the rows that need logits only if they are confident.
            make_batch: Makes the batch of the pass of which only the given rows are live, for an
                exit with a block, which writes the keys and values of all rows.
            gather: Concatenates the parts [q, 1] of all ranks to [q, n].

        Returns:
            This rank's logits [r, v / n] in the order of the rows, and the confidences of the
            queries by number of the row. A row below the threshold of its query has no logits.
        """
        confidences: dict[int, float] = {}
        if queries:
            queried = [rows[query.row] for query in queries]
            values = gather(self._confidences(index, hidden, queried, queries, make_batch))
            numbers = (query.row for query in queries)
            confidences = dict(zip(numbers, values[:, 0].tolist(), strict=True))
        # NaN declines, and the final exit reports it.
        declined = {q.row for q in queries if not confidences[q.row] >= q.threshold}
        live = [run for number, run in enumerate(rows) if number not in declined]
        batch = make_batch(live) if self.has_block(index) else None
        return self.logits(index, hidden, live, batch), confidences

    def _confidences(
        self,
        index: int,
        hidden: HiddenRows,
        rows: Sequence[Run],
        queries: Sequence[HiddenQuery],
        make_batch: Callable[[Sequence[Run]], Batch],
    ) -> Tensor:
        """Return the confidence [q, 1] of the row of each query, float64."""
        head = self._heads[index]
        assert head is not None, f"layer range {index} has no exit"
        selected = hidden.select(self._numbers(rows))
        head_input = selected.x, selected.attended
        if head.block is not None and any(query.measure == "shortlist" for query in queries):
            head_input = self.run_block(index, hidden.x, make_batch(rows))
        return head.confidences(selected, head_input, queries, self.first_id)[:, None]

    def gate(self, boundary: int, x: Tensor) -> Tensor:
        """Return the confidence [r] of the gate of an exit for rows x [r, h] at its boundary."""
        index = [layer_range.last for layer_range in self.layer_ranges].index(boundary)
        return self.hidden_confidences(index, HiddenRows(x, x, x), "gate")

    def hidden_confidences(self, index: int, hidden: HiddenRows, measure: HiddenMeasure) -> Tensor:
        """Return the confidence [t] of an exit for all rows, float64."""
        head = self._heads[index]
        assert head is not None, f"layer range {index} has no exit"
        return head.hidden_confidences(hidden, measure).double()

    def logits(
        self, index: int, hidden: HiddenRows, rows: Sequence[Run], batch: Batch | None
    ) -> Tensor:
        """Return this rank's logits [r, v / n] of the given rows at the exit of a layer range.

        Args:
            index: Index of the layer range.
            hidden: Rows as `run` returned them.
            rows: The rows to return the logits of.
            batch: Metadata of all rows, of which `rows` are live, for an exit with a block; the
                block writes the keys and values of all of them. None for other exits.
        """
        head = self._heads[index]
        assert head is not None, f"layer range {index} has no exit"
        x, attended, _ = hidden
        numbers = self._numbers(rows)
        if batch is not None:
            x, attended = self.run_block(index, x, batch)
        elif numbers.tolist() != list(range(len(x))):
            x, attended = x[numbers], attended[numbers]
        if not len(numbers):
            return x.new_empty(0, self.num_logits)
        return head(x, attended)

    def _numbers(self, rows: Sequence[Run]) -> Tensor:
        """Return the numbers [r] of rows within a pass."""
        numbers = [row for run in rows for row in range(run.first, run.first + run.num_rows)]
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def early_logits(self, x: Tensor, has_norm: bool) -> Tensor:
        """Return this rank's logits [r, v / n] that the final exit's head gives early rows [r, h].

        Args:
            x: Rows at any boundaries.
            has_norm: Apply the final norm before the output weight.
        """
        final = self._heads[-1]
        assert final is not None, "this stage does not have the final exit"
        return final.early(x, has_norm)


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the K/V cache for a model that computes in `dtype`.

    On a CPU, a bfloat16 model gets a float32 cache: the attention of single rows is many times
    slower with bfloat16 operands, and the cache is small compared with the weights.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype
