"""A group of which one command need not be named."""

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from selfsup.cli.group import Shorthand


@click.group(cls=Shorthand, default="show")
def shop():
    """Sell things."""


@shop.command()
@click.argument("thing", required=False, shell_complete=lambda *_: ["pear", "plum"])
@click.option("--loud", is_flag=True)
def show(thing, loud):
    """Show a thing."""
    click.echo(f"show {thing} {loud}")


@shop.command()
@click.argument("thing")
def new(thing):
    """Make a thing."""
    click.echo(f"new {thing}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "show None False"),
        (["pear"], "show pear False"),
        (["--loud"], "show None True"),
        (["--loud", "pear"], "show pear True"),
        (["pear", "--loud"], "show pear True"),
        (["show", "pear"], "show pear False"),
        (["show", "new"], "show new False"),
        (["new", "new"], "new new"),
    ],
)
def test_what_is_no_command_goes_to_the_one_that_need_not_be_named(words, said):
    done = CliRunner().invoke(shop, words)
    assert (done.exit_code, done.output.strip()) == (0, said)


@pytest.mark.parametrize(("words", "said"), [(["--help"], "Sell things."), (["pear", "--help"], "Show a thing.")])
def test_help_is_of_what_was_named(words, said):
    assert said in CliRunner().invoke(shop, words).output


def test_a_wrong_option_is_one_of_the_command():
    done = CliRunner().invoke(shop, ["--loudd"])
    assert done.exit_code == 2
    assert "--loud" in done.output


@pytest.mark.parametrize(
    ("words", "incomplete", "offered"),
    [
        ([], "", ["new", "show", "pear", "plum"]),
        ([], "p", ["pear", "plum"]),
        ([], "n", ["new"]),
        ([], "--l", ["--loud"]),
        (["pear"], "--l", ["--loud"]),
        (["--loud"], "", ["pear", "plum"]),
        (["new"], "", []),
    ],
)
def test_a_shell_is_offered_commands_and_values(words, incomplete, offered):
    found = ShellComplete(shop, {}, "shop", "_SHOP").get_completions(words, incomplete)
    assert [item.value for item in found if item.value.startswith(incomplete)] == offered
