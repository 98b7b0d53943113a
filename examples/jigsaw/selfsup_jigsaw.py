"""Jigsaw: put nine shuffled tiles of a picture back in order.

Noroozi and Favaro 2016, "Unsupervised learning of visual representations by solving jigsaw puzzles",
https://arxiv.org/abs/1603.09246. A picture is cut into 3 x 3 cells, a tile is taken from a random place in each
cell, and the tiles are shown in one of P orders that differ from each other as much as possible. Every tile is
encoded alone; from all nine features f the head h guesses which order it was:

    L = cross entropy(h([f(tile_1), ..., f(tile_9)]), order)

Deviations: a ResNet in place of the paper's AlexNet; crops follow the modality, and colour channels are not shifted;
the orders are picked, each as far as can be from those before, among 10,000 random ones instead of all 9!.

Shapes: B pictures, C channels, V side of a view, S side of a tile, D width of the encoder, P orders.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from selfsup.kernel import Batch, Loss, Objective, Signal, Step, Stream, Tower, about, stream
from selfsup.kernel.errors import ContractError


class Jigsaw(Objective):
    """Which of P orders are the tiles of a picture in? For any modality whose views are [B, C, V, V]."""

    contract = 1  # of selfsup.kernel.contracts, which this was written for
    towers = ("encoder",)
    paper = "Noroozi and Favaro 2016, Jigsaw puzzles, https://arxiv.org/abs/1603.09246"
    presets: ClassVar = {
        "base": {
            **{"modality.name": "image", "modality.size": 225, "modality.patch": 15, "backbone.name": "resnet"},
            **{"optimizer.name": "sgd", "optimizer.lr": 0.01, "train.batch": 256, "train.steps": 350_000},
        },
        "tiny": {
            **{"modality.size": 36, "modality.patch": 4, "objective.tile": 8, "objective.orders": 24},
            **{"backbone.name": "transformer", "backbone.positions": "sincos", "backbone.width": 48},
            **{"backbone.depth": 2, "optimizer.name": "adamw", "optimizer.lr": 1e-3, "train.steps": 200},
        },
    }

    def __init__(
        self,
        encoder: Tower,
        *,
        orders: Annotated[int, about("how many orders there are to tell apart", ge=2, le=10_000)] = 1000,
        tile: Annotated[int, about("side of a tile in pixels; at most a third of a view", ge=1)] = 64,
        extent: Annotated[tuple[float, float], about("least and largest share of a picture in a view")] = (0.77, 1.0),
    ) -> None:
        super().__init__()
        self.encoder, self.tile, self.extent = encoder, tile, extent
        self.register_buffer("orders", distant(orders))
        self.head = nn.Sequential(nn.Linear(9 * encoder.width, 1024), nn.ReLU(), nn.Linear(1024, orders))

    def forward(self, batch: Batch, step: Step) -> Loss:
        """Shuffle the tiles of every picture and guess their order."""
        ids = batch["ids"]
        view = self.encoder.view(batch["encoder"], self.extent, step.draw("view", ids), strength=0).x
        order = step.draw("order", ids).integers(len(self.orders), 1)[:, 0]  # [B]
        tiles = self.cut(view, self.orders[order], step.draw("place", ids))  # [B, 9, C, S, S]
        # Without its own mean and contrast, a tile does not tell its neighbours by the light.
        tiles = nn.functional.layer_norm(tiles, tiles.shape[2:])
        features = self.encoder(Signal(tiles.flatten(0, 1))).mean()  # [9 B, D]
        guess = self.head(features.view(len(ids), -1)).float()  # [B, P]
        return Loss(nn.functional.cross_entropy(guess, order), {"accuracy": (guess.argmax(1) == order).float().mean()})

    def cut(self, view: Tensor, cells: Tensor, draw: Stream) -> Tensor:
        """A tile from a random place in each of these cells [B, 9] of a view [B, C, V, V]: [B, 9, C, S, S]."""
        cell = view.shape[-1] // 3
        if cell < self.tile:
            raise ContractError(f"a tile of {self.tile} pixels does not fit a third of a view of {view.shape[-1]}")
        row, column = draw.integers(cell - self.tile + 1, 9, 2).unbind(2)  # [B, 9], within the cell
        side = torch.arange(self.tile, device=view.device)
        rows = (cells // 3 * cell + row)[..., None] + side  # [B, 9, S]
        columns = (cells % 3 * cell + column)[..., None] + side  # [B, 9, S]
        pictures = torch.arange(len(view), device=view.device)[:, None, None, None]
        tiles = view.movedim(1, 3)[pictures, rows[..., :, None], columns[..., None, :]]  # [B, 9, S, S, C]
        return tiles.movedim(4, 2)


def distant(count: int) -> Tensor:
    """Permutations of nine that are far apart: [P, 9]."""
    pool = stream(0, "jigsaw", torch.arange(10_000)).permutation(9)  # [10000, 9]
    picked, least = [0], torch.full((len(pool),), 9)
    while len(picked) < count:
        least = least.minimum((pool != pool[picked[-1]]).sum(1))  # [10000], Hamming distance to the nearest picked
        picked.append(int(least.argmax()))
    return pool[picked]
