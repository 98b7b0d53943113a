"""The first look at folders, files, globs, mixtures and the built-in sample."""

from __future__ import annotations

import os
import pickle

import pytest

from selfsup.kernel.config import check
from selfsup.kernel.contracts import Modality
from selfsup.kernel.errors import ConfigError, DataError
from selfsup.kernel.loader import Order, Part
from selfsup.plugins.services.data import Data, split_weight


class Sound(Modality):
    field, suffixes = "audio", (".wav", ".flac")

    def collate(self, raws, draw=None): ...

    def stem(self, width): ...


class Picture(Sound):
    field, suffixes = "image", (".png", ".jpg")

    def sample(self):
        return [{"image": f"picture {i}", "label": i % 3} for i in range(7)]


class Caption(Sound):
    field, suffixes = "text", (".txt",)


def fill(root, *names, text="x"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def opened(*paths, kinds=(Picture,), **options):
    return Data(**options).open_data([str(p) for p in paths], {kind.field: kind() for kind in kinds})


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_a_folder_is_read_recursively_in_sorted_order_without_hidden_files(tmp_path):
    fill(tmp_path, "b.png", "a/c.JPG", "a/.hidden.png", ".cache/d.png", "a/b/e.png")
    source = opened(tmp_path)
    assert [os.path.relpath(n, tmp_path) for n in names(source)] == ["b.png", "a/c.JPG", "a/b/e.png"]
    assert source[1] == {"image": tmp_path / "a/c.JPG"}
    assert source.classes is None
    assert source.parts == [Part(3, 3)]


def test_a_link_to_a_parent_does_not_go_round(tmp_path):
    fill(tmp_path, "a/b.png")
    (tmp_path / "a/up").symlink_to(tmp_path)
    assert len(opened(tmp_path)) == 1


def test_what_is_left_out_is_said(tmp_path):
    fill(tmp_path, "b.png", "notes.txt", "more.txt", text="12345")
    fill(tmp_path, "c.png", "d.png", text="")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    assert opened(tmp_path).notes == [
        f"1 image file, 5 bytes, from {tmp_path}",
        "5 files left out: 2 empty (c.png, d.png), 1 broken links (gone.png), 2 of another kind (.txt)",
    ]


def test_class_folders_give_labels_in_sorted_order(tmp_path):
    fill(tmp_path, "dog/1.png", "cat/1.png", "cat/2.png")
    source = opened(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert [source[i]["label"] for i in range(3)] == [0, 0, 1]
    assert source.notes == [f"3 image files in 2 class folders, 3 bytes, from {tmp_path}"]


def test_numbers_are_sorted_by_value(tmp_path):
    assert opened(fill(tmp_path, "10/a.png", "9/a.png", "2/a.png")).classes == ["2", "9", "10"]


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        (["train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/dog/2.png"], [0, 1, 0, 1]),
        (["train/1.png", "test/2.png"], None),
        (["cat/1.png", "cat/2.png"], None),
        (["cat/1.png", "dog/1.png", "loose.png"], None),
        (["speaker/book/1.png", "other/book/1.png"], None),
    ],
)
def test_only_folders_that_are_classes_are_taken_for_them(tmp_path, files, labels):
    source = opened(fill(tmp_path, *files))
    found = {os.path.relpath(source.name(i), tmp_path): source[i].get("label") for i in range(len(source))}
    assert found == dict(zip(files, labels or [None] * len(files), strict=True))


def test_a_path_that_is_no_utf8_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"caf\\udce9' is no UTF-8, which a run file cannot hold"):
        opened(tmp_path / "caf\udce9")


def test_a_glob_and_a_single_file(tmp_path):
    fill(tmp_path, "a/1.png", "b/1.png", "b/2.png", "b/3.jpg", "odd[1].png")
    globbed = opened(f"{tmp_path}/*/*.png")
    assert len(globbed) == 3
    assert globbed.classes == ["a", "b"]
    assert names(opened(tmp_path / "odd[1].png")) == [str(tmp_path / "odd[1].png")]
    assert len(opened(f"{tmp_path}/[ab]")) == 4


def test_labels_from_file_names(tmp_path):
    fill(tmp_path, "7_ann_0.png", "3_bob_1.png", "other.png")
    source = opened(tmp_path, label=r"^(\d)_")
    assert source.classes == ["3", "7"]
    assert [source[i].get("label") for i in range(3)] == [0, 1, None]
    assert "2 classes, by file name" in source.notes[0]


@pytest.mark.parametrize(
    ("label", "error", "says"),
    [
        ("^(x", ConfigError, "is no regular expression"),
        ("(a)(b)", ConfigError, "2 groups; one is to hold the label"),
        (r"^(\d)_", DataError, "matches no file name"),
    ],
)
def test_a_wrong_expression_is_refused(tmp_path, label, error, says):
    with pytest.raises(error, match=says):
        opened(fill(tmp_path, "a.png"), label=label)


def test_several_fields_are_paired_by_name(tmp_path):
    fill(tmp_path, "a.png", "a.txt", "b.png", "c.txt", "d/a.txt", "d/a.jpg")
    source = opened(tmp_path, kinds=(Picture, Caption))
    assert [source[i] for i in range(len(source))] == [
        {"image": tmp_path / f"{stem}.{kind}", "text": tmp_path / f"{stem}.txt"}
        for stem, kind in (("a", "png"), ("d/a", "jpg"))
    ]


