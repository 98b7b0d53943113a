from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from selfsup.plugins.common.attention import Scope, SelfAttention
from selfsup.plugins.common.transformer_layer import FeedForward, Layer, drop_path

WIDTH = 4


def layer(norm_first: bool, drop_path: float | None = None) -> Layer:
    return Layer(
        attention=SelfAttention(WIDTH, 2, 2, True, 0.0),
        cross=None,
        mlp=FeedForward(WIDTH, 8, "gelu", True, 0.0),
        norms=[nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)],
        norm_first=norm_first,
        dropout=0.0,
        drop_path=drop_path,
    )


def test_where_the_norms_stand() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, WIDTH)
    pre = layer(norm_first=True)
    middle = x + pre.attention(pre.norm1(x), Scope())
    assert torch.equal(pre(x, Scope()), middle + pre.mlp(pre.norm2(middle)))
    post = layer(norm_first=False)
    middle = post.norm1(x + post.attention(x, Scope()))
    assert torch.equal(post(x, Scope()), post.norm2(middle + post.mlp(middle)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return x / 2 * (1 + math.erf(x / 2**0.5))


def gelu_tanh(x: float) -> float:
    return x / 2 * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("activation", "want"),
    [
        ("gelu", [gelu(-2), gelu(0.5)]),
        ("gelu_tanh", [gelu_tanh(-2), gelu_tanh(0.5)]),
        ("relu", [0, 0.5]),
        ("swiglu", [-2 * sigmoid(-2) * 3, 0.5 * sigmoid(0.5) * -1]),
    ],
)
def test_activations(activation: str, want: list[float]) -> None:
    """The layer before the activation gives -2 and 0.5 (the gate of swiglu, and then 3 and -1)."""
    mlp = FeedForward(WIDTH, 2, activation, True, 0.0)
    mlp.up.weight.data.zero_()
    mlp.up.bias.data = torch.tensor([-2, 0.5, 3, -1][: len(mlp.up.bias)])
    mlp.down.weight.data = torch.eye(WIDTH, 2)
    mlp.down.bias.data.zero_()
    torch.testing.assert_close(mlp(torch.randn(1, 1, WIDTH))[0, 0, :2], torch.tensor(want))


def test_drop_path_drops_whole_samples_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 5, WIDTH).expand(4000, -1, -1)
    y: Tensor = drop_path(x, torch.tensor(0.4))
    kept = (y != 0).any(-1).any(-1)
    torch.testing.assert_close(y[kept], x[kept] / 0.4)
    assert abs(kept.float().mean() - 0.4) < 4 * (0.24 / 4000) ** 0.5


def test_drop_path_acts_in_training_only() -> None:
    x = torch.randn(64, 1, WIDTH)
    dropping = layer(norm_first=True, drop_path=0.99)
    assert (dropping(x, Scope()) == x).all(-1).float().mean() > 0.5
    assert (dropping.eval()(x, Scope()) == x).all(-1).float().mean() == 0
