"""The command line: dispatch, help, overrides, and what mistakes are answered with."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tyro

import ee_llm
from ee_llm import cli, launch
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
    """The configurations that reach training, which is recorded instead of being run."""
    configs: list[Config] = []
    module = types.ModuleType("ee_llm.training.trainer")
    module.train = configs.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ee_llm.training.trainer", module)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return configs


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ee_llm.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(cli.__file__).parents[1],
        env={**os.environ, **environment},
    )


def test_help_lists_every_command_and_imports_nothing_slow() -> None:
    """Help that takes the seconds of torch's import is not asked for twice."""
    code = (
        "import sys; from ee_llm import cli; status = cli.main(['--help']); "
        "print(sorted({'torch', 'megatron', 'numpy', 'pydantic'} & set(sys.modules)), status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    *text, last = done.stdout.splitlines()
    assert last == "[] 0"
    for name, command in cli.COMMANDS.items():
        assert any(line.split("  ")[1:2] == [name] and command.summary in line for line in text)


def test_help_on_training_imports_no_torch() -> None:
    code = (
        "import sys; from ee_llm import cli\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit as done: print('torch' in sys.modules, done.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "False 0"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([*command.split(), "--help"])
    assert done.value.code == 0
    assert f"ee-llm {command}" in capsys.readouterr().out


def test_help_on_training_shows_meaning_and_default_of_every_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for name in set(option_names()) - set(section_types()):
        section, _, leaf = name.rpartition(".")
        field = (section_types()[section] if section else Config).model_fields[leaf]
        assert f"--{name}" in text
        assert field.description
        assert field.description in text
    assert "(default: 0.0003)" in text


@pytest.mark.parametrize("arguments", [["data"], ["data", "--help"], ["data", "-h"]])
def test_help_on_a_group_of_commands(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "data prepare" in text
    assert "generate" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ee-llm {ee_llm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "no such command: 'trian'; did you mean 'train'?"),
        (["data", "prepar"], "no such command: 'data prepar'; did you mean 'data prepare'?"),
        (["xyzzy"], "no such command: 'xyzzy'; 'ee-llm --help' lists the commands"),
    ],
)
def test_unknown_commands(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"ee-llm: {expected}\n"


def test_options_given_override_the_file_and_no_others_do(
    tiny: Path, trained: list[Config]
) -> None:
    """A default that is taken for an option would put the file's values back to defaults."""
    assert cli.main(["train", "--config", str(tiny)]) == 0
    assert trained.pop() == load_config(tiny)
    arguments = ["--training.steps", "9", "--exits.boundaries", "1", "2", "--exits.no_deferred"]
    assert cli.main(["train", "--config", str(tiny), *arguments]) == 0
    changed = {"training.steps": 9, "exits.boundaries": (1, 2), "exits.deferred": False}
    assert trained.pop() == load_config(tiny, changed)


def test_training_needs_no_file(trained: list[Config]) -> None:
    options = {"model.shape": "llama-tiny", "data.prefixes": ("a", "b"), "output": "runs/q"}
    arguments = ["--model.shape", "llama-tiny", "--data.prefixes", "a", "b", "--output", "runs/q"]
    assert cli.main(["train", *arguments]) == 0
    assert trained == [load_config(overrides=options)]


def test_every_option_can_be_given() -> None:
    """Every field, with a value of its type, arrives as that value and under its name."""
    config = load_config(
        overrides={
            "model.shape": "llama-tiny",
            "exits.boundaries": (2, 4),
            "data.prefixes": ("a", "b"),
            "data.weights": (0.5, 1.5),
            "parallel.layer_split": (8,),
            "logging.wandb_project": "p",
            "exits.head": ("block", "norm"),
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
    given = tyro.cli(cli.train_options(), args=arguments, use_underscores=True)
    assert given == expected
    assert load_config(overrides=given) == config


def test_an_unknown_option_gets_the_nearest_valid_one(
    tiny: Path, trained: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["train", "--config", str(tiny), "--model.num_layer", "3"])
    assert done.value.code == 2
    assert "--model.num_layers" in capsys.readouterr().err
    assert not trained


MISTAKES = {
    "no such file": (["--config", "nope.toml"], "nope.toml: no such configuration file"),
    "cross-field": (
        ["--parallel.pipeline", "3"],
        "model.num_layers = 4 is not divisible by parallel.pipeline = 3",
    ),
    "no data": (["--data.prefixes"], "data.prefixes = [] names nothing to train on"),
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
    "no processes": (["--nproc", "0"], "--nproc = 0: give 1 or more"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(
    case: str, tiny: Path, trained: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    """And they end the command before any process is started."""
    arguments, expected = MISTAKES[case]
    config = [] if "--config" in arguments else ["--config", str(tiny)]
    assert cli.main(["train", *config, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("ee-llm: ")
    first, _, second = expected.partition(".*")
    assert first in err
    assert second.strip() in err
    assert not trained


@pytest.mark.parametrize("value", ["", "two", "0", "-1"])
def test_a_world_size_that_is_none(
    value: str,
    tiny: Path,
    trained: list[Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert cli.main(["train", "--config", str(tiny)]) == 2
    assert f"WORLD_SIZE = {value!r} in the environment is no number" in capsys.readouterr().err
    assert not trained


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_mistake_found_by_a_worker_is_one_line(workers: str, tmp_path: Path) -> None:
    """An error that comes out of a pool of processes has the pool's frames in its traceback."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"txt": "?"}\n')
    output = ["--output", str(tmp_path / "out")]
    done = run("data", "prepare", "--inputs", str(path), *output, "--workers", workers)
    assert (done.returncode, done.stdout) == (2, "")
    keys = "no key 'text' (keys: 'txt'); name the right one with key"
    assert done.stderr == f"ee-llm: {path}, line 2: {keys}\n"


def test_processes_are_started_once(
    tiny: Path,
    trained: list[Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--nproc under torchrun would start N processes in each of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "--config", str(tiny), "--nproc", "2"]) == 2
    assert "already started 2 processes; leave --nproc out" in capsys.readouterr().err
    assert cli.main(["train", "--config", str(tiny), "--parallel.pipeline", "2"]) == 0
    assert len(trained) == 1


def test_debugging_shows_where_a_mistake_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EE_LLM_DEBUG", "1")
    with pytest.raises(ValueError, match="no such command"):
        cli.main(["xyzzy"])


@pytest.mark.parametrize(
    ("error", "status"),
    [(FileNotFoundError(2, "No such file", "x.bin"), 2), (PermissionError(13, "denied", "y"), 2)],
)
def test_files_that_can_not_be_used(
    error: OSError,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: list[str]) -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("", fail))
    assert cli.main(["fail"]) == status
    assert capsys.readouterr().err == f"ee-llm: {error}\n"


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError that nobody wrote for the user is no message to the user."""

    def fail(_: list[str]) -> None:
        int("no number")

    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("", fail))
    with pytest.raises(ValueError, match="no number"):
        cli.main(["fail"])


def test_an_interrupt_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("", interrupt))
    assert cli.main(["fail"]) == 130
    assert capsys.readouterr().err == "ee-llm: interrupted\n"
    # Every rank is interrupted with its launcher, which says so for all.
    monkeypatch.setenv(launch._LAUNCHED, "1")
    assert cli.main(["fail"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_may_be_cut_short(unbuffered: str) -> None:
    """`ee-llm --help | head -n 1` ends as other programs do there: as told, and in silence."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    # Buffered, the text is written at the end of the program; unbuffered, by print.
    done = subprocess.run(
        [sys.executable, "-m", "ee_llm.cli", "--help"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--nproc", "2", "--output", "x"], ["--output", "x"]),
        (["--output", "x", "--nproc=2"], ["--output", "x"]),
        (["--output", "x", "--nproc"], ["--output", "x"]),
        (["--output", "nproc"], ["--output", "nproc"]),
    ],
)
def test_ranks_are_started_without_the_option_that_starts_them(
    arguments: list[str], kept: list[str]
) -> None:
    assert cli._without_option(arguments, "--nproc") == kept


def test_ranks_get_the_other_options(
    tiny: Path, trained: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    monkeypatch.setattr(cli, "launch", lambda *call: launched.append(call))
    options = ["--config", str(tiny), "--parallel.pipeline", "2"]
    assert cli.main(["train", *options, "--nproc", "4"]) == 0
    assert launched == [(4, ["train", *options])]
    assert not trained


def run_ranks(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from ee_llm.launch import launch; launch(2, sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


def test_ranks_run_the_command() -> None:
    done = run_ranks("--version")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"ee-llm {ee_llm.__version__}"] * 2


def test_a_mistake_found_in_every_rank_is_told_once() -> None:
    """N ranks that say the same, and a launcher's page about each, hide the one line that helps."""
    done = run_ranks("data", "stats", "--prefix", "/nowhere/corpus")
    assert done.returncode == 2
    assert done.stderr.startswith("ee-llm: ")
    assert done.stderr.count("\n") == 1
    assert "/nowhere/corpus" in done.stderr


def test_the_command_runs_as_a_process() -> None:
    done = run("train", "--config", "nope.toml", WORLD_SIZE="1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
