"""What logs hold of a step, and when the device is read for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from selfsup.kernel import Step
from selfsup.kernel.loop import Report
from selfsup.plugins.common import readings
from selfsup.plugins.common.readings import Reading, Readings


def made(device="cpu"):
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    return SimpleNamespace(batch=6, device=torch.device(device), optimizer=optimizer)


def report(number, loss=1.5, **metrics):
    metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    one = torch.ones(())
    return Report(Step(number, 9), one, torch.tensor(loss), metrics, 2 * one, one, one > 0, {"tokens": 4.0}, {})


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(readings.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(readings.time, "time", lambda: now[0])
    return now


def test_a_reading_holds_the_numbers_of_its_step(clock, monkeypatch):
    monkeypatch.setattr(readings.distributed, "world", lambda: 2)
    kept = Readings()
    kept.start()
    clock[0] += 3.0
    assert kept.keep(made(), report(0, accuracy=0.25)) == [
        Reading(
            0, 1.5, 2.0, 0.5, samples_per_second=2.0, amount={"tokens": 8.0}, time=103.0, metrics={"accuracy": 0.25}
        )
    ]


def test_thinned_readings_have_the_rate_of_all_steps_since_the_last(clock):
    kept, found = Readings(every=4), []
    kept.start()
    for number in range(9):
        clock[0] += 2.0
        found += kept.keep(made(), report(number))
    assert [reading.step for reading in found] == [0, 4, 8]
    assert {reading.samples_per_second for reading in found} == {3.0}


def test_starting_the_clock_leaves_out_what_was_before(clock):
    kept = Readings(every=2)
    kept.start()
    kept.keep(made(), report(1))
    clock[0] += 50.0
    kept.start()
    clock[0] += 2.0
    (reading,) = kept.keep(made(), report(2))
    assert reading.samples_per_second == 3.0


@pytest.mark.parametrize(("every", "read_at"), [(1, [9, 19]), (4, [8, 20]), (20, [0, 20])])
def test_a_gpu_is_read_every_few_steps(every, read_at):
    kept, run = Readings(every=every, patience=10), made("cuda")  # only asked for its type
    assert [number for number in range(24) if kept.keep(run, report(number))] == read_at
    assert [reading.step for reading in kept.read()] == ([20, 21, 22, 23] if every == 1 else [])
    assert kept.read() == []
