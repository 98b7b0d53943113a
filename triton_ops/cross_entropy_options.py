"""What `cross_entropy` and `linear_cross_entropy` share: options, checks, and the loss of a few rows of logits.

cross_entropy.py has the equations. Of a row of logits, four numbers are measured,

    top = max_v z_v      rest = log sum_v exp(z_v - top)      true = z_y      spread = sum_v w_v z_v

from which its loss follows, and the gradient with the softmax. Where classes are split across ranks, each measures
its own, and the numbers of all are joined: top is the largest, true and spread are sums, and rest is again a logarithm
of a sum of exponentials. So the exchange is four numbers a row.

Shapes: C rows of logits at once, T in all, V classes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_into_tensor, distributed_c10d, get_rank, get_world_size

from selfsup.kernel.errors import ContractError

ROWS = 256  # of logits at once on a CPU; fewer where so many would pass LOGITS
LOGITS = 2**25


class Options(NamedTuple):
    """The numbers that shape a loss; they travel into an op as a list of floats."""

    smoothing: float  # 0 to 1
    z_loss: float
    softcap: float  # 0: none
    scale: float

    def plain(self) -> bool:
        """Whether the gradient for a logit is softmax - onehot."""
        return self == Options(0.0, 0.0, 0.0, 1.0)


def checked_options(label_smoothing: float, z_loss: float, softcap: float | None, scale: float) -> list[float]:
    """The options as floats, or an error that names the one out of range."""
    if not 0 <= label_smoothing <= 1:
        raise ContractError(f"label_smoothing must be from 0 to 1, and is {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ContractError(f"z_loss must be at least 0, and is {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ContractError(f"softcap must be above 0, or None, and is {softcap}")
    if not abs(scale) < math.inf:
        raise ContractError(f"scale must be a number, and is {scale}")
    return [float(label_smoothing), float(z_loss), float(softcap or 0.0), float(scale)]


def check_arrays(logits: Tensor, labels: Tensor, class_weights: Tensor | None, classes: int, reduction: str) -> None:
    """Raise unless types, devices and sizes fit; `logits` is whatever has the type and the device of logits."""
    if reduction not in ("mean", "sum", "none"):
        raise ContractError(f"there is no reduction {reduction!r}; choose mean, sum or none")
    if labels.dtype != torch.int64:
        raise ContractError(f"labels must be int64, and are {labels.dtype}")
    if not logits.is_floating_point():
        raise ContractError(f"logits and what makes them must be of floating point, and are {logits.dtype}")
    if labels.device != logits.device:
        raise ContractError(f"labels are on {labels.device}, and the rest is on {logits.device}")
    if class_weights is not None and (class_weights.shape != (classes,) or class_weights.device != logits.device):
        given = f"{list(class_weights.shape)} on {class_weights.device}"
        raise ContractError(f"class_weights must be [V] = [{classes}] on {logits.device}, and are {given}")


def check_labels(labels: Tensor, ignore_index: int, classes: int) -> None:
    """Raise where labels on a CPU name no class; those on a device cannot be asked without making it wait."""
    if labels.device.type != "cpu" or not labels.numel():
        return
    real = torch.where(labels == ignore_index, 0, labels)
    low, high = int(real.amin()), int(real.amax())
    if low < 0 or high >= classes:
        raise ContractError(
            f"labels must be from 0 to {classes - 1}, the last class, or {ignore_index}; they are from {low} to {high}"
        )


def exact(kind: torch.dtype) -> torch.dtype:
    """The type of losses and of sums over classes and rows."""
    return torch.float64 if kind == torch.float64 else torch.float32


def kept_type(kind: torch.dtype) -> torch.dtype:
    """The type in which gradients wait for that of the loss, which may scale what is too small for float16."""
    return torch.float32 if kind == torch.float16 else kind


def weights_of(class_weights: Tensor | None, kind: torch.dtype) -> Tensor | None:
    """Class weights as a loss takes them: exact, and constant."""
    return None if class_weights is None else class_weights.detach().to(exact(kind)).contiguous()


def share_of_a_row(labels: Tensor, class_weights: Tensor | None, ignore_index: int, kind: torch.dtype) -> Tensor:
    """What a mean multiplies each loss by: 1 / sum of the labels' class weights, [] exact; 0 where that sum is 0."""
    counts = labels != ignore_index
    if class_weights is None:
        total = counts.sum().to(exact(kind))
    else:
        inside = labels.clamp(0, class_weights.shape[0] - 1)
        total = torch.where(counts, class_weights[inside], 0.0).sum()
    return torch.where(total == 0, 0.0, 1 / total)


