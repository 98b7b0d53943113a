from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from selfsup.cli.eval import evaluate
from selfsup.kernel import Plugins, Signal, compose, loop
from selfsup.kernel.config import nest, to_toml
from selfsup.kernel.errors import ContractError, DataError
from selfsup.plugins.common.perplexity import Asked, measure, windows

TEXTS = ["to be, or not to be", "that is", "x" * 70 + " the question", "é", "a b"]
SMALL = {
    "modality.tokenizer": "bytes",
    "modality.length": 16,
    "backbone.width": 16,
    "backbone.depth": 1,
    "backbone.heads": 2,
    "backbone.length": 16,
    "train.steps": 30,
    "train.batch": 4,
    "data.workers": 0,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "gpt", "gpt", SMALL, texts)


def train(folder: Path, name: str, options: dict[str, object], texts: Path) -> Path:
    plugins = Plugins()
    asked = {"objective": {"name": name}, "preset": "tiny", "data": {"paths": [str(texts)]}}
    settings = compose.resolve(plugins, asked, nest(options))
    folder.mkdir()
    (folder / "run.toml").write_text(to_toml(settings))
    started = compose.start(plugins, settings, folder)
    loop.train(started)
    started.save()
    return folder


@torch.no_grad()
def nats_by_hand(run: Path, text: str, all_before: bool = False) -> tuple[float, float]:
    """Of the bytes of a text and of its end, one by one, each from what its window shows: up to 15 tokens before it.

    Windows follow each other or, with `all_before`, there is one for each prediction.
    """
    objective, _, _ = compose.restore(run, Plugins())
    words = objective.exports.modality.vocabulary
    ids = [words.begin, *words.encode([text])[0].tolist(), words.end]
    nats = []
    for place in range(1, len(ids)):
        first = max(0, place - 15) if all_before else (place - 1) // 15 * 15
        hidden = objective.decoder(Signal(torch.tensor([ids[first:place]]))).x[0, -1]
        nats.append(-float((hidden @ objective.weight.T).log_softmax(0)[ids[place]]))
    return sum(nats[:-1]), nats[-1]


def test_every_token_is_predicted_once(run: Path, texts: Path) -> None:
    found = measure(Plugins(), Asked(run=run, paths=[str(texts)], batch=3))
    size = sum(len(text.encode()) for text in TEXTS)
    assert (found.size.documents, found.size.tokens, found.size.bytes) == (len(TEXTS), size, size)
    parts = [nats_by_hand(run, text) for text in TEXTS]
    text, ends = (sum(part) for part in zip(*parts, strict=True))
    row = found.rows["trained"]
    # float32 sums of about a hundred terms on both sides
    assert row.nats == pytest.approx(text / size, rel=1e-5)
    assert row.nats_with_ends == pytest.approx((text + ends) / (size + len(TEXTS)), rel=1e-5)
    assert row.perplexity == pytest.approx(math.exp(text / size), rel=1e-4)
    assert row.bits_per_byte == pytest.approx(text / size / math.log(2), rel=1e-5)


def test_training_beats_chance_and_chance_is_known(run: Path, texts: Path) -> None:
    found = measure(Plugins(), Asked(run=run, paths=[str(texts)]))
    uniform, rows = math.log(found.vocabulary), found.rows
    assert rows["uniform"].nats == pytest.approx(uniform)
    assert rows["uniform"].nats_with_ends == pytest.approx(uniform)
    assert abs(rows["random"].nats - uniform) < 0.5  # logits are products of vectors 4 and about 0.1 long
    assert rows["trained"].nats < rows["random"].nats - 0.5
    assert found.step == 30


def test_neither_batch_nor_the_order_of_windows_matters(run: Path, texts: Path) -> None:
    few, many = (measure(Plugins(), Asked(run=run, paths=[str(texts)], batch=n)).rows["trained"] for n in (1, 64))
    assert few.nats == pytest.approx(many.nats, rel=1e-6)


