import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.kernel.errors import ConfigError
from selfsup.plugins.common.packing import LONG, Layout, first_fit_decreasing

ANY = {
    "sizes": st.lists(st.integers(1, 200), min_size=1, max_size=40),
    "length": st.integers(6, 40),
    "overhead": st.integers(1, 2),
    "pieces": st.integers(2, 8),
    "turn": st.integers(0, 3),
}


@settings(max_examples=200, deadline=None)
@given(**ANY)
def test_every_unit_of_every_document_stands_in_one_place(sizes, length, overhead, pieces, turn):
    layout = Layout(sizes, length, overhead, pieces, seed=3)
    seen = [np.zeros(n, int) for n in sizes]
    taken = 0
    for index in range(layout.rows):
        row = layout.row(turn, index)
        assert 1 <= len(row) <= pieces + 1  # head and tail of a long document count as one, and fill their row
        assert sum(p.units + overhead for p in row) <= length
        taken += sum(p.units + overhead for p in row)
        for document, start, count in row:
            assert count >= 1
            assert start >= 0
            seen[document][start : start + count] += 1
    assert all((times == 1).all() for times in seen)
    assert layout.used == pytest.approx(taken / (layout.rows * length))


def naive(lengths, room, pieces):
    """First-fit decreasing, piece by piece."""
    rows = []
    for n in sorted(lengths, reverse=True):
        row = next((r for r in rows if sum(r) + n <= room and len(r) < pieces), None)
        if row is None:
            rows.append([n])
        else:
            row.append(n)
    return Counter(tuple(row) for row in rows)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=80), st.integers(20, 50), st.integers(1, 6))
def test_equal_lengths_at_once_are_first_fit_decreasing_one_by_one(lengths, room, pieces):
    found = Counter()
    for run in first_fit_decreasing(np.bincount(lengths, minlength=room + 1), room, pieces):
        found[tuple(n for n, many, _ in run.pattern for _ in range(many))] += run.rows
    assert found == naive(lengths, room, pieces)


def rows_of(layout, turn):
    return [tuple(sorted(layout.row(turn, index))) for index in range(layout.rows)]


def test_neighbours_change_from_turn_to_turn_and_with_the_seed_alone():
    sizes = np.random.default_rng(0).integers(1, 90, 500)
    layout, again = Layout(sizes, 64, 1, 16, seed=1), Layout(sizes, 64, 1, 16, seed=1)
    assert rows_of(layout, 0) == rows_of(again, 0)
    assert rows_of(layout, 0) != rows_of(layout, 1)
    assert rows_of(layout, 0) != rows_of(Layout(sizes, 64, 1, 16, seed=2), 0)
    assert rows_of(pickle.loads(pickle.dumps(layout)), 1) == rows_of(layout, 1)


def test_a_long_document_is_cut_at_other_places_each_turn():
    length, size = 16, LONG * 16 * 10 + 5
    layout = Layout([size], length, 1, 4, seed=0)
    heads = {p.units for turn in range(200) for row in rows_of(layout, turn) for p in row if p.start == 0}
    assert heads == set(range(1, length - 2))  # head and tail share a row of 14 units
    assert layout.rows == Layout([size], length, 1, 4, seed=9).rows


def test_a_shorter_one_is_cut_as_seldom_as_can_be():
    layout = Layout([45], 16, 1, 4, seed=0)
    assert sorted(p for index in range(layout.rows) for p in layout.row(5, index)) == [
        (0, 0, 15),
        (0, 15, 15),
        (0, 30, 15),
    ]


@pytest.mark.parametrize(("length", "median"), [(128, 12), (512, 200), (1024, 600)])
def test_rows_are_full(length, median):
    """Lengths of documents are near to log-normal; utterances of a dozen words and articles alike."""
    draws = np.random.default_rng(1).lognormal(np.log(median), 0.9, 20_000)
    layout = Layout(np.maximum(1, draws).astype(int), length, 2, 64, seed=0)
    assert layout.used >= 0.99


def test_a_row_is_a_function_of_its_number_and_the_turn():
    layout = Layout(np.random.default_rng(0).integers(1, 300, 300), 64, 1, 16, seed=1)
    places = [(turn, index) for turn in (0, 1, 2, 3) for index in range(0, layout.rows, 7)]
    one = {place: layout.row(*place) for place in places}
    assert {place: layout.row(*place) for place in reversed(places)} == one


def test_rows_without_room_for_what_surrounds_a_piece_are_refused():
    with pytest.raises(ConfigError, match="choose 6 or more"):
        Layout([5], 5, 2, 4, seed=0)
