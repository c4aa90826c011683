"""Error messages for mistakes in a configuration: option, value and remedy."""

import re
from pathlib import Path

import pytest

from ee_llm.config import Config, load_config
from ee_llm.errors import ConfigError
from tests.unit.refusals import message


@pytest.mark.parametrize(
    ("name", "suggestion"),
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
def test_unknown_options_suggest_the_closest_name(name: str, suggestion: str) -> None:
    error = message({name: 1})
    path = name if name.partition(".")[0] not in ("modle", "optimiser") else name.partition(".")[0]
    assert error.startswith(f"{path}: no such option. Did you mean {suggestion}")
    assert re.search(rf"\b{re.escape(suggestion)}\b( or .*)?\?$", error)


def test_unknown_option_without_similar_names_lists_all_names() -> None:
    assert message({"logging.xyzzy": 1}) == (
        "logging.xyzzy: no such option. The options of logging are interval, tensorboard, "
        "trace_steps, wandb_mode, wandb_project."
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
            "al",
            'exits.boundaries: must be all or a list such as [2, 4], got "al"',
        ),
        (
            "exits.boundaries",
            [1, "b"],
            'exits.boundaries: must be an integer such as 8, got "b" (item 2)',
        ),
        (
            "exits.head",
            ["nrm"],
            "exits.head: must be one of 'block', 'mlp', 'translator' or 'norm', got \"nrm\"",
        ),
        ("model.family", "bert", "model.family: must be one of 'llama' or 'gpt', got \"bert\""),
        ("data.split", (1.0,), "data.split: too few values, got [1.0]"),
        ("parallel", 2, "parallel: must be a table of options, got 2"),
        ("output", "", "output: "),
        (
            "model.shape",
            "llama-8B",
            "model.shape = 'llama-8B' does not exist. Choose one of llama-",
        ),
    ],
)
def test_values_of_the_wrong_kind(name: str, value: object, expected: str) -> None:
    error = message({name: value})
    assert error.startswith(expected)
    assert "\n" not in error


def test_all_problems_are_reported_together() -> None:
    error = message({"model.num_layer": 1, "optimizer.lr": -1, "exits.placement": "mid"})
    assert error.splitlines()[0] == "3 problems"
    for name in ("model.num_layer:", "optimizer.lr:", "exits.placement:"):
        assert f"\n  {name}" in error
    both = message({"parallel.pipeline": 3, "training.micro_batch_size": 3})
    assert both.splitlines()[0] == "2 problems"


def test_model_sizes_are_required() -> None:
    with pytest.raises(ConfigError, match="model.num_layers, model.hidden_size, model.num_heads"):
        load_config()
    with pytest.raises(ConfigError, match=r"^model.num_heads: missing.*model\.shape"):
        load_config(overrides={"model": {"num_layers": 2, "hidden_size": 32, "vocab_size": 64}})


def test_the_constructor_reports_like_the_loader() -> None:
    with pytest.raises(ConfigError, match=r"^exits.boundaries = \[9\]: boundary 9 is outside 1..7"):
        Config(model={"shape": "llama-tiny"}, exits={"boundaries": [9]})  # type: ignore[arg-type]


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "run.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_errors_in_a_file_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, '[model]\nshape = "llama-tiny"\nnum_layrs = 3\n')
    assert message({}, path) == (
        f"{path}: model.num_layrs: no such option. Did you mean model.num_layers?"
    )


def test_empty_file_names_the_required_options(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    assert re.match(rf"{re.escape(str(path))}: model.num_layers, .* missing", message({}, path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    missing = message({}, path.with_name("runn.toml"))
    assert missing == f"{tmp_path}/runn.toml: no such configuration file. Did you mean {path}?"
    assert message({}, tmp_path) == f"{tmp_path} is a directory. Give a TOML file in it."
    assert "not UTF-8 at byte 3" in message({}, write(tmp_path, b"# \xc3\n\xff"[0:2] + b"a\xff"))
    error = message({}, write(tmp_path, "[model]\nshape = llama-tiny\n"))
    assert re.match(r".*run\.toml is not valid TOML: .*line 2.*\. Strings need quotes", error)
