"""All documents of a source as ids on disk, tokenised once.

A folder holds `tokens.bin` (the documents one after another, uint16 where that suffices), `documents.npy` (how long
each is and its number in the source) and `corpus.json`, which says what it was made from. It is written under a
temporary name and renamed when it is whole, so a folder of that name is always a whole one; one whose digests do not
verify any more is made anew. Processes map the files and share the memory.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from selfsup.kernel import distributed
from selfsup.kernel.errors import BadSample, DataError, SelfsupError, StateError, allow_bad, most_bad
from selfsup.kernel.loader import Source
from selfsup.kernel.state import digest

from .plain_text import Empty, text_of
from .vocabulary import Vocabulary, threaded

Ids = np.ndarray[Any, Any]
TOKENS, DOCUMENTS, FACTS = "tokens.bin", "documents.npy", "corpus.json"
NAMED = 1000  # bad documents whose reasons are kept
SHOWN = 5  # of these in the notes
SIGN = 20.0  # seconds after which the process that tokenises tells the others that it is still at it


@dataclass
class Facts:
    """What a corpus was made from, and what came of it."""

    tokenizer: str  # digest
    samples: int  # of the source
    max_bytes: int
    source: str = ""  # digest of what the data says of itself: paths, counts, sizes
    dtype: str = "uint16"
    tokens: int = 0
    bytes: int = 0  # of the documents in UTF-8
    empty: int = 0  # samples without text
    bad: int = 0  # samples whose text cannot be used
    reasons: dict[str, str] = field(default_factory=dict)  # number of a sample -> why not
    digests: dict[str, str] = field(default_factory=dict)  # of the other files


def facts_of(folder: Path) -> Facts:
    """What the folder of a corpus says of it."""
    return Facts(**json.loads((folder / FACTS).read_text("utf-8")))


class Corpus:
    """The ids of every usable document."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path | None = folder
        self.facts = facts_of(folder)
        if self.facts.dtype not in ("uint16", "uint32"):  # NumPy would make objects of bytes
            raise StateError(f"the tokens in {folder} are of no known type: {self.facts.dtype!r}")
        self._open(folder)

    def _open(self, folder: Path) -> None:
        try:
            self.sizes, self.numbers = np.load(folder / DOCUMENTS)  # [N] int64 each
        except (ValueError, EOFError, MemoryError) as cause:  # objects, or more than a file may hold
            raise StateError(f"{folder / DOCUMENTS} cannot be read: {cause}; remove it, and it is made anew") from None
        self.ends = np.cumsum(self.sizes)
        self.tokens: Ids = np.memmap(folder / TOKENS, self.facts.dtype, "r") if len(self) else np.zeros(0, "u2")
        if len(self.tokens) != self.facts.tokens or self.sizes.sum() != self.facts.tokens:
            raise StateError(f"the tokens in {folder} are not whole; remove that folder, and it is made anew")

    def __len__(self) -> int:
        return len(self.sizes)

    def ids(self, document: int) -> Ids:
        """The ids of a document, on disk."""
        end = int(self.ends[document])
        return self.tokens[end - int(self.sizes[document]) : end]

    def __getstate__(self) -> dict[str, Any]:
        if self.folder:
            return {"folder": self.folder, "facts": self.facts}
        return {**self.__dict__, "tokens": np.array(self.tokens)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.folder:
            self._open(self.folder)


def open_corpus(source: Source, name: str, max_bytes: int, vocabulary: Vocabulary, folder: Path | None) -> Corpus:
    """The field `name` of all samples as ids, kept in `folder`/tokens; None keeps them on the disk without a name.

    All processes call this together; the first one tokenises.
    """
    said = "\n".join(source.notes)
    wanted = Facts(_digest(vocabulary.json), len(source), max_bytes, _digest(said))
    own = "" if folder else tempfile.mkdtemp(prefix="selfsup-") if distributed.rank() == 0 else ""
    place = folder / "tokens" if folder else Path(distributed.alike(own)) / "tokens"
    try:
        _while_others_wait(_made(place, wanted, source, name, vocabulary))
        for _ in _made(place, wanted, source, name, vocabulary):  # only where the first one's disk cannot be seen
            pass
        corpus = Corpus(place)
        distributed.barrier()  # every process has its maps, which stay when the folder goes
    finally:
        if folder is None:
            shutil.rmtree(place.parent, ignore_errors=True)
    if folder is None:
        corpus.folder = None
    return corpus


def left_out(corpus: Corpus, source: Source, max_bad_fraction: float) -> list[str]:
    """Notes on the samples that gave no document; DataError where more than the share cannot be used."""
    facts = corpus.facts
    named = [f"{source.name(int(number))}: {reason}" for number, reason in facts.reasons.items()]
    if facts.bad > most_bad(max_bad_fraction, facts.samples) or not len(corpus):
        listed = "\n".join(f"  {line}" for line in named[:20])
        empty = f" ({facts.empty:,} are empty)" if facts.empty else ""
        more = f", or allow more, as in {allow_bad(facts.bad, facts.samples)}" if len(corpus) else ""
        raise DataError(
            f"{facts.bad:,} of {facts.samples:,} samples cannot be used{empty}, more than data.max_bad_fraction = "
            f"{max_bad_fraction:g} allows; remove them{more}:\n{listed}"
        )
    notes = [f"{facts.empty:,} sample{'s' * (facts.empty > 1)} without text left out"] if facts.empty else []
    count, more = f"{facts.bad:,} sample{'s' * (facts.bad > 1)}", "; …" if facts.bad > SHOWN else ""
    return notes + ([f"{count} left out: {'; '.join(named[:SHOWN])}{more}"] if facts.bad else [])


def _while_others_wait(making: Iterator[None]) -> None:
    """Do it on the first process; a sign of life now and then keeps the others from giving up."""
    if distributed.rank() > 0:
        while (said := distributed.alike("")) == "at it":
            pass
        if said:
            raise DataError(said)
        return
    last = time.monotonic()
    try:
        for _ in making:
            if time.monotonic() - last > SIGN:
                distributed.alike("at it")
                last = time.monotonic()
    except SelfsupError as cause:
        distributed.alike(str(cause))
        raise
    distributed.alike("")


def _made(place: Path, wanted: Facts, source: Source, name: str, vocabulary: Vocabulary) -> Iterator[None]:
    """Make the corpus unless there is one that was made from the same; yields now and then."""
    if _made_from(place) == _key(wanted):
        return
    work = place.with_name(f".tokens-{distributed.rank()}")
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    try:
        work.mkdir(parents=True)
        with threaded():
            yield from _write(work, wanted, source, name, vocabulary)
        shutil.rmtree(place, ignore_errors=True)
        work.rename(place)
    except OSError as cause:
        raise StateError(f"the tokens of the data cannot be written to {place}: {cause.strerror or cause}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _made_from(place: Path) -> tuple[Any, ...] | None:
    try:
        facts = facts_of(place)
        whole = facts.digests == {name: digest(place / name) for name in (TOKENS, DOCUMENTS)}
        return _key(facts) if whole else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _key(facts: Facts) -> tuple[Any, ...]:
    return facts.tokenizer, facts.samples, facts.max_bytes, facts.source


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))  # names need not be UTF-8


