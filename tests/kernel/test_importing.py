"""An import that hangs is named and given up, and one that would end the process does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from selfsup.kernel import importing
from selfsup.kernel.importing import watched


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(importing, "NOTE", 0.1)
    monkeypatch.setattr(importing, "GIVE_UP", 0.3)


def test_a_hang_is_named_and_then_given_up(soon, capfd):
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"given up after 0\.3 s"), watched("the thing", "HIDE=it"):
        time.sleep(30)
    assert time.monotonic() - began < 5
    assert capfd.readouterr().err == "still importing the thing; without it: HIDE=it\n"
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_is_ours_is_waited_for(soon, capfd):
    with watched("the thing", "HIDE=it", ours=True):
        time.sleep(0.5)
    assert capfd.readouterr().err.startswith("still importing the thing")


def test_a_hang_that_swallows_the_error_is_given_up_all_the_same(soon):
    def stubborn():
        for _ in range(3):
            try:
                time.sleep(30)
            except TimeoutError:
                continue
            return
        raise TimeoutError("thrice")

    with pytest.raises(TimeoutError, match="thrice"), watched("x", "y"):
        stubborn()


def test_an_import_that_ends_in_time_leaves_nothing_behind(soon, capfd):
    with watched("x", "y"):
        pass
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_an_alarm_of_somebody_else_is_left_alone(soon):
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with watched("x", "y"):
            time.sleep(0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert heard == [1]


def test_in_a_thread_there_is_no_alarm(soon):
    done = []

    def work():
        with watched("x", "y"):
            time.sleep(0.5)
        done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


def test_the_end_of_the_process_becomes_an_exception():
    own = os._exit
    with pytest.raises(SystemExit, match=r"os._exit\(3\)"), watched("x", "y"):
        os._exit(3)
    assert os._exit is own


def test_a_child_and_whoever_kept_it_may_end_themselves():
    code = (
        "import os\nfrom selfsup.kernel.importing import watched\n"
        "with watched('x', 'y'):\n"
        "    from os import _exit\n"
        "    child = os.fork()\n"
        "    if not child: os._exit(5)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5\n"
        "_exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")
