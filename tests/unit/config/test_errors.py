"""What a user's mistake in the configuration is answered with: option, value, mend."""

import re
from pathlib import Path

import pytest

from ee_llm.config import Config, load_config
from ee_llm.errors import ConfigError
from tests.unit.refusals import message


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("model.num_layer", "model.num_layers"),
        ("exits.boundary", "exits.boundaries"),
        ("training.lr", "optimizer.lr"),
        ("seed", "training.seed"),
        ("modle.num_layers", "model"),
        ("optimiser.lr", "optimizer"),
        ("checkpoint.keeplast", "checkpoint.keep_last"),
    ],
)
def test_unknown_names_get_the_nearest_valid_one(name: str, mend: str) -> None:
    found = message({name: 1})
    path = name if name.partition(".")[0] not in ("modle", "optimiser") else name.partition(".")[0]
    assert found.startswith(f"{path}: no such option; did you mean {mend}")
    assert re.search(rf"\b{re.escape(mend)}\b( or .*)?\?$", found)


def test_an_unknown_name_like_no_other_gets_the_names_there_are() -> None:
    assert message({"logging.xyzzy": 1}) == (
        "logging.xyzzy: no such option; logging has interval, tensorboard, trace_steps, "
        "wandb_mode, wandb_project"
    )
    assert "ee-llm train --help" in message({"xyzzy": 1})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("model.num_layers", "8", 'model.num_layers: must be an integer such as 8, got "8"'),
        ("model.num_layers", 8.0, "model.num_layers: must be an integer such as 8, got 8.0"),
        ("model.num_layers", True, "model.num_layers: must be an integer such as 8, got true"),
        ("model.num_layers", 0, "model.num_layers: must be greater than 0, got 0"),
        ("model.dropout", 1.0, "model.dropout: must be less than 1, got 1.0"),
        ("optimizer.lr", "x", 'optimizer.lr: must be a number such as 0.1, got "x"'),
        ("optimizer.lr", float("nan"), "optimizer.lr: must be a finite number, got nan"),
        ("exits.deferred", 1, "exits.deferred: must be true or false, got 1"),
        ("exits.boundaries", 2, "exits.boundaries: must be a list such as [2, 4], got 2"),
        (
            "exits.boundaries",
            [1, "b"],
            'exits.boundaries: must be an integer such as 8, got "b" (item 2)',
        ),
        ("exits.head", ["nrm"], "exits.head: must be one of 'block', 'mlp' or 'norm', got \"nrm\""),
        ("model.family", "bert", "model.family: must be one of 'llama' or 'gpt', got \"bert\""),
        ("data.split", (1.0,), "data.split: has too few values, got [1.0]"),
        ("parallel", 2, "parallel: must be a table of options, got 2"),
        ("output", "", "output: "),
        ("model.shape", "llama-8B", "model.shape = 'llama-8B' does not exist; choose among llama-"),
    ],
)
def test_values_of_the_wrong_kind(name: str, value: object, expected: str) -> None:
    found = message({name: value})
    assert found.startswith(expected)
    assert "\n" not in found


def test_all_problems_are_reported_together() -> None:
    found = message({"model.num_layer": 1, "optimizer.lr": -1, "exits.placement": "mid"})
    assert found.splitlines()[0] == "3 problems"
    for name in ("model.num_layer:", "optimizer.lr:", "exits.placement:"):
        assert f"\n  {name}" in found
    both = message({"parallel.pipeline": 3, "training.micro_batch_size": 3})
    assert both.splitlines()[0] == "2 problems"


def test_a_model_needs_sizes() -> None:
    with pytest.raises(ConfigError, match="model.num_layers, model.hidden_size, model.num_heads"):
        load_config()
    with pytest.raises(ConfigError, match="^model.num_heads: not given; give a number, or .*shape"):
        load_config(overrides={"model": {"num_layers": 2, "hidden_size": 32, "vocab_size": 64}})


def test_the_constructor_reports_like_the_loader() -> None:
    with pytest.raises(ConfigError, match=r"^exits.boundaries = \[9\]: boundary 9 is outside 1..7"):
        Config(model={"shape": "llama-tiny"}, exits={"boundaries": [9]})  # type: ignore[arg-type]


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "run.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_problems_in_a_file_name_it(tmp_path: Path) -> None:
    path = write(tmp_path, '[model]\nshape = "llama-tiny"\nnum_layrs = 3\n')
    assert message({}, path) == (
        f"{path}: model.num_layrs: no such option; did you mean model.num_layers?"
    )


def test_an_empty_file_says_what_a_model_needs(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    assert re.match(rf"{re.escape(str(path))}: model.num_layers, .* not given", message({}, path))


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    missing = message({}, path.with_name("runn.toml"))
    assert missing == f"{tmp_path}/runn.toml: no such configuration file; did you mean {path}?"
    assert message({}, tmp_path) == f"{tmp_path}: is a directory; give a TOML file in it"
    assert "not UTF-8 at byte 3" in message({}, write(tmp_path, b"# \xc3\n\xff"[0:2] + b"a\xff"))
    found = message({}, write(tmp_path, "[model]\nshape = llama-tiny\n"))
    assert re.match(r".*run\.toml: not TOML: .*line 2.*; strings need quotes", found)
