"""augment: equal to the reference, sample by sample, in every order and shape, and to Pillow, kornia and colorsys."""

from __future__ import annotations

import mmap
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.kernel.errors import ContractError
from selfsup.triton_ops._launch import INTERPRETED, can_launch
from selfsup.triton_ops.augment import AugmentPlan, augment, augment_reference

ORDERS = torch.tensor(list(permutations(range(4))))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = [  # channels, height, width, size, blur
    (3, 28, 28, 24, 3),
    (1, 32, 33, 31, 5),
    (3, 33, 96, 64, 3),
    (3, 96, 80, 32, 3),
    (1, 24, 24, 33, 9),
    (3, 3, 4, 1, 1),
    (3, 2, 1, 3, 5),
]
EVERYTHING = {"flip", "jitter", "greyed", "sigma", "solarized"}


def photos(count, channels, height, width, seed=0):
    """Noise, in memory column by column: [B, C, H, W] uint8."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, width, channels, height), generator=g, dtype=torch.uint8).permute(0, 2, 3, 1)


def planned(count, height, width, parts=EVERYTHING, seed=0, share=0.6):
    """A plan in which each of the parts happens to about `share` of the samples."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(16, count, generator=g, dtype=torch.float64)
    sides = torch.stack([height * (0.3 + 0.7 * u[0]), width * (0.3 + 0.7 * u[1])], 1)
    start = torch.stack([u[2], u[3]], 1) * (torch.tensor([height, width]) - sides)
    order = torch.where(u[4, :, None] < share, ORDERS[torch.randint(24, (count,), generator=g)], -1)
    factors = torch.stack([0.2 + 1.6 * u[5], 0.2 + 1.6 * u[6], 0.2 + 1.6 * u[7], u[8] - 0.5], 1)
    return AugmentPlan(
        torch.cat([start, sides], 1).float(),
        u[9] < share if "flip" in parts else None,
        order if "jitter" in parts else None,
        factors.float() if "jitter" in parts else None,
        u[10] < share / 2 if "greyed" in parts else None,
        torch.where(u[11] < share, 0.1 + 1.9 * u[12], 0).float() if "sigma" in parts else None,
        u[13] < share if "solarized" in parts else None,
    )


def whole(count, side):
    """The whole of square images in their own resolution."""
    return torch.tensor([[0.0, 0.0, side, side]]).repeat(count, 1)


def on(device, plan):
    return AugmentPlan(*(None if part is None else part.to(device) for part in plan))


def in_float64(plan):
    return AugmentPlan(*(part.double() if part is not None and part.is_floating_point() else part for part in plan))


def views(device, images, plan, size, *normal, **options):
    """The op's, brought back."""
    return augment(images.to(device), on(device, plan), size, *normal, **options).cpu()


def truth(images, plan, size, *normal, **options):
    return augment_reference(images, in_float64(plan), size, *normal, **options, dtype=torch.float64)


def close(got, want, atol=1e-5):
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


CASES = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[0], torch.bfloat16), (SHAPES[1], torch.float16)]


