"""The source of copied exits, and the description of a tuning run."""

import pytest

from ee_llm.architecture.initial_values import copy_source
from ee_llm.config import Config, load_config
from ee_llm.training.tuning import INITIALIZATIONS, describe_tuning


def make(**overrides: object) -> Config:
    options = {"model.shape": "llama-tiny", "exits.boundaries": (2, 7), "exits.output": "own"}
    return load_config(None, options | {"tuning.checkpoint": "runs/a"} | overrides)


@pytest.mark.parametrize(
    ("name", "head", "source"),
    [
        ("exits.2.norm.weight", ("norm",), "exits.8.norm.weight"),
        ("exits.2.norm.bias", ("norm",), "exits.8.norm.bias"),
        ("exits.2.output.weight", ("norm",), "output.weight"),
        ("exits.2.mlp.linear_fc1.weight", ("mlp", "norm"), "layers.2.mlp.linear_fc1.weight"),
        ("exits.2.mlp_norm.weight", ("mlp", "norm"), "layers.2.pre_mlp_layernorm.weight"),
        ("exits.7.block.mlp.linear_fc2.bias", ("block",), "layers.8.mlp.linear_fc2.bias"),
        ("exits.2.block.input_layernorm.weight", ("block",), "layers.3.input_layernorm.weight"),
        ("exits.2.mlp.linear_fc1.weight", ("block", "mlp"), None),
        ("exits.2.mlp_norm.weight", ("block", "mlp"), None),
    ],
)
def test_source_of_copied_parameters(name: str, head: tuple, source: str | None) -> None:
    assert copy_source(name, make(**{"exits.head": head})) == source


def test_tied_output_weight_is_copied_from_the_embedding() -> None:
    tied = make(**{"model.tie_embeddings": True})
    assert copy_source("exits.2.output.weight", tied) == "embedding.word.weight"


def test_every_initialization_of_the_configuration_exists() -> None:
    for name in ("copy", "random"):
        assert make(**{"exits.initialization": name}).exits.initialization in INITIALIZATIONS


def test_description_names_what_is_trained() -> None:
    own = make(**{"exits.head": ("mlp", "norm"), "tuning.exits": (2,)})
    assert describe_tuning(own) == (
        "tuning exits at [2]: mlp, norm, output weight; a step computes 2 of 8 layers"
    )
    distilled = make(**{"tuning.exits": (2,), "tuning.objective": "distill"})
    assert describe_tuning(distilled) == (
        "tuning exits at [2] towards the final exit's distribution: norm, output weight; a step "
        "computes 8 of 8 layers"
    )
    assert describe_tuning(make(**{"exits.output": "shared"})) == (
        "tuning exits at [2, 7]: norm; their output weight is the final exit's, which is frozen "
        "(exits.output = shared); a step computes 7 of 8 layers"
    )
