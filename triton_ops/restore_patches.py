"""All tokens of each sample, where only some were seen: these at their places, one learned vector at the others.

He et al. 2021, "Masked autoencoders are scalable vision learners", https://arxiv.org/abs/2111.06377, section 3: what a
decoder gets. With `seen` [B, K, D] and the place index[b, k] of each,

    out[b, t] = seen[b, k] + positions[t] where index[b, k] = t for some k;   else token + positions[t]
    d seen[b, k] = d out[b, index[b, k]]     d positions[t] = sum_b d out[b, t]     d token = sum over the rest of d out

A class token is a seen one like any other: index 0, with a row of zeros in `positions`, and the others one further.

Shapes: B samples, T tokens, K seen ones, D values of each. On a GPU each token looks for itself in its sample's index,
so that one launch reads what was seen and writes each token, once: 257 MB for MAE with ViT-L (1,024 samples, 49 of 196
tokens of 512 values, bfloat16). Its gradient is read once for `seen` and `token`; for `positions` what was seen is read
again. Sums are in float32 and in a fixed order. On a CPU, and in float64, torch's own indexing does it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfsup.kernel.errors import ContractError

from ._launch import can_launch, narrow, on_device_of, power
from ._triton import tl, triton
from .take_patches import check_index, sum_type
from .take_patches_kernels import TILE, take, tile

PROGRAMS = 1056  # that sums over samples are divided among: eight on each processor of a large GPU


def restore_patches(
    seen: Tensor, index: Tensor, token: Tensor, positions: Tensor | None = None, *, tokens: int
) -> Tensor:
    """Seen tokens at their places among `tokens`, `token` at the others, plus positions: [B, T, D] in the type of seen.

    It has a first derivative with respect to seen, token and positions, and no second one. A place that is not there,
    or that is named twice, is a ContractError on a CPU; on a GPU, which nobody waits for, the first makes the whole
    sample NaN and the second the token.

    Args:
        seen: [B, K, D] of floating point, of any strides.
        index: int64 [B, K]; the place of each, from 0 to T - 1, or -1 for what belongs nowhere (padding).
        token: [D]; what stands where nothing was seen.
        positions: [T, D]; added in float32.
        tokens: T, at least 1.
    """
    _check(seen, index, token, positions, tokens)
    out: Tensor = torch.ops.selfsup.restore_patches(seen, index, token, positions, tokens)
    return out


def restore_patches_reference(
    seen: Tensor, index: Tensor, token: Tensor, positions: Tensor | None = None, *, tokens: int
) -> Tensor:
    """What `restore_patches` must equal."""
    b, _, d = seen.shape
    exact = sum_type(seen.dtype)
    where = torch.where(index < 0, tokens, index)  # what belongs nowhere goes to one place more, that is cut off
    out = token.to(exact).expand(b, tokens + 1, d)
    out = out.scatter(1, where[..., None].expand(-1, -1, d), seen.to(exact))[:, :tokens]  # [B, T, D]
    return (out if positions is None else out + positions.to(exact)).to(seen.dtype)


def _check(seen: Tensor, index: Tensor, token: Tensor, positions: Tensor | None, tokens: int) -> None:
    if seen.dim() != 3 or not seen.is_floating_point() or not seen.shape[2] or tokens < 1:
        raise ContractError(
            f"seen must be floats [B, K, D] and tokens above 0; they are {seen.dtype} {list(seen.shape)} and {tokens}"
        )
    check_index(seen, index)
    if index.shape != seen.shape[:2]:
        raise ContractError(f"index must be [B, K] = {list(seen.shape[:2])}, and is {list(index.shape)}")
    shapes = {"token": (token, [seen.shape[2]])}
    if positions is not None:
        shapes["positions"] = (positions, [tokens, seen.shape[2]])
    for name, (x, shape) in shapes.items():
        if list(x.shape) != shape or not x.is_floating_point() or x.device != seen.device:
            raise ContractError(
                f"{name} must be floats {shape} on {seen.device}, and is {x.dtype} {list(x.shape)} on {x.device}"
            )


def _wrong(index: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(whether an index of each sample is out of range [B], whether each place is named more than once [B, T])."""
    beyond = ((index < -1) | (index >= tokens)).any(1)
    where = torch.where((index < 0) | (index >= tokens), tokens, index)
    named = index.new_zeros(len(index), tokens + 1).scatter_add_(1, where, torch.ones_like(where))
    return beyond, named[:, :tokens] > 1


def _refuse(index: Tensor, beyond: Tensor, twice: Tensor) -> None:
    if beyond.any():
        low, high = (int(value) for value in index.aminmax())
        raise ContractError(f"index must be from -1 to {twice.shape[1] - 1}, and goes from {low} to {high}")
    if twice.any():
        sample, place = twice.nonzero()[0].tolist()
        raise ContractError(f"index names place {place} of sample {sample} more than once")


