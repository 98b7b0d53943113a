"""A stream is the same for every reader, from the beginning or from a mark, and holds no more than two windows."""

from __future__ import annotations

import json
import pickle

import pytest

from selfsup.kernel.errors import DataError
from selfsup.kernel.loader import Endless
from selfsup.kernel.random import tag
from selfsup.plugins.common.windows import HELD, MARKED, Shards, Windows, shares


class Lists(Shards):
    """Shards in memory; `opened` says from which state each was read."""

    def __init__(self, *shards):
        super().__init__("lists", [f"shard{n}" for n in range(len(shards))])
        self.lists, self.opened = shards, []

    def open(self, shard, state):
        self.opened.append((shard, state))
        for place in range(state or 0, len(self.lists[shard])):
            if self.lists[shard][place] is OSError:
                raise OSError("the disk is gone")
            yield f"{self.shards[shard]} row {place}", {"x": self.lists[shard][place]}, place + 1


ABC = ("abcde", "fghij", "klm")


def flow(*shards):
    return Lists(*(shards or ABC))


def windows(*flows, sizes=(4,), seed=0):
    out = Windows(flows or [flow()], list(sizes), ["a note"])
    out.seed = seed
    return out


def taken(source, turns):
    return ["".join(source.at(i, turn)["x"] for i in range(len(source))) for turn in turns]


def test_a_flow_goes_through_all_shards_in_another_order_each_pass():
    items = flow().read(0, None)
    passes = ["".join(next(items).sample["x"] for _ in range(13)) for _ in range(6)]
    assert all(sorted(p) == sorted("abcdefghijklm") for p in passes)
    assert all(shard in p for p in passes for shard in ABC), "a shard is read from front to back"
    assert len(set(passes)) > 1
    again = flow().read(1, None)
    assert ["".join(next(again).sample["x"] for _ in range(13)) for _ in range(6)] != passes, "seeds differ"


def test_reading_goes_on_from_any_mark():
    first = flow().read(3, None)
    items = [next(first) for _ in range(40)]
    for place in range(39):
        lists = flow()
        on = lists.read(3, json.loads(json.dumps(items[place].mark)))
        assert [next(on)[:4] for _ in range(39 - place)] == [item[:4] for item in items[place + 1 :]]
    assert lists.opened[0][1] is not None, "it was sought, not read again"
    assert [item.read for item in items] == list(range(1, 41))


def test_windows_come_one_after_the_other():
    items = flow().read(0, None)
    whole = "".join(next(items).sample["x"] for _ in range(4 * 9))
    assert "".join(taken(windows(), range(9))) == whole
    assert isinstance(windows(), Endless)
    assert windows()[2] == windows().at(2, 0)


def test_any_window_may_be_asked_for_first_and_again():
    straight = taken(windows(), range(9))
    source = windows()
    for turn in (5, 6, 5, 2, 8, 0, 7):
        assert taken(source, [turn]) == [straight[turn]]


def test_marks_from_one_reader_let_another_begin_there():
    one = windows(flow(), flow("xyz"), sizes=(4, 2))
    straight = taken(one, range(7))
    marks, bad = one.news()
    assert bad == {}
    assert all(len(known) == MARKED + 1 for known in marks)
    lists = flow()
    other = windows(lists, flow("xyz"), sizes=(4, 2))
    other.recall(json.loads(json.dumps(marks)))
    assert taken(other, [6]) == straight[6:]
    assert len(lists.opened) <= 2
    assert other.seen == one.seen == 7 * 6


def test_no_more_than_two_windows_are_held_and_none_is_sent_to_workers():
    source = windows()
    taken(source, range(20))
    assert sum(map(len, source.windows[0].held.values())) == HELD * 4
    sent = pickle.loads(pickle.dumps(source))
    assert sent.windows[0].held == {}
    assert taken(sent, [20]) == taken(source, [20])


def test_a_mixture_has_its_shares_in_every_window():
    source = windows(flow(), flow("xy", "z"), sizes=shares(8, [3.0, 1.0]))
    for window in taken(source, range(10)):
        assert sum(letter in "xyz" for letter in window) == 2


@pytest.mark.parametrize(
    ("window", "weights", "expected"),
    [(10, [1, 1], [5, 5]), (10, [1, 2], [3, 7]), (3, [1, 1, 1000], [1, 1, 2]), (5, [2.5], [5])],
)
def test_shares_are_whole_and_none_is_empty(window, weights, expected):
    assert shares(window, weights) == expected


def test_names_need_no_reading_and_places_say_where():
    source = windows(flow(), flow("xyz"), sizes=(4, 2))
    source.at(1, 3)
    assert source.name(tag(3, 1)) == "sample 14 of the stream 1"
    assert source.name(tag(3, 5)) == "sample 8 of the stream 2"
    assert source.where(tag(0, 4)) == "shard0 row 0"
    with pytest.raises(IndexError):
        source.at(6, 0)


def test_data_without_samples_is_an_error_and_no_endless_search():
    with pytest.raises(DataError, match="there is no sample in 'lists'"):
        windows(flow("", "")).at(0, 0)


def test_a_shard_that_cannot_be_read_stops_the_run_and_says_where():
    with pytest.raises(DataError, match=r"cannot be read on in shard0, after 2 samples: OSError: the disk is gone"):
        windows(Lists(["a", "b", OSError])).at(3, 0)
