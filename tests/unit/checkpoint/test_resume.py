"""Where a run goes on: what was asked for, or what it has saved itself since."""

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


def asked(output, resume) -> Config:
    return Config(
        output=str(output), model={"shape": "llama-tiny"}, checkpoint={"resume": str(resume)}
    )


def save(output, step, resume):
    """A checkpoint as a run that was told to begin at `resume` saves it."""
    path = write_checkpoint(output, step)
    config = load_config(path / CONFIG)
    changed = config.checkpoint.model_copy(update={"resume": str(resume)})
    (path / CONFIG).write_text(config.model_copy(update={"checkpoint": changed}).to_toml())
    reseal(path)
    return path


def test_auto_never_and_a_path(tmp_path):
    first, newest = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    assert resume_path(asked(tmp_path, "auto")) == newest
    assert resume_path(asked(tmp_path, "never")) is None
    assert resume_path(asked(tmp_path, first)) == first  # going back
    assert resume_path(asked(tmp_path / "other", tmp_path)) == newest
    with pytest.raises(CheckpointError, match="none does not exist"):
        resume_path(asked(tmp_path, tmp_path / "none"))


def test_a_run_that_began_at_a_path_keeps_what_it_saved_since(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ee_llm")
    """Restarted from the path after every crash, it would never get beyond the first one."""
    source, output = write_checkpoint(tmp_path / "source", 5), tmp_path / "run"
    save(output, 6, resume=source)
    newest = save(output, 7, resume=source)
    assert resume_path(asked(output, source)) == newest
    assert str(source) in caplog.text
    assert newest.name in caplog.text
    shutil.rmtree(source)
    assert resume_path(asked(output, source)) == newest


def test_a_place_may_be_written_in_several_ways(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "source", 5)
    newest = save(tmp_path / "run", 6, resume=tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    for written in ("source", "source/", "./source", os.path.join(tmp_path, "run", "..", "source")):
        assert resume_path(asked(tmp_path / "run", written)) == newest, written


def test_a_run_that_went_on_by_itself_in_between_began_at_the_same_place(tmp_path):
    source, output = write_checkpoint(tmp_path / "source", 5), tmp_path / "run"
    newest = save(output, 6, resume="auto")
    assert resume_path(asked(output, source)) == source  # it never began there
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state | {"data": [], "origin": str(source)}))
    reseal(newest)
    assert resume_path(asked(output, source)) == newest


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
def test_what_can_not_be_read_is_told(tmp_path, caplog, how):
    """Beginning at the path again would throw away in silence what the run has done since."""
    source, output = write_checkpoint(tmp_path / "source", 5), tmp_path / "run"
    first = save(output, 6, resume=source)
    save(output, 7, resume=source)
    _damage(output, how)
    with pytest.raises(CheckpointError, match=f"to begin at {source} once more, give another"):
        resume_path(asked(output, source))
    assert resume_path(asked(output, first)) == first  # the way back
    assert f"using {first} as given" in caplog.text
