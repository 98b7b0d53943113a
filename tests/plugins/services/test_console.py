"""The console: what it says and how often, in a terminal and elsewhere."""

import io
import os

import pytest
import torch
from rich.console import Console as Terminal

from selfsup.plugins.services import console
from selfsup.plugins.services.console import Console, clock


def show(run, report, numbers=(), terminal=False, width=200, **options):
    """Everything that was printed for these steps."""
    service = Console(**options)
    out = io.StringIO()
    service.terminal = Terminal(file=out, force_terminal=terminal, width=width, highlight=False)
    service.run_started(run)
    for number in numbers:
        service.step_finished(run, report(run, number, accuracy=0.25))
    service.run_finished(run, None)
    return out.getvalue()


def test_it_opens_with_the_data_and_the_recipe(fake_run, fake_report):
    run = fake_run(first=5)
    run.notes = ["resumed at step 5"]
    run.plugins.manager.get_plugin = lambda name: type("O", (), {"describe": lambda self, batch: f"lr for {batch}"})()
    lines = show(run, fake_report).splitlines()
    assert lines == [
        "hide      numbers, mixer, 10 parameters, preset tiny",
        "data      20 numbers",
        "          1 was left out: it is empty",
        "train     20 steps of 2 samples, 2 epochs, seed 3",
        "optimizer lr for 2",
        "device    cpu, fp32",
        f"folder    {run.folder}",
        "note      resumed at step 5",
    ]


def test_a_large_model_on_a_cpu_is_said_to_be_one(fake_run, fake_report, monkeypatch):
    assert "of a CPU" not in show(fake_run(), fake_report)
    monkeypatch.setattr(console, "LARGE", 10)
    said = "note      10 parameters and 2 samples a step ask much time and memory of a CPU; "
    assert f"{said}--batch N" in show(fake_run(), fake_report)
    (run := fake_run()).config["preset"] = "base"
    assert f"{said}--preset tiny is small, --batch N" in show(run, fake_report)


def test_lines_hold_loss_metrics_rates_and_time_left(fake_run, fake_report):
    line = show(fake_run(), fake_report, [0]).splitlines()[-1]
    for part in ("step 1/20", "loss 1.5", "accuracy 0.25", "samples/s", "s of sound/s", "left", " GB"):
        assert part in line


def test_without_a_terminal_lines_are_rare(fake_run, fake_report, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])

    def report(run, number, **metrics):
        now[0] += 1.0
        return fake_report(run, number, **metrics)

    lines = show(fake_run(total=40), report, range(40), every=5, pause=8.0).splitlines()
    steps = [line.split(" ")[1] for line in lines if line.startswith("step ")]
    assert steps == ["1/40", "10/40", "20/40", "30/40", "40/40"]
    (line,) = [line for line in lines if line.startswith("step 20/40")]
    assert "2 samples/s" in line  # two a second
    assert "0:20 left" in line


def test_values_are_read_every_few_steps_only(fake_run, fake_report, monkeypatch):
    read = []
    before = console.readings
    monkeypatch.setattr(console, "readings", lambda report: read.append(report.step.number + 1) or before(report))
    show(fake_run(), fake_report, range(20), every=6, style="bar", terminal=True)
    assert read == [1, 6, 12, 18, 20]


def test_a_terminal_gets_a_bar(fake_run, fake_report):
    text = show(fake_run(), fake_report, range(20), terminal=True)
    assert "20/20" in text
    assert "━" in text
    assert "loss 1.5" in text


