"""What the goals share can itself be trusted: it sees a difference, a hang, and every process that was started."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import runs
import torch

from selfsup.kernel import saving

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


@pytest.fixture
def run(tmp_path):
    """A folder as a run leaves it."""
    folder = tmp_path / "run"
    tensors = {"model": {"w": torch.ones(3)}, "optimizer": {"w:exp_avg": torch.ones(3)}}
    saving.save(folder / "checkpoints", 2, tensors, {"optimizer": [{"lr": 0.1}], "skipped": {}})
    rows = [{"step": step, "loss": 1.0, "lr": 0.1, "time": 1000.0 + step} for step in range(2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_difference_of_one_bit_is_seen(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    assert runs.difference(run, other) is None
    tensors, facts = runs.newest(other)
    tensors["optimizer"]["w:exp_avg"][1] += 2**-23
    saving.save(other / "checkpoints", 2, tensors, facts)
    assert runs.difference(run, other) == "optimizer w:exp_avg"


def test_a_learning_rate_that_differs_is_seen(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    log = other / "metrics.jsonl"
    log.write_text(log.read_text().replace("0.1", "0.2", 1))
    assert "metrics.jsonl" in runs.difference(run, other)


def test_samples_count_as_a_step_was_done_last(tmp_path):
    lines = [{"step": 0, "ids": [1, 2]}, {"step": 1, "ids": [3, 4]}, {"step": 1, "ids": [3, 5]}]
    (tmp_path / "ids-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "i')
    (tmp_path / "ids-1.jsonl").write_text(json.dumps({"step": 1, "ids": [6]}) + "\n")
    assert runs.samples(tmp_path) == ({0: [1, 2], 1: [3, 5, 6]}, 1)


def test_a_process_is_killed_with_all_that_it_started(tmp_path):
    job = runs.Job([sys.executable, "-c", PARENT], tmp_path / "log")
    assert runs.wait_until(lambda: len(runs.family(job.pid)) > 1, job, "child", timeout=60)
    _, child = runs.family(job.pid)
    job.kill()
    end = time.monotonic() + 10
    while lives(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not lives(child)


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_hang_is_an_error_and_the_process_is_gone(tmp_path):
    job = runs.Job([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    with pytest.raises(runs.Hung, match="still running after 0 s"):
        job.wait(0.3)
    assert not job.running