def test_the_runs_own_data_is_the_default_and_a_limit_takes_the_first(run: Path) -> None:
    found = measure(Plugins(), Asked(run=run, limit=2))
    assert (found.size.documents, found.size.bytes) == (2, sum(len(text) for text in TEXTS[:2]))


@pytest.mark.parametrize("stride", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("units", [[1], [7], [8], [22, 1, 7, 40]])
def test_windows_predict_each_unit_once(stride: int | None, units: list[int]) -> None:
    found = windows(torch.tensor(units).numpy(), 7, stride)
    predicted = sorted((w.document, w.start + i) for w in found for i in range(w.seen, w.size))
    assert predicted == [(d, i) for d, n in enumerate(units) for i in range(n)]
    assert all(w.size <= 7 for w in found)
    if stride:  # all but the first window are as long as they can be, and predict `stride` units at most
        assert all(w.size == 7 and w.size - w.seen <= stride for w in found if w.start > 0)
    else:
        assert not any(w.seen for w in found)


def test_with_a_stride_each_token_sees_what_fits_before_it(run: Path, texts: Path) -> None:
    found = measure(Plugins(), Asked(run=run, paths=[str(texts)], stride=1)).rows["trained"]
    text = sum(nats_by_hand(run, text, all_before=True)[0] for text in TEXTS)
    assert found.nats == pytest.approx(text / sum(len(text.encode()) for text in TEXTS), rel=1e-5)
    assert found.nats != measure(Plugins(), Asked(run=run, paths=[str(texts)])).rows["trained"].nats


def test_bad_documents_are_named(run: Path, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("some text")
    (tmp_path / "broken.txt").write_bytes(b"ab\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    found = measure(Plugins(), Asked(run=run, paths=[str(tmp_path)]))
    assert found.size.documents == 3
    notes = "\n".join(found.notes)
    assert "broken.txt: invalid UTF-8 at byte 2" in notes
    assert "1 sample left out" in notes
    assert "no --data" not in notes
    for number in range(3):
        (tmp_path / f"{number}.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"0\.txt: invalid UTF-8"):
        measure(Plugins(), Asked(run=run, paths=[str(tmp_path)]))


def test_texts_of_the_run_are_said_to_be_its_own(run: Path) -> None:
    assert measure(Plugins(), Asked(run=run)).notes == [
        "no --data: these are the run's own texts, which it was trained on"
    ]


def test_what_a_tokenizer_cannot_spell_is_said(tmp_path: Path, texts: Path) -> None:
    small = SMALL | {"modality.tokenizer": "characters", "train.steps": 1}
    run = train(tmp_path / "letters", "gpt", small, texts)
    (tmp_path / "strange.txt").write_text("to be ⁂⁂")
    found = measure(Plugins(), Asked(run=run, paths=[str(tmp_path / "strange.txt")]))
    assert "2 of 8 tokens stand for text that the tokenizer does not know" in found.notes


def test_an_objective_that_predicts_no_next_token_is_refused(tmp_path: Path, texts: Path) -> None:
    options = {
        **SMALL,
        "modality.tokenizer": "wordpiece",
        "modality.vocabulary": 300,
        "train.steps": 1,
        "train.batch": 1,
    }
    run = train(tmp_path / "bert", "bert", options, texts)
    with pytest.raises(ContractError, match="bert does not predict the next token"):
        measure(Plugins(), Asked(run=run, paths=[str(texts)]))


def test_the_command_prints_a_table_or_json(run: Path, texts: Path) -> None:
    command = ["perplexity", str(run), "--data", str(texts)]
    shown = CliRunner().invoke(evaluate, command, obj=Plugins(), catch_exceptions=False)
    plain = CliRunner().invoke(evaluate, [*command, "--json"], obj=Plugins(), catch_exceptions=False)
    row = json.loads(plain.output)["rows"]["trained"]
    assert f"{row['bits_per_byte']:.4f}" in shown.output
    assert "5 documents of 114 tokens and 114 bytes" in shown.output
    assert "uniform guess" in shown.output
