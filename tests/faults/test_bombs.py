"""Small files that promise much are refused in bounded memory: the short form of goal_bombs.py."""

from __future__ import annotations

import re
import sys

import goal_bombs
import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")


def test_each_is_refused_in_little_memory(tmp_path):
    results = list(goal_bombs.measure(tmp_path / "bombs", full=False))
    assert len(results) == 5
    for result in results:
        assert result.survived == result.injected > 0, result
        assert int(re.search(r"at most (\d+) MB", result.figure)[1]) < goal_bombs.LIMIT / 1e6
    assert "crashed" in results[4].stock or "RecursionError" in results[4].stock
    assert "out of memory" in results[2].stock
