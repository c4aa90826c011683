"""Errors of training name the option or file, the value and the fix, on all ranks."""

import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ee_llm import distributed
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.lock import OutputLock
from ee_llm.data.tokenization.train_tokenizer import train_sentencepiece
from ee_llm.training.trainer import train
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    assert_equal_bits,
    inject,
    layout,
    log_of,
    make_config,
    tensors_of,
    text,
    train_here,
    train_ranks,
    training_log,
    write_corpus,
)


def refusal(world_size, config):
    """Return the one error that all ranks raise, in time."""
    start = time.monotonic()
    ends = train_ranks(world_size, config)
    assert time.monotonic() - start < 30
    messages = {end.partition("Error: ")[2] for end in ends}
    assert len(messages) == 1, ends
    return messages.pop()


# Errors before the first step.


def test_world_size_that_does_not_fit(tmp_path, corpus):
    config = make_config(tmp_path, corpus, **layout(1, 2))
    message = refusal(3, config)
    assert "world size 3 is not a multiple of parallel.tensor 1 x parallel.pipeline 2" in message
    assert "--nproc 2" in message


def test_world_size_that_does_not_fit_under_a_launcher(tmp_path, corpus):
    """A wrong start by torchrun is an error at once, without waiting for other ranks."""
    path = tmp_path / "train.toml"
    path.write_text(make_config(tmp_path, corpus, **layout(1, 2)).to_toml())
    environment = {**os.environ, "WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", "ee_llm", "train", "--config", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment, "MASTER_PORT": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ee-llm: the number of processes, 3, is not a multiple of")
    assert done.stderr.count("\n") == 1


def test_missing_data(tmp_path, corpus):
    config = make_config(tmp_path, str(tmp_path / "nowhere"), **layout(1, 2))
    message = refusal(2, config)
    assert f"{tmp_path}/nowhere.bin" in message or f"{tmp_path}/nowhere.idx" in message


def test_validation_part_without_documents(tmp_path):
    prefix = write_corpus(tmp_path / "one", num_documents=1)
    message = refusal(1, make_config(tmp_path / "run", prefix))
    assert "data.split = [0.9, 0.1, 0.0] has 2 splits, but there are only 1 document(s)" in message
    [end] = train_ranks(1, make_config(tmp_path / "run", prefix, **{"data.split": (1.0, 0.0, 0.0)}))
    assert end.endswith("step-00000005")


def test_vocabulary_smaller_than_the_tokenizers(tmp_path, corpus):
    message = refusal(2, make_config(tmp_path, corpus, **layout(1, 2), **{"model.vocab_size": 200}))
    assert "model.vocab_size = 200 is smaller than the vocabulary of data.tokenizer" in message
    assert "257" in message


def test_output_that_is_a_file(tmp_path, corpus):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        message = refusal(2, make_config(output, corpus, **layout(1, 2)))
        assert f"output: the directory {str(output)!r} cannot be written to" in message
        assert "--output" in message


def test_output_on_a_read_only_file_system(tmp_path, corpus):
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        message = refusal(2, make_config(tmp_path / "run", corpus, **layout(1, 2)))
        assert "cannot be written to (Read-only file system)" in message
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_checkpoint_of_another_tokenizer(tmp_path, corpus):
    train_ranks(1, make_config(tmp_path, corpus, **{"training.steps": 1}))
    train_sentencepiece(text(60), 300, tmp_path / "other.model")
    other = {"data.tokenizer": str(tmp_path / "other.model"), "model.vocab_size": 300}
    message = refusal(2, make_config(tmp_path, corpus, **other, **layout(1, 2)))
    assert "model.vocab_size is 258 in the checkpoint and 300 in this run" in message

    train_ranks(1, make_config(tmp_path / "b", corpus, **{"model.vocab_size": 300}))
    message = refusal(2, make_config(tmp_path / "b", corpus, **other, **layout(1, 2)))
    assert "is not the tokenizer that" in message
    assert "Use 'bytes'" in message


def test_missing_checkpoint(tmp_path, corpus):
    options = {"checkpoint.resume": str(tmp_path / "none"), **layout(1, 2)}
    message = refusal(2, make_config(tmp_path / "run", corpus, **options))
    assert f"{tmp_path}/none does not exist" in message


def test_another_order_of_the_data(tmp_path, corpus):
    train_ranks(1, make_config(tmp_path, corpus, **{"training.steps": 1}))
    message = refusal(2, make_config(tmp_path, corpus, **{"training.seed": 5}))
    assert "training.seed is 1234 in the checkpoint and 5 in this run" in message


def test_other_data_of_the_same_name(tmp_path, corpus):
    prefix = write_corpus(tmp_path / "corpus", num_documents=60)
    old = (tmp_path / "corpus.bin").stat().st_size
    first = make_config(tmp_path / "run", prefix, **{"training.steps": 1})
    train_ranks(1, first)
    write_corpus(tmp_path / "corpus", num_documents=61)
    new = (tmp_path / "corpus.bin").stat().st_size
    message = refusal(2, make_config(tmp_path / "run", prefix))
    assert f"{prefix}.bin had {old} bytes and now has {new}" in message
    assert "another --output" in message


def test_run_that_resumed_itself_does_not_start_again(tmp_path, corpus):
    """Starts from a path, resumes with "auto", then repeats the first command."""
    source, output = tmp_path / "source", tmp_path / "run"
    train_ranks(1, make_config(source, corpus, **{"training.steps": 1}))
    resume = {"checkpoint.resume": str(source)}
    for steps, options in ((2, resume), (3, {}), (4, resume)):
        config = make_config(output, corpus, **options, **{"training.steps": steps})
        assert train_ranks(1, config) == [str(output / f"checkpoints/step-0000000{steps}")]
    assert sorted(training_log(output)) == [2, 3, 4]


def _end_in_order(config):
    order = []
    shutdown, release = distributed.shutdown, OutputLock.release
    distributed.shutdown = lambda: (order.append("shutdown"), shutdown())
    OutputLock.release = lambda lock: (order.append("release"), release(lock))
    train_here(config)
    return order


def test_lock_is_released_last(tmp_path, corpus):
    """The next run must not write while ranks of this one still run."""
    config = make_config(tmp_path, corpus, **{"training.steps": 1})
    assert run_ranks(1, _end_in_order, config) == [["shutdown", "release"]]


def test_output_of_another_running_run(tmp_path, corpus):
    lock = OutputLock(tmp_path)
    lock.take()
    config = make_config(tmp_path, corpus, **layout(1, 2), **{"training.steps": 1})
    assert f"output: another run (process {os.getpid()} on" in refusal(2, config)
    lock.release()
    [end, _] = train_ranks(2, config)
    assert end.endswith("step-00000001")


def test_data_beyond_the_vocabulary(tmp_path):
    """One of two data ranks reads the bad sample, and all ranks end with its error."""
    prefix = write_corpus(tmp_path / "corpus", extra=[5, 999, 7])
    options = {"data.split": (1.0, 0.0, 0.0), "training.steps": 1000, "checkpoint.interval": 0}
    start = time.monotonic()
    messages = train_ranks(2, make_config(tmp_path / "run", prefix, **options))
    assert time.monotonic() - start < 60
    said = f"{prefix}.bin: token id 999 in window "
    [rank] = [rank for rank, message in enumerate(messages) if f"Error: {said}" in message]
    assert f"Error: rank {rank}: {said}" in messages[1 - rank]
    assert all("model.vocab_size = 258" in message for message in messages)


# Errors during the run.


def _full_at(config, step, rank):
    """Train with a disk that is full for one rank after a step."""

    def fault(model, here):
        if here == step and model.grid.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.RLIM_INFINITY))

    return train_here(config, fault)


