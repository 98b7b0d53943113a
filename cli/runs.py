"""List runs, compare some of them, or name the best."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfsup.kernel.errors import ConfigError, nearest

from .group import Shorthand
from .installed import complete_runs

if TYPE_CHECKING:
    from .run_folder import Folder

DEFAULT = Path("runs")
COLOURS = {"running": "green", "active": "green", "done": "", "stopped": "yellow"}
LOWER = re.compile(r"(^|[/_])(loss|error|perplexity|bits\w*|mse|mae|wer|cer)$")
HIGHER = re.compile(r"^online/|(^|[/_])(accuracy|knn|probe|top_?\d+|f1|auc|map|precision|recall)$")
UNITS = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_path = click.Path(path_type=Path)
_folder = click.argument("folder", type=_path, default=DEFAULT, shell_complete=complete_runs)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(cls=Shorthand, default="list", subcommand_metavar="[FOLDER] | COMMAND ...")
def runs() -> None:
    """List the runs in a FOLDER (default: runs) and up to two levels below it, the newest first.

    \b
    ssl runs                                      those in ./runs
    ssl runs . --json                             all below here, for programs
    ssl runs compare runs/a runs/b                settings that differ, and figures
    ssl runs best --by validation/loss            the best one

    \b
    running         a process of this machine writes to it (known on Linux, of one's own processes)
    active          written to in the last minutes, by a process that cannot be seen: on another machine, or just killed
    done            all steps were taken and saved
    stopped         interrupted; go on with: ssl train --resume --out RUN
    no checkpoint   interrupted before anything was saved
    damaged         run.toml cannot be read

    The loss is the mean of the last ten steps, "validation" the lowest loss that was measured, "online" the newest.
    A folder whose name is that of a command is listed by: ssl runs ./best
    """


@runs.command("list")
@_folder
@_json
def listed(folder: Path, as_json: bool) -> None:
    """List runs: how far they are, and how good; `list` may be left out."""
    found = _found(folder)
    facts = [run.facts() for run in found]
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    elif not facts:
        click.echo(f"there is no run in {folder} yet; begin one: ssl train --plugin simclr")
    else:
        _print_list(facts)


@runs.command()
@click.argument(
    "folders", metavar="RUN RUN...", nargs=-1, type=click.Path(path_type=Path), shell_complete=complete_runs
)
@_json
def compare(folders: Sequence[Path], as_json: bool) -> None:
    """Show the settings in which runs differ side by side, and their figures."""
    from .run_folder import open_run

    if len(folders) < 2:
        raise click.UsageError(
            "name two runs or more, as in: ssl runs compare runs/a runs/b", click.get_current_context()
        )
    opened = [open_run(folder) for folder in folders]
    flat = [_flat(run.settings) for run in opened]
    keys = list(dict.fromkeys(key for own in flat for key in own))
    rows = {key: [own.get(key) for own in flat] for key in keys}
    differ = {key: values for key, values in rows.items() if any(value != values[0] for value in values)}
    figures = _figures(opened)
    if as_json:
        names = [str(folder) for folder in folders]
        click.echo(json.dumps({"runs": names, "settings": differ, "figures": figures}, indent=2))
    else:
        _print_compared(folders, differ, figures)


@runs.command()
@_folder
@click.option("--by", metavar="METRIC", help="Default: validation/loss where it was measured, otherwise loss.")
@click.option("--highest/--lowest", default=None, help="Which is best; known for losses and accuracies.")
@_json
def best(folder: Path, by: str | None, highest: bool | None, as_json: bool) -> None:
    """Name the run with the best figure: what was measured counts at its best, a loss at the end of the run.

    \b
    ssl runs best                                 by validation/loss, or else by loss
    ssl runs best --by online/knn experiments     by the accuracy that the service `online` measured
    ssl runs best --by spread --highest           by any metric of the objective
    """
    found = _found(folder)
    known = {name for run in found for name in run.log.names()}
    if not found or not known:
        raise ConfigError(f"{'no run' if not found else 'no figure of any run'} was found in {folder}")
    by = by or ("validation/loss" if "validation/loss" in known else "loss")
    if by not in known:
        raise ConfigError(f"no run in {folder} has a figure called {by!r}; {nearest(by, known)}")
    highest = _direction(by) if highest is None else highest
    ranked = [(*figure, run) for run in found if (figure := run.log.best(by, highest))]
    ranked.sort(key=lambda entry: -entry[0] if highest else entry[0])
    if as_json:
        order = [{"run": str(run.path), "value": value, "steps": steps} for value, steps, run in ranked]
        facts = {"by": by, "best": "highest" if highest else "lowest", "ranked": order}
        click.echo(json.dumps({**facts, "without": len(found) - len(ranked)}, indent=2))
    else:
        _print_ranked(by, highest, ranked, len(found) - len(ranked))


def _found(folder: Path) -> list[Folder]:
    """The runs below a folder; a folder that is not there is an error, unless it is the one that nobody named."""
    from .run_folder import find_runs

    if not folder.is_dir() and folder != DEFAULT:
        near = nearest(folder.name, [p.name for p in folder.absolute().parent.glob("*/")])
        raise ConfigError(f"there is no folder {str(folder)!r}; {near}")
    return find_runs(folder)


def _direction(by: str) -> bool:
    """Whether more is better."""
    if LOWER.search(by):
        return False
    if HIGHER.search(by):
        return True
    raise click.UsageError(f"is more of {by!r} better, or less? Say --highest or --lowest", click.get_current_context())


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def _figures(opened: Sequence[Folder]) -> dict[str, list[Any]]:
    """{what: its value in each run}, None where a run has none."""
    facts = [run.facts() for run in opened]
    out: dict[str, list[Any]] = {key: [fact[key] for fact in facts] for key in ("state", "steps", "total", "loss")}
    names = dict.fromkeys(name for fact in facts for name in (*fact["metrics"], *fact["measured"]))
    for name in names:
        out[name] = [(fact["measured"] | fact["metrics"]).get(name) for fact in facts]
    out["validation/loss, lowest"] = [fact["validation_loss"] for fact in facts]
    out["samples_per_second"] = [fact["samples_per_second"] for fact in facts]
    return {name: values for name, values in out.items() if any(value is not None for value in values)}


def _print_list(facts: Sequence[Mapping[str, Any]]) -> None:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    cells = [_cells(fact) for fact in facts]
    for column in [name for name in cells[0] if any(row[name] for row in cells)]:
        right = column in ("steps", "loss", "validation", "samples/s", "age", "size")
        grid.add_column(column, justify="right" if right else "left", no_wrap=column != "data", overflow="fold")
    shown = [str(column.header) for column in grid.columns]
    for row in cells:
        grid.add_row(*(Text(row[name], COLOURS.get(row[name], "red") if name == "state" else "") for name in shown))
    console = _console()
    console.print(grid)
    for fact in facts:
        if fact["problem"]:
            console.print(Text(f"{fact['run']}: {fact['problem']}", "red"))


def _cells(fact: Mapping[str, Any]) -> dict[str, str]:
    online = {name.removeprefix("online/"): v for name, v in fact["measured"].items() if name.startswith("online/")}
    data = [str(path).rstrip("/") for path in fact["data"]]
    return {
        "run": fact["run"],
        "objective": fact["objective"] or "?",
        "data": ", ".join(data[:2]) + (f" +{len(data) - 2}" if len(data) > 2 else "") or "built-in sample",
        "steps": f"{fact['steps']:,}/{fact['total']:,}" if fact["total"] else f"{fact['steps']:,}",
        "state": fact["state"],
        "loss": _short(fact["loss"]),
        "validation": _short(fact["validation_loss"]),
        "online": ", ".join(f"{name} {value:.1%}" for name, value in online.items()),
        "samples/s": f"{fact['samples_per_second']:,.0f}" if fact["samples_per_second"] else "",
        "age": ago(fact["age"]),
        "size": size(fact["bytes"]),
    }


def _print_compared(
    folders: Sequence[Path], differ: Mapping[str, Sequence[Any]], figures: Mapping[str, Sequence[Any]]
) -> None:
    short = [folder.name for folder in folders]
    labels = short if len({*short}) == len(short) else [str(folder) for folder in folders]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", *labels):
        grid.add_column(column, overflow="fold")
    for key, values in differ.items():
        grid.add_row(key, *(Text("-" if value is None else _plain(value)) for value in values))
    if not differ:
        grid.add_row("all settings are equal")
    grid.add_section()
    for key, values in figures.items():
        grid.add_row(Text(key, "bold"), *(_short(value) or "-" for value in values))
    _console().print(grid)


def _print_ranked(by: str, highest: bool, ranked: Sequence[tuple[float, int, Folder]], without: int) -> None:
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for value, steps, run in ranked:
        at = f"after {steps:,} steps"
        grid.add_row(str(run.path), _short(value), at, style="bold" if run is ranked[0][2] else "dim")
    console = _console()
    console.print(f"{'highest' if highest else 'lowest'} {by}:", grid, sep="\n")
    if without:
        console.print(f"{without} more {'runs have' if without > 1 else 'run has'} no {by}", style="dim")
    kinds = sorted({str(run.option("objective", "name")) for _, _, run in ranked})
    if LOWER.search(by) and len(kinds) > 1:
        console.print(f"losses of different objectives do not compare: {', '.join(kinds)}", style="yellow")


def _console() -> Console:
    """A file or a pipe gets whole lines."""
    console = Console(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=250)


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def ago(seconds: float) -> str:
    """90 -> "1 min"."""
    span, unit = next(((span, unit) for span, unit in UNITS if seconds >= span), (1, "s"))
    return f"{int(seconds / span)} {unit}"


def size(count: int) -> str:
    """123456789 -> "123 MB"."""
    for unit, many in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= many:
            return f"{count / many:.3g} {unit}"
    return f"{count} B"
