"""Cases of cross-entropies over a vocabulary.

Rows have logits as a trained model's are: four in five favour their label. One case has those of an untrained model
beside, as what leaves out small gradients is fast there and wrong. Peers that cannot leave out unlabelled rows run
twice: as they are, and on rows that were gathered before the clock began.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .bench_case import Arrays, Call, Case, Draw, Peer, borrowed, find

SURE = 14.0  # what a favoured label's logit is above the others
NONE = -100


def cases(full: bool) -> list[Case]:
    """Of `linear_cross_entropy` and `cross_entropy`."""
    if not full:
        return [
            _linear(67, 10, 48, 129),
            _linear(31, 31, 40, 253),
            _linear(31, 31, 40, 253, trained=False),
            _plain(37, 5, 131),
            _plain(33, 33, 257),
        ]
    return [
        _linear(8192, 1229, 768, 30522),
        _linear(8192, 1229, 768, 50257),
        _linear(8192, 8192, 4096, 128256),
        _linear(8192, 1229, 4096, 128256),
        _linear(8192, 1229, 768, 30522, trained=False),
        _plain(8192, 8192, 128256),
        _plain(8192, 1229, 30522),
    ]


def _labels(draw: Draw, rows: int, labelled: int, classes: int) -> Tensor:
    labels = draw.whole(classes, rows)
    if labelled < rows:
        kept = draw.subset(1, rows, labelled)[0]
        labels = torch.full_like(labels, NONE).scatter(0, kept, labels[kept])
    return labels


def _linear(rows: int, labelled: int, width: int, classes: int, trained: bool = True) -> Case:
    def make(draw: Draw) -> Arrays:
        weight = draw.normal(classes, width, scale=width**-0.5)
        labels = _labels(draw, rows, labelled, classes)
        hidden = draw.normal(rows, width, learned=False).float()
        if trained:
            of_label = weight.detach()[labels.clamp(min=0)].float()
            sure = (draw.whole(5, rows, 1) > 0) * SURE
            hidden = hidden + sure * of_label / of_label.square().sum(1, keepdim=True)
        return [hidden.to(draw.kind).requires_grad_(), weight, labels]

    return Case(
        "linear_cross_entropy",
        f"T={rows} labelled={labelled} H={width} V={classes}{'' if trained else ' untrained'}",
        make,
        lambda op, hidden, weight, labels: op(hidden, weight, labels),
        products=((labelled, width, classes), (labelled, classes, width), (classes, labelled, width)),
        least=2 * 2 * (rows + classes) * width,
        peers={"ours, capacity": _with_capacity(rows, labelled), **_with_gathered(LINEAR, labelled < rows)},
    )


def _with_capacity(rows: int, labelled: int) -> Peer:
    """The op, told how many rows have a label at most, in whole blocks of 64."""
    capacity = min(rows, -(-labelled // 64) * 64)
    return Peer(lambda: partial(find("linear_cross_entropy"), capacity=capacity), only_gpu=False)


def _plain(rows: int, labelled: int, classes: int) -> Case:
    def make(draw: Draw) -> Arrays:
        labels = _labels(draw, rows, labelled, classes)
        logits = draw.normal(rows, classes, learned=False).float()
        sure = (draw.whole(5, rows, 1) > 0) * SURE
        logits = logits.scatter_add(1, labels.clamp(min=0)[:, None], sure)
        return [logits.to(draw.kind).requires_grad_(), labels]

    return Case(
        "cross_entropy",
        f"T={rows} labelled={labelled} V={classes}",
        make,
        lambda op, logits, labels: op(logits, labels),
        least=2 * (labelled + rows) * classes,
        peers=_with_gathered(PLAIN, labelled < rows),
    )


def _gathered(arrays: Arrays) -> Arrays:
    """The rows that have a label, and their labels."""
    rows, *others, labels = arrays
    kept = labels != NONE
    return [rows.detach()[kept].requires_grad_(), *others, labels[kept]]


def _with_gathered(peers: Mapping[str, Peer], some: bool) -> dict[str, Peer]:
    gathered = {f"{name}, gathered": replace(peer, prepare=_gathered) for name, peer in peers.items()}
    return {**peers, **(gathered if some else {})}


def _torch() -> Call:
    from torch.nn import functional as F

    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy; 2.13 is the first that does")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, y: F.linear_cross_entropy(h, w, y, ignore_index=NONE, options=options)


def _liger() -> Call:
    loss = borrowed("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return lambda h, w, y: loss(h, w, y, ignore_index=NONE)


def _cce() -> Call:
    loss = borrowed("cut_cross_entropy", "linear_cross_entropy")
    return lambda h, w, y: loss(h, w, y, ignore_index=NONE, impl="cce")


def _cce_exact() -> Call:
    """The preset; the release of January 2025 has none, but leaves nothing out either if its filter is off."""
    loss = borrowed("cut_cross_entropy", "linear_cross_entropy")
    presets = importlib.import_module("cut_cross_entropy.linear_cross_entropy").LinearCrossEntropyImpl
    if any("EXACT" in name for name in dir(presets)):
        return lambda h, w, y: loss(h, w, y, ignore_index=NONE, impl="cce_exact")
    return lambda h, w, y: loss(h, w, y, ignore_index=NONE, impl="cce", filter_eps=None)


def _quack() -> Call:
    loss = borrowed("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda h, w, y: loss(h, w, y, ignore_index=NONE)


def _liger_plain() -> Call:
    loss = borrowed("liger_kernel.transformers.functional", "liger_cross_entropy")
    return lambda logits, y: loss(logits, y, ignore_index=NONE)


def _quack_plain() -> Call:
    loss = borrowed("quack.cross_entropy", "cross_entropy")
    return lambda logits, y: loss(logits, y, ignore_index=NONE, reduction="mean")


LINEAR = {
    "torch": Peer(_torch, only_gpu=False),
    "liger": Peer(_liger),
    "cce": Peer(_cce),
    "cce_exact": Peer(_cce_exact),
    "quack": Peer(_quack),
}
PLAIN = {"liger": Peer(_liger_plain, spoils=True), "quack": Peer(_quack_plain)}
