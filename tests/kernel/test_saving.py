"""A checkpoint is there whole or not at all, and training goes on while it is written."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from small_state import tensors

from selfsup.kernel import saving, state
from selfsup.kernel.errors import DivergedError, StateError


def test_tied_weights_are_kept(root):
    weight = torch.randn(4, 4)
    loaded, _ = state.load(saving.save(root, 1, {"model": {"a": weight, "b": weight, "row": weight[1]}}, {}))
    assert torch.equal(loaded["model"]["a"], loaded["model"]["b"])
    assert torch.equal(loaded["model"]["row"], weight[1])


def test_a_new_folder_of_checkpoints_is_on_the_disk_before_what_it_holds(root, monkeypatch):
    synced, sync = [], saving._sync
    monkeypatch.setattr(saving, "_sync", lambda path: (synced.append(path), sync(path)))
    saving.save(root, 1, {"model": {"w": torch.ones(2)}}, {})
    assert synced[0] == root.parent
    assert synced[-1] == root


def test_a_checkpoint_is_written_again_over_a_damaged_one(root):
    folder = saving.save(root, 1, tensors(), {})
    (folder / "state.json").unlink()
    assert state.verify(saving.save(root, 1, tensors(), {})) is None


def test_too_little_space_is_said_before_anything_is_written(root, monkeypatch):
    good = saving.save(root, 1, tensors(), {})
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        StateError, match=r"step 2 could not be written .*1 MB and 0 MB are free; the newest on disk is"
    ):
        saving.save(root, 2, tensors(), {})
    assert state.newest(root) == (good, [])


def test_a_disk_that_fills_up_in_the_middle_leaves_the_last_good_checkpoint(root, monkeypatch):
    good = saving.save(root, 1, tensors(), {})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "_sync", full)
    with pytest.raises(StateError, match=r"No space left on device; it needs 1 MB and \d+ MB are free; the"):
        saving.save(root, 2, tensors(), {})
    assert [p.name for p in root.iterdir()] == [good.name]


def test_a_real_file_size_limit_in_the_middle_of_a_write(root):
    good = saving.save(root, 1, tensors(), {})
    code = f"""
import resource, signal, sys
from pathlib import Path
import torch
from selfsup.kernel import saving, state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    saving.save(Path({str(root)!r}), 2, {{"model": {{"w": torch.zeros(100_000)}}}}, {{}})
except state.StateError as said:
    print(said)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "the checkpoint of step 2 could not be written" in said
    assert state.newest(root) == (good, [])
    assert [p.name for p in root.iterdir()] == [good.name]


def test_killed_while_writing(root):
    """A writer that is killed at random moments never leaves a checkpoint that does not verify."""
    code = f"""
from pathlib import Path
import torch
from selfsup.kernel import saving, state
for step in range(1, 10_000):
    saving.save(Path({str(root)!r}), step, {{"model": {{"w": torch.full((300_000,), float(step))}}}}, {{}})
    state.retain(Path({str(root)!r}), 2)
    if step == 1:
        print("ready", flush=True)
"""
    chosen = random.Random(1)
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        writer.stdout.readline()
        time.sleep(0.05 + 0.3 * chosen.random())
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        found, damaged = state.newest(root)
        assert damaged == []
        loaded, facts = state.load(found)
        assert (loaded["model"]["w"] == facts["step"]).all()


def test_what_a_killed_writer_left_goes_with_the_next_checkpoint(root):
    (root / ".step-00000004").mkdir(parents=True)
    (root / ".step-00000004.old").mkdir()
    folder = saving.save(root, 5, tensors(), {})
    assert [p.name for p in root.iterdir()] == [folder.name]


def test_training_may_change_the_state_while_it_is_written(root, monkeypatch):
    writing, go_on = threading.Event(), threading.Event()
    write = saving._write_group

    def slowly(*given):
        writing.set()
        assert go_on.wait(30)
        return write(*given)

    monkeypatch.setattr(saving, "_write_group", slowly)
    saver, weight = saving.Saver(root), torch.zeros(1000)
    for step in (1, 2):
        saver.begin(step, {"model": {"w": weight}}, {"seen": [step]})
        assert writing.wait(30)
        weight += 1
        assert saver.busy
        assert saver.commit(wait=False) is None
        go_on.set()
        loaded, facts = state.load(saver.commit(wait=True))
        assert (loaded["model"]["w"] == step - 1).all()
        assert facts == {"step": step, "seen": [step]}
        assert not saver.busy
        assert saver.commit(wait=True) is None


def test_one_checkpoint_is_begun_after_the_other(root):
    saver = saving.Saver(root)
    saver.begin(1, tensors(), {})
    with pytest.raises(RuntimeError, match="not committed"):
        saver.begin(2, tensors(), {})
    assert saver.commit(wait=True).name == "step-00000001"


def test_whatever_goes_wrong_while_it_is_written_nothing_is_committed(root, monkeypatch):
    good = saving.save(root, 1, tensors(), {})

    def out_of_memory(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(saving, "save_file", out_of_memory)
    with pytest.raises(StateError, match=r"step 2 could not be written .*no more; it needs .*; the newest on disk is"):
        saving.save(root, 2, tensors(), {})
    assert [p.name for p in root.iterdir()] == [good.name]


@pytest.mark.parametrize("name", ["trained", "optimizer trained:exp_avg", "buffer"])
def test_a_state_that_is_not_finite_is_never_committed(root, name):
    group, key = ("optimizer", "trained:exp_avg") if "exp" in name else ("model", name)
    broken = {
        "model": {"trained": torch.ones(3), "buffer": torch.ones(3)},
        "optimizer": {"trained:exp_avg": torch.ones(3)},
    }
    broken[group][key][1] = float("nan" if name == "buffer" else "inf")
    saver = saving.Saver(root)
    saver.begin(3, broken, {}, trained=["trained"])
    with pytest.raises(DivergedError, match=rf"after 3 steps the state is not finite \({name}\)"):
        saver.commit(wait=True)
    assert list(root.iterdir()) == []


def test_a_buffer_may_hold_infinities_by_design(root):
    saver = saving.Saver(root)
    saver.begin(3, {"model": {"mask": torch.tensor([0.0, float("-inf")])}}, {}, trained=["w"])
    assert saver.commit(wait=True).exists()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors_of_every_kind_come_back(root, shape, dtype):
    x = torch.ones(shape, dtype=dtype)
    loaded, _ = state.load(saving.save(root, 1, {"model": {"x": x}}, {}))
    assert loaded["model"]["x"].dtype == dtype
    assert torch.equal(loaded["model"]["x"], x)
