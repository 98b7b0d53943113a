"""The loss of CLIP, both ways, without its matrix of similarities.

Radford et al. 2021, "Learning transferable visual models from natural language supervision",
https://arxiv.org/abs/2103.00020, figure 3. For images x and texts y, and with s_ij = scale x_i . y_j,

    loss = 1/2 mean_i (log sum_j exp(s_ij) - s_ii) + 1/2 mean_j (log sum_i exp(s_ij) - s_jj)

Shapes: B pairs, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .contrast import as_scalar, check_vectors, in_one_type, losses, negatives, similarity


def clip_loss(image: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
    """The mean cross-entropy of finding the text of each image and the image of each text: [].

    It has a first derivative with respect to image, text and scale, and no second one.

    Args:
        image: [B, D], not normalised here.
        text: [B, D]; row i belongs to image i.
        scale: what similarities are multiplied by, 1 / temperature; a tensor of one number has a gradient.
    """
    check_vectors(image=image, text=text)
    image, text = in_one_type(image, text)
    scale = as_scalar(scale, image)
    ids = torch.arange(len(image), device=image.device)
    r, t, c, u = negatives(image, text, scale, ids, ids, columns=True)
    near = similarity(image, text) * scale  # [B]
    return (losses(near, r, t) + losses(near, c, u)).mean() / 2


def clip_loss_reference(image: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
    """What `clip_loss` must equal; makes all similarities, [B, B]."""
    logits = scale * (image @ text.T)  # [B, B]
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
