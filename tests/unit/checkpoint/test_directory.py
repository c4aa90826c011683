"""A checkpoint gets its name only when it is complete, and `latest` is updated last."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.directory import (
    CheckpointError,
    check_output,
    find_latest,
    resolve_checkpoint,
)
from tests.unit.checkpoint.checkpoints import write_checkpoint


def add(output, step, keep_last=0):
    """Publish an empty checkpoint."""
    checkpoints = output / directory.CHECKPOINTS
    partial = directory.create_partial(checkpoints, step)
    (partial / directory.TENSORS / "data").write_text(f"step {step}")
    directory.seal(partial, {"step": step})
    return directory.publish(partial, keep_last)


def names(output):
    return sorted(path.name for path in (output / directory.CHECKPOINTS).iterdir())


def test_keeps_the_last(tmp_path):
    for step in (1, 2, 10, 200):
        add(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["latest", "step-00000010", "step-00000200"]
    assert find_latest(tmp_path).name == "step-00000200"


def test_keep_last_zero_keeps_all(tmp_path):
    for step in (1, 2, 3):
        add(tmp_path, step, keep_last=0)
    assert len(directory.complete_steps(tmp_path / directory.CHECKPOINTS)) == 3


@pytest.mark.parametrize("order", [1, -1], ids=["copied-in-order", "copied-in-reverse"])
def test_the_last_steps_are_kept_regardless_of_file_times(tmp_path, order):
    """In a copied directory the oldest step may be the newest file."""
    for step in (100, 200, 300, 400):
        path = add(tmp_path, step)
        for file in (path / directory.MANIFEST, path):
            os.utime(file, (10**9 + order * step, 10**9 + order * step))
    add(tmp_path, 500, keep_last=3)
    assert names(tmp_path) == ["latest", "step-00000300", "step-00000400", "step-00000500"]


def test_steps_of_an_abandoned_branch_are_removed_first(tmp_path):
    """The run went back from 500 to 200: saving 300 must not remove 200."""
    for step in (100, 200, 400, 500):
        add(tmp_path, step)
    add(tmp_path, 300, keep_last=3)
    assert names(tmp_path) == ["latest", "step-00000100", "step-00000200", "step-00000300"]
    add(tmp_path, 350, keep_last=3)
    assert names(tmp_path) == ["latest", "step-00000200", "step-00000300", "step-00000350"]


def test_a_step_that_is_reached_again_is_replaced(tmp_path):
    first = add(tmp_path, 5)
    (first / "tensors" / "data").write_text("old")
    assert (add(tmp_path, 5) / "tensors" / "data").read_text() == "step 5"
    assert names(tmp_path) == ["latest", "step-00000005"]


def test_a_failed_replacement_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    first = add(tmp_path, 5)
    (first / "tensors" / "data").write_text("old")
    rename = Path.rename

    def failing(path, target):
        if path.name == "step-00000005.partial":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        add(tmp_path, 5)
    assert (find_latest(tmp_path) / "tensors" / "data").read_text() == "old"
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000005.partial"]


def test_an_interrupted_replacement_loses_nothing(tmp_path):
    """After a death between the renames, the next run reads the old one and restores its name."""
    first = add(tmp_path, 5)
    (first / "tensors" / "data").write_text("old")
    directory.seal(directory.create_partial(first.parent, 5), {"step": 5})
    first.rename(first.with_name("step-00000005.replaced.partial"))
    assert (find_latest(tmp_path) / "tensors" / "data").read_text() == "old"
    add(tmp_path, 6)
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000006"]
    assert (first / "tensors" / "data").read_text() == "old"


def test_a_checkpoint_is_found_after_its_name_is_restored(tmp_path):
    """Frozen tensors are copied from it while the next checkpoint is written."""
    path = add(tmp_path, 5)
    waiting = path.rename(path.with_name("step-00000005.replaced.partial"))
    assert find_latest(tmp_path) == waiting == directory.restored_path(waiting)
    directory.create_partial(path.parent, 6)
    assert directory.restored_path(waiting) == path
    assert directory.restored_path(path) == path


def test_an_incomplete_replaced_checkpoint_is_not_restored(tmp_path, monkeypatch):
    add(tmp_path, 5)
    monkeypatch.setattr(shutil, "rmtree", lambda *given, **options: None)
    checkpoints = tmp_path / directory.CHECKPOINTS
    add(tmp_path, 5)
    left = checkpoints / "step-00000005.replaced.partial"
    assert left.is_dir()
    assert not (left / directory.MANIFEST).exists()
    monkeypatch.undo()
    (checkpoints / "step-00000005").rename(tmp_path / "pruned")
    add(tmp_path, 6)
    assert names(tmp_path) == ["latest", "step-00000006"]


def test_a_partial_checkpoint_of_a_dead_run_is_cleared(tmp_path):
    add(tmp_path, 1)
    write_checkpoint(tmp_path, step=2, publish=False)
    assert find_latest(tmp_path).name == "step-00000001"
    assert "step-00000002.partial" in names(tmp_path)
    add(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000003"]


def test_a_directory_without_a_manifest_is_not_complete(tmp_path):
    """An interrupted copy has the final name, but not the manifest, which is written last."""
    add(tmp_path, 1)
    (add(tmp_path, 2) / directory.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"latest names step-00000002.*step-00000001"):
        find_latest(tmp_path)
    (tmp_path / directory.CHECKPOINTS / "latest").unlink()
    assert find_latest(tmp_path).name == "step-00000001"


def test_latest_must_be_a_name(tmp_path):
    add(tmp_path, 1)
    (tmp_path / directory.CHECKPOINTS / "latest").write_text("../../elsewhere")
    with pytest.raises(CheckpointError, match=r"expected a name such .*: step-00000001"):
        find_latest(tmp_path)


def test_resolves_runs_and_checkpoints(tmp_path, monkeypatch):
    step = add(tmp_path, 1)
    newest = add(tmp_path, 2)
    assert resolve_checkpoint(tmp_path) == newest
    assert resolve_checkpoint(str(newest.parent)) == newest
    assert resolve_checkpoint(step) == step
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("checkpoints").name == newest.name
    with pytest.raises(CheckpointError, match=r"does not exist: .*step-00000100"):
        resolve_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*empty: expected"):
        resolve_checkpoint(tmp_path / "empty")
    assert find_latest(tmp_path / "empty") is None


def test_unwritable_output_raises(tmp_path):
    check_output(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []
    with tempfile.TemporaryDirectory(dir=tmp_path) as other:  # as by a process with the same id
        (Path(other) / f".write-test-{os.getpid()}").mkdir()
        check_output(other)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output: the directory '.*file/run' cannot be written"):
        check_output(tmp_path / "file" / "run")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="Permission denied"):
            check_output(tmp_path / "closed")
