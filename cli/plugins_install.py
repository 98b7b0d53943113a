"""Install plugins into the environment that runs `ssl`, and leave the torch that is there as it is.

pip is the one of this Python, or uv where there is no pip. A file of constraints names the versions of torch and
triton that are installed: a package that asks for others is refused, not obeyed, as another build of torch may not
know this machine's GPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from selfsup.kernel.discovery import KINDS, SINGULAR
from selfsup.kernel.errors import PluginError

from .installed import Row, plugins_of, rows

KEPT = ("torch", "triton")
LAST = 8  # lines of the installer that are shown when it failed
Table = dict[str, list[Row]]
REASONS = {  # what the installer says, and what it means; the first that is found counts
    ("name resolution", "Failed to establish a new connection", "ConnectionError", "dns error", "ProxyError"): (
        "the package index cannot be reached"
    ),
    ("externally-managed-environment", "externally managed"): (
        "this Python belongs to the system; make an environment of your own: python -m venv .venv"
    ),
    ("conflicting dependencies", "ResolutionImpossible", "unsatisfiable"): (
        "what it needs does not go together with what stays; its own lines name the packages"
    ),
    ("does not appear to be a Python project", "neither 'setup.py' nor 'pyproject.toml'"): (
        "the folder holds no Python package: it needs a pyproject.toml"
    ),
    ("No matching distribution", "not found in the package registry", "Invalid requirement"): (
        "there is no such package for this Python; is its name right?"
    ),
    ("Permission denied",): "the environment cannot be written",
}


@click.command()
@click.argument("packages", metavar="PACKAGE...", nargs=-1, required=True)
@click.option("--upgrade", is_flag=True, help="Take the newest versions, even of what is installed.")
@click.pass_context
def install(context: click.Context, packages: Sequence[str], upgrade: bool) -> None:
    """Install plugins; torch stays as it is.

    PACKAGE is what pip takes: a name, a folder, a wheel, a git address. It goes to the environment that runs ssl.

    \b
    ssl plugins install selfsup-jigsaw                          from the package index
    ssl plugins install ./selfsup-mine dist/mine-1.0.whl        from here
    ssl plugins install git+https://example.org/mine.git
    """
    plugins = plugins_of(context)
    before = {kind: rows(plugins, kind) for kind in KINDS}
    command = installer()
    wanted = [as_path(package) for package in packages]
    kept = pins()
    if kept:
        click.echo(f"{click.style('keeping', bold=True)}   {', '.join(kept)}: other versions are not installed")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(kept) + "\n")
        run([*command, *(["--upgrade"] if upgrade else []), "-c", str(constraints), *wanted], wanted)
    report(before, listed())


def installer() -> list[str]:
    """The command that installs into this environment."""
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    if uv := shutil.which("uv"):
        click.echo(f"{click.style('using', bold=True)}     uv, as this environment has no pip")
        return [uv, "pip", "install", "--python", sys.executable]
    raise PluginError(
        f"the environment of {sys.executable} has no pip, and no uv is on the path. "
        f"Add pip to it: {sys.executable} -m ensurepip; or install uv, which is then used"
    )


def pins() -> list[str]:
    """torch==... and triton==... as they are installed."""
    out = []
    for name in KEPT:
        try:
            out.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return out


def as_path(package: str) -> str:
    """A folder here that holds a package is meant by its name too, not a stranger's package on the index."""
    folder = Path(package)
    if "/" in package or not any((folder / file).is_file() for file in ("pyproject.toml", "setup.py")):
        return package
    click.echo(f"{click.style('taking', bold=True)}    the folder {package} that is here")
    return f"./{package}"


def run(command: Sequence[str], wanted: Sequence[str]) -> None:
    """Run the installer, with its newest line in sight; a PluginError says what its last ones mean if it fails."""
    names = " ".join(wanted)
    lines: deque[str] = deque(maxlen=200)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with Console(stderr=True).status(f"installing {names}") as status, subprocess.Popen(command, **pipes) as process:
        for line in filter(None, map(str.strip, process.stdout or ())):
            lines.append(line)
            status.update(Text(line, "dim", no_wrap=True))
    if code := process.returncode:
        said, last = "\n".join(lines), "\n".join(f"  {line}" for line in list(lines)[-LAST:])
        why = next((why for words, why in REASONS.items() if any(w in said for w in words)), f"it ended with {code}")
        raise PluginError(f"{names} could not be installed: {why}. The installer's last lines:\n{last}")


def listed() -> Table:
    """All plugins, as a new process sees them: this one does not search what was just added to its path."""
    command = [sys.executable, "-m", "selfsup.cli", "plugins", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PluginError(f"it was installed, but the plugins cannot be listed any more: {done.stderr.strip()}")
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return {kind: [Row(**row) for row in own] for kind, own in found.items()}


def report(before: Table, after: Table) -> None:
    """Show what is new or has another version, and warn of what clashes or does not parse."""
    was = {(kind, row.name): row for kind, own in before.items() for row in own}
    fresh = [(kind, row) for kind, own in after.items() for row in own if was.get((kind, row.name)) != row]
    for kind, row in fresh:
        if row.broken:
            click.secho(f"warning: {SINGULAR[kind]} {row.name}: {row.summary}", fg="red", err=True)
            continue
        old = was.get((kind, row.name))
        word = "new" if old is None else "changed"
        title = click.style(f"{SINGULAR[kind]} {row.name}", bold=True)
        click.echo(f"{click.style(f'{word:<10}', bold=True)}{title} of {row.distribution}: {row.summary}")
    if not fresh:
        click.echo("no plugin is new: these packages were installed already, or bring none; see: ssl plugins")
    elif names := [row.name for _, row in fresh if not row.broken]:
        click.echo(f"{'next':<10}ssl plugins {names[0]}")
