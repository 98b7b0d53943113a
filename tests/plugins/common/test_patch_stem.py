"""Patches that are left out before the linear layer, and patches put back together."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from selfsup.kernel.contracts import Signal
from selfsup.plugins.common.patch_stem import PatchStem
from selfsup.plugins.modalities.image import Image


class Blocks(PatchStem):
    """Series [B, N] in blocks of four; what is left over at the end belongs to none."""

    def cut(self, raw: Signal) -> Signal:
        count = raw.x.shape[1] // 4
        segments = None if raw.segments is None else raw.segments[:, : 4 * count : 4]
        return Signal(raw.x[:, : 4 * count].unflatten(1, (count, 4)), segments)


def test_tokens_of_some_patches_are_those_of_all() -> None:
    torch.manual_seed(0)
    stem = Blocks(4, 6)
    stem.norm, stem.project = nn.LayerNorm(6), nn.Linear(6, 8)
    raw = Signal(torch.randn(2, 22), segments=(torch.arange(22) < torch.tensor([[22], [12]])).int())
    index = torch.tensor([[4, 0], [1, 2]])
    whole, some = stem(raw).take(index), stem.tokens(stem.cut(raw).take(index))
    torch.testing.assert_close(some.x, whole.x)
    assert torch.equal(some.places(), index)
    assert torch.equal(some.segments, whole.segments)
    assert torch.equal(stem.targets(raw), stem.cut(raw).x)
    assert stem.latents(raw).x.shape == (2, 5, 6)


def test_uncut_undoes_cut_and_leaves_what_no_patch_covers() -> None:
    raw = Signal(torch.randn(2, 22))
    stem = Blocks(4, 6)
    patches = torch.randn(2, 5, 4)
    put = stem.uncut(patches, raw)
    assert torch.equal(stem.cut(put).x, patches)
    assert torch.equal(put.x[:, 20:], raw.x[:, 20:])


def test_uncut_of_an_image() -> None:
    stem, view = Image(size=12, patch=4).stem(8), Signal(torch.randn(3, 3, 12, 8))
    assert torch.equal(stem.uncut(stem.targets(view), replace(view, x=torch.zeros_like(view.x))).x, view.x)
