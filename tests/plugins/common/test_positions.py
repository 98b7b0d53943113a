from __future__ import annotations

import math

import pytest
import torch

from selfsup.kernel.contracts import Signal
from selfsup.kernel.errors import ContractError
from selfsup.plugins.common.positions import Conv, Learned, Relative, Rotary, SinCos, correlate, fft_pays, rotate


def test_sincos_of_one_axis() -> None:
    table = SinCos(8)(Signal(torch.zeros(2, 5, 8)))
    assert table.shape == (1, 5, 8)
    for p in range(5):
        angles = [p / 10_000 ** (i / 4) for i in range(4)]
        want = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(table[0, p], torch.tensor(want))


def test_sincos_splits_the_width_over_axes() -> None:
    where = torch.tensor([[[2, 7, 1], [0, 3, 5]]])
    table = SinCos(26)(Signal(torch.zeros(1, 2, 26), positions=where))
    for axis in range(3):
        alone = SinCos(8)(Signal(torch.zeros(1, 2, 8), positions=where[..., axis]))
        assert torch.equal(table[..., 8 * axis : 8 * axis + 8], alone)
    assert (table[..., 24:] == 0).all()


def test_a_token_at_negative_positions_is_nowhere() -> None:
    where = torch.tensor([[[-1, -1], [0, 0], [3, 1]]])
    tokens = Signal(torch.zeros(1, 3, 8), positions=where)
    table = SinCos(8)(tokens)
    assert (table[0, 0] == 0).all()
    assert torch.equal(table[:, 1:], SinCos(8)(Signal(tokens.x[:, 1:], positions=where[:, 1:])))
    cos, sin = Rotary(8)(tokens)
    assert (cos[0, 0, 0] == 1).all()
    assert (sin[0, 0, 0] == 0).all()
    learned = Learned(4, 8)
    added = learned(Signal(tokens.x, positions=where[..., 0]))
    assert (added[0, 0] == 0).all()
    assert torch.equal(added[0, 1:], learned.table.weight[[0, 3]])


def test_rotary_logits_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 12).double().unbind()

    def logit(a: list[int], b: list[int]) -> float:
        def turned(x: torch.Tensor, p: list[int]) -> torch.Tensor:
            return rotate(x, Rotary(12)(Signal(torch.zeros(1, 1, 12), positions=torch.tensor([[p]]))))

        return float((turned(q, a) * turned(k, b)).sum())

    for offset in (0, 100):
        assert logit([3 + offset], [1 + offset]) == pytest.approx(logit([3], [1]), abs=1e-4)
        assert logit([3 + offset, 5, 2], [1 + offset, 4, 2]) == pytest.approx(logit([3, 5, 2], [1, 4, 2]), abs=1e-4)
    assert abs(logit([3], [1]) - logit([4], [1])) > 1e-3
    assert abs(logit([3, 5, 2], [1, 4, 2]) - logit([3, 6, 2], [1, 4, 2])) > 1e-3
    with pytest.raises(ContractError, match="12 wide do not split into pairs over 4 axes"):
        logit([1, 1, 1, 1], [0, 0, 0, 0])


def test_relative_buckets() -> None:
    """Exact up to 8 in both directions (16 when causal), then by logarithm, one bucket beyond 128."""
    relative = Relative(2)
    ahead = torch.tensor([0, -1, -7, -8, -127, -128, -5000, 1, 7, 8, 127, 128, 5000])
    assert relative.bucket(ahead, causal=False).tolist() == [0, 1, 7, 8, 15, 15, 15, 17, 23, 24, 31, 31, 31]
    assert relative.bucket(ahead, causal=True).tolist() == [0, 1, 7, 8, 31, 31, 31, 0, 0, 0, 0, 0, 0]
    both = relative.bucket(torch.arange(-200, 201), causal=False)
    assert both.unique().tolist() == [i for i in range(32) if i != 16]  # 16 would be "0 ahead"


def test_relative_bias_reads_positions() -> None:
    relative = Relative(2)
    bias = relative(Signal(torch.zeros(1, 3, 4), positions=torch.tensor([[4, 0, 5]])), causal=False)
    assert bias.shape == (1, 2, 3, 3)
    assert torch.equal(bias[0, :, 0, 1], relative.table.weight[4])  # query at 4, key at 0
    assert torch.equal(bias[0, :, 1, 2], relative.table.weight[16 + 5])  # query at 0, key at 5


@pytest.mark.parametrize("kernel", [4, 5])
def test_conv_keeps_the_length_and_its_norm(kernel: int) -> None:
    torch.manual_seed(0)
    conv = Conv(16, kernel, 4)
    x = torch.randn(2, 9, 16)
    assert conv(Signal(x)).shape == x.shape
    before = conv(Signal(x))
    with torch.no_grad():
        conv.weight_v.mul_(torch.rand(kernel) + 0.5)  # the length of weight_v has no part in it
    torch.testing.assert_close(conv(Signal(x)), before)
    seen = torch.autograd.functional.jacobian(lambda x: conv(Signal(x)).sum(-1), x[:1])[0, :, 0].abs().sum(-1)
    behind = kernel // 2
    for t in range(9):
        assert (seen[t] > 0).tolist() == [-behind <= s - t < kernel - behind for s in range(9)]


@pytest.mark.parametrize("kernel", [32, 33])
def test_the_fast_convolution_is_the_convolution(kernel: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 12, 40).double(), torch.randn(12, 3, kernel).double()
    x.requires_grad_()
    weight.requires_grad_()
    fast = correlate(x, weight, 4)
    direct = torch.nn.functional.conv1d(x, weight, padding=kernel // 2, groups=4)[..., :40]
    torch.testing.assert_close(fast, direct)
    probe = torch.randn_like(fast)
    for got, want in zip(
        torch.autograd.grad(fast, (x, weight), probe), torch.autograd.grad(direct, (x, weight), probe), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_the_fast_convolution_serves_large_batches_in_full_precision() -> None:
    x = torch.zeros(8, 4, 100)
    assert fft_pays(x, 128)
    assert not fft_pays(x, 5)
    assert not fft_pays(x[:1], 128)
    assert not fft_pays(x.bfloat16(), 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fft_pays(x, 128)
    conv = Conv(4, 128, 2)
    signal = Signal(torch.randn(8, 100, 4))
    alone = torch.cat([conv(Signal(row[None])) for row in signal.x])
    torch.testing.assert_close(conv(signal), alone, rtol=1e-5, atol=1e-6)
