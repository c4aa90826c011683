"""The dtype that "auto" selects, and that the measurement has no side effects."""

import pytest
import torch

from ee_llm import distributed
from ee_llm.config import load_config
from ee_llm.training import precision
from ee_llm.training.precision import choose_dtype
from tests.distributed.harness import run_ranks

SIZES = {
    "model.num_layers": 2,
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.vocab_size": 32,
    "model.max_seq_length": 8,
}


def make_config(dtype):
    return load_config(None, SIZES | {"training.dtype": dtype})


def _choose(dtype, seconds):
    distributed.initialize(seed=3)
    if seconds is not None:
        precision._seconds = lambda dtype, *sizes: seconds[str(dtype).removeprefix("torch.")]
    before = torch.get_rng_state()
    chosen = choose_dtype(make_config(dtype))
    return chosen, torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_named_dtype_is_used(dtype):
    assert run_ranks(1, _choose, dtype, None) == [(dtype, True)]


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_auto_selects_the_faster_dtype(faster):
    seconds = {"float32": 2.0, "bfloat16": 2.0, faster: 1.0}
    assert run_ranks(1, _choose, "auto", seconds) == [(faster, True)]


def test_measurement_does_not_advance_the_random_generator():
    """Only rank 0 measures; random numbers would make its dropout differ from that of its peers."""
    results = run_ranks(2, _choose, "auto", None)
    assert len({chosen for chosen, _ in results}) == 1
    assert results[0][1]
