"""The part of a model that one rank runs: pieces of it, and the heads of the exits in between.

A piece is a segment or, where a pipeline stage ends within one, a part of it.

Legend of shapes: t rows, r rows that an exit judges, h hidden, v vocabulary, c positions in the
cache, k key/value heads of this rank, d head dimension.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.architecture.tensor_parallel import DIVIDED_SIZES
from ee_llm.config import Config
from ee_llm.errors import RequestError
from ee_llm.inference.execution.attention import Batch, Run
from ee_llm.inference.execution.layers import Layer, MakeLinear, Mlp, Norm, Shard, rotations
from ee_llm.inference.execution.linear import Linear
from ee_llm.inference.execution.quantization import Int8Linear


class LayerRange(NamedTuple):
    """Layers first .. last (numbered from 1), and whether an exit follows the last."""

    first: int
    last: int
    has_exit: bool


def partition_layers(config: Config, num_stages: int = 1) -> list[list[LayerRange]]:
    """Return the pieces of each pipeline stage; stages have equally many layers as far as possible.

    Raises RequestError if there are more stages than layers.
    """
    num_layers = config.model.num_layers
    if num_stages > num_layers:
        raise RequestError(
            f"--pipeline {num_stages} is more than num_layers = {num_layers}. Use --pipeline"
            f" {num_layers} or less."
        )
    exits = (*config.exits.boundaries, num_layers)
    ends = [num_layers * (stage + 1) // num_stages for stage in range(num_stages)]
    stages: list[list[LayerRange]] = []
    first = 1
    for end in ends:
        edges = sorted({*(b for b in exits if first <= b <= end), end})
        starts = [first, *(edge + 1 for edge in edges[:-1])]
        pieces = [LayerRange(a, b, b in exits) for a, b in zip(starts, edges, strict=True)]
        stages.append(pieces)
        first = end + 1
    return stages


def check_layout(config: Config, tensor: int, pipeline: int) -> None:
    """Raise RequestError unless the model can be split over so many tensor ranks and stages."""
    partition_layers(config, pipeline)
    sizes = {name: getattr(config.model, name) for name in DIVIDED_SIZES}
    for name, size in sizes.items():
        if size % tensor:
            common = math.gcd(*sizes.values())
            fit = [n for n in range(1, common + 1) if common % n == 0]
            choices = " or ".join(f"--tensor {n}" for n in fit)
            raise RequestError(f"--tensor {tensor} does not divide {name} = {size}. Use {choices}.")


def make_shard(
    config: Config, ranks: distributed.InferenceGrid | None, linear: MakeLinear = Linear
) -> Shard:
    """Return this rank's share of a model; raises RequestError as `check_layout` does."""
    if ranks is None or ranks.tensor_size == 1:
        return Shard(linear=linear)
    check_layout(config, ranks.tensor_size, ranks.num_stages)
    return Shard(ranks.tensor_rank, ranks.tensor_size, ranks.reduce, linear)


class Head:
    """An exit: [block] -> [mlp] -> [norm] -> output projection; the final one has a norm alone."""

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        boundary: int,
        output: Linear | Int8Linear,
        shard: Shard,
    ) -> None:
        model, exits = config.model, config.exits
        is_final = boundary == model.num_layers
        parts = ("norm",) if is_final else exits.head
        name = f"exits.{boundary}"
        self.block = Layer(model, tensors, f"{name}.block", shard) if "block" in parts else None
        self._mlp = None
        if "mlp" in parts:
            self._mlp = Mlp(model, tensors, f"{name}.mlp", f"{name}.mlp_norm", shard)
        self._norm = Norm(model, tensors, f"{name}.norm") if "norm" in parts else None
        self._output = output
        temperatures = dict(zip(exits.boundaries, exits.temperatures, strict=True))
        self._temperature = temperatures.get(boundary, 1.0)

    def __call__(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return this rank's logits [r, v / t] of x [r, h], the block's outcome where there is one.

        attended [r, h]: the same rows before the layer's (or block's) own MLP, which an `mlp`
        stands in for if there is no block (EE-Tuning, arXiv 2402.00518).
        """
        logits = self._output(self.features(x, attended))
        return logits if self._temperature == 1.0 else logits / self._temperature

    def features(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return what the output weight projects [r, h], of the same rows."""
        if self._mlp is not None:
            start = attended if self.block is None else x
            x = start + self._mlp(start)
        return x if self._norm is None else self._norm(x)


