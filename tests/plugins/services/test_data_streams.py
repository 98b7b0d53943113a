"""Tables and tars read front to back: the same rows as any other reader finds, in the workers of a loader too."""

from __future__ import annotations

import gc
import gzip
import hashlib
import io
import json
import os
import re
import socket
import tarfile
import warnings
from itertools import pairwise

import pytest

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

from selfsup.kernel.contracts import Modality  # noqa: E402
from selfsup.kernel.errors import BadSample, DataError  # noqa: E402
from selfsup.kernel.loader import Endless, Loader, Reader  # noqa: E402
from selfsup.plugins.services import data_streams  # noqa: E402
from selfsup.plugins.services.data import Data  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


class Words(Modality):
    field, suffixes = "text", (".txt",)

    def collate(self, raws, draw=None):
        return [str(raw) for raw in raws]

    def stem(self, width): ...


class Picture(Words):
    field, suffixes = "image", (".png", ".jpg")


def together(samples, draw):
    return {"words": [str(sample["tower"]) for sample in samples]}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    own = socket.socket.connect

    def refuse(*given):
        if isinstance(given[-1], bytes | str):  # processes of this machine speak to each other so
            return own(*given)
        raise AssertionError("a local file made it go to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # so that a call home would be made, and seen
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # `datasets` leaves files that are not read to their end to the garbage collector


def opened(*paths, stream=8, kinds=(Words,), **options):
    paths = [str(path) for path in paths]
    return Data(paths=paths, stream=stream, **options).open_data(paths, {kind.field: kind() for kind in kinds})


def read(source, windows, field="text"):
    return [source.at(i, turn)[field] for turn in range(windows) for i in range(len(source))]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def texts(shard, count):
    return [f"shard {shard} row {n}" for n in range(count)]


def write(folder, kind):
    """Three shards of 250 rows each."""
    for shard in range(3):
        rows = texts(shard, 250)
        if kind == "jsonl":
            write_jsonl(folder / f"{shard}.jsonl", rows)
        elif kind == "jsonl.gz":
            (folder / f"{shard}.jsonl.gz").write_bytes(
                gzip.compress("".join(f'{{"text": "{r}"}}\n' for r in rows).encode())
            )
        elif kind == "csv":
            (folder / f"{shard}.csv").write_text("text,n\n" + "".join(f'"{row}",1\n' for row in rows))
        elif kind == "tsv":
            (folder / f"{shard}.tsv").write_text("n\ttext\n" + "".join(f"1\t{row}\n" for row in rows))
        elif kind == "parquet":
            parquet.write_table(pa.table({"text": rows}), folder / f"{shard}.parquet", row_group_size=70)
        else:
            write_tar(folder / f"{shard}.tar", {f"{n:04d}.txt": row.encode() for n, row in enumerate(rows)})


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet", "tar"])
def test_every_kind_is_read_whole_in_passes_and_from_any_mark(tmp_path, kind):
    write(tmp_path, kind)
    source = opened(tmp_path, stream=250)
    found = read(source, 6)
    if kind == "tar":
        found = [stored["bytes"].decode() for stored in found]
    wanted = sorted(row for shard in range(3) for row in texts(shard, 250))
    assert sorted(found[:750]) == sorted(found[750:]) == wanted
    assert found[:750] != found[750:], "passes differ in order"
    flow = source.flows[0]
    items = flow.read(0, None)
    some = [next(items) for _ in range(600)]
    for place in (0, 98, 99, 100, 249, 250, 333, 598):
        on = flow.read(0, json.loads(json.dumps(some[place].mark)))
        assert next(on) == some[place + 1]


def test_names_say_where_a_sample_lies(tmp_path):
    write(tmp_path, "jsonl")
    source = opened(tmp_path / "1.jsonl", stream=150)
    items = source.flows[0].read(0, None)
    some = [next(items) for _ in range(250)]
    assert [item.name for item in some] == [f"{tmp_path / '1.jsonl'} row {n}" for n in range(250)]
    on = source.flows[0].read(0, some[130].mark)
    assert next(on).name.endswith("row 131")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", ["jsonl", "tar"])
def test_any_workers_and_a_resume_with_and_without_marks_give_the_same(tmp_path, kind):
    write(tmp_path, kind)

    def batches(workers, first, last, microbatch=0, marks=None):
        reader = Reader(opened(tmp_path, stream=40), {"tower": Words()}, together, 0)
        loader = Loader(reader, batch=12, microbatch=microbatch, workers=workers, timeout=60)
        if marks:
            reader.source.recall(json.loads(json.dumps(marks)))
        found = [[word for part in parts for word in part["words"]] for parts in loader.steps(first, last)]
        return found, reader.source.news()[0]

    whole, _ = batches(0, 0, 20)
    ours, marks = batches(2, 0, 11, microbatch=5)
    assert ours == whole[:11]
    assert batches(1, 11, 20, marks=marks)[0] == batches(0, 11, 20)[0] == whole[11:]
    assert max(turn for turn, *_ in marks[0]) >= 3, "the marks of workers arrive"


def test_weights_share_the_window_and_streams_without_them_are_refused(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", ["a"] * 5), write_jsonl(tmp_path / "b.jsonl", ["b"] * 100)
    source = opened(f"{a}@3", f"{b}@1", stream=8)
    assert isinstance(source, Endless)
    assert read(source, 2).count("b") == 4
    assert any(note.startswith("mixture: 75 % ") for note in source.notes)
    with pytest.raises(DataError, match=f"each needs its share, as in --data {re.escape(str(a))}@1 --data"):
        opened(a, b)


def test_columns_of_paths_count_from_the_folder_of_their_table(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/0.png").write_bytes(b"png")
    (tmp_path / "list.csv").write_text("image,n\nclips/0.png,1\nclips/1.png,2\n")
    source = opened(tmp_path / "list.csv", kinds=(Picture,))
    assert source.at(0, 0) == {"image": tmp_path / "clips/0.png"}


def test_images_stay_as_they_are_stored(tmp_path):
    rows = {"image": [{"bytes": b"no png", "path": None}] * 3}
    table = datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image()}))
    table.to_parquet(tmp_path / "a.parquet")
    assert opened(tmp_path / "a.parquet", kinds=(Picture,)).at(1, 0) == {"image": {"bytes": b"no png", "path": None}}


