"""Nothing that is read runs, and nothing is written elsewhere: the short form of goal_hostile.py."""

from __future__ import annotations

import re

import goal_hostile
import pytest


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return list(goal_hostile.measure(tmp_path_factory.mktemp("hostile") / "w", full=False))


def test_nothing_runs_and_nothing_escapes(results):
    assert len(results) == 5
    for result in results:
        assert result.survived == result.injected > 0, result


def test_the_attacks_are_real(results):
    assert re.match(r"canary in 3 of 3: ", results[0].stock)
    assert int(re.search(r"trusting: (\d+) files outside", results[1].stock)[1]) > 2
