"""A failed save on one rank fails soon on all ranks and keeps the previous checkpoint."""

import contextlib
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch

from ee_llm import distributed
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import CheckpointError
from tests.distributed.harness import run_ranks
from tests.distributed.toy_run import Run

distributed.enable_megatron()
from megatron.core.dist_checkpointing.strategies import filesystem_async


def _no_process_left(output):
    run = Run(output, (1, 1))
    sys.modules["psutil"] = None
    filesystem_async.HAVE_PSUTIL = False
    start = time.monotonic()
    run.save(1)
    assert time.monotonic() - start < 10
    assert multiprocessing.active_children() == []
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    ).stdout
    assert [line for line in children.splitlines() if "ps -o" not in line] == []


def test_saving_starts_no_process_and_needs_no_psutil(tmp_path):
    """megatron-core's own writer starts a manager process, and hangs without psutil."""
    run_ranks(1, _no_process_left, tmp_path, timeout_s=30)


def _expect_failure(run, step, match):
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=match):
        run.save(step)
    assert time.monotonic() - start < 10, "the ranks waited for each other"
    checkpoints = run.config.output + "/checkpoints"
    distributed.synchronize()
    torch.distributed.barrier()  # rank 0 cleans up after it has notified the others
    assert sorted(os.listdir(checkpoints)) == ["latest", "step-00000001"]
    assert directory.find_latest(run.config.output).name == "step-00000001"
    run.load()


def _disk_full(output, failing_rank, limit):
    run = Run(output, (1, 2))
    run.save(1)
    rank = run.grid.rank
    if rank == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    _expect_failure(run, 2, r"cannot save .*step-00000002: .*(large|Errno 27|fail)")
    if rank == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert run.save(2).name == "step-00000002"


@pytest.mark.parametrize(
    ("failing_rank", "limit"), [(0, 100), (0, 1200), (0, 20_000), (1, 100), (1, 9_000)]
)
def test_disk_full_while_saving(tmp_path, failing_rank, limit):
    """Covers the start of the header to the end of the tensors, on either rank."""
    run_ranks(2, _disk_full, tmp_path, failing_rank, limit)


def _full_file_system(output):
    run = Run(output, (1, 2))
    run.save(1)
    if run.grid.rank == 0:
        filler = f"{output}/filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
    torch.distributed.barrier()
    _expect_failure(run, 2, r"cannot save .*step-00000002: .* \(\d\.\d MiB are free there\)")
    torch.distributed.barrier()
    if run.grid.rank == 0:
        os.unlink(filler)
    torch.distributed.barrier()
    run.save(2)


def test_full_file_system(tmp_path):
    """A real full file system, if the test may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        run_ranks(2, _full_file_system, tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _broken_stage(output):
    run = Run(output, (1, 2))
    run.save(1)
    if run.grid.rank == 1:
        working = run.toy.sharded_state_dict

        def broken(**options):
            run.toy.sharded_state_dict = working
            raise RuntimeError("planted")

        run.toy.sharded_state_dict = broken
    _expect_failure(run, 2, "RuntimeError: planted")


def test_error_on_one_rank_is_raised_on_all(tmp_path):
    run_ranks(2, _broken_stage, tmp_path)


def _dead_rank(output):
    run = Run(output, (1, 2))
    run.save(1)
    if run.grid.rank == 1:
        torch.distributed.destroy_process_group()  # closes its connections, as its death would
        return None
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        run.save(2)
    return time.monotonic() - start, directory.find_latest(output).name


def test_dead_rank_ends_the_wait(tmp_path):
    [survivor, _] = run_ranks(2, _dead_rank, tmp_path)
    assert survivor[0] < 25
    assert survivor[1] == "step-00000001"
