"""GPT: predict the next token of a text from those before it.

Radford, Wu, Child, Luan, Amodei, Sutskever 2019, "Language models are unsupervised multitask learners" (GPT-2),
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf, after Radford,
Narasimhan, Salimans, Sutskever 2018 (GPT). For the tokens x of a sequence, with h_t what a causal transformer makes of
x_1 ... x_t and E the table of the embedding (`tie`; or a matrix of its own),

    p(x_{t+1} | x_1 ... x_t) = softmax(E h_t)        L = mean over all t of  -log p(x_{t+1} | x_1 ... x_t)

The mean is over all predictions of a batch. Sequences packed into one row neither see nor predict each other.

The preset "base" is GPT-2 small: sizes, vocabulary, context, batch, pre-norm and the start of the residual branches are
the paper's; dropout is that of the released model. The paper names no optimizer settings. Learning rates, betas, decay,
clipping and the cosine to a tenth are GPT-3's for models of these sizes (Brown et al. 2020, table 2.1 and appendix B,
https://arxiv.org/abs/2005.14165); 600,000 steps, of which 2,000 warm up, are those of the reproduction nanoGPT. As
there, a learning rate belongs to a model's size and does not follow the batch (`optimizer.scaling` = none). GPT-2 was
trained on one stream of text without bounds between documents; here documents are apart.

"llama" is LLaMA 7B (Touvron et al. 2023, https://arxiv.org/abs/2302.13971), with the byte-level tokenizer of this
library instead of SentencePiece; "characters" is nanoGPT's model of Shakespeare, letter by letter.

Shapes: B rows, T tokens, D width of the backbone, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup.kernel import Batch, Loss, Objective, Shown, Signal, Stem, Step, Tower, about
from selfsup.kernel.errors import ContractError
from selfsup.triton_ops.linear_cross_entropy import linear_cross_entropy

IGNORED = -100  # what linear_cross_entropy leaves out
SHOWN = 48  # tokens of a prompt that people are shown, at most


class GPT(Objective):
    """Guess the next token from those before it; learns language from text alone, and writes it."""

    towers = ("decoder",)
    paper = (
        "Radford et al. 2019, GPT-2, "
        "https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf"
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base": {  # GPT-2 small, 124 million parameters
            "modality.name": "text",
            "modality.tokenizer": "bpe",
            "modality.vocabulary": 50_257,
            "modality.length": 1024,
            "modality.ends": "document",
            "backbone.name": "transformer",
            "backbone.width": 768,
            "backbone.depth": 12,
            "backbone.heads": 12,
            "backbone.activation": "gelu_tanh",
            "backbone.length": 1024,
            "backbone.packed": 64,
            "backbone.init_residual": True,
            "backbone.dropout": 0.1,
            "backbone.attention_dropout": 0.1,
            "optimizer.name": "adamw",
            "optimizer.lr": 6e-4,
            "optimizer.betas": (0.9, 0.95),
            "optimizer.weight_decay": 0.1,
            "optimizer.schedule": "cosine",
            "optimizer.warmup": 2000 / 600_000,
            "optimizer.final": 0.1,
            "optimizer.reference_batch": 512,
            "optimizer.scaling": "none",
            "train.steps": 600_000,
            "train.batch": 512,
            "train.clip": 1.0,
        },
        "medium": {  # 355 million
            "backbone.width": 1024,
            "backbone.depth": 24,
            "backbone.heads": 16,
            "optimizer.lr": 3e-4,
        },
        "large": {  # 774 million
            "backbone.width": 1280,
            "backbone.depth": 36,
            "backbone.heads": 20,
            "optimizer.lr": 2.5e-4,
        },
        "xl": {  # 1.5 billion, GPT-2 itself
            "backbone.width": 1600,
            "backbone.depth": 48,
            "backbone.heads": 25,
            "optimizer.lr": 2e-4,
        },
        "llama": {  # 7B, tables 1 and 2: 10^12 tokens in batches of 2^22
            "objective.tie": False,
            "modality.vocabulary": 32_000,
            "modality.length": 2048,
            "backbone.width": 4096,
            "backbone.depth": 32,
            "backbone.heads": 32,
            "backbone.hidden": 11_008,
            "backbone.norm": "rms",
            "backbone.norm_eps": 1e-6,
            "backbone.positions": "rotary",
            "backbone.activation": "swiglu",
            "backbone.bias": False,
            "backbone.init_residual": False,
            "backbone.dropout": 0.0,
            "backbone.attention_dropout": 0.0,
            "optimizer.lr": 3e-4,
            "optimizer.warmup": 2000 / 238_419,
            "optimizer.reference_batch": 2048,
            "train.steps": 238_419,
            "train.batch": 2048,
        },
        "characters": {  # nanoGPT's config/train_shakespeare_char.py
            "modality.tokenizer": "characters",
            "modality.length": 256,
            "backbone.width": 384,
            "backbone.depth": 6,
            "backbone.heads": 6,
            "backbone.length": 256,
            "backbone.bias": False,
            "backbone.dropout": 0.2,
            "backbone.attention_dropout": 0.2,
            "optimizer.lr": 1e-3,
            "optimizer.betas": (0.9, 0.99),
            "optimizer.warmup": 0.02,
            "optimizer.reference_batch": 64,
            "train.steps": 5000,
            "train.batch": 64,
        },
        "tiny": {  # minutes on two CPU cores
            "modality.vocabulary": 2048,
            "modality.length": 128,
            "backbone.width": 192,
            "backbone.depth": 4,
            "backbone.heads": 4,
            "backbone.length": 128,
            "backbone.dropout": 0.0,
            "backbone.attention_dropout": 0.0,
            "optimizer.lr": 2e-3,
            "optimizer.warmup": 0.1,
            "optimizer.reference_batch": 16,
            "train.steps": 600,
            "train.batch": 16,
        },
    }

    def __init__(
        self,
        decoder: Tower,
        *,
        tie: Annotated[bool, about("the matrix that predicts is the table of the embedding")] = True,
    ) -> None:
        super().__init__()
        stem = decoder.stem
        if not isinstance(stem, Stem) or not stem.discrete:
            raise ContractError("GPT predicts tokens of a vocabulary, and this modality has none; try --modality text")
        table = getattr(stem, "embed", None)
        if tie and (table is None or table.weight.shape != (stem.size, decoder.width)):
            raise ContractError(
                "the stem of this modality has no table of embeddings, as wide as the backbone, that could predict; "
                "give the head a matrix of its own: --set objective.tie=false"
            )
        self.decoder = decoder
        decoder.causal = True
        self.head = None if tie else nn.Linear(decoder.width, stem.size, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    @property
    def weight(self) -> Tensor:
        """The matrix that predicts: [V, D]."""
        weight: Tensor = self.decoder.stem.embed.weight if self.head is None else self.head.weight
        return weight

    def forward(self, batch: Batch, step: Step) -> Loss:
        """Predict every token of a batch that has one of its own sequence before it."""
        raw = batch["decoder"]
        labels = next_tokens(raw, self.decoder.stem.targets(raw))  # [B, T]
        hidden = self.decoder(raw).x  # [B, T, D]
        # Nearly all tokens are predicted, so nothing is gained by looking for those that are.
        total = linear_cross_entropy(hidden.flatten(0, 1), self.weight, labels.flatten(), capacity=labels.numel())
        return Loss(total, {"perplexity": total.detach().exp()}, weight=(labels != IGNORED).sum())

    def surprise(self, raw: Signal) -> Tensor:
        """-log p of the token behind each place of its sequence, in nats; 0 where there is none: [B, T]."""
        labels = next_tokens(raw, self.decoder.stem.targets(raw))  # [B, T]
        hidden = self.decoder(raw).x  # [B, T, D]
        nats = linear_cross_entropy(hidden.flatten(0, 1), self.weight, labels.flatten(), reduction="none")
        return nats.view_as(labels)

    def show(self, batch: Batch, step: Step, guess: bool = True) -> Mapping[str, Sequence[Shown]]:
        """The texts, and how the model would go on after the first half of the first one in each row."""
        shown: dict[str, Sequence[Shown]] = {"text": self.decoder.modality.show(batch["decoder"])}
        if guess:
            shown["continued"] = [self._prompted(batch, row, step) for row in range(len(batch["ids"]))]
        return shown

    def _prompted(self, batch: Batch, row: int, step: Step) -> Shown:
        raw, words = batch["decoder"], self.decoder.modality.vocabulary
        ids = raw.x[row] if raw.segments is None else raw.x[row, raw.segments[row] == 1]
        prompt = ids[: max(1, min(len(ids) // 2, SHOWN))]
        added = self.continued(prompt, step.draw("continue", batch["ids"][row : row + 1]).uniform(len(prompt))[0])
        return [(words.decode(prompt.tolist()), ""), (words.decode(added.tolist()), "guess")]

    def continued(self, prompt: Tensor, draws: Tensor) -> Tensor:
        """N tokens behind a prompt [P], drawn from the model's softmax by N uniform numbers: [N]."""
        ids = prompt
        for u in draws:
            logits = self.decoder(Signal(ids[None])).x[0, -1] @ self.weight.T  # [V]
            below = logits.double().softmax(0).cumsum(0)
            ids = torch.cat([ids, torch.searchsorted(below, u.double() * below[-1])[None].clamp(max=len(below) - 1)])
        return ids[len(prompt) :]


def next_tokens(raw: Signal, tokens: Tensor) -> Tensor:
    """The token behind each place of tokens [B, T], `IGNORED` where none of the same sequence is: [B, T]."""
    labels = F.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    if raw.segments is None:
        return labels
    goes_on = (raw.segments[:, 1:] == raw.segments[:, :-1]) & (raw.segments[:, 1:] > 0)  # [B, T - 1]
    return labels.masked_fill(~F.pad(goes_on, (0, 1)), IGNORED)
