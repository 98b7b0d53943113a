"""Real processes: several equal one, and a run that is killed anywhere continues as if it had not been.

Everything goes through the command line, with the wav2vec 2.0 and SimCLR that people get, on their
built-in samples, made small.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from forked import Forked, together

from selfsup.kernel import state

SSL = (sys.executable, "-m", "selfsup.cli")
SMALL = {
    # Dropout and layer drop off: they are drawn per process (law 1's exception).
    "wav2vec2": (
        "train.batch=6 modality.longest=0.4 modality.layers=[[16,10,5],[16,8,4],[16,4,4],[16,4,2]] backbone.depth=2 "
        "backbone.width=32 backbone.heads=2 backbone.dropout=0.0 backbone.layer_drop=0.0 "
        "backbone.attention_dropout=0.0 backbone.activation_dropout=0.0 objective.dropout_input=0.0 "
        "objective.dropout_features=0.0 objective.width=16"
    ),
    "simclr": "train.batch=12 modality.size=16 backbone.depth=18",
}


def arguments(plugin, out, steps=3, *more):
    sets = [word for option in (SMALL[plugin] + " data.workers=0").split() for word in ("--set", option)]
    return ["train", "--plugin", plugin, *sets, "--steps", str(steps), "--out", str(out), *more]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def ssl(*words, **how):
    return Forked([*SSL, *words], env=environment(), **how)


def finish(process, code=0):
    said = "".join(text or "" for text in process.communicate(timeout=240))
    assert process.returncode == code, said
    return said


def torchrun(processes, *words, restarts, meanwhile):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launch, f"--max-restarts={restarts}", "-m", "selfsup.cli", *words]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    meanwhile(process)
    finish(process)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final(folder):
    found, damaged = state.newest(folder / "checkpoints")
    assert damaged == []
    return state.load(found)[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's runs, made once: plugin -> folder."""
    made = {}

    def run(plugin):
        if plugin not in made:
            made[plugin] = tmp_path_factory.mktemp("alone") / plugin
            finish(ssl(*arguments(plugin, made[plugin])))
        return made[plugin]

    return run


@pytest.mark.parametrize(
    ("plugin", "processes", "parallel"),
    [("wav2vec2", 2, "ddp"), ("wav2vec2", 3, "fsdp"), ("simclr", 3, "ddp"), ("simclr", 2, "fsdp")],
)
def test_several_processes_train_as_one(plugin, processes, parallel, alone, tmp_path):
    words = (*arguments(plugin, tmp_path / "run"), "--set", f"train.parallel={parallel}")
    for process in together(processes, [*SSL, *words], env=environment()):
        finish(process)
    ours, theirs = metrics(tmp_path / "run"), metrics(alone(plugin))
    assert len(ours) == len(theirs) == 3
    # The first step's loss and gradient are the same mathematics in another order of summation.
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)
    assert ours[0]["norm"] == pytest.approx(theirs[0]["norm"], rel=1e-3)
    assert [m["loss"] for m in ours] == pytest.approx([m["loss"] for m in theirs], rel=1e-2)
    several, one = final(tmp_path / "run"), final(alone(plugin))
    assert several["model"].keys() == one["model"].keys()
    assert several["optimizer"].keys() == one["optimizer"].keys()


def workers(process):
    """The processes that torchrun started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and "RANK" in variables:
                found[int(variables["RANK"])] = int(folder.name)
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found in /proc")
def test_torchrun_replaces_a_process_that_is_killed_and_the_weights_are_the_same(tmp_path):
    """First the one that writes, then the other."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    words = ("--set", "checkpoints.steps=1", "--resume")
    for process in together(2, [*SSL, *arguments("wav2vec2", whole, 12), *words], env=environment()):
        finish(process)

    def kill(process):
        for victim in (0, 1):
            wait_for(folder / "metrics.jsonl", process)
            os.kill(workers(process)[victim], signal.SIGKILL)

    torchrun(2, *arguments("wav2vec2", folder, 12), *words, restarts=2, meanwhile=kill)
    same(final(folder), final(whole))
    assert [m["step"] for m in metrics(folder)] == list(range(12))
    assert (folder / "status").read_text() == "DONE\n"


