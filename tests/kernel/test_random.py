"""Law 1: the published vectors, equal bits everywhere, and numbers that look random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.kernel.random import Stream, key_of, philox, shuffled, stream, tag, untag
from selfsup.kernel.random import words as words_from

# Random123's known answers (kat_vectors, philox4x32 10): counter, key, words.
ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
IDS = torch.arange(50_000)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    tensors = philox(tuple(torch.tensor([c]) for c in counter), key)
    arrays = philox(tuple(np.array([c], dtype=np.uint64) for c in counter), key)
    assert tuple(int(w) for w in tensors) == words
    assert tuple(int(w[0]) for w in arrays) == words


@given(st.lists(st.integers(0, ONES), min_size=6, max_size=6))
def test_numpy_and_torch_agree_on_every_word(words):
    counter, key = words[:4], (words[4], words[5])
    tensors = philox(tuple(torch.tensor([c]) for c in counter), key)
    arrays = philox(tuple(np.array([c], dtype=np.uint64) for c in counter), key)
    assert [int(w) for w in tensors] == [int(w[0]) for w in arrays]


def test_a_stream_is_philox_of_block_and_id():
    ident = tag(3, 7)
    key = key_of(5, "mask")
    first = philox(tuple(torch.tensor([c]) for c in (0, ident & ONES, ident >> 32, 0)), key)
    second = philox(tuple(torch.tensor([c]) for c in (1, ident & ONES, ident >> 32, 0)), key)
    bits = stream(5, "mask", torch.tensor([ident])).bits(2, 3)
    assert bits.shape == (1, 2, 3)
    assert bits.flatten().tolist() == [int(w) for w in (*first, *second)][:6]


@given(st.integers(0, 2**23 - 1), st.integers(0, 2**40 - 1))
def test_tag_and_untag(epoch, sample):
    assert untag(tag(epoch, sample)) == (epoch, sample)
    ident = torch.tensor([tag(epoch, sample)])
    assert [int(part) for part in untag(ident)] == [epoch, sample]


def test_a_sample_draws_the_same_in_any_batch():
    ids = tag(1, torch.arange(64))
    whole = stream(0, "crop", ids)
    parts = [stream(0, "crop", part) for part in ids.flip(0).split([5, 1, 40, 18])]
    for draw in (
        lambda s: s.bits(3),
        lambda s: s.uniform(2, 2),
        lambda s: s.normal(5),
        lambda s: s.gumbel(7),
        lambda s: s.integers(9, 3),
        lambda s: s.permutation(11),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]).flip(0))


def test_calls_continue_the_stream():
    a, b = stream(0, "x", IDS[:3]), stream(0, "x", IDS[:3])
    first, second = a.bits(4), a.bits(4)
    assert torch.equal(torch.cat([first, second], 1), b.bits(8))
    assert not torch.equal(first, second)


def test_words_that_are_taken_are_made_elsewhere():
    ids, key = torch.arange(3), key_of(0, "x")
    draws, others = Stream(key, ids), Stream(key, ids)
    assert draws.take(6) == 0
    assert draws.take(1) == 2
    first, second, third = others.bits(6), others.bits(1), others.bits(5)
    assert torch.equal(words_from(ids, 6, key, 0), first)
    assert torch.equal(words_from(ids, 1, key, 2), second)
    assert torch.equal(draws.bits(5), third)


def test_no_draw_reads_or_moves_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = stream(0, "x", IDS[:5]).normal(3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(a, stream(0, "x", IDS[:5]).normal(3))


@pytest.mark.parametrize(
    "other",
    [
        stream(0, "b", IDS),
        stream(1, "a", IDS),
        stream(0, "a", IDS + len(IDS)),
        stream(0, "a", tag(1, IDS)),
    ],
    ids=["purpose", "seed", "sample", "epoch"],
)
def test_streams_are_uncorrelated(other):
    n = len(IDS)
    pair = torch.stack([stream(0, "a", IDS).uniform(1)[:, 0], other.uniform(1)[:, 0]])
    assert abs(torch.corrcoef(pair)[0, 1]) < 4 / n**0.5
    assert (pair[0] == pair[1]).sum() < 10


def test_neighbouring_draws_of_one_stream_are_uncorrelated():
    draws = stream(0, "a", IDS[:20_000]).uniform(9)
    off = torch.corrcoef(draws.T) - torch.eye(9)
    assert off.abs().max() < 5 / 20_000**0.5


def test_uniform_is_flat_and_stays_below_one():
    u = stream(0, "u", IDS).uniform(4).flatten()
    assert u.dtype == torch.float32
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    expected = len(u) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5  # chi squared, five deviations


class Extreme(Stream):
    """A stream whose words are all zeros, or all ones."""

    def __init__(self, word: int) -> None:
        super().__init__((0, 0), torch.zeros(2, dtype=torch.int64))
        self.word = word

    def bits(self, *shape: int) -> torch.Tensor:
        return torch.full((2, *shape), self.word)


@pytest.mark.parametrize("word", [0, ONES])
def test_the_extreme_words_stay_in_range(word):
    draw = Extreme(word)
    assert bool((draw.uniform(3) >= 0).all() and (draw.uniform(3) < 1).all())
    assert draw.normal(3).isfinite().all()
    assert draw.gumbel(3).isfinite().all()
    assert draw.integers(2**31, 1).tolist() == [[word >> 1]] * 2
    assert draw.integers(1, 1).tolist() == [[0]] * 2


def test_between_and_chance():
    draw = stream(0, "b", IDS)
    x = draw.between(-2.0, 3.0, 1)
    assert -2 <= x.min() < -1.99
    assert 2.99 < x.max() < 3
    assert draw.chance(0.3, 2).float().mean() == pytest.approx(0.3, abs=4 * (0.21 / 1e5) ** 0.5)
    assert not draw.chance(0.0, 2).any()
    assert draw.chance(1.0, 2).all()


def test_normal_has_the_moments_of_a_normal():
    x = stream(0, "n", IDS).normal(4).double().flatten()
    n = len(x)
    assert x.mean().abs() < 5 / n**0.5
    assert (x.var() - 1).abs() < 5 * (2 / n) ** 0.5
    assert (x**3).mean().abs() < 5 * (15 / n) ** 0.5
    assert ((x**4).mean() - 3).abs() < 5 * (96 / n) ** 0.5
    for level in (1, 2, 3):
        tail = 0.5 * torch.erfc(torch.tensor(level / 2**0.5)).item()
        assert (x > level).double().mean().item() == pytest.approx(tail, abs=5 * (tail / n) ** 0.5)


def test_gumbel_has_its_moments_and_makes_argmax_a_sample():
    x = stream(0, "g", IDS).gumbel(4)
    assert x.mean().item() == pytest.approx(0.57722, abs=5 * 1.2825 / x.numel() ** 0.5)
    assert x.var().item() == pytest.approx(np.pi**2 / 6, rel=0.03)
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    share = torch.bincount((logits + x).argmax(1), minlength=4) / len(x)
    assert share.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=5 * (0.24 / len(x)) ** 0.5)


def test_integers_are_even_and_take_a_bound_for_each_sample():
    draw = stream(0, "i", IDS)
    counts = torch.bincount(draw.integers(7, 2).flatten(), minlength=7)
    assert len(counts) == 7
    assert ((counts - 1e5 / 7).abs() < 5 * (1e5 / 7) ** 0.5).all()
    high = (IDS % 5 + 1)[:, None]
    x = draw.integers(high, 3)  # [B, 3]
    assert x.shape == (len(IDS), 3)
    assert ((x >= 0) & (x < high)).all()
    for bound in range(1, 6):
        assert x[(IDS % 5).eq(bound - 1)].unique().tolist() == list(range(bound))


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_each_row_is_a_permutation(n):
    rows = stream(0, "p", IDS[:500]).permutation(n)
    assert torch.equal(rows.sort(1).values, torch.arange(n).expand(500, n))


def test_every_permutation_is_as_likely():
    rows = stream(0, "p", IDS).permutation(3)
    counts = torch.bincount(rows[:, 0] * 3 + rows[:, 1], minlength=9)
    counts = counts[counts > 0]
    assert len(counts) == 6
    assert ((counts - len(IDS) / 6).abs() < 5 * (len(IDS) / 6) ** 0.5).all()


def test_shuffled_is_a_bijection_for_every_small_size():
    for n in range(1, 301):
        assert np.array_equal(np.sort(shuffled(np.arange(n), n, 0, "order")), np.arange(n)), n


def test_shuffled_is_a_bijection_for_a_large_size():
    n = 1_000_003
    assert np.array_equal(np.sort(shuffled(np.arange(n), n, 3, "order")), np.arange(n))


@settings(max_examples=50)
@given(st.integers(2, 2**40), st.integers(0, 2**63 - 1))
def test_shuffled_stays_below_n_and_keeps_indices_apart(n, seed):
    index = np.unique(np.linspace(0, n - 1, 50).astype(np.int64))
    out = shuffled(index, n, seed, "order")
    assert out.dtype == np.int64
    assert ((out >= 0) & (out < n)).all()
    assert len(np.unique(out)) == len(index)
    assert shuffled(index[:1], n, seed, "order")[0] == out[0]  # whatever else is asked for


def test_shuffled_mixes():
    n = 10_000
    a, b = (shuffled(np.arange(n), n, seed, "order") for seed in (0, 1))
    for x, y in ((a, np.arange(n)), (a, b), (a[1:], a[:-1])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / n**0.5
    assert abs((a == np.arange(n)).sum() - 1) < 8  # a random permutation leaves one in place on average


def test_shuffled_of_nothing_is_nothing():
    assert len(shuffled(np.arange(0), 5, 0, "order")) == 0
