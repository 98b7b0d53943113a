"""InfoNCE: find a query's key among all keys, or among those of a queue, without the matrix of similarities.

van den Oord, Li and Vinyals 2018, "Representation learning with contrastive predictive coding",
https://arxiv.org/abs/1807.03748, equation 4. For queries q_n, keys k_m and the key y_n of each query,

    loss_n = -log( exp(q_n . k_{y_n} / t) / sum_m exp(q_n . k_m / t) )

With a queue the negatives are its keys alone, as in equation 1 of He, Fan, Wu, Xie and Girshick 2019, "Momentum
contrast for unsupervised visual representation learning", https://arxiv.org/abs/1911.05722:

    loss_n = -log( exp(q_n . k_{y_n} / t) / (exp(q_n . k_{y_n} / t) + sum_i exp(q_n . queue_i / t)) )

contrast_options.py has margins and label smoothing. Shapes: N queries, M keys, K keys of the queue, D width.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError

from .contrast import as_scalar, check_vectors, in_one_type, losses, similarity
from .contrast_clip import both_ways
from .contrast_options import above_mean, check_share, inverse, unit
from .contrast_ring import negatives_of_all, numbered, offset

Reduction = Literal["mean", "sum", "none"]


def info_nce(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor,
    queue: Tensor | None = None,
    symmetric: bool = False,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    normalize: bool = False,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """The cross-entropy of finding the key of each query: [], or [N] where nothing is reduced.

    It has a first derivative with respect to every tensor of vectors, and no second one.

    Args:
        queries: [N, D].
        keys: [M, D].
        labels: int64 [N], the key of each query; key n of query n if not given. A label of no key is an error; where
            that cannot be seen without waiting, on a GPU or compiled, the query's loss is NaN.
        temperature: of the softmax; a tensor has a gradient.
        queue: [K, D], the negatives, instead of the other keys.
        symmetric: the mean with the loss of finding the query of each key, which takes M = N, no labels and no queue.
        label_smoothing: the share of the target that is spread over all that a query has to choose from, as in
            F.cross_entropy; the true key is among these.
        margin: what is taken off the similarity of a query and its key; of unit vectors, 0 to 1.
        normalize: make vectors unit ones first (contrast_options.py), the queue's too; otherwise they are taken as
            they are.
        reduction: the mean over queries, the sum, or each query's loss.
        group: the processes whose keys are negatives too, such as torch.distributed.group.WORLD, each with as many
            queries and keys; None is this one alone. A label is of a key of the same process. Of a queue each process
            gives its own part; one that all hold alike needs no group. The loss is that of this process's queries,
            and its gradients are those of the sum of all processes' losses, so that means over processes are one
            process's (contrast_ring.py).
    """
    check_vectors(queries=queries, keys=keys, alike=False)
    _check_options(queries, keys, labels, queue, symmetric, reduction)
    check_share(label_smoothing)
    arrays = (queries, keys) if queue is None else (queries, keys, queue)
    queries, keys, *others = in_one_type(*(map(unit, arrays) if normalize else arrays))
    scale = as_scalar(inverse(temperature), queries)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "margin": margin, "group": group}
    if symmetric:
        return _reduced(both_ways(queries, keys, scale, **options), reduction)
    return _reduced(_one_way(queries, keys, labels, others[0] if others else None, scale, **options), reduction)


def _one_way(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor | None,
    queue: Tensor | None,
    scale: Tensor,
    *,
    label_smoothing: float,
    margin: float,
    group: ProcessGroup | None,
) -> Tensor:
    """The loss of each query: [N]."""
    near = _near(queries, keys, labels)
    near = (near - margin) * scale if margin else near * scale  # [N]
    every = numbered(keys, group)  # [M]
    own = every[: queries.shape[0]] if labels is None else labels + offset(keys, group)  # [N]
    far, ids = (keys, (own, every)) if queue is None else (queue, (None, None))
    r, t, _, _ = negatives_of_all(queries, far, scale, *ids, group=group)  # [N]
    found = losses(near, r, t)
    if label_smoothing:
        above = above_mean(near, queries, far, scale, margin=margin, group=group, beside=queue is not None)
        found = found + label_smoothing * above
    return found


def info_nce_reference(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor,
    queue: Tensor | None = None,
    symmetric: bool = False,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    normalize: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """What `info_nce` must equal on one process; makes all similarities, [N, M] or [N, 1 + K]."""
    labels = torch.arange(len(queries), device=queries.device) if labels is None else labels
    if normalize:
        queries, keys = (F.normalize(x, dim=-1, eps=1e-6) for x in (queries, keys))
        queue = None if queue is None else F.normalize(queue, dim=-1, eps=1e-6)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
    if queue is not None:
        near = (queries * keys[labels]).sum(-1, keepdim=True) - margin  # [N, 1]
        logits = torch.cat([near, queries @ queue.T], 1) / temperature  # [N, 1 + K]
        return F.cross_entropy(logits, torch.zeros_like(labels), **options)
    logits = queries @ keys.T  # [N, M]
    logits = (logits - margin * F.one_hot(labels, len(keys)).to(logits.dtype)) / temperature
    found = F.cross_entropy(logits, labels, **options)
    return (found + F.cross_entropy(logits.T, labels, **options)) / 2 if symmetric else found


def _check_options(
    queries: Tensor, keys: Tensor, labels: Tensor | None, queue: Tensor | None, symmetric: bool, reduction: str
) -> None:
    if reduction not in get_args(Reduction):
        raise ContractError(f"there is no reduction {reduction!r}; choose mean, sum or none")
    if queue is not None:
        check_vectors(queries=queries, queue=queue, alike=False)
    if symmetric:
        check_vectors(queries=queries, keys=keys)
        if labels is not None or queue is not None:
            raise ContractError("symmetric: key n is that of query n, so that it takes neither labels nor a queue")
    if labels is None:
        if len(queries) > len(keys):
            raise ContractError(f"without labels, {len(queries)} queries need as many keys, and there are {len(keys)}")
    elif labels.shape != queries.shape[:1] or labels.dtype != torch.int64:
        raise ContractError(f"labels must be int64 [N] = [{len(queries)}], and are {labels.dtype} {list(labels.shape)}")
    elif not _unseen(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(keys):
            raise ContractError(f"labels must be from 0 to {len(keys) - 1}, the last key, and are from {low} to {high}")


def _unseen(labels: Tensor) -> bool:
    """Whether to look at the labels would be to wait for them."""
    return labels.device.type != "cpu" or torch.compiler.is_compiling()


def _near(queries: Tensor, keys: Tensor, labels: Tensor | None) -> Tensor:
    """The similarity of each query and its key [N]; NaN where it has none."""
    if labels is None:
        return similarity(queries, keys[: queries.shape[0]])
    if not _unseen(labels):
        return similarity(queries, keys[labels])
    last = keys.shape[0] - 1
    near = similarity(queries, keys[labels.clamp(0, last)])
    return near.masked_fill((labels < 0) | (labels > last), torch.nan)


def _reduced(found: Tensor, reduction: str) -> Tensor:
    return found if reduction == "none" else found.mean() if reduction == "mean" else found.sum()
