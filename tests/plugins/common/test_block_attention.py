from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from selfsup.kernel.contracts import Signal
from selfsup.kernel.errors import ContractError
from selfsup.plugins.backbones import transformer
from selfsup.plugins.common import block_attention


def lengths_by_hand(segments: Tensor, limit: int) -> list[int]:
    out: list[int] = []
    for row in segments.tolist():
        runs = [row.count(i) for i in sorted(set(row))]
        out += runs + [0] * (limit + 1 - len(runs))
    return out


def test_sequence_starts_come_from_sorted_segments() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [7, 7, 7, 7, 7, 7], [0, 3, 0, 3, 1, 1], [0, 0, 0, 0, 0, 0]])
    x = torch.arange(24.0).view(4, 6, 1)
    ordered, restore = block_attention.gathered(Signal(x, segments))
    assert torch.equal(ordered.x.gather(1, restore[..., None]), x)
    assert ordered.segments.tolist()[2] == [0, 0, 1, 1, 3, 3]
    assert ordered.places()[2].tolist() == [0, 2, 4, 5, 1, 3]
    for limit in (2, 5):
        starts = block_attention.starts(ordered.segments, limit)
        assert starts.dtype == torch.int32
        assert starts.diff().tolist() == lengths_by_hand(segments, limit)
        assert (starts[0], starts[-1]) == (0, 24)
    assert block_attention.counted(segments).tolist() == [2, 1, 2, 0]


def test_real_xformers_takes_the_mask() -> None:
    fmha = pytest.importorskip("xformers.ops.fmha")
    segments = torch.tensor([[0, 1, 1, 2], [1, 1, 1, 1]])
    for causal, kind in ((False, fmha.attn_bias.BlockDiagonalMask), (True, fmha.attn_bias.BlockDiagonalCausalMask)):
        mask = block_attention.block_mask(segments, 3, causal)
        assert type(mask) is kind
        assert mask.q_seqinfo.seqstart is mask.k_seqinfo.seqstart
        assert mask.q_seqinfo.seqstart.tolist() == [0, 1, 3, 4, 4, 8, 8, 8, 8]
        assert mask.q_seqinfo.max_seqlen == 4


class StandIn:
    """Does on a CPU what xformers does on a GPU, from the same offsets and the same layout."""

    class BlockDiagonalMask:
        causal = False

        @classmethod
        def from_seqlens(cls, lengths: list[int], device: torch.device) -> StandIn.BlockDiagonalMask:
            mask = cls()
            mask.q_seqinfo = mask.k_seqinfo = SimpleNamespace(
                seqstart=None, max_seqlen=max(lengths), count=len(lengths)
            )
            return mask

    class BlockDiagonalCausalMask(BlockDiagonalMask):
        causal = True

    @staticmethod
    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: BlockDiagonalMask, p: float) -> Tensor:
        starts = attn_bias.q_seqinfo.seqstart.tolist()
        assert len(starts) == attn_bias.q_seqinfo.count + 1
        out = torch.full_like(q, torch.nan)
        for a, b in pairwise(starts):
            assert b - a <= attn_bias.q_seqinfo.max_seqlen
            part = (t[:, a:b].transpose(1, 2) for t in (q, k, v))
            part = torch.nn.functional.scaled_dot_product_attention(*part, is_causal=attn_bias.causal)
            out[:, a:b] = part.transpose(1, 2)
        return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("positions", ["learned", "sincos", "rotary", "none", "conv"])
def test_blocks_equal_masks(positions: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that a GPU goes: rows sorted, laid end to end, restored; dropped tokens in any order."""
    torch.manual_seed(0)
    backbone = transformer.Transformer(
        width=32, depth=2, heads=4, kv_heads=2, positions=positions, conv_kernel=4, conv_groups=4, packed=3
    )
    with torch.no_grad():
        for parameter in backbone.layers.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)  # so that it matters who is seen
    segments = torch.tensor([[1, 1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1], [2, 0, 1, 2, 1, 0, 1]])
    signal = Signal(torch.randn(3, 7, 32), segments, torch.randint(0, 9, (3, 7)))
    if positions == "conv":
        signal = Signal(signal.x, segments.clamp(max=1))
    want = backbone(signal, causal=causal).x
    calls: list[int] = []

    def attend(*args: Tensor, **options: Any) -> Tensor:
        calls.append(1)
        return StandIn.memory_efficient_attention(*args, **options)

    stand_in = SimpleNamespace(attn_bias=StandIn, memory_efficient_attention=attend)
    monkeypatch.setattr(block_attention, "fmha", lambda: stand_in)
    monkeypatch.setattr(transformer, "serves", lambda x: True)
    got = backbone(signal, causal=causal).x
    assert len(calls) == 2
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_cpu_never_asks_for_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "fmha", lambda: pytest.fail("xformers was asked for on a CPU"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not block_attention.serves(torch.zeros(1))


def test_too_many_sequences() -> None:
    signal = Signal(torch.zeros(2, 3, 4), torch.tensor([[1, 2, 3], [1, 1, 0]]))
    assert block_attention.within(signal, 3, "") is signal
    with pytest.raises(ContractError, match="3 packed sequences, and this backbone takes 2; pack fewer"):
        block_attention.within(signal, 2, "pack fewer")
