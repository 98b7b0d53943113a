"""Options: from signatures, files and flags to checked values, and back to a file."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfsup.kernel.config import (
    TrainOptions,
    about,
    check,
    merge,
    nest,
    parse_set,
    read_toml,
    schema,
    to_toml,
    to_toml_value,
    tomllib,
)
from selfsup.kernel.errors import ConfigError


class Plugin:
    def __init__(
        self,
        tower: object,
        *,
        temperature: Annotated[float, about("of the softmax", gt=0)] = 0.1,
        depth: Annotated[int, about("blocks", ge=1, le=100)] = 12,
        kind: Annotated[Literal["a", "b"], about("which")] = "a",
        sizes: Annotated[list[int], about("of layers")] = [1, 2],  # noqa: B006
        name_of: Annotated[str | None, about("a file")] = None,
        needed: Annotated[bool, about("has no default")],
    ) -> None:
        pass


def test_a_signature_is_the_schema():
    fields = schema(Plugin).model_fields
    assert list(fields) == ["temperature", "depth", "kind", "sizes", "name_of", "needed"]  # towers are no options
    assert fields["depth"].description == "blocks"


def test_check_fills_in_the_defaults():
    assert check("objective", Plugin, {"needed": True, "depth": 3}) == {
        "temperature": 0.1,
        "depth": 3,
        "kind": "a",
        "sizes": [1, 2],
        "name_of": None,
        "needed": True,
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"needed": True, "temprature": 1}, r"objective has no option 'temprature'; did you mean 'temperature'\?"),
        ({"needed": True, "temperature": 0}, r"objective\.temperature = 0: input should be greater than 0"),
        ({"needed": True, "depth": 101}, r"objective\.depth = 101: input should be less than or equal to 100"),
        ({"needed": True, "depth": 1.5}, r"objective\.depth = 1\.5: .*integer"),
        ({"needed": True, "kind": "c"}, r"objective\.kind = 'c': input should be 'a' or 'b'"),
        ({"needed": True, "sizes": 1}, r"objective\.sizes = 1: input should be a list in brackets, as in \[1, 2\]"),
        ({}, r"objective\.needed = .*: field required"),
    ],
)
def test_what_does_not_fit_is_named(options, said):
    with pytest.raises(ConfigError, match=said):
        check("objective", Plugin, options)


def test_the_options_of_the_loop_are_valid_and_described():
    assert check("train", TrainOptions, {})["batch"] == 256
    assert all(field.description for field in schema(TrainOptions).model_fields.values())


def test_later_layers_win_and_others_stay():
    a = {"train": {"batch": 1, "seed": 2}, "data": {"paths": ["x"]}}
    assert merge(a, {"train": {"batch": 3}}) == {"train": {"batch": 3, "seed": 2}, "data": {"paths": ["x"]}}
    assert a["train"]["batch"] == 1  # layers are left alone
    inner = merge(a)["train"]
    inner["batch"] = 9
    assert a["train"]["batch"] == 1


def test_another_plugin_leaves_the_options_of_the_one_before():
    recipe = {"backbone": {"name": "resnet", "depth": 50}}
    assert merge(recipe, {"backbone": {"name": "transformer", "heads": 8}}) == {
        "backbone": {"name": "transformer", "heads": 8}
    }
    assert merge(recipe, {"backbone": {"name": "resnet", "width": 8}})["backbone"]["depth"] == 50
    assert merge(recipe, {"backbone": {"width": 8}})["backbone"]["depth"] == 50


def test_nest():
    assert nest({"a.b": 1, "a.c.d": 2, "e.f": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": {"f": 3}}


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("train.batch=64", 64),
        ("optimizer.lr=1e-3", 1e-3),
        ("train.compile=true", True),
        ("data.paths=['a', 'b']", ["a", "b"]),
        ("data.paths=a=b.wav", "a=b.wav"),
        ("objective.kind=plain words", "plain words"),
        ("objective.kind='quoted'", "quoted"),
    ],
)
def test_set_reads_toml_and_else_a_string(item, value):
    section, _, name = item.partition("=")[0].partition(".")
    assert parse_set([item]) == {section: {name: value}}


@pytest.mark.parametrize("item", ["train.batch", "batch=64", ""])
def test_a_set_without_section_or_value_is_refused(item):
    with pytest.raises(ConfigError, match=r"--set takes section\.option=value"):
        parse_set([item])


def test_a_run_file_that_is_missing_or_broken(tmp_path):
    path = tmp_path / "run.toml"
    with pytest.raises(ConfigError, match="there is no run file"):
        read_toml(path)
    path.write_text("[train\nbatch = 1")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_toml(path)
    path.write_bytes(b'a = "\xff"')
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_toml(path)
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_toml(tmp_path)


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3)
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


@given(st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES, max_size=3), max_size=3))
def test_settings_survive_a_file(settings):
    back = tomllib.loads(to_toml(settings))
    assert {k: v for k, v in back.items() if v} == {k: v for k, v in settings.items() if v}


def test_none_has_a_word_and_sections_nest():
    text = to_toml({"preset": "tiny", "train": {"steps": None, "batch": 2}, "towers": {"a": {"backbone": {"x": 1}}}})
    assert tomllib.loads(text)["train"] == {"steps": "none", "batch": 2}
    assert tomllib.loads(text)["towers"] == {"a": {"backbone": {"x": 1}}}
    assert to_toml_value({"a": [1, True]}) == "{ a = [1, true] }"


def test_an_option_that_may_be_open_is_opened_by_its_word():
    assert check("train", TrainOptions, {"steps": "none"})["steps"] is None
    with pytest.raises(ConfigError, match=r"train\.batch = 'none'"):
        check("train", TrainOptions, {"batch": "none"})


def test_a_run_file_that_is_none_says_so_whatever_its_depth_and_size(tmp_path, monkeypatch):
    path = tmp_path / "run.toml"
    path.write_text("x = " + "[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_toml(path)
    assert parse_set([f"train.steps={'[' * 100_000}"])["train"]["steps"][0] == "["
    monkeypatch.setattr("selfsup.kernel.config.LARGEST", 10)
    with pytest.raises(ConfigError, match="more than 10 bytes"):
        read_toml(path)
