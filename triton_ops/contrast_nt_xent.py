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
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from .contrast import as_scalar, check_vectors, in_one_type, losses, similarity
from .contrast_options import inverse, unit
from .contrast_ring import negatives_of_all, numbered


def nt_xent(
    a: Tensor,
    b: Tensor,
    *,
    temperature: float | Tensor,
    normalize: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The mean over all 2B views of the cross-entropy of finding the partner among all the others: [].

    It has a first derivative with respect to a and b (and a temperature that is a tensor), and no second one.

    Args:
        a: one view of each sample [B, D].
        b: the other view of each sample [B, D].
        temperature: of the softmax.
        normalize: make vectors unit ones first (contrast_options.py); otherwise they are taken as they are.
        group: the processes whose views are negatives too, such as torch.distributed.group.WORLD, each with as many;
            None is this one alone. The loss is the mean over this process's views, and its gradients are those of the
            sum of all processes' losses, so that means over processes are one process's (contrast_ring.py).
    """
    check_vectors(a=a, b=b)
    a, b = in_one_type(*((unit(a), unit(b)) if normalize else (a, b)))
    scale = as_scalar(inverse(temperature), a)
    r, t, _, _ = negatives_of_all(torch.cat([a, b]), None, scale, numbered(a, group).repeat(2), group=group)
    return losses((similarity(a, b) * scale).repeat(2), r, t).mean()


def nt_xent_reference(a: Tensor, b: Tensor, *, temperature: float | Tensor, normalize: bool = False) -> Tensor:
    """What `nt_xent` must equal on one process; makes all similarities, [2B, 2B]."""
    z = torch.cat([a, b])  # [2B, D]
    z = F.normalize(z, dim=-1, eps=1e-6) if normalize else z
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)  # [2B, 2B]
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(logits, partner)
