"""`benchmarks/learn.py` but for the learning: what is skipped, when the goal is met, how the text is split."""

from __future__ import annotations

import argparse
import json
import time

import learn
import pytest


def learning(tmp_path, **how):
    args = argparse.Namespace(**{"data": tmp_path / "data", "limit": 100, "out": tmp_path, "little": False, **how})
    (tmp_path / "work").mkdir()
    return learn.Learning(args, tmp_path / "work")


def test_what_is_absent_is_said_and_skipped(tmp_path, capsys):
    learning(tmp_path).run("simclr-mnist")
    assert "there is no " in capsys.readouterr().out
    assert json.loads((tmp_path / "learn.json").read_text())[0]["skipped"].endswith("data/image_mnist")


def test_nothing_begins_when_the_time_is_over(tmp_path):
    run = learning(tmp_path, limit=1, little=True)
    run.run("gpt")
    assert run.results == [{"task": "gpt", "skipped": "the time given was over"}]


@pytest.mark.parametrize(
    ("losses", "best", "met"), [((2.0, 1.46, 1.5), (1.46, 500), True), ((2.0, 1.48), (1.48, 500), False)]
)
def test_the_best_measurement_is_held_against_the_goal(tmp_path, monkeypatch, losses, best, met):
    said = []

    def ssl(self, given, where):
        said.append(given)
        folder = where["work"] / "run"
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        rows = [{"step": 250 * n - 1, "measured": {"validation/loss": loss}} for n, loss in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"steps": 5000, "seconds": 60.0, "samples_per_second": 5000, "rows": {"trained": {"nats": 1.5}}}

    monkeypatch.setattr(learn.Learning, "ssl", ssl)
    data = tmp_path / "data" / learn.SHAKESPEARE
    data.parent.mkdir(parents=True)
    data.write_text("abcdefghij" * 10)
    run = learning(tmp_path)
    run.run("gpt")
    found = run.results[0]
    assert (found["best"], found["met"]) == (best, met)
    assert (tmp_path / "work" / "gpt" / "last-tenth.txt").read_text() == "abcdefghij"
    assert [line.split()[0] for line in said] == ["train", "eval"]
    assert f"goal 1.4697: {'met' if met else 'not met'}" in learn.told(found)


def test_a_command_gives_its_last_line_or_says_why_there_is_none(tmp_path):
    run = learning(tmp_path)
    found = run.ssl("train --plugin nothing", {})
    assert "ended with" in found["failed"]
    assert "there is no objective called 'nothing'" in found["failed"]
    assert found["command"] == "ssl train --plugin nothing"
    assert run.end > time.monotonic()


def test_made_up_data_stands_where_the_real_one_does(tmp_path):
    place = learn.made_up(tmp_path, learn.MNIST)
    assert {part.name for part in place.iterdir()} == {"train", "test", "train.parquet", "test.parquet"}
    assert learn.made_up(tmp_path, learn.MNIST) == place
    assert learn.made_up(tmp_path, learn.SHAKESPEARE).read_text().startswith("First Citizen")
