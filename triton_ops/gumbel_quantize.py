"""One entry of each codebook, chosen by Gumbel noise that is never stored, and trained straight through the choice.

Jang et al. 2017, "Categorical reparameterization with Gumbel-softmax", https://arxiv.org/abs/1611.01144, as in
Baevski et al. 2020, "wav2vec 2.0", https://arxiv.org/abs/2006.11477, equation 1:

    c_g = argmax_v (l_gv + n_gv)        q_g = e_gc        p_gv = softmax_v((l_gv + n_gv) / tau)
    d l_gv = p_gv (a_gv - sum_w p_gw a_gw) / tau, a_gv = d q_g . e_gv        d e_gv = sum of d q_g where c_g = v

The noise n = -log(-log(u)) is that of `Stream.gumbel`, from equal bits, but made where it is added, once for the choice
and again for the gradient. On a GPU a program has one row of V logits: the choice is one launch, which reads the
logits and writes the vectors and codes. The gradient has a product of all d q_g with all entries, one launch that reads
it and the logits, and one that adds up d e in a fixed order. On a CPU, where the noise costs more than all else, the
sums of logits and noise are kept for the gradient, and the rest is done a few samples at a time.

Shapes: B samples, each with its own random words; `...` what a sample has, such as frames; G groups of V entries of
width D. Noise and sums are in float32, in float64 for float64 logits or entries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError
from selfsup.kernel.random import Stream

from ._launch import can_launch, on_device_of

WORDS = 2**17  # logits at once on a CPU, unless a single sample has more
WIDEST = 8000  # entries of a group, and numbers of an entry, for which a kernel is tried


def gumbel_quantize(
    logits: Tensor, codebook: Tensor, draw: Stream | None = None, *, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """(the chosen entries [B, ..., G, D], their numbers int64 [B, ..., G]).

    The entries have a first derivative with respect to the logits and the codebook, and no second one.

    Args:
        logits: [B, ..., G, V].
        codebook: [G, V, D].
        draw: what the noise is taken from, a stream for each of the B samples; without one, the likeliest is chosen.
        temperature: of the softmax in the backward pass, above 0; the choice does not depend on it. A tensor of one
            number varies without recompiling a compiled step, and lies where the logits do, or the host waits for it.
    """
    _check(logits, codebook, draw)
    kind = _exact(logits, codebook)
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ContractError(f"temperature must be above 0, and is {temperature}")
        temperature = torch.full((), temperature, dtype=kind, device=logits.device)
    elif temperature.numel() != 1:
        raise ContractError(f"temperature is one number, and this has shape {list(temperature.shape)}")
    temperature = temperature.detach().to(logits.device, kind).reshape(())
    rows = logits.reshape(logits.shape[0], math.prod(logits.shape[1:-2]), *logits.shape[-2:])  # [B, M, G, V]
    ids, key, start = None, (0, 0), 0
    if draw is not None:
        ids, key, start = draw.ids, draw.key, draw.take(math.prod(logits.shape[1:]))
    keep = draw is not None and logits.requires_grad and torch.is_grad_enabled()
    vectors, codes, _ = torch.ops.selfsup.gumbel_quantize(rows, codebook, ids, *key, start, temperature, keep)
    return vectors.view(*logits.shape[:-1], codebook.shape[2]), codes.view(logits.shape[:-1])


def gumbel_quantize_reference(
    logits: Tensor, codebook: Tensor, draw: Stream | None = None, *, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """What `gumbel_quantize` must equal; the choice is a product with a one-hot vector, [B, ..., G, V]."""
    kind = _exact(logits, codebook)
    scores = logits.to(kind)
    if draw is not None:
        scores = scores + draw.gumbel(*logits.shape[1:])
    codes = scores.argmax(-1)  # [B, ..., G]
    soft = (scores / temperature).softmax(-1)
    hard = F.one_hot(codes, logits.shape[-1]) + (soft - soft.detach())  # [B, ..., G, V]
    return torch.einsum("...gv,gvd->...gd", hard, codebook.to(kind)).to(codebook.dtype), codes


def _check(logits: Tensor, codebook: Tensor, draw: Stream | None) -> None:
    shapes = f"{list(logits.shape)} and {list(codebook.shape)}"
    if logits.dim() < 3 or codebook.dim() != 3 or logits.shape[-2:] != codebook.shape[:2]:
        raise ContractError(f"logits and codebook must be [B, ..., G, V] and [G, V, D], and are {shapes}")
    if 0 in codebook.shape:
        raise ContractError(f"there is nothing to choose from: logits and codebook are {shapes}")
    if not logits.is_floating_point() or not codebook.is_floating_point():
        raise ContractError(f"logits and codebook must be of floating point: {logits.dtype} and {codebook.dtype}")
    devices = {str(x.device) for x in (logits, codebook, *([] if draw is None else [draw.ids]))}
    if len(devices) > 1:
        raise ContractError(f"logits, codebook and ids must be on one device, and are on {', '.join(sorted(devices))}")
    if draw is not None and draw.ids.shape != logits.shape[:1]:
        raise ContractError(f"there must be an id for each of {logits.shape[0]} samples, not {list(draw.ids.shape)}")


def _exact(*arrays: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in arrays) else torch.float32


def _sample_chunks(logits: Tensor) -> list[slice]:
    count = len(logits)
    size = max(1, WORDS // max(1, logits[:1].numel()))
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def choose_in_chunks(
    logits: Tensor,
    codebook: Tensor,
    ids: Tensor | None,
    low: int,
    high: int,
    start: int,
    temperature: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The choice on any device, a few samples at a time: [B, M, G, D], [B, M, G], and [B, M, G, V] if `keep`."""
    B, M, G, V = logits.shape
    codes = logits.new_empty(B, M, G, dtype=torch.int64)
    kept = temperature.new_empty(logits.shape if keep else 0)
    for part in _sample_chunks(logits) if M else []:
        scores = logits[part].to(temperature.dtype)
        if ids is not None:
            draw = Stream((low, high), ids[part])
            draw.take(4 * start)
            noise = draw.gumbel(M, G, V)
            scores = torch.add(scores, noise, out=kept[part]) if keep else scores + noise
        codes[part] = scores.argmax(-1)
    rows = codes + torch.arange(G, device=codes.device) * V  # into the flat codebook
    return codebook.flatten(0, 1).index_select(0, rows.flatten()).view(B, M, G, codebook.shape[2]), codes, kept


