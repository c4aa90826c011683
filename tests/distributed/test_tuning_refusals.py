"""Errors of tuning name the option or file, the value and the fix, on all ranks."""

import shutil
from pathlib import Path

import pytest

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import CONFIG, TensorReader
from tests.distributed.harness import run_ranks
from tests.distributed.runs import layout, make_config, train_here, train_ranks
from tests.distributed.tuning_runs import SIX_LAYERS, dense_config, tune, tuning_config
from tests.unit.checkpoint.checkpoints import reseal

ONE_STEP = {"training.steps": 1, "training.dtype": "float32"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory, corpus):
    output = tmp_path_factory.mktemp("dense")
    train_ranks(1, dense_config(output, corpus, **ONE_STEP))
    return output


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, corpus, dense):
    """Tune exits at 2 and 5 with their own norms and weights."""
    output = tmp_path_factory.mktemp("tuned")
    tune(1, tuning_config(output, corpus, dense, **ONE_STEP))
    return output


def refused(tmp_path, corpus, source, **options):
    options = ONE_STEP | layout(1, 2) | options
    return tune(2, tuning_config(tmp_path / "run", corpus, source, **options))


def test_no_checkpoint(tmp_path, corpus):
    assert refused(tmp_path, corpus, tmp_path / "nowhere").startswith(
        f"{tmp_path / 'nowhere'} does not exist: expected a run directory or a checkpoint"
    )


def test_another_model(tmp_path, corpus, dense):
    message = refused(tmp_path, corpus, dense, **{"model.num_layers": 8, "model.num_kv_heads": 4})
    assert "/config.toml describes another model: " in message
    assert "model.num_layers is 6 in the checkpoint and 8 in this run" in message
    assert "model.num_kv_heads is 2 in the checkpoint and 4 in this run" in message


def test_missing_exit_of_the_checkpoint(tmp_path, corpus, tuned):
    """Otherwise the saved checkpoint would silently lack it."""
    options = {"exits.boundaries": (2, 3), "exits.weights": (1.0, 1.0)}
    assert refused(tmp_path, corpus, tuned, **options).endswith(
        "has exits at [2, 5], but exits.boundaries = [2, 3] leaves out [5]. Set exits.boundaries ="
        " [2, 3, 5]. Exits that are not in tuning.exits do not change."
    )


def test_new_exit_that_is_not_tuned(tmp_path, corpus, dense):
    assert refused(tmp_path, corpus, dense, **{"tuning.exits": (5,)}).endswith(
        "has no exits at [2], and tuning.exits = [5] does not tune them. Tune them as well, or "
        "remove them from exits.boundaries."
    )


def test_exits_with_other_heads(tmp_path, corpus, tuned):
    message = refused(tmp_path, corpus, tuned, **{"exits.head": ("mlp", "norm")})
    assert "exits.head is ['norm'] in the checkpoint and ['mlp', 'norm'] in this run" in message


def test_another_temperature_of_an_exit_that_is_not_tuned(tmp_path, corpus, tuned):
    options = {"exits.temperatures": (0.5, 2.0), "tuning.exits": (2,)}
    message = refused(tmp_path, corpus, tuned, **options)
    assert "another model: exits.temperatures at 5 is 1.0 in the checkpoint and 2.0 in" in message


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (7, "7 tensors are missing: layers.7.input_layernorm.weight"),
        (5, "7 tensors are not used by this run: layers.6.input_layernorm.weight"),
    ],
)
def test_tensors_after_the_last_exit_are_compared(tmp_path, corpus, dense, stated, expected):
    """They are not loaded, but the saved checkpoint must be complete."""
    source = tmp_path / "source"
    shutil.copytree(directory.find_latest(dense), source)
    config = source / CONFIG
    text = config.read_text()
    config.write_text(text.replace("num_layers = 6", f"num_layers = {stated}"))
    reseal(source)
    options = {"exits.boundaries": (2, 4), "model.num_layers": stated}
    message = refused(tmp_path, corpus, source, **options)
    # The final norm also depends on the number of layers.
    assert f"exits.{stated}.norm.weight" in message
    assert "tensors are missing" in message
    assert f"layers.{max(stated, 6)}.input_layernorm.weight" in message
    assert expected.partition(":")[2].strip() in message


def test_training_and_tuning_do_not_share_an_output(tmp_path, corpus, dense, tuned):
    here = tmp_path / "run"
    shutil.copytree(dense, here)
    assert refused(tmp_path, corpus, dense).endswith(
        "is from a run that trained the whole model, but this run tunes exits. To use it, start a "
        "new run with its parameters: set another --output, and only tuning.checkpoint to the "
        "checkpoint."
    )
    shutil.rmtree(here)
    shutil.copytree(tuned, here)
    options = {**SIX_LAYERS, **ONE_STEP, "exits.boundaries": (2, 5), "exits.output": "own"}
    [end] = train_ranks(1, make_config(here, corpus, **options))
    assert end.endswith(
        "is from a run that tuned exits [2, 5], so it has no optimizer state of the other "
        "parameters. To use it, start a new run with its parameters: set another --output, and "
        "checkpoint.initial to the checkpoint."
    )
    assert "is from a run that tuned exits [2, 5], but tuning.exits = [2]. Tune the same" in (
        refused(tmp_path, corpus, dense, **{"tuning.exits": (2,)})
    )


def _vanishes(config, source):
    """Tune, and delete the initial checkpoint before the first save copies from it."""

    def fault(model, step):
        if step == 1 and model.grid.rank == 0:
            for path in Path(source).rglob("*.distcp"):
                path.write_bytes(path.read_bytes()[:-5000])

    return train_here(config, fault)


def test_checkpoint_deleted_before_the_first_save(tmp_path, corpus, dense):
    """No partial checkpoint is left, and the error names the file."""
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    config = tuning_config(tmp_path / "run", corpus, source, **ONE_STEP, **layout(1, 2))
    for end in run_ranks(2, _vanishes, config, source):
        assert "CheckpointError" in end
        assert "is truncated" in end
    assert list((tmp_path / "run" / directory.CHECKPOINTS).iterdir()) == []


def test_save_that_fails_while_it_copies(tmp_path, corpus, tuned, monkeypatch):
    """If a checkpoint cannot be read to its end, the previous one stays complete."""
    from ee_llm.checkpoint.sharded.save import CopiedTensors

    original = CopiedTensors.tensor

    def tensor(self, name):
        if name == "layers.6.mlp.linear_fc2.weight":
            raise OSError(28, "No space left on device")
        return original(self, name)

    here = tmp_path / "run"
    tune(1, tuning_config(here, corpus, tuned, **ONE_STEP))
    monkeypatch.setattr(CopiedTensors, "tensor", tensor)
    options = {**ONE_STEP, **layout(1, 2), "training.steps": 2}
    for end in train_ranks(2, tuning_config(here, corpus, tuned, **options)):
        assert "No space left" in end  # the message also has the free space, which varies
    checkpoints = here / directory.CHECKPOINTS
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000001"]
    assert len(TensorReader(here).names()) == len(TensorReader(tuned).names())
