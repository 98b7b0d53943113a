"""Begin a plugin: a whole package of one's own, whose tests pass before a line of it is changed."""

from __future__ import annotations

import keyword
import re
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template

import click

from selfsup.kernel.discovery import KINDS, SINGULAR, Plugins
from selfsup.kernel.errors import ConfigError, PluginError

from .installed import plugins_of

PLURAL = {SINGULAR[kind]: kind for kind in KINDS[:-1]}  # a command needs nothing of selfsup but its entry point
RESERVED = {  # names that mean something else where plugins of a kind are named
    "modality": {"none"},
    "service": {"objective", "modality", "backbone", "towers", "train", "preset"},
}
NAME = re.compile(r"[a-z]([a-z0-9_]*[a-z0-9])?")
TRAIN = {
    "objective": "ssl train --plugin $name",
    "modality": "ssl train --plugin simclr --modality $name --backbone transformer --preset tiny \\\n"
    "    --set backbone.width=64 --set backbone.depth=2 --set backbone.heads=4",
    "backbone": "ssl train --plugin simclr --backbone $name",
    "service": "ssl train --plugin simclr --set $name.every=10",
}
EXTRA = {"modality": ""}  # of selfsup, for the sample that the tests train on; images elsewhere


@click.command()
@click.argument("name")
@click.option("--kind", type=click.Choice(list(PLURAL)), required=True, help="What the plugin is.")
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="The folder to make. Default: selfsup-NAME.",
)
@click.pass_context
def new(context: click.Context, name: str, kind: str, out: Path | None) -> None:
    """Begin a package of your own: a small working plugin, its tests, a README.

    \b
    ssl plugins new turns --kind objective        what to hide and to predict
    ssl plugins new tides --kind modality         a kind of data
    ssl plugins new mixer --kind backbone         a network
    ssl plugins new gauge --kind service          whatever listens to a run
    """
    name = checked(plugins_of(context), kind, name)
    words = wording(name, kind)
    folder = out or Path(words["distribution"])
    write(folder, package(kind, words))
    click.echo(f"{click.style('made', bold=True)}      {folder}, a package with the {kind} {name!r}\n")
    steps = {
        f"pip install -e {shlex.quote(f'{folder}[dev]')}": "once, with pytest; what you change is used at once",
        f"pytest {shlex.quote(str(folder))}": "its tests pass",
        f"ssl plugins {name}": "what it says about itself",
        words["train"]: "on a built-in sample",
    }
    for command, why in steps.items():
        click.echo(f"  {command}{click.style(f'  # {why}', dim=True)}")
    click.echo(f"\n{words['module']}.py is the plugin; README.md says how to publish it, once you chose a licence.")


def checked(plugins: Plugins, kind: str, asked: str) -> str:
    """The plugin's name as Python writes it; an error if it cannot be one, or another plugin of the kind has it."""
    name = asked.replace("-", "_")
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        plain = re.sub(r"\W+|_+", "_", name.lower(), flags=re.ASCII).strip("_0123456789")
        better = plain and not keyword.iskeyword(plain) and plain != name
        why = "is a word of Python's own" if keyword.iskeyword(name) else "cannot name a module of Python"
        raise ConfigError(
            f"{asked!r} {why}: begin with a letter, go on with lower-case letters, digits, - and _, as in "
            f"{plain if better else f'my_{kind}'!r}"
        )
    if name in RESERVED.get(kind, ()):
        raise ConfigError(
            f"a {kind} cannot be called {name!r}, which means something else in a run file; choose another"
        )
    if name in plugins.names(PLURAL[kind]):
        owner = plugins.find(PLURAL[kind], name).distribution
        raise PluginError(f"the {kind} {name!r} is there already, of {owner}; choose another name")
    return name


def wording(name: str, kind: str) -> dict[str, str]:
    """What the templates call things."""
    camel = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    extra = EXTRA.get(kind, "[image,eval]")
    words = {
        "name": name,
        "kind": kind,
        "group": PLURAL[kind],
        "attribute": camel,
        "module": f"selfsup_{name}",
        "distribution": f"selfsup-{name.replace('_', '-')}",
        "selfsup": f"selfsup>={version('selfsup')}",
        "tested": f"selfsup{extra}",
    }
    return words | {"train": Template(TRAIN[kind]).substitute(words)}


def package(kind: str, words: Mapping[str, str]) -> dict[str, str]:
    """The files of a package of a kind: {name: text}."""
    texts = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        ".gitignore": "gitignore",
        f"{words['module']}.py": f"{kind}.py",
        f"test_{words['name']}.py": f"test_{kind}.py",
    }
    source = files("selfsup.cli.templates")
    return {
        file: Template((source / f"{text}.txt").read_text("utf-8")).substitute(words) for file, text in texts.items()
    }


def write(folder: Path, texts: Mapping[str, str]) -> None:
    """Make the folder, which must be a new one, with these files."""
    if folder.exists():
        what = "a folder" if folder.is_dir() else "a file"
        raise ConfigError(
            f"there is {what} {str(folder)!r} already, and nothing was changed; choose another with --out"
        )
    try:
        folder.mkdir(parents=True)
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8")
    except OSError as cause:
        raise ConfigError(f"the folder {folder} cannot be written: {cause.strerror}") from None
