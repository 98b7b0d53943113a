"""Features on a plane: of the same samples before and after training, coloured by label, and what they mean."""

from __future__ import annotations

import re

import pytest
import torch

from selfsup.kernel import compose
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import DataError
from selfsup.plugins.common import feature_map as module
from selfsup.plugins.common.feature_map import feature_map, hues
from selfsup.plugins.common.seen import modalities_of, open_data


def test_frequent_classes_have_a_colour():
    labels = [label for label in range(12) for _ in range(20 - label)] + [-1]
    colours, meaning = hues(labels, [f"class {n}" for n in range(11)])
    assert colours[-1] == -1
    assert {label: colour for label, colour in zip(labels, colours, strict=True) if label >= 0} == {
        **{n: n for n in range(10)},
        **{10: -1, 11: -1},
    }
    assert meaning["hue-3"] == "class 3"
    assert meaning["hue"] == "2 more classes"
    assert hues([5, 5], [])[1] == {"hue-0": "5"}
    assert hues([-1, -1], ["a"]) == ([-1, -1], {})


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(module, "MOST", 48)
    plugins = Plugins()
    recipe = {"objective": {"name": "mae"}, "preset": "tiny", "backbone": {"depth": 1, "width": 16, "heads": 2}}
    settings = compose.resolve(plugins, recipe)
    objective = compose.build(plugins, settings)
    return objective, open_data(plugins, settings, modalities_of(objective)), lambda: compose.build(plugins, settings)


def test_both_models_see_the_same_samples(built):
    objective, source, untrained = built
    html = "".join(feature_map(objective, untrained, source, 0, 12))
    assert html.count("<circle") == 2 * 48
    assert "trained, step 12" in html
    assert "Features of 48 samples" in html
    assert len(set(re.findall(r"</i>(\d)</span>", html))) > 5
    one, other = html.split("<svg")[1:3]
    assert (
        one.split("</svg>")[0].split("<circle")[1:] == other.split("</svg>")[0].split("<circle")[1:]
    )  # both untrained
    assert html != "".join(feature_map(objective, untrained, source, 1, 12))  # other samples for another seed


def test_time_limits_how_many(built, monkeypatch):
    objective, source, untrained = built
    monkeypatch.setattr(module, "SECONDS", -1.0)
    html = "".join(feature_map(objective, untrained, source, 0, 12))
    assert html.count("<circle") == 2 * module.BATCH


def test_a_collapse_is_said(built):
    objective, source, untrained = built
    with torch.no_grad():
        for parameter in objective.encoder.backbone.parameters():
            parameter.zero_()
    assert "All features are alike" in "".join(feature_map(objective, untrained, source, 0, 12))
    assert "collapsed" not in "".join(feature_map(untrained(), untrained, source, 0, 12))


@pytest.mark.parametrize(
    ("scale", "text"),
    [
        ((1, 1, 1, 1, 1, 1, 1, 1), "No sign"),
        ((1, *[0] * 7), "differ along a line at most"),
        ((1, *[0.1] * 7), "One direction holds 9"),
    ],
)
def test_the_hint_follows_the_spread(scale, text):
    noise = torch.randn(400, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trained, initial = (module.spectrum(noise * torch.tensor(s)) for s in (scale, [1.0] * 8))
    assert text in module._hint(trained, initial)


def test_too_few_samples_are_an_error(built, monkeypatch):
    objective, source, untrained = built
    monkeypatch.setattr(module, "MOST", 2)
    with pytest.raises(DataError, match="only 2 samples"):
        feature_map(objective, untrained, source, 0, 12)
