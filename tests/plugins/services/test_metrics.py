"""metrics.jsonl: what a line holds, and that it stays valid and complete through resumes and damage."""

import json

import pytest
import torch

from selfsup.plugins.services import metrics
from selfsup.plugins.services.metrics import Metrics


def rows(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def write(run, report, numbers, **options):
    service = Metrics(**options)
    service.run_started(run)
    for number in numbers:
        service.step_finished(run, report(run, number, accuracy=0.25))
    service.run_finished(run, None)


def test_a_line_holds_the_step(fake_run, fake_report, monkeypatch):
    clock = iter([10.0, 12.0, 12.5])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    run = fake_run()
    write(run, fake_report, [0, 1])
    first, row = rows(run)
    assert first["samples_per_second"] == 1.0
    assert row.pop("time") > 1e9
    assert row == {
        "step": 1,
        "loss": 1.5,
        "norm": 2.0,
        "lr": 0.5,
        "samples_per_second": 4.0,  # 2 in half a second
        "amount": {"s of sound": 4.0},
        "metrics": {"accuracy": 0.25},
    }


def test_what_is_not_finite_is_null(fake_run, fake_report):
    run, service = fake_run(), Metrics()
    service.run_started(run)
    run.optimizer.param_groups[0]["lr"] = float("inf")
    service.step_finished(run, fake_report(run, 0, loss=float("nan"), norms=(float("inf"),) * 4, good=float("-inf")))
    service.run_finished(run, None)
    text = (run.folder / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["loss"] is row["norm"] is row["lr"] is row["metrics"]["good"] is None


@pytest.mark.parametrize("torn", ['{"step": 1, "lo', '{"step": 1}', "\xff\n", "[]\n", ""])
def test_a_resumed_run_replaces_the_steps_it_does_again(fake_run, fake_report, torn):
    write(fake_run(), fake_report, range(5))
    run = fake_run(first=3)
    with (run.folder / "metrics.jsonl").open("a", encoding="latin-1") as file:
        file.write(torn)
    write(run, fake_report, range(3, 6))
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in run.folder.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_in_the_same_folder_starts_the_file_anew(fake_run, fake_report):
    write(fake_run(), fake_report, range(5))
    write(run := fake_run(), fake_report, [0])
    assert [row["step"] for row in rows(run)] == [0]


def test_on_a_gpu_values_are_read_every_few_steps_and_before_a_checkpoint(fake_run, fake_report):
    run, service = fake_run(), Metrics(every=3)
    run.device = torch.device("cuda")  # only asked for its type
    service.run_started(run)
    seen = []
    for number in range(5):
        service.step_finished(run, fake_report(run, number))
        seen.append(len(rows(run)))
    assert seen == [0, 0, 3, 3, 3]
    service.checkpoint_saved(run, run.folder)
    assert len(rows(run)) == 5
    service.run_finished(run, None)


def test_lines_are_on_disk_after_every_step_on_a_cpu(fake_run, fake_report):
    run, service = fake_run(), Metrics()
    service.run_started(run)
    service.step_finished(run, fake_report(run, 0))
    assert len(rows(run)) == 1
    service.run_finished(run, None)


def test_without_a_folder_and_on_other_processes_nothing_is_written(fake_run, fake_report, monkeypatch, tmp_path):
    write(fake_run(folder=None), fake_report, [0])
    monkeypatch.setattr(metrics.distributed, "rank", lambda: 1)
    write(fake_run(), fake_report, [0])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_file_and_not_the_run(fake_run, fake_report, capsys):
    run, service = fake_run(), Metrics()
    service.run_started(run)
    service.file.close()
    service.file = open("/dev/full", "w")  # noqa: SIM115
    service.step_finished(run, fake_report(run, 0))
    service.step_finished(run, fake_report(run, 1))
    service.run_finished(run, None)
    assert capsys.readouterr().err.count("metrics.jsonl ends here") == 1


def measured(service, run, **values):
    service.measured(run, {f"validation/{name}": value for name, value in values.items()})


def test_what_was_measured_stands_behind_the_step_after_which_it_was(fake_run, fake_report):
    run, service = fake_run(), Metrics(every=3)
    run.device = torch.device("cuda")  # only asked for its type: the step waits to be read
    service.run_started(run)
    measured(service, run, loss=2.0)
    service.step_finished(run, fake_report(run, 0))
    measured(service, run, loss=1.0, accuracy=float("nan"))
    service.run_finished(run, None)
    before, step, after = rows(run)
    assert (before["step"], before["measured"]) == (-1, {"validation/loss": 2.0})
    assert step["loss"] == 1.5
    assert after.pop("time") > 1e9
    assert after == {"step": 0, "measured": {"validation/loss": 1.0, "validation/accuracy": None}}


@pytest.mark.parametrize(("first", "kept"), [(0, []), (1, [-1, 0]), (2, [-1, 0, 1]), (3, [-1, 0, 1, 2])])
def test_a_resumed_run_measures_again_what_it_had_not_saved(fake_run, fake_report, first, kept):
    run, service = fake_run(), Metrics()
    service.run_started(run)
    measured(service, run, loss=9.0)
    for number in range(3):
        service.step_finished(run, fake_report(run, number))
        measured(service, run, loss=float(number))
    service.run_finished(run, None)
    service.run_started(run := fake_run(first=first))
    service.run_finished(run, None)
    assert [row["step"] for row in rows(run) if "measured" in row] == kept
    assert [row["step"] for row in rows(run) if "loss" in row] == [step for step in kept if step >= 0]


def test_the_time_that_measuring_takes_is_no_part_of_a_step(fake_run, fake_report, monkeypatch):
    clock = iter([10.0, 12.0, 99.0, 99.5])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    run, service = fake_run(), Metrics()
    service.run_started(run)
    service.step_finished(run, fake_report(run, 0))
    measured(service, run, loss=1.0)
    service.step_finished(run, fake_report(run, 1))
    service.run_finished(run, None)
    assert [row["samples_per_second"] for row in rows(run) if "loss" in row] == [1.0, 4.0]
