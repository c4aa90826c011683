"""Run one of the other ranks of an engine, in a process that `Workers` started."""

import json
import sys

from ee_llm.distributed import RankLostError
from ee_llm.inference.llm import LLM
from ee_llm.launch.rank import report


def run_worker(arguments: str) -> None:
    """Run passes for the leader until it closes the engine; arguments: those of `LLM`, as JSON."""
    try:
        with LLM(**json.loads(arguments)) as llm:
            llm.worker_loop()
    except Exception as error:
        report(f"{type(error).__name__}: {error}")
        if isinstance(error, RankLostError):
            sys.exit(1)  # The leader has an error of its own, or has ended.
        raise
