"""Whatever happens to the files of a checkpoint is found before a tensor of it is used, and the one before is used."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

from selfsup.kernel import state
from selfsup.kernel.errors import StateError

TRIALS = 300


def tensors(seed):
    g = torch.Generator().manual_seed(seed)
    return {
        "model": {"w": torch.randn(20, 10, generator=g)},
        "optimizer": {"w:exp_avg": torch.randn(20, 10, generator=g)},
    }


@pytest.fixture
def checkpoints(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        state.save(root, step, tensors(step), {"settings": {"train": {"seed": 0}}})
    return root


@pytest.fixture
def newest(checkpoints):
    return checkpoints / "step-00000002"


def files(folder):
    return sorted(folder.iterdir())


def assert_the_one_before_is_used(root):
    with pytest.raises(StateError, match="step-00000002 is damaged"):
        state.load(root / "step-00000002")
    found, damaged = state.newest(root)
    assert found.name == "step-00000001"
    assert len(damaged) == 1
    assert torch.equal(state.load(found)[0]["model"]["w"], tensors(1)["model"]["w"])


def test_no_alarm_is_false(checkpoints):
    for _ in range(TRIALS):
        assert state.newest(checkpoints)[1] == []


def test_every_flipped_bit_is_found(checkpoints, newest):
    chosen = random.Random(0)
    for _ in range(TRIALS):
        file = chosen.choice(files(newest))
        whole = file.read_bytes()
        place = chosen.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        assert_the_one_before_is_used(checkpoints)
        file.write_bytes(whole)


def test_every_file_cut_short_is_found(checkpoints, newest):
    chosen = random.Random(1)
    for file in files(newest):
        whole = file.read_bytes()
        for length in [0, len(whole) - 1, *(chosen.randrange(len(whole)) for _ in range(20))]:
            file.write_bytes(whole[:length])
            assert_the_one_before_is_used(checkpoints)
        file.write_bytes(whole)


def test_every_file_that_is_missing_is_found(checkpoints, newest):
    for file in files(newest):
        file.rename(kept := newest.parent / "kept")
        assert_the_one_before_is_used(checkpoints)
        kept.rename(file)


def test_files_of_another_step_or_in_each_others_place_are_found(checkpoints, newest):
    for file in files(newest):
        whole = file.read_bytes()
        shutil.copy(checkpoints / "step-00000001" / file.name, file)
        assert_the_one_before_is_used(checkpoints)
        file.write_bytes(whole)
    model, optimizer = newest / "model.safetensors", newest / "optimizer.safetensors"
    model.rename(newest / "other")
    optimizer.rename(model)
    (newest / "other").rename(optimizer)
    assert_the_one_before_is_used(checkpoints)
