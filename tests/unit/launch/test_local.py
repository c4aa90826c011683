"""Ranks on this machine: what they run, and the one account of what went wrong."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ee_llm

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


def test_ranks_run_the_command() -> None:
    done = run_ranks("--version")
    assert done.returncode == 0
    # Unbuffered, the ranks' line ends may come after both texts.
    assert done.stdout.replace("\n", "") == f"ee-llm {ee_llm.__version__}" * 2


def test_a_mistake_found_in_every_rank_is_told_once() -> None:
    """N ranks that say the same, and a launcher's page about each, hide the one line that helps."""
    done = run_ranks("data", "stats", "--prefix", "/nowhere/corpus")
    assert done.returncode == 2
    assert done.stderr.startswith("ee-llm: ")
    assert done.stderr.count("\n") == 1
    assert "/nowhere/corpus" in done.stderr


def test_a_mistake_with_a_name_that_is_not_utf8_is_told() -> None:
    done = run_ranks("data", "stats", "--prefix", os.fsdecode(b"/nowhere/\xff"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "/nowhere/\\udcff" in done.stderr


def test_a_rank_that_is_interrupted_while_it_imports_shows_no_traceback(tmp_path) -> None:
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
    assert re.fullmatch(r"ee-llm: rank [01] was ended by SIGINT\n", done.stderr)


def test_a_rank_that_told_nothing_is_named_with_its_status() -> None:
    """A traceback goes to standard error, not to the launcher, whose library then says <NONE>."""
    done = run_ranks("data", "stats", "--prefix", "/nowhere/corpus", EE_LLM_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"ee-llm: rank [01] ended with status 1; its output above says why", last)


def test_who_was_killed_is_named_though_another_noticed_it_first(tmp_path: Path) -> None:
    """Rank 0 says that it lost rank 1, and both have ended when the launcher looks."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ.get('RANK') == '0':\n"
        "    from ee_llm.launch.rank import report\n"
        "    report('rank 0 lost contact with rank 1')\n"
        "    os._exit(1)\n"
        "from ee_llm import launch\n"
        "launch._POLL_S = 3.0\n"
    )
    done = run_ranks("--version", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr.startswith("ee-llm: rank 1 was ended by SIGKILL")


def test_ctrl_c_to_one_rank_is_said_of_that_rank(tmp_path: Path) -> None:
    """It says nothing itself: usually the launcher is interrupted too, and speaks for all ranks."""
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
    assert done.stderr.startswith("ee-llm: rank 1 was ended by SIGINT. Rank 0 did not end")


def test_a_rank_that_does_not_end_is_named(tmp_path: Path) -> None:
    """The first failure comes first; whoever hangs is not taken for a victim of the machine."""
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


def test_a_long_report_does_not_block_the_rank(tmp_path: Path) -> None:
    """A pipe that nobody reads yet takes 64 KiB, and a control character is six bytes of JSON."""
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


def test_ranks_import_from_where_the_launcher_does(tmp_path: Path) -> None:
    """A folder in the working directory replaces no library: `ee-llm` does not look there."""
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
        (signal.SIGKILL, "SIGKILL; the machine may be out of memory"),
        (signal.SIGRTMIN + 3, f"signal {signal.SIGRTMIN + 3}"),  # has no name
    ],
)
def test_a_rank_that_was_killed_is_named_with_its_signal(
    tmp_path: Path, number: int, expected: str
) -> None:
    """As by a machine that is out of memory."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif os.environ.get('RANK') == '1':\n    os.kill(os.getpid(), {int(number)})\n"
    )
    done = run_ranks("--version", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 128 + number
    assert done.stderr.splitlines()[-1] == f"ee-llm: rank 1 was ended by {expected}"
    assert done.stderr.count("\n") == 1
