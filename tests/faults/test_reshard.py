"""What three processes saved in parts, one process and two others load as it was."""

from __future__ import annotations

from goal_reshard import measure


def test_a_checkpoint_is_loaded_however_it_was_split(tmp_path):
    (result,) = measure(tmp_path, full=False)
    assert result.survived == result.injected == 3, result.figure
    assert "6 files of parts" in result.figure
