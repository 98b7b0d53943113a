"""The image modality: views that depend on nothing but their sample, and a stem that is a convolution."""

from __future__ import annotations

import builtins
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from kornia.filters import gaussian_blur2d
from PIL import Image as pillow

from selfsup.kernel.config import check, schema
from selfsup.kernel.contracts import Signal
from selfsup.kernel.errors import ConfigError, ContractError, DataError
from selfsup.kernel.random import Stream, stream, tag
from selfsup.plugins.common.random_crop import crop_boxes
from selfsup.plugins.modalities.image import Image

EXTENT = (0.08, 1.0)


def draw(ids: Any, purpose: str = "view") -> Stream:
    return stream(0, purpose, torch.as_tensor(ids))


def photos(modality: Image, count: int = 8) -> Signal:
    """Noisy photos of different shapes."""
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(20, 90, (count, 2))]
    return modality.collate([modality.read(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes])


def part(raw: Signal, index: Any) -> Signal:
    return Signal(raw.x[index], positions=raw.positions[index])


def test_collate_keeps_the_shapes_of_the_photos() -> None:
    modality = Image(size=32)
    raws = [modality.read(np.full((h, w, 3), level, np.uint8)) for h, w, level in ((10, 20, 0), (30, 7, 255))]
    batch = modality.collate(raws)
    assert batch.x.shape == (2, 3, 32, 32)
    assert batch.x.dtype == torch.uint8
    assert batch.positions.tolist() == [[10, 20], [30, 7]]
    assert (batch.x[0] == 0).all()
    assert (batch.x[1] == 255).all()


@pytest.mark.parametrize(("size", "canvas"), [(224, 256), (96, 110), (64, 73), (32, 32), (28, 28)])
def test_default_canvas(size: int, canvas: int) -> None:
    assert Image(size=size, patch=1).canvas == canvas
    assert Image(size=size, patch=1, canvas=300).canvas == 300


@pytest.mark.parametrize("size", [32, 64])
def test_a_view_depends_on_its_sample_alone(size: int) -> None:
    """Whatever the batch and its order: bit for bit, but for the blur's matrix products."""
    modality = Image(size=size, solarize_chance=0.3)
    raw = photos(modality, 24)
    ids = tag(torch.tensor(3), torch.arange(100, 124))
    whole = modality.view(raw, EXTENT, draw(ids)).x
    assert whole.shape == (24, 3, size, size)
    assert whole.dtype == torch.float32
    assert torch.equal(whole, modality.view(raw, EXTENT, draw(ids)).x)
    for index in (slice(0, 7), slice(7, 24), [23, 4, 11], [5]):
        some = modality.view(part(raw, index), EXTENT, draw(ids[index])).x
        torch.testing.assert_close(some, whole[index], rtol=0, atol=1e-6)


def test_views_differ_by_sample_purpose_and_epoch() -> None:
    modality = Image(size=32)
    one = photos(modality, 1)
    raw = Signal(one.x.expand(4, -1, -1, -1), positions=one.positions.expand(4, -1))
    ids = [*(tag(0, i) for i in range(3)), tag(1, 0)]
    views = [*modality.view(raw, EXTENT, draw(ids)).x, modality.view(one, EXTENT, draw(ids[:1], "other")).x[0]]
    for i, a in enumerate(views):
        assert all((a - b).abs().mean() > 0.01 for b in views[:i])


def test_no_value_is_read_back_from_the_device() -> None:
    """A meta tensor has no values: any wait for the host, and any shape that depends on a draw, is an error."""
    modality = Image(size=224, solarize_chance=0.3, mean=(0.5,) * 3, std=(0.2,) * 3)
    raw = Signal(torch.zeros(5, 3, 256, 256, dtype=torch.uint8), positions=torch.ones(5, 2, dtype=torch.long))
    raw = raw.to("meta")
    view = modality.view(raw, EXTENT, stream(0, "view", torch.arange(5).to("meta")))
    assert view.x.shape == (5, 3, 224, 224)
    assert modality.plain(raw).x.shape == (5, 3, 224, 224)
    assert modality.stem(8).to("meta")(view).x.shape == (5, 196, 8)


def test_without_strength_a_view_is_a_crop() -> None:
    """Pillow's crop of the photo, where the canvas has the photo's own pixels."""
    modality = Image(size=32, canvas=48)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (6, 48, 48, 3), dtype=np.uint8)
    raw = modality.collate([modality.read(image) for image in images])
    views = modality.view(raw, EXTENT, draw(range(6)), strength=0.0).x
    u = draw(range(6)).uniform(54)
    boxes = crop_boxes(*raw.positions.unbind(1), EXTENT, u[:, :40].reshape(-1, 4, 10)).tolist()
    assert 0 < (u[:, 40] < 0.5).sum() < 6
    for image, (top, left, height, width), flip, view in zip(images, boxes, u[:, 40] < 0.5, views, strict=True):
        box = (left, top, left + width, top + height)
        expected = pillow.fromarray(image).resize((32, 32), pillow.Resampling.BILINEAR, box=box, reducing_gap=None)
        expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        expected = expected.flip(-1) if flip else expected
        assert (view * 255 - expected).abs().max() <= 1.01


