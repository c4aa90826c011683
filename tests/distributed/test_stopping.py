"""Signals, lost consoles and hanging ranks lose no work, with every kind of launcher."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ee_llm.checkpoint import directory
from tests.distributed.processes import ROOT, Place
from tests.distributed.runs import (
    assert_equal_bits,
    events,
    layout,
    training_log,
    validation_log,
)

NUM_RANKS = {"single": 1, "nproc": 2, "torchrun": 2, "scripts/torchrun.sh": 2}


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory, corpus):
    """Return the places of uninterrupted runs, by number of ranks."""
    made = {}
    for how, options in (("single", {}), ("nproc", layout(1, 2))):
        place = Place(tmp_path_factory.mktemp("unstopped") / how, corpus, **options)
        place.finish(how)
        made[NUM_RANKS[how]] = place
    return made


@pytest.fixture
def place(tmp_path, corpus, request):
    """Return a place to train in, for the test's parameter `how`."""
    how = request.getfixturevalue("how")
    options = layout(1, 2) if NUM_RANKS[how] == 2 else {}
    return Place(tmp_path / "place", corpus, **options | {"parallel.timeout_s": 20.0})


def assert_equals_unstopped(place: Place, unstopped: Place) -> None:
    assert training_log(place.run) == training_log(unstopped.run)
    found, expected = validation_log(place.run), validation_log(unstopped.run)
    assert found.keys() == expected.keys() == {3, 6}
    for step, line in expected.items():
        assert {**found[step], "time": 0} == {**line, "time": 0}
    assert_equal_bits(directory.find_latest(place.run), directory.find_latest(unstopped.run))


def assert_saved(place: Place, step: int, name: str) -> None:
    assert directory.find_latest(place.run).name == f"step-{step:08}"
    assert [line["signal"] for line in events(place.run, "interrupted")] == [name]


slow = pytest.mark.slow
SIGNALS = [
    pytest.param("single", signal.SIGHUP, 2),
    pytest.param("single", signal.SIGTERM, 2, marks=slow),
    pytest.param("single", signal.SIGINT, 2, marks=slow),
    pytest.param("nproc", signal.SIGTERM, 2),
    pytest.param("nproc", signal.SIGINT, 2, marks=slow),
    pytest.param("nproc", signal.SIGHUP, 2, marks=slow),
    pytest.param("torchrun", signal.SIGTERM, 2),
    pytest.param("torchrun", signal.SIGINT, 2, marks=slow),
    pytest.param("torchrun", signal.SIGHUP, 2, marks=slow),
    # Longer than a minute, and than `parallel.timeout_s`, which is 20 s here.
    pytest.param("single", signal.SIGTERM, 70, marks=slow),
    pytest.param("nproc", signal.SIGTERM, 70, marks=slow),
    pytest.param("nproc", signal.SIGINT, 70, marks=slow),
    pytest.param("nproc", signal.SIGHUP, 70, marks=slow),
    pytest.param("scripts/torchrun.sh", signal.SIGTERM, 70, marks=slow),
]


@pytest.mark.parametrize(("how", "number", "seconds"), SIGNALS)
def test_signal_in_a_long_step_loses_nothing(place, unstopped, how, number, seconds):
    """The step is completed and saved; the log continues like that of an uninterrupted run.

    Step 3 is due for a validation, which the signal delays until the run is resumed.
    """
    with place.started(how, long_step=(3, seconds)) as process:
        place.wait_for_long_step(process, NUM_RANKS[how])
        process.send_signal(number)
        _, err = process.communicate(timeout=60 + seconds)
    assert f"stopped by {number.name} after step 3: saved in run/checkpoints/step-00000003" in err
    if "torchrun" not in how:
        assert process.returncode == 128 + number
        assert "Traceback" not in err
    assert_saved(place, 3, number.name)
    place.finish(how)
    assert_equals_unstopped(place, unstopped[NUM_RANKS[how]])


@pytest.mark.parametrize("how", ["nproc", pytest.param("torchrun", marks=slow)])
def test_signal_to_one_rank_stops_all_without_an_error(place, unstopped, how):
    with place.started(how, long_step=(3, 2)) as process:
        ranks = place.wait_for_long_step(process, 2)
        os.kill(ranks[1], signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    if how == "nproc":
        assert process.returncode == 128 + signal.SIGTERM
        assert err.splitlines()[-1] == "ee-llm: stopped by SIGTERM"
    assert "lost contact" not in err
    assert_saved(place, 3, "SIGTERM")
    place.finish(how)
    assert_equals_unstopped(place, unstopped[2])


@pytest.mark.parametrize("how", ["nproc"])
def test_second_signal_ends_at_once(place, how):
    """It does not wait for the step, which takes ten minutes here."""
    with place.started(how, long_step=(3, 600)) as process:
        ranks = place.wait_for_long_step(process, 2)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)  # two signals within a second are one request
        assert [Path(f"/proc/{pid}").exists() for pid in ranks] == [True, True]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.splitlines()[-1] == "ee-llm: killed by a second signal after SIGTERM"


