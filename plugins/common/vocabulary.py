"""Text to ids and back, as a tokenizer of the Hugging Face library `tokenizers` does it.

Everything that a vocabulary is fits into one text, a `tokenizer.json`: checkpoints keep it, and transformers'
AutoTokenizer loads it from the folder of a run. What stands in a text never becomes a special id: "[MASK]" in a
document is six characters. A long text is encoded in pieces that are cut where no token reaches across, so that memory
is bounded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from selfsup.kernel.errors import ConfigError, DataError

Ids = np.ndarray[Any, np.dtype[np.int32]]

# The usual names, the more telling ones first: a tokenizer may know several.
BEGIN = ("[CLS]", "<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>")
END = ("[SEP]", "</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
MASK = ("[MASK]", "<mask>", "<|mask|>")
PAD = ("[PAD]", "<pad>", "<|pad|>")
UNKNOWN = ("[UNK]", "<unk>", "<|unknown|>")

MOST = 1 << 24  # ids: each gets a row of weights

PIECE, FAR = 1 << 15, 1 << 20  # characters: a piece is cut at the first safe place after PIECE, by force after FAR
BATCH = 1 << 20  # characters that are encoded at a time; an encoding takes some hundred times their memory
THREADS, OURS = "TOKENIZERS_PARALLELISM", "off"  # the library's own switch, and our word for no

# No pre-tokenizer in use puts a space behind something else into one token; GPT-4's do so with a line break behind
# punctuation, so that comes second.
SAFE = (re.compile(r"(?<=\S) |(?<=[^\W_])\n"), re.compile(r"(?<=\S)\s"))


class Vocabulary:
    """A tokenizer, without the specials that it might add by itself: they are asked for by name."""

    def __init__(self, text: str) -> None:
        self.json = text
        self._open()

    def _open(self) -> None:
        os.environ.setdefault(THREADS, OURS)
        try:
            self._tokenizer = library().Tokenizer.from_str(self.json)
        except Exception as cause:  # the library raises nothing more telling
            raise ConfigError(f"this is no tokenizer.json of the library `tokenizers`: {cause}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # as the text that they are
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.size > MOST:
            raise ConfigError(f"this tokenizer.json has an id of {self.size - 1:,}; more than {MOST:,} are not read")
        if not self.size:
            raise ConfigError("this tokenizer.json has no tokens; train it first")
        self.begin, self.end = self._find(BEGIN), self._find(END)
        self.mask, self.pad, self.unknown = self._find(MASK), self._find(PAD), self._find(UNKNOWN)
        known = [number for number in (self.begin, self.end, self.mask, self.pad, self.unknown) if number is not None]
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special = frozenset([*known, *(int(number) for number, token in added if token.special)])
        forbidden = sorted(self.special - {self.unknown})
        self._forbidden = np.array(forbidden, np.int32)
        names = [self._tokenizer.id_to_token(number) for number in forbidden]
        apart = "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names if len(name) > 1)
        self._apart = re.compile(apart) if apart else None

    def _find(self, names: Sequence[str]) -> int | None:
        found = (self._tokenizer.token_to_id(name) for name in names)
        return next((number for number in found if number is not None), None)

    def __getstate__(self) -> dict[str, Any]:
        return {"json": self.json}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.json = state["json"]
        self._open()

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, without specials: int32 [n]."""
        parts: list[list[Ids]] = [[] for _ in texts]
        for number, ids in self.stream(texts):
            parts[number].append(ids)
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def stream(self, texts: Iterable[str]) -> Iterator[tuple[int, Ids]]:
        """(number of a text, the ids of its next piece), in order, never holding more than a batch of pieces."""
        batch: list[str] = []
        numbers: list[int] = []
        held = 0
        for number, text in enumerate(texts):
            for piece in pieces(text):
                batch.append(piece)
                numbers.append(number)
                held += len(piece) + 64
                if held >= BATCH:
                    yield from zip(numbers, self._ids(batch), strict=True)
                    batch, numbers, held = [], [], 0
        yield from zip(numbers, self._ids(batch), strict=True)

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind ids; specials show their names."""
        text: str = self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=False)
        return text

    def files(self, length: int) -> dict[str, str]:
        """The tokenizer by file name, as transformers reads it, for models that see `length` tokens."""
        name = self._tokenizer.id_to_token
        roles = {
            **{"bos_token": self.begin, "cls_token": self.begin, "eos_token": self.end, "sep_token": self.end},
            **{"mask_token": self.mask, "pad_token": self.pad, "unk_token": self.unknown},
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": length,
            "clean_up_tokenization_spaces": False,
            **{role: name(number) for role, number in roles.items() if number is not None},
        }
        return {
            "tokenizer/tokenizer.json": self.json,
            "tokenizer/tokenizer_config.json": json.dumps(config, indent=1) + "\n",
        }

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> Vocabulary:
        """What `files` gave."""
        return cls(files["tokenizer/tokenizer.json"])

    def _ids(self, texts: Sequence[str]) -> list[Ids]:
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        arrays = [np.array(encoding.ids, np.int32) for encoding in found]
        return [
            self._taken_apart(text) if np.isin(ids, self._forbidden).any() else ids
            for text, ids in zip(texts, arrays, strict=True)
        ]

    def _taken_apart(self, text: str) -> Ids:
        """The ids of a text where the model itself (a unigram one) knows the names of specials: they are cut in two."""
        parts = self._apart.split(text) if self._apart else [text]
        found = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        ids = np.array([number for encoding in found for number in encoding.ids], np.int32)
        return ids[~np.isin(ids, self._forbidden)]


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of about `PIECE` characters; at least one, which may be empty."""
    start = 0
    while len(text) - start > PIECE:
        first, last = start + PIECE, start + FAR
        cut = next((found.start() for safe in SAFE if (found := safe.search(text, first, last))), last)
        yield text[start:cut]
        start = cut
    if start < len(text) or not text:
        yield text[start:]


@contextmanager
def threaded() -> Iterator[None]:
    """Let the library use all cores meanwhile; for the main process, as forked ones do not have its threads."""
    if os.environ.get(THREADS, OURS) != OURS:  # somebody else's decision
        yield
        return
    os.environ[THREADS] = "on"
    try:
        yield
    finally:
        os.environ[THREADS] = OURS


def library() -> Any:
    """The module `tokenizers`."""
    try:
        import tokenizers
    except ImportError:
        raise DataError("text needs the library `tokenizers`: pip install 'selfsup[text]'") from None
    return tokenizers
