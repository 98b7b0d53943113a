"""Contrast with the vectors of every process, of which each holds one other's at a time: they go round a ring.

Blocks of keys travel, as in Chen et al. 2024, "Breaking the memory barrier: near infinite batch size scaling for
contrastive loss", https://arxiv.org/abs/2410.17243, section 3.3. The W processes of a group stand in a ring. In turn k
a process has the keys of the one k places before it. It sends them on, works on them while they travel, and merges
what it found of its rows: with r, t of contrast.py from one block of keys, and r', t' from another,

    t'' = max(t, t')      r'' = log(exp(r + t - t'') + exp(r' + t' - t''))

What it found of the keys, statistics of columns or their gradient in the type of sums, goes on a turn behind them, each
process adding its own, and after the last turn to the process that the keys belong to. Where the rows of all processes
are the keys of all, both ends of a pair are served at once: W // 2 turns, and the last of an even number, in which each
of two processes has the other's rows, gives it the gradient of its own rows alone.

A process multiplies 2 N M D W times in the forward pass and 6 N M D W in the backward pass (half of each where the rows
are the keys), and holds O((N + M) D). It sends W - 1 blocks of keys each way, and backward W gradients, half of each
where the rows are the keys. The other way would be to send rows too, and let each process find the gradient of its own
keys: 8 N M D W, and fewer bytes, which do not count where they travel behind the products.

The gradients are those of the sum of all processes' losses. That of a scale or bias is this process's part of it, and
the parts add up. So the means over processes, as DDP takes them, of losses that are means over a process's own rows are
those of one process with all rows, as with kernel/distributed.gather. Nothing here is traced by torch.compile, which
breaks its graph; without a group all is.

Shapes: N rows, M keys of one process, D width; W processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from selfsup.kernel.errors import ContractError

from .contrast import as_scalar, check_ids, check_vectors, exact, in_one_type, losses, negatives, similarity
from .contrast_tiles import LOG2

Block = list[Tensor | None]
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def contrast_everywhere(
    rows: Tensor, partners: Tensor, ids: Tensor, *, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """`contrast` of this process's rows with the rows of all processes of the run, if it is one of several."""
    return contrast_among(rows, partners, ids, temperature=temperature, group=dist.group.WORLD)


