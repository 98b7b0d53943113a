"""The validation loss: over every sample once, the same each time, and without a trace in training."""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from forked import Forked, together

from selfsup.kernel import hookimpl, loop
from selfsup.kernel.errors import ConfigError, DataError
from selfsup.kernel.random import tag
from selfsup.plugins.services import validation
from selfsup.plugins.services.validation import shares

HELD = "50 73"  # 23 samples: no batch and no number of processes divides them


def measured(run):
    return run.plugins.manager.get_plugin("listener").heard


def weights(run):
    return {name: tensor.clone() for name, tensor in run.objective.state_dict().items()}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def by_hand(run, first, end, leave_out=()):
    """The loss of one batch of all samples, in eval mode."""
    index = [i for i in range(end - first) if i not in leave_out]
    reader = validation.Samples(run.plugins.manager.get_plugin("validation").samples.reader)
    batch, bad = reader[index]
    assert bad == {}
    assert batch["ids"].tolist() == [tag(0, i) for i in index]
    run.objective.eval()
    with torch.no_grad():
        loss = run.objective(batch, run.step(0))
    return float(loss.total)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [*range(5, 17), 29, 30, 31])
def test_a_divisible_loss_counts_every_sample_once(n, world):
    for share in (1, 2, 4):
        parts = [shares(n, share * world, world, rank, True) for rank in range(world)]
        assert len({tuple(len(places) for places, _ in part) for part in parts}) == 1  # gathered shapes are alike
        assert sorted(place for part in parts for places, counts in part if counts for place in places) == [*range(n)]
        assert all(0 <= place < n for part in parts for places, _ in part for place in places)


