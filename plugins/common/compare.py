"""Compare a run's features with what needs no training, on one split of labelled data.

Four rows share data, split and judge: the trained tower, the same tower at its random initialisation (same
architecture, same seed), the raw input, and always guessing the most frequent class of the bank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from selfsup.kernel import compose
from selfsup.kernel.config import Settings, check
from selfsup.kernel.contracts import Modality
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import ContractError, DataError, most_bad
from selfsup.kernel.loader import Source
from selfsup.kernel.precision import pick_device
from selfsup.kernel.random import stream

from .features import Features, Raw, Subset, features, list_skipped
from .judges import knn, probe, split

HOW = (
    "labels are found in class folders (cat/1.jpg, dog/2.jpg), in a column such as `label` (--label NAME for another), "
    "or in file names by a regular expression with one group: --label '^(\\d)_'"
)


class Judge(Protocol):
    """A way to judge features."""

    @property
    def name(self) -> str:
        """As on the command line."""

    def describe(self) -> dict[str, Any]:
        """Its settings."""

    def __call__(self, bank: Features, query: Features, seed: int) -> tuple[Tensor, dict[str, Any]]:
        """(guesses [M], what it found out on the way)."""


@dataclass(frozen=True)
class Neighbours:
    """k nearest neighbours, weighted by similarity; see `judges.knn`."""

    k: int = 20
    temperature: float = 0.07
    name: str = field(default="knn", init=False)

    def describe(self) -> dict[str, Any]:
        """k and T."""
        return {"k": self.k, "temperature": self.temperature}

    def __call__(self, bank: Features, query: Features, seed: int) -> tuple[Tensor, dict[str, Any]]:
        """(guesses [M], {})"""
        return knn(bank.x, bank.labels, query.x, k=self.k, temperature=self.temperature), {}


@dataclass(frozen=True)
class Linear:
    """A linear probe; see `judges.probe`."""

    name: str = field(default="probe", init=False)

    def describe(self) -> dict[str, Any]:
        """Nothing is set: C is chosen."""
        return {}

    def __call__(self, bank: Features, query: Features, seed: int) -> tuple[Tensor, dict[str, Any]]:
        """(guesses [M], {"C", "converged"})"""
        said = probe(bank.x, bank.labels, query.x, seed=seed)
        return said.guess, {"C": said.c, "converged": said.converged}


@dataclass(frozen=True)
class Task:
    """Labelled samples, parted: the bank teaches the judge, the query examines it."""

    bank: Subset
    query: Subset
    classes: int
    seed: int
    notes: list[str]


@dataclass(frozen=True)
class Row:
    """One line of the comparison; without an accuracy, `why` says why."""

    accuracy: float | None
    error: float | None = None  # standard error of a share of M independent samples
    why: str | None = None
    found: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, guess: Tensor, labels: Tensor, found: dict[str, Any] | None = None) -> Row:
        """Guesses [M] against labels [M]."""
        share = float((guess == labels).double().mean())
        return cls(share, (share * (1 - share) / len(labels)) ** 0.5, found=found or {})


@dataclass(frozen=True)
class Comparison:
    """Everything that `ssl eval` says."""

    judge: str
    settings: dict[str, Any]
    run: str
    step: int
    layer: int | None
    bank: int
    query: int
    classes: int
    skipped: dict[str, str]
    rows: dict[str, Row]
    notes: list[str]
    metric: str = "accuracy"

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Labelled data, and how its features are read."""

    paths: Sequence[str] = ()
    tests: Sequence[str] = ()
    label: str | None = None
    column: str | None = None
    limit: int | None = None
    layer: int | None = None
    batch: int = 64
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Asked(Labelled):
    """What the command line asks for."""

    run: Path


def compare(plugins: Plugins, asked: Asked, judge: Judge) -> Comparison:
    """Judge the newest good checkpoint of a run."""
    objective, settings, step = compose.restore(asked.run, plugins, asked.device)
    modality: Modality = objective.exports.modality
    task = open_task(plugins, settings, modality, asked)
    judged = partial(examine, judge, task, modality, asked, settings)
    row, bank, query = judged(objective.exports, asked.layer)
    skipped = {**bank.skipped, **query.skipped}
    del objective
    initial = compose.restore(asked.run, plugins, asked.device, initial=True)[0]
    rows = {"trained": row, "random": judged(initial.exports, asked.layer)[0]}
    try:
        rows["raw"] = judged(Raw(), None)[0]
    except ContractError as why:
        rows["raw"] = Row(None, why=str(why))
    guess = torch.full_like(query.labels, int(bank.labels.bincount().argmax()))
    rows["chance"] = Row.of(guess, query.labels)
    return Comparison(
        judge=judge.name,
        settings=judge.describe(),
        run=str(asked.run),
        step=step,
        layer=asked.layer,
        bank=len(bank.labels),
        query=len(query.labels),
        classes=task.classes,
        skipped=skipped,
        rows=rows,
        notes=task.notes,
    )


def examine(
    judge: Judge,
    task: Task,
    modality: Modality,
    asked: Labelled,
    settings: Settings,
    tower: nn.Module,
    layer: int | None,
) -> tuple[Row, Features, Features]:
    """Judge a tower: (how it did, features of the bank, features of the query)."""
    device, workers = pick_device(asked.device), _workers(settings, task)
    read = partial(features, tower, modality, device=device, batch=asked.batch, layer=layer, workers=workers)
    bank, query = read(task.bank), read(task.query)
    _limit({**bank.skipped, **query.skipped}, len(task.bank) + len(task.query), settings)
    guess, found = judge(bank, query, task.seed)
    return Row.of(guess, query.labels, found), bank, query


