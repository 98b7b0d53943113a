"""A run that a service can listen to, without a loop: `fake_run(...)`, and `fake_report(run, number, ...)`.

Where a service needs the loop: `start(...)`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from selfsup.kernel import Signal, Step, compose
from selfsup.kernel.loop import Report
from selfsup.kernel.random import untag

spec = importlib.util.spec_from_file_location("measured_toys", Path(__file__).with_name("measured_toys.py"))
measured_toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measured_toys)


class Source:
    notes = ("20 numbers", "1 was left out: it is empty")

    def __len__(self):
        return 20

    def name(self, index):
        return f"number-{index}.txt"


class FakeRun(SimpleNamespace):
    def stop(self, reason):
        self.reason = reason

    def saved(self, wait=False):
        pass

    def save(self, wait=True):
        self.saves.append(self.done)
        folder = self.folder / "checkpoints" / f"step-{self.done:08d}"
        folder.mkdir(parents=True)
        for service in self.services:
            if hasattr(service, "checkpoint_saved"):
                service.checkpoint_saved(run=self, folder=folder)
        return folder


@pytest.fixture
def fake_run(tmp_path):
    def make(first=0, total=20, folder=tmp_path, services=()):
        objective = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        optimizer = torch.optim.AdamW(objective.parameters(), lr=0.5)
        config = {
            "preset": "tiny",
            "objective": {"name": "hide"},
            "modality": {"name": "numbers"},
            "backbone": {"name": "mixer"},
            "train": {"precision": "auto", "parallel": "ddp", "seed": 3},
        }
        signal = Signal(torch.arange(6.0).reshape(2, 3).T)  # not contiguous, on purpose
        read = lambda step: [{"encoder": signal, "ids": torch.tensor([4, 5]), "amount": {}, "bad": {}}]  # noqa: E731
        reader = SimpleNamespace(key=lambda ident: untag(ident)[1])
        plugins = SimpleNamespace(manager=SimpleNamespace(get_plugin=lambda name: None))
        return FakeRun(
            config=config, plugins=plugins, objective=objective, optimizer=optimizer, source=Source(), folder=folder,
            loader=SimpleNamespace(read=read, reader=reader), device=torch.device("cpu"), seed=3,
            first=first, total=total, batch=2, done=first, notes=[], reason=None, saves=[], services=services,
            parameter_names=[name for name, _ in objective.named_parameters()],
        )  # fmt: skip

    return make


@pytest.fixture
def start():
    """A run of toys, `start(folder, train__steps=3)`; what it measures is heard by its service `listener`."""

    def make(folder=None, resume=False, **settings):
        plugins = measured_toys.Toys()
        plugins.register(measured_toys.Listener(), "listener")
        layers = [{s: {key: value}} for name, value in settings.items() for s, key in [name.split("__")]]
        config = compose.resolve(plugins, {"objective": {"name": "hide"}}, *layers)
        if folder:
            folder.mkdir(exist_ok=True)
        return compose.start(plugins, config, folder, resume)

    return make


@pytest.fixture
def fake_report():
    def make(run, number, loss=1.5, norms=(1.0, 1.0, 1.0, 1.0), bad=None, **metrics):
        run.done = number + 1
        norms = torch.tensor(norms)
        loss, norm = torch.tensor(loss), norms.norm()
        ids = torch.tensor([4, (1 << 40) + 5])  # number 4 in epoch 0, number 5 in epoch 1
        metrics = {name: torch.tensor(value) for name, value in metrics.items()}
        finite = loss.isfinite() & norm.isfinite()
        amount = {"s of sound": 4.0}
        return Report(Step(number, run.total, 3), ids, loss, metrics, norm, norms, finite, amount, bad or {})

    return make
