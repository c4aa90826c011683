"""Class-aware initialization: an exit's output weight from what the exit sees before each token.

Legend of shapes: t tokens of a window, h hidden, v vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.architecture.tensors import Converted, tensor_shapes
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.surgery.exits import added
from ee_llm.checkpoint.surgery.rewrite import with_options
from ee_llm.config import Config
from ee_llm.data.indexed import IndexedTokens
from ee_llm.errors import DataError
from ee_llm.inference.execution.attention import BlockTable, Run
from ee_llm.inference.execution.stage import ModelStage, make_shard, partition_layers


@dataclass(frozen=True)
class ClassMeans:
    """Output weights [v, h] by boundary, and how many tokens of the vocabulary they were seen of.

    num_seen: of the vocabulary's tokens, those that the data have as a target. num_tokens: targets.
    """

    weights: dict[int, Tensor]  # float64; empty on ranks that do not lead
    num_seen: int
    num_tokens: int


class Windows:
    """Prepared data as windows of up to `seq_length` + 1 tokens, each predicted once, in order."""

    def __init__(self, prefixes: Sequence[str], seq_length: int, num_tokens: int | None) -> None:
        """Open the data; `num_tokens` is the most to predict. Raises DataError, naming a file."""
        self._data = [IndexedTokens(prefix) for prefix in prefixes]
        self._seq_length = seq_length
        whole = sum(max(0, data.num_tokens - 1) for data in self._data)
        self.num_tokens = whole if num_tokens is None else min(num_tokens, whole)
        if self.num_tokens < 1:
            raise DataError(
                f"--data {' '.join(prefixes)} with --num-tokens {num_tokens}: there is nothing to "
                "predict; give data of at least 2 tokens, and a number of 1 or more"
            )

    def __iter__(self) -> Iterator[Tensor]:
        """Yield token ids, int64 [t + 1]."""
        left = self.num_tokens
        for data in self._data:
            for start in range(0, data.num_tokens - 1, self._seq_length):
                num = min(self._seq_length, data.num_tokens - 1 - start, left)
                if num == 0:
                    return
                left -= num
                yield torch.from_numpy(data.tokens[start : start + num + 1].astype("int64"))


def class_means(
    reader: TensorReader,
    config: Config,
    boundaries: Sequence[int],
    windows: Windows,
    eos_token_id: int,
    ranks: distributed.InferenceGrid | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> ClassMeans:
    """Return the output weights of the exits at `boundaries`, which `config` has besides others.

    Row c is the mean, over all positions whose next token is c, of what the exit's output weight is
    to project there (its head begins as a copy of the model's), normalized to length 1 (Gormez and
    Koyuncu 2024, without its bias of class probabilities: our outputs have none). A row of a token
    that the data never have as a target is the final exit's, brought to the mean length of the
    rows that were seen: unknown tokens stay where the model has them, neither favoured nor barred.

    Sums are float64 on the CPU, in the order of the data: the same on every run. ranks: tensor
    parallel ranks that run the model together; all call this, and the leader has the sums. Raises
    ValueError, on all of them, for tokens that the model does not have.
    """
    stage = _Exits(reader, config, boundaries, ranks)
    model = config.model
    summed = boundaries if ranks is None or ranks.is_leader else ()
    size = model.vocab_size, model.hidden_size
    sums = {boundary: torch.zeros(size, dtype=torch.float64) for boundary in summed}
    counts = torch.zeros(model.vocab_size, dtype=torch.float64)
    for window in windows:
        _check_tokens(window, model.vocab_size)
        targets = window[1:]
        known = torch.ones(len(targets), dtype=torch.bool)
        if config.data.mask_after_eos:
            known = window[:-1] != eos_token_id
        counts.index_add_(0, targets[known], torch.ones(int(known.sum())).double())
        for boundary, features in stage.features(window[:-1]):
            if boundary in sums:
                states = F.normalize(features.cpu().double(), dim=-1)
                sums[boundary].index_add_(0, targets[known], states[known])
        if on_tokens is not None:
            on_tokens(len(targets))
    is_seen = counts > 0
    if not is_seen.any():
        raise DataError("--data has no token that is to be predicted: all follow an end of text")
    if sums:
        final = reader.tensor(output_weight_name(config, model.num_layers)).double()
    for means in sums.values():
        means.div_(counts.clamp(min=1)[:, None])
        length = means[is_seen].norm(dim=-1).mean()
        means[~is_seen] = F.normalize(final[~is_seen], dim=-1) * length
    return ClassMeans(sums, int(is_seen.sum()), int(counts.sum()))


class _Exits:
    """The model up to the deepest of some exits, which the checkpoint lacks."""

    def __init__(
        self,
        reader: TensorReader,
        config: Config,
        boundaries: Sequence[int],
        ranks: distributed.InferenceGrid | None,
    ) -> None:
        # The final exit's output weight stands in for theirs, which is not there yet.
        count = {"weights": (), "initial_weights": (), "temperatures": ()}
        exits = {"boundaries": tuple(sorted(boundaries)), "output": "shared", **count}
        config = with_options(config, exits=exits)
        pieces = [p for p in partition_layers(config)[0] if p.last <= max(boundaries)]
        dtype = reader.dtype("embedding.word.weight")
        dtype = dtype if dtype == torch.float64 else torch.float32
        tensors = Converted(_WithCopies(reader, config), dtype, distributed.device())
        length = config.model.max_seq_length
        self._stage = ModelStage(config, tensors, length, pieces, make_shard(config, ranks))
        self._pages = BlockTable(1, 1, length, self._stage.device)

    @torch.no_grad()
    def features(self, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the boundary and what the output weight projects [t, h], of each exit."""
        stage, run = self._stage, Run(0, 0, len(tokens), 0)
        batch = self._pages.batch([run], None, stage.cache_dtype)
        x = stage.embed(tokens.to(stage.device), batch.positions)
        for index, piece in enumerate(stage.pieces):
            x, attended = stage.run(index, x, batch)
            yield piece.last, stage.features(index, x, attended, batch)


class _WithCopies(Mapping[str, Tensor]):
    """A checkpoint's tensors, and those of exits it lacks, copied from the model."""

    def __init__(self, reader: TensorReader, config: Config) -> None:
        self._names = list(tensor_shapes(config))
        self._get = added(reader, config, "copy").get

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_tokens(window: Tensor, vocab_size: int) -> None:
    if int(window.min()) < 0 or int(window.max()) >= vocab_size:
        raise DataError(
            f"--data has token ids {int(window.min())} to {int(window.max())}, and the model "
            f"{vocab_size} tokens; were they prepared with the checkpoint's tokenizer?"
        )
