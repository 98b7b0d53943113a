"""What every backbone owes the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from selfsup.cli.installed import summary
from selfsup.kernel import Backbone, Plugins, Signal, Step
from selfsup.kernel.config import check, schema
from selfsup.kernel.errors import ContractError


class BackboneContract:
    """Subclass it, and set `name`."""

    name: ClassVar[str]
    """The plugin, by its entry point."""

    options: ClassVar[Mapping[str, Any]] = {}
    """Its options where they are not the defaults, for instance to make it smaller."""

    modality: ClassVar[str] = "image"
    """Whose raw signal it is fed if it `wants_raw`."""

    tolerance: ClassVar[float] = 1e-4
    """Absolute, of values of order one that two orders of summation give in float32."""

    def make(self) -> Backbone:
        """The backbone under test, the same every time."""
        cls = Plugins().load("backbones", self.name)
        torch.manual_seed(0)
        backbone: Backbone = cls(**check("backbone", cls, self.options))
        backbone.step = Step(0, 10)
        return backbone

    def signal(self, backbone: Backbone) -> Signal:
        """A batch of three: tokens without padding, or what a modality collates."""
        if not backbone.wants_raw:
            torch.manual_seed(1)
            return Signal(torch.randn(3, 6, backbone.width))
        modality = Plugins().load("modalities", self.modality)()
        raws = [modality.read(modality.sample()[i][modality.field]) for i in range(3)]
        plain: Signal = modality.plain(modality.collate(raws))
        return plain

    def test_it_says_what_it_is(self) -> None:
        cls = Plugins().load("backbones", self.name)
        assert issubclass(cls, Backbone)
        assert summary(Plugins().find("backbones", self.name)), "the first line of the module's docstring"
        for option, field in schema(cls).model_fields.items():
            assert field.description, f"describe {option} with about()"

    def test_tokens_come_out(self) -> None:
        backbone = self.make()
        signal = self.signal(backbone)
        out = backbone(signal)
        assert out.x.dim() == 3
        assert (len(out.x), out.x.shape[2]) == (len(signal.x), backbone.width)
        assert out.x.isfinite().all()
        assert out.segments is None or out.segments.shape == out.x.shape[:2]

    def test_every_parameter_has_a_finite_gradient(self) -> None:
        backbone = self.make()
        backbone(self.signal(backbone)).x.square().mean().backward()
        for key, parameter in backbone.named_parameters():
            if parameter.requires_grad and not (parameter.grad is None and backbone.skips_parameters):
                assert parameter.grad is not None, f"{key} has no gradient"
                assert parameter.grad.isfinite().all(), key

    def test_samples_do_not_mix_and_nothing_is_random_in_evaluation(self) -> None:
        backbone = self.make().eval()
        signal = self.signal(backbone)
        with torch.no_grad():
            whole = backbone(signal).x
            torch.manual_seed(2)
            each = torch.cat([backbone(_row(signal, i)).x for i in range(3)])
        self._close(each, whole)

    def test_its_units_are_parts_of_it(self) -> None:
        backbone = self.make()
        units = list(backbone.units())
        assert len({id(unit) for unit in units}) == len(units)
        assert all(any(unit is module for module in backbone.modules()) for unit in units)
        assert all(any(True for _ in unit.parameters()) for unit in units)

    def test_it_runs_in_bf16(self) -> None:
        backbone = self.make()
        with torch.autocast("cpu", torch.bfloat16):
            x = backbone(self.signal(backbone)).x
        x.float().square().mean().backward()
        assert x.isfinite().all()
        assert all(p.grad.isfinite().all() for p in backbone.parameters() if p.grad is not None)

    def test_padding_changes_nothing(self) -> None:
        backbone, tokens = self._of_tokens()
        with torch.no_grad():
            plain = backbone(Signal(tokens, torch.ones(3, 6, dtype=torch.int64))).x
            padded = torch.cat([tokens, torch.full((3, 4, backbone.width), 9.0)], 1)
            segments = (torch.arange(10) < 6).long().expand(3, 10)
            self._close(backbone(Signal(padded, segments)).x[:, :6], plain)
            self._close(plain, backbone(Signal(tokens)).x)

    def test_packed_sequences_do_not_see_each_other(self) -> None:
        backbone, tokens = self._of_tokens()
        segments = torch.tensor([[1, 1, 2, 2, 2, 0]] * 3)
        positions = torch.tensor([[0, 1, 0, 1, 2, 0]] * 3)
        try:
            with torch.no_grad():
                packed = backbone(Signal(tokens, segments, positions)).x
                first, second = backbone(Signal(tokens[:, :2])).x, backbone(Signal(tokens[:, 2:5])).x
        except ContractError:
            return  # it says that it takes one sequence a row
        self._close(packed[:, :2], first)
        self._close(packed[:, 2:5], second)

    def test_causal_tokens_do_not_see_later_ones(self) -> None:
        backbone, tokens = self._of_tokens()
        changed = tokens.clone()
        changed[:, 4:] *= -1.0  # a norm would undo a shift
        try:
            with torch.no_grad():
                one, other = backbone(Signal(tokens), causal=True).x, backbone(Signal(changed), causal=True).x
        except ContractError:
            return  # it says that it cannot be causal
        self._close(one[:, :4], other[:, :4])
        assert not torch.allclose(one[:, 4:], other[:, 4:])

    def _of_tokens(self) -> tuple[Backbone, Tensor]:
        backbone = self.make().eval()
        if backbone.wants_raw:
            pytest.skip("it wants raw input, which has no tokens yet")
        return backbone, self.signal(backbone).x

    def _close(self, one: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(one, other, rtol=0, atol=self.tolerance)


def _row(signal: Signal, i: int) -> Signal:
    rest = (part if part is None else part[i : i + 1] for part in (signal.segments, signal.positions))
    return Signal(signal.x[i : i + 1], *rest)
