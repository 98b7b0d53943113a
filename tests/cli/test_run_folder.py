"""Runs on disk: found, and their state told by files alone."""

import json
import os
import subprocess
import sys
import time

import pytest

from selfsup.cli import run_folder
from selfsup.cli.run_folder import Folder, find_runs, open_run, writers
from selfsup.kernel.errors import ConfigError

TOML = """preset = "tiny"
[objective]
name = "guess"
[data]
paths = ["a", "b"]
[train]
steps = 100
"""


@pytest.fixture
def make(tmp_path):
    """A run after so many steps, so many seconds ago, with a checkpoint of each of these steps."""

    def made(name="run", steps=0, saved=(), ago=0.0, toml=TOML):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "run.toml").write_text(toml)
        begin = time.time() - ago - steps
        rows = [{"step": step, "loss": 1.0, "time": begin + step + 1} for step in range(steps)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step in saved:
            (folder / f"checkpoints/step-{step:08}").mkdir(parents=True)
            (folder / f"checkpoints/step-{step:08}/manifest.json").write_text("{}")
        return folder

    return made


@pytest.mark.parametrize(
    ("run", "state"),
    [
        ({"steps": 100, "saved": (50, 100)}, "done"),
        ({"steps": 100, "saved": (50,), "ago": 9999}, "stopped"),
        ({"steps": 60, "saved": (60,)}, "stopped"),  # saved where it ended: in good order
        ({"steps": 60, "saved": (50,)}, "active"),
        ({"steps": 60, "saved": (50,), "ago": 9999}, "stopped"),
        ({"steps": 60, "ago": 9999}, "no checkpoint"),
        ({"steps": 60}, "active"),
        ({}, "no checkpoint"),
        ({"toml": "objective = ["}, "damaged"),
        ({"toml": "[objective]\n"}, "damaged"),
        ({"toml": ""}, "damaged"),
        ({"toml": "objective = 3\n[train]\nsteps = 'many'\n", "steps": 3}, "damaged"),
    ],
)
def test_a_state_is_told_by_files(make, run, state):
    folder = Folder(make(**run))
    assert folder.state == state
    assert json.loads(json.dumps(folder.facts()))["state"] == state


def test_steps_that_take_long_are_waited_for(make, monkeypatch):
    folder = make(steps=20, ago=200)
    assert Folder(folder).state == "no checkpoint"
    monkeypatch.setattr(run_folder, "LONG", 300)
    assert Folder(folder).state == "active"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fdinfo"), reason="only Linux tells which process writes a file")
def test_a_process_that_writes_is_seen_and_one_that_reads_is_not(make):
    folder = make(steps=3, ago=9999)
    log = os.path.realpath(folder / "metrics.jsonl")
    code = f"import sys; f = open({log!r}, sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    for mode, seen in (("r", False), ("a", True)):
        command = [sys.executable, "-c", code, mode]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "open\n"
            assert (log in writers()) == seen
            assert Folder(folder, writers()).state == ("running" if seen else "no checkpoint")
            process.stdin.close()
    assert log not in writers()


def test_facts_are_those_of_the_run(make):
    folder = make(steps=60, saved=(50,), ago=9999)
    with (folder / "metrics.jsonl").open("a") as file:
        for step, loss in ((29, 2.0), (49, 3.0)):
            file.write(json.dumps({"step": step, "measured": {"validation/loss": loss, "online/knn": 0.5}}) + "\n")
    facts = Folder(folder).facts()
    assert facts["objective"] == "guess"
    assert facts["data"] == ["a", "b"]
    assert (facts["steps"], facts["total"], facts["checkpoint"]) == (60, 100, 50)
    assert (facts["validation_loss"], facts["validation_steps"]) == (2.0, 30)
    assert facts["measured"] == {"validation/loss": 3.0, "online/knn": 0.5}
    assert facts["age"] == pytest.approx(9999, abs=60)
    assert facts["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_that_is_not_whole_does_not_count(make):
    folder = make(steps=60, saved=(50,), ago=9999)
    (folder / "checkpoints/step-00000060").mkdir()
    (folder / "checkpoints/.step-00000070.1").mkdir()
    assert Folder(folder).checkpoint == 50


def test_runs_are_found_two_levels_down_the_newest_first(make, tmp_path):
    for name, ago in (("a", 300), ("deep/b", 200), ("deep/er/c", 100), (".hidden/d", 0), ("deep/b/e", 0)):
        make(name, steps=3, ago=ago)
    (tmp_path / "foreign/photos").mkdir(parents=True)
    (tmp_path / "foreign/run.txt").touch()
    names = [run.path.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)]
    assert names == ["deep/b", "a"]
    assert [run.path.name for run in find_runs(tmp_path / "deep")] == ["c", "b"]
    assert [run.path for run in find_runs(tmp_path / "a")] == [tmp_path / "a"]
    assert find_runs(tmp_path / "nowhere") == []


def test_a_run_without_its_settings_is_found_and_damaged(make, tmp_path):
    (make(steps=9, saved=(9,), ago=9999) / "run.toml").unlink()
    (run,) = find_runs(tmp_path)
    assert (run.state, run.steps, run.total) == ("damaged", 9, None)
    assert "there is no run file" in run.problem


def test_a_folder_that_is_no_run_gets_the_nearest_match(make, tmp_path):
    make("photos-1")
    assert open_run(tmp_path / "photos-1").option("objective", "name") == "guess"
    with pytest.raises(ConfigError, match=r"is not the folder of a run; did you mean 'photos-1'\?"):
        open_run(tmp_path / "photo-1")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        open_run(make("bad", toml="["))


def test_a_line_of_the_future_says_nothing_of_now(make):
    """The clock was put back since: nobody knows how long ago it was."""
    run = Folder(make(steps=60, saved=(50,), ago=-3600.0))
    assert run.age == 0
    assert run.state == "stopped"
