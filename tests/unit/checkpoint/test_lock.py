"""A second run in a directory is refused while the first one lives, and no longer."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from ee_llm.checkpoint.lock import OutputLock

HOLDER = """
import sys, time
from ee_llm.checkpoint.lock import OutputLock
lock = OutputLock(sys.argv[1])
lock.take()
print("taken", flush=True)
time.sleep(600)
"""


def test_only_one_run_at_a_time_uses_a_directory(tmp_path):
    first, second = OutputLock(tmp_path), OutputLock(tmp_path)
    first.take()
    with pytest.raises(ValueError, match=rf"process {os.getpid()} on .*'{tmp_path}'.* --output"):
        second.take()
    second.release()  # without having the lock
    with pytest.raises(ValueError, match="another run"):
        second.take()
    first.release()
    second.take()
    second.release()


def test_a_killed_run_leaves_no_lock(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        lock = OutputLock(tmp_path)
        with pytest.raises(ValueError, match=f"process {holder.pid} on"):
            lock.take()
        holder.kill()
    lock.take()
    lock.release()


def test_a_file_system_without_locks_is_not_an_error(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    lock = OutputLock(tmp_path)
    lock.take()
    lock.release()
    assert "cannot be locked (No locks available)" in caplog.text
