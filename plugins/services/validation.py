"""Measure the loss on data held out from training, every so many steps and at the end.

The whole set is scored in eval mode and without gradients, in the precision of training:

    validation/NAME = sum_b w_b m_b / sum_b w_b      m_b: the loss or a metric of batch b, w_b: its Loss.weight

What is hidden and cropped is the same in every measurement: a sample's draws are those of its first time in training
(turn 0), and only what follows a schedule moves on with the run. Training is as without it, bit for bit. The loss does
not depend on the batch; a metric that is no mean over predictions, such as a perplexity, does a little.

A run that is asked to stop leaves out the measurement at hand: a scheduler does not wait for it.

A sample that cannot be read is counted, named and left out; the service `quarantine` lists it with those of training.
With several processes each scores its share; where the set does not divide by them, the last samples go to some of
them, while the others score one that does not count.

An objective that compares the samples of a batch with each other (`divisible = False`: SimCLR) has a loss that grows
with the batch, so batches are as large as those of training, all of them full: the last one is filled up with samples
from the beginning of the set. Choose `batch` to compare runs whose own batches differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from selfsup.kernel import compose, distributed
from selfsup.kernel.config import about
from selfsup.kernel.contracts import Batch, Loss, Step
from selfsup.kernel.errors import BadSample, ConfigError, DataError, SelfsupError, most_bad
from selfsup.kernel.hookspecs import hookimpl
from selfsup.kernel.loader import Reader, to_device
from selfsup.kernel.precision import autocast
from selfsup.kernel.random import Stream, shuffled, stream, tag
from selfsup.kernel.workers import made_ahead
from selfsup.plugins.common.evaluation import evaluating

from .data import Paths
from .quarantine import place

if TYPE_CHECKING:
    from selfsup.kernel.loop import Report, Run

FEW = 2000  # samples that are read here and now: starting workers for them takes longer


@dataclass(frozen=True)
class Fixed(Step):
    """A step that draws what the first one draws, wherever its schedules stand."""

    def draw_once(self, purpose: str, device: torch.device | str = "cpu") -> Stream:
        """As in step 0."""
        return Step(0, self.total, self.seed).draw_once(purpose, device)


class Validation:
    """The loss on held-out data."""

    def __init__(
        self,
        *,
        data: Annotated[
            Paths, about("held-out data: folders, files, globs, tables, hub names, as --data; empty: off")
        ] = [],  # noqa: B006 - never changed
        every: Annotated[int, about("steps between two measurements; the last step is always one", ge=1)] = 1000,
        start: Annotated[bool, about("measure before the first step as well")] = False,
        batch: Annotated[int | None, about("samples at once, over all processes; none: as in training", ge=1)] = None,
    ) -> None:
        self.data, self.every, self.start, self.batch = data, every, start, batch
        self.bad: dict[int, str] = {}  # index -> why it cannot be used

    @hookimpl
    def run_composed(self, run: Run) -> None:
        """Open the data and try some of it, so that a mistake costs no training."""
        if not self.data:
            return
        world, trained = distributed.world(), run.loader.reader
        if self.batch and self.batch % world:
            raise ConfigError(
                f"validation.batch = {self.batch} cannot be shared by {world} processes; choose a multiple"
            )
        try:
            source = compose.open_source(run.plugins, run.config, trained.modalities, self.data)
            source = compose.rows(run.config, trained.modalities, source, None)
        except DataError as cause:
            raise DataError(f"validation.data: {cause}") from cause
        self.size = len(source)
        if self.size < world:
            raise DataError(f"validation.data has {self.size} samples, fewer than there are processes")
        self.samples, self.bad = Samples(Reader(source, trained.modalities, trained.collate, run.seed)), {}
        self._try()
        run.notes.append(f"validation: {self.size:,} held-out samples, every {self.every:,} steps and at the end")
        if refused := self._refused():
            first = f"{refused[0]['path']}: {refused[0]['reason']}"
            run.notes.append(f"validation: left out when it was opened: {len(refused):,}, such as {first}")
        if not run.objective.divisible and self.size < self._batch(run):
            run.notes.append(
                f"validation: {self.size:,} samples are one batch, and a loss that compares them with each other is "
                f"smaller than in batches of {self._batch(run):,}"
            )

    @hookimpl(trylast=True)  # the list is open
    def run_started(self, run: Run) -> None:
        """List what was refused when the data was opened."""
        if self.data:
            quarantined(run, self._refused())

    @hookimpl
    def step_started(self, run: Run, step: Step) -> None:
        """Measure before the first step, where asked for."""
        if self.data and self.start and step.number == 0:
            self.measure(run)

    @hookimpl
    def step_finished(self, run: Run, report: Report) -> None:
        """Measure if it is time."""
        if self.data and (run.done % self.every == 0 or run.done == run.total):
            self.measure(run)

    def measure(self, run: Run) -> None:
        """Score the set and tell the services."""
        step = Fixed(max(run.done - 1, 0), run.total, run.seed)
        with evaluating(run.objective):
            for backbone in run.objective.backbones():
                backbone.step = step
            while (sums := self._score(run, step)) is None:
                self._leave_out(run)
        if not sums:
            return
        shared = distributed.total(torch.stack(list(sums.values()))).tolist()
        if distributed.rank() == 0:
            means = {name: value / max(shared[0], 1e-12) for name, value in zip(sums, shared, strict=True)}
            run.measure({f"validation/{name}": value for name, value in means.items() if name})

    def _score(self, run: Run, step: Step) -> dict[str, Tensor] | None:
        """This process's sums by name, "" being that of the weights; None where a sample turned out to be bad.

        Empty where the run was asked to stop meanwhile, which does not wait for a measurement.
        """
        sums: dict[str, Tensor] = {}
        whole = True
        for batch, bad, counts in self._batches(run):
            if distributed.anyone(run.reason is not None):
                return {}
            self.bad |= bad
            whole = whole and not distributed.anyone(batch is None)
            if not whole or batch is None:
                continue  # the forward passes are of all processes together; read on, to know every bad sample
            for name, value in score(run, batch, step).items():
                value = value if counts else torch.zeros_like(value)
                sums[name] = sums[name] + value if name in sums else value
        return sums if whole else None

    def _batches(self, run: Run) -> Iterator[tuple[Batch | None, dict[int, str], bool]]:
        """What this process scores: (batch, or None where it has bad samples, which are they, whether it counts)."""
        order = shuffled(np.arange(self.size), self.size, run.seed, "validation")  # folders come class by class
        usable = order[~np.isin(order, list(self.bad))]
        parts = shares(len(usable), self._batch(run), distributed.world(), distributed.rank(), run.objective.divisible)
        workers = run.loader.workers if self.size > FEW else 0
        places = [usable[places].tolist() for places, _ in parts]
        read = made_ahead(self.samples, places, workers, run.loader.timeout, run.device.type == "cuda")
        for got, (_, counts) in zip(read, parts, strict=True):
            if isinstance(got, SelfsupError):
                raise got
            yield *got, counts

    def _batch(self, run: Run) -> int:
        own = run.loader.microbatch if run.objective.divisible else run.loader.share
        return self.batch or own * distributed.world()

    def _try(self) -> None:
        """Read the first samples; DataError if none can be used."""
        some = range(min(self.size, 4))
        got = self.samples[some]
        if isinstance(got, SelfsupError):
            raise got
        if len(got[1]) == len(some):
            raise DataError(f"validation.data: its first samples cannot be used:{self._listed(got[1])}")

    def _leave_out(self, run: Run) -> None:
        """Share which samples are bad; past the limit, stop with the list."""
        mark = torch.zeros(self.size)
        mark[list(self.bad)] = 1
        for index in distributed.total(mark).nonzero()[:, 0].tolist():
            if index not in self.bad:  # another process met it; read it to know why
                self.bad[index] = self.samples.why(index)
        source = self.samples.reader.source
        quarantined(run, ({**place(source, index), "reason": why} for index, why in sorted(self.bad.items())))
        share = run.config.get("data", {}).get("max_bad_fraction", 0.01)
        left_out = f"{len(self.bad)} of {self.size} samples of validation.data cannot be used"
        if len(self.bad) > most_bad(share, self.size) or self.size - len(self.bad) < distributed.world():
            raise DataError(
                f"{left_out}, more than data.max_bad_fraction = {share:g} allows; remove them:{self._listed(self.bad)}"
            )
        if distributed.rank() == 0:
            print(f"warning: {left_out} and are left out:{self._listed(self.bad)}", file=sys.stderr)

    def _refused(self) -> list[dict[str, Any]]:
        """What of the data was left out when it was opened."""
        refused: list[dict[str, Any]] = getattr(self.samples.reader.source, "left_out", [])
        return refused

    def _listed(self, bad: Mapping[int, str]) -> str:
        """The first of them, a line each."""
        name = self.samples.reader.source.name
        return "".join(f"\n  {name(index)}: {why}" for index, why in sorted(bad.items())[:20])


class Samples(Dataset[Any]):
    """Indices -> (batch, {}), or (None, {index: why it cannot be used}); as in training, at its first turn."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def why(self, index: int) -> str:
        """Why a sample cannot be used."""
        try:
            self.reader.read(tag(0, index))
        except SelfsupError as cause:
            return str(cause)
        return "it could not be read a moment ago"

    def __getitem__(self, indices: Sequence[int]) -> tuple[Batch | None, dict[int, str]] | SelfsupError:
        samples, bad = [], {}
        for index in indices:
            try:
                samples.append(self.reader.read(tag(0, index)))
            except BadSample as why:
                bad[index] = str(why)
            except SelfsupError as cause:  # raised in a worker, it would arrive with a traceback for a message
                return cause
        if bad:
            return None, bad
        ids = torch.tensor([tag(0, index) for index in indices])
        return {**self.reader.collate(samples, partial(stream, self.reader.seed, ids=ids)), "ids": ids}, {}


