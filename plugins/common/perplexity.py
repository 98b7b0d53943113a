"""How well a run predicts the tokens of a text: every token of every document once, each from what stands before it.

With s_t = -log p(x_t | x_<t) in nats, over N tokens of documents of M bytes (UTF-8) in all,

    nats = sum s_t / N        perplexity = exp(nats)        bits per byte = sum s_t / (M ln 2)

Only bits per byte compare models of different tokenizers. They count the text alone; the token that ends each document
is predicted too, and reported with the rest as `nats_with_ends`.

A document longer than the row of the model is read in windows. Each shows the last token of the one before and
predicts what follows, so the first tokens of a window see little; with `stride`, windows advance by that many tokens,
and predict no more than these, so that each sees all that fits before it.

Shapes: B windows of a batch, T tokens of the longest of them, V tokens in the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from selfsup.kernel import compose
from selfsup.kernel.config import Settings
from selfsup.kernel.contracts import Sample, Signal
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import ContractError
from selfsup.kernel.loader import Part, Source
from selfsup.kernel.precision import pick_device

from .compare import to_judge
from .corpus import Corpus, left_out, open_corpus
from .token_rows import Frame


@runtime_checkable
class Predicts(Protocol):
    """An objective that gives each next token a probability."""

    def surprise(self, raw: Signal) -> Tensor:
        """-log p of the token behind each place of its row, in nats; the last one of a row gets 0: [B, T]."""


class Window(NamedTuple):
    """`size` units of a document from `start` on (see `token_rows`); the first `seen` are only looked at."""

    document: int
    start: int
    size: int
    seen: int


@dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    nats: float  # a token of the text
    nats_with_ends: float  # a token, those that end documents counted
    perplexity: float
    bits_per_byte: float

    @classmethod
    def of(cls, text: float, ends: float, size: Size) -> Row:
        """From the nats of all tokens of the text, and of all that end a document."""
        nats = text / size.tokens
        return cls(
            nats,
            (text + ends) / (size.tokens + size.documents),
            math.exp(min(nats, 700.0)),
            text / (size.bytes * math.log(2)),
        )


@dataclass(frozen=True)
class Size:
    """What was predicted; tokens without those that end documents."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Perplexity:
    """Everything that `ssl eval perplexity` says."""

    run: str
    step: int
    length: int
    stride: int | None
    vocabulary: int
    size: Size
    rows: dict[str, Row]
    notes: list[str]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for."""

    run: Path
    paths: Sequence[str] = ()
    column: str | None = None
    limit: int | None = None
    stride: int | None = None
    batch: int = 16
    device: str = "auto"


def measure(plugins: Plugins, asked: Asked) -> Perplexity:
    """The newest good checkpoint of a run, beside its random initialisation and a uniform guess."""
    objective, settings, step = compose.restore(asked.run, plugins, asked.device)
    if not isinstance(objective, Predicts):
        raise ContractError(
            f"{settings['objective']['name']} does not predict the next token, so it has no perplexity; "
            "ssl eval knn and ssl eval probe judge its features"
        )
    modality = objective.exports.modality
    source = _open(plugins, settings, modality, asked)
    words = modality.vocabulary
    corpus = open_corpus(source, modality.field, modality.max_bytes, words, None)
    own = [] if asked.paths else ["no --data: these are the run's own texts, which it was trained on"]
    bad = left_out(corpus, source, settings.get("data", {}).get("max_bad_fraction", 0.01))
    notes = [*own, *bad, *_unknown(corpus, words.unknown)]
    size = Size(len(corpus), corpus.facts.tokens, corpus.facts.bytes)
    # Documents end with a token whatever the training rows did: it is what the model was shown, or a little harder.
    frame = Frame(modality.frame.begin, modality.frame.end, each=False)
    listed = windows(frame.units(corpus.sizes), modality.length - 1, asked.stride)
    device = pick_device(asked.device)

    def judged(model: Any) -> Row:
        return Row.of(*surprises(model, corpus, frame, listed, asked.batch, device), size)

    rows = {"trained": judged(objective)}
    del objective
    rows["random"] = judged(compose.restore(asked.run, plugins, asked.device, initial=True)[0])
    uniform = math.log(words.size)
    rows["uniform"] = Row.of(size.tokens * uniform, size.documents * uniform, size)
    return Perplexity(str(asked.run), step, modality.length, asked.stride, words.size, size, rows, notes)


def windows(units: np.ndarray[Any, Any], longest: int, stride: int | None) -> list[Window]:
    """How documents of so many units are read, at most `longest` at once: the longest windows first."""
    advance = min(stride or longest, longest)
    found = []
    for document, total in enumerate(units.tolist()):
        done = 0
        while done < total:
            # The first window predicts all that it shows; with `stride`, each later one only what is new in it.
            until = min(total, done + (advance if done else longest))
            start = max(0, until - longest) if stride else done
            found.append(Window(document, start, until - start, done - start))
            done = until
    return sorted(found, key=lambda window: -window.size)


def surprises(
    model: Any, corpus: Corpus, frame: Frame, listed: Sequence[Window], batch: int, device: torch.device
) -> tuple[float, float]:
    """The nats of all tokens of the text, and of all tokens that end a document."""
    text = ends = 0.0
    for first in range(0, len(listed), batch):
        some = listed[first : first + batch]
        raw, counted, last = _batch(some, corpus, frame)
        with torch.no_grad():
            nats = model.surprise(raw.to(device)).double().cpu()  # [B, T]
        text += float(nats[counted & ~last].sum())
        ends += float(nats[counted & last].sum())
    return text, ends


def _batch(some: Sequence[Window], corpus: Corpus, frame: Frame) -> tuple[Signal, Tensor, Tensor]:
    """Windows as rows, which predictions of each count, and which of these are of a document's end: [B, T] each."""
    lengths = torch.tensor([window.size + 1 for window in some])
    places = torch.arange(int(lengths.max()))
    x = torch.full((len(some), len(places)), frame.end)
    for row, window in zip(x, some, strict=True):
        ids = frame.piece(corpus.ids(window.document), window.start, window.size)
        row[: len(ids)] = torch.from_numpy(ids)
    predicted = places < lengths[:, None] - 1  # [B, T], by the token before
    counted = predicted & (places >= torch.tensor([window.seen for window in some])[:, None])
    final = torch.tensor([w.start + w.size == corpus.sizes[w.document] + 1 for w in some])
    last = final[:, None] & (places == lengths[:, None] - 2)
    # Equally long rows need no segments, and attention without them is faster.
    segments = None if bool((lengths == len(places)).all()) else (places < lengths[:, None]).int()
    return Signal(x, segments), counted, last


