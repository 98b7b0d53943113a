"""A modality that learns from the data before the model is built, and lays the data out anew in every epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from selfsup.kernel import Modality, Signal, compose, loop
from selfsup.kernel.config import to_toml
from selfsup.kernel.loader import Reader
from selfsup.kernel.random import tag

HIDE = {"objective": {"name": "hide"}, "modality": {"name": "scaled"}}


@dataclass
class Pairs:
    """Two neighbours a sample, other ones every turn."""

    source: object

    @property
    def parts(self):
        return self.source.parts

    notes = ("pairs",)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.at(index, 0)

    def at(self, index, turn):
        return {"number": self.source[index]["number"] + 1000 * turn}

    def name(self, index):
        return f"pair {index}"


@pytest.fixture
def scaled(toys, monkeypatch):
    numbers = toys.toys["modalities"]["numbers"]

    class Scaled(numbers):
        made: ClassVar[list] = []

        def __init__(self) -> None:
            super().__init__(width=4)
            self.largest, self.learned = None, 0
            Scaled.made.append(self)

        def learn(self, source):
            if self.largest is None:
                self.largest, self.learned = max(source[i]["number"] for i in range(len(source))), self.learned + 1

        def files(self):
            return {} if self.largest is None else {"largest.txt": str(self.largest)}

        def load(self, files):
            self.largest = int(files["largest.txt"])

        def rows(self, source, seed, folder, max_bad_fraction):
            assert max_bad_fraction == 0.01
            return Pairs(source)

        def stem(self, width):
            assert self.largest is not None, "the stem is made before anything was learned"
            return super().stem(width)

    monkeypatch.setitem(toys.toys["modalities"], "scaled", Scaled)
    return Scaled


def run_for(toys, folder, steps, **sections):
    plugins = toys()
    settings = compose.resolve(plugins, HIDE, {"train": {"steps": steps}}, sections)
    folder.mkdir(exist_ok=True)
    (folder / "run.toml").write_text(to_toml(settings))
    run = compose.start(plugins, settings, folder, resume=True)
    loop.train(run)
    run.save()
    return run


def test_it_learns_once_in_the_life_of_a_run(toys, scaled, tmp_path):
    first = run_for(toys, tmp_path, 2)
    assert first.loader.reader.modalities["encoder"].learned == 1
    second = run_for(toys, tmp_path, 4)
    kind = second.loader.reader.modalities["encoder"]
    assert (kind.largest, kind.learned) == (99, 0)
    scaled.made.clear()
    compose.restore(tmp_path, toys())
    assert [(m.largest, m.learned) for m in scaled.made] == [(99, 0)]


def test_weights_of_another_run_bring_what_it_had_learned(toys, scaled, tmp_path):
    run_for(toys, tmp_path / "old", 1)
    plugins = toys()
    settings = compose.resolve(plugins, HIDE, {"data": {"first": 500}})
    run = compose.start(plugins, settings, tmp_path / "new", weights_from=tmp_path / "old")
    assert run.loader.reader.modalities["encoder"].largest == 99


def test_training_goes_through_the_rows_of_each_turn(toys, scaled):
    plugins = toys()
    run = compose.start(plugins, compose.resolve(plugins, HIDE))
    assert run.source.notes == ("pairs",)
    reader = run.loader.reader
    for turn in (0, 3):
        raw = reader.read(int(tag(turn, 7)))["encoder"]
        torch.testing.assert_close(raw, torch.full((5, 4), (7 + 1000 * turn) / 100))
    assert isinstance(reader, Reader)
    first, later = (run.loader.read(step)[0]["encoder"].x.mean() for step in (0, 13))  # 8 of 100 samples a step
    assert first < 1.2 < 9 < later


def test_what_a_modality_shows_without_its_own_way_are_shapes():
    assert Modality.show(None, Signal(torch.zeros(2, 3, 4))) == ["float32 [3, 4]"] * 2