def quarantined(run: Run, rows: Iterable[Mapping[str, Any]]) -> None:
    """Have the service `quarantine`, where it is in use, list what cannot be used."""
    add = getattr(run.plugins.manager.get_plugin("quarantine"), "add", None)
    if add:
        add(run, ({**row, "of": "validation"} for row in rows))


def score(run: Run, batch: Batch, step: Step) -> dict[str, Tensor]:
    """One forward pass: the loss and the metrics times the weight, and under "" the weight; () float64 each."""
    with autocast(run.device, run.config["train"]["precision"]):
        loss: Loss = run.objective(to_device(batch, run.device), step)
    count = torch.full((), float(len(batch["ids"])), device=run.device)
    weight = (count if loss.weight is None else loss.weight).double()
    values = {"loss": loss.total, **loss.metrics}
    return {"": weight, **{name: value.detach().double() * weight for name, value in values.items()}}


def shares(n: int, batch: int, world: int, rank: int, divisible: bool) -> list[tuple[list[int], bool]]:
    """What one of `world` processes scores of n samples: (places, whether they count) of each forward pass.

    All processes have as many passes, of as many places each. A divisible loss counts every place once.
    """
    if not divisible:
        batch = min(batch, n - n % world)
        own, passes = batch // world, -(-n // batch)
        starts = [number * batch + rank * own for number in range(passes)]
        return [([place % n for place in range(start, start + own)], True) for start in starts]
    sizes = [batch] * (n // batch) + [n % batch - n % batch % world]
    out, start = [], 0
    for own in (size // world for size in sizes if size):
        out.append((list(range(start + rank * own, start + (rank + 1) * own)), True))
        start += own * world
    if start < n:  # fewer than there are processes
        out.append(([start + min(rank, n - start - 1)], rank < n - start))
    return out
