"""Loss and every gradient must not depend on the schedule."""

import pytest
import torch

from tests.distributed.test_parallel_parity import VARIANTS, compare, layout_name

INTERLEAVED = {"parallel.virtual": 2}
ZERO_BUBBLE = {"parallel.schedule": "zero-bubble"}
ZERO_BUBBLE_EXITS = {"parallel.schedule": "zero-bubble-exits"}


@pytest.mark.parametrize(
    "layout", [(1, 2, 1, False), (2, 2, 1, True), (1, 2, 2, False)], ids=layout_name
)
@pytest.mark.parametrize(
    "schedule",
    [INTERLEAVED, ZERO_BUBBLE, ZERO_BUBBLE_EXITS],
    ids=["interleaved", "zb-h1", "zb-h1 of exits too"],
)
@pytest.mark.parametrize("variant", VARIANTS, scope="module")
def test_gradients_equal_the_single_process(variant, schedule, layout):
    micro_batch_size = 1 if layout[2] == 1 else 2
    compare(VARIANTS[variant], layout, micro_batch_size, torch.float64, 1e-9, schedule)


EIGHT_LAYERS = {
    "model.num_layers": 8,
    "exits.boundaries": (1, 2, 4, 6),
    "exits.weights": (0.1, 0.2, 0.3, 0.4),
    "exits.output": "tied",
    "model.tie_embeddings": True,
}


@pytest.mark.parametrize(
    ("pipeline", "schedule"),
    [
        (4, INTERLEAVED),
        (2, {"parallel.virtual": 4}),
        (4, ZERO_BUBBLE),
        (4, ZERO_BUBBLE_EXITS),
        (2, {"parallel.virtual": 2, "parallel.layer_split": (3, 1, 2, 2)}),
    ],
    ids=[
        "4 ranks interleaved",
        "4 stages per rank",
        "4 ranks zb-h1",
        "of exits too",
        "uneven, two exits a chunk",
    ],
)
def test_more_stages_with_a_weight_on_all_of_them(pipeline, schedule):
    """A rank with several copies of a tied weight sums their gradients before the reduction."""
    compare(EIGHT_LAYERS, (1, pipeline, 1, False), 1, torch.float64, 1e-9, schedule)


@pytest.mark.parametrize("schedule", [INTERLEAVED, ZERO_BUBBLE], ids=["interleaved", "zb-h1"])
def test_float32_gradients_equal_the_single_process(schedule):
    compare({"exits.output": "tied"}, (1, 2, 1, False), 1, torch.float32, 1e-5, schedule)