@torch.library.custom_op("selfsup::restore_patches", mutates_args=())
def _restore(seen: Tensor, index: Tensor, token: Tensor, positions: Tensor | None, tokens: int) -> Tensor:
    kinds = [x.dtype for x in (seen, token, positions) if x is not None]
    if can_launch(seen) and torch.float64 not in kinds:
        with on_device_of(seen):
            return _launch_restore(seen, index, token, positions, tokens)
    beyond, twice = _wrong(index, tokens)
    if index.device.type == "cpu":
        _refuse(index, beyond, twice)
    (b, _, d), exact = seen.shape, sum_type(seen.dtype)
    out = seen.new_empty(b * tokens + 1, d)
    whole = out[:-1].view(b, tokens, d)
    token = token.to(exact)
    whole.copy_((token if positions is None else token + positions.to(exact)).expand(tokens, d))
    if positions is not None:
        seen = seen.to(exact) + positions.to(exact)[index.clamp(0, tokens - 1)]
    first = torch.arange(b, device=index.device)[:, None] * tokens  # [B, 1]
    place = torch.where((index < 0) | (index >= tokens), b * tokens, first + index)
    out.index_copy_(0, place.flatten(), seen.to(out.dtype).reshape(-1, d))
    return whole if index.device.type == "cpu" else whole.masked_fill((beyond[:, None] | twice)[..., None], torch.nan)


