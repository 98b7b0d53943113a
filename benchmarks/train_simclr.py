"""SimCLR here, in transformers and in timm, on the same weights; see `train.py`.

A batch is two views of every image, ready on both sides. The loss of the others is lightly's NTXentLoss where that is
installed, and otherwise the same formula in plain torch. Their convolutions lie channels last, as is fastest for them.

Shapes: B images, 2B views, Z of the embedding.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from contest import Contest as Paired
from contest import Side, normal, photos
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from selfsup.kernel import Signal, Step, Tower
from selfsup.kernel.contracts import Raw
from selfsup.plugins.backbones.resnet import ResNet
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.common.class_token import ClassToken
from selfsup.plugins.modalities.image import Image
from selfsup.plugins.objectives.simclr import SimCLR, nt_xent

TEMPERATURE = 0.1
DEPTHS = {18: ((2, 2, 2, 2), "basic", 1), 50: ((3, 4, 6, 3), "bottleneck", 4)}


@dataclass(frozen=True)
class Shape:
    """What the encoder and its batch measure: a ResNet of `depth` layers or, with a `patch`, a ViT."""

    batch: int
    size: int
    depth: int
    patch: int = 0
    width: int = 0
    heads: int = 0


SHAPES = {
    "resnet50": Shape(4, 224, 50),
    "vit": Shape(4, 224, 12, 16, 384, 6),  # ViT-S/16
    "tiny": Shape(4, 32, 18),
    "tiny-vit": Shape(4, 32, 2, 8, 32, 2),
}


class Contest(Paired):
    """Against `transformers.ResNetModel` or `ViTModel`; features are means over all places, the class token's too."""

    unit = "images"

    def __init__(self, shape: Shape, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        torch.manual_seed(0)
        self.shape, self.why = shape, dict[str, str]()
        self.criterion = self._criterion()
        self.ours = ours_of(shape).train()
        kind = "ViTModel" if shape.patch else "ResNetModel"
        self.peer = f"transformers.{kind}, with {self.criterion_name}"
        self.theirs = beside(theirs_of(shape), self.ours, their_names, device)
        self.timm = self._timm()
        self.ours.to(device)
        self.fill(shape.batch)

    def _criterion(self) -> Any:
        try:
            from lightly.loss import NTXentLoss
        except Exception as why:  # whatever another's package raises on import
            self.why["lightly's NTXentLoss"], self.criterion_name = said(why), "the plain formula"
            return plain_nt_xent
        self.criterion_name = "lightly's NTXentLoss"
        return NTXentLoss(temperature=TEMPERATURE)

    def _timm(self) -> nn.Module | None:
        try:
            import timm
        except Exception as why:  # as above
            self.why["timm"] = said(why)
            return None
        s = self.shape
        if s.patch:
            options = {"img_size": s.size, "patch_size": s.patch, "embed_dim": s.width, "depth": s.depth}
            model = timm.create_model("vit_small_patch16_224", num_heads=s.heads, num_classes=0, **options)
        else:
            model = timm.create_model(f"resnet{s.depth}", num_classes=0)
        return beside(model, self.ours, timm_names, self.device)

    def batch(self, samples: int) -> Tensor:
        canvas = self.ours.encoder.modality.canvas
        self.photos = self._pinned(photos(samples, canvas))
        return normal(2 * samples, 3, self.shape.size, self.shape.size)

    @property
    def amount(self) -> float:
        return 1

    def losses(self) -> tuple[Tensor, Tensor]:
        """Both losses of the batch."""
        return self.loss_of_ours(0), self.loss_of_theirs(0)

    def checked(self) -> dict[str, Tensor]:
        timm = {} if self.timm is None else {"timm": self.loss_of_timm(0)}
        return {**super().checked(), **timm}

    def loss_of_ours(self, number: int) -> Tensor:
        embeddings = self.ours.head(self.ours.encoder(Signal(self.x)).mean())  # [2B, Z]
        with torch.autocast(self.device.type, enabled=False):
            first, second = F.normalize(embeddings.float(), dim=-1).chunk(2)
            return nt_xent(first, second, self.ids(number), TEMPERATURE)[0]

    def loss_of_photos(self, number: int) -> Tensor:
        """Ours, from photos as workers hand them over: both views are drawn in the step."""
        batch = {"encoder": Signal(self.there(self.photos)), "ids": self.ids(number)}
        return self.ours(batch, Step(number, 1000)).total

    def loss_of_theirs(self, number: int) -> Tensor:
        return self.criterion(*self.theirs(self._last(self.x)).chunk(2))

    def loss_of_timm(self, number: int) -> Tensor:
        return self.criterion(*self.timm(self._last(self.x)).chunk(2))

    def _last(self, x: Tensor) -> Tensor:
        return x if self.shape.patch else x.to(memory_format=torch.channels_last)

    def sides(self) -> dict[str, Side]:
        more = {} if self.timm is None else {"timm": Side(self.timm, self.loss_of_timm)}
        return {**super().sides(), **more, "ours, views and all": Side(self.ours, self.loss_of_photos)}

    def absent(self) -> dict[str, str]:
        return self.why


class Features(nn.Module):
    """A model of others with the head of ours: [2B, 3, V, V] -> [2B, Z]."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.body, "forward_features"):  # timm's
            out = self.body.forward_features(x)
        else:
            out = self.body(x).last_hidden_state
        return self.head(out.flatten(2).mean(2) if out.ndim == 4 else out.mean(1))


def plain_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    """Equation 1 of SimCLR, with the matrix of all similarities."""
    z = F.normalize(torch.cat([first, second]), dim=-1)  # [2B, Z]
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)  # [2B, 2B]
    partner = torch.arange(len(z), device=z.device).roll(len(first))
    return F.cross_entropy(logits, partner)


def ours_of(shape: Shape) -> SimCLR:
    image = Image(size=shape.size, patch=shape.patch or shape.size)
    if not shape.patch:
        return SimCLR(Tower(Raw(), ResNet(depth=shape.depth), image), layers=2, temperature=TEMPERATURE)
    backbone = Transformer(width=shape.width, depth=shape.depth, heads=shape.heads, positions="sincos", norm_eps=1e-6)
    stem = ClassToken(image.stem(shape.width), shape.width)
    return SimCLR(Tower(stem, backbone, image), layers=2, temperature=TEMPERATURE)


def theirs_of(shape: Shape) -> nn.Module:
    if not shape.patch:
        depths, kind, times = DEPTHS[shape.depth]
        widths = [times * width for width in (64, 128, 256, 512)]
        return ResNetModel(ResNetConfig(depths=list(depths), hidden_sizes=widths, layer_type=kind))
    config = ViTConfig(
        image_size=shape.size,
        patch_size=shape.patch,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTModel(config, add_pooling_layer=False)


VIT = {  # ours -> transformers, in this order
    "stem.token": "embeddings.cls_token",
    "stem.patches.embed.": "embeddings.patch_embeddings.projection.",
    "backbone.norm.": "layernorm.",
    "backbone.layers.": "layers.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".mlp.up.": ".mlp.fc1.",
    ".mlp.down.": ".mlp.fc2.",
    ".attention.out.": ".attention.o_proj.",
}
TIMM = {  # ours -> timm, in this order; its ResNets have our names
    "stem.token": "cls_token",
    "stem.patches.embed.": "patch_embed.proj.",
    "backbone.layers.": "blocks.",
    "backbone.": "",
    ".mlp.up.": ".mlp.fc1.",
    ".mlp.down.": ".mlp.fc2.",
    ".attention.out.": ".attn.proj.",
    ".attention.qkv.": ".attn.qkv.",
}


def their_names(name: str) -> list[str]:
    """The names in transformers of one of our parameters: one, or three where we hold one matrix."""
    if not name.startswith(("stem.", "backbone.norm.", "backbone.layers.")):
        return [their_resnet(name.removeprefix("backbone."))]
    for ours, theirs in VIT.items():
        name = name.replace(ours, theirs)
    return [name.replace(".qkv.", f".{part}_proj.") for part in "qkv"] if ".qkv." in name else [name]


def their_resnet(name: str) -> str:
    """layer1.0.conv2.weight -> encoder.stages.0.layers.0.layer.1.convolution.weight"""
    *place, module, kind = name.split(".")
    kind = ("convolution." if module.startswith("conv") else "normalization.") + kind
    if not place:
        return f"embedder.embedder.{kind}"
    layer = f"encoder.stages.{int(place[0][-1]) - 1}.layers.{place[1]}"
    if "downsample" in place:
        return f"{layer}.shortcut.{'convolution' if module == '0' else 'normalization'}.{name.rpartition('.')[2]}"
    return f"{layer}.layer.{int(module[-1]) - 1}.{kind}"


def timm_names(name: str) -> list[str]:
    for ours, theirs in TIMM.items():
        name = name.replace(ours, theirs)
    return [name]


@torch.no_grad()
def beside(body: nn.Module, ours: SimCLR, names: Any, device: torch.device | str) -> nn.Module:
    """A model of others with the weights and the positions of ours; every trained parameter has its partner."""
    model = Features(body, deepcopy(ours.head)).train()
    values = dict(body.named_parameters())
    for name, parameter in ours.encoder.named_parameters():
        parts = [values.pop(other) for other in names(name)]
        for part, own in zip(parts, parameter.chunk(len(parts)), strict=True):
            if part.ndim == 4 and own.ndim == 2:  # a patch's values lie by (row, column, channel) here
                side = part.shape[2]
                own = own.view(len(own), side, side, -1).permute(0, 3, 1, 2)
            part.copy_(own.view_as(part))
    for name in [name for name in values if "pos" in name]:  # fixed here, so fixed there
        size = ours.encoder.modality.size
        tokens = ours.encoder.stem(Signal(torch.zeros(1, 3, size, size)))
        values.pop(name).copy_(ours.encoder.backbone.positions(tokens)).requires_grad_(False)
    if values:
        raise ValueError(f"no partner for {sorted(values)}")
    last = torch.channels_last if any(isinstance(part, nn.BatchNorm2d) for part in body.modules()) else None
    return model.to(device) if last is None else model.to(device, memory_format=last)


def said(why: BaseException) -> str:
    return f"{type(why).__name__}: {why}".splitlines()[0][:200]


SIZES = {size: partial(Contest, shape) for size, shape in SHAPES.items()}
