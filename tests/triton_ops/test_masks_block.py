"""block_mask: exact counts in blocks as the paper draws them, and equal bits by every road."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.kernel.errors import ContractError
from selfsup.kernel.random import Stream, key_of, philox, stream, tag
from selfsup.triton_ops import _masks
from selfsup.triton_ops.masks_block import (
    _block_mask_kernel,
    block_count,
    block_mask,
    block_mask_reference,
    blocks,
)

IDS = tag(2**22, torch.tensor([5, 0, 2**39])) + 2**33
KEY = key_of(3, "mask")
GRIDS = [(1, 1), (1, 2), (3, 2), (14, 14), (7, 5), (13, 17), (16, 16), (1, 40)]


def cut_in(hidden, block, need, backwards):
    """Hide the block's patches that are visible, or the first or last `need` of these."""
    top, left, height, width = block
    fresh = [(i, j) for i in range(top, top + height) for j in range(left, left + width) if not hidden[i, j]]
    for i, j in (fresh[::-1] if backwards else fresh)[:need]:
        hidden[i, j] = True


def by_numpy(ident, rows, columns, count, least, aspect, key, start=0, attempts=64):
    """hidden [H, W] of one image, block by block, in NumPy's words of 64 bits and Python's own exp."""
    hidden, attempt = np.zeros((rows, columns), bool), 0
    while need := count - hidden.sum():
        counter = (np.array([x], np.uint64) for x in (start + attempt, ident % 2**32, ident // 2**32, 0))
        w0, w1, w2, w3 = (int(w[0]) for w in philox(tuple(counter), key))
        area = least + max(0, need - least) * ((w0 >> 8) / 2**24)
        ratio = math.exp(math.log(aspect) * (2 * ((w1 >> 8) / 2**24) - 1))
        height = min(rows, max(1, math.floor(math.sqrt(area * ratio) + 0.5)))
        width = min(columns, max(1, math.floor(math.sqrt(area / ratio) + 0.5)))
        block = (w2 * (rows - height + 1) >> 32, w3 * (columns - width + 1) >> 32, height, width)
        attempt += 1
        cut_in(hidden, block if attempt < attempts else (0, 0, rows, columns), need, not w0 & 1)
    return torch.from_numpy(hidden.ravel())


def assert_same(got, want):
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x.cpu(), y.cpu()), name


@pytest.mark.parametrize(
    ("rows", "columns", "share", "least", "aspect"),
    [*((*grid, 0.4, 16, 0.3) for grid in GRIDS), (14, 14, 0.7, 3, 0.1), (7, 5, 0.5, 4, 1.0), (65, 64, 0.3, 400, 0.3)],
)
def test_every_path_equals_numpy_and_the_reference(device, rows, columns, share, least, aspect):
    draw, other = Stream(KEY, IDS.to(device)), Stream(KEY, IDS)
    for each in (draw, other):
        each.take(9)
    got = block_mask(draw, rows, columns, share, least=least, aspect=aspect)
    assert_same(got, block_mask_reference(other, rows, columns, share, least=least, aspect=aspect))
    count = block_count(rows * columns, share)
    loops = [by_numpy(ident, rows, columns, count, least, aspect, KEY, 3) for ident in IDS.tolist()]
    assert torch.equal(got.hidden.cpu(), torch.stack(loops))
    assert draw.take(0) == other.take(0), "so that what is drawn next is the same, too"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0.02, 0.98),
    st.integers(1, 30),
    st.floats(0.02, 1),
    st.integers(0, 2**62),
)
def test_any_grid_and_any_blocks(rows, columns, share, least, aspect, ident):
    draw = stream(0, "mask", torch.tensor([ident]))
    got = block_mask(draw, rows, columns, share, least=least, aspect=aspect)
    count = block_count(rows * columns, share)
    assert torch.equal(got.hidden[0], by_numpy(ident, rows, columns, count, least, aspect, key_of(0, "mask")))
    assert int(got.hidden.sum()) == count == got.hide.shape[1]
    both = torch.cat([got.keep, got.hide], 1)
    assert torch.equal(both.gather(1, got.restore)[0], torch.arange(rows * columns))
    assert torch.equal(got.hidden[0].nonzero()[:, 0], got.hide[0])
    assert got.keep_real.all()
    assert got.hide_real.all()


