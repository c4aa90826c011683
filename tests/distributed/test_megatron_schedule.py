"""The runtime's gradients against megatron-core's own 1F1B schedule, an independent reference.

megatron-core's schedule supports only the final loss. An autograd function attaches an exit's loss
to the hidden states that a stage sends, as megatron-core does for its auxiliary losses: the value
passes through unchanged, and the backward pass starts that of the exit.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.config import Config, load_config
from ee_llm.data import Microbatch
from ee_llm.losses.exit_losses import exit_loss
from tests.distributed.harness import run_ranks

distributed.enable_megatron()
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule

from ee_llm.model.stage import Stage
from ee_llm.training.parallel import ParallelModel

NUM_MICROBATCHES, BATCH, LENGTH, VOCAB = 5, 2, 8, 32
WEIGHTS = {1: 0.3, 2: 0.6, 3: 0.9, 4: 1.0}

VARIANTS = {
    "post, own": {"exits.output": "own"},
    "pre, tied": {"exits.output": "tied", "exits.placement": "pre"},
    "gpt, mlp, tied everywhere": {
        "model.family": "gpt",
        "model.tie_embeddings": True,
        "exits.output": "tied",
        "exits.head": ("mlp", "norm"),
    },
    "block, shared, dynamic, full recomputation": {
        "exits.head": ("block", "norm"),
        "exits.dynamic_token_weights": True,
        "exits.temperatures": (2.0, 1.0, 0.5),
        "training.recompute": "full",
    },
}


class AttachLoss(torch.autograd.Function):
    """Passes hidden states through; backward also differentiates the loss, with weight 1."""

    @staticmethod
    def forward(ctx, hidden, loss):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones((), dtype=gradient.dtype)


class WithLosses(MegatronModule):
    """A stage with the interface that megatron-core's schedule expects."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: Config, index: int, dtype: torch.dtype, num_tokens: float) -> None:
        stage = Stage(config, index, dtype)
        size = config.parallel.pipeline
        parts = dataclasses.replace(
            stage.config, pipeline_model_parallel_size=size, pipeline_dtype=dtype
        )
        super().__init__(config=parts)
        self.stage, self.settings, self.num_tokens = stage, config, num_tokens
        self.received: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        self.received = tensors[0]

    def forward(self, batch: Microbatch) -> torch.Tensor:
        """Return the hidden states, or the final loss, with the exits' losses attached."""
        hidden, taps = self.stage(batch.tokens, batch.positions, self.received)
        for boundary, tap in zip(self.stage.boundaries, taps, strict=True):
            if boundary == 4:
                return self.loss(boundary, hidden, batch)
            hidden = AttachLoss.apply(hidden, self.loss(boundary, tap, batch))
        return hidden

    def loss(self, boundary: int, tap: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        dynamic = self.settings.exits.dynamic_token_weights and boundary != 4
        loss = exit_loss(
            self.stage.exit_logits(boundary, tap, batch.positions),
            batch.labels.t(),
            batch.loss_mask.t(),
            group=parallel_state.get_tensor_model_parallel_group(),
            dynamic_token_weights=dynamic,
        )
        return WEIGHTS[boundary] * loss.objective / self.num_tokens


def make_config(variant: dict, tensor: int, sequence: bool) -> Config:
    options = {
        "model.num_layers": 4,
        "model.hidden_size": 16,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.ffn_hidden_size": 24,
        "model.vocab_size": VOCAB,
        "model.max_seq_length": LENGTH,
        "model.init_std": 0.3,
        "exits.boundaries": (1, 2, 3),
        "exits.weights": (0.3, 0.6, 0.9),
        "parallel.tensor": tensor,
        "parallel.pipeline": 2,
        "parallel.sequence": sequence,
        "parallel.timeout_s": 20.0,
        "training.global_batch_size": NUM_MICROBATCHES * BATCH,
        "training.micro_batch_size": BATCH,
    }
    return load_config(None, options | variant)


def make_batches() -> list[Microbatch]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(NUM_MICROBATCHES):
        tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
        mask = (torch.rand(BATCH, LENGTH, generator=generator) < 0.6).float()
        positions = torch.arange(LENGTH).repeat(BATCH, 1)
        batches.append(Microbatch(tokens[:, :-1], tokens[:, 1:], mask, positions))
    return batches


def by_megatron(config: Config, grid: distributed.Grid, batches, dtype) -> dict[str, torch.Tensor]:
    """Return the gradients of this rank's stage by name, from megatron-core's schedule."""
    num_tokens = sum(batch.loss_mask.sum().item() for batch in batches)
    model = WithLosses(config, grid.pipeline_rank, dtype, num_tokens)

    def step(batches: Iterator[Microbatch], model: WithLosses):
        # Two results: megatron-core divides the loss by the number of microbatches only.
        return model(next(batches)), lambda loss: (loss * NUM_MICROBATCHES, {})

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=NUM_MICROBATCHES,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
    )
    parameters = dict(model.stage.named_parameters())
    for name in ("embedding.word.weight", "output.weight"):  # copies on both stages
        has_copy = [None, None]
        dist.all_gather_object(has_copy, name in parameters, group=grid.pipeline_group)
        if all(has_copy):
            dist.all_reduce(parameters[name].grad, group=grid.pipeline_group)
    if config.parallel.sequence:
        for parameter in parameters.values():
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=grid.tensor_group)
    return {name: parameter.grad for name, parameter in parameters.items()}


def worst_difference(variant: dict, tensor: int, sequence: bool, dtype: torch.dtype):
    config = make_config(variant, tensor, sequence)
    grid = distributed.initialize(tensor=tensor, pipeline=2, timeout_s=20)
    batches = make_batches()
    expected = by_megatron(config, grid, batches, dtype)
    model = ParallelModel(config, grid, dtype)
    model.forward_backward(batches, step=0)
    found = {name: p.main_grad for name, p in model.stages[0].named_parameters()}
    assert set(found) == set(expected)
    worst = 0.0
    for name, gradient in found.items():
        scale = expected[name].abs().max()
        assert scale > 0, f"{name} has no gradient"
        worst = max(worst, ((gradient - expected[name]).abs().max() / scale).item())
    return worst


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_of_megatrons_schedule(variant):
    for worst in run_ranks(2, worst_difference, VARIANTS[variant], 1, False, torch.float64):
        assert worst < 1e-9


@pytest.mark.parametrize("sequence", [False, True])
def test_with_tensor_parallelism(sequence):
    variant = VARIANTS["pre, tied"]
    for worst in run_ranks(4, worst_difference, variant, 2, sequence, torch.float64):
        assert worst < 1e-9


def test_in_float32():
    for worst in run_ranks(2, worst_difference, VARIANTS["post, own"], 1, False, torch.float32):
        assert worst < 1e-5
