"""A learned codebook, chosen from by Gumbel noise and trained straight through the choice.

Jang et al. 2017, "Categorical reparameterization with Gumbel-softmax", https://arxiv.org/abs/1611.01144,
as a product quantiser in Baevski et al. 2020, "wav2vec 2.0", section 2, eq. 1:

    code_g = argmax_v (l_gv + n_gv),    p_gv = softmax_v((l_gv + n_gv) / tau),    n Gumbel noise

The forward pass is a lookup, q = [e_1,code_1 ; ... ; e_G,code_G]; the backward pass takes the gradient
as if q had been the average of the entries under p. See `triton_ops/gumbel_quantize.py`, which keeps no noise.

Shapes: G groups, V entries of each, L width of the input, D of the output; `...` any leading shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from selfsup.kernel import Stream, gather
from selfsup.triton_ops.gumbel_quantize import gumbel_quantize


class Quantized(NamedTuple):
    """What the quantiser makes of its input."""

    vectors: Tensor  # [..., D]
    codes: Tensor  # [..., G] int64
    logits: Tensor  # [..., G, V], without noise


class GumbelQuantizer(nn.Module):
    """Product quantisation into `groups` codes of `entries` each."""

    def __init__(self, width_in: int, width: int, *, groups: int, entries: int) -> None:
        super().__init__()
        self.size = groups * entries
        self.logits = nn.Linear(width_in, self.size)
        self.codebook = nn.Parameter(torch.rand(groups, entries, width // groups))
        nn.init.normal_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def forward(self, x: Tensor, noise: Stream | Tensor | None = None, temperature: float = 1.0) -> Quantized:
        """Quantise x [..., L], by the likeliest code, or with standard Gumbel noise.

        noise: of a stream for each x[b] where x is [B, ..., L]; or ready made, [..., G, V].
        """
        logits: Tensor = self.logits(x).unflatten(-1, self.codebook.shape[:2])  # [..., G, V]
        scores, draw = (logits + noise, None) if isinstance(noise, Tensor) else (logits, noise)
        vectors, codes = gumbel_quantize(scores, self.codebook, draw, temperature=temperature)
        return Quantized(vectors.flatten(-2), codes, logits)  # [..., D], [..., G], [..., G, V]


def usage(chance: Tensor, valid: Tensor) -> Tensor:
    """How often each entry is chosen: the mean of chance [B, M, G, V] where valid [B, M], over all processes: [G, V].

    Every process gets the same answer, and through it a gradient for what it put in.
    """
    weight = valid.flatten().to(chance.dtype)  # [B M]
    sums = (weight @ chance.flatten(2).flatten(0, 1)).view(chance.shape[2:])  # [G, V]
    counted = torch.cat([sums.flatten(), weight.sum()[None]])  # [G V + 1], so that one exchange does for both
    everyone = gather(counted[None]).sum(0)  # [G V + 1]
    return (everyone[:-1] / everyone[-1].clamp(min=1)).view_as(sums)


def perplexity(usage: Tensor) -> Tensor:
    """exp(entropy) of each group's usage [G, V], added up: between G (one entry each) and G * V (all alike)."""
    # Softmax underflows to exact zeros, where the gradient of p log p has no limit.
    return torch.exp(-(usage * usage.clamp(min=torch.finfo(usage.dtype).tiny).log()).sum(-1)).sum()