def test_files_of_one_sample_in_a_tar_are_paired(tmp_path):
    members = {
        "a.txt": b"A",
        "a.jpg": b"1",
        "a.json": b"{}",
        "b.jpg": b"2",
        "c.jpg": b"3",
        "c.txt": b"C",
        ".d.txt": b"x",
    }
    path = write_tar(tmp_path / "x.tar", members)
    source = opened(path, stream=2, kinds=(Picture, Words))
    found = [{name: stored["bytes"] for name, stored in source.at(i, 0).items()} for i in range(2)]
    assert found == [{"text": b"A", "image": b"1"}, {"text": b"C", "image": b"3"}]


def test_a_file_of_a_tar_that_is_too_large_is_a_bad_sample_and_not_read(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.txt": b"A", "b.txt": b"B" * 500, "c.txt": b"C"})
    source = opened(path, stream=3, max_bytes=100)
    with pytest.raises(BadSample, match=r"500 bytes are more than the 100 that data.max_bytes allows"):
        source.at(1, 0)
    assert source.at(2, 0)["text"]["bytes"] == b"C"


def test_a_key_chooses_among_the_files_of_a_tar(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.en.txt": b"A", "a.fr.txt": b"B", "b.en.txt": b"C"})
    source = opened(path, stream=2, column="en.txt")
    assert [stored["bytes"] for stored in read(source, 1)] == [b"A", b"C"]


def good_and_bad(source, count):
    """The first samples, or why they are none; all of them again from each mark."""
    flow = source.flows[0]
    items = flow.read(0, None)
    found = [next(items) for _ in range(count)]
    for before, item in pairwise(found):
        on = next(flow.read(0, json.loads(json.dumps(before.mark))))
        assert (str(on.sample), on.mark, on.read) == (str(item.sample), item.mark, item.read)
    why = [f"{item.name}: {sample}" for item in found if isinstance(sample := item.sample["text"], BadSample)]
    return [item.sample["text"] for item in found if not isinstance(item.sample["text"], BadSample)], why


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("cut", r"x.tar after 2.txt: ReadError: unexpected end of data; the rest of the file is left out"),
        ("cut between files", r"x.tar after 2.txt: what follows byte 4,608 is nothing, not even the mark of its end"),
        ("overwritten", r"x.tar after 2.txt: what follows byte 4,608 is no tar; the rest of the file is left out"),
    ],
)
def test_the_rest_of_a_damaged_tar_is_left_out_by_name(tmp_path, damage, reason):
    path = write_tar(tmp_path / "x.tar", {f"{n}.txt": b"text" * 200 for n in range(9)})
    data = bytearray(path.read_bytes())
    if damage == "overwritten":
        data[3 * 1536 : 3 * 1536 + 512] = b"\x07" * 512
    else:
        del data[5300 if damage == "cut" else 4608 :]
    path.write_bytes(data)
    texts, why = good_and_bad(opened(path, stream=9), 8)
    assert len(texts) == 6
    assert len(why) == 2, "once in each pass"
    assert all(re.search(reason, one) for one in why)


