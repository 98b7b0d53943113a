"""SimCLR: know your other view among the views of everyone else.

Chen, Kornblith, Norouzi and Hinton 2020, "A simple framework for contrastive learning of visual
representations", https://arxiv.org/abs/2002.05709. Two random views of every sample are encoded and
projected to unit vectors; for a view i with its partner j, equation 1 (NT-Xent):

    l(i, j) = -log( exp(z_i . z_j / t) / sum_{k != i} exp(z_i . z_k / t) )
    loss    = mean of l over all 2B views

with k over the views of all processes. The authors' code adds the means over the first and over the
second views instead, which is twice this loss: under LARS the same training, under SGD twice the
learning rate.

Deviations: the paper's head has two layers, its authors' newer code (and SimCLR v2) three; the option
`layers` is 3 and the preset "base" says 2. Linear layers of the head start as torch starts them.

Shapes: B samples of this process, G of all processes, D width of the tower, Z of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.kernel.config import about
from selfsup.kernel.contracts import Batch, Loss, Objective, Shown, Signal, Step, Tower
from selfsup.kernel.errors import ConfigError
from selfsup.plugins.common.heads import ProjectionHead
from selfsup.triton_ops.contrast_ring import contrast_everywhere


class SimCLR(Objective):
    """Contrast two views of each sample of any modality that has `view`.

    The negatives of a sample are the rest of the *global* batch, a process's share of it at a time. Gradient
    accumulation would leave each sample the negatives of its own microbatch only, which is another
    loss; so the batch is not divisible, and has to fit the memory of the processes.
    """

    towers = ("encoder",)
    divisible = False
    paper = (
        "Chen, Kornblith, Norouzi, Hinton 2020, A simple framework for contrastive learning of visual "
        "representations, https://arxiv.org/abs/2002.05709"
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {  # sections 2.1 to 2.4: ImageNet, ResNet-50
            "modality.name": "image",
            "modality.size": 224,
            "backbone.name": "resnet",
            "backbone.depth": 50,
            "objective.layers": 2,
            "train.batch": 4096,
            "train.epochs": 100,
            "optimizer.name": "lars",
            "optimizer.lr": 0.3,
            "optimizer.reference_batch": 256,
            "optimizer.scaling": "linear",
            "optimizer.weight_decay": 1e-6,
            "optimizer.schedule": "cosine",
            "optimizer.warmup": 0.1,
        },
        "cifar": {  # the command for CIFAR-10 in the README of the authors' code
            "modality.size": 32,
            "modality.blur_chance": 0.0,
            "backbone.depth": 18,
            "backbone.small": True,
            "objective.layers": 3,
            "objective.temperature": 0.5,
            "objective.strength": 0.5,
            "train.batch": 512,
            "train.epochs": 1000,
            "optimizer.lr": 1.0,
            "optimizer.weight_decay": 1e-4,
            "optimizer.warmup": 0.01,
        },
        "tiny": {  # grey digits of at most 28 pixels, on a CPU: a mirrored digit is another one, so nothing is flipped
            "modality.size": 28,
            "modality.patch": 4,
            "modality.channels": 1,
            "modality.flip_chance": 0.0,
            "modality.grey_chance": 0.0,
            "modality.blur_chance": 0.0,
            "backbone.depth": 18,
            "backbone.channels": 1,
            "objective.width": 64,
            "objective.temperature": 0.2,
            "objective.extent": (0.2, 1.0),
            "train.batch": 128,
            "train.steps": 150,
            "optimizer.name": "adamw",
            "optimizer.lr": 2e-3,
            "optimizer.reference_batch": 128,
            "optimizer.scaling": "sqrt",
            "optimizer.weight_decay": 0.05,
            "optimizer.warmup": 0.1,
        },
    }

    def __init__(
        self,
        encoder: Tower,
        *,
        width: Annotated[int, about("of the embedding that is compared", ge=1)] = 128,
        temperature: Annotated[float, about("of the softmax over similarities", gt=0)] = 0.1,
        hidden: Annotated[int | None, about("width inside the head; none: the encoder's", ge=1)] = None,
        layers: Annotated[int, about("linear layers of the head", ge=1)] = 3,
        extent: Annotated[tuple[float, float], about("least and largest share of a sample in a view")] = (0.08, 1.0),
        strength: Annotated[float, about("of the distortions beyond cropping and flipping", ge=0)] = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < extent[0] <= extent[1] <= 1:
            raise ConfigError(f"objective.extent = {list(extent)}: two shares, above 0, at most 1, the smaller first")
        self.encoder = encoder
        self.head = ProjectionHead(encoder.width, hidden or encoder.width, width, layers)
        self.temperature, self.extent, self.strength = temperature, (extent[0], extent[1]), strength

    def forward(self, batch: Batch, step: Step) -> Loss:
        """The loss of this process's views against those of all processes, and how the embedding fares."""
        ids = batch["ids"]
        features = self.encoder(stacked(*self.views(batch, step))).mean()  # [2B, D]
        embeddings = self.head(features)  # [2B, Z]
        with torch.autocast(embeddings.device.type, enabled=False):
            first, second = F.normalize(embeddings.float(), dim=-1).chunk(2)  # [B, Z] each
            loss, accuracy = nt_xent(first, second, ids, self.temperature)
            with torch.no_grad():
                alignment = (first - second).square().sum(-1).mean()
                spread = spread_of(features)
        return Loss(loss, {"accuracy": accuracy, "alignment": alignment, "spread": spread})

    def views(self, batch: Batch, step: Step) -> list[Signal]:
        """Two random views of every sample."""
        draws = [step.draw(f"view {name}", batch["ids"]) for name in ("a", "b")]
        return [self.encoder.view(batch["encoder"], self.extent, draw, self.strength) for draw in draws]

    @torch.no_grad()
    def show(self, batch: Batch, step: Step, guess: bool = True) -> Mapping[str, Sequence[Shown]]:
        """Both views of each sample; the guess is the view, of all that are shown, that is nearest to the first."""
        first, second = self.views(batch, step)
        modality = self.encoder.modality
        views = [*modality.show(first), *modality.show(second)]
        half = len(views) // 2
        shown = {"sample": modality.show(batch["encoder"]), "one view": views[:half], "its partner": views[half:]}
        if not guess:
            return shown
        embeddings = F.normalize(self.head(self.encoder(stacked(first, second)).mean()).float(), dim=-1)  # [2B, Z]
        nearest = (embeddings[:half] @ embeddings.T).fill_diagonal_(-torch.inf).argmax(1).tolist()  # [B]
        found = [views[i] for i in nearest]
        right = ["its partner" if i == row + half else "another sample's" for row, i in enumerate(nearest)]
        return {**shown, "nearest view": found, "which is": right}


