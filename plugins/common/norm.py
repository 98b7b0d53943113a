"""Normalisation: of tokens (layer, RMS), and of a batch that several processes hold.

Batch normalisation (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167) of channel c:

    y = (x - mean_c) / sqrt(var_c + eps) * weight_c + bias_c

where mean and variance are over every value of that channel in the *global* batch. Process p holds
n_p values with mean m_p and sum of squared deviations s_p; then (Chan et al. 1979)

    N = sum_p n_p    mean = sum_p n_p m_p / N    var = sum_p (s_p + n_p (m_p - mean)^2) / N

so W processes give the values and gradients of one, also when they hold unequal numbers of rows.

Shapes: B batch, C channels, W processes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup.kernel.distributed import gather, world
from selfsup.kernel.errors import ContractError

Norm = Literal["layer", "rms"]


def token_norm(kind: Norm, width: int, eps: float) -> nn.Module:
    """A norm over the last dimension, `width` wide: LayerNorm (2016), or RMSNorm (2019), which has no bias."""
    return nn.LayerNorm(width, eps=eps) if kind == "layer" else nn.RMSNorm(width, eps=eps)


class BatchNorm(nn.Module):
    """Batch normalisation of [B, C] or [B, C, ...] with the statistics of all processes.

    Parameters and buffers carry torch's names, so checkpoints of `torch.nn.BatchNorm1d`, `2d` and `3d`
    load. In one process it is torch's batch norm, bit for bit. `momentum` is the weight of the newest
    batch in the running statistics; `affine=False` leaves out weight and bias, `bias=False` the bias
    alone (SimCLR's last layer).

    Raises ContractError for an input of the wrong shape, and ValueError (torch's) for a batch of one
    value per channel in one process.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        self.channels, self.eps, self.momentum = channels, eps, momentum
        self.register_parameter("weight", nn.Parameter(torch.ones(channels)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if affine and bias else None)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] or [B, C, ...] -> the same shape; updates the running statistics in training."""
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ContractError(f"batch norm of {self.channels} channels got an input of shape {list(x.shape)}")
        if self.training:
            self.num_batches_tracked.add_(1)
            if world() > 1:
                return self._synchronised(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def _synchronised(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, count = moments(wide)
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        each = (1, -1) + (1,) * (x.dim() - 2)
        # One multiply-add, so that autograd keeps x itself and no centred copy of it.
        return torch.addcmul(shift.view(each), wide, scale.view(each)).to(x.dtype)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}"


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and count [1] of each channel of x [B, C, ...] over all processes.

    Differentiable. A process may hold no rows at all.
    """
    over = [d for d in range(x.dim()) if d != 1]
    count = x.new_full((1,), x.numel() // x.shape[1])
    if x.numel():
        spread, mean = torch.var_mean(x, over, correction=0)  # [C], [C]
        spread = spread * count
    else:
        spread = mean = x.sum(over)  # zeros that still belong to the graph, so that all processes run its backward
    parts = gather(torch.cat([mean, spread, count])[None])  # [W, 2C + 1]
    means, spreads, counts = torch.split(parts, [len(mean), len(mean), 1], 1)  # [W, C], [W, C], [W, 1]
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    var = (spreads + counts * (means - mean).square()).sum(0) / total
    return mean, var, total
