"""The status of a run is replaced as one act, and missing without a fuss."""

from __future__ import annotations

from selfsup.plugins.common import status


def test_what_was_written_is_read(tmp_path):
    assert status.read(tmp_path) == ""
    status.write(tmp_path, "RUNNING")
    status.write(tmp_path, "FAILED a disk")
    assert status.read(tmp_path) == "FAILED a disk"
    assert [path.name for path in tmp_path.iterdir()] == ["status"]


def test_a_folder_that_is_gone_ends_no_run(tmp_path):
    status.write(tmp_path / "gone", "DONE")
    assert status.read(tmp_path / "gone") == ""
