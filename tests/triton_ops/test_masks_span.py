"""span_mask: spans as the papers draw them, equal bits by every road, and no row that minds its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.kernel.errors import ContractError
from selfsup.kernel.random import Stream, key_of, philox, stream, tag
from selfsup.triton_ops import _masks
from selfsup.triton_ops.masks_span import Spans, _span_mask_kernel, capacity, span_mask, span_mask_reference

PAPER = Spans(share=0.65, length=10, least=2)
HUBERT = Spans(share=0.8, length=10, least=2)
IDS = tag(2**22, torch.tensor([5, 0, 2**39, 3])) + 2**33
KEY = key_of(3, "mask")


def by_numpy(ids, lengths, total, spans, key, start=0):
    """hidden [B, T], span by span, in NumPy's words of 64 bits."""
    block = np.arange(start, start + 1 + -(-total // 4), dtype=np.uint64)
    hidden = np.zeros((len(ids), total), bool)
    for row, (ident, n) in enumerate(zip(ids, lengths, strict=True)):
        if n == 0:
            continue
        low, high = (np.full_like(block, part) for part in (ident % 2**32, ident // 2**32))
        words = np.stack(philox((block, low, high, np.zeros_like(block)), key), 1)
        size = min(spans.length, max(1, (n - 1) // spans.least))
        count = int(spans.share * n / size + (int(words[0, 0]) >> 8) / 2**24)
        count = min(max(count, spans.least), max(1, (n - 1) // size))
        keys = words[1:].ravel()[: n - size + 1]
        for first in sorted(range(len(keys)), key=lambda t, keys=keys: (int(keys[t]), t))[:count]:
            hidden[row, first : first + size] = True
    return torch.from_numpy(hidden)


def real_of(lengths, total=None):
    return torch.arange(total or max(lengths)) < torch.tensor(lengths)[:, None]


def rows(lengths, total=None, ids=None, spans=PAPER, device="cpu"):
    ids = torch.as_tensor(ids or range(len(lengths)), dtype=torch.int64)
    return span_mask(stream(0, "mask", ids.to(device)), real_of(lengths, total).to(device), spans)


@pytest.mark.parametrize(
    ("total", "spans"),
    [
        *((total, PAPER) for total in (1, 2, 3, 196, 197, 255, 256, 257)),
        (2, Spans(0.15, 3, 1)),
        (50, Spans(0.15, 3, 1)),
        (4097, PAPER),
    ],
)
def test_every_path_equals_numpy_and_the_reference(device, total, spans):
    lengths = [total, 0, max(1, total // 2), max(1, total - 1)]
    real, draw, other = real_of(lengths, total), Stream(KEY, IDS.to(device)), Stream(KEY, IDS)
    for each in (draw, other):
        each.take(9)
    got = span_mask(draw, real.to(device), spans)
    assert torch.equal(got.cpu(), span_mask_reference(other, real, spans))
    assert torch.equal(got.cpu(), by_numpy(IDS.tolist(), lengths, total, spans, KEY, start=3))
    assert draw.take(0) == other.take(0), "so that what is drawn next is the same, too"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.builds(Spans, st.floats(0.01, 0.99), st.integers(1, 12), st.integers(1, 4)),
    st.integers(0, 2**62),
)
def test_any_rows_and_any_spans(lengths, spans, first):
    total, ids = max(*lengths, 1), [first + i for i in range(len(lengths))]
    assert torch.equal(rows(lengths, total, ids, spans), by_numpy(ids, lengths, total, spans, key_of(0, "mask")))


@pytest.mark.parametrize(("frames", "spans", "share"), [(50, PAPER, 0.510), (780, PAPER, 0.491), (780, HUBERT, 0.567)])
def test_the_share_that_ends_up_hidden_is_the_definitions(frames, spans, share):
    """The chance of a token that one of the starts which cover it is drawn, averaged over a row."""
    hidden = rows([frames] * 4000, spans=spans)
    assert abs(hidden.float().mean() - share) < 0.004


def test_the_number_of_spans_is_rounded_at_random():
    """15 tokens in spans of 1: int(0.65 * 15 + U) is 9 in a quarter of the rows and 10 in the others."""
    counts = rows([15] * 4000, spans=PAPER._replace(length=1)).sum(1)
    assert set(counts.tolist()) == {9, 10}
    assert abs((counts == 10).float().mean() - 0.75) < 0.03


def test_every_start_is_equally_likely():
    """One span of 3 in 12 tokens has ten starts; a middle token is hidden three times as often as the first."""
    hidden = rows([12] * 20000, spans=Spans(0.01, 3, 1))
    assert (hidden.sum(1) == 3).all()
    assert torch.allclose(hidden.float().mean(0) * 10, torch.tensor([1, 2, *[3] * 8, 2, 1]).float(), atol=0.12)


def test_runs_of_hidden_tokens_are_as_long_as_a_loop_makes_them():
    """Of the lengths of runs in 3,000 rows, ours and those of spans that are drawn one at a time, within 2 %."""
    generator = np.random.default_rng(0)
    loops = np.zeros((3000, 200), bool)
    for row in loops:
        for first in generator.choice(191, int(0.65 * 20 + generator.random()), replace=False):
            row[first : first + 10] = True

    def runs(hidden):
        edges = np.flatnonzero(np.diff(np.pad(hidden, ((0, 0), (1, 1))).ravel()))
        return np.diff(edges)[::2]

    ours, theirs = runs(rows([200] * 3000).numpy()), runs(loops)
    apart = [abs((ours <= n).mean() - (theirs <= n).mean()) for n in range(10, 201)]
    assert max(apart) < 0.02, "a Kolmogorov-Smirnov distance"


def test_spans_are_whole_and_inside_the_real_tokens(device):
    lengths = [200, 131, 40, 57] * 2
    hidden = rows(lengths, total=210, device=device).cpu()
    for row, length in zip(hidden, lengths, strict=True):
        assert not row[length:].any()
        runs = "".join("x" if h else "." for h in row).split(".")
        assert min(len(run) for run in runs if run) >= 10


@pytest.mark.parametrize("frames", range(1, 45))
def test_short_rows_keep_one_token_hidden_and_one_visible(frames):
    hidden = rows([frames] * 50)
    assert hidden.any(1).all()
    if frames > 1:
        assert (~hidden).any(1).all()


def test_short_rows_get_their_spans_shortened():
    """12 tokens get two spans of 5, which hide 6 tokens where they overlap most and 10 where they do not."""
    assert set(rows([12] * 500).sum(1).tolist()) == {6, 7, 8, 9, 10}


def test_a_row_of_padding_hides_nothing(device):
    assert not rows([0, 60], device=device)[0].any()


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_nothing_is_hidden_of_nothing(device, shape):
    draw = stream(0, "mask", torch.arange(shape[0], device=device))
    assert span_mask(draw, torch.ones(shape, device=device).bool(), PAPER).shape == shape


def test_a_row_is_masked_alike_in_any_batch(device):
    together = rows([90, 33, 200, 12], ids=[7, 3, 9, 5], device=device)
    assert torch.equal(rows([33], ids=[3], device=device)[0], together[1, :33])
    assert torch.equal(rows([12, 90], total=90, ids=[5, 7], device=device), together[[3, 0], :90])


def test_rows_differ():
    assert len(rows([100] * 50).unique(dim=0)) == 50


@pytest.mark.parametrize("spans", [PAPER, HUBERT, Spans(0.3, 3, 4)])
def test_the_capacity_holds_every_row(spans):
    for total in (1, 2, 5, 19, 20, 21, 22, 30, 31, 46, 47, 100, 333):
        most = int(rows([*range(1, total + 1)] * (1 + 500 // total), total=total, spans=spans).sum(1).max())
        assert most <= capacity(total, spans) <= total


def test_rows_too_long_for_a_program_go_another_way(device, monkeypatch):
    whole = rows([70, 41], device=device)
    monkeypatch.setattr("selfsup.triton_ops.masks_span.LONGEST", 64)
    assert torch.equal(rows([70, 41], device=device), whole)


def test_arrays_may_have_gaps_in_memory(device):
    real = real_of([30, 4, 9, 0]).to(device)
    wide = torch.zeros(8, 60, dtype=torch.bool, device=device)
    wide[::2, ::2] = real
    ids = IDS.to(device).repeat_interleave(2)[::2]
    got = span_mask(Stream(KEY, ids), wide[::2, ::2], PAPER)
    assert torch.equal(got, span_mask(Stream(KEY, IDS.to(device)), real, PAPER))
    assert got.is_contiguous()


@pytest.mark.parametrize(
    ("real", "spans", "message"),
    [
        (torch.ones(4, 5), PAPER, "torch.float32"),
        (torch.ones(3, 5).bool(), PAPER, r"\[3, 5\] for 4 ids"),
        (torch.ones(4, 5).bool(), Spans(1.0, 10, 2), "is 1.0"),
        (torch.ones(4, 5).bool(), Spans(0.5, 0, 2), "length=0"),
        (torch.ones(4, 5).bool(), Spans(0.5, 10, 0), "least=0"),
        (torch.ones(4, 5, dtype=torch.bool, device="meta"), PAPER, "on meta"),
        (torch.tensor([[1, 1], [1, 1], [0, 1], [0, 0]]).bool(), PAPER, "padding stands before a token"),
    ],
)
def test_what_cannot_be_masked_is_named(real, spans, message):
    with pytest.raises(ContractError, match=message):
        span_mask(Stream(KEY, IDS), real, spans)


def test_the_op_is_well_formed(device):
    arguments = (IDS[:1].to(device), real_of([6], 8).to(device), *PAPER, *KEY, 2)
    torch.library.opcheck(torch.ops.selfsup.span_mask, arguments)


def test_it_compiles_whole_and_once_for_every_size_of_batch():
    calls = []

    def count(graph, inputs):
        calls.append(graph)
        return graph

    def hide(ids, real):
        return span_mask(Stream((1, 2), ids), real, PAPER)

    compiled = torch.compile(hide, backend=count, fullgraph=True, dynamic=True)
    for size in (2, 3, 5, 8, 13):
        ids, real = torch.arange(size), real_of([40] * size)
        assert torch.equal(compiled(ids, real), hide(ids, real))
    assert len(calls) == 1


def test_autocast_and_meta_tensors_are_no_trouble():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            rows([50] * 3), span_mask_reference(stream(0, "mask", torch.arange(3)), real_of([50] * 3), PAPER)
        )
    there = span_mask(Stream(KEY, torch.arange(3, device="meta")), real_of([20] * 3).to("meta"), PAPER)
    assert (there.shape, there.dtype) == ((3, 20), torch.bool)


def test_the_host_does_not_wait(device, without_waiting):
    real, draw = real_of([50, 20]).to(device), stream(0, "mask", torch.arange(2, device=device))
    span_mask(draw, real, PAPER)
    with without_waiting():
        span_mask(draw, real, PAPER)


@pytest.mark.parametrize("tokens", [1, 250, 780, 1500, _masks.LONGEST])
def test_the_kernel_compiles_for_gpus_that_are_not_here(compile_ahead, assert_fits, tokens):
    lanes, warps = _masks.block_of(tokens)
    arrays = {"ids_ptr": "*i64", "real_ptr": "*i1", "hidden_ptr": "*i1"}
    numbers = {"share": "i64", "length": "i32", "least": "i32", "key": "i64", "start": "i32", "T": "i32"}
    compiled = compile_ahead(_span_mask_kernel, {**arrays, **numbers}, BLOCK=lanes, num_warps=warps, **_masks.EXACTLY)
    assert_fits(compiled)
    if "ptx" in compiled.asm:
        assert "div.rn.f64" in compiled.asm["ptx"], "the number of spans is rounded as in torch"
        assert "fma.rn.f64" not in compiled.asm["ptx"]
