"""BERT here and in transformers, on the same weights; see `train.py`.

Shapes: B rows, T tokens, M the most chosen tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from contest import Contest as Paired
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

from selfsup.kernel import Signal, Step, Tower
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.common.token_stem import Tokens
from selfsup.plugins.objectives.bert import IGNORED, Bert

PAD, UNKNOWN, BEGIN, END, MASK = 0, 100, 101, 102, 103  # as in the authors' vocabulary


@dataclass(frozen=True)
class Shape:
    """What a BERT model and its batch measure."""

    batch: int
    tokens: int  # of a row
    width: int
    depth: int
    heads: int
    words: int = 30_522


SHAPES = {
    "small": Shape(16, 128, 256, 4, 4),
    "base": Shape(4, 128, 768, 12, 12),
    "long": Shape(2, 512, 768, 12, 12),
    "tiny": Shape(2, 24, 32, 2, 2, 1101),
}


class Tokenizer:
    """What the masks of transformers ask of a tokenizer."""

    mask_token = "[MASK]"

    def __init__(self, words: int) -> None:
        self.words = words

    def __len__(self) -> int:
        return self.words

    def convert_tokens_to_ids(self, token: str) -> int:
        return MASK


class Contest(Paired):
    """Against `transformers.BertForMaskedLM`, without dropout and without a next sentence; every row is one sequence.

    Its masks are those of transformers' collator. Its table of token types is zero, and not trained.
    """

    peer, unit = "transformers.BertForMaskedLM", "tokens"

    def __init__(self, shape: Shape, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        torch.manual_seed(0)
        self.shape = shape
        self.theirs = theirs_of(shape).train()
        self.ours = ours_of(shape).train()
        copy_weights(self.theirs, self.ours)
        self.theirs.to(device)
        self.ours.to(device)
        self.collator = DataCollatorForLanguageModeling(Tokenizer(shape.words))
        self.fill(shape.batch)

    def batch(self, samples: int) -> Tensor:
        x = torch.randint(1000, self.shape.words, (samples, self.shape.tokens))
        x[:, 0], x[:, -1] = BEGIN, END
        self.special = torch.zeros_like(x).index_fill_(1, torch.tensor([0, self.shape.tokens - 1]), 1)  # [B, T]
        return x

    @property
    def amount(self) -> float:
        return self.shape.tokens

    @property
    def needless(self) -> float:
        """The head of tokens that are not predicted: two matrices, forward and two ways back."""
        _, labels = self.masked()
        spared = float((labels == IGNORED).double().mean()) * self.shape.tokens
        return 6 * spared * self.shape.width * (self.shape.width + self.shape.words)

    def masked(self) -> tuple[Tensor, ...]:
        """What the model is shown and what it is to say, as transformers' collator makes them."""
        shown, labels = self.collator.torch_mask_tokens(self.host.clone(), special_tokens_mask=self.special)
        return shown, labels

    def losses(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Both losses for the same masks, which are ours."""
        raw = Signal(self.x)
        hidden = self.ours.hide(raw, self.ids(0), Step(0, 1, seed))
        truth = hidden.truth.masked_fill(~hidden.valid, IGNORED)  # [B, M]
        labels = torch.full_like(self.x, IGNORED).scatter(1, hidden.places, truth)  # [B, T]
        return self.ours.score(raw, hidden), self.theirs(hidden.ids, labels=labels).loss

    def loss_of_ours(self, number: int) -> Tensor:
        return self.ours({"encoder": Signal(self.x), "ids": self.ids(number)}, Step(number, 1000)).total

    def loss_of_theirs(self, number: int) -> Tensor:
        shown, labels = self.ahead(number, self.masked)
        return self.theirs(shown, labels=labels).loss


def ours_of(shape: Shape) -> Bert:
    backbone = Transformer(
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        norm_first=False,
        norm_eps=1e-12,
        input_norm=True,
        length=shape.tokens,
    )
    words = SimpleNamespace(mask=MASK, special=frozenset({PAD, UNKNOWN, BEGIN, END, MASK}))
    modality = SimpleNamespace(vocabulary=words, pack=False)
    return Bert(Tower(Tokens(shape.words, shape.width), backbone, modality))  # type: ignore[arg-type]


def theirs_of(shape: Shape) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=shape.words,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        max_position_embeddings=shape.tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    types = model.bert.embeddings.token_type_embeddings.weight
    types.requires_grad_(False).zero_()
    return model


RENAMED = {  # a part of our name -> theirs
    "encoder.stem.embed": "bert.embeddings.word_embeddings",
    "encoder.backbone.positions.table": "bert.embeddings.position_embeddings",
    "encoder.backbone.input_norm": "bert.embeddings.LayerNorm",
    "encoder.backbone.layers": "bert.encoder.layer",
    "norm1": "attention.output.LayerNorm",
    "norm2": "output.LayerNorm",
    "attention.qkv": "attention.self.{query,key,value}",
    "attention.out.": "attention.output.dense.",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
HEAD = {"dense": "transform.dense", "norm": "transform.LayerNorm", "bias": "bias"}


def their_names(ours: str) -> list[str]:
    """The names in transformers of one of our parameters: one, or three where we hold one matrix."""
    first, _, rest = ours.partition(".")
    if first in HEAD:
        return ["cls.predictions." + HEAD[first] + (f".{rest}" if rest else "")]
    for part, other in RENAMED.items():
        ours = ours.replace(part, other)
    return [ours.replace("{query,key,value}", part) for part in ("query", "key", "value")] if "{" in ours else [ours]


@torch.no_grad()
def copy_weights(theirs: nn.Module, ours: nn.Module) -> None:
    """Give ours the weights of theirs; every trained parameter of both has its partner."""
    values = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        parts = [values.pop(other) for other in their_names(name)]
        parameter.copy_(torch.cat(parts))
    assert not values, f"no partner for {sorted(values)}"


SIZES = {size: partial(Contest, shape) for size, shape in SHAPES.items()}