@torch.library.custom_op("selfsup::restore_patches_gradient", mutates_args=())
def _gradients(grad: Tensor, index: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """(d seen [B, K, D], d token [D], d positions [T, D]): empty where not `wanted`."""
    if can_launch(grad) and grad.dtype != torch.float64:
        with on_device_of(grad):
            return _launch_gradients(grad, index, wanted)
    (b, tokens, d), exact = grad.shape, sum_type(grad.dtype)
    d_seen, none = grad.new_empty(0), grad.new_empty(0, dtype=exact)
    rows, known = torch.arange(b, device=index.device)[:, None], (index >= 0) & (index < tokens)
    place = torch.where(known, index, 0)
    if wanted[0]:
        d_seen = grad[rows, place].masked_fill_(~known[..., None], 0.0)
    d_token = grad.new_zeros(d, dtype=exact) if wanted[1] else none
    if wanted[1]:
        hidden = torch.ones(b, tokens + 1, dtype=torch.bool, device=index.device)
        hidden = hidden.scatter_(1, torch.where(known, index, tokens), False)[:, :tokens]
        for b_grad, b_hidden in zip(grad, hidden, strict=True):  # one sample at a time is all that is copied
            d_token += torch.where(b_hidden[:, None], b_grad, 0.0).sum(0, dtype=exact)
    return d_seen, d_token, grad.sum(0, dtype=exact) if wanted[2] else none.clone()


@_restore.register_fake
def _(seen: Tensor, index: Any, token: Any, positions: Any, tokens: int) -> Tensor:
    return seen.new_empty(seen.shape[0], tokens, seen.shape[2])


@_gradients.register_fake
def _(grad: Tensor, index: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    _, tokens, width = grad.shape
    exact = sum_type(grad.dtype)
    return (
        grad.new_empty((*index.shape, width) if wanted[0] else 0),
        grad.new_empty(width if wanted[1] else 0, dtype=exact),
        grad.new_empty((tokens, width) if wanted[2] else 0, dtype=exact),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, token, positions, _ = inputs
    ctx.save_for_backward(index)
    ctx.kinds = token.dtype, None if positions is None else positions.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    for_seen, _, for_token, for_positions, _ = ctx.needs_input_grad
    wanted = [for_seen, for_token, for_positions]
    d_seen, d_token, d_positions = torch.ops.selfsup.restore_patches_gradient(grad, index, wanted)
    return (
        d_seen if for_seen else None,
        None,
        d_token.to(ctx.kinds[0]) if for_token else None,
        d_positions.to(ctx.kinds[1]) if for_positions else None,
        None,
    )


_restore.register_autograd(_backward, setup_context=_keep)


def _options(tokens: int, width: int, count: int) -> dict[str, int]:
    return {**tile(tokens, width, TILE // 2), "BK": power(count, 16, 64)}


def _launch_restore(seen: Tensor, index: Tensor, token: Tensor, positions: Tensor | None, tokens: int) -> Tensor:
    (b, count, width), options = seen.shape, _options(tokens, seen.shape[2], seen.shape[1])
    out = seen.new_empty(b, tokens, width)
    if b:
        where = token.expand(tokens, width) if positions is None else positions
        launch = (triton.cdiv(tokens, options["BR"]) * b, triton.cdiv(width, options["BD"]))
        _restore_kernel[launch](
            *(seen, index.contiguous(), token.contiguous(), where, out, count, tokens),
            *(*seen.stride(), *where.stride()),
            D=width,
            POSITIONS=positions is not None,
            **options,
        )
    return out


def _launch_gradients(grad: Tensor, index: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    (b, tokens, width), options = grad.shape, _options(grad.shape[1], grad.shape[2], index.shape[1])
    d_seen = take(grad, index, None, 0, 0.0) if wanted[0] else grad.new_empty(0)
    blocks = triton.cdiv(tokens, options["BR"])
    parts = max(1, min(b, PROGRAMS // blocks))
    d_token, d_positions = (grad.new_empty(0, dtype=torch.float32) for _ in range(2))
    if wanted[1]:
        d_token = d_token.new_empty(parts * blocks, width)
    if wanted[2]:
        d_positions = d_positions.new_empty(parts, tokens, width)
    if wanted[1] or wanted[2]:
        _sums_kernel[(parts * blocks, triton.cdiv(width, options["BD"]))](
            *(grad, index.contiguous(), d_token, d_positions, b, index.shape[1], tokens, -(-b // parts)),
            *grad.stride(),
            D=width,
            TOKEN=wanted[1],
            POSITIONS=wanted[2],
            **options,
        )
    return d_seen, d_token.sum(0) if wanted[1] else d_token, d_positions.sum(0) if wanted[2] else d_positions


@triton.jit
def _seen_at(index_ptr, t, K, T, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(how often index [K] names each of t, the place in it that does, how much of it is out of range)."""
    times = (t * 0).to(tl.int32)
    place, beyond = times, times
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        named = tl.load(index_ptr + k, mask=k < K, other=-1)
        hit = named[None, :] == t[:, None]
        times += tl.sum(hit.to(tl.int32), 1)
        place += tl.sum(tl.where(hit, k[None, :], 0), 1)
        beyond += tl.sum(((named >= T) | (named < -1)).to(tl.int32), 0)
    return times, place, beyond


@triton.jit(do_not_specialize=["K", "T"])
def _restore_kernel(  # type: ignore[no-untyped-def]
    seen_ptr,
    index_ptr,
    token_ptr,
    positions_ptr,
    out_ptr,
    K,
    T,
    s_b,
    s_k,
    s_d,
    p_t,
    p_d,
    D: tl.constexpr,
    POSITIONS: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    blocks = tl.cdiv(T, BR)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks).to(tl.int64) * BR + tl.arange(0, BR)  # [BR], of T
    v = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)  # [BD]
    inside = (t < T)[:, None] & (v < D)[None, :]
    times, k, beyond = _seen_at(index_ptr + b * K, t, K, T, BK)
    once = (times == 1)[:, None]
    where = b * s_b + (tl.where(times == 1, k, 0).to(tl.int64) * s_k)[:, None] + (v * s_d)[None, :]
    x = tl.load(seen_ptr + where, mask=inside & once, other=0.0).to(tl.float32)
    token = tl.load(token_ptr + v, mask=v < D, other=0.0).to(tl.float32)
    x = tl.where(once, x, token[None, :])
    if POSITIONS:
        x += tl.load(positions_ptr + (t * p_t)[:, None] + (v * p_d)[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.where(((times > 1) | (beyond > 0))[:, None], float("nan"), x)
    tl.store(out_ptr + ((b * T + t) * D)[:, None] + v[None, :], narrow(x, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "K", "T", "span"])
def _sums_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    index_ptr,
    token_ptr,
    positions_ptr,
    B,
    K,
    T,
    span,
    g_b,
    g_t,
    g_d,
    D: tl.constexpr,
    TOKEN: tl.constexpr,
    POSITIONS: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    blocks = tl.cdiv(T, BR)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks).to(tl.int64) * BR + tl.arange(0, BR)  # [BR], of T
    v = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)  # [BD]
    inside = (t < T)[:, None] & (v < D)[None, :]
    here = (t * g_t)[:, None] + (v * g_d)[None, :]
    whole = tl.zeros([BR, BD], tl.float32)
    rest = tl.zeros([BR, BD], tl.float32)  # of places where nothing was seen
    for turn in range(0, tl.minimum(span, B - part * span)):
        b = part * span + turn
        mask = inside
        if TOKEN:
            times, _, _ = _seen_at(index_ptr + b * K, t, K, T, BK)
            hidden = (times == 0)[:, None]
            if not POSITIONS:
                mask = inside & hidden
        g = tl.load(grad_ptr + b * g_b + here, mask=mask, other=0.0).to(tl.float32)
        whole += g
        if TOKEN:
            rest += tl.where(hidden, g, 0.0)
    if TOKEN:
        tl.store(token_ptr + tl.program_id(0).to(tl.int64) * D + v, tl.sum(rest, 0), mask=v < D)
    if POSITIONS:
        tl.store(positions_ptr + ((part * T + t) * D)[:, None] + v[None, :], whole, mask=inside)
