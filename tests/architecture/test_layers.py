"""Who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

KERNEL_MAY_IMPORT = {"torch", "numpy", "pluggy", "pydantic", "safetensors", "xxhash", "tomli", "selfsup"}


def outside(source, *packages):
    """What a file imports of these packages of ours."""
    return [m for m, _ in source.imports() if any(f"{m}.".startswith(f"selfsup.{p}.") for p in packages)]


def test_the_kernel_stands_on_little(sources):
    for source in sources["kernel"]:
        foreign = {m.partition(".")[0] for m, _ in source.imports()} - sys.stdlib_module_names
        assert foreign <= KERNEL_MAY_IMPORT, source.name


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("kernel", ("plugins", "cli", "triton_ops", "testing")),
        ("triton_ops", ("plugins", "cli", "testing")),
        ("plugins", ("cli", "testing")),
        ("cli", ("testing",)),
    ],
)
def test_nothing_imports_what_stands_on_it(sources, folder, above):
    assert sources[folder]
    for source in sources[folder]:
        assert outside(source, *above) == [], source.name


def test_plugins_of_one_kind_know_none_of_another_kind(sources):
    """Objectives, modalities and backbones meet in the contract, and share tools in plugins/common alone."""
    kinds = ("objectives", "modalities", "backbones", "services")
    for source in sources["plugins"]:
        own = source.name.split("/")[1]
        others = [f"plugins.{kind}" for kind in kinds if kind != own]
        assert outside(source, *others) == [], source.name


def test_an_objective_knows_of_other_processes_only_gather(sources):
    for source in sources["plugins"]:
        if source.name.startswith("plugins/objectives/"):
            assert "torch.distributed" not in {m for m, _ in source.imports()}, source.name
            assert not {"rank", "world", "all_reduce"} & set(shared_by(source)), source.name


def shared_by(source):
    """What a file imports from kernel/distributed.py."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("distributed"):
            yield from (alias.name for alias in node.names)


def test_importing_the_package_imports_no_torch():
    source = "import sys, selfsup.kernel, selfsup.cli; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
