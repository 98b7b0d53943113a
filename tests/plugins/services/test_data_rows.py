"""Rows of local tables: from any row on the same, and what cannot be read costs no more than it has to."""

from __future__ import annotations

import gzip
import json

import pytest

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

from selfsup.kernel.errors import BadSample  # noqa: E402
from selfsup.plugins.services.data_refused import Limits  # noqa: E402
from selfsup.plugins.services.data_rows import damage, first_rows, read_rows  # noqa: E402

TEXTS = [f"text {n} " * 20 for n in range(40)]
LINES = [json.dumps({"text": text}).encode() for text in TEXTS]


def write_parquet(path, texts=TEXTS, kind=None):
    table = pa.table({"text": pa.array(texts, kind)})
    parquet.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False)
    return path


def write(folder, suffix, lines=LINES):
    path = folder / f"a{suffix}"
    data = b"\n".join(lines) + b"\n"
    if suffix == ".csv":
        data = b"n,text\n" + b"".join(
            b'%d,"%s"\n' % (n, json.loads(line)["text"].encode()) for n, line in enumerate(lines)
        )
    if suffix == ".json":
        data = json.dumps([json.loads(line) for line in lines], indent=1).encode()
    if suffix == ".parquet":
        return write_parquet(path)
    path.write_bytes(gzip.compress(data, mtime=0) if suffix.endswith(".gz") else data)
    return path


def rows(path, first=0, columns=("text",), **limits):
    """{name: text, or the reason why there is none}"""
    found = {}
    for read in read_rows(str(path), first, columns, Limits(**limits)):
        found[read.name] = read.row if isinstance(read.row, BadSample) else read.row["text"]
    return found


def bad(found):
    return {name: str(row) for name, row in found.items() if isinstance(row, BadSample)}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
def test_every_row_from_any_row_on(tmp_path, suffix):
    path = write(tmp_path, suffix)
    for first in (0, 1, 9, 10, 25, 40):
        assert rows(path, first) == {f"row {n}": TEXTS[n] for n in range(first, 40)}
    assert first_rows(str(path), Limits())["text"] == TEXTS[0]


def test_a_line_that_is_none_costs_itself(tmp_path):
    found = rows(write(tmp_path, ".jsonl", [*LINES[:3], LINES[3][:20], *LINES[4:8], b"\xff", *LINES[9:]]))
    assert bad(found).keys() == {"row 3", "row 8"}
    assert "invalid UTF-8 at byte 0" in str(found["row 8"])
    assert len(found) == 40
    path = tmp_path / "b.csv"
    path.write_text('text\n"one"\n"broken\ntwo,2\nthree\n')
    found = rows(path)
    assert [row for row in found.values() if isinstance(row, str)] == ["one", "three"]
    assert bad(found).keys() == {"row 1", "row 2"}


def test_a_row_that_asks_for_too_much_costs_itself(tmp_path):
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    found = rows(
        write(tmp_path, ".jsonl", [LINES[0], deep, b'{"text": "' + b"a" * 300_000 + b'"}', LINES[3]]), row=250_000
    )
    assert bad(found) == {
        "row 1": "brackets are nested more than 100 deep",
        "row 2": "it has more than the 250,000 bytes that data.max_bytes allows",
    }
    assert found["row 3"] == TEXTS[3]


def test_a_gz_file_is_read_as_far_as_it_is_whole_and_as_limits_allow(tmp_path):
    path = write(tmp_path, ".jsonl.gz", [json.dumps({"text": str(n) * 50}).encode() for n in range(5000)])
    path.write_bytes(path.read_bytes()[:-500])
    found = read_rows(str(path), 0, None, Limits())
    with pytest.raises(BadSample, match="EOFError: Compressed file ended"):
        list(found)
    bomb = tmp_path / "b.jsonl.gz"
    bomb.write_bytes(gzip.compress(b'{"text": "a"}\n' * 6_000_000, 1))
    with pytest.raises(BadSample, match=r"raise data\.max_ratio"):
        list(read_rows(str(bomb), 10**9, None, Limits(ratio=2)))


def test_a_row_group_with_a_damaged_page_costs_itself(tmp_path):
    path = write(tmp_path, ".parquet")
    place = parquet.read_metadata(path).row_group(2).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 200] = b"\xff" * 200
    path.write_bytes(data)
    found = rows(path)
    assert bad(found).keys() == {"rows 20 to 29"}
    assert [row for row in found.values() if isinstance(row, str)] == TEXTS[:20] + TEXTS[30:]
    assert list(rows(path, 23)) == ["rows 23 to 29", *(f"row {n}" for n in range(30, 40))]


def test_a_value_of_a_parquet_file_that_is_no_utf8_costs_its_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [b"one", b"\xff\xfe", b"three"], pa.binary())
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(0, "text", table["text"].combine_chunks().view(pa.string())), path)
    found = rows(path)
    assert (found["row 0"], found["row 2"]) == ("one", "three")
    assert bad(found) == {"row 1": "invalid UTF-8 at byte 0 of a value"}


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.parquet", b"PAR1 and no more", "ArrowInvalid"),
        ("a.parquet", b"", "ArrowInvalid"),
        ("a.csv", b'"text\n', "its line of names cannot be read"),
        ("a.json", b'{\n"text": "one object"\n}', "it is one object over several lines"),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, "brackets are nested"),
    ],
)
def test_a_file_of_which_nothing_can_be_used(tmp_path, name, data, reason):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(BadSample, match=reason):
        rows(path)


def test_a_parquet_file_without_the_column(tmp_path):
    with pytest.raises(BadSample, match="it has no column 'words', but text"):
        rows(write(tmp_path, ".parquet"), columns=["words"])


def test_a_fault_of_the_machine_is_none_of_the_file(tmp_path):
    """A disk that fails at this moment may not fail at another: no data is left out for it."""
    with pytest.raises(FileNotFoundError):
        rows(tmp_path / "gone.jsonl")
    with pytest.raises(MemoryError):
        damage(MemoryError())
    assert str(damage(OSError("Corrupt snappy compressed data"))) == "OSError: Corrupt snappy compressed data"
