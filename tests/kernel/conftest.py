"""A toy of every kind of plugin: numbers, hidden and guessed. Small enough that a step costs a millisecond."""

from __future__ import annotations

from typing import Annotated, ClassVar

import pytest
import torch
from torch import nn

from selfsup.kernel import Backbone, Loss, Modality, Objective, Part, Plugins, Signal, Stem, about, hookimpl
from selfsup.kernel.errors import BadSample


class Numbers(Modality):
    field = "number"
    unit = "numbers"

    def __init__(self, *, width: Annotated[int, about("values a token", ge=1)] = 4) -> None:
        self.width = width

    def read(self, stored):
        if stored == "bad":
            raise BadSample("it is not a number")
        return torch.full((5, self.width), stored / 100)

    def collate(self, raws, draw=None):
        x = torch.stack(raws)
        return Signal(x + draw("noise").normal(5, self.width) if draw else x)

    def stem(self, width):
        return NumbersStem(self.width, width)


class NumbersStem(Stem):
    def __init__(self, size, width):
        super().__init__()
        self.size, self.width = size, width
        self.embed = nn.Linear(size, width)

    def latents(self, raw):
        return Signal(self.embed(raw.x))

    def targets(self, raw):
        return raw.x


class Mixer(Backbone):
    def __init__(self, *, width: Annotated[int, about("of a token", ge=1)] = 8) -> None:
        super().__init__()
        self.width = width
        self.mix = nn.Linear(width, width)

    def forward(self, tokens, *, causal=False, context=None):
        return Signal(torch.relu(self.mix(tokens.x)) + tokens.x.mean(1, keepdim=True))

    def units(self):
        return [self.mix]


class Hide(Objective):
    towers = ("encoder",)
    paper = "a toy"
    presets: ClassVar = {
        "base": {"modality.name": "numbers", "backbone.name": "mixer", "train.batch": 8, "train.steps": 100},
        "tiny": {"train.steps": 12},
    }

    def __init__(self, encoder, *, share: Annotated[float, about("of tokens hidden", gt=0, lt=1)] = 0.4) -> None:
        super().__init__()
        self.encoder, self.share = encoder, share
        self.vector = nn.Parameter(torch.zeros(encoder.width))
        self.head = nn.Linear(encoder.width, encoder.stem.size)
        self.register_buffer("calibrated", torch.zeros(()))

    def calibrate(self, batches, step):
        self.calibrated += next(iter(batches))["encoder"].x.mean()

    def forward(self, batch, step):
        tokens = self.encoder.stem(batch["encoder"])
        hidden = step.draw("mask", batch["ids"]).chance(self.share, 5)  # [B, 5]
        guess = self.head(self.encoder.backbone(tokens.fill(hidden, self.vector)).x)
        error = (guess - self.encoder.stem.targets(batch["encoder"])).square().mean(-1)  # [B, 5]
        count = hidden.sum()
        return Loss((error * hidden).sum() / count.clamp(min=1), {"hidden": hidden.float().mean()}, count)


class List:
    """A source over a list."""

    notes = ("a list",)

    def __init__(self, items, weights=None):
        self.items, self.parts = items, [Part(len(items), 1.0)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return {"number": self.items[index]}

    def name(self, index):
        return f"item {index}"


class Data:
    fixed = ("first",)

    def __init__(
        self,
        *,
        paths: Annotated[list[str], about("unused")] = [],  # noqa: B006
        workers: Annotated[int, about("processes", ge=0)] = 0,
        max_bad_fraction: Annotated[float, about("share", ge=0, le=1)] = 0.01,
        first: Annotated[int, about("number")] = 0,
        bad: Annotated[int, about("how many are bad")] = 0,
    ) -> None:
        self.first, self.bad = first, bad

    @hookimpl
    def open_data(self):
        return List(["bad" if i < self.bad else self.first + i for i in range(100)])


class Optimizer:
    def __init__(self, *, lr: Annotated[float, about("learning rate", gt=0)] = 1e-2) -> None:
        self.lr = lr

    @hookimpl
    def build_optimizer(self, objective):
        return torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=self.lr, fused=True)


class Toys(Plugins):
    """Toys in place of what is installed."""

    toys: ClassVar = {
        "objectives": {"hide": Hide},
        "modalities": {"numbers": Numbers},
        "backbones": {"mixer": Mixer},
        "services": {"data": Data, "optimizer": Optimizer},
        "commands": {},
    }

    def names(self, kind):
        return sorted(self.toys[kind])

    def load(self, kind, name):
        return self.toys[kind][name]


@pytest.fixture
def toys():
    return Toys


@pytest.fixture
def root(tmp_path):
    """Where a run has its checkpoints."""
    return tmp_path / "checkpoints"
