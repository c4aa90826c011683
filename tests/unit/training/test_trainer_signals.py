"""Signals that ask a run to end: the first is noted, one more is meant."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ee_llm.training import signals
from ee_llm.training.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_is_noted(number, capfd, request):
    # `nohup`, and a shell's background job, make the tests ignore signals.
    inherited = signal.signal(number, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, inherited))
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), number)
        assert stop.received == number
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher passes it on, soon after
        assert stop.received == number
    assert signal.getsignal(number) is before
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"{number.name}: finishing the step")


def test_only_the_first_rank_speaks(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_one_more_ends_at_once(monkeypatch):
    """Who presses Ctrl-C twice does not want to wait for a checkpoint of many gigabytes."""
    monkeypatch.setitem(signals.REPEAT_S, signal.SIGINT, 0.0)
    # A shell's background job, as tests may be, has been told to ignore it.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_a_sigterm_that_is_passed_on_late_is_the_same_request(monkeypatch):
    """SLURM signals all processes, and torchrun passes its own on: seconds later on a busy node."""
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        late = time.monotonic() + 8.0
        monkeypatch.setattr(signals.time, "monotonic", lambda: late)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM


def test_one_more_sigterm_kills(tmp_path):
    code = (
        "import os, signal, time; from ee_llm.training import signals\n"
        "signals.REPEAT_S[signal.SIGTERM] = 0.0\n"
        "with signals.StopSignals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGTERM


def test_outside_of_the_main_thread_nothing_is_noted():
    """Python refuses handlers there; a run in a notebook's or server's thread must still start."""
    failures = []

    def run():
        try:
            with StopSignals() as stop:
                failures.extend([stop.received] * stop.received)
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []
