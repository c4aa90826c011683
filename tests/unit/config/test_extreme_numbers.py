"""Every numeric option of every command with extreme values."""

import contextlib
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ee_llm.cli import main, run_options, train, tune
from ee_llm.cli.checkpoint import add_exits
from ee_llm.cli.checkpoint import options as edit
from ee_llm.cli.plan_options import PlanOptions
from ee_llm.config import section_types
from ee_llm.conversion.options import ConvertOptions
from ee_llm.data.prepare import PrepareOptions
from ee_llm.data.tokenization.train_tokenizer import TrainTokenizerOptions
from ee_llm.errors import ConfigError
from tests.unit.checkpoint.surgery.sources import HEADS, save, tiny

pytestmark = pytest.mark.thorough

EXTREMES = ("0", "-1", "2147483648", "9223372036854775808", "18446744073709551615")
EXTREMES += ("1e10", "1e308", "1e-308", "inf", "-inf", "nan")

# Required arguments of each command; RUN is a run directory, TEXT a text file.
COMMANDS: dict[str, tuple[Any, str]] = {
    "plan": (PlanOptions, "--stages 2 --microbatches 4 --layers 4 --exits 2 --fill auto"),
    "data prepare": (PrepareOptions, "--inputs TEXT --output OUT"),
    "data train-tokenizer": (
        TrainTokenizerOptions,
        "--inputs TEXT --output OUT.model --vocab-size 275",
    ),
    "convert": (ConvertOptions, "RUN --to hf --output OUT"),
    "checkpoint reshard": (edit.ReshardOptions, "RUN --output OUT"),
    "checkpoint add-exits": (
        edit.AddExitsOptions,
        "RUN --output OUT --exits 3 --initialization class-aware --data DATA",
    ),
    "checkpoint remove-exits": (edit.RemoveExitsOptions, "RUN --output OUT --exits 2"),
    "checkpoint average": (edit.AverageOptions, "RUN OTHER --output OUT"),
}


def numeric_options(kinds: Mapping[str, Any]) -> Iterator[str]:
    for name, annotation in kinds.items():
        parts = [annotation]
        for part in parts:
            parts += [argument for argument in typing.get_args(part) if argument is not ...]
        if {int, float} & {part for part in parts if isinstance(part, type)}:
            yield name


# Options that allow any positive number, or nearly the largest float32.
UNBOUNDED = ("data.weights", "optimizer.clip_grad", "model.rope_theta")
CASES = [
    (name, option)
    for name, (kind, _) in COMMANDS.items()
    for option in numeric_options(typing.get_type_hints(kind))
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("extremes")
    text, data = folder / "text.txt", folder / "data"
    text.write_text("a short text of a few words, repeated. " * 20)
    for name in ("run", "other"):
        save(folder / name, tiny(**HEADS["own outputs"]))
    arguments = ["data", "prepare", "--inputs", str(text), "--output", str(data)]
    assert main.main(arguments) == 0
    return {"RUN": folder / "run", "OTHER": folder / "other", "TEXT": text, "DATA": data}


def test_all_numeric_options_are_found() -> None:
    """The tests below cover only the options that this search finds."""
    assert {"training.seed", "data.split", "parallel.fill_warmup"} <= set(config_options())
    assert len(config_options()) > 50
    expected = {("plan", "memory_limit"), ("plan", "fill"), ("convert", "max_shard_gb")}
    assert expected | {("checkpoint average", "last"), ("data prepare", "workers")} <= set(CASES)


@pytest.mark.parametrize(("name", "option"), CASES)
def test_extreme_numbers_work_or_give_a_one_line_error(
    name: str,
    option: str,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A command accepts an extreme number or rejects it with a one-line error."""
    trainer = types.ModuleType("ee_llm.training.trainer")
    trainer.train = lambda config: config.to_toml()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ee_llm.training.trainer", trainer)
    for module in (add_exits, run_options):
        monkeypatch.setattr(module, "launch", lambda *call: None)
    for number, value in enumerate([None, *EXTREMES]):
        output = {"OUT": tmp_path / str(number), "OUT.model": tmp_path / f"{number}.model"}
        places = {key: str(path) for key, path in {**files, **output}.items()}
        arguments = [places.get(word, word) for word in COMMANDS[name][1].split()]
        given = [] if value is None else [f"--{option}={value}"]
        status, err = run([*name.split(), *arguments, *given], capsys)
        if value is None:
            assert status == 0, err
        elif status:
            assert status == 2
            assert err.startswith("ee-llm: ") or f"--{option.replace('_', '-')}" in err
            assert "Traceback" not in err


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        status = main.main(arguments)
    except SystemExit as stop:  # The argument parser rejects values that are not integers.
        status = int(str(stop.code))
    return status, capsys.readouterr().err.replace("_", "-")


def config_options() -> list[str]:
    """Return the dotted names of the numeric options of the configuration."""
    kinds = {option.name: option.annotation for option in run_options.config_options()}
    return list(numeric_options(kinds))


@pytest.mark.parametrize("name", ["train", "tune"])
@pytest.mark.parametrize("option", config_options())
def test_extreme_numbers_in_a_configuration(
    name: str, option: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extreme number passes all checks and can be saved, or raises ConfigError.

    A seed of 2^64 - 1 or a time-out of 1e10 seconds used to end in a traceback. The test bypasses
    the argument parser, which takes ten times as long as all checks.
    """
    run_directory = str(files["RUN"])
    base: dict[str, Any] = {"model.shape": "llama-tiny", "exits.boundaries": (2, 4)}
    if name == "tune":
        base = {"tuning.checkpoint": run_directory}
    base["data.prefixes"] = ("x",)
    trained: list[str] = []
    trainer = types.ModuleType("ee_llm.training.trainer")
    trainer.train = lambda config: trained.append(config.to_toml())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ee_llm.training.trainer", trainer)
    module: Any = {"train": train, "tune": tune}[name]
    start = getattr(module, f"run_{name}")

    def attempt(more: dict[str, Any]) -> None:
        options = run_options.RunOptions(None, None, base | more)
        monkeypatch.setattr(module, "parse_run", lambda *call: options)
        start([])

    attempt({})
    assert len(trained) == 1
    section, leaf = option.split(".")
    kind = section_types()[section].model_fields[leaf].annotation
    for text in EXTREMES:
        value = int(text) if text.lstrip("-").isdecimal() else float(text)
        for given in (value, float(value)):
            if typing.get_origin(kind) is tuple:
                is_open = typing.get_args(kind)[-1] is ...
                attempted: Any = (given,) if is_open else (given,) * 3
            else:
                attempted = given
            with contextlib.suppress(ConfigError):
                attempt({option: attempted})
                # Accepted values must work, which is only known for numbers of this size.
                assert abs(given) < 2**63 or option in UNBOUNDED, f"{option} has no bound"
