"""Rows of parquet, csv and jsonl files, and of the hub."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import pickle
import socket

import pytest

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

from selfsup.kernel.contracts import Modality  # noqa: E402
from selfsup.kernel.errors import DataError  # noqa: E402
from selfsup.plugins.services import data_tables  # noqa: E402
from selfsup.plugins.services.data import Data  # noqa: E402


class Sound(Modality):
    field, suffixes = "audio", (".wav", ".flac")

    def collate(self, raws, draw=None): ...

    def stem(self, width): ...


class Picture(Sound):
    field, suffixes = "image", (".png", ".jpg")


class Words(Sound):
    field, suffixes = "text", (".txt",)


@pytest.fixture
def opened(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")

    def refuse(*_):
        raise AssertionError("a local file made it go to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # so that a call home would be made, and seen
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)

    def open_(*paths, kinds=(Picture,), **options):
        service = Data(cache=str(cache), **options)
        return service.open_data([str(p) for p in paths], {kind.field: kind() for kind in kinds})

    return open_


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        out.writeheader()
        out.writerows(rows)
    return path


def write_parquet(path, columns, features=None):
    if features:
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(str(path))
    else:
        parquet.write_table(pa.table(columns), path)
    return path


def pictures(first, last):
    return [{"bytes": b"png %d" % i, "path": f"{i}.png"} for i in range(first, last)]


def test_parquet_with_undecoded_images(opened, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"image": pictures(0, 3), "label": [5, 9, 10]})
    source = opened(path)
    assert [source[i] for i in range(3)] == [{"image": p, "label": i} for i, p in enumerate(pictures(0, 3))]
    assert source.classes == ["5", "9", "10"]
    assert source.name(2) == f"{path} row 2"
    assert source.notes[0].startswith("3 rows in 3 classes (column 'label'), ")
    assert source.notes[0].endswith(f"from column 'image' of {path}")


def test_features_of_the_library_stay_undecoded_and_name_classes(opened, tmp_path):
    columns = {"image": pictures(0, 2), "label": [1, 0], "extra": [0.5, 0.5]}
    kinds = {"image": datasets.Image(decode=True), "label": datasets.ClassLabel(names=["dog", "cat"])}
    path = write_parquet(tmp_path / "a.parquet", columns, {**kinds, "extra": datasets.Value("float32")})
    source = opened(path)
    assert source[0] == {"image": pictures(0, 1)[0], "label": 0}
    assert source.classes == ["cat", "dog"]


def test_several_files_name_their_own_rows(opened, tmp_path):
    for number, (first, last) in enumerate(((0, 2), (2, 2), (2, 5))):
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        write_parquet(tmp_path / f"{number}.parquet", {"image": pa.array(pictures(first, last), kind)})
    (tmp_path / "dataset_infos.json").write_text("{}")
    source = opened(f"{tmp_path}/*.parquet")
    assert [source[i]["image"]["path"] for i in range(5)] == [f"{i}.png" for i in range(5)]
    assert source.name(4) == f"{tmp_path}/2.parquet row 2"
    assert len(opened(tmp_path)) == 5


def test_a_struct_without_bytes_is_a_path_beside_its_table(opened, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"image": [{"bytes": None, "path": "in/a.png"}]})
    column = pa.array([{"bytes": None, "path": "in/a.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    write_parquet(path, {"image": column})
    assert opened(path)[0] == {"image": tmp_path / "in/a.png"}


def test_binary_columns_and_other_names(opened, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"id": [1], "IMG": [b"raw"]})
    assert opened(path)[0] == {"image": b"raw"}
    path = write_parquet(tmp_path / "b.parquet", {"id": [1], "scan": [b"raw"]})
    assert opened(path, column="scan")[0] == {"image": b"raw"}


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("odd [1]*.csv", ",")])
def test_csv_paths_count_from_its_folder(opened, tmp_path, name, delimiter):
    for file in ("7_ann.wav", "clips/3_bob.wav"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("sound")
    rows = [{"file": "7_ann.wav", "digit": 7}, {"file": "3_bob.wav", "digit": 3}, {"file": "gone.wav", "digit": 1}]
    source = opened(write_csv(tmp_path / name, rows, delimiter), kinds=(Sound,))
    assert [source[i] for i in range(len(source))] == [
        {"audio": tmp_path / "7_ann.wav", "label": 1},
        {"audio": tmp_path / "clips/3_bob.wav", "label": 0},
    ]
    assert source.name(1) == str(tmp_path / "clips/3_bob.wav")
    assert source.classes == ["3", "7"]
    assert source.notes[1] == "1 file left out: 1 not where column 'file' says (gone.wav)"
    by_name = opened(tmp_path / name, kinds=(Sound,), label=r"_(\w+)\.wav")
    assert [by_name.classes[by_name[i]["label"]] for i in range(2)] == ["ann", "bob"]


def test_an_ambiguous_name_is_not_guessed(opened, tmp_path):
    for file in ("x/a.wav", "y/a.wav", "b.wav"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("sound")
    path = write_csv(tmp_path / "t.csv", [{"file": "a.wav"}, {"file": "b.wav"}])
    assert [opened(path, kinds=(Sound,)).name(0)] == [str(tmp_path / "b.wav")]


def test_a_csv_whose_files_are_all_gone(opened, tmp_path):
    path = write_csv(tmp_path / "t.csv", [{"path": "a.wav"}, {"path": "b.wav"}])
    with pytest.raises(DataError, match=r"none of the files that .* names exists beside or below it, such as 'a.wav'"):
        opened(path, kinds=(Sound,))


@pytest.mark.parametrize("zipped", [False, True])
def test_jsonl_text_is_the_data_itself(opened, tmp_path, zipped):
    rows = [{"text": "one", "intent": "a"}, {"text": "see notes.txt", "intent": "b"}, {"text": "x", "intent": None}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / ("t.jsonl.gz" if zipped else "t.jsonl")
    path.write_bytes(gzip.compress(lines.encode()) if zipped else lines.encode())
    source = opened(path, kinds=(Words,), label="intent")
    assert [source[i] for i in range(3)] == [
        {"text": "one", "label": 0},
        {"text": "see notes.txt", "label": 1},
        {"text": "x"},
    ]


def test_a_changed_file_is_read_again(opened, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "old"}\n')
    assert opened(path, kinds=(Words,))[0] == {"text": "old"}
    path.write_text('{"text": "new"}\n')
    os.utime(path, (1, 1))
    assert opened(path, kinds=(Words,))[0] == {"text": "new"}


def test_several_fields_of_one_row(opened, tmp_path):
    (tmp_path / "a.png").write_text("x")
    path = write_csv(tmp_path / "t.csv", [{"image": "a.png", "text": "a cat"}, {"image": "b.png", "text": "a dog"}])
    source = opened(path, kinds=(Picture, Words))
    assert [source[i] for i in range(len(source))] == [{"image": tmp_path / "a.png", "text": "a cat"}]


def test_it_pickles(opened, tmp_path):
    source = opened(write_parquet(tmp_path / "a.parquet", {"image": pictures(0, 3), "label": ["b", "a", "b"]}))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(3)] == [source[i] for i in range(3)]


def test_workers_read_the_same_rows(opened, tmp_path):
    from torch.utils.data import DataLoader

    source = opened(write_parquet(tmp_path / "a.parquet", {"image": pictures(0, 30), "label": [0, 1, 2] * 10}))
    here = [source[i] for i in range(30)]
    assert list(DataLoader(source, batch_size=None, num_workers=2)) == here


def test_errors_name_what_exists(opened, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"picture_": [b"x"], "label": [0.5]})
    with pytest.raises(
        DataError, match=r"no column of .* to hold image: it has picture_, label; name one .*--column NAME"
    ):
        opened(path)
    with pytest.raises(DataError, match=r"has no column 'pictur'; did you mean 'picture_'\? It has picture_, label"):
        opened(path, column="pictur")
    with pytest.raises(DataError, match=r"has no column 'labl' for labels; did you mean 'label'\? It has pic"):
        opened(path, column="picture_", label="labl")
    with pytest.raises(DataError, match="labels are whole numbers or words"):
        opened(path, column="picture_", label="label")
    assert opened(path, column="picture_").classes is None


def test_empty_and_damaged_tables(opened, tmp_path):
    (tmp_path / "head.csv").write_text("image,label\n")
    with pytest.raises(DataError, match="no rows in"):
        opened(tmp_path / "head.csv")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"'.*bad.parquet' cannot be used: \w+: "):
        opened(tmp_path / "bad.parquet")


def test_a_damaged_file_and_bad_rows_among_good_ones_are_left_out_and_named(opened, tmp_path):
    for number in range(3):
        (tmp_path / "p").mkdir(exist_ok=True)
        write_parquet(tmp_path / "p" / f"{number}.parquet", {"image": pictures(0, 4)})
    whole = (tmp_path / "p/1.parquet").read_bytes()
    (tmp_path / "p/1.parquet").write_bytes(whole[:100] + b"\xff" * 40 + whole[140:])  # a page
    source = opened(tmp_path / "p")
    assert [source.place(i) for i in (3, 4)] == [
        {"path": f"{tmp_path}/p/0.parquet", "row": 3},
        {"path": f"{tmp_path}/p/2.parquet", "row": 0},
    ]
    assert source.notes[1].startswith(f"1 file left out: {tmp_path}/p/1.parquet: ")
    rows = [json.dumps({"text": f"text {i}"}) for i in range(200)]
    rows[7], rows[9] = '{"text": "cut', "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    source = opened(tmp_path / "a.jsonl", kinds=(Words,))
    assert (len(source), source[7]["text"], source.name(8)) == (198, "text 8", f"{tmp_path}/a.jsonl row 10")
    assert [one.row for one in source.refused] == [7, 9]
    with pytest.raises(DataError, match=r"2 of 200 rows cannot be used.* = 0\.001 allows"):
        opened(tmp_path / "a.jsonl", kinds=(Words,), max_bad_fraction=0.001)


def test_a_file_of_another_digest_is_refused(opened, tmp_path):
    names = [write_parquet(tmp_path / f"{i}.parquet", {"image": pictures(i, i + 2)}).name for i in range(2)]
    sums = [f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (tmp_path / "SHA256SUMS").write_text("".join(sums))
    assert any("2 of 2 files are as their SHA-256 says" in note for note in opened(tmp_path).notes)
    flipped = bytearray((tmp_path / "1.parquet").read_bytes())
    flipped[12] ^= 1
    (tmp_path / "1.parquet").write_bytes(flipped)
    source = opened(tmp_path)
    assert len(source) == 2
    assert [(one.path, one.reason) for one in source.refused] == [
        (f"{tmp_path}/1.parquet", "its SHA-256 is not the one beside it")
    ]


def test_numbers_among_texts_leave_the_texts_alone(opened, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 2}\n{"text": "three"}\n')
    source = opened(tmp_path / "a.jsonl", kinds=(Words,))
    assert [source[i]["text"] for i in range(3)] == ["one", 2, "three"]


def test_a_parquet_file_that_promises_too_much_is_refused(opened, tmp_path):
    many = pa.table({"image": pa.array([b"x" * 1000] * 200_000)})
    parquet.write_table(many, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=r"it promises 200,000 rows of .* raise data\.max_ratio"):
        opened(tmp_path / "a.parquet")


def test_no_script_that_comes_with_data_is_run(opened, monkeypatch):
    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: asked.update(options) or {}[name])
    with pytest.raises(DataError):
        opened("somebody/something")
    assert asked["trust_remote_code"] is False


def test_progress_bars_are_as_they_were(opened, tmp_path, capfd):
    assert not datasets.are_progress_bars_disabled()
    opened(write_parquet(tmp_path / "a.parquet", {"image": pictures(0, 3)}))
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr().err == ""


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "a.csv").write_text("image\nx.png\n")
    with pytest.raises(DataError, match=r"needs the library `datasets`: pip install 'selfsup\[data\]'"):
        Data().open_data([str(tmp_path / "a.csv")], {"image": Picture()})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub, played by a folder in the layout of a repository without a script."""
    (tmp_path / "repository/data").mkdir(parents=True)
    write_parquet(
        tmp_path / "repository/data/train-00000-of-00001.parquet", {"image": pictures(0, 3), "label": [0, 1, 0]}
    )
    write_parquet(tmp_path / "repository/data/test-00000-of-00001.parquet", {"image": pictures(3, 5), "label": [1, 1]})
    real = datasets.load_dataset

    def load(name, **options):
        if name != "someone/pictures":
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub")
        return real(str(tmp_path / "repository"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("hub")
def test_a_name_on_the_hub(opened):
    source = opened("someone/pictures")
    assert [source[i]["image"]["path"] for i in range(len(source))] == ["0.png", "1.png", "2.png"]
    assert source.classes == ["0", "1"]
    assert source.name(1) == "someone/pictures:train row 1"
    assert len(opened("someone/pictures:test")) == 2


@pytest.mark.usefixtures("hub")
def test_a_name_that_the_hub_does_not_have(opened, tmp_path):
    with pytest.raises(
        DataError, match=r"no file or folder 'nobody/nothing', and the hub does not give .*Couldn't reach"
    ):
        opened("nobody/nothing")
    (tmp_path / "photos/train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"there is no 'photos/trian'; in photos: did you mean 'train'\?"):
        opened("photos/trian")


def test_every_suffix_has_a_reader():
    assert all(hasattr(datasets.DatasetDict, f"from_{kind}") for kind in data_tables.READERS.values())


@pytest.mark.parametrize("column", ["text", "Content", "document", "body", "sentence"])
def test_a_column_of_text_is_found_and_its_values_are_texts(opened, tmp_path, column):
    values = ["Look into notes.txt", "a line\nand another.txt", "", "no"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": i, column: value}) + "\n" for i, value in enumerate(values)))
    source = opened(path, kinds=(Words,))
    assert [source[i]["text"] for i in range(len(source))] == values


def test_a_column_of_text_may_hold_paths_where_the_files_are_there(opened, tmp_path):
    path = write_csv(tmp_path / "t.csv", [{"text": "b.txt"}, {"text": "a.txt"}])
    assert [row["text"] for row in opened(path, kinds=(Words,))] == ["b.txt", "a.txt"]
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"inside {name}")
    assert [row["text"] for row in opened(path, kinds=(Words,))] == [tmp_path / "b.txt", tmp_path / "a.txt"]


def test_text_without_a_known_column_asks_for_one(opened, tmp_path):
    path = write_csv(tmp_path / "t.csv", [{"reviews": "good", "stars": 5}])
    with pytest.raises(
        DataError, match=r"no column of .* is known to hold text: it has reviews, stars; .*data\.column"
    ):
        opened(path, kinds=(Words,))
    assert opened(path, kinds=(Words,), column="reviews")[0] == {"text": "good"}
    with pytest.raises(DataError, match=r"has no column 'review'; did you mean 'reviews'\?"):
        opened(path, kinds=(Words,), column="review")
