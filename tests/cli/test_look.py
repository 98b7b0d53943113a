"""`ssl look`: what the model will see, before any training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as pillow

LOOK = ("look", "--plugin", "guess")

MARKS = """

class Marks(Guess):
    def show(self, batch, step, guess=True):
        assert not guess and not self.training
        return {"kind": [[("seen", ""), (" hidden", "hidden"), ("[/red]", "")]] * len(batch["ids"])}
"""


@pytest.fixture
def marks(toys):
    file = toys.path / "toy_plugins.py"
    file.write_text(file.read_text() + MARKS)
    entry = next(toys.path.glob("toys-*")) / "entry_points.txt"
    entry.write_text(entry.read_text().replace("guess = toy_plugins:Guess", "guess = toy_plugins:Marks"))
    return toys


def test_texts_are_printed_and_nothing_is_written(toys):
    out, _ = toys(*LOOK, "--samples", 3)
    assert out.count("encoder: float32 [5, 4]") == 3
    assert out.count("built-in number sample") == 3
    assert list(Path().iterdir()) == []


def test_hidden_parts_are_in_brackets(marks):
    out, _ = marks(*LOOK, "--samples", 1)
    assert "kind: seen [hidden][/red]" in out


def test_texts_go_to_a_file_if_asked(marks):
    out, _ = marks(*LOOK, "--samples", 2, "--out", "deep/sheet.txt")
    assert "deep/sheet.txt: 2 samples; kind" in out
    assert Path("deep/sheet.txt").read_text().count("kind: seen [hidden][/red]\n") == 2


def test_texts_that_cannot_be_used_are_named(ssl):
    Path("d").mkdir()
    Path("d/good.txt").write_text("abcdefgh" * 50)
    Path("d/bad.txt").write_bytes(b"caf\xe9")
    tiny = ("--preset", "tiny", "--set", "modality.tokenizer=characters")
    out, _ = ssl("look", "--plugin", "gpt", "--data", "d", "--samples", 1, *tiny)
    assert "1 sample left out: d/bad.txt: invalid UTF-8" in out


def test_pictures_are_one_sheet(ssl):
    out, _ = ssl("look", "--plugin", "simclr", "--samples", 4)
    assert "look-simclr.png: 4 samples; sample, one view, its partner" in out
    with pillow.open("look-simclr.png") as image:
        assert image.size > (300, 400)
    ssl("look", "--plugin", "simclr", "--samples", 4, "--seed", 1, "--out", "again.png")
    with pillow.open("look-simclr.png") as one, pillow.open("again.png") as other:
        assert one.size == other.size
        assert (np.asarray(one) != np.asarray(other)).any()


def test_options_are_those_of_train(ssl):
    """With views of the whole sample and no distortion, both views are the sample."""
    Path("d").mkdir()
    pillow.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save("d/a.png")
    flags = ("--preset", "tiny", "--set", "modality.size=32", "--set", "objective.strength=0")
    out, _ = ssl("look", "--plugin", "simclr", "--data", "d", *flags, "--set", "objective.extent=[1,1]")
    assert "1 sample;" in out
    with pillow.open("look-simclr.png") as image:
        columns = np.asarray(image)[-112:-16]  # of the only row
    sample, first, second = (columns[:, 12 + 108 * n : 108 + 108 * n].astype(int) for n in range(3))
    assert np.abs(sample - first).max() <= 1
    assert np.abs(first - second).max() == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--plugin", "simclx"), "did you mean 'simclr'?"),
        (("--plugin", "simclr", "--data", "nowhere"), "nowhere"),
        (("--plugin", "simclr", "--out", "sheet.doc"), "sheet.doc cannot be written: unknown file extension"),
        (("--plugin", "simclr", "--out", "plain/sheet.png"), "choose another file with --out"),
    ],
)
def test_errors_are_for_people(ssl, args, message):
    Path("plain").touch()
    _, err = ssl("look", *args, code=1)
    assert message in err


def test_help_has_an_example(ssl):
    assert "ssl look --plugin simclr --data photos" in ssl("look", "--help")[0]