def _write(work: Path, facts: Facts, source: Source, name: str, vocabulary: Vocabulary) -> Iterator[None]:
    facts.dtype = "uint16" if vocabulary.size <= 1 << 16 else "uint32"
    numbers, sizes = array("q"), array("q")
    with open(work / TOKENS, "wb") as file:
        for document, ids in vocabulary.stream(_texts(source, name, facts, numbers)):
            sizes.extend([0] * (document + 1 - len(sizes)))
            sizes[document] += len(ids)
            file.write(ids.astype(facts.dtype).tobytes())
            yield
        facts.tokens = sum(sizes)
        _flush(file)
    kept = np.array(sizes) > 0  # a tokenizer may make nothing of control characters
    facts.empty += int((~kept).sum())
    with open(work / DOCUMENTS, "wb") as file:
        np.save(file, np.array([sizes, numbers], np.int64)[:, kept])
        _flush(file)
    facts.digests = {name: digest(work / name) for name in (TOKENS, DOCUMENTS)}
    with open(work / FACTS, "w", encoding="utf-8") as text:
        json.dump(asdict(facts), text, indent=1)
        _flush(text)


def _texts(source: Source, name: str, facts: Facts, numbers: Any) -> Iterator[str]:
    """The usable texts; their numbers go to `numbers`, and what happened to the others to `facts`."""
    for number in range(len(source)):
        try:
            text = text_of(source, number, name, facts.max_bytes)
        except Empty:
            facts.empty += 1
            continue
        except BadSample as why:
            facts.bad += 1
            if len(facts.reasons) < NAMED:
                facts.reasons[str(number)] = str(why)
        else:
            facts.bytes += len(text) if text.isascii() else len(text.encode())
            numbers.append(number)
            yield text


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
