"""GPT learns: each token of a source follows from the two before it, by chances that are known.

No model can fall below the source's entropy; one that saw a single token back stays at the entropy of pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from selfsup.kernel import Signal, Step, Tower
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.common.token_stem import Tokens
from selfsup.plugins.objectives.gpt import GPT

WORDS, BATCH, LENGTH, STEPS = 8, 32, 32, 350


def source(generator: torch.Generator) -> Tensor:
    """The chance of each token after every two: [V, V, V]."""
    return (2.5 * torch.randn(WORDS, WORDS, WORDS, generator=generator).double()).softmax(-1)


def entropies(chances: Tensor) -> tuple[float, float]:
    """Nats a token, knowing two tokens and knowing one."""
    pairs = torch.full((WORDS, WORDS), 1 / WORDS**2).double()
    for _ in range(1000):
        pairs = (pairs[..., None] * chances).sum(0)  # p(a, b) -> p(b, c)
    one = (pairs[..., None] * chances).sum(0) / pairs.sum(0)[:, None]  # p(c | b)
    both = -(pairs[..., None] * torch.xlogy(chances, chances)).sum()
    return float(both), float(-(pairs.sum(0)[:, None] * torch.xlogy(one, one)).sum())


def draw(chances: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    x = torch.randint(WORDS, (rows, length), generator=generator)
    for t in range(2, length):
        x[:, t] = torch.multinomial(chances[x[:, t - 2], x[:, t - 1]], 1, generator=generator)[:, 0]
    return x


def test_gpt_comes_near_the_entropy_of_a_source() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    chances = source(generator)
    entropy, of_one = entropies(chances)
    assert of_one > entropy + 0.4  # or looking back once would do
    objective = GPT(
        Tower(Tokens(WORDS, 48), Transformer(width=48, depth=2, heads=4, length=LENGTH, activation="gelu_tanh"))
    )

    def loss(rows: int, number: int) -> Tensor:
        x = draw(chances, rows, LENGTH, generator)
        return objective({"decoder": Signal(x), "ids": torch.arange(rows)}, Step(number, STEPS)).total

    with torch.no_grad():
        untrained = float(loss(200, 0))
    assert abs(untrained - math.log(WORDS)) < 0.1
    optimizer = torch.optim.AdamW(objective.parameters(), betas=(0.9, 0.95), fused=True)
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (number + 1) / 30) * (1 - number / STEPS)
        loss(BATCH, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = float(loss(400, STEPS))
    # Of the 31 predictions of a row, the first is of a token that the source did not make.
    least = ((LENGTH - 2) * entropy + math.log(WORDS)) / (LENGTH - 1)
    assert least - 0.02 < trained < least + 0.1 * (of_one - entropy)
