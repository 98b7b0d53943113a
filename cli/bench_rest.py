"""Cases of augmentation, distillation, quantisation and averaged weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from selfsup.kernel.random import Stream

from .bench_case import KEY, Arrays, Call, Case, Draw, Peer, borrowed

OTHERS = "draws its own crops and colours, and is not compared"
NOISE = "draws other noise, and is not compared"


def cases(full: bool) -> list[Case]:
    """Of `augment`, `distill_cross_entropy`, `gumbel_quantize` and `ema`."""
    return [
        _augment(*((1024, 256, 224, 23) if full else (3, 24, 16, 5))),
        _distill(*((8, 2, 64, 65536) if full else (3, 2, 5, 131))),
        _distill(*((1, 1, 4096, 8192) if full else (1, 1, 7, 65))),
        _ema(*((1024, 24) if full else (12, 2))),
        _gumbel(*((128, 750, 2, 320, 128) if full else (3, 11, 2, 19, 8))),
    ]


def _augment(batch: int, side: int, size: int, blur: int) -> Case:
    def make(draw: Draw) -> Arrays:
        from selfsup.triton_ops.augment import AugmentPlan

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(shape, device=draw.device, generator=draw.generator)

        images = draw.whole(256, batch, 3, side, side).to(torch.uint8)
        extent = uniform(0.4, 1.0, batch, 2) * side
        corner = uniform(0, 1, batch, 2) * (side - extent)
        factors = torch.cat([uniform(0.6, 1.4, batch, 3), uniform(-0.1, 0.1, batch, 1)], 1)
        order = torch.rand(batch, 4, device=draw.device, generator=draw.generator).argsort(1)
        chances = [uniform(0, 1, batch) < share for share in (0.5, 0.2, 0.2)]
        plan = AugmentPlan(
            torch.cat([corner, extent], 1), chances[0], order, factors, chances[1], uniform(0.1, 2, batch), chances[2]
        )
        return [images, plan]

    # An output in the type of the arrays is compared with one in float64.
    return Case(
        "augment",
        f"B={batch} {side} to {size} blur={blur}",
        make,
        lambda op, images, plan: op(images, plan, size, blur=blur),
        least=batch * 3 * (side**2 + 4 * size**2),
        peers={"kornia": Peer(lambda: _kornia(size, blur), differs=OTHERS, only_gpu=False)},
        truth=lambda images, plan: _exact_views(images, plan, size, blur),
    )


def _exact_views(images: Tensor, plan: Any, size: int, blur: int) -> Tensor:
    from selfsup.triton_ops.augment import augment_reference

    return augment_reference(images, plan, size, blur=blur, dtype=torch.float64)


def _kornia(size: int, blur: int) -> Call:
    """The same kinds of steps for every sample, each with numbers of its own; solarizing is beyond this sequence."""
    from kornia import augmentation as k

    steps = torch.nn.Sequential(
        k.RandomResizedCrop((size, size), scale=(0.16, 1.0)),
        k.RandomHorizontalFlip(p=0.5),
        k.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0),
        k.RandomGrayscale(p=0.2),
        k.RandomGaussianBlur((blur, blur), (0.1, 2.0), p=1.0),
        k.RandomSolarize(p=0.2),
    )
    return lambda images, plan: steps(images.float() / 255)


def _distill(students: int, teachers: int, rows: int, prototypes: int) -> Case:
    def make(draw: Draw) -> Arrays:
        student = draw.normal(students, rows, prototypes)
        teacher = draw.normal(teachers, rows, prototypes, learned=False)
        centre = draw.normal(prototypes, scale=0.1, learned=False)
        return [student, teacher, centre]

    return Case(
        "distill_cross_entropy",
        f"S={students} R={teachers} N={rows} K={prototypes}",
        make,
        lambda op, student, teacher, centre: op(student, teacher, centre, skip_same=students > 1),
        least=2 * rows * prototypes * (2 * students + teachers),  # each read once, and a gradient written
    )


def _gumbel(batch: int, frames: int, groups: int, entries: int, width: int) -> Case:
    def make(draw: Draw) -> Arrays:
        logits = draw.normal(batch, frames, groups, entries)
        return [logits, draw.normal(groups, entries, width), torch.arange(batch, device=draw.device)]

    rows = batch * frames
    return Case(
        "gumbel_quantize",
        f"B={batch} T={frames} G={groups} V={entries} D={width}",
        make,
        lambda op, logits, codebook, ids: op(logits, codebook, Stream(KEY, ids), temperature=1.0),
        products=((rows, width, entries),) * groups,  # of the gradients that arrive, with the codebook
        least=2 * rows * groups * (3 * entries + 2 * width),  # logits twice and their gradient; entries, and theirs
        peers={"torch": Peer(lambda: _gumbel_softmax, differs=NOISE, only_gpu=False)},
        spare=1e-4,  # of two choices that are alike likely, the last digit of the noise takes one
    )


def _gumbel_softmax(logits: Tensor, codebook: Tensor, ids: Tensor) -> Tensor:
    """torch.nn.functional.gumbel_softmax, as wav2vec 2.0's code has it: one-hot vectors times the codebook."""
    chosen = torch.nn.functional.gumbel_softmax(logits.float(), hard=True).to(codebook.dtype)
    return torch.einsum("btgv,gvd->btgd", chosen, codebook)


def _ema(width: int, depth: int) -> Case:
    """The weights of a transformer, in float32 whatever the type of arrays: 16 bits cannot show a step of it."""
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), *[(width,)] * 9]

    def make(draw: Draw) -> Arrays:
        draw = Draw(draw.device, torch.float32, seed=1)
        return [draw.normal(*shape, learned=False) for _ in range(2 * depth) for shape in block]

    def call(op: Call, *weights: Tensor) -> list[Tensor]:
        half = len(weights) // 2
        targets = list(weights[:half])
        op(targets, list(weights[half:]), 0.996)
        return targets

    count = depth * sum(torch.Size(shape).numel() for shape in block)
    return Case(
        "ema",
        f"{count} weights in {depth * len(block)} tensors",
        make,
        call,
        least=12 * count,
        peers={"torch": Peer(lambda: partial(call, _torch_average), only_gpu=False)},
        in_place=True,
    )


def _torch_average(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    borrowed("torch.optim.swa_utils", "get_ema_multi_avg_fn")(momentum)(targets, sources, 0)
