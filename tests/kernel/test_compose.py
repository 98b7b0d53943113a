"""From names and options to something that runs, and the errors on the way."""

import pytest
import torch

from selfsup.kernel import Modality, compose, loop
from selfsup.kernel.config import read_toml, to_toml
from selfsup.kernel.contracts import Raw
from selfsup.kernel.errors import ConfigError, StateError

HIDE = {"objective": {"name": "hide"}}


def test_layers_lie_over_the_preset(toys):
    settings = compose.resolve(toys(), HIDE, {"objective": {"share": 0.5}}, {"train": {"batch": 4}})
    assert settings["preset"] == "tiny"  # no data was named
    assert settings["objective"] == {"name": "hide", "share": 0.5}
    assert settings["train"]["batch"] == 4
    assert settings["train"]["steps"] == 12
    assert settings["optimizer"] == {"lr": 0.01}
    with_data = compose.resolve(toys(), HIDE, {"data": {"paths": ["x"]}})
    assert (with_data["preset"], with_data["train"]["steps"]) == ("base", 100)


def test_what_is_resolved_survives_a_run_file(toys, tmp_path):
    settings = compose.resolve(toys(), HIDE)
    (tmp_path / "run.toml").write_text(to_toml(settings))
    assert compose.resolve(toys(), read_toml(tmp_path / "run.toml")) == settings


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "name an objective with --plugin; known: hide"),
        ({"objective": {"name": "hide", "sahre": 1}}, "objective has no option 'sahre'; did you mean 'share'?"),
        ({"objective": {"name": "hide", "share": 2}}, "objective.share = 2: input should be less than 1"),
        ({**HIDE, "trian": {}}, "there is no section 'trian'; did you mean 'train'?"),
        ({**HIDE, "train": {"batch": "many"}}, "train.batch = 'many': input should be a valid integer"),
        ({**HIDE, "preset": "tinny"}, "hide has no preset 'tinny'; did you mean 'tiny'?"),
        ({**HIDE, "towers": {"decoder": {}}}, "this objective has no tower 'decoder'"),
        ({**HIDE, "towers": {"encoder": {"stem": {}}}}, "a tower has a modality and a backbone, not 'stem'"),
        ({**HIDE, "data": {"wokers": 1}}, "data has no option 'wokers'; did you mean 'workers'?"),
    ],
)
def test_what_does_not_exist_is_refused(toys, asked, said):
    with pytest.raises(ConfigError, match="^" + said.replace("?", r"\?").replace(".", r"\.")):
        compose.resolve(toys(), asked)


def test_a_tower_may_differ(toys):
    settings = compose.resolve(toys(), HIDE, {"towers": {"encoder": {"backbone": {"width": 12}}}})
    assert compose.build(toys(), settings).encoder.width == 12
    assert settings["backbone"]["width"] == 8


def test_the_seed_decides_the_first_weights(toys):
    def build(seed):
        return compose.build(toys(), compose.resolve(toys(), HIDE, {"train": {"seed": seed}})).head.weight

    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))


def test_a_backbone_that_wants_raw_input_gets_no_stem(toys, monkeypatch):
    mixer = toys.toys["backbones"]["mixer"]
    monkeypatch.setattr(mixer, "wants_raw", True)
    monkeypatch.setattr(toys.toys["objectives"]["hide"], "__init__", _encoder_only)
    objective = compose.build(toys(), compose.resolve(toys(), HIDE))
    assert isinstance(objective.encoder.stem, Raw)


def _encoder_only(self, encoder):
    super(type(self), self).__init__()
    self.encoder = encoder


def test_a_batch_larger_than_the_data_is_answered_with_a_recipe_that_fits(toys, monkeypatch):
    settings = compose.resolve(toys(), HIDE, {"preset": "base", "train": {"batch": 101}})
    for batch, hint in ((100, "less, or --preset tiny"), (101, "less")):
        monkeypatch.setitem(toys.toys["objectives"]["hide"].presets["tiny"], "train.batch", batch)
        with pytest.raises(ConfigError, match=f"choose --batch 100 or {hint}$"):
            compose.start(toys(), settings)


