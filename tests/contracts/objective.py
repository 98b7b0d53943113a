"""What every objective owes the rest: the laws of the design, each as a test."""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from selfsup.cli.installed import summary
from selfsup.kernel import Objective, Plugins, Run, Signal, Tower, compose, hookimpl, loop
from selfsup.kernel.config import schema

from .hollow import step_without_values
from .ranks import ranks
from .trial import BATCH, begin, exact_gradients, gradients


class ObjectiveContract:
    """Subclass it, and set `name`."""

    name: ClassVar[str]
    """The plugin, by its entry point."""

    options: ClassVar[Mapping[str, Any]] = {}
    """Settings by dotted name on top of the preset "tiny", for instance to make it smaller."""

    linear: ClassVar[Mapping[str, Any]] = {}
    """Settings by dotted name under which parts of a batch add up exactly: a weight of 0 for a term that is not
    a mean over samples, such as the entropy of the batch's average."""

    tolerance: ClassVar[float] = 1e-4
    """Relative, of losses and gradients. Models are made in float64, data and draws are float32."""

    def test_its_presets_are_valid(self) -> None:
        cls = Plugins().load("objectives", self.name)
        assert {"base", "tiny"} <= set(cls.presets), "base is the paper's recipe, tiny runs anywhere in minutes"
        for preset in cls.presets:
            settings = compose.resolve(Plugins(), {"objective": {"name": self.name}, "preset": preset})
            assert settings["train"]["batch"] > 0

    def test_it_says_what_it_is(self) -> None:
        cls = Plugins().load("objectives", self.name)
        assert issubclass(cls, Objective)
        assert cls.towers
        assert "http" in cls.paper, "the paper's authors, year, title and address"
        assert cls.__doc__
        assert summary(Plugins().find("objectives", self.name)), "the first line of the module's docstring"
        for option, field in schema(cls).model_fields.items():
            assert field.description, f"describe {option} with about()"
            assert not field.is_required(), f"{option} needs the paper's value as its default"

    def test_a_step_has_a_finite_loss_and_finite_gradients(self) -> None:
        run = begin(self.name, self.options, dropout=True)
        for number in range(2):
            report, found = gradients(run, run.loader.read(number), number)
            assert report.loss.isfinite()
            assert report.norm > 0
            for key, gradient in found.items():
                assert gradient.isfinite().all(), key
            for key, metric in report.metrics.items():
                assert metric.shape == (), key
                assert metric.isfinite(), key

    def test_its_loss_is_a_scalar_with_detached_metrics(self) -> None:
        run = begin(self.name, self.options)
        loss = run.objective(run.loader.read(0)[0], run.step(0))
        assert loss.total.shape == ()
        assert loss.total.requires_grad
        assert loss.weight is None or (loss.weight.shape == () and loss.weight > 0 and not loss.weight.requires_grad)
        assert not any(metric.requires_grad for metric in loss.metrics.values())

    def test_every_parameter_is_trained_or_frozen(self) -> None:
        run = begin(self.name, self.options)
        trained: set[str] = set()
        for number in range(3):
            trained |= gradients(run, run.loader.read(number), number)[1].keys()
        idle = set(run.parameter_names) - trained
        assert not idle, f"no gradient in three steps; freeze with requires_grad_(False) or leave out: {sorted(idle)}"

    def test_the_order_of_a_batch_does_not_matter(self) -> None:
        places = list(range(BATCH))
        self._same(exact_gradients(self.name, self.options, [places[::-1]]), self._whole())

    def test_microbatches_add_up(self) -> None:
        if not Plugins().load("objectives", self.name).divisible:
            return  # it says that they do not
        places, settings = list(range(BATCH)), {**self.options, **self.linear}
        parts = exact_gradients(self.name, settings, [places[:1], places[1:3], places[3:]], still=True)
        self._same(parts, exact_gradients(self.name, settings, [places], still=True))

    def test_two_processes_are_as_good_as_one(self) -> None:
        for shared in ranks()(exact_gradients, self.name, dict(self.options)):
            self._same(shared, self._whole())

    def test_interrupted_is_uninterrupted(self, tmp_path: Path) -> None:
        straight = begin(self.name, self.options, dropout=True)
        loop.train(straight)
        first = begin(self.name, self.options, dropout=True, folder=tmp_path)
        first.plugins.register(_StopAfter(1), "stop after a step")
        loop.train(first)
        second = begin(self.name, self.options, dropout=True, folder=tmp_path)
        assert second.first == 1
        loop.train(second)
        ours, theirs = second.objective.state_dict(), straight.objective.state_dict()
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), f"{key} differs after a resume: a buffer that is not persistent?"

    def test_its_collator_goes_to_workers(self) -> None:
        reader = begin(self.name, self.options).loader.reader
        places = list(range(BATCH))
        _same_batch(pickle.loads(pickle.dumps(reader))[places], reader[places])

    def test_it_draws_from_streams_alone(self) -> None:
        run = begin(self.name, self.options)
        results = []
        for seed in (1, 2):
            _seed_all(seed)
            batch = run.loader.reader[list(range(BATCH))]
            state = {key: value.clone() for key, value in run.objective.state_dict().items()}
            results.append((batch, run.objective(batch, run.step(0)).total.detach()))
            run.objective.load_state_dict(state)
        _same_batch(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1]), "the loss depends on a global generator; use step.draw"

    def test_a_step_never_waits_for_the_host(self) -> None:
        """Tensors without values go through loss and gradient: what needs a value, or whose shape depends on one,
        would make a GPU's host wait, and fails here. Views, which may differ by device, are the modality's promise."""
        run = begin(self.name, self.options)
        step_without_values(run, run.loader.read(0)[0])

    def test_it_trains_in_bf16(self) -> None:
        run = begin(self.name, {**self.options, "train.precision": "bf16"}, dropout=True)
        report, found = gradients(run, run.loader.read(0))
        assert report.loss.isfinite()
        for key, gradient in found.items():
            assert gradient.isfinite().all(), key

    def test_its_product_is_a_tower(self) -> None:
        run = begin(self.name, self.options)
        objective = run.objective.eval()
        tower = objective.exports
        assert isinstance(tower, Tower)
        assert any(module is tower for module in objective.modules()), "exports must be part of the objective"
        raw = tower.modality.collate(_raws(run, tower))
        with torch.no_grad():
            features = tower(tower.modality.plain(raw)).mean()  # [B, D]
        assert features.shape == (2, tower.width)
        assert features.isfinite().all()

    def _whole(self) -> tuple[float, dict[str, Any]]:
        return exact_gradients(self.name, self.options, [list(range(BATCH))])

    def _same(self, one: tuple[float, dict[str, Any]], other: tuple[float, dict[str, Any]]) -> None:
        np.testing.assert_allclose(one[0], other[0], rtol=self.tolerance, atol=1e-6, err_msg="the loss")
        assert one[1].keys() == other[1].keys()
        largest = max(np.abs(gradient).max() for gradient in other[1].values())
        for key, gradient in other[1].items():
            scale = max(np.abs(gradient).max(), 1e-3 * largest)  # rounding of what cancels counts as rounding
            difference = np.abs(one[1][key] - gradient).max()
            assert difference <= self.tolerance * scale, f"{key}: {difference:.2e} off, of {scale:.2e}"


class _StopAfter:
    """Save and end a run after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @hookimpl
    def step_finished(self, run: Run) -> None:
        if run.done == self.steps:
            run.save()
            run.stop("enough")


def _raws(run: Run, tower: Tower) -> list[Any]:
    """Two decoded samples for a tower, which may be a copy of one of the objective's own."""
    for name, modality in run.loader.reader.modalities.items():
        if modality.field == tower.modality.field:
            return [run.loader.reader.read(index)[name] for index in range(2)]
    raise AssertionError(f"no tower of this run reads {tower.modality.field!r}")


def _same_batch(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        pairs = [(value, other[key])]
        if isinstance(value, Signal):
            pairs = [(getattr(value, f), getattr(other[key], f)) for f in ("x", "segments", "positions", "edges")]
        for a, b in pairs:
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, f"batch[{key!r}] is not reproduced"


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
