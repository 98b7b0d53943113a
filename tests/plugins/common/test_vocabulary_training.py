"""Vocabularies of four kinds from the same texts, and those of files."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from selfsup.kernel.errors import ConfigError
from selfsup.plugins.common.vocabulary_training import KINDS, RUN, alphabet, open_file, train

TEXTS = ["Low lower lowest, new newer newest; wide wider widest.\n" * 20, "äöü ÄÖÜ 日本 " * 5, "qzj"]
AGAIN = """
import hashlib, sys
sys.path.insert(0, {folder!r})
from test_vocabulary_training import TEXTS
from selfsup.plugins.common.vocabulary_training import KINDS, train
for kind in KINDS:
    print(kind, hashlib.sha256(train(kind, TEXTS * 30, 400).json.encode()).hexdigest())
"""


def digests():
    return [f"{kind} {hashlib.sha256(train(kind, TEXTS * 30, 400).json.encode()).hexdigest()}" for kind in KINDS]


def test_the_same_texts_give_the_same_vocabulary_in_any_process():
    folder = __file__.rpartition("/")[0]
    known = digests()
    assert digests() == known
    for _ in range(2):  # hash maps are seeded anew in each
        done = subprocess.run(
            [sys.executable, "-c", AGAIN.format(folder=folder)], capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.splitlines() == known


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_kept(kind):
    for size in (300, 350):
        vocabulary = train(kind, TEXTS * 30, size)
        assert vocabulary.size <= max(size, 259)
        assert len(vocabulary.special) == {"wordpiece": 5, "characters": 4}.get(kind, 3)


def test_a_vocabulary_too_small_says_what_is_needed():
    with pytest.raises(ConfigError, match=r"modality\.vocabulary = 100: byte-level bpe needs 259"):
        train("bpe", TEXTS, 100)
    with pytest.raises(ConfigError, match=r"modality\.vocabulary = 8 is too small for wordpiece"):
        train("wordpiece", TEXTS, 8)


def test_characters_are_the_most_frequent_ones():
    every = train("characters", TEXTS, 1000)
    assert every.size == 4 + len(set("".join(TEXTS)))
    few = train("characters", TEXTS, 4 + 5)
    assert few.size == 9
    assert few.encode(["e日"])[0].tolist()[1] == few.unknown
    assert few.decode(few.encode(["e"])[0]) == "e"


def test_wordpiece_keeps_case_when_asked():
    text = ["Low LOW low " * 50]
    assert train("wordpiece", text, 60).decode(train("wordpiece", text, 60).encode(["LOW"])[0]) == "low"
    cased = train("wordpiece", text, 60, lowercase=False)
    assert cased.decode(cased.encode(["LOW Low"])[0]) == "LOW Low"


def test_wordpiece_knows_every_frequent_character_at_both_places():
    vocabulary = train("wordpiece", TEXTS, 400)
    for word in ("l", "ll", "日", "wq", "qw"):
        assert vocabulary.unknown not in vocabulary.encode([word])[0].tolist()


def test_the_alphabet_is_that_after_normalising():
    from tokenizers.normalizers import BertNormalizer

    assert alphabet(["bbBaÄ c"], None, 3) == [" ", "B", "b"]  # of equally frequent ones the first by code point
    assert alphabet(["bbBaÄ c\n"], BertNormalizer(lowercase=True), 10) == ["a", "b", "c"]
    assert alphabet(["bbBaÄ c"], BertNormalizer(lowercase=True), 1) == ["b"]


def test_endless_words_are_broken_for_training():
    genome = "acgt" * 1000
    assert max(map(len, RUN.sub("\\g<0>\n", genome).split())) == 256
    assert train("bpe", [genome] * 3, 300).size <= 300


def test_a_vocabulary_from_a_file_or_its_folder(tmp_path):
    vocabulary = train("bpe", TEXTS, 300)
    path = tmp_path / "tokenizer.json"
    path.write_text(vocabulary.json)
    for where in (path, tmp_path):
        assert open_file(str(where)).json == vocabulary.json


def test_what_is_no_vocabulary_says_so(tmp_path):
    (tmp_path / "token.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"'bqe' is no file, and no kind: did you mean 'bpe'\?"):
        open_file("bqe")
    with pytest.raises(ConfigError, match=r"is no file \(the folder .* holds token.json\), .*known: bpe, bytes, "):
        open_file(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is a run; its tokenizer is '.*/tokenizer'$"):
        open_file(str(tmp_path))
    with pytest.raises(ConfigError, match=r"token\.json': this is no tokenizer.json"):
        open_file(str(tmp_path / "token.json"))
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_file(str(tmp_path / "binary"))
