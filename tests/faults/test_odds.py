"""Clocks, logs, crowds and rivals do not stop a run: goal_odds.py in short."""

from __future__ import annotations

import goal_odds


def test_odd_things_do_not_stop_a_run(tmp_path):
    for result in goal_odds.measure(tmp_path, full=False):
        assert result.survived == result.injected > 0, result
