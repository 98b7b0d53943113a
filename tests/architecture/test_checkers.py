"""The linter, the formatter and the type checker have nothing to say."""

from __future__ import annotations

import subprocess
import sys

PACKAGES = {
    "kernel": "kernel",
    "cli": "cli",
    "plugins": "plugins",
    "triton_ops": "triton_ops",
    "testing": "tests/contracts",
}


def check(*command, cwd):
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"


def test_ruff(root):
    check("ruff", "check", "--no-cache", ".", cwd=root)


def test_format(root):
    check("ruff", "format", "--no-cache", "--check", ".", cwd=root)


def test_types(root, tmp_path):
    # The mapping of folders to packages is setuptools' own: a tree of links shows it to mypy.
    (tmp_path / "selfsup").mkdir()
    for package, folder in PACKAGES.items():
        (tmp_path / "selfsup" / package).symlink_to(root / folder)
    options = ["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache")]
    check("mypy", *options, "-p", "selfsup", cwd=tmp_path)
