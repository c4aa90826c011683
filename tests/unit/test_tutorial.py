"""Test that the Python tutorial runs as written on a CPU."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "python-api.md"


def script(page: str) -> str:
    """Return a program with the code blocks of the page; commands run as subprocesses."""
    parts = ["import subprocess"]
    for language, code in re.findall(
        r"^```(bash|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE
    ):
        if language == "bash":
            commands = [shlex.split(line) for line in code.splitlines()]
            code = "\n".join(f"subprocess.run({command!r}, check=True)" for command in commands)
        parts.append(code)
    return "\n".join(parts)


def test_code_blocks_run_in_order(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    (tmp_path / "tutorial.py").write_text(script(PAGE.read_text()))
    done = subprocess.run(
        [sys.executable, "tutorial.py"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "drafts accepted" in done.stdout
    assert "training.step" in done.stdout
