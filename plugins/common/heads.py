"""What stands between a tower and a loss, and is thrown away after training.

Shapes: N rows, D width of the tower, H hidden width, Z width of the embedding.
"""

from __future__ import annotations

from torch import nn

from selfsup.plugins.common.norm import BatchNorm


class ProjectionHead(nn.Sequential):
    """SimCLR's head: Linear, batch norm and ReLU for every layer but the last, which has no ReLU: [N, D] -> [N, Z].

    No linear layer has a bias: the batch norm behind it would take it away. The last batch norm has none
    either, so every dimension of the embedding has mean 0 over the batch. With one layer it is the linear
    head of the paper's ablation. Chen et al. 2020, https://arxiv.org/abs/2002.05709, section 4.2; the
    norms are those of the authors' code, the paper does not name them.
    """

    def __init__(self, width: int, hidden: int, out: int, layers: int) -> None:
        parts: list[nn.Module] = []
        for _ in range(layers - 1):
            parts += [nn.Linear(width, hidden, bias=False), BatchNorm(hidden), nn.ReLU(inplace=True)]
            width = hidden
        super().__init__(*parts, nn.Linear(width, out, bias=False), BatchNorm(out, bias=False))
