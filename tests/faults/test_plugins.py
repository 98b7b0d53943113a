"""Broken plugins harm nothing else, and are refused by name: goal_plugins.py in short."""

from __future__ import annotations

import goal_plugins


def test_broken_plugins_are_named_and_harm_nothing_else(tmp_path):
    for result in goal_plugins.measure(tmp_path, full=False):
        assert result.survived == result.injected > 0, result
