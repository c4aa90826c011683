"""Stop signals: the first one is recorded, a repeated one ends the process."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ee_llm.launch import signals
from ee_llm.training.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_first_signal_is_recorded(number, capfd, request):
    # `nohup`, or a shell's background job, makes the tests ignore signals.
    inherited = signal.signal(number, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, inherited))
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), number)
        assert stop.received == number
        os.kill(os.getpid(), signal.SIGTERM)  # forwarded by a launcher soon after
        assert stop.received == number
    assert signal.getsignal(number) is before
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"{number.name}: finishing the step")


def test_only_rank_zero_prints(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_repeated_signal_ends_the_run_at_once(monkeypatch):
    """A user who presses Ctrl-C twice does not want to wait for a large checkpoint."""
    monkeypatch.setitem(signals.REPEAT_S, signal.SIGINT, 0.0)
    # A shell's background job, which may run the tests, ignores SIGINT.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_sigterm_that_is_forwarded_late_is_the_same_request(monkeypatch):
    """SLURM signals all processes, and torchrun forwards its own, seconds later on a busy node."""
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        late = time.monotonic() + 8.0
        monkeypatch.setattr(signals.time, "monotonic", lambda: late)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM


@pytest.mark.thorough
def test_repeated_sigterm_kills(tmp_path):
    code = (
        "import os, signal, time\n"
        "from ee_llm.launch import signals; from ee_llm.training.signals import StopSignals\n"
        "signals.REPEAT_S[signal.SIGTERM] = 0.0\n"
        "with StopSignals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGTERM


def test_other_threads_record_nothing():
    """Python allows no handlers there, but a run in a server's thread must still start."""
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
