"""`ssl plugins`: what is there, whatever state it is in."""

import json
from typing import Annotated, Literal

from selfsup.cli.plugins import _options
from selfsup.kernel import about

OBJECTIVE = "[selfsup.objectives]\n{name} = {module}:{name}\n"


def test_the_list_names_distribution_and_summary(toys):
    lines = toys("plugins")[0].splitlines()
    (line,) = [line for line in lines if line.split()[:1] == ["guess"]]
    assert line.split()[1:7] == ["toys", "1.0", "A", "toy", "of", "every"]
    assert lines[0] == "objectives"


def test_one_kind(toys):
    out, _ = toys("plugins", "--kind", "backbones")
    assert "mixer" in out
    assert "guess" not in out


def test_json(toys):
    table = json.loads(toys("plugins", "--json")[0])
    assert list(table) == ["objectives", "modalities", "backbones", "services", "commands"]
    (row,) = [row for row in table["objectives"] if row["name"] == "guess"]
    assert (row["distribution"], row["broken"]) == ("toys 1.0", False)


def test_a_plugin_shows_paper_presets_and_options(toys):
    out, _ = toys("plugins", "guess")
    for part in ("objective guess toys 1.0", "A. Toy 2020", "preset base", 'modality.name = "numbers"', "preset tiny"):
        assert part in out
    (share,) = [line for line in out.splitlines() if line.strip().startswith("share")]
    assert share.split() == ["share", "float", "0.4", ">", "0,", "<", "1", "of", "nothing", "at", "all"]


def test_names_of_options_are_whole_however_narrow_the_terminal(toys):
    assert "\n solarize_chance " in toys("plugins", "image")[0]


def test_a_plugin_as_json(toys):
    (facts,) = json.loads(toys("plugins", "mixer", "--json")[0])
    assert facts["kind"] == "backbone"
    assert facts["options"] == [
        {"name": "width", "type": "int", "default": "8", "range": ">= 1", "about": "of a token"}
    ]


def test_options_are_described_as_people_write_them():
    def plugin(
        *,
        temperature: Annotated[float, about("of the softmax", gt=0)] = 0.1,
        depth: Annotated[int, about("blocks", ge=1, le=100)] = 12,
        kind: Annotated[Literal["a", "b"], about("which")] = "a",
        workers: Annotated[Annotated[int, about("how many", ge=0)] | Literal["auto"], about("processes")] = "auto",
        means: Annotated[tuple[float, ...] | None, about("of each channel")] = None,
        needed: Annotated[bool, about("has no default")],
    ):
        pass

    shown = [(o["name"], o["type"], o["default"], o["range"]) for o in _options(plugin)]
    assert shown == [
        ("temperature", "float", "0.1", "> 0"),
        ("depth", "int", "12", ">= 1, <= 100"),
        ("kind", "Literal['a', 'b']", '"a"', ""),
        ("workers", "int | Literal['auto']", '"auto"', ""),
        ("means", "tuple[float, ...] | None", '"none"', ""),
        ("needed", "bool", "required", ""),
    ]


def test_a_name_in_several_kinds_shows_each(toys):
    toys.distribution("more", "[selfsup.backbones]\nguess = toy_plugins:Mixer\n")
    facts = json.loads(toys("plugins", "guess", "--json")[0])
    assert [fact["kind"] for fact in facts] == ["objective", "backbone"]
    assert [f["kind"] for f in json.loads(toys("plugins", "guess", "--kind", "backbones", "--json")[0])] == ["backbone"]


def test_a_command_is_shown_too(toys):
    assert "ssl train --help" in toys("plugins", "train")[0]


def test_a_typo_gives_the_nearest_match(toys):
    assert "there is no plugin called 'gues'; did you mean 'guess'?" in toys("plugins", "gues", code=1)[1]
    assert (
        "there is no backbone called 'mixr'; did you mean 'mixer'?"
        in (toys("plugins", "mixr", "--kind", "backbones", code=1)[1])
    )


def test_a_plugin_that_raises_on_import_is_listed_and_named(toys):
    toys.distribution("broken", OBJECTIVE.format(name="Bad", module="bad"), bad="'''A bad one.'''\nimport nowhere")
    assert "A bad one." in toys("plugins")[0]
    err = toys("plugins", "Bad", code=1)[1]
    assert "objective 'Bad' of broken 1.0 could not be imported: ModuleNotFoundError" in err
    assert "SELFSUP_DISABLE=objectives.Bad" in err
    toys("plugins", "guess")


def test_a_disabled_plugin_is_gone(toys, monkeypatch):
    monkeypatch.setenv("SELFSUP_DISABLE", "objectives.guess")
    assert "guess" not in [line.split()[0] for line in toys("plugins")[0].splitlines() if line.strip()]


def test_a_name_claimed_twice_is_said(toys):
    toys.distribution("other", "[selfsup.objectives]\nguess = toy_plugins:Guess\n")
    assert "claimed by other 1.0 and by toys 1.0" in " ".join(toys("plugins")[0].split())
    assert "claimed by other 1.0 and by toys 1.0" in toys("plugins", "guess", code=1)[1]
