"""The command `ssl`, and the only place that turns an error into a message.

Commands are entry points of the group `selfsup.commands`: a command is imported when it is called,
so that help, lists and shell completion stay fast and a broken one harms no other.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 a run that a signal stopped, 130 interrupted by Ctrl-C, in a run after
it was saved.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import PluginError, SelfsupError, nearest

from .blame import culprit
from .installed import plugins_of, rows

INTERRUPTED = 130  # the exit code after Ctrl-C, so that a shell does not go on with the next command
PREEMPTED = 75  # the exit code of a run that another signal stopped: EX_TEMPFAIL, "try again"


class Asked(KeyboardInterrupt):
    """A signal, by its name, asked a run to end that had not taken a step yet."""


class Commands(click.Group):
    """A group whose commands are looked up by entry point."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, without importing any."""
        return plugins_of(ctx).names("commands")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command of this name; None if there is none."""
        plugins = plugins_of(ctx)
        if not plugins.claims("commands", cmd_name):
            return None
        command = plugins.load("commands", cmd_name)
        if not isinstance(command, click.Command):
            owner = plugins.find("commands", cmd_name).distribution
            raise PluginError(f"the command {cmd_name!r} of {owner} is no click.Command but a {type(command).__name__}")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names, or a usage error with the nearest match."""
        if not ctx.resilient_parsing and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(f"there is no command {args[0]!r}; {nearest(args[0], self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names and summaries, without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl([(row.name, row.summary) for row in rows(plugins_of(ctx), "commands")])


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with: ssl train --plugin simclr. Without --data it trains on a small built-in sample.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error; may stand anywhere on the line.")
@click.version_option(package_name="selfsup", message="%(package)s %(version)s")
@click.pass_context
def ssl(context: click.Context, debug: bool) -> None:
    """Pretrain models on unlabelled data."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process, which is ours alone where no `args` are given."""
    given = list(sys.argv[1:] if args is None else args)
    at_work = True

    def interrupt(*_: object) -> None:
        if at_work:
            raise KeyboardInterrupt
        os._exit(INTERRUPTED)  # nothing is left to catch it: Python would print a traceback, or die of the signal

    if args is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # soon handlers are called no more
    try:
        code = answer(given)
        at_work = False
    except KeyboardInterrupt as cause:
        at_work = False
        code = interrupted(cause)
    leave(code, at_once=args is None and code in (INTERRUPTED, PREEMPTED))


def answer(given: Sequence[str]) -> int:
    """Run a command line; the exit code."""
    debug = "--debug" in given
    given = [*(["--debug"] if debug else []), *(a for a in given if a != "--debug")]
    plugins = Plugins()
    try:
        code = ssl.main(given, prog_name="ssl", standalone_mode=False, obj=plugins)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and culprit(plugins, error) is None:
            raise  # click's own, for completion
        if debug:
            raise
        code = report(error, plugins)
    return code if isinstance(code, int) else 0


def report(error: BaseException, plugins: Plugins) -> int:
    """Say what went wrong, for people, on stderr; return the exit code."""
    match error:
        case click.Abort():  # what click makes of Ctrl-C
            return interrupted(error.__cause__)
        case click.UsageError():
            say(f"error: {error.format_message()}")
            if error.ctx:
                say(f"       {error.ctx.command_path} --help says what it takes")
            return 2
        case click.ClickException():
            say(f"error: {error.format_message()}")
        case SelfsupError():
            say(f"error: {error}")
            if getattr(error, "by", None) is not None and (found := culprit(plugins, error)):
                say(f"       that is {found}")
        case _:
            found = culprit(plugins, error)
            say(f"error: {f'{found} failed: ' if found else ''}{type(error).__name__}: {error}")
            for owner, why in plugins.damaged.items():  # torch and pydantic read them too, and fail
                say(f"       it may be for the distribution {owner}, {why}: install it again, or uninstall it")
            say("       this was not foreseen; --debug shows where it happened")
    return 1


def interrupted(cause: BaseException | None) -> int:
    """Say that the command did not come to its end; return the exit code."""
    say(f"ended by {cause}" if isinstance(cause, Asked) else "interrupted")
    return PREEMPTED if isinstance(cause, Asked) else INTERRUPTED


def say(text: str) -> None:
    """One line on stderr, with the process's number where there are several."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    click.echo(f"[{os.environ.get('RANK', '0')}] {text}" if several else text, err=True)


def leave(code: int, at_once: bool = False) -> NoReturn:
    """End the process; one of several, and one that Ctrl-C ended, ends at once.

    A thread that waits for the others could hold one that failed. And ending in good order is not safe: gloo's
    threads abort the interpreter now and then (seen in 2 of 6 runs of 4 processes), a model under DDP that is freed
    after its process group was destroyed can wait for ever, and a thread that Ctrl-C left in the middle of writing a
    checkpoint aborts the interpreter too (2 of 10).
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk, or nobody reads it: the exit code says how it went all the same
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if at_once or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)
