"""What cannot be a plugin of its kind is refused in words that say what is missing."""

from __future__ import annotations

from typing import Annotated, ClassVar

import pytest

from selfsup.kernel import Backbone, Modality, Objective, Plugins, about, hookimpl
from selfsup.kernel.contracts import CONTRACT
from selfsup.kernel.fitness import misfit


class Mixer(Backbone):
    def __init__(self, *, width: Annotated[int, about("of a token", ge=1)] = 8):
        super().__init__()
        self.width = width

    def forward(self, tokens, *, causal=False, context=None):
        return tokens


class Guess(Objective):
    towers = ("encoder",)
    paper = "A. Toy"
    presets: ClassVar = {"base": {}}

    def __init__(self, encoder, *, share: float = 0.5):
        super().__init__()

    def forward(self, batch, step):
        return None


class Kind(Modality):
    field = "x"

    def collate(self, raws, draw=None):
        return None

    def stem(self, width):
        return None


class Listens:
    @hookimpl
    def run_started(self, run):
        pass


FITTING = {"objectives": Guess, "modalities": Kind, "backbones": Mixer, "services": Listens}


def changed(kind, **members):
    return type("Changed", (FITTING[kind],), members)


@pytest.mark.parametrize("kind", FITTING)
def test_what_fits(kind):
    assert misfit(kind, FITTING[kind], "toys") is None
    assert misfit(kind, changed(kind, contract=CONTRACT), "toys") is None


def test_ours_fit():
    plugins = Plugins()
    for kind in FITTING:
        for name in plugins.names(kind):
            plugins.load(kind, name)


@pytest.mark.parametrize(
    ("kind", "members", "said"),
    [
        ("objectives", {"forward": Objective.forward}, r"lacks forward\(\), which every Objective has"),
        ("modalities", {"stem": Modality.stem, "collate": Modality.collate}, r"lacks collate\(\), stem\(\)"),
        ("backbones", {"contract": 0}, "made for contract 0 .* has contract 1; upgrade it: .* --upgrade toys"),
        ("backbones", {"contract": 99}, "made for contract 99 of plugins, .* has contract 1; upgrade selfsup"),
        ("services", {"contract": 99}, "made for contract 99 "),
        ("services", {"contract": "1"}, "made for contract '1' "),
        ("objectives", {"towers": "encoder"}, "has towers = 'encoder', which is no tuple"),
        ("objectives", {"towers": ("one", "two")}, "options that cannot be read: .*too many positional"),
        ("objectives", {"presets": {"tiny": {}}}, 'no preset "base"'),
        ("backbones", {"__init__": lambda self, width: None}, "options that cannot be read: .*'width'"),
        ("services", {"run_started": hookimpl(lambda self, rum: None)}, "(?s)not fit the hooks: .*rum"),
        ("services", {"run_strted": hookimpl(lambda self: 0)}, "no hook 'run_strted'; did you mean 'run_started'"),
    ],
)
def test_what_does_not_fit(kind, members, said):
    import re

    assert re.search(said, misfit(kind, changed(kind, **members), "toys"))


def test_what_is_not_even_of_the_kind():
    assert misfit("backbones", Guess, "toys") == "is no Backbone: the class Guess does not inherit from it"
    assert misfit("services", Guess(None), "toys") == "is no class but a Guess"
    assert (
        misfit("services", Guess, "toys") == "listens to nothing: no method of the class Guess is marked with hookimpl"
    )
    nothing = type("Nothing", (Modality,), {"collate": None, "stem": None})
    assert misfit("modalities", nothing, "toys") == "does not say its field, as every Modality does"


def test_an_option_whose_type_does_not_exist():
    class Typo(Mixer):
        def __init__(self, *, width: Nowhere = 8):  # noqa: F821
            super().__init__()

    assert "options that cannot be read: NameError: name 'Nowhere'" in misfit("backbones", Typo, "toys")


def test_a_hook_that_another_version_may_have():
    class Newer(Listens):
        @hookimpl(optionalhook=True)
        def run_paused(self, run):
            pass

    assert misfit("services", Newer, "toys") is None


def test_a_command_is_clicks_matter():
    assert misfit("commands", 3, "toys") is None
