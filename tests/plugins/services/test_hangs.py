"""A process that hangs says where and ends, with what it started; one that lives is left alone."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from forked import Forked

from selfsup.plugins.services import hangs
from selfsup.plugins.services.hangs import Hangs, Silence

HUNG = """
import ctypes, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from torch import nn
from selfsup.plugins.services.hangs import Hangs

def stuck(): time.sleep(1000)
def locked(): ctypes.PyDLL(None).sleep(1000)  # keeps Python's lock
def alive():
    for _ in range(30):
        service.step_finished(run, None)
        time.sleep(0.1)

def calibrate(batches, last):
    for number in range(batches):
        service.calibrating(run, number)
        time.sleep(0.1)
    time.sleep(last)
    service.calibrated()

child = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
config = {"train": {"timeout": float(sys.argv[3])}}
run = SimpleNamespace(objective=nn.Linear(1, 1), folder=Path(sys.argv[1]), done=7, config=config)
service = Hangs()
calibrates = sys.argv[2] == "calibrates"
if not calibrates:
    service.run_started(run)
    service.step_finished(run, None)
Path(sys.argv[1], ".child").write_text(str(child.pid))
Path(sys.argv[1], ".child").rename(Path(sys.argv[1], "child"))
if calibrates:
    calibrate(30, 0)  # batch after batch for three times what is waited
    time.sleep(3)  # nobody watches what comes between
    calibrate(2, 1000)
globals()[sys.argv[2]]()
service.run_finished(run, None)
child.kill()
"""


@pytest.fixture
def hung(tmp_path):
    started = []

    def start(how, limit):
        command = [sys.executable, "-c", HUNG, str(tmp_path), how, str(limit)]
        process = Forked(command)
        started.append(process)
        child, end = tmp_path / "child", time.monotonic() + 30
        while not child.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return process, int(child.read_text())

    yield start
    for process in started:
        process.kill()
        process.wait(30)


def test_it_says_where_it_hangs_and_leaves_nothing(hung, tmp_path):
    process, child = hung("stuck", 0.4)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(
        r"error: this process hangs: step 7 did not end and nothing else happened for \d s; it is at", said
    )
    assert "(stuck)" in said
    assert "--set hangs.seconds=4" in said
    assert "in stuck" in said  # the stack
    assert (tmp_path / "status").read_text().startswith("FAILED this process hung: step 7 did not end")
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()


def test_it_ends_though_the_lock_of_python_is_held(hung):
    process, child = hung("locked", 0.4)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        os.kill(child, signal.SIGKILL)  # nothing of Python ran to end it
    assert process.returncode == 1
    assert "Timeout (0:00:02" in said
    assert "in locked" in said


def test_a_calibration_lives_by_its_batches_and_ends_when_it_hangs(hung, tmp_path):
    process, _ = hung("calibrates", 0.3)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: this process hangs: its calibration did not end and nothing else happened for " in said
    assert "(calibrate)" in said
    assert (tmp_path / "status").read_text().startswith("FAILED this process hung: its calibration did not end")


def test_nothing_of_the_calibration_stays(fake_run):
    service, run = Hangs(seconds=1000), fake_run()
    service.calibrated()  # it asked for no batch
    service.calibrating(run, 0)
    run.objective(torch.zeros(4, 2))
    assert service.signs.count == 2  # the batch, and what is called with it
    service.calibrated()
    assert not service.thread.is_alive()
    assert not run.objective._forward_pre_hooks


def test_a_process_that_was_stopped_for_a_while_goes_on(hung):
    process, _ = hung("alive", 1.0)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


@pytest.fixture
def watch(fake_run, monkeypatch):
    """A watch over a run; `.ended` says for how long it had been silent."""
    monkeypatch.setattr(hangs, "LOCKED", 1000)
    monkeypatch.setattr(hangs, "end", lambda run, doing, silent, limit: run.ended.append(silent))
    run = fake_run()
    run.ended = []
    service = Hangs(seconds=0.4)
    service.run_started(run)
    yield service, run
    service.run_finished(run, None)


def beat(seconds, sign):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sign()
        time.sleep(0.02)


def test_every_sign_of_life_counts(watch, fake_report):
    service, run = watch
    report = fake_report(run, 0)
    grown = run.folder / "checkpoints" / ".step-1" / "model.safetensors"
    grown.parent.mkdir(parents=True)
    size = count(1)
    signs = {
        "a step": lambda: service.step_finished(run, report),
        "a validation": lambda: run.objective(torch.zeros(4, 2)),
        "measured": lambda: service.measured(run),
        "a checkpoint that grows": lambda: grown.write_bytes(b"x" * next(size)),
    }
    signs["a step"]()
    for name, sign in signs.items():
        beat(0.7, sign)
        assert run.ended == [], name
    end = time.monotonic() + 20  # on a busy machine there were silences, which are waited for ten times
    while not run.ended and time.monotonic() < end:
        time.sleep(0.05)
    assert run.ended
    assert run.ended[0] > 0.4


def test_nothing_is_left_of_the_watch(watch):
    service, run = watch
    service.run_finished(run, None)
    assert not service.thread.is_alive()
    assert not run.objective._forward_pre_hooks
    time.sleep(0.8)
    assert run.ended == []


def silent(silence, seconds, first=False):
    return sum(silence.passed(1.0, False, first) for _ in range(seconds)) > 0


def test_the_first_step_may_take_longer():
    assert not silent(Silence(limit=10.0, tick=1.0), 30, first=True)
    assert silent(Silence(limit=10.0, tick=1.0), 31, first=True)


def test_slow_steps_are_waited_for():
    silence = Silence(limit=10.0, tick=1.0)
    assert not silent(silence, 30, first=True)
    silence.passed(1.0, True, first=True)
    assert not silent(silence, 100)
    assert silent(silence, 1)


def test_time_in_which_it_was_stopped_does_not_count():
    silence = Silence(limit=10.0, tick=1.0)
    assert not silence.passed(3600.0, False, first=False)
    assert silence.now == 2.0
