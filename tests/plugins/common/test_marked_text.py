from __future__ import annotations

import pytest

from selfsup.plugins.common.marked_text import marked
from selfsup.plugins.common.vocabulary_training import train

TEXT = "The cat sat on the mat, and the other cat sat beside it."


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "characters", "bytes"])
def test_the_parts_add_up_to_the_text(kind: str) -> None:
    words = train(kind, [TEXT] * 3, 300)
    ids = words.encode([TEXT])[0].tolist()
    marks = ["hidden" if place % 5 in (1, 2) else "" for place in range(len(ids))]
    parts = marked(words, ids, marks)
    assert "".join(text for text, _ in parts) == words.decode(ids)
    assert [mark for _, mark in parts] == (["", "hidden"] * len(ids))[: len(parts)]
    assert words.decode(ids[1:3]).strip() == parts[1][0].strip()


def test_words_keep_their_spaces() -> None:
    words = train("wordpiece", [TEXT] * 3, 300)
    ids = words.encode(["the cat sat"])[0].tolist()
    assert marked(words, ids, ["", "guess", ""]) == [("the", ""), (" cat", "guess"), (" sat", "")]
    assert marked(words, [], []) == []
