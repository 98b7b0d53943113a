"""People see what training sees: the same samples, in the same order, with the same draws."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from selfsup.kernel import compose, loop
from selfsup.kernel.config import to_toml
from selfsup.kernel.contracts import Step
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import ContractError
from selfsup.plugins.common.seen import modalities_of, open_data, see
from selfsup.plugins.services.data_streams import Tables


@pytest.fixture
def built():
    plugins = Plugins()
    settings = compose.resolve(plugins, {"objective": {"name": "simclr"}, "preset": "tiny", "train": {"batch": 4}})
    settings["data"]["workers"] = 0
    objective = compose.build(plugins, settings)
    return plugins, settings, objective, open_data(plugins, settings, modalities_of(objective))


def test_the_samples_and_draws_are_those_of_training(built):
    _, settings, objective, source = built
    settings["console"]["style"] = "off"
    run = compose.start(Plugins(), settings)
    batch = run.loader.read(7)[0]
    at = run.step(7)
    seen = see(settings, objective, source, at, 3, guess=False)
    assert list(seen.names) == [source.name(int(i) % 2**40) for i in batch["ids"][:3]]
    view = run.objective.views(batch, at)[0]
    np.testing.assert_array_equal(seen.shown["one view"], objective.encoder.modality.show(view)[:3])
    assert seen.of(1).keys() == seen.shown.keys()
    np.testing.assert_array_equal(seen.of(1)["one view"], seen.shown["one view"][1])


def test_looking_leaves_the_model_as_it_was(built):
    _, settings, objective, source = built
    objective.train()
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    first = see(settings, objective, source, Step(0, 10), 4, guess=True)
    again = see(settings, objective, source, Step(0, 10), 4, guess=True)
    assert objective.training
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    np.testing.assert_array_equal(first.shown["nearest view"], again.shown["nearest view"])


def test_no_more_samples_than_there_are(built):
    _, settings, objective, source = built
    source.pieces[0].samples = source.pieces[0].samples[:3]
    source.ends[0] = 3
    source.parts = [type(source.parts[0])(3, 3.0)]
    seen = see(settings, objective, source, Step(0, 10), 8, guess=False)
    assert len(set(seen.names)) == 3


def test_an_objective_that_shows_too_little_is_named(built):
    _, settings, objective, source = built
    objective.show = lambda batch, step, guess: {"half": ["one"]}
    with pytest.raises(ContractError, match="shows 1 times 'half' for 4 samples"):
        see(settings, objective, source, Step(0, 10), 4, guess=False)


def test_the_data_is_opened_once_whoever_opened_it_before(built):
    plugins, settings, objective, source = built
    again = open_data(plugins, settings, modalities_of(objective))
    assert len(again) == len(source) == 1797


def test_a_stream_is_read_from_where_the_checkpoint_stands(tmp_path, monkeypatch):
    """What was trained on would be read again else, however much it is."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} of a hundred"}) + "\n" for n in range(100)))
    plugins = Plugins()
    given = {
        "objective": {"name": "gpt"},
        "preset": "tiny",
        "modality": {"tokenizer": "bytes", "length": 32, "pack": False},
        "train": {"batch": 5, "steps": 6},
        "data": {"paths": [str(tmp_path / "a.jsonl")], "stream": 10, "workers": 0},
        "console": {"style": "off"},
    }
    settings = compose.resolve(plugins, given)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.toml").write_text(to_toml(settings))
    run = compose.start(plugins, settings, tmp_path / "run")
    loop.train(run)
    wanted = [run.source.name(int(ident)) for ident in run.loader.read(6)[0]["ids"]]
    begun, own = [], Tables.samples
    monkeypatch.setattr(Tables, "samples", lambda self, file, row: begun.append(row) or own(self, file, row))
    source = open_data(plugins, settings, modalities_of(run.objective))
    seen = see(settings, run.objective, source, run.step(6), 5, guess=False, folder=tmp_path / "run")
    assert list(seen.names) == wanted
    assert begun == [30]