@pytest.mark.parametrize("rank", [0, 1])
def test_disk_full_while_saving(tmp_path, corpus, rank):
    """The run ends with the reason, and can resume from the previous checkpoint."""
    options = {"training.steps": 6, "checkpoint.interval": 2, "model.dropout": 0.1, **layout(1, 2)}
    config = make_config(tmp_path / "full", corpus, **options)
    messages = run_ranks(2, _full_at, config, 4, rank)
    step = tmp_path / "full" / "checkpoints" / "step-00000004"
    for message in messages:
        assert message.startswith("CheckpointError: ")
        assert f"cannot save {step}: " in message
        assert re.search("File too large|enforce fail", message)
    assert not step.exists()
    assert directory.find_latest(tmp_path / "full").name == "step-00000002"
    tensors_of(tmp_path / "full")
    assert sorted(os.listdir(step.parent)) == ["latest", "step-00000002"]

    [straight, _] = train_ranks(2, make_config(tmp_path / "other", corpus, **options))
    [end, _] = train_ranks(2, config)
    assert_equal_bits(straight, end)


def test_full_file_system(tmp_path, corpus):
    """A real full file system, if the test may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        options = {"training.steps": 6, "checkpoint.interval": 2, **layout(1, 2)}
        config = make_config(tmp_path / "run", corpus, **options)
        messages = run_ranks(2, _filled_at, config, 4, tmp_path / "filler")
        assert all(m.startswith("CheckpointError: cannot save") for m in messages), messages
        assert any("No space left on device" in message for message in messages)
        assert directory.find_latest(tmp_path / "run").name == "step-00000002"
        (tmp_path / "filler").unlink()
        assert train_ranks(2, config)[0].endswith("step-00000006")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _filled_at(config, step, filler):
    def fault(model, here):
        if here == step and model.grid.rank == 0:
            # Leaves space for a line of the log and the start of a checkpoint.
            stat = os.statvfs(filler.parent)
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                for _ in range(stat.f_bavail - 5):
                    file.write(b"x" * stat.f_bsize)

    return train_here(config, fault)


def _end_of(config, fault):
    inject(fault)
    start = time.monotonic()
    try:
        train(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "trained", time.monotonic() - start


def test_error_on_one_rank_ends_all(tmp_path, corpus):
    """The others neither wait until the timeout nor hide it with their own errors."""

    def fault(model, here):
        if here == 2 and model.grid.rank == 1:
            raise ZeroDivisionError("planted")

    config = make_config(tmp_path, corpus, **layout(1, 2))
    [first, second] = run_ranks(2, _end_of, config, fault)
    assert second[0] == "ZeroDivisionError: planted"
    assert first[0].startswith(
        "LostContactError: rank 0 lost contact with rank 1 during step 2: the"
    )
    assert first[1] < 20


def test_hanging_rank_ends_all(tmp_path, corpus):
    def fault(model, here):
        if here == 2 and model.grid.rank == 1:
            time.sleep(8)

    config = make_config(tmp_path, corpus, **layout(1, 2), **{"parallel.timeout_s": 3.0})
    [first, second] = run_ranks(2, _end_of, config, fault)
    for message, seconds in (first, second):
        assert message.startswith("LostContactError: "), message
        assert seconds < 25
    assert len([line for line in log_of(tmp_path) if "learning-rate" in line]) == 1


def _elsewhere(config, path):
    """Train with another directory on rank 1, as on a machine without the shared disk."""
    if os.environ["RANK"] == "1":
        config = config.model_copy(update={"output": str(path)})
    return train_here(config)


def test_rank_that_cannot_write(tmp_path, corpus):
    config = make_config(tmp_path / "run", corpus, **layout(1, 2))
    ends = run_ranks(2, _elsewhere, config, Path("/proc/no"))
    said = "output: the directory '/proc/no' cannot be written to"
    assert f"Error: {said}" in ends[1]
    assert f"Error: rank 1: {said}" in ends[0]


def test_ranks_that_do_not_share_a_disk(tmp_path, corpus):
    """All ranks resume from the checkpoint that rank 0 found, or none; a save reports the rest."""
    options = {"training.steps": 4, "checkpoint.interval": 2, **layout(1, 2)}
    train_ranks(2, make_config(tmp_path / "whole", corpus, **options))
    short = make_config(tmp_path / "run", corpus, **options | {"training.steps": 2})
    train_ranks(2, short)
    config = make_config(tmp_path / "run", corpus, **options)
    for end in run_ranks(2, _elsewhere, config, tmp_path / "elsewhere"):
        assert "Set output to a file system that all machines share" in end
    assert training_log(tmp_path / "run") == training_log(tmp_path / "whole")
    assert directory.find_latest(tmp_path / "run").name == "step-00000002"
