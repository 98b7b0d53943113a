"""Curves for TensorBoard, read back with its own reader."""

from __future__ import annotations

import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selfsup.kernel.errors import ConfigError
from selfsup.plugins.common import readings
from selfsup.plugins.services import tensorboard
from selfsup.plugins.services.tensorboard import TensorBoard


def curves(run):
    """{name: [(step, value)]}, as TensorBoard shows them."""
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def write(run, report, numbers, service=None, **options):
    service = service or TensorBoard(**{"every": 1, **options})
    service.run_composed(run)
    service.run_started(run)
    if run.first == 0:
        service.measured(run, {"validation/loss": 9.0})
    for number in numbers:
        service.step_finished(run, report(run, number, loss=float(number), accuracy=0.25))
        service.measured(run, {"validation/loss": number / 2})
    service.run_finished(run, None)


def test_every_number_has_its_curve(fake_run, fake_report, monkeypatch):
    clock = iter([0.0, 2.0, 50.0, 52.0])
    monkeypatch.setattr(readings.time, "perf_counter", lambda: next(clock))
    run, service = fake_run(), TensorBoard(every=1)
    service.run_started(run)
    service.step_finished(run, fake_report(run, 0, accuracy=0.25))
    service.measured(run, {"validation/loss": 9.0})
    service.step_finished(run, fake_report(run, 1, accuracy=0.25))
    service.run_finished(run, None)
    assert curves(run) == {
        "train/loss": [(0, 1.5), (1, 1.5)],
        "train/norm": [(0, 2.0), (1, 2.0)],
        "train/lr": [(0, 0.5), (1, 0.5)],
        "train/accuracy": [(0, 0.25), (1, 0.25)],
        "throughput/samples per second": [(0, 1.0), (1, 1.0)],
        "throughput/s of sound per second": [(0, 2.0), (1, 2.0)],
        "validation/loss": [(0, 9.0)],
    }


@pytest.mark.parametrize("first", [0, 2])
def test_a_resumed_run_goes_on_with_the_curves(fake_run, fake_report, first):
    """As after kill -9: what the first one wrote after step 2 is on the disk, and is done again."""
    write(fake_run(), fake_report, range(5))
    write(run := fake_run(first=first), fake_report, range(first, 7))
    found = curves(run)
    assert found["train/loss"] == [(step, float(step)) for step in range(7)]
    assert found["validation/loss"] == [(-1, 9.0), *((step, step / 2) for step in range(7))]


def test_points_are_on_the_disk_when_a_checkpoint_is(fake_run, fake_report):
    run, service = fake_run(), TensorBoard(every=1)
    run.device = torch.device("cuda")  # only asked for its type
    service.run_started(run)
    for number in range(5):
        service.step_finished(run, fake_report(run, number))
    assert "train/loss" not in curves(run)
    service.checkpoint_saved(run, run.folder)
    assert len(curves(run)["train/loss"]) == 5
    service.run_finished(run, None)


def test_points_may_be_rare(fake_run, fake_report):
    write(run := fake_run(), fake_report, range(10), every=4)
    assert [step for step, _ in curves(run)["train/loss"]] == [0, 4, 8]
    assert len(curves(run)["validation/loss"]) == 11


def test_it_is_off_until_asked_for(fake_run, fake_report, monkeypatch, tmp_path):
    write(fake_run(), fake_report, [0], TensorBoard())
    write(fake_run(folder=None), fake_report, [0])
    monkeypatch.setattr(tensorboard.distributed, "rank", lambda: 1)
    write(fake_run(), fake_report, [0])
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_a_run_does_not_begin(fake_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    TensorBoard().run_composed(fake_run())
    with pytest.raises(ConfigError, match=r"needs the package tensorboard: pip install 'selfsup\[tensorboard\]'"):
        TensorBoard(every=10).run_composed(fake_run())


def test_what_cannot_be_written_does_not_end_the_run(fake_run, fake_report, capsys):
    run = fake_run()
    (run.folder / "tensorboard").write_text("a file where the folder should be")
    write(run, fake_report, range(2))
    assert capsys.readouterr().err.count("the curves for TensorBoard end here") == 1
