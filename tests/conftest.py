"""Settings that must precede the start of torch's threads, and isolation between tests."""

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests compute on the CPU unless a run is for the GPU: CUDA does not survive the fork that
# starts a rank, and most machines have fewer GPUs than the tests have ranks.
if os.environ.get("EE_LLM_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from typing import Any

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)

from hypothesis import settings

# A busy machine must not fail a test.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def _refuse_groups_here() -> None:
    """Forbid process groups in this process: a forked rank would wait for their threads forever."""
    here, initialize = os.getpid(), dist.init_process_group

    def init_process_group(*arguments: Any, **options: Any) -> None:
        assert os.getpid() != here, "create process groups in a rank of tests.distributed.harness"
        initialize(*arguments, **options)

    dist.init_process_group = init_process_group


if os.environ.get("EE_LLM_TEST_GPU") != "1":
    _refuse_groups_here()


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Undo the logging configuration of a command line that runs in this process."""
    logger = logging.getLogger("ee_llm")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
