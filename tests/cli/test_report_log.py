"""What a run's folder tells: whole, torn, odd, or hardly anything."""

from __future__ import annotations

import json

import pytest

from selfsup.cli.report_log import history
from selfsup.cli.run_folder import open_run

RUN = '[objective]\nname = "guess"\n[train]\nbatch = 8\nsteps = 4\n'


def row(step, **more):
    known = {"step": step, "loss": 1.5, "norm": 2.0, "lr": 0.1, "samples_per_second": 16.0, "time": 100.0 + step}
    return {**known, "amount": {"tokens": 40.0}, "metrics": {"accuracy": 0.5}, **more}


@pytest.fixture
def told(tmp_path):
    (tmp_path / "run.toml").write_text(RUN)

    def tell(*lines):
        text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text)
        return history(open_run(tmp_path))

    return tell


def test_series_are_by_name(told):
    log = told(row(0), row(1, loss=None, metrics={"accuracy": 0.25, "new": 1}))
    assert log.series() == {
        "loss": ([0, 1], [1.5, None]),
        "accuracy": ([0, 1], [0.5, 0.25]),
        "new": ([1], [1.0]),
        "gradient norm": ([0, 1], [2.0, 2.0]),
        "learning rate": ([0, 1], [0.1, 0.1]),
    }
    assert log.done == 2


def test_what_was_measured_stands_after_the_steps_done(told):
    log = told({"step": -1, "measured": {"online/knn": 0.1}}, row(0), {"step": 0, "measured": {"online/knn": None}})
    assert log.measured == {"online/knn": ([0, 1], [0.1, None])}
    assert log.done == 1
    assert list(log.series())[-1] == "online/knn"


def test_rates_and_time_are_those_of_the_steps(told):
    log = told(row(0), row(1, samples_per_second=4.0))
    assert log.rates() == {"samples / s": ([0, 1], [16.0, 4.0]), "tokens / s": ([0, 1], [80.0, 20.0])}
    assert log.seconds() == 8 / 16 + 8 / 4


@pytest.mark.parametrize(
    "odd",
    [
        "{torn",
        "[]\n",
        '{"loss": 1}\n',
        '{"step": "x"}\n',
        "\x00\n",
        row(1, metrics=3, amount=None, samples_per_second="fast", loss="low", norm=True),
        row(1, samples_per_second=0.0, loss=float("nan")),
    ],
)
def test_odd_lines_harm_nothing(told, odd):
    log = told(row(0), odd)
    assert log.series()["loss"][1][0] == 1.5
    assert log.seconds() == 0.5
    assert log.rates()["samples / s"][1][0] == 16.0


def test_a_step_that_was_done_again_counts_once_and_lines_are_put_in_order(told):
    log = told(row(2), row(0), row(1), row(0, loss=9.0))
    assert log.series()["loss"] == ([0, 1, 2], [9.0, 1.5, 1.5])


@pytest.mark.parametrize("text", ["", "{torn", "[1]", '{"data": 3}', '{"data": {"samples": "x"}}'])
def test_a_run_of_which_nothing_was_kept_is_empty(tmp_path, text):
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "environment.json").write_text(text)
    log = history(open_run(tmp_path))
    assert (log.done, log.series(), log.rates(), log.seconds(), dict(log.outcome)) == (0, {}, {}, 0, {})
    assert log.data.get("notes") is None
