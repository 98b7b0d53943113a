"""What is not finite is left out by all processes alike, and in no checkpoint: the short form of goal_nan.py."""

from __future__ import annotations

import goal_nan


def test_no_step_passes_and_no_checkpoint_holds_it(tmp_path):
    results = list(goal_nan.measure(tmp_path / "nan", full=False))
    assert len(results) == 1
    for result in results:
        assert result.survived == result.injected > 0, result
    assert results[0].stock.endswith("NaN in 7 of 12 checkpoints")
