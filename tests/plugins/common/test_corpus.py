"""The store of tokens: made once, whole or not at all, and found again."""

from __future__ import annotations

import json
import os
import pickle
import threading

import numpy as np
import pytest

from selfsup.kernel import distributed
from selfsup.kernel.errors import ConfigError, DataError, StateError
from selfsup.kernel.loader import Part
from selfsup.plugins.common import corpus as module
from selfsup.plugins.common.corpus import left_out, open_corpus
from selfsup.plugins.common.vocabulary_training import train

TEXTS = ["one two three", "", "four", b"bad \xff", " \n", "five six", None, "\x01"]
VOCABULARY = train("bytes", [], 300)


class Source:
    notes = ()

    def __init__(self, texts=TEXTS):
        self.texts, self.parts, self.read = texts, [Part(len(texts), len(texts))], 0

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        self.read += 1
        return {"text": self.texts[index]}

    def name(self, index):
        return f"file {index}"


class Missing(Source):
    def __getitem__(self, index):
        raise ConfigError("install it")


def opened(source, folder=None, vocabulary=VOCABULARY, max_bytes=1000):
    return open_corpus(source, "text", max_bytes, vocabulary, folder)


def texts_of(corpus, vocabulary=VOCABULARY):
    return [vocabulary.decode(corpus.ids(i)) for i in range(len(corpus))]


def test_it_holds_what_can_be_read_in_order(tmp_path):
    corpus = opened(Source(), tmp_path)
    assert texts_of(corpus) == ["one two three", "four", "five six", "\x01"]
    assert corpus.numbers.tolist() == [0, 2, 5, 7]
    assert corpus.sizes.tolist() == [13, 4, 8, 1]
    assert corpus.tokens.dtype == np.uint16
    facts = corpus.facts
    assert (facts.tokens, facts.bytes, facts.empty, facts.bad) == (26, 26, 3, 1)
    assert facts.reasons == {"3": "invalid UTF-8 at byte 4 (0xff)"}
    assert sorted(os.listdir(tmp_path)) == ["tokens"]


def test_what_is_left_out_is_counted_and_named():
    corpus = opened(Source())
    assert left_out(corpus, Source(), 0.01) == [
        "3 samples without text left out",
        "1 sample left out: file 3: invalid UTF-8 at byte 4 (0xff)",
    ]
    many = Source(["fine"] * 90 + [b"\xff"] * 10)
    with pytest.raises(
        DataError, match=r"10 of 100 samples .* = 0\.05 allows; .*--max-bad-fraction 0\.1:\n  file 90: invalid"
    ):
        left_out(opened(many), many, 0.05)
    (note,) = left_out(opened(many), many, 0.1)
    assert note.count("invalid UTF-8") == 5
    assert note.endswith("; …")


def test_one_bad_sample_of_few_stops_nothing_but_nothing_at_all_does():
    few = Source(["fine", b"\xff"])
    assert len(left_out(opened(few), few, 0.01)) == 1
    for texts in (["", " "], [b"\xff"]):
        with pytest.raises(DataError, match=r"(?s)samples cannot be used.* allows; remove them:\n"):
            left_out(opened(Source(texts)), Source(texts), 0.5)


def test_it_is_made_once(tmp_path):
    first = Source()
    opened(first, tmp_path)
    assert first.read == len(TEXTS)
    again = Source()
    assert texts_of(opened(again, tmp_path)) == texts_of(opened(first, tmp_path))
    assert again.read == 0


def test_it_is_made_anew_where_it_is_of_something_else(tmp_path):
    opened(Source(), tmp_path)
    other = train("characters", ["one two three four five six"], 300)
    moved = Source()
    moved.notes = ("8 rows, from elsewhere",)
    for source, options in (
        (moved, {}),
        (Source(), {"vocabulary": other}),
        (Source([*TEXTS, "seven"]), {}),
        (Source(), {"max_bytes": 10}),
    ):
        corpus = opened(source, tmp_path, **options)
        assert source.read == len(source)
        assert corpus.facts.samples == len(source)


@pytest.mark.parametrize("file", [module.TOKENS, module.DOCUMENTS, module.FACTS])
@pytest.mark.parametrize("damage", ["gone", "short", "empty"])
def test_one_that_is_not_whole_is_made_anew(tmp_path, file, damage):
    opened(Source(), tmp_path)
    path = tmp_path / "tokens" / file
    data = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(data[:-2] if damage == "short" else b"")
    source = Source()
    assert len(opened(source, tmp_path)) == 4
    assert source.read == len(TEXTS)


@pytest.mark.parametrize("file", ["tokens.bin", "documents.npy"])
def test_one_with_a_flipped_bit_is_made_anew(tmp_path, file):
    opened(Source(), tmp_path)
    path = tmp_path / "tokens" / file
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        opened(Source(), tmp_path)
        assert path.read_bytes() == whole, place


