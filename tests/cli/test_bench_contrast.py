"""What the contrastive cases count and compare with."""

import pytest
import torch

from selfsup.cli import bench_contrast
from selfsup.cli.bench_case import Draw
from selfsup.cli.bench_parity import error, step


def of(op, **which):
    return [case for case in bench_contrast.cases(True) if case.op == op]


def test_the_fewest_products():
    n, d = 32768, 512
    assert of("info_nce")[0].flops == 6 * n * n * d
    assert of("nt_xent")[0].flops == 4 * n * n * d
    assert of("clip_loss")[0].flops == 8 * 65536**2 * d
    assert of("sigmoid_loss")[0].flops == 6 * n * n * 768
    assert of("info_nce")[2].flops == 4 * 256 * 65536 * 128


def small_clip():
    (case,) = (case for case in bench_contrast.cases(False) if case.op == "clip_loss")
    return case, case.make(Draw(torch.device("cpu"), torch.float64, 0))


def test_the_truth_in_parts_is_the_reference(monkeypatch):
    monkeypatch.setattr(bench_contrast, "PART", 48)
    case, arrays = small_clip()
    assert error(step(bench_contrast._clip_in_parts, arrays)(), step(case.reference, arrays)())[0] < 1e-12


def test_open_clips_form_is_the_reference():
    case, arrays = small_clip()
    assert error(step(case.peers["open_clip's form"].load(), arrays)(), step(case.reference, arrays)())[0] < 1e-12


@pytest.mark.parametrize(("width", "head"), [(512, 256), (768, 256), (1024, 256), (128, 128), (72, 72), (96, 32)])
def test_a_head_divides_the_width(width, head):
    assert bench_contrast._head(width) == head
