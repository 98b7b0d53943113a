"""What is installed, as the command line shows and completes it: nothing here imports a plugin."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from selfsup.kernel.discovery import Found, Plugins
from selfsup.kernel.errors import PluginError

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


@dataclass(frozen=True)
class Row:
    """One line of a list of plugins."""

    name: str
    distribution: str
    summary: str
    broken: bool = False


def plugins_of(context: click.Context) -> Plugins:
    """The plugins of this invocation; looked up once, on first use."""
    root = context.find_root()
    if not isinstance(root.obj, Plugins):
        root.obj = Plugins()
    return root.obj


def rows(plugins: Plugins, kind: str) -> list[Row]:
    """All plugins of a kind, with those that cannot be used and why."""
    out = []
    for name in plugins.names(kind):
        out.append(row(plugins, kind, name))
        for found in plugins.claims(kind, name) if not out[-1].broken else []:
            if found.distribution != out[-1].distribution:
                taken = f"{found.name!r} is a name of {out[-1].distribution}"
                out.append(Row(found.full_name, found.distribution, taken, broken=True))
    return out


def row(plugins: Plugins, kind: str, name: str) -> Row:
    """One plugin; two distributions that claim its name, or a file that does not parse, are said in the line."""
    try:
        found = plugins.find(kind, name)
    except PluginError as clash:
        return Row(name, "?", str(clash), broken=True)
    return Row(name, found.distribution, *_summary(found))


def summary(found: Found) -> str:
    """The first line of the docstring of a plugin's module, read without importing anything."""
    source = source_of(found.entry.module)
    text = ast.get_docstring(ast.parse(source.read_text("utf-8"))) if source else None
    return text.partition("\n")[0].strip() if text else ""


def source_of(module: str) -> Path | None:
    """The file of a module, found without running any of its parents' code."""
    path: Any = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if find and (spec := find(name, path)):
                break
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _summary(found: Found) -> tuple[str, bool]:
    try:
        return summary(found), False
    except Exception as cause:  # whatever a stranger's file makes Python's parser say
        return f"cannot be read: {type(cause).__name__}: {cause}", True


def complete_names(kind: str) -> Complete:
    """Shell completion of the names of a kind of plugin."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        plugins = plugins_of(context)
        plain = plugins.names(kind)
        full = [f.full_name for name in plain if len(claims := plugins.claims(kind, name)) > 1 for f in claims]
        names = [name for name in (*plain, *full) if name.startswith(incomplete)]
        return [CompletionItem(name, help=row(plugins, kind, name).summary) for name in names]

    return complete


def complete_runs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shell completion of run folders: those that hold a run.toml, here and one level down; else any folder."""
    given = Path(incomplete)
    parent, start = (given, "") if incomplete.endswith("/") else (given.parent, given.name)
    here = [path for path in sorted(parent.glob("*")) if path.name.startswith(start) and path.is_dir()]
    found = [path for folder in here for path in (folder, *sorted(folder.glob("*"))) if (path / "run.toml").is_file()]
    return [CompletionItem(str(path)) for path in found] or [CompletionItem(incomplete, type="dir")]


def complete_files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shell completion of files and folders."""
    return [CompletionItem(incomplete, type="file")]
