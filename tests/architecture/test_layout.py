"""What is declared is on disk, what is on disk is tested, and files stay small."""

from __future__ import annotations

import ast
import statistics
from importlib import import_module

import pytest

from selfsup.kernel import Backbone, Modality, Objective
from selfsup.kernel.discovery import SINGULAR

KERNEL_LINES = 2_016  # of code: neither blank, comment nor docstring
LONGEST_FILE = 400
MEDIAN_FILE = 120  # lines that are not blank
FUNCTION = 30  # lines, at the 90th percentile

# What has no test file of its own name, and why.
NO_TEST = {
    "cli/outcome.py": "what the commands share; tests/cli/test_train.py and test_check.py go through it",
    "cli/selection.py": "what the commands share; tests/cli/test_train.py and test_explain.py go through it",
    "cli/__main__.py": "two lines; tests/test_packaging.py runs them",
    "kernel/hookspecs.py": "declarations alone; tests/architecture/test_hooks.py holds them to what they say",
    "triton_ops/_launch.py": "part of every op's test",
}


def test_every_folder_is_a_package_that_is_declared(root, pyproject):
    mapped = pyproject["tool"]["setuptools"]["package-dir"]
    found = set()
    for package, folder in mapped.items():
        for path in [root / folder, *(p for p in (root / folder).rglob("*") if p.is_dir() and p.name != "__pycache__")]:
            assert (path / "__init__.py").exists(), path
            found.add(".".join([package, *path.relative_to(root / folder).parts]))
        assert (root / folder / "py.typed").exists(), folder
    assert set(pyproject["tool"]["setuptools"]["packages"]) == found


def test_every_entry_point_is_of_its_kind(pyproject):
    kinds = {"selfsup.objectives": Objective, "selfsup.modalities": Modality, "selfsup.backbones": Backbone}
    groups = pyproject["project"]["entry-points"]
    assert set(groups) <= {f"selfsup.{kind}" for kind in SINGULAR}
    for group, entries in groups.items():
        for name, target in entries.items():
            module, _, attribute = target.partition(":")
            plugin = getattr(import_module(module), attribute)
            if group in kinds:
                assert issubclass(plugin, kinds[group]), name
                assert module == f"selfsup.plugins.{group.removeprefix('selfsup.')}.{name}", "named as people search"
            elif group == "selfsup.services":
                assert any(hasattr(getattr(plugin, m), "selfsup_impl") for m in dir(plugin)), f"{name} has no hook"
            else:
                assert callable(plugin), name


def test_every_plugin_file_is_an_entry_point(root, pyproject):
    for kind in ("objectives", "modalities", "backbones"):
        declared = set(pyproject["project"]["entry-points"][f"selfsup.{kind}"])
        files = {path.stem for path in (root / "plugins" / kind).glob("*.py")} - {"__init__"}
        assert files == declared, kind


def test_every_module_has_a_test_file_in_its_place(root, sources):
    untested = []
    for source in (s for folder in sources.values() for s in folder):
        if source.path.name != "__init__.py" and source.name not in NO_TEST:
            place, stem = root / "tests" / source.path.parent.relative_to(root), source.path.stem.lstrip("_")
            # What is split off an op, such as its kernels, is tested with the op whose name it begins with.
            parts = stem.split("_") if place.name == "triton_ops" else []
            ops = ["_".join(parts[:n]) for n in range(1, len(parts))]
            found = list(place.glob(f"test_{stem}*.py")) or [op for op in ops if (place / f"test_{op}.py").exists()]
            untested += [] if found else [source.name]
    assert untested == []
    for name in NO_TEST:
        assert (root / name).exists(), f"{name} is gone; take it off the list"


def test_test_folders_are_no_packages(root):
    packages = {p.parent.relative_to(root).as_posix() for p in (root / "tests").rglob("__init__.py")}
    assert packages == {"tests/contracts"}


def test_the_kernel_stays_small(sources):
    assert sum(source.code_lines for source in sources["kernel"]) <= KERNEL_LINES


def test_files_stay_small(sources):
    every = [source for folder in sources.values() for source in folder]
    assert [source.name for source in every if source.lines > LONGEST_FILE] == []
    assert statistics.median(source.filled_lines for source in every) <= MEDIAN_FILE


def test_functions_stay_small(sources):
    """Triton kernels are exempt: what is fused cannot be split."""
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for folder in sources.values()
        for source in folder
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list)
    )
    assert lengths[int(0.9 * len(lengths))] <= FUNCTION


@pytest.mark.parametrize("folder", ["kernel", "plugins", "cli", "triton_ops"])
def test_library_code_does_not_assert_on_what_users_pass(sources, folder):
    """An assert narrows a type or states what the code itself made true, and carries no message for people."""
    for source in sources[folder]:
        for node in ast.walk(source.tree):
            assert not (isinstance(node, ast.Assert) and node.msg), f"{source.name}:{node.lineno}: raise an error"
