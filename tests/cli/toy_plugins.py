"""A toy of every kind of plugin, for tests that run the command itself: a step costs a millisecond."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import nn

from selfsup.kernel import Backbone, Loss, Modality, Objective, Signal, Stem, about
from selfsup.kernel.errors import BadSample


class Numbers(Modality):
    """Files that hold one number each."""

    field = "number"
    unit = "numbers"
    suffixes = (".num",)

    def __init__(self, *, width: Annotated[int, about("values a token", ge=1)] = 4) -> None:
        self.width = width

    def read(self, stored):
        try:
            number = float(stored.read_text() if isinstance(stored, Path) else stored)
        except ValueError as cause:
            raise BadSample(str(cause)) from None
        return torch.full((5, self.width), number / 100)

    def collate(self, raws, draw=None):
        x = torch.stack(raws)  # [B, 5, W]
        return Signal(x + draw("noise").normal(5, self.width) if draw else x)

    def stem(self, width):
        return NumbersStem(self.width, width)

    def sample(self):
        return [{"number": i, "label": i % 2} for i in range(100)]


class NumbersStem(Stem):
    def __init__(self, size, width):
        super().__init__()
        self.size, self.width = size, width
        self.embed = nn.Linear(size, width)

    def latents(self, raw):
        return Signal(self.embed(raw.x))


class Mixer(Backbone):
    """Adds the mean of all tokens to each."""

    def __init__(self, *, width: Annotated[int, about("of a token", ge=1)] = 8) -> None:
        super().__init__()
        self.width = width
        self.mix = nn.Linear(width, width)

    def forward(self, tokens, *, causal=False, context=None):
        return Signal(torch.relu(self.mix(tokens.x)) + tokens.x.mean(1, keepdim=True))


class Guess(Objective):
    """Guesses the raw values of its tokens."""

    towers = ("encoder",)
    paper = "A. Toy 2020, Guessing numbers, https://example.org/toy"
    presets: ClassVar = {
        "base": {
            **{"modality.name": "numbers", "backbone.name": "mixer", "backbone.width": 16},
            **{"train.batch": 8, "train.steps": 100, "optimizer.lr": 0.01, "optimizer.reference_batch": 8},
        },
        "tiny": {"train.steps": 12, "backbone.width": 8},
    }

    def __init__(
        self,
        encoder,
        *,
        share: Annotated[float, about("of nothing at all", gt=0, lt=1)] = 0.4,
        pause: Annotated[float, about("seconds that a step sleeps", ge=0)] = 0.0,
        poison: Annotated[int, about("the step whose loss is not a number; -1 for none")] = -1,
        crash: Annotated[int, about("the step that raises; -1 for none")] = -1,
    ) -> None:
        super().__init__()
        self.encoder, self.share, self.pause, self.poison, self.crash = encoder, share, pause, poison, crash
        self.head = nn.Linear(encoder.width, encoder.modality.width)

    def forward(self, batch, step):
        if self.pause:
            Path("pausing").write_text(str(step.number))
            time.sleep(self.pause)
        if step.number == self.crash:
            raise RuntimeError("a toy broke")
        raw = batch["encoder"]
        loss = (self.head(self.encoder(raw).x) - raw.x).square().mean()
        loss = loss * torch.nan if step.number == self.poison else loss
        return Loss(loss, {"size": raw.x.abs().mean()})
