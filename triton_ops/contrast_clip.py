"""The loss of CLIP, both ways, without its matrix of similarities.

Radford et al. 2021, "Learning transferable visual models from natural language supervision",
https://arxiv.org/abs/2103.00020, figure 3. For images x and texts y, and with s_ij = scale x_i . y_j,

    loss = 1/2 mean_i (log sum_j exp(s_ij) - s_ii) + 1/2 mean_j (log sum_i exp(s_ij) - s_jj)

contrast_options.py has label smoothing. Shapes: B pairs, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from .contrast import as_scalar, check_vectors, in_one_type, losses, similarity
from .contrast_options import above_mean, check_share, unit
from .contrast_ring import negatives_of_all, numbered


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The mean cross-entropy of finding the text of each image and the image of each text: [].

    It has a first derivative with respect to image, text and scale, and no second one.

    Args:
        image: [B, D].
        text: [B, D]; row i belongs to image i.
        scale: what similarities are multiplied by, 1 / temperature; a tensor of one number has a gradient.
        label_smoothing: the share of the target that is spread over all texts, or images, as in F.cross_entropy.
        normalize: make vectors unit ones first (contrast_options.py); otherwise they are taken as they are.
        group: the processes whose pairs take part, such as torch.distributed.group.WORLD, each with as many; None is
            this one alone. The loss is the mean over this process's pairs, and its gradients are those of the sum of
            all processes' losses, so that means over processes are one process's (contrast_ring.py).
    """
    check_vectors(image=image, text=text)
    check_share(label_smoothing)
    image, text = in_one_type(*((unit(image), unit(text)) if normalize else (image, text)))
    scale = as_scalar(scale, image)
    return both_ways(image, text, scale, label_smoothing=label_smoothing, margin=0.0, group=group).mean()


def both_ways(
    x: Tensor, y: Tensor, scale: Tensor, *, label_smoothing: float, margin: float, group: ProcessGroup | None
) -> Tensor:
    """The mean of the two losses of each pair: [B]. x and y are of one type, and scale [] is exact."""
    ids = numbered(x, group)
    r, t, c, u = negatives_of_all(x, y, scale, ids, ids, columns=True, group=group)
    near = similarity(x, y) * scale  # [B]
    near = near - scale * margin if margin else near
    both = losses(near, r, t) + losses(near, c, u)
    if label_smoothing:
        for rows, keys in ((x, y), (y, x)):
            both = both + label_smoothing * above_mean(near, rows, keys, scale, margin=margin, group=group)
    return both / 2


def clip_loss_reference(
    image: Tensor, text: Tensor, scale: float | Tensor, *, label_smoothing: float = 0.0, normalize: bool = False
) -> Tensor:
    """What `clip_loss` must equal on one process; makes all similarities, [B, B]."""
    if normalize:
        image, text = (F.normalize(x, dim=-1, eps=1e-6) for x in (image, text))
    logits = scale * (image @ text.T)  # [B, B]
    labels = torch.arange(len(image), device=image.device)
    ways = [F.cross_entropy(way, labels, label_smoothing=label_smoothing) for way in (logits, logits.T)]
    return (ways[0] + ways[1]) / 2
