"""The table, the file and what is said of the machine."""

import json
import math

import pytest
import torch

from selfsup.cli import bench_show as show
from selfsup.cli.bench_case import Case
from selfsup.cli.bench_measure import Ceilings, Times
from selfsup.cli.bench_run import Result, Row

CPU = torch.device("cpu")


@pytest.fixture
def result():
    case = Case("square", "N=4", lambda draw: [], lambda op: op, products=((10, 10, 10),), least=100)
    rows = [
        Row("ours", error=1e-7, times=Times(2.0, 1.9, 2.1, 5), memory=2**20),
        Row("eager", error=2e-7, times=Times(5.0, 4.0, 6.0, 5), replay=4.0, memory=2**22),
        Row("bad", "wrong", "wrong by inf, at most 1e-3 is right; not timed", error=math.inf),
        Row("gone", "absent", "ImportError: none"),
        Row("lost", "absent", "ImportError: none"),
    ]
    return Result(case, rows, floor=1.0)


def test_figures_stand_beside_each_other(result, capsys):
    show.say(result, timed=True)
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    assert lines["ours"] == ["ours", "1.0e-07", "2", "5%", "1", "50%", "1"]
    assert lines["eager"] == ["eager", "2.0e-07", "5", "20%", "4", "2.5", "25%", "4"]
    assert "bad: wrong by inf" in out
    assert "gone; lost: absent: ImportError: none" in out


def test_without_times_there_are_errors_alone(result, capsys):
    show.say(result, timed=False)
    out = capsys.readouterr().out
    assert "ms" not in out.split()
    assert "1.0e-07" in out


def test_the_file_is_plain_json(result, tmp_path):
    about = show.about(CPU, torch.float32, "small", Ceilings(1e12, 1e11))
    show.write(tmp_path / "new", about, [result])
    found = json.loads((tmp_path / "new" / "ops.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["dtype"] == "float32"
    assert found["ceilings"] == {"flops": 1e12, "bytes": 1e11}
    assert found["versions"]["torch"]
    (case,) = found["cases"]
    assert case["floor"] == {"flops": 2000, "bytes": 100, "ms": 1.0}
    assert [row["error"] for row in case["rows"]] == [1e-7, 2e-7, None, None, None]
    assert [row["of_floor"] for row in case["rows"]] == [0.5, 0.25, None, None, None]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["ops.json"]


def test_a_cpu_is_said_to_be_one(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    said = show.opening(show.about(CPU, torch.float32, "full", None))
    assert "These are figures of a CPU. They say nothing about the speed of a GPU." in said
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    said = show.opening(show.about(CPU, torch.float32, "full", None))
    assert "nothing is timed" in said


def test_nothing_timed_is_nothing_drawn(result, tmp_path):
    result.rows = result.rows[2:]
    assert "ops.png" not in show.drawn(tmp_path, {}, [result])


def test_at_the_end_there_is_a_line_for_each_case(result, capsys):
    bare = Row("bare products", times=Times(0.1, 0.1, 0.1, 5))
    quick = Row("ours, capacity", times=Times(1.0, 1.0, 1.0, 5), memory=2**20)
    both = Result(result.case, [*result.rows, bare, quick], floor=0.5)
    show.close([result, both, Result(result.case, [Row("ours", "wrong", "by 1")])])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "square" in line]
    assert lines == [
        ["square", "N=4", "2", "50%", "eager", "2", "4"],
        ["square", "N=4", "1", "50%", "eager", "4", "4"],
        ["square", "N=4", "wrong"],
    ]
