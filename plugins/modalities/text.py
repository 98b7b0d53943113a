"""Text as tokens: documents are tokenised once, packed into rows without waste, and kept apart by segments.

A vocabulary is learned from the data at the first start (or read from a tokenizer.json), kept in every checkpoint and,
for people and for transformers, in the folder of the run. Training rows hold whole documents and pieces of long ones;
every token of every document is shown once per turn. Equal segments alone may attend to each other, so no token sees
another document, and positions count from 0 in each. What surrounds a document or piece is up to `ends`:

    document   begin, text, end around every document (GPT). A long one is cut into pieces of which each begins with the
               last token of the one before, so that each token but the first is predicted once.
    piece      begin, piece, end around every piece of a document: BERT's [CLS] and [SEP].

Raw sample: int ids [n] of one document, without specials; or a `Row`. Signal: x [B, T] int64, segments [B, T] int32
(0 padding, then 1, 2, ... by row), positions [B, T] int64. A training batch has T = `length`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch

from selfsup.kernel.config import about
from selfsup.kernel.contracts import Draw, Modality, Sample, Shown, Signal
from selfsup.kernel.errors import BadSample, ConfigError, ContractError, DataError
from selfsup.kernel.loader import Source
from selfsup.kernel.random import shuffled
from selfsup.plugins.common import standard_library, vocabulary_training
from selfsup.plugins.common.corpus import Corpus, left_out, open_corpus
from selfsup.plugins.common.packing import Layout
from selfsup.plugins.common.plain_text import decode, text_of
from selfsup.plugins.common.token_flow import Reading, documents_of, rows_of
from selfsup.plugins.common.token_rows import Documents, Frame, Packed, Row
from selfsup.plugins.common.token_stem import Tokens
from selfsup.plugins.common.vocabulary import Vocabulary, pieces
from selfsup.plugins.common.windows import Windows

SAMPLE = 100_000_000  # characters that a tokenizer is learned from, at most
WELL_USED = 0.9  # share of positions; below it, people are told what to change
BETWEEN = "\n⁂\n"  # what people see between two sequences of a row


class Text(Modality):
    """Prose and everything else that people write."""

    field: ClassVar[str] = "text"
    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".md", ".rst", ".text")
    unit: ClassVar[str | None] = "tokens"

    def __init__(
        self,
        *,
        tokenizer: Annotated[
            str, about("bpe (byte-level), wordpiece, characters, bytes, or the path of a tokenizer.json")
        ] = "bpe",
        vocabulary: Annotated[int, about("most ids of a tokenizer that is learned from the data", ge=8)] = 32768,
        lowercase: Annotated[bool, about("wordpiece: no capitals and accents")] = True,
        length: Annotated[int, about("tokens of a row or crop", ge=8)] = 1024,
        pack: Annotated[bool, about("several documents in a row; off: one random crop of one document")] = True,
        pieces: Annotated[int, about("most sequences in a row; backbone.packed is to be as large", ge=1)] = 64,
        ends: Annotated[
            Literal["document", "piece"], about("begin and end tokens around every document, or around every piece")
        ] = "document",
        max_bytes: Annotated[int, about("a longer document is a bad sample; bounds memory", ge=1)] = 256_000_000,
    ) -> None:
        self.tokenizer, self.most, self.lowercase, self.length = tokenizer, vocabulary, lowercase, length
        self.pack, self.pieces, self.ends, self.max_bytes = pack, pieces, ends, max_bytes
        self._vocabulary: Vocabulary | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """What ids mean; there is one after `learn` or `load`."""
        if self._vocabulary is None:
            raise ContractError(f"this {self.field} has no vocabulary yet: call learn(source) or load(files) first")
        return self._vocabulary

    def learn(self, source: Source) -> None:
        """Train the tokenizer on an even choice of the documents, or read it from its file."""
        if self._vocabulary is not None:
            return
        if self.tokenizer in vocabulary_training.KINDS:
            texts = [] if self.tokenizer == "bytes" else self._chosen(source)
            self._take(vocabulary_training.train(self.tokenizer, texts, self.most, self.lowercase))
        else:
            self._take(vocabulary_training.open_file(self.tokenizer))

    def files(self) -> Mapping[str, str]:
        """The tokenizer, as transformers' AutoTokenizer reads it."""
        return {} if self._vocabulary is None else self._vocabulary.files(self.length)

    def load(self, files: Mapping[str, str]) -> None:
        """Take back what `files` gave."""
        self._take(Vocabulary.from_files(files))

    def _chosen(self, source: Source) -> list[str]:
        """Texts of an even choice of the documents, up to `SAMPLE` characters."""
        order = shuffled(np.arange(len(source)), len(source), 0, "vocabulary")
        texts: list[str] = []
        left, reason = SAMPLE, ""
        for index in order.tolist():
            try:
                text = text_of(source, index, self.field, self.max_bytes)[:left]
            except BadSample as cause:
                reason = f": {cause}"
                continue  # `rows` counts and names it
            texts.append(text)
            left -= len(text)
            if left <= 0:
                break
        if not texts:
            raise DataError(
                f"there is no text to learn a tokenizer from in the {len(source):,} documents of the data{reason}"
            )
        return texts

    def _take(self, vocabulary: Vocabulary) -> None:
        around = [number for number in (vocabulary.begin, vocabulary.end) if number is not None]
        if not around:
            raise ConfigError(
                f"modality.tokenizer = {self.tokenizer!r} has no token that begins or ends a document, such as "
                f"<|endoftext|>, [CLS] and [SEP], or <s> and </s>"
            )
        # GPT-2 has one token for both; T5 only an end.
        self.frame = Frame(around[0], around[-1], self.ends == "piece")
        self._vocabulary = vocabulary

    def read(self, stored: Any) -> Any:
        """The ids of one document, int64 [n <= length], without specials; rows and ids pass.

        Takes a text, a Path, the bytes of a file or {"bytes", "path"}; UTF-8. Raises BadSample with the reason.
        """
        if isinstance(stored, Row | np.ndarray | torch.Tensor):
            return stored
        found: list[np.ndarray[Any, Any]] = []
        for piece in pieces(decode(stored, self.max_bytes)):
            found += self.vocabulary.encode([piece])
            if sum(map(len, found)) >= self.length:
                break
        ids = np.concatenate(found)
        if not len(ids):
            raise BadSample("the tokenizer makes no token of it")
        return torch.from_numpy(ids[: self.length].astype(np.int64))

    def rows(self, source: Source, seed: int, folder: Path | None, max_bad_fraction: float) -> Source:
        """Tokenise everything once; then rows of `length`, or with `pack` off the documents one by one.

        A stream is tokenised as it comes.
        """
        if isinstance(source, Windows):
            reading = Reading(self.field, self.vocabulary, self.max_bytes)
            if not self.pack:
                return documents_of(source, reading)
            return rows_of(source, reading, self.frame, self.length, self.pieces)
        corpus = open_corpus(source, self.field, self.max_bytes, self.vocabulary, folder)
        notes = [*source.notes, *self._counted(corpus), *left_out(corpus, source, max_bad_fraction)]
        single = Documents(self.field, corpus, source, notes)
        if not self.pack:
            return single
        packed = Packed(
            single,
            self.frame,
            self.vocabulary.pad or 0,
            lambda sizes: Layout(sizes, self.length, self.frame.overhead, self.pieces, seed),
        )
        if packed.used < WELL_USED and len(corpus) > self.pieces:
            packed.notes = [
                *packed.notes,
                f"a row holds at most modality.pieces = {self.pieces} sequences; to fill rows with such short "
                f"documents, lower modality.length, or raise it and backbone.packed",
            ]
        return packed

    def _counted(self, corpus: Corpus) -> list[str]:
        facts, size = corpus.facts, self.vocabulary.size
        per_token, documents = facts.bytes / max(1, facts.tokens), f"{len(corpus):,} document{'s' * (len(corpus) != 1)}"
        return [
            f"{documents} of {facts.tokens:,} tokens, {per_token:.2f} bytes each "
            f"({self.tokenizer}, {size:,} different ones)"
        ]

    def collate(self, raws: Sequence[Any], draw: Draw | None = None) -> Signal:
        """Stack rows; crop documents with their specials to `length` (at random with `draw`) and pad them."""
        if isinstance(raws[0], Row):
            return Signal(*(torch.from_numpy(np.stack(part)) for part in zip(*raws, strict=True)))
        share = draw("crop").uniform().tolist() if draw is not None else [0.0] * len(raws)
        # What `read` gave is the beginning of a document already.
        share = [u if isinstance(raw, np.ndarray) else 0.0 for raw, u in zip(raws, share, strict=True)]
        crops = [self.frame.crop(np.asarray(raw), self.length, u) for raw, u in zip(raws, share, strict=True)]
        lengths = torch.tensor([len(crop) for crop in crops])  # [B]
        total = self.length if draw is not None else int(lengths.max())
        x = torch.full((len(crops), total), self.vocabulary.pad or 0)  # [B, T]
        for row, crop in zip(x, crops, strict=True):
            row[: len(crop)] = torch.from_numpy(crop)
        segments = (torch.arange(total) < lengths[:, None]).int()  # [B, T]
        return Signal(x, segments, torch.arange(total) * segments)

    def stem(self, width: int) -> Tokens:
        """A table of embeddings."""
        return Tokens(self.vocabulary.size, width)

    def amount(self, signal: Signal) -> float:
        """Tokens, without padding."""
        return float(signal.real().sum())

    def show(self, signal: Signal) -> list[Shown]:
        """The text of each sample; sequences of a packed row one by one."""
        segments = signal.real().int() if signal.segments is None else signal.segments
        rows = zip(signal.x.cpu().numpy(), segments.cpu().numpy(), strict=True)
        return [self._shown(ids, segment) for ids, segment in rows]

    def _shown(self, ids: Any, segments: Any) -> Shown:
        texts = [self.vocabulary.decode(ids[segments == number]) for number in range(1, int(segments.max()) + 1)]
        if len(texts) == 1:
            return texts[0]
        return [part for number, text in enumerate(texts) for part in ((BETWEEN, ""), (text, ""))[number == 0 :]]

    def sample(self) -> Sequence[Sample]:
        """Python's own documentation."""
        return standard_library.documentation()
