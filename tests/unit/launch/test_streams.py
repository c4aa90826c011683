"""Test standard streams that are closed, broken or limited in their encoding."""

import json
import subprocess
import sys

import pytest

PROTECTED = """
import json, os, sys
from ee_llm.launch import streams
streams.protect_streams()
"""


def run(code: str, shell: str = '"$@"', **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROTECTED + code]
    return subprocess.run(
        ["bash", "-c", shell, "bash", *command],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def test_characters_that_the_encoding_lacks_are_escaped() -> None:
    """JSON escapes do not change the meaning of a JSON record, even beyond U+FFFF."""
    text = "é\u2581\U0001f600"
    done = run(
        f"print(json.dumps({text!r}, ensure_ascii=False))\nprint({text!r}, file=sys.stderr)",
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 0
    assert json.loads(done.stdout) == text
    assert done.stderr == "\\u00e9\\u2581\\ud83d\\ude00\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_unpaired_surrogate_is_escaped(encoding: str) -> None:
    """It comes from a file name that is not UTF-8."""
    done = run("print('\\udcff', file=sys.stderr)", PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert done.stderr == "\\udcff\n"


def test_files_do_not_get_the_descriptors_of_closed_streams() -> None:
    """Otherwise a library's output to descriptor 2 would go into the file that is opened next."""
    done = run(
        "with open('/proc/self/fd/9', 'w') as file:\n"
        "    print('out'); print('err', file=sys.stderr); os.write(2, b'library')\n"
        "    print(file.fileno() > 2, sys.stdin.read() == '', file=file)\n",
        '"$@" 9>&1 <&- >&- 2>&-',
    )
    assert done.stdout == "True True\n"


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        ('"$@" 2>/dev/full', "standard error: No space left on device"),
        ('"$@" 2> >(true)', "standard error: Broken pipe"),
    ],
)
def test_broken_standard_error_is_ignored(shell: str, expected: str) -> None:
    code = (
        "import time, warnings\n"
        "while streams.stream_trouble() is None:\n"
        "    print('x' * 100000, file=sys.stderr); time.sleep(0.05)\n"
        "warnings.warn('lost'); sys.stderr.write('without an end')\n"
        "print(streams.stream_trouble())\n"
    )
    done = run(code, shell)
    assert done.returncode == 0
    assert done.stdout == f"{expected}\n"


def test_standard_output_fails_only_for_commands_that_print_a_result() -> None:
    """A lost result is an error; a command without a result does not need the stream."""
    done = run("print('a result'); sys.stdout.flush()", '"$@" >/dev/full')
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    done = run("streams.ignore_output_trouble(); print('lost')", '"$@" >/dev/full')
    assert done.returncode == 0
    assert done.stderr == ""


def test_non_blocking_streams_lose_nothing() -> None:
    """Another process on the same terminal may have made the stream non-blocking."""
    code = (
        "os.set_blocking(2, False)\nfor _ in range(50):\n    print('x' * 9999, file=sys.stderr)\n"
    )
    done = run(code, '"$@" 2> >(sleep 0.5; wc -c); wait $!')
    assert done.returncode == 0
    assert done.stdout.strip() == "500000"