def test_what_blocks_do_not_find_in_time_is_filled_all_the_same(device):
    """All but 4 of 180 patches, by blocks of any size: the 64th is the grid, where more of them would go on."""
    got = block_mask(stream(0, "mask", torch.arange(4, device=device)), 9, 20, 0.98, least=1)
    stopped, later, more = (
        torch.stack([by_numpy(ident, 9, 20, 176, 1, 0.3, key_of(0, "mask"), attempts=n) for ident in range(4)])
        for n in (64, 65, 1000)
    )
    assert torch.equal(got.hidden.cpu(), stopped)
    assert not torch.equal(stopped, later)
    assert not torch.equal(stopped, more)


@pytest.mark.parametrize(
    ("patches", "share", "count"),
    [(196, 0.4, 78), (196, 0.5, 98), (1, 0.4, 0), (2, 0.01, 1), (2, 0.99, 1), (256, 0.4, 102)],
)
def test_the_count_is_exact(patches, share, count):
    assert block_count(patches, share) == count
    assert (block_mask(stream(0, "mask", torch.arange(300)), 1, patches, share).hidden.sum(1) == count).all()


def distance(ours, theirs):
    """Kolmogorov and Smirnov's: the largest difference between two distribution functions."""
    ours, theirs = np.sort(ours), np.sort(theirs)
    every = np.concatenate([ours, theirs])
    return np.abs(
        np.searchsorted(ours, every, "right") / len(ours) - np.searchsorted(theirs, every, "right") / len(theirs)
    ).max()


def drawn_block(rows, columns, need, generator, least=16, aspect=0.3):
    """Algorithm 1's block, from Python's own random numbers."""
    area = generator.uniform(least, max(least, need))
    ratio = math.exp(generator.uniform(math.log(aspect), -math.log(aspect)))
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    height, width = min(height, rows), min(width, columns)
    return generator.randint(0, rows - height), generator.randint(0, columns - width), height, width


@pytest.mark.parametrize("need", [78, 30, 5])
def test_blocks_have_the_papers_areas_shapes_and_places(need):
    """4,000 of each; 0.045 is exceeded by chance once in 1,500."""
    generator = random.Random(0)
    theirs = np.array([drawn_block(14, 14, need, generator) for _ in range(4000)]).T
    words = stream(0, "mask", torch.arange(4000)).bits(4)
    ours = torch.stack(blocks(words, torch.full((4000,), need), 14, 14, 16, -math.log(0.3) / 2)).numpy()
    for a, b in zip(
        (*ours, ours[2] * ours[3], ours[2] / ours[3]),
        (*theirs, theirs[2] * theirs[3], theirs[2] / theirs[3]),
        strict=True,
    ):
        assert distance(a, b) < 0.045


def shapes_of(hidden):
    """Of every image [H, W]: its longest run in a row, that in a column, and the edges between hidden and visible."""

    def longest(images):
        run = most = np.zeros(images.shape[:2], int)
        for column in images.transpose(2, 0, 1):
            run = np.where(column, run + 1, 0)
            most = np.maximum(most, run)
        return most.max(1)

    edges = (np.diff(hidden, axis=1) != 0).sum((1, 2)) + (np.diff(hidden, axis=2) != 0).sum((1, 2))
    return longest(hidden), longest(hidden.transpose(0, 2, 1)), edges


def test_masks_look_like_those_of_a_loop():
    """3,000 of each; 0.05 is exceeded by chance once in 1,000."""
    generator, loops = random.Random(1), np.zeros((3000, 14, 14), bool)
    for hidden in loops:
        while need := 78 - hidden.sum():
            cut_in(hidden, drawn_block(14, 14, need, generator), need, generator.random() < 0.5)
    ours = block_mask(stream(0, "mask", torch.arange(3000)), 14, 14).hidden.view(-1, 14, 14).numpy()
    for a, b in zip(shapes_of(ours), shapes_of(loops), strict=True):
        assert distance(a, b) < 0.05
    assert np.abs(ours.mean(0) - loops.mean(0)).max() < 0.06, "five standard errors"


def test_no_side_is_preferred():
    hidden = block_mask(stream(0, "mask", torch.arange(20000)), 14, 14).hidden.view(-1, 14, 14).float().mean(0)
    error = (0.25 / 20000) ** 0.5
    for other in (hidden.flip(0), hidden.flip(1), hidden.T):
        assert (hidden - other).abs().max() < 6 * error