def _open(plugins: Plugins, settings: Settings, modality: Any, asked: Asked) -> Source:
    """The documents behind --data; by default, the run's own."""
    if not (hasattr(modality, "vocabulary") and hasattr(modality, "frame")):
        raise ContractError(f"the modality of this run, {modality.field}, is not made of documents of tokens")
    settings = to_judge(plugins, settings, asked.paths, column=asked.column)
    plugins.serve(settings)
    source = compose.open_source(
        plugins, settings, {"decoder": modality}, list(asked.paths) or settings["data"].get("paths", [])
    )
    if asked.limit is None or asked.limit >= len(source):
        return source
    return First(source, asked.limit)


class First:
    """The first samples of a source: a `Source`."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.notes = source, source.notes
        self.parts: Sequence[Part] = [Part(count, count)]

    def __len__(self) -> int:
        return self.parts[0].size

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]

    def name(self, index: int) -> str:
        """As the source calls it."""
        return self.source.name(index)


def _unknown(corpus: Corpus, unknown: int | None) -> Iterator[str]:
    """A word on what the tokenizer could not spell, which makes bits per byte look better than they are."""
    count = 0 if unknown is None else int((np.asarray(corpus.tokens) == unknown).sum())
    if count:
        yield f"{count:,} of {corpus.facts.tokens:,} tokens stand for text that the tokenizer does not know"
