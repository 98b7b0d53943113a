"""Masks of others are called as they are, and hide what they should."""

import pytest
import torch

from selfsup.cli import bench_masks

IDS, REAL = torch.arange(6), torch.ones(6, 40, dtype=torch.bool)


def test_a_stream_is_begun_anew_by_every_call():
    case = next(case for case in bench_masks.cases(False) if case.op == "random_mask")
    first, again = case.ours(IDS, REAL), case.ours(IDS, REAL)
    first, again = (x if isinstance(x, tuple) else (x,) for x in (first, again))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_maes_form_hides_three_quarters():
    kept, mask, restore = bench_masks._mae_mask(IDS, REAL)
    assert kept.shape == (6, 10)
    assert mask.sum(1).tolist() == [30] * 6
    assert restore.sort(1).values.tolist() == [list(range(40))] * 6


def test_transformers_hides_spans():
    pytest.importorskip("transformers")
    mask = bench_masks._transformers()(IDS, REAL)
    assert mask.shape == REAL.shape
    assert 0 < mask.double().mean() < 1
