"""The Triton ops are put in place on a GPU alone, and make the same words."""

from types import SimpleNamespace

import pytest
import torch

from selfsup.kernel import random
from selfsup.plugins.services.triton import Triton


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.setattr(random, "FASTER", {})
    monkeypatch.setattr("selfsup.plugins.services.triton.FASTER", random.FASTER)
    return random.FASTER


@pytest.mark.parametrize(
    ("device", "enabled", "used"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_it_serves_a_run_on_a_gpu(faster, device, enabled, used):
    Triton(enabled=enabled).run_started(SimpleNamespace(device=torch.device(device)))
    assert ("cuda" in faster) is used


def test_a_stream_takes_the_faster_maker_of_its_device(faster):
    plain = random.stream(0, "x", torch.arange(3))
    wanted = [plain.bits(5), plain.bits(2, 3)]
    Triton().run_started(SimpleNamespace(device=torch.device("cuda")))
    faster["cpu"] = faster.pop("cuda")  # its path for a CPU
    again = random.stream(0, "x", torch.arange(3))
    for want in wanted:
        assert torch.equal(again.bits(*want.shape[1:]), want)