@pytest.mark.parametrize(("n", "batch", "world"), [(23, 8, 2), (24, 8, 2), (7, 8, 2), (9, 3, 3), (10, 3, 1), (8, 8, 1)])
def test_a_loss_that_compares_samples_sees_full_batches_of_different_ones(n, batch, world):
    parts = [shares(n, batch, world, rank, False) for rank in range(world)]
    whole = [[*chain(*(places for places, _ in each))] for each in zip(*parts, strict=True)]
    size = min(batch, n - n % world)
    assert all(len(places) == len(set(places)) == size for places in whole)
    assert set(chain(*whole)) == set(range(n))
    assert len(whole) == -(-n // size)


def test_it_is_the_weighted_mean_over_the_whole_set(start):
    run = start(validation__data=HELD, train__steps=3)
    loop.train(run)
    ((done, values),) = measured(run)
    assert done == 3
    assert values["validation/loss"] == pytest.approx(by_hand(run, 50, 73), rel=1e-5)
    assert set(values) == {"validation/loss", "validation/size", "validation/fraction"}


@pytest.mark.parametrize("batch", [1, 5, 23, 64])
def test_the_batch_does_not_matter_where_a_loss_can_be_divided(start, batch):
    values = []
    for options in ({}, {"validation__batch": batch}):
        run = start(validation__data=HELD, train__steps=2, **options)
        loop.train(run)
        values.append(measured(run)[-1][1])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_every_measurement_draws_the_same_and_reads_the_clock_of_its_step(start):
    run = start(validation__data=HELD, train__steps=4, validation__every=2, validation__start=True, optimizer__lr=0.0)
    loop.train(run)
    (_, first), (_, second), (_, last) = measured(run)
    assert [done for done, _ in measured(run)] == [0, 2, 4]
    assert [v.pop("validation/fraction") for v in (first, second, last)] == [0.0, 0.25, 0.75]
    assert first == second == last


@pytest.mark.parametrize("objective", ["hide", "contrast"])
def test_training_does_not_notice_it(start, objective):
    runs = [start(objective__name=objective, train__steps=4, **o) for o in ({}, {"validation__data": HELD})]
    runs[1].plugins.manager.get_plugin("validation").every = 1
    draws = []
    for run in runs:
        torch.manual_seed(0)
        loop.train(run)
        draws.append(torch.get_rng_state())
    plain, watched = map(weights, runs)
    assert len(measured(runs[1])) == 4
    assert torch.equal(*draws)
    assert runs[1].objective.training
    for name in plain:
        assert torch.equal(plain[name], watched[name]), name


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_run_that_was_interrupted_has_measured_what_an_uninterrupted_one_has(start, tmp_path, stop):
    options = {"train__steps": 8, "validation__data": HELD, "validation__every": 2, "validation__start": True}
    whole = start(tmp_path / "whole", **options)
    loop.train(whole)
    first = start(tmp_path / "parts", checkpoints__steps=3, **options)
    first.plugins.register(Stop(stop), "stop")
    with pytest.raises(KeyboardInterrupt):
        loop.train(first)
    second = start(tmp_path / "parts", resume=True, **options)
    loop.train(second)
    assert second.first == 3
    strip = lambda row: {k: v for k, v in row.items() if k not in ("time", "samples_per_second")}  # noqa: E731
    ours, theirs = ([strip(row) for row in lines(tmp_path / name)] for name in ("parts", "whole"))
    assert ours == theirs
    assert [row["step"] for row in ours if "measured" in row] == [-1, 1, 3, 5, 7]


def test_a_run_that_is_asked_to_stop_does_not_wait_for_a_measurement(start, tmp_path):
    run = start(tmp_path, validation__data=HELD, validation__every=2, train__steps=8)
    run.plugins.register(Ask(4), "ask")
    assert loop.train(run) == "SIGTERM"
    assert [row["step"] for row in lines(tmp_path) if "measured" in row] == [1]


class Ask:
    """What a signal does."""

    def __init__(self, at):
        self.at = at

    @hookimpl(tryfirst=True)
    def step_finished(self, run):
        if run.done == self.at:
            run.stop("SIGTERM")


class Stop:
    """An interruption that saves nothing."""

    def __init__(self, at):
        self.at = at

    @hookimpl(trylast=True)
    def step_finished(self, run):
        if run.done == self.at:
            raise KeyboardInterrupt


def test_bad_samples_are_named_once_and_left_out(start, capsys):
    run = start(validation__data="50 73 2", train__steps=4, validation__every=2)
    loop.train(run)
    assert capsys.readouterr().err == (
        "warning: 2 of 23 samples of validation.data cannot be used and are left out:\n"
        "  item 1: it is no number\n  item 2: it is no number\n"
    )
    assert measured(run)[-1][1]["validation/loss"] == pytest.approx(by_hand(run, 50, 73, (1, 2)), rel=1e-5)


def test_bad_samples_are_listed_with_those_of_training(start, tmp_path):
    """Both have a sample of that name; a run that goes on repeats nothing."""
    for steps in (5, 6):
        run = start(tmp_path, steps > 5, validation__data="50 73 2 1", data__paths=["0 40 1"], train__steps=steps)
        assert "validation: left out when it was opened: 1, such as 0.tar: it is cut" in run.notes
        loop.train(run)
    rows = [json.loads(line) for line in (tmp_path / "bad" / "samples.jsonl").read_text().splitlines()]
    listed = {(row.get("of"), row["path"], row["reason"], row["step"]) for row in rows}
    assert listed == {
        ("validation", "0.tar", "it is cut", 0),
        (None, "item 1", "it is no number", max(row["step"] for row in rows if "of" not in row)),
        ("validation", "item 1", "it is no number", 5),
        ("validation", "item 2", "it is no number", 5),
    }
    assert len(rows) == len(listed)


def test_too_many_bad_samples_stop_the_run_with_the_list(start):
    run = start(validation__data="50 73 5", train__steps=2)
    with pytest.raises(
        DataError, match=r"5 of 23 samples .* data.max_bad_fraction = 0.2 allows(.|\n)*item 5: it is no number"
    ):
        loop.train(run)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"data": "heldout"}, DataError, "validation.data: there is nothing at 'heldout'"),
        ({"data": "50 54 3"}, None, ""),
        ({"data": ["50 51 0", "60 61"]}, None, ""),
        ({"data": "50 50"}, DataError, "validation.data has 0 samples, fewer than there are processes"),
    ],
)
def test_what_cannot_work_is_said_before_training(start, options, error, says):
    options = {f"validation__{key}": value for key, value in options.items()}
    if error is None:
        start(**options)
        return
    with pytest.raises(error, match=says):
        start(**options)


