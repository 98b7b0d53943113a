"""wav2vec 2.0 here and in transformers, on the same weights; see `train.py`.

Shapes: B utterances, T frames, M the most hidden frames, K negatives, G groups of V codebook entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import numpy as np
import torch
from contest import Contest as Paired
from contest import normal
from torch import Tensor, nn
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2 import modeling_wav2vec2 as peer

from selfsup.kernel import Signal, Step, Tower
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.common.masking import pack, pick
from selfsup.plugins.modalities.audio import Audio
from selfsup.plugins.objectives.wav2vec2 import Wav2Vec2
from selfsup.triton_ops.masks_span import capacity


@dataclass(frozen=True)
class Shape:
    """What a wav2vec 2.0 model and its batch measure."""

    batch: int
    seconds: float
    channels: int
    width: int
    depth: int
    heads: int
    codes: int  # width of the quantised latents
    entries: int
    negatives: int
    norm_first: bool = False
    kernel: int = 128  # of the convolutional positions


SHAPES = {
    "small": Shape(4, 5.0, 256, 256, 4, 4, 256, 320, 100),
    "base": Shape(2, 5.0, 512, 768, 12, 12, 256, 320, 100),
    "long": Shape(1, 15.0, 512, 768, 12, 12, 256, 320, 100),
    "tiny": Shape(2, 1.0, 16, 32, 2, 4, 16, 12, 20, kernel=8),
}


class Contest(Paired):
    """Against `transformers.Wav2Vec2ForPreTraining`, whose masks and negatives are drawn by its NumPy functions."""

    peer, unit = "transformers.Wav2Vec2ForPreTraining", "s of audio"

    def __init__(self, shape: Shape, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        torch.manual_seed(0)
        self.shape = shape
        self.theirs = peer.Wav2Vec2ForPreTraining(config_of(shape)).train()
        self.ours = ours_of(shape).train()
        copy_weights(self.theirs, self.ours)
        self.theirs.to(device)
        self.ours.to(device)
        self.frames = int(self.theirs._get_feat_extract_output_lengths(int(16000 * shape.seconds)))
        self.fill(shape.batch)

    def batch(self, samples: int) -> Tensor:
        return normal(samples, int(16000 * self.shape.seconds))

    @property
    def amount(self) -> float:
        return self.shape.seconds

    def losses(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Both losses, summed over hidden frames, for the same masks, negatives and noise."""
        np.random.seed(seed)
        hidden, sampled = map(self.there, self.peer_choices())
        noise = Step(0, 1, seed).draw("gumbel", self.ids(0))
        noise_all = noise.gumbel(self.frames, *self.ours.quantize.codebook.shape[:2])  # [B, T, G, V]
        index, _ = pack(hidden, capacity(self.frames, self.ours.spans))  # [B, M]
        within = sampled - self.ids(0)[:, None, None] * self.frames  # [B, T, K], a place in its row
        place = (
            (hidden.cumsum(1) - 1).clamp(min=0)[:, :, None].expand_as(within).gather(1, within)
        )  # [B, T, K], among the hidden
        local = self.ours.latents(Signal(self.x))
        mine = self.ours.score(local, hidden, pick(place, index), pick_noise(noise_all, index), 2.0)
        with same_noise(noise_all.flatten(0, 2)):
            his = self.theirs(self.x, mask_time_indices=hidden, sampled_negative_indices=sampled)
        return mine.total * mine.weight, his.loss

    def peer_choices(self) -> tuple[Tensor, Tensor]:
        """Masks [B, T] and negatives [B, T, K], as transformers' pretraining example draws them for every batch."""
        config, size = self.theirs.config, (self.samples, self.frames)
        hidden = peer._compute_mask_indices(size, config.mask_time_prob, config.mask_time_length, min_masks=2)
        negatives = peer._sample_negative_indices(size, config.num_negatives, hidden)
        return torch.from_numpy(hidden), torch.from_numpy(negatives).long()

    def loss_of_ours(self, number: int) -> Tensor:
        return self.ours({"encoder": Signal(self.x), "ids": self.ids(number)}, Step(number, 1000)).total

    def loss_of_theirs(self, number: int) -> Tensor:
        hidden, sampled = self.ahead(number, self.peer_choices)
        return self.theirs(self.x, mask_time_indices=hidden, sampled_negative_indices=sampled).loss / hidden.sum()


def layers_of(shape: Shape) -> tuple[tuple[int, int, int], ...]:
    c = shape.channels
    return ((c, 10, 5), *[(c, 3, 2)] * 4, *[(c, 2, 2)] * 2)


def ours_of(shape: Shape) -> Wav2Vec2:
    audio = Audio(
        layers=layers_of(shape), conv_norm="layer" if shape.norm_first else "group", conv_bias=shape.norm_first
    )
    backbone = Transformer(
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        norm_first=shape.norm_first,
        input_norm=not shape.norm_first,
        positions="conv",
        conv_kernel=shape.kernel,
    )
    return Wav2Vec2(
        Tower(audio.stem(shape.width), backbone, audio),
        width=shape.codes,
        entries=shape.entries,
        negatives=shape.negatives,
        penalty=0.0,  # which transformers does not have; nor does it scale the gradient of the convolutions
        feature_scale=1.0,
        dropout_input=0.0,
        dropout_features=0.0,
    )


