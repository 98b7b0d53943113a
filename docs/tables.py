"""Write the tables of README.md from the code: `python docs/tables.py`; a test checks that they are up to date."""

from __future__ import annotations

import inspect
from pathlib import Path

import click

from selfsup.cli.installed import summary
from selfsup.kernel.discovery import KINDS, SINGULAR, Plugins

README = Path(__file__).parents[1] / "README.md"


def plugins_table() -> str:
    """Kind, name and one line of every built-in plugin."""
    plugins = Plugins()
    rows = ["| kind | name | what it is |", "| --- | --- | --- |"]
    for kind in KINDS[:-1]:
        for name in plugins.names(kind):
            found = plugins.find(kind, name)
            if found.entry.dist and found.entry.dist.name == "selfsup":
                rows.append(f"| {SINGULAR[kind]} | `{name}` | {summary(found).rstrip('.')} |")
    return "\n".join(rows)


def commands_table() -> str:
    """Usage and one line of every command."""
    plugins = Plugins()
    rows = ["| command | what it does |", "| --- | --- |"]
    for name in plugins.names("commands"):
        command = plugins.load("commands", name)
        parts = command.commands if isinstance(command, click.Group) else {"": command}
        for part, one in parts.items():
            pieces = one.collect_usage_pieces(click.Context(one))
            usage = " ".join(["ssl", name, *([part] if part else []), *(p for p in pieces if p != "[OPTIONS]")])
            rows.append(f"| `{usage}` | {one.get_short_help_str(200).rstrip('.')} |")
    return "\n".join(rows)


def ops_table() -> str:
    """Signature and one line of every fused op."""
    from selfsup import triton_ops

    rows = ["| op | what it is |", "| --- | --- |"]
    for name in triton_ops.__all__:
        op = getattr(triton_ops, name)
        if inspect.isfunction(op):
            signature = ", ".join(inspect.signature(op).parameters)
            said = (inspect.getdoc(op) or "").partition("\n")[0].rstrip(".")
            rows.append(f"| `{name}({signature})` | {said} |")
    return "\n".join(rows)


def filled(text: str) -> str:
    """The README with its tables written anew, between `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(start)
        text = head + start + table() + "\n" + end + rest.split(end)[1]
    return text


TABLES = {"plugins": plugins_table, "commands": commands_table, "ops": ops_table}


if __name__ == "__main__":
    README.write_text(filled(README.read_text("utf-8")), "utf-8")
