"""Dropout masks are equal where tensor ranks have the same numbers, different elsewhere."""

import pytest
import torch

from ee_llm import distributed
from ee_llm.config import Config, load_config
from ee_llm.data import Microbatch
from tests.distributed.harness import run_ranks

distributed.enable_megatron()
from ee_llm.model.attention import CausalAttention
from ee_llm.model.stage import Stage
from ee_llm.training.parallel import ParallelModel

BATCH, LENGTH, VOCAB = 2, 8, 32


def make_config(tensor: int = 1, sequence: bool = False, **options: object) -> Config:
    sizes = {
        "model.num_layers": 2,
        "model.hidden_size": 32,
        "model.num_heads": 4,
        "model.ffn_hidden_size": 48,
        "model.vocab_size": VOCAB,
        "model.max_seq_length": LENGTH,
        "model.init_std": 0.3,
        "model.dropout": 0.25,
        "exits.boundaries": (1,),
        "exits.head": ("block", "norm"),
        "parallel.tensor": tensor,
        "parallel.sequence": sequence,
        "parallel.timeout_s": 20.0,
        "training.micro_batch_size": BATCH,
        "training.global_batch_size": 2 * BATCH,
    }
    return load_config(None, sizes | {k.replace("__", "."): v for k, v in options.items()})


def make_batch(seed: int = 0) -> Microbatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).repeat(BATCH, 1)
    return Microbatch(tokens, tokens.flip(1), torch.ones(BATCH, LENGTH), positions)


def _calls(dropout: float) -> list[torch.Tensor]:
    """Return the logits of the exit from two calls in training and two in evaluation."""
    distributed.initialize(timeout_s=20)
    stage = Stage(make_config(model__dropout=dropout), 0, torch.float64)
    batch = make_batch()
    results = []
    for training in (True, True, False, False):
        stage.train(training)
        _, taps = stage(batch.tokens, batch.positions)
        results.append(stage.exit_logits(1, taps[0], batch.positions).detach())
    return results


def test_only_training_drops():
    [(one, other, evaluation, again)] = run_ranks(1, _calls, 0.25)
    [(_, _, plain, _)] = run_ranks(1, _calls, 0.0)
    assert not torch.equal(one, other)
    assert not torch.equal(one, evaluation)
    assert torch.equal(evaluation, again)
    assert torch.equal(evaluation, plain)


def _dropped(tensor: int, sequence: bool) -> dict[str, torch.Tensor]:
    """Return the masks of dropped numbers by place, gathered from the tensor ranks."""
    distributed.initialize(tensor=tensor, timeout_s=20, seed=4)
    stage = Stage(make_config(tensor, sequence), 0, torch.float64)
    batch = make_batch()
    seen: dict[str, torch.Tensor] = {}

    def watch(name, layer):
        # Dropout applies to the output of attention, so the residual stream is unchanged where it
        # drops.
        layer.input_layernorm.register_forward_pre_hook(
            lambda _, inputs: seen.update({f"{name} in": inputs[0].detach()})
        )
        layer.pre_mlp_layernorm.register_forward_pre_hook(
            lambda _, inputs: seen.update({f"{name} mid": inputs[0].detach()})
        )

    watch("layer", stage.layers["1"])
    watch("block", stage.exits["1"].block)
    stage.exits["1"].norm.register_forward_pre_hook(
        lambda _, inputs: seen.update({"block out": inputs[0].detach()})
    )
    hidden, taps = stage(batch.tokens, batch.positions)
    stage.exit_logits(1, taps[0], batch.positions)
    return {
        "dropped by the embedding": seen["layer in"] == 0,
        "dropped by the layer": seen["layer mid"] == seen["layer in"],
        "dropped by the exit's block": seen["block mid"] == seen["block in"],
        "stage": hidden.detach(),
        "exit": seen["block out"],
    }


def test_tensor_ranks_drop_equal_places_of_common_numbers():
    one, other = run_ranks(2, _dropped, 2, False)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        if name.startswith("dropped"):
            assert value.double().mean().item() == pytest.approx(0.25, abs=0.1), name


def test_sequence_parallel_ranks_drop_different_places():
    """They have different positions, so that equal masks would repeat along the sequence."""
    one, other = run_ranks(2, _dropped, 2, True)
    for name in (name for name in one if name.startswith("dropped")):
        assert one[name].shape == (LENGTH // 2, BATCH, 32)
        assert one[name].double().mean().item() == pytest.approx(0.25, abs=0.1), name
        agree = (one[name] == other[name]).double().mean().item()
        assert agree < 0.8, name  # 0.625 for independent masks


def test_data_parallel_ranks_drop_different_places():
    one, other = run_ranks(2, _dropped, 1, False)
    for name, value in one.items():
        assert not torch.equal(value, other[name]), name


def _attention(sequence: bool):
    """Run attention of tensor ranks over equal heads, within the regions around it in a layer."""
    distributed.initialize(tensor=2, timeout_s=20)
    stage = Stage(make_config(2, sequence), 0, torch.float64)
    layer = stage.layers["1"]
    found = []

    def equal_heads(module, args):
        generator = torch.Generator().manual_seed(1)
        shape = args[0].shape
        return tuple(torch.randn(shape, generator=generator).double() for _ in range(3)) + args[3:]

    attention = next(m for m in layer.modules() if isinstance(m, CausalAttention))
    attention.register_forward_pre_hook(equal_heads)
    attention.register_forward_hook(lambda _, args, output: found.append(output.detach()))
    batch = make_batch()
    for training in (True, False):
        stage.train(training)
        stage(batch.tokens, batch.positions)
    return found


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_ranks_drop_different_scores_of_their_heads(sequence):
    (training, evaluation), (training_there, evaluation_there) = run_ranks(2, _attention, sequence)
    assert torch.equal(evaluation, evaluation_there)
    assert not torch.equal(training, evaluation)
    assert not torch.equal(training, training_there)


def _gradients(tensor: int, sequence: bool, recompute: str) -> dict[str, torch.Tensor]:
    config = make_config(tensor, sequence, training__recompute=recompute)
    grid = distributed.initialize(tensor=tensor, timeout_s=20, seed=2)
    model = ParallelModel(config, grid, torch.float64)
    model.forward_backward([make_batch(1), make_batch(2)], step=0)
    return {name: p.main_grad.clone() for name, p in model.stages[0].named_parameters()}


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_recomputation_drops_the_same_places(tensor, sequence):
    expected = run_ranks(tensor, _gradients, tensor, sequence, "none")
    for recompute in ("selective", "full"):
        found = run_ranks(tensor, _gradients, tensor, sequence, recompute)
        for rank, gradients in enumerate(found):
            for name, gradient in gradients.items():
                torch.testing.assert_close(
                    gradient, expected[rank][name], rtol=1e-10, atol=1e-12, msg=name
                )
