"""random_mask: exact counts, equal bits by every road, and every token hidden alike often."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.kernel.errors import ContractError
from selfsup.kernel.random import Stream, key_of, philox, stream, tag
from selfsup.triton_ops import _masks
from selfsup.triton_ops._launch import can_launch
from selfsup.triton_ops.masks_random import (
    _random_mask_kernel,
    hidden_count,
    random_mask,
    random_mask_reference,
)
from selfsup.triton_ops.philox import signed

LENGTHS = [1, 2, 3, 196, 197, 255, 256, 257]
IDS = tag(2**22, torch.tensor([5, 0, 2**39, 3])) + 2**33
KEY = key_of(3, "mask")


def by_numpy(ids, lengths, total, share, key, start=0):
    """hidden [B, T], row by row, in NumPy's words of 64 bits."""
    block = np.arange(start, start + -(-total // 4), dtype=np.uint64)
    hidden = np.zeros((len(ids), total), bool)
    for row, (ident, length) in enumerate(zip(ids, lengths, strict=True)):
        low, high = (np.full_like(block, part) for part in (ident % 2**32, ident // 2**32))
        words = np.stack(philox((block, low, high, np.zeros_like(block)), key), 1).ravel()[:length]
        order = sorted(range(length), key=lambda t, words=words: (int(words[t]), t))
        hidden[row, order[max(1, int((1 - share) * length + 1e-6)) :]] = True
    return torch.from_numpy(hidden)


def rows(lengths, total=None):
    return torch.arange(total or max(lengths)) < torch.tensor(lengths)[:, None]


def drawn(lengths, total=None, ids=None, share=0.75, device="cpu"):
    ids = torch.arange(len(lengths)) if ids is None else torch.as_tensor(ids)
    return random_mask(stream(0, "mask", ids.to(device)), rows(lengths, total).to(device), share)


def assert_same(got, want):
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x.cpu(), y.cpu()), name


@pytest.mark.parametrize(
    ("total", "share"), [*((total, 0.75) for total in LENGTHS), (196, 0.4), (31, 0.999), (4097, 0.75)]
)
def test_every_path_equals_numpy_and_the_reference(device, total, share):
    lengths = [total, 0, max(1, total // 2), max(1, total - 1)]
    real, draw = rows(lengths, total).to(device), Stream(KEY, IDS.to(device))
    draw.take(9)
    got = random_mask(draw, real, share)
    other = Stream(KEY, IDS)
    other.take(9)
    assert_same(got, random_mask_reference(other, real.cpu(), share))
    assert torch.equal(got.hidden.cpu(), by_numpy(IDS.tolist(), lengths, total, share, KEY, start=3))
    assert draw.take(0) == other.take(0), "so that what is drawn next is the same, too"


@triton.jit
def keys_and_bounds(ids_ptr, keys_ptr, given_ptr, numbers_ptr, bounds_ptr, start, key, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(keys_ptr + lane, _masks.keys_of(tl.load(ids_ptr), start, key, BLOCK))
    bound = _masks.bound_of(tl.load(given_ptr + lane), tl.load(numbers_ptr + tl.program_id(0)), BLOCK)
    tl.store(bounds_ptr + tl.program_id(0), bound)


def test_keys_are_the_streams_words_and_bounds_lie_where_a_sort_would_put_them(device):
    if not can_launch(torch.empty(0, device=device)):
        pytest.skip("Triton runs on a GPU, or in its interpreter")
    words = (torch.arange(32) + 3) % 5 + 2**32 - 5  # equal ones, and at last the largest key there is
    keys = words * 32 + torch.arange(32)
    keys[20:24] = 1 << 62
    numbers = torch.tensor([0, 1, 7, 27, 28, 32])
    arrays = [x.to(device) for x in (IDS, torch.empty(32, dtype=torch.int64), keys, numbers, torch.empty_like(numbers))]
    keys_and_bounds[(6,)](*arrays, 5, signed(KEY), BLOCK=32)
    draw = Stream(KEY, IDS[:1])
    draw.take(20)
    assert torch.equal(arrays[1].cpu(), draw.bits(32)[0] * 32 + torch.arange(32))
    below = (keys[:, None] < arrays[-1].cpu()).sum(0)
    assert below.tolist() == [0, 1, 7, 27, 28, 28]


def test_equal_words_leave_the_first_tokens_visible(monkeypatch):
    """The chance that two words of a row are equal is 5 in a million: here they all are."""
    monkeypatch.setattr("selfsup.triton_ops.masks_random.random_bits", lambda ids, n, *_: torch.full((len(ids), n), 7))
    assert drawn([8]).hidden.tolist() == [[False] * 2 + [True] * 6]


@pytest.mark.parametrize("lengths", [[5, 0, 3, 1], [196, 195, 17, 2], [64] * 4])
def test_what_is_kept_and_what_is_hidden_are_every_token_once(device, lengths):
    """In padded rows, too: what is left over is filled with padding."""
    real = rows(lengths).to(device)
    got = random_mask(Stream(KEY, IDS.to(device)), real, 0.6)
    both = torch.cat([got.keep, got.hide], 1)
    place = torch.arange(real.shape[1], device=device).expand_as(real)
    assert torch.equal(both.gather(1, got.restore), place)
    assert torch.equal(real.gather(1, both), torch.cat([got.keep_real, got.hide_real], 1))
    assert torch.equal(got.hidden.gather(1, got.hide), got.hide_real)
    assert not got.hidden.gather(1, got.keep).any()
    for hand in (got.keep, got.hide):
        assert (hand.diff(dim=1) > 0).all(), "in the order of the row"


def test_padding_may_stand_anywhere(device):
    real = torch.rand(4, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    got = random_mask(Stream(KEY, IDS.to(device)), real.to(device), 0.5)
    assert_same(got, random_mask_reference(Stream(KEY, IDS), real, 0.5))
    assert got.hidden.sum(1).tolist() == [hidden_count(int(n), 0.5) for n in real.sum(1)]
    assert torch.equal(got.hide_real.sum(1), got.hidden.sum(1))


@pytest.mark.parametrize(
    ("tokens", "share", "hidden"),
    # As MAE's int(tokens * (1 - share)) visible ones, but (1 - 0.9) * 10 is one token, not none.
    [
        (196, 0.75, 147),
        (49, 0.75, 37),
        (256, 0.75, 192),
        (10, 0.9, 9),
        (10, 0.4, 4),
        (3, 0.99, 2),
        (1, 0.5, 0),
        (0, 0.5, 0),
    ],
)
def test_the_count_is_exact(device, tokens, share, hidden):
    assert hidden_count(tokens, share) == hidden
    got = random_mask(stream(0, "mask", torch.arange(2, device=device)), rows([tokens] * 2, tokens).to(device), share)
    assert (got.hidden.sum(1) == hidden).all()
    assert [x.shape[1] for x in got] == [tokens, tokens - hidden, hidden, tokens - hidden, hidden, tokens]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.6, 0.75, 0.9])
def test_counts_of_padded_rows_are_their_own_and_fit(share):
    lengths = list(range(1, 200))
    hidden = drawn(lengths, share=share).hidden
    assert hidden.sum(1).tolist() == [hidden_count(length, share) for length in lengths]
    assert not (hidden & ~rows(lengths)).any()
    shown = [length - hidden_count(length, share) for length in lengths]
    assert shown == sorted(shown)
    assert hidden.sum(1).tolist() == sorted(hidden.sum(1).tolist()), "so the longest row's counts hold every row's"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.floats(0.01, 0.99), st.integers(0, 2**62))
def test_any_rows_and_any_share(lengths, share, first):
    total = max(*lengths, 1)
    ids = (torch.arange(len(lengths)) + first).tolist()
    got = drawn(lengths, total, ids=ids, share=share)
    assert torch.equal(got.hidden, by_numpy(ids, lengths, total, share, key_of(0, "mask")))
    assert torch.equal(
        torch.cat([got.keep, got.hide], 1).gather(1, got.restore), torch.arange(total).expand(len(lengths), -1)
    )


def test_all_tokens_are_hidden_alike_often_and_independently():
    """3 of 4: each of the four sets a quarter of the time, within four standard errors of 20,000 draws."""
    sets, counts = drawn([4] * 20000).hidden.unique(dim=0, return_counts=True)
    assert len(sets) == 4
    assert ((counts / 20000 - 0.25).abs() < 4 * (0.25 * 0.75 / 20000) ** 0.5).all()


def test_every_pair_of_patches_is_hidden_as_often_as_any_other():
    """37 of 49 in 8,000 rows: 37/49, and 37 * 36 / (49 * 48) for pairs, within five standard errors."""
    hidden = drawn([49] * 8000).hidden.double()
    pairs = hidden.T @ hidden / 8000
    single, double = 37 / 49, 37 * 36 / (49 * 48)
    assert ((pairs.diagonal() - single).abs() < 5 * (single * (1 - single) / 8000) ** 0.5).all()
    apart = pairs[~torch.eye(49, dtype=torch.bool)]
    assert ((apart - double).abs() < 5 * (double * (1 - double) / 8000) ** 0.5).all()


def test_a_row_is_hidden_alike_in_any_batch(device):
    together = drawn([90, 33, 200, 12], ids=[7, 3, 9, 5], device=device).hidden
    assert torch.equal(drawn([33], ids=[3], device=device).hidden[0], together[1, :33])
    assert torch.equal(drawn([12, 90], total=90, ids=[5, 7], device=device).hidden, together[[3, 0], :90])


def test_epochs_and_purposes_draw_others():
    real = rows([196] * 64)
    masks = [
        random_mask(stream(0, purpose, tag(epoch, torch.arange(64))), real, 0.5).hidden
        for purpose, epoch in (("mask", 0), ("mask", 1), ("view", 0))
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[i] == masks[j]).float().mean() - 0.5) < 0.02


def test_rows_too_long_for_a_program_go_another_way(device, monkeypatch):
    real = rows([70, 41]).to(device)
    draws = [Stream(KEY, IDS[:2].to(device)) for _ in range(2)]
    whole = random_mask(draws[0], real, 0.5)
    monkeypatch.setattr("selfsup.triton_ops.masks_random.LONGEST", 64)
    assert_same(random_mask(draws[1], real, 0.5), whole)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_nothing_is_hidden_of_nothing(device, shape):
    got = random_mask(
        stream(0, "mask", torch.arange(shape[0], device=device)), torch.ones(shape, device=device).bool(), 0.5
    )
    assert got.hidden.shape == shape
    assert got.keep.shape[1] + got.hide.shape[1] == shape[1]


def test_arrays_may_have_gaps_in_memory(device):
    real = rows([9, 4, 9, 0]).to(device)
    wide = torch.zeros(8, 18, dtype=torch.bool, device=device)
    wide[::2, ::2] = real
    ids = IDS.to(device).repeat_interleave(2)[::2]
    assert_same(random_mask(Stream(KEY, ids), wide[::2, ::2], 0.5), random_mask(Stream(KEY, ids), real, 0.5))
    flat = torch.ones(1, 1, dtype=torch.bool, device=device).expand(4, 9)
    assert_same(random_mask(Stream(KEY, ids), flat, 0.5), random_mask(Stream(KEY, ids), flat.clone(), 0.5))


@pytest.mark.parametrize(
    ("real", "share", "message"),
    [
        (torch.ones(4, 5), 0.5, "torch.float32"),
        (torch.ones(3, 5).bool(), 0.5, r"\[3, 5\] for 4 ids"),
        (torch.ones(4).bool(), 0.5, r"\[4\]"),
        (torch.ones(4, 5).bool(), 0.0, "is 0.0"),
        (torch.ones(4, 5).bool(), 1.0, "is 1.0"),
        (torch.ones(4, 5).bool(), float("nan"), "is nan"),
        (torch.ones(4, 5, dtype=torch.bool, device="meta"), 0.5, "on meta"),
    ],
)
def test_what_cannot_be_masked_is_named(real, share, message):
    with pytest.raises(ContractError, match=message):
        random_mask(Stream(KEY, IDS), real, share)


def test_the_op_is_well_formed(device):
    for frames in (1, 2):
        arguments = (IDS[:1].to(device), rows([4], 8).to(device), 0.5, frames, *KEY, 2)
        torch.library.opcheck(torch.ops.selfsup.random_mask, arguments)


def test_it_compiles_whole_and_once_for_every_size_of_batch():
    calls = []

    def count(graph, inputs):
        calls.append(graph)
        return graph

    def hide(ids, real):
        return random_mask(Stream((1, 2), ids), real, 0.75)

    compiled = torch.compile(hide, backend=count, fullgraph=True, dynamic=True)
    for size in (2, 3, 5, 8, 13):
        ids, real = torch.arange(size), rows([20] * size)
        assert_same(compiled(ids, real), hide(ids, real))
    assert len(calls) == 1


def test_autocast_and_meta_tensors_are_no_trouble():
    real = rows([20] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(drawn([20] * 3), random_mask_reference(stream(0, "mask", torch.arange(3)), real, 0.75))
    there = random_mask(Stream(KEY, torch.arange(3, device="meta")), real.to("meta"), 0.75)
    assert [(x.shape, x.dtype) for x in there] == [(x.shape, x.dtype) for x in drawn([20] * 3)]


def test_the_host_does_not_wait(device, without_waiting):
    real, ids = rows([50, 20]).to(device), torch.arange(2, device=device)
    drawn([50, 20], device=device)
    with without_waiting():
        random_mask(stream(0, "mask", ids), real, 0.75)


@pytest.mark.parametrize("tokens", [1, 196, 1024, _masks.LONGEST])
def test_the_kernel_compiles_for_gpus_that_are_not_here(compile_ahead, assert_fits, tokens):
    lanes, warps = _masks.block_of(tokens)
    flags = dict.fromkeys(["real_ptr", "hidden_ptr", "keep_real_ptr", "hide_real_ptr"], "*i1")
    places = dict.fromkeys(["ids_ptr", "keep_ptr", "hide_ptr", "restore_ptr"], "*i64")
    numbers = {"seen": "i64", "slack": "i64", "key": "i64", "start": "i32", "F": "i32", "S": "i32", "K": "i32"}
    signature = {**flags, **places, **numbers}
    compiled = compile_ahead(_random_mask_kernel, signature, BLOCK=lanes, num_warps=warps, **_masks.EXACTLY)
    assert_fits(compiled)
    if "ptx" in compiled.asm:
        assert "fma.rn.f64" not in compiled.asm["ptx"], "the count is rounded as in torch"


def test_a_program_holds_any_row_up_to_the_longest():
    for tokens in range(1, 600):
        lanes, warps = _masks.block_of(tokens)
        assert lanes >= tokens
        assert lanes % (32 * warps) == 0
    assert _masks.block_of(_masks.LONGEST)[0] == _masks.LONGEST
