"""Where a checkpoint cannot be written nothing is lost: goal_disk.py in short."""

from __future__ import annotations

import goal_disk
import pytest


def test_no_room_for_a_checkpoint(tmp_path):
    results = list(goal_disk.measure(tmp_path, full=False))
    for result in results:
        assert result.survived == result.injected, result
    assert results[-1].injected == 1
    if not results[0].injected:
        pytest.skip(results[0].figure)