def test_crops_keep_the_aspect_ratio_of_the_photo() -> None:
    """A circle on a photo twice as wide as high is squashed on the canvas, and round again in a view."""
    down, across = np.mgrid[0:100, 0:200]
    disc = (((down - 50) ** 2 + (across - 100) ** 2) < 40**2).astype(np.uint8) * 255
    modality = Image(size=64, canvas=96, channels=1)
    raw = modality.collate([modality.read(disc)])
    share = (raw.x > 127).float().mean((1, 2, 3))
    torch.testing.assert_close(share, torch.tensor([3.1416 * 1600 / 20000]), rtol=0, atol=0.01)
    plain = modality.plain(raw).x[0, 0] > 0.5  # the middle 87.5 x 87.5 pixels
    high, wide = plain.any(1).sum(), plain.any(0).sum()
    assert abs(int(high) - int(wide)) <= 1
    assert abs(int(high) - 64 * 80 / 87.5) <= 2


def test_chances_are_met() -> None:
    """Grey, flips, jitter, blur and solarisation happen as often as asked."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16] = (200, 40, 90)
    count = 600

    def views(**options: Any) -> torch.Tensor:
        quiet = {"jitter_chance": 0.0, "grey_chance": 0.0, "flip_chance": 0.0, "blur_chance": 0.0}
        modality = Image(size=32, **{**quiet, **options})
        raw = modality.collate([modality.read(pixels)] * count)
        return modality.view(raw, (1.0, 1.0), draw(range(count))).x

    still = views()
    assert (still == still[0]).all()
    for options in ({"jitter_chance": 0.8}, {"flip_chance": 0.5}, {"grey_chance": 0.2}, {"blur_chance": 0.5}):
        changed = (views(**options) - still).flatten(1).abs().amax(1) > 1e-3
        expected = next(iter(options.values()))
        # Blurs with a small sigma change nothing: with a kernel of 3, below about 0.27 of 0.1 to 2.0.
        assert abs(changed.float().mean() - expected) < 0.08
    assert abs((views(solarize_chance=0.3)[:, 0, 0, 0] < 0.5).float().mean() - 0.3) < 0.06


def test_choices_are_independent() -> None:
    modality = Image(size=32, jitter_chance=0.5, grey_chance=0.5, solarize_chance=0.5)
    count = 5000
    plan = modality._plan(Signal(torch.zeros(count, 3, 8, 8)), EXTENT, draw(range(count)), 1.0)
    jittered, blurred = plan.order[:, 0] >= 0, plan.sigma > 0
    choices = torch.stack(
        [c.float() for c in (plan.flip, jittered, plan.greyed, blurred, plan.solarized, *plan.factors.T, *plan.box.T)]
    )
    related = torch.corrcoef(choices) - torch.eye(len(choices))
    related[-4:, -4:] = 0  # where a crop is depends on how large it is
    assert related.abs().max() < 0.06
    firsts = plan.order[jittered, 0].bincount(minlength=4) / jittered.sum()
    assert ((firsts - 0.25).abs() < 0.03).all()
    assert (torch.corrcoef(torch.stack([plan.sigma[blurred], plan.factors[blurred, 0]]))[0, 1]).abs() < 0.06


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (96, 9), (224, 23)])
def test_blur_spans_a_tenth_of_the_view(size: int, kernel: int) -> None:
    modality = Image(size=size, jitter_chance=0.0, grey_chance=0.0, blur_chance=1.0, blur_sigma=(1.9, 2.0))
    raw = photos(modality, 2)
    sharp = modality.view(raw, EXTENT, draw(range(2)), 0.0).x
    sigma = 1.9 + 0.1 * draw(range(2)).uniform(54)[:, 50, None].expand(-1, 2)
    expected = gaussian_blur2d(sharp, (kernel, kernel), sigma, border_type="reflect")
    torch.testing.assert_close(modality.view(raw, EXTENT, draw(range(2))).x, expected, rtol=0, atol=2e-4)


def test_strength_scales_the_jitter() -> None:
    modality = Image(size=32, jitter_chance=1.0, grey_chance=0.0, blur_chance=0.0)
    raw = photos(modality, 32)
    plain = modality.view(raw, EXTENT, draw(range(32)), 0.0).x
    off = [(modality.view(raw, EXTENT, draw(range(32)), s).x - plain).abs().mean() for s in (0.01, 0.5, 1.0)]
    assert off[0] < 0.02 < off[1] < off[2]


def test_values_are_shares_of_white_unless_normalised() -> None:
    raw = photos(Image(size=32), 16)
    view = Image(size=32).view(raw, EXTENT, draw(range(16))).x
    assert view.min() >= 0
    assert view.max() <= 1 + 1e-6
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    modality = Image(size=32, mean=mean, std=std)
    shift, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    torch.testing.assert_close(modality.view(raw, EXTENT, draw(range(16))).x, (view - shift) / scale)
    torch.testing.assert_close(modality.plain(raw).x, (Image(size=32).plain(raw).x - shift) / scale)


def test_a_grey_view_is_normalised_channel_by_channel() -> None:
    """Also where every sample of a chunk is grey, and what follows works in place."""
    options = {"size": 40, "patch": 8, "grey_chance": 1.0, "solarize_chance": 0.5}
    raw = photos(Image(size=40, patch=8), 12)
    grey = Image(**options).view(raw, EXTENT, draw(range(12))).x
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    normal = Image(**options, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)).view(raw, EXTENT, draw(range(12))).x
    for channel in range(3):
        torch.testing.assert_close(normal[:, channel] * (channel + 1) + 0.1 * (channel + 1), grey[:, channel])


def test_autocast_does_not_coarsen_views() -> None:
    modality = Image(size=40, patch=8)
    raw = photos(modality)
    expected = modality.view(raw, EXTENT, draw(range(8))).x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(modality.view(raw, EXTENT, draw(range(8))).x, expected)


def test_plain_is_resize_and_centre_crop() -> None:
    """256 and 224, in small: a square photo of the canvas's own size against Pillow."""
    modality = Image(size=56, canvas=64, patch=8)
    image = np.asarray(pillow.effect_noise((64, 64), 60))
    raw = modality.collate([modality.read(image)])
    expected = torch.from_numpy(image[4:60, 4:60].copy())
    assert (modality.plain(raw).x[0] * 255 - expected).abs().max() <= 0.01
    small = Image(size=32, patch=8)
    raw = photos(small, 3)
    torch.testing.assert_close(small.plain(raw).x, raw.x / 255, rtol=0, atol=1e-6)


