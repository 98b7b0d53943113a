from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from selfsup.kernel.contracts import Signal
from selfsup.kernel.errors import ContractError
from selfsup.plugins.backbones.resnet import ResNet


def torchvision_names(depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's resnet18 and resnet50 but for `fc`, from their definition."""

    def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
        kinds = ("weight", "bias", "running_mean", "running_var")
        return {f"{name}.{kind}": (channels,) for kind in kinds} | {f"{name}.num_batches_tracked": ()}

    out = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    channels, grow = 64, 4 if depth == 50 else 1
    for layer, count in enumerate({18: [2, 2, 2, 2], 50: [3, 4, 6, 3]}[depth]):
        width = 64 * 2**layer
        for i in range(count):
            block = f"layer{layer + 1}.{i}"
            sizes = [(1, width), (3, width), (1, 4 * width)] if depth == 50 else [(3, width), (3, width)]
            before = channels
            for n, (kernel, after) in enumerate(sizes, 1):
                out |= {f"{block}.conv{n}.weight": (after, before, kernel, kernel)} | norm(f"{block}.bn{n}", after)
                before = after
            if i == 0 and (layer > 0 or depth == 50):
                out |= {f"{block}.downsample.0.weight": (grow * width, channels, 1, 1)}
                out |= norm(f"{block}.downsample.1", grow * width)
            channels = grow * width
    return out


@pytest.mark.parametrize(("depth", "width", "parameters"), [(18, 512, 11_176_512), (50, 2048, 23_508_032)])
def test_names_and_shapes_are_torchvisions(depth: int, width: int, parameters: int) -> None:
    backbone = ResNet(depth=depth)
    assert {name: tuple(value.shape) for name, value in backbone.state_dict().items()} == torchvision_names(depth)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert backbone.width == width
    assert backbone.wants_raw


def reference(depth: int) -> tuple[nn.Module, nn.Module]:
    """Our model and transformers', with the same random weights and statistics."""
    kind, widths = ("basic", [64, 128, 256, 512]) if depth == 18 else ("bottleneck", [256, 512, 1024, 2048])
    depths = [2, 2, 2, 2] if depth == 18 else [3, 4, 6, 3]
    config = transformers.ResNetConfig(embedding_size=64, hidden_sizes=widths, depths=depths, layer_type=kind)
    theirs, ours = transformers.ResNetModel(config), ResNet(depth=depth)
    # Both list a block's convolutions and norms in order, but they its shortcut first and we last.
    mine = ours.state_dict()
    other = dict(theirs.state_dict())
    names = [n for n in mine if "downsample" not in n]
    plain = [n for n in other if "shortcut" not in n]
    names += [n for n in mine if "downsample" in n]
    plain += [n for n in other if "shortcut" in n]
    for name, value in zip(names, (other[n] for n in plain), strict=True):
        value = torch.rand_like(value) + 0.5 if value.is_floating_point() and value.dim() == 1 else value
        mine[name], other[plain[names.index(name)]] = value.clone(), value
    ours.load_state_dict(mine)
    theirs.load_state_dict(other)
    return ours, theirs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("depth", [18, 50])
def test_outputs_and_gradients_equal_transformers(depth: int, training: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = (m.train(training) for m in reference(depth))
    x = torch.randn(2, 3, 64, 64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = ours(Signal(a)).x
    want: Tensor = theirs(b).last_hidden_state
    assert got.shape == (2, 4, ours.width)
    torch.testing.assert_close(
        got, want.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4 * float(want.detach().abs().max())
    )
    probe = torch.randn_like(want)
    (got * probe.flatten(2).transpose(1, 2)).sum().backward()
    (want * probe).sum().backward()
    assert (a.grad - b.grad).norm() < 1e-3 * b.grad.norm()
    theirs_first = theirs.embedder.embedder.convolution.weight.grad
    assert (ours.conv1.weight.grad - theirs_first).norm() < 1e-3 * theirs_first.norm()


def test_small_stem_keeps_small_images() -> None:
    backbone = ResNet(depth=18, small=True, channels=1)
    out = backbone(Signal(torch.rand(2, 1, 32, 32)))
    assert backbone.conv1.weight.shape == (64, 1, 3, 3)
    assert out.x.shape == (2, 16, 512)
    assert out.mean().shape == (2, 512)


def test_zero_init_residual_starts_blocks_as_their_shortcuts() -> None:
    torch.manual_seed(0)
    for depth in (18, 50):
        backbone = ResNet(depth=depth, zero_init_residual=True).eval()
        x = torch.randn(1, backbone.layer1[1].conv1.in_channels, 8, 8)
        torch.testing.assert_close(backbone.layer1[1](x), x.relu())
        block = ResNet(depth=depth).eval().layer1[1]
        assert (block(x) - x.relu()).abs().max() > 0.1


def test_convolutions_start_from_he_fan_out() -> None:
    torch.manual_seed(0)
    backbone = ResNet(depth=18)
    assert abs(backbone.layer4[0].conv1.weight.std() / (2 / (512 * 9)) ** 0.5 - 1) < 0.01


def test_what_does_not_fit_is_a_contract_error() -> None:
    backbone = ResNet(depth=18)
    image = torch.rand(1, 3, 32, 32)
    for x in ((image * 255).byte(), image[:, :1], image[0]):
        with pytest.raises(ContractError, match=r"float images \[batch, 3, height, width\]; it got torch"):
            backbone(Signal(x))
    with pytest.raises(ContractError, match="no causal form"):
        backbone(Signal(image), causal=True)
