"""The kernels of contrastive losses: compiled for GPUs, bounded in memory, and safe far into it.

test_contrast.py has what they compute.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.triton_ops import contrast_gradient_kernels as gradients
from selfsup.triton_ops import contrast_kernels as shared
from selfsup.triton_ops import contrast_pairs as pairs
from selfsup.triton_ops import contrast_sums_kernels as sums
from selfsup.triton_ops._launch import can_launch

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNELS = {
    "sums": (sums._sums_kernel, {"COLUMNS": True, "ALONE": True}),
    "gradients": (gradients._gradient_kernel, {"KEYS": True, "ALONE": True}),
    "pairs": (pairs._pairs_kernel, {"GRADIENTS": True}),
}


def types_of(kernel, kind):
    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {name: f"*{kind}" for name in ("x_ptr", "y_ptr", "out_ptr") if name in types}
    types |= {name: "*i64" for name in ("row_ids_ptr", "key_ids_ptr") if name in types}
    return types | {name: "i32" for name in kernel.arg_names if name.islower() and not name.endswith("_ptr")}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("kind", "width"), [("bf16", 1024), ("fp16", 48), ("fp32", 512)])
def test_the_kernels_compile_for_gpus_that_are_not_here(request, compile_ahead, assert_fits, name, kind, width):
    kernel, flags = KERNELS[name]
    more = {"gradients": {"RELATIVE": kind == "fp16"}, "pairs": {"RAISED": pairs.RAISED}, "sums": {}}[name]
    crowded = request.node.callspec.params["compile_ahead"][1] == 100
    options = shared.tile_options(KINDS[kind], width, crowded=crowded)
    types = types_of(kernel, kind) | ({"M": "i32"} if "M" in kernel.arg_names else {})
    assert_fits(compile_ahead(kernel, types, D=width, KIN=True, PRECISION="ieee", **flags, **more, **options))


def test_the_kernel_that_merges_compiles(compile_ahead, assert_fits):
    types = types_of(sums._merge_kernel, "fp32") | {"S": "i32", "L": "i32"}
    assert_fits(compile_ahead(sums._merge_kernel, types, CONTINUED=True, **sums.MERGED))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300_000), st.integers(1, 3_000_000), st.booleans(), st.sampled_from([(2, 128), (4, 64)]))
def test_panels_have_every_pair_once_and_find_room(rows, keys, alone, kind):
    itemsize, block = kind
    keys, counted, diagonal = rows if alone else keys, 0, 0
    for part, of_keys in shared.panels(rows, keys, alone, itemsize, block):
        height, width = part.stop - part.start, of_keys.stop - of_keys.start
        assert 0 < height * shared._pitch(of_keys) * itemsize <= shared.WORKSPACE + 32 * height
        assert height * shared._pitch(of_keys) < 2**31  # lanes of a tile are counted in 32 bits
        assert part.start % block == 0 == of_keys.start % block
        counted += height * width
        if alone and of_keys.start == part.start:
            assert of_keys.stop >= part.stop  # the square at the diagonal is in one panel
            diagonal += height * height
    # Where rows are the keys, what is right of the squares on the diagonal is there once for two.
    assert counted == ((rows * rows - diagonal) // 2 + diagonal if alone else rows * keys)


@pytest.mark.parametrize(("rows", "itemsize", "block"), [(1, 4, 64), (5, 2, 128), (700, 2, 128)])
def test_no_panel_is_wider_than_a_launch(rows, itemsize, block):
    widths = [keys.stop - keys.start for _, keys in shared.panels(rows, 20_000_000, False, itemsize, block)]
    assert sum(widths) % 20_000_000 == 0
    assert max(widths) <= 65_535 * block


def test_a_loss_of_more_keys_than_a_launch_has_is_whole(device, monkeypatch):
    if not can_launch(torch.empty(0, device=device)):
        pytest.skip("kernels run on a GPU, or in the interpreter")
    x, y = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)).to(device) for n in (5, 150))
    arrays = (x, y, torch.ones((), device=device), torch.zeros((), device=device))
    monkeypatch.setattr(pairs, "BLOCKS", 1)
    torch.testing.assert_close(pairs.negative_pairs(*arrays), torch.nn.functional.softplus(x @ y.T).sum() / 5)


def test_a_small_batch_against_a_queue_takes_programs_enough_for_a_gpu():
    """MoCo: 256 queries, 65,536 keys."""
    span = sums._span(256, 65_536, 128)
    assert 2 * -(-65_536 // span) >= sums.PROGRAMS
    assert len(sums._launches(256, 0, 65_536 // span, 128)) == 1
    assert len(list(shared.panels(256, 65_536, False, 2, 128))) == 1


@pytest.mark.parametrize("columns", [0, 65_536, 2**20])
def test_partial_results_are_bounded_whatever_the_number_of_rows(columns):
    keys = max(columns, 65_536)
    parts = -(-keys // sums._span(262_144, keys, 128))
    launches = sums._launches(262_144, columns, parts, 128)
    for start, stop in launches:
        assert (stop - start) * parts + -(-(stop - start) // 128) * columns <= sums.PARTIALS
    assert sum(stop - start for start, stop in launches) == 262_144


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_numbers_past_the_32_bits_of_a_count_are_found(device):
    x = torch.zeros(2**27 + 200, 16, dtype=torch.bfloat16, device=device)
    y = torch.ones(3, 16, dtype=torch.bfloat16, device=device)
    x[-1] = 1
    r, t, _, _ = sums.sums(x, y, torch.ones((), device=device), None, None, False)
    assert (r[-1].item(), t[-1].item(), t[-2].item()) == (pytest.approx(1.0986123), 16.0, 0.0)
