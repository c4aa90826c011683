"""The names of metrics, the lines of the log, and the log of a resumed run."""

import errno
import importlib.util
import io
import json
import math
import os
import sys

import pytest
from rich.console import Console

from ee_llm import distributed
from ee_llm.config import load_config
from ee_llm.losses.exit_sums import Validation
from ee_llm.training.reporting import run_log
from ee_llm.training.reporting.run_log import RunLog, loss_name, validation_metrics
from tests.distributed.harness import run_ranks


def make_config(output, **overrides):
    given = {"model.shape": "llama-tiny", "training.steps": 100, "output": str(output)}
    return load_config(None, given | {name.replace("__", "."): v for name, v in overrides.items()})


def lines(output, name=run_log.LOG):
    # Python accepts NaN and Infinity, which are not JSON.
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (output / name).read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture
def console(monkeypatch):
    text = io.StringIO()
    # `from ee_llm.distributed import console` is the console itself, not its module.
    module = sys.modules[distributed.print_line.__module__]
    monkeypatch.setattr(module, "console", Console(file=text, width=60))
    return text


def test_names_are_megatrons():
    assert loss_name(6, 8) == "exit 6 loss"
    assert loss_name(8, 8) == "lm loss"
    metrics = validation_metrics(Validation({2: 1.0, 8: 2.0}, {2: 0.25}), 8)
    assert metrics == {
        "exit 2 loss validation": 1.0,
        "exit 2 loss validation ppl": pytest.approx(math.e),
        "exit 2 agreement validation": 0.25,
        "lm loss validation": 2.0,
        "lm loss validation ppl": pytest.approx(math.e**2),
    }
    assert math.isfinite(validation_metrics(Validation({8: 1e9}, {}), 8)["lm loss validation ppl"])


def test_report_is_a_line_with_the_speed(tmp_path, console, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: now[0])
    with RunLog(make_config(tmp_path)) as log:
        for step in (1, 2):
            now[0] += 2.0
            log.advance(step, tokens=1000)
        log.report(2, {"lm loss": 5.5, "grad-norm": math.inf, "learning-rate": 1e-3})
        now[0] += 50.0
        log.report_validation(2, validation_metrics(Validation({8: 1.0}, {}), 8))
        log.restart_clock()
        log.event(2, "saved", path="step-00000002", note="é")
        now[0] += 1.0
        log.advance(3, tokens=1000)
        log.report(3, {"lm loss": 5.0})
    first, validation, event, second = lines(tmp_path)
    assert first.pop("time") > 1e9
    assert first == {
        "step": 2,
        "lm loss": 5.5,
        "grad-norm": None,
        "learning-rate": 1e-3,
        "tokens-per-second": 500.0,
        "iteration-time": 2.0,
    }
    assert validation["lm loss validation"] == 1.0
    assert event == {"step": 2, "event": "saved", "path": "step-00000002", "note": "é"}
    assert second["tokens-per-second"] == 1000.0
    _, *shown = console.getvalue().splitlines()  # the first line is the estimate of the second step
    assert shown[0].startswith("step 2/100 · lm loss 5.5 · grad-norm inf · learning-rate 0.001")
    assert shown[0].endswith("500 tokens/s · ETA 0:03:16")


@pytest.mark.parametrize(("start", "interval", "expected"), [(0, 10, 2), (6, 10, 8), (0, 2, None)])
def test_second_step_prints_the_duration_of_the_run(
    tmp_path, console, monkeypatch, start, interval, expected
):
    """With slow steps and an interval of 10, nothing else would be printed for a long time."""
    now = [100.0]
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: now[0])
    config = make_config(tmp_path, logging__interval=interval)
    with RunLog(config, start_step=start) as log:
        for step in range(start + 1, start + 5):
            now[0] += 60.0
            log.advance(step, tokens=1000)
            if step == start + 1:
                log.restart_clock()  # as the trainer does
    shown = console.getvalue()
    if expected is None:
        assert shown == ""
    else:
        left = (100 - expected) // 60, (100 - expected) % 60
        assert shown == f"step {expected}/100 · 60 s per step · ETA {left[0]}:{left[1]:02}:00\n"
    assert (
        lines(tmp_path) == []
    )  # no record: the log of a resumed run equals that of an uninterrupted one


def test_lines_are_not_wrapped_in_a_file(console):
    message = "a long line " * 30
    distributed.print_line(message)
    assert console.getvalue() == message + "\n"


