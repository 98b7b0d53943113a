"""Damage to a checkpoint is found, and the one before is used: the short form of goal_damage.py."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import goal_damage
import pytest


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(The results, the run that was damaged, which is whole again.)"""
    work = tmp_path_factory.mktemp("damage")
    return list(goal_damage.measure(work, full=False)), work / "run"


@pytest.fixture
def bench(measured, tmp_path):
    shutil.copytree(measured[1], tmp_path / "run", ignore=shutil.ignore_patterns("whole"))
    return goal_damage.Bench(tmp_path / "run" / "checkpoints")


def test_all_damage_is_found(measured):
    results, _ = measured
    assert len(results) == 8
    for result in results:
        assert result.survived == result.injected > 0, result
    # The same flips, where nothing has a digest: nearly all of them pass, or the trial is none.
    usual = [int(n) for n in re.findall(r"(\d+) of 60 silently wrong", results[0].stock)]
    assert len(usual) == 3
    assert min(usual) > 30


def test_damage_that_is_not_found_is_counted_as_not_survived(bench):
    assert bench.try_all("nothing", [(path, lambda _: None) for path in bench.files()]).survived == 0


def test_a_checkpoint_before_that_is_lost_too_is_counted_as_not_survived(bench):
    shutil.rmtree(bench.before)
    assert bench.try_all("deleted", [(path, Path.unlink) for path in bench.files()]).survived == 0
