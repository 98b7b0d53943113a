"""The repository speaks of the project alone, and of nothing that only one machine has."""

from __future__ import annotations

import re

TEXT = {".py", ".md", ".toml", ".txt", ".json", ".cfg", ".sh", ".yml", ".yaml", ""}
# In pieces, so that this file passes its own test.
MACHINE = re.compile(
    "|".join(
        [
            r"/(?:work|root|home|Users|opt)/" + r"\w",
            r"/tmp/" + r"\w",
            r"file:" + r"///",
            r"--(?:extra-)?index-url",
            r"--find-" + "links",
            r"py" + r"torch\.org/whl",
        ]
    )
)
UNFINISHED = re.compile(r"\b(?:TO" + "DO|FIX" + "ME|X" + r"XX)\b")


def test_no_text_names_a_machine_or_a_registry(files, root):
    for path in files:
        if path.suffix in TEXT:
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                assert not MACHINE.search(line), f"{path.relative_to(root)}:{number}: {line.strip()}"


def test_nothing_is_left_for_later(files, root):
    for path in files:
        if path.suffix in TEXT:
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                assert not UNFINISHED.search(line), f"{path.relative_to(root)}:{number}: {line.strip()}"


def test_constraints_pin_every_dependency(pyproject, root):
    pins = (root / "constraints.txt").read_text().splitlines()
    pins = [line for line in pins if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins), "a name and a version, nothing else"
    names = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in pins}
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [
        d for extra in (extras["dev"], *map(extras.get, ["image", "audio", "data", "eval"])) for d in extra
    ]
    for requirement in wanted:
        name = re.match(r"[\w-]+", requirement)[0].lower()
        assert name in names | {"selfsup", "tomli"}, f"{requirement} is not pinned"


def test_every_extra_is_in_all_or_says_why_not(pyproject):
    extras = pyproject["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(re.search(r"\[(.*)\]", everything)[1].split(","))
    assert set(extras) - named == {"all", "dev", "gpu"}  # a GPU's, and the developers'