def nt_xent(first: Tensor, second: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Equation 1 over this process's 2B views against all 2G: (mean loss, share of views nearest to their partner).

    `first` and `second` are unit vectors [B, Z], `ids` [B] names their samples, on all processes alike: one that is
    in the batch twice is no negative of itself.
    """
    rows, partners = torch.cat([first, second]), torch.cat([second, first])  # [2B, Z] each
    losses, nearest = contrast_everywhere(rows, partners, ids.repeat(2), temperature=temperature)  # [2B] each
    return losses.mean(), nearest.float().mean()


def stacked(first: Signal, second: Signal) -> Signal:
    """Two signals of one shape as one of twice the batch, so that one pass (and one batch norm) sees both."""
    x = torch.cat([first.x, second.x])
    joined = {
        name: None if ours is None else torch.cat([ours, theirs])
        for name in ("segments", "positions")
        for ours, theirs in [(getattr(first, name), getattr(second, name))]
    }
    edges = first.edges
    if edges is not None and second.edges is not None:
        # Edges name tokens of the flattened batch, so the second half's come after the first's.
        edges = torch.cat([edges, second.edges + first.x.shape[0] * first.x.shape[1]], 1)
    return replace(first, x=x, edges=edges, **joined)


def spread_of(features: Tensor) -> Tensor:
    """How far normalised features [N, D] vary over the batch, times sqrt(D): 0 where they have collapsed, at most 1.

    It looks at what is exported, because the head's last batch norm hides a collapse before it.
    """
    unit = F.normalize(features.float(), dim=-1)  # [N, D]
    return unit.std(0, correction=0).mean() * math.sqrt(features.shape[-1])
