"""ResNet (He et al. 2015, "Deep residual learning", https://arxiv.org/abs/1512.03385), for images.

    x <- relu(f(x) + shortcut(x)),  f = two 3x3 convolutions (18) or 1x1, 3x3, 1x1 (50), batch-normed

A stage halves the image in the 3x3 convolution of its first block (the "v1.5" that torchvision and the
self-supervised papers train), and its shortcut there is a 1x1 convolution. Names and shapes of the
parameters are torchvision's, without its classifier `fc`, so checkpoints go both ways. `small` is
CIFAR's stem, as in SimCLR's appendix B.9: a 3x3 convolution of stride 1 and no pooling.

Shapes: B batch, C channels, H x W pixels, h x w the last map (H / 32, or H / 8 with `small`), D 512 or 2,048.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from selfsup.kernel.config import about
from selfsup.kernel.contracts import Backbone, Signal
from selfsup.kernel.errors import ContractError

from ..common.norm import BatchNorm

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class ResNet(Backbone):
    """Images [B, C, H, W] -> the last map as tokens [B, h * w, D], whose mean is global average pooling.

    Batch norm takes the statistics of all processes. Convolutions start from He et al.'s normal
    (fan-out), batch norms from the identity; `zero_init_residual` starts each block's last one from 0,
    so that a block begins as its shortcut.
    """

    wants_raw: ClassVar[bool] = True

    def __init__(
        self,
        *,
        depth: Annotated[Literal[18, 50], about("layers")] = 50,
        small: Annotated[bool, about("stem for images of up to 64 pixels: 3x3, stride 1, no pooling")] = False,
        channels: Annotated[int, about("channels of the image", ge=1)] = 3,
        zero_init_residual: Annotated[bool, about("blocks start as their shortcuts")] = False,
    ) -> None:
        super().__init__()
        block = Basic if depth == 18 else Bottleneck
        self.width, self.channels = 512 * block.expansion, channels
        self.conv1 = conv(channels, 64, 3, 1) if small else conv(channels, 64, 7, 2)
        self.bn1 = BatchNorm(64)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        n1, n2, n3, n4 = BLOCKS[depth]
        self.layer1 = stage(block, 64, 64, n1, 1)
        self.layer2 = stage(block, 64 * block.expansion, 128, n2, 2)
        self.layer3 = stage(block, 128 * block.expansion, 256, n3, 2)
        self.layer4 = stage(block, 256 * block.expansion, 512, n4, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_residual and isinstance(module, Basic | Bottleneck):
                last = module.bn2 if isinstance(module, Basic) else module.bn3
                nn.init.zeros_(last.get_parameter("weight"))

    def forward(self, tokens: Signal, *, causal: bool = False, context: Signal | None = None) -> Signal:
        """Float images [B, C, H, W] -> [B, h * w, D], row by row."""
        x = tokens.x
        if causal or context is not None:
            raise ContractError("a ResNet sees the whole image at once: it has no causal form and looks at no context")
        if x.dim() != 4 or x.shape[1] != self.channels or not x.is_floating_point():
            raise ContractError(
                f"a ResNet takes float images [batch, {self.channels}, height, width]; "
                f"it got {x.dtype} of shape {list(x.shape)}"
            )
        x = self.pool(F.relu(self.bn1(self.conv1(x))))  # [B, 64, H / 4, W / 4]
        for part in self.units():
            x = part(x)  # last: [B, D, h, w]
        return Signal(x.flatten(2).transpose(1, 2))  # [B, h * w, D]

    def units(self) -> Iterable[nn.Module]:
        """The four stages."""
        return self.layer1, self.layer2, self.layer3, self.layer4


class Basic(nn.Module):
    """Two 3x3 convolutions: [B, C, H, W] -> [B, width, H / stride, W / stride]."""

    expansion: ClassVar[int] = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 3, stride), BatchNorm(width)
        self.conv2, self.bn2 = conv(width, width, 3, 1), BatchNorm(width)
        self.downsample = shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1 to `width` channels, 3x3, 1x1 to four times as many: [B, 4 * width, H / stride, W / stride]."""

    expansion: ClassVar[int] = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 1, 1), BatchNorm(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), BatchNorm(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1, 1), BatchNorm(4 * width)
        self.downsample = shortcut(channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def conv(channels: int, width: int, kernel: int, stride: int) -> nn.Conv2d:
    """A convolution that keeps the size but for its stride, without a bias: batch norm follows."""
    return nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)


def shortcut(channels: int, width: int, stride: int) -> nn.Module | None:
    """The 1x1 convolution around a block that changes the shape; None where it does not."""
    if stride == 1 and channels == width:
        return None
    return nn.Sequential(conv(channels, width, 1, stride), BatchNorm(width))


def stage(block: type[Basic] | type[Bottleneck], channels: int, width: int, count: int, stride: int) -> nn.Sequential:
    """`count` blocks, of which the first takes `channels` and has the stride."""
    inner = width * block.expansion
    return nn.Sequential(*(block(inner if i else channels, width, 1 if i else stride) for i in range(count)))
