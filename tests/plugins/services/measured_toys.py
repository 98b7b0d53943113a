"""Toys of every kind for services that measure: whatever could betray a measurement, changes in a forward pass."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import nn

from selfsup.kernel import Backbone, Loss, Modality, Objective, Part, Plugins, Signal, Stem, about, gather, hookimpl
from selfsup.kernel.errors import BadSample, DataError
from selfsup.plugins.services.checkpoints import Checkpoints
from selfsup.plugins.services.metrics import Metrics
from selfsup.plugins.services.online import Online
from selfsup.plugins.services.quarantine import Quarantine
from selfsup.plugins.services.validation import Validation


class Numbers(Modality):
    field = "number"

    def read(self, stored):
        if stored == "bad":
            raise BadSample("it is no number")
        return torch.full((5, 4), stored / 100) + torch.linspace(0, stored % 7, 4)

    def collate(self, raws, draw=None):
        x = torch.stack(raws)
        return Signal(x + draw("noise").normal(5, 4) if draw else x)

    def stem(self, width):
        return NumbersStem(width)


class NumbersStem(Stem):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Linear(4, width)

    def latents(self, raw):
        return Signal(self.embed(raw.x))


class Mixer(Backbone):
    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.1)

    def forward(self, tokens, *, causal=False, context=None):
        x = tokens.x
        for layer in self.layers:
            x = x + self.drop(torch.relu(layer(x)))
        return Signal(self.norm(x))

    def units(self):
        return self.layers


class Hide(Objective):
    """Guesses hidden tokens: a weight that differs by sample, a buffer that counts, a draw for the whole step."""

    towers = ("encoder",)
    paper = "a toy"
    presets: ClassVar = {"base": {"modality.name": "numbers", "backbone.name": "mixer", "train.batch": 8}}

    def __init__(self, encoder) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(8, 4)
        self.vector = nn.Parameter(torch.zeros(8))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch, step):
        self.seen += len(batch["ids"]) + torch.rand(())  # the state of torch moves on too
        raw = batch["encoder"]
        hidden = step.draw("mask", batch["ids"]).chance(0.4, 5)  # [B, 5]
        shift = step.draw_once("shift").uniform(1)[0]
        guess = self.head(self.encoder.backbone(self.encoder.stem(raw).fill(hidden, self.vector)).x)
        error = (guess - raw.x - shift).square().mean(-1)  # [B, 5]
        count = hidden.sum()
        metrics = {"size": (guess.norm(dim=-1) * hidden).sum() / count.clamp(min=1)}
        metrics["fraction"] = torch.tensor(step.fraction)
        return Loss((error * hidden).sum() / count.clamp(min=1), metrics, count)


class Contrast(Hide):
    """Tells samples from each other, over all processes."""

    divisible = False

    def forward(self, batch, step):
        z = self.head(self.encoder(batch["encoder"]).mean())  # [B, 4]
        near = z @ gather(z).T  # [B, world * B]
        return Loss(near.logsumexp(1).mean() - (z * z).sum(1).mean() + 0 * self.vector.sum())


class List:
    notes = ("a list",)

    def __init__(self, items, sizes, refused):
        self.items, self.parts = items, [Part(size, size) for size in sizes]
        self.left_out = [{"path": f"{number}.tar", "reason": "it is cut"} for number in range(refused)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        number = self.items[index]
        return {"number": number} if number == "bad" else {"number": number, "label": number % 7 // 3}

    def name(self, index):
        return f"item {index}"


class Data:
    """ "10 30" are the numbers from 10 to 29, "10 30 2" with two bad ones, "10 30 2 1" beside a refused file too."""

    opened: ClassVar = []  # (label, path) of what was opened
    fixed = ("paths",)

    def __init__(
        self,
        *,
        paths: Annotated[list[str], about("see above")] = ["0 40"],  # noqa: B006
        label: Annotated[str | None, about("unused")] = None,
        max_bad_fraction: Annotated[float, about("share")] = 0.2,
    ) -> None:
        self.label = label

    @hookimpl
    def open_data(self, paths):
        items, sizes, gone = [], [], 0
        for path in paths:
            Data.opened.append((self.label, path))
            first, end, bad, refused = (*self.numbers(path), 0, 0)[:4]
            part = list(range(first, end))
            part[1 : 1 + bad] = ["bad"] * bad
            items, sizes, gone = items + part, [*sizes, len(part)], gone + refused
        return List(items, sizes, gone)

    def numbers(self, path):
        try:
            return [*map(int, path.split())]
        except ValueError:
            raise DataError(f"there is nothing at {path!r}") from None


class Optimizer:
    def __init__(self, *, lr: float = 1e-2) -> None:
        self.lr = lr

    @hookimpl
    def build_optimizer(self, objective):
        return torch.optim.AdamW(objective.parameters(), lr=self.lr, fused=True)


class Listener:
    """What was measured: [(steps done, values)]."""

    def __init__(self) -> None:
        self.heard = []

    @hookimpl
    def measured(self, run, values):
        self.heard.append((run.done, dict(values)))


class Toys(Plugins):
    toys: ClassVar = {
        "objectives": {"hide": Hide, "contrast": Contrast},
        "modalities": {"numbers": Numbers},
        "backbones": {"mixer": Mixer},
        "services": {
            "checkpoints": Checkpoints,
            "data": Data,
            "metrics": Metrics,
            "online": Online,
            "optimizer": Optimizer,
            "quarantine": Quarantine,
            "validation": Validation,
        },
        "commands": {},
    }

    def names(self, kind):
        return sorted(self.toys[kind])

    def load(self, kind, name):
        return self.toys[kind][name]