def test_many_readings_do_not_push_the_bar_out_of_a_narrow_terminal(fake_run, fake_report):
    def report(run, number, **metrics):
        return fake_report(run, number, **dict.fromkeys(["one long name", "another long name", "a third one"], 0.1))

    text = show(fake_run(), report, range(20), terminal=True, width=60)
    assert "20/20" in text
    assert "━" in text
    assert "third one 0.1" in text
    assert "samples/s" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_what_was_measured_is_a_line_above_the_bar(fake_run, fake_report, terminal):
    class Measures(Console):
        def step_finished(self, run, report):
            super().step_finished(run, report)
            self.measured(run, {"validation/loss": 1.9312, "validation/accuracy": 0.5, "online/knn": 0.25})

    out, run, service = io.StringIO(), fake_run(), Measures()
    service.terminal = Terminal(file=out, force_terminal=terminal, width=100, highlight=False)
    service.run_started(run)
    service.step_finished(run, fake_report(run, 0))
    service.run_finished(run, None)
    (line,) = [n for n, text in enumerate(out.getvalue().splitlines()) if "validation" in text]
    lines = out.getvalue().splitlines()
    assert lines[line].endswith("step 1/20 · validation loss 1.931, accuracy 0.5, online knn 0.25")
    assert not terminal or "━" in lines[line + 1]


def test_the_time_that_measuring_takes_is_no_part_of_the_rates(fake_run, fake_report, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    out, run, service = io.StringIO(), fake_run(), Console(every=2, pause=0)
    service.terminal = Terminal(file=out, width=200)
    service.run_started(run)
    for number in range(4):
        now[0] += 1.0  # a step
        service.step_finished(run, fake_report(run, number))
        now[0] += 50.0
        service.measured(run, {"validation/loss": 1.0})
    lines = [line for line in out.getvalue().splitlines() if "samples/s" in line]
    assert len(lines) == 3
    assert all("2 samples/s" in line for line in lines)


def test_other_processes_and_off_show_no_measurement(fake_run, fake_report):
    out, run, service = io.StringIO(), fake_run(), Console(style="off")
    service.terminal = Terminal(file=out, width=200)
    service.run_started(run)
    service.measured(run, {"validation/loss": 1.0})
    assert out.getvalue() == ""


def test_a_long_note_is_indented_in_a_terminal(fake_run, fake_report):
    run = fake_run()
    run.source.notes = ["left out " * 12]
    text = show(run, fake_report, terminal=True, width=60)
    assert "\n          left out" in text


def test_bad_samples_are_named_then_counted(fake_run, fake_report):
    run = fake_run()
    bad = dict.fromkeys(range(8), "no number")
    text = show(run, lambda run, number, **metrics: fake_report(run, number, bad=bad, **metrics), [0, 1])
    assert text.count(": no number") == 5
    assert "number-0.txt: no number" in text
    assert "8 samples in all" in text


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_speaks_and_off_is_silent(fake_run, fake_report, monkeypatch, rank):
    monkeypatch.setattr(console.distributed, "rank", lambda: rank)
    text = show(fake_run(), fake_report, [0], style="off" if rank == 0 else "auto")
    assert text == ""


def test_names_from_files_are_not_read_as_markup(fake_run, fake_report):
    run = fake_run()
    run.source.notes = ["[red]odd[/] name"]
    assert "[red]odd[/] name" in show(run, fake_report)


def test_rates_count_all_processes(fake_run, fake_report, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(console.distributed, "world", lambda: 3)

    def report(run, number, **metrics):
        now[0] += 1.0
        return fake_report(run, number, **metrics)

    assert "12 s of sound/s" in show(fake_run(), report, [0])


def test_clock():
    assert [clock(s) for s in (9, 90, 3601)] == ["0:09", "1:30", "1:00:01"]


def test_memory_of_this_process_is_plausible():
    assert 1e7 < console.resident() < 1e12
    assert console.memory(torch.device("cpu")).endswith(" GB")


def test_an_output_that_cannot_be_written_stops_nothing(fake_run, fake_report, monkeypatch, capsys):
    full = open("/dev/full", "w")  # noqa: SIM115 - it cannot be closed as others can
    monkeypatch.setattr(console.sys, "stdout", full)
    service, run = Console(pause=0, every=1), fake_run()
    service.run_started(run)
    for number in range(3):
        service.step_finished(run, fake_report(run, number))
    service.run_finished(run, None)
    monkeypatch.undo()
    os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    full.close()
    assert capsys.readouterr().err == "warning: the output ends here, it cannot be written: No space left on device\n"
