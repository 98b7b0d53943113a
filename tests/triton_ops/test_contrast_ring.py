"""Processes that hold parts of the vectors against one that holds all: losses and every gradient are the same.

Four processes are started once, by this file as a program, and do all that is tried here, together or in part.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import Forked
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops import contrast_ring
from selfsup.triton_ops.contrast import contrast
from selfsup.triton_ops.contrast_clip import clip_loss
from selfsup.triton_ops.contrast_info_nce import info_nce
from selfsup.triton_ops.contrast_nt_xent import nt_xent
from selfsup.triton_ops.contrast_ring import contrast_among, contrast_everywhere
from selfsup.triton_ops.contrast_sigmoid import sigmoid_loss

WORLD = 4
PATIENCE = 300.0  # seconds for all of it
SHORT = timedelta(seconds=30)  # for one exchange: where one process fails, the others do not wait long
SIZES = range(1, WORLD + 1)


def of_rows(rows, partners, ids, scale, group):
    """SimCLR's: the keys are all rows, and a sample may be there twice, on one process or on several."""
    if group is None:
        losses, near = contrast(rows, partners, rows, ids, ids, temperature=1 / scale)
    else:
        losses, near = contrast_among(rows, partners, ids, temperature=1 / scale, group=group)
    return (losses * (1 + near)).mean()


CASES = {  # called with (a, b, a queue, labels, ids, scale, bias, group)
    "nt_xent": lambda a, b, q, labels, ids, s, c, g: nt_xent(a, b, temperature=1 / s, group=g),
    "contrast": lambda a, b, q, labels, ids, s, c, g: of_rows(a, b, ids, s, g),
    "clip_loss": lambda a, b, q, labels, ids, s, c, g: clip_loss(a, b, s, group=g),
    "clip_loss, smoothed": lambda a, b, q, labels, ids, s, c, g: clip_loss(
        3 * a, b / 2, s, label_smoothing=0.1, normalize=True, group=g
    ),
    "sigmoid_loss": lambda a, b, q, labels, ids, s, c, g: sigmoid_loss(a, b, s, c, group=g),
    "info_nce": lambda a, b, q, labels, ids, s, c, g: info_nce(a, b, temperature=1 / s, group=g),
    "info_nce of labels": lambda a, b, q, labels, ids, s, c, g: info_nce(
        a, q, labels, temperature=1 / s, label_smoothing=0.2, margin=0.1, group=g
    ),
    "info_nce with a queue": lambda a, b, q, labels, ids, s, c, g: info_nce(
        a, b, temperature=1 / s, queue=q, label_smoothing=0.2, margin=0.1, group=g
    ),
    "info_nce both ways": lambda a, b, q, labels, ids, s, c, g: info_nce(
        a, b, temperature=1 / s, symmetric=True, label_smoothing=0.1, margin=0.3, normalize=True, group=g
    ),
    "two at once": lambda a, b, q, labels, ids, s, c, g: (
        clip_loss(a, b, s, group=g) + 2 * sigmoid_loss(b, a, s, c, group=g) + nt_xent(a, b, temperature=1 / s, group=g)
    ),
}
every_size = pytest.mark.parametrize("size", SIZES)


def whole(size, count=5, width=6, queued=7, dtype=torch.float64, scale=5.0, seed=0):
    """What all processes have, to be divided by `part`."""
    g = torch.Generator().manual_seed(100 * seed + size)
    counts = (size * count, size * count, size * queued)
    vectors = [F.normalize(torch.randn(n, width, generator=g, dtype=torch.float64), dim=-1).to(dtype) for n in counts]
    vectors[1] = F.normalize(vectors[1] + vectors[0], dim=-1)
    labels = torch.randint(queued, (size * count,), generator=g)  # among a process's own
    ids = torch.randint(2 * count, (size * count,), generator=g)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return [*vectors, labels, ids, torch.tensor(scale, dtype=exact), torch.tensor(-scale / 2, dtype=exact)]


def part(arrays, place, size):
    return [x.chunk(size)[place] if x.dim() else x for x in arrays]


def with_gradients(case, arrays, group=None):
    """The loss, and the gradients of vectors, scale and bias; 0 where something has none."""
    arrays = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in arrays]
    loss = CASES[case](*arrays, group)
    learned = [x for x in arrays if x.requires_grad]
    found = torch.autograd.grad(loss, learned, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(found, learned, strict=True))]


def mean_over(group, x, size):
    total = x.double()
    dist.all_reduce(total, group=group)
    return total / size


