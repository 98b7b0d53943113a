"""A checkpoint is begun, written, verified and resumed from as the long command times it."""

from __future__ import annotations

from goal_cost import measure


def test_a_run_is_back_in_seconds(tmp_path):
    for result in measure(tmp_path, full=False):
        assert result.survived == result.injected, result
