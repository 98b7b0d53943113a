"""The page: everything is escaped, nothing is fetched, sizes are bounded."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest

from selfsup.plugins.common.page import (
    LONGEST,
    cards,
    cite,
    facts,
    folded,
    legend,
    listed,
    page,
    samples,
    say,
    section,
    shown,
    table,
    title,
)
from selfsup.plugins.common.seen import Seen

EVIL = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Tags that open and close in order, with their attributes and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.said = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data

    def tags(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def everything(text):
    seen = Seen([text], {text: [text], "b" + text: [[(text, "hidden"), (text, "guess")]], "c": [np.zeros(5)]})
    parts = [title(text), say(text, "warn"), cite(text), facts({text: text}), samples(seen), legend({"hue-1": text})]
    parts += [section(text, table((text,), [(text,)], [True]), listed([text]), folded(text, say(text))), cards([])]
    return page(text, parts)


def test_whatever_is_put_on_the_page_is_escaped():
    read, plain = Reader(everything(EVIL)), Reader(everything("word"))
    assert [tag for tag, _ in read.found] == [tag for tag, _ in plain.found]
    assert read.tags("script") == []
    assert read.said.count(EVIL) == plain.said.count("word")


def test_addresses_are_links_that_the_page_does_not_follow():
    read = Reader(cite("A. Toy, https://example.org/a_b?c=1&d=2, and (https://example.org/x)."))
    assert [a["href"] for a in read.tags("a")] == ["https://example.org/a_b?c=1&d=2", "https://example.org/x"]
    assert read.said == "A. Toy, https://example.org/a_b?c=1&d=2, and (https://example.org/x)."


@pytest.mark.parametrize("text", ["javascript:alert(1)", "http://", "data:text/html,x"])
def test_nothing_else_is_a_link(text):
    assert Reader(cite(text)).tags("a") == []


def test_each_kind_of_what_people_look_at():
    (image,) = Reader(shown(np.zeros((8, 4, 3), np.uint8))).tags("img")
    assert (image["width"], image["height"], image["class"]) == ("48", "96", "pixels")
    assert image["src"].startswith("data:image/png;base64,")
    assert "class" not in Reader(shown(np.zeros((200, 300, 3), np.uint8))).tags("img")[0]
    assert Reader(shown(np.sin(np.arange(1000.0)))).tags("svg")
    marks = Reader(shown([("a ", ""), ("b", "hidden"), ("c", "guess")]))
    assert marks.said == "a bc"
    assert [mark["class"] for mark in marks.tags("mark")] == ["hidden", "guess"]


@pytest.mark.parametrize("value", ["word " * 10_000, [("word ", "hidden")] * 10_000, [("word " * 10_000, "")]])
def test_long_texts_are_cut(value):
    read = Reader(shown(value))
    assert LONGEST <= len(read.said) < LONGEST + 10
    assert read.said.endswith("…")
