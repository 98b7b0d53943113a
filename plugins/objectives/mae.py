"""MAE: see a quarter of the patches, paint the rest.

He, Chen, Xie, Li, Dollár and Girshick 2021, "Masked autoencoders are scalable vision learners",
https://arxiv.org/abs/2111.06377. The encoder sees the visible patches alone; a small decoder sees its tokens and, for
each hidden patch, one learned vector and the patch's position. Section 3: the mean squared error at hidden patches,

    loss = mean over hidden t, p of (guess_tp - target_tp)^2
    target_t = (x_t - mean(x_t)) / sqrt(var(x_t) + 1e-6)        with norm_pixels, var unbiased; else x_t

As in the authors' code the linear layers of both towers start Xavier-uniform, the class token and the mask token from
normal(0, 0.02), and both tokens are decayed, as matrices are; biases and norms are not.

Deviations: the head runs at hidden patches alone. Tokens know their places, so the decoder gets the visible ones and
then the hidden ones, side by side for the head: nothing is sorted before it or picked behind it. In the positions a
grid's rows come before its columns, in the authors' code after them: the same model, its channels in another order.
Crops are resized bilinearly, the paper's bicubically. Evaluation averages all tokens, the class token among them.

Shapes: B batch, T patches, K visible and M hidden ones, P values of a patch, D width of the encoder, E of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from selfsup.kernel.config import about
from selfsup.kernel.contracts import Batch, Loss, Objective, Shown, Signal, Step, Tower
from selfsup.kernel.errors import ConfigError, ContractError
from selfsup.plugins.common.class_token import ClassToken
from selfsup.plugins.common.patch_stem import PatchStem
from selfsup.triton_ops._masks import Masked, dealt
from selfsup.triton_ops.masks_random import hidden_count, random_mask
from selfsup.triton_ops.patch_mse import patch_mse_with_spread
from selfsup.triton_ops.take_patches import take_patches

EPS = 1e-6  # added to the variance of a patch


class MAE(Objective):
    """Rebuild hidden patches of any modality that has views and whose stem cuts patches.

    Rows may be padded: each hides its own exact count, and what is padding in one row is no part of any sum.
    """

    towers = ("encoder", "decoder")
    paper = (
        "He, Chen, Xie, Li, Dollár, Girshick 2021, Masked autoencoders are scalable vision learners, "
        "https://arxiv.org/abs/2111.06377"
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {  # section 4 and table 8: ImageNet, ViT-B/16, 800 epochs
            "modality.name": "image",
            "modality.size": 224,
            "modality.patch": 16,
            "modality.mean": (0.485, 0.456, 0.406),
            "modality.std": (0.229, 0.224, 0.225),
            "backbone.name": "transformer",
            "backbone.width": 768,
            "backbone.depth": 12,
            "backbone.heads": 12,
            "backbone.norm_eps": 1e-6,
            "backbone.positions": "sincos",
            "towers.decoder.modality.name": "none",
            "towers.decoder.backbone.width": 512,
            "towers.decoder.backbone.depth": 8,
            "towers.decoder.backbone.heads": 16,
            "train.batch": 4096,
            "train.epochs": 800,
            "optimizer.name": "adamw",
            "optimizer.lr": 1.5e-4,
            "optimizer.reference_batch": 256,
            "optimizer.scaling": "linear",
            "optimizer.betas": (0.9, 0.95),
            "optimizer.weight_decay": 0.05,
            "optimizer.schedule": "cosine",
            "optimizer.warmup": 0.05,  # 40 epochs
        },
        "large": {"backbone.width": 1024, "backbone.depth": 24, "backbone.heads": 16},  # ViT-L/16
        "huge": {  # ViT-H/14
            "modality.patch": 14,
            "backbone.width": 1280,
            "backbone.depth": 32,
            "backbone.heads": 16,
        },
        "tiny": {  # grey digits of at most 28 pixels, on a CPU: a mirrored digit is another one, so nothing is flipped
            "objective.extent": (0.5, 1.0),
            "modality.size": 28,
            "modality.patch": 4,
            "modality.channels": 1,
            "modality.mean": (0.5,),
            "modality.std": (0.25,),
            "modality.flip_chance": 0.0,
            "backbone.width": 128,
            "backbone.depth": 4,
            "backbone.heads": 4,
            "towers.decoder.backbone.width": 64,
            "towers.decoder.backbone.depth": 2,
            "towers.decoder.backbone.heads": 4,
            "train.batch": 128,
            "train.steps": 1000,
            "optimizer.lr": 1e-3,
            "optimizer.reference_batch": 128,
        },
    }

    def __init__(
        self,
        encoder: Tower,
        decoder: Tower,
        *,
        mask_share: Annotated[float, about("of the patches that are hidden", gt=0, lt=1)] = 0.75,
        norm_pixels: Annotated[bool, about("targets have mean 0 and variance 1 in each patch")] = True,
        class_token: Annotated[bool, about("a learned token before the patches, in both towers")] = True,
        extent: Annotated[tuple[float, float], about("least and largest share of a sample in a view")] = (0.2, 1.0),
    ) -> None:
        super().__init__()
        if not 0 < extent[0] <= extent[1] <= 1:
            raise ConfigError(f"objective.extent = {list(extent)}: two shares, above 0, at most 1, the smaller first")
        patches = stem_of(encoder)
        if norm_pixels and patches.size < 2:
            raise ConfigError(
                "a patch of one value has no variance: set objective.norm_pixels = false, or larger patches"
            )
        if class_token:
            encoder.stem = ClassToken(patches, encoder.width)
        self.encoder, self.decoder = encoder, decoder
        self.project = nn.Linear(encoder.width, decoder.width)
        self.mask_token = nn.Parameter(torch.empty(1, decoder.width))
        self.head = nn.Linear(decoder.width, patches.size)
        self.mask_share, self.norm_pixels, self.extent = mask_share, norm_pixels, (extent[0], extent[1])
        for part in (encoder.backbone, decoder.backbone, self.project, self.head):
            part.apply(start)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, batch: Batch, step: Step) -> Loss:
        """Cut a view of every sample, hide most of it and score; every draw is a function of the sample's id."""
        patches = self.encoder.stem.cut(self.view(batch, step))  # [B, T, P]
        return self.score(patches, self.hide(patches, batch, step))

    def view(self, batch: Batch, step: Step) -> Signal:
        """A crop of every sample, flipped or not, and otherwise as it is."""
        return self.encoder.view(batch["encoder"], self.extent, step.draw("view", batch["ids"]), 0.0)

    def hide(self, patches: Signal, batch: Batch, step: Step) -> Masked:
        """Which patches of each sample are hidden, and which are seen."""
        if patches.x.shape[1] < 2:
            raise ContractError(
                "a sample of one patch is either hidden or seen; choose smaller patches or larger samples"
            )
        return random_mask(step.draw("mask", batch["ids"]), patches.real(), self.mask_share)

    def score(self, patches: Signal, hidden: Masked | Tensor) -> Loss:
        """The loss of hiding these of the patches [B, T, P]: what `hide` gives, or [B, T] bool with as many."""
        guess, mask = self.guess(patches, hidden)
        total, spread = patch_mse_with_spread(
            guess, patches.x, mask.hide, mask.hide_real, normalize=self.norm_pixels, eps=EPS
        )
        explained = 1 - total.detach() / spread.clamp(min=1e-6)
        return Loss(total, {"explained": explained}, weight=mask.hide_real.sum())

    def guess(self, patches: Signal, hidden: Masked | Tensor) -> tuple[Tensor, Masked]:
        """What the hidden patches are taken to be [B, M, P], in the order of `hide` in the mask that comes with it."""
        tokens = patches.x.shape[1]
        count = hidden_count(tokens, self.mask_share)  # M
        mask = hidden if isinstance(hidden, Masked) else dealt(hidden, patches.real(), tokens - count)
        seen = replace(places(patches, mask.keep), x=take_patches(patches.x, mask.keep))  # [B, K, P]
        encoded = self.encoder.backbone(self.encoder.stem.tokens(seen))  # [B, 1 + K, D]
        wanted = replace(places(patches, mask.hide), x=self.mask_token.expand(*mask.hide.shape, -1))  # [B, M, E]
        given = joined(replace(encoded, x=self.project(encoded.x)), wanted)  # [B, 1 + K + M, E]
        return self.head(self.decoder(given).x[:, -count:]), mask

    @torch.no_grad()
    def show(self, batch: Batch, step: Step, guess: bool = True) -> Mapping[str, Sequence[Shown]]:
        """The view, the view with hidden patches halfway between its extremes, and the view with their guesses.

        With `norm_pixels` a guess has neither mean nor deviation: it is given those of the true patch.
        """
        view, stem = self.view(batch, step), self.encoder.stem
        patches = stem.cut(view)
        mask = self.hide(patches, batch, step)
        grey = (patches.x.amin((1, 2), keepdim=True) + patches.x.amax((1, 2), keepdim=True)) / 2  # [B, 1, 1]
        visible = torch.where(mask.hidden[..., None], grey, patches.x)
        shown = {"view": patches.x, "what the model sees": visible}
        if guess:
            values, true = self.guess(patches, mask)[0].to(patches.x.dtype), take_patches(patches.x, mask.hide)
            if self.norm_pixels:
                values = values * (true.var(-1, keepdim=True) + EPS).sqrt() + true.mean(-1, keepdim=True)
            values = torch.where(mask.hide_real[..., None], values, true)
            caption = "rebuilt" + ", each patch with its true mean and deviation" * self.norm_pixels
            shown[caption] = patches.x.scatter(1, mask.hide[..., None].expand_as(values), values)
        return {name: self.encoder.modality.show(stem.uncut(x, view)) for name, x in shown.items()}


def stem_of(encoder: Tower) -> PatchStem:
    """The encoder's stem, if it cuts patches; ConfigError says what to do where it does not."""
    if isinstance(encoder.stem, PatchStem):
        return encoder.stem
    if encoder.backbone.wants_raw:
        raise ConfigError(
            "MAE's encoder sees some of the patches, and this backbone wants the whole signal: --backbone transformer"
        )
    field = getattr(encoder.modality, "field", "of this tower")
    raise ConfigError(
        f"the modality {field!r} has a stem that cuts no patches, which MAE hides; choose another modality"
    )


def places(patches: Signal, index: Tensor) -> Signal:
    """Where the patches are that index [B, K] names, without their values."""
    return replace(patches, x=patches.x[..., :0]).take(index)


def joined(first: Signal, second: Signal) -> Signal:
    """The tokens of both, side by side, with their places."""
    ours, theirs = first.segments, second.segments
    segments = None if ours is None or theirs is None else torch.cat([ours, theirs], 1)
    return Signal(torch.cat([first.x, second.x], 1), segments, torch.cat([first.places(), second.places()], 1))


def start(module: nn.Module) -> None:
    """First values of a linear layer; others keep theirs."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
