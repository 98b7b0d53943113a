"""`ssl check`: one step, its shapes and figures, and nothing on disk."""

import json
from pathlib import Path

import pytest

from selfsup.plugins.services.online import Online
from selfsup.plugins.services.validation import Validation

CHECK = ("check", "--plugin", "guess")


def test_shapes_sizes_and_figures(toys):
    found = json.loads(toys(*CHECK, "--json")[0])
    assert found["signals"] == {"encoder": {"raw": [8, 5, 4], "dtype": "float32", "tokens": [8, 5, 8]}}
    assert found["parameters"] == {"encoder": 4 * 8 + 8 + 8 * 8 + 8, "head": 8 * 4 + 4}
    assert found["loss"] > 0
    assert found["gradient_norm"] > 0
    assert found["metrics"].keys() == {"size"}
    assert found["no_gradient"] == []


def test_it_writes_nothing(toys):
    out, _ = toys(*CHECK)
    assert "nothing was written" in out
    assert list(Path().iterdir()) == []


def test_what_would_be_measured_is_opened_and_not_measured(toys, monkeypatch):
    for service in (Validation, Online):
        monkeypatch.setattr(service, "measure", lambda self, run: pytest.fail("it was measured"))
    Path("held").mkdir()
    for i in range(6):
        Path(f"held/{i}.num").write_text(str(i))
    toys(*CHECK, "--set", "online.every=1", "--set", "validation.data=held", "--set", "tensorboard.every=1")
    assert "validation.data: there is no 'hedl'" in toys(*CHECK, "--set", "validation.data=hedl", code=1)[1]
    assert [p.name for p in Path().iterdir()] == ["held"]


def test_people_see_the_same(toys):
    out, _ = toys(*CHECK, "--batch", 3)
    for part in (
        "encoder: raw [3, 5, 4] float32 -> tokens [3, 5, 8]",
        "built-in sample",
        "head: 36 parameters",
        "norm",
    ):
        assert part in out


def test_a_batch_that_train_would_refuse_is_said(toys):
    Path("d").mkdir()
    for n in range(9):
        Path(f"d/{n}.num").write_text(str(n))
    file = Path("big.toml")
    file.write_text("[objective]\nname = 'guess'\n[data]\npaths = ['d']\n[train]\nbatch = 10\n")
    out, _ = toys("check", file)
    assert "a batch of 10 is larger than the data: to train, choose --batch 9 or less" in out
    assert "a batch of 10 is larger than the data" in toys("explain", file)[0].replace("\n", " ")
    file.write_text(file.read_text().replace("10", "9"))
    assert "larger than" not in toys("check", file)[0] + toys("explain", file)[0]


def test_a_failure_is_the_reason_and_exit_code_1(toys):
    _, err = toys(*CHECK, "--set", "objective.poison=0", code=1)
    assert "step 0: the loss is nan" in err
    _, err = toys(*CHECK, "--set", "objective.crash=0", code=1)
    assert "a toy broke" in err


def test_a_failure_is_found_without_a_watchdog(toys, monkeypatch):
    monkeypatch.setenv("SELFSUP_DISABLE", "services.watchdog")
    _, err = toys(*CHECK, "--set", "objective.poison=0", code=1)
    assert "not finite" in err


def test_it_does_not_touch_the_state_of_the_tower(toys):
    """The look at the shapes leaves the loss as `train` has it."""
    loss = json.loads(toys(*CHECK, "--json")[0])["loss"]
    toys("train", "--plugin", "guess", "--steps", 1, "--out", "r", "--set", "data.workers=0")
    first = json.loads(Path("r/metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert loss == first
