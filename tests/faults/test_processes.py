"""Processes that hang, signals and the end of torchrun: the short forms of goals R4 and R13."""

from __future__ import annotations

import sys

import goal_nodes
import goal_processes
import goal_signals
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


@pytest.mark.parametrize("goal", [goal_processes, goal_signals, goal_nodes])
def test_the_run_survives(goal, tmp_path):
    for result in goal.measure(tmp_path, full=False):
        assert result.survived == result.injected > 0, result
