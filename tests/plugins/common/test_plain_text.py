"""What is stored becomes text, or says why it is none."""

from __future__ import annotations

import pytest

from selfsup.kernel.errors import BadSample, ConfigError
from selfsup.plugins.common.plain_text import Empty, decode, text_of

MOST = 1000


def test_every_form_gives_the_same_text(tmp_path):
    text = "naïve\r\n字 🙂\n"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    forms = [text, path, text.encode(), bytearray(text.encode()), b"\xef\xbb\xbf" + text.encode()]
    forms += [{"bytes": text.encode(), "path": None}, {"bytes": None, "path": str(path)}]
    for form in forms:
        assert decode(form, MOST) == text


def test_a_str_is_a_text_even_where_a_file_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("inside")
    assert decode("a.txt", MOST) == "a.txt"


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (b"abc\xffdef", r"invalid UTF-8 at byte 3 \(0xff\)$"),
        (b"abc\xe2\x82", r"invalid UTF-8 at byte 3 \(0xe2\)"),
        (b"\xef\xbb\xbfabc\xff", r"invalid UTF-8 at byte 6 \(0xff\)"),
        (b"\xed\xa0\x80", "invalid UTF-8 at byte 0"),
        (b"\xc0\xaf", "invalid UTF-8 at byte 0"),
        ("text".encode("utf-16"), "at byte 0 .*as UTF-16 does"),
        ("a\ud800", "character 1 is half of a surrogate pair"),
        (b"MZ\0\0\0\0code", "4 of its 10 characters are NUL"),
        (b"x" * (MOST + 1), "1,001 bytes are more than the 1,000 that modality.max_bytes allows"),
        ("é" * MOST, "2,000 bytes are more"),
        (7, "this is int"),
    ],
)
def test_what_is_no_text_says_why(stored, says):
    with pytest.raises(BadSample, match=says) as found:
        decode(stored, MOST)
    assert not isinstance(found.value, Empty)


@pytest.mark.parametrize("stored", ["", " \n\t ", b"", b"\xef\xbb\xbf", b" \n", None, "\u3000"])
def test_nothing_is_told_from_what_is_damaged(stored):
    with pytest.raises(Empty, match=r"empty|white space"):
        decode(stored, MOST)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(BadSample, match="cannot be opened: No such file"):
        decode(tmp_path / "gone.txt", MOST)
    with pytest.raises(BadSample, match="cannot be opened: Is a directory"):
        decode({"bytes": None, "path": None}, 1 << 20)
    (tmp_path / "long.txt").write_bytes(b"x" * (MOST + 1))
    with pytest.raises(BadSample, match="1,001 bytes are more"):
        decode(tmp_path / "long.txt", MOST)


def test_a_single_nul_in_a_long_text_is_no_reason():
    assert decode("x" * 2000 + "\0", 5000).endswith("\0")


def test_whatever_a_source_raises_is_a_bad_sample_but_what_no_other_sample_mends():
    class Source:
        def __getitem__(self, number):
            raise (OSError("disk"), ConfigError("option"))[number]

    with pytest.raises(BadSample, match="OSError: disk"):
        text_of(Source(), 0, "text", MOST)
    with pytest.raises(ConfigError, match="option"):
        text_of(Source(), 1, "text", MOST)
