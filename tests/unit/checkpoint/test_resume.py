"""A run resumes from the requested checkpoint, or from one that it has saved itself since."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import CONFIG, CheckpointError
from ee_llm.checkpoint.resume import resume_path
from ee_llm.config import Config, load_config
from tests.unit.checkpoint.checkpoints import reseal, write_checkpoint


def config_for(output, resume) -> Config:
    return Config(
        output=str(output), model={"shape": "llama-tiny"}, checkpoint={"resume": str(resume)}
    )


def save(output, step, resume):
    """Write a checkpoint like a run with `checkpoint.resume` = `resume`."""
    path = write_checkpoint(output, step)
    config = load_config(path / CONFIG)
    changed = config.checkpoint.model_copy(update={"resume": str(resume)})
    (path / CONFIG).write_text(config.model_copy(update={"checkpoint": changed}).to_toml())
    reseal(path)
    return path


def test_auto_never_and_a_path(tmp_path):
    first, newest = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    assert resume_path(config_for(tmp_path, "auto")) == newest
    assert resume_path(config_for(tmp_path, "never")) is None
    assert resume_path(config_for(tmp_path, first)) == first  # going back
    assert resume_path(config_for(tmp_path / "other", tmp_path)) == newest
    with pytest.raises(CheckpointError, match="none does not exist"):
        resume_path(config_for(tmp_path, tmp_path / "none"))


def test_a_restarted_run_resumes_from_its_own_newest_checkpoint(tmp_path, caplog):
    """Restarting from the path after every crash would lose all progress."""
    caplog.set_level(logging.INFO, "ee_llm")
    source, output = write_checkpoint(tmp_path / "source", 5), tmp_path / "run"
    save(output, 6, resume=source)
    newest = save(output, 7, resume=source)
    assert resume_path(config_for(output, source)) == newest
    assert str(source) in caplog.text
    assert newest.name in caplog.text
    shutil.rmtree(source)
    assert resume_path(config_for(output, source)) == newest


def test_spellings_of_the_same_path_are_equal(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "source", 5)
    newest = save(tmp_path / "run", 6, resume=tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    for written in ("source", "source/", "./source", os.path.join(tmp_path, "run", "..", "source")):
        assert resume_path(config_for(tmp_path / "run", written)) == newest, written


def test_an_automatically_resumed_run_remembers_its_origin(tmp_path):
    source, output = write_checkpoint(tmp_path / "source", 5), tmp_path / "run"
    newest = save(output, 6, resume="auto")
    assert resume_path(config_for(output, source)) == source  # it never started from there
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state | {"data": [], "origin": str(source)}))
    reseal(newest)
    assert resume_path(config_for(output, source)) == newest


def _damage(output: Path, how: str) -> None:
    if how == "latest":
        (output / directory.CHECKPOINTS / directory.LATEST).write_text("step-00000099\n")
        return
    newest = directory.find_latest(output)
    assert newest is not None
    (newest / CONFIG).write_text("no configuration")
    if how == "configuration":
        reseal(newest)


@pytest.mark.parametrize("how", ["latest", "size", "configuration"])
def test_an_unreadable_newest_checkpoint_raises(tmp_path, caplog, how):
    """Starting from the path again would silently discard the progress since."""
    source, output = write_checkpoint(tmp_path / "source", 5), tmp_path / "run"
    first = save(output, 6, resume=source)
    save(output, 7, resume=source)
    _damage(output, how)
    with pytest.raises(
        CheckpointError, match=f"To start from {source} again, choose another --output"
    ):
        resume_path(config_for(output, source))
    assert resume_path(config_for(output, first)) == first
    assert f"Resuming from {first} as requested" in caplog.text