def test_lines_of_repeated_steps_move_to_another_file(tmp_path, console):
    """The run died in the middle of a line after step 30; its last checkpoint is of step 20."""
    with RunLog(make_config(tmp_path)) as log:
        for step in (10, 20, 30):
            log.report(step, {"lm loss": float(step)})
    with open(tmp_path / run_log.LOG, "a") as file:
        file.write('{"step": 40, "lm lo')
    with RunLog(make_config(tmp_path), start_step=20) as log:
        log.report(30, {"lm loss": -30.0})
    assert [(line["step"], line["lm loss"]) for line in lines(tmp_path)] == [
        (10, 10.0),
        (20, 20.0),
        (30, -30.0),
    ]
    moved = (tmp_path / run_log.SUPERSEDED).read_text().splitlines()
    assert json.loads(moved[0])["lm loss"] == 30.0
    assert moved[1] == '{"step": 40, "lm lo'


def test_full_disk_ends_no_run_and_loses_no_line(tmp_path, console, monkeypatch, caplog):
    """A line that is written in part is completed when there is space again."""
    write, space = os.write, 0

    def limited(file, data):
        nonlocal space
        if not space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        number = write(file, data[:space])
        space -= number
        return number

    config = make_config(tmp_path)
    with RunLog(config) as log:
        monkeypatch.setattr(run_log.os, "write", limited)
        log.event(1, "first")
        space = 7
        log.event(2, "second")
        monkeypatch.undo()
        log.event(3, "third")
    assert [line["event"] for line in lines(tmp_path)] == ["first", "second", "third"]
    assert caplog.text.count("cannot be written") == 1


def test_log_without_superseded_lines_is_appended_to(tmp_path, console):
    with RunLog(make_config(tmp_path)) as log:
        log.report(10, {"lm loss": 1.0})
    inode = (tmp_path / run_log.LOG).stat().st_ino
    with RunLog(make_config(tmp_path), start_step=10) as log:
        log.report(20, {"lm loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]
    assert (tmp_path / run_log.LOG).stat().st_ino == inode
    assert not (tmp_path / run_log.SUPERSEDED).exists()


def test_other_ranks_write_nothing(tmp_path, console):
    with RunLog(make_config(tmp_path, logging__tensorboard=True), is_logging=False) as log:
        log.advance(1, 10)
        log.report(1, {"lm loss": 1.0})
        log.report_validation(1, {"lm loss validation": 1.0})
        log.event(1, "saved")
    assert list(tmp_path.iterdir()) == []
    assert console.getvalue() == ""


def test_tensorboard_has_the_same_numbers(tmp_path, console):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, value in ((0, 1.0), (10, 2.0)):
        config = make_config(tmp_path, logging__tensorboard=True)
        with RunLog(config, start_step=start) as log:
            for step in (start + 10, start + 20):
                log.report(step, {"lm loss": value, "exit 2 loss": value + step})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"lm loss", "exit 2 loss"}
    # the second run repeats step 20 of the first
    found = [(event.step, event.value) for event in events.Scalars("lm loss")]
    assert found == [(10, 1.0), (20, 2.0), (30, 2.0)]


def _log_twice(tmp_path):
    config = make_config(tmp_path, logging__wandb_project="ee", logging__wandb_mode="offline")
    for start in (0, 1):
        with RunLog(config, start_step=start) as log:
            log.report(start + 1, {"lm loss": 1.0})


def test_wandb_offline_resumes_its_run(tmp_path, console, monkeypatch):
    """Runs in a subprocess, because wandb's threads stay and later tests fork."""
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_ranks(1, _log_twice, tmp_path)
    identity = (tmp_path / "wandb-run-id").read_text().strip()
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert runs == [f"run-{identity}.wandb"] * 2


@pytest.mark.parametrize(
    ("package", "overrides", "option"),
    [
        ("tensorboard", {"logging__tensorboard": True}, "logging.tensorboard"),
        ("wandb", {"logging__wandb_project": "ee"}, "logging.wandb_project"),
    ],
)
def test_missing_package_names_the_extra(tmp_path, monkeypatch, package, overrides, option):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{option} needs .*{package}.*ee-llm\[track\]"):
        RunLog(make_config(tmp_path, **overrides))
    assert not (tmp_path / run_log.LOG).exists()


def test_trackers_are_imported_only_if_configured(tmp_path, console, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with RunLog(make_config(tmp_path)) as log:
        log.report(1, {"lm loss": 1.0})
    assert len(lines(tmp_path)) == 1
