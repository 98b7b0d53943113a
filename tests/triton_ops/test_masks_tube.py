"""tube_mask: random_mask of a frame, in every frame."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.kernel.errors import ContractError
from selfsup.kernel.random import Stream, key_of, tag
from selfsup.triton_ops.masks_random import hidden_count, random_mask
from selfsup.triton_ops.masks_tube import tube_mask, tube_mask_reference

IDS = tag(2**22, torch.tensor([5, 0, 2**39])) + 2**33
KEY = key_of(3, "mask")


def clips(frames, space, lengths):
    """real [B, F S]: rows of so many frames, and then padding."""
    return (torch.arange(frames) < torch.tensor(lengths)[:, None]).repeat_interleave(space, 1)


def assert_same(got, want):
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x.cpu(), y.cpu()), name


@pytest.mark.parametrize(("frames", "space"), [(1, 1), (1, 49), (2, 1), (3, 7), (4, 33)])
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_every_path_equals_the_reference(device, frames, space, share):
    real = clips(frames, space, [frames, max(1, frames - 1), 0])
    draw, other = Stream(KEY, IDS.to(device)), Stream(KEY, IDS)
    assert_same(tube_mask(draw, real.to(device), frames, share), tube_mask_reference(other, real, frames, share))
    assert draw.take(0) == other.take(0)


@pytest.mark.parametrize(("frames", "space"), [(1, 9), (4, 10)])
def test_every_frame_hides_what_one_frame_would(device, frames, space):
    real = clips(frames, space, [frames, 1, 0]).to(device)
    got = tube_mask(Stream(KEY, IDS.to(device)), real, frames, 0.9)
    one = random_mask(Stream(KEY, IDS.to(device)), real[:, :space], 0.9)
    assert torch.equal(got.hidden.view(3, frames, space), one.hidden[:, None] & real.view(3, frames, space))
    assert torch.equal(got.keep.view(3, frames, -1) % space, one.keep[:, None].expand(-1, frames, -1))
    frame = torch.arange(frames, device=device)[:, None]
    assert torch.equal(got.hide.view(3, frames, -1), frame * space + one.hide[:, None])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.floats(0.05, 0.95))
def test_counts_are_exact_and_every_token_is_dealt_once(frames, space, share):
    real = clips(frames, space, [frames, frames // 2, 0])
    got = tube_mask(Stream(KEY, IDS), real, frames, share)
    assert got.hidden.view(3, frames, space).sum(2)[0].eq(hidden_count(space, share)).all()
    both = torch.cat([got.keep, got.hide], 1)
    assert torch.equal(both.gather(1, got.restore), torch.arange(frames * space).expand(3, -1))
    assert torch.equal(real.gather(1, both), torch.cat([got.keep_real, got.hide_real], 1))
    assert torch.equal(got.hidden.gather(1, got.hide), got.hide_real)
    assert not got.hidden.gather(1, got.keep).any()


def test_frames_too_large_for_a_program_go_another_way(device, monkeypatch):
    real = clips(3, 40, [3, 1, 2]).to(device)
    whole = tube_mask(Stream(KEY, IDS.to(device)), real, 3, 0.8)
    monkeypatch.setattr("selfsup.triton_ops.masks_random.LONGEST", 32)
    assert_same(tube_mask(Stream(KEY, IDS.to(device)), real, 3, 0.8), whole)


@pytest.mark.parametrize(
    ("frames", "share", "message"),
    [(3, 0.5, "3 frames do not divide 8"), (0, 0.5, "0 frames"), (2, 1.5, "is 1.5")],
)
def test_what_cannot_be_masked_is_named(frames, share, message):
    with pytest.raises(ContractError, match=message):
        tube_mask(Stream(KEY, IDS), torch.ones(3, 8).bool(), frames, share)


@pytest.mark.parametrize("second", [[1, 1, 0], [1, 0, 1], [0, 1, 0]])
def test_frames_that_are_unlike_the_first_are_named(second):
    with pytest.raises(ContractError, match="other real tokens than the first"):
        tube_mask(Stream(KEY, IDS[:1]), torch.tensor([[1, 0, 0, *second, 0, 0, 0]]).bool(), 3, 0.5)


def test_it_compiles_whole_and_once_for_every_size_of_batch():
    calls = []

    def count(graph, inputs):
        calls.append(graph)
        return graph

    def hide(ids, real):
        return tube_mask(Stream((1, 2), ids), real, 4, 0.75)

    compiled = torch.compile(hide, backend=count, fullgraph=True, dynamic=True)
    for size in (2, 3, 5, 8, 13):
        ids, real = torch.arange(size), clips(4, 5, [4] * size)
        assert_same(compiled(ids, real), hide(ids, real))
    assert len(calls) == 1


def test_nothing_is_hidden_of_nothing(device):
    none = tube_mask(Stream(KEY, IDS[:0].to(device)), torch.ones(0, 8, device=device).bool(), 2, 0.5)
    assert [x.shape for x in none] == [(0, 8), (0, 4), (0, 4), (0, 4), (0, 4), (0, 8)]
