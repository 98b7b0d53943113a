"""MAE here and in transformers, on the same weights; see `train.py`.

A batch is views that are cropped and normalised already, on both sides. Shapes: B views, T patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from contest import Contest as Paired
from contest import Side, normal, photos
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from selfsup.kernel import Signal, Step, Tower
from selfsup.kernel.contracts import Raw
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.modalities.image import Image
from selfsup.plugins.objectives.mae import MAE


@dataclass(frozen=True)
class Shape:
    """What a MAE and its batch measure."""

    batch: int
    size: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int


SHAPES = {
    "small": Shape(16, 96, 8, 192, 6, 3, 128, 4, 4),
    "base": Shape(4, 224, 16, 768, 12, 12, 512, 8, 16),  # ViT-B/16
    "large": Shape(2, 224, 16, 1024, 24, 16, 512, 8, 16),  # ViT-L/16
    "tiny": Shape(2, 32, 8, 32, 2, 2, 16, 1, 2),
}


class Contest(Paired):
    """Against `transformers.ViTMAEForPreTraining`, whose masks are the ranks of noise that it draws."""

    peer, unit = "transformers.ViTMAEForPreTraining", "images"

    def __init__(self, shape: Shape, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        torch.manual_seed(0)
        self.shape = shape
        self.theirs = ViTMAEForPreTraining(config_of(shape)).train()
        self.ours = ours_of(shape).train()
        x = self.batch(shape.batch)
        copy_weights(self.theirs, self.ours, x)
        self.theirs.to(device)
        self.ours.to(device)
        self.fill(shape.batch)

    def batch(self, samples: int) -> Tensor:
        return normal(samples, 3, self.shape.size, self.shape.size)

    @property
    def amount(self) -> float:
        return 1

    def losses(self) -> tuple[Tensor, Tensor]:
        """Both losses, for the same masks."""
        with torch.no_grad():
            his = self.theirs(self.x)
            return self.ours.score(self.ours.encoder.stem.cut(Signal(self.x)), his.mask.bool()).total, his.loss

    def loss_of_ours(self, number: int) -> Tensor:
        patches = self.ours.encoder.stem.cut(Signal(self.x))
        batch = {"ids": self.ids(number)}
        return self.ours.score(patches, self.ours.hide(patches, batch, Step(number, 1000))).total

    def loss_of_photos(self, number: int) -> Tensor:
        """Ours, from photos as workers hand them over: views are cropped, resized and normalised in the step."""
        batch = {"encoder": Signal(self.there(self.photos)), "ids": self.ids(number)}
        return self.ours(batch, Step(number, 1000)).total

    def fill(self, samples: int) -> None:
        super().fill(samples)
        canvas = self.ours.encoder.modality.canvas
        self.photos = self._pinned(photos(samples, canvas))

    def sides(self) -> dict[str, Side]:
        return {**super().sides(), "ours, views and all": Side(self.ours, self.loss_of_photos)}

    def loss_of_theirs(self, number: int) -> Tensor:
        return self.theirs(self.x).loss


def ours_of(shape: Shape) -> MAE:
    image = Image(size=shape.size, patch=shape.patch)
    encoder = Transformer(width=shape.width, depth=shape.depth, heads=shape.heads, positions="sincos", norm_eps=1e-6)
    decoder = Transformer(
        width=shape.decoder_width,
        depth=shape.decoder_depth,
        heads=shape.decoder_heads,
        positions="sincos",
        norm_eps=1e-6,
    )
    return MAE(Tower(image.stem(shape.width), encoder, image), Tower(Raw(), decoder))


def config_of(shape: Shape) -> ViTMAEConfig:
    return ViTMAEConfig(
        image_size=shape.size,
        patch_size=shape.patch,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        decoder_hidden_size=shape.decoder_width,
        decoder_num_hidden_layers=shape.decoder_depth,
        decoder_num_attention_heads=shape.decoder_heads,
        decoder_intermediate_size=4 * shape.decoder_width,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
    )


RENAMED = {  # ours -> theirs, in this order
    "mask_token": "decoder.mask_token",
    "project.": "decoder.decoder_embed.",
    "head.": "decoder.decoder_pred.",
    "encoder.stem.token": "vit.embeddings.cls_token",
    "encoder.stem.patches.embed.": "vit.embeddings.patch_embeddings.projection.",
    "encoder.backbone.norm.": "vit.layernorm.",
    "decoder.backbone.norm.": "decoder.decoder_norm.",
    "encoder.backbone.layers.": "vit.layers.",
    "decoder.backbone.layers.": "decoder.decoder_layers.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".mlp.up.": ".mlp.fc1.",
    ".mlp.down.": ".mlp.fc2.",
    ".attention.out.": ".attention.o_proj.",
}


def their_names(name: str) -> list[str]:
    """The names in transformers of one of our parameters: one, or three where we hold one matrix."""
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs, 1) if name.startswith(ours) or ours[0] == "." else name
    return [name.replace(".qkv.", f".{part}_proj.") for part in "qkv"] if ".qkv." in name else [name]


@torch.no_grad()
def copy_weights(theirs: nn.Module, ours: MAE, x: Tensor) -> None:
    """Give ours the weights of theirs, and theirs our positions; every trained parameter has its partner."""
    values = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        parts = [values.pop(n) for n in their_names(name)]
        # A convolution over patches is our matrix, with the values of a patch by (row, column, channel).
        whole = torch.cat([part.permute(0, 2, 3, 1) if part.ndim == 4 else part for part in parts])
        parameter.copy_(whole.reshape(parameter.shape))
    places = ours.encoder.stem(Signal(x[:1])).positions
    tables = {"encoder": "vit.embeddings.position_embeddings", "decoder": "decoder.decoder_pos_embed"}
    for tower, name in tables.items():
        positions = getattr(ours, tower).backbone.positions
        # Made from a configuration, transformers' tables are zeros.
        values.pop(name).copy_(positions(Signal(torch.zeros(1, places.shape[1], 1), positions=places)))
    assert not values, f"no partner for {sorted(values)}"


SIZES = {size: partial(Contest, shape) for size, shape in SHAPES.items()}