def alone(case, arrays, size):
    """What one process finds: labels are then of the keys of all."""
    arrays = [*arrays]
    arrays[3] = arrays[3] + torch.arange(size).repeat_interleave(len(arrays[3]) // size) * (len(arrays[2]) // size)
    return with_gradients(case, arrays)


def of_all(case, arrays, group, place, size):
    """What several processes find, put together: [the mean of losses, the gradients of the mean]."""
    loss, *gradients = with_gradients(case, part(arrays, place, size), group)
    out = [mean_over(group, loss, size)]
    for gradient in gradients:
        if gradient.dim():
            rows = [torch.empty_like(gradient) for _ in range(size)]
            dist.all_gather(rows, gradient, group=group)
            out.append(torch.cat(rows) / size)
        else:
            out.append(mean_over(group, gradient, size))
    return out


def off(found, true):
    """The error relative to the size, of the loss and each gradient."""
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(found, true, strict=True)]


def try_equal(case, group, place, size):
    for scale in (5.0, 100.0, 1e4)[: 2 + (size == WORLD)]:
        arrays = whole(size, scale=scale)
        errors = off(of_all(case, arrays, group, place, size), alone(case, arrays, size))
        assert max(errors) < 1e-10, (scale, errors)


def try_low_precision(case, group, place, size):
    """At a scale of 100 a few rows with rounded similarities make the gradients: several draws, and some slack."""
    for dtype, scale, slack in (
        (torch.float32, 5.0, 1e-6),
        (torch.float32, 100.0, 2e-5),
        (torch.bfloat16, 100.0, 2**-9),
    ):
        squares = {"ours": 0.0, "theirs": 0.0, "size": 0.0}
        for seed in range(4):
            arrays = whole(size, count=20, width=24, dtype=dtype, scale=scale, seed=seed)
            true = alone(case, [x.double() if x.is_floating_point() else x for x in arrays], size)
            ours, theirs = of_all(case, arrays, group, place, size), alone(case, arrays, size)
            for name, found in (("ours", ours), ("theirs", theirs), ("size", [2 * x for x in true])):
                squares[name] += torch.stack(
                    [(a - b).double().square().sum() for a, b in zip(found, true, strict=True)]
                )
        ours, theirs, sizes = (squares[name].sqrt() for name in ("ours", "theirs", "size"))
        assert (ours <= 2 * theirs + slack * sizes).all(), (dtype, scale, ours / sizes, theirs / sizes)


