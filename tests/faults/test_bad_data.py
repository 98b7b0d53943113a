"""Bad data are left out, counted and named: the short form of goal_bad_data.py."""

from __future__ import annotations

import goal_bad_data


def test_all_that_is_bad_is_named_and_nothing_else(tmp_path):
    results = list(goal_bad_data.measure(tmp_path / "bad", full=False))
    assert len(results) == 25
    for result in results:
        assert result.survived == result.injected > 0, result
