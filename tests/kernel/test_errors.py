"""The tree of errors, and the hint at what exists."""

from __future__ import annotations

import inspect

import pytest

from selfsup.kernel import errors
from selfsup.kernel.errors import BadSample, DataError, SelfsupError, nearest

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
    ],
)
def test_nearest(asked, known, said):
    assert nearest(asked, known) == said
    assert nearest(asked, iter(known)) == said