def test_an_image_is_masked_alike_in_any_batch(device):
    together = block_mask(stream(0, "mask", torch.tensor([7, 3, 9], device=device)), 14, 14)
    alone = block_mask(stream(0, "mask", torch.tensor([3], device=device)), 14, 14)
    assert torch.equal(alone.hidden[0], together.hidden[1])


def test_epochs_draw_others():
    masks = [block_mask(stream(0, "mask", tag(epoch, torch.arange(50))), 14, 14).hidden for epoch in (0, 1)]
    assert (masks[0] != masks[1]).any(1).all()


def test_grids_too_large_for_a_program_go_another_way(device, monkeypatch):
    whole = block_mask(Stream(KEY, IDS.to(device)), 8, 9)
    monkeypatch.setattr("selfsup.triton_ops.masks_block.LONGEST", 64)
    assert_same(block_mask(Stream(KEY, IDS.to(device)), 8, 9), whole)


def test_ids_may_have_gaps_in_memory_and_there_may_be_none(device):
    ids = IDS.to(device).repeat_interleave(2)[::2]
    assert_same(block_mask(Stream(KEY, ids), 6, 6), block_mask(Stream(KEY, IDS.to(device)), 6, 6))
    assert block_mask(Stream(KEY, ids[:0]), 6, 6).hide.shape == (0, 14)


@pytest.mark.parametrize(
    ("grid", "share", "options", "message"),
    [
        ((14, 14), 0.0, {}, "is 0.0"),
        ((14, 14), 1.0, {}, "is 1.0"),
        ((0, 14), 0.4, {}, "0 x 14"),
        ((14, 14), 0.4, {"least": 0}, "least = 0"),
        ((14, 14), 0.4, {"aspect": 3.0}, "aspect = 3.0"),
        ((14, 14), 0.4, {"aspect": 0.0}, "aspect = 0.0"),
    ],
)
def test_what_cannot_be_masked_is_named(grid, share, options, message):
    with pytest.raises(ContractError, match=message):
        block_mask(Stream(KEY, IDS), *grid, share, **options)


def test_the_op_is_well_formed(device):
    arguments = (IDS[:1].to(device), 3, 4, 5, 2, 0.6, *KEY, 2)
    torch.library.opcheck(torch.ops.selfsup.block_mask, arguments)


def test_it_compiles_whole_and_once_for_every_size_of_batch():
    calls = []

    def count(graph, inputs):
        calls.append(graph)
        return graph

    def hide(ids):
        return block_mask(Stream((1, 2), ids), 14, 14)

    compiled = torch.compile(hide, backend=count, fullgraph=True, dynamic=True)
    for size in (2, 3, 5, 8, 13):
        assert_same(compiled(torch.arange(size)), hide(torch.arange(size)))
    assert len(calls) == 1


def test_autocast_and_meta_tensors_are_no_trouble():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(block_mask(Stream(KEY, IDS), 14, 14), block_mask_reference(Stream(KEY, IDS), 14, 14))
    there = block_mask(Stream(KEY, IDS.to("meta")), 14, 14)
    assert [(x.shape, x.dtype) for x in there] == [(x.shape, x.dtype) for x in block_mask(Stream(KEY, IDS), 14, 14)]


def test_the_host_does_not_wait(device, without_waiting):
    draw = Stream(KEY, IDS.to(device))
    block_mask(draw, 14, 14)
    with without_waiting():
        block_mask(draw, 14, 14)


@pytest.mark.parametrize("patches", [1, 196, 1024, _masks.LONGEST])
def test_the_kernel_compiles_for_gpus_that_are_not_here(compile_ahead, assert_fits, patches):
    lanes, warps = _masks.block_of(patches)
    flags = dict.fromkeys(["hidden_ptr", "keep_real_ptr", "hide_real_ptr"], "*i1")
    places = dict.fromkeys(["ids_ptr", "keep_ptr", "hide_ptr", "restore_ptr"], "*i64")
    numbers = {**dict.fromkeys(["H", "W", "count", "least", "start"], "i32"), "half": "i64", "key": "i64"}
    compiled = compile_ahead(
        _block_mask_kernel, {**flags, **places, **numbers}, BLOCK=lanes, num_warps=warps, **_masks.EXACTLY
    )
    assert_fits(compiled)
    if "ptx" in compiled.asm:
        found = compiled.asm["ptx"]
        assert "sqrt.rn.f64" in found
        assert "div.rn.f64" in found
        assert "fma.rn.f64" not in found, "areas and ratios are rounded as in torch"