def chunks(rows: int, classes: int) -> list[slice]:
    """Evenly sized, as products of few rows are slow."""
    number = -(-rows // max(1, min(ROWS, LOGITS // classes)))
    size = -(-rows // max(1, number))
    return [slice(first, min(first + size, rows)) for first in range(0, rows, max(1, size))]


def labelled(labels: Tensor, ignore_index: int) -> Tensor | None:
    """The rows with a label, where leaving out the others makes no device wait and saves something."""
    if labels.device.type != "cpu":
        return None
    kept = (labels != ignore_index).nonzero()[:, 0]
    return kept if len(kept) < len(labels) else None


def unless_crowded(labels: Tensor, ignore_index: int, capacity: int | None) -> Tensor | float:
    """1, or NaN where more rows have a label than was said."""
    if capacity is None or capacity >= labels.shape[0]:
        return 1.0
    return torch.where((labels != ignore_index).sum() > capacity, torch.nan, 1.0)


class Share(NamedTuple):
    """The classes of this rank: `first` on, of `ranks` equal shares."""

    group: ProcessGroup | None
    first: int
    ranks: int


def share(group: str, classes: int) -> Share:
    """What this rank has, with `classes` of its own; "" is a group of one."""
    if not group:
        return Share(None, 0, 1)
    found: ProcessGroup = vars(distributed_c10d)["_resolve_process_group"](group)
    return Share(found, get_rank(found) * classes, get_world_size(found))


def shaped(x: Tensor, options: Options, out: Tensor) -> tuple[Tensor, Tensor | None]:
    """(z, the slope of the cap) of logits x before scale and cap; z is x itself, or in the memory of `out`."""
    if options.softcap:
        z = torch.mul(x, options.scale / options.softcap, out=out).tanh_()
        slope = 1 - z.square()
        return z.mul_(options.softcap), slope
    return (x if options.scale == 1 else torch.mul(x, options.scale, out=out)), None


def picked(z: Tensor, labels: Tensor) -> Tensor:
    """z_y of each row, [C]; 0 where the label is of no class here."""
    here, column = _place(labels, z.shape[1])
    return torch.where(here, z.gather(1, column)[:, 0], 0.0)


def spread_of(z: Tensor, weights: Tensor | None, options: Options) -> Tensor:
    """sum_v w_v z_v of each row, [C], where it is asked for."""
    if not options.smoothing:
        return z.new_zeros(len(z))
    return z.sum(-1) if weights is None else z @ weights


def softmax_rows(
    x: Tensor, labels: Tensor, weights: Tensor | None, options: Options, out: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(top, rest, true, spread [4, C]; the slope of the cap, [C, V]); `out` becomes softmax(z).

    Args:
        x: logits before scale and cap, exact [C, V].
        labels: int64 [C]; a label of no class here has a `true` of 0.
        weights: exact [V].
        options: of the loss.
        out: exact [C, V]; may be x itself.
    """
    z, slope = shaped(x, options, out)
    true, spread = picked(z, labels), spread_of(z, weights, options)
    top = z.amax(-1)
    torch.softmax(z, -1, out=out)
    # The largest probability, unlike the label's, is never near 0.
    return torch.stack((top, -out.amax(-1).log(), true, spread)), slope


def _place(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(whether a label is of a class here [C], a column that can be read [C, 1])."""
    return (labels >= 0) & (labels < classes), labels.clamp(0, classes - 1)[:, None]


def joined(measured: Tensor, group: ProcessGroup | None) -> Tensor:
    """The measures of rows over the classes of every rank: [4, C]."""
    if group is None:
        return measured
    every = measured.new_empty(get_world_size(group) * 4, measured.shape[1])
    all_gather_into_tensor(every, measured.contiguous(), group=group)
    tops, rests, true, spread = every.view(-1, 4, measured.shape[1]).unbind(1)  # [W, C]
    top = tops.amax(0)
    return torch.stack((top, ((tops - top) + rests).logsumexp(0), true.sum(0), spread.sum(0)))


def of_label(labels: Tensor, weights: Tensor | None, options: Options, classes: int, kind: torch.dtype) -> Tensor:
    """What the term of the label itself weighs, given weights, if any, of all classes: [C]; NaN for no class."""
    here, column = _place(labels, classes)
    own = labels.new_full(labels.shape, 1 - options.smoothing, dtype=kind)
    if weights is not None:
        own *= weights[column[:, 0]]
    return own.masked_fill_(~here, torch.nan)


def losses_of(measured: Tensor, own: Tensor, weights: Tensor | None, options: Options, classes: int) -> Tensor:
    """The loss of each row, [C], given `own` of `of_label`, and weights, if any, of all `classes`."""
    top, rest, true, spread = measured.unbind()
    losses: Tensor = own * ((top - true) + rest)
    if options.smoothing:
        mass = classes if weights is None else weights.sum()
        losses = losses + options.smoothing / classes * ((mass * top - spread) + mass * rest)
    return losses + options.z_loss * (top + rest) ** 2 if options.z_loss else losses


class Pull(NamedTuple):
    """The gradient of a loss for its logits before scale and cap: all * softmax - own [v = y] - even * w_v."""

    all: Tensor | None  # [C]; None where it is 1
    own: Tensor  # [C]
    even: Tensor | None  # [C]; None where it is 0

    def at(self, rows: slice | Tensor) -> Pull:
        """That of some of the rows."""
        part, rest = (None if x is None else x[rows] for x in (self.all, self.even))
        return Pull(part, self.own[rows], rest)


def pull_of(
    measured: Tensor,
    own: Tensor,
    weights: Tensor | None,
    options: Options,
    classes: int,
    factor: Tensor | None = None,
    shrink: Tensor | None = None,
) -> Pull:
    """Of rows whose losses count `factor` [C] times, where p times `shrink` [C] is the softmax over all classes."""
    if options.plain() and weights is None and factor is None and shrink is None:
        return Pull(None, own, None)
    factor = torch.full_like(own, options.scale) if factor is None else factor * options.scale
    even = None
    total = own
    if options.smoothing:
        mass = classes if weights is None else weights.sum()
        total = total + options.smoothing / classes * mass
        even = factor * (options.smoothing / classes)
    if options.z_loss:
        total = total + 2 * options.z_loss * (measured[0] + measured[1])
    total = factor * total
    return Pull(total if shrink is None else total * shrink, factor * own, even)


def to_gradient(p: Tensor, pull: Pull, labels: Tensor, weights: Tensor | None, slope: Tensor | None) -> None:
    """Turn p, the softmax of classes here but for what `pull_of` was told, [C, V], into the gradient."""
    if pull.all is not None:
        p.mul_(pull.all[:, None])
    here, column = _place(labels, p.shape[1])
    p.scatter_add_(1, column, torch.where(here, -pull.own, 0.0)[:, None])
    if pull.even is not None:
        p.addr_(pull.even, p.new_ones(p.shape[1]) if weights is None else weights, alpha=-1)
    if slope is not None:
        p.mul_(slope)


def in_one_dtype(*arrays: Tensor) -> torch.dtype:
    """The type of products: that of the arrays, or of autocast."""
    kind: Any = arrays[0].dtype
    for x in arrays[1:]:
        kind = torch.promote_types(kind, x.dtype)
    device = arrays[0].device.type
    if kind != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return kind  # type: ignore[no-any-return]
