"""Where a run goes on: what was asked for, or what it has saved itself since."""

import shutil

import pytest

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import CONFIG, CheckpointError
from ee_llm.checkpoint.resume import resume_path
from ee_llm.config import Config, load_config
from tests.unit.checkpoint.checkpoints import write_checkpoint


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
    return path


def test_auto_never_and_a_path(tmp_path):
    first, newest = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    assert resume_path(asked(tmp_path, "auto")) == newest
    assert resume_path(asked(tmp_path, "never")) is None
    assert resume_path(asked(tmp_path, first)) == first  # going back
    assert resume_path(asked(tmp_path / "other", tmp_path)) == newest
    with pytest.raises(CheckpointError, match="none does not exist"):
        resume_path(asked(tmp_path, tmp_path / "none"))


def test_a_run_that_began_at_a_path_keeps_what_it_saved_since(tmp_path, capfd):
    """Restarted from the path after every crash, it would never get beyond the first one."""
    source, output = write_checkpoint(tmp_path / "source", 5), tmp_path / "run"
    save(output, 6, resume=source)
    newest = save(output, 7, resume=source)
    assert resume_path(asked(output, source)) == newest
    said = capfd.readouterr().err.replace("\n", "")
    assert f"began at {source}" in said
    assert newest.name in said
    shutil.rmtree(source)
    assert resume_path(asked(output, source)) == newest


def test_what_can_not_be_read_does_not_hide_what_is_asked_for(tmp_path):
    source, output = write_checkpoint(tmp_path / "source", 5), tmp_path / "run"
    newest = save(output, 6, resume=source)
    (newest / CONFIG).write_text("no configuration")
    assert resume_path(asked(output, source)) == source
    (output / directory.CHECKPOINTS / directory.LATEST).write_text("step-00000099\n")
    assert resume_path(asked(output, source)) == source
