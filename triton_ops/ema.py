"""The moving average of a network's weights, all of them at once: the teacher of BYOL, MoCo and DINO.

Grill et al. 2020, "Bootstrap your own latent", https://arxiv.org/abs/2006.07733, equation 1; He et al. 2020, MoCo,
https://arxiv.org/abs/1911.05722, equation 2; Caron et al. 2021, DINO, https://arxiv.org/abs/2104.14294:

    target <- m target + (1 - m) source, computed as target + (1 - m) (source - target): equal weights stay as they are

There is no kernel of our own. `torch._foreach_lerp_` on a GPU reads both lists once and writes one, which is the limit,
12 bytes for a weight in float32, in about one launch for every 20 million weights or 64 tensors. Where the types of
target and source differ it would refuse, so the source is first brought to the wider type, a bounded number of weights
at a time: 18 bytes for a target in float32 and a source in bfloat16, where 10 would do. Where the momentum is a tensor,
as a CUDA graph needs it, there is a launch for each tensor, at the limit of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from selfsup.kernel.errors import ContractError

LARGEST = 2**30  # elements of a tensor at once: offsets within it fit 32 bits, whatever a library makes of them
TOGETHER = 2**27  # elements at once, which exist twice meanwhile if their type changes


@torch.no_grad()
def ema(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor) -> None:
    """Move each target towards its source, in place.

    Of DTensors, each process moves its own part. A momentum near 1 moves no target of 16 bits: its steps are smaller
    than what such a number can show. Keep targets in float32.

    Args:
        targets: of floating point, any mix of types and shapes, each once.
        sources: as many, of the same shapes; any types.
        momentum: from 0, which copies, to 1, which changes nothing. A float costs no copy to the GPU; a tensor of one
            number may change inside a CUDA graph.
    """
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1:
            raise ContractError(f"momentum is one number, and this has shape {list(momentum.shape)}")
        momentum = momentum.reshape(()).item() if momentum.device.type == "cpu" else momentum.reshape(())
    if not isinstance(momentum, Tensor) and not 0 <= momentum <= 1:
        raise ContractError(f"momentum must be from 0 to 1, and is {momentum}")
    _check(targets, sources)
    pairs = sorted((pair for t, s in zip(targets, sources, strict=True) for pair in _parts(t, s)), key=_kind)
    for _, alike in groupby(pairs, _kind):
        for batch in _batches(list(alike)):
            _move(batch, momentum)


@torch.no_grad()
def ema_reference(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor) -> None:
    """What `ema` must do."""
    for target, source in zip(targets, sources, strict=True):
        kind = torch.promote_types(torch.promote_types(target.dtype, source.dtype), torch.float32)
        target.copy_(momentum * target.to(kind) + (1 - momentum) * source.to(kind))


def _check(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if len(targets) != len(sources):
        raise ContractError(f"each target needs a source; there are {len(targets)} and {len(sources)}")
    if len({id(t) for t in targets}) < len(targets):
        raise ContractError("a target is given twice, and would be moved twice; name shared weights once")
    for number, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape:
            shapes = f"{list(target.shape)} and {list(source.shape)}"
            raise ContractError(f"target and source {number} must have one shape, and have {shapes}")
        if not target.is_floating_point() or not source.is_floating_point():
            raise ContractError(f"target and source {number} must be of floating point: {target.dtype}, {source.dtype}")
        if target.device != source.device:
            raise ContractError(f"target {number} is on {target.device}, and its source on {source.device}")
        if getattr(target, "placements", None) != getattr(source, "placements", None):
            raise ContractError(f"target and source {number} are DTensors, both or neither, divided in one way")


def _parts(target: Any, source: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """What this process has of a pair, as one, or as several where it is very large."""
    if hasattr(target, "to_local"):
        target, source = target.to_local(), source.to_local()
    if target.numel() <= LARGEST:
        yield target, source
        return
    size = LARGEST * len(target) // target.numel()
    parts = (target.split(size), source.split(size)) if size else (target, source)  # some rows, or each by itself
    for pair in zip(*parts, strict=True):
        yield from _parts(*pair)


def _kind(pair: tuple[Tensor, Tensor]) -> tuple[str, str, str]:
    """What tensors that are moved in one launch have in common."""
    target, source = pair
    return str(target.device), str(target.dtype), str(source.dtype)


def _batches(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """No more elements at once than may exist twice."""
    batch: list[tuple[Tensor, Tensor]] = []
    count = 0
    for pair in pairs:
        if batch and count + pair[0].numel() > TOGETHER:
            yield batch
            batch, count = [], 0
        batch.append(pair)
        count += pair[0].numel()
    yield batch


def _move(pairs: list[tuple[Tensor, Tensor]], momentum: float | Tensor) -> None:
    targets, sources = ([pair[side] for pair in pairs] for side in range(2))
    kind = torch.promote_types(targets[0].dtype, sources[0].dtype)
    if isinstance(momentum, Tensor):  # a tensor has the type of the numbers that it weighs, and 16 bits are too few
        kind = torch.promote_types(kind, torch.float32)
    exact = _as(targets, kind)
    sources = _as(sources, kind)
    if isinstance(momentum, Tensor):
        weight = (1 - momentum.double()).to(targets[0].device, kind)
        for target, source in zip(exact, sources, strict=True):
            target.lerp_(source, weight)
    else:
        torch._foreach_lerp_(exact, sources, 1 - momentum)
    if exact is not targets:
        torch._foreach_copy_(targets, exact)


def _as(tensors: list[Tensor], kind: torch.dtype) -> list[Tensor]:
    """The tensors in a type: themselves, or copies made in few launches."""
    if tensors[0].dtype == kind:
        return tensors
    copies = [torch.empty_like(x, dtype=kind) for x in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies
