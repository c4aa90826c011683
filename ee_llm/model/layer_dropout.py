"""Layer dropout: in training, samples skip layers at random (LayerSkip, arXiv 2404.16710).

Which samples skip a layer is a function of (seed, step, sample, layer) alone. All ranks therefore
agree without communication, and the parallel layout, the microbatch size and a restart change
nothing.

Shapes: s sequence, b microbatch, k kept samples, h hidden, d head dimension.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import torch

from ee_llm import distributed
from ee_llm.config import Config

KeptRows = Mapping[int, torch.Tensor]
"""By layer number, the rows [k] of a microbatch that run the layer; all rows if it is missing."""

LayerOutput = tuple[torch.Tensor, torch.Tensor | None]


def drop_probabilities(config: Config, step: int) -> list[float]:
    """Return the probabilities with which a sample skips each layer in `step` (from 0).

    p(l, t) = S(t) D(l) p_max with D(l) = exp(l ln 2 / (L-1)) - 1 for l = 0..L-1. S(t) is 1 with the
    constant schedule and exp(t ln 2 / (T-1)) - 1 for t = 0..T-1 with the exponential one
    (LayerSkip, section 4.1.1).
    """
    options, num_layers = config.layer_dropout, config.model.num_layers
    if options.max_probability == 0:
        return [0.0] * num_layers
    maximum = options.max_probability
    if options.schedule == "exponential":
        maximum *= _growth(step, config.training.steps)
    return [maximum * _growth(layer, num_layers) for layer in range(num_layers)]


def _growth(index: int, count: int) -> float:
    # expm1 and min give exactly 0 at the first index and never exceed 1 at the last.
    return min(1.0, math.expm1(index * math.log(2) / (count - 1)))


def dropped_layers(seed: int, step: int, sample: int, probabilities: Sequence[float]) -> list[bool]:
    """Return whether a sample skips each layer.

    Layer l is skipped if the l-th number of a Philox generator with key (seed, step) and a counter
    that starts at the sample is below the layer's probability. numpy guarantees that these numbers
    never change, unlike those of its distributions.

    Args:
        seed: The seed of the run.
        step: The step, from 0.
        sample: Position of the sample in the step's global batch.
        probabilities: The probability of each layer.
    """
    generator = np.random.Philox(
        key=np.array([seed, step], np.uint64), counter=np.array([0, sample, 0, 0], np.uint64)
    )
    uniform = (generator.random_raw(len(probabilities)) >> np.uint64(11)) * 2.0**-53
    return (uniform < np.asarray(probabilities)).tolist()


def kept_rows(
    config: Config, step: int, samples: Sequence[Sequence[int]], layers: Collection[int]
) -> list[KeptRows]:
    """Return the rows that run each layer, for every microbatch of a step.

    Args:
        config: The configuration.
        step: The step, from 0.
        samples: For every microbatch, the positions of its rows in the global batch.
        layers: Numbers (from 1) of the layers on this rank.
    """
    probabilities = drop_probabilities(config, step)
    if not any(probabilities):
        return [{} for _ in samples]
    places: list[tuple[int, int]] = []
    indices: list[list[int]] = []
    for microbatch, rows in enumerate(samples):
        dropped = [dropped_layers(config.training.seed, step, s, probabilities) for s in rows]
        for number in layers:
            kept = [row for row, layers_ in enumerate(dropped) if not layers_[number - 1]]
            if len(kept) < len(dropped):
                places.append((microbatch, number))
                indices.append(kept)
    result: list[dict[int, torch.Tensor]] = [{} for _ in samples]
    for (microbatch, number), tensor in zip(places, _on_device(indices), strict=True):
        result[microbatch][number] = tensor
    return list(result)


def _on_device(indices: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """Yield the indices as tensors, moved to the device in one copy."""
    flat = torch.tensor([index for part in indices for index in part], dtype=torch.int64)
    yield from flat.to(distributed.device()).split([len(part) for part in indices])


def run_on_rows(
    layer: Callable[[torch.Tensor, torch.Tensor | None], LayerOutput],
    hidden: torch.Tensor,
    rotary: torch.Tensor | None,
    rows: torch.Tensor,
    *,
    taps_attention: bool,
) -> LayerOutput:
    """Run a layer on some samples and pass the others on unchanged.

    Nothing runs if there are no rows: the layer's parameters then get no gradient.

    Args:
        layer: Returns the layer's output and the residual stream after attention, if it is tapped.
        hidden: The residual stream [s, b, h].
        rotary: Angles [s, b or 1, 1, d], if any.
        rows: The samples that run the layer [k].
        taps_attention: Whether the residual stream after attention is needed.

    Returns:
        Both outputs for all samples. For a skipped sample, both equal `hidden`.
    """
    if len(rows) == 0:
        return hidden, hidden if taps_attention else None
    if rotary is not None and rotary.shape[1] > 1:
        rotary = rotary.index_select(1, rows)
    output, attended = layer(hidden.index_select(1, rows), rotary)
    merged = hidden.index_copy(1, rows, output)
    return merged, None if attended is None else hidden.index_copy(1, rows, attended)
