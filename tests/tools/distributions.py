"""Distributions that nobody installed: their metadata and modules lie in a folder, which is put on the path."""

from __future__ import annotations

import os
from pathlib import Path

# Of tests/cli/toy_plugins.py.
TOYS = """
[selfsup.objectives]
guess = toy_plugins:Guess
[selfsup.modalities]
numbers = toy_plugins:Numbers
[selfsup.backbones]
mixer = toy_plugins:Mixer
"""


def install(folder: Path, name: str, entry_points: str, version: str = "1.0", **modules: str) -> Path:
    """Write a distribution with modules, given by their text, into a folder; where its metadata lie."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    return info


def on_path(folder: Path) -> dict[str, str]:
    """The environment of a process that finds what lies in a folder, beside what this one finds."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
