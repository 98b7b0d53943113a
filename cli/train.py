"""Train a model, or go on with a run that was interrupted."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from selfsup.kernel.errors import ConfigError, nearest

from .blame import raise_named
from .installed import complete_runs, plugins_of
from .run_claim import RUN_FILE, claim
from .selection import Asked, selection

if TYPE_CHECKING:
    from selfsup.kernel.config import Settings
    from selfsup.kernel.discovery import Plugins
    from selfsup.kernel.loop import Run

_folder = click.Path(path_type=Path)


@click.command()
@selection
@click.option(
    "--out", metavar="FOLDER", type=_folder, shell_complete=complete_runs, help="Of the run. Default: runs/NAME-TIME."
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out; needs nothing else.")
@click.option(
    "--from",
    "weights_from",
    metavar="RUN",
    type=_folder,
    shell_complete=complete_runs,
    help="Begin with the weights of another run.",
)
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
@click.pass_context
def train(
    context: click.Context,
    asked: Asked,
    out: Path | None,
    resume: bool,
    weights_from: Path | None,
    as_json: bool,
) -> int:
    """Train a model, or go on with a run that was interrupted.

    \b
    ssl train --plugin simclr                      on the built-in sample
    ssl train --plugin simclr --data photos        on a folder
    ssl train RUN.toml --set train.batch=512       from a run file
    ssl train --resume --out runs/simclr-...       go on

    Ctrl-C, SIGTERM and SIGUSR1 end the run after the step at hand and save it; a
    second Ctrl-C ends it at once, and what came after the newest checkpoint is lost.
    The exit code is 0 only if all steps are done: 130 after Ctrl-C, 75 after
    another signal. The file `status` in the folder says the same in a word.
    """
    if resume and weights_from:
        raise click.UsageError("--resume goes on with a run and --from begins one; give one of them", context)
    if resume and out is None:
        raise click.UsageError("--resume needs the folder of the run: --out FOLDER", context)
    if weights_from and asked.names_nothing:
        example = f"ssl train {weights_from / RUN_FILE} --from {weights_from}"
        raise click.UsageError(f"--from gives weights and no settings; name those too, as in {example}", context)
    plugins = plugins_of(context)
    settings = _settings(plugins, asked, out, resume)
    folder = out or default_folder(settings)
    with claim(folder, resume) as claimed:
        run, reason, outcome = _train(plugins, settings, folder, resume, weights_from)
        code = claimed.ended(reason)
    from selfsup.kernel import distributed

    if distributed.rank() == 0:
        report = {"run": str(folder), "ended": reason, "steps": run.done, **outcome.figures(run)}
        with suppress(OSError):  # the run is done, whether or not it can be said
            for line in closing(run, report):
                click.echo(line)
            if as_json:
                click.echo(json.dumps(report))
    distributed.barrier()  # the process ends without leaving the group: see cli/main.py
    return code


def _settings(plugins: Plugins, asked: Asked, out: Path | None, resume: bool) -> Settings:
    from selfsup.kernel import compose

    file = None
    if resume and asked.names_nothing and out:
        file = out / RUN_FILE
        if not file.is_file():
            near = nearest(out.name, [path.parent.name for path in out.absolute().parent.glob(f"*/{RUN_FILE}")])
            raise ConfigError(f"there is no run in {out} to go on with; {near}")
    return compose.resolve(plugins, *asked.layers(plugins, file))


def default_folder(settings: Settings) -> Path:
    """runs/NAME-TIME; of several processes each has its own clock, so there a name must be given."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several processes need one folder for the run; name it with --out")
    first = Path("runs") / f"{settings['objective']['name'].rpartition(':')[2]}-{time.strftime('%Y%m%d-%H%M%S')}"
    # A clock that is put back, as in autumn, gives a name once more.
    return next(path for n in count(1) if not (path := first if n == 1 else Path(f"{first}-{n}")).exists())


def _train(
    plugins: Plugins, settings: Settings, folder: Path, resume: bool, weights_from: Path | None
) -> tuple[Run, str, Any]:
    from selfsup.kernel import compose, distributed, loop, state

    from .outcome import Outcome, began_with, refuse_others, write_facts
    from .patience import asked_for

    if resume:
        refuse_others(folder, plugins, settings)
    outcome, run = Outcome(), None
    plugins.register(outcome, "outcome")
    # Killed before its first checkpoint, a run that began with the weights of another one begins with them again.
    weights_from = began_with(folder) if resume else weights_from
    needed = None if state.folders(folder / "checkpoints") else weights_from
    try:
        with asked_for("making this run ready, before its first step,"):
            run = compose.start(plugins, settings, folder, resume, needed)
        if distributed.rank() == 0:
            write_facts(run, folder, weights_from)
        return run, loop.train(run), outcome
    except (Exception, SystemExit) as error:
        raise_named(plugins, error, run)
    except KeyboardInterrupt:
        if run and distributed.rank() == 0 and (kept := state.folders(folder / "checkpoints")):
            at = f"after {run.done} of {run.total} steps"
            click.echo(f"ended at once {at}; the newest checkpoint is {kept[0]}", err=True)
            click.echo(f"{'go on':<10}ssl train --resume --out {folder}", err=True)
        raise


def closing(run: Run, report: dict[str, Any]) -> list[str]:
    """What was done, where it is, and what to do next."""
    from selfsup.kernel import state
    from selfsup.plugins.common.perplexity import Predicts
    from selfsup.plugins.services.console import clock

    folder, saved = report["run"], next(iter(state.folders(Path(report["run"]) / "checkpoints")), None)
    if report["ended"] != "done":
        kept = "the state is saved" if saved else "nothing was saved"
        return [
            f"stopped by {report['ended']} after {run.done} of {run.total} steps; {kept}",
            f"{'go on':<10}ssl train --resume --out {folder}",
        ]
    if run.first == run.done:
        return [f"this run was done before: {run.done} of {run.total} steps; for more, add --steps N to --resume"]
    figures = f"{run.done - run.first:,} steps in {clock(report['seconds'])}, loss {report['loss']}"
    judge, data = ("perplexity", "HELD-OUT") if isinstance(run.objective, Predicts) else ("knn", "LABELLED")
    named = f" --data {data}" if run.config.get("data", {}).get("paths") else ""
    return [
        f"{'done':<10}{figures}, {report['samples_per_second']:,} samples/s",
        f"{'saved':<10}{saved or 'no checkpoint: the service `checkpoints` is disabled'}",
        f"{'next':<10}ssl eval {judge} {folder}{named}",
        f"{'':<10}ssl report {folder}",
    ]
