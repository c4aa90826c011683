"""The options that a run may change when it resumes from a checkpoint."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ee_llm.checkpoint.sharded import load, save
from ee_llm.checkpoint.sharded.load import compare_configs, compare_data, compare_files
from ee_llm.checkpoint.state import TrainState, data_files
from ee_llm.config import Config, load_config
from ee_llm.errors import CheckpointError

SOURCE = Path("step-00000007/config.toml")


def make(**overrides: Any) -> Config:
    options = {
        "model.shape": "llama-tiny",
        "data.prefixes": ("here/a", "here/b"),
        "data.weights": (1.0, 2.0),
    }
    return load_config(None, options | overrides)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("training.seed", 5, "training.seed is 1234 in the checkpoint and 5 in this run"),
        ("data.prefixes", ("here/b", "here/a"), "data.prefixes is ['a', 'b'] in .* ['b', 'a'] in"),
        ("data.weights", (1.0, 3.0), "data.weights is [1.0, 2.0] in .* and [1.0, 3.0] in this"),
        ("data.split", (0.9, 0.1, 0.0), "data.split is [0.98, 0.02, 0.0] in .* [0.9, 0.1, 0.0] in"),
        # A test part that rounds to no document takes one from the training part.
        ("data.split", (0.98, 0.019, 0.001), "data.split is [0.98, 0.02, 0.0] in .* 0.019, 0.001]"),
        ("data.seq_length", 32, "data.seq_length is 256 in the checkpoint and 32 in this run"),
    ],
)
def test_another_order_of_the_data_is_refused(name: str, value: object, expected: str) -> None:
    """The position is a number of samples: in another order it would repeat and skip some."""
    saved, current = make(), make(**{name: value})
    compare_configs(saved, current, SOURCE)  # the model is the same
    with pytest.raises(CheckpointError) as caught:
        compare_data(saved, current, SOURCE)
    found = str(caught.value)
    first, _, second = expected.partition(".*")
    assert found.startswith(f"{SOURCE} is from a run that reads its data in another order: {first}")
    assert second in found
    assert found.endswith("--output.")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.prefixes", ("there/a", "b")),
        ("data.weights", (0.5, 1.0)),
        ("data.weights", (0.1, 0.2)),
        ("data.mask_after_eos", True),
        ("training.global_batch_size", 16),
        ("training.micro_batch_size", 2),
        ("training.steps", 5000),
        ("optimizer.lr", 1e-4),
    ],
)
def test_options_that_keep_the_order_may_change(name: str, value: object) -> None:
    compare_data(make(), make(**{name: value}), SOURCE)


def test_splits_are_compared_in_proportion() -> None:
    """They need to add up to 1 only approximately."""
    saved = make(**{"data.split": (0.33333333, 0.33333333, 0.33333333)})
    compare_data(saved, make(**{"data.split": (1 / 3, 1 / 3, 1 / 3)}), SOURCE)


def test_advice_for_a_run_that_resumes_from_a_path() -> None:
    """A path loads the position as well, so another output alone would not help."""
    current = make(**{"training.seed": 5, "checkpoint.resume": "runs/a"})
    with pytest.raises(CheckpointError, match="another --output and without checkpoint.resume.$"):
        compare_data(make(), current, SOURCE)


def write_data(prefix: Path, num_bytes: int) -> None:
    for suffix, size in ((".bin", num_bytes), (".idx", 54)):
        Path(f"{prefix}{suffix}").write_bytes(bytes(size))


def test_data_of_another_size_is_refused(tmp_path: Path) -> None:
    """Data that was prepared again under the same name has another order."""
    prefixes = (str(tmp_path / "a"), str(tmp_path / "b"))
    for prefix in prefixes:
        write_data(Path(prefix), 1000)
    config = make(**{"data.prefixes": prefixes})
    state = TrainState(data=data_files(prefixes))
    assert state.data == [("a", 1000, 54), ("b", 1000, 54)]
    compare_files(state, config, SOURCE)
    write_data(tmp_path / "b", 1200)
    with pytest.raises(CheckpointError) as caught:
        compare_files(state, config, SOURCE)
    assert f"other data: {prefixes[1]}.bin had 1000 bytes and now has 1200" in str(caught.value)
    compare_files(TrainState(), config, SOURCE)  # an older checkpoint


def test_deleted_data_does_not_prevent_saving(tmp_path: Path) -> None:
    assert data_files([str(tmp_path / "gone")]) == []


def test_states_of_older_checkpoints_are_read() -> None:
    older = {"step": 7, "consumed_samples": 56, "skipped_steps": 1, "extra": {}}
    assert TrainState.from_json(dict(older), SOURCE) == TrainState(**older)  # type: ignore[arg-type]
    state = TrainState(step=7, data=[("a", 10, 54)], origin="runs/a")
    assert TrainState.from_json(json.loads(json.dumps(state.to_json())), SOURCE) == state


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"steps": 1}, "config.toml: steps: Extra inputs"),
        ({"step": -1}, "step: Input should be greater than or equal to 0, found -1"),
        ({"step": True}, "step: Input should be a valid integer, found True"),
        ({"origin": 1}, "origin: Input should be a valid string, found 1"),
        ({"data": [["a", 10]]}, "data.0.2: Field required"),
        ({"data": [["a", 10, "5"]]}, "data.0.2: Input should be a valid integer, found '5'"),
        ({"data": 5}, "data: Input should be a valid list, found 5"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        TrainState.from_json(TrainState().to_json() | change, SOURCE)


def test_a_state_without_a_field_is_refused() -> None:
    state = TrainState().to_json()
    del state["step"]
    with pytest.raises(CheckpointError, match="step: Field required"):
        TrainState.from_json(state, SOURCE)


def test_the_layout_of_random_generators_includes_the_stages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Virtual stages divide the layers among the same ranks in another way."""
    monkeypatch.setattr(save.dist, "get_world_size", lambda: 2)
    for size, ranks in (("tensor_model_parallel", 1), ("pipeline_model_parallel", 2)):
        name = f"get_{size}_world_size"
        monkeypatch.setattr(save.parallel_state, name, lambda ranks=ranks: ranks)
    monkeypatch.setattr(save.parallel_state, "get_data_parallel_world_size", lambda: 1)
    plain = make(**{"model.num_layers": 4, "parallel.pipeline": 2})
    halved = make(**{"model.num_layers": 4, "parallel.pipeline": 2, "parallel.virtual": 2})
    assert save.layout(plain) != save.layout(halved)

    older = {name: size for name, size in save.layout(halved).items() if name != "stages"}
    for manifest in (older, save.layout(halved)):
        reader: Any = SimpleNamespace(manifest={"layout": manifest}, config=lambda: halved)
        assert load.saved_layout(reader) == save.layout(halved)