def test_killed_at_random_moments_ends_with_the_same_weights(alone, tmp_path):
    """kill -9 while it starts, computes or writes a checkpoint (it writes one at every step)."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    words = (*SAVING, "--resume")
    finish(ssl(*arguments("wav2vec2", whole, 30), *words))
    chosen = random.Random(5)
    kills = 0
    for _ in range(40):
        process = ssl(*arguments("wav2vec2", folder, 30), *words, start_new_session=True)
        wait_for(folder / "metrics.jsonl", process)
        time.sleep(1.2 * chosen.random())
        if process.poll() is not None:
            finish(process)
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        if kills == 5:
            break
    finish(ssl(*arguments("wav2vec2", folder, 30), *words))
    assert kills >= 2
    same(final(folder), final(whole))
    assert [m["step"] for m in metrics(folder)] == list(range(30))
    assert [m["loss"] for m in metrics(folder)] == [m["loss"] for m in metrics(whole)]


SAVING = ("--set", "checkpoints.steps=1", "--set", "backbone.dropout=0.1", "--set", "data.workers=1")


def wait_for(path, process):
    """Until the run has written metrics anew, or has ended."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
        time.sleep(0.02)


def same(ours, theirs):
    for group in ("model", "optimizer"):
        assert ours[group].keys() == theirs[group].keys()
        for name in ours[group]:
            assert torch.equal(ours[group][name], theirs[group][name]), name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_a_code_of_its_own_and_a_hint(number, code, tmp_path):
    folder = tmp_path / "run"
    process = ssl(*arguments("wav2vec2", folder, 10_000))
    wait_for(folder / "metrics.jsonl", process)
    process.send_signal(number)
    said = finish(process, code)
    assert f"stopped by {number.name} after" in said
    assert f"ssl train --resume --out {folder}" in said
    assert len(state.folders(folder / "checkpoints")) == 1


def test_a_signal_to_the_whole_group_saves_too(tmp_path):
    """As torchrun, `timeout` and schedulers send it: the data workers get it as well."""
    folder = tmp_path / "run"
    words = (*arguments("wav2vec2", folder, 10_000), "--set", "data.workers=1")
    process = ssl(*words, start_new_session=True)
    wait_for(folder / "metrics.jsonl", process)
    os.killpg(process.pid, signal.SIGTERM)
    assert "stopped by SIGTERM after" in finish(process, 75)
    assert len(state.folders(folder / "checkpoints")) == 1


def test_one_flipped_bit_is_found_and_the_checkpoint_before_is_used(tmp_path):
    folder = tmp_path / "run"
    finish(ssl(*arguments("wav2vec2", folder, 3, "--set", "checkpoints.steps=1")))
    newest = state.folders(folder / "checkpoints")[0] / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    said = finish(ssl("train", "--resume", "--out", str(folder)))
    assert "step-00000003 is damaged and was not used: model.safetensors does not match its digest" in said
    assert "resumed at step 2 of 3" in said
    assert state.newest(folder / "checkpoints")[1] == []


def test_a_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    """A limit on the size of a file stands in for the full disk: a write fails in its middle."""
    folder = tmp_path / "run"
    finish(ssl(*arguments("wav2vec2", folder, 2)))
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "from selfsup.cli.main import main; main(sys.argv[1:])"
    )
    words = ("train", "--resume", "--out", folder, "--set", "train.steps=4")
    process = Forked([sys.executable, "-c", code, *words], env=environment())
    said = finish(process, code=1)
    assert "the checkpoint of step 4 could not be written" in said
    assert "the newest on disk is" in said
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert state.newest(folder / "checkpoints")[1] == []