@pytest.mark.parametrize("how", ["nproc", pytest.param("torchrun", marks=slow)])
def test_ranks_die_with_their_launcher(place, how):
    """A killed launcher cannot notify them. `started` asserts that all ranks are gone."""
    with place.started(how, long_step=(1, 600)) as process:
        ranks = place.wait_for_long_step(process, 2)
        os.kill(ranks[1], signal.SIGSTOP)
        process.kill()


@pytest.mark.parametrize("how", ["nproc", pytest.param("torchrun", marks=slow)])
@pytest.mark.parametrize("hung", [1, pytest.param(0, marks=slow)])
def test_suspended_rank_is_named(tmp_path, corpus, how, hung):
    """The other rank waits until the timeout and reports what it waited for."""
    place = Place(tmp_path / "place", corpus, **layout(1, 2), **{"parallel.timeout_s": 4.0})
    with place.started(how, long_step=(3, 1)) as process:
        ranks = place.wait_for_long_step(process, 2)
        os.kill(ranks[hung], signal.SIGSTOP)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert (
        f"rank {1 - hung} lost contact with rank {hung} during step 3: no response within 4 s"
        in err
    )
    assert "out of memory" not in err
    if how == "nproc":
        last = err.splitlines()[-1]
        assert last.startswith(f"ee-llm: rank {1 - hung} lost contact")
        assert f"Rank {hung} did not respond: its process {ranks[hung]} was suspended" in last


CONSOLES = {
    "head": ("single", '"$@" 2>&1 | head -n 1'),
    "a full disk": ("nproc", '"$@" >/dev/full 2>&1'),
    "closed streams": ("nproc", '"$@" <&- >&- 2>&-'),
    "a reader that ends": ("torchrun", '"$@" 2>&1 | head -n 1'),
}


@pytest.mark.parametrize(
    "console",
    ["head", "a full disk", "closed streams", pytest.param("a reader that ends", marks=slow)],
)
def test_lost_console_is_ignored(tmp_path, corpus, unstopped, console):
    how, shell = CONSOLES[console]
    options = layout(1, 2) if NUM_RANKS[how] == 2 else {}
    place = Place(tmp_path / "place", corpus, **options)
    place.finish(how, shell=f"set -o pipefail; {shell}", stdout=subprocess.DEVNULL)
    assert_equals_unstopped(place, unstopped[NUM_RANKS[how]])
    noted = events(place.run, "console lost")
    assert len(noted) == (0 if console == "closed streams" else 1)
    if console == "a full disk":
        assert noted[0]["error"] == "standard error: No space left on device"


@pytest.mark.parametrize("how", [pytest.param("single", marks=slow), "nproc"])
def test_signal_with_a_lost_console(place, unstopped, how):
    """Ctrl-C also ends `tee` before the run can print; a lost terminal has the same effect."""
    reader, writer = os.pipe()
    with place.started(how, long_step=(3, 2), stderr=writer, stdout=writer) as process:
        os.close(writer)
        place.wait_for_long_step(process, NUM_RANKS[how])
        os.close(reader)
        process.send_signal(signal.SIGHUP)
        process.wait(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP
    assert_saved(place, 3, "SIGHUP")
    place.finish(how)
    assert_equals_unstopped(place, unstopped[NUM_RANKS[how]])


@pytest.mark.parametrize("how", ["single"])
def test_nohup_is_respected(place, how):
    with place.started(how, long_step=(3, 1), shell='trap "" HUP; exec "$@"') as process:
        place.wait_for_long_step(process, 1)
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert events(place.run, "interrupted") == []


@pytest.mark.parametrize("how", ["single"])
def test_console_with_a_limited_encoding(place, how):
    """The separators of a report are not ASCII; they are escaped, and no record is lost."""
    err = place.finish(how, environment={"PYTHONIOENCODING": "ascii"})
    assert "step 6/6 \\u00b7 exit 1 loss" in err
    assert sorted(training_log(place.run)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "how", [pytest.param("single", marks=slow), "nproc", pytest.param("torchrun", marks=slow)]
)
def test_working_directory_does_not_shadow_libraries(place, how):
    """Ranks of all launchers have the same import path."""
    for name in ("megatron", "numpy"):
        (place.path / name).mkdir()
        (place.path / name / "__init__.py").write_text(f"raise SystemExit('imported {name} here')")
    environment = {"PYTHONPATH": str(ROOT)}  # without the working directory
    if how == "torchrun":
        environment["PYTHONSAFEPATH"] = "1"  # for torchrun; scripts/torchrun.sh sets it
    place.finish(how, environment=environment)
    assert json.loads((place.run / "log.jsonl").read_text().splitlines()[0])["step"] == 1
