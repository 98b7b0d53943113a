"""Finding, sifting and counting files."""

from __future__ import annotations

import os

import pytest

from selfsup.kernel.errors import DataError
from selfsup.plugins.services.data_files import (
    Options,
    class_folders,
    count_classes,
    find_files,
    glob_parent,
    kinds_of,
    left_out,
    megabytes,
    says_about,
)


def test_names_that_are_not_utf8_survive(tmp_path):
    from selfsup.plugins.services.data_files import open_files

    class Picture:
        suffixes = (".png",)

    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        with open(odd, "wb") as file:
            file.write(b"x")
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    root, files = find_files(str(tmp_path))
    opened = open_files(str(tmp_path), root, files, {"image": Picture()}, Options())
    with open(opened.fetch(0)["image"], "rb") as file:
        assert file.read() == b"x"


def test_the_order_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    for name in ("b/2.png", "b/1.png", "a/3.png", "0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    known, real = find_files(str(tmp_path))[1], os.scandir

    class Reversed(list):
        def __enter__(self):
            return iter(self)

        def __exit__(self, *_): ...

        def __next__(self):
            if not self:
                raise StopIteration
            return self.pop(0)

        def close(self): ...

    monkeypatch.setattr(os, "scandir", lambda path: Reversed(sorted(real(path), key=lambda e: e.name, reverse=True)))
    assert find_files(str(tmp_path))[1] == known
    assert [os.path.relpath(file, tmp_path) for file in known] == ["0.png", "a/3.png", "b/1.png", "b/2.png"]


def test_the_nearest_folder_that_exists_is_searched(tmp_path):
    (tmp_path / "data/photos").mkdir(parents=True)
    with pytest.raises(DataError, match=r"in .*/data: did you mean 'photos'\?"):
        find_files(str(tmp_path / "data/photo/train/cats"))
    with pytest.raises(DataError, match="there is no folder"):
        find_files(str(tmp_path / "nowhere/*.png"))


def test_two_stars_do_not_go_round_in_links(tmp_path):
    for name in ("0.png", "a/1.png", "a/b/2.png", "a/b/3.txt", "c.png/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    for name in ("a/loop", "a/b/loop", "a/b/again"):
        (tmp_path / name).symlink_to(tmp_path)

    def found(pattern):
        return [os.path.relpath(file, tmp_path) for file in find_files(f"{tmp_path}/{pattern}")[1]]

    assert found("**/*.png") == ["0.png", "a/1.png", "a/b/2.png", "c.png/4.png"]
    assert found("a/**/*.png") == ["a/1.png", "a/b/2.png", "a/b/again/0.png", "a/b/again/c.png/4.png"]
    assert found("**/b/*.txt") == ["a/b/3.txt"]
    assert found("?/**")[:2] == ["a/1.png", "a/b/2.png"]
    assert found("**") == ["0.png", "a/1.png", "a/b/2.png", "a/b/3.txt", "c.png/4.png"]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a/1", "b/1"], ["a", "b"]),
        (["TRAIN/a/1", "val/b/1"], ["a", "b"]),
        (["train/a/1", "b/1"], ["a", "b"]),
        (["train/1", "test/1"], None),
        (["a/1", "a/2"], None),
        ([], None),
    ],
)
def test_class_folders(names, labels):
    assert class_folders(names) == labels


def test_how_people_read_numbers():
    assert [megabytes(n) for n in (12, 1500, 8_100_000, 2.5e12)] == ["12 bytes", "1.5 kB", "8.1 MB", "2,500.0 GB"]
    assert kinds_of(["a.PNG", "b.png", "c"]) == "2 .png, 1 without a suffix"
    assert kinds_of([f"x.{i}" for i in range(7)]).endswith("1 .4, more kinds")
    assert kinds_of([]) == "nothing"
    assert count_classes(["a", None, "a", "b"]) == 2
    assert count_classes(None) == 0


def test_what_was_left_out():
    assert left_out({"empty": []}) == []
    assert left_out({"empty": ["a.wav"]}) == ["1 file left out: 1 empty (a.wav)"]
    four = left_out({"empty": ["a", "b", "c", "d"], "of another kind": [".txt", ".txt"]}, "member")
    assert four == ["6 members left out: 4 empty (a, b, c, …), 2 of another kind (.txt)"]


@pytest.mark.parametrize(
    ("name", "about"),
    [("README.md", True), ("a/readme", True), ("LICENCE.txt", True), ("readmes.txt", False), ("notes/a.md", False)],
)
def test_files_that_describe_the_data(name, about):
    assert says_about(name) == about


def test_the_folder_above_a_wildcard():
    assert glob_parent("/data/*/x/*.png") == "/data"
    assert glob_parent("*.png") == "."
