"""The loss of SigLIP, without its matrix of similarities.

Zhai, Mustafa, Kolesnikov and Beyer 2023, "Sigmoid loss for language image pre-training",
https://arxiv.org/abs/2303.15343, equation in section 3.2. For images x and texts y, and l_ij = scale x_i . y_j + bias,

    loss = -1/B sum_ij log sigmoid(z_ij l_ij)      z_ij = 1 where i = j, else -1

Shapes: B pairs, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .contrast import as_scalar, check_vectors, in_one_type, similarity
from .contrast_pairs import negative_pairs


def sigmoid_loss(image: Tensor, text: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """The cross-entropy of telling, for each image and text, whether they are a pair; over B: [].

    It has a first derivative with respect to all that are tensors, and no second one.

    Args:
        image: [B, D], not normalised here.
        text: [B, D]; row i belongs to image i.
        scale: what similarities are multiplied by; the paper starts at 10.
        bias: what is added to them; the paper starts at -10, near what most pairs need.
    """
    check_vectors(image=image, text=text)
    image, text = in_one_type(image, text)
    scale, bias = as_scalar(scale, image), as_scalar(bias, image)
    ids = torch.arange(len(image), device=image.device)
    near = similarity(image, text) * scale + bias  # [B]
    return negative_pairs(image, text, scale, bias, ids, ids) - F.logsigmoid(near).mean()


def sigmoid_loss_reference(image: Tensor, text: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """What `sigmoid_loss` must equal; makes all similarities, [B, B]."""
    logits = scale * (image @ text.T) + bias  # [B, B]
    sign = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)
