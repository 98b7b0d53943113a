"""Workers that stop, starve or have no room cost no more than a sentence: goal_workers.py in short."""

from __future__ import annotations

import goal_workers
import pytest


def test_workers(tmp_path):
    results = list(goal_workers.measure(tmp_path, full=False))
    for result in results:
        assert result.survived == result.injected > 0, result
    assert "hangs" in results[0].stock, "or the trial is none"


@pytest.mark.skipif(goal_workers.may_mount(), reason="root may mount a small /dev/shm: test_workers did")
def test_a_full_dev_shm_was_not_tried():
    pytest.skip("only root can mount a small /dev/shm")
