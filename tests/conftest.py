"""Settings that must stand before torch starts its threads."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ranks are forked, which CUDA does not survive, and there are more ranks than most machines have
# GPUs: the tests compute on the CPU everywhere, but those of a run for the GPU alone.
if os.environ.get("EE_LLM_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

torch.set_num_threads(1)

from hypothesis import settings

# A busy machine is no mistake of the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
