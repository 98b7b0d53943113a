import torch
from torch import nn

from selfsup.plugins.common.heads import ProjectionHead
from selfsup.plugins.common.norm import BatchNorm


def test_every_layer_is_linear_norm_relu_but_the_last_which_has_no_relu():
    head = ProjectionHead(8, 12, 5, layers=3)
    kinds = [type(m) for m in head]
    assert kinds == [nn.Linear, BatchNorm, nn.ReLU, nn.Linear, BatchNorm, nn.ReLU, nn.Linear, BatchNorm]
    assert [tuple(m.weight.shape) for m in head if isinstance(m, nn.Linear)] == [(12, 8), (12, 12), (5, 12)]


def test_no_linear_layer_and_not_the_last_norm_has_a_bias():
    head = ProjectionHead(8, 12, 5, layers=2)
    assert [n for n, _ in head.named_parameters()] == ["0.weight", "1.weight", "1.bias", "3.weight", "4.weight"]


def test_one_layer_is_a_linear_head():
    head = ProjectionHead(8, 12, 5, layers=1)
    assert [tuple(p.shape) for p in head.parameters()] == [(5, 8), (5,)]


def test_embeddings_are_centred_over_the_batch():
    torch.manual_seed(0)
    z = ProjectionHead(8, 12, 5, layers=3)(torch.randn(64, 8) + 3)
    torch.testing.assert_close(z.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)
