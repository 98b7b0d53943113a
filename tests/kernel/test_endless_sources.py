"""A source without an end: its marks reach the checkpoint, and what cannot be used is counted among what was read."""

from __future__ import annotations

import json

import pytest

from selfsup.kernel import Part, compose, loop, state
from selfsup.kernel.errors import ConfigError, DataError
from selfsup.kernel.hookspecs import hookimpl
from selfsup.kernel.loader import Endless
from selfsup.kernel.random import tag, untag

WINDOW = 10


class Numbers:
    """0, 1, 2 ... in windows; a number in `broken` is none."""

    notes = ("numbers",)
    parts = (Part(WINDOW, WINDOW),)

    def __init__(self, broken=()):
        self.seed, self.broken, self.begun, self.recalled = None, broken, {0: 0}, []

    def __len__(self):
        return WINDOW

    def __getitem__(self, index):
        return self.at(index, 0)

    def at(self, index, turn):
        self.begun[turn + 1] = WINDOW * (turn + 1)
        number = WINDOW * turn + index
        return {"number": "bad" if number % 100 in self.broken else number}

    @property
    def seen(self):
        return max(self.begun.values())

    def name(self, ident):
        turn, index = untag(ident)
        return f"number {WINDOW * turn + index}"

    def where(self, ident):
        return "line 7"

    def news(self):
        return [[turn, read] for turn, read in self.begun.items()], {}

    def recall(self, marks):
        self.recalled.append(marks)
        self.begun |= dict(marks)


class Opens:
    def __init__(self, source):
        self.source = source

    @hookimpl(tryfirst=True)
    def open_data(self):
        return self.source


@pytest.fixture
def start(toys):
    def start(source, folder=None, resume=False, **settings):
        plugins = toys()
        plugins.register(Opens(source), "opens")
        layers = [{section: {key: value}} for name, value in settings.items() for section, key in [name.split("__")]]
        return compose.start(
            plugins, compose.resolve(plugins, {"objective": {"name": "hide"}}, *layers), folder, resume
        )

    return start


def test_it_is_told_the_seed_of_the_run(start):
    assert isinstance(Numbers(), Endless)
    assert start(source := Numbers(), train__seed=7).source is source
    assert source.seed == 7


def test_it_needs_a_number_of_steps(start):
    with pytest.raises(ConfigError, match=r"a stream has no end, .* name the steps, as in --steps 1000"):
        start(Numbers(), train__steps="none")


def test_a_batch_larger_than_its_window_is_refused(start):
    with pytest.raises(ConfigError, match="larger than the window of the stream, which has 10 samples"):
        start(Numbers(), train__batch=11)


@pytest.mark.parametrize("workers", [0, 1])
def test_marks_go_from_the_reader_to_the_checkpoint_and_back(start, tmp_path, workers):
    run = start(Numbers(), tmp_path, train__steps=4, data__workers=workers)
    loop.train(run)
    assert run.source.begun == {0: 0, 1: 10, 2: 20, 3: 30, 4: 40}
    facts = state.load(run.save())[1]
    assert facts["marks"] == [[n, 10 * n] for n in range(5)]
    resumed = start(source := Numbers(), tmp_path, resume=True, train__steps=8)
    assert resumed.first == 4
    assert source.begun == run.source.begun


def test_a_sample_of_each_window_is_one_of_its_own(start):
    """The indices of a window come again in the next one: bad samples are known by their ids."""
    run = start(Numbers(broken=[3, 13, 23]), train__steps=20, data__max_bad_fraction=0.1)
    loop.train(run)
    assert len(run.skipped) == 5 + 1  # 3, 13, 23, 103, 113, 123 of 160
    named = [run.source.name(ident) for ident in run.skipped]
    assert sorted(named)[:3] == ["number 103", "number 113", "number 123"]
    assert set(run.skipped.values()) == {"line 7: it is not a number"}
    assert tag(1, 3) in json.loads(json.dumps(run.skipped), object_pairs_hook=lambda pairs: [int(k) for k, _ in pairs])


def test_the_limit_is_a_share_of_what_was_read(start):
    run = start(Numbers(broken=range(50, 57)), train__steps=20, data__max_bad_fraction=0.05)
    with pytest.raises(DataError, match=r"of 60 samples cannot be used, .*--max-bad-fraction 0"):
        loop.train(run)
    assert run.done >= 5, "it went on as long as there was no reason to stop"