def open_task(plugins: Plugins, settings: Settings, modality: Modality, asked: Labelled) -> Task:
    """Open the labelled data and part it: by --test, or a fifth of every class, chosen by the run's seed."""
    seed = int(settings["train"]["seed"])
    source = _open(plugins, settings, modality, asked)
    labels, notes = _labels(source), [note for note in source.notes if not note.startswith("mixture:")]
    where = ", ".join([*(asked.paths or settings["data"].get("paths") or ["the built-in sample"]), *asked.tests])
    names = getattr(source, "classes", None) or [str(label) for label in range(int(labels.max(initial=-1)) + 1)]
    known = _known(labels, names, where)
    if len(known) < len(labels):
        count = len(labels) - len(known)
        notes.append(f"{count:,} sample{'s' * (count > 1)} without a label left out")
    first = sum(part.size for part in source.parts[: len(source.parts) - len(asked.tests)])
    bank, query = (_choose(part, asked.limit, seed) for part in (known[known < first], known[known >= first]))
    if not asked.tests:
        learn, held = split(labels[bank], 0.2, seed)
        bank, query = bank[learn], bank[held]
        notes.append("no --test: a fifth of every class, chosen by the run's seed, is what is judged on")
    for part, what in ((bank, "to learn from"), (query, "to be judged on")):
        if not len(part):
            raise DataError(f"no labelled sample of {where} is left {what}; give more data or a larger --limit")
    strangers = sorted({str(names[label]) for label in set(labels[query]) - set(labels[bank])})
    if strangers:
        notes.append(f"classes that only --test has, so always wrong: {', '.join(strangers)}")
    classes = len(np.unique(labels[np.concatenate([bank, query])]))
    return Task(Subset(source, bank.tolist()), Subset(source, query.tolist()), classes, seed, notes)


def _known(labels: np.ndarray[Any, Any], names: Sequence[str], where: str) -> np.ndarray[Any, Any]:
    """The indices of labelled samples; errors say how labels are found."""
    known = np.flatnonzero(labels >= 0)
    if not len(known):
        raise DataError(f"no sample of {where} has a label, which eval needs; {HOW}")
    if len(classes := np.unique(labels[known])) < 2:
        only = names[int(classes[0])]
        raise DataError(f"all {len(known):,} labelled samples of {where} are {only!r}; at least two classes are needed")
    return known


def _open(plugins: Plugins, settings: Settings, modality: Modality, asked: Labelled) -> Source:
    """--data and --test as one source, so that labels mean the same in both."""
    settings = to_judge(plugins, settings, asked.paths, label=asked.label, column=asked.column)
    plugins.serve(settings)
    paths = list(asked.paths or settings["data"].get("paths", []))
    if asked.tests and not paths:
        raise DataError("--test needs --data beside it: this run learned from the built-in sample")
    source: Source | None = plugins.hook.open_data(paths=[*paths, *asked.tests], modalities={modality.field: modality})
    if source is None:
        raise DataError("no service opens data: the service `data` is disabled, and no other one answered")
    if len(source.parts) != max(1, len(paths) + len(asked.tests)):
        raise DataError("the service that opened the data does not tell --data from --test")
    return source


def to_judge(plugins: Plugins, settings: Settings, paths: Sequence[str], **asked: str | None) -> Settings:
    """The settings of a run, changed for data to judge on: the columns asked for, and opened whole."""
    given: dict[str, Any] = settings["data"]
    own = {key: value for key, value in asked.items() if value is not None}
    if given.get("stream"):
        if not paths:
            raise DataError(
                f"this run read its data as a stream, which has neither labels nor an end; name data to judge on, as "
                f"in --data {given['paths'][0]}: it is opened whole"
            )
        given = {**given, "stream": None}
    return {**settings, "data": check("data", plugins.load("services", "data"), {**given, **own})}


def _labels(source: Source) -> np.ndarray[Any, Any]:
    known = getattr(source, "labels", None)
    if known is None:
        known = [source[index].get("label", -1) for index in range(len(source))]
    return np.asarray(known, np.int64)


def _choose(index: np.ndarray[Any, Any], limit: int | None, seed: int) -> np.ndarray[Any, Any]:
    """At most `limit` of them, by the seed, in order."""
    if limit is None or len(index) <= limit:
        return index
    order = stream(seed, "limit", torch.from_numpy(index)).bits(1)[:, 0].argsort(stable=True).numpy()
    return np.sort(index[order[:limit]])


def _workers(settings: Settings, task: Task) -> int:
    """As for training; starting processes for little data takes longer than reading it."""
    asked = settings.get("data", {}).get("workers", 0)
    if asked != "auto":
        return int(asked)
    return min(8, (os.cpu_count() or 1) // 2) if len(task.bank) > 2000 else 0


def _limit(skipped: dict[str, str], count: int, settings: Settings) -> None:
    share = settings.get("data", {}).get("max_bad_fraction", 0.01)
    if len(skipped) > most_bad(share, count):
        raise DataError(
            f"{len(skipped)} of {count} samples cannot be used, more than the run's data.max_bad_fraction = {share:g} "
            f"allows; remove them:\n{list_skipped(skipped)}"
        )
