"""The learning rate of a step as a share of its peak: a pure function, so there is nothing to save.

With step k of n, counted from 0, and a warm-up of W = warmup * n steps (not rounded):

    k <  W    min(1, (k + 1) / W)                      linear from 0; the first step does not train at 0
    k >= W    with p = (k - W) / (n - W), 0 <= p < 1:
      constant   1
      linear     final + (1 - final) (1 - p)
      cosine     final + (1 - final) (1 + cos(pi p)) / 2     Loshchilov and Hutter 2017, eq. 5, without restarts
      multistep  decay ** (how many milestones are <= k / n)

`final` is what the curve tends to at step n, which is the first step that is not taken. Milestones are
shares of the whole run, warm-up included. https://arxiv.org/abs/1608.03983
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from selfsup.kernel.contracts import Step

Shape = Literal["cosine", "linear", "constant", "multistep"]


def share(
    step: Step,
    shape: Shape = "cosine",
    *,
    warmup: float = 0.0,
    final: float = 0.0,
    milestones: Sequence[float] = (),
    decay: float = 0.1,
) -> float:
    """The share of the peak learning rate at a step, 0 to 1.

    `warmup` is a share of the run (0 to 1), `final` a share of the peak (0 to 1) that only linear and
    cosine read, `milestones` are shares of the run at which multistep multiplies by `decay`.
    """
    warm = warmup * step.total
    if step.number < warm:
        return min(1.0, (step.number + 1) / warm)
    if shape == "constant":
        return 1.0
    if shape == "multistep":
        return float(decay ** sum(milestone <= step.fraction for milestone in milestones))
    behind = (step.number - warm) / max(1.0, step.total - warm)
    falling = 1.0 - behind if shape == "linear" else (1.0 + math.cos(math.pi * behind)) / 2.0
    return final + (1.0 - final) * falling
