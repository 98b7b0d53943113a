"""The machinery of the soak, with one fault: goal_soak.py in short."""

from __future__ import annotations

import json
import sys

import goal_soak
import pytest
import runs
import torch

from selfsup.kernel import saving, state


def test_one_fault(tmp_path):
    fault, segments = goal_soak.measure(tmp_path, full=False)
    assert (fault.injected, fault.survived) == (1, 1), fault
    assert (segments.injected, segments.survived) == (1, 1), segments
    assert "bitwise equal" in segments.figure


@pytest.mark.parametrize(("border", "damaged"), [(20, False), (10, True), (0, True)])
@pytest.mark.parametrize("kind", [goal_soak.FLIPPED, "the newest checkpoint cut short"])
def test_damage_leaves_a_checkpoint_of_its_segment(tmp_path, border, damaged, kind):
    """From one before the border the run would take steps again with another number of processes than it had."""
    soak = goal_soak.Soak(tmp_path, 0, [goal_soak.Segment(2, 40, 0)])
    soak.folder, soak.first, event = tmp_path / "run", border, goal_soak.Event(kind)
    root = soak.folder / "checkpoints"
    for step in (10, 20):
        saving.save(root, step, {"model": {"w": torch.ones(3)}}, {})
    soak.damage(runs.Job([sys.executable, "-c", ""], tmp_path / "log"), event)
    newest, told = state.newest(root)
    assert (newest.name, bool(told)) == (f"step-000000{10 if damaged else 20}", damaged)
    assert event.kind == (kind if damaged else "kill -9")


def test_where_two_runs_part_is_named(tmp_path):
    for name, losses in {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.5, 3.0]}.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    assert goal_soak.parted(tmp_path / "a", tmp_path / "b") == 1
    assert goal_soak.parted(tmp_path / "a", tmp_path / "a") is None
