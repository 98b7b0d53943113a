"""Judge the features during training: nearest neighbours or a linear probe on labelled data, every so many steps.

The figure is the one that `ssl eval knn` (or `probe`) gives for a checkpoint of the same step, with the same data and
`--limit`: the share of the judged samples whose class is found, from the exported tower in eval mode. Labels serve
nothing else, and training is as without it, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from selfsup.kernel import distributed
from selfsup.kernel.config import about
from selfsup.kernel.errors import DataError
from selfsup.kernel.hookspecs import hookimpl
from selfsup.plugins.common.compare import Judge, Labelled, Linear, Neighbours, examine, open_task
from selfsup.plugins.common.evaluation import evaluating
from selfsup.plugins.common.features import units_of
from selfsup.plugins.common.judges import need_sklearn

from .data import Paths

if TYPE_CHECKING:
    from selfsup.kernel.discovery import Plugins
    from selfsup.kernel.loop import Report, Run

USUAL = 1000  # steps between two measurements where only the data was named


class Online:
    """kNN or a linear probe while training."""

    def __init__(
        self,
        *,
        every: Annotated[
            int | None, about("steps between two measurements; none: 1000 where data is named, otherwise off", ge=1)
        ] = None,
        data: Annotated[Paths, about("labelled data, as --data; empty: the data of the run")] = [],  # noqa: B006
        test: Annotated[Paths, about("labelled data to judge on; empty: a fifth of every class")] = [],  # noqa: B006
        label: Annotated[str | None, about("column of labels, or a regular expression; see data.label")] = None,
        column: Annotated[str | None, about("column (tables) or key (tars) of the data; see data.column")] = None,
        judge: Annotated[Literal["knn", "probe"], about("nearest neighbours, or a linear classifier")] = "knn",
        limit: Annotated[int | None, about("at most so many samples of data, and of test", ge=4)] = 2000,
        layer: Annotated[int | None, about("use only this many layers of the backbone", ge=1)] = None,
    ) -> None:
        self.every = every or (USUAL if data or test else None)
        self.asked = Labelled(paths=data, tests=test, label=label, column=column, limit=limit, layer=layer)
        self.judge: Judge = Neighbours() if judge == "knn" else Linear()

    @hookimpl
    def run_composed(self, run: Run) -> None:
        """Open the data, so that a mistake costs no training."""
        if self.every is None:
            return
        if self.judge.name == "probe":
            need_sklearn()
        if self.asked.layer:
            units_of(run.objective.exports, self.asked.layer)
        try:
            self.task = open_task(self._plugins(run), run.config, run.objective.exports.modality, self.asked)
        except DataError as cause:
            raise DataError(f"online.data: {cause}") from cause
        run.notes.append(
            f"online {self.judge.name}: {len(self.task.bank):,} samples to learn from, {len(self.task.query):,} to be "
            f"judged on, {self.task.classes} classes, every {self.every:,} steps and at the end"
        )

    @hookimpl
    def step_finished(self, run: Run, report: Report) -> None:
        """Measure if it is time."""
        if self.every and (run.done % self.every == 0 or run.done == run.total):
            self.measure(run)

    def measure(self, run: Run) -> None:
        """Judge the exported tower and tell the services; every process computes it, as each may hold a shard only."""
        tower, asked = run.objective.exports, replace(self.asked, device=str(run.device))
        with evaluating(run.objective, parts=True):
            row, _, _ = examine(self.judge, self.task, tower.modality, asked, run.config, tower, asked.layer)
        if distributed.rank() == 0 and row.accuracy is not None:
            run.measure({f"online/{self.judge.name}": row.accuracy})

    def _plugins(self, run: Run) -> Plugins:
        """The services of the run; without `data` where that is to be made anew: for other columns, or no stream."""
        streamed = run.config.get("data", {}).get("stream")
        if self.asked.label is None and self.asked.column is None and not streamed:
            return run.plugins
        others = type(run.plugins)()
        for name, service in run.plugins.manager.list_name_plugin():
            if name != "data":
                others.register(service, name)
        return others
