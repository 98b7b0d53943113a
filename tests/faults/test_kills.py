"""Killed at one named moment after the other, a run ends as if nothing had happened: goal_kills.py in short."""

from __future__ import annotations

import goal_kills
import killed_at
import pytest


def test_killed_at_some_moments(tmp_path):
    (result,) = goal_kills.measure(tmp_path, full=False)
    assert result.survived == result.injected == len(goal_kills.SOME), result


@pytest.mark.slow
def test_killed_at_all_moments_one_after_the_other(tmp_path):
    goal_kills.runs.train(tmp_path / "whole", *goal_kills.evaluated(tmp_path), steps=8).finish()
    every = list(killed_at.moments())
    chain = goal_kills.chain(tmp_path / "killed", every, [1] * len(every), 8)
    assert (chain.wrong, chain.kills, chain.recovered) == (None, len(every), len(every))


def test_an_end_that_differs_is_not_survived():
    same, other = goal_kills.Chain(["a"], 5, 5), goal_kills.Chain(["a"], 5, 5, "model stem.weight")
    assert goal_kills.told("kill", [same, other]).survived == 5
    assert "1 of 2 runs bitwise equal; model stem.weight" in goal_kills.told("kill", [same, other]).figure
    never = goal_kills.told("kill", [goal_kills.Chain(["a"])])
    assert (never.injected, never.survived) == (1, 0)
