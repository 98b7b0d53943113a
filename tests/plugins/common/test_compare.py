"""How labelled data is parted, whoever opened it."""

from __future__ import annotations

from typing import Annotated, ClassVar

import pytest
import torch

from selfsup.kernel import Modality, Part, Plugins, about, hookimpl
from selfsup.kernel.errors import DataError
from selfsup.plugins.common.compare import Asked, Row, open_task, to_judge
from selfsup.plugins.common.judges import split


class Number(Modality):
    field = "number"

    def collate(self, raws, draw=None): ...

    def stem(self, width): ...


class Bare:
    """A source that knows no more than it must: neither `labels` nor `classes`."""

    notes = ("the first look", "mixture: 50 % a, 50 % b")

    def __init__(self, labels, sizes):
        self.known, self.parts = labels, [Part(size, size) for size in sizes]

    def __len__(self):
        return len(self.known)

    def __getitem__(self, index):
        return {"number": index} if self.known[index] is None else {"number": index, "label": self.known[index]}

    def name(self, index):
        return f"number {index}"


class Opens:
    """Opens what its class attribute says."""

    source: ClassVar = Bare([0, 1] * 10, [20])

    def __init__(self, *, paths: Annotated[list[str], about("ignored")] = [], label: str | None = None) -> None:  # noqa: B006
        self.paths, self.label = paths, label

    @hookimpl
    def open_data(self, paths):
        return type(self).source


class Silent(Opens):
    @hookimpl
    def open_data(self, paths):
        return None


def parted(service=Opens, **asked):
    class Toys(Plugins):
        def names(self, kind):
            return ["data"]

        def load(self, kind, name):
            return service

    settings = {"train": {"seed": 5}, "data": {"paths": []}}
    return open_task(Toys(), settings, Number(), Asked(run=None, **asked))


def test_any_source_serves(monkeypatch):
    labels = [0, 1, None, 1] * 10
    monkeypatch.setattr(Opens, "source", Bare(labels, [40]))
    task = parted(paths=["x"])
    known = [i for i in range(40) if labels[i] is not None]
    first, second = split(torch.tensor([labels[i] for i in known]).numpy(), 0.2, 5)
    assert list(task.bank.index) == [known[i] for i in first]
    assert list(task.query.index) == [known[i] for i in second]
    assert (task.classes, task.seed) == (2, 5)
    assert task.notes[:2] == ["the first look", "10 samples without a label left out"]


def test_the_last_parts_are_the_test_set(monkeypatch):
    monkeypatch.setattr(Opens, "source", Bare([0, 1] * 10, [8, 4, 8]))
    task = parted(paths=["a", "b"], tests=["c"])
    assert list(task.bank.index) == list(range(12))
    assert list(task.query.index) == list(range(12, 20))
    with pytest.raises(DataError, match="does not tell --data from --test"):
        parted(paths=["a"], tests=["c"])


def test_nobody_opens():
    with pytest.raises(DataError, match="no service opens data"):
        parted(Silent, paths=["x"])


def test_a_row_has_the_standard_error_of_a_share():
    row = Row.of(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 0]), {"C": 1.0})
    assert (row.accuracy, row.error, row.found) == (0.75, pytest.approx((0.75 * 0.25 / 4) ** 0.5), {"C": 1.0})


class Streams(Opens):
    def __init__(self, *, paths: list[str], stream: int | None = None, column: str | None = None) -> None:
        super().__init__(paths=paths)


def test_what_a_run_read_as_a_stream_is_judged_on_data_opened_whole():
    class Toys(Plugins):
        def load(self, kind, name):
            return Streams

    settings = {"data": {"paths": ["a.tar"], "stream": 9}}
    whole = to_judge(Toys(), settings, ["a.tar"], column="x")
    assert whole["data"] == {"paths": ["a.tar"], "stream": None, "column": "x"}
    assert settings["data"]["stream"] == 9
    with pytest.raises(
        DataError, match=r"as a stream, which has neither labels nor an end; .* as in --data a\.tar: it is opened whole"
    ):
        to_judge(Toys(), settings, [])
