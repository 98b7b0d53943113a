"""Columns are found by the names that people give them, and asked for where they are not."""

from __future__ import annotations

import numpy as np
import pytest

from selfsup.kernel.errors import DataError
from selfsup.plugins.modalities.text import Text
from selfsup.plugins.services.data_columns import column_of, resolved


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (["id", "text", "content"], "text"),
        (["id", "Content"], "Content"),
        (["txt", "path"], "txt"),
        (["id", "file_name"], "file_name"),
    ],
)
def test_the_most_telling_name_wins(known, found):
    assert column_of("t.csv", known, "text", Text(), None) == found


def test_what_is_asked_for_is_taken_or_said_to_be_missing():
    assert column_of("t.csv", ["text", "notes"], "text", Text(), "notes") == "notes"
    with pytest.raises(DataError, match=r"'t.csv' has no column 'note'; did you mean 'notes'\? It has text, notes"):
        column_of("t.csv", ["text", "notes"], "text", Text(), "note")
    with pytest.raises(DataError, match=r"no column of 't.csv' is known to hold text: it has a, b; name one with"):
        column_of("t.csv", ["a", "b"], "text", Text(), None)


def test_a_path_counts_from_its_table_or_is_the_one_of_its_name_below(tmp_path):
    for name in ("one/a.txt", "one/clips/b.txt", "two/x/c.txt", "two/y/c.txt", "two/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files, starts = [str(tmp_path / "one/t.csv"), str(tmp_path / "two/t.csv")], np.array([0, 3])
    values = ["a.txt", "b.txt", None, "a.txt", "c.txt"]  # there are two c.txt: neither is guessed
    found, missing = resolved(values, files, starts)
    below = [path.removeprefix(f"{tmp_path}/") for path in found]
    assert below == ["one/a.txt", "one/clips/b.txt", "", "two/a.txt", ""]
    assert missing == ["no name", "c.txt"]