def test_a_readme_beside_tables_is_no_data(tmp_path):
    pytest.importorskip("datasets")
    fill(tmp_path, "README.txt", "LICENSE.txt", text="about the data")
    fill(tmp_path, "a.csv", text="text,label\none,1\ntwo,2\n")
    assert len(opened(tmp_path, kinds=(Caption,), cache=str(tmp_path / ".cache"))) == 2
    fill(tmp_path, "story.txt", text="once")


def test_a_readme_beside_texts_is_no_data(tmp_path):
    fill(tmp_path, "README.txt", "LICENSE.txt", "story.txt", "b/readme.txt")
    source = opened(tmp_path, kinds=(Caption,))
    assert [os.path.relpath(name, tmp_path) for name in names(source)] == ["story.txt", "b/readme.txt"]
    assert source.notes[1] == "2 files left out: 2 about the data (LICENSE.txt, README.txt)"
    assert len(opened(f"{tmp_path}/*.txt", kinds=(Caption,))) == 1


def test_a_readme_alone_is_data(tmp_path):
    fill(tmp_path, "README.txt")
    assert len(opened(tmp_path, kinds=(Caption,))) == 1
    assert len(opened(tmp_path / "README.txt", kinds=(Caption,))) == 1


def test_parts_weigh_by_size_unless_told(tmp_path):
    one, two = fill(tmp_path / "one", "a.png", "b.png", "c.png"), fill(tmp_path / "two", "d.png")
    assert opened(one, two).parts == [Part(3, 3), Part(1, 1)]
    mixed = opened(f"{one}@0.25", f"{two}@0.75")
    assert mixed.parts == [Part(3, 0.25), Part(1, 0.75)]
    assert mixed.notes[-1] == f"mixture: 25 % {one}, 75 % {two}"
    assert Order(mixed.parts, 0).places.tolist() == [1, 3]
    with pytest.raises(DataError, match=r"either every --data has a weight or none; .*two' has none"):
        opened(f"{one}@1", two)


def test_labels_mean_the_same_in_all_parts(tmp_path):
    one, two = fill(tmp_path / "one", "cat/1.png", "dog/1.png"), fill(tmp_path / "two", "ant/1.png", "dog/2.png")
    source = opened(one, two)
    assert source.classes == ["ant", "cat", "dog"]
    assert [source[i]["label"] for i in range(4)] == [1, 2, 0, 2]
    assert [os.path.relpath(source.name(i), tmp_path) for i in (1, 2)] == ["one/dog/1.png", "two/ant/1.png"]


def test_an_at_sign_in_a_path_is_no_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "a@2/x.png")
    assert split_weight("a@2") == ("a@2", None)
    assert split_weight("a@home") == ("a@home", None)
    assert split_weight("b*@.5") == ("b*", 0.5)
    assert split_weight("a@2@3") == ("a@2", 3.0)
    with pytest.raises(DataError, match="larger than 0"):
        split_weight("b@0")


def test_no_path_is_the_built_in_sample_and_says_so():
    source = opened()
    assert len(source) == 7
    assert source[4] == {"image": "picture 4", "label": 1}
    assert "built-in sample of 7 image samples" in source.notes[0]
    assert "--data FOLDER (.png, .jpg)" in source.notes[0]
    with pytest.raises(DataError, match="no built-in sample of image with text"):
        opened(kinds=(Picture, Caption))


def test_numbers_outside_the_data_are_refused(tmp_path):
    source = opened(fill(tmp_path, "a.png"))
    for index in (-1, 1):
        with pytest.raises(IndexError):
            source[index]


def test_it_pickles_small(tmp_path):
    fill(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(300)))
    source = opened(tmp_path)
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in (0, 599)] == [source[i] for i in (0, 599)]
    assert names(copy) == names(source)


def test_errors_say_what_is_there_instead(tmp_path):
    fill(tmp_path, "photos/a.gif", "photos/b.gif", "photos/c.pdf")
    with pytest.raises(DataError, match=r"there is no '.*fotos'; in .*: did you mean 'photos'\?"):
        opened(tmp_path / "fotos")
    with pytest.raises(DataError, match=r"no file matches '.*\*.png'; .*photos holds 2 .gif, 1 .pdf"):
        opened(tmp_path / "photos/*.png")
    with pytest.raises(
        DataError, match=r"no usable file in '.*photos', it holds 2 .gif, 1 .pdf\. image is read from .png"
    ):
        opened(tmp_path / "photos")
    with pytest.raises(DataError, match=r"no sample of .* is whole; 1 file left out: 1 empty \(e.png\)"):
        opened(fill(tmp_path / "empty", "e.png", text=""))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="it holds nothing"):
        opened(tmp_path / "nothing")


def test_a_folder_of_two_kinds_of_tables_asks_which(tmp_path):
    fill(tmp_path, "a.csv", "b.parquet")
    with pytest.raises(DataError, match=r"1 .csv, 1 .parquet, of which several could be meant; .*/\*\*/\*.parquet"):
        opened(tmp_path)


def test_the_options_have_ranges_and_defaults():
    assert check("data", Data, {})["max_bad_fraction"] == 0.01
    assert check("data", Data, {"workers": 3})["workers"] == 3
    for wrong in ({"workers": -1}, {"workers": "many"}, {"max_bad_fraction": 2}):
        with pytest.raises(ConfigError):
            check("data", Data, wrong)


def test_one_path_needs_no_list():
    assert check("data", Data, {"paths": "photos"})["paths"] == ["photos"]
    assert check("data", Data, {"paths": ["photos", "more"]})["paths"] == ["photos", "more"]
    with pytest.raises(ConfigError, match="paths"):
        check("data", Data, {"paths": 3})