def test_one_that_was_interrupted_leaves_nothing(tmp_path):
    class Stopped(Source):
        def __getitem__(self, index):
            if index == 5:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        opened(Stopped(), tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / ".tokens-0").mkdir()  # of a process that was killed
    (tmp_path / ".tokens-0" / module.TOKENS).write_bytes(b"half")
    assert len(opened(Source(), tmp_path)) == 4
    assert os.listdir(tmp_path) == ["tokens"]


def test_what_no_other_sample_mends_is_raised(tmp_path):
    with pytest.raises(ConfigError, match="install it"):
        opened(Missing(), tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="tokens of the data cannot be written to"):
        opened(Source(), tmp_path / "file")


def test_a_temporary_one_leaves_nothing_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    corpus = opened(Source())
    assert os.listdir(tmp_path) == [], "however the process ends"
    with pytest.raises(ConfigError):
        opened(Missing())
    assert os.listdir(tmp_path) == []
    known = ["one two three", "four", "five six", "\x01"]
    assert texts_of(corpus) == texts_of(pickle.loads(pickle.dumps(corpus))) == known
    if (child := os.fork()) == 0:
        os._exit(texts_of(corpus) != known)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_it_pickles_small(tmp_path):
    corpus = opened(Source([f"document {i}" for i in range(3000)]), tmp_path)
    assert len(pickle.dumps(corpus)) < 1000
    assert texts_of(pickle.loads(pickle.dumps(corpus))) == texts_of(corpus)


def test_many_ids_take_four_bytes():
    class Large:
        json, size = "large", 1 << 17

        def stream(self, texts):
            yield from ((number, np.array([number, 1 << 16], np.int32)) for number, _ in enumerate(texts))

    corpus = opened(Source(["a", "b"]), vocabulary=Large())
    assert corpus.tokens.tolist() == [0, 1 << 16, 1, 1 << 16]
    assert corpus.tokens.dtype == np.uint32


class Team(threading.local):
    """Threads that stand for processes: what the first one says, all hear."""

    rank = 0


def as_processes(monkeypatch, work, count=3):
    team, said, barrier = Team(), [], threading.Barrier(count)
    monkeypatch.setattr(distributed, "barrier", lambda: barrier.wait(20))
    heard = []

    def alike(text):
        barrier.wait(20)
        if team.rank == 0:
            said.append(text)
        barrier.wait(20)
        return said[-1]

    monkeypatch.setattr(distributed, "rank", lambda: team.rank)
    monkeypatch.setattr(distributed, "alike", alike)

    def run(rank):
        team.rank = rank
        try:
            heard.append((rank, work()))
        except Exception as error:
            heard.append((rank, error))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [result for _, result in sorted(heard, key=lambda pair: pair[0])], said


@pytest.mark.parametrize("own", [False, True])
def test_the_first_process_makes_it_for_all(tmp_path, monkeypatch, own):
    monkeypatch.setattr(module, "SIGN", 0.0)
    monkeypatch.setattr("selfsup.plugins.common.vocabulary.BATCH", 100)
    sources = [Source([f"document {i}" for i in range(20)]) for _ in range(3)]

    def work():
        corpus = opened(sources[distributed.rank()], tmp_path if own else None)
        return corpus, texts_of(corpus)

    found, said = as_processes(monkeypatch, work)
    assert [texts for _, texts in found] == [found[0][1]] * 3
    assert [source.read for source in sources] == [20, 0, 0]
    assert said.count("at it") > 2, "it gives signs of life"
    assert {corpus.folder for corpus, _ in found} == {tmp_path / "tokens" if own else None}


def test_the_failure_of_the_first_process_reaches_all(tmp_path, monkeypatch):
    found, _ = as_processes(monkeypatch, lambda: opened(Missing(), tmp_path))
    assert [str(error) for error in found] == ["install it"] * 3


def test_its_facts_are_for_people_too(tmp_path):
    opened(Source(), tmp_path)
    facts = json.loads((tmp_path / "tokens" / module.FACTS).read_text())
    assert facts["samples"] == len(TEXTS)
    assert facts["tokens"] == 26


def test_one_that_was_made_to_lie_is_refused(tmp_path):
    folder = tmp_path / "tokens"
    opened(Source(["one two"]), tmp_path)
    path = folder / "corpus.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "dtype": "O"}))
    with pytest.raises(StateError, match="are of no known type: 'O'"):
        module.Corpus(folder)
    path.write_text(json.dumps(whole))
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 1), }".ljust(117) + b"\n"
    for kind in (
        header,
        header.replace(b"'|O'", b"'<i8'").replace(b"(2, 1)", b"(2, 1099511627776)").ljust(117)[:117] + b"\n",
    ):
        (folder / "documents.npy").write_bytes(b"\x93NUMPY\x01\0\x76\0" + kind)
        with pytest.raises(StateError, match=r"documents\.npy cannot be read"):
            module.Corpus(folder)
    assert texts_of(opened(Source(["one two"]), tmp_path)) == ["one two"]
