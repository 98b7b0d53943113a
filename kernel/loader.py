"""Sample order, batches, workers.

Order is a function (law 2): the global order is endless, place g of it belongs to step g // batch, and
which sample stands there depends on the seed and g alone. So a resume needs only the step's number,
and any number of workers, processes and microbatches sees the same samples with the same draws.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Dataset

from . import distributed
from .contracts import Batch, Collator, Modality, Sample, Signal
from .errors import BadSample, ConfigError, DataError, SelfsupError
from .random import shuffled, stream, tag, untag
from .workers import made_ahead, short_of_memory

NAMED = 8  # samples of a batch, in a message
TRIES = 100  # how many samples in a row may be unusable before the data is


@dataclass(frozen=True)
class Part:
    """One of the data sets that a source joins: how many samples, and its share of the mixture."""

    size: int
    weight: float  # relative; 0 < weight


@runtime_checkable
class Source(Protocol):
    """Samples by number, as `open_data` returns them. Must pickle: it goes to data workers."""

    parts: Sequence[Part]  # consecutive; their sizes add up to len()
    notes: Sequence[str]  # the first look at the data, for people: counts, sizes, what was left out and why

    def __len__(self) -> int:
        """How many samples there are."""

    def __getitem__(self, index: int) -> Sample:
        """Stored fields, not decoded: {"audio": path or {"bytes", "path"}, ...}, and "label" (int) where known."""

    def name(self, index: int) -> str:
        """What a person calls this sample: a path, a row of a file."""


@runtime_checkable
class Relaid(Protocol):
    """A source whose samples are other ones each time the data is gone through, such as documents packed into rows."""

    def at(self, index: int, turn: int) -> Sample:
        """The sample of this number, the data having been gone through `turn` times before."""


@runtime_checkable
class Endless(Relaid, Protocol):
    """A source that is read front to back and has no end: `len` samples at a time are shuffled among each other, its
    window, and `at(index, turn)` is one of the window number `turn`. `name` takes an id here, as `tag` makes it.
    """

    seed: int  # of the order in which shards are read
    seen: int  # how many samples were read so far, usable or not

    def where(self, ident: int) -> str:
        """What a person finds a sample by that `at` gave: a row of a file."""

    def news(self) -> tuple[Any, Mapping[int, str]]:
        """Where the newest windows begin, as JSON, and {id: reason} of what was found unusable in reading them."""

    def recall(self, marks: Any) -> None:
        """Take back where windows begin, so that what lies before them need not be read again."""


class Order:
    """Which sample stands at each place of the endless global order.

    An epoch has as many places as there are samples, and each part gets its share of them, exactly.
    Every part is gone through in a new permutation each time, whether an epoch shows it once (the
    natural mixture), more often or in part.
    """

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        self.seed, self.sizes = seed, np.array([p.size for p in parts])
        self.n = int(self.sizes.sum())
        shares = np.array([p.weight for p in parts]) / sum(p.weight for p in parts) * self.n
        self.places = np.floor(shares + 1e-9).astype(np.int64)  # of each part in an epoch
        rest = np.argsort(self.places - shares, kind="stable")[: self.n - int(self.places.sum())]
        self.places[rest] += 1
        self.first = np.cumsum(self.sizes) - self.sizes  # index of each part's first sample

    def ids(self, places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The ids, tagged with the number of times that the sample's part was gone through: int64, as `places`."""
        epoch, place = np.divmod(places, self.n)
        slot = np.empty_like(place)
        for e in np.unique(epoch):
            slot[epoch == e] = shuffled(place[epoch == e], self.n, self.seed, f"order {e}")
        ends = np.cumsum(self.places)
        part = np.searchsorted(ends, slot, side="right")
        turn, within = np.divmod(epoch * self.places[part] + slot - (ends - self.places)[part], self.sizes[part])
        for p, t in np.unique(np.stack([part, turn]), axis=1).T:
            if self.places[p] != self.sizes[p]:
                here = (part == p) & (turn == t)
                within[here] = shuffled(within[here], int(self.sizes[p]), self.seed, f"part {p} turn {t}")
        ids: np.ndarray[Any, Any] = tag(turn, self.first[part] + within)
        return ids

    def instead(self, place: int, attempt: int) -> int:
        """Another sample for a place whose own cannot be used."""
        draw = stream(self.seed, f"instead {attempt}", torch.tensor([place]))
        return int(tag(place // self.n, draw.integers(self.n, 1).item()))


class Reader(Dataset[Batch]):
    """Places of the order -> a batch: decode, skip what cannot be decoded, collate. Runs in workers."""

    def __init__(self, source: Source, modalities: Mapping[str, Modality], collate: Collator, seed: int) -> None:
        self.source, self.modalities, self.collate, self.seed = source, modalities, collate, seed
        self.order = Order(source.parts, seed)

    def __getitem__(self, places: Sequence[int]) -> Batch:
        """The batch, with "ids" [B], "amount" {unit: how much} and "bad" {key: reason} beside its signals."""
        bad: dict[int, str] = {}
        found = [
            self._usable(place, int(ident), bad)
            for place, ident in zip(places, self.order.ids(np.asarray(places)), strict=True)
        ]
        ids = torch.tensor([ident for ident, _ in found])
        batch = self.collate([sample for _, sample in found], partial(stream, self.seed, ids=ids))
        amount: dict[str, float] = {}
        for name, modality in self.modalities.items():
            if modality.unit and isinstance(batch.get(name), Signal):
                amount[modality.unit] = amount.get(modality.unit, 0.0) + modality.amount(batch[name])
        out = {**batch, "ids": ids, "amount": amount, "bad": bad}
        if isinstance(self.source, Endless):
            out["marks"], unusable = self.source.news()
            bad.update(unusable)
        return out

    def key(self, ident: int) -> int:
        """What `source.name` and lists of bad samples know a sample by: its index or, of an endless source, its id."""
        return ident if isinstance(self.source, Endless) else int(untag(ident)[1])

    def read(self, ident: int) -> Sample:
        """Decode one sample: {tower: raw}. BadSample says why it cannot be used."""
        turn, index = untag(ident)
        try:
            stored = self.source.at(index, turn) if isinstance(self.source, Relaid) else self.source[index]
            return {tower: modality.read(stored[modality.field]) for tower, modality in self.modalities.items()}
        except SelfsupError:  # a BadSample, or what no other sample would mend: a library that is not installed
            raise
        except Exception as cause:
            if short_of_memory(cause):
                raise DataError(f"there is too little memory to read {self.source.name(self.key(ident))}") from cause
            raise BadSample(f"{type(cause).__name__}: {cause}") from cause

    def _usable(self, place: int, ident: int, bad: dict[int, str]) -> tuple[int, Sample]:
        for attempt in range(1, TRIES + 1):
            try:
                return ident, self.read(ident)
            except BadSample as why:
                bad[self.key(ident)] = (
                    f"{self.source.where(ident)}: {why}" if isinstance(self.source, Endless) else str(why)
                )
                ident = self.order.instead(place, attempt)
        reasons = "\n".join(f"  {self.source.name(i)}: {why}" for i, why in list(bad.items())[:10])
        raise DataError(f"{len(bad)} samples in a row cannot be used:\n{reasons}")


class Loader:
    """The microbatches of this process, step by step."""

    def __init__(self, reader: Reader, *, batch: int, microbatch: int, workers: int, timeout: float) -> None:
        self.reader, self.batch, self.workers, self.timeout = reader, batch, workers, timeout
        self.share, rest = divmod(batch, distributed.world())
        if rest:
            raise ConfigError(
                f"a batch of {batch} cannot be shared by {distributed.world()} processes; choose a multiple"
            )
        self.microbatch = min(microbatch or self.share, self.share)

    def places(self, step: int) -> list[list[int]]:
        """The places of each microbatch of this process in a step."""
        first = step * self.batch + distributed.rank() * self.share
        mine = range(first, first + self.share)
        return [list(mine[i : i + self.microbatch]) for i in range(0, self.share, self.microbatch)]

    def read(self, step: int) -> list[Batch]:
        """The microbatches of any step, made here and now."""
        return [self.reader[places] for places in self.places(step)]

    def whole(self, total: int) -> Iterator[Batch]:
        """The batches of all processes, undivided and made here: alike for each process that calibrates on them."""
        for step in range(total):
            yield self.reader[range(step * self.batch, (step + 1) * self.batch)]

    def steps(self, first: int, total: int, pin: bool = False) -> Generator[list[Batch], None, None]:
        """The microbatches of each step from `first` up to `total`, made ahead by workers."""
        places = (places for step in range(first, total) for places in self.places(step))
        batches = made_ahead(_Caught(self.reader), places, self.workers, self.timeout, pin)
        try:
            for step in range(first, total):
                parts = [next(batches) for _ in self.places(step)]
                if isinstance(self.reader.source, Endless):
                    for part in parts:
                        self.reader.source.recall(part.pop("marks"))
                yield parts
        finally:
            batches.close()  # ends the workers now, though the traceback of an error may keep this frame alive


class _Caught(Dataset[Any]):
    """The reader in a worker: it hands an error over; raised there, it would arrive with a traceback for a message."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, places: Sequence[int]) -> Batch | SelfsupError:
        try:
            return self.reader[places]
        except SelfsupError as cause:
            return cause

    def called(self, places: Sequence[int]) -> str:
        """What a person calls the samples of a batch."""
        idents = self.reader.order.ids(np.asarray(places)).tolist()
        names = [self.reader.source.name(self.reader.key(ident)) for ident in idents]
        return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch with its signals and tensors on a device."""
    movable = (Signal, torch.Tensor)
    return {k: v.to(device, non_blocking=True) if isinstance(v, movable) else v for k, v in batch.items()}
