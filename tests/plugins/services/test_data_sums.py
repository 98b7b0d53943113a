"""Digests beside the data."""

from __future__ import annotations

import hashlib
import json
import os
import sys

import pytest
from forked import together

from selfsup.kernel.errors import DataError
from selfsup.plugins.services.data_sums import check_sums, digests

TOGETHER = """
import json, os, sys
import torch
from selfsup.kernel import distributed
from selfsup.kernel.errors import DataError
from selfsup.plugins.services import data_sums

data_sums.MEET, read, digest = 0.05, [], data_sums._digest
data_sums._digest = lambda file: read.append(os.path.basename(file)) or digest(file)
distributed.join(torch.device("cpu"), 60)
folder = sys.argv[1]
files = [f"{folder}/{number}.png" for number in range(7)]
refused, notes = data_sums.check_sums(folder, files)
if distributed.rank() == 2:
    open(f"{folder}/SHA256SUMS", "w").write("no digest")
distributed.barrier()
try:
    data_sums.check_sums(folder, files if distributed.rank() == 1 else [])
    error = "none"
except DataError as cause:
    error = str(cause)
print(json.dumps([read, [one.path for one in refused], notes[0].partition(",")[0], error]), flush=True)
distributed.barrier()
os._exit(0)
"""


def write(path, content, name=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return f"{hashlib.sha256(content).hexdigest()}  {name or path.name}\n"


def test_a_flipped_bit_is_found_and_named(tmp_path):
    lines = [write(tmp_path / "in" / f"{i}.png", b"%d" % i, f"./in/{i}.png") for i in range(5)]
    (tmp_path / "SHA256SUMS").write_text("# of the data\n" + "".join(lines))
    files = sorted(str(path) for path in tmp_path.glob("in/*.png"))
    refused, (note,) = check_sums(str(tmp_path), files)
    assert refused == []
    assert note.startswith("5 of 5 files are as their SHA-256 says, ")
    (tmp_path / "in/3.png").write_bytes(b"2")
    refused, (note,) = check_sums(str(tmp_path), files)
    assert [(one.path, one.reason) for one in refused] == [(files[3], "its SHA-256 is not the one beside it")]
    assert note.startswith("4 of 5 files")


def test_where_they_may_lie(tmp_path, monkeypatch):
    data = tmp_path / "data"
    own = write(data / "a" / "1.wav", b"1")
    write(data / "a" / "2.wav", b"2")
    write(data / "b" / "3.wav", b"3")
    (data / "a" / "1.wav.sha256").write_text(own.upper().replace(".WAV", ".wav"))
    (data / "a" / "SHA256SUMS").write_text("0" * 64 + " *2.wav\n" + "0" * 64 + "  1.wav\n")
    (tmp_path / "SHA256SUMS").write_text("1" * 64 + "  data/b/3.wav\n" + "2" * 64 + "  data/a/2.wav\n")
    files = [str(data / name) for name in ("a/1.wav", "a/2.wav", "b/3.wav")]
    found = digests(str(data), files)
    assert [found[file][:8] for file in files] == [own[:8], "0" * 8, "1" * 8]  # the nearest one says
    assert digests(str(data / "b"), files[2:]) == {}  # not above the folder that holds what was named
    monkeypatch.chdir(data)
    assert list(digests("", ["a/2.wav"])) == ["a/2.wav"]


def test_names_as_coreutils_escapes_them(tmp_path):
    line = write(tmp_path / "a\\b\nc.wav", b"1")
    digest = line[:64]
    (tmp_path / "SHA256SUMS").write_text(f"\\{digest}  a\\\\b\\nc.wav\n")
    assert digests(str(tmp_path), [str(tmp_path / "a\\b\nc.wav")]) == {str(tmp_path / "a\\b\nc.wav"): digest}


def test_sums_that_say_something_else(tmp_path):
    write(tmp_path / "a.wav", b"1")
    file = str(tmp_path / "a.wav")
    (tmp_path / "SHA256SUMS").write_text("SHA256 (a.wav) = 00\n")
    with pytest.raises(DataError, match=r"line 1 of .*SHA256SUMS is not of the form 'digest  name'"):
        digests(str(tmp_path), [file])
    (tmp_path / "a.wav.sha256").write_text("0" * 64 + "  b.wav\n")
    with pytest.raises(DataError, match=r"a\.wav\.sha256 names b\.wav, not a\.wav"):
        digests(str(tmp_path), [file])


def test_without_digests_nothing_is_read(tmp_path):
    write(tmp_path / "a.wav", b"1")
    assert check_sums(str(tmp_path), [str(tmp_path / "a.wav")]) == ([], [])


def test_a_file_that_vanished(tmp_path):
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  gone.wav\n")
    ((one,), _) = check_sums(str(tmp_path), [str(tmp_path / "gone.wav")])
    assert one.reason == "it cannot be read: No such file or directory"


def test_processes_share_the_work_and_learn_all_that_was_found(tmp_path):
    """One of them alone sees digests that cannot be read: all raise it."""
    lines = [write(tmp_path / f"{i}.png", b"%d" % i * (i + 1)) for i in range(7)]
    (tmp_path / "SHA256SUMS").write_text("".join(lines))
    for i in (2, 5):
        (tmp_path / f"{i}.png").write_bytes(b"another")
    told = []
    for process in together(3, [sys.executable, "-c", TOGETHER, tmp_path], env=os.environ):
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        told.append(json.loads(out))
    assert sorted(name for read, *_ in told for name in read) == [f"{i}.png" for i in range(7)]  # each once
    assert max(len(read) for read, *_ in told) == 3
    for _, refused, note, error in told:
        assert refused == [str(tmp_path / "2.png"), str(tmp_path / "5.png")]
        assert note == "5 of 7 files are as their SHA-256 says"
        assert "is not of the form 'digest  name'" in error
