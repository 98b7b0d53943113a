"""Look at a model in the middle of its training, and leave no trace in it.

Inside `with evaluating(model):` it is in eval mode, without gradients. Afterwards every module's mode, every buffer
(queues, statistics of batch norm, whatever a forward pass may change) and torch's random state are what they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def evaluating(model: nn.Module, parts: bool = False) -> Iterator[None]:
    """Eval mode and no gradients, for a while.

    `parts` says that not the model but some module in it will be called: where FSDP2 shards the parameters, the calls
    that would put together the model's own are missing then. All processes enter together.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    gpus = {p.device for p in model.parameters() if p.is_cuda}
    try:
        # Not inference_mode: what FSDP2 puts together there could not be trained afterwards.
        with torch.no_grad(), torch.random.fork_rng(gpus):
            model.eval()
            if parts and isinstance(model, FSDPModule):
                model.unshard()
            yield
    finally:
        for shard in sharded:
            shard.reshard()  # without a backward pass the parameters stay whole
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
