"""What is listed is read, not imported."""

from __future__ import annotations

import subprocess
import sys

from selfsup.cli.installed import rows, source_of, summary
from selfsup.kernel.discovery import KINDS, Plugins

FIRST = '"""Guess the rest.\n\nLong."""\nraise RuntimeError\n'


def test_a_summary_is_the_first_line_of_the_module(ssl, monkeypatch):
    ssl.distribution("dist-a", "[selfsup.objectives]\nmine = stranger_a:Mine\n", stranger_a=FIRST)
    ssl.distribution("dist-b", "[selfsup.objectives]\nother = stranger_b:Mine\n", stranger_b="def broken(:")
    monkeypatch.syspath_prepend(str(ssl.path))
    said = {row.name: row for row in rows(Plugins(), "objectives")}
    assert (said["mine"].summary, said["mine"].broken) == ("Guess the rest.", False)
    assert said["other"].broken
    assert said["other"].summary.startswith("cannot be read: SyntaxError: ")
    assert "stranger_a" not in sys.modules


def test_every_builtin_has_a_summary():
    plugins = Plugins()
    for kind in KINDS:
        for name in plugins.names(kind):
            assert len(summary(plugins.find(kind, name))) > 10, (kind, name)


def test_a_source_that_is_not_there():
    assert source_of("surely_missing.module") is None
    assert source_of("selfsup.kernel.surely_missing") is None
    assert source_of("math") is None


def test_listing_imports_neither_torch_nor_a_plugin():
    source = (
        "import sys; from selfsup.cli.installed import rows; from selfsup.kernel.discovery import KINDS, Plugins\n"
        "p = Plugins(); [rows(p, k) for k in KINDS]\n"
        "print([m for m in ('torch', 'numpy', 'selfsup.plugins.objectives') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
