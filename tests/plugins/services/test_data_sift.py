"""Rows that no parser takes are found one by one, and cost no other row."""

from __future__ import annotations

import gzip
import json

import pytest

from selfsup.kernel.errors import DataError
from selfsup.plugins.services import data_sift
from selfsup.plugins.services.data_refused import FREE, Limits
from selfsup.plugins.services.data_sift import DEPTH, from_json, sift

ROWS = [json.dumps({"text": f"text {i}", "id": i}).encode() + b"\n" for i in range(20)]
DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"


@pytest.fixture
def sifted(tmp_path):
    def run(content, name="a.jsonl", **limits):
        path = tmp_path / name
        path.write_bytes(content)
        return sift(str(path), "csv" if ".csv" in name or ".tsv" in name else "json", tmp_path / "c", Limits(**limits))

    return run


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"text": "half of', "this is no JSON: "),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 10 of the row"),
        (b"5", "a row is an object, as in {...}; this is a int"),
        (b"\0\0\0", "this is no JSON"),
        (DEEP, f"brackets are nested more than {DEPTH} deep"),
        (b'{"a":' * 120 + b"1" + b"}" * 120, f"brackets are nested more than {DEPTH} deep"),
        (b'{"text": 1, "text": 2}', "a name stands there twice"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_left_out_and_the_others_stay(sifted, raw, reason):
    found = sifted(b"".join(ROWS[:7]) + raw.rstrip() + b"\n" + b"".join(ROWS[7:]))
    ((row, why),) = found.bad
    assert row == 7
    assert reason in why
    with open(found.read, "rb") as copy:
        assert copy.readlines() == ROWS
    assert found.rows == 20


def test_a_good_file_is_read_where_it_lies(sifted, tmp_path):
    found = sifted(b"\xef\xbb\xbf" + b"\n".join(ROWS).rstrip())
    assert (found.read, found.rows, found.bad) == (str(tmp_path / "a.jsonl"), 20, [])
    deep = {"a": [[1, {"b": []}]] * 60, "t": "\U0001f600"}
    assert from_json(json.dumps(deep).encode()) == deep


def test_it_costs_once(sifted, tmp_path, monkeypatch):
    found = sifted(b"".join(ROWS) + b"x\n")
    monkeypatch.setattr(data_sift, "_through", lambda *_: pytest.fail("it was gone through again"))
    again = sift(found.file, "json", tmp_path / "c", Limits())
    assert (again.read, again.rows, len(again.bad)) == (found.read, 20, 1)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"7", "it has 1 fields, and there are 2 names"),
        (b"7,a,b,c", "it has 4 fields"),
        (b'7,"a', "this is no record"),
        (b"7,\xff", "invalid UTF-8 at byte 2"),
        (b'7,"a"b', "this is no record"),
    ],
)
def test_a_bad_record_is_left_out_and_the_others_stay(sifted, record, reason):
    before, after = [b'%d,"t, ""%d""\n\nand more"\n' % (i, i) for i in range(5)], [b"%d,t\n" % i for i in range(5)]
    found = sifted(b"id,text\n" + b"".join(before) + record + b"\n" + b"".join(after), "a.csv")
    ((row, why),) = found.bad
    assert row == 5
    assert reason in why
    with open(found.read, "rb") as copy:
        assert copy.read() == b"id,text\n" + b"".join(before + after)
    assert found.rows == 10


def test_tabs(sifted):
    assert sifted(b"id\ttext\n1\ta, b\n", "a.tsv").bad == []


def test_a_packed_file_is_unpacked_as_far_as_it_may(sifted):
    whole = gzip.compress(b"".join(ROWS))
    found = sifted(whole, "a.jsonl.gz")
    with open(found.read, "rb") as copy:
        assert copy.readlines() == ROWS
    cut = sifted(whole[:-20], "b.jsonl.gz")
    assert 10 < cut.rows < 20
    assert "damaged from here on" in cut.bad[-1][1]
    bomb = gzip.compress((b'{"text": "' + b"a" * 999 + b'"}\n') * (FREE // 1000))
    with pytest.raises(DataError, match=r"unpacks to more than 200 times its .* raise data\.max_ratio"):
        sifted(bomb, "c.jsonl.gz")


def test_a_line_without_end_is_not_held(sifted):
    found = sifted(ROWS[0] + b'{"text": "' + b"a" * 5000 + b'"}\n' + ROWS[1], row=1000)
    assert (found.rows, found.bad) == (2, [(1, "it has more than the 1,000 bytes that data.max_bytes allows")])


def test_a_file_of_nothing_but_bad_lines_is_refused(sifted, monkeypatch):
    monkeypatch.setattr(data_sift, "MOST", 10)
    with pytest.raises(DataError, match="more than 10 of its rows cannot be used, such as row 10: "):
        sifted(b"x\n" * 50)


def test_one_value_over_several_lines(sifted):
    assert sifted(json.dumps([{"text": "a"}], indent=1).encode(), "a.json").rows == 1
    assert sifted(json.dumps({"text": "a"}, indent=1).encode(), "b.json").bad == []
    assert sifted(ROWS[0] + b"x\n", "c.json").rows == 1
    with pytest.raises(DataError, match="nested more than"):
        sifted(b"[" * 100_000 + b"]" * 100_000, "d.json")
