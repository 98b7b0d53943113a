"""Each promise of the conformance suite, broken once: the test that guards it fails, and the others pass."""

from __future__ import annotations

import inspect
import sys
from importlib import invalidate_caches

import distributions
import pytest

from selfsup.testing import ObjectiveContract, ranks

BROKEN = '''"""Objectives that each break one promise."""

import random
import torch
from torch import nn
from selfsup.kernel import Loss, Objective, gather


class Sound(Objective):
    """Guess the mean of each picture's pixels; nothing is wrong with it."""

    towers = ("encoder",)
    paper = "http"
    divisible = True
    presets = {
        "base": {"modality.name": "image", "modality.size": 8, "modality.patch": 4, "backbone.name": "transformer"},
        "tiny": {
            "backbone.width": 8, "backbone.depth": 1, "backbone.heads": 2, "backbone.positions": "sincos",
            "optimizer.lr": 0.01, "optimizer.warmup": 0.0,
        },
    }

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.width, 1)

    def errors(self, batch, step):
        raw = self.encoder.modality.plain(batch["encoder"])
        noise = step.draw("noise", batch["ids"]).normal(1)[:, 0]
        guess = self.head(self.encoder(raw).mean())[:, 0]
        return (guess - raw.x.mean((1, 2, 3)) - 0.1 * noise).square()

    def forward(self, batch, step):
        return Loss(self.errors(batch, step).mean())


class GlobalDraw(Sound):
    def forward(self, batch, step):
        return Loss(self.errors(batch, step).mean() * (1 + torch.rand(())))


class Idle(Sound):
    def __init__(self, encoder):
        super().__init__(encoder)
        self.unused = nn.Parameter(torch.zeros(3))


class Forgetful(Sound):
    def __init__(self, encoder):
        super().__init__(encoder)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, batch, step):
        self.scale += 1
        return Loss(self.errors(batch, step).mean() * self.scale)


class Ordered(Sound):
    def forward(self, batch, step):
        errors = self.errors(batch, step)
        return Loss((errors * torch.linspace(0.5, 1.5, len(errors))).mean())


class Heavy(Sound):
    def forward(self, batch, step):
        return Loss(self.errors(batch, step).mean(), weight=torch.tensor(1.0))


class Local(Sound):
    """Compares the samples of this process alone."""

    divisible = False

    def forward(self, batch, step):
        errors = self.errors(batch, step)
        return Loss((errors - errors.mean()).square().mean())


class Global(Local):
    """Compares the samples of all processes."""

    def forward(self, batch, step):
        errors = self.errors(batch, step)
        return Loss((errors - gather(errors).mean()).square().mean())


class Infinite(Sound):
    def forward(self, batch, step):
        return Loss(self.errors(batch, step).mean() / 0)


class Attached(Sound):
    def forward(self, batch, step):
        loss = self.errors(batch, step).mean()
        return Loss(loss, {"error": loss})


class Waiting(Sound):
    def forward(self, batch, step):
        errors = self.errors(batch, step)
        return Loss(errors[errors > 0].mean())


class Closure(Sound):
    def collator(self, **modalities):
        collate = super().collator(**modalities)
        return lambda samples, draw: collate(samples, draw)


class Foreign(Sound):
    @property
    def exports(self):
        return self.head


class Undescribed(Sound):
    def __init__(self, encoder, *, option: float = 1.0):
        super().__init__(encoder)
'''
WRONG = {
    "Sound": set(),
    "Global": set(),
    "GlobalDraw": {"test_it_draws_from_streams_alone"},
    "Idle": {"test_every_parameter_is_trained_or_frozen", "test_two_processes_are_as_good_as_one"},
    "Forgetful": {"test_interrupted_is_uninterrupted"},
    "Ordered": {"test_the_order_of_a_batch_does_not_matter"},
    "Heavy": {"test_microbatches_add_up"},
    "Local": {"test_two_processes_are_as_good_as_one"},
    "Infinite": {"test_a_step_has_a_finite_loss_and_finite_gradients", "test_it_trains_in_bf16"},
    "Attached": {"test_its_loss_is_a_scalar_with_detached_metrics"},
    "Waiting": {"test_a_step_never_waits_for_the_host"},
    "Closure": {"test_its_collator_goes_to_workers"},
    "Foreign": {"test_its_product_is_a_tower"},
    "Undescribed": {"test_it_says_what_it_is"},
}
TESTS = {name: f for name, f in inspect.getmembers(ObjectiveContract, inspect.isfunction) if name.startswith("test_")}


@pytest.fixture(scope="module", autouse=True)
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    entries = "".join(f"{name.lower()} = broken_objectives:{name}\n" for name in WRONG)
    distributions.install(folder, "broken", f"[selfsup.objectives]\n{entries}", broken_objectives=BROKEN)
    sys.path.insert(0, str(folder))
    invalidate_caches()
    ranks.ranks.cache_clear()  # processes see the path of their start
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("broken_objectives", None)
    ranks.ranks.cache_clear()


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name, tmp_path):
    contract = type("Contract", (ObjectiveContract,), {"name": name.lower()})()
    # A sound objective passes everything; of a broken one only the tests that must fail are run.
    for test in WRONG[name] or TESTS:
        arguments = {"tmp_path": tmp_path} if "tmp_path" in inspect.signature(TESTS[test]).parameters else {}
        if WRONG[name]:
            with pytest.raises(Exception):  # noqa: B017, PT011  (whatever shape the failure takes)
                TESTS[test](contract, **arguments)
        else:
            TESTS[test](contract, **arguments)


def test_every_promise_is_broken_once():
    assert set(TESTS) - set().union(*WRONG.values()) == {"test_its_presets_are_valid"}
