"""When checkpoints are written, and that all processes decide alike."""

import pytest

from selfsup.plugins.services import checkpoints
from selfsup.plugins.services.checkpoints import Checkpoints


class Clock:
    """A monotonic clock that goes on by `pace` seconds a step."""

    def __init__(self, pace=1.0):
        self.now, self.pace = 100.0, pace

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(checkpoints.time, "monotonic", clock.monotonic)
    return clock


def go(service, run, report, clock, until=None, error=None):
    service.run_started(run)
    for number in range(run.first, until or run.total):
        clock.now += clock.pace
        service.step_finished(run, report(run, number))
    service.run_finished(run, error)
    return run.saves


@pytest.mark.parametrize(("steps", "first", "saves"), [(6, 0, [6, 12, 18, 20]), (5, 7, [10, 15, 20])])
def test_every_few_steps_and_at_the_end_once(fake_run, fake_report, clock, steps, first, saves):
    assert go(Checkpoints(steps=steps), fake_run(total=20, first=first), fake_report, clock) == saves


def test_by_the_clock_alone(fake_run, fake_report, clock):
    saves = go(Checkpoints(minutes=1.0), fake_run(total=200), fake_report, clock)
    assert saves == [60, 120, 180, 200]


def test_the_clock_is_asked_rarely(fake_run, fake_report, clock, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoints.distributed, "total", lambda x: asked.append(1) or x)
    go(Checkpoints(minutes=1000.0), fake_run(total=1000), fake_report, clock)
    assert len(asked) < 15


def test_only_the_first_process_has_a_clock_that_counts(fake_run, fake_report, clock, monkeypatch):
    # The other process's clock stands still; it saves when the first one's share of the sum says 0.
    clock.pace = 0.0
    answers = iter([2, 0, 5])
    monkeypatch.setattr(checkpoints.distributed, "rank", lambda: 1)
    monkeypatch.setattr(checkpoints.distributed, "total", lambda mine: mine + next(answers))
    monkeypatch.setattr(checkpoints.distributed, "anyone", lambda flag: flag)
    assert go(Checkpoints(minutes=1.0), fake_run(total=6), fake_report, clock) == [3, 6]


def test_an_early_stop_is_saved_and_an_error_is_not(fake_run, fake_report, clock, tmp_path):
    assert go(Checkpoints(), fake_run(folder=tmp_path / "a"), fake_report, clock, until=7) == [7]
    assert go(Checkpoints(), fake_run(folder=tmp_path / "b"), fake_report, clock, until=7, error=OSError()) == []


def test_nothing_is_saved_twice_or_before_the_first_step(fake_run, fake_report, clock):
    run = fake_run(first=20, total=20)
    service = Checkpoints()
    service.run_started(run)
    service.run_finished(run, None)
    assert run.saves == []
    assert go(Checkpoints(steps=7), fake_run(total=20), fake_report, clock, until=7) == [7]


def test_without_a_folder_nothing_is_saved(fake_run, fake_report, clock):
    assert go(Checkpoints(steps=1), fake_run(folder=None), fake_report, clock) == []


def test_the_newest_are_kept(fake_run, fake_report, clock, monkeypatch):
    monkeypatch.setattr(checkpoints.state, "verify", lambda folder: None)
    service = Checkpoints(steps=5, keep=2)
    run = fake_run(services=[service])
    go(service, run, fake_report, clock)
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == ["step-00000015", "step-00000020"]


def test_while_steps_are_left_out_healthy_ones_stay(fake_run, fake_report, clock):
    run, service = fake_run(total=6), Checkpoints(steps=1)
    service.run_started(run)
    for number in range(6):
        service.step_finished(run, fake_report(run, number, loss=float("nan") if number in (2, 3) else 1.0))
    assert run.saves == [1, 2, 5, 6]
