"""Test `ee-llm train`: its options, and the errors before any process is started."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ee_llm.cli import main, run_options, train
from ee_llm.cli.arguments.parsing import parse_values
from ee_llm.config import Config, load_config, option_names, section_types

TINY = """
[model]
shape = "llama-tiny"
num_layers = 4

[data]
prefixes = ["corpus"]

[training]
steps = 7
global_batch_size = 4
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Return the list of configurations that reach training, which does not run."""
    configs: list[Config] = []
    module = types.ModuleType("ee_llm.training.trainer")
    module.train = configs.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ee_llm.training.trainer", module)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return configs


def test_only_given_options_override_the_file(tiny: Path, trained: list[Config]) -> None:
    """Defaults of the command line must not replace values in the file."""
    assert main.main(["train", "--config", str(tiny)]) == 0
    assert trained.pop() == load_config(tiny)
    arguments = ["--training.steps", "9", "--exits.boundaries", "1", "2", "--exits.no_deferred"]
    assert main.main(["train", "--config", str(tiny), *arguments]) == 0
    changed = {"training.steps": 9, "exits.boundaries": (1, 2), "exits.deferred": False}
    assert trained.pop() == load_config(tiny, changed)


def test_training_without_a_file(trained: list[Config]) -> None:
    options = {"model.shape": "llama-tiny", "data.prefixes": ("a", "b"), "output": "runs/q"}
    arguments = ["--model.shape", "llama-tiny", "--data.prefixes", "a", "b", "--output", "runs/q"]
    assert main.main(["train", *arguments]) == 0
    assert trained == [load_config(overrides=options)]


def test_every_option_can_be_given() -> None:
    """Every field of the configuration is parsed to a value of its type."""
    config = load_config(
        overrides={
            "model.shape": "llama-tiny",
            "exits.boundaries": (2, 4),
            "data.prefixes": ("a", "b"),
            "data.weights": (0.5, 1.5),
            "parallel.layer_split": (8,),
            "logging.wandb_project": "p",
            "exits.head": ("block", "norm"),
            "checkpoint.initial": "runs/b",
        }
    )
    expected = config.model_dump()
    arguments = []
    for name in set(option_names()) - set(section_types()):
        section, _, leaf = name.rpartition(".")
        value: Any = expected[section][leaf] if section else expected[leaf]
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--{section}.no_{leaf}")
        elif isinstance(value, tuple):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments += [f"--{name}", str(value)]
    given = parse_values(run_options.config_options(), train.COMMAND, arguments)
    assert given == dotted(expected)
    assert load_config(overrides=given) == config


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= dotted(value, f"{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def test_error_of_unknown_option_names_the_nearest_option(
    tiny: Path, trained: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main.main(["train", "--config", str(tiny), "--model.num_layer", "3"])
    assert done.value.code == 2
    assert "--model.num-layers" in capsys.readouterr().err
    assert not trained


MISTAKES = {
    "no such file": (["--config", "nope.toml"], "nope.toml: no such configuration file"),
    "cross-field": (
        ["--parallel.pipeline", "3"],
        "model.num_layers = 4 is not divisible by parallel.pipeline = 3",
    ),
    "no data": (["--data.prefixes"], "data.prefixes = []"),
    "too few processes": (
        ["--parallel.pipeline", "2"],
        "the number of processes, 1, is not a multiple of .* --nproc 2",
    ),
    "processes that do not fit": (
        ["--parallel.pipeline", "2", "--nproc", "3"],
        "the number of processes, 3, is not a multiple of",
    ),
    "batch that does not divide": (
        ["--nproc", "8"],
        "training.global_batch_size = 4 is not divisible by .* x 8 data-parallel",
    ),
    "more filling than fits": (
        ["--parallel.pipeline", "2", "--parallel.fill_cooldown", "1", "--nproc", "2"],
        "parallel.fill_cooldown = 1: the largest useful number is 0, .*Set it to 0 or auto",
    ),
    "tuning": (
        ["--tuning.checkpoint", "runs/a", "--exits.boundaries", "2"],
        "tuning.checkpoint = runs/a is for 'ee-llm tune', .*set checkpoint.initial",
    ),
    "no processes": (["--nproc", "0"], "nproc = 0 is not .* 1 to 65,536"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_errors_are_one_line(
    case: str, tiny: Path, trained: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends before any process is started."""
    arguments, expected = MISTAKES[case]
    config = [] if "--config" in arguments else ["--config", str(tiny)]
    assert main.main(["train", *config, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("ee-llm: ")
    first, _, second = expected.partition(".*")
    assert first in err
    assert second.strip() in err
    assert not trained


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = '' in the environment is not an integer of 1 or more"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' in the environment is not an integer"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0' in the environment is not an integer"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE = '-1' in the environment is not an integer"),
        ({"RANK": None}, "WORLD_SIZE = 2 is set in the environment, but RANK is not"),
        ({"WORLD_SIZE": None}, "RANK = 1 is set in the environment, but WORLD_SIZE is not"),
        ({"RANK": "abc"}, "RANK = 'abc' in the environment is not an integer of 0 or more"),
        ({"RANK": "\u0661"}, "RANK = '\u0661' in the environment is not an integer"),
        ({"RANK": "2"}, "RANK = 2 in the environment is not less than WORLD_SIZE = 2"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK = 'x' in the environment is not an integer"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR and MASTER_PORT are not"),
    ],
)
def test_invalid_launcher_environment(
    change: dict[str, str | None],
    expected: str,
    tiny: Path,
    trained: list[Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (LAUNCHED | change).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert main.main(["train", "--config", str(tiny), "--parallel.pipeline", "2"]) == 2
    assert expected in capsys.readouterr().err
    assert not trained


def test_nproc_within_a_launcher_is_an_error(
    tiny: Path,
    trained: list[Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--nproc under torchrun would start N processes in each process."""
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert main.main(["train", "--config", str(tiny), "--nproc", "2"]) == 2
    assert "already started 2 processes (WORLD_SIZE). Leave nproc out." in capsys.readouterr().err
    assert main.main(["train", "--config", str(tiny), "--parallel.pipeline", "2"]) == 0
    assert len(trained) == 1


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--nproc", "2", "--output", "x"], ["--output", "x"]),
        (["--output", "x", "--nproc=2"], ["--output", "x"]),
        (["--output", "x", "--nproc"], ["--output", "x"]),
        (["--output", "nproc"], ["--output", "nproc"]),
    ],
)
def test_ranks_do_not_get_the_nproc_option(arguments: list[str], kept: list[str]) -> None:
    assert run_options.without_option(arguments, "--nproc") == kept


def test_ranks_get_the_other_options(
    tiny: Path, trained: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    monkeypatch.setattr(run_options, "launch", lambda *call: launched.append(call))
    options = ["--config", str(tiny), "--parallel.pipeline", "2"]
    assert main.main(["train", *options, "--nproc", "4"]) == 0
    assert launched == [(4, ["train", *options])]
    assert not trained
