"""GPT-2 here and in transformers, on the same weights; see `train.py`.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from contest import Contest as Paired
from contest import Side
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from selfsup.kernel import Signal, Step, Tower
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.common.token_stem import Tokens
from selfsup.plugins.objectives.gpt import GPT


@dataclass(frozen=True)
class Shape:
    """What a GPT-2 model and its batch measure."""

    batch: int
    tokens: int  # of a row
    width: int
    depth: int
    heads: int
    words: int = 50_257


SHAPES = {
    "small": Shape(8, 256, 256, 4, 4),
    "base": Shape(2, 512, 768, 12, 12),
    "long": Shape(1, 1024, 768, 12, 12),
    "tiny": Shape(2, 24, 32, 2, 2, 101),
}


class Contest(Paired):
    """Against `transformers.GPT2LMHeadModel`, without dropout; every row is one sequence."""

    peer, unit = "transformers.GPT2LMHeadModel", "tokens"

    def __init__(self, shape: Shape, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        torch.manual_seed(0)
        self.shape = shape
        self.theirs = GPT2LMHeadModel(config_of(shape)).train()
        self.ours = ours_of(shape).train()
        copy_weights(self.theirs, self.ours)
        self.theirs.to(device)
        self.ours.to(device)
        self.fill(shape.batch)

    def batch(self, samples: int) -> Tensor:
        return torch.randint(self.shape.words, (samples, self.shape.tokens))

    @property
    def amount(self) -> float:
        return self.shape.tokens

    def losses(self) -> tuple[Tensor, Tensor]:
        """Both losses of the batch."""
        return self.loss_of_ours(0), self.loss_of_theirs(0)

    def loss_of_ours(self, number: int) -> Tensor:
        return self.ours({"decoder": Signal(self.x), "ids": self.ids(number)}, Step(number, 1000)).total

    def loss_of_theirs(self, number: int) -> Tensor:
        return self.theirs(self.x, labels=self.x, use_cache=False).loss

    def loss_of_packed(self, number: int) -> Tensor:
        """Ours, with two documents in every row that do not see each other, as packed rows of real texts have."""
        place = torch.arange(self.shape.tokens, device=self.device)
        second = place >= self.shape.tokens // 2
        segments = (1 + second.int()).expand(self.samples, -1)
        places = torch.where(second, place - self.shape.tokens // 2, place).expand(self.samples, -1)
        batch = {"decoder": Signal(self.x, segments, places), "ids": self.ids(number)}
        return self.ours(batch, Step(number, 1000)).total

    def sides(self) -> dict[str, Side]:
        return {**super().sides(), "ours, two documents a row": Side(self.ours, self.loss_of_packed)}


def ours_of(shape: Shape) -> GPT:
    backbone = Transformer(
        width=shape.width, depth=shape.depth, heads=shape.heads, activation="gelu_tanh", length=shape.tokens
    )
    return GPT(Tower(Tokens(shape.words, shape.width), backbone))


def config_of(shape: Shape) -> GPT2Config:
    return GPT2Config(
        vocab_size=shape.words,
        n_positions=shape.tokens,
        n_embd=shape.width,
        n_layer=shape.depth,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


RENAMED = {  # a part of our name -> theirs
    "decoder.stem.embed": "transformer.wte",
    "decoder.backbone.positions.table": "transformer.wpe",
    "decoder.backbone.norm": "transformer.ln_f",
    "decoder.backbone.layers": "transformer.h",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def their_name(ours: str) -> str:
    """The name in transformers of one of our parameters."""
    for part, other in RENAMED.items():
        ours = ours.replace(part, other)
    return ours


def turned(name: str, x: Tensor) -> Tensor:
    """One of their parameters, or its gradient, as ours: the matrices of their layers lie the other way."""
    return x.T if ".c_" in name and x.dim() == 2 else x


@torch.no_grad()
def copy_weights(theirs: nn.Module, ours: nn.Module) -> None:
    """Give ours the weights of theirs; every parameter of both has its partner."""
    values = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        other = their_name(name)
        parameter.copy_(turned(other, values.pop(other)))
    assert not values, f"no partner for {sorted(values)}"


SIZES = {size: partial(Contest, shape) for size, shape in SHAPES.items()}
