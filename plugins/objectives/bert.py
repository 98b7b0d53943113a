"""BERT: predict hidden tokens of a text from those on both sides.

Devlin, Chang, Lee, Toutanova 2018, "BERT: Pre-training of deep bidirectional transformers for language
understanding", https://arxiv.org/abs/1810.04805, section 3.1. Of the tokens x of a sequence, 15 % are chosen;
of these 80 % are replaced by a mask, 10 % by a random token, and 10 % stay. For a chosen place m, the encoder's output
h_m becomes a guess in a head whose last matrix is the table E of the embedding (the authors' code):

    g_m = LayerNorm(GELU(W h_m + c))        L = mean over chosen m of  -log softmax(E g_m + b)[x_m]

The mean is over all chosen tokens of a batch. Head and logits exist at chosen places alone.

What differs from the paper, and why:

* There is no prediction of the next sentence, and so no table of token types and no pooled [CLS]: Liu et al. 2019,
  "RoBERTa", https://arxiv.org/abs/1907.11692, section 4.2, find the tasks at which BERT is used better without it.
* Masks are drawn anew whenever a text is seen, as RoBERTa does; the authors' code writes ten masks of each to disk.
* 80, 10 and 10 % are exact counts of a row (see `common/corrupt.py`), not draws token by token.
* All steps are at the full length; the authors' first 900,000 of 1,000,000 have 128 tokens.
* Unknown words, [UNK], are never chosen, as no special token is; the authors spare [CLS] and [SEP] alone.

The preset "roberta" is RoBERTa's recipe, but that random tokens come from the whole vocabulary, special ones
included, as in BERT, and that a row holds pieces of documents that do not see each other, not one stream of sentences
across documents.

Shapes: B rows, T tokens, D width of the backbone, V tokens in the vocabulary, M the most chosen tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup.kernel import Batch, Loss, Objective, Shown, Signal, Stem, Step, Tower, about
from selfsup.kernel.contracts import returned
from selfsup.kernel.errors import ConfigError, ContractError
from selfsup.plugins.common.corrupt import Choice, Corrupted, capacity, choose, corrupt
from selfsup.plugins.common.marked_text import marked
from selfsup.triton_ops.linear_cross_entropy import linear_cross_entropy

IGNORED = -100


class Bert(Objective):
    """Guess the hidden 15 % of a text's tokens; learns language from text alone."""

    towers = ("encoder",)
    paper = "Devlin et al. 2018, BERT, https://arxiv.org/abs/1810.04805"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {  # BERT-base, appendix A.2; the authors' code clips the gradient and sets eps
            "modality.name": "text",
            "modality.tokenizer": "wordpiece",
            "modality.vocabulary": 30_522,
            "modality.length": 512,
            "modality.ends": "piece",
            "modality.pieces": 16,
            "backbone.name": "transformer",
            "backbone.width": 768,
            "backbone.depth": 12,
            "backbone.heads": 12,
            "backbone.norm_first": False,
            "backbone.norm_eps": 1e-12,
            "backbone.input_norm": True,
            "backbone.length": 512,
            "backbone.packed": 16,
            "backbone.dropout": 0.1,
            "backbone.attention_dropout": 0.1,
            "optimizer.name": "adamw",
            "optimizer.lr": 1e-4,
            "optimizer.betas": (0.9, 0.999),
            "optimizer.eps": 1e-6,
            "optimizer.weight_decay": 0.01,
            "optimizer.schedule": "linear",
            "optimizer.warmup": 0.01,
            "optimizer.reference_batch": 256,
            "optimizer.scaling": "sqrt",
            "train.steps": 1_000_000,
            "train.batch": 256,
            "train.clip": 1.0,
        },
        "large": {  # BERT-large
            "backbone.width": 1024,
            "backbone.depth": 24,
            "backbone.heads": 16,
        },
        "roberta": {  # RoBERTa-base, appendix A, table 9
            "modality.tokenizer": "bpe",
            "modality.vocabulary": 50_265,
            "optimizer.lr": 6e-4,
            "optimizer.betas": (0.9, 0.98),
            "optimizer.warmup": 0.048,
            "optimizer.reference_batch": 8192,
            "train.steps": 500_000,
            "train.batch": 8192,
            "train.clip": 0.0,
        },
        "tiny": {  # minutes on two CPU cores; rotary positions and pre-norm, which learn sooner
            "modality.vocabulary": 2048,
            "modality.length": 128,
            "backbone.width": 128,
            "backbone.depth": 3,
            "backbone.heads": 4,
            "backbone.norm_first": True,
            "backbone.input_norm": False,
            "backbone.positions": "rotary",
            "backbone.dropout": 0.0,
            "backbone.attention_dropout": 0.0,
            "optimizer.lr": 3e-3,
            "optimizer.betas": (0.9, 0.98),
            "optimizer.warmup": 0.1,
            "optimizer.reference_batch": 16,
            "train.steps": 1500,
            "train.batch": 16,
        },
    }

    def __init__(
        self,
        encoder: Tower,
        *,
        share: Annotated[float, about("of the tokens of a sequence that are predicted", gt=0, lt=1)] = 0.15,
        most: Annotated[int | None, about("predictions of a sequence; none: as many as `share` says", ge=1)] = None,
    ) -> None:
        super().__init__()
        stem, modality = encoder.stem, encoder.modality
        if not isinstance(stem, Stem) or not stem.discrete:
            raise ContractError("BERT predicts tokens of a vocabulary, and this modality has none; try --modality text")
        table = getattr(stem, "embed", None)
        if table is None or table.weight.shape != (stem.size, encoder.width):
            raise ContractError(
                "BERT predicts with a stem's table of embeddings, which must be as wide as the backbone"
            )
        if modality.vocabulary.mask is None:
            raise ConfigError(
                f"modality.tokenizer = {modality.tokenizer!r} has no token that masks others, such as [MASK] or "
                "<mask>, and BERT hides tokens behind it; try wordpiece"
            )
        self.encoder, self.choice = encoder, Choice(share, most)
        self.mask, self.size = modality.vocabulary.mask, stem.size
        self.sequences: int = modality.pieces if modality.pack else 1  # in a row, at most
        self.dense = nn.Linear(encoder.width, encoder.width)
        self.norm = nn.LayerNorm(encoder.width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(self.size))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)
        self.special: Tensor  # [V] bool
        self.register_buffer("special", torch.zeros(self.size, dtype=torch.bool), persistent=False)
        self.special[sorted(modality.vocabulary.special)] = True

    def forward(self, batch: Batch, step: Step) -> Loss:
        """Choose, corrupt and score; every draw is a function of the row's id."""
        raw = batch["encoder"]
        hidden = self.hide(raw, batch["ids"], step)
        total = self.score(raw, hidden)
        return Loss(total, {"perplexity": total.detach().exp()}, weight=hidden.valid.sum())

    def hide(self, raw: Signal, ids: Tensor, step: Step) -> Corrupted:
        """The rows as the encoder sees them, and what is to be predicted."""
        tokens = self.encoder.stem.targets(raw)  # [B, T]
        segments = raw.real() if raw.segments is None else raw.segments
        chosen = choose(step.draw("mask", ids), segments, ~self.special[tokens] & raw.real(), self.choice)  # [B, T]
        size = capacity(tokens.shape[1], self.sequences, self.choice)
        return corrupt(tokens, chosen, size, self.mask, self.size, step.draw("replace", ids))

    def score(self, raw: Signal, hidden: Corrupted) -> Tensor:
        """The loss of given choices."""
        labels = hidden.truth.masked_fill(~hidden.valid, IGNORED)  # [B, M]
        guess = self.guess(raw, hidden).flatten(0, 1)  # [B M, D]
        return linear_cross_entropy(guess, self.encoder.stem.embed.weight, labels.flatten(), self.bias)

    def guess(self, raw: Signal, hidden: Corrupted) -> Tensor:
        """What the head makes of each chosen place, to be compared with the table: [B, M, D]."""
        tokens = self.encoder.stem(replace(raw, x=hidden.ids))  # [B, T, D]
        backbone = self.encoder.backbone
        context = returned(backbone, "at", backbone.at(tokens, hidden.places), Tensor)  # [B, M, D]
        out: Tensor = self.norm(F.gelu(self.dense(context)))
        return out

    def show(self, batch: Batch, step: Step, guess: bool = True) -> Mapping[str, Sequence[Shown]]:
        """The rows as the encoder sees them, and with the most likely token at each chosen place."""
        raw, words = batch["encoder"], self.encoder.modality.vocabulary
        hidden = self.hide(raw, batch["ids"], step)
        rows = {"hidden": hidden.ids}
        if guess:
            likely = (self.guess(raw, hidden) @ self.encoder.stem.embed.weight.T + self.bias).argmax(-1)  # [B, M]
            rows["guess"] = hidden.ids.scatter(1, hidden.places, torch.where(hidden.valid, likely, hidden.truth))
        places = torch.zeros_like(raw.real()).scatter(1, hidden.places, hidden.valid)  # [B, T]
        return {
            mark: [
                marked(words, ids[real].tolist(), [mark * here for here in row[real].tolist()])
                for ids, row, real in zip(shown, places, raw.real(), strict=True)
            ]
            for mark, shown in rows.items()
        }
