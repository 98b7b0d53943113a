"""InfoNCE: find a query's key among all keys, or among those of a queue, without the matrix of similarities.

van den Oord, Li and Vinyals 2018, "Representation learning with contrastive predictive coding",
https://arxiv.org/abs/1807.03748, equation 4. For queries q_n, keys k_m and the key y_n of each query,

    loss_n = -log( exp(q_n . k_{y_n} / t) / sum_m exp(q_n . k_m / t) )

With a queue the negatives are its keys alone, as in equation 1 of He, Fan, Wu, Xie and Girshick 2019, "Momentum
contrast for unsupervised visual representation learning", https://arxiv.org/abs/1911.05722:

    loss_n = -log( exp(q_n . k_{y_n} / t) / (exp(q_n . k_{y_n} / t) + sum_i exp(q_n . queue_i / t)) )

Shapes: N queries, M keys, K keys of the queue, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError

from .contrast import as_scalar, check_vectors, in_one_type, losses, negatives, similarity


def info_nce(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor,
    queue: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """The cross-entropy of finding the key of each query: [], or [N] where nothing is reduced.

    It has a first derivative with respect to every tensor of vectors, and no second one.

    Args:
        queries: [N, D], not normalised here.
        keys: [M, D].
        labels: int64 [N], the key of each query; key n of query n if not given.
        temperature: of the softmax; a tensor has a gradient.
        queue: [K, D], the negatives, instead of the other keys.
        reduction: the mean over queries, the sum, or each query's loss.
    """
    check_vectors(queries=queries, keys=keys, alike=False)
    labels = _checked(queries, keys, labels)
    if queue is not None:
        check_vectors(queries=queries, queue=queue, alike=False)
    queries, keys, others = in_one_type(queries, keys, keys if queue is None else queue)
    scale = as_scalar(1 / temperature, queries)
    every = torch.arange(len(keys), device=keys.device)
    ids = (labels, every) if queue is None else (None, None)
    r, t, _, _ = negatives(queries, others, scale, *ids)  # [N]
    found = losses(similarity(queries, keys[labels]) * scale, r, t)  # [N]
    return _reduced(found, reduction)


def info_nce_reference(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor,
    queue: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """What `info_nce` must equal; makes all similarities, [N, M] or [N, 1 + K]."""
    labels = torch.arange(len(queries), device=queries.device) if labels is None else labels
    if queue is None:
        return F.cross_entropy(queries @ keys.T / temperature, labels, reduction=reduction)
    near = (queries * keys[labels]).sum(-1, keepdim=True)  # [N, 1]
    logits = torch.cat([near, queries @ queue.T], 1) / temperature  # [N, 1 + K]
    return F.cross_entropy(logits, torch.zeros_like(labels), reduction=reduction)


def _checked(queries: Tensor, keys: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        if len(queries) > len(keys):
            raise ContractError(f"without labels, {len(queries)} queries need as many keys, and there are {len(keys)}")
        return torch.arange(len(queries), device=queries.device)
    if labels.shape != queries.shape[:1] or labels.dtype != torch.int64:
        raise ContractError(f"labels must be int64 [N] = [{len(queries)}], and are {labels.dtype} {list(labels.shape)}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(keys):
            raise ContractError(f"labels must be from 0 to {len(keys) - 1}, the last key, and are from {low} to {high}")
    return labels


def _reduced(found: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ContractError(f"there is no reduction {reduction!r}; choose mean, sum or none")
    return found if reduction == "none" else found.mean() if reduction == "mean" else found.sum()