def test_a_line_that_is_none_costs_itself_in_every_pass(tmp_path):
    write(tmp_path, "jsonl")
    lines = (tmp_path / "1.jsonl").read_text().splitlines()
    lines[17] = lines[17][:12]
    (tmp_path / "1.jsonl").write_text("\n".join(lines))
    source = opened(tmp_path, stream=750)
    items = source.flows[0].read(0, None)
    found = [next(items) for _ in range(1500)]
    bad = [item for item in found if isinstance(item.sample["text"], BadSample)]
    assert [item.name for item in bad] == [f"{tmp_path / '1.jsonl'} row 17"] * 2
    with pytest.raises(BadSample, match="this is no JSON"):
        source.at(found.index(bad[0]), 0)


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz", "tar"])
def test_a_shard_that_is_no_longer_as_its_digest_says_is_refused_before_it_is_used(tmp_path, kind):
    write(tmp_path, kind)
    files = sorted(tmp_path.iterdir())
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (tmp_path / "SHA256SUMS").write_text("".join(sums))
    source = opened(tmp_path / f"*.{kind}", stream=9)
    assert "3 of 3 files have a SHA-256, checked before each is read" in source.notes
    assert good_and_bad(source, 251)[1] == []
    data = bytearray(files[1].read_bytes())
    data[len(data) // 2] ^= 1
    files[1].write_bytes(data)
    items = source.flows[0].read(0, None)
    found = [next(items) for _ in range(501)]
    (why,) = (f"{item.name}: {stored}" for item in found if isinstance(stored := item.sample["text"], BadSample))
    assert why == f"{files[1]}: its SHA-256 is not the one beside it; the rest of the file is left out"
    assert not any(item.name.startswith(f"{files[1]} ") or item.name.startswith(f"{files[1]}:") for item in found)


def test_a_digest_is_made_once_unless_the_file_changes(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    (tmp_path / "a.jsonl.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  a.jsonl\n")
    read, own = [], data_streams.sha256
    monkeypatch.setattr(data_streams, "sha256", lambda file: read.append(file) or own(file))
    source = opened(path, stream=2)
    assert not read, "not before it is read"
    assert len(good_and_bad(source, 6)[0]) == 6
    assert len(read) == 1
    write_jsonl(path, ["a", "c"])
    os.utime(path, (0, 0))
    with pytest.raises(DataError, match="cannot be used: its SHA-256 is not the one beside it"):
        good_and_bad(source, 2)


def test_more_shards_of_which_nothing_can_be_used_than_are_allowed_stop_the_run(tmp_path):
    write(tmp_path, "parquet")
    for shard in (0, 1):
        (tmp_path / f"{shard}.parquet").write_bytes(b"no parquet at all")
    source = opened(tmp_path, stream=9, max_bad_fraction=0.5)
    with pytest.raises(DataError, match=r"2 of 3 shards cannot be used, more than data.max_bad_fraction = 0.5") as told:
        good_and_bad(source, 500)
    assert all(f"{shard}.parquet: ArrowInvalid" in str(told.value) for shard in (0, 1))
    assert len(good_and_bad(opened(tmp_path, stream=9, max_bad_fraction=0.7), 500)[0]) > 240
    (tmp_path / "2.parquet").write_bytes(b"neither")
    with pytest.raises(DataError, match="none of 3 files can be used"):
        opened(tmp_path)


def test_a_shard_that_is_gone_stops_the_run(tmp_path):
    """It may be there for another process, or at another moment: left out, it would make them differ."""
    write(tmp_path, "tar")
    source = opened(tmp_path, stream=9)
    (tmp_path / "1.tar").unlink()
    with pytest.raises(DataError, match=r"cannot be read on in .*1.tar, after .*; mend it and go on with --resume"):
        good_and_bad(source, 751)


def test_what_streams_cannot_do_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="holds files of their own"):
        opened(tmp_path)
    with pytest.raises(DataError, match="no data was named"):
        opened()
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match="there are no rows"):
        opened(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(DataError, match=r"no column of .* is known to hold text"):
        opened(tmp_path / "c.jsonl")


def test_other_data_than_that_of_training_is_no_stream(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", ["a"]), write_jsonl(tmp_path / "b.jsonl", ["b"])
    service = Data(paths=[str(a)], stream=4, cache=str(tmp_path / "cache"))
    held_out = service.open_data([str(b)], {"text": Words()})
    assert not isinstance(held_out, Endless)
    assert len(held_out) == 1


def test_a_hub_name_goes_the_same_way(tmp_path, monkeypatch):
    write(tmp_path, "parquet")
    asked = []

    def load(name, split, streaming, trust_remote_code):
        assert trust_remote_code is False
        asked.append((name, split, streaming))
        return datasets.Dataset.from_parquet([str(tmp_path / f"{n}.parquet") for n in range(3)], streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = opened("someone/many:validation", stream=250)
    assert asked == [("someone/many", "validation", True)]
    assert sorted(read(source, 3)) == sorted(row for shard in range(3) for row in texts(shard, 250))
    assert source.where(0).startswith("someone/many:validation shard ")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match="the hub does not give a data set of that name: ZeroDivisionError"):
        data_streams.stream_hub("someone/many", {"text": Words()}, data_streams.Options())
