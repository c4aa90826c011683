"""Class-aware initialization: set an exit's output weight from what it sees before each token.

Legend of shapes: t tokens of a window, h hidden, v vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.data.windows import Windows, check_counted, check_window, counted_positions
from ee_llm.inference.execution.teacher_forced import TeacherForced
from ee_llm.inference.exits.new_exits import (
    check_finite,
    tensors_with_new_exits,
    with_new_exits,
)


@dataclass(frozen=True)
class ClassMeans:
    """Output weights of new exits.

    Attributes:
        weights: Output weight [v, h] by boundary, float64; empty on ranks that do not lead.
        num_seen: Number of vocabulary entries that occur as a target in the data.
        num_tokens: Number of targets.
    """

    weights: dict[int, Tensor]
    num_seen: int
    num_tokens: int


def class_means(
    reader: TensorReader,
    config: Config,
    boundaries: Sequence[int],
    windows: Windows,
    eos_token_id: int,
    ranks: distributed.InferenceGrid | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> ClassMeans:
    """Return the output weights of the exits at `boundaries`.

    Row c is the mean, over all positions whose next token is c, of the vector that the exit's
    output weight will project there (the head starts as a copy of the model's), normalized to
    length 1 (Gormez and Koyuncu 2024, without its bias of class probabilities, since our outputs
    have no bias). The row of a token that never occurs as a target is the final exit's row, scaled
    to the mean length of the other rows: unseen tokens keep the direction that the model gives
    them, and are neither favoured nor suppressed.

    Sums are float64 on the CPU, in the order of the data, so every run gives the same result.

    Args:
        reader: The checkpoint.
        config: Configuration of the model with the new exits among its exits.
        boundaries: Boundaries of the new exits.
        windows: The data.
        eos_token_id: Id of the end token; with data.mask_after_eos, its successors are no targets.
        ranks: Tensor-parallel ranks that run the model together. All of them call this function;
            the leader gets the sums.
        on_tokens: Called with the number of tokens of each window.

    Raises:
        DataError: The data has a token id outside the vocabulary, on all ranks, or no target.
        RunError: The hidden states of an exit are not finite.
    """
    with_exits = with_new_exits(config, boundaries)
    tensors = tensors_with_new_exits(reader, with_exits)
    run = TeacherForced(
        with_exits, tensors, config.model.max_seq_length, ranks, last=max(boundaries)
    )
    model = config.model
    masked_after = eos_token_id if config.data.mask_after_eos else None
    summed = boundaries if ranks is None or ranks.is_leader else ()
    size = model.vocab_size, model.hidden_size
    sums = {boundary: torch.zeros(size, dtype=torch.float64) for boundary in summed}
    counts = torch.zeros(model.vocab_size, dtype=torch.int64)
    for window in windows:
        check_window(window, model.vocab_size)
        targets = window[1:]
        is_counted = counted_positions(window, masked_after)
        counts += targets[is_counted].bincount(minlength=model.vocab_size)
        for exit in run(window[:-1]):
            features = exit.features()
            if exit.boundary in sums:
                states = F.normalize(features.cpu().double(), dim=-1)
                sums[exit.boundary].index_add_(0, targets[is_counted], states[is_counted])
        if on_tokens is not None:
            on_tokens(len(targets))
    is_seen = counts > 0
    check_counted(int(is_seen.sum()))
    if sums:
        final = reader.tensor(output_weight_name(config, model.num_layers)).double()
    for boundary, means in sums.items():
        check_finite(boundary, run.dtype, means)
        means.div_(counts.clamp(min=1)[:, None])
        length = means[is_seen].norm(dim=-1).mean()
        means[~is_seen] = F.normalize(final[~is_seen], dim=-1) * length
    return ClassMeans(sums, int(is_seen.sum()), int(counts.sum()))
