"""gumbel_quantize: the choices of the stream's noise, by every road, and the gradient straight through them."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup.kernel.errors import ContractError
from selfsup.kernel.random import Stream, key_of, stream, tag
from selfsup.triton_ops._launch import INTERPRETED
from selfsup.triton_ops.gumbel_quantize import gumbel_quantize, gumbel_quantize_reference

module = import_module("selfsup.triton_ops.gumbel_quantize")  # the package has the function under this name

# samples, frames, groups, entries, width
SHAPES = [(1, 1, 1, 1, 1), (2, 1, 2, 320, 8), (2, 2, 3, 7, 17), (3, 1, 2, 130, 3), (2, 3, 1, 63, 130)]
FRACTIONS = (torch.float32, torch.bfloat16, torch.float16)


def case(shape, dtype=torch.float64, device="cpu", seed=0):
    """(logits, codebook), with gradients."""
    samples, frames, groups, entries, width = shape
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()
        for s in ((samples, frames, groups, entries), (groups, entries, width))
    )


def noise_of(logits, seed=3, after=0):
    """A stream that has given `after` words."""
    draw = stream(seed, "gumbel", tag(2**22, torch.arange(logits.shape[0], device=logits.device)) + 2**33)
    draw.take(after)
    return draw


@pytest.mark.parametrize("words", [2**17, 100])
@pytest.mark.parametrize("after", [None, 0, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_reference(monkeypatch, gradients_of, words, after, shape):
    monkeypatch.setattr(module, "WORDS", words)

    def run(f):
        def go(logits, codebook):
            vectors, codes = f(
                logits, codebook, after if after is None else noise_of(logits, after=after), temperature=0.7
            )
            return vectors, codes.double()

        return gradients_of(go, case(shape))

    for a, b in zip(run(gumbel_quantize), run(gumbel_quantize_reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", FRACTIONS)
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision_is_no_worse_than_torchs(device, as_exact_as_torch, dtype, noisy, shape):
    def run(f):
        return lambda x, c: f(x, c, noise_of(x) if noisy else None, temperature=0.5)

    as_exact_as_torch(
        run(gumbel_quantize),
        run(gumbel_quantize_reference),
        lambda seed: case(shape, dtype, device, seed),
        seeds=2,
    )


@pytest.mark.parametrize("entries", [320, 7])
@pytest.mark.parametrize("after", [0, 9, 2**32 * 4 - 4000])
def test_codes_are_those_of_the_streams_noise(device, entries, after):
    """Equal bits on every road; a logarithm's last digit decides about one choice in a million."""
    logits, codebook = case((2, 9 if entries == 7 else 4, 2, entries, 4), torch.float32, device)
    vectors, codes = gumbel_quantize(logits, codebook, noise_of(logits, after=after))
    noise = noise_of(logits.cpu(), after=after).gumbel(*logits.shape[1:])
    assert torch.equal(codes.cpu(), (logits.cpu() + noise).argmax(-1))
    groups = torch.arange(2, device=device)
    assert torch.equal(vectors, codebook[groups, codes])


def test_the_stream_goes_on_where_the_noise_ends():
    logits, codebook = case((3, 5, 2, 7, 4))
    ours, theirs = noise_of(logits), noise_of(logits)
    gumbel_quantize(logits, codebook, ours)
    theirs.gumbel(5, 2, 7)
    assert torch.equal(ours.bits(9), theirs.bits(9))


def test_a_samples_choices_are_its_own(device):
    """The same, whatever else is in the batch."""
    logits, codebook = case((4, 2, 2, 7, 4), torch.float32, device)
    whole = noise_of(logits)
    _, codes = gumbel_quantize(logits, codebook, whole)
    for row in (0, 3):
        alone = stream(3, "gumbel", whole.ids[row, None])
        assert torch.equal(gumbel_quantize(logits[row, None], codebook, alone)[1], codes[row, None])


