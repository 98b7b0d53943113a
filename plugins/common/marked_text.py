"""Tokens as text for people, in parts that say which of them were hidden or guessed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from .vocabulary import Vocabulary


def marked(vocabulary: Vocabulary, ids: Sequence[int], marks: Sequence[str]) -> list[tuple[str, str]]:
    """The text of ids [n] in parts of one mark each: [(text, mark)].

    A part is what the text gains by its tokens, so that the parts add up to the text with its spaces.
    """
    parts: list[tuple[str, str]] = []
    before, end = "", 0
    for mark, run in groupby(marks):
        end += len(list(run))
        text = vocabulary.decode(ids[:end])
        parts.append((text[len(before) :], mark))
        before = text
    return parts