def gradients_in_chunks(
    grad: Tensor,
    logits: Tensor,
    codebook: Tensor,
    codes: Tensor,
    temperature: Tensor,
    kept: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients for logits and codebook on any device, a few samples at a time: empty where not `wanted`."""
    (_, M, G, V), kind = logits.shape, temperature.dtype
    to_logits = logits.new_empty(logits.shape if wanted[0] else 0)
    to_codebook = grad.new_zeros(codebook.shape if wanted[1] else 0, dtype=kind)
    if wanted[0] and M:
        entries = codebook.to(kind).transpose(1, 2)  # [G, D, V]
        scores = kept if len(kept) else logits
        for part in _sample_chunks(logits):
            p = (scores[part].to(kind) / temperature).flatten(0, 1).softmax(-1)
            along = torch.bmm(grad[part].flatten(0, 1).to(kind).transpose(0, 1), entries).transpose(0, 1)  # [C M, G, V]
            mean = torch.linalg.vecdot(p, along)[..., None]
            to_logits[part] = p.mul_(along.sub_(mean)).div_(temperature).view_as(to_logits[part])
    if wanted[1]:
        rows = codes + torch.arange(G, device=codes.device) * V
        to_codebook.flatten(0, 1).index_add_(0, rows.flatten(), grad.flatten(0, 2).to(kind))
    return to_logits, to_codebook.to(codebook.dtype)


def _launches(logits: Tensor, codebook: Tensor, temperature: Tensor) -> bool:
    """Whether a kernel can run, and a program holds a row."""
    small = max(logits.shape[-1], codebook.shape[2]) <= WIDEST
    return can_launch(logits) and temperature.dtype != torch.float64 and small


@torch.library.custom_op("selfsup::gumbel_quantize", mutates_args=())
def _choose(
    logits: Tensor,
    codebook: Tensor,
    ids: Tensor | None,
    low: int,
    high: int,
    start: int,
    temperature: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if _launches(logits, codebook, temperature):
        from .gumbel_quantize_kernels import choose

        with on_device_of(logits):
            return *choose(logits, codebook, ids, (low, high), start), temperature.new_empty(0)
    return choose_in_chunks(logits, codebook, ids, low, high, start, temperature, keep)


@torch.library.custom_op("selfsup::gumbel_quantize_gradient", mutates_args=())
def _gradients(
    grad: Tensor,
    logits: Tensor,
    codebook: Tensor,
    codes: Tensor,
    ids: Tensor | None,
    low: int,
    high: int,
    start: int,
    temperature: Tensor,
    kept: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    with torch.autocast(logits.device.type, enabled=False):
        if _launches(logits, codebook, temperature):
            from .gumbel_quantize_kernels import gradients

            with on_device_of(logits):
                return gradients(grad, logits, codebook, codes, ids, (low, high), start, temperature, wanted)
        if wanted[0] and ids is not None and not len(kept):
            kept = choose_in_chunks(logits, codebook, ids, low, high, start, temperature, True)[2]
        return gradients_in_chunks(grad, logits, codebook, codes, temperature, kept, wanted)


@_choose.register_fake
def _(
    logits: Tensor, codebook: Tensor, ids: Any, low: int, high: int, start: int, temperature: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits.shape[:-1]
    kept = logits.shape if keep and not _launches(logits, codebook, temperature) else 0
    vectors, codes = codebook.new_empty(*shape, codebook.shape[2]), logits.new_empty(shape, dtype=torch.int64)
    return vectors, codes, temperature.new_empty(kept)


@_gradients.register_fake
def _(
    grad: Tensor,
    logits: Tensor,
    codebook: Tensor,
    codes: Any,
    ids: Any,
    low: int,
    high: int,
    start: int,
    temperature: Any,
    kept: Any,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape if wanted[0] else 0), codebook.new_empty(codebook.shape if wanted[1] else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, codebook, ids, *ctx.words, temperature, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, codebook, output[1], ids, temperature, output[2])


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    logits, codebook, codes, ids, temperature, kept = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    arrays = (grad, logits, codebook, codes, ids)
    found = torch.ops.selfsup.gumbel_quantize_gradient(*arrays, *ctx.words, temperature, kept, wanted)
    return (*(g if want else None for g, want in zip(found, wanted, strict=True)), *[None] * 6)


_choose.register_autograd(_backward, setup_context=_keep)
