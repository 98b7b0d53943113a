"""A run that is killed at every named moment, one after the other, ends as if nothing had happened."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfsup.kernel import state

LAUNCHER = Path(__file__).with_name("killed_at.py")
SETS = (
    "train.batch=4 modality.length=32 modality.vocabulary=300 backbone.width=32 backbone.depth=1 backbone.heads=2 "
    "backbone.dropout=0.1 checkpoints.steps=2 checkpoints.keep=1 data.workers=0 train.steps=8"
)
SHORT = [
    "before the model is made",
    "after the optimizer",
    "between its tensors",
    "after its manifest",
    "after its rename",
    "before a checkpoint is loaded",
]


def moments():
    spec = importlib.util.spec_from_file_location("killed_at", LAUNCHER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.moments())


def launched(folder, *killed):
    start = [str(LAUNCHER), *killed] if killed else ["-m", "selfsup.cli"]
    sets = [word for option in SETS.split() for word in ("--set", option)]
    command = [sys.executable, *start, "train", "--plugin", "bert", "--resume", *sets, "--out", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("chosen", [SHORT, pytest.param(moments(), marks=pytest.mark.slow)], ids=["some", "all"])
def test_killed_at_one_moment_after_the_other(tmp_path, chosen):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert launched(whole).returncode == 0
    for moment in chosen:
        done = launched(folder, moment, "1")
        assert done.returncode == -signal.SIGKILL, (moment, done.stdout, done.stderr)
        assert (folder / "status").read_text() == "RUNNING\n"
    done = launched(folder)
    assert done.returncode == 0, done.stderr
    ours, theirs = (state.load(state.newest(f / "checkpoints")[0])[0] for f in (folder, whole))
    for group in ("model", "optimizer"):
        assert ours[group].keys() == theirs[group].keys()
        assert all(torch.equal(ours[group][name], theirs[group][name]) for name in ours[group]), group
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, whole)]
    ours, theirs = ([(row["step"], row["loss"], row["lr"]) for row in log] for log in logs)
    assert ours == theirs
    assert not list((folder / "checkpoints").glob(".*"))
    assert (folder / "status").read_text() == "DONE\n"
