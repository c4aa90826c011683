"""Test starting ranks on this machine, and the single error message if they fail."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ee_llm

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[3]


def run_ranks(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from ee_llm.launch.local import launch; launch(2, sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_every_rank_runs_the_command() -> None:
    done = run_ranks("--version")
    assert done.returncode == 0
    # The ranks' output is unbuffered, so both texts may come before either line end.
    assert done.stdout.replace("\n", "") == f"ee-llm {ee_llm.__version__}" * 2


def test_error_of_every_rank_is_printed_once() -> None:
    """N copies of an error, each with the launcher's own report, would hide the useful line."""
    done = run_ranks("data", "stats", "--prefix", "/nowhere/corpus")
    assert done.returncode == 2
    assert done.stderr.startswith("ee-llm: ")
    assert done.stderr.count("\n") == 1
    assert "/nowhere/corpus" in done.stderr


def test_error_with_a_name_that_is_not_utf8_is_printed() -> None:
    done = run_ranks("data", "stats", "--prefix", os.fsdecode(b"/nowhere/\xff"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "/nowhere/\\udcff" in done.stderr


def test_interrupt_during_imports_shows_no_traceback(tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'ee_llm.cli.main' and 'EE_LLM_LAUNCHED' in os.environ:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    done = run_ranks("--version", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 128 + signal.SIGINT
    assert re.fullmatch(r"ee-llm: rank [01] was killed by SIGINT\n", done.stderr)


def test_rank_without_a_report_is_named_with_its_status() -> None:
    """A traceback goes to standard error, not to the launcher."""
    done = run_ranks("data", "stats", "--prefix", "/nowhere/corpus", EE_LLM_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"ee-llm: rank [01] exited with status 1.*", last)


def test_killed_rank_is_named_even_if_another_fails_because_of_it(tmp_path: Path) -> None:
    """Rank 0 reports that it lost rank 1, and both have ended when the launcher polls."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ.get('RANK') == '0':\n"
        "    from ee_llm.launch.rank import report\n"
        "    report('rank 0 lost contact with rank 1')\n"
        "    os._exit(1)\n"
        "from ee_llm.launch import local\n"
        "local._POLL_S = 3.0\n"
    )
    done = run_ranks("--version", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr.startswith("ee-llm: rank 1 was killed by SIGKILL")


def test_interrupt_of_one_rank_names_that_rank(tmp_path: Path) -> None:
    """An interrupted rank reports nothing: usually the launcher is interrupted too."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "if 'RANK' in os.environ:\n"
        "    from ee_llm.cli import main\n"
        "    def interrupt(_):\n"
        "        if os.environ['RANK'] == '1':\n"
        "            raise KeyboardInterrupt\n"
        "        time.sleep(600)\n"
        "    main.COMMANDS['fail'] = main.Command('', interrupt)\n"
        "from ee_llm.launch import local\n"
        "local._GRACE_S = 0.1\n"
    )
    done = run_ranks("fail", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.startswith("ee-llm: rank 1 was killed by SIGINT. Rank 0 did not end")


def test_rank_that_does_not_end_is_named(tmp_path: Path) -> None:
    """The message starts with the first failure and does not blame the machine for the hang."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "if os.environ.get('RANK') == '1':\n"
        "    time.sleep(600)\n"
        "from ee_llm.launch import local\n"
        "local._GRACE_S = 0.5\n"
    )
    done = run_ranks(
        "data", "stats", "--prefix", "/nowhere/corpus", PYTHONPATH=f"{tmp_path}:{ROOT}"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ee-llm: data /nowhere/corpus")
    assert done.stderr.endswith(". Rank 1 did not end within 0.5 s and was killed\n")


def test_long_report_does_not_block_the_rank(tmp_path: Path) -> None:
    """An unread pipe takes 64 KiB, and a control character is six bytes of JSON."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if 'RANK' in os.environ:\n"
        "    from ee_llm.launch.rank import report\n"
        "    report('wrong: ' + 100_000 * chr(1))\n"
        "    os._exit(2)\n"
    )
    done = run_ranks("--version", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 2
    assert done.stderr.startswith("ee-llm: wrong: \x01\x01")


def test_ranks_have_the_import_path_of_the_launcher(tmp_path: Path) -> None:
    """A folder in the working directory does not shadow a library."""
    (tmp_path / "tyro").mkdir()
    (tmp_path / "tyro" / "__init__.py").write_text("raise SystemExit('imported tyro here')")
    code = "import sys; from ee_llm.launch.local import launch; launch(2, sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "data", "stats", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ee-llm data stats") == 2


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, "SIGKILL. The machine may be out of memory"),
        (signal.SIGRTMIN + 3, f"signal {signal.SIGRTMIN + 3}"),  # has no name
    ],
)
def test_killed_rank_is_named_with_its_signal(tmp_path: Path, number: int, expected: str) -> None:
    """A machine that is out of memory sends SIGKILL."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif os.environ.get('RANK') == '1':\n    os.kill(os.getpid(), {int(number)})\n"
    )
    done = run_ranks("--version", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 128 + number
    assert done.stderr.splitlines()[-1] == f"ee-llm: rank 1 was killed by {expected}"
    assert done.stderr.count("\n") == 1
