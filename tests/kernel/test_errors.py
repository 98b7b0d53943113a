"""The tree of errors, and the hint at what exists."""

from __future__ import annotations

import inspect

import pytest

from selfsup.kernel import errors
from selfsup.kernel.errors import BadSample, DataError, SelfsupError, allow_bad, most_bad, nearest

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_every_error_is_one_of_ours_and_drawn_in_the_module(error):
    assert issubclass(error, SelfsupError)
    assert f"* {error.__name__} " in errors.__doc__


def test_a_bad_sample_is_a_data_error():
    assert issubclass(BadSample, DataError)


@pytest.mark.parametrize(
    ("asked", "known", "said"),
    [
        ("simclir", ["wav2vec2", "simclr"], "did you mean 'simclr'?"),
        ("zebra", ["wav2vec2", "simclr"], "known: simclr, wav2vec2"),
        ("zebra", [], "known: none"),
        (
            "zebra",
            [f"x{n:04}" for n in range(1020)],
            f"known: {', '.join(f'x{n:04}' for n in range(20))} and 1,000 more",
        ),
        ("zebra", [f"x{n:02}" for n in range(20)], f"known: {', '.join(f'x{n:02}' for n in range(20))}"),
    ],
    ids=["near", "all", "none", "a crowd", "few"],
)
def test_nearest(asked, known, said):
    assert nearest(asked, known) == said
    assert nearest(asked, iter(known)) == said


@pytest.mark.parametrize(
    ("bad", "of", "share"), [(2, 14, 0.15), (1, 10, 0.1), (1, 100_000, 0.01), (9, 10, 0.9), (4, 3, 1)]
)
def test_the_share_that_is_named_is_enough(bad, of, share):
    assert allow_bad(bad, of) == f"--max-bad-fraction {share}"


def test_one_sample_may_be_bad_unless_none_may():
    assert [most_bad(share, 50) for share in (0.0, 0.01, 0.1)] == [0, 1, 5]
