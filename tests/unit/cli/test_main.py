"""Test the dispatch of commands, their help and the reports of errors."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ee_llm
from ee_llm.cli import main
from ee_llm.config import Config, option_names, section_types
from ee_llm.errors import RequestError, RunError
from ee_llm.launch import rank
from ee_llm.pipeline.runtime import PipelineError


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ee_llm", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(main.__file__).parents[2],
        env={**os.environ, **environment},
    )


def test_help_lists_every_command_without_slow_imports() -> None:
    """Importing torch would make help slow."""
    code = (
        "import sys; from ee_llm.cli import main; status = main.main(['--help']); "
        "print(sorted({'torch', 'megatron', 'numpy', 'pydantic'} & set(sys.modules)), status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    *text, last = done.stdout.splitlines()
    assert last == "[] 0"
    for name, command in main.COMMANDS.items():
        assert any(line.split("  ")[1:2] == [name] and command.summary in line for line in text)


def test_help_of_training_does_not_import_torch() -> None:
    code = (
        "import sys; from ee_llm.cli import main\n"
        "try: main.main(['train', '--help'])\n"
        "except SystemExit as done: print('torch' in sys.modules, done.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "False 0"


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main.main([*command.split(), "--help"])
    assert done.value.code == 0
    assert f"ee-llm {command}" in capsys.readouterr().out


def test_full_help_of_training_describes_every_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main.main(["train", "--help-all"])
    text = capsys.readouterr().out
    for name in set(option_names()) - set(section_types()):
        section, _, leaf = name.rpartition(".")
        field = (section_types()[section] if section else Config).model_fields[leaf]
        if section == "tuning":  # shown by another command
            continue
        assert re.search(
            rf"--{section.replace('_', '-')}\.?(\[no-\])?{leaf.replace('_', '-')}\b", text
        )
        assert field.description
        assert " ".join(field.description.split()) in " ".join(text.split())
    assert "(default: 0.0003)" in text


@pytest.mark.parametrize("arguments", [["data"], ["data", "--help"], ["data", "-h"]])
def test_help_of_a_group_of_commands(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(arguments) == 0
    text = capsys.readouterr().out
    assert "data prepare" in text
    assert "checkpoint info" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ee-llm {ee_llm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "'trian' is not a command. Did you mean 'train'?"),
        (["data", "prepar"], "'data prepar' is not a command. Did you mean 'data prepare'?"),
        (["xyzzy"], "'xyzzy' is not a command. 'ee-llm --help' lists the commands."),
    ],
)
def test_unknown_commands(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(arguments) == 2
    assert capsys.readouterr().err == f"ee-llm: {expected}\n"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_user_error_in_a_worker_process_is_one_line(workers: str, tmp_path: Path) -> None:
    """The traceback of an error from a process pool has frames of the pool."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"txt": "?"}\n')
    output = ["--output", str(tmp_path / "out")]
    done = run("data", "prepare", "--inputs", str(path), *output, "--workers", workers)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"ee-llm: {path}, line 2: ")
    for part in ("'text'", "'txt'", "--key", "--format text"):
        assert part in done.stderr


def test_debug_variable_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EE_LLM_DEBUG", "1")
    with pytest.raises(ValueError, match="xyzzy"):
        main.main(["xyzzy"])


@pytest.mark.parametrize(
    ("error", "status"),
    [(FileNotFoundError(2, "No such file", "x.bin"), 2), (PermissionError(13, "denied", "y"), 2)],
)
def test_os_error_is_one_line(
    error: OSError,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: list[str]) -> None:
        raise error

    monkeypatch.setitem(main.COMMANDS, "fail", main.Command("", fail))
    assert main.main(["fail"]) == status
    assert capsys.readouterr().err == f"ee-llm: {error}\n"


def test_value_error_of_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of such an error is not for the user."""

    def fail(_: list[str]) -> None:
        int("no number")

    monkeypatch.setitem(main.COMMANDS, "fail", main.Command("", fail))
    with pytest.raises(ValueError, match="no number"):
        main.main(["fail"])


@pytest.mark.parametrize(("kind", "status"), [(RequestError, 2), (RunError, 1), (OSError, 2)])
def test_user_error_is_one_line(
    kind: type[Exception],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: list[str]) -> None:
        raise kind("reason")

    monkeypatch.setitem(main.COMMANDS, "fail", main.Command("", fail))
    assert main.main(["fail"]) == status
    assert capsys.readouterr().err == "ee-llm: reason\n"


@pytest.mark.parametrize("kind", [PipelineError, RuntimeError, ValueError, KeyError])
def test_defect_keeps_its_traceback(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """PipelineError is a defect too: its traceback shows the failing action of the plan."""

    def fail(_: list[str]) -> None:
        raise kind("reason")

    monkeypatch.setitem(main.COMMANDS, "fail", main.Command("", fail))
    with pytest.raises(kind, match="reason"):
        main.main(["fail"])


def test_interrupt_has_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(main.COMMANDS, "fail", main.Command("", interrupt))
    assert main.main(["fail"]) == 130
    assert capsys.readouterr().err == "ee-llm: interrupted\n"
    # Ranks are interrupted together with their launcher, which reports it once.
    monkeypatch.setenv(rank._LAUNCHED, "1")
    monkeypatch.setattr(main.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        main.main(["fail"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_failing_rank_flushes_its_output() -> None:
    """A rank exits without Python's shutdown, which would flush the buffer of a pipe."""
    code = (
        "from ee_llm.cli import main\n"
        "def fail(_):\n"
        "    print('the result')\n"
        "    raise OSError(2, 'No such file', 'x')\n"
        "main.COMMANDS['fail'] = main.Command('', fail)\n"
        "main.main(['fail'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONUNBUFFERED": "", rank._LAUNCHED: f"{os.getpid()} -1"},
    )
    assert (done.returncode, done.stdout) == (2, "the result\n")
    assert "No such file" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_output_ends_the_command_silently(unbuffered: str) -> None:
    """`ee-llm --help | head -n 1` exits with the status of SIGPIPE, as other programs do."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    # Buffered text is written at exit, unbuffered text by print.
    done = subprocess.run(
        [sys.executable, "-m", "ee_llm", "--help"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_command_in_a_process() -> None:
    done = run("train", "--config", "nope.toml", WORLD_SIZE="1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_exit_by_rich_on_closed_output_becomes_sigpipe(monkeypatch):
    """rich exits with status 1 when its output is closed; shells expect the status of SIGPIPE."""

    def write_to_closed_output(arguments):
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904  (as rich does)

    monkeypatch.setattr(main, "_dispatch", write_to_closed_output)
    assert main.main([]) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(("module", "status"), [("ee_llm", 0), ("ee_llm.cli.main", 1)])
def test_python_m_runs_the_package(module: str, status: int, tmp_path: Path) -> None:
    """A file in the working directory does not replace a library of the same name.

    Running the module that only dispatches is an error: it would do nothing.
    """
    (tmp_path / "difflib.py").write_text("raise SystemExit(5)")
    root = Path(main.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path if module == "ee_llm" else root,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": ""},
    )
    assert done.returncode == status
    assert done.stdout == (f"ee-llm {ee_llm.__version__}\n" if status == 0 else "")
    assert ("python -m ee_llm" in done.stderr) == (status != 0)
