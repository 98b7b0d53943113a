"""The judge during training: the figure of `ssl eval`, and no trace in training."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from selfsup.kernel import loop
from selfsup.kernel.config import to_toml
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import ConfigError, DataError
from selfsup.plugins.common.compare import Asked, Linear, Neighbours, compare
from selfsup.plugins.services.online import Online

LABELLED = "0 90"


def measured(run):
    return run.plugins.manager.get_plugin("listener").heard


@pytest.mark.parametrize(
    ("judge", "asked"),
    [
        (Neighbours(), {"data": [LABELLED]}),
        (Neighbours(), {"data": [LABELLED], "test": ["90 130"], "limit": 40}),
        (Linear(), {"data": [LABELLED], "limit": 30, "layer": 1}),
    ],
)
def test_it_is_what_eval_says_of_the_checkpoint_of_that_step(start, tmp_path, judge, asked):
    options = {f"online__{key}": value for key, value in asked.items()}
    run = start(tmp_path, train__steps=5, online__every=2, online__judge=judge.name, checkpoints__steps=4, **options)
    loop.train(run)
    (tmp_path / "run.toml").write_text(to_toml(run.config))
    assert [done for done, _ in measured(run)] == [2, 4, 5]
    asked = {"limit": 2000, **asked, "paths": asked["data"], "tests": asked.get("test", [])}
    asked = {key: asked[key] for key in asked if key not in ("data", "test")}
    for done in (5, 4):
        report = compare(type(run.plugins)(), Asked(run=tmp_path, **asked), judge)
        assert report.step == done
        assert dict(measured(run))[done] == {f"online/{judge.name}": report.rows["trained"].accuracy}
        for path in sorted((tmp_path / "checkpoints").glob("step-*"))[-1:]:
            path.rename(tmp_path / path.name)  # so that the one before is the newest


def test_training_does_not_notice_it(start):
    weights = []
    for options in ({}, {"online__every": 1, "online__data": LABELLED}, {"online__every": 1, "online__layer": 1}):
        torch.manual_seed(0)
        run = start(train__steps=4, **options)
        loop.train(run)
        assert len(measured(run)) == (4 if options else 0)
        assert run.objective.training
        weights.append({**run.objective.state_dict(), "random state": torch.get_rng_state()})
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name
        assert torch.equal(weights[0][name], weights[2][name]), name


def test_naming_the_data_switches_it_on_and_the_default_is_off(start):
    assert start().plugins.manager.get_plugin("online").every is None
    run = start(online__data=LABELLED)
    assert run.notes == [
        "online knn: 72 samples to learn from, 18 to be judged on, 3 classes, every 1,000 steps and at the end"
    ]
    assert start(online__every=5).plugins.manager.get_plugin("online").task.classes == 3


def test_it_may_find_its_labels_elsewhere_than_training(start):
    opened = type(start().plugins).toys["services"]["data"].opened
    opened.clear()
    start(data__label="of training", online__data=LABELLED)
    start(data__label="of training", online__data=LABELLED, online__label="its own")
    assert opened == [
        *(("of training", "0 40"), ("of training", LABELLED)),
        *(("of training", "0 40"), ("its own", LABELLED)),
    ]


@pytest.mark.parametrize(("stream", "anew"), [(None, False), (9, True)])
def test_a_run_on_a_stream_has_its_labelled_data_opened_whole(stream, anew):
    """By a service made anew: that of the run would read the same paths as a stream, without labels."""
    plugins = Plugins()
    for name in ("data", "another"):
        plugins.register(type(name, (), {})(), name)
    served = Online(data=["a.tar"])._plugins(SimpleNamespace(plugins=plugins, config={"data": {"stream": stream}}))
    assert served.manager.has_plugin("data") is not anew
    assert served.manager.has_plugin("another")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"data": "labbelled"}, DataError, "online.data: there is nothing at 'labbelled'"),
        ({"data": LABELLED, "test": "tset"}, DataError, "online.data: there is nothing at 'tset'"),
        ({"data": "0 3"}, DataError, "online.data: all 3 labelled samples of 0 3 are '0'"),
        ({"data": LABELLED, "layer": 3}, ConfigError, "layer = 3: this backbone has layers 1 to 2"),
        ({"data": LABELLED, "judge": "svm"}, ConfigError, "online.judge"),
    ],
)
def test_what_cannot_work_is_said_before_training(start, options, error, says):
    with pytest.raises(error, match=says):
        start(**{f"online__{key}": value for key, value in options.items()})


def test_a_probe_without_scikit_learn_is_said_before_training(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    start(online__data=LABELLED)
    with pytest.raises(DataError, match="needs scikit-learn"):
        start(online__data=LABELLED, online__judge="probe")
