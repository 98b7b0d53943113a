"""A wheel in a fresh environment is as good as the checkout, and so is a stranger's plugin beside it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

from selfsup.kernel import Plugins
from selfsup.kernel.discovery import KINDS

ROOT = Path(__file__).parent.parent
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "shared")
EXAMPLE = ROOT / "examples" / "jigsaw"


def run(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    """What a command prints; it fails the test with all it said."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(source: Path, wheels: Path) -> Path:
    """The wheel of a clean copy of a project."""
    copy = wheels / "source" / source.name
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    before = set(wheels.glob("*.whl"))
    run([*pip, "-w", wheels, copy], wheels)
    (wheel,) = set(wheels.glob("*.whl")) - before
    return wheel


class Fresh:
    """A virtual environment that has this one's dependencies, and of selfsup the wheel alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.wheels = folder, folder / "wheels"
        self.wheels.mkdir()
        run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
        self.python = folder / "venv" / "bin" / "python"
        self.site = Path(
            run([self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder)[:-1]
        )
        # A plain path in a .pth file: the folder is searched, but its own .pth files, which make editable
        # installs work, are not read.
        (self.site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def install(self, source: Path) -> None:
        wheel = build(source, self.wheels)
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--no-deps", "--no-index"]
        run([*pip, wheel], self.folder)

    def ssl(self, *words: str) -> str:
        return run([self.python.with_name("ssl"), *words], self.folder)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    environment = Fresh(tmp_path_factory.mktemp("fresh"))
    environment.install(ROOT)
    return environment


IMPORT_ALL = """
import importlib, pathlib, selfsup.kernel
root = pathlib.Path(selfsup.kernel.__file__).parent.parent
names = [".".join(("selfsup", *p.relative_to(root).with_suffix("").parts)) for p in sorted(root.rglob("*.py"))]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name.removesuffix(".__init__"))
print(root)
print(*names)
"""


def test_the_wheel_holds_every_module_and_each_imports(fresh):
    root, names = run([fresh.python, "-W", "error", "-c", IMPORT_ALL], fresh.folder).splitlines()[-2:]
    assert Path(root) == fresh.site / "selfsup"
    folders = {"cli": "cli", "kernel": "kernel", "plugins": "plugins", "triton_ops": "triton_ops"}
    ours = {
        ".".join(("selfsup", package, *path.relative_to(ROOT / folder).with_suffix("").parts))
        for package, folder in (folders | {"testing": "tests/contracts"}).items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(names.split()) == ours
    for package in (*folders, "testing"):
        assert (fresh.site / "selfsup" / package / "py.typed").exists(), package


def test_the_wheel_lists_every_builtin_plugin(fresh):
    listed = fresh.ssl("plugins")
    plugins = Plugins()
    for kind in KINDS:
        for name in plugins.names(kind):
            if plugins.find(kind, name).distribution.startswith("selfsup "):
                assert re.search(rf"\b{name}\b", listed), f"{kind} {name}"


def test_the_command_and_the_module_are_one(fresh):
    version = fresh.ssl("--version")
    assert re.search(r"\b\d+\.\d+\.\d+\b", version)
    assert run([fresh.python, "-m", "selfsup.cli", "--version"], fresh.folder) == version


def test_the_licence_travels(fresh):
    (info,) = fresh.site.glob("selfsup-*.dist-info")
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_example_is_installed_tested_and_trained_by_name(fresh):
    fresh.install(EXAMPLE)
    assert re.search(r"jigsaw\b.*selfsup-jigsaw", fresh.ssl("plugins"))
    fresh.ssl("train", "--plugin", "jigsaw", "--steps", "3", "--batch", "8", "--out", "puzzle")
    assert list((fresh.folder / "puzzle" / "checkpoints").glob("step-00000003"))
    tests = shutil.copy(EXAMPLE / "test_jigsaw.py", fresh.folder)
    said = run([fresh.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests], fresh.folder)
    assert re.search(r"\d+ passed", said)
    assert "skipped" not in said


def test_the_wheel_begins_a_plugin(fresh):
    fresh.ssl("plugins", "new", "tides", "--kind", "modality")
    fresh.install(fresh.folder / "selfsup-tides")
    assert re.search(r"tides\b.*selfsup-tides", fresh.ssl("plugins"))


def code_lines(path: Path) -> int:
    """Lines that are neither blank, comment nor docstring."""
    import ast

    source = path.read_text("utf-8")
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for number, line in lines if line.strip() and line.strip()[0] != "#" and number not in documented)


def test_the_example_is_small():
    assert code_lines(EXAMPLE / "selfsup_jigsaw.py") <= 60


def test_the_gate_runs_what_the_readme_says():
    gate = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and line[0] != "#"]
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    tests = [block.splitlines() for block in blocks if re.search(r"^pytest\b", block, re.M)]
    assert len(tests) == 1, "README.md has one block that runs the tests"
    assert gate[-len(tests[0]) :] == tests[0]
    assert "set -euo pipefail" in gate


def test_what_is_installed_is_what_was_declared():
    """A new entry point reaches an editable install only when it is installed again."""
    from selfsup.kernel.config import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    plugins = Plugins()
    for group, entries in declared.items():
        for name, target in entries.items():
            found = plugins.find(group.removeprefix("selfsup."), name)
            assert found.entry.value == target, "run `pip install -e .` again"
