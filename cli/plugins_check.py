"""Import every plugin in a process of its own, and tell the good from the broken.

torch is imported once, here; each plugin then in a fork, which may hang, exit or die as it likes: it has LIMIT seconds,
is killed with all that it started, and leaves at most a line through a pipe. Nothing of a plugin is imported here.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfsup.kernel.discovery import SINGULAR, Found, Plugins
from selfsup.kernel.errors import PluginError

LIMIT = 10.0  # seconds that an import may take


@dataclass
class Verdict:
    """What an import of one plugin showed."""

    kind: str
    name: str
    distribution: str
    reason: str = ""  # why it is broken; nothing if it is good
    trace: str = ""  # the whole traceback
    contract: int | None = None
    options: int | None = None  # how many it has
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether it can be used."""
        return not self.reason


def check_all(plugins: Plugins, kinds: Sequence[str], name: str | None, as_json: bool, whole: bool) -> int:
    """Check all plugins of these kinds, or those of a name, and say so; the exit code."""
    names = {kind: [name] if name else plugins.names(kind) for kind in kinds}
    found = [f for kind, own in names.items() for each in own for f in plugins.claims(kind, each)]
    verdicts = [*examined(found), *_damaged(plugins, name)]
    for verdict, one in zip(verdicts, found, strict=False):
        verdict.reason = verdict.reason or _refused(plugins, one, name)
    if as_json:
        click.echo(json.dumps([{**asdict(v), "good": v.good} for v in verdicts], indent=2))
    else:
        _print(verdicts, whole)
    return 0 if all(verdict.good for verdict in verdicts) else 1


def examined(found: Sequence[Found], limit: float = LIMIT) -> list[Verdict]:
    """A verdict on each, in order; as many at once as there are processors."""
    import_module("torch._dynamo")  # ahead of the forks: what takes long and is needed by nearly all
    import_module("selfsup.kernel.compose")
    import_module("selfsup.kernel.fitness")

    out: dict[int, Verdict] = {}
    left = list(range(len(found)))[::-1]
    running: dict[Any, tuple[int, Trial]] = {}
    while left or running:
        while left and len(running) < max(2, os.cpu_count() or 1):
            trial = Trial(found[number := left.pop()], limit)
            running[trial.pipe] = number, trial
        first = min(trial.end for _, trial in running.values())
        ready = wait(list(running), timeout=max(0.0, first - time.monotonic()))
        for pipe in [pipe for pipe, (_, trial) in running.items() if pipe in ready or time.monotonic() >= trial.end]:
            number, trial = running.pop(pipe)
            out[number] = trial.verdict(pipe in ready)
    return [out[number] for number in range(len(found))]


class Trial:
    """An import under way in another process."""

    def __init__(self, found: Found, limit: float) -> None:
        self.found, self.limit, self.began = found, limit, time.monotonic()
        self.end = self.began + limit
        self.pipe, theirs = get_context("fork").Pipe(duplex=False)
        sys.stdout.flush()
        sys.stderr.flush()
        if not (pid := os.fork()):
            self.pipe.close()
            _inside(found, theirs)
        self.pid = pid
        theirs.close()

    def verdict(self, heard: bool) -> Verdict:
        """What came of it; whatever it started is gone then."""
        out = Verdict(SINGULAR[self.found.kind], self.found.name, self.found.distribution)
        out.seconds = round(time.monotonic() - self.began, 2)
        facts: dict[str, Any] = {} if heard else {"reason": f"its import did not end in {self.limit:g} s"}
        if heard:
            with suppress(EOFError, OSError, ValueError):  # it died, or wrote what is no verdict
                facts = json.loads(self.pipe.recv_bytes())
        with suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pipe.close()
        if "reason" not in facts:
            how = f"died of {signal.Signals(-ended).name}" if ended < 0 else f"ended with exit code {ended}"
            facts = {"reason": f"its import ended the process: it {how}"}
        vars(out).update(facts)
        return out


def _inside(found: Found, pipe: Connection) -> None:
    """In the fork: import, say what was found, and end at once, whatever threads there are."""
    os.setsid()
    silence = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(silence, number)
    facts: dict[str, Any] = {"reason": ""}
    end = os._exit
    try:
        plugin = found.load()
        facts |= {"contract": _contract(found, plugin), "options": _options(found, plugin)}
    except BaseException as cause:
        trace = "".join(traceback.format_exception(cause.__cause__ or cause))
        plain = str(cause).partition(". Go on without it: ")[0] if isinstance(cause, PluginError) else repr(cause)
        facts = {"reason": plain.removeprefix(f"{found} "), "trace": trace}
    with suppress(OSError):
        pipe.send_bytes(json.dumps(facts).encode())
    end(0)


def _contract(found: Found, plugin: Any) -> int | None:
    from selfsup.kernel.contracts import CONTRACT

    return None if found.kind == "commands" else getattr(plugin, "contract", CONTRACT)


def _options(found: Found, plugin: Any) -> int | None:
    from selfsup.kernel.config import check, schema

    if found.kind == "commands":
        if not isinstance(plugin, click.Command):
            raise PluginError(f"{found} is no click.Command but a {type(plugin).__name__}")
        return None
    if found.kind == "services":  # each run makes one of each
        plugin(**check(found.name, plugin, {}))
    return len(schema(plugin).model_fields)


def _refused(plugins: Plugins, found: Found, name: str | None) -> str:
    """Why a plugin that can be imported is not: another distribution has its name."""
    asked = name or found.name
    try:
        chosen = plugins.find(found.kind, asked)
    except PluginError as clash:
        return str(clash)
    return "" if chosen == found else f"its name is one of {chosen.distribution}; in full: {found.full_name}"


def _damaged(plugins: Plugins, name: str | None) -> list[Verdict]:
    return [] if name else [Verdict("distribution", owner, owner, why) for owner, why in plugins.damaged.items()]


def _print(verdicts: Sequence[Verdict], whole: bool) -> None:
    console = Console(highlight=False)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("kind", "plugin", "distribution", "contract", "options", "seconds", ""):
        grid.add_column(column, overflow="fold", justify="right" if column in ("options", "seconds") else "left")
    for v in verdicts:
        numbers = ["" if value is None else str(value) for value in (v.contract, v.options)]
        said = Text(f"broken: {v.reason.splitlines()[-1]}", "red") if v.reason else Text("good", "green")
        grid.add_row(v.kind, Text(v.name, "bold"), v.distribution, *numbers, f"{v.seconds:.2f}", said)
    console.print(grid)
    for v in verdicts if whole else ():
        if v.trace:
            console.print(Text(f"{v.kind} {v.name} of {v.distribution}\n", "bold"), Text(v.trace), sep="")
    broken = sum(not v.good for v in verdicts)
    more = "; --debug shows the tracebacks" if broken and not whole else ""
    console.print(f"{len(verdicts) - broken} good, {broken} broken{more}")
