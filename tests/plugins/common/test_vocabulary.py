"""Text to ids and back; what stands in a text; long texts; transformers."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from selfsup.kernel.errors import ConfigError
from selfsup.plugins.common import vocabulary as module
from selfsup.plugins.common.vocabulary import Vocabulary, pieces, threaded
from selfsup.plugins.common.vocabulary_training import KINDS, train

WORDS = "the cat sat on the mat and the dog sat on the log, while rain fell; naïve café 42 times!\n"
TEXTS = [WORDS * 3, "def f(x):\n    return x + 1\n\n\n" * 3, "日本語のテキスト。\n" * 3]
SPECIALS = ("<|endoftext|>", "<|mask|>", "<|pad|>", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "<|unknown|>")


@pytest.fixture(scope="module")
def vocabularies():
    return {kind: train(kind, TEXTS, 400) for kind in KINDS}


KNOWN = st.text("".join(sorted(set("".join(TEXTS)))), max_size=60)


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=60), known=KNOWN)
def test_decoding_gives_back_what_was_encoded(vocabularies, text, known):
    for kind, one in (("bpe", text), ("bytes", text), ("characters", known)):
        vocabulary = vocabularies[kind]
        (ids,) = vocabulary.encode([one])
        assert vocabulary.decode(ids) == one
        assert not set(ids.tolist()) & vocabulary.special
        assert ids.dtype == np.int32


def test_what_the_kinds_are(vocabularies):
    text = "the naïve cat"
    assert len(vocabularies["bytes"].encode([text])[0]) == len(text.encode())
    assert len(vocabularies["characters"].encode([text])[0]) == len(text)
    assert len(vocabularies["bpe"].encode([text])[0]) < len(text)
    assert vocabularies["wordpiece"].decode(vocabularies["wordpiece"].encode(["The NAÏVE cat!"])[0]) == "the naive cat!"
    unknown = vocabularies["characters"].encode(["a☃b"])[0]
    assert unknown[1] == vocabularies["characters"].unknown
    assert vocabularies["bytes"].size == 256 + 3
    assert vocabularies["bytes"].unknown is vocabularies["bpe"].unknown is None


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_specials_in_a_text_are_text(vocabularies, kind):
    vocabulary = vocabularies[kind]
    for name in SPECIALS:
        (ids,) = vocabulary.encode([f"a {name} b{name}"])
        assert not set(ids.tolist()) & (vocabulary.special - {vocabulary.unknown})
        if kind in ("bpe", "bytes"):
            assert vocabulary.decode(ids) == f"a {name} b{name}"


def test_a_unigram_model_that_knows_the_names_of_its_specials_does_not_give_them_away():
    letters = [(letter, -5.0) for letter in "abcs<>/▁"]
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *letters], unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram.add_special_tokens(["<unk>", "</s>"])
    vocabulary = Vocabulary(unigram.to_str())
    assert (vocabulary.begin, vocabulary.end, vocabulary.unknown) == (None, 1, 0)
    (ids,) = vocabulary.encode(["ab</s>c"])
    assert 1 not in ids.tolist()
    assert vocabulary.decode(ids).replace(" ", "") == "ab</s>c"


def by_name(*names):
    tokenizer = Tokenizer(
        models.WordLevel({**{name: i for i, name in enumerate(names)}, "a": len(names)}, unk_token="a")
    )
    tokenizer.add_special_tokens(list(names))
    vocabulary = Vocabulary(tokenizer.to_str())
    found = (vocabulary.begin, vocabulary.end, vocabulary.mask, vocabulary.pad, vocabulary.unknown)
    return tuple(None if number is None else names[number] for number in found)


def test_the_usual_names_are_found():
    gpt2 = "<|endoftext|>"
    assert by_name(gpt2) == (gpt2, gpt2, None, None, None)
    assert by_name("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") == ("[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]")
    assert by_name("<s>", "<pad>", "</s>", "<unk>", "<mask>") == ("<s>", "</s>", "<mask>", "<pad>", "<unk>")
    assert by_name("<|begin_of_text|>", "<|end_of_text|>")[:2] == ("<|begin_of_text|>", "<|end_of_text|>")
    assert by_name("<pad>", "</s>", "<unk>") == (None, "</s>", None, "<pad>", "<unk>")
    assert by_name(gpt2, "[CLS]", "[SEP]", "[MASK]")[:3] == ("[CLS]", "[SEP]", "[MASK]")


def test_what_a_file_says_of_padding_cutting_and_specials_is_left_out(vocabularies):
    tokenizer = Tokenizer.from_str(vocabularies["bpe"].json)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    plain = vocabularies["bpe"].encode([WORDS, "cat"])
    for one, other in zip(Vocabulary(tokenizer.to_str()).encode([WORDS, "cat"]), plain, strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_it_and_agrees(vocabularies, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = vocabularies[kind]
    for name, text in vocabulary.files(512).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for text in [*TEXTS, "unseen words, and 🙂"]:
        (ids,) = vocabulary.encode([text])
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
        assert theirs.decode(ids.tolist()) == vocabulary.decode(ids)
    assert theirs.mask_token_id == vocabulary.mask
    assert theirs.pad_token_id == vocabulary.pad
    assert theirs.unk_token_id == vocabulary.unknown
    assert (theirs.cls_token_id, theirs.sep_token_id) == (vocabulary.begin, vocabulary.end)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (vocabulary.begin, vocabulary.end)
    assert len(theirs) == vocabulary.size
    assert theirs.model_max_length == 512
    if kind == "wordpiece":
        assert theirs("cat")["input_ids"] == [vocabulary.begin, *vocabulary.encode(["cat"])[0], vocabulary.end]


def test_it_comes_back_from_files_and_pickles(vocabularies):
    for vocabulary in vocabularies.values():
        for copy in (Vocabulary.from_files(vocabulary.files(8)), pickle.loads(pickle.dumps(vocabulary))):
            assert copy.json == vocabulary.json
            assert copy.special == vocabulary.special
            (one,), (other,) = copy.encode(["a[MASK]<|mask|>"]), vocabulary.encode(["a[MASK]<|mask|>"])
            assert one.tolist() == other.tolist()


@pytest.mark.parametrize("text", ["", "hello", "{}", json.dumps({"model": {"type": "BPE"}}), "[1]"])
def test_what_is_no_tokenizer_is_refused(text):
    with pytest.raises(ConfigError, match=r"this is no tokenizer\.json"):
        Vocabulary(text)


def test_a_tokenizer_without_tokens_is_refused():
    with pytest.raises(ConfigError, match="has no tokens"):
        Vocabulary(Tokenizer(models.BPE()).to_str())


@pytest.fixture
def short(monkeypatch):
    """Pieces of some twenty characters, and at most sixty where there is no safe place."""
    monkeypatch.setattr(module, "PIECE", 20)
    monkeypatch.setattr(module, "FAR", 60)
    monkeypatch.setattr(module, "BATCH", 200)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*TEXTS, WORDS.replace("\n", " ") * 20, "a  b\n\n  c\t\td " * 30, "x;\n" * 50])
def test_a_long_text_has_the_ids_of_the_whole(vocabularies, short, kind, text):
    vocabulary = vocabularies[kind]
    whole = vocabulary._tokenizer.encode(text, add_special_tokens=False).ids
    found = list(vocabulary.stream(["cat", text, "dog"]))
    assert len(found) > 3 or len(text) < 40, "it was to be cut"
    assert [number for number, _ in found] == sorted(number for number, _ in found)
    assert np.concatenate([ids for number, ids in found if number == 1]).tolist() == whole
    assert vocabulary.encode(["cat", text])[1].tolist() == whole


def test_pieces_are_cut_at_safe_places_or_by_force(short):
    assert list(pieces("")) == [""]
    assert list(pieces("short")) == ["short"]
    words = "aaaa bbbb cccc dddd eeee ffff gggg"
    assert list(pieces(words)) == ["aaaa bbbb cccc dddd eeee"[:24], words[24:]]
    endless = "x" * 150
    assert [len(piece) for piece in pieces(endless)] == [60, 60, 30]
    for text in (words * 9, endless, "字" * 99, "a\n" * 99, " " * 99, "a.\nb" * 50):
        found = list(pieces(text))
        assert "".join(found) == text
        assert all(0 < len(piece) <= 60 for piece in found)
        safe = [b[0].isspace() and not a[-1].isspace() for a, b in pairwise(found)]
        assert all(safe) or text.isspace() or not any(c.isspace() for c in text)


def test_gpt4s_way_of_splitting_is_cut_safely_too(short):
    lib = pytest.importorskip("tokenizers")
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(lib.Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    text = ("if (x):\n    y = 12345;\n\n" + WORDS) * 5
    whole = [word for word, _ in splitter.pre_tokenize_str(text)]
    assert [word for piece in pieces(text) for word, _ in splitter.pre_tokenize_str(piece)] == whole


def test_no_more_than_a_batch_is_held(vocabularies, short):
    asked = []

    def texts():
        for number in range(100):
            asked.append(number)
            yield WORDS[:15]

    stream = vocabularies["bpe"].stream(texts())
    next(stream)
    assert len(asked) < 5


def test_threads_are_on_meanwhile_only(monkeypatch):
    monkeypatch.delenv(module.THREADS, raising=False)
    with threaded():
        assert os.environ[module.THREADS] == "on"
    assert os.environ[module.THREADS] == "off"
    monkeypatch.setenv(module.THREADS, "false")  # a person's decision
    with threaded():
        assert os.environ[module.THREADS] == "false"


FORK = """
import os
from selfsup.plugins.common.vocabulary_training import train
vocabulary = train("bpe", ["some words and more words " * 50] * 50, 300)
if (child := os.fork()) == 0:
    vocabulary.encode(["words "] * 100)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_data_worker_encodes_without_a_word():
    environment = {name: value for name, value in os.environ.items() if name != module.THREADS}
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_an_id_of_billions_is_refused():
    model = {"type": "WordLevel", "vocab": {"a": 2**31, "b": 0}, "unk_token": "a"}
    with pytest.raises(ConfigError, match="an id of 2,147,483,648; more than 16,777,216 are not read"):
        Vocabulary(json.dumps({"version": "1.0", "model": model}))