class Watch(TorchDispatchMode):
    """The most elements that any tensor has."""

    most = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.most = max([self.most, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return out


def try_memory(group, place, size):
    count, width = 8, 64
    for case in CASES:
        arrays = part(whole(size, count, width, queued=count), place, size)
        with Watch() as watch:
            with_gradients(case, arrays, group)
        local = 2 * count * width  # the views of nt_xent, one matrix
        assert count * width <= watch.most <= local < size * count * width, (case, watch.most)


def expect(said, f):
    with pytest.raises(ContractError) as error:
        f()
    assert said in str(error.value), error.value


def try_refusals(group, place, size):
    """Every process says what is wrong, and the next call works."""
    a, b, *_ = part(whole(size), place, size)
    fewer = slice(0, 4 if place == 1 else 5)
    for case in ("nt_xent", "clip_loss", "sigmoid_loss", "info_nce with a queue"):
        arrays = part(whole(size), place, size)
        arrays = [x[fewer] if x.dim() else x for x in arrays]
        expect("their rows: ", partial(CASES[case], *arrays, group))
    expect("their keys: [7, 7, 6, 7]", lambda: info_nce(a, part(whole(size), place, size)[2][: 7 - (place == 2)],
                                                        temperature=1.0, group=group))  # fmt: skip
    expect(
        "their width: [6, 6, 6, 5]", lambda: clip_loss(*(x[:, : 6 - (place == 3)] for x in (a, b)), 1.0, group=group)
    )
    expect(
        "their type: ['torch.float32', 'torch.float64', ",
        lambda: clip_loss(*(x.float() if place == 0 else x for x in (a, b)), 1.0, group=group),
    )
    expect("learned", lambda: clip_loss(a.clone().requires_grad_(place == 0), b, 1.0, group=group))
    text = b.clone().requires_grad_()
    loss = sigmoid_loss(a, text, 1.0, 0.0, group=group) * (1 + place)
    expect("the same weight, and they give it [1.0, 2.0, 3.0, 4.0]", loss.backward)
    try_equal("clip_loss", group, place, size)


def try_strangers(group, place, size):
    pair = dist.new_group([0, 1])
    if place < 2:
        try_equal("clip_loss", pair, place, 2)
    else:
        expect(
            f"this process, number {place} of all",
            lambda: clip_loss(torch.ones(3, 2), torch.ones(3, 2), 1.0, group=pair),
        )


def try_no_negatives(group, place, size):
    """Rows whose samples are of one kind, at home or everywhere."""
    arrays = whole(size)
    for ids in (torch.arange(size).repeat_interleave(5), torch.zeros(5 * size).long(), torch.arange(5 * size) // 2):
        arrays[4] = ids
        found, true = of_all("contrast", arrays, group, place, size), alone("contrast", arrays, size)
        assert max(off(found, true)) < 1e-10
        if not ids.any():
            assert not any(x.any() for x in found)


def try_frozen(group, place, size):
    """What is not learned needs no gradient, and to learn nothing is no error."""
    a, b, *_ = part(whole(size), place, size)
    everything = whole(size)
    one = b.clone().requires_grad_()
    (found,) = torch.autograd.grad(clip_loss(a, one, 5.0, group=group), one)
    every = everything[1].requires_grad_()
    (true,) = torch.autograd.grad(clip_loss(everything[0], every, 5.0), every)
    assert off([found / size], [true.chunk(size)[place]])[0] < 1e-10
    for case in CASES:
        true = alone(case, whole(size), size)[0]
        arrays = part(whole(size), place, size)
        for learned in (False, True):
            arrays[0].requires_grad_(learned)
            with torch.no_grad():
                loss = CASES[case](*arrays, group)
            assert off([mean_over(group, loss, size)], [true])[0] < 1e-10


def try_compiled(group, place, size):
    """The ring is not traced, and what is around it may be."""

    def step(x, y):
        return clip_loss(x * 2, y, 5.0, group=group) * 3  # fmt: skip

    a, b, *_ = part(whole(size), place, size)
    torch.testing.assert_close(torch.compile(step, backend="eager")(a, b), step(a, b), rtol=1e-12, atol=0)


def try_everywhere(group, place, size):
    a, b, _, _, ids, *_ = part(whole(size), place, size)
    for got, want in zip(
        contrast_everywhere(a, b, ids, temperature=0.1),
        contrast_among(a, b, ids, temperature=0.1, group=group),
        strict=True,
    ):
        assert torch.equal(got, want)


TOGETHER = {
    name: f
    for name, f in globals().items()
    if name.startswith("try_") and name not in ("try_equal", "try_low_precision")
}


def program(place, folder):
    """All of it, as process `place` of WORLD; what failed is written to the folder."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=place, world_size=WORLD, timeout=SHORT)
    groups = {size: dist.new_group(list(range(size)), timeout=SHORT) for size in SIZES}
    plan = {}
    for case in CASES:
        plan |= {f"{case} {size}": (size, partial(try_equal, case)) for size in SIZES}
        plan[f"{case} low"] = (WORLD, partial(try_low_precision, case))
    plan |= {name: (2 if f is try_compiled else WORLD, f) for name, f in TOGETHER.items()}  # to compile is slow
    failed = {}
    for name, (size, f) in plan.items():
        if place < size:
            try:
                f(groups[size], place, size)
            except BaseException:  # what pytest.raises missed is no Exception
                failed[name] = traceback.format_exc()
    (Path(folder) / f"{place}.json").write_text(json.dumps(failed))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """failures(name): what each process said that failed in it."""
    folder = tmp_path_factory.mktemp("ring")
    processes = [Forked([sys.executable, __file__, place, folder]) for place in range(WORLD)]
    try:
        said = ["".join(process.communicate(timeout=PATIENCE)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(said)
    found = [json.loads((folder / f"{place}.json").read_text()) for place in range(WORLD)]
    return lambda name: [f"process {place}:\n{failed[name]}" for place, failed in enumerate(found) if name in failed]


@every_size
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_process(failures, case, size):
    assert failures(f"{case} {size}") == []


@pytest.mark.parametrize("case", CASES)
def test_low_precision_is_no_worse_than_one_processs(failures, case):
    assert failures(f"{case} low") == []


@pytest.mark.parametrize("name", TOGETHER)
def test_together(failures, name):
    assert failures(name) == []


def test_without_processes_a_group_is_this_one():
    assert dist.group.WORLD is None
    a, b, _, _, ids, *_ = whole(1)
    losses, near = contrast_everywhere(a, b, ids, temperature=0.1)
    expected = contrast(a, b, a, ids, ids, temperature=0.1)
    assert torch.equal(losses, expected[0])
    assert torch.equal(near, expected[1])
    assert contrast_ring.size_of(None) == 1


if __name__ == "__main__":
    warnings.simplefilter("error")
    program(int(sys.argv[1]), sys.argv[2])
