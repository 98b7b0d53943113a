"""List what is installed, show a plugin's paper, presets and options, begin a plugin, install others' plugins."""

from __future__ import annotations

import json
import typing
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from selfsup.kernel.discovery import KINDS, SINGULAR, Plugins
from selfsup.kernel.errors import PluginError, nearest

from .group import Shorthand
from .installed import Row, plugins_of, rows, summary
from .plugins_check import check_all
from .plugins_install import install
from .plugins_new import new

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    names = {name for kind in KINDS[:-1] for name in plugins_of(context).names(kind)}
    return sorted(name for name in names if name.startswith(incomplete))


@click.group(cls=Shorthand, default="show", subcommand_metavar="[NAME] | COMMAND ...")
def plugins() -> None:
    """List what is installed; with a NAME, show a plugin's paper, presets and options.

    \b
    ssl plugins                                   all, by kind
    ssl plugins simclr                            one: its paper, presets, options and their ranges
    ssl plugins --check                           import each, in a process of its own: which are broken, and why
    ssl plugins --kind backbones --json           for programs
    ssl plugins new my-task --kind objective      begin one of your own
    ssl plugins install selfsup-jigsaw            install others'

    A plugin whose name is that of a command, such as "new", is shown by: ssl plugins show new
    """


@plugins.command()
@click.argument("name", required=False, shell_complete=_complete)
@click.option("--kind", type=click.Choice(KINDS), help="Only plugins of this kind.")
@click.option("--check", is_flag=True, help="Import each in a process of its own; exit with 1 if one is broken.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def show(context: click.Context, name: str | None, kind: str | None, check: bool, as_json: bool) -> int:
    """List what is installed, or show one plugin; `show` may be left out."""
    installed = plugins_of(context)
    kinds = (kind,) if kind else KINDS
    found = [k for k in kinds if name is None or installed.claims(k, name)]
    if not found:
        what = SINGULAR[kind] if kind else "plugin"
        known = {n for k in kinds for n in installed.names(k)}
        raise PluginError(f"there is no {what} called {name!r}; {nearest(name or '', known)}")
    if check:
        return check_all(installed, found, name, as_json, whole=bool(context.find_root().params["debug"]))
    if name is None:
        table = {k: rows(installed, k) for k in kinds}
        click.echo(json.dumps(_plain(table), indent=2)) if as_json else _print_list(table, installed.damaged)
        return 0
    facts = [_facts(installed, k, name) for k in found]
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        for fact in facts:
            _print_facts(fact)
    return 0


plugins.add_command(new)
plugins.add_command(install)


def _plain(table: dict[str, list[Row]]) -> dict[str, list[dict[str, Any]]]:
    return {kind: [vars(row) for row in listed] for kind, listed in table.items()}


def _print_list(table: dict[str, list[Row]], damaged: dict[str, str]) -> None:
    console = Console(highlight=False)
    for kind, listed in table.items():
        if listed:
            grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
            for width in (14, 14, None):
                grid.add_column(min_width=width)
            for row in listed:
                name, owner = Text(f"  {row.name}", "bold"), Text(row.distribution, "dim")
                grid.add_row(name, owner, Text(row.summary, "red" if row.broken else ""))
            console.print(Text(kind, "underline"), grid, sep="\n")
    for distribution, why in damaged.items():
        console.print(Text(f"{distribution}: {why}", "red"))
    console.print("\nssl plugins NAME shows a plugin's paper and options", style="dim")


def _facts(installed: Plugins, kind: str, name: str) -> dict[str, Any]:
    """Everything about one plugin, as JSON holds it; imports it."""
    found = installed.find(kind, name)
    plugin = found.load()
    facts: dict[str, Any] = {"kind": SINGULAR[kind], "name": name, "distribution": found.distribution}
    facts["summary"] = summary(found)
    if kind == "commands":
        return facts | {"usage": f"ssl {name} --help"}
    facts |= {key: getattr(plugin, key) for key in ("paper", "towers") if hasattr(plugin, key)}
    if hasattr(plugin, "presets"):
        facts["presets"] = {preset: dict(settings) for preset, settings in plugin.presets.items()}
    return facts | {"options": _options(plugin)}


def _options(plugin: Any) -> list[dict[str, str]]:
    from selfsup.kernel.config import schema  # pydantic: not for the list

    out = []
    for option, field in schema(plugin).model_fields.items():
        kind, default, limits = _describe(field)
        text = field.description or ""
        out.append({"name": option, "type": kind, "default": default, "range": limits, "about": text})
    return out


def _describe(field: FieldInfo) -> tuple[str, str, str]:
    """(type, default, range) of an option, as people write them."""
    from selfsup.kernel.config import to_toml_value

    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = (f"{signs[k]} {getattr(m, k)}" for m in field.metadata for k in signs if hasattr(m, k))
    default = "required" if field.is_required() else to_toml_value(field.default)
    return _written(field.annotation), default, ", ".join(limits)


def _written(kind: Any) -> str:
    """A type, without what is annotated to its members."""
    members = typing.get_args(kind)
    if typing.get_origin(kind) is Annotated:
        return _written(members[0])
    if typing.get_origin(kind) in (typing.Union, UnionType):
        return " | ".join(_written(member) for member in members)
    name = kind.__name__ if isinstance(kind, type) and not members else str(kind).replace("typing.", "")
    return name.replace("NoneType", "None")


def _print_facts(fact: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(Text(f"{fact['kind']} {fact['name']}", "bold"), Text(fact["distribution"], "dim"))
    console.print(Text(fact["summary"]), *([Text(fact["paper"], "italic")] if "paper" in fact else []), sep="\n")
    for preset, settings in fact.get("presets", {}).items():
        shown = ", ".join(escape(f"{key} = {_short(value)}") for key, value in settings.items())
        console.print(Text(f"\npreset {preset}", "bold"), Padding(shown or "as the defaults", (0, 0, 0, 2)), sep="\n")
    if "usage" in fact:
        console.print(fact["usage"])
    if fact.get("options"):
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        for column in ("option", "type", "default", "range", "what it is"):
            grid.add_column(column, overflow="fold", no_wrap=column == "option")  # a name is there to be copied
        for o in fact["options"]:
            grid.add_row(*(Text(o[key]) for key in ("name", "type", "default", "range", "about")))
        console.print(grid)


def _short(value: Any) -> str:
    return json.dumps(value, default=str)