def test_a_batch_that_processes_cannot_share_is_said_before_training(start, monkeypatch):
    run = start(validation__data=HELD, validation__batch=9)
    monkeypatch.setattr(validation.distributed, "world", lambda: 2)
    with pytest.raises(ConfigError, match=r"validation.batch = 9 cannot be shared by 2 processes"):
        run.plugins.manager.get_plugin("validation").run_composed(run)


def test_data_of_which_nothing_can_be_read_is_an_error_before_training(start, monkeypatch):
    monkeypatch.setattr(validation.Reader, "read", broken)
    with pytest.raises(DataError, match=r"its first samples cannot be used:\n  item 0: no field 'number'"):
        start(validation__data=HELD)


def broken(self, ident):
    raise validation.BadSample("no field 'number'")


def test_notes_say_what_is_measured(start):
    run = start(validation__data=HELD, validation__every=5)
    assert run.notes == ["validation: 23 held-out samples, every 5 steps and at the end"]
    few = start(objective__name="contrast", validation__data="50 53")
    assert "3 samples are one batch, and a loss that compares them with each other is smaller" in few.notes[1]
    assert start().notes == []


PROCESSES = """
import importlib.util, os, sys
import torch
from selfsup.kernel import compose, distributed, loop

spec = importlib.util.spec_from_file_location("measured_toys", {toys!r})
toys = sys.modules["measured_toys"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)
toys.Mixer.__init__.__globals__["nn"].Dropout = lambda share: torch.nn.Identity()  # drawn per process

measuring = {{
    "validation": {{"data": [{held!r}], "every": 2, "start": True}},
    "online": {{"data": ["0 60"], "every": 2, "limit": 40}},
}}
for objective in ("hide", "contrast"):
    for parallel in {parallel}:
        found = []
        for services in (measuring, {{}}):
            plugins = toys.Toys()
            listener = toys.Listener()
            plugins.register(listener, "listener")
            train = {{"batch": 8, "steps": 4, "parallel": parallel, "timeout": 60}}
            settings = {{"objective": {{"name": objective}}, "train": train, **services}}
            run = compose.start(plugins, compose.resolve(plugins, settings))
            assert loop.train(run) == "done"
            weights = {{n: loop.whole(p.detach()) for n, p in run.objective.named_parameters()}}
            found.append((weights, listener.heard))
        (watched, heard), (plain, _) = found
        for name in plain:
            assert torch.equal(plain[name], watched[name]), name
        if distributed.rank() == 0:
            torch.save(heard, f"{folder}/{{objective}}-{{parallel}}.pt")
        else:
            assert heard == []
distributed.barrier()
os._exit(0)  # as the command line does, and why: cli/main.py
"""


def processes(folder, count, *parallel):
    folder.mkdir()
    script, toys = folder / "measure.py", str(Path(__file__).with_name("measured_toys.py"))
    script.write_text(PROCESSES.format(toys=toys, held="50 73 2", parallel=parallel, folder=folder))
    command, said = [sys.executable, script], ""
    for process in together(count, command) if count > 1 else [Forked(command)]:
        said += process.communicate(timeout=240)[1]
        assert process.returncode == 0, said
    assert said.count("2 of 23 samples of validation.data cannot be used") == 2 * len(parallel)
    assert "item 1: it is no number" in said
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def test_two_processes_measure_what_one_does(tmp_path):
    """The same weights with and without measuring, bit for bit, and the same figures but for the order of sums."""
    alone = processes(tmp_path / "alone", 1, "ddp")
    both = processes(tmp_path / "both", 2, "ddp", "fsdp")
    assert len(both) == 4
    for name, heard in both.items():
        wanted = alone[f"{name.partition('-')[0]}-ddp"]
        assert [done for done, _ in heard] == [done for done, _ in wanted] == [0, 2, 2, 4, 4]
        for (_, ours), (_, theirs) in zip(heard, wanted, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4), name
