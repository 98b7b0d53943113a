"""Killed at random times, a run takes all its steps on their samples: goal_random_kills.py in short."""

from __future__ import annotations

import goal_random_kills


def test_killed_at_random_times(tmp_path):
    (result,) = goal_random_kills.measure(tmp_path, full=False)
    assert result.survived == result.injected == 2, result
    assert "0 samples lost, 0 seen twice" in result.figure
