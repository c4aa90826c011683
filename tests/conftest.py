"""Settings that must stand before torch starts its threads."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ranks are forked, which CUDA does not survive, and there are more ranks than most machines have
# GPUs: the tests compute on the CPU everywhere, but those of a run for the GPU alone.
if os.environ.get("EE_LLM_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from typing import Any

import torch
import torch.distributed as dist

torch.set_num_threads(1)

from hypothesis import settings

# A busy machine is no mistake of the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def _refuse_groups_here() -> None:
    """Process groups start threads that no fork of this process would have, and wait for: hangs."""
    here, form = os.getpid(), dist.init_process_group

    def init_process_group(*arguments: Any, **options: Any) -> None:
        assert os.getpid() != here, "form process groups in a rank of tests.distributed.harness"
        form(*arguments, **options)

    dist.init_process_group = init_process_group


if os.environ.get("EE_LLM_TEST_GPU") != "1":
    _refuse_groups_here()
