"""Show what the model will see: a few samples with their views and hidden parts, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from selfsup.kernel.errors import ConfigError

from .installed import plugins_of
from .selection import Asked, selection

if TYPE_CHECKING:
    from rich.text import Text

    from selfsup.kernel.discovery import Plugins
    from selfsup.plugins.common.seen import Seen

STYLES = {"": "", "hidden": "black on yellow", "guess": "black on green"}


@click.command()
@selection
@click.option("--samples", type=click.IntRange(min=1, max=64), default=8, show_default=True, help="How many to show.")
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where to write. Default: look-NAME.png; text is printed only.",
)
@click.pass_context
def look(context: click.Context, asked: Asked, samples: int, out: Path | None) -> None:
    """Show what the model will see: a few samples with their views and hidden parts.

    \b
    ssl look --plugin simclr                                    of the built-in sample
    ssl look --plugin simclr --data photos --out views.png      of your own data
    ssl look RUN.toml --set objective.strength=0.5              with another option

    The samples are the first of training, with the very views and masks of its first step. Pictures and curves
    make one sheet, a PNG; text is printed, its hidden parts in brackets. Nothing is trained.
    """
    plugins = plugins_of(context)
    name, seen = _see(plugins, asked, samples)
    texts = all(isinstance(value, str | list) for values in seen.shown.values() for value in values)
    if texts:
        _print(seen)
    if texts and out is None:
        return
    out = out or Path(f"look-{name}.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(name, seen, out, texts)
    except (OSError, ValueError) as cause:  # ValueError: a suffix that Pillow does not know
        raise ConfigError(f"{out} cannot be written: {cause}; choose another file with --out") from None
    count = len(seen.names)
    click.echo(f"{'wrote':<10}{out}: {count} sample{'s' * (count > 1)}; {', '.join(seen.shown)}")


def _see(plugins: Plugins, asked: Asked, samples: int) -> tuple[str, Seen]:
    from selfsup.kernel import compose
    from selfsup.kernel.contracts import Step
    from selfsup.kernel.precision import pick_device
    from selfsup.plugins.common.seen import open_data, see

    settings = compose.resolve(plugins, *asked.layers(plugins))
    kinds = compose.modalities(plugins, settings)
    source = open_data(plugins, settings, kinds)
    objective = compose.build(plugins, settings, kinds).to(pick_device(settings["train"]["device"]))
    first = Step(0, settings["train"]["steps"] or 1, settings["train"]["seed"])
    seen = see(settings, objective, source, first, samples, guess=False)
    for note in seen.notes:
        click.echo(f"{'data':<10}{note}")
    return settings["objective"]["name"], seen


def _write(name: str, seen: Seen, out: Path, texts: bool) -> None:
    from selfsup.plugins.common.contact_sheet import plain, sheet

    if not texts:
        sheet(f"{name}: what the model sees of its first samples", seen).save(out)
        return
    lines = []
    for place, sample in enumerate(seen.names):
        lines += [sample, *(f"{caption}: {plain(value)}" for caption, value in seen.of(place).items()), ""]
    out.write_text("\n".join(lines), "utf-8")


def _print(seen: Seen) -> None:
    """Texts, with what is hidden in colour and brackets."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for place, sample in enumerate(seen.names):
        console.print(Text(sample, "bold"))
        for caption, value in seen.of(place).items():
            console.print(Text.assemble((f"{caption}: ", "dim"), _coloured(value)))
        console.print()


def _coloured(value: str | list[tuple[str, str]]) -> Text:
    from rich.text import Text

    from selfsup.plugins.common.contact_sheet import plain

    if isinstance(value, str):
        return Text(value)
    return Text.assemble(*((plain([(text, mark)]), STYLES.get(mark, "")) for text, mark in value))
