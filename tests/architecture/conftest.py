"""The repository's own source, as the tests of the architecture read it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selfsup.kernel.config import tomllib

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("kernel", "plugins", "triton_ops", "cli")
NOT_OURS = {"__pycache__", "build", "dist", "runs", "shared"}


def walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in NOT_OURS or path.name.endswith(".egg-info") or (path.name[0] == "." and path.name != ".ci"):
            continue
        if path.is_dir():
            yield from walk(path)
        else:
            yield path


class Source:
    """One Python file."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.relative_to(ROOT).as_posix()
        self.text = path.read_text("utf-8")
        self.tree = ast.parse(self.text)

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def filled_lines(self) -> int:
        return sum(1 for line in self.text.splitlines() if line.strip())

    @property
    def code_lines(self) -> int:
        """Lines that are neither blank, comment nor docstring."""
        documented: set[int] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        lines = enumerate(self.text.splitlines(), 1)
        return sum(1 for n, line in lines if line.strip() and line.strip()[0] != "#" and n not in documented)

    def imports(self) -> Iterator[tuple[str, bool]]:
        """(absolute module, whether for type checkers alone) of every import, wherever it stands."""
        lazy = {
            id(inner)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            for statement in node.body
            for inner in ast.walk(statement)
        }
        package = ["selfsup", *self.path.relative_to(ROOT).parts[:-1]]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, id(node) in lazy) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                yield ".".join([*above, *([node.module] if node.module else [])]), id(node) in lazy


@pytest.fixture(scope="session")
def sources() -> dict[str, list[Source]]:
    """{folder: its files}."""
    return {folder: [Source(p) for p in walk(ROOT / folder) if p.suffix == ".py"] for folder in FOLDERS}


@pytest.fixture(scope="session")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="session")
def files() -> list[Path]:
    """Every file of the repository."""
    return list(walk(ROOT))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT
