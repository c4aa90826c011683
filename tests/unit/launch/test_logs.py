"""Test the log lines that the command line prints."""

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.thorough

CONFIGURED = """
import logging
from ee_llm.launch.logs import configure_logging
configure_logging()
configure_logging()
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CONFIGURED + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr


CODE = f"""
logger = logging.getLogger("ee_llm.training.trainer")
logger.debug("hidden")
logger.info("step %d is saved in %s", 3, "run/[red]:x:")
logger.warning("a long line {"word " * 30}")
logger.error("failed")
logging.getLogger("other").info("hidden")
"""


def test_messages_are_plain_lines_and_warnings_have_a_prefix() -> None:
    """A path with brackets is not markup, and a file gets long lines unwrapped."""
    assert run(CODE) == (
        f"step 3 is saved in run/[red]:x:\nwarning: a long line {'word ' * 30}\nerror: failed\n"
    )


def test_only_rank_zero_prints() -> None:
    assert run(CODE, RANK="1") == ""


def test_root_handlers_do_not_repeat_messages() -> None:
    assert run("logging.basicConfig()\nlogging.getLogger('ee_llm').info('once')") == "once\n"


def test_importing_the_package_configures_no_logging() -> None:
    code = "import logging, ee_llm.distributed; print(logging.getLogger('ee_llm').handlers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
