"""How a run ended, in words, and the parts of a page about runs of which little is known."""

from __future__ import annotations

import json
import re
import time

import pytest

from selfsup.cli import report_parts
from selfsup.cli.report_log import history
from selfsup.cli.run_folder import open_run
from selfsup.kernel.discovery import Plugins

RUN = '[objective]\nname = "simclr"\n[train]\nbatch = 8\nsteps = 4\n'


@pytest.fixture
def told(tmp_path):
    def tell(steps=0, when=0.0, outcome=None, environment=None, run=RUN):
        (tmp_path / "run.toml").write_text(run)
        rows = [{"step": n, "loss": 2.0, "samples_per_second": 8.0, "time": when} for n in range(steps)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, facts in {"outcome": outcome, "environment": environment}.items():
            if facts is not None:
                (tmp_path / f"{name}.json").write_text(json.dumps(facts))
        return history(open_run(tmp_path))

    return tell


@pytest.mark.parametrize(
    ("steps", "outcome", "sentence"),
    [
        (4, {"ended": "done"}, "Done: 4 of 4 steps."),
        (4, None, "Done: 4 of 4 steps."),
        (2, {"ended": "SIGTERM"}, "Stopped by SIGTERM after 2 of 4 steps. Go on with: ssl train --resume --out "),
        (2, {"ended": "failed", "error": "the loss is nan"}, "Failed after 2 of 4 steps: the loss is nan. Go on with"),
        (2, None, "Interrupted after 2 of 4 steps. Go on with"),
        (0, None, "Interrupted after 0 of 4 steps. Go on with"),
    ],
)
def test_how_it_ended(told, steps, outcome, sentence):
    said, good = report_parts.ending(told(steps, outcome=outcome))
    assert said.startswith(sentence)
    assert good == sentence.startswith("Done")


def test_a_run_that_wrote_just_now_goes_on(told):
    assert report_parts.ending(told(2, when=time.time())) == ("Going on: 2 of 4 steps so far.", True)


def test_figures_are_means_over_time(told):
    log = told(4, outcome={"ended": "done", "memory": 2.5e9})
    said = re.sub("<[^>]*>", " ", "".join(report_parts.heading(log, "")))
    for part in (
        "steps  4",
        "time in steps  0:04",
        "samples / s  8",
        "loss, mean of last 4  2",
        "memory at most  2.5 GB",
    ):
        assert part in said


def test_skipped_samples_are_named(told):
    reasons = {f"photos/{n}.jpg": "truncated <b>" for n in range(2)}
    said = report_parts.data(told(1, outcome={"ended": "done", "skipped": 5, "reasons": reasons}))
    assert "5 samples could not be used and were skipped, the first 2 of them here" in said
    assert "photos/1.jpg: truncated &lt;b&gt;" in said
    assert "could be used" in report_parts.data(told(1, outcome={"skipped": 0}))


def test_the_data_is_summed_up(told):
    said = report_parts.data(told(4, environment={"data": {"samples": 16, "notes": ["16 photos & more"]}}))
    assert "<li>16 photos &amp; more</li>" in said
    assert "32 samples seen: 2 times the 16 there are." in said
    stream = told(4, environment={"data": {"samples": 16}}, run=f"{RUN}[data]\nstream = 16\n")
    assert "32 samples seen: 2 windows of 16 each." in report_parts.data(stream)


def test_without_files_every_part_says_what_is_missing(told):
    log = told()
    assert "Nothing was logged yet." in report_parts.curves(log)
    assert "The built-in sample." in report_parts.data(log)
    assert "is known when a run has ended" in report_parts.speed(log)
    assert "environment.json is missing" in report_parts.environment(log)


def test_a_recipe_whose_plugin_is_gone_is_shown_as_it_is(told):
    log = told(run='[objective]\nname = "gone"\nwidth = 3\n[train]\nbatch = 8\n')
    said = report_parts.recipe(log, Plugins())
    assert "It cannot be set beside the paper&#x27;s: there is no objective called &#x27;gone&#x27;" in said
    assert "<td>objective.width</td><td>3</td>" in said


def test_differences_from_the_paper_come_first(told):
    log = told(run='preset = "tiny"\n' + RUN, environment={"data": {"samples": 16, "notes": []}})
    changed, _, every = report_parts.recipe(log, Plugins()).partition("<details>")
    assert "<td>objective.temperature</td><td>0.2</td><td>0.1</td>" in changed
    assert "objective.layers" not in changed
    assert "<td>objective.layers</td><td>2</td><td>2</td>" in every
    assert "<td>epochs</td><td>2.0</td><td>100.0</td>" in changed  # 4 steps of 8 of 16 samples
