"""What each step trains on does not depend on how the work is shared or interrupted: goal_order.py in short."""

from __future__ import annotations

import re

import goal_order
import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    # `datasets` leaves files that are not read to their end to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_order(tmp_path):
    results = list(goal_order.measure(tmp_path, full=False))
    assert {result.goal for result in results} == {"R3", "R8", "R9"}
    for result in results:
        assert result.survived == result.injected > 0, result
    usual = " ".join(result.stock for result in results)
    differ, never = (int(n) for n in re.findall(r"(\d+) of 48", usual))
    assert differ > 24, "the usual loader draws by worker"
    assert never == 24, "the usual loader begins anew"


def test_another_order_is_seen(tmp_path):
    bench = goal_order.Bench(tmp_path, *goal_order.KINDS["documents of text"], steps=2)
    bench.whole[1][3] = bench.whole[0][3]
    assert bench.shared("", [goal_order.Share()]).survived == 0
    assert bench.resumed("", 0).injected == 0
