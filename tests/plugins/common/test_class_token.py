from __future__ import annotations

import torch

from selfsup.kernel.contracts import Signal
from selfsup.plugins.common.class_token import ClassToken
from selfsup.plugins.modalities.image import Image


def test_the_token_comes_first_and_is_nowhere() -> None:
    torch.manual_seed(0)
    inner = Image(size=8, patch=4).stem(6)
    stem = ClassToken(inner, 6)
    view = Signal(torch.randn(2, 3, 8, 8))
    tokens = stem(view)
    assert torch.equal(tokens.x[:, 0], stem.token.expand(2, -1))
    assert torch.equal(tokens.x[:, 1:], inner(view).x)
    assert (tokens.positions[:, 0] == -1).all()
    assert torch.equal(tokens.positions[:, 1:], inner(view).positions)
    assert tokens.segments is None
    index = torch.tensor([[3, 1], [0, 2]])
    torch.testing.assert_close(stem.tokens(stem.cut(view).take(index)).x[:, 1:], inner(view).take(index).x)


def test_it_belongs_to_the_sequence_of_its_row() -> None:
    stem = ClassToken(Image(size=8, patch=4).stem(6), 6)
    led = stem.lead(Signal(torch.zeros(3, 2, 6), segments=torch.tensor([[1, 1], [1, 0], [0, 0]])))
    assert led.segments.tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert led.positions.tolist() == [[-1, 0, 1]] * 3


def test_targets_and_latents_are_of_patches_alone() -> None:
    inner = Image(size=8, patch=4).stem(6)
    stem, view = ClassToken(inner, 6), Signal(torch.randn(2, 3, 8, 8))
    assert (stem.size, stem.width) == (48, 6)
    assert torch.equal(stem.targets(view), inner.targets(view))
    assert torch.equal(stem.latents(view).x, inner.latents(view).x)
    assert torch.equal(stem.uncut(stem.targets(view), view).x, view.x)