def config_of(shape: Shape) -> Wav2Vec2Config:
    channels, kernels, strides = zip(*layers_of(shape), strict=True)
    return Wav2Vec2Config(
        conv_dim=channels,
        conv_kernel=kernels,
        conv_stride=strides,
        conv_bias=shape.norm_first,
        feat_extract_norm="layer" if shape.norm_first else "group",
        do_stable_layer_norm=shape.norm_first,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        num_conv_pos_embeddings=shape.kernel,
        num_codevectors_per_group=shape.entries,
        codevector_dim=shape.codes,
        proj_codevector_dim=shape.codes,
        num_negatives=shape.negatives,
        mask_time_prob=0.65,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
    )


RENAMED = {  # ours -> theirs; {} is the number of a layer
    "hidden": "wav2vec2.masked_spec_embed",
    "quantize.logits": "quantizer.weight_proj",
    "quantize.codebook": "quantizer.codevectors",
    "project_target": "project_q",
    "project_context": "project_hid",
    "encoder.stem.convs.{}.weight": "wav2vec2.feature_extractor.conv_layers.{}.conv.weight",
    "encoder.stem.convs.{}.conv": "wav2vec2.feature_extractor.conv_layers.{}.conv",
    "encoder.stem.convs.{}.norm": "wav2vec2.feature_extractor.conv_layers.{}.layer_norm",
    "encoder.stem.convs.{}.scale": "wav2vec2.feature_extractor.conv_layers.{}.layer_norm.weight",
    "encoder.stem.convs.{}.shift": "wav2vec2.feature_extractor.conv_layers.{}.layer_norm.bias",
    "encoder.stem.norm": "wav2vec2.feature_projection.layer_norm",
    "encoder.stem.project": "wav2vec2.feature_projection.projection",
    "encoder.backbone.positions.weight_g": "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    "encoder.backbone.positions.weight_v": "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1",
    "encoder.backbone.positions.bias": "wav2vec2.encoder.pos_conv_embed.conv.bias",
    "encoder.backbone.input_norm": "wav2vec2.encoder.layer_norm",
    "encoder.backbone.norm": "wav2vec2.encoder.layer_norm",
    "encoder.backbone.layers.{}.norm1": "wav2vec2.encoder.layers.{}.layer_norm",
    "encoder.backbone.layers.{}.norm2": "wav2vec2.encoder.layers.{}.final_layer_norm",
    "encoder.backbone.layers.{}.mlp.up": "wav2vec2.encoder.layers.{}.feed_forward.intermediate_dense",
    "encoder.backbone.layers.{}.mlp.down": "wav2vec2.encoder.layers.{}.feed_forward.output_dense",
    "encoder.backbone.layers.{}.attention.out": "wav2vec2.encoder.layers.{}.attention.out_proj",
    "encoder.backbone.layers.{}.attention.qkv": "wav2vec2.encoder.layers.{}.attention.{q,k,v}_proj",
}


def their_names(ours: str) -> list[str]:
    """The names in transformers of one of our parameters: one, or three where we hold one matrix."""
    number = next((part for part in ours.split(".") if part.isdigit()), "")
    general = ours.replace(f".{number}.", ".{}.") if number else ours
    end = "" if general in RENAMED else "." + general.rpartition(".")[2]
    name = RENAMED[general.removesuffix(end)] + end
    name = name.replace("{}", number)
    return [name.replace("{q,k,v}", part) for part in "qkv"] if "{q,k,v}" in name else [name]


@torch.no_grad()
def copy_weights(theirs: nn.Module, ours: nn.Module) -> None:
    """Give ours the weights of theirs; every parameter of both has its partner."""
    values = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        parameter.copy_(torch.cat([values.pop(n) for n in their_names(name)]).view_as(parameter))
    assert not values, f"no partner for {sorted(values)}"


def pick_noise(noise: Tensor, index: Tensor) -> Tensor:
    """Of noise for all frames [B, T, G, V], that of the frames in index [B, M]: [B, M, G, V]."""
    return pick(noise.flatten(2), index).unflatten(-1, noise.shape[2:])


@contextmanager
def same_noise(noise: Tensor) -> Iterator[None]:
    """torch's gumbel_softmax, with this noise in place of its own."""

    def gumbel_softmax(logits: Tensor, tau: float, hard: bool) -> Tensor:
        soft = ((logits + noise) / tau).softmax(-1)
        return torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0) - soft.detach() + soft

    with mock.patch.object(nn.functional, "gumbel_softmax", gumbel_softmax):
        yield


SIZES = {size: partial(Contest, shape) for size, shape in SHAPES.items()}
