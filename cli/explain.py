"""Show the resolved recipe beside the paper's, with every difference marked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .installed import plugins_of
from .selection import Asked, oversized, selection

if TYPE_CHECKING:
    from selfsup.kernel.config import Settings
    from selfsup.kernel.discovery import Plugins

Row = tuple[str, str, Any, Any]  # section, option, this run's value, the paper's
SHOWN = ("objective", "modality", "backbone", "towers", "optimizer")
OF_TRAINING = ("clip", "precision", "seed")  # beside batch, steps and epochs, which stand at the top


@click.command()
@selection
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def explain(context: click.Context, asked: Asked, as_json: bool) -> None:
    """Show the resolved recipe beside the paper's, with every difference marked.

    Opens the data as training does, to turn epochs into steps, and builds no model.
    """
    from selfsup.kernel import compose

    plugins = plugins_of(context)
    settings = compose.resolve(plugins, *asked.layers(plugins))
    objective = settings["objective"]["name"]
    source = _open(plugins, settings)
    rows = beside_paper(plugins, settings, len(source))
    cite = getattr(plugins.load("objectives", objective), "paper", "")
    if as_json:
        listed = [
            {"option": f"{section}.{key}" if section else key, "run": run, "paper": base, "differs": differs(row)}
            for row in rows
            for section, key, run, base in [row]
        ]
        facts = {"objective": objective, "paper": cite, "preset": settings["preset"], "samples": len(source)}
        click.echo(json.dumps({**facts, "settings": listed}))
    else:
        _print(settings, cite, [*source.notes, *oversized(settings["train"]["batch"], len(source))], rows)


def beside_paper(plugins: Plugins, settings: Settings, size: int | None) -> list[Row]:
    """Every option that shapes what is learned from so many samples (None: nobody knows), beside the paper's."""
    from selfsup.kernel import compose

    paper = compose.resolve(plugins, {"objective": {"name": settings["objective"]["name"]}, "preset": "base"})
    top = [_figures(plugins, settings, size), _figures(plugins, paper, None)]
    return [("", key, top[0][key], top[1][key]) for key in top[0]] + _differences(settings, paper)


def _open(plugins: Plugins, settings: Settings) -> Any:
    """What training would go through: of texts the rows, which are neither as many nor as long as the files."""
    from selfsup.kernel import compose
    from selfsup.plugins.common.seen import open_data

    kinds = compose.modalities(plugins, settings)
    return compose.rows(settings, kinds, open_data(plugins, settings, kinds), None)


def _figures(plugins: Plugins, settings: Settings, size: int | None) -> dict[str, Any]:
    """What the settings come to: the peak learning rate, batch, steps, epochs, samples seen."""
    options = settings["train"]
    batch, steps, epochs = options["batch"], options["steps"], options["epochs"]
    if size:
        steps = steps or math.ceil(epochs * size / batch)
        epochs = float(f"{steps * batch / size:.3g}")
    elif steps:
        epochs = None  # the size of the paper's data is not part of a recipe
    out: dict[str, Any] = {}
    if "optimizer" in plugins.names("services"):
        service = plugins.load("services", "optimizer")(**settings["optimizer"])
        out["effective learning rate"] = float(f"{float(service.peak(batch)):.6g}")
    return {**out, "batch": batch, "steps": steps, "epochs": epochs}


def _differences(settings: Settings, paper: Settings) -> list[Row]:
    """(section, option, this run's, the paper's) of every option that shapes what is learned."""
    rows = []
    for section in SHOWN:
        run, base = _flat(settings.get(section, {})), _flat(paper.get(section, {}))
        rows += [(section, key, run.get(key), base.get(key)) for key in dict.fromkeys((*run, *base))]
    return rows + [("train", key, settings["train"][key], paper["train"][key]) for key in OF_TRAINING]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def differs(row: Row) -> bool:
    """Whether a row departs from the paper; what the recipe leaves open, as its epochs in steps, cannot differ."""
    section, _, run, base = row
    return bool(run != base) and (bool(section) or base is not None)


def _print(settings: Settings, cite: str, notes: Any, rows: list[Row]) -> None:
    console = Console(highlight=False)
    console.print(
        Text(f"{settings['objective']['name']}, preset {settings['preset']}", "bold"), Text(cite, "italic"), sep="\n"
    )
    for note in notes:
        console.print(Text(note, "dim"))
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "this run", "", "paper"):
        grid.add_column(column, overflow="fold", no_wrap=not column)  # a name is there to be copied
    before = ""
    for section, key, run, base in rows:
        if section != before:
            grid.add_row(Text(section, "underline"))
            before = section
        colour, sign = ("yellow", "≠") if differs((section, key, run, base)) else ("", "")
        grid.add_row(Text(f"  {key}"), Text(shown(run), colour), Text(sign, colour), Text(shown(base), "dim"))
    console.print(grid)
    count = sum(differs(row) for row in rows)
    console.print(f"{count} of {len(rows)} settings differ from the paper's" if count else "all as in the paper")


def shown(value: Any) -> str:
    """A value of an option, as people read it."""
    return (
        "-" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    )
