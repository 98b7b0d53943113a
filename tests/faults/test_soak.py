"""The machinery of the soak, with one fault: goal_soak.py in short."""

from __future__ import annotations

import goal_soak


def test_one_fault(tmp_path):
    fault, segments = goal_soak.measure(tmp_path, full=False)
    assert (fault.injected, fault.survived) == (1, 1), fault
    assert (segments.injected, segments.survived) == (1, 1), segments
    assert "bitwise equal" in segments.figure
