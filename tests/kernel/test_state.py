"""A checkpoint is there whole or not at all, and a damaged one is never used."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from selfsup.kernel import state
from selfsup.kernel.errors import StateError


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"model": {"a.weight": torch.randn(64, 32, generator=generator), "b": torch.arange(5)}, "optimizer": {}}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


def test_round_trip(root):
    folder = state.save(root, 7, tensors(), {"settings": {"x": 1}})
    loaded, facts = state.load(folder)
    assert facts == {"step": 7, "settings": {"x": 1}}
    assert torch.equal(loaded["model"]["a.weight"], tensors()["model"]["a.weight"])
    assert folder.name == "step-00000007"
    assert sorted(p.name for p in root.iterdir()) == ["step-00000007"]


def test_tied_weights_are_kept(root):
    weight = torch.randn(4, 4)
    loaded, _ = state.load(state.save(root, 1, {"model": {"a": weight, "b": weight, "row": weight[1]}}, {}))
    assert torch.equal(loaded["model"]["a"], loaded["model"]["b"])
    assert torch.equal(loaded["model"]["row"], weight[1])


def test_every_flipped_bit_is_found(root):
    folder = state.save(root, 1, tensors(), {"settings": {"lr": 0.1}})
    chosen = random.Random(0)
    for path in sorted(folder.iterdir()):
        clean = path.read_bytes()
        for _ in range(50):
            bit = chosen.randrange(len(clean) * 8)
            damaged = bytearray(clean)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert state.verify(folder) is not None, (path.name, bit)
        path.write_bytes(clean)
    assert state.verify(folder) is None


def test_truncated_missing_and_swapped_files_are_found(root):
    first, second = (state.save(root, step, tensors(step), {}) for step in (1, 2))
    model = first / "model.safetensors"
    clean = model.read_bytes()
    model.write_bytes(clean[:-1])
    assert "bytes instead of" in state.verify(first)
    model.write_bytes((second / "model.safetensors").read_bytes())
    assert "does not match its digest" in state.verify(first)
    model.unlink()
    assert state.verify(first) == "model.safetensors is missing"
    (second / "manifest.json").write_text("[]")
    assert "cannot be read" in state.verify(second)


def test_the_newest_that_verifies_is_used_and_the_damaged_named(root):
    for step in (1, 2, 3):
        state.save(root, step, tensors(step), {})
    path = root / "step-00000003" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found, damaged = state.newest(root)
    assert found.name == "step-00000002"
    assert len(damaged) == 1
    assert "step-00000003 is damaged" in damaged[0]
    with pytest.raises(StateError, match=r"damaged: model\.safetensors does not match"):
        state.load(root / "step-00000003")


def test_retention_counts_verified_checkpoints_only(root):
    for step in (1, 2, 3):
        state.save(root, step, tensors(step), {})
    (root / "step-00000003" / "state.json").unlink()
    (root / ".step-00000004.99").mkdir()
    state.retain(root, 1)
    assert sorted(p.name for p in root.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_new_folder_of_checkpoints_is_on_the_disk_before_what_it_holds(root, monkeypatch):
    synced, sync = [], state._sync
    monkeypatch.setattr(state, "_sync", lambda path: (synced.append(path), sync(path)))
    state.save(root, 1, {"model": {"w": torch.ones(2)}}, {})
    assert synced[0] == root.parent
    assert synced[-1] == root


def test_a_checkpoint_is_written_again_over_a_damaged_one(root):
    folder = state.save(root, 1, tensors(), {})
    (folder / "state.json").unlink()
    assert state.verify(state.save(root, 1, tensors(), {})) is None


def test_too_little_space_is_said_before_anything_is_written(root, monkeypatch):
    good = state.save(root, 1, tensors(), {})
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(state.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        StateError, match=r"step 2 could not be written .*1 MB and 0 MB are free; the newest on disk is"
    ):
        state.save(root, 2, tensors(), {})
    assert state.newest(root) == (good, [])


def test_a_disk_that_fills_up_in_the_middle_leaves_the_last_good_checkpoint(root, monkeypatch):
    good = state.save(root, 1, tensors(), {})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "_sync", full)
    with pytest.raises(StateError, match="No space left on device; the newest on disk is"):
        state.save(root, 2, tensors(), {})
    assert [p.name for p in root.iterdir()] == [good.name]


def test_a_real_file_size_limit_in_the_middle_of_a_write(root):
    good = state.save(root, 1, tensors(), {})
    code = f"""
import resource, signal, sys
from pathlib import Path
import torch
from selfsup.kernel import state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    state.save(Path({str(root)!r}), 2, {{"model": {{"w": torch.zeros(100_000)}}}}, {{}})
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
from selfsup.kernel import state
for step in range(1, 10_000):
    state.save(Path({str(root)!r}), step, {{"model": {{"w": torch.full((300_000,), float(step))}}}}, {{}})
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


def test_a_checkpoint_holds_no_pickle(root):
    folder = state.save(root, 1, tensors(), {"settings": {}})
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    assert json.loads((folder / "manifest.json").read_text())["schema"] == state.SCHEMA
