"""Charts: round ticks, honest smoothing, gaps where there is nothing, and a size that does not grow with the run."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from selfsup.plugins.common import charts
from selfsup.plugins.common.charts import line_chart, scatter, short, smoothed, span, ticks, wave


def drawn(chart, kind):
    """The attribute d of the path of this class."""
    (path,) = (node for node in ET.fromstring(chart).iter("path") if node.get("class") == kind)
    return path.get("d")


def points(path):
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.replace("h.1", ""))]
    return np.array(numbers).reshape(-1, 2)


@pytest.mark.parametrize("low", [-3.2, 0.0, 0.01, 250.0])
@pytest.mark.parametrize("reach", [1e-6, 0.3, 1.0, 9.9, 4e5])
def test_ticks_are_few_round_and_within(low, reach):
    found = ticks(low, low + reach)
    assert 2 <= len(found) <= 7
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-4)
    assert f"{steps[0]:.0e}"[0] in "125"
    assert low - 1e-9 * reach <= found[0]
    assert found[-1] <= low + reach * (1 + 1e-9)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (1234, "1234"), (12500, "12.5k"), (2e6, "2M"), (-3e9, "-3G"), (1.2e-4, "1.2e-4")],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_smoothing_keeps_what_is_straight_and_takes_the_noise():
    steps = np.arange(1000.0)
    np.testing.assert_allclose(smoothed(steps, np.full(1000, 3.0))[1], 3)
    at, line = smoothed(steps, 2 * steps)
    inner = (at > 100) & (at < 900)
    np.testing.assert_allclose(line[inner], 2 * at[inner], atol=0.01)
    noise = np.random.default_rng(0).normal(size=1000)
    # A Gaussian of width s leaves 1 / sqrt(2 s sqrt(pi)) of white noise: s = 20 steps, 0.119.
    assert smoothed(steps, noise)[1][20:-20].std() == pytest.approx(0.119, rel=0.35)


def test_a_few_extremes_do_not_flatten_the_axis():
    values = np.linspace(1, 2, 1000)
    assert span(values)[2] == 0
    values[0] = 1e6
    low, high, beyond = span(values)
    assert (low > 0.9, high < 2.2, beyond) == (True, True, 1)
    assert span(np.array([1.0, 1e6]))[1] > 1e6  # of two values none is extreme


def test_values_are_where_the_axes_say():
    chart = line_chart("loss", [0, 10, 20], [1.0, 3.0, 2.0])
    (x0, y0), (x1, y1), (x2, y2) = points(drawn(chart, "line"))
    assert (x0, x2) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert x1 == (x0 + x2) / 2
    assert charts.TOP < y1 < y2 < y0 < charts.HEIGHT - charts.BOTTOM
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert "<b>2</b>" in chart


def test_what_is_not_finite_is_a_gap_and_is_counted():
    values = [1.0] * 50 + [None] * 3 + [2.0] * 50
    chart = line_chart("loss", range(103), values)
    assert drawn(chart, "raw").count("M") == 2
    assert "3 values are not finite" in chart
    assert chart.count('class="bad"') == 3
    assert "none of 2 values is finite" in line_chart("loss", [0, 1], [None, None])
    assert "nan" not in chart.lower()


def test_values_beyond_the_axis_are_said():
    assert "1 of 200 values lie beyond" in line_chart("x", range(200), [1e9, *np.linspace(0, 1, 199)])
    assert "beyond" not in line_chart("x", range(199), [1e9, *np.linspace(0, 1, 198)])


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [0.0, 1e-30], [1e30, -1e30], list(range(200))])
def test_every_curve_has_a_chart(values):
    chart = line_chart("x", range(len(values)), values)
    ET.fromstring(chart)
    found = points(drawn(chart, "line"))
    assert np.isfinite(found).all()
    assert found.min() >= 0


def test_the_size_is_bounded():
    rng = np.random.default_rng(0)
    long = line_chart("loss", range(200_000), rng.normal(size=200_000).tolist())
    assert len(long) < 25_000
    assert len(points(drawn(long, "raw"))) == 2 * charts.COLUMNS
    holes = [None if i % 2 else 1.0 for i in range(200_000)]
    assert len(line_chart("loss", range(200_000), holes)) < 40_000
    assert len(line_chart("online/knn", range(20_000), rng.normal(size=20_000).tolist(), smooth=False)) < 25_000


def test_names_are_escaped():
    for chart in (line_chart("<b>&", [0], [1.0]), scatter('<b>&"', np.zeros((3, 2)), [0, 1, -1])):
        assert "<b>&" not in chart.replace("<b>1", "")
        ET.fromstring(chart)


def test_a_wave_has_bands_where_there_is_nothing():
    curve = np.sin(np.arange(3200) / 9)
    curve[800:1600] = np.nan
    picture = ET.fromstring(wave(curve, columns=320))
    (gap,) = picture.iter("rect")
    assert (float(gap.get("x")), float(gap.get("width"))) == (80, 80)
    (path,) = picture.iter("path")
    assert path.get("d").count("M") == 2
    ET.fromstring(wave(np.full(5, np.nan)))
    assert len(wave(np.random.default_rng(0).normal(size=10**6))) < 10_000


def test_few_values_are_bars_from_zero():
    (path,) = ET.fromstring(wave(np.array([0.0, 1.0, np.nan, 0.5]), columns=80, height=56)).iter("path")
    assert re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)h", path.get("d")) == [
        ("0.0", "54.0", "54.0"),
        ("20.0", "54.0", "2.0"),
        ("60.0", "54.0", "28.0"),
    ]


def test_points_keep_their_distances():
    places = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 5.0]])
    chart = ET.fromstring(scatter("t", places, [0, 1, -1], side=300))
    dots = [(float(c.get("cx")), float(c.get("cy")), c.get("class")) for c in chart.iter("circle")]
    assert [kind for *_, kind in dots] == ["hue-0", "hue-1", "hue"]
    (ax, ay, _), (bx, by, _), (cx, cy, _) = dots
    assert (bx - ax, by - ay) == (284, 0)
    assert (cx - ax, ay - cy) == (0, 142)
    ET.fromstring(scatter("t", np.zeros((4, 2)), [-1] * 4))
