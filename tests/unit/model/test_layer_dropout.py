"""Layer dropout: its probabilities, its decisions, and that a dropped sample is not computed."""

import pytest
import torch

from ee_llm import distributed
from ee_llm.config import Config, load_config
from ee_llm.model.layer_dropout import (
    drop_probabilities,
    dropped_layers,
    kept_rows,
    run_on_rows,
)
from ee_llm.model.stage import Stage
from tests.distributed.harness import run_ranks

LAYERS, BATCH, LENGTH = 5, 3, 8


def make_config(**options: object) -> Config:
    sizes = {
        "model.num_layers": LAYERS,
        "model.hidden_size": 16,
        "model.num_heads": 4,
        "model.ffn_hidden_size": 24,
        "model.vocab_size": 32,
        "model.max_seq_length": LENGTH,
        "exits.boundaries": (2, 4),
        "layer_dropout.max_probability": 0.5,
        "training.steps": 11,
        "parallel.timeout_s": 20.0,
    }
    return load_config(None, sizes | {k.replace("__", "."): v for k, v in options.items()})


def test_probabilities_grow_exponentially_with_depth():
    """D(l) = 2^(l / (L-1)) - 1: for L = 5, 0, 2^(1/4) - 1, 2^(1/2) - 1, 2^(3/4) - 1 and 1."""
    expected = [0.0, 0.5 * 0.18920711500, 0.5 * 0.41421356237, 0.5 * 0.68179283050, 0.5]
    for step in (0, 5, 10):
        found = drop_probabilities(make_config(), step)
        assert found == pytest.approx(expected, rel=1e-9)
    assert drop_probabilities(make_config(), 0)[0] == 0


def test_probabilities_grow_exponentially_with_the_step_from_scratch():
    """S(t) = 2^(t / (T-1)) - 1: for T = 11, 0 in step 0, 2^(1/2) - 1 in step 5, 1 in step 10."""
    config = make_config(layer_dropout__schedule="exponential")
    assert drop_probabilities(config, 0) == [0.0] * LAYERS
    assert drop_probabilities(config, 5)[-1] == pytest.approx(0.5 * 0.41421356237)
    assert drop_probabilities(config, 5)[2] == pytest.approx(0.5 * 0.41421356237**2)
    assert drop_probabilities(config, 10) == pytest.approx(drop_probabilities(make_config(), 0))


def test_decisions_do_not_change_between_versions():
    """A resumed run must drop what the uninterrupted run drops, also after an update of numpy."""
    dropped = [dropped_layers(1234, 7, sample, [0.5] * 8) for sample in range(4)]
    assert ["".join("01"[d] for d in sample) for sample in dropped] == RECORDED


RECORDED = ["01001010", "10101001", "11010111", "10101001"]


def test_decisions_depend_on_seed_step_sample_and_layer():
    base = dropped_layers(1, 2, 3, [0.5] * 64)
    assert base == dropped_layers(1, 2, 3, [0.5] * 64)
    assert base[:10] == dropped_layers(1, 2, 3, [0.5] * 10)
    for other in ((9, 2, 3), (1, 9, 3), (1, 2, 9)):
        assert base != dropped_layers(*other, [0.5] * 64)


def test_layers_are_dropped_as_often_as_configured():
    probabilities = drop_probabilities(make_config(), 0)
    samples = [dropped_layers(5, 0, sample, probabilities) for sample in range(4000)]
    shares = [sum(column) / len(samples) for column in zip(*samples, strict=True)]
    assert shares == pytest.approx(probabilities, abs=0.03)
    assert shares[0] == 0


