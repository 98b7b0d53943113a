"""ema: every target moves towards its source, in place, whatever their types."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops.ema import ema, ema_reference

module = import_module("selfsup.triton_ops.ema")  # the package has the function under this name

SHAPES = [(), (1,), (7,), (3, 5), (0, 4), (2, 3, 4), (257,)]
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def case(kinds=(torch.float32, torch.float32), device="cpu", seed=0):
    """(targets, sources) of all shapes; `kinds` is the type of either."""
    g = torch.Generator().manual_seed(seed)
    return tuple([torch.randn(s, generator=g).to(device, kind) for s in SHAPES] for kind in kinds)


def moved(f, targets, sources, momentum):
    targets = [t.clone() for t in targets]
    f(targets, sources, momentum)
    return targets


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.996, 1.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_it_equals_the_reference(device, momentum, as_tensor):
    targets, sources = case((torch.float64, torch.float64), device)
    given = torch.tensor(momentum, device=device, dtype=torch.float64) if as_tensor else momentum
    got, want = moved(ema, targets, sources, given), moved(ema_reference, targets, sources, momentum)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_low_precision_and_mixed_types_are_no_worse_than_torchs(device, as_exact_as_torch, target, source, as_tensor):
    def run(f):
        def go(*arrays):
            momentum = torch.tensor(0.97, device=device) if as_tensor and f is ema else 0.97
            return tuple(moved(f, arrays[: len(SHAPES)], arrays[len(SHAPES) :], momentum))

        return go

    def draw(seed):
        targets, sources = case((KINDS[target], KINDS[source]), device, seed)
        return [*targets, *sources]

    as_exact_as_torch(run(ema), run(ema_reference), draw)


def test_types_may_differ_from_tensor_to_tensor(device):
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16, torch.float32, torch.bfloat16]
    targets, sources = case(device=device)
    targets = [t.to(kind) for t, kind in zip(targets, kinds, strict=True)]
    sources = [s.to(kind) for s, kind in zip(sources, reversed(kinds), strict=True)]
    got, want = (moved(f, targets, sources, 0.9) for f in (ema, ema_reference))
    for a, b, kind in zip(got, want, kinds, strict=True):
        assert a.dtype == kind
        torch.testing.assert_close(a, b)


def test_a_small_step_of_a_float32_target_is_kept_whatever_the_source(device):
    target, source = torch.ones(5, device=device), torch.full((5,), 2.0, device=device, dtype=torch.bfloat16)
    ema([target], [source], 0.9999)
    torch.testing.assert_close(target, torch.full_like(target, 1.0001), rtol=1e-7, atol=0)


def test_equal_weights_stay_as_they_are(device):
    targets, _ = case(device=device)
    for momentum in (0.996, torch.tensor(0.996, device=device)):
        assert all(torch.equal(a, b) for a, b in zip(moved(ema, targets, targets, momentum), targets, strict=True))


@settings(max_examples=20, deadline=None)
@given(momentum=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_target_ends_between_where_it_was_and_its_source(momentum, seed):
    targets, sources = case((torch.float64, torch.float64), seed=seed)
    for a, t, s in zip(moved(ema, targets, sources, momentum), targets, sources, strict=True):
        assert (a >= torch.minimum(t, s) - 1e-15).all()
        assert (a <= torch.maximum(t, s) + 1e-15).all()


def test_a_networks_weights_move_in_place_and_learn_nothing():
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    before = [p.clone() for p in teacher.parameters()]
    places = [p.data_ptr() for p in teacher.parameters()]
    ema(list(teacher.parameters()), list(student.parameters()), 0.75)
    for p, old, place in zip(teacher.parameters(), before, places, strict=True):
        torch.testing.assert_close(p, old + 0.25)
        assert p.data_ptr() == place
        assert p.grad_fn is None
        assert not p.requires_grad
    ema(list(student.parameters()), list(teacher.parameters()), 0.5)  # those that learn may be moved too
    assert all(p.is_leaf and p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("largest", [1, 5, 8])
def test_very_large_tensors_are_moved_in_parts(monkeypatch, device, largest):
    monkeypatch.setattr(module, "LARGEST", largest)
    monkeypatch.setattr(module, "TOGETHER", 10)
    sizes = []
    move = module._move
    monkeypatch.setattr(module, "_move", lambda pairs, m: (sizes.extend(t.numel() for t, _ in pairs), move(pairs, m)))
    targets, sources = case((torch.float32, torch.bfloat16), device)
    got, want = (moved(f, targets, sources, 0.9) for f in (ema, ema_reference))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert max(sizes) <= largest


def test_memory_may_have_gaps(device):
    targets, sources = (torch.randn(6, 8, device=device) for _ in range(2))
    want = 0.9 * targets[:, ::2] + 0.1 * sources.T[:4, :].T
    rest = targets[:, 1::2].clone()
    ema([targets[:, ::2]], [sources.T[:4, :].T], 0.9)
    torch.testing.assert_close(targets[:, ::2], want)
    assert torch.equal(targets[:, 1::2], rest)


def test_few_calls_move_many_tensors(monkeypatch):
    calls = []
    lerp = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *a: (calls.append(len(a[0])), lerp(*a)))
    targets, sources = ([torch.randn(3) for _ in range(500)] for _ in range(2))
    ema(targets, sources, 0.9)
    assert calls == [500]


def test_the_host_does_not_wait(device, without_waiting):
    targets, sources = case((torch.float32, torch.bfloat16), device)
    momentum = torch.tensor(0.9, device=device)
    with without_waiting():
        ema(targets, sources, 0.9)
        ema(targets, sources, momentum)


def test_it_needs_no_values():
    targets, sources = case(device="meta")
    ema(targets, sources, 0.9)


def test_each_process_moves_its_part_of_a_dtensor(device):
    import torch.distributed as dist

    if device.type != "cpu" or not dist.is_available() or dist.is_initialized():
        pytest.skip("one process by itself makes a group on a CPU")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (1,))
        target, source = torch.randn(4, 3), torch.randn(4, 3)
        divided, other = (distribute_tensor(x.clone(), mesh, [Shard(0)]) for x in (target, source))
        ema([divided], [other], 0.9)
        torch.testing.assert_close(divided.to_local(), 0.9 * target + 0.1 * source)
        for wrong in (source, distribute_tensor(source, mesh, [Replicate()])):
            with pytest.raises(ContractError, match="DTensors, both or neither, divided in one way"):
                ema([divided], [wrong], 0.9)
    finally:
        dist.destroy_process_group()


X, Y = torch.ones(3), torch.ones(4)
BAD = [
    (([X], []), "each target needs a source; there are 1 and 0"),
    (([X], [Y]), r"target and source 0 must have one shape, and have \[3\] and \[4\]"),
    (([X, X.long()], [X, X]), "target and source 1 must be of floating point: torch.int64, torch.float32"),
    (([X], [X.to("meta")]), "target 0 is on cpu, and its source on meta"),
    (([X, X], [X, X]), "a target is given twice"),
]


@pytest.mark.parametrize(("lists", "message"), BAD)
def test_what_does_not_fit_is_named_and_nothing_moves(lists, message):
    with pytest.raises(ContractError, match=message):
        ema(*lists, 0.5)
    assert X.eq(1).all()


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan"), torch.tensor(2.0)])
def test_a_momentum_out_of_range_is_named(momentum):
    with pytest.raises(ContractError, match="momentum must be from 0 to 1"):
        ema([X], [X], momentum)


def test_a_momentum_is_one_number():
    with pytest.raises(ContractError, match=r"this has shape \[2\]"):
        ema([X], [X], torch.ones(2))


def test_there_may_be_nothing_to_move():
    ema([], [], 0.9)
