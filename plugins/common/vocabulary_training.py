"""Make a vocabulary from text, or read one from a file.

bpe: byte-level byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; over bytes: Radford et al.
2019, "Language models are unsupervised multitask learners"). wordpiece: BERT's (Devlin et al. 2019,
https://arxiv.org/abs/1810.04805), its pieces found by the merges of bpe, as the library does it: the original training
was never published. characters, bytes: one id each.

The same texts give the same vocabulary. For wordpiece the library numbers the characters within words in the order of a
hash map, which is another one in each process; here they are numbered beforehand.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfsup.kernel.errors import ConfigError, nearest

from .vocabulary import Vocabulary, library, pieces, threaded

GPT = ("<|endoftext|>", "<|mask|>", "<|pad|>")
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNKNOWN = "<|unknown|>"
TWICE = 2  # a pair that stands in the texts once is no token
ALPHABET = 1000  # characters of wordpiece, at most; rarer ones are unknown
RUN = re.compile(r"\S{256}(?=\S)")  # a longer word (base64, genomes) would take training minutes


def train(kind: str, texts: Sequence[str], size: int, lowercase: bool = True) -> Vocabulary:
    """A vocabulary of at most `size` ids, of one of the `KINDS`."""
    with threaded():
        tokenizer = KINDS[kind](texts, size, lowercase)
    return Vocabulary(tokenizer.to_str())


def open_file(path: str) -> Vocabulary:
    """The tokenizer.json at a path, or in the folder of that path; ConfigError says what is there instead."""
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        if (file.parent / "tokenizer" / file.name).is_file():
            raise ConfigError(
                f"modality.tokenizer = {path!r} is a run; its tokenizer is {str(file.parent / 'tokenizer')!r}"
            )
        beside = [entry.name for entry in file.parent.glob("*.json")] if file.parent.is_dir() else []
        found = f" (the folder {str(file.parent)!r} holds {', '.join(sorted(beside)[:5])})" if beside else ""
        raise ConfigError(f"modality.tokenizer = {path!r} is no file{found}, and no kind: {nearest(path, KINDS)}")
    try:
        return Vocabulary(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"modality.tokenizer = {path!r} cannot be read: {cause}") from None
    except ConfigError as cause:
        raise ConfigError(f"modality.tokenizer = {path!r}: {cause}") from None


def byte_level(texts: Sequence[str], size: int, lowercase: bool) -> Any:
    """Byte-pair encoding of bytes, within words as GPT-2 splits them."""
    lib = library()
    bytes_ = lib.pre_tokenizers.ByteLevel
    if size < len(GPT) + 256:
        raise ConfigError(f"modality.vocabulary = {size}: byte-level bpe needs {len(GPT) + 256} or more")
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_(add_prefix_space=False), lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=TWICE,
        special_tokens=list(GPT),
        initial_alphabet=sorted(bytes_.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_words(texts), trainer)
    return tokenizer


def wordpiece(texts: Sequence[str], size: int, lowercase: bool) -> Any:
    """BERT's: words split into the longest known pieces, those within a word marked by ##."""
    lib = library()
    normalizer = lib.normalizers.BertNormalizer(lowercase=lowercase)
    letters = alphabet(texts, normalizer, min(ALPHABET, (size - len(BERT)) // 4))
    if not letters:
        raise ConfigError(f"modality.vocabulary = {size} is too small for wordpiece; choose some thousands")
    learner = lib.Tokenizer(lib.models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, lib.pre_tokenizers.BertPreTokenizer()
    trainer = lib.trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=TWICE,
        special_tokens=[*BERT, *(f"##{letter}" for letter in letters)],  # numbered by us
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    learner.train_from_iterator(_words(texts), trainer)
    vocabulary = json.loads(learner.to_str())["model"]["vocab"]
    tokenizer = lib.Tokenizer(lib.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, learner.pre_tokenizer
    tokenizer.decoder = lib.decoders.WordPiece()
    tokenizer.add_special_tokens(list(BERT))
    named = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = lib.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=named
    )
    return tokenizer


def characters(texts: Sequence[str], size: int, lowercase: bool) -> Any:
    """Every character that the texts hold; if there are more than `size`, the most frequent ones."""
    lib = library()
    names = [*GPT, UNKNOWN, *alphabet(texts, None, size - len(GPT) - 1)]
    # Byte-pair encoding without a merge: a model of its own for characters takes five times as long.
    model = lib.models.BPE({name: number for number, name in enumerate(names)}, [], unk_token=UNKNOWN, fuse_unk=False)
    tokenizer = lib.Tokenizer(model)
    tokenizer.decoder = lib.decoders.Fuse()
    tokenizer.add_special_tokens([*GPT, UNKNOWN])
    return tokenizer


def bytes_of(texts: Sequence[str], size: int, lowercase: bool) -> Any:
    """The 256 bytes of UTF-8."""
    lib = library()
    level = lib.pre_tokenizers.ByteLevel
    names = [*GPT, *sorted(level.alphabet())]
    tokenizer = lib.Tokenizer(lib.models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = level(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = lib.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(GPT))
    return tokenizer


KINDS = {"bpe": byte_level, "wordpiece": wordpiece, "characters": characters, "bytes": bytes_of}


def alphabet(texts: Sequence[str], normalizer: Any, most: int) -> list[str]:
    """The `most` most frequent characters, sorted; with a normalizer, of what it makes of them, without spaces."""
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        for piece in pieces(text):
            found = np.bincount(np.frombuffer(piece.encode("utf-32-le"), np.uint32))
            counts[: len(found)] += found
    every: Counter[str] = Counter()
    for point in np.flatnonzero(counts):
        made = chr(point) if normalizer is None else normalizer.normalize_str(chr(point)).strip()
        every.update(dict.fromkeys(made, int(counts[point])))
    return sorted(sorted(every, key=lambda letter: (-every[letter], letter))[: max(0, most)])


def _words(texts: Sequence[str]) -> Any:
    return (RUN.sub("\\g<0>\n", piece) for text in texts for piece in pieces(text))
