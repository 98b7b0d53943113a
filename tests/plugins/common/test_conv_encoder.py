"""The stem against transformers' on whole utterances, and against itself, alone, on padded ones."""

import pytest
import torch
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

from selfsup.kernel.contracts import Signal
from selfsup.kernel.errors import ConfigError, ContractError
from selfsup.plugins.common.conv_encoder import LAYERS, ConvEncoder, frames, receptive_field

SMALL = ((24, 10, 5), (16, 3, 2), (20, 3, 2), (16, 2, 2))
KINDS = pytest.mark.parametrize(("norm", "bias"), [("group", False), ("layer", True), ("layer", False)])


def pair(norm, bias):
    """Our encoder and transformers', with the same weights."""
    torch.manual_seed(0)
    ours = ConvEncoder(32, SMALL, norm, bias)
    channels, kernels, strides = map(list, zip(*SMALL, strict=True))
    theirs = Wav2Vec2FeatureEncoder(
        Wav2Vec2Config(
            conv_dim=channels, conv_kernel=kernels, conv_stride=strides, feat_extract_norm=norm, conv_bias=bias
        )
    )
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(dict(ours.named_parameters())[rename(name, norm)])
    return ours, theirs


def rename(name, norm):
    """Our name of transformers' parameter."""
    name = name.replace("conv_layers", "convs").replace("layer_norm", "norm")
    if norm == "group":
        swaps = {"convs.0.conv.weight": "weight", "convs.0.norm.weight": "scale", "convs.0.norm.bias": "shift"}
        return f"convs.0.{swaps[name]}" if name in swaps else name
    return name


def waves(lengths):
    """Smooth noise with an offset: neighbouring samples are much alike, as in speech."""
    torch.manual_seed(1)
    x = 0.3 + 0.01 * torch.randn(len(lengths), max(lengths)).cumsum(1)
    segments = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).int()
    return x * segments, segments


def test_frame_counts_are_those_of_the_paper():
    assert receptive_field(LAYERS) == 400
    assert [frames(n, LAYERS) for n in (0, 399, 400, 719, 720, 16000, 250000)] == [0, 0, 1, 1, 2, 49, 781]
    assert frames(torch.tensor([0, 400, 16000]), LAYERS).tolist() == [0, 1, 49]


@KINDS
def test_values_and_gradients_equal_transformers_on_whole_utterances(norm, bias):
    ours, theirs = pair(norm, bias)
    x, _ = waves([4003, 4003, 4003])
    y, z = ours.latents(Signal(x)).x, theirs(x).transpose(1, 2)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(y)
    y.backward(g)
    z.backward(g)
    grads = {name: p.grad for name, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        error = (grads[rename(name, norm)] - p.grad).norm() / p.grad.norm()
        assert error < 2e-4, f"{name}: {error}"


@KINDS
def test_padding_changes_no_utterance(norm, bias):
    ours, _ = pair(norm, bias)
    lengths = [4003, 2500, 997, receptive_field(SMALL)]
    x, segments = waves(lengths)
    together = ours(Signal(x, segments))
    assert together.segments.sum(1).tolist() == [frames(n, SMALL) for n in lengths]
    for i, n in enumerate(lengths):
        alone = ours(Signal(x[i : i + 1, :n]))
        torch.testing.assert_close(together.x[i, : alone.x.shape[1]], alone.x[0], rtol=1e-4, atol=2e-5)


def test_padding_changes_transformers_features_of_base():
    """Why ours are not equal to theirs on padded batches: their statistics count the padding."""
    _, theirs = pair("group", False)
    lengths = [4003, 2000]
    x, _ = waves(lengths)
    batched, alone = theirs(x)[1], theirs(x[1:, : lengths[1]])[0]
    difference = (batched[:, : alone.shape[1]] - alone).abs().max()
    assert difference > 0.1 * alone.abs().max()


@KINDS
def test_what_lies_in_the_padding_reaches_neither_features_nor_gradients(norm, bias):
    ours, _ = pair(norm, bias)
    x, segments = waves([3000, 1703, 1000])

    def features(noise):
        ours.zero_grad()
        out = ours.latents(Signal(x + noise * (1 - segments) * torch.randn_like(x), segments))
        real = out.x * out.segments[..., None]
        real.square().sum().backward()
        return [real.detach(), *(p.grad.clone() for p in ours.convs.parameters())]

    for quiet, loud in zip(features(0.0), features(100.0), strict=True):
        torch.testing.assert_close(loud, quiet, rtol=1e-3, atol=1e-4 * float(quiet.abs().max()))


def test_silence_and_clips_shorter_than_a_frame_stay_finite():
    ours = ConvEncoder(8, SMALL)
    segments = (torch.arange(500) < torch.tensor([[500], [3]])).int()
    out = ours(Signal(torch.zeros(2, 500), segments))
    assert out.segments[1].sum() == 0
    out.x.sum().backward()
    assert torch.isfinite(out.x).all()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


def test_bf16_autocast_is_near():
    ours, _ = pair("group", False)
    x, segments = waves([3000, 2000])
    with torch.autocast("cpu", torch.bfloat16):
        low = ours.latents(Signal(x, segments)).x
    high = ours.latents(Signal(x, segments)).x
    assert low.dtype == torch.bfloat16
    assert (low - high).norm() < 0.05 * high.norm()


def test_sizes():
    stem = ConvEncoder(64)
    assert (stem.width, stem.size, stem.discrete) == (512, 320, False)
    assert stem(Signal(torch.randn(2, 800))).x.shape == (2, 2, 64)
    weights = stem.convs[1].conv.weight  # Kaiming: variance 2 / (512 channels * 3 taps)
    assert weights.var().item() == pytest.approx(2 / (512 * 3), rel=0.02)


def test_messages():
    with pytest.raises(ConfigError, match=r"layers lists \[channels, kernel, stride\]"):
        ConvEncoder(8, [(16, 3)])
    with pytest.raises(ContractError, match="100 samples make no frame: one frame sees 400 samples"):
        ConvEncoder(8)(Signal(torch.zeros(1, 100)))
