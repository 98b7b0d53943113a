"""Rows show every token of every document once a turn, each sequence by itself."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from selfsup.kernel.errors import DataError
from selfsup.kernel.loader import Order, Part, Relaid
from selfsup.plugins.common.corpus import open_corpus
from selfsup.plugins.common.packing import Layout
from selfsup.plugins.common.token_rows import Documents, Frame, Packed
from selfsup.plugins.common.vocabulary_training import train

VOCABULARY = train("bytes", [], 300)
BEGIN, END, PAD = 0, 1, 2
LENGTH = 32


class Source:
    notes = ("two sets",)

    def __init__(self, texts, parts=None):
        self.texts, self.parts = texts, parts or [Part(len(texts), len(texts))]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"text": self.texts[index]}

    def name(self, index):
        return f"file {index}"


def documents(texts, parts=None):
    source = Source(texts, parts)
    return Documents("text", open_corpus(source, "text", 10**6, VOCABULARY, None), source, source.notes)


def packed(single, each, length=LENGTH, pieces=8, seed=0):
    frame = Frame(BEGIN, END, each)
    return Packed(single, frame, PAD, lambda sizes: Layout(sizes, length, frame.overhead, pieces, seed))


def random_texts(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return ["".join(chr(c) for c in draw.integers(97, 123, n)) for n in lengths]


def sequences(row):
    for number in range(1, int(row.segments.max()) + 1):
        here = row.segments == number
        assert here.any()
        assert row.positions[here].tolist() == list(range(here.sum()))
        assert (np.diff(np.flatnonzero(here)) == 1).all(), "a sequence stands together"
        yield row.ids[here].tolist()


@pytest.mark.parametrize("each", [False, True])
def test_a_frame_shows_pieces(each):
    frame, ids = Frame(BEGIN, END, each), np.arange(10, 16)
    units = frame.units(len(ids))
    whole = frame.piece(ids, 0, units).tolist()
    assert whole == [BEGIN, *range(10, 16), END]
    for cut in range(1, units):
        one, other = frame.piece(ids, 0, cut).tolist(), frame.piece(ids, cut, units - cut).tolist()
        assert len(one) == cut + frame.overhead
        assert len(other) == units - cut + frame.overhead
        assert (one[:-1] + other[1:] if each else one + other[1:]) == whole
        if not each:
            assert one[-1] == other[0], "each token but the first is predicted once"


@pytest.mark.parametrize("each", [False, True])
def test_crops_reach_from_the_beginning_to_the_end(each):
    frame, ids = Frame(BEGIN, END, each), np.arange(10, 30)
    first, last = frame.crop(ids, 8, 0.0).tolist(), frame.crop(ids, 8, 1 - 2**-24).tolist()
    assert len(first) == len(last) == 8
    assert first == [BEGIN, *range(10, 16), END] if each else [BEGIN, *range(10, 17)]
    assert last == [BEGIN, *range(24, 30), END] if each else [*range(23, 30), END]
    assert frame.crop(ids, 100, 0.7).tolist() == [BEGIN, *range(10, 30), END]


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("turn", [0, 1, 5])
def test_every_token_is_shown_once_per_turn(each, turn):
    lengths = [*range(1, 60), 200, 500, 1000]
    texts = random_texts(lengths)
    rows = packed(documents(texts), each)
    assert isinstance(rows, Relaid)
    found = []
    for index in range(len(rows)):
        row = rows.at(index, turn)["text"]
        assert [part.shape for part in row] == [(LENGTH,)] * 3
        assert [part.dtype for part in row] == [np.int64, np.int32, np.int64]
        assert (row.ids[row.segments == 0] == PAD).all()
        assert (row.positions[row.segments == 0] == 0).all()
        found += list(sequences(row))
    if each:
        assert all((ids[0], ids[-1]) == (BEGIN, END) for ids in found)
        shown = [ids[1:-1] for ids in found]
    else:  # what is predicted: all but the first token of a sequence
        shown = [ids[1:] for ids in found]
        assert sum(ids[0] == BEGIN for ids in found) == len(texts)
        assert sum(ids[-1] == END for ids in found) == len(texts)
    flat = sorted(np.concatenate(shown).tolist())
    wanted = [number for ids in VOCABULARY.encode(texts) for number in [*ids.tolist(), *([] if each else [END])]]
    assert flat == sorted(wanted)
    whole = {tuple(ids[1:-1]) for ids in found}
    for text, ids in zip(texts, VOCABULARY.encode(texts), strict=True):
        if len(text) + 2 <= LENGTH:
            assert tuple(ids.tolist()) in whole, "a document that fits stays whole"


def test_a_sequence_is_a_stretch_of_one_document():
    texts = random_texts([5, 12, 40, 300, 90, 17])
    for each in (False, True):
        rows = packed(documents(texts), each)
        for turn in range(3):
            for index in range(len(rows)):
                for ids in sequences(rows.at(index, turn)["text"]):
                    assert any(VOCABULARY.decode([i for i in ids if i > PAD]) in text for text in texts)


def test_turns_differ_and_repeat():
    rows = packed(documents(random_texts([9] * 40 + [400])), False)
    one, other, again = ([rows.at(i, turn)["text"].ids for i in range(len(rows))] for turn in (0, 1, 0))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert np.array_equal(rows[3]["text"].ids, rows.at(3, 0)["text"].ids)
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.parametrize("each", [False, True])
def test_hardly_a_position_is_padding(each):
    """Lengths of documents on the web are about log-normal."""
    draw = np.random.default_rng(1)
    lengths = np.clip(np.exp(draw.normal(5.5, 1.2, 2000)).astype(int), 1, 20_000)
    rows = packed(documents(random_texts(lengths)), each, length=512, pieces=64)
    used = np.mean([(rows[i]["text"].segments > 0).mean() for i in range(len(rows))])
    assert used >= 0.99
    assert rows.used == pytest.approx(used)


def test_short_ones_fill_rows_up_to_the_most_sequences():
    rows = packed(documents(random_texts([3] * 100)), True, pieces=4)
    assert len(rows) == 25
    assert all(rows[i]["text"].segments.max() == 4 for i in range(25))


def test_parts_of_a_mixture_keep_their_shares_and_documents():
    texts = ["a" * 50] * 4 + ["b" * 20] * 16
    single = documents([*texts, ""], [Part(4, 0.25), Part(17, 0.75)])
    rows = packed(single, True)
    assert single.parts == [Part(4, 0.25), Part(16, 0.75)]
    assert [part.weight for part in rows.parts] == [0.25, 0.75]
    assert sum(part.size for part in rows.parts) == len(rows)
    first = rows.parts[0].size
    for index in range(len(rows)):
        letters = set(VOCABULARY.decode(i for i in rows[index]["text"].ids if i > PAD))
        assert letters == {"a" if index < first else "b"}
    assert Order(rows.parts, 0).places.tolist() == [round(0.25 * len(rows)), len(rows) - round(0.25 * len(rows))]
    natural = packed(documents(texts, [Part(4, 4), Part(16, 16)]), True)
    assert all(part.weight == part.size for part in natural.parts)


def test_a_part_without_a_document_is_named():
    with pytest.raises(DataError, match="data set 2 of 2 holds no text"):
        documents(["a", ""], [Part(1, 0.5), Part(1, 0.5)])


def test_names_and_notes():
    rows = packed(documents(["", *random_texts([20, 20, 9, 200])]), True)
    assert rows.name(len(rows) - 1).startswith(f"row {len(rows) - 1}: file ")
    assert any("and 1 more" in rows.name(i) for i in range(len(rows)))
    assert rows.notes[0] == "two sets"
    assert rows.notes[1].startswith(f"{len(rows)} rows of 32 tokens, ")
    assert rows.notes[1].endswith("% of them in use; 1 document is longer and cut")
    single = rows.single
    assert [single.name(i) for i in range(4)] == [f"file {i}" for i in (1, 2, 3, 4)]
    assert VOCABULARY.decode(single[3]["text"]) == single.documents.texts[4]


def test_it_pickles_and_gives_the_same_rows():
    rows = packed(documents(random_texts(range(1, 50))), False)
    copy = pickle.loads(pickle.dumps(rows))
    for index in range(len(rows)):
        assert np.array_equal(copy.at(index, 2)["text"].ids, rows.at(index, 2)["text"].ids)