class ModelStage:
    """Pieces of a model, with a cache for the keys and values of their layers."""

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        num_positions: int,
        pieces: Sequence[LayerRange],
        shard: Shard | None = None,
    ) -> None:
        """Take the weights that the pieces need out of `tensors`, all of one dtype and device.

        num_positions: that the cache holds.
        """
        shard = shard or Shard()
        model = config.model
        self.pieces = tuple(pieces)
        some = tensors[f"layers.{pieces[0].first}.input_layernorm.weight"]
        self.dtype, self.device = some.dtype, some.device
        self.hidden_size = model.hidden_size
        self.num_ranks = shard.size  # that share each layer
        self.num_logits = model.vocab_size // shard.size  # of this rank, for ids from first_id on
        self.first_id = shard.rank * self.num_logits
        self._rotations = rotations(model, self.dtype, self.device)
        if pieces[0].first == 1:
            self._words = tensors["embedding.word.weight"]
            self._places = tensors.get("embedding.position.weight")
        self._layers = [
            [
                Layer(model, tensors, f"layers.{n}", shard)
                for n in range(piece.first, piece.last + 1)
            ]
            for piece in pieces
        ]
        outputs: dict[str, Linear | Int8Linear] = {}
        self._heads: list[Head | None] = []
        for piece in pieces:
            self._heads.append(None)
            if piece.has_exit:
                name = output_weight_name(config, piece.last)
                if name not in outputs:
                    outputs[name] = shard.linear(shard.parameter(model, tensors, name))
                self._heads[-1] = Head(config, tensors, piece.last, outputs[name], shard)
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
                f" they take {size / 2**30:,.1f} GiB. Use a smaller --cache-tokens, --batch-size or"
                " model."
            ) from error

    def clear(self) -> None:
        """Forget all keys and values."""
        for pages in (page for piece in self._pages for page in piece):
            pages.zero_()

    def zero(self, start: int, stop: int) -> None:
        """Zero the keys and values at positions start .. stop - 1 of the cache."""
        for pages in (page for piece in self._pages for page in piece):
            pages[start:stop].zero_()

    def compile(self) -> None:
        """Send all layers, those of exits too, through torch.compile."""
        blocks = [head.block for head in self._heads if head is not None and head.block is not None]
        for layer in (*blocks, *(layer for layers in self._layers for layer in layers)):
            layer.compile()

    def has_block(self, piece: int) -> bool:
        """Return whether the exit at the end of a piece has keys and values of its own."""
        head = self._heads[piece]
        return head is not None and head.block is not None

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the rows [t, h] that enter layer 1, of token ids [t] at positions [t]."""
        x = self._words[tokens]
        return x if self._places is None else x + self._places[positions]

    def run(self, piece: int, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return rows [t, h] after the piece's layers, and after the last one's attention alone.

        Rows that do not live in the batch stay what they are, but have keys and values.
        """
        rotation = None if self._rotations is None else self._rotations[batch.positions]
        attended = x
        for layer, pages in zip(self._layers[piece], self._pages[piece], strict=False):
            after, attended = layer(x, pages, batch, rotation)
            x = after if batch.live is None else x.index_copy(0, batch.live, after)
        if batch.live is not None:
            attended = x.index_copy(0, batch.live, attended)
        return x, attended

    def run_block(self, piece: int, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the rows that live in the batch after the exit's block, and after its attention.

        The keys and values of all rows x [t, h] are kept.
        """
        head = self._heads[piece]
        assert head is not None, f"piece {piece} has no exit"
        assert head.block is not None, f"the exit of piece {piece} has no block"
        rotation = None if self._rotations is None else self._rotations[batch.positions]
        return head.block(x, self._pages[piece][-1], batch, rotation)

    def features(self, piece: int, x: Tensor, attended: Tensor, batch: Batch) -> Tensor:
        """Return what the output weight of a piece's exit projects [t, h], of all rows.

        x, attended [t, h]: as `run` returned them. batch: of those rows, all of which live.
        """
        head = self._heads[piece]
        assert head is not None, f"piece {piece} has no exit"
        if head.block is not None:
            x, attended = self.run_block(piece, x, batch)
        return head.features(x, attended)

    def logits(
        self, piece: int, x: Tensor, attended: Tensor, judged: Sequence[Run], batch: Batch | None
    ) -> Tensor:
        """Return this rank's logits [r, v / t] of the rows that the exit of a piece judges.

        x, attended [t, h]: as `run` returned them. batch: of all rows, in which those judged live,
        for an exit with a block; its keys and values are kept of all.
        """
        head = self._heads[piece]
        assert head is not None, f"piece {piece} has no exit"
        rows = [row for run in judged for row in range(run.first, run.first + run.num_rows)]
        if batch is not None:
            x, attended = self.run_block(piece, x, batch)
        elif rows != list(range(len(x))):
            index = torch.tensor(rows, dtype=torch.int64, device=self.device)
            x, attended = x[index], attended[index]
        if not rows:
            return x.new_empty(0, self.num_logits)
        return head(x, attended)


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to keep keys and values in.

    On a CPU it is float32 where one computes in bfloat16: its attention is many times slower
    with bfloat16 operands for single rows, and the cache is small beside the weights.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype
