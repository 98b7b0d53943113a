"""One layer of a transformer: self-attention, cross-attention where there is a context, feed-forward.

    pre-norm     x <- x + branch(norm(x))        for each branch (Xiong et al. 2020)
    post-norm    x <- norm(x + branch(x))        (Vaswani et al. 2017)

Shapes: B batch, T tokens, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import CrossAttention, Scope, SelfAttention
from .masking import pick

Activation = Literal["gelu", "gelu_tanh", "relu", "swiglu"]


class FeedForward(nn.Module):
    """down(activation(up(x))); swiglu: down(silu(g) * u), where [g, u] = up(x) (Shazeer 2020).

    For swiglu the first F rows of `up.weight` are the gate.
    """

    def __init__(self, width: int, hidden: int, activation: Activation, bias: bool, dropout: float) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, 2 * hidden if activation == "swiglu" else hidden, bias)
        self.down = nn.Linear(hidden, width, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = self.up(x)  # [B, T, F], or [B, T, 2F]
        if self.activation == "swiglu":
            gate, h = h.chunk(2, -1)  # 2 x [B, T, F]
            h = F.silu(gate) * h
        elif self.activation == "relu":
            h = F.relu(h)
        else:
            h = F.gelu(h, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        y: Tensor = self.down(self.dropout(h))  # [B, T, D]
        return y


class Layer(nn.Module):
    """The branches of one layer, each with its norm; `norms` in the order of the branches.

    `drop_path` is the chance that a sample skips a branch. It is kept as a tensor: compiled code treats
    a float as a constant, and would be compiled again for each layer.
    """

    keep: Tensor

    def __init__(
        self,
        *,
        attention: SelfAttention,
        cross: CrossAttention | None,
        mlp: FeedForward,
        norms: Sequence[nn.Module],
        norm_first: bool,
        dropout: float,
        drop_path: float | None,
    ) -> None:
        super().__init__()
        self.norm_first, self.drops_path = norm_first, drop_path is not None
        self.register_buffer("keep", torch.tensor(1 - (drop_path or 0.0)), persistent=False)
        self.norm1, self.attention = norms[0], attention
        if cross is not None:
            self.norm_cross = norms[1]
        self.cross = cross
        self.norm2, self.mlp = norms[-1], mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scope: Scope) -> Tensor:
        """[B, T, D] -> [B, T, D], or [B, M, D] where the scope asks for some places only."""
        kept = x if scope.only is None else pick(x, scope.only)
        x = self.add(x, self.norm1, partial(self.attention, scope=scope), kept)
        if self.cross is not None:
            x = self.add(x, self.norm_cross, partial(self.cross, context=scope.context, mask=scope.context_mask))
        return self.add(x, self.norm2, self.mlp)

    def add(
        self, x: Tensor, norm: nn.Module, branch: partial[Tensor] | nn.Module, kept: Tensor | None = None
    ) -> Tensor:
        """One residual branch of x [B, T, D], added to x or to those tokens of it that are `kept`: as they are."""
        y = self.dropout(branch(norm(x) if self.norm_first else x))
        x = (x if kept is None else kept) + (drop_path(y, self.keep) if self.drops_path and self.training else y)
        return x if self.norm_first else norm(x)


def drop_path(x: Tensor, keep: Tensor) -> Tensor:
    """Keep whole samples of x [B, ...] with probability `keep` [], scaled up; zero the rest.

    Stochastic depth, Huang et al. 2016; draws from torch's generator.
    """
    kept = torch.rand(len(x), *(1 for _ in x.shape[1:]), device=x.device) < keep  # [B, 1, ...]
    return x * (kept / keep).to(x.dtype)
