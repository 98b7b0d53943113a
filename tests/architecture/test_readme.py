"""The README says what the code says, and what it shows is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_code():
    text = (ROOT / "README.md").read_text("utf-8")
    assert tables().filled(text) == text, "run: python docs/tables.py"


def test_every_link_within_the_repository_leads_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_documented_option_exists():
    """Options on command lines in the documentation are options of `ssl` and of torchrun."""
    from torch.distributed.run import get_args_parser

    from selfsup.cli.eval import evaluate
    from selfsup.cli.train import train

    known = {word for action in get_args_parser()._actions for word in action.option_strings}
    commands = [train, *evaluate.commands.values()]
    known |= {word for command in commands for parameter in command.params for word in parameter.opts}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        whole = page.read_text("utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?:ssl|torchrun) .*$", whole, re.M):
            assert set(re.findall(r"(?<=\s)--[a-z-]+", line.partition("#")[0])) <= known, line
