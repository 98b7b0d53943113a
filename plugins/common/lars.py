"""LARS: every weight matrix moves by about the same share of its own length.

You, Gitman and Ginsburg 2017, "Large batch training of convolutional networks",
https://arxiv.org/abs/1708.03888, as SimCLR and BYOL train with it. For a parameter w with gradient g,
momentum buffer v, learning rate l, momentum m, weight decay b and trust coefficient c:

    g' = g + b w
    r  = c |w| / |g'|      1 where either norm is 0
    v <- m v + l r g'
    w <- w - v             Nesterov: w - (m v + l r g')

Two departures from the paper's algorithm 1, both those of SimCLR's code: the ratio divides by |g + b w|,
where the paper divides by |g| + b |w|; and parameters of a group with `adapt` = False (biases, norms)
have r = 1. As in the paper, and unlike most ports to PyTorch, the learning rate stands inside the
momentum buffer: the two differ whenever it changes, that is in every step of warm-up and cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

BUFFER = "momentum_buffer"
Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling. Groups may set `adapt` = False to leave out the trust ratio.

    Nothing here waits for the device. Like torch's fused optimizers it reads two attributes that a loop
    may set before `step`: `found_inf` (float (), 1 leaves out the update, parameters and buffers
    untouched) and `grad_scale` (float (), gradients are divided by it).
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        nesterov: bool = False,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, {**defaults, "nesterov": nesterov, "adapt": adapt})
        # Tells torch.amp.GradScaler to set the two attributes instead of waiting to see whether to skip.
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        buffers = [self._buffer(p) for p in params]
        grads: Tensors = self._gradients(params)
        if group["weight_decay"]:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        rate, momentum = group["lr"], group["momentum"]
        if self.found_inf is not None:  # a step that is left out adds nothing to the buffers and keeps them
            moves = 1.0 - self.found_inf.to(params[0].device, params[0].dtype)  # ()
            rate, momentum = rate * moves, torch.where(moves > 0, momentum, 1.0)
        if group["adapt"]:
            rates = rate * trust_ratios(params, grads, group["trust"])  # [P]
            grads = torch._foreach_mul(grads, list(rates.unbind()))
        else:
            grads = torch._foreach_mul(grads, rate)
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        update: Tensors = buffers
        if group["nesterov"]:
            update = torch._foreach_add(grads, torch._foreach_mul(buffers, momentum))
        if self.found_inf is not None:
            update = torch._foreach_mul(update, moves)
        torch._foreach_sub_(params, update)

    def _buffer(self, p: Tensor) -> Tensor:
        if BUFFER not in self.state[p]:
            self.state[p][BUFFER] = torch.zeros_like(p)
        buffer: Tensor = self.state[p][BUFFER]
        return buffer

    def _gradients(self, params: list[Tensor]) -> Tensors:
        """The gradients, unscaled; zeros, whatever they hold, where this update is to be left out."""
        grads: Tensors = [p.grad for p in params if p.grad is not None]
        if self.grad_scale is not None:
            grads = torch._foreach_mul(grads, self.grad_scale.to(params[0].device).reciprocal())
        if self.found_inf is not None:
            left_out = self.found_inf.to(params[0].device) > 0  # ()
            grads = [torch.where(left_out, torch.zeros_like(g), g) for g in grads]
        return grads


def trust_ratios(params: Tensors, grads: Tensors, trust: float) -> Tensor:
    """trust |w| / |g| of each parameter, 1 where either norm is 0: [P]."""
    weights = torch.stack([whole(n) for n in torch._foreach_norm(params)])
    slopes = torch.stack([whole(n) for n in torch._foreach_norm(grads)])
    usable = (weights > 0) & (slopes > 0)
    return torch.where(usable, trust * weights / torch.where(usable, slopes, 1.0), 1.0)


def whole(x: Tensor) -> Tensor:
    """A plain tensor from one that may be sharded over processes."""
    full: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return full