@pytest.mark.parametrize(("shape", "kind"), CASES, ids=str)
def test_it_is_as_exact_as_the_reference(device, as_exact_as_torch, shape, kind):
    channels, height, width, size, blur = shape
    options = (size, MEAN[:channels], STD[:channels])

    def draw(seed):
        plan = planned(2, height, width, seed=seed + 2, share=0.8)
        return (photos(2, channels, height, width, seed).to(device), *on(device, plan))

    def of(f):
        return lambda images, *plan: f(
            images,
            AugmentPlan(*plan),
            *options,
            blur=blur,
            dtype=torch.float64 if plan[0].dtype == torch.float64 else kind,
        )

    # Triton's interpreter does not round to the nearest bfloat16 but towards zero.
    cut = INTERPRETED and kind == torch.bfloat16
    as_exact_as_torch(of(augment), of(augment_reference), draw, slack=4e-3 if cut else 1e-6, seeds=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_float64_it_equals_the_reference(shape):
    channels, height, width, size, blur = shape
    images, plan = photos(48, channels, height, width), in_float64(planned(48, height, width))
    options = {"blur": blur, "dtype": torch.float64}
    got = augment(images, plan, size, MEAN[:channels], STD[:channels], **options)
    want = augment_reference(images, plan, size, MEAN[:channels], STD[:channels], **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("part", "channels"), [*((part, 3) for part in sorted(EVERYTHING)), ("jitter", 1), ("greyed", 1)]
)
def test_each_part_alone_and_who_needs_nothing_is_only_resized(device, part, channels):
    images, plan = photos(3, channels, 30, 26), planned(3, 30, 26, {part}, seed=3)
    got = views(device, images, plan, 20, blur=3)
    close(got, truth(images, plan, 20, blur=3))
    resized = views(device, images, AugmentPlan(plan.box), 20)
    idle = (plan.order[:, 0] < 0) if part == "jitter" else ~getattr(plan, part).bool()
    assert 0 < idle.sum() < 3
    assert torch.equal(got[idle], resized[idle])
    if part != "greyed" or channels == 3:
        assert ((got - resized).flatten(1).abs().amax(1)[~idle] > 1e-3).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_each_distortion_of_the_jitter_alone(device, channels):
    images = photos(8, channels, 24, 24)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(8, 1)
    order = torch.full((8, 4), -1)
    for sample, factor in enumerate([0.4, 1.7, 0.0, 3.0, -0.3, 0.6, 0.2, -1.3]):
        factors[sample, sample // 2] = factor
        order[sample, sample % 4] = sample // 2
    plan = AugmentPlan(whole(8, 24), order=order, factors=factors)
    close(views(device, images, plan, 24), truth(images, plan, 24))


def test_all_orders_are_kept(device):
    images, plan = photos(1, 3, 20, 20).expand(24, -1, -1, -1), planned(1, 20, 20)
    plan = AugmentPlan(plan.box.expand(24, -1), order=ORDERS, factors=torch.tensor([[1.7, 1.6, 0.3, 0.15]] * 24))
    got = views(device, images, plan, 17)
    close(got, truth(images, plan, 17))
    assert len({tuple(view.flatten().tolist()) for view in got}) == 24


def test_orders_may_leave_out_some(device):
    order = [[-1, 2, -1, 0], [0, 1, 2, -1], [-1, -1, -1, 3], [1, -1, 3, -1], [3, -1, 1, 2], [-1, -1, -1, -1]]
    images = photos(6, 3, 20, 20)
    factors = torch.tensor([0.6, 1.6, 0.3, 0.15]).repeat(6, 1)
    plan = AugmentPlan(whole(6, 20), order=torch.tensor(order), factors=factors)
    close(views(device, images, plan, 20), truth(images, plan, 20))


def test_a_sample_does_not_depend_on_its_batch(device):
    images, plan = photos(4, 3, 30, 30), planned(4, 30, 30)
    together = views(device, images, plan, 20, MEAN, STD, blur=3)
    assert torch.equal(together, views(device, images, plan, 20, MEAN, STD, blur=3))
    for index in (slice(2, 3), [3, 0]):
        some = AugmentPlan(*(part[index] for part in plan))
        got = views(device, images[index], some, 20, MEAN, STD, blur=3)
        torch.testing.assert_close(got, together[index], rtol=0, atol=2e-6)


def test_how_images_lie_in_memory_does_not_matter(device):
    images, plan = photos(2, 3, 20, 22).to(device), on(device, planned(2, 20, 22, {"flip", "greyed"}))
    want = augment(images, plan, 16)
    wide = torch.empty(2, 20, 3, 44, dtype=torch.uint8, device=device).permute(0, 2, 1, 3)[..., ::2].copy_(images)
    for same in (images.contiguous(), images.contiguous(memory_format=torch.channels_last), wide):
        assert same.stride() != images.stride()
        assert torch.equal(augment(same, plan, 16), want)
    spread = AugmentPlan(*(None if p is None else torch.stack([p, p], -1)[..., 0] for p in plan))
    assert not spread.box.is_contiguous()
    assert torch.equal(augment(images, spread, 16), want)


FAR = 2**31 + 8


@pytest.mark.parametrize("strides", [(FAR, 4, 1, 2), (12, 4, 1, FAR // 2), (1, FAR // 2, 4, 2), (9, 3, FAR, 1)])
def test_offsets_pass_two_to_the_31(device, strides):
    size = sum(s * (n - 1) for s, n in zip(strides, (2, 3, 2, 3), strict=True)) + 1
    if device.type == "cuda":
        room = torch.empty(size, dtype=torch.uint8, device=device)
    else:
        room = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)  # pages that nobody touches take no memory
    images = room.as_strided((2, 3, 2, 3), strides).copy_(photos(2, 3, 2, 3).to(device))
    plan = on(device, planned(2, 2, 3, {"flip"}))
    assert torch.equal(augment(images, plan, 4), augment(images.contiguous(), plan, 4))


def test_it_never_waits(device, without_waiting):
    images, plan = photos(2, 3, 9, 9).to(device), on(device, planned(2, 9, 9))
    with without_waiting():
        found = augment(images, plan, 8, MEAN, STD, blur=3)
        exact = augment(images, plan, 8, MEAN, STD, blur=3, dtype=torch.float64)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)


BROKEN = {
    "box": [[2.0, 2, 8, 9], [0, -1, 3, 3], [0, 0, 0, 4], [0, 0, float("nan"), 4], [0, 0, 4, 1e30]],
    "order": [[0, 1, 2, 1], [4, 0, 1, 2], [-2, 0, 1, 2], [3, -1, -1, 3], [2**40, -1, -1, -1]],
    "sigma": [-1.0, float("nan"), -1e-9, float("-inf"), -3.0],
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_values_are_refused_or_make_no_number(device, name):
    plan = planned(6, 10, 10, {"jitter" if name == "order" else name}, share=1.0)
    values = torch.tensor(BROKEN[name], dtype=getattr(plan, name).dtype)
    plan = plan._replace(**{name: torch.cat([getattr(plan, name)[:1], values])})
    images = photos(6, 3, 10, 10)
    if can_launch(images.to(device)):
        got = views(device, images, plan, 8, blur=3)
        assert got[1:].isnan().all()
        first = AugmentPlan(*(None if p is None else p[:1] for p in plan))
        assert torch.equal(got[:1], views(device, images[:1], first, 8, blur=3))
    else:
        with pytest.raises(ContractError, match=r"that of sample 1 is"):
            augment(images, plan, 8, blur=3)


def test_a_box_may_touch_the_border_as_rounding_has_it(device):
    images, plan = photos(2, 3, 10, 10), AugmentPlan(torch.tensor([[-1e-5, 0, 10, 10.00001], [3, 3, 7.00001, 7]]))
    close(views(device, images, plan, 7), truth(images, plan, 7), atol=2e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_small_batches(device, count):
    images, plan = photos(count, 3, 9, 9), planned(count, 9, 9)
    got = views(device, images, plan, 8, blur=3)
    assert got.shape == (count, 3, 8, 8)
    assert got.isfinite().all()


def test_what_is_not_there_happens_to_nobody(device):
    images, plan = photos(2, 3, 12, 12), AugmentPlan(whole(2, 12))
    assert (views(device, images, plan, 12) * 255 - images).abs().max() < 1e-4
    flipped = views(device, images, plan._replace(flip=torch.tensor([True, False])), 12)
    assert (flipped * 255 - torch.stack([images[0].flip(-1), images[1]])).abs().max() < 1e-4
    normal = views(device, images, plan, 12, MEAN, STD)
    want = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(normal, want, rtol=0, atol=1e-5)


def test_a_level_that_is_no_number_stays_none(device):
    factors = torch.tensor([[float("nan"), 1, 1, 0], [0.5, 1, 1, 0]])
    order = torch.tensor([[0, -1, -1, -1]] * 2)
    images, plan = photos(2, 3, 8, 8), AugmentPlan(whole(2, 8), order=order, factors=factors)
    got = views(device, images, plan, 8)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 4),
    st.sampled_from([1, 3]),
    st.integers(0, 10**6),
)
def test_any_shape_and_plan(height, width, size, radius, channels, seed):
    blur = 2 * min(radius, size - 1) + 1
    images, plan = photos(3, channels, height, width, seed), planned(3, height, width, seed=seed)
    close(augment(images, plan, size, blur=blur), truth(images, plan, size, blur=blur), atol=5e-5)


def test_the_op_is_well_formed():
    images, plan = photos(3, 3, 9, 9), planned(3, 9, 9)
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    for given_plan, dtype in ((plan, torch.float32), (AugmentPlan(plan.box), torch.bfloat16)):
        arguments = (images, *given_plan, 8, list(MEAN), [], 3, dtype)
        torch.library.opcheck(torch.ops.selfsup.augment.default, arguments, test_utils=checks)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_it_compiles_whole_and_once():
    compiled = torch.compile(augment, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 2, 7, 11, 4):  # not first 3, which torch takes for the number of channels
        images, plan = photos(count, 3, 9, 9), planned(count, 9, 9)
        assert torch.equal(compiled(images, plan, 8, MEAN, STD, blur=3), augment(images, plan, 8, MEAN, STD, blur=3))


def test_autocast_changes_nothing():
    images, plan = photos(5, 3, 20, 20), planned(5, 20, 20)
    want = augment(images, plan, 16, blur=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images, plan, 16, blur=3), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors_have_shapes_alone(dtype):
    images, plan = photos(5, 3, 20, 20), planned(5, 20, 20)
    found = augment(images.to("meta"), on("meta", plan), 16, blur=3, dtype=dtype)
    assert (found.shape, found.dtype, found.device.type) == ((5, 3, 16, 16), dtype, "meta")


IMAGES, PLAN = photos(2, 3, 9, 9), planned(2, 9, 9)


@pytest.mark.parametrize(
    ("images", "plan", "options", "message"),
    [
        (IMAGES.float(), PLAN, {}, r"uint8 \[B, C, H, W\].*float32 \[2, 3, 9, 9\]"),
        (IMAGES[0], PLAN, {}, r"uint8 \[B, C, H, W\].*\[3, 9, 9\]"),
        (IMAGES[:, :2], PLAN, {}, r"1 or 3 channels.*\[2, 2, 9, 9\]"),
        (IMAGES[..., :0], PLAN, {}, r"\[2, 3, 9, 0\]"),
        (IMAGES[:1], PLAN, {}, r"box of a plan must be float \[1, 4\]"),
        (IMAGES, PLAN._replace(box=None), {}, "box for each sample"),
        (IMAGES, PLAN._replace(box=PLAN.box.long()), {}, "box of a plan must be float"),
        (IMAGES, PLAN._replace(flip=torch.zeros(2)), {}, "flip of a plan must be bool"),
        (IMAGES, PLAN._replace(order=PLAN.order.int()), {}, "order of a plan must be int64"),
        (IMAGES, PLAN._replace(factors=PLAN.factors[:, :3]), {}, r"factors of a plan must be float \[2, 4\]"),
        (IMAGES, PLAN._replace(factors=None), {}, "both order and factors"),
        (IMAGES, PLAN._replace(sigma=PLAN.sigma[:, None]), {}, r"sigma of a plan must be float \[2\]"),
        (IMAGES, PLAN._replace(greyed=PLAN.greyed.to("meta")), {}, "on cpu; it is .* on meta"),
        (IMAGES, PLAN, {"size": 0}, "size must be at least 1"),
        (IMAGES, PLAN, {"blur": 4}, "an odd number of pixels"),
        (IMAGES, PLAN, {"size": 2, "blur": 5}, "below 2 size; they are 2 and 5"),
        (IMAGES, PLAN, {"mean": (0.5,)}, "mean has a value for each of 3 channels"),
        (IMAGES, PLAN, {"std": (0.5,) * 4}, "std has a value for each of 3 channels"),
        (IMAGES, PLAN, {"std": (0.5, 0.0, 0.5)}, "each std is greater than 0"),
        (IMAGES, PLAN, {"dtype": torch.int32}, "torch.int32 was asked for"),
    ],
)
def test_what_does_not_fit_is_refused(images, plan, options, message):
    with pytest.raises(ContractError, match=message):
        augment(images, plan, **{"size": 8, "blur": 3, **options})
