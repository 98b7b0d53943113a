"""How features spread: principal components, and how many dimensions they use.

Effective rank (Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality"; of embeddings
Garrido et al. 2023, "RankMe", https://arxiv.org/abs/2210.02885), here of centred features, s_k their singular values:

    exp( - sum_k p_k log p_k ),   p_k = s_k / sum_j s_j

1 where all samples lie on a line, at most min(N - 1, D). Shapes: N samples, D features, K components.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DIRECTION = 1e-6  # of the largest value of features: less is rounding, not variation
COLLAPSED = 2.0  # an effective rank below it means that samples differ along a line at most


class Spectrum(NamedTuple):
    """How the features [N, D] of some samples spread."""

    places: Tensor  # [N, 2], on the first two principal components
    explained: Tensor  # [K], share of the variance on each component, falling
    rank: float  # effective
    most: int  # that the rank could be

    @property
    def collapsed(self) -> bool:
        """Whether samples can hardly be told apart."""
        return self.rank < COLLAPSED <= self.most


def spectrum(features: Tensor) -> Spectrum:
    """Principal components of features [N, D], N >= 2."""
    x = features.double()
    centred = x - x.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)  # [N, K], [K]
    most = min(len(x) - 1, x.shape[1])
    if float(s[0]) <= DIRECTION * len(x) ** 0.5 * float(x.abs().max()):
        return Spectrum(torch.zeros(len(x), 2), torch.zeros(len(s)), 0.0, most)  # all samples alike
    places = torch.zeros(len(x), 2, dtype=torch.float64)
    kept = min(2, len(s))
    places[:, :kept] = u[:, :kept] * s[:kept]
    p = s / s.sum()
    rank = float((-p * p.clamp(min=1e-300).log()).sum().exp())
    return Spectrum(places, s.square() / s.square().sum(), rank, most)
