"""The chart is a picture with a bar for each that was timed."""

import pytest

from selfsup.cli.bench_case import Case
from selfsup.cli.bench_measure import Times
from selfsup.cli.bench_run import Result, Row

pytest.importorskip("matplotlib")


def test_bars_and_times_are_drawn(tmp_path, monkeypatch):
    from selfsup.cli import bench_chart

    texts = []
    true = bench_chart._bar

    def bar(axis, place, result, row):
        true(axis, place, result, row)
        texts.extend(text.get_text() for text in axis.texts[-2:])
        assert axis.patches[-1].get_width() == pytest.approx({"ours": 0.5, "eager": 0.25, "quick": 1.1}[row.name])

    monkeypatch.setattr(bench_chart, "_bar", bar)
    case = Case("square", "N=4", lambda draw: [], lambda op: op)
    rows = [
        Row("ours", times=Times(2.0, 2.0, 2.0, 5)),
        Row("eager", times=Times(5.0, 4.0, 6.0, 5), replay=4.0),
        Row("quick", times=Times(0.1, 0.1, 0.1, 5)),
        Row("gone", "absent", "none"),
    ]
    about = {"gpu": False, "device": "CPU", "dtype": "float32", "ceilings": {"flops": 1e12, "bytes": 1e11}}
    bench_chart.draw(tmp_path / "ops.png", about, [Result(case, rows, floor=1.0)])
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    assert texts == ["2 ms", "ours", "4 ms in a graph", "eager", "0.1 ms", "quick"]
