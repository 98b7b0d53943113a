"""`ssl explain`: the resolved recipe beside the paper's."""

import json
from pathlib import Path


def settings(toys, *args):
    facts = json.loads(toys("explain", "--plugin", "guess", *args, "--json")[0])
    return facts, {row["option"]: row for row in facts["settings"]}


def test_the_paper_is_preset_base(toys):
    facts, rows = settings(toys, "--preset", "base")
    assert facts["paper"].startswith("A. Toy 2020")
    assert [name for name, row in rows.items() if row["differs"]] == []
    assert rows["steps"]["run"] == rows["steps"]["paper"] == 100


def test_differences_are_marked(toys):
    facts, rows = settings(toys, "--set", "objective.share=0.2")
    assert facts["preset"] == "tiny"
    differing = {name: (row["run"], row["paper"]) for name, row in rows.items() if row["differs"]}
    assert differing == {"steps": (12, 100), "backbone.width": (8, 16), "objective.share": (0.2, 0.4)}


def test_the_learning_rate_follows_the_batch(toys):
    _, rows = settings(toys, "--preset", "base", "--batch", 4)
    rate = rows["effective learning rate"]
    assert (rate["run"], rate["paper"]) == (0.005, 0.01)


def test_epochs_become_steps_of_the_data(toys):
    Path("d").mkdir()
    for n in range(20):
        Path(f"d/{n}.num").write_text(str(n))
    facts, rows = settings(toys, "--data", "d", "--epochs", 3, "--batch", 8)
    assert facts["samples"] == 20
    assert (rows["steps"]["run"], rows["epochs"]["run"]) == (8, 3.2)


def test_people_see_a_table(toys):
    out, _ = toys("explain", "--plugin", "guess")
    (line,) = [line for line in out.splitlines() if line.strip().startswith("width") and "≠" in line]
    assert line.split() == ["width", "8", "≠", "16"]
    assert "2 of " in out
    assert "settings differ from the paper's" in out
    assert "all as in the paper" in toys("explain", "--plugin", "guess", "--preset", "base")[0]


def test_texts_count_by_the_rows_of_training(ssl):
    """Two texts of 400 characters are 26 rows of 32 tokens, where a token is a character: 13 steps of two epochs."""
    Path("d").mkdir()
    for n in range(2):
        Path(f"d/{n}.txt").write_text("abcdefgh" * 50)
    tiny = ("--preset", "tiny", "--set", "modality.tokenizer=characters", "--set", "modality.length=32")
    out, _ = ssl("explain", "--plugin", "gpt", "--data", "d", *tiny, "--batch", 4, "--epochs", 2, "--json")
    facts = json.loads(out)
    rows = {row["option"]: row["run"] for row in facts["settings"]}
    assert (facts["samples"], rows["steps"], rows["epochs"]) == (26, 13, 2.0)


def test_names_of_options_are_whole_however_narrow_the_terminal(ssl, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out, _ = ssl("explain", "--plugin", "mae")
    assert "  decoder.backbone.activation_dropout " in out
