"""The normalised temperature-scaled cross-entropy of SimCLR, without its matrix of similarities.

Chen, Kornblith, Norouzi and Hinton 2020, https://arxiv.org/abs/2002.05709, equation 1. For the 2B rows z of a and b,
where j is the partner of row i, at the same place of the other half,

    l(i, j) = -log( exp(z_i . z_j / t) / sum_{k != i} exp(z_i . z_k / t) )      loss = mean of l over all rows

`contrast` has the general form: keys of all processes, and ids for what is no negative of what.
Shapes: B samples, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .contrast import as_scalar, check_vectors, in_one_type, losses, negatives, similarity


def nt_xent(a: Tensor, b: Tensor, *, temperature: float | Tensor) -> Tensor:
    """The mean over all 2B views of the cross-entropy of finding the partner among all the others: [].

    It has a first derivative with respect to a and b (and a temperature that is a tensor), and no second one.

    Args:
        a: one view of each sample [B, D], not normalised here.
        b: the other view of each sample [B, D].
        temperature: of the softmax.
    """
    check_vectors(a=a, b=b)
    a, b = in_one_type(a, b)
    scale = as_scalar(1 / temperature, a)
    ids = torch.arange(len(a), device=a.device).repeat(2)  # [2B]
    r, t, _, _ = negatives(torch.cat([a, b]), None, scale, ids)
    return losses((similarity(a, b) * scale).repeat(2), r, t).mean()


def nt_xent_reference(a: Tensor, b: Tensor, *, temperature: float | Tensor) -> Tensor:
    """What `nt_xent` must equal; makes all similarities, [2B, 2B]."""
    z = torch.cat([a, b])  # [2B, D]
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)  # [2B, 2B]
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(logits, partner)
