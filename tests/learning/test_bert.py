"""BERT learns: texts of 8 words on one of 8 topics, each with 40 words of its own, which nothing else tells.

What a hidden word can be follows from the topic of the words around it: 40 words rather than 320.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from selfsup.kernel import Signal, Step, Tower
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.common.judges import probe
from selfsup.plugins.common.token_stem import Tokens
from selfsup.plugins.objectives.bert import Bert

TOPICS, EACH, LENGTH, BATCH, STEPS = 8, 40, 10, 64, 140
PAD, BEGIN, END, MASK, WORDS = 0, 1, 2, 3, 4 + TOPICS * EACH


def texts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Texts [N, T] and their topics [N]."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.arange(count) % TOPICS
    x = 4 + topics[:, None] * EACH + torch.randint(EACH, (count, LENGTH), generator=generator)
    x[:, 0], x[:, -1] = BEGIN, END
    return x, topics


@torch.no_grad()
def judged(objective: Bert) -> tuple[float, float]:
    """The loss on held-out texts, and how many topics a probe finds that has seen two texts of each."""
    objective.eval()
    (bank, labels), (query, truth) = texts(2 * TOPICS, 10_001), texts(400, 10_002)
    seen, asked = (objective.encoder(Signal(x)).mean() for x in (bank, query))
    accuracy = (probe(seen, labels, asked).guess == truth).double().mean()
    loss = objective({"encoder": Signal(query), "ids": torch.arange(len(query))}, Step(0, 1)).total
    objective.train()
    return loss.item(), accuracy.item()


def test_bert_learns_which_words_go_together() -> None:
    torch.manual_seed(0)
    words = SimpleNamespace(mask=MASK, special=frozenset({PAD, BEGIN, END, MASK}))
    backbone = Transformer(width=64, depth=2, heads=4, length=LENGTH, norm_first=False, input_norm=True)
    tower = Tower(Tokens(WORDS, 64), backbone, SimpleNamespace(vocabulary=words, pack=False))
    objective = Bert(tower).train()
    optimizer = torch.optim.AdamW(objective.parameters(), betas=(0.9, 0.98), fused=True)
    before = judged(objective)
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (number + 1) / 20)
        ids = torch.arange(BATCH) + number * BATCH
        objective({"encoder": Signal(texts(BATCH, number)[0]), "ids": ids}, Step(number, STEPS)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = judged(objective)
    assert abs(before[0] - math.log(WORDS)) < 0.1
    assert after[0] < math.log(EACH) + 0.5  # what can be known; without learning it is 2.1 more
    assert before[1] < 0.7
    assert after[1] > 0.95
