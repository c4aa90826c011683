"""Rotary frequencies equal those of published checkpoints bit for bit."""

from typing import Any

import pytest
import torch

from ee_llm.architecture.rotary import inverse_frequencies
from ee_llm.config import load_config

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("head_dim", [64, 128, 6])
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "original_max_position_embeddings": 8192} | LLAMA3,
        {"rope_type": "llama3", "original_max_position_embeddings": 300} | LLAMA3,
    ],
    ids=str,
)
def test_frequencies_equal_transformers(
    scaling: dict[str, Any], theta: float, head_dim: int
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=64,
            num_attention_heads=2,
            head_dim=head_dim,
            rope_parameters={"rope_theta": theta} | scaling,
        )
    )
    options: dict[str, Any] = {"model.rope_theta": theta, "model.head_dim": head_dim}
    kind = scaling["rope_type"]
    options["model.rope_scaling"] = "none" if kind == "default" else kind
    if kind != "default":
        options["model.rope_factor"] = scaling["factor"]
    if kind == "llama3":
        options["model.rope_original_length"] = scaling["original_max_position_embeddings"]
    model = load_config(None, {"model.shape": "llama-tiny"} | options).model
    found = inverse_frequencies(model)
    assert found.dtype == torch.float32
    assert torch.equal(found, theirs.inv_freq)


def test_llama3_scaling_slows_only_low_frequencies() -> None:
    """Pairs that turn over 3 times in 40 positions stay; pairs below 0.5 turns slow by 8."""
    options = {"model.head_dim": 8, "model.rope_theta": 100.0}
    plain = load_config(None, {"model.shape": "llama-tiny"} | options).model
    slowed = load_config(
        None,
        {"model.shape": "llama-tiny"}
        | options
        | {
            "model.rope_scaling": "llama3",
            "model.rope_factor": 8.0,
            "model.rope_low_freq_factor": 0.5,
            "model.rope_high_freq_factor": 3.0,
            "model.rope_original_length": 40,
        },
    ).model
    ratio = inverse_frequencies(plain) / inverse_frequencies(slowed)
    assert ratio[0] == 1
    assert 1 < ratio[1] < ratio[2] < 8
    assert ratio[3] == 8
