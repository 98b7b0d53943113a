"""A group of commands of which one need not be named: `ssl plugins simclr` is `ssl plugins show simclr`."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem


class Shorthand(click.Group):
    """A group that hands what begins with none of its commands' names to the command `default`.

    A command wins over a value of the same name; the value is reached by naming the default command:
    `ssl plugins show new` shows a plugin called "new".
    """

    def __init__(self, *args: Any, default: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command's name in front where no command was named."""
        named = bool(args) and (args[0] in self.commands or args[0] in ctx.help_option_names)
        # Where a shell asks what could come next, nothing is settled yet.
        if not named and (args or not ctx.resilient_parsing):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names of the commands, and whatever the default command takes."""
        command = self.commands[self.default]
        first = next((p for p in command.params if isinstance(p, click.Argument)), None)
        values = first.shell_complete(ctx, incomplete) if first and incomplete[:1] != "-" else []
        return [*super().shell_complete(ctx, incomplete), *command.shell_complete(ctx, incomplete), *values]
