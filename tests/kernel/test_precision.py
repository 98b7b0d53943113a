"""Device, autocast and compile."""

import pytest
import torch

from selfsup.kernel import compose
from selfsup.kernel.errors import ConfigError
from selfsup.kernel.precision import autocast, compile_units, pick_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("auto", torch.float32), ("bf16", torch.bfloat16)]
)
def test_autocast(precision, dtype):
    with autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_devices_that_do_not_exist_are_named():
    assert pick_device("cpu") == CPU
    with pytest.raises(ConfigError, match="there is no device 'gpu'; known: auto, cpu, cuda, cuda:N"):
        pick_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="sees no GPU here"):
        pick_device("cuda")


def test_compiled_units_are_the_backbones(toys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    objective = compose.build(toys(), compose.resolve(toys(), {"objective": {"name": "hide"}}))
    compile_units(objective)
    assert compiled == [objective.encoder.backbone.mix]
