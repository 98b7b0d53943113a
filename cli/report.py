"""Write one web page about a run: how it went, its recipe beside the paper's, what was hidden and guessed, features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from selfsup.kernel.errors import ConfigError, SelfsupError

from .installed import complete_runs, plugins_of

if TYPE_CHECKING:
    from selfsup.kernel.contracts import Objective
    from selfsup.kernel.discovery import Plugins
    from selfsup.kernel.loader import Source
    from selfsup.plugins.common.page import Raw

    from .report_log import History

_path = click.Path(path_type=Path)


@click.command()
@click.argument("run", type=_path, shell_complete=complete_runs)
@click.option("--out", metavar="FILE", type=_path, help="The page. Default: report.html in the folder of the run.")
@click.option(
    "--samples",
    type=click.IntRange(min=1, max=64),
    default=6,
    show_default=True,
    help="How many to show, with what is hidden of them and guessed.",
)
@click.option("--no-model", is_flag=True, help="Leave out what needs the model and the data: samples and features.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1 or auto.")
@click.pass_context
def report(context: click.Context, run: Path, out: Path | None, samples: int, no_model: bool, device: str) -> None:
    """Write one web page about a run.

    \b
    ssl report runs/simclr-20260101-120000                      writes report.html there
    ssl report runs/simclr-20260101-120000 --out simclr.html    elsewhere

    It holds curves, the recipe beside the paper's, data and skipped samples, speed, environment, some samples with
    what was hidden and guessed, and how the features spread. It is one file that needs no network. The run may still
    be going on.
    """
    from selfsup.plugins.common.page import page

    from . import report_parts
    from .report_log import history
    from .run_folder import open_run

    plugins = plugins_of(context)
    log = history(open_run(run))
    parts = [*report_parts.heading(log, _paper(plugins, log)), report_parts.curves(log)]
    if not no_model:
        parts += _of_model(plugins, log, samples, device)
    for part in (report_parts.data, report_parts.speed, report_parts.environment):
        parts.append(part(log))
    parts.insert(-3, report_parts.recipe(log, plugins))
    out = out or run / "report.html"
    text = page(f"{log.run.option('objective', 'name')}: {run.resolve().name}", parts)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, "utf-8")
    except OSError as cause:
        raise ConfigError(
            f"the page {out} cannot be written: {cause.strerror}; choose another place with --out"
        ) from None
    click.echo(f"{'wrote':<10}{out}, {len(text.encode()) / 1e3:,.0f} kB; it opens in any browser and needs no network")


def _paper(plugins: Plugins, log: History) -> str:

    try:
        return str(getattr(plugins.load("objectives", log.run.option("objective", "name")), "paper", ""))
    except SelfsupError:  # not installed here: the recipe says so
        return ""


def _of_model(plugins: Plugins, log: History, samples: int, device: str) -> list[Raw]:
    """What the newest checkpoint makes of the run's own data; where that cannot be had, why."""
    from selfsup.kernel import compose
    from selfsup.plugins.common.feature_map import feature_map
    from selfsup.plugins.common.page import say, section
    from selfsup.plugins.common.seen import modalities_of, open_data

    if log.run.checkpoint is None:
        return [section("Samples and features", say("There is no checkpoint yet, so there is no model to look into."))]
    try:
        objective, settings, step = compose.restore(log.run.path, plugins, device)
        source = open_data(plugins, settings, modalities_of(objective))
    except SelfsupError as why:
        return [section("Samples and features", say(f"They cannot be shown: {why}", "warn"))]
    made = [_trying("Samples", lambda: _samples(log, objective, settings, source, step, samples))]

    def untrained() -> Objective:
        return compose.restore(log.run.path, plugins, device, initial=True)[0]

    seed = settings["train"]["seed"]
    return [*made, _trying("Features", lambda: feature_map(objective, untrained, source, seed, step))]


def _trying(name: str, make: Callable[[], list[Raw]]) -> Raw:
    """A section; where it cannot be made, why. A plugin may fail in any way; the rest is worth having."""
    from selfsup.plugins.common.page import say, section

    try:
        return section(name, *make())
    except Exception as why:
        reason = str(why) if isinstance(why, SelfsupError) else f"{type(why).__name__}: {why}"
        click.echo(f"note      {name.lower()} cannot be shown: {reason}", err=True)
        return section(name, say(f"They cannot be shown: {reason}", "warn"))


def _samples(log: History, objective: Objective, settings: Any, source: Source, step: int, count: int) -> list[Raw]:
    from selfsup.kernel.contracts import Step
    from selfsup.plugins.common.page import is_curve, samples, say
    from selfsup.plugins.common.seen import see

    at = Step(step, settings["train"]["steps"] or step, settings["train"]["seed"])
    seen = see(settings, objective, source, at, count, guess=True, folder=log.run.path)
    told = [f"The next samples in the order of training, and what the model of step {step:,} makes of them."]
    values = [value for column in seen.shown.values() for value in column]
    marks = {mark for value in values if isinstance(value, list) for _, mark in value}
    told += ["Grey bands of curves are hidden, or there is nothing to guess."] if any(map(is_curve, values)) else []
    told += ["Yellow text is hidden."] if "hidden" in marks else []
    told += ["What is green and underlined was guessed."] if "guess" in marks else []
    return [say(" ".join(told)), samples(seen)]
