"""Cases of augmentation, distillation, quantisation and averaged weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bench_case import Arrays, Call, Case, Draw, Peer

OTHERS = "draws its own crops and colours, and is not compared"


def cases(full: bool) -> list[Case]:
    """Of `augment` and `distill_cross_entropy`."""
    return [
        _augment(*((1024, 256, 224, 23) if full else (3, 24, 16, 5))),
        _distill(*((8, 2, 64, 65536) if full else (3, 2, 5, 131))),
        _distill(*((1, 1, 4096, 8192) if full else (1, 1, 7, 65))),
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
