from __future__ import annotations

import math

import pytest
import torch

from selfsup.kernel.contracts import Signal
from selfsup.plugins.common.attention import Scope, SelfAttention, cross_mask, self_mask


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_the_equation(kv_heads: int) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, 4, kv_heads, True, 0.0).double()
    x = torch.randn(2, 5, 16).double()
    segments = torch.tensor([[1, 1, 1, 2, 0], [1, 1, 1, 1, 1]])
    scope = Scope(causal=True, mask=self_mask(Signal(x, segments), causal=True))
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split([16, 4 * kv_heads, 4 * kv_heads], -1)
    out = torch.zeros(2, 5, 16).double()
    for b in range(2):
        for t in range(5):
            for h in range(4):
                g = h * kv_heads // 4  # consecutive heads share their keys
                seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
                query = q[b, t, 4 * h : 4 * h + 4]
                weights = torch.stack([query @ k[b, s, 4 * g : 4 * g + 4] for s in seen]).div(2).softmax(0)
                values = torch.stack([v[b, s, 4 * g : 4 * g + 4] for s in seen])
                out[b, t, 4 * h : 4 * h + 4] = weights @ values
    want = out @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(attention(x, scope), want)


def test_nothing_is_masked_where_nothing_needs_to_be() -> None:
    x = torch.zeros(2, 3, 4)
    assert self_mask(Signal(x), causal=False) is None
    assert self_mask(Signal(x), causal=True) is None
    assert cross_mask(Signal(x, torch.ones(2, 3).long()), Signal(x)) is None
    whole, packed = torch.tensor([[1, 1, 1], [2, 2, 2]]), torch.tensor([[1, 1, 1], [1, 1, 2]])
    assert self_mask(Signal(x, whole), causal=True) is None
    assert self_mask(Signal(x, packed), causal=True).shape == (2, 1, 3, 3)
    assert self_mask(Signal(x.to("meta"), whole.to("meta")), causal=True).shape == (2, 1, 3, 3)  # nobody can look


def test_bias_and_mask_come_together() -> None:
    signal = Signal(torch.zeros(1, 3, 4), torch.tensor([[1, 1, 2]]))
    bias = torch.arange(9.0).view(1, 1, 3, 3)
    inf = math.inf
    assert self_mask(signal, causal=True, bias=bias)[0, 0].tolist() == [[0, -inf, -inf], [3, 4, -inf], [-inf, -inf, 8]]


def test_cross_mask() -> None:
    x, y = torch.zeros(1, 3, 4), torch.zeros(1, 4, 4)
    theirs = Signal(y, torch.tensor([[1, 2, 2, 0]]))
    open_to = cross_mask(Signal(x), theirs)
    assert open_to[0, 0].tolist() == [[True, True, True, False]] * 3
    own = cross_mask(Signal(x, torch.tensor([[1, 2, 3]])), theirs)
    assert own[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]  # 3 has no context
