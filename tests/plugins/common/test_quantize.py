from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.kernel.random import stream
from selfsup.plugins.common import quantize
from selfsup.plugins.common.quantize import GumbelQuantizer, perplexity, usage

G, V, L, D = 2, 7, 5, 6


def quantizer() -> GumbelQuantizer:
    torch.manual_seed(0)
    return GumbelQuantizer(L, D, groups=G, entries=V).double()


def by_definition(q: GumbelQuantizer, x: Tensor, noise: Tensor, tau: float) -> Tensor:
    """Eq. 1 with the choice as a product of one-hot vectors, straight through."""
    soft = ((q.logits(x).unflatten(-1, (G, V)) + noise) / tau).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), V).to(soft)
    return torch.einsum("...gv,gvd->...gd", hard - soft.detach() + soft, q.codebook).flatten(-2)


@pytest.mark.parametrize("shape", [(11,), (3, 4), (2, 1, 3)])
def test_vectors_and_gradients_are_the_definitions(shape: tuple[int, ...]) -> None:
    q, x = quantizer(), torch.randn(*shape, L, dtype=torch.float64, requires_grad=True)
    noise = -torch.rand(*shape, G, V, dtype=torch.float64).log().neg().log()
    wanted = [x, *q.parameters()]
    upstream = torch.randn(*shape, D, dtype=torch.float64)
    ours = q(x, noise, 0.7)
    theirs = by_definition(q, x, noise, 0.7)
    torch.testing.assert_close(ours.vectors, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.vectors, wanted, upstream), torch.autograd.grad(theirs, wanted, upstream)
    )


def test_without_noise_the_likeliest_code_is_looked_up() -> None:
    q, x = quantizer(), torch.randn(9, L, dtype=torch.float64)
    out = q(x)
    assert torch.equal(out.codes, out.logits.argmax(-1))
    for vector, (a, b) in zip(out.vectors, out.codes.tolist(), strict=True):
        assert torch.equal(vector, torch.cat([q.codebook[0, a], q.codebook[1, b]]))


def test_the_noise_decides_between_codes_as_often_as_their_softmax_says() -> None:
    """Gumbel 1954: argmax(l + n) is a draw from softmax(l)."""
    q = quantizer()
    x = torch.randn(1, L, dtype=torch.float64).expand(40000, L) * 0.3
    noise = -torch.log(-torch.log(torch.rand(40000, G, V, dtype=torch.float64)))
    out = q(x, noise)
    often = F.one_hot(out.codes, V).double().mean(0)
    torch.testing.assert_close(often, out.logits[0].softmax(-1), atol=0.01, rtol=0)


def test_a_stream_gives_the_noise_that_it_would_have_drawn() -> None:
    q, x = quantizer(), torch.randn(3, 4, L, dtype=torch.float64)
    ours = q(x, stream(5, "gumbel", torch.arange(3)), 0.7)
    ready = q(x, stream(5, "gumbel", torch.arange(3)).gumbel(4, G, V), 0.7)
    assert torch.equal(ours.codes, ready.codes)
    assert torch.equal(ours.vectors, ready.vectors)
    assert not torch.equal(ours.codes, q(x).codes)
    wanted = list(q.parameters())
    got, want = (torch.autograd.grad(each.vectors.square().sum(), wanted) for each in (ours, ready))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_usage_averages_over_valid_rows_alone() -> None:
    chance = torch.rand(2, 3, G, V).softmax(-1)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(usage(chance, valid), chance[valid].mean(0))
    assert torch.equal(usage(chance, torch.zeros_like(valid)), torch.zeros(G, V))


def test_usage_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unequal halves of a batch, each on its own process, give what the whole gives, and its gradient."""
    chance = torch.rand(5, 3, G, V).softmax(-1).requires_grad_()
    valid = torch.rand(5, 3) < 0.6
    whole = usage(chance, valid)
    weights = torch.rand(G, V)
    (expected,) = torch.autograd.grad((whole * weights).sum(), chance)
    sent: list[Tensor] = []
    monkeypatch.setattr(quantize, "gather", lambda x: sent.append(x) or x)
    usage(chance[2:], valid[2:])
    monkeypatch.setattr(quantize, "gather", lambda x: torch.cat([x, sent[0].detach()]))
    mine = usage(chance[:2], valid[:2])
    torch.testing.assert_close(mine, whole)
    (grad,) = torch.autograd.grad((mine * weights).sum(), chance)
    torch.testing.assert_close(grad[:2], expected[:2])


def test_the_first_logits_are_far_apart() -> None:
    """The authors start the weights of the logits from normal(0, 1), and the codebook from uniform(0, 1)."""
    q = GumbelQuantizer(200, 64, groups=2, entries=100)
    assert abs(q.logits.weight.std() - 1) < 0.02
    assert not q.logits.bias.any()
    assert 0 <= q.codebook.min() < 0.01 < 0.99 < q.codebook.max() <= 1


def test_perplexity_counts_the_codes_in_use() -> None:
    alike, one = torch.full((G, V), 1 / V), F.one_hot(torch.tensor([3, 3]), V).float()
    assert math.isclose(perplexity(alike), G * V, rel_tol=1e-6)
    assert perplexity(one) == G
    half = torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0]])
    assert math.isclose(perplexity(half), 2, rel_tol=1e-6)


def test_the_gradient_of_perplexity_is_finite_where_an_entry_is_never_used() -> None:
    """Softmax underflows to 0 for an entry 104 below the best; transformers' xlogy(p, p) gives NaN there."""
    logits = torch.tensor([[0.0, -200.0, 1.0]], requires_grad=True)
    perplexity(logits.softmax(-1)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    p = torch.tensor([1.0, 0.0], requires_grad=True)
    torch.xlogy(p, p).sum().backward()
    assert p.grad is not None
    assert p.grad.isnan().any()
