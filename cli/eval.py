"""Judge a run's features (nearest neighbours, a linear probe) or its predictions, beside what needs no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .installed import complete_files, complete_runs, plugins_of

if TYPE_CHECKING:
    from selfsup.plugins.common.compare import Comparison, Judge
    from selfsup.plugins.common.perplexity import Perplexity

TITLES = {
    "trained": "trained",
    "random": "random initialisation",
    "raw": "raw input",
    "chance": "most frequent class",
}
PREDICTED = {"trained": "trained", "random": "random initialisation", "uniform": "uniform guess"}


@click.group(invoke_without_command=True)
@click.pass_context
def evaluate(context: click.Context) -> None:
    """Judge a run's features or its predictions, beside random ones, raw input and chance.

    Features need labelled data, labels serve nothing else. They are found in class folders (cat/1.jpg, dog/2.jpg),
    in a column of a table, or in file names, by a regular expression: --label '^(\\d)_'
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _files(flag: str, name: str, text: str) -> Any:
    return click.option(flag, name, multiple=True, metavar="PATH", shell_complete=complete_files, help=text)


def _shared(command: Any) -> Any:
    """The arguments of every way to judge."""
    for add in reversed(
        (
            click.argument("run", type=click.Path(path_type=Path), shell_complete=complete_runs),
            _files("--data", "paths", "Labelled data; by default the run's own."),
            _files("--test", "tests", "Labelled data to judge on; by default a fifth of --data."),
            click.option("--label", help="Column of labels, or a regular expression with one group on file names."),
            click.option("--column", help="Column of a table, or key of a tar, that holds the data."),
            click.option(
                "--limit", type=click.IntRange(min=4), help="At most so many samples of --data and of --test."
            ),
            click.option("--layer", type=click.IntRange(min=1), help="Use only this many layers of the backbone."),
            click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Samples at once."),
            click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or auto."),
            click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        )
    ):
        command = add(command)
    return command


@evaluate.command()
@_shared
@click.option("-k", "k", type=click.IntRange(min=1), default=20, show_default=True, help="Neighbours that vote.")
@click.option(
    "--temperature", type=click.FloatRange(0, min_open=True), default=0.07, show_default=True, help="Of the votes."
)
@click.pass_context
def knn(context: click.Context, /, k: int, temperature: float, **shared: Any) -> None:
    """Judge by the k nearest neighbours, weighted by similarity."""
    from selfsup.plugins.common.compare import Neighbours

    _judge(context, Neighbours(k, temperature), **shared)


@evaluate.command()
@_shared
@click.pass_context
def probe(context: click.Context, /, **shared: Any) -> None:
    """Judge by a linear classifier on frozen features."""
    from selfsup.plugins.common.compare import Linear

    _judge(context, Linear(), **shared)


@evaluate.command()
@click.argument("run", type=click.Path(path_type=Path), shell_complete=complete_runs)
@click.option(
    "--data",
    "paths",
    multiple=True,
    metavar="PATH",
    shell_complete=complete_files,
    help="Texts; by default the run's own.",
)
@click.option("--column", help="Column of a table, or key of a tar, that holds the texts.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many documents, the first ones.")
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Read long documents in windows that advance by so many tokens, so that each token is predicted from more.",
)
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Windows at once.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or auto.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def perplexity(context: click.Context, /, as_json: bool, **asked: Any) -> None:
    """Judge how well a run predicts the next token of each text."""
    from selfsup.plugins.common.perplexity import Asked, measure

    result = measure(plugins_of(context), Asked(**asked))
    if as_json:
        click.echo(json.dumps(result.plain()))
    else:
        _print_perplexity(result)


def _print_perplexity(result: Perplexity) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for note in result.notes:
        console.print(Text(note, "dim"))
    size, stride = result.size, f", stride {result.stride:,}" if result.stride else ""
    console.print(Text(f"\nperplexity: {result.run}, step {result.step:,}", "bold"))
    console.print(
        f"{size.documents:,} document{'s' * (size.documents != 1)} of {size.tokens:,} tokens and {size.bytes:,} bytes, "
        f"each token once, from at most {result.length - 1:,} before it{stride}; "
        f"{result.vocabulary:,} different tokens\n"
    )
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "nats a token", "with ends", "perplexity", "bits per byte"):
        grid.add_column(column, justify="right" if column else "left")
    for key, row in result.rows.items():
        figures = (f"{row.nats:.4f}", f"{row.nats_with_ends:.4f}", f"{row.perplexity:,.2f}", f"{row.bits_per_byte:.4f}")
        grid.add_row(PREDICTED[key], *figures, style="bold" * (key == "trained"))
    console.print(grid)


def _judge(context: click.Context, judge: Judge, as_json: bool, **asked: Any) -> None:
    from selfsup.plugins.common.compare import Asked, compare

    result = compare(plugins_of(context), Asked(**asked), judge)
    if as_json:
        click.echo(json.dumps(result.plain()))
    else:
        _print(result)


def _print(result: Comparison) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for note in result.notes:
        console.print(Text(note, "dim"))
    if result.skipped:
        name, why = next(iter(result.skipped.items()))
        console.print(Text(f"{len(result.skipped)} samples could not be used, such as {name}: {why}", "yellow"))
    options = "".join(f", {key} = {value}" for key, value in result.settings.items())
    layers = f", features after layer {result.layer}" if result.layer else ""
    console.print(Text(f"\n{result.judge}{options}: {result.run}, step {result.step:,}{layers}", "bold"))
    console.print(
        f"{result.bank:,} samples to learn from, {result.query:,} to be judged on, {result.classes} classes\n"
    )
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, side in (("", "left"), (f"{result.metric}, %", "right"), ("", "left")):
        grid.add_column(column, justify=side)  # type: ignore[arg-type]
    for key, row in result.rows.items():
        share = "-" if row.accuracy is None else f"{100 * row.accuracy:.1f} ± {100 * (row.error or 0):.1f}"
        found = [f"C = {row.found['C']:g}"] if "C" in row.found else []
        found += ["not converged"] if row.found.get("converged") is False else []
        grid.add_row(TITLES[key], share, Text(", ".join(found), "dim"), style="bold" * (key == "trained"))
    console.print(grid)
    for key, row in result.rows.items():
        if row.why:
            console.print(Text(f"{TITLES[key]}: {row.why}", "dim"))
