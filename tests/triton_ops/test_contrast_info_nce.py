"""info_nce against cross-entropy by hand; test_contrast.py has what all such losses must do."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops.contrast_info_nce import info_nce, info_nce_reference

Q, K, QUEUE = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (4, 7, 9))
LABELS = torch.tensor([6, 0, 0, 3])


def by_hand(negatives_of, temperature=0.7):
    losses = []
    for n, label in enumerate(LABELS.tolist()):
        true = float(Q[n] @ K[label]) / temperature
        others = sum(math.exp(float(Q[n] @ k) / temperature) for k in negatives_of(label))
        losses.append(math.log(math.exp(true) + others) - true)
    return losses


@pytest.mark.parametrize("f", [info_nce, info_nce_reference])
def test_negatives_are_the_other_keys(f):
    expected = by_hand(lambda label: [k for m, k in enumerate(K) if m != label])
    assert f(Q, K, LABELS, temperature=0.7, reduction="none").tolist() == pytest.approx(expected, rel=1e-12)
    assert f(Q, K, LABELS, temperature=0.7, reduction="sum").item() == pytest.approx(sum(expected), rel=1e-12)
    assert f(Q, K, LABELS, temperature=0.7).item() == pytest.approx(sum(expected) / 4, rel=1e-12)


@pytest.mark.parametrize("f", [info_nce, info_nce_reference])
def test_with_a_queue_they_are_its_keys_alone(f):
    expected = by_hand(lambda label: QUEUE)
    found = f(Q, K, LABELS, temperature=0.7, queue=QUEUE, reduction="none")
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


KEYS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
ONE = torch.tensor([[1.0, 0.0]])  # its similarities are 1, 0 and -1; its key is the second


@pytest.mark.parametrize("f", [info_nce, info_nce_reference])
def test_a_margin_by_hand(device, f):
    """At a temperature of 0.5 logits are 2, 0 and -2; a margin of 0.25 makes that of the key -0.5."""
    found = f(ONE.to(device), KEYS.to(device), torch.tensor([1], device=device), temperature=0.5, margin=0.25)
    expected = math.log(math.exp(2) + math.exp(-0.5) + math.exp(-2)) + 0.5
    assert found.item() == pytest.approx(expected, rel=1e-6)
    found = f(ONE.to(device), KEYS[1:].to(device), temperature=0.5, margin=0.25, queue=KEYS.to(device))
    expected = math.log(math.exp(-0.5) + math.exp(2) + 1 + math.exp(-2)) + 0.5
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("f", [info_nce, info_nce_reference])
def test_smoothed_labels_by_hand(device, f):
    """Of the target 0.7 + 0.1 is on the key, and 0.1 on each of two others; with a queue of three 0.7 + 0.075."""
    one, keys, label = ONE.to(device), KEYS.to(device), torch.tensor([1], device=device)
    found = f(one, keys, label, temperature=1.0, margin=0.5, label_smoothing=0.3)
    whole = math.log(math.e + math.exp(-0.5) + math.exp(-1))
    assert found.item() == pytest.approx(whole - (0.1 * 1 + 0.8 * -0.5 + 0.1 * -1), rel=1e-6)
    found = f(one, keys, label, temperature=1.0, margin=0.5, label_smoothing=0.3, queue=keys)
    whole = math.log(math.exp(-0.5) + math.e + 1 + math.exp(-1))
    assert found.item() == pytest.approx(whole - (0.775 * -0.5 + 0.075 * (1 + 0 - 1)), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_both_ways_are_those_of_a_transposed_matrix(reduction):
    options = {"temperature": 0.7, "label_smoothing": 0.1, "margin": 0.2, "normalize": True, "reduction": reduction}
    found = info_nce(Q, K[:4], symmetric=True, **options)
    expected = (info_nce_reference(Q, K[:4], **options) + info_nce_reference(K[:4], Q, **options)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(info_nce_reference(Q, K[:4], symmetric=True, **options), expected, rtol=1e-12, atol=0)


CHOICES = {
    "plain": {},
    "labels": {"margin": 0.1, "label_smoothing": 0.2, "reduction": "none"},
    "queue": {"margin": 0.1, "label_smoothing": 0.2, "normalize": True, "reduction": "none"},
    "both ways": {"margin": 0.3, "label_smoothing": 0.1, "normalize": True, "symmetric": True},
}


def drawn(name, kind, device, seed):
    """(arrays, how a loss is called with them)"""
    g = torch.Generator().manual_seed(seed)
    counts = (17, 17 if name == "both ways" else 23, 31)
    arrays = [torch.randn(n, 10, generator=g).to(device, kind).div_(3).requires_grad_() for n in counts]
    labels = torch.randint(23, (17,), generator=g).to(device) if name in ("labels", "queue") else None
    scale = torch.promote_types(kind, torch.float32)
    arrays.append(torch.full((1,), 0.1, device=device, dtype=scale).requires_grad_())

    def call(f, queries, keys, queue, temperature):
        extra = queue if name == "queue" else None
        return f(queries, keys, labels, temperature=temperature, queue=extra, **CHOICES[name])

    return arrays if name == "queue" else [*arrays[:2], arrays[2].detach(), arrays[3]], call


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_options_are_as_exact_as_torchs(device, as_exact_as_torch, name, kind):
    call = drawn(name, kind, device, 0)[1]
    slack = 1e-13 if kind == torch.float64 else 2e-6
    op, reference = partial(call, info_nce), partial(call, info_nce_reference)
    as_exact_as_torch(op, reference, lambda seed: drawn(name, kind, device, seed)[0], slack=slack, seeds=4)


@pytest.mark.parametrize("name", CHOICES)
def test_options_wait_for_nothing_and_need_no_values(device, without_waiting, name):
    arrays, call = drawn(name, torch.float32, device, 0)
    call(info_nce, *arrays).sum().backward()  # what is compiled and made once
    with without_waiting():
        call(info_nce, *arrays).sum().backward()
    if name != "labels" and name != "queue":  # labels are of this device
        meta = [x.detach().to("meta").requires_grad_() for x in arrays]
        assert call(info_nce, *meta).shape == ()


@pytest.mark.parametrize("name", CHOICES)
@torch._dynamo.config.patch(error_on_recompile=True)
def test_options_compile_whole_and_once(name):
    torch._dynamo.reset()
    f = torch.compile(
        partial(info_nce, temperature=0.2, **CHOICES[name]), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for count in (9, 20, 33, 34, 65):
        q, k, queue = (torch.randn(count + n, 4, dtype=torch.float64, requires_grad=True) for n in (0, 0, 7))
        more = {"queue": queue} if name == "queue" else {}
        more |= {"labels": torch.arange(count).flip(0)} if name in ("labels", "queue") else {}
        got, want = f(q, k, **more), info_nce(q, k, temperature=0.2, **CHOICES[name], **more)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        found, true = (torch.autograd.grad(loss.sum(), (q, k)) for loss in (got, want))
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)


def test_a_label_of_no_key_that_cannot_be_seen_is_no_number():
    f = torch.compile(partial(info_nce, temperature=0.7, reduction="none"), fullgraph=True, backend="eager")
    found = f(Q, K, torch.tensor([6, 7, -1, 3]))
    assert found.isnan().tolist() == [False, True, True, False]
    assert torch.equal(found[::3], info_nce(Q[::3], K, LABELS[::3], temperature=0.7, reduction="none"))


def test_a_vector_of_zeros_has_no_direction():
    q = Q.clone()
    q[1] = 0
    q.requires_grad_()
    loss = info_nce(q, K, LABELS, temperature=0.7, normalize=True, reduction="none")
    assert loss[1].item() == pytest.approx(math.log(7), rel=1e-12)
    assert torch.autograd.grad(loss.sum(), q)[0].isfinite().all()


def test_without_labels_key_n_is_that_of_query_n():
    given = info_nce(Q, K, torch.arange(4), temperature=0.7)
    assert info_nce(Q, K, temperature=0.7) == given
    with pytest.raises(ContractError, match="7 queries need as many keys, and there are 4"):
        info_nce(K, Q, temperature=0.7)


def test_labels_of_no_key_are_named():
    with pytest.raises(ContractError, match=r"from 0 to 6, the last key, and are from 0 to 7"):
        info_nce(Q, K, LABELS + torch.tensor([1, 0, 0, 0]), temperature=0.7)
    with pytest.raises(ContractError, match=r"and are from -1 to 5"):
        info_nce(Q, K, LABELS - 1, temperature=0.7)
    with pytest.raises(ContractError, match=r"labels must be int64 \[N\] = \[4\], and are torch.int64 \[3\]"):
        info_nce(Q, K, LABELS[:3], temperature=0.7)
    with pytest.raises(ContractError, match=r"are torch.int32 \[4\]"):
        info_nce(Q, K, LABELS.int(), temperature=0.7)


def test_what_does_not_fit_is_named():
    with pytest.raises(ContractError, match=r"queries and queue must be \[N, D\], \[M, D\], .* \[4, 3\], \[9, 2\]"):
        info_nce(Q, K, LABELS, temperature=0.7, queue=QUEUE[:, :2])
    with pytest.raises(ContractError, match="takes neither labels nor a queue"):
        info_nce(Q, K[:4], LABELS, temperature=0.7, symmetric=True)
    with pytest.raises(ContractError, match=r"queries and keys must be \[N, D\], \[N, D\], and are \[4, 3\], \[7, 3\]"):
        info_nce(Q, K, temperature=0.7, symmetric=True)
    with pytest.raises(ContractError, match=r"label_smoothing must be from 0 to 1, and is -0\.1"):
        info_nce(Q, K, temperature=0.7, label_smoothing=-0.1)
    with pytest.raises(ContractError, match="a temperature must be above 0, and is 0"):
        info_nce(Q, K, temperature=0)
    with pytest.raises(ContractError, match="no reduction 'avg'"):
        info_nce(Q, K, LABELS, temperature=0.7, reduction="avg")
