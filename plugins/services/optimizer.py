"""AdamW, SGD or LARS, with a learning rate that follows the step and the batch size.

Recipes name the batch their learning rate is for (`reference_batch`); for another batch the peak is

    linear   lr * batch / reference_batch             Goyal et al. 2017, https://arxiv.org/abs/1706.02677
    sqrt     lr * sqrt(batch / reference_batch)       Krizhevsky 2014, https://arxiv.org/abs/1404.5997

Biases, parameters of at most one dimension (norms, scales) and those that an objective names in
`no_decay` are not decayed and, under LARS, not adapted. Frozen parameters are left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.sgd import sgd

from selfsup.kernel.config import about
from selfsup.kernel.contracts import Objective, Step
from selfsup.kernel.errors import ConfigError, ContractError, nearest
from selfsup.kernel.hookspecs import hookimpl
from selfsup.plugins.common.lars import BUFFER, LARS
from selfsup.plugins.common.schedules import Shape, share

if TYPE_CHECKING:
    from selfsup.kernel.loop import Run


class Optimizers:
    """Build the optimizer of a run and set its learning rate before every step."""

    fixed: ClassVar[tuple[str, ...]] = (
        *("name", "lr", "betas", "eps", "momentum", "nesterov", "weight_decay", "trust"),
        *("schedule", "warmup", "final", "milestones", "decay", "reference_batch", "scaling"),
    )  # what may not change when a run is resumed

    def __init__(
        self,
        *,
        name: Annotated[Literal["adamw", "sgd", "lars"], about("the algorithm")] = "adamw",
        lr: Annotated[float, about("peak learning rate, at reference_batch where that is given", gt=0)] = 1e-3,
        betas: Annotated[tuple[float, float], about("AdamW: decay of both moments, each in [0, 1)")] = (0.9, 0.999),
        eps: Annotated[float, about("AdamW: added to the root of the second moment", gt=0)] = 1e-8,
        momentum: Annotated[float, about("SGD, LARS: of the gradient", ge=0, lt=1)] = 0.9,
        nesterov: Annotated[bool, about("SGD, LARS: Nesterov's momentum")] = False,
        weight_decay: Annotated[float, about("of matrices; biases and norms have none", ge=0)] = 0.01,
        trust: Annotated[float, about("LARS: share of its length that a matrix moves by at lr 1", gt=0)] = 1e-3,
        schedule: Annotated[Shape, about("the curve after the warm-up")] = "cosine",
        warmup: Annotated[float, about("share of the run with a rising learning rate", ge=0, le=1)] = 0.05,
        final: Annotated[float, about("cosine, linear: end of the curve, as a share of the peak", ge=0, le=1)] = 0.0,
        milestones: Annotated[tuple[float, ...], about("multistep: shares of the run, rising, in (0, 1)")] = (),
        decay: Annotated[float, about("multistep: factor at each milestone", gt=0, le=1)] = 0.1,
        reference_batch: Annotated[int | None, about("the batch that lr is for; none: any", ge=1)] = None,
        scaling: Annotated[Literal["linear", "sqrt", "none"], about("how lr follows the batch")] = "linear",
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"optimizer.betas = {list(betas)}: each must be at least 0 and below 1")
        if list(milestones) != sorted(set(milestones)) or not all(0 < m < 1 for m in milestones):
            raise ConfigError(f"optimizer.milestones = {list(milestones)}: they must rise, between 0 and 1")
        if nesterov and not momentum:
            raise ConfigError("optimizer.nesterov = true needs optimizer.momentum above 0")
        self.name, self.lr, self.betas, self.eps = name, lr, tuple(betas), eps
        self.momentum, self.nesterov, self.weight_decay, self.trust = momentum, nesterov, weight_decay, trust
        self.schedule, self.warmup, self.final = schedule, warmup, final
        self.milestones, self.decay = tuple(milestones), decay
        self.reference_batch, self.scaling = reference_batch, scaling

    @hookimpl(trylast=True)
    def build_optimizer(self, objective: Objective, batch: int) -> Optimizer:
        """The optimizer over all trained parameters; other services are asked first."""
        decayed, spared = partition(objective)
        lr = self.peak(batch)
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.weight_decay, "peak": lr},
            {"params": spared, "weight_decay": 0.0, "peak": lr},
        ]
        if self.name == "lars":
            for group in groups:
                group["adapt"] = group["params"] is decayed
        groups = [group for group in groups if group["params"]]
        if self.name == "adamw":  # fused: it reads `found_inf`, so an update is left out without the host knowing
            return AdamW(groups, lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=True)
        if self.name == "lars":
            return LARS(groups, lr, momentum=self.momentum, trust=self.trust, nesterov=self.nesterov)
        return FusedSGD(groups, lr, momentum=self.momentum, nesterov=self.nesterov)

    @hookimpl
    def step_started(self, run: Run, step: Step) -> None:
        """Set the learning rate of every group that has a `peak`, as a function of the step alone.

        Another service's optimizer joins in by giving its groups one, and is left alone otherwise.
        """
        now = self.share(step)
        for group in run.optimizer.param_groups:
            if "peak" in group:
                group["lr"] = group["peak"] * now

    def share(self, step: Step) -> float:
        """The share of the peak learning rate at a step."""
        return share(
            step,
            self.schedule,
            warmup=self.warmup,
            final=self.final,
            milestones=self.milestones,
            decay=self.decay,
        )

    def peak(self, batch: int) -> float:
        """The highest learning rate of a run with this global batch."""
        ratio = batch / (self.reference_batch or batch)
        return self.lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[self.scaling]

    def describe(self, batch: int) -> str:
        """The recipe in a line, with the learning rate that this global batch gets."""
        peak = self.peak(batch)
        rate = f"lr {peak:g}"
        if self.reference_batch not in (None, batch) and self.scaling != "none":
            rate = f"lr {self.lr:g} at batch {self.reference_batch} -> {peak:g} at batch {batch} ({self.scaling})"
        curve = f"{self.schedule} after {100 * self.warmup:g} % warm-up" if self.warmup else self.schedule
        return f"{self.name}, {rate}, weight decay {self.weight_decay:g}, {curve}"


class FusedSGD(SGD):
    """torch's fused SGD, made fit for two things that torch 2.13 leaves out.

    Its kernel has no rule for parameters that FSDP2 shards: here every process updates its own shards.
    And a first step that `found_inf` leaves out keeps the momentum buffers it allocated, uninitialised:
    here they start as zeros.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            buffers: list[Tensor | None] = [self._buffer(p) if group["momentum"] else None for p in params]
            sgd(
                [local(p) for p in params],
                [local(p.grad) for p in params],
                [None if b is None else local(b) for b in buffers],
                fused=True,
                found_inf=self.found_inf,
                grad_scale=self.grad_scale,
                **{key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")},
            )
        return loss

    def _buffer(self, p: Tensor) -> Tensor:
        if BUFFER not in self.state[p]:
            self.state[p][BUFFER] = torch.zeros_like(p)
        buffer: Tensor = self.state[p][BUFFER]
        return buffer


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    part: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return part


def partition(objective: Objective) -> tuple[list[Tensor], list[Tensor]]:
    """The trained parameters (with weight decay, without it), each in the order of the objective."""
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    known = {name for name, _ in objective.named_parameters()}
    named = set(objective.no_decay())
    for name in sorted(named - known):
        raise ContractError(
            f"{type(objective).__name__}.no_decay names the parameter {name!r}, which it does not have; "
            f"{nearest(name, known)}"
        )
    if not trained:
        raise ContractError(f"{type(objective).__name__} has no parameter to train: all are frozen, or there are none")
    spared = {n for n, p in trained.items() if n in named or p.ndim <= 1 or n.rpartition(".")[2] == "bias"}
    return [p for n, p in trained.items() if n not in spared], [trained[n] for n in trained if n in spared]
