"""Rows of a stream show every token of every document once, whatever they were read from, and go on from any mark."""

from __future__ import annotations

import itertools
import json
import pickle

import numpy as np
import pytest

from selfsup.kernel.errors import DataError
from selfsup.plugins.common import token_flow
from selfsup.plugins.common.token_flow import Filled, Reading, Rows, documents_of, rows_of
from selfsup.plugins.common.token_rows import Frame
from selfsup.plugins.common.vocabulary_training import train
from selfsup.plugins.common.windows import Item, Windows

VOCABULARY = train("bytes", [], 300)
BEGIN, END, PAD = 0, 1, 2
LENGTH = 48


class Texts:
    """A flow of texts; a mark is a number."""

    notes = ("texts",)

    def __init__(self, texts):
        self.texts = texts

    def read(self, seed, mark):
        for n in itertools.count(mark or 0):
            yield Item(f"text {n}", {"text": self.texts[n % len(self.texts)]}, n + 1, n + 1)


def random_texts(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return ["".join(chr(c) for c in draw.integers(97, 123, n)) for n in lengths]


LENGTHS = [5, 200, 1, 48, 46, 47, 90, 30, 30, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 400]
READING = Reading("text", VOCABULARY, 10**6)


def rows(texts, each, pieces=8):
    return Rows(Texts(texts), READING, Frame(BEGIN, END, each), LENGTH, pieces)


def sequences(row):
    for number in range(1, int(row.segments.max()) + 1):
        here = row.segments == number
        assert row.positions[here].tolist() == list(range(here.sum()))
        assert (np.diff(np.flatnonzero(here)) == 1).all(), "a sequence stands together"
        yield row.ids[here].tolist()
    assert (row.ids[row.segments == 0] == PAD).all()


@pytest.mark.parametrize("each", [False, True])
def test_every_token_of_every_document_is_shown_once_in_order(each):
    texts = random_texts(LENGTHS)
    found = []
    for item in itertools.islice(rows(texts, each).read(0, None), 60):
        row = item.sample["text"]
        assert len(row.ids) == LENGTH
        assert 1 <= row.segments.max() <= 8
        for ids in sequences(row):
            if each:
                assert (ids[0], ids[-1]) == (BEGIN, END)
                found += ids[1:-1]
            else:  # a piece begins with the last token of the one before, which predicts its first
                assert ids[0] == BEGIN or ids[0] == found[-1]
                found += ids[ids[0] != BEGIN :] if ids[0] != BEGIN else ids
    wanted = []
    while len(wanted) < len(found):
        for text in texts:
            ids = VOCABULARY.encode([text])[0].tolist()
            wanted += ids if each else [BEGIN, *ids, END]
    assert found == wanted[: len(found)]
    assert len(found) > 60 * LENGTH / 2


@pytest.mark.parametrize("each", [False, True])
def test_rows_are_nearly_full(each):
    texts = random_texts([100, 250, 80, 130])
    shown = [(item.sample["text"].segments > 0).sum() for item in itertools.islice(rows(texts, each).read(0, None), 50)]
    assert np.mean(shown) > 0.9 * LENGTH


@pytest.mark.parametrize("each", [False, True])
def test_rows_go_on_from_any_mark(each):
    texts = [*random_texts(LENGTHS), "", "a\0\0b"]
    whole = list(itertools.islice(rows(texts, each).read(0, None), 40))
    for place in range(39):
        on = rows(texts, each).read(0, json.loads(json.dumps(whole[place].mark)))
        for item in whole[place + 1 :]:
            ours = next(on)
            assert ours[2:] == item[2:], "mark, count, what was left out"
            assert all((a == b).all() for a, b in zip(ours.sample["text"], item.sample["text"], strict=True))
            assert ours.name == item.name


def test_what_cannot_be_used_is_named_and_what_is_empty_is_not():
    texts = ["a" * 60, "", " \n", "\0\0\0", "b" * 60]
    items = list(itertools.islice(rows(texts, True).read(0, None), 10))
    found = {number: why for item in items for number, why in item.bad.items()}
    assert list(found) == [4 + 5 * n for n in range(len(found))]
    assert found[4].startswith("text 3: this is no text")
    source = rows_of(Windows([Texts(texts)], [6], []), READING, Frame(BEGIN, END, True), LENGTH, 8)
    source.at(0, 0)
    bad = source.news()[1]
    assert bad
    assert all(key < 0 for key in bad)
    assert source.name(min(bad, key=abs)) == "sample 4 as stored of the stream"
    assert source.seen >= -min(bad)


def test_a_stream_without_any_text_ends(monkeypatch):
    monkeypatch.setattr(token_flow, "TRIES", 50)
    for flow in (rows(["", "\0\0"], True), Filled(Texts(["", None, " "]), "text")):
        with pytest.raises(DataError, match="50 samples in a row hold no text that can be used, the last is text 5"):
            next(flow.read(0, None))


def test_windows_of_rows_and_of_documents_are_as_large_as_the_streams_own():
    texts = random_texts(LENGTHS)
    source = Windows([Texts(texts), Texts(texts)], [6, 2], ["a stream"])
    source.seed = 7
    packed = rows_of(source, READING, Frame(BEGIN, END, False), LENGTH, 8)
    single = documents_of(source, READING)
    for made in (packed, single):
        assert len(made) == 8
        assert made.parts == source.parts
        assert made.seed == 7
        assert "a stream" in made.notes
    assert packed.workers == 1, "each would tokenise all"
    assert single.at(1, 0)["text"].tolist() == VOCABULARY.encode([texts[1]])[0].tolist()
    sent = pickle.loads(pickle.dumps(packed))
    assert (sent.at(3, 2)["text"].ids == packed.at(3, 2)["text"].ids).all()
