"""What takes long says where it is, now and then."""

from __future__ import annotations

import importlib
import threading
import time
from pathlib import Path

import pytest

from selfsup.cli import patience
from selfsup.cli.patience import asked_for
from selfsup.kernel import distributed


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(patience, "FIRST", 0.1)


def test_it_says_where_it_is_less_and_less_often(impatient, capsys):
    with asked_for("this"):
        time.sleep(1.0)
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith(f"note: this takes 0 s so far; it is at {__file__}:")
    assert "(test_it_says_where_it_is_less_and_less_often)" in first
    assert len(others) == 3  # after 0.2, 0.4 and 0.8
    assert not any(thread.name == "patience" for thread in threading.enumerate())


def test_what_is_soon_done_says_nothing(capsys):
    with asked_for("this"):
        pass
    assert capsys.readouterr().err == ""


def test_opening_data_says_what_it_waits_for(toys, impatient, monkeypatch):
    data = importlib.import_module("selfsup.plugins.services.data")
    slow = eval("lambda spec: sleep(0.5) or split(spec)", {"sleep": time.sleep, "split": data.split_weight})
    monkeypatch.setattr(data, "split_weight", slow)  # a line that is of no file here
    (toys.folder / "d").mkdir()
    (toys.folder / "d" / "1.num").write_text("1")
    _, err = toys("train", "--plugin", "guess", "--data", "d", "--batch", "1", "--steps", "1")
    assert err.startswith("note: making this run ready, before its first step, takes ")
    assert f"called at {data.__file__}:" in err
    assert "If that stands still, Ctrl-C ends it" in err


def test_one_that_waits_for_others_leaves_it_to_them(impatient, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "world", lambda: time.sleep(0.5) or 1)
    monkeypatch.setattr(patience, "OURS", Path(distributed.__file__).parent)
    with asked_for("this"):
        distributed.barrier()
    assert capsys.readouterr().err == ""