def test_a_signal_without_shapes_is_square() -> None:
    modality = Image(size=32)
    x = photos(modality, 3).x
    square = Signal(x, positions=torch.full((3, 2), 32))
    views = [modality.view(raw, EXTENT, draw(range(3))).x for raw in (Signal(x), square)]
    assert torch.equal(*views)
    assert torch.equal(modality.plain(Signal(x)).x, modality.plain(square).x)


@pytest.mark.parametrize("channels", [1, 3])
def test_stem_is_a_convolution(channels: int) -> None:
    stem = Image(size=32, patch=8, channels=channels).stem(24)
    nn = torch.nn.Conv2d(channels, 24, 8, stride=8)
    with torch.no_grad():
        nn.weight.copy_(stem.embed.weight.reshape(24, 8, 8, channels).permute(0, 3, 1, 2))
        nn.bias.copy_(torch.randn(24))
        stem.embed.bias.copy_(nn.bias)
    x = torch.rand(2, channels, 32, 48)
    tokens = stem(Signal(x))
    torch.testing.assert_close(tokens.x, nn(x).flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
    assert tokens.positions.shape == (2, 24, 2)
    assert tokens.positions[1, 7].tolist() == [1, 1]  # six patches a row
    assert (stem.width, stem.size, stem.discrete) == (24, 64 * channels, False)


def test_targets_are_pixels_by_row_column_and_channel() -> None:
    stem = Image(size=8, patch=4).stem(4)
    x = torch.rand(1, 3, 8, 8)
    targets = stem.targets(Signal(x))
    assert targets.shape == (1, 4, 48)
    for row, column, channel in ((0, 0, 0), (1, 2, 1), (3, 3, 2)):
        assert targets[0, 2, (row * 4 + column) * 3 + channel] == x[0, channel, 4 + row, column]


@pytest.mark.parametrize(
    "x", [torch.rand(1, 3, 30, 32), torch.rand(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)]
)
def test_stem_refuses_what_is_no_view(x: torch.Tensor) -> None:
    with pytest.raises(ContractError, match="float views of 3 channels whose sides are multiples of 16"):
        Image(size=32).stem(8)(Signal(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100}, "patch = 16 does not divide size = 100"),
        ({"canvas": 200}, "canvas = 200 is smaller than size = 224"),
        ({"channels": 2}, "channels = 2: it is 3 .RGB. or 1 .grey."),
        (
            {"mean": (0.5,)},
            "mean = .* does not have channels = 3 values; .*, or --set modality.mean=none",
        ),
        ({"std": (0.5, 0.0, 0.5)}, "std = .*: each is greater than 0"),
        ({"jitter": (0.8, -0.1, 0.8, 0.2)}, "jitter = .*: each strength is at least 0"),
        ({"blur_sigma": (2.0, 0.1)}, "blur_sigma = .*: least, then largest"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"modality.{message}"):
        Image(**options)


def test_options_are_a_schema() -> None:
    assert check("modality", Image, {"mean": [0.5, 0.5, 0.5]})["mean"] == (0.5, 0.5, 0.5)
    assert check("modality", Image, {})["jitter"] == (0.8, 0.8, 0.8, 0.2)
    assert all(field.description for field in schema(Image).model_fields.values())
    with pytest.raises(ConfigError, match=r"modality\.grey_chance"):
        check("modality", Image, {"grey_chance": 1.5})


def test_pickles() -> None:
    modality = pickle.loads(pickle.dumps(Image(size=32)))
    assert modality.read(np.zeros((5, 5), np.uint8)).pixels.shape == (3, 32, 32)


def test_sample() -> None:
    modality = Image(size=32)
    samples = modality.sample()
    assert len(samples) == 1797
    assert {s["label"] for s in samples} == set(range(10))
    photo = modality.read(samples[0]["image"])
    assert photo.size == (8, 8)
    assert photo.pixels.max() > 200


def test_sample_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(DataError, match=r"pip install 'selfsup\[eval\]'"):
        Image().sample()


@pytest.mark.parametrize("channels", [1, 3])
def test_people_see_views_as_they_were_before_mean_and_deviation(channels: int) -> None:
    modality = Image(size=8, patch=8, channels=channels, mean=(0.4,) * channels, std=(0.2,) * channels)
    stored = [np.full((8, 8, 3), level, np.uint8) for level in (0, 100, 255)]
    raw = modality.collate([modality.read(array) for array in stored])
    for signal in (raw, modality.plain(raw)):
        shown = modality.show(signal)
        assert [picture.shape for picture in shown] == [(8, 8, 3)] * 3
        for picture, array in zip(shown, stored, strict=True):
            assert picture.dtype == np.uint8
            np.testing.assert_array_equal(picture, array)


def test_people_see_canvases_in_the_shape_of_their_photos() -> None:
    modality = Image(size=32)
    photo = np.zeros((40, 20, 3), np.uint8)
    photo[20:] = (255, 0, 0)
    (shown,) = modality.show(modality.collate([modality.read(photo)]))
    assert shown.shape == (32, 16, 3)
    assert shown[:14].max() == 0
    assert (shown[18:] == (255, 0, 0)).all()