def test_choices_come_as_often_as_their_softmax_says(device):
    """Gumbel 1954: argmax(l + n) is a draw from softmax(l)."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5], device=device)
    count = 200 if INTERPRETED else 20_000
    _, codes = gumbel_quantize(
        logits.expand(2, count // 2, 1, 5), torch.ones(1, 5, 1, device=device), noise_of(logits[:2])
    )
    often = torch.bincount(codes.flatten(), minlength=5) / count
    torch.testing.assert_close(often, logits.softmax(0), atol=3 * 0.5 * count**-0.5, rtol=0)


def test_of_equals_the_first_is_chosen(device):
    logits = torch.tensor([[[[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]]], device=device)
    assert gumbel_quantize(logits, torch.ones(2, 3, 1, device=device))[1].tolist() == [[[1, 0]]]


def test_what_is_not_finite_is_never_looked_up_elsewhere(device):
    for value in (torch.nan, torch.inf, -torch.inf):
        logits = torch.full((1, 2, 2, 7), value, device=device)
        _, codes = gumbel_quantize(logits, torch.ones(2, 7, 4, device=device), noise_of(logits))
        assert codes.min() >= 0
        assert codes.max() < 7


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 5, 3, 40, 5))), seed=st.integers(0, 99), after=st.integers(0, 40)
)
def test_gradients_of_logits_sum_to_nothing_and_those_of_entries_to_what_came(shape, seed, after):
    logits, codebook = case(shape, seed=seed)
    vectors, _ = gumbel_quantize(logits, codebook, noise_of(logits, seed, after))
    upstream = torch.randn(vectors.shape, dtype=vectors.dtype)
    to_logits, to_codebook = torch.autograd.grad(vectors, (logits, codebook), upstream)
    torch.testing.assert_close(to_logits.sum(-1), torch.zeros_like(to_logits[..., 0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(to_codebook.sum(1), upstream.sum((0, 1)))


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (2, 0, 2, 4, 4)])
def test_nothing_is_chosen_of_nothing(device, shape):
    logits, codebook = case(shape, torch.float32, device)
    vectors, codes = gumbel_quantize(logits, codebook, noise_of(logits))
    assert (vectors.shape, codes.shape) == ((*shape[:3], 4), shape[:3])
    to_logits, to_codebook = torch.autograd.grad(vectors.sum(), (logits, codebook))
    assert to_logits.shape == logits.shape
    assert not to_codebook.any()


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_a_sample_may_have_any_shape(device, leading):
    logits, codebook = case((4, 6, 2, 7, 3), torch.float32, device)
    logits = logits[:, :6].reshape(4, *leading, -1, 2, 7)[..., 0, :, :]
    got, want = (f(logits, codebook, noise_of(logits)) for f in (gumbel_quantize, gumbel_quantize_reference))
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0])


@pytest.mark.parametrize("frozen", range(2))
def test_what_is_frozen_gets_no_gradient_and_memory_may_have_gaps(device, gradients_of, frozen):
    logits, codebook = case((2, 6, 2, 14, 6), torch.float32, device)
    arrays = [logits.detach()[:, ::2, :, ::2].requires_grad_(), codebook.detach()[:, ::2, ::2].requires_grad_()]
    arrays[frozen].requires_grad_(False)
    got, want = (
        gradients_of(lambda x, c, f=f: f(x, c, noise_of(x), temperature=0.7), arrays)
        for f in (gumbel_quantize, gumbel_quantize_reference)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_too_many_entries_for_a_kernel_are_chosen_from_without_one(device):
    logits, codebook = case((1, 2, 1, module.WIDEST + 1, 2), torch.float32, device)
    _, codes = gumbel_quantize(logits, codebook, noise_of(logits))
    assert torch.equal(codes, gumbel_quantize_reference(logits, codebook, noise_of(logits))[1])


def test_the_same_numbers_twice(device, gradients_of):
    arrays = case((2, 3, 2, 65, 8), torch.float32, device)
    first, again = (gradients_of(lambda x, c: gumbel_quantize(x, c, noise_of(x)), arrays) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_host_does_not_wait(device, without_waiting):
    logits, codebook = case((3, 5, 2, 65, 8), torch.bfloat16, device)
    draw = noise_of(logits)
    with without_waiting():
        gumbel_quantize(logits, codebook, draw)[0].sum().backward()


def test_autocast_changes_nothing(gradients_of):
    arrays = case((3, 5, 2, 65, 8), torch.float32)
    plain = gradients_of(lambda x, c: gumbel_quantize(x, c, noise_of(x)), arrays)
    with torch.autocast("cpu", torch.bfloat16):
        under = gradients_of(lambda x, c: gumbel_quantize(x, c, noise_of(x)), arrays)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_it_needs_no_values():
    logits, codebook = (x.detach().to("meta").requires_grad_() for x in case((2, 3, 2, 7, 4)))
    vectors, codes = gumbel_quantize(logits, codebook, noise_of(logits))
    assert (vectors.shape, codes.shape) == ((2, 3, 2, 4), (2, 3, 2))
    grads = torch.autograd.grad(vectors.sum(), (logits, codebook))
    assert [g.shape for g in grads] == [logits.shape, codebook.shape]


def test_the_ops_are_well_formed():
    logits, codebook = case((2, 3, 2, 7, 4))
    temperature = torch.tensor(0.7).double()
    for ids, keep in ((torch.arange(2), True), (torch.arange(2), False), (None, False)):
        arrays = (logits, codebook, ids, *key_of(3, "gumbel"), 2, temperature, keep)
        torch.library.opcheck(torch.ops.selfsup.gumbel_quantize, arrays)
    vectors, codes, kept = (x.detach() for x in torch.ops.selfsup.gumbel_quantize(*arrays))
    for wanted in ([True, True], [False, True], [True, False]):
        given = (vectors, logits.detach(), codebook.detach(), codes, *arrays[2:-1], kept, wanted)
        torch.library.opcheck(torch.ops.selfsup.gumbel_quantize_gradient, given)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_it_compiles_once_for_batches_of_all_sizes_and_any_temperature(gradients_of):
    torch._dynamo.reset()

    key = key_of(3, "gumbel")

    def plain(logits, codebook, ids, temperature):
        return gumbel_quantize(logits, codebook, Stream(key, ids), temperature=temperature)

    compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples, temperature in zip((6, 8, 9, 11, 13), (2.0, 1.9, 1.7, 1.0, 0.5), strict=True):
        logits, codebook = case((samples, 3, 2, 7, 4))
        others = (torch.arange(samples), torch.tensor(temperature).double())
        ours, theirs = (gradients_of(lambda *a, f=f: f(*a, *others), (logits, codebook)) for f in (compiled, plain))  # noqa: B023
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


L, C = torch.ones(2, 3, 4, 5), torch.ones(4, 5, 6)
BAD = [
    ((L, C[:, :4]), r"\[2, 3, 4, 5\] and \[4, 4, 6\]"),
    ((L[0, 0], C), r"\[4, 5\] and \[4, 5, 6\]"),
    ((L[..., :0], C[:, :0]), "nothing to choose from"),
    ((L.long(), C), "must be of floating point: torch.int64"),
    ((L, C.to("meta")), "must be on one device, and are on cpu, meta"),
    ((L, C, stream(0, "gumbel", torch.arange(3))), r"an id for each of 2 samples, not \[3\]"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD)
def test_what_does_not_fit_is_named(arrays, message):
    with pytest.raises(ContractError, match=message):
        gumbel_quantize(*arrays)


def test_temperatures_that_do_not_fit_are_named():
    with pytest.raises(ContractError, match="temperature must be above 0, and is 0"):
        gumbel_quantize(L, C, temperature=0)
    with pytest.raises(ContractError, match=r"this has shape \[2\]"):
        gumbel_quantize(L, C, temperature=torch.ones(2))


SIZES = [("fp32", 320, 128, True), ("bf16", 7, 5, False), ("fp16", 8000, 1000, True)]


@pytest.mark.parametrize(("kind", "entries", "width", "noisy"), SIZES)
def test_the_kernels_compile_for_gpus_that_are_not_here(compile_ahead, assert_fits, kind, entries, width, noisy):
    from selfsup.triton_ops import gumbel_quantize_kernels as kernels

    row = {"G": 2, "V": entries, "NOISY": noisy, **kernels._options(entries)}
    of_entries = {"G": 2, "V": entries, "D": width, **kernels._entry_options(entries, width)}
    for kernel, more in (
        (kernels._choose_kernel, {"D": width, "BD": 1 << (width - 1).bit_length(), **row}),
        (kernels._scores_kernel, row),
        (kernels._codebook_kernel, of_entries),
    ):
        pointers = {name: f"*{kind}" for name in kernel.arg_names if name.endswith("_ptr")}
        others = {"ids_ptr": "*i64" if noisy else f"*{kind}", "codes_ptr": "*i64", "key": "i64", "start": "i32"}
        others |= {"each": "i32", "N": "i32", "temperature_ptr": "*fp32", "along_ptr": "*fp32"}
        pointers |= {name: value for name, value in others.items() if name in kernel.arg_names}
        if kernel is kernels._codebook_kernel:
            pointers["out_ptr"] = "*fp32"
        assert_fits(compile_ahead(kernel, pointers, **more))
