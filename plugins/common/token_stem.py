"""The stem of data that is ids already: every id is a row of a table, z_t = E[x_t].

Shapes: B batch, T tokens, V ids, L width of the stem.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from selfsup.kernel.contracts import Signal, Stem


class Tokens(Stem):
    """An embedding table, normal(0, 0.02) at first, as in GPT-2 and BERT."""

    discrete = True

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size, self.width = size, width
        self.embed = nn.Embedding(size, width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def latents(self, raw: Signal) -> Signal:
        """[B, T] int64 -> [B, T, L]."""
        return replace(raw, x=self.embed(raw.x))

    def targets(self, raw: Signal) -> Tensor:
        """The ids [B, T]."""
        return raw.x
