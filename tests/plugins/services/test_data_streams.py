"""Tables and tars read front to back: the same rows as any other reader finds, in the workers of a loader too."""

from __future__ import annotations

import gc
import gzip
import io
import json
import re
import socket
import tarfile
import warnings

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


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_tar_stops_the_run_instead_of_ending_early(tmp_path, damage):
    path = write_tar(tmp_path / "x.tar", {f"{n}.txt": b"text" * 200 for n in range(9)})
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[5000:]
    else:
        data[3 * 1536 : 3 * 1536 + 512] = b"\x07" * 512
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot be read on in .*x.tar, after 3 samples"):
        opened(path, stream=9).at(0, 0)


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
