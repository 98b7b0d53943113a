"""Other processes: how they are joined, and the little that the rest of the code may know of them.

An objective may use `gather`, and losses that do the same with a process's share of memory
(`triton_ops.contrast_ring`), and nothing else. Its gradient is that of the sum of every process's loss, so with the
loop's weighted mean over processes the gradient of W processes is that of one.
"""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from .errors import ConfigError

if TYPE_CHECKING:
    from .contracts import Objective


def join(device: torch.device, timeout: float) -> None:
    """Join the process group that torchrun describes in the environment; alone, do nothing."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)  # save and end: nobody would end what a torchrun that was killed left behind
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend, wait = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout)
        try:
            store, number, processes = next(iter(rendezvous("env://", timeout=wait)))
            dist.init_process_group(backend, store=meeting(store), rank=number, world_size=processes, timeout=wait)
        except (dist.DistError, ValueError) as cause:
            raise ConfigError(f"this process could not join the others: {cause}") from cause


def meeting(store: dist.distributed_c10d.Store) -> dist.distributed_c10d.Store:
    """Where the processes of this start find each other, and not the addresses of those that were killed before.

    torchrun keeps one store over all starts, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 tells it to make new ones.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    return dist.distributed_c10d.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def end_with_parent(number: int) -> None:
    """Let Linux send this process a signal when its parent ends, however that ends."""
    with suppress(AttributeError):  # another system
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes; not differentiable."""
    if world() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def anyone(flag: bool) -> bool:
    """Whether the flag is set on any process: a decision that all take alike. Waits for the others."""
    return bool(total(torch.tensor(float(flag))) > 0)


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier()


def alike(text: str) -> str:
    """The text of the first process, on every process."""
    if world() == 1:
        return text
    said = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
    size = torch.tensor([len(said)])
    dist.broadcast(size, 0)
    said = said if rank() == 0 else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(said, 0)
    return said.numpy().tobytes().decode()


def everyone(text: str) -> list[str]:
    """What each process says, in their order, on every process."""
    said, sizes = text.encode(), torch.zeros(world(), dtype=torch.int64)
    sizes[rank()] = len(said)
    sizes = total(sizes)
    mine = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    mine[: len(said)] = torch.tensor(list(said), dtype=torch.uint8)
    rows = gather(mine).view(world(), -1).numpy()
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes.tolist(), strict=True)]


def gather(x: Tensor) -> Tensor:
    """Concatenate x [B, ...], of one shape everywhere, over all processes: [world * B, ...].

    Differentiable: the gradient of this process's rows is summed over all processes.
    """
    if world() == 1:
        return x
    return _Gather.apply(x)  # type: ignore[no-untyped-call, no-any-return]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(out, x.contiguous())
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        dist.all_reduce(grad := grad.contiguous().clone())
        return grad.chunk(world())[rank()]


class Wrapped:
    """An objective as one of several processes runs it: alone, under DDP or sharded by FSDP2."""

    def __init__(self, objective: Objective, parallel: str, device: torch.device) -> None:
        self.forward: nn.Module = objective
        self.sharded = False
        if world() == 1:
            return
        if parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for backbone in objective.backbones():
                for unit in backbone.units():
                    fully_shard(unit)
            fully_shard(objective)
            self.sharded = True
        else:
            skips = any(backbone.skips_parameters for backbone in objective.backbones())
            self.forward = nn.parallel.DistributedDataParallel(objective, find_unused_parameters=skips)
            # Every process keeps its own buffers, which are alike. (As an argument this is deprecated in torch 2.13.)
            self.forward.broadcast_buffers = False
            if not skips:
                self._settle(objective)

    def _settle(self, objective: Objective) -> None:
        """Let a pass that changes nothing show DDP the order of gradients, by which it arranges its sums for good.

        The first step would show it otherwise, and be summed in another order than the same step of a run that was not
        interrupted before it: among three processes and more, the last bits would differ.
        """
        parameters = [p for p in objective.parameters() if p.requires_grad]
        vars(objective)["forward"] = lambda: torch.stack([p.sum().float() for p in parameters]).sum()
        self.forward().backward()
        del vars(objective)["forward"]
        objective.zero_grad(set_to_none=True)

    def syncing(self, last: bool) -> AbstractContextManager[object]:
        """Share gradients with the other processes after the last microbatch only."""
        if isinstance(self.forward, nn.parallel.DistributedDataParallel) and not last:
            return self.forward.no_sync()
        if self.sharded:
            self.forward.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()