def contrast_among(
    rows: Tensor, partners: Tensor, ids: Tensor, *, temperature: float | Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(the loss of each row [N], whether its partner is at least as near as all its negatives: bool [N]).

    It is `contrast` with the rows of all processes for keys. Vectors are not normalised. The losses have a first
    derivative with respect to rows, partners and a temperature that is a tensor, and no second one.

    Args:
        rows: [N, D], as many on every process.
        partners: [N, D]; what row i should be near to.
        ids: int64 [N]; a row of the same id, here or elsewhere, is no negative.
        temperature: of the softmax.
        group: the processes; None is this one alone.
    """
    check_vectors(rows=rows, partners=partners)
    check_ids(rows=(rows, ids))
    rows, partners = in_one_type(rows, partners)
    scale = as_scalar(1 / temperature, rows)
    r, t, _, _ = negatives_of_all(rows, None, scale, ids, group=group)
    near = similarity(rows, partners) * scale
    return losses(near, r, t), near.detach() >= t


def negatives_of_all(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    columns: bool = False,
    *,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`negatives` of this process's rows with the keys of all, and of its keys with the rows of all.

    Raises ContractError on every process unless all bring arrays of the same shapes and types, of which the same are
    learned. The hosts ask each other at every call, and no GPU waits, if the group has a way between hosts, as one of
    "cpu:gloo,cuda:nccl" has, torch's default; in a group of GPUs alone they wait to ask these.
    """
    if group is None:
        return negatives(x, y, scale, row_ids, key_ids, columns)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _around(group, x, y, scale, row_ids, key_ids, columns)
    return found


def numbered(vectors: Tensor, group: ProcessGroup | None) -> Tensor:
    """An id for each vector that no other of any process has: int64 [N]."""
    return torch.arange(vectors.shape[0], device=vectors.device) + offset(vectors, group)


def offset(vectors: Tensor, group: ProcessGroup | None) -> int:
    """How many vectors the processes before this one have, which are as many on each."""
    return 0 if group is None else _place(group) * vectors.shape[0]


def mean_of_all(vectors: Tensor, group: ProcessGroup | None) -> Tensor:
    """The mean of the vectors of all processes, as many on each: [D] in the type of sums."""
    mean = vectors.to(exact(vectors.dtype)).mean(0)
    return mean if group is None else _mean(mean, group)


def size_of(group: ProcessGroup | None) -> int:
    """How many processes there are."""
    return 1 if group is None else _size(group)


@torch.compiler.disable
def _size(group: ProcessGroup) -> int:
    return dist.get_world_size(group)


@torch.compiler.disable
def _place(group: ProcessGroup) -> int:
    place = dist.get_rank(group)
    if place < 0:
        raise ContractError(f"this process, number {dist.get_rank()} of all, is none of the group that it was given")
    return place


@torch.compiler.disable
def _mean(mean: Tensor, group: ProcessGroup) -> Tensor:
    return _Total.apply(mean, group) / _size(group)  # type: ignore[no-untyped-call, no-any-return]


@torch.compiler.disable
def _around(
    group: ProcessGroup,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ring = Ring(group)
    if ring.size == 1:
        return negatives(x, y, scale, row_ids, key_ids, columns)
    ring.hold_to_one_form(x, x if y is None else y, scale)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _Everywhere.apply(  # type: ignore[no-untyped-call]
        ring, x, y, scale, row_ids, key_ids, columns
    )
    return found


class Ring:
    """The processes of a group, of which this one has a place, and what goes round among them."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.place, self.size = group, _place(group), _size(group)

    def move(self, block: Block, places: int) -> Callable[[], list[Any]]:
        """Begin to send arrays so many places on; the call that is returned waits for those that come instead."""
        to, source = (dist.get_global_rank(self.group, (self.place + n) % self.size) for n in (places, -places))
        gone = [None if x is None else x.contiguous() for x in block]
        come = [None if x is None else torch.empty_like(x) for x in gone]
        filled = [(a, b) for a, b in zip(gone, come, strict=True) if a is not None and b is not None and a.numel()]
        sends = [dist.P2POp(dist.isend, a, to, self.group) for a, _ in filled]
        receipts = [dist.P2POp(dist.irecv, b, source, self.group) for _, b in filled]
        return partial(_arrived, dist.batch_isend_irecv(sends + receipts) if filled else [], gone, come)

    def gathered(self, x: Tensor) -> Tensor:
        """What all processes have of the shape of x: [W, ...]."""
        every = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(every, x.contiguous(), group=self.group)
        return torch.stack(every)

    def hold_to_one_form(self, x: Tensor, y: Tensor, *numbers: Tensor) -> None:
        """Raise on every process unless all bring the same: to wait for what never comes would say nothing."""
        learned = [a.requires_grad and torch.is_grad_enabled() for a in (x, y, *numbers)]
        form = {
            "rows": x.shape[0],
            "keys": y.shape[0],
            "width": x.shape[1],
            "type": TYPES.index(x.dtype),
            "learned": sum(flag << bit for bit, flag in enumerate(learned)),
        }
        device = "cpu" if "cpu:" in dist.get_backend_config(self.group) else x.device
        every = self.gathered(torch.tensor(list(form.values()), device=device))
        for name, values in zip(form, every.T.tolist(), strict=True):
            if len(set(values)) > 1:
                said = [str(TYPES[v]) if name == "type" else v for v in values]
                what = "learned arrays (bits: rows, keys, scale or bias)" if name == "learned" else name
                raise ContractError(f"all processes of a group must bring the same; their {what}: {said}")


def _arrived(works: list[dist.Work], gone: Block, come: list[Any]) -> list[Any]:
    """What came; until then, what goes is kept."""
    for work in works:
        work.wait()
    return come


def _turns(ring: Ring, same: bool) -> tuple[int, int]:
    """(the last turn, the last in which something is found for the keys): see above."""
    return (ring.size // 2, (ring.size - 1) // 2) if same else (ring.size - 1, ring.size - 1)


def _merged(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(r'', t'') of the equations above; where neither has negatives, 0 and -inf."""
    top = torch.maximum(one[1], other[1])
    # exp(r) may be a little below 1, by the rounding of t, for which it makes up.
    first, second = (torch.exp(r) * _share(t, top) for r, t in (one, other))
    return (first + second).masked_fill(top == -torch.inf, 1).log(), top


def _share(t: Tensor, top: Tensor) -> Tensor:
    """exp(t - top), 0 where t is -inf.

    It is rounded as the gradients round exp(s - top), on a CPU in powers of two: or the weights of a row would add up
    to 1 and some 1e-6, which the gradient for the scale shows, a small difference of large sums.
    """
    if t.device.type == "cpu":
        t, top = t / LOG2, top / LOG2
        return torch.exp2(t - top.clamp(min=torch.finfo(top.dtype).min))
    return torch.exp(t - top.clamp(min=torch.finfo(top.dtype).min))


def _sums(
    ring: Ring,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_ids: Tensor | None,
    key_ids: Tensor | None,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, t, c, u) over all processes."""
    op, same = torch.ops.selfsup.contrast, y is None
    last, final = _turns(ring, same)
    block: Block = [x, row_ids] if same else [y, key_ids]
    coming = ring.move(block, 1)
    r, t, c, u = op(x, y, scale, row_ids, key_ids, columns)
    behind = ring.move([c, u], 1) if columns else None
    for turn in range(1, last + 1):
        block = coming()
        coming = ring.move(block, 1) if turn < last else list
        both = (columns or same) and turn <= final
        r_k, t_k, c_k, u_k = op(x, block[0], scale, row_ids, block[1], both)
        r, t = _merged((r, t), (r_k, t_k))
        if both:
            c_k, u_k = _merged(behind(), (c_k, u_k)) if behind else (c_k, u_k)
            behind = ring.move([c_k, u_k], 1 if turn < final else -final)
    if behind is None:
        return r, t, c, u
    home = behind()
    return (*_merged((r, t), home), c, u) if same else (r, t, *home)


def _gradients(
    ring: Ring, arrays: Block, state: list[Tensor], a: Tensor, b: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for x, y and scale of what all processes' sums are for: empty where not `wanted`."""
    (x, y, scale, row_ids, key_ids), (r, t, c, u) = arrays, state
    op, same, none = torch.ops.selfsup.contrast_gradients, y is None, r.new_empty(0)
    last, final = _turns(ring, same)
    block: Block = [x, row_ids, r, t, a] if same else [y, key_ids, c, u, b]
    behind, coming = None, None
    found: list[Tensor] = []
    for turn in range(last + 1):
        block = coming() if coming else block
        coming = ring.move(block, 1) if turn < last else None
        alone = same and not turn
        keys, ids, *of_keys = [None, None, none, none, none] if alone else block
        wants = [wanted[0], wanted[0 if same else 1] and turn <= final and not alone, wanted[2]]
        d_x, d_y, d_scale = op(x, keys, scale, row_ids, ids, r, t, a, *of_keys, wants)
        if same and 2 * turn == ring.size:  # the other process finds the same
            d_scale = d_scale / 2
        parts = [part.to(r.dtype) for part in (d_x, d_scale)]
        found = [whole.add_(part) for whole, part in zip(found, parts, strict=True)] if turn else parts
        if wants[1]:
            d_y = d_y.to(r.dtype)
            d_y = d_y if behind is None else d_y.add_(behind()[0])
            behind = ring.move([d_y], 1 if turn < final else -final)
    d_x, d_scale = found
    home = none if behind is None else behind()[0]
    return (d_x + home, none, d_scale) if same and len(home) else (d_x, home, d_scale)


class _Everywhere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: Ring, *inputs: Any) -> tuple[Tensor, ...]:
        output = _sums(ring, *inputs)
        ctx.ring = ring
        ctx.save_for_backward(*inputs[:5], *output)
        ctx.mark_non_differentiable(output[1], output[3])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor, of_t: Tensor, b: Tensor, of_u: Tensor) -> tuple[Tensor | None, ...]:
        *arrays, r, t, c, u = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[1:4])
        found = _gradients(ctx.ring, arrays, [r, t, c, u], a, b, wanted)
        learned = zip(found, arrays, wanted, strict=False)
        return (None, *(g.to(array.dtype) if want else None for g, array, want in learned), None, None, None)


class _Total(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
