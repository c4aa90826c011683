"""Errors for conflicting options: they name the options, their values and a remedy."""

from typing import Any

import pytest

from ee_llm.config import load_config
from tests.unit.refusals import assert_message, message

CROSS_FIELD = {
    "layers over stages": (
        {"parallel.pipeline": 3},
        "model.num_layers = 8 is not divisible by parallel.pipeline = 3.*parallel.layer_split.*"
        "[3, 3, 2]",
    ),
    "more stages than layers": (
        {"parallel.pipeline": 9},
        "model.num_layers = 8 .* 9 (parallel.pipeline = 9). Lower parallel.pipeline",
    ),
    "split of the wrong length": (
        {"parallel.pipeline": 2, "parallel.layer_split": (8,)},
        "parallel.layer_split = [8] must be 2 positive numbers",
    ),
    "split of the wrong sum": (
        {"parallel.pipeline": 2, "parallel.layer_split": (4, 5)},
        "parallel.layer_split = [4, 5] must be 2 .* 8 (model.num_layers).*[4, 4]",
    ),
    "empty stage": (
        {"parallel.pipeline": 2, "parallel.layer_split": (8, 0)},
        "parallel.layer_split = [8, 0] must be 2 positive",
    ),
    "layers over interleaved stages": (
        {"parallel.pipeline": 2, "parallel.virtual": 3},
        "model.num_layers = 8 is not divisible by parallel.pipeline = 2 x parallel.virtual = 3.*"
        "parallel.layer_split.*[2, 2, 1, 1, 1, 1]",
    ),
    "nothing to interleave": (
        {"parallel.virtual": 2},
        "parallel.virtual = 2.*parallel.pipeline = 1",
    ),
    "two schedules at once": (
        {"parallel.pipeline": 2, "parallel.virtual": 2, "parallel.schedule": "zero-bubble"},
        "parallel.virtual = 2.*parallel.schedule = zero-bubble.*parallel.schedule to 1f1b",
    ),
    "filling bubbles of a schedule other than 1F1B": (
        {"parallel.pipeline": 2, "parallel.virtual": 2, "parallel.fill_cooldown": "auto"},
        "parallel.fill_cooldown = auto.*1F1B.*parallel.virtual to 1",
    ),
    "negative number of filling microbatches": (
        {"parallel.fill_warmup": -1},
        "parallel.fill_warmup = -1 must be from 0 to 65536",
    ),
    "traced steps outside the run": (
        {"logging.trace_steps": (0, 5), "training.steps": 9},
        "logging.trace_steps = [0, 5]: [0] .* training.steps = 9",
    ),
    "heads over tensor": (
        {"parallel.tensor": 4},
        "model.num_heads = 6 is not divisible by parallel.tensor = 4.*a divisor of 6",
    ),
    "key-value heads over tensor": (
        {"parallel.tensor": 2, "model.num_kv_heads": 1},
        "model.num_kv_heads = 1 is not divisible by parallel.tensor = 2",
    ),
    "vocabulary of a checkpoint over tensor": (
        {"parallel.tensor": 2, "model.vocab_size": 257, "checkpoint.initial": "runs/model"},
        "model.vocab_size = 257 is not divisible by parallel.tensor = 2. Set parallel.tensor to a "
        "divisor of 257",
    ),
    "vocabulary over tensor": (
        {"parallel.tensor": 2, "model.vocab_size": 257},
        "model.vocab_size = 257 is not divisible by parallel.tensor = 2.*model.vocab_size = 258",
    ),
    "MLP over tensor": (
        {"parallel.tensor": 2, "model.ffn_hidden_size": 77},
        "model.ffn_hidden_size = 77 is not divisible by parallel.tensor = 2.*"
        "model.ffn_hidden_size = 78",
    ),
    "query over key-value heads": (
        {"model.num_kv_heads": 4},
        "model.num_heads = 6 is not divisible by model.num_kv_heads = 4.*a divisor of 6",
    ),
    "width over heads": (
        {"model.num_heads": 7},
        "model.hidden_size = 288 is not divisible by model.num_heads = 7.*model.head_dim",
    ),
    "odd heads with rotary positions": (
        {"model.head_dim": 5},
        "model.head_dim = 5 is odd.*model.position = learned",
    ),
    "exit before the first layer": (
        {"exits.boundaries": (0, 2)},
        "exits.boundaries = [0, 2]: boundary 0 is outside 1..7",
    ),
    "exit at the last layer": (
        {"exits.boundaries": (2, 8)},
        "exits.boundaries = [2, 8]: boundary 8 is outside 1..7 (model.num_layers = 8",
    ),
    "exits that decrease": (
        {"exits.boundaries": (4, 2)},
        "exits.boundaries = [4, 2] .*[2, 4]",
    ),
    "exit given twice": (
        {"exits.boundaries": (2, 2)},
        "exits.boundaries = [2, 2] .*[2]",
    ),
    "weights not one per exit": (
        {"exits.boundaries": (2, 4), "exits.weights": (0.1, 0.2, 1.0)},
        "exits.weights = [0.1, 0.2, 1.0] has 3 values for 2 exits",
    ),
    "initial weights not one per exit": (
        {
            "exits.boundaries": (2, 4),
            "exits.initial_weights": (1.0,),
            "exits.weight_schedule": "linear",
        },
        "exits.initial_weights = [1.0] has 1 values for 2 exits",
    ),
    "temperatures not one per exit": (
        {"exits.boundaries": (2,), "exits.temperatures": (1.0, 2.0)},
        "exits.temperatures = [1.0, 2.0] has 2 values for 1 exits",
    ),
    "negative weight": (
        {"exits.boundaries": (2,), "exits.weights": (-0.1,)},
        "exits.weights = [-0.1] must be from 0 to 1e+06",
    ),
    "temperature of zero": (
        {"exits.boundaries": (2,), "exits.temperatures": (0.0,)},
        "exits.temperatures = [0.0] must be from 1e-06 to 1e+06",
    ),
    "initial weights without a schedule": (
        {"exits.boundaries": (2,), "exits.initial_weights": (0.5,)},
        "exits.initial_weights = [0.5] .*exits.weight_schedule = constant",
    ),
    "head out of order": (
        {"exits.head": ("norm", "mlp")},
        "exits.head = ['norm', 'mlp'] .*['mlp', 'norm']",
    ),
    "head module given twice": (
        {"exits.head": ("norm", "norm")},
        "exits.head = ['norm', 'norm'] .*['norm']",
    ),
    "mlp head placed pre": (
        {"exits.boundaries": (2,), "exits.head": ("mlp", "norm"), "exits.placement": "pre"},
        "exits.head = ['mlp', 'norm'] .*exits.placement = pre.*exits.placement = post.*block",
    ),
    "sequence parallel without tensor parallel": (
        {"parallel.sequence": True},
        "parallel.sequence = true .*parallel.tensor = 1.*parallel.tensor = 2",
    ),
    "sequence length over tensor": (
        {"parallel.sequence": True, "parallel.tensor": 2, "data.seq_length": 31},
        "data.seq_length = 31 is not divisible by parallel.tensor = 2.*data.seq_length = 30",
    ),
    "sequences of length 0": (
        {"data.seq_length": 0},
        "data.seq_length = 0 must be greater than 0.*model.max_seq_length",
    ),
    "sequences longer than the model's": (
        {"data.seq_length": 300},
        "data.seq_length = 300 is greater than model.max_seq_length = 256",
    ),
    "batches that do not divide": (
        {"training.micro_batch_size": 3},
        "training.global_batch_size = 8 is not divisible by training.micro_batch_size = 3.*"
        "training.global_batch_size to 9",
    ),
    "blend weights not one per prefix": (
        {"data.prefixes": ("a", "b"), "data.weights": (1.0,)},
        "data.weights = [1.0] has 1 values for 2 data.prefixes",
    ),
    "blend weight of zero": (
        {"data.prefixes": ("a", "b"), "data.weights": (1.0, 0.0)},
        "data.weights = [1.0, 0.0] must be greater than 0",
    ),
    "split whose sum is not 1": (
        {"data.split": (0.5, 0.3, 0.1)},
        "data.split = [0.5, 0.3, 0.1] must be three fractions from 0 to 1",
    ),
    "negative fraction": (
        {"data.split": (1.5, -0.5, 0.0)},
        "data.split = [1.5, -0.5, 0.0] must be three fractions",
    ),
    "validation without data": (
        {"data.split": (1.0, 0.0, 0.0)},
        "training.eval_interval = 100 .*data.split = [1.0, 0.0, 0.0].*training.eval_interval = 0",
    ),
    "minimum learning rate above the maximum": (
        {"optimizer.lr": 1e-5, "optimizer.min_lr": 1e-4},
        "optimizer.min_lr = 0.0001 is greater than optimizer.lr = 1e-05",
    ),
    "warm-up longer than the run": (
        {"optimizer.warmup_steps": 1000},
        "optimizer.warmup_steps = 1000 must be less than training.steps = 1000",
    ),
    "warm-up longer than the decay": (
        {"optimizer.warmup_steps": 90, "optimizer.decay_steps": 80},
        "optimizer.warmup_steps = 90 must be less than optimizer.decay_steps = 80",
    ),
    "minimum learning rate of a constant schedule": (
        {"optimizer.schedule": "constant", "optimizer.min_lr": 1e-5},
        "optimizer.min_lr = 1e-05 .*optimizer.schedule = constant.*cosine, linear or wsd",
    ),
    "end of a constant schedule": (
        {"optimizer.schedule": "constant", "optimizer.decay_steps": 500},
        "optimizer.decay_steps = 500 .*optimizer.schedule = constant",
    ),
    "wsd without a decay": (
        {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 100},
        "optimizer.wsd_decay_steps = 0 must be from 1 to 900",
    ),
    "rotary scaling without rotary positions": (
        {"model.rope_scaling": "linear", "model.position": "learned"},
        "model.rope_scaling = linear .*model.position = learned.*model.rope_scaling to none",
    ),
    "factor without scaling": (
        {"model.rope_factor": 8.0},
        "model.rope_factor = 8.0 .*model.rope_scaling = none.*linear or llama3",
    ),
    "original length with linear scaling": (
        {"model.rope_scaling": "linear", "model.rope_original_length": 100},
        "model.rope_original_length = 100 .*model.rope_scaling = linear.*to llama3",
    ),
    "low frequency factor not below the high one": (
        {"model.rope_scaling": "llama3", "model.rope_low_freq_factor": 4.0},
        "model.rope_low_freq_factor = 4.0 .*model.rope_high_freq_factor = 4.0",
    ),
    "gpt without biases": (
        {"model.family": "gpt", "model.qkv_bias": False},
        "model.qkv_bias = false .*model.family = gpt",
    ),
    "gpt with query and key norms": (
        {"model.family": "gpt", "model.qk_norm": True},
        "model.qk_norm = true .*model.family = gpt.*to false",
    ),
    "GELU variant of a model without GELU": (
        {"model.gelu": "tanh"},
        "model.gelu = tanh .*model.family = llama.*model.family = gpt",
    ),
    "empty path": (
        {"data.prefixes": ("a", "")},
        "data.prefixes = ['a', '']",
    ),
    "wsd decay of a cosine schedule": (
        {"optimizer.wsd_decay_steps": 10},
        "optimizer.wsd_decay_steps = 10 .*optimizer.schedule = cosine",
    ),
}


def test_boundary_beyond_the_model_does_not_change_its_number_of_layers() -> None:
    """Boundary 9 of 8 layers was also reported as model.num_layers = 9, not divisible by 2."""
    for tuning in ({}, {"tuning.checkpoint": "runs/a", "parallel.layer_split": (4, 4)}):
        error = message({"exits.boundaries": (2, 9), "parallel.pipeline": 2} | tuning)
        assert error.startswith("exits.boundaries = [2, 9]: boundary 9 is outside 1..7")
        assert "\n" not in error


@pytest.mark.parametrize("case", CROSS_FIELD)
def test_cross_field_errors_name_options_values_and_remedy(case: str) -> None:
    assert_message(*CROSS_FIELD[case])


@pytest.mark.parametrize(
    "overrides",
    [
        {"exits.head": ("block", "mlp", "norm"), "exits.placement": "pre"},
        {"exits.head": ()},
        {"model.hidden_size": 100, "model.num_heads": 6, "model.head_dim": 16},
        {"model.head_dim": 5, "model.position": "learned"},
        {"optimizer.schedule": "constant", "optimizer.warmup_steps": 2000},
        {"data.split": (1.0, 0.0, 0.0), "training.eval_interval": 0},
        {"parallel.pipeline": 3, "parallel.layer_split": (2, 3, 3)},
        {"parallel.tensor": 2, "parallel.sequence": True},
        {"exits.boundaries": (2,), "exits.initial_weights": (0.0,)},
        {"model.family": "gpt", "model.gelu": "tanh"},
        {"model.qk_norm": True, "model.position": "learned"},
    ],
)
def test_similar_but_valid_combinations(overrides: dict[str, Any]) -> None:
    assert load_config(overrides={"model.shape": "llama-tiny", **overrides})