def test_rows_do_not_depend_on_the_split_into_microbatches():
    """Sample 5 is row 1 of the third microbatch of two, and row 1 of the second one of four."""
    config, layers = make_config(), range(1, LAYERS + 1)

    def kept(samples):
        found = set()
        for rows, microbatch in zip(samples, kept_rows(config, 3, samples, layers), strict=True):
            for layer in layers:
                indices = microbatch.get(layer, torch.arange(len(rows))).tolist()
                found |= {(layer, rows[index]) for index in indices}
        return found

    by_two = kept([range(first, first + 2) for first in range(0, 16, 2)])
    by_four = kept([range(12, 16), range(4, 8), range(8, 12), range(4)])
    assert by_two == by_four
    assert 16 < len(by_two) < 16 * LAYERS


def test_without_dropout_all_rows_run():
    config = make_config(layer_dropout__max_probability=0.0)
    assert kept_rows(config, 3, [range(4), range(4, 8)], range(1, LAYERS + 1)) == [{}, {}]


def test_skipped_samples_pass_unchanged():
    hidden = torch.randn(LENGTH, BATCH, 4, dtype=torch.float64, requires_grad=True)
    rotary = torch.randn(LENGTH, BATCH, 1, 2)
    seen = []

    def layer(part, angles):
        seen.append((part, angles))
        return part * 2, part * 3

    rows = torch.tensor([0, 2])
    output, attended = run_on_rows(layer, hidden, rotary, rows, taps_attention=True)
    [(part, angles)] = seen
    assert torch.equal(part, hidden[:, [0, 2]])
    assert torch.equal(angles, rotary[:, [0, 2]])
    factors = torch.tensor([2.0, 1.0, 2.0]).view(1, 3, 1)
    assert torch.equal(output, hidden * factors)
    assert torch.equal(attended[:, 1], hidden[:, 1])
    output.sum().backward()
    assert torch.equal(hidden.grad, factors.expand_as(hidden).double())


def _calls(rows: list[list[int]], recompute: str, head: tuple[str, ...]):
    """Return how many samples each module of the layers saw, the output and the taps."""
    distributed.initialize(timeout_s=20)
    config = make_config(training__recompute=recompute, exits__head=head)
    stage = Stage(config, 0, torch.float64)
    seen: dict[str, list[int]] = {}
    for name, module in stage.layers.named_modules():
        if name.count(".") == 1:

            def record(_, inputs, options, name=name):
                given = [*inputs, *options.values()]
                counts = [x.shape[1] for x in given if isinstance(x, torch.Tensor)]
                seen.setdefault(name, []).extend(counts[:1])

            module.register_forward_pre_hook(record, with_kwargs=True)
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 32
    positions = torch.arange(LENGTH).repeat(BATCH, 1)
    kept = {number + 1: torch.tensor(r, dtype=torch.int64) for number, r in enumerate(rows)}
    output, taps = stage(tokens, positions, None, kept)
    output.sum().backward()
    gradients = {name: p.grad for name, p in stage.layers.named_parameters()}
    return seen, output.detach(), [tap.detach() for tap in taps], gradients


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("head", [("norm",), ("mlp", "norm")], ids=["norm", "mlp"])
def test_a_layer_is_not_called_for_dropped_samples(recompute, head):
    rows = [[0, 1, 2], [1], [], [0, 2], [0, 1, 2]]
    [(seen, output, taps, gradients)] = run_ranks(1, _calls, rows, recompute, head)
    assert {count for name, counts in seen.items() if name[0] == "2" for count in counts} == {1}
    assert {count for name, counts in seen.items() if name[0] == "4" for count in counts} == {2}
    assert not any(name.startswith("3.") for name in seen)
    assert all((g is None) == name.startswith("3.") for name, g in gradients.items())
    # Without the samples that layers drop, the others have the same hidden states.
    [(_, whole, whole_taps, _)] = run_ranks(1, _calls, [[0, 1, 2]] * 5, recompute, head)
    assert not torch.allclose(output, whole)
    # Before layer 4, sample 1 has skipped only layer 3, and the exit at 2 lies before that.
    torch.testing.assert_close(taps[0][:, 1], whole_taps[0][:, 1], rtol=1e-12, atol=0)
    assert not torch.allclose(taps[0][:, 0], whole_taps[0][:, 0])