def run_for(toys, folder, steps=3, save=True, **sections):
    plugins = toys()
    settings = compose.resolve(plugins, HIDE, {"train": {"steps": steps}}, sections)
    folder.mkdir(exist_ok=True)
    (folder / "run.toml").write_text(to_toml(settings))
    run = compose.start(plugins, settings, folder, resume=True)
    loop.train(run)
    if save:
        run.save()
    return run


def test_a_resume_may_go_on_for_longer_and_otherwise_is_the_same_run(toys, tmp_path):
    run_for(toys, tmp_path)
    assert run_for(toys, tmp_path, steps=5, train={"steps": 5, "microbatch": 2}).first == 3
    with pytest.raises(ConfigError, match=r"train\.batch was 8 when this run began and is 4 now"):
        run_for(toys, tmp_path, train={"batch": 4})
    with pytest.raises(ConfigError, match=r"objective\.share was 0\.4"):
        run_for(toys, tmp_path, objective={"share": 0.3})
    with pytest.raises(ConfigError, match=r"data\.first was 0"):
        run_for(toys, tmp_path, data={"first": 7})


def test_restore_gives_the_trained_and_the_initial_objective(toys, tmp_path):
    run = run_for(toys, tmp_path)
    trained, settings, step = compose.restore(tmp_path, toys())
    assert step == 3
    assert not trained.training
    assert settings == run.config
    torch.testing.assert_close(trained.head.weight, run.objective.head.weight, rtol=0, atol=0)
    initial, _, step = compose.restore(tmp_path, toys(), initial=True)
    assert step == 0
    assert not torch.equal(initial.head.weight, trained.head.weight)


def test_weights_of_another_run_begin_a_new_one(toys, tmp_path):
    old = run_for(toys, tmp_path / "a")
    plugins = toys()
    settings = compose.resolve(plugins, HIDE)
    new = compose.start(plugins, settings, tmp_path / "b", weights_from=tmp_path / "a")
    assert new.first == 0
    torch.testing.assert_close(new.objective.head.weight, old.objective.head.weight, rtol=0, atol=0)
    wider = compose.resolve(toys(), HIDE, {"backbone": {"width": 16}})
    with pytest.raises(StateError, match=r"do not fit this model: \d+ tensors are of another shape \("):
        compose.start(toys(), wider, weights_from=tmp_path / "a")


def test_a_folder_without_a_run_is_named_with_its_nearest(toys, tmp_path):
    run_for(toys, tmp_path / "first", save=False)
    with pytest.raises(StateError, match=r"is not the folder of a run; did you mean 'first'\?"):
        compose.restore(tmp_path / "frist", toys())
    with pytest.raises(StateError, match="has no checkpoint that can be used"):
        compose.restore(tmp_path / "first", toys())


def test_a_kind_of_the_modality_of_a_recipe_takes_over_what_it_says(toys, monkeypatch):
    numbers = toys.toys["modalities"]["numbers"]
    monkeypatch.setitem(toys.toys["objectives"]["hide"].presets["tiny"], "modality.width", 3)
    monkeypatch.setitem(toys.toys["modalities"], "kind", type("Kind", (numbers,), {}))
    monkeypatch.setitem(toys.toys["modalities"], "other", type("Other", (Modality,), {"__init__": numbers.__init__}))
    for name, width in (("kind", 3), ("other", 4)):
        settings = compose.resolve(toys(), HIDE, {"modality": {"name": name}})
        assert settings["modality"] == {"name": name, "width": width}


def test_epochs_that_are_asked_for_win_over_the_steps_of_a_recipe(toys):
    asked = {"objective": {"name": "hide"}, "train": {"epochs": 3.0}}
    assert compose.resolve(toys(), {"objective": {"name": "hide"}})["train"]["steps"] == 12
    assert compose.resolve(toys(), asked)["train"]["steps"] is None
    assert compose.resolve(toys(), asked, {"train": {"steps": 5}})["train"]["steps"] == 5
