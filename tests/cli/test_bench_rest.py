"""Plans of views that are within their images, and kornia beside."""

import pytest
import torch

from selfsup.cli import bench_rest
from selfsup.cli.bench_case import Draw


def test_boxes_lie_within_their_images():
    images, plan = bench_rest._augment(50, 24, 16, 5).make(Draw(torch.device("cpu"), torch.float32, 0))
    assert (images.dtype, images.shape) == (torch.uint8, (50, 3, 24, 24))
    top, left, height, width = plan.box.unbind(1)
    assert plan.box.min() >= 0
    assert max((top + height).max(), (left + width).max()) <= 24
    assert plan.order.sort(1).values.tolist() == [[0, 1, 2, 3]] * 50


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_kornia_gives_views_of_that_size():
    pytest.importorskip("kornia")
    views = bench_rest._kornia(16, 5)(torch.randint(256, (3, 3, 24, 24), dtype=torch.uint8), None)
    assert views.shape == (3, 3, 16, 16)


def test_distillation_moves_every_logit_once_and_writes_a_gradient():
    (case,) = (case for case in bench_rest.cases(True) if "S=8" in case.shape)
    assert case.least == 2 * 64 * 65536 * (8 + 2 + 8)
