"""`ssl plugins new`: each kind of package is installed, passes its own tests and trains, as its author would see it."""

import os
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from selfsup.cli.plugins_new import PLURAL, checked, package, wording, write
from selfsup.kernel import Plugins
from selfsup.kernel.config import tomllib
from selfsup.kernel.errors import ConfigError, PluginError

NAMES = {"objective": "turns", "modality": "tide_gauge", "backbone": "mix2", "service": "largest"}


def run(command, folder, **environment):
    own = {"cwd": folder, "env": os.environ | environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **own)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A package of each kind, installed into a folder of its own, without the network."""
    here = tmp_path_factory.mktemp("made")
    folders = {}
    for kind, name in NAMES.items():
        words = wording(name, kind)
        folders[kind] = here / words["distribution"]
        write(folders[kind], package(kind, words))
    copies = here / "copies"  # pip leaves its build in the folder that it is given
    for folder in folders.values():
        shutil.copytree(folder, copies / folder.name)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    run([*pip, "--target", here / "site", *copies.iterdir()], here)
    return SimpleNamespace(folders=folders, site=here / "site")


@pytest.mark.parametrize("kind", NAMES)
def test_its_tests_pass(made, kind):
    path = os.pathsep.join([str(made.site), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    said = run(command, made.folders[kind], PYTHONPATH=path)
    assert " passed" in said
    assert "skipped" not in said


@pytest.mark.parametrize("kind", NAMES)
def test_it_is_listed_and_trains_by_the_command_that_is_printed(made, kind, ssl):
    shutil.copytree(made.site, ssl.path, dirs_exist_ok=True)
    name = NAMES[kind]
    words = wording(name, kind)
    said, _ = ssl("plugins", name)
    assert said.startswith(f"{kind} {name} {words['distribution']} 0.1.0")
    _, *command = shlex.split(words["train"].replace("\\\n", " "))
    small = ["--steps", 1, "--batch", 4, "--device", "cpu", "--set", "data.workers=0", "--out", "out"]
    ssl(*command, *small, "--set", "largest.every=1")
    assert (ssl.folder / "out/checkpoints/step-00000001").is_dir()
    assert (ssl.folder / "out/largest.jsonl").is_file()


@pytest.mark.parametrize("kind", NAMES)
def test_linter_and_formatter_have_nothing_to_say(made, kind):
    plain = ["--isolated", "--no-cache", "--config", "line-length = 120"]
    rules = ["--select", "E,F,I,UP,B,SIM,RUF,C4,PT"]
    run([sys.executable, "-m", "ruff", "check", *plain, *rules, "."], made.folders[kind])
    run([sys.executable, "-m", "ruff", "format", "--check", *plain, "."], made.folders[kind])


@pytest.mark.parametrize("kind", NAMES)
def test_a_package_is_whole(made, kind):
    folder, name = made.folders[kind], NAMES[kind]
    assert {path.name for path in folder.iterdir() if path.name[0] != "_"} >= {
        *("pyproject.toml", "README.md", ".gitignore", f"selfsup_{name}.py", f"test_{name}.py")
    }
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    assert list(project["entry-points"]) == [f"selfsup.{PLURAL[kind]}"]
    assert "license" not in project  # the author's choice
    readme = (folder / "README.md").read_text("utf-8")
    for command in ("pip install -e", "pytest", wording(name, kind)["train"], "python -m build", "twine upload"):
        assert command in readme


def test_next_steps_are_printed(ssl):
    out, _ = ssl("plugins", "new", "my-turns", "--kind", "objective")
    for command in ("pip install -e 'selfsup-my-turns[dev]'", "pytest selfsup-my-turns", "ssl train --plugin my_turns"):
        assert command in out
    assert (ssl.folder / "selfsup-my-turns/selfsup_my_turns.py").is_file()


def test_the_folder_can_be_chosen_and_must_be_new(ssl):
    ssl("plugins", "new", "a", "--kind", "service", "--out", "deep/er")
    before = {path: path.read_text() for path in (ssl.folder / "deep/er").iterdir()}
    err = ssl("plugins", "new", "b", "--kind", "backbone", "--out", "deep/er", code=1)[1]
    assert "there is a folder 'deep/er' already, and nothing was changed; choose another with --out" in err
    assert before == {path: path.read_text() for path in (ssl.folder / "deep/er").iterdir()}


def test_a_folder_that_cannot_be_written_is_said(ssl):
    (ssl.folder / "file").touch()
    err = ssl("plugins", "new", "a", "--kind", "service", "--out", "file/a", code=1)[1]
    assert "the folder file/a cannot be written: Not a directory" in err


def test_a_name_that_is_taken_names_its_owner(toys):
    err = toys("plugins", "new", "guess", "--kind", "objective", code=1)[1]
    assert "the objective 'guess' is there already, of toys 1.0; choose another name" in err
    toys("plugins", "new", "guess", "--kind", "backbone")  # of another kind it is free
    assert not (toys.folder / "guess").exists()


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("2d", "as in 'd'"),
        ("MyTask", "as in 'mytask'"),
        ("a b", "as in 'a_b'"),
        ("no.dots", "as in 'no_dots'"),
        ("ümlaut", "as in 'mlaut'"),
        ("end-", "as in 'end'"),
        ("", "as in 'my_backbone'"),
        ("../up", "as in 'up'"),
        ("class", "'class' is a word of Python's own"),
        ("a\n", "as in 'a'"),
    ],
)
def test_a_name_must_be_one_in_python(asked, hint):
    with pytest.raises(ConfigError, match=hint):
        checked(Plugins(), "backbone", asked)


def test_names_with_a_meaning_of_their_own_are_refused():
    for kind, name in (("modality", "none"), ("service", "train")):
        with pytest.raises(ConfigError, match="means something else in a run file"):
            checked(Plugins(), kind, name)
    assert checked(Plugins(), "objective", "no-ne") == "no_ne"


def test_a_name_claimed_twice_is_taken_too(toys):
    toys.distribution("other", "[selfsup.backbones]\nmixer = toy_plugins:Mixer\n")
    with pytest.raises(PluginError, match=r"claimed by other 1\.0 and by toys 1\.0"):
        checked(Plugins(), "backbone", "mixer")


def test_a_plugin_named_as_a_command_is_shown_by_its_full_command(toys):
    toys.distribution("news", "[selfsup.backbones]\nnew = toy_plugins:Mixer\n")
    assert "new" in toys("plugins", "--kind", "backbones")[0].split()
    assert toys("plugins", "show", "new")[0].startswith("backbone new news 1.0")
    assert "Missing argument 'NAME'" in toys("plugins", "new", code=2)[1]


def test_a_kind_that_is_missing_or_wrong_says_which_there_are(ssl):
    for words in (["x"], ["x", "--kind", "objektive"]):
        err = ssl("plugins", "new", *words, code=2)[1]
        assert all(kind in err for kind in NAMES), err
    assert list(ssl.folder.iterdir()) == []
