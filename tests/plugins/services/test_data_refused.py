"""What is refused is named and counted; a parser gets so much memory and no more."""

from __future__ import annotations

import io
import resource
import sys

import numpy as np
import pytest

from selfsup.kernel.errors import DataError
from selfsup.plugins.services.data_refused import FREE, Limits, Refused, Unpacked, check_share, little_memory, named


def refused(count):
    return [Refused(f"{i}.csv", "it is damaged", row=i or None) for i in range(count)]


def test_a_share_may_be_refused():
    check_share(refused(0), 0, 0.0, "files")
    check_share(refused(1), 2, 0.01, "files")
    check_share(refused(5), 100, 0.05, "rows")
    with pytest.raises(DataError, match=r"6 of 100 rows .* = 0\.05 allows.*--max-bad-fraction 0\.06:\n  0\.csv: it is"):
        check_share(refused(6), 100, 0.05, "rows")
    with pytest.raises(DataError, match=r"1 of 100 rows .* = 0 allows"):
        check_share(refused(1), 100, 0.0, "rows")
    with pytest.raises(DataError, match=r"none of 2 files can be used:\n  0\.csv: it is damaged\n  1\.csv row 1: "):
        check_share(refused(2), 2, 1.0, "files")
    with pytest.raises(DataError, match=r"'0\.csv' cannot be used: it is damaged"):
        check_share(refused(1), 1, 1.0, "files")


def test_the_first_are_named():
    assert named([], "row") == []
    assert named(refused(1), "row") == ["1 row left out: 0.csv: it is damaged"]
    assert named(refused(4), "row")[0].endswith("2.csv row 2: it is damaged; …")


def test_unpacking_ends_at_the_limit():
    small = Unpacked(io.BytesIO(b"x" * 100), 1, Limits(ratio=2))
    assert io.BufferedReader(small).read() == b"x" * 100  # so little is free
    large = io.BufferedReader(Unpacked(io.BytesIO(bytes(FREE + 1)), 1000, Limits(ratio=2)))
    with pytest.raises(DataError, match=r"more than 2 times its 1,000 bytes"):
        large.read()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts such memory")
def test_memory_is_bounded_meanwhile_and_free_afterwards():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError), little_memory(2e8):
        np.ones(300_000_000, np.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with little_memory(4e8):
        np.ones(300_000_000, np.uint8)
