"""Documents to tokens, rows and batches; what people see of them; what a run keeps."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from selfsup.cli.outcome import found_in_data
from selfsup.kernel import compose
from selfsup.kernel.config import check
from selfsup.kernel.contracts import Signal
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import BadSample, ConfigError, ContractError, DataError
from selfsup.kernel.loader import Loader, Part, Reader, Relaid
from selfsup.kernel.random import stream, tag
from selfsup.plugins.backbones.transformer import Transformer
from selfsup.plugins.common.vocabulary_training import train
from selfsup.plugins.modalities.text import Text


class Source:
    notes = ("some texts",)

    def __init__(self, texts):
        self.texts, self.parts = texts, [Part(len(texts), len(texts))]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"text": self.texts[index]}

    def name(self, index):
        return f"file {index}"


WORDS = ["the cat sat on the mat.", "a dog ran off", "no", "rain fell on the log and on the mat " * 9]


def text_of(texts=WORDS, **options):
    text = Text(**{"tokenizer": "bytes", "length": 32, **options})
    text.learn(Source(texts))
    return text


def draw(ids):
    return lambda purpose: stream(0, purpose, ids)


def test_a_document_is_read_to_its_first_tokens():
    text = text_of()
    assert text.vocabulary.decode(text.read(WORDS[0])) == WORDS[0]
    assert text.read(WORDS[0]).dtype == torch.int64
    assert text.vocabulary.decode(text.read(WORDS[3])) == WORDS[3][:32]
    with pytest.raises(BadSample, match="invalid UTF-8 at byte 1"):
        text.read(b"a\xff")
    with pytest.raises(BadSample, match=r"more than the 10 that modality\.max_bytes allows"):
        text_of(max_bytes=10).read("a" * 11)


def test_reading_a_long_document_stops_when_there_are_enough_tokens(monkeypatch):
    text = text_of()
    monkeypatch.setattr("selfsup.plugins.common.vocabulary.PIECE", 8)
    encoded = []
    real = text.vocabulary.encode
    monkeypatch.setattr(text.vocabulary, "encode", lambda texts: encoded.extend(texts) or real(texts))
    assert len(text.read(WORDS[3] * 100)) == 32
    assert len(encoded) <= 5


@pytest.mark.parametrize("ends", ["document", "piece"])
def test_documents_are_padded_for_evaluation(ends):
    text = text_of(ends=ends)
    vocabulary = text.vocabulary
    signal = text.collate([text.read(words) for words in WORDS])
    assert signal.x.shape == signal.segments.shape == signal.positions.shape == (4, 32)
    assert text.collate([text.read("no")]).x.shape == (1, 4)
    for row, words in enumerate(WORDS[:3]):
        real = signal.real()[row]
        assert vocabulary.decode(signal.x[row][real][1:-1]) == words
        assert signal.x[row][real][[0, -1]].tolist() == [vocabulary.begin, vocabulary.end]
        assert (signal.x[row][~real] == vocabulary.pad).all()
        assert signal.positions[row][real].tolist() == list(range(int(real.sum())))
    long = signal.x[3].tolist()
    assert (long[-1] == vocabulary.end) == (ends == "piece"), "a document that was cut has not ended"
    assert text.amount(signal) == int(signal.real().sum())


def test_training_rows_go_through_read_and_collate_as_they_are():
    text = text_of()
    rows = text.rows(Source(WORDS), 0, None, 0.01)
    assert isinstance(rows, Relaid)
    batch = Reader(rows, {"encoder": text}, lambda samples, draw: {"encoder": _collated(text, samples)}, 0)[range(6)]
    signal = batch["encoder"]
    assert (signal.x.dtype, signal.segments.dtype, signal.positions.dtype) == (torch.int64, torch.int32, torch.int64)
    assert signal.x.shape == (6, 32)
    assert batch["amount"] == {"tokens": float((signal.segments > 0).sum())}


def _collated(text, samples):
    return text.collate([sample["encoder"] for sample in samples])


def test_every_epoch_shows_every_token_once(monkeypatch):
    text = text_of()
    rows = text.rows(Source(WORDS), 0, None, 0.01)
    reader = Reader(rows, {"encoder": text}, lambda samples, draw: {"encoder": _collated(text, samples)}, 0)
    loader = Loader(reader, batch=1, microbatch=0, workers=0, timeout=1.0)
    wanted = sorted(i for ids in text.vocabulary.encode(WORDS) for i in [*ids.tolist(), text.vocabulary.end])
    epochs = []
    for epoch in range(3):
        signals = [loader.read(epoch * len(rows) + step)[0]["encoder"] for step in range(len(rows))]
        epochs.append([signal.x[0].tolist() for signal in signals])
        shown = [i for s in signals for i, at in zip(s.x[s.real()].tolist(), s.positions[s.real()], strict=True) if at]
        assert sorted(shown) == wanted
    assert sorted(epochs[0]) != sorted(epochs[1]), "rows are laid anew"


def test_without_packing_training_sees_random_crops():
    text = text_of(pack=False)
    single = text.rows(Source(["", *WORDS]), 0, None, 0.01)
    assert not isinstance(single, Relaid)
    assert (len(single), single.name(0)) == (4, "file 1")
    raws = [text.read(single[3]["text"])] * 64
    ids = tag(torch.arange(64), 3)
    signal = text.collate(raws, draw(ids))
    assert signal.x.shape == (64, 32)
    assert len({tuple(row.tolist()) for row in signal.x}) > 32
    assert all(text.vocabulary.decode(i for i in row if i > 2) in WORDS[3] for row in signal.x)
    assert torch.equal(signal.x, text.collate(raws, draw(ids)).x)
    short = text.collate([single[2]["text"]], draw(ids[:1]))
    assert short.x.shape == (1, 32), "training rows are of one length"
    assert int(short.segments.sum()) == 4


def test_no_token_sees_another_document():
    """Changing one sequence of a row leaves what a transformer makes of the others as it was, to the bit."""
    torch.manual_seed(0)
    text = text_of(pieces=8)
    rows = text.rows(Source(WORDS), 0, None, 0.01)
    signals = [text.collate([rows[i]["text"]]) for i in range(len(rows))]
    signal = next(s for s in signals if s.segments.max() >= 2)
    stem = text.stem(16)
    for causal in (False, True):
        mixer = Transformer(width=16, depth=2, heads=2, positions="rotary").eval()
        changed = Signal(torch.where(signal.segments == 2, 7, signal.x), signal.segments, signal.positions)
        with torch.no_grad():
            one, other = (mixer(stem(s), causal=causal).x for s in (signal, changed))
        assert torch.equal(one[signal.segments == 1], other[signal.segments == 1])
        assert not torch.equal(one[signal.segments == 2], other[signal.segments == 2])


def test_notes_say_what_there_is():
    text = text_of()
    notes = text.rows(Source([*WORDS, "", b"\xff"]), 0, None, 0.01).notes
    assert notes[0] == "some texts"
    assert notes[1] == f"4 documents of {sum(map(len, WORDS))} tokens, 1.00 bytes each (bytes, 259 different ones)"
    assert notes[2:4] == [
        "1 sample without text left out",
        "1 sample left out: file 5: invalid UTF-8 at byte 0 (0xff)",
    ]
    assert "rows of 32 tokens, " in notes[4]
    with pytest.raises(DataError, match=r"2 of 3 samples cannot be used, more than data\.max_bad_fraction = 0\.01"):
        text.rows(Source(["fine", b"\xff", b"\xff"]), 0, None, 0.01)


def test_rows_that_are_full_of_short_documents_say_what_to_change():
    text = text_of(pieces=4)
    notes = text.rows(Source(["no"] * 100), 0, None, 0.01).notes
    assert "at most modality.pieces = 4 sequences" in notes[-1]
    assert "at most" not in text_of(pieces=8).rows(Source(["no"] * 100), 0, None, 0.01).notes[-1]
    assert "at most" not in text.rows(Source(["no"]), 0, None, 0.01).notes[-1]


def test_short_utterances_fill_rows():
    """Questions of 2 to 28 words, as in a data set of intents."""
    lengths = np.random.default_rng(0).integers(8, 130, 3000)
    texts = ["".join("ab "[i % 3] for i in range(n)) + "!" for n in lengths]
    text = text_of(length=512, ends="piece")
    rows = text.rows(Source(texts), 0, None, 0.01)
    assert rows.used >= 0.99


def test_it_learns_once_and_keeps_what_it_learned():
    text = Text(tokenizer="bpe", vocabulary=300)
    with pytest.raises(ContractError, match=r"no vocabulary yet: call learn\(source\) or load\(files\)"):
        text.stem(8)
    assert text.files() == {}
    text.learn(Source(WORDS * 20))
    files = text.files()
    assert set(files) == {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    text.learn(Source(["something else"] * 100))
    assert text.files() == files
    other = Text(tokenizer="bpe", vocabulary=300)
    other.load(json.loads(json.dumps(dict(files))))
    assert other.files() == files
    assert text.stem(8).size == text.vocabulary.size


def test_it_learns_from_an_even_choice_of_documents(monkeypatch):
    """Sorted documents: the first ones alone would not tell which characters there are."""
    monkeypatch.setattr("selfsup.plugins.modalities.text.SAMPLE", 2000)
    source = Source([chr(0x4E00 + i // 10) * 10 for i in range(2000)])
    text = Text(tokenizer="characters", vocabulary=1000)
    text.learn(source)
    known = {
        i // 10 for i in range(2000) if text.vocabulary.unknown not in text.vocabulary.encode([source.texts[i]])[0]
    }
    assert 80 < len(known) < 200
    assert min(known) < 20
    assert max(known) > 180
    assert text.vocabulary.size - 4 == len(known)


def test_bad_documents_are_no_reason_not_to_learn():
    text = Text(tokenizer="characters")
    text.learn(Source([b"\xff", "", "abc"]))
    assert text.vocabulary.size == 4 + 3
    said = "there is no text to learn a tokenizer from in the 2 documents of the data: invalid UTF-8"
    with pytest.raises(DataError, match=said):
        Text().learn(Source([b"\xff", b"\xff"]))


def test_a_tokenizer_from_a_file(tmp_path):
    vocabulary = train("wordpiece", WORDS * 30, 200)
    (tmp_path / "tokenizer.json").write_text(vocabulary.json)
    text = text_of(tokenizer=str(tmp_path / "tokenizer.json"))
    assert text.vocabulary.json == vocabulary.json
    with pytest.raises(ConfigError, match=r"is no file, and no kind: did you mean 'wordpiece'\?"):
        text_of(tokenizer="wordpieces")
    plain = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    (tmp_path / "plain.json").write_text(plain.to_str())
    with pytest.raises(ConfigError, match=r"has no token that begins or ends a document, such as <\|endoftext\|>"):
        text_of(tokenizer=str(tmp_path / "plain.json"))


def test_one_token_may_begin_and_end(tmp_path):
    """T5 has an end alone."""
    t5 = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    t5.add_special_tokens(["<pad>", "</s>", "<unk>"])
    (tmp_path / "t5.json").write_text(t5.to_str())
    text = text_of(tokenizer=str(tmp_path / "t5.json"))
    assert text.collate([text.read("a")]).x.tolist() == [[1, 3, 1]]


@pytest.mark.parametrize("ends", ["document", "piece"])
def test_what_people_see(ends):
    text = text_of(ends=ends)
    vocabulary = text.vocabulary
    around = "<|endoftext|>{}<|endoftext|>".format
    assert text.show(text.collate([text.read("no"), text.read("a dog")])) == [around("no"), around("a dog")]
    rows = text.rows(Source(["no", "a dog"]), 0, None, 0.01)
    (shown,) = text.show(text.collate([rows[0]["text"]]))
    assert [mark for _, mark in shown] == ["", "", ""]
    assert {shown[0][0], shown[2][0]} == {around("no"), around("a dog")}
    assert shown[1][0].strip()
    bare = Signal(torch.tensor([[*vocabulary.encode(["hi"])[0].tolist()]]))
    assert text.show(bare) == ["hi"]


def test_a_run_finds_its_tokens_again(tmp_path, monkeypatch):
    plugins = Plugins()
    options = check("modality", Text, {"tokenizer": "bytes", "length": 64})
    settings = {"train": {"seed": 3}, "data": {"max_bad_fraction": 0.01}, "modality": {"name": "text", **options}}

    class Counted(Source):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    monkeypatch.setattr(plugins.hook, "open_data", lambda **_: Counted(WORDS))
    seen = []
    for _ in range(2):
        kinds = {"encoder": Text(**options)}
        source = compose.open_source(plugins, settings, kinds, [])
        rows = compose.rows(settings, kinds, source, tmp_path)
        seen.append([rows.at(i, 1)["text"].ids.tolist() for i in range(len(rows))])
    assert Counted.reads == len(WORDS)
    assert seen[0] == seen[1]
    assert (tmp_path / "tokens" / "tokens.bin").stat().st_size == 2 * sum(map(len, WORDS))


def test_what_was_learned_is_written_for_people():
    one, two = text_of(), text_of(length=16)

    def found(**modalities):
        return set(
            found_in_data(SimpleNamespace(loader=SimpleNamespace(reader=SimpleNamespace(modalities=modalities))))
        )

    names = {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    assert found(encoder=one) == found(encoder=one, teacher=one) == names
    assert found(text=one, code=two) == {f"{tower}/{name}" for tower in ("text", "code") for name in names}
    assert found(encoder=Text()) == set()


@pytest.mark.parametrize(
    ("options", "says"),
    [({"ends": "both"}, "modality.ends"), ({"length": 2}, "modality.length"), ({"pieces": 0}, "modality.pieces")],
)
def test_options_have_ranges(options, says):
    with pytest.raises(ConfigError, match=says):
        check("modality", Text, options)
