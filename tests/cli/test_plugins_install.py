"""`ssl plugins install`: what is run, what is kept, what is said; the network is never needed."""

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from selfsup.cli import plugins_install
from selfsup.cli.installed import Row
from selfsup.cli.plugins_new import package, wording, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The python of a new environment that sees what is installed here, this checkout too, and packages to install."""
    folder = tmp_path_factory.mktemp("place")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    (Path(site) / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for kind, name in (("service", "largest"), ("objective", "turns"), ("objective", "simclr")):
        write(folder / f"selfsup-{name}", package(kind, wording(name, kind)))
    return folder


def install(place, *words, code=0):
    """`ssl plugins install` in that environment; what it says, both ways."""
    environment = {"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "COLUMNS": "200"}
    command = [place / "venv/bin/python", "-m", "selfsup.cli", "plugins", "install", *words]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_a_folder_is_installed_and_what_is_new_is_shown(place):
    out, err = install(place, "./selfsup-largest")
    assert f"torch=={importlib.metadata.version('torch')}" in out
    (line,) = [line for line in out.splitlines() if line.startswith("new")]
    assert line.split()[1:6] == ["service", "largest", "of", "selfsup-largest", "0.1.0:"]
    assert "write to RUN/largest.jsonl" in line
    assert "next      ssl plugins largest" in out
    assert err == ""
    again, _ = install(place, "./selfsup-largest")
    assert "no plugin is new" in again


def test_a_folder_here_is_meant_by_its_bare_name(place):
    out, _ = install(place, "selfsup-turns")
    assert "the folder selfsup-turns that is here" in out
    assert "objective turns of selfsup-turns 0.1.0" in out


def test_a_wheel_that_clashes_is_installed_with_a_warning(place, tmp_path):
    source = shutil.copytree(place / "selfsup-simclr", tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", tmp_path, source], check=True)
    out, err = install(place, *tmp_path.glob("*.whl"))
    version = importlib.metadata.version("selfsup")
    assert f"warning: objective simclr: the objective 'simclr' is claimed by selfsup {version}" in err
    assert "and by selfsup-simclr 0.1.0; say which, as in selfsup:simclr" in err
    assert "new" not in out


def test_a_package_that_is_nowhere(place):
    _, err = install(place, "selfsup-nowhere", code=1)
    assert err.startswith("error: selfsup-nowhere could not be installed: there is no such package for this Python")
    assert "No matching distribution found for selfsup-nowhere" in err
    assert "Traceback" not in err


def test_a_package_that_wants_another_torch_is_refused(place, tmp_path):
    source = shutil.copytree(place / "selfsup-turns", tmp_path / "greedy")
    text = (source / "pyproject.toml").read_text()
    (source / "pyproject.toml").write_text(text.replace("dependencies = [", 'dependencies = ["torch<2",'))
    _, err = install(place, source, code=1)
    assert "what it needs does not go together with what stays" in err
    assert "torch<2" in err


def test_pip_is_the_one_of_this_python_and_torch_is_pinned(ssl, monkeypatch):
    seen = {}

    def fake(command, wanted):
        at = command.index("-c")
        seen.update(command=command[:at], pins=Path(command[at + 1]).read_text().split(), rest=command[at + 2 :])

    monkeypatch.setattr(plugins_install, "run", fake)
    words = ["git+https://example.org/x.git", "x-1.0-py3-none-any.whl", "name>=2"]
    ssl("plugins", "install", "--upgrade", *words)
    assert seen["command"][:4] == [sys.executable, "-m", "pip", "install"]
    assert seen["command"][-1] == "--upgrade"
    assert seen["rest"] == words
    assert f"torch=={importlib.metadata.version('torch')}" in seen["pins"]


def test_without_pip_uv_is_used_or_the_way_out_is_said(ssl, monkeypatch, tmp_path):
    monkeypatch.setattr(plugins_install, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    err = ssl("plugins", "install", "x", code=1)[1]
    assert "has no pip, and no uv is on the path" in err
    assert "-m ensurepip" in err
    (tmp_path / "uv").write_text('#!/bin/sh\necho "$@" >&2\necho "dns error" >&2\nexit 2\n')
    (tmp_path / "uv").chmod(0o755)
    out, err = ssl("plugins", "install", "x", code=1)
    assert "uv, as this environment has no pip" in out
    assert f"pip install --python {sys.executable} -c" in err
    assert "the package index cannot be reached" in err


def test_a_new_version_is_a_change_and_not_a_new_plugin(capsys):
    kinds = {"objectives": [Row("a", "x 1.0", "One.")], "services": []}
    after = {"objectives": [Row("a", "x 2.0", "Two.")], "services": []}
    plugins_install.report(kinds, after)
    assert capsys.readouterr().out.splitlines() == ["changed   objective a of x 2.0: Two.", "next      ssl plugins a"]
