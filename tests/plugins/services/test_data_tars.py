"""Tar shards: plain ones and those of the webdataset form, read where they lie."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile

import pytest

from selfsup.kernel.contracts import Modality
from selfsup.kernel.errors import BadSample, DataError
from selfsup.plugins.services.data import Data


class Picture(Modality):
    field, suffixes = "image", (".png", ".jpg")

    def collate(self, raws, draw=None): ...

    def stem(self, width): ...


class Sound(Picture):
    field, suffixes = "audio", (".wav",)


class Caption(Picture):
    field, suffixes = "text", (".txt",)


def write(path, members, kind=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def opened(*paths, kinds=(Picture,), **options):
    return Data(**options).open_data([str(p) for p in paths], {kind.field: kind() for kind in kinds})


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_files_labelled_by_name(tmp_path, kind):
    long = "d/" * 60 + "3_bob_1.wav"
    path = write(tmp_path / "a.tar", {"7_ann_0.wav": b"one", long: b"two" * 500, "speech.02.wav": b"3"}, kind)
    source = opened(path, kinds=(Sound,), label=r"^(\d)_")
    assert source[0] == {"audio": {"bytes": b"one", "path": "7_ann_0.wav"}, "label": 1}
    assert source[1] == {"audio": {"bytes": b"two" * 500, "path": long}, "label": 0}
    assert source[2] == {"audio": {"bytes": b"3", "path": "speech.02.wav"}}
    assert source.name(0) == f"{path}:7_ann_0.wav"
    assert source.notes == [f"3 audio files in 2 classes, 1.5 kB, from {path}"]


def test_shards_with_members_beside_the_samples(tmp_path):
    one = {"a.jpg": b"A", "a.cls": b"1\n", "a.json": b"{}", "b.png": b"B", "b.cls": b"0", "._b.png": b"junk"}
    write(tmp_path / "0.tar", one)
    write(tmp_path / "1.tar", {"./a.png": b"C", "./a.json": b'{"label": "10"}', "e.png": b""})
    source = opened(tmp_path)
    assert [source[i]["image"]["bytes"] for i in range(3)] == [b"A", b"B", b"C"]
    assert [source.classes[source[i]["label"]] for i in range(3)] == ["1", "0", "10"]
    assert source.name(2) == f"{tmp_path}/1.tar:a.png"
    assert source.notes == [
        f"3 image files in 3 classes, 3 bytes, from 2 tars of {tmp_path}",
        "5 members left out: 1 empty (e.png), 4 beside the samples (.cls, .json)",
    ]


def test_labels_by_folder_and_by_name_of_a_key(tmp_path):
    path = write(tmp_path / "a.tar", {"train/cat/1.png": b"x", "train/dog/1.png": b"x"})
    assert opened(path).classes == ["cat", "dog"]
    path = write(tmp_path / "b.tar", {"1.png": b"x", "1.json": b'{"kind": 4}', "2.png": b"x", "2.json": b"broken"})
    source = opened(path, label="kind")
    assert [source[i].get("label") for i in range(2)] == [0, None]
    assert source.classes == ["4"]
    with pytest.raises(DataError, match=r"no sample of .* has a label 'sort'"):
        opened(path, label="sort")


def test_a_key_chooses_among_several(tmp_path):
    path = write(tmp_path / "a.tar", {"1.png": b"x", "1.mask.png": b"m", "2.png": b"y"})
    assert len(opened(path)) == 3
    assert [opened(path, column="mask.png")[0]["image"]["bytes"]] == [b"m"]
    with pytest.raises(DataError, match=r"no member of .* with the key 'jpg' is image"):
        opened(path, column="jpg")


def test_several_fields_are_paired(tmp_path):
    path = write(tmp_path / "a.tar", {"b.txt": b"B!", "a.png": b"a", "a.txt": b"A!", "b.png": b"b", "c.png": b"c"})
    source = opened(path, kinds=(Picture, Caption))
    assert [(source[i]["image"]["bytes"], source[i]["text"]["bytes"]) for i in range(len(source))] == [
        (b"a", b"A!"),
        (b"b", b"B!"),
    ]


def test_same_names_in_two_shards_stay_apart(tmp_path):
    for shard in "01":
        write(tmp_path / f"{shard}.tar", {"a.png": shard.encode(), "a.txt": f"caption {shard}".encode()})
    source = opened(tmp_path, kinds=(Picture, Caption))
    assert [(source[i]["image"]["bytes"], source[i]["text"]["bytes"]) for i in range(len(source))] == [
        (b"0", b"caption 0"),
        (b"1", b"caption 1"),
    ]


def test_a_tar_that_ends_early_gives_what_it_holds(tmp_path):
    path = write(tmp_path / "a.tar", {"a.png": b"x" * 600, "b.png": b"y" * 6000, "c.png": b"z"})
    path.write_bytes(path.read_bytes()[:3000])
    source = opened(path)
    assert source[0]["image"]["bytes"] == b"x" * 600
    assert any("is damaged after its" in note for note in source.notes)
    if len(source) > 1:
        with pytest.raises(BadSample, match="the tar ends after"):
            source[1]


def test_what_is_no_plain_tar_is_refused(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"no tar at all")
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar"):
        opened(tmp_path / "bad.tar")
    whole = write(tmp_path / "a.tar", {"a.png": b"x"})
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar"):
        opened(tmp_path / "zipped.tar")


def test_names_that_lead_elsewhere_are_names_alone(tmp_path):
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    odd = {"../x.png": b"1", "/etc/x.png": b"2", "a/../../x.png": b"3", "same.png": b"4"}
    write(path, odd)
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("same.png"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo(f"{kind.decode()}.png")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    source = opened(path)
    assert [source[i]["image"]["bytes"] for i in range(len(source))] == [b"1", b"2", b"3", b"4"]
    assert source.place(0) == {"path": str(path), "member": "../x.png", "offset": 512}
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.tar", "in"]


def test_a_member_that_is_larger_than_it_may_be_is_refused_and_named(tmp_path):
    path = write(tmp_path / "a.tar", {"a.png": b"1", "b.png": b"2" * 5000, "c.png": b"3"})
    source = opened(path, max_bytes=1000)
    assert len(source) == 2
    assert source.notes[1].endswith("a.tar:b.png: it has 5,000 bytes, more than data.max_bytes = 1,000 allows")


def test_a_damaged_shard_among_good_ones_is_left_out(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.tar", {f"{number}.png": b"x"})
    (tmp_path / "1.tar").write_bytes(b"\xff" * 2000)
    source = opened(tmp_path)
    assert len(source) == 2
    assert [one.path for one in source.refused] == [str(tmp_path / "1.tar")]


def test_a_tar_without_the_field_says_what_it_holds(tmp_path):
    path = write(tmp_path / "a.tar", {"a.txt": b"x", "b.txt": b"x", "c.pdf": b"x"})
    with pytest.raises(DataError, match=r"is image \(.png, .jpg\); it holds 2 .txt, 1 .pdf"):
        opened(path)


def test_it_pickles(tmp_path):
    source = opened(write(tmp_path / "a.tar", {"a/1.png": b"x", "b/2.png": b"y"}))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(2)] == [source[i] for i in range(2)]
